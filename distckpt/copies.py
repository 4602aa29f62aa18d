"""Which bytes of which blocks go where: fragments as runs and boxes of bytes, all at once.

Most of what is wanted is a run: it lies in one stretch of its file, and belongs into one stretch of
memory. Such bytes can be read, sent and received where they belong. The rest is copied box by box.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from distckpt.manifest import pad_columns
from distckpt.plan import Fragments
from distckpt.region import Region, boxes_of_runs

# A run of so many bytes is sent as it lies; what is shorter goes together with others.
_LONG_BYTES = 1 << 18


def find_runs(
    extent: np.ndarray, start: np.ndarray, stop: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Tell which boxes are runs of the C order of a box around each.

    Args:
        extent: (n, width) shapes of the boxes around.
        start: (n, width) the boxes in them.
        stop: (n, width).

    Returns:
        (n,) the place of each box's first element in the C order; and whether it is a run.
    """
    count, width = extent.shape
    first, step = np.zeros(count, np.int64), np.ones(count, np.int64)
    is_run, whole = np.ones(count, bool), np.ones(count, bool)
    for dim in range(width - 1, -1, -1):
        size = stop[:, dim] - start[:, dim]
        # Left of a dimension that isn't wanted whole, it may be one index in each.
        is_run &= whole | (size == 1)
        whole &= size == extent[:, dim]
        first += start[:, dim] * step
        step *= extent[:, dim]
    return first, is_run


@dataclass(frozen=True, slots=True)
class Places:
    """Where the boxes that a rank wants lie in its memory; rows by key.

    Attributes:
        start: (keys, width) the box, padded as `Fragments` are, or less.
        stop: (keys, width).
        first_byte: (keys,) where it begins in its memory, which holds it in C order, in the dtype
            and byte order of the file; -1 where that isn't so.
    """

    start: np.ndarray
    stop: np.ndarray
    first_byte: np.ndarray

    def is_like(self, other: Places) -> bool:
        """Whether other boxes lie alike."""
        return (
            np.array_equal(self.first_byte, other.first_byte)
            and np.array_equal(self.start, other.start)
            and np.array_equal(self.stop, other.stop)
        )

    def find(
        self, key: np.ndarray, start: np.ndarray, stop: np.ndarray, itemsize: np.ndarray
    ) -> np.ndarray:
        """Return at which byte of its memory each box begins; -1 where it is no run there."""
        width = start.shape[1]
        origin = pad_columns(self.start, width, 0)[key]
        extent = pad_columns(self.stop, width, 1)[key] - origin
        first, is_run = find_runs(extent, start - origin, stop - origin)
        base = self.first_byte[key]
        found: np.ndarray = np.where(is_run & (base >= 0), base + first * itemsize, -1)
        return found


@dataclass(frozen=True, slots=True)
class Boxes:
    """Parts of rows, as columns: each is a box, and is copied in one go.

    Attributes:
        of: (boxes,) of which of the rows that were to be cut it is a part.
        start: (boxes, width) the box, in the whole tensor.
        stop: (boxes, width).
        place: (boxes,) the byte of the block at which it begins.
        strides: (boxes, width) bytes from an element to the next, in the block.
        after: (boxes,) bytes of the row's boxes before it.
    """

    of: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    place: np.ndarray
    strides: np.ndarray
    after: np.ndarray

    def each(self) -> Iterator[tuple[int, Box]]:
        """Yield them one by one, each with its `of`."""
        for of, *box in zip(
            self.of.tolist(),
            map(tuple, self.start.tolist()),
            map(tuple, (self.stop - self.start).tolist()),
            self.place.tolist(),
            map(tuple, self.strides.tolist()),
            self.after.tolist(),
            strict=True,
        ):
            yield of, Box(*box)


class Box(NamedTuple):
    """One of `Boxes`; shapes and strides as numpy's."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    place: int
    strides: tuple[int, ...]
    after: int

    @property
    def region(self) -> Region:
        """It, in the whole tensor."""
        stop = tuple(a + n for a, n in zip(self.start, self.shape, strict=True))
        return Region(self.start, stop)

    def of_block(self, block: np.ndarray, dtype: np.dtype, first_byte: int = 0) -> np.ndarray:
        """View it in the bytes of its block, or in those from the first byte on."""
        return np.ndarray(self.shape, dtype, block.data, self.place - first_byte, self.strides)

    def of_row(self, content: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """View it in the bytes of its row, one box after another."""
        return np.ndarray(self.shape, dtype, content.data, self.after)


class Work:
    """Fragments of one rank as rows; equal on the reader's and on the consumer's side.

    Args:
        fragments: What the rank reads or wants.
        block_bytes: Size of a block.

    Attributes:
        block_bytes: Size of a block.
        round: (rows,) and the other columns as in `Fragments`.
        is_run: (rows,) whether the row's bytes lie in one stretch of the file.
        start_byte: (rows,) where the stretch from the first to the last of them begins in the file.
        stop_byte: (rows,) and where it ends.
        schedules: Those of it (`Schedule`), to be used again; the one that was used last is last.
    """

    def __init__(self, fragments: Fragments, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self.round, self.reader = fragments.round, fragments.reader
        self.consumer, self.key = fragments.consumer, fragments.key
        self.file, self.block = fragments.file, fragments.block
        self.itemsize = fragments.itemsize
        self._fragments = fragments
        self.schedules: list[Any] = []
        piece, offset = fragments.piece_start, fragments.offset_bytes
        extent = fragments.piece_stop - piece
        start, stop = fragments.start - piece, fragments.stop - piece
        first, self.is_run = find_runs(extent, start, stop)
        last, _ = find_runs(extent, stop - 1, stop)
        #: Where the wanted part of the piece begins, be it in this block or in one before.
        self._begin_byte = offset + first * self.itemsize
        block_start = self.block * block_bytes
        self.start_byte = np.maximum(self._begin_byte, block_start)
        self.stop_byte = np.minimum(offset + (last + 1) * self.itemsize, block_start + block_bytes)

    def __len__(self) -> int:
        return len(self.round)

    @cached_property
    def size_bytes(self) -> np.ndarray:
        """(rows,) how many bytes of the block are wanted."""
        size: np.ndarray = self.stop_byte - self.start_byte
        others = np.flatnonzero(~self.is_run)
        if others.size:
            boxes = self.cut(others)
            elements = (boxes.stop - boxes.start).prod(axis=1)
            size[others] = 0
            of = others[boxes.of]
            np.add.at(size, of, elements * self.itemsize[of])
        return size

    @cached_property
    def is_long(self) -> np.ndarray:
        """(rows,) whether it is a run that is worth a message of its own."""
        long: np.ndarray = self.is_run & (self.stop_byte - self.start_byte >= _LONG_BYTES)
        return long

    def in_memory(self, rows: np.ndarray, places: Places) -> np.ndarray:
        """Return for some rows the byte of the consumer's memory where each goes.

        Returns:
            (rows,) -1 where its bytes don't go into one stretch.
        """
        table = self._fragments
        place = places.find(
            self.key[rows], table.start[rows], table.stop[rows], self.itemsize[rows]
        )
        within = self.start_byte[rows] - self._begin_byte[rows]
        found: np.ndarray = np.where(self.is_run[rows] & (place >= 0), place + within, -1)
        return found

    def cut(
        self,
        rows: np.ndarray,
        first_byte: np.ndarray | None = None,
        last_byte: np.ndarray | None = None,
    ) -> Boxes:
        """Cut some rows into boxes: a block holds a run of the piece, which is a few boxes.

        Args:
            rows: The rows; the same one may stand several times in succession.
            first_byte: (rows,) if given, of each only what lies from that byte of the block on.
            last_byte: (rows,) and before that one.
        """
        table, item = self._fragments, self.itemsize[rows]
        origin = table.piece_start[rows]
        extent = table.piece_stop[rows] - origin
        # How much of the piece lies before the block, and its elements in the part.
        before = self.block[rows] * self.block_bytes - table.offset_bytes[rows]
        size = extent.prod(axis=1)
        begin = before if first_byte is None else before + first_byte
        end = before + (self.block_bytes if last_byte is None else last_byte)
        first, last = np.clip(begin // item, 0, size), np.clip(end // item, 0, size)
        of, low, high = boxes_of_runs(extent, first, last)
        # Boxes of a row follow one another in the block.
        place = (first * item - before)[of] + before_in_group(
            of, (high - low).prod(axis=1) * item[of]
        )
        strides = np.empty_like(low)
        step = item[of]
        for dim in range(low.shape[1] - 1, -1, -1):
            strides[:, dim] = step
            step = step * (high[:, dim] - low[:, dim])
        start = np.maximum(low, (table.start[rows] - origin)[of])
        stop = np.minimum(high, (table.stop[rows] - origin)[of])
        keep = (start < stop).all(axis=1)
        place += ((start - low) * strides).sum(axis=1)
        of, start, stop = of[keep], start[keep], stop[keep]
        after = before_in_group(rows[of], (stop - start).prod(axis=1) * item[of])
        origin = origin[of]
        return Boxes(of, start + origin, stop + origin, place[keep], strides[keep], after)

    def edges_before(self, rows: np.ndarray, byte: np.ndarray, most_bytes: int) -> np.ndarray:
        """Return for some rows the edge of a line of its piece at or before a byte of its block.

        A block that is read in parts is best cut there: then no line is in two boxes.

        Args:
            rows: The rows.
            byte: (rows,) the byte.
            most_bytes: A line is what lies in all dimensions but the first ones, and no longer.

        Returns:
            (rows,) the byte itself where it isn't in the piece.
        """
        table = self._fragments
        extent = table.piece_stop[rows] - table.piece_start[rows]
        line, fits = self.itemsize[rows], np.ones(len(rows), bool)
        for dim in range(extent.shape[1] - 1, 0, -1):
            longer = line * extent[:, dim]
            fits &= longer <= most_bytes
            line = np.where(fits, longer, line)
        within = self.block[rows] * self.block_bytes + byte - table.offset_bytes[rows]
        inside = (within >= 0) & (within < extent.prod(axis=1) * self.itemsize[rows])
        edge: np.ndarray = np.where(inside, byte - within % line, byte)
        return edge

    def rounds(self) -> Iterator[np.ndarray]:
        """Yield the rows of each round."""
        yield from split(np.arange(len(self)), self.round)


def split(rows: np.ndarray, column: np.ndarray) -> list[np.ndarray]:
    """Split rows where a column, given for these rows, changes."""
    if not len(rows):
        return []
    return np.split(rows, np.flatnonzero(column[1:] != column[:-1]) + 1)


def before_in_group(group: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Return the sum of the sizes before each in its group; those of a group are neighbours."""
    total = np.cumsum(size) - size
    new = np.ones(len(group), bool)
    new[1:] = group[1:] != group[:-1]
    starts = np.flatnonzero(new)
    found: np.ndarray = total - np.repeat(total[starts], np.diff(np.append(starts, len(group))))
    return found
