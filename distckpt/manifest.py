"""The record of one checkpoint, as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from distckpt import dtypes
from distckpt.layout import Layout
from distckpt.region import ranges

MANIFEST_NAME = "manifest.binpb"
BLOCK_BYTES = 4 << 20
DATA_ALIGNMENT = 4096
TABLE_DIGEST_BYTES = 16
# So many numbers are listed at once for the starts of boxes.
_MOST_LISTED = 1 << 21


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

    def is_like(self, other: Manifest) -> bool:
        """Whether another's tensors and values are the same, and in the same places.

        False, too, where their names and layouts were decoded apart.
        """
        return (
            self.names is other.names
            and self.layouts is other.layouts
            and (self.ranks, self.block_bytes) == (other.ranks, other.block_bytes)
            and all(
                np.array_equal(getattr(self, name), getattr(other, name))
                for name in ("dtype", "layout", "file_length", "file_data_start", "per_rank_file")
            )
            and list(self.values) == list(other.values)
            and list(self.per_rank) == list(other.per_rank)
            and all(map(np.array_equal, self.per_rank.values(), other.per_rank.values()))
        )

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
        return dtypes.itemsizes(self.dtype)

    @property
    def width(self) -> int:
        """Dimensions that the columns of `Pieces` have."""
        return max((len(layout.shape) for layout in self.layouts), default=1) or 1

    @cached_property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return int(self.file_data_bytes.sum())

    @cached_property
    def boxes(self) -> int:
        """Number of boxes of all tensors."""
        count = np.array([len(layout) for layout in self.layouts], np.int64)
        return int(count[self.layout].sum())

    @cached_property
    def pieces(self) -> Pieces:
        """Every stored box with its place; at thousands of ranks, ask for `pieces_of` some tensors.

        The places follow from the layouts alone: so invariant I4 always holds.
        """
        tensor, start, stop, file = self._listed(*self._all_boxes(np.arange(len(self.names))))
        itemsize = self.itemsize[tensor]
        size_bytes = (stop - start).prod(axis=1) * itemsize
        order = order_in_file(file, itemsize, tensor)
        before = np.cumsum(size_bytes[order]) - size_bytes[order]
        first = np.searchsorted(file[order], np.arange(len(self.file_length)))
        base = before[np.minimum(first, max(len(before) - 1, 0))] if len(before) else first
        offset = np.empty(len(file), np.int64)
        offset[order] = before - base[file[order]] + self.file_data_start[file[order]]
        return Pieces(tensor, start, stop, file, offset, size_bytes)

    def pieces_of(self, tensors: np.ndarray) -> Pieces:
        """Return the stored boxes of some tensors, each with its place.

        Args:
            tensors: Indices of tensors, ascending.
        """
        if self.boxes * self.width > _MOST_LISTED:
            return self._placed(*self._all_boxes(tensors))
        pieces = self.pieces
        first = np.searchsorted(pieces.tensor, tensors)
        count = np.searchsorted(pieces.tensor, tensors, side="right") - first
        rows = ranges(first, count)
        return Pieces(*(getattr(pieces, name)[rows] for name in Pieces.__dataclass_fields__))

    def pieces_for(self, tensor: np.ndarray, start: np.ndarray, stop: np.ndarray) -> Pieces:
        """Return the stored boxes that have elements of some boxes, each with its place.

        Where there are few in all, others of the same tensors may be among them.

        Args:
            tensor: (n,) which tensor each box is one of.
            start: (n, width) the boxes.
            stop: (n, width).
        """
        if self.boxes * self.width <= _MOST_LISTED:
            return self.pieces_of(np.unique(tensor))
        # Thousands of tensors share a layout, and most of them are wanted in the same few boxes.
        table = np.column_stack([self.layout[tensor], start, stop])
        wanted, kind = np.unique(table, axis=0, return_inverse=True)
        touched = []
        for layout, *box in wanted.tolist():
            found = self.layouts[layout]
            pad = start.shape[1] - len(found.shape)
            low, high = (end[pad:] for end in np.split(np.array(box), 2))
            common = np.maximum(found.start, low) < np.minimum(found.stop, high)
            touched.append(np.flatnonzero(common.all(axis=1)))
        counts = np.array([len(boxes) for boxes in touched], np.int64)
        kind = kind.reshape(-1)
        rows = ranges((np.cumsum(counts) - counts)[kind], counts[kind])
        boxes = np.concatenate([*touched, np.zeros(0, np.int64)])[rows]
        pairs = np.unique(np.column_stack([np.repeat(tensor, counts[kind]), boxes]), axis=0)
        return self._placed(*pairs.T)

    def _all_boxes(self, tensors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number all boxes of some tensors: the tensor of each, and which of its boxes it is."""
        each = np.array([len(layout) for layout in self.layouts], np.int64)
        count = each[self.layout[tensors]]
        return np.repeat(tensors, count), ranges(np.zeros(len(tensors), np.int64), count)

    def _listed(
        self, tensor: np.ndarray, box: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """List boxes.

        Args:
            tensor: (n,) the tensor of each.
            box: (n,) which of its boxes.

        Returns:
            The tensor, start, stop and file of each.
        """
        layouts, row = self._layouts_of(tensor, box)
        width = self.width
        start = _stack([pad_columns(layout.start, width, 0) for layout in layouts], width)
        stop = _stack([pad_columns(layout.stop, width, 1) for layout in layouts], width)
        file = np.concatenate([*(layout.file for layout in layouts), np.zeros(0, np.int64)])
        return tensor, start[row], stop[row], file[row]

    def _layouts_of(self, tensor: np.ndarray, box: np.ndarray) -> tuple[list[Layout], np.ndarray]:
        """Return the layouts that occur, and for each box its number in all of their boxes."""
        found, which = np.unique(self.layout[tensor], return_inverse=True)
        layouts = [self.layouts[index] for index in found.tolist()]
        sizes = np.array([len(layout) for layout in layouts], np.int64)
        return layouts, (np.cumsum(sizes) - sizes)[which.reshape(-1)] + box

    def _placed(self, tensor: np.ndarray, box: np.ndarray) -> Pieces:
        """List boxes with their places, and no others.

        Of the others, only how many bytes a tensor has in which file is counted.

        Args:
            tensor: (n,) the tensor of each, ascending.
            box: (n,) which of its boxes, ascending.
        """
        _, start, stop, file = self._listed(tensor, box)
        layouts, row = self._layouts_of(tensor, box)
        before = np.concatenate(
            [*(layout.elements_before() for layout in layouts), np.zeros(0, np.int64)]
        )
        itemsize = self.itemsize[tensor]
        offset = self.file_data_start[file] + before[row] * itemsize
        tensors, begins = np.unique(tensor, return_index=True)
        ends = np.append(begins, len(tensor))[1:]
        files, place = np.unique(file, return_inverse=True)
        place = place.reshape(-1)
        for number, total in self._bytes_before(tensors, files):
            rows = slice(begins[number], ends[number])
            offset[rows] += total[place[rows]]
        size_bytes = (stop - start).prod(axis=1) * itemsize
        return Pieces(tensor, start, stop, file, offset, size_bytes)

    def _bytes_before(
        self, tensors: np.ndarray, files: np.ndarray
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield for some tensors what lies before them in some files: their position, and bytes.

        Tensors lie in the files in the order of falling item size, then of their index.

        Args:
            tensors: Indices of tensors, ascending.
            files: Numbers of files, ascending.
        """
        wanted = np.full(len(self.names), -1)
        wanted[tensors] = np.arange(len(tensors))
        row = np.full(len(self.file_length), -1)
        row[files] = np.arange(len(files))
        elements = [(row[file], count) for file, count in self._elements]
        elements = [(file[file >= 0], count[file >= 0]) for file, count in elements]
        total = np.zeros(len(files), np.int64)
        order = np.lexsort((np.arange(len(self.names)), -self.itemsize))
        last = int(np.flatnonzero(wanted[order] >= 0)[-1]) + 1 if len(tensors) else 0
        columns = zip(
            order[:last].tolist(),
            wanted[order[:last]].tolist(),
            self.layout[order[:last]].tolist(),
            self.itemsize[order[:last]].tolist(),
            strict=True,
        )
        for _, place, layout, itemsize in columns:
            if place >= 0:
                yield place, total
            file, count = elements[layout]
            total[file] += count * itemsize

    @cached_property
    def _elements(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each layout, the files that hold any of it, and how many elements each."""
        return [layout.count_elements(len(self.file_length)) for layout in self.layouts]

    @cached_property
    def file_data_bytes(self) -> np.ndarray:
        """(files,) bytes of the tensors in each file."""
        return self._sum_bytes(np.int64)

    @property
    def largest_file_bytes(self) -> float:
        """Bytes of the tensors in the file that has most; as a float, which can't overflow."""
        return float(self._sum_bytes(np.float64).max(initial=0.0))

    def _sum_bytes(self, kind: type[np.number[Any]]) -> np.ndarray:
        # Layout by layout, and nothing is kept: a small manifest may describe millions of boxes.
        total = np.zeros(len(self.file_length), kind)
        weight = np.zeros(len(self.layouts), np.int64)
        np.add.at(weight, self.layout, self.itemsize)
        for index in np.flatnonzero(weight).tolist():
            file, elements = self.layouts[index].count_elements(len(self.file_length))
            total[file] += elements.astype(kind) * weight[index]
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
