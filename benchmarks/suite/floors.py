"""What the hardware takes for the same bytes: the floors that saves and loads are divided by."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from distckpt.shardfile import checksum_all

_PAGE = mmap.PAGESIZE
_MOST_BUFFERS = 1024  # that one preadv takes (IOV_MAX)
_MOST_BYTES = 1 << 30  # of one request; Linux stops at 2 GiB
_BLOCK_BYTES = 4 << 20  # of which a checksum is taken
_SCRATCH_BYTES = 1 << 20


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


def write_arrays(path: Path, arrays: Sequence[np.ndarray], *, checked: bool) -> None:
    """Write a new file straight from many arrays (uint8, contiguous), and wait until it is durable.

    Args:
        path: The file.
        arrays: What it is to hold.
        checked: Whether to take a checksum of what is then written, while it is in the cache.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        at = 0
        for some in _batches(arrays):
            if checked:
                checksum_all(array.data for array in some)
            at += os.pwritev(descriptor, some, at)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if at != sum(array.nbytes for array in arrays):
        raise OSError(f"{path}: {at} bytes were written")


def _batches(arrays: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Cut arrays into pieces, and yield as many together as are a block."""
    some: list[np.ndarray] = []
    left = _BLOCK_BYTES
    for array in arrays:
        at = 0
        while at < len(array):
            some.append(array[at : at + left])
            at += len(some[-1])
            left -= len(some[-1])
            if not left or len(some) == _MOST_BUFFERS:
                yield some
                some, left = [], _BLOCK_BYTES
    if some:
        yield some


def read_into(
    paths: Sequence[Path], arrays: Sequence[np.ndarray], *, checked: bool = False
) -> None:
    """Fill arrays (uint8, contiguous) one after another from files, as if these were one.

    Args:
        paths: The files.
        arrays: The arrays.
        checked: Whether to read block by block, and take a checksum of each.

    Raises:
        OSError: The files are too short.
    """
    left = list(reversed(arrays))
    for path in paths:
        if not left:
            return
        descriptor = os.open(path, os.O_RDONLY)
        try:
            _read_file(descriptor, left, checked=checked)
        finally:
            os.close(descriptor)
    if left:
        missing = sum(array.nbytes for array in left)
        raise OSError(f"{', '.join(path.name for path in paths)}: {missing} bytes too short")


def _read_file(descriptor: int, left: list[np.ndarray], *, checked: bool) -> None:
    """Fill what a file has bytes for; *left* is in reverse order, and keeps the rest."""
    size, at = os.fstat(descriptor).st_size, 0
    while left and at < size:
        some: list[np.ndarray] = []
        wanted = 0
        most = min(_BLOCK_BYTES if checked else _MOST_BYTES, size - at)
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
        if checked:
            checksum_all(array.data for array in some)
        at += got


def read_strided(path: Path, arrays: Iterable[np.ndarray]) -> None:
    """Fill arrays of any strides from a file, from its begin again where it ends.

    By way of memory that stays in the processor's cache; checksums are taken there.

    Args:
        path: A file that is longer than each array.
        arrays: The arrays, of two dimensions, or of one.
    """
    scratch = np.empty(_SCRATCH_BYTES, np.uint8)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size, at = os.fstat(descriptor).st_size, 0
        for array in arrays:
            rows = array.reshape(1, -1) if array.ndim == 1 else array
            step = max(1, len(scratch) // (rows.shape[1] * rows.itemsize))
            for first in range(0, len(rows), step):
                some = rows[first : first + step]
                if at + some.nbytes > size:
                    at = 0
                piece = scratch[: some.nbytes]
                if os.preadv(descriptor, [piece], at) != some.nbytes:
                    raise OSError(f"{path}: less than {some.nbytes} bytes at {at}")
                checksum_all([piece.data])
                np.copyto(some, piece.view(some.dtype).reshape(some.shape))
                at += some.nbytes
    finally:
        os.close(descriptor)


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
