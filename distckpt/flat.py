"""A nested state, taken apart into leaves under dotted names."""

from __future__ import annotations

import copy
import dataclasses
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from distckpt import dtypes
from distckpt.errors import LayoutError
from distckpt.frameworks import jax, mindspore, torch
from distckpt.leaves import LaterLeaves, Leaf, TensorLeaf, whole_region
from distckpt.state import (
    MAX_DIMENSIONS,
    MAX_NAME_BYTES,
    MAX_TENSOR_BYTES,
    PLAIN,
    Array,
    FlatShard,
    LazyArray,
    Net,
    PerRank,
    Shard,
)

Adapt = Callable[[Any], Net | Mapping[str, object]]
_adapters: list[tuple[type, Adapt]] = []


def register_net(cls: type, adapt: Adapt) -> None:
    """Say how objects of a class are saved and loaded into. Not collective.

    Args:
        cls: The class; objects of derived classes are meant, too. What is registered later counts
            before what is registered earlier, and before what distckpt knows by itself (nested
            containers, torch modules, MindSpore cells, JAX pytrees and flax.nnx modules).
        adapt: Object → a `Net`; or a mapping of names to arrays that share the object's memory, or
            to further nested state.

    Examples:
        >>> class Table:
        ...     def __init__(self):
        ...         self.rows = np.zeros(3)
        >>> register_net(Table, lambda table: {"rows": table.rows})
        >>> [leaf.name for leaf in flatten({"table": Table()}).tensors]
        ['table.rows']
    """
    _adapters.insert(0, (cls, adapt))


def is_registered(cls: type) -> bool:
    """Whether `register_net` was told how objects of a class are saved."""
    return any(issubclass(cls, known) for known, _ in _adapters)


@dataclass(frozen=True, slots=True)
class FlatState:
    """A nested state, taken apart by kind; each in the order of the state.

    Attributes:
        tensors: The tensors.
        values: Plain values by name.
        per_rank: Per-rank values by name.
        state: What was taken apart.
        changes: Name → new value of the leaves that were replaced in immutable containers.
    """

    tensors: Sequence[TensorLeaf]
    values: dict[str, Leaf]
    per_rank: dict[str, Leaf]
    state: object = None
    changes: dict[str, object] = field(default_factory=dict)

    @property
    def arrays(self) -> Sequence[Array]:
        """The tensors' arrays."""
        if isinstance(self.tensors, LaterLeaves):
            return self.tensors.arrays
        return [tensor.array for tensor in self.tensors]

    def takes_bytes(self) -> list[bool]:
        """Say of each tensor whether its memory takes bytes as they are in a file.

        It does in C order, little-endian.
        """
        if isinstance(self.tensors, LaterLeaves):
            return self.tensors.takes_bytes()
        return [
            isinstance(array, np.ndarray)
            and array.flags.carray
            and array.dtype == dtype.numpy
            and leaf.filled
            for leaf, array, dtype, *_ in self.tensors
        ]

    def rebuilt(self) -> object:
        """Return the state, made anew where immutable containers hold replaced leaves."""
        return _rebuild(self.state, "", self.changes) if self.changes else self.state


def flatten(state: object) -> FlatState:
    """Take a nested state apart.

    Args:
        state: Nested dicts, lists, tuples, dataclasses and JAX pytrees; a `Net`, a torch module, a
            MindSpore cell or what `register_net` knows, at any depth; or a list of
            ``{"name", "data"}`` dicts. Names of nested leaves are joined with ``.``.

    Raises:
        LayoutError: Everything that can't be stored, at once: unknown types and dtypes, two leaves
            of one name.

    Returns:
        The leaves by kind. Arrays share their memory with the state's.
    """
    tensors: list[TensorLeaf] = []
    flat = FlatState(tensors, {}, {}, state)
    problems: list[str] = []
    leaves = list(_walk(state, problems, flat.changes))
    leaves = _well_named(leaves, problems)
    for leaf in leaves:
        value = leaf.value
        if type(value) is np.ndarray and value.size:
            # Most are, and there may be thousands: what can be wrong with others isn't looked at.
            known = dtypes.find(value.dtype)
            if known is not None and value.ndim <= MAX_DIMENSIONS:
                shape = value.shape
                tensors.append(TensorLeaf(leaf, value, known, shape, whole_region(shape), None))
                continue
        if isinstance(value, PerRank):
            flat.per_rank[leaf.name] = leaf
        elif isinstance(value, PLAIN) and not isinstance(value, np.generic):
            flat.values[leaf.name] = leaf
        else:
            found = _tensor(leaf)
            if isinstance(found, str):
                problems.append(f"{leaf.name!r}: {found}")
            else:
                tensors.append(found)
    if problems:
        raise LayoutError(
            f"{len(problems)} leaves of the state can't be stored:\n  " + "\n  ".join(problems)
        )
    return flat


def _well_named(leaves: list[Leaf], problems: list[str]) -> list[Leaf]:
    """Keep the leaves that have a name of their own that can be stored."""
    if are_good_names([leaf.name for leaf in leaves]):
        return leaves
    kept: dict[str, Leaf] = {}
    for leaf in leaves:
        problem = _name_problem(leaf.name)
        if leaf.name in kept:
            problem = f"{leaf.name!r}: two leaves of the state have this name; rename one"
        if problem:
            problems.append(problem)
        else:
            kept[leaf.name] = leaf
    return list(kept.values())


def are_good_names(names: Sequence[str]) -> bool:
    """Whether all are different and can be stored; not all that are so are found to be."""
    known = set(names)
    together = "".join(known)
    return (
        len(known) == len(names)
        and together.isascii()
        and "\0" not in together
        and max(map(len, names), default=0) <= MAX_NAME_BYTES
    )


def _name_problem(name: str) -> str | None:
    if "\0" in name:
        return f"{name!r}: a name can't hold a NUL character"
    try:
        length = len(name.encode())
    except UnicodeEncodeError as exc:
        return f"{name!r}: not valid Unicode ({exc.reason})"
    if length > MAX_NAME_BYTES:
        return f"{name[:40]!r}…: a name of {length} bytes; a name has at most {MAX_NAME_BYTES}"
    return None


def _walk(state: object, problems: list[str], changes: dict[str, object]) -> Iterator[Leaf]:
    """Yield the leaves of a state, in its order.

    Not by recursion: each leaf would be handed on by the generators of all containers around it.
    """
    above = {id(state)}
    todo = [("", state, _children(state))]
    while todo:
        prefix, node, children = todo[-1]
        for key, value, replace, net in children:
            name = f"{prefix}.{key}" if len(todo) > 1 else key
            # Asked first what is true of most.
            if type(value) is np.ndarray or not _is_container(value):
                yield Leaf(name, value, replace or partial(changes.__setitem__, name), net)
            elif id(value) in above:
                problems.append(f"{name!r}: the state contains itself")
            else:
                above.add(id(value))
                todo.append((name, value, _children(value)))
                break
        else:
            todo.pop()
            above.discard(id(node))


def _rebuild(node: object, prefix: str, changes: Mapping[str, object]) -> object:
    """Make anew the immutable containers that hold changed leaves, and what holds those."""
    new: dict[str, object] = {}
    for key, value, replace, _ in _children(node):
        name = f"{prefix}.{key}" if prefix else key
        inner = _is_container(value)
        found = _rebuild(value, name, changes) if inner else changes.get(name, value)
        if found is value:
            continue
        if replace is not None:
            replace(found)
        else:
            new[key] = found
    return _with(node, new) if new else node


def _with(node: object, new: Mapping[str, object]) -> object:
    """Copy an immutable container with other children."""
    if not _is_container(node):
        return new[""]
    if jax.is_node(node):
        return jax.rebuild(node, [new.get(key, child) for key, child in jax.children(node)])
    if isinstance(node, Mapping):
        return type(node)({key: new.get(str(key), value) for key, value in node.items()})  # type: ignore[call-arg]
    if isinstance(node, tuple):
        names = getattr(node, "_fields", None)
        if names is not None:
            return node._replace(**new)  # type: ignore[attr-defined]
        return type(node)(new.get(str(index), value) for index, value in enumerate(node))
    # Not dataclasses.replace: that runs __init__, which may want what the fields do not hold.
    made = copy.copy(node)
    for key, value in new.items():
        object.__setattr__(made, key, value)
    return made


def _is_container(value: object) -> bool:
    if isinstance(value, (np.ndarray, Shard, FlatShard, PerRank, LazyArray, type, *PLAIN)):
        return False
    return (
        isinstance(value, (Mapping, list, tuple))
        or dataclasses.is_dataclass(value)
        or _adapted(value) is not None
        or jax.is_node(value)
    )


# Seen at once to be no net: whether an object is a `Net`, Python looks for long.
_BARE = frozenset({dict, list, tuple})


def _adapted(value: object) -> Net | Mapping[str, object] | None:
    """See an object as a net, or as a mapping of what it holds; None if it is neither."""
    for cls, adapt in _adapters:
        if isinstance(value, cls):
            return adapt(value)
    if type(value) in _BARE or isinstance(value, (*PLAIN, np.ndarray, np.generic)):
        return None
    if isinstance(value, Net):
        return value
    if torch.is_module(value):
        return torch.as_net(value)
    if mindspore.is_module(value):
        return mindspore.as_net(value)
    return jax.as_net(value) if jax.is_module(value) else None


_Child = tuple[str, object, Callable[[object], None] | None, Net | None]


def _children(node: object) -> Iterator[_Child]:
    """Yield (name, value, how to replace it, the Net that it is of), not going deeper."""
    adapted = _adapted(node)
    if adapted is not None and isinstance(adapted, Net):
        net = adapted
        return (
            (name, value, partial(net.assign, name), net) for name, value in net.tensors().items()
        )
    if adapted is not None:
        return _children(adapted)
    if jax.is_node(node):  # also where it is a mapping or a dataclass, too
        return ((key, value, None, None) for key, value in jax.children(node))
    if _is_container(node):
        return _plain_children(node)
    return iter([("", node, None, None)])


def _plain_children(node: object) -> Iterator[_Child]:
    """Yield the same for what Python itself has."""
    if isinstance(node, Mapping):
        writable = hasattr(node, "__setitem__")
        for key, value in node.items():
            yield str(key), value, (_setter(node, key) if writable else None), None
    elif isinstance(node, list) and node and all(_is_named(item) for item in node):
        for item in node:
            yield item["name"], item["data"], _setter(item, "data"), None
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield str(index), value, _setter(node, index), None
    elif isinstance(node, tuple):
        names = getattr(node, "_fields", None) or map(str, range(len(node)))
        for key, value in zip(names, node, strict=True):
            yield key, value, None, None
    else:
        frozen = type(node).__dataclass_params__.frozen  # type: ignore[attr-defined]
        for entry in dataclasses.fields(node):  # type: ignore[arg-type]
            value = getattr(node, entry.name)
            yield entry.name, value, (None if frozen else _attribute(node, entry.name)), None


def _is_named(item: object) -> bool:
    return isinstance(item, Mapping) and "data" in item and isinstance(item.get("name"), str)


def _setter(container: Any, key: object) -> Callable[[object], None]:  # noqa: ANN401  a mapping
    return partial(operator.setitem, container, key)


def _attribute(owner: object, name: str) -> Callable[[object], None]:
    def replace(value: object) -> None:
        setattr(owner, name, value)

    return replace


def _tensor(leaf: Leaf) -> TensorLeaf | str:
    """Make a TensorLeaf, or say why it can't be one."""
    value = leaf.value
    piece = value.array if isinstance(value, (Shard, FlatShard)) else value
    array = as_array(piece)
    if isinstance(array, str):
        return array
    dtype = dtypes.find(array.dtype)
    if dtype is None:
        return (
            f"dtype {array.dtype} can't be stored; supported are "
            f"{', '.join(entry.name for entry in dtypes.TABLE)}"
        )
    shape = value.global_shape if isinstance(value, Shard | FlatShard) else array.shape
    if len(shape) > MAX_DIMENSIONS:
        return f"{len(shape)} dimensions; a tensor has at most {MAX_DIMENSIONS}"
    if math.prod([extent or 1 for extent in shape]) * dtype.itemsize > MAX_TENSOR_BYTES:
        return f"a shape of {tuple(shape)}; a tensor has at most {MAX_TENSOR_BYTES} bytes"
    if isinstance(value, Shard):
        return TensorLeaf(leaf, array, dtype, value.global_shape, value.region, None)
    if isinstance(value, FlatShard):
        return TensorLeaf(leaf, array, dtype, value.global_shape, None, value.start, value.region)
    return TensorLeaf(leaf, array, dtype, array.shape, whole_region(array.shape), None)


def as_array(value: object) -> Array | str:
    """View an array-like as numpy, sharing its memory where it can; a text if it isn't one."""
    if isinstance(value, LazyArray):
        return value
    if isinstance(value, np.ma.MaskedArray):
        return "a masked array; save its .data and .mask as two tensors"
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)  # a matrix, say, becomes a plain array of the same memory
    try:
        if torch.is_tensor(value):
            return torch.as_array(value)
        if jax.is_array(value):
            return jax.as_array(value)
        if mindspore.is_tensor(value):
            return mindspore.as_array(value)
        source = value.detach() if hasattr(value, "detach") else value
        if hasattr(source, "__array__"):
            return np.asarray(source)
        if hasattr(source, "__dlpack__"):
            return np.from_dlpack(source)
    except (TypeError, RuntimeError, BufferError, ValueError) as exc:
        return f"{_type_name(value)} does not convert to numpy: {exc}"
    return (
        f"{_type_name(value)} can't be stored; a leaf is an array, a Shard, FlatShard or PerRank, "
        "or an int, float, bool, str, bytes or None"
    )


def _type_name(value: object) -> str:
    kind = type(value)
    return (
        kind.__qualname__
        if kind.__module__ == "builtins"
        else f"{kind.__module__}.{kind.__qualname__}"
    )
