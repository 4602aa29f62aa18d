"""Peak memory of this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

_KIB = 1024
_RESET_PEAK = "5"  # see proc_pid_clear_refs(5)


def peak_extra_bytes(action: Callable[[], object]) -> int:
    """Run something, and return by how many bytes at most the process was larger meanwhile.

    Pages of files in the page cache do not count, those that are mapped do.
    """
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK, encoding="ascii")
    before = _status("VmRSS")
    action()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * _KIB
    raise LookupError(f"/proc/self/status has no {name}")
