"""Taking states apart fast: nested dicts of arrays, and what is like a state before."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from distckpt.errors import LayoutError
from distckpt.flat import FlatState, are_good_names, is_registered
from distckpt.leaves import LaterLeaves, Leaf, LeafModel
from distckpt.state import FlatShard, Shard

_WRITEABLE = operator.attrgetter("flags.writeable")
_PIECES = frozenset({np.ndarray, Shard, FlatShard})
_DEEPEST = 64
_IMMUTABLE = frozenset({int, float, bool, str, bytes, type(None)})
_SIMPLE = _IMMUTABLE | {np.ndarray}


class Flattened:
    """What a state is like, to take the next one apart that is like it.

    A training loop saves the same again and again, in dicts: then nothing needs to be looked at but
    whether keys, shapes, dtypes and places are the same. No array is kept.

    Attributes:
        tensors: How many tensors it has.
    """

    def __init__(self, flat: FlatState) -> None:
        self.tensors = len(flat.tensors)
        walked = None if flat.per_rank else _walk_dicts(flat.state)
        self._like: list[object] | None = None
        if walked is None or len(walked.leaves) != len(flat.tensors) + len(flat.values):
            return
        leaves = walked.leaves
        self._kinds = list(map(type, leaves))
        self._pieces = [i for i, kind in enumerate(self._kinds) if kind not in _IMMUTABLE]
        # Mostly all are, and there may be thousands.
        self._are_bare = {self._kinds[index] for index in self._pieces} <= {np.ndarray}
        pieces, arrays = self._arrays(leaves)
        if {type(piece) for piece in pieces} <= _PIECES and {type(a) for a in arrays} <= {
            np.ndarray
        }:
            self._like = [walked.keys, self._kinds, self._seen(pieces, arrays)]
            self._values = dict(zip(self._others(), flat.values, strict=True))
            self._like_of = LeafModel.of(flat.tensors)

    def again(self, state: object, *, replaces: bool = False) -> FlatState | None:
        """Take the next state apart.

        Args:
            state: The state.
            replaces: Whether leaves may be replaced; that takes a little longer.

        Returns:
            It, or None if it isn't the like.
        """
        walked = _walk_dicts(state) if self._like is not None else None
        if walked is None or [walked.keys, list(map(type, walked.leaves))] != self._like[:2]:  # type: ignore[index]
            return None
        pieces, arrays = self._arrays(walked.leaves)
        if not self._are_bare and set(map(type, arrays)) - {np.ndarray}:
            return None
        if self._seen(pieces, arrays) != self._like[2]:  # type: ignore[index]
            return None
        setters = walked.setters(arrays, replaces=replaces)
        replace = [setters[index] for index in self._pieces]
        leaves = LaterLeaves(self._like_of, pieces, arrays, replace)
        return FlatState(leaves, walked.values(self._values, setters), {}, state)

    def _others(self) -> list[int]:
        return [i for i, kind in enumerate(self._kinds) if kind in _IMMUTABLE]

    def _arrays(self, leaves: list[object]) -> tuple[list[Any], list[Any]]:
        pieces: list[Any] = leaves
        if len(self._pieces) < len(leaves):
            pieces = [leaves[index] for index in self._pieces]
        if self._are_bare:
            return pieces, pieces
        return pieces, [
            piece.array if type(piece) is Shard or type(piece) is FlatShard else piece
            for piece in pieces
        ]

    def _seen(self, pieces: Sequence[Any], arrays: Sequence[Any]) -> list[object]:
        """List what a plan depends on of each piece."""
        found: list[object] = [[array.shape for array in arrays], [array.dtype for array in arrays]]
        if self._are_bare:
            return found
        shards = [piece for piece in pieces if type(piece) is Shard]
        runs = [piece for piece in pieces if type(piece) is FlatShard]
        return [
            *found,
            [shard.offset for shard in shards],
            [shard.global_shape for shard in shards],
            [(run.start, run.global_shape, run.region) for run in runs],
        ]


def flatten_dicts(state: object, *, replaces: bool = False) -> FlatState | None:
    """Take nested dicts of numpy's arrays and plain values apart, thousands at once.

    Args:
        state: The state.
        replaces: Whether leaves may be replaced; that takes a little longer.

    Returns:
        What `flatten` does. None for any other state, and one with a fault: then it names that.
    """
    walked = _walk_dicts(state)
    if walked is None:
        return None
    kinds = list(map(type, walked.leaves))
    if not set(kinds) <= _SIMPLE:
        return None
    names = walked.names()
    at = [index for index, kind in enumerate(kinds) if kind is np.ndarray]
    arrays: list[Any] = [walked.leaves[index] for index in at]
    model = LeafModel.of_arrays([names[index] for index in at], arrays)
    others = {index: names[index] for index, kind in enumerate(kinds) if kind in _IMMUTABLE}
    if model is None or not are_good_names(names):
        return None
    setters = walked.setters(arrays, replaces=replaces)
    leaves = LaterLeaves(model, arrays, arrays, [setters[index] for index in at])
    return FlatState(leaves, walked.values(others, setters), {}, state)


def _unreplaceable(value: object) -> None:
    raise LayoutError(f"a state that is saved takes no new value ({type(value).__qualname__})")


@dataclass(frozen=True, slots=True)
class _Walked:
    """Nested dicts, in the order in which they are flattened.

    Attributes:
        dicts: All of them.
        keys: Of each, its keys.
        leaves: What lies in them and is no dict.
    """

    dicts: list[dict[object, object]]
    keys: list[tuple[object, ...]]
    leaves: list[object]

    def names(self) -> list[str]:
        """Return each leaf's name."""
        return [f"{prefix}{key}" for prefix, _, key in self._places()]

    def setters(
        self, arrays: Sequence[np.ndarray], *, replaces: bool
    ) -> Sequence[Callable[[object], None]]:
        """Return for each leaf what puts another in its place.

        Args:
            arrays: Those of the leaves: what is filled where it is is not replaced.
            replaces: Whether any leaf is.
        """
        if not replaces or (len(arrays) == len(self.leaves) and all(map(_WRITEABLE, arrays))):
            return [_unreplaceable] * len(self.leaves)
        return [partial(operator.setitem, node, key) for _, node, key in self._places()]

    def values(
        self, names: Mapping[int, str], setters: Sequence[Callable[[object], None]]
    ) -> dict[str, Leaf]:
        """Return the leaves of some names, by the numbers of the leaves."""
        return {
            name: Leaf(name, self.leaves[index], setters[index]) for index, name in names.items()
        }

    def _places(self) -> Iterator[tuple[str, dict[object, object], object]]:
        """Yield where the leaves are: what their names begin with, the dict and the key."""
        inner = iter(self.dicts)
        todo = [("", next(inner), iter(self.keys[0]))]
        while todo:
            prefix, node, keys = todo[-1]
            for key in keys:
                if type(node[key]) is dict:
                    below = next(inner)
                    todo.append((f"{prefix}{key}.", below, iter(below)))
                    break
                yield prefix, node, key
            else:
                todo.pop()


def _walk_dicts(state: object) -> _Walked | None:
    """List the keys and the leaves of nested dicts; None where it is something else."""
    if type(state) is not dict or is_registered(dict):
        return None
    found = _Walked([], [], [])
    todo: list[Iterator[object]] = []
    node: dict[object, object] = state
    while True:
        found.dicts.append(node)
        found.keys.append(tuple(node))
        if dict in set(map(type, node.values())):
            todo.append(iter(node.values()))
        else:
            found.leaves.extend(node.values())
        while todo:
            for value in todo[-1]:
                if type(value) is dict:
                    node = value
                    break
                found.leaves.append(value)
            else:
                todo.pop()
                continue
            break
        else:
            return found
        if len(todo) > _DEEPEST:
            return None
