"""What a net wants, and how what was read is put in place."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from types import EllipsisType

import numpy as np

from distckpt import dtypes
from distckpt.copies import Places
from distckpt.plan import Holdings, describe
from distckpt.region import Region
from distckpt.state import FlatState, Leaf, TensorLeaf, flatten, runs_boxes


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

    def put(self, region: Region, values: np.ndarray) -> None:
        """Copy a part of the box in; converts where the dtypes differ."""
        array = self.destination.memory()
        if self.destination.is_run:
            array = array[self.first : self.first + self.region.size].reshape(self.region.shape)
        slices = region.relative_to(self.region.start).slices
        # The Ellipsis makes it a view where there is no dimension, too.
        where: tuple[slice | EllipsisType, ...] = (*slices, ...)
        np.copyto(array[where], values, casting="unsafe")
        self.destination.arrived(region.size)


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

    @property
    def is_run(self) -> bool:
        """Whether it is a FlatShard."""
        return self.tensor.region is None

    @property
    def in_place(self) -> bool:
        """Whether the net's own memory is filled."""
        array = self.tensor.array
        return isinstance(array, np.ndarray) and array.flags.writeable and self.tensor.leaf.filled

    @property
    def is_filled(self) -> bool:
        """Whether its memory takes bytes as they are in a file: in C order, little-endian."""
        array = self.tensor.array
        return (
            isinstance(array, np.ndarray)
            and array.flags.carray
            and (array.dtype is self.tensor.dtype.numpy or array.dtype == self.tensor.dtype.numpy)
            and self.tensor.leaf.filled
        )

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
        self._missing -= count
        if not self.in_place and self._missing == 0:
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
        destinations: The tensors.
        values: Plain values by name.
        per_rank: Per-rank values by name.
        flat: What it was made of.
    """

    destinations: list[Destination]
    values: dict[str, Leaf]
    per_rank: dict[str, Leaf]
    flat: FlatState

    @property
    def names(self) -> list[str]:
        """All names, tensors first."""
        return [*(d.tensor.name for d in self.destinations), *self.values, *self.per_rank]

    @cached_property
    def held(self) -> Holdings:
        """The tensors in columns."""
        return describe([destination.tensor for destination in self.destinations])

    @cached_property
    def targets(self) -> list[Target]:
        """The boxes of all tensors; the place of each is its key."""
        return [target for destination in self.destinations for target in destination.targets]


class Filling:
    """Fills a net with what is read: where it is, or by way of `Target.put`.

    Args:
        wanted: What the net wants.
        stored: (targets,) the code of the dtype in which each target is stored; 0 for none.

    Attributes:
        places: Which targets' bytes may be put where they belong as they are in the file.
        touched: (targets,) whether any byte of each may have changed.
    """

    def __init__(self, wanted: Wanted, stored: np.ndarray) -> None:
        self._targets = wanted.targets
        self._stored = stored
        self.touched = np.zeros(len(stored), bool)
        _, start, stop = wanted.held.boxes()
        codes = stored.tolist()
        # Where each target's bytes go as they are: its array, and the first byte there.
        self._arrays: dict[int, np.ndarray] = {}
        first = np.full(len(codes), -1)
        for key, (target, code) in enumerate(zip(self._targets, codes, strict=True)):
            array = target.destination.tensor.array
            if code == target.destination.tensor.dtype.code and target.destination.is_filled:
                self._arrays[key] = array  # type: ignore[assignment]
                first[key] = target.first * array.dtype.itemsize
        # What Python can hand out as it is.
        self._length = np.full(len(codes), -1)
        known = [key for key, array in self._arrays.items() if array.dtype.isbuiltin == 1]
        self._length[known] = [self._arrays[key].nbytes for key in known]
        self.places: Places | None = Places(start, stop, first)

    def dtype(self, key: int) -> np.dtype:
        """See `Landing`."""
        return dtypes.BY_CODE[int(self._stored[key])].numpy

    def memories(self, key: np.ndarray, start: np.ndarray, stop: np.ndarray) -> list[memoryview]:
        """See `Landing`."""
        self.touched[key] = True
        arrays = self._arrays
        is_whole = (start == 0) & (stop == self._length[key])
        return [
            arrays[number].data if whole else _bytes(arrays[number], first, last)
            for number, first, last, whole in zip(
                key.tolist(), start.tolist(), stop.tolist(), is_whole.tolist(), strict=True
            )
        ]

    def put(self, key: int, start: tuple[int, ...], values: np.ndarray) -> None:
        """See `Landing`."""
        self.touched[key] = True
        target = self._targets[key]
        pad = len(start) - len(target.region.start)
        shape = values.shape[pad:]
        stop = tuple(a + n for a, n in zip(start[pad:], shape, strict=True))
        target.put(Region(start[pad:], stop), values.reshape(shape))


def _bytes(array: np.ndarray, start_byte: int, stop_byte: int) -> memoryview:
    return array.reshape(-1).view(np.uint8)[start_byte:stop_byte].data


def collect(net: object) -> Wanted:
    """Take a net apart.

    Raises:
        LayoutError: A leaf that nothing can be loaded into.
    """
    flat = flatten(net)
    destinations = [Destination(tensor) for tensor in flat.tensors]
    for destination in destinations:
        destination.targets = _targets(destination)
    return Wanted(destinations, flat.values, flat.per_rank, flat)


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
