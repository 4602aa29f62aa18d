"""The table of element types, which is part of the file format."""

from __future__ import annotations

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from distckpt import dtypes

FLOATS = ["float16", "float32", "float64", "bfloat16"]
SIGNED = ["int8", "int16", "int32", "int64"]
FAMILIES = [*itertools.product(FLOATS, FLOATS), *itertools.product(SIGNED, SIGNED)]

# Code, name, bytes of an element, name in a safetensors header. What is here never changes.
FORMAT_1 = """
     1 bool               1  BOOL
     2 int8               1  I8
     3 int16              2  I16
     4 int32              4  I32
     5 int64              8  I64
     6 uint8              1  U8
     7 uint16             2  U16
     8 uint32             4  U32
     9 uint64             8  U64
    10 float16            2  F16
    11 float32            4  F32
    12 float64            8  F64
    13 complex64          8  C64
    14 complex128         16 -
    20 bfloat16           2  BF16
    21 float8_e4m3fn      1  F8_E4M3
    22 float8_e5m2        1  F8_E5M2
    23 float8_e8m0fnu     1  F8_E8M0
    24 float8_e4m3fnuz    1  -
    25 float8_e5m2fnuz    1  -
    26 float8_e4m3b11fnuz 1  -
    27 float8_e3m4        1  -
    28 float8_e4m3        1  -
    29 float6_e2m3fn      1  -
    30 float6_e3m2fn      1  -
    31 float4_e2m1fn      1  -
    32 int4               1  -
    33 uint4              1  -
    34 int2               1  -
    35 uint2              1  -
"""


def test_the_table_is_that_of_format_1():
    expected = [tuple(line.split()) for line in FORMAT_1.strip().splitlines()]
    found = [
        (str(entry.code), entry.name, str(entry.itemsize), entry.safetensors or "-")
        for entry in dtypes.TABLE
    ]
    assert found == expected


def test_every_name_is_numpys_or_ml_dtypes():
    for entry in dtypes.TABLE:
        scalar = getattr(ml_dtypes, entry.name, None) or entry.name
        assert np.dtype(scalar).newbyteorder("<") == entry.numpy


def test_every_item_size_is_a_power_of_two_so_that_no_block_cuts_an_element():
    assert all(math.log2(entry.itemsize).is_integer() for entry in dtypes.TABLE)


@pytest.mark.parametrize("entry", dtypes.TABLE, ids=lambda entry: entry.name)
def test_a_dtype_is_found_in_every_byte_order(entry):
    for order in "<>=|":
        assert dtypes.find(entry.numpy.newbyteorder(order)) is entry
    assert dtypes.BY_CODE[entry.code] is dtypes.BY_NAME[entry.name] is entry


@pytest.mark.parametrize("kind", "bhilqBHILQ")
def test_cs_names_of_the_integers_are_found(kind):
    found = dtypes.find(np.dtype(kind))
    assert (found.numpy.kind, found.itemsize) == (np.dtype(kind).kind, np.dtype(kind).itemsize)


def test_metadata_of_a_dtype_does_not_matter():
    assert dtypes.find(np.dtype("f4", metadata={"unit": "m"})).name == "float32"


@pytest.mark.parametrize(
    "dtype",
    ["O", "U3", "S3", "V8", "M8[s]", "m8[s]", "g", "G", [("x", "f4")], ("f4", (2,)), "U0", "V0"],
)
def test_a_dtype_that_can_not_be_stored_is_not_found(dtype):
    assert dtypes.find(np.dtype(dtype)) is None


# -------------------------------------------------------------------------------------- conversions


def test_only_floats_and_signed_integers_convert_among_themselves():
    convertible = {
        (saved.name, wanted.name)
        for saved, wanted in itertools.product(dtypes.TABLE, repeat=2)
        if dtypes.can_convert(saved, wanted)
    }
    assert convertible == {*FAMILIES, *((entry.name, entry.name) for entry in dtypes.TABLE)}


def values(name):
    """Values of a dtype, edges among them."""
    dtype = dtypes.BY_NAME[name].numpy
    if name in SIGNED:
        return hnp.from_dtype(dtype)
    edges = [65504.0, 65520.0, -65536.0, 3.3895e38, 3.4e38, 1e39, 1e-46, float("nan"), -math.inf]
    with np.errstate(over="ignore"):
        edges = [np.array(edge).astype(dtype)[()] for edge in edges]
    wide = hnp.from_dtype(np.dtype("f4" if name == "bfloat16" else dtype))
    return st.sampled_from(edges) | wide.map(lambda value: np.array(value).astype(dtype)[()])


def is_lost(value, wanted):
    """Tell whether the wanted dtype can't hold a value: by Python's own numbers."""
    if wanted in SIGNED:
        bits = 8 * dtypes.BY_NAME[wanted].itemsize
        return not -(1 << bits - 1) <= int(value) < 1 << bits - 1
    # The first value that rounds to infinity: half a step above the largest.
    largest, digits = {"float16": (15, 11), "bfloat16": (127, 8), "float32": (127, 24)}[wanted]
    limit = (2 - 2.0**-digits) * 2.0**largest
    return math.isfinite(float(value)) and abs(float(value)) >= limit


@pytest.mark.parametrize(("saved", "wanted"), FAMILIES)
@settings(max_examples=settings.default.max_examples // 3)
@given(data=st.data())
def test_values_are_lost_where_they_do_not_fit_and_only_where_that_is_looked_for(
    saved, wanted, data
):
    source, target = dtypes.BY_NAME[saved], dtypes.BY_NAME[wanted]
    found = data.draw(st.lists(values(saved), max_size=5))
    array = np.array(found, source.numpy)
    with np.errstate(over="ignore", invalid="ignore"):
        lost = dtypes.count_lost(array, target)
    if dtypes.is_narrowing(source, target):
        assert lost == sum(is_lost(value, wanted) for value in found)
    else:
        assert lost == 0


@pytest.mark.parametrize(
    ("saved", "wanted", "narrowing"),
    [
        ("float64", "float32", True),
        ("float32", "bfloat16", True),
        ("float32", "float16", True),
        ("bfloat16", "float16", True),
        ("float16", "bfloat16", False),
        ("float16", "float64", False),
        ("int64", "int8", True),
        ("int8", "int16", False),
        ("int32", "int32", False),
    ],
)
def test_narrowing_is_where_a_value_could_be_lost(saved, wanted, narrowing):
    assert dtypes.is_narrowing(dtypes.BY_NAME[saved], dtypes.BY_NAME[wanted]) is narrowing
