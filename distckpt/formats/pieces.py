"""Pieces for libraries that read by chunks: which boxes, and bytes of one that is read whole."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Sequence

import numpy as np

from distckpt import dtypes
from distckpt.errors import CorruptCheckpoint
from distckpt.region import Region

# A piece has at least so many bytes, where the tensor has, and a tensor at most so many pieces.
_PIECE_BYTES = 4 << 20
_MOST_PIECES = 4096


def grid(shape: tuple[int, ...], chunk: Sequence[int], itemsize: int) -> tuple[Region, ...] | None:
    """Cut a tensor along the borders of its chunks, so that no chunk is in two pieces.

    Args:
        shape: Of the tensor.
        chunk: Shape of a chunk.
        itemsize: Bytes of an element.

    Returns:
        The boxes: of one chunk each, or of several, where chunks are small or very many. None where
        one would do.

    Examples:
        >>> [str(box) for box in grid((3, 2 << 20), (2, 1 << 20), 4)]
        ['[0:2, 0:1048576]', '[0:2, 1048576:2097152]', '[2:3, 0:1048576]', '[2:3, 1048576:2097152]']
    """
    cell = [max(1, min(c, n)) for c, n in zip(chunk, shape, strict=True)]
    for dim in reversed(range(len(cell))):
        while cell[dim] < shape[dim] and (
            math.prod(cell) * itemsize < _PIECE_BYTES
            or math.prod(-(-n // c) for n, c in zip(shape, cell, strict=True)) > _MOST_PIECES
        ):
            cell[dim] = min(2 * cell[dim], shape[dim])
    if 0 in shape or tuple(cell) == shape:
        return None
    starts = itertools.product(*(range(0, n, c) for n, c in zip(shape, cell, strict=True)))
    return tuple(
        Region(start, tuple(min(a + c, n) for a, c, n in zip(start, cell, shape, strict=True)))
        for start in starts
    )


class WholePieces:
    """Bytes of pieces that a library can only read whole: the last one is kept.

    Args:
        read: Reads one: its tensor's index and its own → array.
    """

    def __init__(self, read: Callable[[int, int], np.ndarray]) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._which: tuple[int, int] | None = None
        self._bytes = np.empty(0, np.uint8)

    def read_into(
        self,
        tensor: int,
        piece: int,
        start_byte: int,
        buffer: memoryview,
        *,
        shape: tuple[int, ...],
        dtype: dtypes.Dtype,
    ) -> None:
        """Fill a buffer; see `Source`.

        Args:
            tensor: Index of the tensor.
            piece: Index of the piece.
            start_byte: First byte.
            buffer: What to fill.
            shape: What the piece must have.
            dtype: What the piece must have.

        Raises:
            CorruptCheckpoint: The library gives something else.
        """
        stop_byte = start_byte + len(buffer)
        with self._lock:
            if self._which != (tensor, piece):
                # Given up before the next one is read: there is never more than one.
                self._which, self._bytes = None, np.empty(0, np.uint8)
                array = self._read(tensor, piece)
                if array.shape != shape or dtypes.find(array.dtype) != dtype:
                    raise CorruptCheckpoint(
                        f"expected {dtype.name} of shape {shape}, found {array.dtype} of shape "
                        f"{array.shape}"
                    )
                array = np.ascontiguousarray(array, dtype.numpy)
                self._which, self._bytes = (tensor, piece), array.reshape(-1).view(np.uint8)
            buffer[:] = self._bytes[start_byte:stop_byte].data
            if stop_byte >= len(self._bytes):
                self._which, self._bytes = None, np.empty(0, np.uint8)
