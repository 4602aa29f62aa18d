"""PyTorch's pickles without torch and without running them: what they say, as plain descriptions.

Only the names that torch's own files of weights use are known, and each stands for a function or a
class of this module. Any other name is refused, so no pickle can call anything.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from distckpt import dtypes
from distckpt.errors import CorruptCheckpoint, UnsupportedFormat
from distckpt.state import MAX_DIMENSIONS

# A pickle is held in memory; honest ones have some 300 bytes a tensor.
MAX_PICKLE_BYTES = 1 << 28
_MAX_DEPTH = 64
# What a pickle may make of each of its bytes, for it can say one thing a million times: items that
# are handed to functions, and letters of names (each of which repeats those of its containers).
_MOST_ITEMS = 4
_MOST_LETTERS = 64
_FREE_ITEMS = 1 << 16
_KEY_BITS = 64

STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
    "UntypedStorage": "",
    # Known, so that they can be refused by what they are.
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
}
_WITHOUT_NUMPY = ("qint8", "quint8", "qint32", "quint4x2", "quint2x4", "complex32")


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of bytes that tensors lie in.

    Attributes:
        key: Its name in the file.
        dtype: Name of its element type; empty for plain bytes.
        count: Number of elements.
    """

    key: str
    dtype: str
    count: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a storage; offset and strides count elements."""

    storage: Storage
    dtype: dtypes.Dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def span(self) -> tuple[int, int]:
        """First element and one past the last that it touches in the storage."""
        if 0 in self.shape:
            return 0, 0
        reach = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return self.offset, self.offset + reach + 1

    @property
    def contiguous(self) -> bool:
        """Whether its elements lie in C order without gaps."""
        expected = 1
        for extent, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if extent > 1 and step != expected:
                return False
            expected *= max(extent, 1)
        return True


@dataclass(frozen=True, slots=True)
class Refused:
    """A tensor that can't be had here, and what it is."""

    what: str


@dataclass(frozen=True, slots=True)
class Other:
    """Something that is neither a tensor nor a plain value, such as a set or a device."""

    what: str

    def __str__(self) -> str:
        return self.what


@dataclass(frozen=True, slots=True)
class Named:
    """A class that only stands as an argument: a storage's, a dtype, a tensor's class."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class _Dict(dict[Any, Any]):
    """An OrderedDict; the attributes that a state_dict's has are of no use here."""

    def __init__(self, pairs: Any = ()) -> None:
        super().__init__()
        for key, value in pairs.items() if isinstance(pairs, dict) else pairs:
            _set(self, key, value)

    def __setstate__(self, state: object) -> None:
        del state


class Fields:
    """An object of a class in `classes`, of which nothing but its attributes is known."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


def load(data: bytes, where: str, classes: Mapping[tuple[str, str], Any] | None = None) -> Any:
    """Read a pickle.

    Args:
        data: The pickle.
        where: For messages.
        classes: More names that it may use, and what they stand for: `Fields`, or functions that
            make nothing larger than their arguments.

    Returns:
        Nested dicts, lists and tuples of plain values, `Stored`, `Refused` and `Other`.

    Raises:
        UnsupportedFormat: It uses other names: it isn't made of weights only.
        CorruptCheckpoint: It's no pickle, or none that torch writes.
    """
    try:
        return _Unpickler(data, where, classes or {}).load()
    except (CorruptCheckpoint, UnsupportedFormat):
        raise
    except _BROKEN as exc:
        raise CorruptCheckpoint(
            f"{where}: expected a pickle as torch writes it, found {type(exc).__name__}: {exc}; "
            "write or copy the file again",
            path=where,
        ) from exc


_BROKEN = (
    pickle.UnpicklingError,
    struct.error,
    EOFError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


# Not C's unpickler: that one takes memory for what a pickle only claims (the index of a PUT).
class _Unpickler(pickle._Unpickler):  # noqa: SLF001
    # Names by number and objects out of band have no place in a file, nor has what hashes
    # tuples: a few bytes can say one that takes for ever.
    dispatch: ClassVar[dict[int, Any]] = {
        code: function
        for code, function in pickle._Unpickler.dispatch.items()  # noqa: SLF001
        if bytes([code])
        not in {
            pickle.EXT1,
            pickle.EXT2,
            pickle.EXT4,
            pickle.BYTEARRAY8,
            pickle.NEXT_BUFFER,
            pickle.READONLY_BUFFER,
            pickle.EMPTY_SET,
            pickle.FROZENSET,
            pickle.ADDITEMS,
        }
    }

    def __init__(self, data: bytes, where: str, classes: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(io.BytesIO(data))
        self._where = where
        self._classes = classes
        self._room = _MOST_ITEMS * len(data) + _FREE_ITEMS

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._classes:
            return self._classes[module, name]
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        storage = name in STORAGES and module in {"torch", "torch.storage", "torch.cuda"}
        if storage or (module == "torch" and (name in dtypes.BY_NAME or name in _WITHOUT_NUMPY)):
            return Named(module, name)
        raise UnsupportedFormat(
            f"{self._where}: the pickle uses {module}.{name}, so it holds more than weights; to "
            "read it would mean to run it. If you trust it, load it with torch and save its "
            "state_dict() alone"
        )

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _set(self.stack[-1], key, value)

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            _set(self.stack[-1], key, value)

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(arguments, tuple):
            raise TypeError(f"arguments that are {shown(arguments)}")
        self.stack.append(self._call(function, arguments))

    dispatch[pickle.REDUCE[0]] = load_reduce

    def _instantiate(self, function: Any, arguments: list[Any]) -> None:
        self.stack.append(self._call(function, tuple(arguments)))

    def load_newobj(self) -> None:
        self.load_reduce()

    dispatch[pickle.NEWOBJ[0]] = load_newobj

    def _call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """Call what a name stands for; in all with few more items than the pickle has bytes."""
        self._room -= len(arguments) + sum(
            len(one) for one in arguments if isinstance(one, (str, bytes, list, tuple, dict))
        )
        if self._room < 0:
            raise ValueError("it makes far more of its bytes than they are")
        return function(*arguments)

    def load_build(self) -> None:
        # Not for what checks itself when it is made, nor for what belongs to this module.
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, (_Dict, Fields)):
            raise TypeError(f"a state for {shown(target)}")
        target.__setstate__(state)

    dispatch[pickle.BUILD[0]] = load_build

    def persistent_load(self, pid: Any) -> Storage:
        kind, cls, key, _, count = pid[:5]
        if kind != "storage" or not isinstance(cls, Named) or cls.name not in STORAGES:
            raise ValueError(f"a persistent id of {shown(kind)}, {shown(cls)}")
        if not isinstance(key, str) or type(count) is not int or count < 0:
            raise ValueError(f"a storage {shown(key)} of {shown(count)} elements")
        if len(pid) > 5 and pid[5] is not None:  # noqa: PLR2004  the view of a very old file
            raise ValueError("a storage that is a view of another one")
        return Storage(key, STORAGES[cls.name], count)


def _set(target: Any, key: Any, value: Any) -> None:
    # Nor a large number: any two that differ by a multiple of 2^61 - 1 have one hash.
    is_large = isinstance(key, int) and key.bit_length() > _KEY_BITS
    if isinstance(key, (tuple, Stored, Storage)) or is_large:
        raise TypeError(f"a key that is a {type(key).__name__}")
    if not isinstance(target, dict):
        raise TypeError(f"an item of {shown(target)}")
    target[key] = value


def shown(value: object, *, nested: bool = True) -> str:
    """Show a value of a pickle in a message: a little of it, for it may be endless."""
    match value:
        case str() | bytes():
            return repr(value[:60])
        case bool() | float() | None | Named() | Other():
            return str(value)
        case int():
            return str(value) if value.bit_length() <= _KEY_BITS else "a large int"
        case list() | tuple() if nested:
            items = [shown(item, nested=False) for item in value[:6]]
            inside = ", ".join([*items, *["…"] * (len(value) > len(items))])
            return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    return f"a {type(value).__name__}"


def _tensor(storage: Storage, offset: int, shape: Any, stride: Any, *rest: Any) -> Stored | Refused:
    """Stand for ``_rebuild_tensor`` and its ``_v2``: the storage says the dtype."""
    marks = rest[2] if len(rest) > 2 else None  # noqa: PLR2004
    return _describe(storage, storage.dtype, (offset, shape, stride), marks)


def _tensor_v3(
    storage: Storage, offset: int, shape: Any, stride: Any, *rest: Any
) -> Stored | Refused:
    """Stand for ``_rebuild_tensor_v3``, where the storage is plain bytes."""
    dtype = rest[2].name
    return _describe(storage, dtype, (offset, shape, stride), rest[3] if len(rest) > 3 else None)  # noqa: PLR2004


def _describe(
    storage: Storage, dtype: str, where: tuple[Any, Any, Any], marks: Any
) -> Stored | Refused:
    offset, shape, stride = where[0], tuple(where[1]), tuple(where[2])
    numbers = (offset, *shape, *stride)
    if len(shape) != len(stride) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"a tensor of {len(shape)} dimensions with {len(stride)} strides")
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
        raise ValueError(f"a tensor of {shown(shape)}, {shown(stride)}, {shown(offset)}")
    if dtype not in dtypes.BY_NAME:
        return Refused(f"a tensor of dtype {dtype or 'none'}, which numpy lacks")
    if isinstance(marks, Mapping) and any(marks.values()):
        return Refused("a conjugated or negated view; save .resolve_conj().resolve_neg()")
    return Stored(storage, dtypes.BY_NAME[dtype], offset, shape, stride)


def _first(data: Any, *_: Any) -> Any:
    """Stand for ``_rebuild_parameter``: a parameter is its tensor here."""
    return data


def _from_type(function: Any, cls: Any, args: Any, state: Any) -> Any:
    del state
    if not isinstance(cls, Named) or isinstance(function, tuple) or function not in _REBUILD:
        raise ValueError(f"a tensor of class {shown(cls)}")
    return function(*args)


def _refused(what: str) -> Callable[..., Refused]:
    return lambda *_: Refused(what)


def _other(what: str) -> Callable[..., Other]:
    return lambda *args: Other(f"{what}({', '.join(map(shown, args[:6]))[:80]})")


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"bytes encoded as {shown(encoding)}")
    return text.encode("latin1")


def _bytes(*args: Any) -> bytes:
    # With a number it would take as much memory.
    if not args:
        return b""
    if isinstance(args[0], str):
        return _encode(*args)
    if len(args) != 1 or not isinstance(args[0], (bytes, list)):
        raise ValueError("bytes of something else")
    return bytes(args[0])


_UTILS = {
    "_rebuild_tensor": _tensor,
    "_rebuild_tensor_v2": _tensor,
    "_rebuild_tensor_v3": _tensor_v3,
    "_rebuild_parameter": _first,
    "_rebuild_parameter_with_state": _first,
    "_rebuild_qtensor": _refused("a quantized tensor; save its int_repr(), scale and zero point"),
    "_rebuild_sparse_tensor": _refused("a sparse tensor; save its to_dense()"),
    "_rebuild_nested_tensor": _refused("a nested tensor; save its parts"),
    "_rebuild_meta_tensor_no_storage": _refused("a tensor on the meta device, without data"),
    "_rebuild_wrapper_subclass": _refused("a tensor made of other tensors; save those"),
    "_rebuild_device_tensor_from_numpy": _refused("a tensor of a special device; save its .cpu()"),
    "_rebuild_device_tensor_from_cpu_tensor": _refused(
        "a tensor of a special device; save its .cpu()"
    ),
}
_REBUILD = frozenset(_UTILS.values())
_QUANTIZATIONS = ("per_tensor_affine", "per_tensor_symmetric", "per_channel_affine",
                  "per_channel_symmetric", "per_channel_affine_float_qparams")  # fmt: skip
_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("collections", "Counter"): _Dict,
    ("collections", "defaultdict"): lambda *_: _Dict(),
    ("builtins", "bytearray"): _bytes,
    ("builtins", "bytes"): _bytes,
    ("builtins", "set"): _other("set"),
    ("builtins", "complex"): _other("complex"),
    ("__builtin__", "bytearray"): _bytes,
    ("__builtin__", "bytes"): _bytes,
    ("__builtin__", "set"): _other("set"),
    ("__builtin__", "complex"): _other("complex"),
    ("_codecs", "encode"): _encode,
    ("torch", "Size"): lambda sizes=(): tuple(sizes),
    ("torch", "device"): _other("torch.device"),
    ("torch", "Tensor"): Named("torch", "Tensor"),
    ("torch.nn.parameter", "Parameter"): Named("torch", "Parameter"),
    ("torch.serialization", "_get_layout"): _other("torch.layout"),
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    **{("torch._utils", name): function for name, function in _UTILS.items()},
    **{("torch", name): Other(f"torch.{name}") for name in _QUANTIZATIONS},
}


def leaves(
    root: object, where: str, pickle_bytes: int, prefix: str = ""
) -> Iterator[tuple[str, object]]:
    """Yield what lies in nested containers, under dotted names.

    Args:
        root: What `load` returned.
        where: For messages.
        pickle_bytes: Length of the pickle. It can say one thing a million times, and so make
            containers of any size, or that contain themselves.
        prefix: What all names begin with.

    Raises:
        CorruptCheckpoint: More entries than such a pickle has, longer names, or they lie too deep.
    """
    entries, letters = pickle_bytes + 1000, _MOST_LETTERS * pickle_bytes + _FREE_ITEMS
    if not isinstance(root, _CONTAINERS):
        yield prefix, root
        return
    stack = [(prefix, _items(root))]  # iterators: containers may be large, and be there many times
    while stack:
        above, rest = stack[-1]
        for key, node in rest:
            name = f"{above}.{key}" if above or len(stack) > 1 else str(key)
            entries -= 1
            letters -= len(name)
            if entries < 0 or letters < 0 or len(stack) > _MAX_DEPTH:
                raise CorruptCheckpoint(
                    f"{where}: too many nested containers, or too large ones, at {name[:200]!r}: "
                    "the pickle refers to the same ones over and over, or they contain themselves",
                    path=where,
                )
            if isinstance(node, _CONTAINERS):
                stack.append((name, _items(node)))
                break
            yield name, node
        else:
            stack.pop()


_CONTAINERS = (dict, list, tuple)


def _items(node: Any) -> Iterator[tuple[object, object]]:
    return iter(node.items() if isinstance(node, dict) else enumerate(node))
