"""What a user hands in: shards, and the leaves of a nested state under dotted names."""

from __future__ import annotations

import copy
import dataclasses
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from itertools import repeat
from typing import Any, NamedTuple, Protocol, overload, runtime_checkable

import numpy as np

from distckpt import dtypes
from distckpt.errors import LayoutError
from distckpt.frameworks import jax, mindspore, torch
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
            list(map(_whole, shapes)),
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
                tensors.append(TensorLeaf(leaf, value, known, shape, _whole(shape), None))
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
    return TensorLeaf(leaf, array, dtype, array.shape, Region.whole(array.shape), None)


@lru_cache(1024)
def _whole(shape: tuple[int, ...]) -> Region:
    return Region.whole(shape)


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


def _ints(values: Sequence[int]) -> tuple[int, ...]:
    try:
        return tuple(operator.index(value) for value in values)
    except TypeError as exc:
        raise LayoutError(f"{tuple(values)}: offsets and extents are whole numbers") from exc
