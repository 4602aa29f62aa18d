"""What one rank does in an exchange, but for the memory: worked out for all blocks at once.

Most of what is wanted is a run: it lies in one stretch of its file, and belongs into one stretch of
memory. Such bytes are read, sent and received where they belong. The rest is copied box by box, in
parts of blocks that stay in the processor's cache.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from distckpt.copies import Box, Places, Work, before_in_group, split

# A block of which fewer bytes are runs is checked before any of them is put in place, which costs a
# copy: then damage changes nothing.
_WORTH_BYTES = 1 << 18
# In about so many bytes is a block read of which boxes are copied, so that they are copied from the
# processor's cache.
_PART_BYTES = 1 << 20
# Parts are cut between lines that are no longer than this.
_LINE_BYTES = _PART_BYTES // 4
# Where nothing is checked, bytes that nobody wants are read with the rest if they are no more.
_GAP_BYTES = 16 << 10
# Where blocks need not be read one by one, so much is read at once; other threads may read more
# meanwhile.
_AT_ONCE_BYTES = 8 << 20
# How much goes together: it is to stay in the processor's cache until it is taken apart.
_TOGETHER_BYTES = 1 << 20
_LINE_ALIGNMENT = 64
# So many are kept of one work: a net may be loaded now with checks and now without.
_KEPT = 4


@dataclass(frozen=True, slots=True)
class Setting:
    """What a schedule depends on, beside the work.

    Attributes:
        rank: Whose it is.
        places: Where its boxes lie in memory; None if all of them are put in place one by one.
        ends: File → how many bytes of it are blocks.
        direct: Whether bytes may be read to where they belong, before they are checked.
        checked: Whether blocks are checked, and so read whole.
        skips: Whether what is damaged is left out, and so all of it looked at first.
    """

    rank: int
    places: Places | None
    ends: Mapping[int, int]
    direct: bool
    checked: bool
    skips: bool

    def is_like(self, other: Setting) -> bool:
        """Whether another asks for the same schedule."""
        mine = (self.rank, self.ends, self.direct, self.checked, self.skips)
        if mine != (other.rank, other.ends, other.direct, other.checked, other.skips):
            return False
        if self.places is None or other.places is None:
            return self.places is other.places
        return self.places.is_like(other.places)


class Stretch(NamedTuple):
    """Bytes of a file that are read at once, each row's to where it belongs.

    Attributes:
        start_byte: Where it begins in the file.
        is_block: Whether it is just a block.
        key: (n,) whose memory this rank's own rows go to, in their order.
        first: (n,) from which byte on.
        last: (n,) and before which.
        sent: What goes to memory that will be sent: before which of the own rows and of these, and
            the row.
        gaps: What lies between: before which of all rows, how many bytes, and at which byte of the
            block they are to be found.
    """

    start_byte: int
    is_block: bool
    key: list[int]
    first: list[int]
    last: list[int]
    sent: list[tuple[int, int]]
    gaps: list[tuple[int, int, int]]


class Copy(NamedTuple):
    """What is copied for a row from a block, or from a part of one.

    Attributes:
        row: The row.
        key: Whose memory it goes to.
        itemsize: Bytes of an element.
        is_own: Whether this rank wants it.
        twin: The row that has just these bytes, and has been read to its place; -1 if none.
        run: From which to which byte of the block, and at which byte of the row, if it is a run
            that is sent.
        boxes: What is copied otherwise.
    """

    row: int
    key: int
    itemsize: int
    is_own: bool
    twin: int
    run: tuple[int, int, int] | None
    boxes: Sequence[Box]


@dataclass(slots=True)
class Read:
    """A block that a rank reads.

    Attributes:
        file: Its file.
        block: Its number there.
        stretches: What is read at once, from this block on; empty if the block is read as a whole.
        edges: At which bytes of the block parts of it begin that may be copied before all of it is
            there, and where the last one ends; empty if it is not read so.
        copies: What is copied from each part; or from the block, as if it were one.
        keys: (n,) the keys of what this rank wants of these copies.
    """

    file: int
    block: int
    stretches: list[Stretch] = field(default_factory=list)
    edges: list[int] = field(default_factory=list)
    copies: list[list[Copy]] = field(default_factory=list)
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


class Entry(NamedTuple):
    """Where a row is in a stream.

    Attributes:
        row: The row.
        key: Whose memory it goes to.
        first: The byte at which it begins in its part.
        size: How many bytes it has.
        place: The byte of the consumer's memory where it goes; -1 where it goes box by box.
        number: Which of the stream's rows it is.
    """

    row: int
    key: int
    first: int
    size: int
    place: int
    number: int


def aligned(size_bytes: int) -> int:
    """Round a size up, so that what follows begins with a line of the processor's cache."""
    return -(-size_bytes // _LINE_ALIGNMENT) * _LINE_ALIGNMENT


class Stream:
    """What one rank sends another in a round, in parts; both sides cut it alike.

    A long run is a part alone, and so can be sent, and received, where it lies. The rest goes
    together, in parts that stay in the processor's cache.

    Args:
        schedule: Of this rank.
        work: What to do.
        peer: The other rank.
        rows: The rows of this round that the one reads and the other wants, in order.

    Attributes:
        peer: The other rank.
        sizes: How long each part is, in bytes.
        entries: What is in each part.
        alone: Of each part, whether it is a row alone.
        twins: Of each part, the row of which it is the twin; -1 if it has memory of its own.
        sent_bytes: How much memory it takes to put together what is sent.
    """

    def __init__(self, schedule: Schedule, work: Work, peer: int, rows: np.ndarray) -> None:
        self.peer = peer
        size = work.size_bytes[rows]
        alone = work.is_long[rows] & (not schedule.setting.skips)
        short, long = np.flatnonzero(~alone), np.flatnonzero(alone)
        number = (np.cumsum(size[short]) - size[short]) // _TOGETHER_BYTES
        new = np.ones(len(short), bool)
        new[1:] = number[1:] != number[:-1]
        together = int(np.count_nonzero(new))
        part, first = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
        part[short] = np.cumsum(new) - 1
        first[short] = before_in_group(part[short], size[short])
        part[long] = together + np.arange(len(long))
        sizes = np.zeros(together + len(long), np.int64)
        np.add.at(sizes, part, size)
        self.sizes: list[int] = sizes.tolist()
        self.alone = [False] * together + [True] * len(long)
        self.entries: list[list[Entry]] = [[] for _ in self.sizes]
        columns = (part, rows, work.key[rows], first, size, schedule.place[rows])
        for number, (of, row, key, begin, length, place) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True)
        ):
            self.entries[of].append(Entry(row, key, begin, length, place, number))
        self.twins = [
            int(schedule.twin[entries[0].row]) if alone else -1
            for alone, entries in zip(self.alone, self.entries, strict=True)
        ]
        self.sent_bytes = sum(
            aligned(size) for size, twin in zip(self.sizes, self.twins, strict=True) if twin < 0
        )


class Round(NamedTuple):
    """What a rank does in one round.

    Attributes:
        reads: The blocks that it reads, in their order.
        outgoing: What others get.
        incoming: What it gets.
    """

    reads: list[Read]
    outgoing: list[Stream]
    incoming: list[Stream]


class Schedule:
    """What one rank does in an exchange.

    Args:
        work: What to do.
        setting: The rest that it depends on.

    Attributes:
        setting: See above.
        key: (rows,) whose memory each goes to.
        size_bytes: (rows,) how many bytes of its block are wanted.
        own: (rows,) whether this rank wants it.
        place: (rows,) at which byte of its own memory what it wants goes; -1 where it is copied
            box by box, and for what others want.
        twin: (rows,) the row that has just the bytes of one that is sent; -1 if none.
        boxes: The boxes of rows that are copied from their block, or from what was sent.
        rounds: Round by round.
        blocks: How many blocks this rank reads.
        most_sent_bytes: How much memory what is sent takes, in any round.
    """

    def __init__(self, work: Work, setting: Setting) -> None:
        self.setting = setting
        self.key, self.size_bytes = work.key, work.size_bytes
        mine = work.reader == setting.rank
        self.own = own = work.consumer == setting.rank
        self.place = np.full(len(work), -1)
        if setting.places is not None:
            rows = np.flatnonzero(own)
            self.place[rows] = work.in_memory(rows, setting.places)
        homes = _Homes(work, np.flatnonzero(mine), own, self.place, direct=setting.direct)
        self.twin = homes.twin
        # A long run that another rank gets leaves from where it is.
        copied = own | ~(work.is_long & (homes.twin >= 0))
        reads = _Reads(self, work, homes, copied)
        boxed = mine & ~work.is_run
        boxed |= own & (self.place < 0)
        boxed |= own & mine & ~homes.is_home
        if setting.skips:
            boxed |= own
        boxed &= ~reads.parted
        self.boxes: dict[int, list[Box]] = {row: [] for row in np.flatnonzero(boxed).tolist()}
        rows = np.flatnonzero(boxed)
        numbers = rows.tolist()
        for of, box in work.cut(rows).each():
            self.boxes[numbers[of]].append(box)
        reads.add_copies(self.boxes)
        self.blocks = len(reads.all)
        self.rounds = [
            Round(
                reads.of_round.get(int(work.round[rows[0]]), []),
                [
                    Stream(self, work, consumer, some)
                    for consumer, some in _by(work.consumer, rows[mine[rows] & ~own[rows]])
                ],
                [
                    Stream(self, work, reader, some)
                    for reader, some in _by(work.reader, rows[own[rows] & ~mine[rows]])
                ],
            )
            for rows in work.rounds()
        ]
        self.most_sent_bytes = max(
            (sum(stream.sent_bytes for stream in part.outgoing) for part in self.rounds), default=0
        )

    @classmethod
    def of(cls, work: Work, setting: Setting) -> Schedule:
        """Return the schedule of some work; those that were used last are kept with it."""
        like = (kept for kept in reversed(work.schedules) if kept.setting.is_like(setting))
        found: Schedule = next(like, None) or cls(work, setting)
        others = [kept for kept in work.schedules if kept is not found]
        work.schedules = [*others, found][-_KEPT:]
        return found


class _Homes:
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
        mine: See above.
        number: (mine,) a number for each block that this rank reads, rising.
        is_home: (rows,) whether it is such a row.
        twin: (rows,) the one that has its bytes; -1 if none.
    """

    def __init__(
        self, work: Work, mine: np.ndarray, own: np.ndarray, place: np.ndarray, *, direct: bool
    ) -> None:
        self.mine = mine
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


class _Reads:
    """How the blocks that a rank reads are taken apart.

    Args:
        schedule: What is known already: its setting, what is its own, and where it goes.
        work: What to do.
        homes: Which rows are read straight to their places.
        copied: (rows,) whether a row that is none of those must be copied.

    Attributes:
        all: The blocks, in the order of reading.
        of_round: Round → its blocks.
        parted: (rows,) whether the row's block is read in parts.
    """

    def __init__(self, schedule: Schedule, work: Work, homes: _Homes, copied: np.ndarray) -> None:
        self._schedule, self._work = schedule, work
        setting = schedule.setting
        mine, number = homes.mine, homes.number
        edges = np.arange(int(number[-1]) + 2) if len(number) else np.zeros(1, np.int64)
        first = mine[np.searchsorted(number, edges[:-1])]
        at_home = homes.is_home[mine]
        rest = ~at_home & copied[mine]
        #: The rows that are copied, in the order of the blocks; and where those of each begin.
        self._rest, self._rest_number = mine[rest], number[rest]
        self._rest_edges: list[int] = np.searchsorted(self._rest_number, edges).tolist()
        files, blocks = work.file[first].tolist(), work.block[first].tolist()
        self.all = [Read(*of) for of in zip(files, blocks, strict=True)]
        size = work.block_bytes
        self._spans = np.array(
            [
                (block * size, min((block + 1) * size, setting.ends[file]))
                for file, block in zip(files, blocks, strict=True)
            ],
            np.int64,
        ).reshape(-1, 2)
        order = np.flatnonzero(at_home)
        order = order[np.lexsort((work.start_byte[mine[order]], number[order]))]
        if len(order):
            # A block of which nothing is copied need not be read whole, unless it is checked.
            loose = np.bincount(self._rest_number, minlength=len(first)) == 0
            loose &= not setting.checked
            for owner, stretch in self._stretches(mine[order], number[order], loose):
                self.all[owner].stretches.append(stretch)
        worth = np.bincount(self._rest_number, work.size_bytes[self._rest], len(first))
        whole = np.array([not read.stretches for read in self.all], bool)
        parted = (worth >= _WORTH_BYTES) & whole & setting.direct
        self.parted = np.zeros(len(work), bool)
        self.parted[mine] = parted[number]
        self._cut(np.flatnonzero(parted))
        self.of_round: dict[int, list[Read]] = {}
        for round_, read in zip(work.round[first].tolist(), self.all, strict=True):
            self.of_round.setdefault(round_, []).append(read)

    def _cut(self, numbers: np.ndarray) -> None:
        """Cut blocks into parts, between lines of the pieces in them."""
        work, rows = self._work, self._rest
        count = -(-(self._spans[numbers, 1] - self._spans[numbers, 0]) // _PART_BYTES)
        number = np.repeat(numbers, count)
        byte = (np.arange(len(number)) - np.repeat(np.cumsum(count) - count, count)) * _PART_BYTES
        # Pieces don't overlap: the last row that begins before the byte is of the piece, if any is.
        start = work.start_byte[rows] - self._spans[self._rest_number, 0]
        order = np.lexsort((start, self._rest_number))
        place = (self._rest_number * work.block_bytes + start)[order]
        found = np.searchsorted(place, number * work.block_bytes + byte, side="right") - 1
        row = rows[order[found]]
        known = (found >= 0) & (self._rest_number[order[found]] == number)
        edge = np.where(known, work.edges_before(row, byte, _LINE_BYTES), byte)
        for owner, first in zip(number.tolist(), np.maximum(edge, 0).tolist(), strict=True):
            self.all[owner].edges.append(first)
        for owner in numbers.tolist():
            edges = self.all[owner].edges
            edges[0] = 0
            edges.append(int(self._spans[owner, 1] - self._spans[owner, 0]))

    def add_copies(self, boxes: Mapping[int, Sequence[Box]]) -> None:
        """Note what is copied from each block; the boxes are those of blocks read in one."""
        schedule, work, rows = self._schedule, self._work, self._rest
        start = work.start_byte[rows] - self._spans[self._rest_number, 0]
        columns = (
            rows,
            work.key[rows],
            work.itemsize[rows],
            schedule.own[rows],
            schedule.twin[rows],
            work.is_run[rows],
            start,
            start + work.stop_byte[rows] - work.start_byte[rows],
        )
        listed = list(zip(*(column.tolist() for column in columns), strict=True))
        cut = self._boxes_of_parts()
        for read, (low, high) in zip(self.all, pairwise(self._rest_edges), strict=True):
            if low == high:
                continue
            edges = read.edges or [0, work.block_bytes]
            read.copies = [[] for _ in edges[1:]]
            read.keys = work.key[rows[low:high][schedule.own[rows[low:high]]]]
            for row, key, item, is_own, twin, is_run, first, last in listed[low:high]:
                if is_run and not is_own:
                    for part in range(bisect_right(edges, first) - 1, len(edges) - 1):
                        begin, end = max(first, edges[part]), min(last, edges[part + 1])
                        if begin >= end:
                            break
                        run = begin, end, begin - first
                        read.copies[part].append(Copy(row, key, item, is_own, twin, run, ()))
                    continue
                found = cut.get(row, {}) if read.edges else {0: boxes[row]}
                for part, some in found.items():
                    read.copies[part].append(Copy(row, key, item, is_own, twin, None, some))

    def _boxes_of_parts(self) -> dict[int, dict[int, list[Box]]]:
        """Cut the rows of blocks that are read in parts: row → part → boxes."""
        schedule, work = self._schedule, self._work
        boxed = (self.parted & (schedule.own | ~work.is_run))[self._rest]
        rows, number = self._rest[boxed], self._rest_number[boxed]
        count = np.array([max(len(read.edges) - 1, 0) for read in self.all], np.int64)
        edges = np.array([edge for read in self.all for edge in read.edges], np.int64)
        # Of each block with parts, where its edges begin among all.
        start = np.cumsum(count + (count > 0)) - count - (count > 0)
        of = np.repeat(np.arange(len(rows)), count[number])
        part = np.arange(len(of)) - np.repeat(
            np.cumsum(count[number]) - count[number], count[number]
        )
        edge = start[number[of]] + part
        found: dict[int, dict[int, list[Box]]] = {}
        numbers, parts = rows[of].tolist(), part.tolist()
        for index, box in work.cut(rows[of], edges[edge], edges[edge + 1]).each():
            found.setdefault(numbers[index], {}).setdefault(parts[index], []).append(box)
        return found

    def _stretches(
        self, rows: np.ndarray, number: np.ndarray, loose: np.ndarray
    ) -> Iterator[tuple[int, Stretch]]:
        """Yield what is read at once, and the number of the block at which that begins.

        Args:
            rows: (n,) what is read straight to its place, in the order of reading.
            number: (n,) the number of each one's block.
            loose: (blocks,) whether it need not be read whole.
        """
        schedule, work, spans = self._schedule, self._work, self._spans
        start, stop, is_loose = work.start_byte[rows], work.stop_byte[rows], loose[number]
        new = np.ones(len(rows), bool)
        new[1:] = number[1:] != number[:-1]
        apart = start[1:] - stop[:-1]
        joined = is_loose[1:] & is_loose[:-1] & (apart >= 0) & (apart <= _GAP_BYTES)
        for column in (work.round, work.file, work.start_byte // _AT_ONCE_BYTES):
            joined &= column[rows[1:]] == column[rows[:-1]]
        new[1:] = np.where(is_loose[1:], ~joined, new[1:])
        firsts = np.flatnonzero(new)
        lasts = np.append(firsts[1:], len(rows))
        begin = np.where(is_loose[firsts], start[firsts], spans[number[firsts], 0])
        end = np.where(is_loose[firsts], stop[lasts - 1], spans[number[firsts], 1])
        of = np.cumsum(new) - 1
        # What lies before each row, and behind the last one of a stretch.
        before = np.empty(len(rows), np.int64)
        before[1:] = stop[:-1]
        before[firsts] = begin
        behind = stop[lasts - 1]
        holes, tails = np.flatnonzero(start > before), np.flatnonzero(end > behind)
        gap_of = np.concatenate([of[holes], tails])
        gap_row = np.concatenate([holes, lasts[tails]])
        gap_size = np.concatenate([(start - before)[holes], (end - behind)[tails]])
        gap_first = np.concatenate([before[holes], behind[tails]])
        gap_place = np.where(is_loose[firsts[gap_of]], 0, gap_first - begin[gap_of])
        gaps: list[list[tuple[int, int, int]]] = [[] for _ in firsts]
        for stretch, row, size, place in zip(
            gap_of.tolist(),
            (gap_row - firsts[gap_of]).tolist(),
            gap_size.tolist(),
            gap_place.tolist(),
            strict=True,
        ):
            gaps[stretch].append((row, size, place))
        own = schedule.own[rows]
        sent: list[list[tuple[int, int]]] = [[] for _ in firsts]
        others = np.flatnonzero(~own)
        for stretch, index, row in zip(
            of[others].tolist(),
            (others - firsts[of[others]]).tolist(),
            rows[others].tolist(),
            strict=True,
        ):
            sent[stretch].append((index, row))
        mine = rows[own]
        edges = np.searchsorted(np.flatnonzero(own), np.append(firsts, len(rows))).tolist()
        key, first = work.key[mine].tolist(), schedule.place[mine].tolist()
        last = (schedule.place[mine] + work.size_bytes[mine]).tolist()
        for index, (owner, first_byte, is_block, low, high) in enumerate(
            zip(
                number[firsts].tolist(),
                begin.tolist(),
                (~is_loose[firsts]).tolist(),
                edges[:-1],
                edges[1:],
                strict=True,
            )
        ):
            yield (
                owner,
                Stretch(
                    first_byte,
                    is_block,
                    key[low:high],
                    first[low:high],
                    last[low:high],
                    sent[index],
                    gaps[index],
                ),
            )


def _by(column: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Group rows by a column: (value, its rows in their order), by rising value."""
    rows = rows[np.argsort(column[rows], kind="stable")]
    for some in split(rows, column[rows]):
        yield int(column[some[0]]), some
