"""JAX's door: its arrays as numpy, new ones like old ones, and what a pytree is made of.

JAX is never imported here: who passes one of its objects has imported it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np


def is_array(value: object) -> bool:
    """Whether it is a JAX array, also one of random keys."""
    jax: Any = sys.modules.get("jax")
    return jax is not None and isinstance(value, jax.Array)


def as_array(value: object) -> np.ndarray:
    """View a JAX array as numpy, read-only; keys of random generators as their data (uint32).

    Raises:
        TypeError: Other processes hold parts of it, or it was donated to a computation.
    """
    array: Any = value
    # is_deleted() before all else: the other questions raise of a deleted array what JAX pleases.
    if getattr(array, "is_deleted", bool)():
        raise TypeError("this jax.Array was deleted, or donated to a computation; save its result")
    if not (array.is_fully_addressable or array.is_fully_replicated):
        raise TypeError(
            f"a jax.Array of shape {array.shape} that other processes hold parts of "
            f"({array.sharding}): pass this process's piece as distckpt.Shard(piece.data, offset, "
            "array.shape), with piece of array.addressable_shards and the starts of piece.index as "
            "offset; or gather it first (jax.experimental.multihost_utils.process_allgather)"
        )
    if _is_key(array):
        array = sys.modules["jax"].random.key_data(array)
    return np.asarray(array)


def like(old: object, array: np.ndarray) -> object:
    """Make a JAX array that stands where another one stood.

    Args:
        old: Gives the dtype, the devices and sharding, and the kind of random keys.
        array: What it holds, as `as_array` gives it. Handed over: it may not change afterwards,
            because an array on the CPU can share its memory.

    Returns:
        The new array, bound to its devices only if the old one was.
    """
    jax: Any = sys.modules["jax"]
    model: Any = old
    # An array that JAX was free to place stays free: one bound to a device can't be used together
    # with others that are bound elsewhere.
    sharding = model.sharding if getattr(model, "committed", True) else None
    if _is_key(model):
        data = jax.device_put(np.asarray(array, np.uint32))
        keys = jax.random.wrap_key_data(data, impl=jax.random.key_impl(model))
        return keys if sharding is None else jax.device_put(keys, sharding)
    return jax.device_put(np.asarray(array, model.dtype), sharding)


def _is_key(array: Any) -> bool:
    jax: Any = sys.modules["jax"]
    return bool(jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key))


# --- pytrees --------------------------------------------------------------------------------------


def is_node(value: object) -> bool:
    """Whether it is a pytree's node of a class of its own, which must be rebuilt to change.

    Such are FrozenDict, flax.struct dataclasses (a TrainState), Equinox modules, and what a user
    registers. Dicts, lists, tuples and dataclasses that can be assigned to are none, and no nnx
    object is (see `is_module`).
    """
    jax: Any = sys.modules.get("jax")
    if jax is None or isinstance(value, (dict, list, tuple, type, np.ndarray, type(None))):
        return False
    if dataclasses.is_dataclass(value) and not _is_frozen(value):
        return False
    if is_array(value) or is_module(value):
        return False
    return [path for path, _ in _one_level(value)] != [()]  # a leaf is its own only leaf


def children(value: object) -> list[tuple[str, object]]:
    """List a node's children, one level deep, by the names that JAX gives them."""
    if _is_frozen_dict(value):
        # Not those that JAX sees: plain dicts, and changing one would change the FrozenDict.
        return [(str(key), child) for key, child in cast("Mapping[object, object]", value).items()]
    keystr = sys.modules["jax"].tree_util.keystr
    return [(keystr(path, simple=True, separator="."), child) for path, child in _one_level(value)]


def rebuild(value: object, new: Sequence[object]) -> object:
    """Make a node like another one with other children, in the order of `children`."""
    if _is_frozen_dict(value):
        kind: Any = type(value)
        made: object = kind(dict(zip(cast("Mapping[object, object]", value), new, strict=True)))
        return made
    tree: Any = sys.modules["jax"].tree_util
    structure = tree.tree_structure(value, is_leaf=lambda found: found is not value)
    rebuilt: object = tree.tree_unflatten(structure, list(new))
    return rebuilt


def _one_level(value: object) -> list[tuple[tuple[object, ...], object]]:
    tree: Any = sys.modules["jax"].tree_util
    found: list[tuple[tuple[object, ...], object]] = tree.tree_flatten_with_path(
        value, is_leaf=lambda inner: inner is not value
    )[0]
    return found


def _is_frozen_dict(value: object) -> bool:
    core: Any = sys.modules.get("flax.core")
    return core is not None and isinstance(value, core.FrozenDict)


def _is_frozen(value: object) -> bool:
    parameters: Any = getattr(type(value), "__dataclass_params__", None)
    return bool(parameters is not None and parameters.frozen)


# --- flax.nnx -------------------------------------------------------------------------------------


def is_module(value: object) -> bool:
    """Whether it is an object of flax.nnx: a module, an optimizer, random streams, or a State."""
    nnx: Any = sys.modules.get("flax.nnx")
    if nnx is None or isinstance(value, type):
        return False
    # Before flax 0.12 the common base of modules and optimizers had another name.
    base = getattr(nnx, "Pytree", None) or nnx.Object
    return isinstance(value, (base, nnx.State))


def as_net(value: object) -> NnxNet:
    """Present an nnx object by the protocol of a Net."""
    return NnxNet(value)


class NnxNet:
    """The variables of an nnx object, by their dotted paths; assigned to in place.

    Args:
        value: A module, an optimizer, random streams, or a State.
    """

    def __init__(self, value: object) -> None:
        nnx: Any = sys.modules["flax.nnx"]
        state = value if isinstance(value, nnx.State) else nnx.state(value)
        # A State shares its variables with the module that it was taken of.
        self._variables: dict[str, Any] = {
            ".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)
        }

    def tensors(self) -> Mapping[str, object]:
        """Name → the variable's value."""
        return {name: _value(variable) for name, variable in self._variables.items()}

    def assign(self, name: str, value: object) -> None:
        """Put a new value in place: a numpy array becomes what stood there."""
        variable = self._variables[name]
        old = _value(variable)
        if is_array(old) and isinstance(value, (np.ndarray, np.generic)):
            value = like(old, np.asarray(value))
        if hasattr(variable, "set_value"):
            variable.set_value(value)
        else:
            variable.value = value


def _value(variable: Any) -> object:
    value: object = variable.get_value() if hasattr(variable, "get_value") else variable.value
    return value
