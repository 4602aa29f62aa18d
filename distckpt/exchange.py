"""Bringing what is wanted of a checkpoint's blocks to where it is wanted, be it on another rank."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from queue import Empty, SimpleQueue
from typing import Protocol

import numpy as np

from distckpt.copies import (
    PART_BYTES,
    Box,
    Homes,
    Places,
    Read,
    Reads,
    Stream,
    Stretch,
    Work,
    split,
)
from distckpt.errors import CheckpointError, CorruptCheckpoint, IncompleteCheckpoint, text
from distckpt.reader import BlockReader
from distckpt.region import Region
from distckpt.team import Late, Operation
from distckpt.waiting import Collections, Waiting

# A consumer may be so many rounds behind its reader before the reader waits.
_ROUNDS_AHEAD = 1
# Where nothing is checked, bytes that nobody wants are read with the rest if they are no more.
_GAP_BYTES = 16 << 10
# What is less is read by one thread: to start others takes as long.
_MUCH_BYTES = 32 << 20
_MOST_THREADS = 4
# Memory is taken in multiples of this, so that it fits again.
_KEPT_BYTES = 1 << 16
# Types that move elements of a size without looking at them.
_BITS = {np.dtype(kind).itemsize: np.dtype(kind) for kind in ("u1", "u2", "u4", "u8", "c16")}
_TAKE = "take what was read for it"


class Landing(Protocol):
    """Takes what a rank wants, by key.

    Attributes:
        places: Where its boxes lie in memory; None if nothing may be put there unseen.
    """

    @property
    def places(self) -> Places | None:
        """See above."""

    def dtype(self, key: int) -> np.dtype:
        """Return the dtype, as stored, of what a key wants."""

    def memories(self, key: np.ndarray, start: np.ndarray, stop: np.ndarray) -> list[memoryview]:
        """Return stretches of memory, which are going to be filled.

        Args:
            key: (n,) whose memory.
            start: (n,) first byte.
            stop: (n,) one past the last.
        """

    def takes_any(self, key: np.ndarray) -> bool:
        """Whether parts of these keys' boxes may be put by several threads at once."""

    def put(self, key: int, start: tuple[int, ...], values: np.ndarray) -> None:
        """Take a part of a key's box.

        Args:
            key: Whose.
            start: Where the part begins in the whole tensor, padded as `Fragments` are.
            values: The part, of as many dimensions; valid until this returns.
        """


@dataclass(slots=True)
class Skipped:
    """What could not be read, and was left out.

    Attributes:
        regions: (key, region) of what this rank wanted.
        damage: What was wrong, of the blocks that this rank read.
        missing: Whether a file was not there.
    """

    regions: list[tuple[int, Region]] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)
    missing: bool = False


def exchange(
    operation: Operation,
    step: int,
    work: Work,
    blocks: BlockReader,
    into: Landing,
    *,
    skipped: Skipped | None = None,
    threads: int = 1,
) -> Waiting[CheckpointError | None]:
    """Collective. Read this rank's blocks, hand out what others want, and take what it wants.

    In rounds, so that a bounded number of bytes is on its way. Each message says whether its blocks
    are good. Uses the steps `step` (data) and `step + 1` (acknowledgements) of the operation.

    Args:
        operation: The messages.
        step: See above.
        work: What to do; rows in the order of the rounds.
        blocks: Reads blocks.
        into: Takes what this rank wants. Its memory may change before the bytes have been checked,
            unless `skipped` is given.
        skipped: Takes what is damaged or missing; None if that is a failure. On all ranks alike.
        threads: How many may read, where that is faster: from local files, if there is much.

    Returns:
        None, or the first failure of this rank, or that another rank reported. Never raises one:
        the others wait.
    """
    if not len(work):
        return None
    exchanged = _Exchange(operation, step, work, blocks, into, skipped=skipped, threads=threads)
    try:
        with exchanged.helpers or nullcontext():
            yield from exchanged.run()
    except Late as late:
        return late
    return exchanged.failure


def threads_for(neighbours: int) -> int:
    """Say how many threads may read, where so many ranks, this one included, share the machine."""
    # Those that this process may run on: launchers bind ranks to some.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(_MOST_THREADS, (cores or 1) // neighbours))


class _Worker:
    """What one thread needs to read blocks.

    Attributes:
        blocks: Reads them.
    """

    def __init__(self, blocks: BlockReader) -> None:
        self.blocks = blocks

    @cached_property
    def gaps(self) -> np.ndarray:
        """Memory for what lies between the rows of a block, at its place there."""
        return np.empty(self.blocks.block_bytes, np.uint8)


class _Exchange:
    """This rank's part of an exchange: what it reads, sends and takes, and the first failure."""

    def __init__(
        self,
        operation: Operation,
        step: int,
        work: Work,
        blocks: BlockReader,
        into: Landing,
        *,
        skipped: Skipped | None,
        threads: int,
    ) -> None:
        self._operation, self._step, self._work = operation, step, work
        self._blocks, self._into, self._skipped = blocks, into, skipped
        self.failure: CheckpointError | None = None
        self._pool = _Pool()
        self._mine = work.reader == operation.rank
        self._own = work.consumer == operation.rank
        # Where this rank's own bytes go in one stretch.
        self._place = np.full(len(work), -1)
        if into.places is not None:
            own = np.flatnonzero(self._own)
            self._place[own] = work.in_memory(own, into.places)
        self._end = self._place + work.size_bytes
        direct = blocks.scatters and skipped is None
        mine = np.flatnonzero(self._mine)
        self._homes = Homes(work, mine, self._own, self._place, direct=direct)
        # A long run that another rank gets leaves from where it is.
        leaves = work.is_long & (self._homes.twin >= 0)
        self._reads = Reads(
            work,
            self._homes,
            mine,
            self._own | ~leaves,
            blocks.span,
            in_parts=direct,
            gap_bytes=None if blocks.verify else _GAP_BYTES,
        )
        boxed = self._mine & ~work.is_run
        boxed |= self._own & (self._place < 0)
        boxed |= self._own & self._mine & ~self._homes.is_home
        if skipped is not None:
            boxed |= self._own
        parted = self._reads.parted
        self._boxes = work.boxes_of(np.flatnonzero(boxed & ~parted))
        self._boxes_of_part: dict[tuple[int, int], list[Box]] = {}
        for row, boxes in work.boxes_of(np.flatnonzero(boxed & parted), PART_BYTES).items():
            for box in boxes:
                self._boxes_of_part.setdefault((row, box.place // PART_BYTES), []).append(box)

        self._worker = _Worker(blocks)
        count = sum(map(len, self._reads.of_round.values()))
        self._threads = threads if direct and count * work.block_bytes >= _MUCH_BYTES else 1
        self.helpers = (
            ThreadPoolExecutor(self._threads - 1, "distckpt-load") if self._threads > 1 else None
        )
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for _ in range(self._threads - 1):
            self._idle.put(_Worker(blocks.another()))

    def run(self) -> Waiting[None]:
        """Do all rounds."""
        receive, work = self._operation.receive, self._work
        collections = Collections()
        ahead: dict[int, list[_Round]] = {}  # consumer → rounds that it has not acknowledged
        for rows in work.rounds():
            collections.remind()
            done = self._read(rows)
            for consumer, outgoing in done.outgoing.items():
                sent = ahead.setdefault(consumer, [])
                while len(sent) > _ROUNDS_AHEAD:
                    yield from receive(consumer, self._step + 1, _TAKE)
                    sent.pop(0).acknowledged(self._pool)
                sent.append(done)
                error = None if self.failure is None else text(self.failure)
                message = {"error": error, "lost": outgoing.lost}
                parts = [] if error else outgoing.parts
                self._operation.send(consumer, self._step, message, parts)
            for reader, some in _by(work.reader, rows[self._own[rows] & ~self._mine[rows]]):
                yield from self._take(reader, some)
        for consumer, sent in ahead.items():
            for _ in sent:
                yield from receive(consumer, self._step + 1, _TAKE)

    def _fail(self, exc: Exception) -> None:
        """Note a failure; the first counts."""
        error = exc if isinstance(exc, CheckpointError) else CheckpointError(text(exc))
        self.failure = self.failure or error

    # ------------------------------------------------------------------------------------- reading

    def _read(self, rows: np.ndarray) -> _Round:
        """Read this rank's blocks of a round."""
        work = self._work
        mine = rows[self._mine[rows]]
        done = _Round()
        for consumer, some in _by(work.consumer, mine[~self._own[mine]]):
            stream = Stream(work, some, together=self._skipped is not None)
            done.outgoing[consumer] = self._prepared(stream, done)
        if self.failure is None:
            try:
                self._read_blocks(self._reads.of_round.get(int(work.round[rows[0]]), []), done)
            except Exception as exc:  # noqa: BLE001  the others wait for this rank's messages
                self._fail(exc)
        return done

    def _prepared(self, stream: Stream, done: _Round) -> _Outgoing:
        """Make the parts of what a rank gets, to be filled, and note where each row goes."""
        parts: list[memoryview] = []
        homes = self._homes
        for number, length in enumerate(stream.sizes):
            row = stream.alone(number)
            twin = -1 if row is None else int(homes.twin[row])
            if twin < 0:
                buffer = self._pool.take(length)
                done.buffers.append(buffer)
                parts.append(buffer[:length].data)
            elif self._own[twin]:
                # What this rank reads for itself leaves from where it is.
                parts += self._memories(np.array([twin]))
            else:
                parts.append(done.slots[twin].data)
        places = zip(
            stream.rows.tolist(),
            stream.part.tolist(),
            stream.place.tolist(),
            self._work.size_bytes[stream.rows].tolist(),
            strict=True,
        )
        whole = [np.frombuffer(part, np.uint8) for part in parts]
        for row, number, place, size in places:
            if stream.alone(number) is None or homes.twin[row] < 0:
                done.slots[row] = whole[number][place : place + size]
        return _Outgoing(stream, parts)

    def _read_blocks(self, reads: Sequence[Read], done: _Round) -> None:
        whole = [read for read in reads if not read.stretches and not read.in_parts]
        self._blocks.expect((read.file, read.block) for read in whole)
        if self.helpers is None:
            for read in reads:
                self._read_one(read, self._worker, done)
            return
        # What a thread of its own may not do is left to this one, which then helps the others.
        queue = SimpleQueue[Read]()
        mine: list[Read] = []
        for read in reads:
            (queue.put if self._is_for_any(read) else mine.append)(read)
        helping: list[Future[int]] = []
        try:
            with suppress(RuntimeError):  # the program is ending, or has too many threads already
                helping.extend(
                    self.helpers.submit(self._help, queue, done) for _ in range(self._threads - 1)
                )
            for read in mine:
                self._read_one(read, self._worker, done)
            self._read_all(queue, self._worker, done)
        finally:
            # Others' memory is written until they have ended.
            wait(helping)
        for helper in helping:
            self._blocks.add(helper.result())

    def _is_for_any(self, read: Read) -> bool:
        """Whether any thread may read a block."""
        rows = self._reads.rest[slice(*read.rest)]
        own = rows[self._own[rows]]
        return not len(own) or self._into.takes_any(self._work.key[own])

    def _help(self, queue: SimpleQueue[Read], done: _Round) -> int:
        """In a helper's thread: read blocks; returns how many bytes."""
        worker = self._idle.get()
        before = worker.blocks.bytes_read
        try:
            self._read_all(queue, worker, done)
        finally:
            self._idle.put(worker)
        return worker.blocks.bytes_read - before

    def _read_all(self, queue: SimpleQueue[Read], worker: _Worker, done: _Round) -> None:
        """Read blocks until none is left; after a failure none is."""
        while True:
            try:
                read = queue.get_nowait()
            except Empty:
                return
            try:
                self._read_one(read, worker, done)
            except BaseException:
                with suppress(Empty):
                    while True:
                        queue.get_nowait()
                raise

    def _read_one(self, read: Read, worker: _Worker, done: _Round) -> None:
        """Read a block, and bring what it holds to where it belongs."""
        first, last = read.rest
        rows = self._reads.rest[first:last]
        start = read.block * self._work.block_bytes
        if read.in_parts:
            parts = worker.blocks.read_parts(read.file, read.block, PART_BYTES)
            for part, data in enumerate(parts):
                self._hand_out(rows, data, start, done, part=part)
            return
        for stretch in read.stretches:
            self._read_stretch(read, stretch, worker, done)
        if not len(rows):
            return
        if read.stretches:
            self._hand_out(rows, worker.gaps, start, done)
        else:
            self._hand_out(rows, self._read_block(read.file, read.block, worker), start, done)

    def _read_block(self, file: int, block: int, worker: _Worker) -> np.ndarray | None:
        """Read a block; None if it is damaged and may be skipped."""
        try:
            return worker.blocks.read(file, block)
        except (CorruptCheckpoint, IncompleteCheckpoint) as exc:
            if self._skipped is None:
                raise
            self._skipped.missing |= isinstance(exc, IncompleteCheckpoint)
            self._skipped.damage.append(str(exc))
            return None

    def _read_stretch(self, read: Read, stretch: Stretch, worker: _Worker, done: _Round) -> None:
        """Read rows where they belong, and what lies between them to its place in the block."""
        first, last = stretch.rows
        buffers = self._memories(self._reads.homes[first:last], done)
        for number, size, place in reversed(stretch.gaps):
            buffers.insert(number - first, worker.gaps.data[place : place + size])
        if stretch.is_block:
            worker.blocks.read_into(read.file, read.block, buffers)
        else:
            worker.blocks.read_unchecked(read.file, stretch.start_byte, buffers)

    def _memories(self, rows: np.ndarray, done: _Round | None = None) -> list[memoryview]:
        """Return the memory that rows are read to: this rank's own, or what will be sent."""
        own = self._own[rows]
        mine = rows[own]
        found: list[memoryview] = []
        if len(mine):
            key, place = self._work.key[mine], self._place[mine]
            found = self._into.memories(key, place, self._end[mine])
        if done is None or len(mine) == len(rows):
            return found
        of_own = iter(found)
        return [
            next(of_own) if is_own else done.slots[row].data
            for row, is_own in zip(rows.tolist(), own.tolist(), strict=True)
        ]

    def _hand_out(
        self,
        rows: np.ndarray,
        data: np.ndarray | None,
        start: int,
        done: _Round,
        *,
        part: int | None = None,
    ) -> None:
        """Bring rows of a block to where they belong.

        Args:
            rows: The rows.
            data: The block, or a part of it; None if it is lost.
            start: Where the block begins in its file.
            done: Takes what is for others.
            part: The number of the part, if it is one.
        """
        work, slots = self._work, done.slots
        begin = (part or 0) * PART_BYTES
        for row, key, item, first, last, is_own, is_run, twin in zip(
            rows.tolist(),
            work.key[rows].tolist(),
            work.itemsize[rows].tolist(),
            (work.start_byte[rows] - start).tolist(),
            (work.stop_byte[rows] - start).tolist(),
            self._own[rows].tolist(),
            work.is_run[rows].tolist(),
            self._homes.twin[rows].tolist(),
            strict=True,
        ):
            if data is None:
                self._lose(row, done)
            elif is_own:
                dtype = self._into.dtype(key)
                for box in self._boxes_in(row, part):
                    self._into.put(key, box.start, box.of_block(data, dtype, begin))
            elif twin >= 0:
                (source,) = self._memories(np.array([twin]), done)
                slots[row][:] = _bytes(source)
            elif is_run:
                low, high = max(first, begin), min(last, begin + len(data))
                if low < high:
                    slots[row][low - first : high - first] = data[low - begin : high - begin]
            else:
                kind = _BITS[item]
                for box in self._boxes_in(row, part):
                    np.copyto(box.of_row(slots[row], kind), box.of_block(data, kind, begin))

    def _boxes_in(self, row: int, part: int | None) -> Sequence[Box]:
        return self._boxes[row] if part is None else self._boxes_of_part.get((row, part), ())

    def _lose(self, row: int, done: _Round) -> None:
        """Note that a row can't be read."""
        if not self._own[row]:
            done.outgoing[int(self._work.consumer[row])].lose(row)
        elif self._skipped is not None:
            key = int(self._work.key[row])
            self._skipped.regions += [(key, box.region) for box in self._boxes[row]]

    # -------------------------------------------------------------------------------------- taking

    def _take(self, reader: int, rows: np.ndarray) -> Waiting[None]:
        """Take what another rank has read for this one, and put it in place."""
        message = yield from self._operation.receive(reader, self._step, "send what it read")
        if message["error"] is None:
            stream = Stream(self._work, rows, together=self._skipped is not None)
            lost = set(message["lost"])
            for number, length in enumerate(stream.sizes):
                row = stream.alone(number)
                if row is not None and self._place[row] >= 0 and self.failure is None:
                    (there,) = self._memories(np.array([row]))
                    yield from self._operation.receive_into(reader, self._step, there, "send")
                    continue
                buffer = self._pool.take(length)
                part = buffer[:length]
                yield from self._operation.receive_into(reader, self._step, part.data, "send")
                if self.failure is None:
                    self._put(stream, number, part, lost)
                self._pool.give(buffer)
        else:
            self._fail(CheckpointError(f"rank {reader} could not read: {message['error']}"))
        self._operation.send(reader, self._step + 1, None)

    def _put(self, stream: Stream, number: int, part: np.ndarray, lost: set[int]) -> None:
        """Put a part of what was sent in place."""
        work, which = self._work, np.flatnonzero(stream.part == number)
        rows = stream.rows[which]
        try:
            for index, row, key, first, size, place in zip(
                which.tolist(),
                rows.tolist(),
                work.key[rows].tolist(),
                stream.place[which].tolist(),
                work.size_bytes[rows].tolist(),
                self._place[rows].tolist(),
                strict=True,
            ):
                if index in lost:
                    if self._skipped is not None:
                        self._skipped.regions += [(key, box.region) for box in self._boxes[row]]
                    continue
                content = part[first : first + size]
                if place >= 0:
                    (there,) = self._memories(np.array([row]))
                    _bytes(there)[:] = content
                    continue
                dtype = self._into.dtype(key)
                for box in self._boxes[row]:
                    self._into.put(key, box.start, box.of_row(content, dtype))
        except Exception as exc:  # noqa: BLE001  the others wait for this rank's messages
            self._fail(exc)


@dataclass(slots=True)
class _Outgoing:
    """What another rank gets of a round.

    Attributes:
        stream: What it is made of.
        parts: Its bytes.
        lost: Which of its rows could not be read, counted among them.
    """

    stream: Stream
    parts: list[memoryview]
    lost: list[int] = field(default_factory=list)

    def lose(self, row: int) -> None:
        """Note that a row could not be read."""
        self.lost.append(int(np.searchsorted(self.stream.rows, row)))


@dataclass(slots=True)
class _Round:
    """What this rank has read for others in a round.

    Attributes:
        outgoing: Consumer → what it gets.
        slots: Row → where its bytes go until they have been sent.
        buffers: The memory of that.
    """

    outgoing: dict[int, _Outgoing] = field(default_factory=dict)
    slots: dict[int, np.ndarray] = field(default_factory=dict)
    buffers: list[np.ndarray] = field(default_factory=list)
    _acknowledged: int = 0

    def acknowledged(self, pool: _Pool) -> None:
        """Note that a consumer has what it gets; when all have, the memory is free."""
        self._acknowledged += 1
        if self._acknowledged == len(self.outgoing):
            for buffer in self.buffers:
                pool.give(buffer)


class _Pool:
    """Memory that is used again: new memory costs more than what is done with it."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def take(self, length: int) -> np.ndarray:
        """Return memory of at least so many bytes."""
        fits = [number for number, one in enumerate(self._free) if len(one) >= length]
        if fits:
            return self._free.pop(min(fits, key=lambda number: len(self._free[number])))
        return np.empty(-(-length // _KEPT_BYTES) * _KEPT_BYTES, np.uint8)

    def give(self, buffer: np.ndarray) -> None:
        """Take memory back."""
        self._free.append(buffer)


def _by(column: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Group rows by a column: (value, its rows in their order), by rising value."""
    rows = rows[np.argsort(column[rows], kind="stable")]
    for some in split(rows, column[rows]):
        yield int(column[some[0]]), some


def _bytes(memory: memoryview) -> np.ndarray:
    return np.frombuffer(memory, np.uint8)
