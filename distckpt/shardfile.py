"""One rank's shard file: safetensors, with a checksum for every block. CRC32C's only door.

A `ShardImage` is the file as it will be, without being anywhere yet: any byte range of it can be
produced into a buffer, straight from the arrays. Whoever writes asks for block after block, and
takes each block's checksum while it is still in the processor's cache.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from fastcrc.crc32 import iscsi as crc32c

from distckpt import dtypes
from distckpt.errors import LayoutError
from distckpt.manifest import DATA_ALIGNMENT, TABLE_DIGEST_BYTES, table_bytes
from distckpt.region import Region, boxes_of_run
from distckpt.state import Array, LazyArray

TABLE_KEY = "__crc32c__"
METADATA_KEY = "__metadata__"
RESERVED_KEYS = frozenset({TABLE_KEY, METADATA_KEY})


def checksum(data: memoryview | bytes) -> int:
    """CRC32C of a contiguous buffer."""
    return crc32c(data)


def checksum_run(array: Array, dtype: dtypes.Dtype, first: int, count: int) -> int:
    """CRC32C of a run of an array's elements as they lie in a file: C order, little-endian.

    Args:
        array: Has any strides and byte order.
        dtype: Its type, in the file's byte order.
        first: First element in the array's C order.
        count: Elements.
    """
    value = 0
    step = (1 << 20) // dtype.itemsize
    whole = _bytes_of(array, dtype)
    if whole is not None:
        return checksum(whole[first * dtype.itemsize : (first + count) * dtype.itemsize].data)
    buffer = np.empty(step * dtype.itemsize, np.uint8)
    for begin in range(first, first + count, step):
        size = min(step, first + count - begin)
        out = buffer[: size * dtype.itemsize]
        copy_run(array, dtype, begin, size, out)
        value = crc32c(out.data, value)
    return value


def table_digest(table: bytes | bytearray) -> bytes:
    """Digest of a checksum table, as the manifest keeps it."""
    return hashlib.sha256(table).digest()[:TABLE_DIGEST_BYTES]


def piece_key(name: str, shape: Sequence[int], region: Region) -> str:
    """Key of a piece in the safetensors header: the name, and the box unless it is the whole.

    Examples:
        >>> piece_key("w", (4, 6), Region((0, 2), (4, 6)))
        'w@0:4,2:6'
    """
    if region.shape == tuple(shape):
        return name
    box = ",".join(f"{a}:{b}" for a, b in zip(region.start, region.stop, strict=True))
    return f"{name}@{box}"


def blob_key(name: str, rank: int) -> str:
    """Key of a rank's blob in the safetensors header."""
    return f"{name}@rank{rank}"


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor in a shard file, and where its bytes come from.

    Attributes:
        key: Its key in the header.
        dtype: Element type.
        shape: Shape of the box.
        array: Holds the box as a run of its C order.
        first: First element of that run.
    """

    key: str
    dtype: dtypes.Dtype
    shape: tuple[int, ...]
    array: Array
    first: int

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes."""
        return self.size * self.dtype.itemsize


class ShardImage:
    """A shard file that is not written yet.

    Args:
        pieces: In the order of the file: falling item size (so each is aligned to its own).
        block_bytes: Bytes under one checksum; a power of two.

    Attributes:
        header: The first `data_start` bytes.
        data_start: Where the tensors' bytes begin.
        table_start: Where the checksum table begins.
        length: Of the whole file, in bytes.
        blocks: Number of blocks, and so of checksums.

    Raises:
        LayoutError: Two pieces of one key, or a reserved key.
    """

    def __init__(self, pieces: Sequence[Piece], block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self._pieces = list(pieces)
        sizes = [piece.size_bytes for piece in self._pieces]
        data_bytes = sum(sizes)
        self.data_start = DATA_ALIGNMENT
        # The table's entry is part of the header, and the table's length depends on the header's.
        while True:
            self.table_start = self.data_start + data_bytes
            text = _header(
                self._pieces, sizes, table_bytes(self.table_start, block_bytes), block_bytes
            )
            needed = -(-(8 + len(text)) // DATA_ALIGNMENT) * DATA_ALIGNMENT
            if needed <= self.data_start:
                break
            self.data_start = needed
        size = self.data_start - 8
        self.header = size.to_bytes(8, "little") + text.ljust(size)
        self.length = self.table_start + table_bytes(self.table_start, block_bytes)
        self.blocks = -(-self.table_start // block_bytes)
        self._flat = [_bytes_of(piece.array, piece.dtype) for piece in self._pieces]
        self._starts = (np.cumsum([0, *sizes]) + self.data_start).tolist()

    def block(self, index: int) -> tuple[int, int]:
        """Return the first and last-plus-one byte of a block."""
        start = index * self.block_bytes
        return start, min(start + self.block_bytes, self.table_start)

    def fill(self, buffer: np.ndarray, start_byte: int, stop_byte: int) -> None:
        """Produce bytes of the file before its table.

        Args:
            buffer: (stop − start,) uint8, written to.
            start_byte: First byte; a multiple of the block size.
            stop_byte: One past the last; such a multiple, or `table_start`.
        """
        at = start_byte
        if at < self.data_start:
            end = min(stop_byte, self.data_start)
            buffer[: end - at] = np.frombuffer(self.header, np.uint8, end - at, at)
            at = end
        index = bisect_right(self._starts, at) - 1
        while at < stop_byte:
            begin, end = self._starts[index], min(self._starts[index + 1], stop_byte)
            if at < end:
                out = buffer[at - start_byte : end - start_byte]
                flat, piece = self._flat[index], self._pieces[index]
                item = piece.dtype.itemsize
                if flat is not None:
                    origin = piece.first * item - begin
                    out[:] = flat[origin + at : origin + end]
                else:
                    # No block cuts an element: item sizes are powers of two, pieces are aligned.
                    copy_run(
                        piece.array,
                        piece.dtype,
                        piece.first + (at - begin) // item,
                        (end - at) // item,
                        out,
                    )
                at = end
            index += 1


def _bytes_of(array: Array, dtype: dtypes.Dtype) -> np.ndarray | None:
    """View an array as bytes in file order; None where that needs a copy."""
    if isinstance(array, LazyArray):
        return None
    if array.flags.c_contiguous and array.dtype == dtype.numpy:
        return array.reshape(-1).view(np.uint8)
    return None


def copy_run(array: Array, dtype: dtypes.Dtype, first: int, count: int, out: np.ndarray) -> None:
    """Copy a run of an array's elements as they lie in a file: C order, little-endian.

    Args:
        array: The source, with any strides and byte order; or what is read only now.
        dtype: Its type, in the file's byte order.
        first: First element in the array's C order.
        count: Elements.
        out: (count · itemsize,) uint8.
    """
    target = out.view(dtype.numpy)
    at = 0
    for box in boxes_of_run(array.shape, first, first + count):
        source = array.read(box) if isinstance(array, LazyArray) else array[box.slices]
        np.copyto(target[at : at + box.size].reshape(box.shape), source)
        at += box.size


def _header(pieces: Sequence[Piece], sizes: Sequence[int], table: int, block_bytes: int) -> bytes:
    entries: dict[str, object] = {
        METADATA_KEY: {"format": "distckpt", "version": "1", "block_bytes": str(block_bytes)}
    }
    at = 0
    for piece, size in zip(pieces, sizes, strict=True):
        name, shape = piece.dtype.safetensors, list(piece.shape)
        if name is None:
            name = "U8"
            shape += [piece.dtype.itemsize] if piece.dtype.itemsize > 1 else []
        if piece.key in entries or piece.key in RESERVED_KEYS:
            raise LayoutError(
                f"{piece.key!r}: this key is "
                + ("reserved" if piece.key in RESERVED_KEYS else "needed twice in one shard file")
                + "; rename the tensor"
            )
        entries[piece.key] = {"dtype": name, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    entries[TABLE_KEY] = {"dtype": "U8", "shape": [table], "data_offsets": [at, at + table]}
    return json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
