"""Memory for copies: aligned, in huge pages where there are any, kept from save to save."""

from __future__ import annotations

import mmap
import threading
from contextlib import suppress

import numpy as np

# What direct I/O wants of addresses, offsets and lengths; no disk of today wants more.
ALIGNMENT = 4096
_HUGE_PAGE_BYTES = 2 << 20


class Arena:
    """Memory that saves copy to. Safe to use from several threads.

    Copying into memory that the kernel has not given pages to yet is several times slower than into
    memory that was used before. So one buffer is kept when a save gives it back; a second one is
    only there while two saves are in flight.
    """

    def __init__(self) -> None:
        self._kept: np.ndarray | None = None
        self._preparing: threading.Thread | None = None
        self._out_bytes = 0
        self._changed = threading.Condition()

    @property
    def out_bytes(self) -> int:
        """Bytes that were taken, and not given back yet."""
        return self._out_bytes

    def take(self, size_bytes: int, most_bytes: int | None = None) -> np.ndarray:
        """Take a buffer of at least so many bytes.

        Args:
            size_bytes: How many are needed.
            most_bytes: How many may be taken, since others are waited for; None: any number.

        Returns:
            A one-dimensional uint8 array, aligned to `ALIGNMENT`, perhaps longer; its contents are
            undefined.
        """
        preparing = self._preparing
        if preparing is not None:
            preparing.join()
        with self._changed:
            kept, self._kept = self._kept, None
            # What does not fit today will not fit tomorrow: a state seldom shrinks.
            too_long = kept is not None and most_bytes is not None and len(kept) > most_bytes
            if kept is None or len(kept) < size_bytes or too_long:
                kept = allocate(size_bytes)
            self._out_bytes += len(kept)
            return kept

    def take_within(self, size_bytes: int, limit_bytes: int, least_bytes: int) -> np.ndarray:
        """Take a buffer of so many bytes, or fewer where more than a limit would be out.

        Waits while not even the least is left.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._out_bytes + least_bytes <= limit_bytes)
            left_bytes = limit_bytes - self._out_bytes
            if self._kept is not None and len(self._kept) > left_bytes:
                self._kept = None
        return self.take(min(size_bytes, left_bytes))

    def give_back(self, buffer: np.ndarray) -> None:
        """Return a buffer; nobody may use it any more."""
        with self._changed:
            self._out_bytes -= len(buffer)
            if self._kept is None or len(self._kept) < len(buffer):
                self._kept = buffer
            self._changed.notify_all()

    def prepare(self, size_bytes: int) -> None:
        """Have a buffer of so many bytes made ready in the background, pages and all."""
        with self._changed:
            is_there = self._kept is not None and len(self._kept) >= size_bytes
            if is_there or self._preparing is not None or not size_bytes:
                return
            self._preparing = threading.Thread(
                target=self._prepare, args=(size_bytes,), name="distckpt-arena", daemon=True
            )
            self._preparing.start()

    def _prepare(self, size_bytes: int) -> None:
        buffer = allocate(size_bytes)
        # One byte a page. Unlike the madvise of Python's mmap, this leaves the interpreter's lock.
        buffer[::ALIGNMENT] = 0
        with self._changed:
            if self._kept is None or len(self._kept) < size_bytes:
                self._kept = buffer
            self._preparing = None


def allocate(size_bytes: int) -> np.ndarray:
    """Make a buffer of at least so many bytes, aligned to `ALIGNMENT`: uint8, zeros."""
    size_bytes = -(-max(size_bytes, 1) // ALIGNMENT) * ALIGNMENT
    if size_bytes < _HUGE_PAGE_BYTES:
        return np.frombuffer(_anonymous(size_bytes), np.uint8)
    # Whole huge pages: the kernel gives none at the edges of what begins elsewhere.
    whole = -(-size_bytes // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    memory = _anonymous(whole + _HUGE_PAGE_BYTES)
    with suppress(OSError, AttributeError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, np.uint8)
    first = -array.ctypes.data % _HUGE_PAGE_BYTES
    return array[first : first + size_bytes]


def _anonymous(size_bytes: int) -> mmap.mmap:
    # Private: the default is memory to be shared with child processes, which gets no huge pages.
    return mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
