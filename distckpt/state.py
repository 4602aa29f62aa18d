"""What a user hands in: shards, and the leaves of a nested state under dotted names."""

from __future__ import annotations

import dataclasses
import math
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Protocol, cast, runtime_checkable

import ml_dtypes
import numpy as np

from distckpt import dtypes
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
        stop = tuple(o + n for o, n in zip(self.offset, np.shape(self.array), strict=True))
        return Region(self.offset, stop)


@dataclass(frozen=True, slots=True, eq=False)
class FlatShard:
    """A run of a tensor's elements in C order (ZeRO, FSDP's flat buffers), held on this rank.

    Attributes:
        array: One-dimensional: elements ``start … start + len(array)`` of the flattened tensor. Not
            copied.
        start: Index of the first element in the flattened tensor.
        global_shape: Shape of the whole tensor.

    Raises:
        LayoutError: The array is not one-dimensional, or the run does not lie in the tensor.
    """

    array: np.ndarray
    start: int
    global_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", _ints((self.start,))[0])
        object.__setattr__(self, "global_shape", _ints(self.global_shape))
        shape = tuple(np.shape(self.array))
        if len(shape) != 1:
            raise LayoutError(
                f"a FlatShard holds a one-dimensional array, not one of shape {shape}"
            )
        outside = self.start < 0 or self.start + shape[0] > math.prod(self.global_shape)
        if outside or min(self.global_shape, default=0) < 0:
            raise LayoutError(
                f"a FlatShard of elements {self.start}:{self.start + shape[0]} ends outside its "
                f"tensor of shape {self.global_shape} ({math.prod(self.global_shape)} elements)"
            )

    @property
    def regions(self) -> list[Region]:
        """The boxes that the run is made of, at most 2·ndim−1."""
        return boxes_of_run(self.global_shape, self.start, self.start + len(self.array))


@dataclass(frozen=True, slots=True, eq=False)
class PerRank:
    """A value that differs by rank on purpose, such as a random generator's state.

    Each rank's is kept. Loaded on as many ranks, each gets its own back; on another number of them
    `per_rank=` decides.

    Attributes:
        value: An array, or nested dicts, lists and tuples of plain values and arrays.
    """

    value: object


@runtime_checkable
class Net(Protocol):
    """What an object must offer to be saved and loaded into, where it is no dict of arrays."""

    def tensors(self) -> Mapping[str, object]:
        """Name → array, Shard, FlatShard, PerRank or plain value."""

    def assign(self, name: str, value: object) -> None:
        """Put one in place, when all of it is read.

        Args:
            name: A name of `tensors`.
            value: A new value of the same kind, shape and dtype: an array for an array, a Shard
                with a new array for a Shard, and so on.
        """


@dataclass(frozen=True, slots=True)
class Leaf:
    """One leaf of a nested state.

    Attributes:
        name: Its dotted name.
        value: The leaf as it stands.
        replace: Puts another value in its place; None where the container is immutable.
        assigned: True for a Net's leaf, which is always put in place by `replace`, never filled.
    """

    name: str
    value: object
    replace: Callable[[object], None] | None
    assigned: bool = False


@dataclass(frozen=True, slots=True)
class TensorLeaf:
    """A tensor, or this rank's piece of one.

    Attributes:
        leaf: Where it comes from.
        array: The piece's memory, the caller's own.
        dtype: Its type.
        shape: The whole tensor's shape.
        region: The piece, or None for a run.
        start: First element of a run, else None.
    """

    leaf: Leaf
    array: np.ndarray
    dtype: dtypes.Dtype
    shape: tuple[int, ...]
    region: Region | None
    start: int | None

    @property
    def name(self) -> str:
        """The leaf's name."""
        return self.leaf.name


@dataclass(frozen=True, slots=True)
class FlatState:
    """A nested state, taken apart by kind; each in the order of the state."""

    tensors: list[TensorLeaf]
    values: dict[str, Leaf]
    per_rank: dict[str, Leaf]


def flatten(state: object) -> FlatState:
    """Take a nested state apart.

    Args:
        state: Nested dicts, lists, tuples and dataclasses, a `Net` at any depth, or a list of
            ``{"name", "data"}`` dicts. Names of nested leaves are joined with ``.``.

    Raises:
        LayoutError: Everything that can't be stored, at once: unknown types and dtypes, two leaves
            of one name.

    Returns:
        The leaves by kind. Arrays share their memory with the state's.
    """
    flat = FlatState([], {}, {})
    problems: list[str] = []
    seen: set[str] = set()
    for leaf in _walk(state, "", (), problems):
        name = leaf.name
        if name in seen:
            problems.append(f"{name!r}: two leaves of the state have this name; rename one")
            continue
        seen.add(name)
        problem = _name_problem(name)
        if problem:
            problems.append(problem)
        elif isinstance(leaf.value, PerRank):
            flat.per_rank[name] = leaf
        elif isinstance(leaf.value, PLAIN) and not isinstance(leaf.value, np.generic):
            flat.values[name] = leaf
        else:
            found = _tensor(leaf)
            if isinstance(found, str):
                problems.append(f"{name!r}: {found}")
            else:
                flat.tensors.append(found)
    if problems:
        raise LayoutError(
            f"{len(problems)} leaves of the state can't be stored:\n  " + "\n  ".join(problems)
        )
    return flat


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


def _walk(node: object, prefix: str, above: tuple[int, ...], problems: list[str]) -> Iterator[Leaf]:
    """Yield the leaves below *node*; *above* has the identities of the containers around it."""
    if id(node) in above:
        problems.append(f"{prefix!r}: the state contains itself")
        return
    inside = (*above, id(node))
    for key, value, replace, assigned in _children(node):
        name = f"{prefix}.{key}" if above else key
        if _is_container(value):
            yield from _walk(value, name, inside, problems)
        else:
            yield Leaf(name, value, replace, assigned)


def _is_container(value: object) -> bool:
    if isinstance(value, (np.ndarray, Shard, FlatShard, PerRank, type)):
        return False
    return (
        isinstance(value, (Mapping, list, tuple))
        or dataclasses.is_dataclass(value)
        or isinstance(value, Net)
    )


def _children(
    node: object,
) -> Iterator[tuple[str, object, Callable[[object], None] | None, bool]]:
    """Yield (name, value, how to replace it, whether a Net assigns it), not going deeper."""
    if not _is_container(node):
        yield "", node, None, False
    elif isinstance(node, Net):
        for name, value in node.tensors().items():
            yield name, value, partial(node.assign, name), True
    elif isinstance(node, Mapping):
        writable = hasattr(node, "__setitem__")
        for key, value in node.items():
            yield str(key), value, (_setter(node, key) if writable else None), False
    elif isinstance(node, list) and node and all(_is_named(item) for item in node):
        for item in node:
            yield item["name"], item["data"], _setter(item, "data"), False
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield str(index), value, _setter(node, index), False
    elif isinstance(node, tuple):
        names = getattr(node, "_fields", None) or map(str, range(len(node)))
        for key, value in zip(names, node, strict=True):
            yield key, value, None, False
    else:
        frozen = type(node).__dataclass_params__.frozen  # type: ignore[attr-defined]
        for field in dataclasses.fields(node):  # type: ignore[arg-type]
            value = getattr(node, field.name)
            yield field.name, value, (None if frozen else _attribute(node, field.name)), False


def _is_named(item: object) -> bool:
    return isinstance(item, Mapping) and "data" in item and isinstance(item.get("name"), str)


def _setter(container: object, key: object) -> Callable[[object], None]:
    def replace(value: object) -> None:
        container[key] = value  # type: ignore[index]

    return replace


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
    if math.prod(extent or 1 for extent in shape) * dtype.itemsize > MAX_TENSOR_BYTES:
        return f"a shape of {tuple(shape)}; a tensor has at most {MAX_TENSOR_BYTES} bytes"
    if isinstance(value, Shard):
        return TensorLeaf(leaf, array, dtype, value.global_shape, value.region, None)
    if isinstance(value, FlatShard):
        return TensorLeaf(leaf, array, dtype, value.global_shape, None, value.start)
    return TensorLeaf(leaf, array, dtype, array.shape, Region.whole(array.shape), None)


def as_array(value: object) -> np.ndarray | str:
    """View an array-like as numpy, sharing its memory where it can; a text if it isn't one."""
    if isinstance(value, np.ma.MaskedArray):
        return "a masked array; save its .data and .mask as two tensors"
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)  # a matrix, say, becomes a plain array of the same memory
    source = value.detach() if hasattr(value, "detach") else value
    try:
        if is_torch(source):
            return _torch_array(cast("_TorchTensor", source), sys.modules["torch"])
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


def is_torch(value: object) -> bool:
    """Whether it is a torch tensor, also of a derived class; imports no torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


class _TorchTensor(Protocol):
    dtype: object

    def view(self, dtype: object) -> np.typing.ArrayLike: ...


def _torch_array(tensor: _TorchTensor, torch: ModuleType) -> np.ndarray:
    """View a torch tensor as numpy, also of a dtype that torch's own conversion refuses."""
    name = str(tensor.dtype).removeprefix("torch.")
    entry = dtypes.BY_NAME.get(name)
    if entry is None or not hasattr(ml_dtypes, name):
        return np.asarray(cast("np.typing.ArrayLike", tensor))
    bits = {1: torch.uint8, 2: torch.int16}[entry.itemsize]
    return np.asarray(tensor.view(bits)).view(entry.numpy)


def _type_name(value: object) -> str:
    kind = type(value)
    return (
        kind.__qualname__
        if kind.__module__ == "builtins"
        else f"{kind.__module__}.{kind.__qualname__}"
    )


def _ints(values: Sequence[int]) -> tuple[int, ...]:
    try:
        return tuple(operator.index(value) for value in values)
    except TypeError as exc:
        raise LayoutError(f"{tuple(values)}: offsets and extents are whole numbers") from exc
