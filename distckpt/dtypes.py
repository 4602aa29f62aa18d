"""The element types that a checkpoint can hold: one table.

The codes are part of the file format (``Dtype`` in ``manifest.proto``); they never change.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache

import ml_dtypes
import numpy as np


@dataclass(frozen=True, slots=True)
class Dtype:
    """One element type.

    Attributes:
        code: Its number in the manifest.
        name: Its name, numpy's or ml_dtypes'.
        numpy: The little-endian numpy dtype.
        safetensors: Its name in a safetensors header, or None where safetensors has none:
            then the tensor is stored as ``U8`` with a last dimension of `itemsize` bytes
            (none for an item size of 1).
    """

    code: int
    name: str
    numpy: np.dtype
    safetensors: str | None

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.numpy.itemsize


def _little(dtype: np.dtype) -> np.dtype:
    """Return it in little-endian order: numpy's own object where that is the machine's."""
    return dtype if sys.byteorder == "little" else dtype.newbyteorder("<")


def _table() -> tuple[Dtype, ...]:
    standard = [
        (1, "bool", "BOOL"),
        (2, "int8", "I8"),
        (3, "int16", "I16"),
        (4, "int32", "I32"),
        (5, "int64", "I64"),
        (6, "uint8", "U8"),
        (7, "uint16", "U16"),
        (8, "uint32", "U32"),
        (9, "uint64", "U64"),
        (10, "float16", "F16"),
        (11, "float32", "F32"),
        (12, "float64", "F64"),
        (13, "complex64", "C64"),
        (14, "complex128", None),
    ]
    extended = [
        (20, "bfloat16", "BF16"),
        (21, "float8_e4m3fn", "F8_E4M3"),
        (22, "float8_e5m2", "F8_E5M2"),
        (23, "float8_e8m0fnu", "F8_E8M0"),
        (24, "float8_e4m3fnuz", None),
        (25, "float8_e5m2fnuz", None),
        (26, "float8_e4m3b11fnuz", None),
        (27, "float8_e3m4", None),
        (28, "float8_e4m3", None),
        (29, "float6_e2m3fn", None),
        (30, "float6_e3m2fn", None),
        (31, "float4_e2m1fn", None),
        (32, "int4", None),
        (33, "uint4", None),
        (34, "int2", None),
        (35, "uint2", None),
    ]
    return tuple(
        [Dtype(code, name, _little(np.dtype(name)), st) for code, name, st in standard]
        + [Dtype(code, name, np.dtype(getattr(ml_dtypes, name)), st) for code, name, st in extended]
    )


TABLE = _table()
BY_CODE = {entry.code: entry for entry in TABLE}
BY_NAME = {entry.name: entry for entry in TABLE}
_BY_NUMPY = {entry.numpy: entry for entry in TABLE}

_FLOATS = frozenset({"float16", "float32", "float64", "bfloat16"})
_SIGNED = frozenset({"int8", "int16", "int32", "int64"})


@lru_cache(256)
def find(dtype: np.dtype) -> Dtype | None:
    """Find the table's entry of a numpy dtype in any byte order; None if it can't be stored."""
    if dtype.fields is not None or dtype.subdtype is not None:
        return None
    entry = _BY_NUMPY.get(dtype)
    if entry is None and dtype.byteorder == ">":
        entry = _BY_NUMPY.get(dtype.newbyteorder("<"))
    return entry


def are_exported(codes: np.ndarray) -> np.ndarray:
    """Tell for many codes whether Python's buffers know their types, and not numpy alone."""
    known = np.zeros(256, bool)
    known[[entry.code for entry in TABLE if entry.numpy.isbuiltin == 1]] = True
    found: np.ndarray = known[codes]
    return found


def itemsizes(codes: np.ndarray) -> np.ndarray:
    """Return the bytes of an element for each of many codes; 0 for an unknown one."""
    sizes = np.zeros(256, np.int64)
    for entry in TABLE:
        sizes[entry.code] = entry.itemsize
    found: np.ndarray = sizes[codes]
    return found


def can_convert(saved: Dtype, wanted: Dtype) -> bool:
    """Whether `cast=True` may convert: among the floats, or among the signed integers."""
    return (
        saved.name == wanted.name
        or {saved.name, wanted.name} <= _FLOATS
        or {saved.name, wanted.name} <= _SIGNED
    )


def is_narrowing(saved: Dtype, wanted: Dtype) -> bool:
    """Whether some value of *saved* can't be held by *wanted*, so that values must be looked at."""
    if saved.name in _SIGNED:
        return wanted.itemsize < saved.itemsize
    # float16 and bfloat16 each hold what the other doesn't, but bfloat16 has float16's range: a
    # finite float16 is always finite in bfloat16.
    order = {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3}
    return order[wanted.name] < order[saved.name]


def count_lost(values: np.ndarray, wanted: Dtype) -> int:
    """Count the values that *wanted* can't hold: they would become infinite, or wrap around."""
    if values.dtype.kind == "i":
        bounds = np.iinfo(wanted.numpy)
        return int(np.count_nonzero((values < bounds.min) | (values > bounds.max)))
    with np.errstate(over="ignore", invalid="ignore"):
        return int(
            np.count_nonzero(np.isfinite(values) & ~np.isfinite(values.astype(wanted.numpy)))
        )
