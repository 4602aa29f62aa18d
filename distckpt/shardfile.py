"""One rank's shard file: safetensors, with a checksum for every block. CRC32C's only door.

A `ShardImage` is the file as it will be, without being anywhere yet: any stretch of it can be
produced into a buffer, straight from the arrays. Whoever does takes the checksum of what was
produced while it is still in the processor's cache.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from fastcrc.crc32 import iscsi as crc32c

from distckpt import dtypes
from distckpt.errors import LayoutError
from distckpt.manifest import DATA_ALIGNMENT, TABLE_DIGEST_BYTES, table_bytes
from distckpt.region import Region, boxes_of_run
from distckpt.state import Array, LazyArray

_quoted = json.JSONEncoder(ensure_ascii=False).encode
TABLE_KEY = "__crc32c__"
METADATA_KEY = "__metadata__"
RESERVED_KEYS = frozenset({TABLE_KEY, METADATA_KEY})


def checksum(data: memoryview | bytes, before: int = 0) -> int:
    """CRC32C of a contiguous buffer, or of what follows bytes whose CRC32C is known."""
    return crc32c(data, before)


def checksum_all(buffers: Iterable[memoryview]) -> int:
    """CRC32C of contiguous buffers, one after another."""
    found = 0
    for buffer in buffers:
        found = crc32c(buffer, found)
    return found


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
    whole = _bytes_of(array, dtype, first, count * dtype.itemsize)
    if whole is not None:
        return checksum(whole.data)
    buffer = np.empty(step * dtype.itemsize, np.uint8)
    for begin in range(first, first + count, step):
        size = min(step, first + count - begin)
        out = buffer[: size * dtype.itemsize]
        copy_run(array, dtype, begin, size, out)
        value = checksum(out.data, value)
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


class Piece(NamedTuple):  # thousands are made at a first save: a tuple is made fastest
    """A box of a tensor in a shard file.

    Attributes:
        key: Its key in the header.
        dtype: Element type.
        shape: Shape of the box.
    """

    key: str
    dtype: dtypes.Dtype
    shape: tuple[int, ...]


class ShardLayout:
    """What lies where in a shard file. It holds no array, so it can be kept from save to save.

    Args:
        pieces: In the order of the file: falling item size (so each is aligned to its own).
        block_bytes: Bytes under one checksum; a power of two.

    Attributes:
        pieces: The pieces.
        sizes: Bytes of each.
        plain: Of each its dtype, if Python knows it and there are elements; else None.
        header: The first `data_start` bytes.
        data_start: Where the tensors' bytes begin.
        starts: Where each piece begins, and the last one ends.
        table_start: Where the checksum table begins.
        length: Of the whole file, in bytes.
        blocks: Number of blocks, and so of checksums.

    Raises:
        LayoutError: Two pieces of one key, or a reserved key.
    """

    def __init__(self, pieces: Sequence[Piece], block_bytes: int) -> None:
        self.pieces = list(pieces)
        self.block_bytes = block_bytes
        kinds = [piece.dtype.numpy for piece in self.pieces]
        sizes = self.sizes = [
            math.prod(piece.shape) * kind.itemsize
            for piece, kind in zip(self.pieces, kinds, strict=True)
        ]
        self.plain = [
            kind if size and kind.isbuiltin == 1 else None
            for kind, size in zip(kinds, sizes, strict=True)
        ]
        data_bytes = sum(sizes)
        entries = _entries(self.pieces, sizes, block_bytes)
        self.data_start = DATA_ALIGNMENT
        # The table's entry is part of the header, and the table's length depends on the header's.
        while True:
            self.table_start = self.data_start + data_bytes
            table = table_bytes(self.table_start, block_bytes)
            text = entries + _entry(TABLE_KEY, "U8", [table], data_bytes, table) + b"}"
            needed = -(-(8 + len(text)) // DATA_ALIGNMENT) * DATA_ALIGNMENT
            if needed <= self.data_start:
                break
            self.data_start = needed
        size = self.data_start - 8
        self.header = size.to_bytes(8, "little") + text.ljust(size)
        self.length = self.table_start + table_bytes(self.table_start, block_bytes)
        self.blocks = -(-self.table_start // block_bytes)
        self.starts: list[int] = (np.cumsum([0, *sizes]) + self.data_start).tolist()

    def block(self, index: int) -> tuple[int, int]:
        """Return the first and last-plus-one byte of a block."""
        start = index * self.block_bytes
        return start, min(start + self.block_bytes, self.table_start)

    def pieces_in(self, start_byte: int, stop_byte: int) -> range:
        """Return the numbers of the pieces that have bytes in a stretch of the file."""
        first = max(bisect_right(self.starts, start_byte) - 1, 0)
        return range(first, min(bisect_left(self.starts, stop_byte), len(self.pieces)))


class ShardImage:
    """A shard file that is not written yet: its layout, and where its bytes come from.

    Args:
        layout: The layout.
        sources: For each piece an array that holds it as a run of its C order, and the first
            element of that run.

    Attributes:
        layout: The layout.
    """

    def __init__(self, layout: ShardLayout, sources: Sequence[tuple[Array, int]]) -> None:
        self.layout = layout
        self._sources = sources

    @cached_property
    def _views(self) -> list[np.ndarray | None]:
        """The pieces' bytes; made when the first are copied, which may be in the background."""
        layout = self.layout
        return [
            # Asked first what is true of most: thousands of whole arrays are seen as bytes.
            np.frombuffer(array, np.uint8)
            if type(array) is np.ndarray
            and array.dtype is plain
            and array.nbytes == size
            and array.flags.c_contiguous
            else _bytes_of(array, piece.dtype, first, size)
            for (array, first), piece, plain, size in zip(
                self._sources, layout.pieces, layout.plain, layout.sizes, strict=True
            )
        ]

    def fill_checked(
        self, buffer: np.ndarray, start_byte: int, stop_byte: int, *, piece_bytes: int
    ) -> int:
        """Produce bytes as `fill` does, and take their checksum while they are in the cache.

        Of the copy, and not of the arrays: where another thread changes one meanwhile, the file is
        still what its checksums say.

        Args:
            buffer: As in `fill`, and so are the bounds.
            start_byte: See there.
            stop_byte: See there.
            piece_bytes: So much is copied before its checksum is taken; a power of two.
        """
        value, at, starts = 0, start_byte, self.layout.starts
        while at < stop_byte:
            # As far as one array goes, straight from it.
            index = bisect_right(starts, at) - 1
            view = self._views[index] if 0 <= index < len(self._views) else None
            end = min(stop_byte, starts[index + 1]) if view is not None else at
            if view is None or end - at < piece_bytes:
                end = min(at + piece_bytes, stop_byte)
                piece = buffer[at - start_byte : end - start_byte]
                self.fill(piece, at, end)
                value, at = checksum(piece.data, value), end
                continue
            source = view[at - starts[index] : end - starts[index]]
            out = buffer[at - start_byte : end - start_byte]
            for first in range(0, end - at, piece_bytes):
                piece = out[first : first + piece_bytes]
                piece[:] = source[first : first + piece_bytes]
                value = checksum(piece.data, value)
            at = end
        return value

    def fill(self, buffer: np.ndarray, start_byte: int, stop_byte: int) -> None:
        """Produce bytes of the file before its table.

        Args:
            buffer: (stop − start,) uint8, written to.
            start_byte: First byte; a multiple of the largest item size.
            stop_byte: One past the last; such a multiple, or `table_start`.
        """
        layout, at = self.layout, start_byte
        if at < layout.data_start:
            end = min(stop_byte, layout.data_start)
            buffer[: end - at] = np.frombuffer(layout.header, np.uint8, end - at, at)
            at = end
        if at >= stop_byte:
            return
        starts, views = layout.starts, self._views
        index = bisect_right(starts, at) - 1
        last = bisect_left(starts, stop_byte) - 1  # the piece that holds the last byte
        while index <= last:
            many = index
            if at == starts[index]:
                while many < last and views[many] is not None:
                    many += 1
            if many > index + 1:
                # Whole small arrays: one call instead of one each.
                end = starts[many]
                out = buffer[at - start_byte : end - start_byte]
                np.concatenate(views[index:many], out=out)  # type: ignore[arg-type]
                index, at = many, end
                continue
            end = min(starts[index + 1], stop_byte)
            if at < end:
                self._fill_part(buffer[at - start_byte : end - start_byte], index, at, end)
            index, at = index + 1, end

    def _fill_part(self, out: np.ndarray, index: int, at: int, end: int) -> None:
        """Produce bytes of one piece."""
        begin, view = self.layout.starts[index], self._views[index]
        if view is not None:
            out[:] = view[at - begin : end - begin]
            return
        # Nothing cuts an element: item sizes are powers of two, pieces are aligned.
        (array, first), dtype = self._sources[index], self.layout.pieces[index].dtype
        item = dtype.itemsize
        copy_run(array, dtype, first + (at - begin) // item, (end - at) // item, out)


def _bytes_of(array: Array, dtype: dtypes.Dtype, first: int, size_bytes: int) -> np.ndarray | None:
    """View a run of an array as bytes in file order (uint8); None where that needs a copy."""
    if (
        isinstance(array, np.ndarray)
        and array.flags.c_contiguous
        and (array.dtype is dtype.numpy or array.dtype == dtype.numpy)
    ):
        whole = array.reshape(-1).view(np.uint8)
        start = first * dtype.itemsize
        return whole if len(whole) == size_bytes else whole[start : start + size_bytes]
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


def _entries(pieces: Sequence[Piece], sizes: Sequence[int], block_bytes: int) -> bytes:
    """Write the header but for its last entry, the table's."""
    metadata = {"format": "distckpt", "version": "1", "block_bytes": str(block_bytes)}
    entries = {METADATA_KEY: _json({METADATA_KEY: metadata})[1:-1]}
    kinds: dict[tuple[int, tuple[int, ...]], str] = {}
    at = 0
    for (key, dtype, extents), size in zip(pieces, sizes, strict=True):
        kind = kinds.get((dtype.code, extents))
        if kind is None:
            kind = kinds[dtype.code, extents] = _kind(dtype, extents)
        if key in entries or key in RESERVED_KEYS:
            raise LayoutError(
                f"{key!r}: this key is "
                + ("reserved" if key in RESERVED_KEYS else "needed twice in one shard file")
                + "; rename the tensor"
            )
        end = at + size
        # There may be thousands, alike but for their names and offsets.
        entries[key] = f'{_quoted(key)}:{{{kind},"data_offsets":[{at},{end}]}}'
        at = end
    return ("{" + ",".join(entries.values()) + ",").encode()


def _kind(dtype: dtypes.Dtype, extents: Sequence[int]) -> str:
    """Write what an entry says of dtype and shape."""
    name, shape = dtype.safetensors, list(extents)
    if name is None:
        name = "U8"
        shape += [dtype.itemsize] if dtype.itemsize > 1 else []
    return _json({"dtype": name, "shape": shape})[1:-1]


def _entry(key: str, dtype: str, shape: Sequence[int], start: int, size: int) -> bytes:
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}
    return _json({key: entry})[1:-1].encode()


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
