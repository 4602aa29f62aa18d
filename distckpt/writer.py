"""One rank's files: made from its part of a plan and the arrays, and written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from distckpt import dtypes
from distckpt.arena import allocate
from distckpt.manifest import BLOCK_BYTES, pad_columns
from distckpt.plan import Holdings, WritePart
from distckpt.region import Region
from distckpt.shardfile import (
    Piece,
    ShardImage,
    ShardLayout,
    blob_key,
    piece_key,
    table_digest,
)
from distckpt.staging import Staging, fill_checked
from distckpt.state import Array
from distckpt.stats import Recorder
from distckpt.store import Sink, Store, wants_aligned, writes_at_once
from distckpt.waiting import Interrupt

# Past the page cache, shorter requests keep a disk waiting for the next.
_REQUEST_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What the manifest must know of a written file.

    Attributes:
        file: Its global number.
        length: In bytes.
        data_start: Where the tensors' bytes begin.
        digest: Of its checksum table.
    """

    file: int
    length: int
    data_start: int
    digest: bytes


class Layouts:
    """Which files a rank writes, and what is where in them; the same for all saves of a plan.

    Args:
        held: This rank's tensors; the part's items are indices into them.
        part: This rank's part of the plan.
        blobs: Name of each per-rank value → its length in bytes.
        rank: This rank.
        block_bytes: Bytes under one checksum.

    Raises:
        LayoutError: Two pieces of one key in a file.
    """

    def __init__(
        self,
        held: Holdings,
        part: WritePart,
        blobs: Mapping[str, int],
        *,
        rank: int,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self.blobs = dict(blobs)
        self.block_bytes = block_bytes
        pieces: dict[int, list[Piece]] = {}
        self._places: dict[int, list[tuple[int | str, int]]] = {}
        extent = part.stop - part.start
        width = max(extent.shape[1], held.shape.shape[1])
        start, extent = pad_columns(part.start, width, 0), pad_columns(extent, width, 1)
        shape = pad_columns(held.shape, width, 1)[part.item]
        rows = zip(
            part.file.tolist(),
            part.item.tolist(),
            part.source.tolist(),
            extent.tolist(),
            (width - held.ndim[part.item].astype(np.int64)).tolist(),
            held.dtype[part.item].tolist(),
            (extent == shape).all(axis=1).tolist(),
            strict=True,
        )
        file_before = -1
        for row, (file, item, source, extents, pad, code, is_whole) in enumerate(rows):
            if file != file_before:
                mine = pieces.setdefault(file, [])
                places = self._places.setdefault(file, [])
                file_before = file
            key, box = held.names[item], tuple(extents[pad:])
            if not is_whole:
                first = tuple(start[row, pad:].tolist())
                region = Region(first, tuple(a + n for a, n in zip(first, box, strict=True)))
                key = piece_key(key, tuple(shape[row, pad:].tolist()), region)
            mine.append(Piece(key, dtypes.BY_CODE[code], box))
            places.append((item, source))
        for name, length in blobs.items():
            piece = Piece(blob_key(name, rank), dtypes.BY_NAME["uint8"], (length,))
            pieces.setdefault(part.blob_file, []).append(piece)
            self._places.setdefault(part.blob_file, []).append((name, 0))
        self._files = {
            file: ShardLayout(found, block_bytes) for file, found in sorted(pieces.items())
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(layout.length for layout in self._files.values())

    def images(self, arrays: Sequence[Array], blobs: Mapping[str, bytes]) -> dict[int, ShardImage]:
        """Return this rank's files, by their global number; they refer to the tensors' arrays."""
        more = {name: np.frombuffer(blob, np.uint8) for name, blob in blobs.items()}
        return {
            file: ShardImage(
                layout,
                [
                    (more[key] if isinstance(key, str) else arrays[key], first)
                    for key, first in self._places[file]
                ],
            )
            for file, layout in self._files.items()
        }

    def by_piece(self, tensors: Sequence[int], blobs: int) -> dict[int, list[int]]:
        """Say of each file's pieces what is said of each tensor, and of all per-rank values."""
        return {
            file: [tensors[key] if isinstance(key, int) else blobs for key, _ in places]
            for file, places in self._places.items()
        }


def write_staged(
    store: Store, name: str, staging: Staging, layout: ShardLayout, *, file: int, recorder: Recorder
) -> FileRecord:
    """Write a file of an asynchronous save durably; it is visible under its name afterwards.

    With few, large requests, since every return to Python can wait for the interpreter's lock while
    training runs.

    Args:
        store: Where to.
        name: The file's.
        staging: Has its bytes.
        layout: What is where in it.
        file: Its global number.
        recorder: Takes the times, and counts the bytes.

    Raises:
        StoreError: The store failed. Nothing is visible.
        SaveFailed: As `Staging.chunks`.
    """

    def write(sink: Sink) -> list[int]:
        for chunk in staging.chunks(file):
            sink.write_at(chunk.start_byte, chunk.data.data)
            recorder.nbytes += len(chunk.data)
        return staging.checksums(file)

    return _write(store, name, layout, write, file=file, recorder=recorder)


def write_image(
    store: Store,
    name: str,
    image: ShardImage,
    *,
    file: int,
    recorder: Recorder,
    interrupt: Interrupt | None = None,
    cores: int = 1,
) -> FileRecord:
    """Write a file whose arrays do not change meanwhile, durably.

    By way of a small buffer, where checksums are taken of what is still in the processor's cache;
    from several threads where that is faster.

    Args:
        store: Where to.
        name: The file's.
        image: Its content.
        file: Its global number.
        recorder: Takes the times, and counts the bytes.
        interrupt: Ends the writing early.
        cores: How many this rank has.

    Raises:
        StoreError: The store failed. Nothing is visible.
        InterruptedError: So did the user.
    """

    def write(sink: Sink) -> list[int]:
        blocks = _Blocks(image, sink, recorder, interrupt)
        blocks.write(cores)
        table = np.array(blocks.checksums, "<u4").tobytes()
        sink.write_at(image.layout.table_start, table)
        recorder.nbytes += len(table)
        return blocks.checksums

    return _write(store, name, image.layout, write, file=file, recorder=recorder)


def _write(
    store: Store,
    name: str,
    layout: ShardLayout,
    write: Callable[[Sink], list[int]],
    *,
    file: int,
    recorder: Recorder,
) -> FileRecord:
    sink = store.create(name, layout.length)
    try:
        with recorder.phase("write"):
            checksums = write(sink)
        with recorder.phase("sync"):
            sink.commit()
    except BaseException:
        sink.abort()
        raise
    table = np.array(checksums, "<u4").tobytes()
    return FileRecord(file, layout.length, layout.data_start, table_digest(table))


class _Blocks:
    """The blocks of a file on their way to the storage.

    Attributes:
        checksums: One a block.
    """

    def __init__(
        self, image: ShardImage, sink: Sink, recorder: Recorder, interrupt: Interrupt | None
    ) -> None:
        self._image, self._sink = image, sink
        self._recorder, self._interrupt = recorder, interrupt
        wanted = _REQUEST_BYTES if wants_aligned(sink) else 0
        self._step = max(1, wanted // image.layout.block_bytes)  # blocks a request
        self._firsts = iter(range(0, image.layout.blocks, self._step))
        self._failed: list[BaseException] = []
        self._counting = threading.Lock()
        self.checksums = [0] * image.layout.blocks

    def write(self, cores: int) -> None:
        """Write them all: in this thread, and in a few more where that is faster."""
        most = writes_at_once(self._sink)
        if not wants_aligned(self._sink):
            # No device works meanwhile: each thread copies by itself, and wants a core.
            most = min(most, cores)
        count = min(most, -(-self._image.layout.blocks // self._step))
        helpers = [threading.Thread(target=self._help) for _ in range(count - 1)]
        for helper in helpers:
            helper.start()
        try:
            self._work()
        except BaseException as exc:
            self._failed.insert(0, exc)
            raise
        finally:
            for helper in helpers:
                helper.join()
        if self._failed:
            raise self._failed[0]

    def _help(self) -> None:
        try:
            self._work()
        except BaseException as exc:  # noqa: BLE001  raised by `write`
            self._failed.append(exc)

    def _work(self) -> None:
        layout, step = self._image.layout, self._step
        scratch = allocate(min(step * layout.block_bytes, layout.table_start))
        for first in self._firsts:  # each number is given to one thread
            if self._failed:
                return
            if self._interrupt is not None:
                self._interrupt.check()
            blocks = range(first, min(first + step, layout.blocks))
            start, stop = layout.block(first)[0], layout.block(blocks[-1])[1]
            data = scratch[: stop - start]
            self.checksums[first : blocks.stop] = fill_checked(self._image, data, blocks)
            self._sink.write_at(start, data.data)
            with self._counting:
                self._recorder.nbytes += stop - start
