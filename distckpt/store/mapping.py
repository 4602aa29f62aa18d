"""Bytes of a local file where they lie in the page cache, mapped into the process."""

from __future__ import annotations

import errno
import mmap
import os
from contextlib import suppress

# Reads only what the page cache has; not every system knows it.
_ONLY_CACHED = getattr(os, "RWF_NOWAIT", None)
_NOT_KNOWN = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})


def map_cached(descriptor: int, start_byte: int, length_bytes: int) -> memoryview | None:
    """Map a stretch of a file, if the page cache has it.

    What it hasn't is better read: then a disk's error is an error, and not the process's end.

    Args:
        descriptor: The file, open for reading; may be closed while the memory is in use.
        start_byte: Where the stretch begins.
        length_bytes: Its length, at least 1.

    Returns:
        Read-only memory, mapped until nobody refers to it; None if the file is shorter, if some of
        it may have to be read, or where it can't be mapped. To look at it after the file was cut
        short ends the process (SIGBUS).
    """
    if not _is_cached(descriptor, start_byte, length_bytes):
        return None
    before = start_byte % mmap.ALLOCATIONGRANULARITY
    with suppress(ValueError, OSError):  # it is shorter; no memory or descriptor is left
        mapped = mmap.mmap(
            descriptor,
            before + length_bytes,
            flags=mmap.MAP_SHARED,
            prot=mmap.PROT_READ,
            offset=start_byte - before,
        )
        return memoryview(mapped)[before:]
    return None


def _is_cached(descriptor: int, start_byte: int, length_bytes: int) -> bool:
    """Whether the page cache has the first, the middle and the last byte of a stretch."""
    if _ONLY_CACHED is None:
        return False
    byte = bytearray(1)
    places = (0, length_bytes // 2, length_bytes - 1)
    try:
        return all(os.preadv(descriptor, [byte], start_byte + at, _ONLY_CACHED) for at in places)
    except BlockingIOError:
        return False
    except OSError as exc:
        if exc.errno in _NOT_KNOWN:
            return False
        raise
