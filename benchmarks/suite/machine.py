"""What is to be known of the machine that measures."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import distckpt

_LIBRARIES = (
    "numpy",
    "mpi4py",
    "mpich",
    "torch",
    "torchsnapshot",
    "orbax-checkpoint",
    "jax",
    "safetensors",
)


def describe(places: Mapping[str, str]) -> dict[str, object]:
    """Describe the machine; neither its name nor where anything lies.

    Args:
        places: Name of a place → a folder there.
    """
    found = {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processor": _field("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory": f"{int(_field('/proc/meminfo', 'MemTotal').split()[0]) / 2**20:.0f} GiB",
        "places": {name: _file_system(folder) for name, folder in places.items()},
        "python": platform.python_version(),
        "distckpt": distckpt.__version__,
    }
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "unknown"


def _file_system(folder: str) -> str:
    """Return the kind of file system that a folder is on."""
    kind, longest = "unknown", -1
    where = Path(folder).resolve()
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, mounted, found, *_ = line.split()
        if len(mounted) > longest and where.is_relative_to(mounted):
            kind, longest = found, len(mounted)
    return kind
