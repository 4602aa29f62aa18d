"""Which bytes of which blocks go where: fragments as runs and boxes of bytes, all at once.

Most of what is wanted is a run: it lies in one stretch of its file, and belongs into one stretch of
memory. Such bytes can be read, sent and received where they belong. The rest is copied box by box.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from distckpt.manifest import pad_columns
from distckpt.plan import Fragments
from distckpt.region import Region, boxes_of_runs

# A block of which fewer bytes are runs is checked before any of them is put in place, which costs a
# copy: then damage changes nothing.
_WORTH_BYTES = 1 << 18
# In so many bytes is a block read of which boxes are copied, so that they are copied from the
# processor's cache.
PART_BYTES = 1 << 20
# A run of so many bytes is sent as it lies; what is shorter goes together with others.
_LONG_BYTES = 1 << 18
# Where blocks need not be read one by one, so much is read at once; other threads may read more
# meanwhile.
_AT_ONCE_BYTES = 8 << 20
# How much goes together: it is to stay in the processor's cache until it is taken apart.
_TOGETHER_BYTES = 1 << 20


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
        row: (boxes,) the row.
        start: (boxes, width) the box, in the whole tensor.
        stop: (boxes, width).
        place: (boxes,) the byte of the block at which it begins.
        strides: (boxes, width) bytes from an element to the next, in the block.
        after: (boxes,) bytes of the row's boxes before it.
    """

    row: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    place: np.ndarray
    strides: np.ndarray
    after: np.ndarray


@dataclass(frozen=True, slots=True)
class Box:
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
    """

    def __init__(self, fragments: Fragments, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self.round, self.reader = fragments.round, fragments.reader
        self.consumer, self.key = fragments.consumer, fragments.key
        self.file, self.block = fragments.file, fragments.block
        self.itemsize = fragments.itemsize
        self._fragments = fragments
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
            np.add.at(size, boxes.row, elements * self.itemsize[boxes.row])
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

    def cut(self, rows: np.ndarray, part_bytes: int = 0) -> Boxes:
        """Cut some rows into boxes: a block holds a run of the piece, which is a few boxes.

        Args:
            rows: The rows.
            part_bytes: If given, blocks are cut into parts of so many bytes first.
        """
        parts = -(-self.block_bytes // part_bytes) if part_bytes else 1
        part = np.tile(np.arange(parts), len(rows))
        rows = np.repeat(rows, parts)
        table, item = self._fragments, self.itemsize[rows]
        origin = table.piece_start[rows]
        extent = table.piece_stop[rows] - origin
        # How much of the piece lies before the block, and its elements in the part.
        before = self.block[rows] * self.block_bytes - table.offset_bytes[rows]
        size, begin = extent.prod(axis=1), before + part * part_bytes
        end = np.minimum(begin + (part_bytes or self.block_bytes), before + self.block_bytes)
        first, last = np.clip(begin // item, 0, size), np.clip(end // item, 0, size)
        of, low, high = boxes_of_runs(extent, first, last)
        # Boxes of a row follow one another in the block.
        place = (first * item - before)[of] + _before(of, (high - low).prod(axis=1) * item[of])
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
        after = _before(rows[of], (stop - start).prod(axis=1) * item[of])
        origin = origin[of]
        return Boxes(rows[of], start + origin, stop + origin, place[keep], strides[keep], after)

    def boxes_of(self, rows: np.ndarray, part_bytes: int = 0) -> dict[int, list[Box]]:
        """Cut some rows into boxes as `cut` does: row → its own."""
        found: dict[int, list[Box]] = {row: [] for row in rows.tolist()}
        boxes = self.cut(rows, part_bytes)
        for row, *box in zip(
            boxes.row.tolist(),
            map(tuple, boxes.start.tolist()),
            map(tuple, (boxes.stop - boxes.start).tolist()),
            boxes.place.tolist(),
            map(tuple, boxes.strides.tolist()),
            boxes.after.tolist(),
            strict=True,
        ):
            found[row].append(Box(*box))
        return found

    def rounds(self) -> Iterator[np.ndarray]:
        """Yield the rows of each round."""
        yield from split(np.arange(len(self)), self.round)


def split(rows: np.ndarray, column: np.ndarray) -> list[np.ndarray]:
    """Split rows where a column, given for these rows, changes."""
    if not len(rows):
        return []
    return np.split(rows, np.flatnonzero(column[1:] != column[:-1]) + 1)


def _before(group: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Return the sum of the sizes before each in its group; those of a group are neighbours."""
    total = np.cumsum(size) - size
    new = np.ones(len(group), bool)
    new[1:] = group[1:] != group[:-1]
    starts = np.flatnonzero(new)
    found: np.ndarray = total - np.repeat(total[starts], np.diff(np.append(starts, len(group))))
    return found


class Homes:
    """Which rows' bytes are read straight to where they belong, or to where they are sent from.

    A block that holds such rows is read into several pieces of memory. Of rows that want just the
    same bytes one is the others' twin: they are read once. Where rows overlap otherwise, or where
    it isn't worth it, the block is read as a whole, and copied from.

    Args:
        work: What to do.
        mine: The rows that this rank reads.
        own: (rows,) whether this rank wants it.
        place: (rows,) at which byte of its memory; -1 where it must be copied.
        direct: Whether any bytes may be read so.

    Attributes:
        number: (mine,) a number for each block that this rank reads, rising.
        is_home: (rows,) whether it is such a row.
        twin: (rows,) the one that has its bytes; -1 if none.
    """

    def __init__(
        self, work: Work, mine: np.ndarray, own: np.ndarray, place: np.ndarray, *, direct: bool
    ) -> None:
        self.is_home = np.zeros(len(work), bool)
        self.twin = np.full(len(work), -1)
        file, block = work.file[mine], work.block[mine]
        new = np.ones(len(mine), bool)
        new[1:] = (file[1:] != file[:-1]) | (block[1:] != block[:-1])
        number = self.number = np.cumsum(new) - 1
        if not direct or not len(mine):
            return
        base = (number - block) * work.block_bytes
        start, stop = work.start_byte[mine] + base, work.stop_byte[mine] + base
        order = np.lexsort((~own[mine], stop, start))
        rows, start, stop, number = mine[order], start[order], stop[order], number[order]
        first = np.ones(len(rows), bool)
        first[1:] = (start[1:] != start[:-1]) | (stop[1:] != stop[:-1])
        group = np.cumsum(first) - 1
        leads = np.flatnonzero(first)
        size = np.diff(np.append(leads, len(rows)))
        reach = np.maximum.accumulate(stop[leads])
        overlaps = np.zeros(len(leads), bool)
        overlaps[1:] = start[leads][1:] < reach[:-1]
        # Bytes that are copied box by box are taken from the block.
        copied = ~work.is_run[rows] | (own[rows] & ((place[rows] < 0) | ~first))
        overlaps |= np.logical_or.reduceat(copied, leads) & (size > 1)
        whole = np.zeros(int(number[-1]) + 1, bool)
        whole[number[leads[overlaps]]] = True
        lead = rows[leads]
        is_home = work.is_run[lead] & np.where(own[lead], place[lead] >= 0, work.is_long[lead])
        size_bytes = np.where(is_home, stop[leads] - start[leads], 0)
        whole |= np.bincount(number[leads], size_bytes, len(whole)) < _WORTH_BYTES
        is_home &= ~whole[number[leads]]
        self.is_home[lead[is_home]] = True
        twins = np.flatnonzero(~first & is_home[group])
        self.twin[rows[twins]] = lead[group[twins]]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bytes of a file that are read at once, each row's to where it belongs.

    Attributes:
        start_byte: Where it begins in the file.
        is_block: Whether it is just a block.
        rows: From which to which of `Reads.homes` lie in it, in its order.
        gaps: What lies between: before which of these rows, how many bytes, and at which byte of
            the block they are to be found.
    """

    start_byte: int
    is_block: bool
    rows: tuple[int, int]
    gaps: list[tuple[int, int, int]]


@dataclass(frozen=True, slots=True)
class Read:
    """A block that a rank reads.

    Attributes:
        file: Its file.
        block: Its number there.
        stretches: What is read at once, from this block on; empty if the block is read as a whole.
        rest: From which to which of `Reads.rest` are copied from the block.
        in_parts: Whether these may be copied part by part, before all of the block is there.
    """

    file: int
    block: int
    stretches: list[Stretch]
    rest: tuple[int, int]
    in_parts: bool


class Reads:
    """How the blocks that a rank reads are taken apart.

    Args:
        work: What to do.
        homes: Which rows are read straight to their places.
        mine: The rows that this rank reads.
        copied: (rows,) whether a row that is none of those must be copied.
        span: (file, block) → the block's first byte in its file, and one past its last.
        in_parts: Whether bytes may be copied before all of their block is there.
        gap_bytes: Where blocks need not be read whole: how many bytes that nobody wants are read
            with the rest. None where they are read whole.

    Attributes:
        homes: The rows that are read straight to their places, in the order of reading.
        rest: The rows that are copied, in the order of the blocks.
        of_round: Round → its blocks, in the order of reading.
        parted: (rows,) whether the row's block is read in parts.
    """

    def __init__(
        self,
        work: Work,
        homes: Homes,
        mine: np.ndarray,
        copied: np.ndarray,
        span: Callable[[int, int], tuple[int, int]],
        *,
        in_parts: bool,
        gap_bytes: int | None,
    ) -> None:
        number = homes.number
        edges = np.arange(int(number[-1]) + 2) if len(number) else np.zeros(1, np.int64)
        first = mine[np.searchsorted(number, edges[:-1])]
        file, block = work.file[first].tolist(), work.block[first].tolist()
        at_home = homes.is_home[mine]
        rest = ~at_home & copied[mine]
        self.rest = mine[rest]
        rest_edges = np.searchsorted(number[rest], edges).tolist()
        order = np.flatnonzero(at_home)
        order = order[np.lexsort((work.start_byte[mine[order]], number[order]))]
        self.homes = mine[order]
        stretches: list[list[Stretch]] = [[] for _ in first]
        if len(order):
            spans = np.array([span(*of) for of in zip(file, block, strict=True)])
            # A block of which nothing is copied need not be read whole.
            loose = np.bincount(number[rest], minlength=len(first)) == 0
            loose &= gap_bytes is not None
            for owner, stretch in self._stretches(
                work, number[order], spans, loose, gap_bytes=gap_bytes or 0
            ):
                stretches[owner].append(stretch)
        worth = np.bincount(number[rest], work.size_bytes[self.rest], len(first)) >= _WORTH_BYTES
        whole = np.array([not found for found in stretches], bool)
        parted = worth & whole & in_parts
        self.parted = np.zeros(len(work), bool)
        self.parted[mine] = parted[number]
        self.of_round: dict[int, list[Read]] = {}
        for round_, *read in zip(
            work.round[first].tolist(),
            file,
            block,
            stretches,
            pairwise(rest_edges),
            parted.tolist(),
            strict=True,
        ):
            self.of_round.setdefault(round_, []).append(Read(*read))

    def _stretches(
        self,
        work: Work,
        number: np.ndarray,
        spans: np.ndarray,
        loose: np.ndarray,
        *,
        gap_bytes: int,
    ) -> Iterator[tuple[int, Stretch]]:
        """Yield what is read at once, and the number of the block at which that begins.

        Args:
            work: What to do.
            number: (homes,) the number of each one's block.
            spans: (blocks, 2) the first byte of each block, and one past its last.
            loose: (blocks,) whether it need not be read whole.
            gap_bytes: As above.
        """
        rows = self.homes
        start, stop, is_loose = work.start_byte[rows], work.stop_byte[rows], loose[number]
        new = np.ones(len(rows), bool)
        new[1:] = number[1:] != number[:-1]
        apart = start[1:] - stop[:-1]
        joined = is_loose[1:] & is_loose[:-1] & (apart >= 0) & (apart <= gap_bytes)
        for column in (work.round, work.file, work.start_byte // _AT_ONCE_BYTES):
            joined &= column[rows[1:]] == column[rows[:-1]]
        new[1:] = np.where(is_loose[1:], ~joined, new[1:])
        firsts = np.flatnonzero(new)
        lasts = np.append(firsts[1:], len(rows))
        begin = np.where(is_loose[firsts], start[firsts], spans[number[firsts], 0])
        end = np.where(is_loose[firsts], stop[lasts - 1], spans[number[firsts], 1])
        # What lies before each row, and behind the last one of a stretch.
        before = np.empty(len(rows), np.int64)
        before[1:] = stop[:-1]
        before[firsts] = begin
        behind = stop[lasts - 1]
        holes, tails = np.flatnonzero(start > before), np.flatnonzero(end > behind)
        gap_of = np.concatenate([(np.cumsum(new) - 1)[holes], tails])
        gap_row = np.concatenate([holes, lasts[tails]])
        gap_size = np.concatenate([(start - before)[holes], (end - behind)[tails]])
        gap_first = np.concatenate([before[holes], behind[tails]])
        gap_place = np.where(is_loose[firsts[gap_of]], 0, gap_first - begin[gap_of])
        gaps: list[list[tuple[int, int, int]]] = [[] for _ in firsts]
        for of, *gap in zip(
            gap_of.tolist(), gap_row.tolist(), gap_size.tolist(), gap_place.tolist(), strict=True
        ):
            gaps[of].append((gap[0], gap[1], gap[2]))
        for owner, first_byte, whole, low, high, found in zip(
            number[firsts].tolist(),
            begin.tolist(),
            (~is_loose[firsts]).tolist(),
            firsts.tolist(),
            lasts.tolist(),
            gaps,
            strict=True,
        ):
            yield owner, Stretch(first_byte, whole, (low, high), found)


class Stream:
    """What one rank sends another in a round, in parts; both sides cut it alike.

    A long run is a part alone, and so can be sent, and received, where it lies. The rest goes
    together, in parts that stay in the processor's cache.

    Args:
        work: What to do.
        rows: The rows of this round that the one reads and the other wants, in order.
        together: Whether long runs go with the rest, too.

    Attributes:
        rows: The rows.
        part: (rows,) the number of the part that each is in.
        place: (rows,) the byte at which it begins there.
        sizes: How long each part is, in bytes.
    """

    def __init__(self, work: Work, rows: np.ndarray, *, together: bool) -> None:
        self.rows = rows
        size = work.size_bytes[rows]
        alone = work.is_long[rows] & (not together)
        short, long = np.flatnonzero(~alone), np.flatnonzero(alone)
        number = (np.cumsum(size[short]) - size[short]) // _TOGETHER_BYTES
        new = np.ones(len(short), bool)
        new[1:] = number[1:] != number[:-1]
        self.part, self.place = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
        self._together = int(np.count_nonzero(new))
        self._alone = rows[long]
        self.part[short] = np.cumsum(new) - 1
        self.place[short] = _before(self.part[short], size[short])
        self.part[long] = self._together + np.arange(len(long))
        sizes = np.zeros(self._together + len(long), np.int64)
        np.add.at(sizes, self.part, size)
        self.sizes: list[int] = sizes.tolist()

    def alone(self, part: int) -> int | None:
        """Return the row that is a part alone; None if the part may have several."""
        return None if part < self._together else int(self._alone[part - self._together])
