"""What no input may do, whoever made it; and a watch that says when one does."""

from __future__ import annotations

import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import repeat

from distckpt import CheckpointError
from distckpt.testing import MemoryStore

# What a reader of bytes in memory has no reason to do. `import` is only told of modules that are
# not there yet: one input of each kind must have been read before.
_FORBIDDEN = ("ctypes.", "ftplib.", "http.", "marshal.", "os.", "pickle.", "shutil.", "socket.",
              "subprocess.", "tempfile.", "urllib.", "winreg.")  # fmt: skip
# What a lap takes on a quiet machine. A busy or slow one has more time in the same proportion.
_LAP_S = 0.003
_FORBIDDEN_EVENTS = frozenset({"code.__new__", "compile", "exec", "import", "open", "pty.spawn"})


class Violation(Exception):
    """An input has broken a promise. No CheckpointError, so that nothing takes it for one."""


class _Watch:
    """What was done that is forbidden, while somebody looks."""

    def __init__(self) -> None:
        self.armed = False
        self.seen: list[str] = []
        self._hooked = False

    def hook(self) -> None:
        if not self._hooked:  # a hook stays for the life of the process
            sys.addaudithook(self._told)
            self._hooked = True

    def _told(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.armed and (event in _FORBIDDEN_EVENTS or event.startswith(_FORBIDDEN)):
            self.armed = False  # what the report does is no matter
            self.seen.append(f"{event}{arguments!r:.200}")
            raise Violation(self.seen[-1])


_WATCH = _Watch()


class GuardedStore(MemoryStore):
    """A store in memory that is asked for nothing but what lies under one name.

    Args:
        root: That name; all objects are it, or lie in it as in a folder.
        objects: Name → content.
    """

    def __init__(self, root: str, objects: dict[str, bytes]) -> None:
        super().__init__()
        self._root = root
        self.objects.update(objects)

    def _check(self, name: str) -> None:
        beside = name.rstrip("/").startswith(self._root)  # such as "<root>.index", when sniffing
        if not beside or {"..", "."} & set(name.split("/")) or "\\" in name or "\0" in name:
            _WATCH.seen.append(f"asked the store for {name!r:.200}")
            raise Violation(_WATCH.seen[-1])

    def size(self, name):
        self._check(name)
        return super().size(name)

    def read_into(self, name, start_byte, buffer):
        self._check(name)
        if start_byte < 0:
            _WATCH.seen.append(f"asked for byte {start_byte}")
            raise Violation(_WATCH.seen[-1])
        super().read_into(name, start_byte, buffer)

    def names(self, prefix=""):
        self._check(prefix)
        return super().names(prefix)

    def put(self, name, data, *, replace):
        raise Violation(f"wrote {name!r:.200}")

    def delete(self, names):
        raise Violation(f"deleted {names!r:.200}")


def run_lap() -> None:
    """Do the work that others are measured by; it takes no memory, which would be traced."""
    for _ in repeat(None, 500_000):
        pass


def _lap_s() -> float:
    begun = time.thread_time()
    run_lap()
    return time.thread_time() - begun


@contextmanager
def watched(limit_bytes: int, limit_s: float) -> Iterator[None]:
    """Hold a reader to the promises: what it raises, does, and takes of memory and time.

    A CheckpointError, and FileNotFoundError for what is not there, end the block in silence.

    Args:
        limit_bytes: Memory that it may take at any moment, beyond what there was.
        limit_s: Processor time that it may take on a quiet machine: 333 laps a second.

    Raises:
        Violation: It did something forbidden, or took more.
        Exception: What it raised, if that is no CheckpointError.
    """
    _WATCH.hook()
    _WATCH.seen.clear()
    tracing = tracemalloc.is_tracing()
    if not tracing:
        tracemalloc.start()
    tracemalloc.reset_peak()
    before, begun = tracemalloc.get_traced_memory()[0], time.thread_time()
    _WATCH.armed = True
    try:
        with suppress(CheckpointError, FileNotFoundError):
            yield
    finally:
        _WATCH.armed = False
        taken, peak = time.thread_time() - begun, tracemalloc.get_traced_memory()[1] - before
        if not tracing:
            tracemalloc.stop()
        if _WATCH.seen:
            raise Violation(_WATCH.seen[0])
    if peak > limit_bytes:
        raise Violation(f"{peak} bytes of memory; {limit_bytes} are allowed")
    if taken > limit_s and taken > limit_s * _lap_s() / _LAP_S:
        raise Violation(f"{taken:.1f} s; {limit_s} are allowed")
