"""The record of one checkpoint, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from distckpt import dtypes
from distckpt.layout import Layout

MANIFEST_NAME = "manifest.binpb"
BLOCK_BYTES = 4 << 20
DATA_ALIGNMENT = 4096
TABLE_DIGEST_BYTES = 16


def shard_name(index: int, count: int, save_id: int) -> str:
    """Name of shard file *index* of *count*."""
    return f"shard-{index:05d}-of-{count:05d}.{save_id:016x}.safetensors"


def pad_columns(columns: np.ndarray, width: int, fill: int) -> np.ndarray:
    """Widen (n, ndim) columns to *width* dimensions by leading ones; C order stays the same."""
    missing = width - columns.shape[1]
    if not missing:
        return columns
    return np.concatenate([np.full((len(columns), missing), fill, np.int64), columns], axis=1)


@dataclass(frozen=True, slots=True)
class Pieces:
    """Every stored box, as columns, in the order of tensor and start.

    Attributes:
        tensor: (n,) index of its tensor.
        start: (n, width) its start, padded with leading dimensions (0:1) to one width, at least 1.
        stop: (n, width).
        file: (n,) which shard file holds it.
        offset_bytes: (n,) where in the file.
        size_bytes: (n,).
    """

    tensor: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    file: np.ndarray
    offset_bytes: np.ndarray
    size_bytes: np.ndarray


def order_in_file(file: np.ndarray, itemsize: np.ndarray, tensor: np.ndarray) -> np.ndarray:
    """Return the order in which boxes lie in the files: by file, falling item size, tensor.

    The boxes come in the order of tensor and start, which breaks the ties. So every tensor is
    aligned to its own item size, and no offset needs to be stored.
    """
    return np.lexsort((tensor, -itemsize, file))


@dataclass(frozen=True)
class Manifest:
    """Immutable record of one checkpoint.

    Attributes:
        save_id: The save's 64 random bits.
        created_ns: When it was committed, nanoseconds since 1970 UTC.
        ranks: How many ranks saved.
        block_bytes: Bytes under one CRC32C of the shard files.
        step: Training step, or None.
        names: Tensor names, in the order of the state.
        dtype: (tensors,) dtype codes.
        layout: (tensors,) index into `layouts`.
        layouts: How tensors are cut, each kept once.
        file_length: (files,) bytes.
        file_data_start: (files,) where the tensors' bytes begin.
        file_digest: (files,) digest of each checksum table.
        values: Plain values by name.
        per_rank: Name → (ranks,) length in bytes of each rank's blob, 0 for none.
        per_rank_file: (ranks,) file of each rank's blobs.
        metadata: The user's own.
        metrics: Numbers by name.
    """

    save_id: int
    created_ns: int
    ranks: int
    block_bytes: int
    step: int | None
    names: Sequence[str]
    dtype: np.ndarray
    layout: np.ndarray
    layouts: Sequence[Layout]
    file_length: np.ndarray
    file_data_start: np.ndarray
    file_digest: Sequence[bytes]
    values: Mapping[str, object] = field(default_factory=dict)
    per_rank: Mapping[str, np.ndarray] = field(default_factory=dict)
    per_rank_file: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    metadata: Mapping[str, object] | None = None
    metrics: Mapping[str, float] | None = None

    @cached_property
    def index(self) -> dict[str, int]:
        """Tensor name → its index."""
        return {name: index for index, name in enumerate(self.names)}

    @property
    def all_names(self) -> list[str]:
        """Names of tensors, values and per-rank values."""
        return [*self.names, *self.values, *self.per_rank]

    @property
    def file_names(self) -> list[str]:
        """Names of the shard files."""
        count = len(self.file_length)
        return [shard_name(index, count, self.save_id) for index in range(count)]

    def dtype_of(self, tensor: int) -> dtypes.Dtype:
        """Return a tensor's dtype."""
        return dtypes.BY_CODE[int(self.dtype[tensor])]

    def layout_of(self, tensor: int) -> Layout:
        """Return a tensor's layout."""
        return self.layouts[int(self.layout[tensor])]

    @cached_property
    def itemsize(self) -> np.ndarray:
        """(tensors,) bytes of an element."""
        sizes = np.zeros(256, np.int64)
        for code, entry in dtypes.BY_CODE.items():
            sizes[code] = entry.itemsize
        return sizes.take(self.dtype)

    @cached_property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return int(self.pieces.size_bytes.sum())

    @cached_property
    def pieces(self) -> Pieces:
        """Every stored box with its place, from the layouts alone: so invariant I4 always holds."""
        width = max((len(layout.shape) for layout in self.layouts), default=1) or 1
        used = [self.layouts[index] for index in self.layout.tolist()]
        count = np.array([len(layout) for layout in used], np.int64)
        tensor = np.repeat(np.arange(len(used)), count)
        start = _stack([pad_columns(layout.start, width, 0) for layout in used], width)
        stop = _stack([pad_columns(layout.stop, width, 1) for layout in used], width)
        file = np.concatenate([layout.file for layout in used] or [np.zeros(0, np.int64)])
        itemsize = self.itemsize[tensor]
        size_bytes = (stop - start).prod(axis=1) * itemsize
        order = order_in_file(file, itemsize, tensor)
        before = np.cumsum(size_bytes[order]) - size_bytes[order]
        first = np.searchsorted(file[order], np.arange(len(self.file_length)))
        base = before[np.minimum(first, max(len(before) - 1, 0))] if len(before) else first
        offset = np.empty(len(file), np.int64)
        offset[order] = before - base[file[order]] + self.file_data_start[file[order]]
        return Pieces(tensor, start, stop, file, offset, size_bytes)

    @cached_property
    def file_data_bytes(self) -> np.ndarray:
        """(files,) bytes of the tensors in each file."""
        pieces = self.pieces
        total = np.zeros(len(self.file_length), np.int64)
        np.add.at(total, pieces.file, pieces.size_bytes)
        return total

    @cached_property
    def file_table_start(self) -> np.ndarray:
        """(files,) where each checksum table begins: after the tensors and the per-rank blobs."""
        total: np.ndarray = self.file_data_start + self.file_data_bytes
        for lengths in self.per_rank.values():
            np.add.at(total, self.per_rank_file[lengths > 0], lengths[lengths > 0])
        return total

    def blob_place(self, name: str, rank: int) -> tuple[int, int, int]:
        """Return the file, first byte and length of one rank's blob; length 0 where it has none."""
        if not self.per_rank[name][rank]:
            return 0, 0, 0
        file = int(self.per_rank_file[rank])
        offset = int(self.file_data_start[file] + self.file_data_bytes[file])
        for other, lengths in self.per_rank.items():
            if other == name:
                return file, offset, int(lengths[rank])
            offset += int(lengths[rank])
        raise KeyError(name)


def _stack(columns: list[np.ndarray], width: int) -> np.ndarray:
    return np.concatenate(columns) if columns else np.zeros((0, width), np.int64)


def table_bytes(table_start: int, block_bytes: int) -> int:
    """Length of the checksum table of a file whose table begins at *table_start*."""
    return 4 * -(-table_start // block_bytes)
