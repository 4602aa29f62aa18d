"""Reading manifests, and blocks of files, which are verified."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from distckpt import codec
from distckpt.copies import Work
from distckpt.errors import (
    CheckpointError,
    CheckpointNotFound,
    CorruptCheckpoint,
    IncompleteCheckpoint,
)
from distckpt.foreign import ForeignStore
from distckpt.manifest import MANIFEST_NAME, Manifest, table_bytes
from distckpt.shardfile import checksum, checksum_all, table_digest
from distckpt.store import (
    OpenObject,
    Store,
    open_object,
    opens,
    parallel_bytes,
    read_object,
    total_bytes,
)

# Where long reads are faster, one has at most so many bytes.
_RUN_BYTES = 32 << 20
# What goes to buffers that are shorter on average is read: only long copies are faster than the
# kernel's, since they go past the processor's caches.
_PIECE_BYTES = 256 << 10


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


class Tables:
    """The checksum tables of files, each read once, whoever asks for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[int, np.ndarray] = {}

    def get(self, file: int, read: Callable[[int], np.ndarray]) -> np.ndarray:
        """Return the table of a file; *read* reads it, if nobody has yet."""
        with self._lock:
            if file not in self._found:
                self._found[file] = read(file)
            return self._found[file]


class BlockReader:
    """Reads blocks of a checkpoint's files, and checks them.

    One by one, while each is in the processor's cache; of a store that is better asked for more,
    runs of blocks that are expected next, of at most 32 MiB. A store that can has the bytes of a
    block go where they belong, before they are checked; or shows them where the system has them in
    memory, to be copied from there. Not for several threads.

    Args:
        store: Where they lie.
        files: Number → file.
        block_bytes: Size of a block.
        verify: Whether to check them.
        like: Another reader, of the same files: each checksum table is read by one of them. Then
            each may be used by a thread of its own.

    Attributes:
        block_bytes: Size of a block.
        verify: Whether they are checked.
        scatters: Whether `read_into` and `read_unchecked` may be used.
        tables: The checksum tables that were read so far.
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
        like: BlockReader | None = None,
    ) -> None:
        self._store = store
        self._files = files
        self.block_bytes = block_bytes
        self.verify = verify
        self.scatters = opens(store)
        self._opened: tuple[int, OpenObject] | None = None  # the file that was read last
        self.tables: Tables = Tables() if like is None else like.tables
        self._scratch = np.empty(0, np.uint8)
        run_bytes = min(parallel_bytes(store), _RUN_BYTES)
        self._most_blocks = max(1, run_bytes // block_bytes)
        self._expected: frozenset[tuple[int, int]] = frozenset()
        self._held = (-1, range(0))  # of which file are which blocks in the scratch
        self.bytes_read = 0
        #: File → how many bytes of it are blocks.
        self.ends = {number: file.table_start for number, file in files.items()}
        self.on_read: Callable[[int], None] | None = None

    def another(self) -> BlockReader:
        """Make a reader of the same for another thread, which tells nobody of its progress."""
        return BlockReader(
            self._store, self._files, self.block_bytes, verify=self.verify, like=self
        )

    def add(self, bytes_read: int) -> None:
        """Count what another has read."""
        self.bytes_read += bytes_read
        if self.on_read is not None:
            self.on_read(self.bytes_read)

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
        start, stop = self.span(file, block)
        if self._held[0] != file or block not in self._held[1]:
            self._read_run(file, block)
        at = (block - self._held[1].start) * self.block_bytes
        data = self._scratch[at : at + stop - start]
        self._check(file, block, [data.data])
        return data

    def read_into(self, file: int, block: int, buffers: Sequence[memoryview]) -> None:
        """Read one block into buffers, in their order; together they are as long as the block.

        Raises:
            CorruptCheckpoint, IncompleteCheckpoint: As in `read`. The buffers may have changed by
                then.
        """
        start, stop = self.span(file, block)
        view = self._view(file, start, stop - start, len(buffers))
        if view is None:
            self._scatter(file, start, buffers)
            self._check(file, block, buffers)
        else:
            self._check(file, block, [view.data])
            _copy(view, buffers)

    def read_parts(self, file: int, block: int, edges: Sequence[int]) -> Iterator[np.ndarray]:
        """Read one block in parts; yield each before all of them have been checked.

        Args:
            file: Its file.
            block: Its number there.
            edges: At which bytes of the block parts begin, and the block's end.

        Raises:
            CorruptCheckpoint, IncompleteCheckpoint: As in `read`; damage after the last part.
        """
        start = block * self.block_bytes
        checked = self._is_checked(file)
        longest = max(last - first for first, last in pairwise(edges))
        if len(self._scratch) < longest:
            self._scratch = np.empty(longest, np.uint8)
        self._held = (-1, range(0))
        found = 0
        for first, last in pairwise(edges):
            part = self._scratch[: last - first]
            self._scatter(file, start + first, [part.data])
            if checked:
                found = checksum(part.data, found)
            yield part
        if checked:
            self._compare(file, block, found)

    def read_unchecked(self, file: int, start_byte: int, buffers: Sequence[memoryview]) -> None:
        """Read any stretch of a file into buffers.

        Raises:
            CorruptCheckpoint, IncompleteCheckpoint: The file is short, or not there.
        """
        view = self._view(file, start_byte, total_bytes(buffers), len(buffers))
        if view is None:
            self._scatter(file, start_byte, buffers)
        else:
            _copy(view, buffers)

    def span(self, file: int, block: int) -> tuple[int, int]:
        """Return a block's first byte in its file, and one past its last."""
        start = block * self.block_bytes
        return start, min(start + self.block_bytes, self._files[file].table_start)

    def _check(self, file: int, block: int, buffers: Sequence[memoryview]) -> None:
        if self._is_checked(file):
            self._compare(file, block, checksum_all(buffers))

    def _is_checked(self, file: int) -> bool:
        return self.verify and bool(self._files[file].digest)

    def _compare(self, file: int, block: int, found: int) -> None:
        """Compare a block's checksum with the one that was saved."""
        stored, expected = self._files[file], int(self.table(file)[block])
        if expected != found:
            start, stop = self.span(file, block)
            raise CorruptCheckpoint(
                f"{self._store.url}/{stored.name}: bytes {start}:{stop} are damaged: their "
                f"CRC32C is {found:08x}, saved was {expected:08x}",
                path=stored.name,
                offset_bytes=start,
            )

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
        stored, size = self._files[file], self.block_bytes
        start, stop = blocks.start * size, min(blocks.stop * size, stored.table_start)
        if len(self._scratch) < stop - start:
            self._scratch = np.empty(max(stop - start, min(size, 4 << 20)), np.uint8)
        self._held = (-1, range(0))
        self._read_into(stored.name, start, self._scratch[: stop - start].data)
        self._held = (file, blocks)

    def bytes_to_read(self, works: Sequence[Work], rank: int) -> int:
        """Bytes of the blocks that a rank reads in some exchanges; their tables come on top."""
        total = 0
        for work in works:
            mine = work.reader == rank
            blocks = np.unique(np.column_stack([work.file[mine], work.block[mine]]), axis=0)
            spans = (self.span(file, block) for file, block in blocks.tolist())
            total += sum(stop - start for start, stop in spans)
        return total

    def table(self, file: int) -> np.ndarray:
        """Return a file's checksums (uint32), verified against the manifest.

        Raises:
            CorruptCheckpoint: The table is damaged, or the file is short.
            IncompleteCheckpoint: The file is not there.
        """
        return self.tables.get(file, self._read_table)

    def _read_table(self, file: int) -> np.ndarray:
        stored = self._files[file]
        data = bytearray(table_bytes(stored.table_start, self.block_bytes))
        self._read_into(stored.name, stored.table_start, memoryview(data))
        if table_digest(data) != stored.digest:
            raise CorruptCheckpoint(
                f"{self._store.url}/{stored.name}: its checksum table, from byte "
                f"{stored.table_start} on, is damaged",
                path=stored.name,
                offset_bytes=stored.table_start,
            )
        return np.frombuffer(data, "<u4")

    def _read_into(self, name: str, start: int, buffer: memoryview) -> None:
        with self._reading(name, start, len(buffer)):
            self._store.read_into(name, start, buffer)

    def _scatter(self, file: int, start: int, buffers: Sequence[memoryview]) -> None:
        with self._reading(self._files[file].name, start, total_bytes(buffers)):
            self._open(file).read_into(start, buffers)

    def _view(self, file: int, start: int, length: int, buffers: int) -> np.ndarray | None:
        """Look at bytes (uint8) that so many buffers are to hold; None where to read is better."""
        if length < _PIECE_BYTES * max(buffers, 1):
            return None
        with self._explained(self._files[file].name, start):
            view = self._open(file).view(start, length)
        if view is None:
            return None
        self.add(length)
        return np.frombuffer(view, np.uint8)

    def _open(self, file: int) -> OpenObject:
        """Return a file; the one that was used last stays open."""
        if self._opened is None or self._opened[0] != file:
            self._opened = None  # closed before the next one is opened
            self._opened = file, open_object(self._store, self._files[file].name)
        return self._opened[1]

    @contextmanager
    def _reading(self, name: str, start: int, length: int) -> Iterator[None]:
        with self._explained(name, start):
            yield
        self.add(length)

    @contextmanager
    def _explained(self, name: str, start: int) -> Iterator[None]:
        try:
            yield
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


def _copy(view: np.ndarray, buffers: Sequence[memoryview]) -> None:
    """Copy bytes to some memory, in its order, without the interpreter's lock."""
    first = 0
    for buffer in buffers:
        last = first + buffer.nbytes
        np.copyto(np.frombuffer(buffer, np.uint8), view[first:last])
        first = last
