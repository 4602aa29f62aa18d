"""Bringing what is wanted of a checkpoint's blocks to where it is wanted, be it on another rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from distckpt.arena import allocate
from distckpt.copies import Places, Work
from distckpt.crew import Crew, Worker
from distckpt.errors import CheckpointError, CorruptCheckpoint, IncompleteCheckpoint, text
from distckpt.reader import BlockReader
from distckpt.region import Region
from distckpt.schedule import (
    Copy,
    Entry,
    Read,
    Round,
    Schedule,
    Setting,
    Stream,
    Stretch,
    aligned,
)
from distckpt.team import Late, Operation
from distckpt.waiting import Collections, Waiting

# A consumer may be so many rounds behind its reader before the reader waits.
_ROUNDS_AHEAD = 1
# What is less is read by one thread: to start others takes as long.
_MUCH_BYTES = 32 << 20
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

    def memories(
        self, key: Sequence[int], start: Sequence[int], stop: Sequence[int]
    ) -> list[memoryview]:
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
    try:
        exchanged = _Exchange(operation, step, work, blocks, into, skipped=skipped, threads=threads)
    except Exception as exc:  # noqa: BLE001  the others wait for this rank's messages
        return _give_up(operation, step, work, exc)
    try:
        with exchanged.crew.at_work():
            yield from exchanged.run()
    except Late as late:
        return late
    return exchanged.failure


def _give_up(operation: Operation, step: int, work: Work, exc: Exception) -> CheckpointError:
    """Tell all ranks that wait for this one that nothing will come; returns the failure."""
    failure = _as_failure(exc)
    mine, own = work.reader == operation.rank, work.consumer == operation.rank
    for rows in work.rounds():
        for consumer in np.unique(work.consumer[rows[mine[rows] & ~own[rows]]]).tolist():
            operation.send(consumer, step, {"error": text(failure), "lost": []})
        for reader in np.unique(work.reader[rows[own[rows] & ~mine[rows]]]).tolist():
            operation.send(reader, step + 1, None)
    return failure


def _as_failure(exc: Exception) -> CheckpointError:
    return exc if isinstance(exc, CheckpointError) else CheckpointError(text(exc))


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
        self._operation, self._step = operation, step
        self._blocks, self._into, self._skipped = blocks, into, skipped
        self.failure: CheckpointError | None = None
        self._pool = _Pool()
        direct = blocks.scatters and skipped is None
        setting = Setting(
            operation.rank,
            into.places,
            blocks.ends,
            direct=direct,
            checked=blocks.verify,
            skips=skipped is not None,
        )
        self._schedule = Schedule.of(work, setting)
        is_much = self._schedule.blocks * work.block_bytes >= _MUCH_BYTES
        self.crew = Crew(blocks, threads if direct and is_much else 1)

    def run(self) -> Waiting[None]:
        """Do all rounds."""
        receive = self._operation.receive
        collections = Collections()
        ahead: dict[int, list[_Sent]] = {}  # consumer → rounds that it has not acknowledged
        for part in self._schedule.rounds:
            collections.remind()
            done = self._read(part)
            for stream in part.outgoing:
                sent = ahead.setdefault(stream.peer, [])
                while len(sent) > _ROUNDS_AHEAD:
                    yield from receive(stream.peer, self._step + 1, _TAKE)
                    sent.pop(0).acknowledged(self._pool)
                sent.append(done)
                error = None if self.failure is None else text(self.failure)
                message = {"error": error, "lost": done.lost_of(stream)}
                parts = [] if error else done.outgoing[stream.peer]
                self._operation.send(stream.peer, self._step, message, parts)
            for stream in part.incoming:
                yield from self._take(stream)
        for consumer, sent in ahead.items():
            for _ in sent:
                yield from receive(consumer, self._step + 1, _TAKE)

    def _fail(self, exc: Exception) -> None:
        """Note a failure; the first counts."""
        self.failure = self.failure or _as_failure(exc)

    # ------------------------------------------------------------------------------------- reading

    def _read(self, part: Round) -> _Sent:
        """Read this rank's blocks of a round."""
        done = _Sent()
        if self.failure is None:
            try:
                if part.outgoing:
                    done.memory = self._pool.take(self._schedule.most_sent_bytes)
                free = done.memory
                for stream in part.outgoing:
                    done.outgoing[stream.peer] = self._prepared(stream, done, free)
                    free = free[stream.sent_bytes :]
                whole = [read for read in part.reads if not read.stretches and not read.edges]
                self._blocks.expect((read.file, read.block) for read in whole)
                self.crew.read(
                    part.reads,
                    lambda read, worker: self._read_one(read, worker, done),
                    lambda read: not len(read.keys) or self._into.takes_any(read.keys),
                )
            except Exception as exc:  # noqa: BLE001  the others wait for this rank's messages
                self._fail(exc)
        return done

    def _prepared(self, stream: Stream, done: _Sent, memory: np.ndarray) -> list[memoryview]:
        """Lay out the parts of what a rank gets, to be filled, and note where each row goes."""
        parts: list[memoryview] = []
        at = 0
        for length, twin, entries in zip(stream.sizes, stream.twins, stream.entries, strict=True):
            if twin >= 0:
                # What this rank has anyway leaves from where it is.
                parts.append(self._home(twin, done))
                continue
            part = memory[at : at + length]
            at += aligned(length)
            parts.append(part.data)
            for entry in entries:
                done.slots[entry.row] = part[entry.first : entry.first + entry.size]
        return parts

    def _home(self, row: int, done: _Sent) -> memoryview:
        """Return the memory that a row is read to: this rank's own, or what will be sent."""
        schedule = self._schedule
        if not schedule.own[row]:
            return done.slots[row].data
        return self._memory(row, int(schedule.key[row]), int(schedule.place[row]))

    def _memory(self, row: int, key: int, place: int) -> memoryview:
        """Return the stretch of this rank's own memory where a row goes."""
        last = place + int(self._schedule.size_bytes[row])
        return self._into.memories([key], [place], [last])[0]

    def _read_one(self, read: Read, worker: Worker, done: _Sent) -> None:
        """Read a block, and bring what it holds to where it belongs."""
        if read.edges:
            parts = worker.blocks.read_parts(read.file, read.block, read.edges)
            # To its end: the last part's checksum is compared after it was taken.
            for part, data in enumerate(parts):
                self._hand_out(read.copies[part], data, done, read.edges[part])
            return
        for stretch in read.stretches:
            self._read_stretch(read, stretch, worker, done)
        for copies in read.copies:
            block = worker.gaps if read.stretches else self._read_block(read, worker)
            if block is None:
                self._lose(copies, done)
            else:
                self._hand_out(copies, block, done)

    def _read_block(self, read: Read, worker: Worker) -> np.ndarray | None:
        """Read a block; None if it is damaged and may be skipped."""
        try:
            return worker.blocks.read(read.file, read.block)
        except (CorruptCheckpoint, IncompleteCheckpoint) as exc:
            if self._skipped is None:
                raise
            self._skipped.missing |= isinstance(exc, IncompleteCheckpoint)
            self._skipped.damage.append(str(exc))
            return None

    def _read_stretch(self, read: Read, stretch: Stretch, worker: Worker, done: _Sent) -> None:
        """Read rows where they belong, and what lies between them to its place in the block."""
        buffers: list[memoryview] = []
        if stretch.key:
            buffers = self._into.memories(stretch.key, stretch.first, stretch.last)
        for index, row in stretch.sent:
            buffers.insert(index, done.slots[row].data)
        for index, size, place in reversed(stretch.gaps):
            buffers.insert(index, worker.gaps.data[place : place + size])
        if stretch.is_block:
            worker.blocks.read_into(read.file, read.block, buffers)
        else:
            worker.blocks.read_unchecked(read.file, stretch.start_byte, buffers)

    def _hand_out(
        self, copies: Sequence[Copy], data: np.ndarray, done: _Sent, begin: int = 0
    ) -> None:
        """Bring rows of a block to where they belong.

        Args:
            copies: What is copied.
            data: The block, or a part of it.
            done: Takes what is for others.
            begin: At which byte of the block the part begins.
        """
        slots = done.slots
        for row, key, itemsize, is_own, twin, run, boxes in copies:
            if is_own:
                dtype = self._into.dtype(key)
                for box in boxes:
                    self._into.put(key, box.start, box.of_block(data, dtype, begin))
            elif twin >= 0:
                slots[row][:] = _bytes(self._home(twin, done))
            elif run is not None:
                first, last, place = run
                slots[row][place : place + last - first] = data[first - begin : last - begin]
            else:
                kind = _BITS[itemsize]
                for box in boxes:
                    np.copyto(box.of_row(slots[row], kind), box.of_block(data, kind, begin))

    def _lose(self, copies: Sequence[Copy], done: _Sent) -> None:
        """Note that a block can't be read."""
        for copy in copies:
            if not copy.is_own:
                done.lost.add(copy.row)
            elif self._skipped is not None:
                self._skipped.regions += [(copy.key, box.region) for box in copy.boxes]

    # -------------------------------------------------------------------------------------- taking

    def _take(self, stream: Stream) -> Waiting[None]:
        """Take what another rank has read for this one, and put it in place."""
        reader, receive_into = stream.peer, self._operation.receive_into
        message = yield from self._operation.receive(reader, self._step, "send what it read")
        if message["error"] is None:
            lost = set(message["lost"])
            for length, alone, entries in zip(
                stream.sizes, stream.alone, stream.entries, strict=True
            ):
                entry = entries[0]
                if alone and entry.place >= 0 and self.failure is None:
                    there = self._memory(entry.row, entry.key, entry.place)
                    yield from receive_into(reader, self._step, there, "send")
                    continue
                buffer = self._pool.take(length)
                part = buffer[:length]
                yield from receive_into(reader, self._step, part.data, "send")
                if self.failure is None:
                    self._put(entries, part, lost)
                self._pool.give(buffer)
        else:
            self._fail(CheckpointError(f"rank {reader} could not read: {message['error']}"))
        self._operation.send(reader, self._step + 1, None)

    def _put(self, entries: Sequence[Entry], part: np.ndarray, lost: set[int]) -> None:
        """Put a part of what was sent in place."""
        boxes = self._schedule.boxes
        try:
            for row, key, first, size, place, number in entries:
                if number in lost:
                    if self._skipped is not None:
                        self._skipped.regions += [(key, box.region) for box in boxes[row]]
                    continue
                content = part[first : first + size]
                if place >= 0:
                    _bytes(self._memory(row, key, place))[:] = content
                    continue
                dtype = self._into.dtype(key)
                for box in boxes[row]:
                    self._into.put(key, box.start, box.of_row(content, dtype))
        except Exception as exc:  # noqa: BLE001  the others wait for this rank's messages
            self._fail(exc)


@dataclass(slots=True)
class _Sent:
    """What this rank has read for others in a round.

    Attributes:
        outgoing: Rank → the parts of what it gets.
        slots: Row → where its bytes go until they have been sent.
        memory: The memory of that.
        lost: Rows that could not be read.
    """

    outgoing: dict[int, list[memoryview]] = field(default_factory=dict)
    slots: dict[int, np.ndarray] = field(default_factory=dict)
    memory: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))
    lost: set[int] = field(default_factory=set)
    _acknowledged: int = 0

    def lost_of(self, stream: Stream) -> list[int]:
        """Say which rows of a stream could not be read, as counted in it."""
        if not self.lost:
            return []
        return [entry.number for part in stream.entries for entry in part if entry.row in self.lost]

    def acknowledged(self, pool: _Pool) -> None:
        """Note that a consumer has what it gets; when all have, the memory is free."""
        self._acknowledged += 1
        if self._acknowledged == len(self.outgoing):
            pool.give(self.memory)


class _Pool:
    """Memory that is used again: new memory costs more than what is done with it."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def take(self, length: int) -> np.ndarray:
        """Return memory of at least so many bytes."""
        fits = [number for number, one in enumerate(self._free) if len(one) >= length]
        if fits:
            return self._free.pop(min(fits, key=lambda number: len(self._free[number])))
        return allocate(-(-length // _KEPT_BYTES) * _KEPT_BYTES)

    def give(self, buffer: np.ndarray) -> None:
        """Take memory back."""
        self._free.append(buffer)


def _bytes(memory: memoryview) -> np.ndarray:
    return np.frombuffer(memory, np.uint8)
