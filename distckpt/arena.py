"""Memory for staging: page-aligned, and reused from save to save."""

from __future__ import annotations

import mmap
import threading

import numpy as np


class Arena:
    """A stock of page-aligned buffers. Safe to use from several threads.

    Copying into memory that the kernel has not given pages to yet is several times slower than into
    memory that was used before, so buffers come back here and go out again.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, size_bytes: int) -> np.ndarray:
        """Take a buffer of at least so many bytes: the smallest free one that fits.

        Returns:
            A one-dimensional uint8 array, perhaps longer; its contents are undefined.
        """
        with self._lock:
            fitting = [
                index for index, buffer in enumerate(self._free) if buffer.size >= size_bytes
            ]
            if fitting:
                return self._free.pop(min(fitting, key=lambda index: self._free[index].size))
            # What does not fit today will not fit tomorrow: a state seldom shrinks.
            self._free.clear()
        pages = -(-max(size_bytes, 1) // mmap.PAGESIZE)
        return np.frombuffer(mmap.mmap(-1, pages * mmap.PAGESIZE), np.uint8)

    def give_back(self, buffer: np.ndarray) -> None:
        """Return a buffer; nobody may use it any more."""
        with self._lock:
            self._free.append(buffer)
