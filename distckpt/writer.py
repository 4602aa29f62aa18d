"""One rank's files: made from its part of a plan and the arrays, staged, and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from distckpt import dtypes
from distckpt.arena import Arena
from distckpt.manifest import BLOCK_BYTES
from distckpt.plan import WritePart
from distckpt.region import Region
from distckpt.shardfile import Piece, ShardImage, blob_key, checksum, piece_key, table_digest
from distckpt.state import TensorLeaf
from distckpt.stats import Recorder
from distckpt.store import Store
from distckpt.waiting import Interrupt


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


def build_images(
    tensors: Sequence[TensorLeaf],
    part: WritePart,
    blobs: Mapping[str, bytes],
    *,
    rank: int,
    block_bytes: int = BLOCK_BYTES,
) -> dict[int, ShardImage]:
    """Make this rank's files out of its part of the plan, by their global number.

    Args:
        tensors: This rank's tensors; the part's items are indices into them.
        part: The part.
        blobs: Per-rank values, encoded.
        rank: This rank.
        block_bytes: Bytes under one checksum.

    Returns:
        The files, which refer to the arrays.

    Raises:
        LayoutError: Two pieces of one key in a file.
    """
    pieces: dict[int, list[Piece]] = {}
    rows = zip(
        part.file.tolist(),
        part.item.tolist(),
        part.source.tolist(),
        part.start.tolist(),
        part.stop.tolist(),
        strict=True,
    )
    for file, item, source, start, stop in rows:
        leaf = tensors[item]
        pad = len(start) - len(leaf.shape)
        region = Region(tuple(start[pad:]), tuple(stop[pad:]))
        key = piece_key(leaf.name, leaf.shape, region)
        pieces.setdefault(file, []).append(Piece(key, leaf.dtype, region.shape, leaf.array, source))
    for name, blob in blobs.items():
        array = np.frombuffer(blob, np.uint8)
        piece = Piece(blob_key(name, rank), dtypes.BY_NAME["uint8"], array.shape, array, 0)
        pieces.setdefault(part.blob_file, []).append(piece)
    return {file: ShardImage(found, block_bytes) for file, found in sorted(pieces.items())}


@dataclass(frozen=True, slots=True)
class Staged:
    """A shard file's bytes before its table, copied, and their checksums.

    Attributes:
        buffer: The arena's; may be longer.
        checksums: One a block.
    """

    buffer: np.ndarray
    checksums: list[int]


def stage(image: ShardImage, arena: Arena) -> Staged:
    """Copy a file's bytes, so that the arrays may change.

    A block's checksum is taken while the block is still in the processor's cache.
    """
    buffer = arena.take(image.table_start)
    checksums = []
    for index in range(image.blocks):
        start, stop = image.block(index)
        image.fill(buffer[start:stop], start, stop)
        checksums.append(checksum(buffer[start:stop].data))
    return Staged(buffer, checksums)


def write_file(
    store: Store,
    name: str,
    image: ShardImage,
    staged: Staged | None,
    *,
    file: int,
    recorder: Recorder,
    interrupt: Interrupt | None = None,
) -> FileRecord:
    """Write a file durably; it is visible under its name when this returns.

    A staged file is written with one request, since every return to Python can wait for the
    interpreter lock while training runs; one that isn't staged goes block by block through one
    small buffer.

    Args:
        store: Where to.
        name: The file's.
        image: Its content.
        staged: A copy of the content; None where the arrays do not change meanwhile.
        file: Its global number.
        recorder: Takes the times, and counts the bytes.
        interrupt: Ends the writing early.

    Raises:
        StoreError: The store failed. Nothing is visible.
        InterruptedError: So did the user.
    """
    sink = store.create(name, image.length)
    try:
        with recorder.phase("write"):
            if staged is not None:
                checksums = staged.checksums
                sink.write_at(0, staged.buffer[: image.table_start].data)
                recorder.nbytes += image.table_start
            else:
                checksums = []
                buffer = np.empty(min(image.block_bytes, image.table_start), np.uint8)
                for index in range(image.blocks):
                    if interrupt is not None:
                        interrupt.check()
                    start, stop = image.block(index)
                    image.fill(buffer[: stop - start], start, stop)
                    data = buffer[: stop - start].data
                    checksums.append(checksum(data))
                    sink.write_at(start, data)
                    recorder.nbytes += stop - start
            table = np.array(checksums, "<u4").tobytes()
            sink.write_at(image.table_start, table)
            recorder.nbytes += len(table)
        with recorder.phase("sync"):
            sink.commit()
    except BaseException:
        sink.abort()
        raise
    return FileRecord(file, image.length, image.data_start, table_digest(table))
