"""Nested plain values to bytes and back, arrays included.

Encoded, they are *blobs*: per-rank values are stored as blobs, and ranks send each other blobs.
A blob can name no class and run no code, whatever its bytes.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from distckpt import dtypes
from distckpt._pb import manifest_pb2 as pb
from distckpt.errors import CorruptCheckpoint, LayoutError
from distckpt.state import MAX_DIMENSIONS

# protobuf refuses messages nested deeper than 100, and a list or a dict is two of them.
MAX_DEPTH = 40
# Keys of a dict that may have one hash; 1, 1.0 and True do, and -1 and -2.
_MOST_ALIKE = 64


def pack(value: object) -> bytes:
    """Encode a nested plain value as a blob.

    Args:
        value: None, bool, int of any size, float, str, bytes, numpy arrays and scalars, and lists,
            tuples and dicts (keys are plain) of these.

    Raises:
        LayoutError: A value of another type, or nested deeper than 40.
    """
    arrays: list[np.ndarray] = []
    tree = _message(value, arrays, "value").SerializeToString()
    return b"".join([struct.pack("<Q", len(tree)), tree, *map(_raw, arrays)])


def _raw(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def unpack(blob: bytes | bytearray | memoryview, *, copy: bool = True) -> Any:
    """Decode a blob.

    Args:
        blob: What `pack` made.
        copy: Whether arrays are new and writable; else they are views of the blob.

    Raises:
        CorruptCheckpoint: Not a blob.
    """
    view = memoryview(blob)
    length = int.from_bytes(view[:8], "little")
    if length > len(view) - 8:
        raise CorruptCheckpoint(f"a blob of {len(view)} bytes claims a tree of {length} bytes")
    try:
        tree = pb.Value.FromString(bytes(view[8 : 8 + length]))
        return from_value(tree, _Arrays(view[8 + length :], copy=copy))
    except CorruptCheckpoint:
        raise
    except (DecodeError, ValueError, TypeError, OverflowError) as exc:
        raise CorruptCheckpoint(f"not a blob of plain values: {exc}") from exc


def encode_value(value: object) -> bytes:
    """Encode a plain value without arrays; equal bytes mean equal values, also for NaN and −0.0."""
    data: bytes = to_value(value, "value").SerializeToString(deterministic=True)
    return data


def decode_value(data: bytes) -> Any:
    """Decode what `encode_value` made."""
    return from_value(pb.Value.FromString(data))


def to_value(value: object, where: str) -> Any:
    """Make the protobuf message of a plain value without arrays.

    Args:
        value: As in `pack`, but for the arrays.
        where: What the value is, for messages.

    Raises:
        LayoutError: As in `pack`.
    """
    return _message(value, None, where)


def _message(value: object, arrays: list[np.ndarray] | None, where: str) -> Any:
    message = pb.Value()
    _fill(message, value, arrays, (where,))
    return message


# Not made anew for each value: a message between ranks has a dozen, and training waits for some.
_PLAIN = frozenset({str, bool, int, float, bytes, dict, list, tuple, type(None)})
_ARRAYS, _RAW = (np.generic, np.ndarray), (bytes, bytearray, memoryview)
_KEY = object()  # in the place of a value: a key of what is around it


def _fill(
    message: Any, value: object, arrays: list[np.ndarray] | None, where: tuple[object, ...]
) -> None:
    """Put a nested plain value into a message where it is: what is put together later is copied.

    Args:
        message: A `Value`.
        value: As in `pack`.
        arrays: Takes the arrays, which lie behind the message; None where none are allowed.
        where: The name of the outermost value, and the keys that lead to this one.
    """
    if len(where) > MAX_DEPTH + 1:
        raise LayoutError(f"{_text(where)}: nested deeper than {MAX_DEPTH}")
    if type(value) not in _PLAIN and (
        isinstance(value, _ARRAYS) or (arrays is not None and hasattr(value, "__array__"))
    ):
        _fill_array(message.array, value, arrays, where)
    elif isinstance(value, str):
        try:
            message.text = value
        except UnicodeEncodeError as exc:
            raise LayoutError(f"{_text(where)}: not valid Unicode ({exc.reason})") from exc
    elif value is None:
        message.null = True
    elif isinstance(value, bool):
        message.boolean = value
    elif isinstance(value, int):
        if -(1 << 63) <= value < 1 << 63:
            message.integer = value
        else:
            message.big_integer = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    elif isinstance(value, float):
        message.real = value
    elif isinstance(value, _RAW):
        message.raw = bytes(value)
    else:
        _fill_container(message, value, arrays, where)


def _fill_container(
    message: Any, value: object, arrays: list[np.ndarray] | None, where: tuple[object, ...]
) -> None:
    if isinstance(value, list | tuple):
        items = message.list if isinstance(value, list) else message.tuple
        items.SetInParent()  # it may be empty
        for index, item in enumerate(value):
            _fill(items.item.add(), item, arrays, (*where, index))
    elif isinstance(value, Mapping):
        message.dict.SetInParent()
        for key, item in value.items():
            _fill(message.dict.key.add(), key, None, (*where, _KEY))
            _fill(message.dict.item.add(), item, arrays, (*where, key))
    else:
        raise LayoutError(
            f"{_text(where)}: {type(value).__name__} can't be stored here; use plain values"
            + (", arrays," if arrays is not None else "")
            + " and lists, tuples and dicts of them"
        )


def _text(where: tuple[object, ...]) -> str:
    text = str(where[0])
    for step in where[1:]:
        text = f"a key of {text}" if step is _KEY else f"{text}[{step!r}]"
    return text


def _fill_array(
    message: Any, value: object, arrays: list[np.ndarray] | None, where: tuple[object, ...]
) -> None:
    array = np.asarray(value)
    entry = dtypes.find(array.dtype)
    if arrays is None or entry is None:
        what = f"an array of dtype {array.dtype}" if arrays is not None else "an array"
        raise LayoutError(f"{_text(where)}: {what} can't be stored here")
    shape = array.shape
    if len(shape) > MAX_DIMENSIONS:
        raise LayoutError(f"{_text(where)}: {len(shape)} dimensions, more than {MAX_DIMENSIONS}")
    # Scalars stay scalars: a shape of () is an array of no dimensions.
    array = np.ascontiguousarray(array, entry.numpy).reshape(shape)
    message.dtype = entry.code
    message.shape.extend(shape)
    message.offset = sum(other.nbytes for other in arrays)
    arrays.append(array)


class _Arrays:
    """The arrays behind a tree: no byte is handed out twice, so a small blob has no large value."""

    def __init__(self, data: memoryview, *, copy: bool) -> None:
        self._data, self._copy, self._left = data, copy, len(data)

    def take(self, array: Any) -> np.ndarray:
        entry = dtypes.BY_CODE.get(array.dtype)
        if entry is None:
            raise CorruptCheckpoint(f"an array of unknown dtype code {array.dtype}")
        shape = tuple(array.shape[: MAX_DIMENSIONS + 1])  # to multiply a million takes for ever
        size = math.prod(shape)
        end = array.offset + size * entry.itemsize
        self._left -= size * entry.itemsize
        if end > len(self._data) or self._left < 0 or len(shape) > MAX_DIMENSIONS:
            raise CorruptCheckpoint(
                f"an array of shape {shape} ends at byte {end} of {len(self._data)}, or lies upon "
                "another"
            )
        if not size:
            return np.empty(shape, entry.numpy)
        flat = np.frombuffer(self._data, entry.numpy, size, array.offset)
        found = flat.reshape(shape)
        return found.copy() if self._copy else found


def checked_dict(keys: Sequence[Any], items: Sequence[Any]) -> dict[Any, Any]:
    """Make a dict of what comes from a file.

    Raises:
        CorruptCheckpoint: Many keys have one hash, so that each would be compared with all: texts
            are hashed with a secret, but numbers and tuples that collide can be computed.
        TypeError: A key that can't be one.
    """
    if len(keys) > _MOST_ALIKE and max(Counter(map(hash, keys)).values()) > _MOST_ALIKE:
        raise CorruptCheckpoint("a dict whose keys collide, as no honest ones do")
    return dict(zip(keys, items, strict=True))


_AS_IT_IS = frozenset({"boolean", "integer", "real", "text", "raw"})


def from_value(value: Any, arrays: _Arrays | None = None) -> Any:
    """Make the plain value of a protobuf message.

    Args:
        value: What `to_value` or `pack` made.
        arrays: What lies behind the message; None where no arrays are allowed.

    Raises:
        CorruptCheckpoint: A message that they do not make.
    """
    kind = value.WhichOneof("kind")
    if kind is None:
        raise CorruptCheckpoint("a value of no kind, or of one that this version doesn't know")
    content = getattr(value, kind)
    if kind in _AS_IT_IS:
        return content
    if kind == "null":
        return None
    if kind == "big_integer":
        return int.from_bytes(content, "little", signed=True)
    if kind == "list":
        return [from_value(item, arrays) for item in content.item]
    if kind == "tuple":
        return tuple(from_value(item, arrays) for item in content.item)
    if kind == "dict":
        if len(content.key) != len(content.item):
            raise CorruptCheckpoint("a dict with unequal numbers of keys and items")
        keys = [from_value(key) for key in content.key]
        return checked_dict(keys, [from_value(item, arrays) for item in content.item])
    if arrays is None:
        raise CorruptCheckpoint("an array where only plain values can be")
    return arrays.take(content)
