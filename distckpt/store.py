"""Where checkpoints lie: fsspec's only door, and the fast path for local files.

A `Store` is a flat namespace of objects under one URL. Names use ``/`` to group them. Local
directories are served with the system's own calls, because durability needs fsync of files and of
directories, which fsspec's local file system never does; every other URL goes through fsspec.
"""

from __future__ import annotations

import errno
import os
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from distckpt.errors import CheckpointError, StoreError

Buffer = memoryview | bytes

# Object stores have no directories; asking them to make one can even fail.
_WITHOUT_DIRECTORIES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "http", "https"})
# memory:// looks whether an object is there, and then creates it: two threads can both win.
_MEMORY = threading.Lock()


class Sink(Protocol):
    """A new object being written. It isn't visible under its name before `commit`."""

    def write_at(self, offset_bytes: int, data: Buffer) -> None:
        """Write at an offset; offsets rise without gaps."""

    def commit(self) -> None:
        """Make the object durable, then visible."""

    def abort(self) -> None:
        """Give the object up; never raises."""


@runtime_checkable
class Store(Protocol):
    """A flat namespace of objects under one URL.

    Absence is an answer, so reading raises `FileNotFoundError`, and writing `FileExistsError`;
    every other failure is a `StoreError`. Not collective; several threads use a store at once.
    """

    @property
    def url(self) -> str:
        """Where it is, for messages."""

    def create(self, name: str, length_bytes: int) -> Sink:
        """Begin a new object; a name is never created twice.

        Args:
            name: Its name.
            length_bytes: How long it will be.

        Returns:
            Takes its content; nothing is visible before `Sink.commit`.

        Raises:
            StoreError: It can't be begun.
        """

    def put(self, name: str, data: bytes, *, replace: bool) -> None:
        """Write a whole object atomically and durably: all of it or nothing is visible, ever.

        Raises:
            FileExistsError: It exists and `replace` is False. Of two that race, exactly one
                succeeds.
            StoreError: Anything else; whether the object is there must then be looked up.
        """

    def read_into(self, name: str, start_byte: int, buffer: memoryview) -> None:
        """Fill a buffer from an object.

        Args:
            name: The object.
            start_byte: First byte to read.
            buffer: Writable bytes; its length says how many to read.

        Raises:
            FileNotFoundError: No such object.
            EOFError: It ends before the buffer is full.
        """

    def size(self, name: str) -> int:
        """Length of an object in bytes, read from the store and not from a cache.

        Raises:
            FileNotFoundError: No such object.
        """

    def names(self, prefix: str = "") -> list[str]:
        """List what lies directly under a prefix, sorted; empty where nothing does.

        Args:
            prefix: Empty, or ends with ``/``; it is no part of the names returned.
        """

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects for good; those that are gone already are fine."""


def open_store(
    url: str | os.PathLike[str] | Store, *, storage_options: Mapping[str, object] | None = None
) -> Store:
    """Open the store at a URL. Nothing is made or contacted yet.

    Args:
        url: A path, or any URL that fsspec knows; a `Store` is returned as it is.
        storage_options: Passed to the fsspec file system.

    Returns:
        A `LocalStore` for a local path, else an `FsspecStore`.

    Raises:
        StoreError: An unknown scheme, or one whose library isn't installed.
    """
    if isinstance(url, Store):
        return url
    text = os.fspath(url)
    try:
        file_system, path = fsspec.core.url_to_fs(text, **dict(storage_options or {}))
    except (ValueError, ImportError, OSError) as exc:
        raise StoreError(f"{text}: can't open this URL: {exc}", url=text) from exc
    if type(file_system) is LocalFileSystem:
        return LocalStore(Path(path).absolute())
    return FsspecStore(file_system, path, text)


class PrefixStore:
    """The objects of another store whose names begin with a prefix, such as one step's of a run.

    Args:
        store: The other store.
        prefix: The prefix, without the ``/`` that follows it.
    """

    def __init__(self, store: Store, prefix: str) -> None:
        self._store = store
        self._prefix = prefix + "/"

    @property
    def url(self) -> str:
        """Where it is."""
        return f"{self._store.url.rstrip('/')}/{self._prefix[:-1]}"

    def create(self, name: str, length_bytes: int) -> Sink:
        """See `Store`."""
        return self._store.create(self._prefix + name, length_bytes)

    def put(self, name: str, data: bytes, *, replace: bool) -> None:
        """See `Store`."""
        self._store.put(self._prefix + name, data, replace=replace)

    def read_into(self, name: str, start_byte: int, buffer: memoryview) -> None:
        """See `Store`."""
        self._store.read_into(self._prefix + name, start_byte, buffer)

    def size(self, name: str) -> int:
        """See `Store`."""
        return self._store.size(self._prefix + name)

    def names(self, prefix: str = "") -> list[str]:
        """See `Store`."""
        return self._store.names(self._prefix + prefix)

    def delete(self, names: Sequence[str]) -> None:
        """See `Store`."""
        self._store.delete([self._prefix + name for name in names])


def read_object(store: Store, name: str, *, limit_bytes: int = 1 << 31) -> bytes:
    """Read a whole object.

    Raises:
        FileNotFoundError: No such object.
        StoreError: It is larger than the limit, or changed while it was read.
    """
    size = store.size(name)
    if size > limit_bytes:
        raise StoreError(
            f"{store.url}/{name}: {size} bytes are more than any such object has", url=store.url
        )
    buffer = bytearray(size)
    try:
        store.read_into(name, 0, memoryview(buffer))
    except EOFError as exc:
        raise StoreError(
            f"{store.url}/{name}: it became shorter while it was read", url=store.url
        ) from exc
    return bytes(buffer)


@contextmanager
def _translated(where: str, *, writes: bool = False) -> Iterator[None]:
    """Turn the foreign errors of a store into StoreError.

    Absence passes, but not in writing: there it means that the parent can't be made. What would lie
    below a file is absent.
    """
    try:
        yield
    except (FileExistsError, EOFError, CheckpointError):
        raise
    except (FileNotFoundError, NotADirectoryError) as exc:
        if writes:
            raise StoreError(f"{where}: {exc}", url=where) from exc
        if isinstance(exc, FileNotFoundError):
            raise
        raise FileNotFoundError(exc.errno, exc.strerror, where) from exc
    except OSError as exc:
        raise StoreError(f"{where}: {exc}", url=where) from exc
    except (ValueError, NotImplementedError, RuntimeError) as exc:
        raise StoreError(f"{where}: {type(exc).__name__}: {exc}", url=where) from exc


# --- local files ----------------------------------------------------------------------------------


class LocalStore:
    """Objects as files below a directory, durable against power loss.

    Args:
        root: The directory; made with the first object.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def url(self) -> str:
        """The directory."""
        return str(self._root)

    def create(self, name: str, length_bytes: int) -> Sink:
        """See `Store`."""
        path = self._root / name
        with _translated(str(path), writes=True):
            return _LocalSink(path, length_bytes)

    def put(self, name: str, data: bytes, *, replace: bool) -> None:
        """See `Store`. Created by `link`, replaced by `rename`: both are atomic."""
        path = self._root / name
        # Not the final name plus a fixed ending: two jobs may be writing at once.
        partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
        with _translated(str(path), writes=True):
            try:
                descriptor = _create_exclusively(partial)
                try:
                    _write_all(descriptor, 0, data)
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                if replace:
                    partial.replace(path)
                else:
                    try:
                        os.link(partial, path)
                    except OSError as exc:
                        if exc.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                            raise
                        raise StoreError(
                            f"{path}: this file system has no hard links, which a first commit "
                            "needs; save with overwrite=True, or to another file system",
                            url=str(path),
                        ) from exc
                _sync_directory(path.parent)
            finally:
                with suppress(OSError):
                    partial.unlink()

    def read_into(self, name: str, start_byte: int, buffer: memoryview) -> None:
        """See `Store`."""
        path = self._root / name
        with _translated(str(path)):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                done = 0
                while done < len(buffer):
                    count = os.preadv(descriptor, [buffer[done:]], start_byte + done)
                    if not count:
                        raise EOFError(
                            f"{path} ends at byte {start_byte + done}; "
                            f"bytes {start_byte}:{start_byte + len(buffer)} were asked for"
                        )
                    done += count
            finally:
                os.close(descriptor)

    def size(self, name: str) -> int:
        """See `Store`."""
        path = self._root / name
        with _translated(str(path)):
            return path.stat().st_size

    def names(self, prefix: str = "") -> list[str]:
        """See `Store`."""
        path = self._root / prefix
        with _translated(str(path)):
            try:
                return sorted(entry.name for entry in path.iterdir())
            except (FileNotFoundError, NotADirectoryError):
                return []

    def delete(self, names: Sequence[str]) -> None:
        """See `Store`. A directory that becomes empty goes, too."""
        paths = [self._root / name for name in names]
        with _translated(self.url):
            for path in paths:
                with suppress(FileNotFoundError, NotADirectoryError):
                    path.unlink()
            for directory in sorted({path.parent for path in paths}):
                with suppress(FileNotFoundError, NotADirectoryError):
                    _sync_directory(directory)
                with suppress(OSError):
                    directory.rmdir()


class _LocalSink:
    """A file under a temporary name until it is durable."""

    def __init__(self, path: Path, length_bytes: int) -> None:
        del length_bytes
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._descriptor = _create_exclusively(self._partial)

    def write_at(self, offset_bytes: int, data: Buffer) -> None:
        with _translated(str(self._path), writes=True):
            _write_all(self._descriptor, offset_bytes, data)

    def commit(self) -> None:
        with _translated(str(self._path), writes=True):
            os.fsync(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
            # Exclusive by the temporary name: both hold the save id, which no other save has.
            self._partial.rename(self._path)
            _sync_directory(self._path.parent)

    def abort(self) -> None:
        with suppress(OSError):
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1
            self._partial.unlink()


def _create_exclusively(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o666)
    except FileNotFoundError:
        _make_directories(path.parent)
        return os.open(path, flags, 0o666)


def _make_directories(path: Path) -> None:
    """Make a directory and its ancestors, each durably: an entry lives in its parent."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        with suppress(FileExistsError):
            directory.mkdir()
        _sync_directory(directory.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, offset_bytes: int, data: Buffer) -> None:
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset_bytes + done)


# --- everything else ------------------------------------------------------------------------------


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
        self._one_at_a_time = _MEMORY if "memory" in names else nullcontext()

    @property
    def url(self) -> str:
        """The URL."""
        return self._url

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _where(self, name: str) -> str:
        return f"{self._url.rstrip('/')}/{name}"

    def _make_parent(self, path: str) -> None:
        if self._has_directories:
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)

    def create(self, name: str, length_bytes: int) -> Sink:
        """See `Store`."""
        with _translated(self._where(name), writes=True):
            self._make_parent(self._path(name))
            return _FsspecSink(self._fs, self._path(name), self._where(name), length_bytes)

    def put(self, name: str, data: bytes, *, replace: bool) -> None:
        """See `Store`."""
        with _translated(self._where(name), writes=True), self._one_at_a_time:
            self._make_parent(self._path(name))
            self._fs.pipe_file(self._path(name), data, mode="overwrite" if replace else "create")

    def read_into(self, name: str, start_byte: int, buffer: memoryview) -> None:
        """See `Store`."""
        if not len(buffer):
            return
        stop = start_byte + len(buffer)
        with _translated(self._where(name)):
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
        with _translated(self._where(name)):
            self._fs.invalidate_cache(self._root)
            return int(self._fs.info(self._path(name))["size"])

    def names(self, prefix: str = "") -> list[str]:
        """See `Store`."""
        path = self._path(prefix).rstrip("/")
        with _translated(self._where(prefix)):
            self._fs.invalidate_cache(self._root)
            try:
                found = cast("list[str]", self._fs.ls(path, detail=False))
            except (FileNotFoundError, NotADirectoryError):
                return []
        # Of what is no directory, some file systems list the object itself.
        below = (name.rstrip("/") for name in found if name.rstrip("/") != path)
        return sorted(name.rpartition("/")[2] for name in below)

    def delete(self, names: Sequence[str]) -> None:
        """See `Store`."""
        for name in names:
            absent = suppress(FileNotFoundError, NotADirectoryError)
            with _translated(self._where(name)), absent:
                self._fs.rm_file(self._path(name))
        if self._has_directories:
            for parent in sorted({self._path(name).rpartition("/")[0] for name in names}):
                with suppress(OSError, NotImplementedError):
                    self._fs.rmdir(parent)


class _FsspecSink:
    """An object that becomes visible when its upload is complete."""

    # Below this an object is put whole, above it goes in parts.
    _WHOLE_BYTES = 64 << 20

    def __init__(self, fs: AbstractFileSystem, path: str, where: str, length_bytes: int) -> None:
        self._fs, self._path, self._where = fs, path, where
        self._whole = bytearray() if length_bytes <= self._WHOLE_BYTES else None
        self._file = None if self._whole is not None else fs.open(path, "wb")

    def write_at(self, offset_bytes: int, data: Buffer) -> None:
        del offset_bytes  # offsets rise without gaps
        with _translated(self._where, writes=True):
            if self._whole is not None:
                self._whole += data
            elif self._file is not None:
                self._file.write(data)

    def commit(self) -> None:
        with _translated(self._where, writes=True):
            if self._whole is not None:
                self._fs.pipe_file(self._path, bytes(self._whole))
            elif self._file is not None:
                self._file.close()

    def abort(self) -> None:
        if self._file is not None:
            with suppress(OSError, NotImplementedError, ValueError, AttributeError):
                self._file.discard()
