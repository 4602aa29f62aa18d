"""Columns of whole numbers as bytes, as small as is cheap; and distinct rows of a table."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np

from distckpt.region import ranges

_COLUMN = struct.Struct("<BI")  # bytes of a number, how many
_RAW, _DEFLATED = b"\0", b"\1"
# Smaller ones are not worth the time that it takes to inflate them, thousands of times.
_DEFLATE_FROM_BYTES = 512
_TYPES = {1: "<u1", 2: "<u2", 4: "<u4", 8: "<u8"}


def narrow(column: np.ndarray) -> np.ndarray:
    """Use the smallest unsigned type that holds a column: most numbers are small."""
    return column.astype(np.min_scalar_type(int(column.max()) if column.size else 0))


def deflate(data: bytes) -> bytes:
    """Compress where that pays."""
    if len(data) < _DEFLATE_FROM_BYTES:
        return _RAW + data
    return _DEFLATED + zlib.compress(data, 1)


def inflate(data: bytes) -> bytes:
    """Undo `deflate`."""
    return data[1:] if data[:1] == _RAW else zlib.decompress(data[1:])


def columns_to_bytes(columns: Sequence[np.ndarray]) -> bytes:
    """Put columns of whole numbers ≥ 0 together; tables are flattened."""
    parts = [len(columns).to_bytes(2, "little")]
    for column in columns:
        narrowed = narrow(column)
        parts += [_COLUMN.pack(narrowed.itemsize, narrowed.size), narrowed.tobytes()]
    return deflate(b"".join(parts))


def columns_from_bytes(data: bytes) -> list[np.ndarray]:
    """Take apart what `columns_to_bytes` put together, as int64."""
    content = inflate(data)
    columns, at = [], 2
    for _ in range(int.from_bytes(content[:2], "little")):
        itemsize, count = _COLUMN.unpack_from(content, at)
        at += _COLUMN.size
        columns.append(np.frombuffer(content, _TYPES[itemsize], count, at).astype(np.int64))
        at += itemsize * count
    return columns


def text_column(texts: Sequence[str]) -> np.ndarray:
    """Make a column of bytes of names, which hold no NUL."""
    return np.frombuffer("\0".join(texts).encode(), np.uint8)


def texts_of(column: np.ndarray, count: int) -> list[str]:
    """Undo `text_column`."""
    return column.astype(np.uint8).tobytes().decode().split("\0") if count else []


def hash_rows(table: np.ndarray) -> np.ndarray:
    """Hash each row of whole numbers to 64 bits."""
    mixed: np.ndarray = np.full(len(table), 0x9E3779B97F4A7C15, np.uint64)
    for column in table.T:
        mixed ^= column.astype(np.uint64)
        mixed *= np.uint64(0xFF51AFD7ED558CCD)
        mixed ^= mixed >> np.uint64(32)
        mixed *= np.uint64(0xC4CEB9FE1A85EC53)
        mixed ^= mixed >> np.uint64(29)
    return mixed


def distinct_rows(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the distinct rows of a table of whole numbers.

    By a hash of 64 bits, which is then verified: sorting numbers is much faster than sorting rows.

    Returns:
        The first row of each kind, kinds in the order of their first rows; and each row's kind.
    """
    _, first, kind = np.unique(hash_rows(table), return_index=True, return_inverse=True)
    kind = kind.reshape(-1)
    if not np.array_equal(table[first][kind], table):
        _, first, kind = np.unique(table, axis=0, return_index=True, return_inverse=True)
        kind = kind.reshape(-1)
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return first[order], place[kind]


def distinct_lists(values: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the distinct ones of many lists of whole numbers.

    Args:
        values: The lists, one after another.
        edges: (lists + 1,) where each begins; none is empty.

    Returns:
        The first list of each kind, and each list's kind; kinds in any order.
    """
    if len(edges) < 2:  # noqa: PLR2004  no list at all
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    count = np.diff(edges)
    place = np.arange(len(values)) - np.repeat(edges[:-1], count)
    mixed = hash_rows(np.column_stack([values, place]))
    key = hash_rows(np.column_stack([np.add.reduceat(mixed, edges[:-1]), count.astype(np.uint64)]))
    _, first, kind = np.unique(key, return_index=True, return_inverse=True)
    kind = kind.reshape(-1)
    model = ranges(edges[:-1][first][kind], count)
    if np.array_equal(count[first][kind], count) and np.array_equal(values[model], values):
        return first, kind
    number: dict[bytes, int] = {}
    firsts, kinds = [], []
    for index, (low, high) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        content = values[low:high].tobytes()
        if content not in number:
            number[content] = len(number)
            firsts.append(index)
        kinds.append(number[content])
    return np.array(firsts, np.int64), np.array(kinds, np.int64)
