"""The operating system's calls for files below a folder, watched and made to fail."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from distckpt.store import Buffer
from distckpt.testing.faults import Fault, Faults, Operation

# The calls that change files, by what they are called in points. What several names of the `os`
# module do is one kind.
_BY_DESCRIPTOR = {
    "pwrite": "os.write",
    "write": "os.write",
    "pwritev": "os.write",
    "writev": "os.write",
    "ftruncate": "os.truncate",
    "posix_fallocate": "os.allocate",
    "fsync": "os.fsync",
    "fdatasync": "os.fsync",
}
_BY_PATH = {
    "mkdir": "os.mkdir",
    "rmdir": "os.rmdir",
    "unlink": "os.unlink",
    "remove": "os.unlink",
    "rename": "os.rename",
    "replace": "os.rename",
    "link": "os.link",
}
_OPENED_ANEW = os.O_CREAT | os.O_TRUNC


@dataclass(slots=True)
class FileCall(Operation):
    """One call to the operating system.

    Attributes:
        source: The old name, of a rename and a link; its new one is `name`.
        offset_bytes: Where a write begins; None where the file's position says so. The new length,
            of a truncation.
        descriptor: Of an open file.
    """

    source: str | None = None
    offset_bytes: int | None = None
    descriptor: int = -1


class WatchedFiles:
    """A context in which this process's calls that change files below a folder can be seen.

    Those of all its threads, made through the `os` module; not what C code does by itself, such as
    the built-in `open`. One folder at a time.
    Kinds: ``os.open`` (of a new file), ``os.write``, ``os.truncate``, ``os.allocate``,
    ``os.fsync`` (also of a directory), ``os.rename``, ``os.link``, ``os.unlink``, ``os.mkdir``,
    ``os.rmdir``. Names are relative to the folder, whose own is ``.``; that of a rename is the
    final one.

    Args:
        folder: The folder; what is in its parent is not watched.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = os.path.abspath(os.fspath(folder))
        self._open: dict[int, str] = {}
        self._originals = ExitStack()

    def perform(self, call: FileCall, do: Callable[[], None]) -> None:
        """Do a call; what derives from this does more."""
        del call
        do()

    def forget(self, descriptor: int) -> None:
        """Be told that a descriptor is being closed, after which another file may get it."""

    def __enter__(self) -> Self:
        if hasattr(os.open, "watched_by"):
            raise RuntimeError("this process's files are being watched already")
        self._replace("open", self._wrap_open(os.open))
        self._replace("close", self._wrap_close(os.close))
        for name, kind in _BY_DESCRIPTOR.items():
            self._replace(name, self._wrap_descriptor(getattr(os, name), name, kind))
        for name, kind in _BY_PATH.items():
            self._replace(name, self._wrap_path(getattr(os, name), kind))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._originals.close()

    def _replace(self, name: str, function: Callable[..., Any]) -> None:
        self._originals.callback(setattr, os, name, getattr(os, name))
        setattr(os, name, function)

    def _below(self, path: object) -> str | None:
        """Name of a path relative to the folder; None if it is elsewhere."""
        if not isinstance(path, str | os.PathLike):
            return None
        whole = os.path.abspath(os.fspath(path))
        if whole != self.folder and not whole.startswith(self.folder + os.sep):
            return None
        return os.path.relpath(whole, self.folder)

    def _call(self, call: FileCall, real: Callable[[], object]) -> object:
        def do() -> None:
            call.result = real()

        self.perform(call, do)
        return call.result

    def _wrap_open(self, real: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(real)
        def opened(path: Any, flags: int, *args: Any, **keywords: Any) -> int:
            name = self._below(path)
            if name is None:
                return real(path, flags, *args, **keywords)
            if flags & _OPENED_ANEW:
                call = FileCall("os.open", name)
                self._call(call, lambda: self._noted(real(path, flags, *args, **keywords), call))
                return call.descriptor
            return self._noted(real(path, flags, *args, **keywords), FileCall("os.open", name))

        opened.watched_by = self  # type: ignore[attr-defined]
        return opened

    def _noted(self, descriptor: int, call: FileCall) -> int:
        self._open[descriptor] = call.name
        call.descriptor = descriptor
        return descriptor

    def _wrap_close(self, real: Callable[[int], None]) -> Callable[[int], None]:
        @functools.wraps(real)
        def close(descriptor: int) -> None:
            self._open.pop(descriptor, None)
            self.forget(descriptor)
            real(descriptor)

        return close

    def _wrap_descriptor(
        self, real: Callable[..., Any], name: str, kind: str
    ) -> Callable[..., Any]:
        vector = name.endswith("v")

        @functools.wraps(real)
        def on_descriptor(descriptor: Any, *args: Any) -> Any:
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            path = self._open.get(number)
            if path is None:
                return real(descriptor, *args)
            call = FileCall(kind, path, descriptor=number)
            if kind != "os.write":
                call.offset_bytes = sum(args) if args else None
                return self._call(call, lambda: real(descriptor, *args))
            call.data = b"".join(args[0]) if vector else args[0]
            call.offset_bytes = args[1] if name.startswith("p") else None

            def write() -> Any:
                data: Buffer = call.data if call.data is not None else b""
                return real(descriptor, [data] if vector else data, *args[1:])

            # A write that was lost says that all of it was done.
            call.result = len(memoryview(args[0]).cast("B")) if not vector else len(call.data)
            return self._call(call, write)

        return on_descriptor

    def _wrap_path(self, real: Callable[..., Any], kind: str) -> Callable[..., Any]:
        renames = kind in {"os.rename", "os.link"}

        @functools.wraps(real)
        def on_path(path: Any, *args: Any, **keywords: Any) -> Any:
            source = self._below(path)
            name = self._below(args[0]) if renames else source
            if source is None or name is None:
                return real(path, *args, **keywords)
            call = FileCall(kind, name, source=source if renames else None)
            return self._call(call, lambda: real(path, *args, **keywords))

        return on_path


class FaultyFiles(WatchedFiles):
    """A context in which chosen calls that change files below a folder go wrong.

    Args:
        folder: As in `WatchedFiles`, and so are the kinds of operations.
        faults: What goes wrong.
        rank: Whose process this is, for faults of some ranks only.

    Attributes:
        operations: What was asked for so far, as (kind, name).
    """

    def __init__(
        self, folder: str | os.PathLike[str], faults: Sequence[Fault] = (), *, rank: int = 0
    ) -> None:
        super().__init__(folder)
        self._faults = Faults(faults, rank)
        self._lock = threading.Lock()
        self.operations: list[tuple[str, str]] = []

    def perform(self, call: FileCall, do: Callable[[], None]) -> None:
        """See `WatchedFiles`."""
        with self._lock:
            self.operations.append((call.kind, call.name))
        self._faults.perform(call, do)


def contents(folder: str | os.PathLike[str]) -> dict[str, bytes | None]:
    """Read all that lies below a folder: relative name → content; None for a directory."""
    root = Path(folder)
    return {
        str(path.relative_to(root)): None if path.is_dir() else path.read_bytes()
        for path in sorted(root.rglob("*"))
    }
