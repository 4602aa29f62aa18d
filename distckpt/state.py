"""What a user hands in: shards, values that differ by rank, arrays to be read later, and nets."""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from distckpt.errors import LayoutError
from distckpt.region import Region, boxes_of_run

Plain = int | float | bool | str | bytes | None
PLAIN = (int, float, str, bytes, type(None))

# Part of the file format: readers refuse more. An extent of 0 counts as 1.
MAX_NAME_BYTES = 1 << 16
MAX_DIMENSIONS = 32
MAX_TENSOR_BYTES = 1 << 62


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """A box of a tensor, and the array that holds it on this rank.

    Attributes:
        array: The piece: numpy, or what converts to numpy without a copy. Not copied.
        offset: Index of its first element in the whole tensor, one int a dimension, in elements.
        global_shape: Shape of the whole tensor.

    Several ranks may hold the same box: it is stored once. Boxes that overlap otherwise are refused
    at the save.

    Raises:
        LayoutError: The piece does not lie in the global shape.
    """

    array: np.ndarray
    offset: tuple[int, ...]
    global_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "offset", _ints(self.offset))
        object.__setattr__(self, "global_shape", _ints(self.global_shape))
        shape = tuple(np.shape(self.array))
        if not len(shape) == len(self.offset) == len(self.global_shape):
            raise LayoutError(
                f"a Shard of shape {shape} at offset {self.offset} of {self.global_shape}: "
                "array, offset and global shape need the same number of dimensions"
            )
        if any(
            o < 0 or o + n > g
            for o, n, g in zip(self.offset, shape, self.global_shape, strict=True)
        ):
            raise LayoutError(
                f"a Shard of shape {shape} at offset {self.offset} ends outside its global shape "
                f"{self.global_shape}"
            )

    @property
    def region(self) -> Region:
        """The box."""
        shape = np.shape(self.array)
        return Region(self.offset, tuple([o + n for o, n in zip(self.offset, shape, strict=True)]))


@dataclass(frozen=True, slots=True, eq=False)
class FlatShard:
    """A run of a tensor's elements in C order (ZeRO, FSDP's flat buffers), held on this rank.

    Where a tensor is cut into boxes first, and each box is flattened and shared out (ZeRO-1 over
    tensor parallelism: the optimizer's state of a rank's local shard), *region* is that box, and
    the run is one of the box's own C order.

    Attributes:
        array: One-dimensional: elements ``start … start + len(array)`` of the flattened tensor, or
            of its flattened region. Not copied.
        start: Index of the first element in what is flattened.
        global_shape: Shape of the whole tensor.
        region: The box that is flattened; None for the whole tensor.

    Raises:
        LayoutError: The array is not one-dimensional, or the run does not lie in the tensor, or the
            region doesn't.

    Examples:
        >>> right_half = Region((0, 2), (4, 4))
        >>> shard = FlatShard(np.zeros(3), 2, (4, 4), right_half)
        >>> [str(box) for box in shard.regions]
        ['[1:2, 2:4]', '[2:3, 2:3]']
    """

    array: np.ndarray
    start: int
    global_shape: tuple[int, ...]
    region: Region | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", _ints((self.start,))[0])
        object.__setattr__(self, "global_shape", _ints(self.global_shape))
        shape = tuple(np.shape(self.array))
        if len(shape) != 1:
            raise LayoutError(
                f"a FlatShard holds a one-dimensional array, not one of shape {shape}"
            )
        if min(self.global_shape, default=0) < 0:
            raise LayoutError(f"a FlatShard ends outside its tensor of shape {self.global_shape}")
        if self.region is not None and (
            len(self.region.stop) != len(self.global_shape)
            or any(b > n for b, n in zip(self.region.stop, self.global_shape, strict=True))
        ):
            raise LayoutError(
                f"a FlatShard of the region {self.region} does not lie in its tensor of shape "
                f"{self.global_shape}"
            )
        size = math.prod(self.global_shape) if self.region is None else self.region.size
        if self.start < 0 or self.start + shape[0] > size:
            where = "" if self.region is None else f" region {self.region} of its"
            raise LayoutError(
                f"a FlatShard of elements {self.start}:{self.start + shape[0]} ends outside its"
                f"{where} tensor of shape {self.global_shape} ({size} elements)"
            )

    @property
    def regions(self) -> list[Region]:
        """The boxes that the run is made of, at most 2·ndim−1."""
        return runs_boxes(self.global_shape, self.region, self.start, np.shape(self.array)[0])


def runs_boxes(
    shape: tuple[int, ...], region: Region | None, start: int, count: int
) -> list[Region]:
    """Cut a run of a tensor, or of a box of it, into boxes of the tensor."""
    if region is None:
        return boxes_of_run(shape, start, start + count)
    return [box.shifted(region.start) for box in boxes_of_run(region.shape, start, start + count)]


@dataclass(frozen=True, slots=True, eq=False)
class PerRank:
    """A value that differs by rank on purpose, such as a random generator's state.

    Each rank's is kept. Loaded on as many ranks, each gets its own back; on another number of them
    `per_rank=` decides.

    Attributes:
        value: An array, or nested dicts, lists and tuples of plain values and arrays.
    """

    value: object


class LazyArray(ABC):
    """An array that is read when a save needs it, a part at a time: a tensor of a checkpoint, say.

    In a state it stands for the array; the save reads it in blocks: it may be larger than memory.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    @abstractmethod
    def dtype(self) -> np.dtype:
        """Its dtype."""

    @abstractmethod
    def read(self, region: Region | None = None) -> np.ndarray:
        """Read it, or a box of it: an array of the box's shape."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


Array = np.ndarray | LazyArray


@runtime_checkable
class Net(Protocol):
    """What an object must offer to be saved and loaded into, where it is no dict of arrays.

    Where it has an attribute ``shares_memory`` that is true, arrays of `tensors` that are writable
    are filled where they are, and `assign` is called for the rest only.
    """

    def tensors(self) -> Mapping[str, object]:
        """Name → array, Shard, FlatShard, PerRank or plain value."""

    def assign(self, name: str, value: object) -> None:
        """Put one in place, when all of it is read.

        Args:
            name: A name of `tensors`.
            value: A new value of the same kind, shape and dtype: an array for an array, a Shard
                with a new array for a Shard, and so on.
        """


def _ints(values: Sequence[int]) -> tuple[int, ...]:
    try:
        return tuple(operator.index(value) for value in values)
    except TypeError as exc:
        raise LayoutError(f"{tuple(values)}: offsets and extents are whole numbers") from exc
