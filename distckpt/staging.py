"""What a save copies of its files, and when; and the rest, which is produced while it is written.

A file is made of blocks, each with its checksum. What a block holds decides when it is copied:
at once, if any of it may change when the call returns; in the background, if all of it may change
only after `wait_staged`; and never, if none of it can change. Runs of such blocks lie in memory of
the arena. Where that may not hold them all, they are produced block by block when they are written,
and the caller waits until what may change has been.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from distckpt.arena import ALIGNMENT, Arena
from distckpt.errors import SaveFailed, some_names
from distckpt.frameworks import jax
from distckpt.leaves import TensorLeaf
from distckpt.shardfile import ShardImage, ShardLayout, checksum
from distckpt.state import FlatShard, Shard

# What is copied before its checksum is taken: so small that it stays in the processor's cache.
_PIECE_BYTES = 512 << 10
# What is written with one request. Each return to Python may wait for the interpreter's lock.
_REQUEST_BYTES = 128 << 20
_CHUNK_BYTES = 32 << 20

# When a block is copied.
NOW, LATER, NEVER = 0, 1, 2


def when_copied(leaf: TensorLeaf, *, lazy: bool) -> int:
    """Say when a tensor must be copied: `NOW`, `LATER` (it may be) or `NEVER`."""
    return NEVER if _is_immutable(leaf) else LATER if lazy else NOW


def _is_immutable(leaf: TensorLeaf) -> bool:
    """Whether nobody can change a tensor: JAX's, or read-only, and so is what it is a view of."""
    array = leaf.array
    if not isinstance(array, np.ndarray) or array.flags.writeable:
        return False
    piece = leaf.leaf.value
    if jax.is_array(piece.array if isinstance(piece, (Shard, FlatShard)) else piece):
        return True
    base: object = array.base
    while isinstance(base, np.ndarray) and not base.flags.writeable:
        base = base.base
    return base is None or isinstance(base, bytes)


def fill_checked(image: ShardImage, out: np.ndarray, blocks: range) -> list[int]:
    """Produce blocks of a file, and take their checksums while they are in the processor's cache.

    Args:
        image: The file.
        out: Takes the blocks, one after another (uint8).
        blocks: Which.

    Returns:
        One checksum a block.
    """
    layout, checksums = image.layout, []
    origin = blocks.start * layout.block_bytes
    for index in blocks:
        start, stop = layout.block(index)
        block = out[start - origin : stop - origin]
        checksums.append(image.fill_checked(block, start, stop, piece_bytes=_PIECE_BYTES))
    return checksums


@dataclass(slots=True)
class Run:
    """Blocks of a file that are copied at the same time.

    Attributes:
        blocks: Which.
        when: `NOW`, `LATER` or `NEVER`.
        memory: Where their copies are; None where they are not, or not yet.
        checksums: Of the copies, one a block.
        before: Checksums at the call, where a change is to be detected; else empty.
    """

    blocks: range
    when: int
    memory: np.ndarray | None = None
    checksums: list[int] = field(default_factory=list)
    before: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes of a file, to be written with one request.

    Attributes:
        start_byte: Where they belong.
        data: (bytes,) uint8; valid until the next chunk is asked for.
    """

    start_byte: int
    data: np.ndarray


class Staging:
    """What one rank copies for one asynchronous save.

    Args:
        arena: Where the memory comes from.
        images: The files, by number.
        when: For each file and each of its pieces: `NOW`, `LATER` or `NEVER`.
        limit_bytes: So much of the arena may be used by all saves in flight; None: what it takes.
        check: Whether to detect what changes before it is copied in the background.
    """

    def __init__(
        self,
        arena: Arena,
        images: Mapping[int, ShardImage],
        when: Mapping[int, Sequence[int]],
        *,
        limit_bytes: int | None = None,
        check: bool = False,
    ) -> None:
        self._arena = arena
        self._images = dict(images)
        self._limit_bytes = limit_bytes
        self._runs = {file: _runs(image.layout, when[file]) for file, image in images.items()}
        self._memory: np.ndarray | None = None
        self._later = False  # whether runs of `LATER` have memory
        # Whether what may change at once, and what may change after the fence, has been copied.
        self._now_copied, self._copied = threading.Event(), threading.Event()
        if check:
            self._note_lazy()

    # ---------------------------------------------------------------------------- in the caller's

    def begin(self) -> None:
        """Copy what may change when the caller goes on, if there is memory for it."""
        limit = self._limit_bytes
        left = None if limit is None else limit - self._arena.out_bytes
        now, later = (
            sum(self._size(file, run) for file, run in self._all() if run.when == when)
            for when in (NOW, LATER)
        )
        rest = any(run.when == NEVER for _, run in self._all())
        # What has no memory of its own is written by way of a chunk.
        chunk = 0 if left is None else min(self._chunk_bytes, left)
        if left is None or now + later + (chunk if rest else 0) <= left:
            kinds = {NOW, LATER}
        elif now + chunk <= left:
            kinds = {NOW}
        else:
            return
        self._later = LATER in kinds
        streams = rest or not self._later
        # A longer one that is kept would leave nothing for the chunk, which would be waited for.
        most = None if left is None else left - (chunk if streams else 0)
        self._take([(file, run) for file, run in self._all() if run.when in kinds], most)
        self._copy(NOW)
        self._now_copied.set()
        if not later:
            self._copied.set()

    @property
    def has_begun(self) -> bool:
        """Whether what may change when the caller goes on has been copied."""
        return self._now_copied.is_set()

    def wait_now(self) -> None:
        """Wait until what may change when the caller goes on has been copied."""
        self._now_copied.wait()

    def wait_copied(self) -> None:
        """Wait until all that may change has been copied."""
        self._copied.wait()

    # ---------------------------------------------------------------------------- in the background

    @property
    def has_rest(self) -> bool:
        """Whether there is something for `copy_rest`."""
        return self._later and not self._copied.is_set()

    def copy_rest(self) -> None:
        """Copy what may change only after the fence, if there is memory for it."""
        if self.has_rest:
            self._copy(LATER)
            self._copied.set()

    def chunks(self, file: int) -> Iterator[Chunk]:
        """Yield a file's bytes in order, its checksum table last.

        Files are asked for in order, each once.

        Raises:
            SaveFailed: A lazy array has changed before it was copied, and that was to be detected.
        """
        image = self._images[file]
        for run in self._runs[file]:
            if run.memory is None:
                yield from self._streamed(image, run)
                self._note_copied(run)
            else:
                yield from self._staged(file, run, run.memory)
            self._compare(image, run)
        if not self._runs[file] or self._runs[file][-1].memory is None:
            yield Chunk(image.layout.table_start, self._table(file))

    def checksums(self, file: int) -> list[int]:
        """Return the checksums of a file's blocks, once its chunks were taken."""
        return [value for run in self._runs[file] for value in run.checksums]

    def release(self) -> None:
        """Give the memory back, and let the arrays go; whoever waits for a copy, waits no more."""
        self._now_copied.set()
        self._copied.set()
        if self._memory is not None:
            self._arena.give_back(self._memory)
        self._memory = None
        self._images, self._runs = {}, {}

    # -------------------------------------------------------------------------------------- inside

    @property
    def _chunk_bytes(self) -> int:
        return max([_CHUNK_BYTES, *(image.layout.block_bytes for image in self._images.values())])

    def _all(self) -> Iterator[tuple[int, Run]]:
        for file, runs in self._runs.items():
            for run in runs:
                yield file, run

    def _size(self, file: int, run: Run) -> int:
        """Return how much memory a run takes, the table behind the last one included."""
        layout = self._images[file].layout
        size = layout.block(run.blocks[-1])[1] - layout.block(run.blocks[0])[0]
        if run is self._runs[file][-1]:
            size += 4 * layout.blocks
        return -(-size // ALIGNMENT) * ALIGNMENT

    def _take(self, runs: Sequence[tuple[int, Run]], most_bytes: int | None) -> None:
        sizes = [self._size(file, run) for file, run in runs]
        if not sizes:
            return
        self._memory = self._arena.take(sum(sizes), most_bytes)
        at = 0
        for (_, run), size in zip(runs, sizes, strict=True):
            run.memory = self._memory[at : at + size]
            at += size

    def _copy(self, when: int) -> None:
        for file, run in self._all():
            if run.when == when and run.memory is not None:
                layout = self._images[file].layout
                start, stop = layout.block(run.blocks[0])[0], layout.block(run.blocks[-1])[1]
                self._images[file].fill(run.memory[: stop - start], start, stop)

    def _staged(self, file: int, run: Run, memory: np.ndarray) -> Iterator[Chunk]:
        """Yield what was copied, in large chunks; the table behind the last block goes with it."""
        layout = self._images[file].layout
        origin, step = run.blocks[0] * layout.block_bytes, _REQUEST_BYTES // layout.block_bytes
        for first in range(run.blocks.start, run.blocks.stop, step):
            blocks = range(first, min(first + step, run.blocks.stop))
            for index in blocks:
                start, stop = layout.block(index)
                # Not in the copy: training waits for that, and here it costs no more.
                run.checksums.append(checksum(memory[start - origin : stop - origin].data))
            start, stop = layout.block(first)[0], layout.block(blocks[-1])[1]
            if blocks[-1] == layout.blocks - 1:
                table = self._table(file)
                memory[stop - origin : stop - origin + len(table)] = table
                stop += len(table)
            yield Chunk(start, memory[start - origin : stop - origin])

    def _streamed(self, image: ShardImage, run: Run) -> Iterator[Chunk]:
        """Produce a run chunk by chunk, in memory that is given back at its end."""
        block_bytes = image.layout.block_bytes
        size = min(self._chunk_bytes, len(run.blocks) * block_bytes)
        if self._limit_bytes is None:
            buffer = self._arena.take(size)
        else:
            buffer = self._arena.take_within(size, self._limit_bytes, block_bytes)
        try:
            step = len(buffer) // block_bytes
            for first in range(run.blocks.start, run.blocks.stop, step):
                blocks = range(first, min(first + step, run.blocks.stop))
                run.checksums += fill_checked(image, buffer, blocks)
                start, stop = image.layout.block(first)[0], image.layout.block(blocks[-1])[1]
                yield Chunk(start, buffer[: stop - start])
        finally:
            self._arena.give_back(buffer)

    def _note_copied(self, run: Run) -> None:
        """Set the events whose last run this was."""
        everything = list(self._all())
        at = next(index for index, found in enumerate(everything) if found[1] is run)
        rest = {found.when for _, found in everything[at + 1 :] if found.memory is None}
        if NOW not in rest:
            self._now_copied.set()
            if LATER not in rest:
                self._copied.set()

    def _table(self, file: int) -> np.ndarray:
        return np.frombuffer(np.array(self.checksums(file), "<u4").tobytes(), np.uint8)

    def _note_lazy(self) -> None:
        for file, run in self._all():
            if run.when == LATER:
                image = self._images[file]
                scratch = np.empty(image.layout.block_bytes, np.uint8)
                for index in run.blocks:
                    run.before += fill_checked(image, scratch, range(index, index + 1))

    def _compare(self, image: ShardImage, run: Run) -> None:
        changed = [
            index
            for index, before, now in zip(run.blocks, run.before, run.checksums, strict=False)
            if before != now
        ]
        if changed:
            layout = image.layout
            keys = {
                layout.pieces[piece].key: None
                for index in changed
                for piece in layout.pieces_in(*layout.block(index))
            }
            raise SaveFailed(
                f"{len(changed)} blocks of lazy arrays have changed between the call and their "
                f"copy; of {some_names(list(keys))}. Call wait_staged() before the arrays change, "
                "or save them without lazy="
            )


def _runs(layout: ShardLayout, when: Sequence[int]) -> list[Run]:
    """Cut a file into runs of blocks that are copied at the same time."""
    if not layout.blocks:
        return []
    kinds = set(when)
    if len(kinds) == 1:
        return [Run(range(layout.blocks), kinds.pop())]
    # A block is copied as early as any of its pieces must be; the header, like what can't change.
    kind = np.full(layout.blocks, NEVER)
    for early in (LATER, NOW):
        edges = np.zeros(layout.blocks + 1, np.int64)
        for piece, found in enumerate(when):
            if found == early and layout.sizes[piece]:
                edges[layout.starts[piece] // layout.block_bytes] += 1
                edges[(layout.starts[piece + 1] - 1) // layout.block_bytes + 1] -= 1
        kind[np.cumsum(edges)[:-1] > 0] = early
    changes = [0, *(np.flatnonzero(np.diff(kind)) + 1).tolist(), layout.blocks]
    return [Run(range(first, stop), int(kind[first])) for first, stop in pairwise(changes)]
