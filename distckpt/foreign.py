"""Files of other formats, presented as a checkpoint: one virtual file for each stored piece.

So whatever opens a format gets all that loading has: matching, slices, conversion, resharding, and
reading each byte once under MPI. There are no checksums of ours; a format that has its own checks
them itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NoReturn, Protocol

import numpy as np

from distckpt import dtypes
from distckpt.errors import CorruptCheckpoint, StoreError
from distckpt.layout import Layout, describe_faults, wrong_covers
from distckpt.manifest import BLOCK_BYTES, Manifest, pad_columns
from distckpt.region import Region
from distckpt.store import Sink


@dataclass(frozen=True, slots=True)
class ForeignTensor:
    """What is known of a tensor before it is read.

    Attributes:
        name: Its name.
        shape: Its whole shape.
        dtype: Its element type.
        pieces: The boxes that it is stored in, which cover it exactly once; None for one piece.
    """

    name: str
    shape: tuple[int, ...]
    dtype: dtypes.Dtype
    pieces: tuple[Region, ...] | None = None

    @property
    def boxes(self) -> tuple[Region, ...]:
        """The boxes that it is stored in."""
        return (Region.whole(self.shape),) if self.pieces is None else self.pieces


@dataclass(frozen=True, slots=True)
class Contents:
    """What an opened file of another format holds.

    Attributes:
        tensors: In the order of the file; no two of one name.
        values: Plain values by name (int, float, bool, str, bytes, None); none has a tensor's name.
        metadata: What the file says of itself: nested plain values.
    """

    tensors: Sequence[ForeignTensor]
    values: Mapping[str, object] = field(default_factory=dict)
    metadata: Mapping[str, object] = field(default_factory=dict)


class Source(Protocol):
    """An opened file, or folder of files, of another format. Several threads may read at once."""

    @property
    def contents(self) -> Contents:
        """What is in it."""

    def read_into(self, tensor: int, piece: int, start_byte: int, buffer: memoryview) -> None:
        """Fill a buffer with bytes of a piece, as if it lay little-endian in C order.

        Mostly called with rising offsets and buffers of a few MiB, which cut no element; of up to
        32 MiB where the file lies in a store that reads in parallel.

        Args:
            tensor: Index in ``contents.tensors``.
            piece: Index in its ``boxes``.
            start_byte: First byte.
            buffer: Writable bytes; its length says how many to read.

        Raises:
            CorruptCheckpoint: The file does not hold what it said.
        """


class ForeignStore:
    """A source, as the read-only Store of a checkpoint.

    Args:
        source: The opened file.
        url: Where it is.
        format: Name of the format.
        parallel_bytes: That of the store where the file is; see `distckpt.store.parallel_bytes`.

    Attributes:
        format: Name of the format.
        parallel_bytes: See above.
    """

    def __init__(self, source: Source, url: str, format: str, *, parallel_bytes: int = 0) -> None:
        self._source = source
        self._url = url
        self.format = format
        self.parallel_bytes = parallel_bytes

    @property
    def url(self) -> str:
        """Where it is."""
        return self._url

    @cached_property
    def manifest(self) -> Manifest:
        """The checkpoint that it is: piece i is the whole of virtual file i.

        Raises:
            CorruptCheckpoint: Tensors that their pieces do not cover exactly once: all of them.
        """
        tensors = self._source.contents.tensors
        self._check_cover(tensors)
        layouts: list[Layout] = []
        sizes: list[int] = []
        for tensor in tensors:
            boxes = sorted(tensor.boxes, key=lambda box: box.start)
            ndim = len(tensor.shape)
            first = len(sizes)
            sizes += [box.size * tensor.dtype.itemsize for box in boxes]
            layouts.append(
                Layout(
                    tensor.shape,
                    np.array([box.start for box in boxes], np.int64).reshape(len(boxes), ndim),
                    np.array([box.stop for box in boxes], np.int64).reshape(len(boxes), ndim),
                    np.arange(first, len(sizes)),
                )
            )
        contents = self._source.contents
        return Manifest(
            save_id=0,
            created_ns=0,
            ranks=1,
            block_bytes=BLOCK_BYTES,
            step=None,
            names=[tensor.name for tensor in tensors],
            dtype=np.array([tensor.dtype.code for tensor in tensors], np.int64),
            layout=np.arange(len(tensors)),
            layouts=layouts,
            file_length=np.array(sizes, np.int64),
            file_data_start=np.zeros(len(sizes), np.int64),
            file_digest=[b""] * len(sizes),  # no checksum table
            values=dict(contents.values),
            metadata=dict(contents.metadata),
        )

    @cached_property
    def _place_of(self) -> dict[str, tuple[int, int, int]]:
        """Virtual file → (tensor, piece, bytes)."""
        places = []
        for number, tensor in enumerate(self._source.contents.tensors):
            starts = [box.start for box in tensor.boxes]
            places += [
                (number, piece, tensor.boxes[piece].size * tensor.dtype.itemsize)
                for piece in sorted(range(len(starts)), key=starts.__getitem__)
            ]
        return dict(zip(self.manifest.file_names, places, strict=True))

    def _check_cover(self, tensors: Sequence[ForeignTensor]) -> None:
        cut = [tensor for tensor in tensors if tensor.pieces is not None and 0 not in tensor.shape]
        if not cut:
            return
        width = max(len(tensor.shape) for tensor in cut)
        count = [len(tensor.boxes) for tensor in cut]

        def columns(boxes: list[tuple[int, ...]], fill: int) -> np.ndarray:
            rows = [pad_columns(np.array([box], np.int64), width, fill) for box in boxes]
            return np.concatenate(rows) if rows else np.zeros((0, width), np.int64)

        faulty = wrong_covers(
            np.repeat(np.arange(len(cut)), count),
            columns([box.start for tensor in cut for box in tensor.boxes], 0),
            columns([box.stop for tensor in cut for box in tensor.boxes], 1),
            columns([tensor.shape for tensor in cut], 1),
        )
        if len(faulty):
            lines = []
            for index in faulty.tolist():
                found = cut[index]
                holders = [[number] for number in range(len(found.boxes))]
                lines.append(describe_faults(found.name, found.shape, found.boxes, holders))
            raise CorruptCheckpoint(
                f"{self._url}: {len(lines)} tensors are not stored exactly once:\n  "
                + "\n  ".join(lines),
                path=self._url,
            )

    def read_into(self, name: str, start_byte: int, buffer: memoryview) -> None:
        """See `Store`."""
        tensor, piece, size = self._find(name)
        if start_byte + len(buffer) > size:
            raise EOFError(f"{name} ends at byte {size}")
        self._source.read_into(tensor, piece, start_byte, buffer)

    def size(self, name: str) -> int:
        """See `Store`."""
        return self._find(name)[2]

    def modified(self, name: str) -> None:
        """See `Store`; not known."""
        self._find(name)

    def _find(self, name: str) -> tuple[int, int, int]:
        try:
            return self._place_of[name]
        except KeyError:
            raise FileNotFoundError(name) from None

    def names(self, prefix: str = "") -> list[str]:
        """See `Store`."""
        return [] if prefix else sorted(self._place_of)

    def create(self, name: str, length_bytes: int) -> Sink:
        """Refuse."""
        del name, length_bytes
        self._refuse()

    def put(self, name: str, data: bytes, *, replace: bool) -> None:
        """Refuse."""
        del name, data, replace
        self._refuse()

    def delete(self, names: Sequence[str]) -> None:
        """Refuse."""
        del names
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise StoreError(
            f"{self._url}: a {self.format} file is only read here; write one with distckpt.convert",
            url=self._url,
        )


def tensor_bytes(shape: Sequence[int], dtype: dtypes.Dtype) -> int:
    """Bytes of a tensor; exact, however absurd the shape is."""
    return math.prod(shape) * dtype.itemsize
