"""Any fsspec file system that has no module of its own here."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from typing import Protocol, cast

from fsspec import AbstractFileSystem

from distckpt.errors import StoreError, without_secrets
from distckpt.store.base import Buffer, Sink, partial_name, translated

# Object stores have no directories; asking them to make one can even fail.
_WITHOUT_DIRECTORIES = frozenset({"gs", "gcs", "abfs", "abfss", "az", "http", "https"})
# memory:// looks whether an object is there, and then creates it: two threads can both win.
_MEMORY = threading.Lock()
# Below this an object is put whole, above it goes in parts.
_WHOLE_BYTES = 64 << 20


class FsspecStore:
    """Objects of any fsspec file system: whole-object puts, large ones in parts, ranged reads.

    Args:
        file_system: The file system.
        root: Path of the namespace in it.
        url: The same as a URL.
    """

    def __init__(self, file_system: AbstractFileSystem, root: str, url: str) -> None:
        self._fs = file_system
        self._root = root.rstrip("/")
        self._url = url
        protocols = file_system.protocol
        names = {protocols} if isinstance(protocols, str) else set(protocols)
        self._has_directories = not names & _WITHOUT_DIRECTORIES
        self._is_memory = "memory" in names
        self._one_at_a_time = _MEMORY if self._is_memory else nullcontext()

    @property
    def url(self) -> str:
        """The URL, without what may be secret in it."""
        return without_secrets(self._url)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _where(self, name: str) -> str:
        return f"{self._url.rstrip('/')}/{name}"

    def _make_parent(self, path: str) -> None:
        if self._has_directories:
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)

    def create(self, name: str, length_bytes: int) -> Sink:
        """See `Store`."""
        path, where = self._path(name), self._where(name)
        with translated(where, writes=True):
            self._make_parent(path)
            if self._is_memory or length_bytes <= _WHOLE_BYTES:
                return _WholeSink(self._fs, path, where)
            if self._has_directories:
                return _MovedSink(self._fs, path, where)
            return _StreamedSink(self._fs, path, where)

    def put(self, name: str, data: bytes, *, replace: bool) -> None:
        """See `Store`."""
        where = self._where(name)
        if not replace and type(self._fs).__module__.partition(".")[0] == "obstore":
            raise StoreError(
                f"{where}: obstore's adapter, which is registered for this URL with fsspec, does "
                "not create exclusively, so that two saves could both commit; register another, or "
                "save with overwrite=True",
                url=where,
                refused=True,
            )
        with translated(where, writes=True), self._one_at_a_time:
            self._make_parent(self._path(name))
            self._fs.pipe_file(self._path(name), data, mode="overwrite" if replace else "create")

    def read_into(self, name: str, start_byte: int, buffer: memoryview) -> None:
        """See `Store`."""
        if not len(buffer):
            return
        stop = start_byte + len(buffer)
        with translated(self._where(name)):
            data = self._fs.cat_file(self._path(name), start=start_byte, end=stop)
            if len(data) < len(buffer):
                raise EOFError(
                    f"{self._where(name)}: bytes {start_byte}:{stop} were asked for, {len(data)} "
                    "came"
                )
            if len(data) > len(buffer):
                raise StoreError(
                    f"{self._where(name)}: bytes {start_byte}:{stop} were asked for, {len(data)} "
                    "came: this server ignores ranges",
                    url=self._where(name),
                )
            buffer[:] = data

    def size(self, name: str) -> int:
        """See `Store`."""
        with translated(self._where(name)):
            self._fs.invalidate_cache(self._root)
            return int(self._fs.info(self._path(name))["size"])

    def modified(self, name: str) -> float | None:
        """See `Store`."""
        with translated(self._where(name)):
            self._fs.invalidate_cache(self._root)
            try:
                when = cast("datetime", self._fs.modified(self._path(name)))
            except NotImplementedError:
                return None
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()

    def names(self, prefix: str = "") -> list[str]:
        """See `Store`."""
        path = self._path(prefix).rstrip("/")
        with translated(self._where(prefix)):
            self._fs.invalidate_cache(self._root)
            try:
                found = cast("list[str]", self._fs.ls(path, detail=False))
            except (FileNotFoundError, NotADirectoryError):
                return []
        # Of what is no directory, some file systems list the object itself.
        below = (name.rstrip("/") for name in found if name.rstrip("/") != path)
        return sorted(name.rpartition("/")[2] for name in below)

    def delete(self, names: Sequence[str]) -> None:
        """See `Store`. A group's directory that becomes empty goes, too; the store's own stays."""
        for name in names:
            absent = suppress(FileNotFoundError, NotADirectoryError)
            with translated(self._where(name)), absent:
                self._fs.rm_file(self._path(name))
        if self._has_directories:
            parents = {self._path(name).rpartition("/")[0] for name in names}
            for parent in sorted(parents - {self._root}):
                with suppress(OSError, NotImplementedError):
                    self._fs.rmdir(parent)


class _WholeSink:
    """An object that is collected, and put at once."""

    def __init__(self, fs: AbstractFileSystem, path: str, where: str) -> None:
        self._fs, self._path, self._where = fs, path, where
        self._data = bytearray()

    def write_at(self, offset_bytes: int, data: Buffer) -> None:
        del offset_bytes  # offsets rise without gaps
        self._data += data

    def commit(self) -> None:
        with translated(self._where, writes=True):
            self._fs.pipe_file(self._path, bytes(self._data))

    def abort(self) -> None:
        self._data.clear()


class _File(Protocol):
    def write(self, data: Buffer) -> int: ...
    def close(self) -> None: ...


class _StreamedSink:
    """An object of a store that shows it only when it is whole."""

    def __init__(self, fs: AbstractFileSystem, path: str, where: str) -> None:
        self._where = where
        self._file: _File = fs.open(path, "wb")

    def write_at(self, offset_bytes: int, data: Buffer) -> None:
        del offset_bytes  # offsets rise without gaps
        with translated(self._where, writes=True):
            self._file.write(data)

    def commit(self) -> None:
        with translated(self._where, writes=True):
            self._file.close()

    def abort(self) -> None:
        # What the base class of such files has is a no-op, or fails where nothing was begun.
        with suppress(OSError, NotImplementedError, ValueError, AttributeError):
            getattr(self._file, "discard")()  # noqa: B009  not all files have it


class _MovedSink:
    """A file of a file system with directories, under a temporary name until it is whole."""

    def __init__(self, fs: AbstractFileSystem, path: str, where: str) -> None:
        self._fs, self._path, self._where = fs, path, where
        self._partial = partial_name(path)
        self._file: _File = fs.open(self._partial, "wb")

    def write_at(self, offset_bytes: int, data: Buffer) -> None:
        del offset_bytes  # offsets rise without gaps
        with translated(self._where, writes=True):
            self._file.write(data)

    def commit(self) -> None:
        with translated(self._where, writes=True):
            self._file.close()
            self._fs.mv(self._partial, self._path)

    def abort(self) -> None:
        with suppress(OSError, NotImplementedError, ValueError):
            self._file.close()
            self._fs.rm_file(self._partial)
