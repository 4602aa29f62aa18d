"""Reading blocks, verified, and bringing what is wanted of them to where it is wanted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distckpt import codec, dtypes
from distckpt.errors import (
    CheckpointError,
    CheckpointNotFound,
    CorruptCheckpoint,
    IncompleteCheckpoint,
    text,
)
from distckpt.foreign import ForeignStore
from distckpt.manifest import MANIFEST_NAME, Manifest, table_bytes
from distckpt.plan import Fragments
from distckpt.region import Region, boxes_of_run
from distckpt.shardfile import checksum, table_digest
from distckpt.store import Store, parallel_bytes, read_object
from distckpt.team import Late, Operation
from distckpt.waiting import Waiting

# A consumer may be so many rounds behind its reader before the reader waits.
_ROUNDS_AHEAD = 2
# Where long reads are faster, one has at most so many bytes.
_RUN_BYTES = 32 << 20
# Types that move elements of a size without looking at them.
_BITS = {np.dtype(kind).itemsize: np.dtype(kind) for kind in ("u1", "u2", "u4", "u8", "c16")}


@dataclass(frozen=True, slots=True)
class StoredFile:
    """What a reader must know of a shard file.

    Attributes:
        name: Its name.
        table_start: Where its checksum table begins.
        digest: The table's digest; empty where there is no table, in other formats' files.
    """

    name: str
    table_start: int
    digest: bytes


def read_manifest(store: Store) -> Manifest:
    """Read the manifest of the checkpoint in a store.

    Raises:
        CheckpointNotFound: There is nothing.
        IncompleteCheckpoint: There are files, but no manifest.
        CorruptCheckpoint, UnsupportedFormat: The manifest can't be used.
        StoreError: The store failed.
    """
    if isinstance(store, ForeignStore):
        return store.manifest
    path = f"{store.url}/{MANIFEST_NAME}"
    try:
        return codec.decode(read_object(store, MANIFEST_NAME), path=path)
    except FileNotFoundError:
        pass
    names = store.names()
    if any(name.startswith("shard-") for name in names):
        raise IncompleteCheckpoint(
            f"{store.url}: {len(names)} files of a save, but no {MANIFEST_NAME}: the save was "
            "never committed, or is still running. Use an earlier checkpoint"
        )
    found = f"a folder with {', '.join(names[:5])}" if names else "nothing"
    raise CheckpointNotFound(
        f"{store.url}: expected a checkpoint ({MANIFEST_NAME}), or a file of another format, found "
        f"{found}"
    )


def why_gone(store: Store, save_id: int) -> str | None:
    """Say how a checkpoint ended whose files are missing; None if its manifest is still there."""
    try:
        if read_manifest(store).save_id == save_id:
            return None
    except (CheckpointNotFound, IncompleteCheckpoint):
        return (
            "the checkpoint was deleted while it was being read: use a newer one, and hold it "
            "(`Checkpoint.hold`)"
        )
    except (CheckpointError, OSError):
        return None
    return "the checkpoint was replaced while it was being read: open it again"


def stored_files(manifest: Manifest) -> list[StoredFile]:
    """List a checkpoint's files."""
    starts = manifest.file_table_start.tolist()
    return [
        StoredFile(name, start, digest)
        for name, start, digest in zip(
            manifest.file_names, starts, manifest.file_digest, strict=True
        )
    ]


class BlockReader:
    """Reads blocks of a checkpoint's files, and checks them.

    One by one, while each is in the processor's cache; of a store that is better asked for more,
    runs of blocks that are expected next, of at most 32 MiB. Not for several threads.

    Args:
        store: Where they lie.
        files: Number → file.
        block_bytes: Size of a block.
        verify: Whether to check them.

    Attributes:
        bytes_read: So far, tables included.
        on_read: Called with `bytes_read` after each reading.
    """

    def __init__(
        self,
        store: Store,
        files: Mapping[int, StoredFile],
        block_bytes: int,
        *,
        verify: bool = True,
    ) -> None:
        self._store = store
        self._files = files
        self._block_bytes = block_bytes
        self._verify = verify
        self._tables: dict[int, np.ndarray] = {}
        self._scratch = np.empty(0, np.uint8)
        run_bytes = min(parallel_bytes(store), _RUN_BYTES)
        self._most_blocks = max(1, run_bytes // block_bytes)
        self._expected: frozenset[tuple[int, int]] = frozenset()
        self._held = (-1, range(0))  # of which file are which blocks in the scratch
        self.bytes_read = 0
        self.on_read: Callable[[int], None] | None = None

    def expect(self, blocks: Iterable[tuple[int, int]]) -> None:
        """Say which blocks, (file, block), will be read until this is called again, each once.

        Those of a file are read in rising order. What was said before is forgotten.
        """
        self._expected = frozenset(blocks) if self._most_blocks > 1 else frozenset()
        self._held = (-1, range(0))

    def read(self, file: int, block: int) -> np.ndarray:
        """Read one block. The array (uint8) is valid until the next call.

        Raises:
            CorruptCheckpoint: The file is short, or the block's checksum differs.
            IncompleteCheckpoint: The file is not there.
        """
        stored = self._files[file]
        start = block * self._block_bytes
        stop = min(start + self._block_bytes, stored.table_start)
        if self._held[0] != file or block not in self._held[1]:
            self._read_run(file, block)
        at = (block - self._held[1].start) * self._block_bytes
        data = self._scratch[at : at + stop - start]
        if self._verify and stored.digest:
            expected, found = int(self.table(file)[block]), checksum(data.data)
            if expected != found:
                raise CorruptCheckpoint(
                    f"{self._store.url}/{stored.name}: bytes {start}:{stop} are damaged: their "
                    f"CRC32C is {found:08x}, saved was {expected:08x}",
                    path=stored.name,
                    offset_bytes=start,
                )
        return data

    def _read_run(self, file: int, block: int) -> None:
        """Read a block into the scratch, and those that follow it and are expected."""
        last = block + 1
        while last - block < self._most_blocks and (file, last) in self._expected:
            last += 1
        try:
            self._fill(file, range(block, last))
        except (CorruptCheckpoint, IncompleteCheckpoint):
            if last == block + 1:
                raise
            # A file that is short or missing: each of its blocks is to have its own answer.
            self._expected = frozenset(one for one in self._expected if one[0] != file)
            self._fill(file, range(block, block + 1))

    def _fill(self, file: int, blocks: range) -> None:
        stored, size = self._files[file], self._block_bytes
        start, stop = blocks.start * size, min(blocks.stop * size, stored.table_start)
        if len(self._scratch) < stop - start:
            self._scratch = np.empty(max(stop - start, min(size, 4 << 20)), np.uint8)
        self._held = (-1, range(0))
        self._read_into(stored.name, start, self._scratch[: stop - start].data)
        self._held = (file, blocks)

    def bytes_to_read(self, works: Sequence[Work], rank: int) -> int:
        """Bytes of the blocks that a rank reads in some exchanges; their tables come on top."""
        blocks = {
            (number, file, block)
            for number, work in enumerate(works)
            for reader, file, block in zip(work.reader, work.file, work.block, strict=True)
            if reader == rank
        }
        size = self._block_bytes
        return sum(
            min(size, self._files[file].table_start - block * size) for _, file, block in blocks
        )

    def table(self, file: int) -> np.ndarray:
        """Return a file's checksums (uint32), verified against the manifest.

        Raises:
            CorruptCheckpoint: The table is damaged, or the file is short.
            IncompleteCheckpoint: The file is not there.
        """
        if file not in self._tables:
            stored = self._files[file]
            data = bytearray(table_bytes(stored.table_start, self._block_bytes))
            self._read_into(stored.name, stored.table_start, memoryview(data))
            if table_digest(data) != stored.digest:
                raise CorruptCheckpoint(
                    f"{self._store.url}/{stored.name}: its checksum table, from byte "
                    f"{stored.table_start} on, is damaged",
                    path=stored.name,
                    offset_bytes=stored.table_start,
                )
            self._tables[file] = np.frombuffer(data, "<u4")
        return self._tables[file]

    def _read_into(self, name: str, start: int, buffer: memoryview) -> None:
        try:
            self._store.read_into(name, start, buffer)
        except EOFError as exc:
            raise CorruptCheckpoint(
                f"{self._store.url}/{name}: the file is cut short: {exc}",
                path=name,
                offset_bytes=start,
            ) from exc
        except FileNotFoundError as exc:
            raise IncompleteCheckpoint(
                f"{self._store.url}/{name}: the manifest names this file, and it is not there: it "
                "was deleted, or not all files were copied"
            ) from exc
        self.bytes_read += len(buffer)
        if self.on_read is not None:
            self.on_read(self.bytes_read)


@dataclass(frozen=True, slots=True)
class Copy:
    """A part of a wanted box that lies in one block: a view of the block, and where it belongs.

    Attributes:
        region: Where it belongs, in the whole tensor.
        first: The byte in the block where the box around it begins.
        shape: Shape of that box.
        inner: The part of that box.
    """

    region: Region
    first: int
    shape: tuple[int, ...]
    inner: tuple[slice, ...]

    def of(self, block: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """View the part in the block's bytes."""
        end = self.first + math.prod(self.shape) * dtype.itemsize
        return block[self.first : end].view(dtype).reshape(self.shape)[self.inner]


class Work:
    """Fragments as plain rows; equal on the reader's and the consumer's side."""

    def __init__(self, fragments: Fragments, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self.round = fragments.round.tolist()
        self.reader = fragments.reader.tolist()
        self.consumer = fragments.consumer.tolist()
        self.key = fragments.key.tolist()
        self.file = fragments.file.tolist()
        self.block = fragments.block.tolist()
        self.itemsize = fragments.itemsize.tolist()
        self._fragments = fragments

    def __len__(self) -> int:
        return len(self.round)

    def copies(self, row: int) -> Iterator[Copy]:
        """Cut a row into views: a block holds a run of the piece, which is a few boxes."""
        table = self._fragments
        item, offset = self.itemsize[row], int(table.offset_bytes[row])
        origin = table.piece_start[row].tolist()
        extent = (table.piece_stop[row] - table.piece_start[row]).tolist()
        wanted = Region(tuple(table.start[row].tolist()), tuple(table.stop[row].tolist()))
        block_start = self.block[row] * self.block_bytes
        first = max(block_start - offset, 0) // item
        total = math.prod(extent)
        last = min((block_start + self.block_bytes - offset) // item, total)
        at = offset + first * item - block_start
        for box in boxes_of_run(tuple(extent), first, last):
            region = Region(
                tuple(a + o for a, o in zip(box.start, origin, strict=True)),
                tuple(b + o for b, o in zip(box.stop, origin, strict=True)),
            )
            common = region & wanted
            if common is not None:
                yield Copy(common, at, region.shape, common.relative_to(region.start).slices)
            at += box.size * item


Put = Callable[[int, Region, np.ndarray], None]


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
    *,
    dtype_of: Callable[[int], np.dtype],
    put: Put,
    skipped: Skipped | None = None,
) -> Waiting[CheckpointError | None]:
    """Collective. Read this rank's blocks, hand out what others want, and take what it wants.

    In rounds, so that a bounded number of bytes is on its way. Each message says whether its blocks
    are good. Uses the steps `step` (data) and `step + 1` (acknowledgements) of the operation.

    Args:
        operation: The messages.
        step: See above.
        work: What to do; rows in the order of the rounds.
        blocks: Reads blocks.
        dtype_of: The dtype of the data that a row's key wants, as stored.
        put: Takes (key, region, values) of what this rank wants.
        skipped: Takes what is damaged or missing; None if that is a failure.

    Returns:
        None, or the first failure of this rank, or that another rank reported. Never raises one:
        the others wait.
    """
    exchanged = _Exchange(operation, step, work, blocks, dtype_of, put, skipped)
    try:
        yield from exchanged.run()
    except Late as late:
        return late
    return exchanged.failure


def _rounds(work: Work) -> Iterator[range]:
    """Yield the rows of each round."""
    row = 0
    while row < len(work):
        end = row
        while end < len(work) and work.round[end] == work.round[row]:
            end += 1
        yield range(row, end)
        row = end


@dataclass(slots=True)
class _Exchange:
    """This rank's part of an exchange: what it reads, sends and takes, and the first failure."""

    operation: Operation
    step: int
    work: Work
    blocks: BlockReader
    dtype_of: Callable[[int], np.dtype]
    put: Put
    skipped: Skipped | None
    failure: CheckpointError | None = None

    def run(self) -> Waiting[None]:
        """Do all rounds."""
        rank, receive = self.operation.rank, self.operation.receive
        ahead: dict[int, int] = {}  # consumer → messages that it has not acknowledged
        for rows in _rounds(self.work):
            for consumer, (content, lost) in self._read(rows).items():
                while ahead.get(consumer, 0) >= _ROUNDS_AHEAD:
                    yield from receive(consumer, self.step + 1, "take what was read for it")
                    ahead[consumer] -= 1
                ahead[consumer] = ahead.get(consumer, 0) + 1
                error = None if self.failure is None else text(self.failure)
                message = {"error": error, "data": content, "lost": lost}
                self.operation.send(consumer, self.step, message)
            senders = dict.fromkeys(
                self.work.reader[index]
                for index in rows
                if self.work.consumer[index] == rank and self.work.reader[index] != rank
            )
            for sender in senders:
                message = yield from receive(sender, self.step, "send what it read")
                self._take(rows, sender, message)
                self.operation.send(sender, self.step + 1, None)
        for consumer, count in ahead.items():
            for _ in range(count):
                yield from receive(consumer, self.step + 1, "take what was read for it")

    def _fail(self, exc: Exception) -> None:
        self.failure = exc if isinstance(exc, CheckpointError) else CheckpointError(text(exc))

    def _read(self, rows: range) -> dict[int, tuple[np.ndarray, list[int]]]:
        """Read this rank's blocks of a round.

        Returns:
            What each other rank gets of them, and which of its rows, counted among those that it
            gets from here in this round, are lost.
        """
        work, rank = self.work, self.operation.rank
        mine = [index for index in rows if work.reader[index] == rank]
        copies = {index: list(work.copies(index)) for index in mine}
        outgoing = _buffers(work, mine, copies, rank)
        self.blocks.expect((work.file[index], work.block[index]) for index in mine)
        filled, count = dict.fromkeys(outgoing, 0), dict.fromkeys(outgoing, 0)
        lost: dict[int, list[int]] = {consumer: [] for consumer in outgoing}
        current, data = (-1, -1), None
        for index in mine:
            if self.failure is not None:
                break
            consumer = work.consumer[index]
            try:
                if current != (work.file[index], work.block[index]):
                    current = (work.file[index], work.block[index])
                    data = self._read_block(*current)
                if consumer != rank and data is None:
                    lost[consumer].append(count[consumer])
                for copy in copies[index]:
                    if consumer == rank:
                        self._place(index, copy, data)
                        continue
                    kind = _BITS[work.itemsize[index]]
                    at = filled[consumer]
                    filled[consumer] += copy.region.size * kind.itemsize
                    if data is not None:
                        target = outgoing[consumer][at : filled[consumer]].view(kind)
                        np.copyto(target.reshape(copy.region.shape), copy.of(data, kind))
                if consumer != rank:
                    count[consumer] += 1
            except Exception as exc:  # noqa: BLE001  the others wait for this rank's messages
                self._fail(exc)
        return {consumer: (content, lost[consumer]) for consumer, content in outgoing.items()}

    def _read_block(self, file: int, block: int) -> np.ndarray | None:
        """Read a block; None if it is damaged and may be skipped."""
        try:
            return self.blocks.read(file, block)
        except (CorruptCheckpoint, IncompleteCheckpoint) as exc:
            if self.skipped is None:
                raise
            self.skipped.missing |= isinstance(exc, IncompleteCheckpoint)
            self.skipped.damage.append(str(exc))
            return None

    def _place(self, row: int, copy: Copy, block: np.ndarray | None) -> None:
        """Put a part of a block, which this rank has read for itself, in place."""
        key = self.work.key[row]
        if block is not None:
            self.put(key, copy.region, copy.of(block, self.dtype_of(key)))
        elif self.skipped is not None:
            self.skipped.regions.append((key, copy.region))

    def _take(self, rows: range, sender: int, message: Mapping[str, Any]) -> None:
        """Put a message's bytes in place: the sender's rows and copies, in the same order."""
        if message["error"] is not None:
            cause = CheckpointError(f"rank {sender} could not read: {message['error']}")
            self.failure = self.failure or cause
        if self.failure is not None:
            return
        work, data, at = self.work, message["data"], 0
        lost = set(message["lost"])
        sent = [
            index
            for index in rows
            if work.reader[index] == sender and work.consumer[index] == self.operation.rank
        ]
        try:
            for number, index in enumerate(sent):
                dtype = self.dtype_of(work.key[index])
                for copy in work.copies(index):
                    size = copy.region.size * dtype.itemsize
                    if number not in lost:
                        values = data[at : at + size].view(dtype).reshape(copy.region.shape)
                        self.put(work.key[index], copy.region, values)
                    elif self.skipped is not None:
                        self.skipped.regions.append((work.key[index], copy.region))
                    at += size
        except Exception as exc:  # noqa: BLE001  the others wait for this rank's messages
            self._fail(exc)


def _buffers(
    work: Work, rows: list[int], copies: Mapping[int, list[Copy]], rank: int
) -> dict[int, np.ndarray]:
    """Make a buffer for each other rank that wants some of these rows, of the size that it gets."""
    sizes: dict[int, int] = {}
    for index in rows:
        if work.consumer[index] != rank:
            elements = sum(copy.region.size for copy in copies[index])
            size = sizes.get(work.consumer[index], 0)
            sizes[work.consumer[index]] = size + elements * work.itemsize[index]
    return {consumer: np.empty(size, np.uint8) for consumer, size in sizes.items()}


def stored_dtype(code: int) -> np.dtype:
    """Return the numpy dtype of a dtype code."""
    return dtypes.BY_CODE[code].numpy
