"""What a net wants, and how what was read is put in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import EllipsisType
from typing import Any

import numpy as np

from distckpt import dtypes
from distckpt.copies import Places
from distckpt.flat import FlatState
from distckpt.leaves import Leaf, TensorLeaf
from distckpt.plan import Holdings, Seen
from distckpt.region import Region
from distckpt.state import runs_boxes


@dataclass(slots=True)
class Target:
    """A box of a tensor that a net wants.

    Attributes:
        destination: The tensor's place in the net.
        region: The box.
        first: Where the box begins in a FlatShard's array; unused otherwise.
    """

    destination: Destination
    region: Region
    first: int

    def put(self, start: tuple[int, ...], values: np.ndarray) -> None:
        """Copy a part of the box in; converts where the dtypes differ.

        Args:
            start: Where the part begins in the whole tensor.
            values: The part.
        """
        destination = self.destination
        array = destination.memory()
        if destination.is_run:
            array = array[self.first : self.first + self.region.size].reshape(self.region.shape)
        where: list[slice | EllipsisType] = [
            slice(first - origin, first - origin + count)
            for first, origin, count in zip(start, self.region.start, values.shape, strict=True)
        ]
        where.append(...)  # makes it a view where there is no dimension, too
        np.copyto(array[tuple(where)], values, casting="unsafe")
        destination.arrived(values.size)


@dataclass(slots=True)
class Destination:
    """A tensor that a net wants, or this rank's piece of one.

    Writable numpy arrays (and torch tensors on the CPU, which share their memory with numpy) are
    filled where they are. In place of anything else a new array is made when the first byte
    arrives, and handed over with the last one, so that no more than a few of them exist at a time.

    Attributes:
        tensor: The leaf of the net.
        targets: The boxes that it is made of.
    """

    tensor: TensorLeaf
    targets: list[Target] = field(default_factory=list)
    _new: np.ndarray | None = None
    _missing: int = 0
    _in_place: bool | None = None

    @property
    def is_run(self) -> bool:
        """Whether it is a FlatShard."""
        return self.tensor.region is None

    @property
    def in_place(self) -> bool:
        """Whether the net's own memory is filled."""
        if self._in_place is None:  # asked for each part that is put in place
            array = self.tensor.array
            writeable = isinstance(array, np.ndarray) and array.flags.writeable
            self._in_place = bool(writeable and self.tensor.leaf.filled)
        return self._in_place

    def memory(self) -> np.ndarray:
        """Return the array to fill."""
        array = self.tensor.array
        if self.in_place and isinstance(array, np.ndarray):
            return array
        if self._new is None:
            self._new = np.empty(array.shape, self.tensor.dtype.numpy)
            self._missing = self._new.size
        return self._new

    def arrived(self, count: int) -> None:
        """Note that so many elements are there; the last ones put a new array in place."""
        if self.in_place:
            return
        self._missing -= count
        if self._missing == 0:
            self.finish()

    def finish(self) -> None:
        """Put the new array in place."""
        array = self.memory()
        self._new = None
        self.tensor.leaf.take(array)


@dataclass(frozen=True)
class Wanted:
    """What a net wants, by kind.

    Attributes:
        flat: The net, taken apart.
        held: Its tensors in columns.
    """

    flat: FlatState
    held: Holdings

    @property
    def tensors(self) -> Sequence[TensorLeaf]:
        """The tensors, and pieces of some."""
        return self.flat.tensors

    @property
    def values(self) -> dict[str, Leaf]:
        """Plain values by name."""
        return self.flat.values

    @property
    def per_rank(self) -> dict[str, Leaf]:
        """Per-rank values by name."""
        return self.flat.per_rank

    @property
    def names(self) -> list[str]:
        """All names, tensors first."""
        return [*self.held.names, *self.values, *self.per_rank]

    @cached_property
    def destinations(self) -> list[Destination]:
        """What is put in place piece by piece."""
        destinations = [Destination(tensor) for tensor in self.tensors]
        for destination in destinations:
            destination.targets = _targets(destination)
        return destinations

    @cached_property
    def targets(self) -> list[Target]:
        """The boxes of all tensors, by key."""
        return [target for destination in self.destinations for target in destination.targets]


class Footing:
    """What filling a net takes, but for the net: alike for all that want the same.

    Args:
        held: What a net wants.
        stored: (keys,) the code of the dtype in which each box is stored; 0 for none.

    Attributes:
        stored: See above.
        items: The number of each box's tensor, by key.
        is_one_each: Whether each tensor is one box.
    """

    def __init__(self, held: Holdings, stored: np.ndarray) -> None:
        self.stored = stored
        self._item, self._start, self._stop = held.keys()
        self.items: list[int] = self._item.tolist()
        self.is_one_each = self.items == list(range(len(held.names)))
        size = (self._stop - self._start).prod(axis=1)
        nbytes = np.zeros(len(held.names), np.int64)
        np.add.at(nbytes, self._item, size)
        itemsize = dtypes.itemsizes(held.dtype)
        # What Python can hand out as it is.
        length = np.where(dtypes.are_exported(held.dtype), nbytes * itemsize, -1)[self._item]
        self._length: list[int] = length.tolist()
        before = np.cumsum(size) - size
        within = (before - before[np.searchsorted(self._item, self._item)]) * itemsize[self._item]
        self._first = np.where(stored == held.dtype[self._item], within, -1)
        self._places = Places(self._start, self._stop, self._first)

    @property
    def takes_bytes(self) -> bool:
        """Whether the bytes of any box can be put in place as they are in the file."""
        return bool((self._first >= 0).any())

    def places(self, filled: Sequence[bool]) -> tuple[Places, list[int]]:
        """Say which boxes' bytes may be put where they belong as they are in the file.

        Args:
            filled: (tensors,) whether the memory of each takes bytes so.

        Returns:
            The boxes' places; and for each box the length in bytes of its tensor's memory, -1 where
            Python can't hand that out whole.
        """
        if all(filled):
            return self._places, self._length
        fills = np.array(filled, bool)[self._item]
        first = np.where(fills, self._first, -1)
        return Places(self._start, self._stop, first), np.where(fills, self._length, -1).tolist()


class Filling:
    """Fills a net with what is read: where it is, or by way of `Target.put`.

    Args:
        wanted: What the net wants.
        footing: What is known of it.

    Attributes:
        places: Which boxes' bytes may be put where they belong as they are in the file.
        touched: Of which boxes any byte may have changed.
    """

    def __init__(self, wanted: Wanted, footing: Footing) -> None:
        self._wanted, self._footing = wanted, footing
        self.touched: set[int] = set()
        arrays = wanted.flat.arrays
        self._arrays: Sequence[Any] = arrays
        if not footing.is_one_each:
            self._arrays = [arrays[item] for item in footing.items]
        # Asked only where it counts: there may be thousands.
        fills = wanted.flat.takes_bytes() if footing.takes_bytes else [False] * len(arrays)
        places, self._length = footing.places(fills)
        self.places: Places | None = places

    @property
    def names(self) -> list[str]:
        """Names of the tensors of which any byte may have changed."""
        names, items = self._wanted.held.names, self._footing.items
        if self._footing.is_one_each and len(self.touched) == len(items):
            return list(names)
        return [names[item] for item in sorted({items[key] for key in self.touched})]

    def dtype(self, key: int) -> np.dtype:
        """See `Landing`."""
        return dtypes.BY_CODE[int(self._footing.stored[key])].numpy

    def memories(
        self, key: Sequence[int], start: Sequence[int], stop: Sequence[int]
    ) -> list[memoryview]:
        """See `Landing`."""
        # Numpy would take as long for one as for a hundred, and mostly there are a few.
        self.touched.update(key)
        arrays, length = self._arrays, self._length
        return [
            arrays[number].data
            if first == 0 and last == length[number]
            else _bytes(arrays[number], first, last)
            for number, first, last in zip(key, start, stop, strict=True)
        ]

    def takes_any(self, key: np.ndarray) -> bool:
        """See `Landing`. Where new arrays are put in place, that takes turns."""
        targets = self._wanted.targets
        return all(targets[number].destination.in_place for number in key.tolist())

    def put(self, key: int, start: tuple[int, ...], values: np.ndarray) -> None:
        """See `Landing`."""
        self.touched.add(key)
        target = self._wanted.targets[key]
        pad = len(start) - len(target.region.start)
        if pad:
            start, values = start[pad:], values.reshape(values.shape[pad:])
        target.put(start, values)


def _bytes(array: np.ndarray, start_byte: int, stop_byte: int) -> memoryview:
    return array.reshape(-1).view(np.uint8)[start_byte:stop_byte].data


def collect(net: object) -> Wanted:
    """Take a net apart, once.

    Raises:
        LayoutError: A leaf that nothing can be loaded into.
    """
    return Wanted(*Seen().take_apart(net, replaces=True))


def _targets(destination: Destination) -> list[Target]:
    tensor = destination.tensor
    if tensor.region is not None:
        return [Target(destination, tensor.region, 0)]
    start = tensor.start or 0
    first, targets = 0, []
    for region in runs_boxes(tensor.shape, tensor.parent, start, tensor.array.size):
        targets.append(Target(destination, region, first))
        first += region.size
    return targets
