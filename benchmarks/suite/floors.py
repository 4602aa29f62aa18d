"""What the hardware takes for the same bytes: the floors that saves and loads are divided by."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

_PAGE = mmap.PAGESIZE
_MOST_BUFFERS = 1024  # that one preadv takes (IOV_MAX)
_MOST_BYTES = 1 << 30  # of one request; Linux stops at 2 GiB


def aligned(nbytes: int) -> np.ndarray:
    """Make a page-aligned uint8 array that has all its pages, in huge ones if there are."""
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, np.uint8)[:nbytes]
    array[:] = 1
    return array


def write_buffered(path: Path, data: np.ndarray) -> None:
    """Write a new file with as few requests as can be, and wait until it is durable."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        _write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_direct(path: Path, data: np.ndarray) -> None:
    """Write a new file past the page cache: preallocated, from aligned memory.

    Raises:
        OSError: The file system doesn't take that.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o600)
    try:
        whole = data.nbytes // _PAGE * _PAGE
        os.posix_fallocate(descriptor, 0, max(data.nbytes, 1))
        _write(descriptor, data[:whole])
        if whole < data.nbytes:
            last = aligned(_PAGE)
            last[: data.nbytes - whole] = data[whole:]
            os.pwrite(descriptor, last, whole)
            os.ftruncate(descriptor, data.nbytes)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(descriptor: int, data: np.ndarray) -> None:
    at = 0
    while at < data.nbytes:
        at += os.pwrite(descriptor, data[at : at + _MOST_BYTES], at)


def read_into(paths: Sequence[Path], arrays: Sequence[np.ndarray]) -> None:
    """Fill arrays (uint8, contiguous) one after another from files, as if these were one.

    Raises:
        OSError: They are too short.
    """
    left = list(reversed(arrays))
    for path in paths:
        if not left:
            return
        descriptor = os.open(path, os.O_RDONLY)
        try:
            _read_file(descriptor, left)
        finally:
            os.close(descriptor)
    if left:
        missing = sum(array.nbytes for array in left)
        raise OSError(f"{', '.join(path.name for path in paths)}: {missing} bytes too short")


def _read_file(descriptor: int, left: list[np.ndarray]) -> None:
    """Fill what a file has bytes for; *left* is in reverse order, and keeps the rest."""
    size, at = os.fstat(descriptor).st_size, 0
    while left and at < size:
        some: list[np.ndarray] = []
        wanted = 0
        most = min(_MOST_BYTES, size - at)
        while left and wanted < most and len(some) < _MOST_BUFFERS:
            array = left.pop()
            if array.nbytes > most - wanted:
                left.append(array[most - wanted :])
                array = array[: most - wanted]
            some.append(array)
            wanted += array.nbytes
        got = os.preadv(descriptor, some, at)
        if got != wanted:
            raise OSError(f"{got} bytes at {at}; expected {wanted}")
        at += got


# ------------------------------------------------------------------------------------ page cache


def files_under(path: Path) -> list[Path]:
    """List a file, or all files of a folder."""
    return sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]


def sync(path: Path) -> None:
    """Make a file or a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def drop_cache(paths: Iterable[Path]) -> float:
    """Have the kernel forget files, and return which share of their pages it still has."""
    pages = left = 0
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            found = resident(descriptor)
        finally:
            os.close(descriptor)
        pages, left = pages + len(found), left + int(found.sum())
    return left / pages if pages else 0.0


def resident(descriptor: int) -> np.ndarray:
    """Ask for each page of a file whether it is in the page cache."""
    size = os.fstat(descriptor).st_size
    if not size:
        return np.zeros(0, np.uint8)
    with mmap.mmap(descriptor, size, prot=mmap.PROT_READ) as mapping:
        view = np.frombuffer(mapping, np.uint8)
        found = np.zeros(-(-size // _PAGE), np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        arguments = (view.ctypes.data, size, found.ctypes.data)
        failed = libc.mincore(*map(ctypes.c_void_p, arguments))
        del view  # the mapping can't be closed before
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return found & 1
