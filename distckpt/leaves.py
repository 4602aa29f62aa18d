"""The leaves of a nested state, and tensors among them: one by one, or in columns."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import repeat
from typing import Any, NamedTuple, overload

import numpy as np

from distckpt import dtypes
from distckpt.frameworks import jax, torch
from distckpt.region import Region
from distckpt.state import MAX_DIMENSIONS, Array, FlatShard, Net, Shard


class Leaf(NamedTuple):  # thousands are made at each save: a tuple is made fastest
    """One leaf of a nested state.

    Attributes:
        name: Its dotted name.
        value: The leaf as it stands.
        replace: Puts another value in its place; where the container is immutable, in the tree that
            `FlatState.rebuilt` makes.
        net: The Net that it belongs to, if any.
    """

    name: str
    value: object
    replace: Callable[[object], None]
    net: Net | None = None

    @property
    def filled(self) -> bool:
        """Whether memory that it shares with numpy is filled, and not replaced."""
        piece = self.value.array if isinstance(self.value, (Shard, FlatShard)) else self.value
        shares = isinstance(piece, np.ndarray) or (torch.is_tensor(piece) and torch.in_place(piece))
        return shares and (self.net is None or getattr(self.net, "shares_memory", False))

    def take(self, array: np.ndarray) -> None:
        """Put a new array in place: as what was there before, on the same device."""
        old = self.value
        if isinstance(old, Shard):
            self.replace(Shard(self._like(old.array, array), old.offset, old.global_shape))
        elif isinstance(old, FlatShard):
            self.replace(
                FlatShard(self._like(old.array, array), old.start, old.global_shape, old.region)
            )
        else:
            self.replace(self._like(old, array))

    def _like(self, old: object, array: np.ndarray) -> Any:  # noqa: ANN401  any framework's
        if isinstance(old, np.generic):
            return array[()]
        if self.net is not None:
            return array
        if torch.is_tensor(old):
            torch.put(old, array)
            return old
        return jax.like(old, array) if jax.is_array(old) else array


class TensorLeaf(NamedTuple):
    """A tensor, or this rank's piece of one.

    Attributes:
        leaf: Where it comes from.
        array: The piece's memory, the caller's own; or what it is read from.
        dtype: Its type.
        shape: The whole tensor's shape.
        region: The piece, or None for a run.
        start: First element of a run, else None.
        parent: The box in whose C order the run lies; None for the whole tensor, and where it is no
            run.
    """

    leaf: Leaf
    array: Array
    dtype: dtypes.Dtype
    shape: tuple[int, ...]
    region: Region | None
    start: int | None
    parent: Region | None = None

    @property
    def name(self) -> str:
        """The leaf's name."""
        return self.leaf.name


_NEW: Callable[..., Any] = tuple.__new__
_IN_ORDER = operator.attrgetter("flags.carray")


@dataclass(frozen=True, slots=True)
class LeafModel:
    """What tensors are like but for what they hold: in columns, as `TensorLeaf` has them.

    Attributes:
        names: Their names.
        dtype: Their types.
        shape: The whole tensors' shapes.
        region: The pieces, or None for runs.
        start: First elements of runs, else None.
        parent: The boxes in whose C order runs lie.
        native: Whether each array has the dtype that a file has.
    """

    names: Sequence[str]
    dtype: Sequence[dtypes.Dtype]
    shape: Sequence[tuple[int, ...]]
    region: Sequence[Region | None]
    start: Sequence[int | None]
    parent: Sequence[Region | None]
    native: Sequence[bool]

    @classmethod
    def of(cls, tensors: Sequence[TensorLeaf]) -> LeafModel:
        """Return some tensors'."""
        if isinstance(tensors, LaterLeaves):
            return tensors.model
        if not tensors:
            return cls(*[()] * 7)
        leaf, array, dtype, shape, region, start, parent = zip(*tensors, strict=True)
        native = [one.dtype == found.numpy for one, found in zip(array, dtype, strict=True)]
        return cls([one.name for one in leaf], dtype, shape, region, start, parent, native)

    @classmethod
    def of_arrays(cls, names: Sequence[str], arrays: Sequence[np.ndarray]) -> LeafModel | None:
        """Return that of whole tensors; None where `flatten` has to look at one."""
        kinds, shapes = [array.dtype for array in arrays], [array.shape for array in arrays]
        known = {kind: found for kind in set(kinds) if (found := dtypes.find(kind)) is not None}
        if (
            len(known) < len(set(kinds))
            or not all(map(math.prod, shapes))
            or max(map(len, shapes), default=0) > MAX_DIMENSIONS
        ):
            return None
        native = {kind: kind == found.numpy for kind, found in known.items()}
        none = [None] * len(arrays)
        return cls(
            names,
            [known[kind] for kind in kinds],
            shapes,
            list(map(whole_region, shapes)),
            none,
            none,
            [native[kind] for kind in kinds],
        )


class LaterLeaves(Sequence[TensorLeaf]):
    """The tensors of a state, made when asked for: mostly nobody does.

    Args:
        model: What they are like.
        pieces: What lies in the state.
        arrays: The memory of each.
        replace: Puts another in the place of each.

    Attributes:
        model: See above.
        arrays: See above.
    """

    def __init__(
        self,
        model: LeafModel,
        pieces: list[Any],
        arrays: list[Any],
        replace: list[Callable[[object], None]],
    ) -> None:
        self.model = model
        self.arrays: list[Any] = arrays
        self._pieces, self._replace = pieces, replace

    def __len__(self) -> int:
        return len(self.arrays)

    @overload
    def __getitem__(self, index: int) -> TensorLeaf: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[TensorLeaf]: ...
    def __getitem__(self, index: int | slice) -> TensorLeaf | Sequence[TensorLeaf]:
        return self._made[index]

    def __iter__(self) -> Iterator[TensorLeaf]:
        return iter(self._made)

    def takes_bytes(self) -> list[bool]:
        """See `FlatState.takes_bytes`: these are numpy's arrays, and in no net."""
        in_order = list(map(_IN_ORDER, self.arrays))
        if all(self.model.native):
            return in_order
        return [a and b for a, b in zip(in_order, self.model.native, strict=True)]

    @cached_property
    def _made(self) -> list[TensorLeaf]:
        # As `Leaf(…)` and `TensorLeaf(…)`, without a call of Python's own for each.
        model = self.model
        columns = zip(model.names, self._pieces, self._replace, repeat(None), strict=False)
        leaves = map(_NEW, repeat(Leaf), columns)
        rest = model.dtype, model.shape, model.region, model.start, model.parent
        made = zip(leaves, self.arrays, *rest, strict=True)
        return list(map(_NEW, repeat(TensorLeaf), made))


@lru_cache(1024)
def whole_region(shape: tuple[int, ...]) -> Region:
    """Return the region of a whole tensor; the same object for the same shape."""
    return Region.whole(shape)
