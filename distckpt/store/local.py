"""Local files: the system's own calls, because durability needs fsync of files and directories."""

from __future__ import annotations

import errno
import logging
import os
import secrets
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np

from distckpt.errors import StoreError
from distckpt.store.base import Buffer, Sink, partial_name, total_bytes, translated
from distckpt.store.mapping import map_cached

logger = logging.getLogger(__name__)

# What a link or a rename answers that was not done. Others, such as EIO and ETIMEDOUT, are what a
# network file system says when it doesn't know.
_CERTAIN = frozenset(
    {
        *(errno.EPERM, errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EMLINK),
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
        *(errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS),
    }
)

# Past the page cache is faster, and costs the processor less, on disks; tmpfs takes it, too, and is
# slower. So the kind of file system decides, and not whether it can be opened so.
_DIRECT = frozenset({"ext4", "xfs"})
_DIRECT_BYTES = 1 << 20  # what is shorter is not worth it
# Where files are looked at in the page cache: not where another machine can cut them short, and not
# on a tmpfs, whose small pages take as long to map as to read.
_MAPPED = frozenset({"ext4", "xfs"})
# More threads than this wait for one another: the kernel writes to a file one after another.
_WRITES = 2
_ALIGNMENT = 4096

_BUFFERS_AT_ONCE = 1024  # the system's limit


class LocalStore:
    """Objects as files below a directory, durable against power loss.

    Args:
        root: The directory; made with the first object.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: set[Path] = set()  # directories that this store has made
        self._named: set[Path] = set()  # directories whose entries in their parents are durable

    @property
    def url(self) -> str:
        """The directory."""
        return str(self._root)

    def create(self, name: str, length_bytes: int) -> Sink:
        """See `Store`."""
        path = self._root / name
        with translated(str(path), writes=True):
            partial = path.with_name(partial_name(path.name))
            sink = _LocalSink(path, partial, self._create_exclusively(partial))
            if length_bytes >= _DIRECT_BYTES and file_system(path.parent) in _DIRECT:
                sink.go_direct(length_bytes)
            return sink

    def put(self, name: str, data: bytes, *, replace: bool) -> None:
        """See `Store`. Created by `link`, replaced by `rename`: both are atomic."""
        path = self._root / name
        # Not the final name plus a fixed ending: two jobs may be writing at once.
        partial = path.with_name(partial_name(path.name, secrets.token_hex(8)))
        try:
            with _refusing(path):
                descriptor = self._create_exclusively(partial)
                try:
                    _write_all(descriptor, 0, data)
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            with _refusing(path, when=_CERTAIN):
                if replace:
                    partial.replace(path)
                else:
                    _link(partial, path)
            try:
                _sync_directory(path.parent)
            except OSError as exc:
                raise StoreError(
                    f"{path}: it is there, but its directory could not be synced, so that it may "
                    f"not survive a power loss: {exc}",
                    url=str(path),
                    undurable=True,
                ) from exc
        finally:
            with suppress(OSError):
                partial.unlink()

    def read_into(self, name: str, start_byte: int, buffer: memoryview) -> None:
        """See `Store`."""
        self.open_object(name).read_into(start_byte, [buffer])

    def open_object(self, name: str) -> _LocalObject:
        """See the function of this name. One call to the system fills a thousand buffers."""
        path = str(self._root / name)
        with translated(path):
            # Without O_NONBLOCK a pipe, which an archive of a stranger can bring, waits for ever.
            return _LocalObject(path, os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))

    def size(self, name: str) -> int:
        """See `Store`."""
        path = self._root / name
        with translated(str(path)):
            return path.stat().st_size

    def modified(self, name: str) -> float | None:
        """See `Store`."""
        path = self._root / name
        with translated(str(path)):
            return path.stat().st_mtime

    def names(self, prefix: str = "") -> list[str]:
        """See `Store`."""
        path = self._root / prefix
        with translated(str(path)):
            try:
                return sorted(entry.name for entry in path.iterdir())
            except (FileNotFoundError, NotADirectoryError):
                return []

    def delete(self, names: Sequence[str]) -> None:
        """See `Store`.

        A group's directory that becomes empty goes, too. The store's own stays, since it may have
        been there before any object was; unless this store made it.
        """
        paths = [self._root / name for name in names]
        with translated(self.url):
            for path in paths:
                with suppress(FileNotFoundError, NotADirectoryError):
                    path.unlink()
            for directory in sorted({path.parent for path in paths}):
                with suppress(FileNotFoundError, NotADirectoryError):
                    _sync_directory(directory)
                if directory != self._root or directory in self._made:
                    with suppress(OSError):
                        directory.rmdir()
                        self._named.discard(directory)

    def _create_exclusively(self, path: Path) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags, 0o666)
        except FileNotFoundError:
            self._made.update(_make_directories(path.parent))
            descriptor = os.open(path, flags, 0o666)
        try:
            self._name_durably(path.parent)
        except BaseException:
            os.close(descriptor)
            with suppress(OSError):
                path.unlink()
            raise
        return descriptor

    def _name_durably(self, directory: Path) -> None:
        """Sync the entries of a directory, and of those above it, in their parents; once for each.

        Also of those that were there: whoever has made one may have died before it could.
        """
        if directory in self._named:
            return
        for ancestor in (directory, *directory.parents):
            if ancestor in self._named or os.path.ismount(ancestor):
                break
            if ancestor.is_relative_to(self._root):
                _sync_directory(ancestor.parent)
            else:
                # A user's own, long there; it need not be one that we may read.
                with suppress(OSError):
                    _sync_directory(ancestor.parent)
            self._named.add(ancestor)


class _LocalObject:
    """A file that is read."""

    def __init__(self, path: str, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor

    def __del__(self) -> None:
        os.close(self._descriptor)

    def read_into(self, start_byte: int, buffers: Sequence[memoryview]) -> None:
        """See `OpenObject`."""
        with translated(self._path):
            for first in range(0, len(buffers), _BUFFERS_AT_ONCE):
                some = buffers[first : first + _BUFFERS_AT_ONCE]
                start_byte = _read_all(self._descriptor, start_byte, some, self._path)

    def view(self, start_byte: int, length_bytes: int) -> memoryview | None:
        """See `OpenObject`."""
        with translated(self._path):
            if _file_system(os.fstat(self._descriptor).st_dev) not in _MAPPED:
                return None
            return map_cached(self._descriptor, start_byte, length_bytes)


class _LocalSink:
    """A file under a temporary name until it is durable.

    Attributes:
        writes_at_once: See `Sink`, and so is the other.
        wants_aligned: Whether it is written past the page cache.
    """

    def __init__(self, path: Path, partial: Path, descriptor: int) -> None:
        self._path, self._partial, self._descriptor = path, partial, descriptor
        self._direct = -1
        self._refused = False
        self.writes_at_once = _WRITES

    @property
    def wants_aligned(self) -> bool:
        return self._direct >= 0 and not self._refused

    def go_direct(self, length_bytes: int) -> None:
        """Write what is aligned past the page cache, if the file system lets us."""
        try:
            self._direct = os.open(self._partial, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as exc:
            _note_indirect(self._path.parent, exc.strerror)
            return
        try:
            os.posix_fallocate(self._descriptor, 0, length_bytes)
        except OSError as exc:
            if exc.errno not in {errno.EOPNOTSUPP, errno.EINVAL}:
                self.abort()
                raise

    def write_at(self, offset_bytes: int, data: Buffer) -> None:
        with translated(str(self._path), writes=True):
            done = 0
            if self.wants_aligned and len(data) >= _ALIGNMENT:
                done = self._write_direct(offset_bytes, data)
            if done < len(data):
                rest = memoryview(data).cast("B")[done:]
                _write_all(self._descriptor, offset_bytes + done, rest)

    def _write_direct(self, offset_bytes: int, data: Buffer) -> int:
        """Write what is aligned; returns how much that was."""
        array = np.frombuffer(data, np.uint8)
        if array.ctypes.data % _ALIGNMENT or offset_bytes % _ALIGNMENT:
            return 0
        whole = len(array) // _ALIGNMENT * _ALIGNMENT
        try:
            _write_all(self._direct, offset_bytes, array[:whole].data)
        except OSError as exc:
            if exc.errno != errno.EINVAL:
                raise
            # A device with larger sectors, or a write that was cut off at an odd length.
            _note_indirect(self._path.parent, exc.strerror)
            self._refused = True
            return 0
        return whole

    def commit(self) -> None:
        with translated(str(self._path), writes=True):
            os.fsync(self._descriptor)
            self._close()
            # Exclusive by the temporary name: both hold the save id, which no other save has.
            self._partial.rename(self._path)
            _sync_directory(self._path.parent)

    def abort(self) -> None:
        with suppress(OSError):
            self._close()
            self._partial.unlink()

    def _close(self) -> None:
        direct, self._direct = self._direct, -1
        descriptor, self._descriptor = self._descriptor, -1
        for opened in (direct, descriptor):
            if opened >= 0:
                os.close(opened)


def file_system(path: Path) -> str:
    """Return the kind of file system that a path lies on, as the kernel calls it; "" if unknown."""
    return _file_system(path.stat().st_dev)


@cache
def _file_system(device: int) -> str:
    number = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            if before.split()[2] == number:
                return after.split()[0]
    return ""


@cache
def _note_indirect(directory: Path, why: str) -> None:
    """Say once that a directory is written to by way of the page cache after all."""
    logger.info("%s: written by way of the page cache, since direct I/O failed: %s", directory, why)


@contextmanager
def _refusing(path: Path, *, when: Container[int | None] | None = None) -> Iterator[None]:
    """Tell of errors that the object certainly doesn't have its name: all, or those in `when`."""
    try:
        with translated(str(path), writes=True):
            yield
    except StoreError as exc:
        cause = exc.__cause__
        exc.refused = when is None or (isinstance(cause, OSError) and cause.errno in when)
        raise


def _link(partial: Path, path: Path) -> None:
    try:
        os.link(partial, path)
    except OSError as exc:
        with suppress(OSError):
            if partial.stat().st_nlink > 1:
                # A network file system sent it twice, and the second was refused: it is ours.
                return
        if exc.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        raise StoreError(
            f"{path}: this file system has no hard links, which a first commit needs; save with "
            "overwrite=True, or to another file system",
            url=str(path),
        ) from exc


def _make_directories(path: Path) -> list[Path]:
    """Make a directory and its ancestors, each durably: an entry lives in its parent.

    Returns:
        Those that were not there, and that nobody else made meanwhile.
    """
    missing: list[Path] = []
    made: list[Path] = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        with suppress(FileExistsError):
            directory.mkdir()
            made.append(directory)
        _sync_directory(directory.parent)
    return made


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_all(descriptor: int, start_byte: int, buffers: Sequence[memoryview], path: str) -> int:
    """Fill buffers; returns the byte after the last one."""
    stop_byte = start_byte + total_bytes(buffers)
    done = start_byte
    while done < stop_byte:
        count = os.preadv(descriptor, buffers, done)
        if not count:
            raise EOFError(
                f"{path} ends at byte {done}; bytes {start_byte}:{stop_byte} were asked for"
            )
        done += count
        if done < stop_byte:
            buffers = _rest(buffers, count)
    return stop_byte


def _rest(buffers: Sequence[memoryview], filled: int) -> list[memoryview]:
    """Return what is left of buffers of which so many bytes are filled."""
    left: list[memoryview] = []
    for buffer in buffers:
        if filled < buffer.nbytes:
            left.append(buffer.cast("B")[filled:])
        filled = max(filled - buffer.nbytes, 0)
    return left


def _write_all(descriptor: int, offset_bytes: int, data: Buffer) -> None:
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset_bytes + done)
