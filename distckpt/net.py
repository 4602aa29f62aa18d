"""What a net wants, and how what was read is put in place."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import EllipsisType

import numpy as np

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


@dataclass(frozen=True, slots=True)
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
