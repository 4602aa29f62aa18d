"""Manifests and plain values as bytes: round trips, damage, and what strangers could write."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import os
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from distckpt import CorruptCheckpoint, LayoutError, UnsupportedFormat, codec, dtypes
from distckpt._pb import manifest_pb2 as pb
from distckpt.layout import Grid, Layout
from distckpt.manifest import DATA_ALIGNMENT, TABLE_DIGEST_BYTES, Manifest, table_bytes

_MANY = settings(max_examples=3 * settings.default.max_examples)
_FUZZ = settings(max_examples=6 * settings.default.max_examples)

REFUSALS = (CorruptCheckpoint, UnsupportedFormat)

# ------------------------------------------------------------------------------------- plain values

numbers = st.integers() | st.integers(-(1 << 70), 1 << 70) | st.just(1 << 10_000)
texts = st.text(st.characters(exclude_categories=["Cs"]))
scalars = st.none() | st.booleans() | numbers | st.floats() | texts | st.binary(max_size=20)
keys = st.recursive(
    st.none() | st.booleans() | st.integers() | texts | st.binary(max_size=5),
    lambda inner: st.tuples(inner, inner),
    max_leaves=3,
)
plain_values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=20,
)


def is_same(a, b):
    """Equal in value and type, at any depth; NaN equals itself, and −0.0 does not equal 0.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack("<d", a) == struct.pack("<d", b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(is_same, a, b))
    if isinstance(a, dict):
        return is_same(list(a), list(b)) and is_same(list(a.values()), list(b.values()))
    if isinstance(a, np.ndarray):
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    return a == b


@_MANY
@given(plain_values)
def test_a_plain_value_survives_with_its_types(value):
    assert is_same(codec.decode_value(codec.encode_value(value)), value)
    assert is_same(codec.unpack(codec.pack(value)), value)


@_MANY
@given(plain_values, plain_values)
def test_bytes_are_equal_if_and_only_if_the_values_are(a, b):
    assert (codec.encode_value(a) == codec.encode_value(b)) == is_same(a, b)


@pytest.mark.parametrize(
    ("a", "b"), [(1, True), (0, False), (1, 1.0), (0.0, -0.0), ((), []), ("a", b"a"), (None, 0)]
)
def test_values_that_python_takes_for_equal_or_alike_stay_apart(a, b):
    assert codec.encode_value(a) != codec.encode_value(b)
    assert is_same(codec.decode_value(codec.encode_value([a, b])), [a, b])


@pytest.mark.parametrize(
    "number",
    [
        sign * (1 << bits) + off
        for bits in (62, 63, 64, 127)
        for sign in (1, -1)
        for off in (-1, 0, 1)
    ],
)
def test_whole_numbers_of_any_size_survive(number):
    assert codec.unpack(codec.pack(number)) == number


def test_bits_of_a_nan_survive():
    (strange,) = struct.unpack("<d", bytes.fromhex("010000000000f4ff"))
    assert is_same(codec.unpack(codec.pack(strange)), strange)


def test_the_order_of_a_dict_survives():
    assert list(codec.unpack(codec.pack({"b": 1, "a": 2}))) == ["b", "a"]


def nested(depth, wrap):
    value = 1
    for _ in range(depth):
        value = wrap(value)
    return value


@pytest.mark.parametrize("wrap", [lambda v: [v], lambda v: (v,), lambda v: {"k": v}])
def test_what_is_nested_as_deep_as_allowed_survives_and_deeper_is_refused(wrap):
    deepest = nested(40, wrap)
    assert codec.unpack(codec.pack(deepest)) == deepest
    manifest = dataclasses.replace(
        small_manifest(), values={"v": deepest}, metadata={"m": nested(39, wrap)}
    )
    assert codec.decode(codec.encode(manifest)).values["v"] == deepest
    with pytest.raises(LayoutError, match="nested deeper than 40"):
        codec.pack(nested(41, wrap))


@pytest.mark.parametrize("value", [object(), {1, 2}, 1j, len, range(3), [[object()]], {"a": {1}}])
def test_what_is_not_plain_is_refused_by_type(value):
    with pytest.raises(LayoutError, match="can't be stored here; use plain values"):
        codec.pack(value)


def test_a_refusal_says_where_in_the_value():
    with pytest.raises(LayoutError, match=r"value\['runs'\]\[1\]: object can't be stored here"):
        codec.pack({"runs": [1, object()]})


@pytest.mark.parametrize("value", ["\ud800", {"\ud800": 1}])
def test_text_that_is_not_unicode_is_refused(value):
    with pytest.raises(LayoutError, match="not valid Unicode"):
        codec.pack(value)


def test_bytes_of_every_kind_become_bytes():
    assert codec.unpack(codec.pack([bytearray(b"ab"), memoryview(b"cd")])) == [b"ab", b"cd"]


def test_arrays_are_refused_where_only_plain_values_go():
    for array in (np.ones(2), np.float32(1)):
        with pytest.raises(LayoutError, match="an array can't be stored here"):
            codec.encode_value({"a": array})


# -------------------------------------------------------------------------------------------- blobs


@st.composite
def arrays(draw):
    entry = draw(st.sampled_from(dtypes.TABLE))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    raw = draw(
        st.binary(
            min_size=int(np.prod(shape)) * entry.itemsize,
            max_size=int(np.prod(shape)) * entry.itemsize,
        )
    )
    return np.frombuffer(raw, entry.numpy).reshape(shape)


@_MANY
@given(
    st.recursive(
        scalars | arrays(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
        max_leaves=8,
    )
)
def test_arrays_of_every_dtype_survive_in_a_blob(value):
    assert is_same(codec.unpack(codec.pack(value)), value)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3).T,
        np.arange(20, dtype=np.int16)[::-3],
        np.arange(4, dtype=">i4"),
        np.array(3, ">f8"),
        np.zeros((0, 3)),
        np.broadcast_to(np.float32(2), (2, 2)),
    ],
)
def test_arrays_in_any_order_become_little_endian_c_order(array):
    found = codec.unpack(codec.pack(array))
    assert np.array_equal(found, array)
    assert found.dtype == array.dtype.newbyteorder("<")
    assert found.flags.c_contiguous


def test_a_numpy_scalar_becomes_an_array_of_no_dimensions():
    found = codec.unpack(codec.pack(np.float32(1.5)))
    assert (found.shape, found.dtype, float(found)) == ((), np.float32, 1.5)


def test_arrays_out_of_a_blob_are_new_and_writable_unless_views_are_asked_for():
    blob = codec.pack({"a": np.arange(3), "b": np.ones(2)})
    found = codec.unpack(blob)
    found["a"][0] = 7
    assert not np.shares_memory(found["a"], np.frombuffer(blob, np.uint8))
    view = codec.unpack(blob, copy=False)["a"]
    assert np.shares_memory(view, np.frombuffer(blob, np.uint8))


@pytest.mark.parametrize("array", [np.array([None]), np.array(["a"]), np.zeros(1, "M8[s]")])
def test_an_array_of_a_foreign_dtype_is_refused(array):
    with pytest.raises(LayoutError, match=r"an array of dtype .* can't be stored here"):
        codec.pack(array)


def test_an_array_of_too_many_dimensions_is_refused():
    assert codec.unpack(codec.pack(np.ones((1,) * 32))).ndim == 32
    with pytest.raises(LayoutError, match="33 dimensions"):
        codec.pack(np.ones((1,) * 33))


SMALL_BLOB = codec.pack({"rng": [1 << 70, "é", (None, 2.5)], "a": np.arange(3, dtype=np.int16)})


@pytest.mark.parametrize("copy", [True, False])
def test_any_damage_to_a_blob_gives_a_value_or_a_refusal(copy):
    damaged = [SMALL_BLOB[:length] for length in range(len(SMALL_BLOB))]
    for at, found in enumerate(SMALL_BLOB):
        values = {0, 255, *(found ^ 1 << bit for bit in range(8))}
        damaged += [SMALL_BLOB[:at] + bytes([v]) + SMALL_BLOB[at + 1 :] for v in values]
    for blob in damaged:
        with contextlib.suppress(CorruptCheckpoint):
            codec.unpack(blob, copy=copy)


def blob_of(tree, data=b""):
    encoded = tree.SerializeToString()
    return struct.pack("<Q", len(encoded)) + encoded + data


def array_of(shape, offset=0, dtype=9):
    return pb.Value(array=pb.Array(dtype=dtype, shape=shape, offset=offset))


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"", "blob of 0 bytes"),
        (b"\1\0\0", "blob of 3 bytes"),
        (struct.pack("<Q", 1 << 63), "claims a tree"),
        (struct.pack("<Q", 9) + b"abc", "claims a tree of 9 bytes"),
        (struct.pack("<Q", 3) + b"abc", "not a blob"),
        (blob_of(pb.Value()), "a value of no kind"),
        (blob_of(array_of([2]), bytes(15)), "ends at byte 16 of 15"),
        (blob_of(array_of([2], 1), bytes(16)), "ends at byte 17 of 16"),
        (blob_of(array_of([1 << 40, 1 << 40]), bytes(16)), "ends at byte"),
        (blob_of(array_of([1], dtype=99), bytes(16)), "unknown dtype code 99"),
        (blob_of(array_of([1] * 33), bytes(16)), "of 16"),
        (blob_of(array_of([0, 1 << 62]), bytes(16)), "not a blob"),
        (blob_of(array_of([0, (1 << 64) - 1]), bytes(16)), "not a blob"),
        (blob_of(array_of([0], offset=(1 << 64) - 1), bytes(16)), "ends at byte"),
        (blob_of(pb.Value(dict=pb.Dict(key=[pb.Value(integer=1)]))), "unequal numbers"),
        (
            blob_of(
                pb.Value(dict=pb.Dict(key=[pb.Value(list=pb.List())], item=[pb.Value(null=True)]))
            ),
            "not a blob",
        ),
    ],
)
def test_a_blob_that_lies_is_refused(blob, message):
    with pytest.raises(CorruptCheckpoint, match=message):
        codec.unpack(blob)


def test_a_blob_nested_without_end_is_refused():
    tree = pb.Value(integer=1).SerializeToString()
    for _ in range(5000):
        inner = b"\x0a" + varint(len(tree)) + tree  # List.item
        tree = b"\x42" + varint(len(inner)) + inner  # Value.list
    with pytest.raises(CorruptCheckpoint, match="not a blob"):
        codec.unpack(struct.pack("<Q", len(tree)) + tree)


def varint(number):
    found = bytearray()
    while number >= 128:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def test_arrays_that_lie_on_one_another_do_not_multiply_a_blob():
    tree = pb.Value(list=pb.List(item=[array_of([1 << 17])] * 2000))
    blob = blob_of(tree, bytes(1 << 20))
    with little_memory(64 << 20), pytest.raises(CorruptCheckpoint):
        codec.unpack(blob)


@contextlib.contextmanager
def little_memory(limit_bytes):
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit_bytes
    finally:
        tracemalloc.stop()


# ---------------------------------------------------------------------------------------- manifests


def made(names, dtype, layout, layouts, *, files, ranks=3, per_rank=None, **more):
    """A manifest whose files have the lengths that they must have."""
    per_rank = per_rank or {}
    manifest = Manifest(
        save_id=more.pop("save_id", 0x3F9C2A71D04BE816),
        created_ns=more.pop("created_ns", 1_700_000_000_000_000_000),
        ranks=ranks,
        block_bytes=more.pop("block_bytes", 4096),
        step=more.pop("step", 100),
        names=names,
        dtype=np.array(dtype, np.int64),
        layout=np.array(layout, np.int64),
        layouts=layouts,
        file_length=np.zeros(files, np.int64),
        file_data_start=np.full(files, DATA_ALIGNMENT, np.int64),
        file_digest=[
            hashlib.sha256(n.to_bytes(4)).digest()[:TABLE_DIGEST_BYTES] for n in range(files)
        ],
        per_rank=per_rank,
        per_rank_file=np.arange(ranks) if per_rank else np.zeros(0, np.int64),
        **more,
    )
    table_start = manifest.file_table_start.tolist()
    manifest.file_length[:] = [
        start + table_bytes(start, manifest.block_bytes) for start in table_start
    ]
    return manifest


def small_manifest():
    """One of everything: a grid, boxes, a scalar, an empty tensor, values, per-rank values."""
    boxes = Layout(
        (5, 4),
        np.array([[0, 0], [2, 0], [2, 1]]),
        np.array([[2, 4], [5, 1], [5, 4]]),
        np.array([0, 2, 1]),
    )
    return made(
        ["net.w", "net.wide", "net.é", "step_size", "empty"],
        [11, 20, 11, 12, 6],
        [0, 1, 0, 2, 3],
        [
            Layout.of_grid((100, 8), Grid((3, 1), (1, 0), 0, (1, 0))),
            boxes,
            Layout.of_grid((), Grid((), (), 1, ())),
            Layout.of_grid((3, 0), Grid((1, 1), (0, 0), 2, (0, 0))),
        ],
        files=3,
        values={"epoch": 3, "big": 1 << 80, "none": None, "deep": {"a": [1.5, (b"x", "é")]}},
        per_rank={"rng": np.array([10, 0, 7]), "loader": np.array([0, 0, 3])},
        metadata={"commit": "abc", "nested": {"lr": 0.1}},
        metrics={"loss": 0.25},
    )


def is_equal(a, b):
    """Compare manifests field by field."""
    for field in dataclasses.fields(Manifest):
        one, other = getattr(a, field.name), getattr(b, field.name)
        if isinstance(one, np.ndarray):
            same = np.array_equal(one, other)
        elif field.name == "per_rank":
            same = {k: v.tolist() for k, v in one.items()} == {
                k: v.tolist() for k, v in other.items()
            }
        elif isinstance(one, dict):
            same = is_same(one, other)
        else:
            same = one == other
        if not same:
            return False
    return True


def test_a_manifest_survives():
    manifest = small_manifest()
    assert is_equal(codec.decode(codec.encode(manifest)), manifest)


def test_a_manifest_without_anything_survives():
    manifest = made([], [], [], [], files=0, ranks=1, step=None)
    found = codec.decode(codec.encode(manifest))
    assert is_equal(found, manifest)
    assert (found.metadata, found.metrics, found.step) == (None, None, None)


def test_a_manifest_is_the_same_bytes_each_time():
    assert codec.encode(small_manifest()) == codec.encode(small_manifest())


@st.composite
def layouts(draw, files):
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
    if 0 in shape or not shape:
        return Layout.of_grid(
            shape,
            Grid(
                (1,) * len(shape),
                (0,) * len(shape),
                draw(st.integers(0, files - 1)),
                (0,) * len(shape),
            ),
        )
    if draw(st.booleans()):
        parts = tuple(draw(st.integers(1, 4)) for _ in shape)
        rule = tuple(draw(st.integers(0, 1)) for _ in shape)
        grid = Layout.of_grid(shape, Grid(parts, rule, 0, (0,) * len(shape)))
    else:
        cuts = sorted(draw(st.sets(st.integers(1, shape[0]), max_size=3)) | {0, shape[0]})
        low = np.zeros((len(cuts) - 1, len(shape)), np.int64)
        high = np.tile(np.array(shape), (len(cuts) - 1, 1))
        low[:, 0], high[:, 0] = cuts[:-1], cuts[1:]
        grid = Layout(shape, low, high, np.zeros(len(low), np.int64))
    file = draw(st.lists(st.integers(0, files - 1), min_size=len(grid), max_size=len(grid)))
    return Layout(shape, grid.start, grid.stop, np.array(file, np.int64))


@st.composite
def manifests(draw):
    ranks = draw(st.integers(1, 4))
    files = ranks
    known = draw(st.lists(layouts(files), min_size=1, max_size=4))
    names = draw(st.lists(texts.filter(lambda name: "\0" not in name), unique=True, max_size=8))
    where = [draw(st.sampled_from(["tensor", "value", "per_rank"])) for _ in names]
    tensors = [name for name, kind in zip(names, where, strict=True) if kind == "tensor"]
    per_rank = {
        name: np.array(draw(st.lists(st.integers(0, 50), min_size=ranks, max_size=ranks)))
        for name, kind in zip(names, where, strict=True)
        if kind == "per_rank"
    }
    codes = [entry.code for entry in dtypes.TABLE]
    return made(
        tensors,
        draw(st.lists(st.sampled_from(codes), min_size=len(tensors), max_size=len(tensors))),
        draw(
            st.lists(st.integers(0, len(known) - 1), min_size=len(tensors), max_size=len(tensors))
        ),
        known,
        files=files,
        ranks=ranks,
        per_rank=per_rank,
        save_id=draw(st.integers(1, (1 << 64) - 1)),
        created_ns=draw(st.integers(-(1 << 63), (1 << 63) - 1)),
        step=draw(st.none() | st.integers(-(1 << 63), (1 << 63) - 1)),
        block_bytes=draw(st.sampled_from([1 << 12, 1 << 22, 1 << 30])),
        values={
            name: draw(plain_values)
            for name, kind in zip(names, where, strict=True)
            if kind == "value"
        },
        metadata=draw(st.none() | st.dictionaries(texts, scalars, max_size=3)),
        metrics=draw(st.none() | st.dictionaries(texts, st.floats(), max_size=3)),
    )


@_MANY
@given(manifests())
def test_any_manifest_survives(manifest):
    found = codec.decode(codec.encode(manifest))
    assert is_equal(found, manifest)
    for one, other in zip(
        dataclasses.astuple(found.pieces), dataclasses.astuple(manifest.pieces), strict=True
    ):
        assert np.array_equal(one, other)


@given(manifests())
def test_a_structure_that_is_known_makes_the_same_bytes(manifest):
    known = codec.encode_structure(manifest, files=len(manifest.file_length))
    another = dataclasses.replace(manifest, save_id=manifest.save_id ^ 1 or 5)
    for each in (manifest, another):
        assert codec.encode(each, known) == codec.encode(each)


@given(manifests(), manifests())
def test_manifests_are_alike_if_a_plan_of_one_is_one_of_the_other(first, second):
    found = codec.decode(codec.encode(first))
    again = codec.decode(codec.encode(dataclasses.replace(first, step=7, metadata={"a": 1})))
    assert again.is_like(found)
    # What several have can't be changed by one.
    for column in (found.dtype, found.layout):
        assert not column.flags.writeable
    assert not codec.decode(codec.encode(second)).is_like(found) or is_equal(
        dataclasses.replace(
            second,
            save_id=first.save_id,
            created_ns=first.created_ns,
            step=first.step,
            file_digest=first.file_digest,
            values=first.values if list(first.values) == list(second.values) else second.values,
            metadata=first.metadata,
            metrics=first.metrics,
        ),
        first,
    )


@pytest.mark.parametrize(
    "change",
    [
        {"ranks": 5},
        {"block_bytes": 1 << 13},
        {"file_length": np.array([9])},
        {"values": {"epoch": 1}},
        {"per_rank": {"rng": np.array([3, 3])}},
        {"names": ["other"]},
    ],
)
def test_manifests_that_differ_in_what_a_plan_depends_on_are_not_alike(change):
    manifest = made(["w"], [11], [0], [Layout.of_grid((4,), Grid((1,), (0,), 0, (0,)))], files=1)
    assert manifest.is_like(dataclasses.replace(manifest, save_id=9))
    assert not manifest.is_like(dataclasses.replace(manifest, **change))


@given(st.lists(st.text("ab·é€", max_size=6), unique=True, max_size=12))
def test_a_name_leaves_out_what_the_one_before_begins_with_too(names):
    layout = Layout.of_grid((4,), Grid((1,), (0,), 0, (0,)))
    structure = made(names, [11] * len(names), [0] * len(names), [layout], files=1)
    found = pb.Tensors.FromString(codec.encode_structure(structure, files=1).tensors)
    for before, name, shared, suffix in zip(
        ["", *names], names, found.shared, found.suffix, strict=False
    ):
        prefix = os.path.commonprefix([before, name])  # noqa: RUF071  of characters is meant
        assert shared == len(prefix.encode())
        assert prefix + suffix == name


def test_a_regular_grid_takes_constant_space():
    def size(ranks):
        rows = ranks * 16
        layout = Layout.of_grid((rows, 64), Grid((ranks, 1), (0, 0), 0, (1, 0)))
        names = [f"layers.{index}.weight" for index in range(50)]
        manifest = made(names, [11] * 50, [0] * 50, [layout], files=ranks, ranks=ranks)
        return len(codec.encode(manifest))

    # 16 bytes of digest, and a length and a start of a few bytes each, a file.
    assert size(2000) - size(1000) < 1000 * 24


def test_a_layout_of_more_boxes_a_file_than_a_grid_may_have_survives():
    layout = Layout.of_grid((500,), Grid((500,), (0,), 0, (0,)))
    manifest = made(["w"], [11], [0], [layout], files=1)
    assert is_equal(codec.decode(codec.encode(manifest)), manifest)


# ------------------------------------------------------------------------------------------- damage

HEAD_BYTES, DIGEST_BYTES = 24, 32


def test_the_envelope_is_magic_version_length_payload_digest():
    data = codec.wrap(b"payload")
    assert data[:8] == b"DISTCKPT"
    assert struct.unpack("<HHIQ", data[8:HEAD_BYTES]) == (1, 0, 0, 7)
    assert data[HEAD_BYTES:-DIGEST_BYTES] == b"payload" == codec.unwrap(data)
    assert data[-DIGEST_BYTES:] == hashlib.sha256(data[:-DIGEST_BYTES]).digest()


def test_any_other_value_of_any_byte_is_refused():
    data = codec.encode(small_manifest())
    for at in range(len(data)):
        damaged = bytearray(data)
        for value in range(256):
            damaged[at] = value
            if value != data[at]:
                with pytest.raises(REFUSALS):
                    codec.decode(bytes(damaged))


def test_any_truncation_is_refused():
    data = codec.encode(small_manifest())
    for length in range(len(data)):
        with pytest.raises(REFUSALS):
            codec.decode(data[:length])


@pytest.mark.parametrize("more", [b"\0", b"\n", bytes(24), bytes(32), bytes(4096), b"DISTCKPT"])
def test_any_extension_is_refused(more):
    data = codec.encode(small_manifest())
    for damaged in (data + more, more + data, data + data):
        with pytest.raises(REFUSALS):
            codec.decode(damaged)


def test_bytes_that_changed_places_are_refused():
    data = codec.encode(small_manifest())
    for at in range(len(data) - 1):
        if data[at] != data[at + 1]:
            swapped = data[:at] + data[at + 1 : at + 2] + data[at : at + 1] + data[at + 2 :]
            with pytest.raises(REFUSALS):
                codec.decode(swapped)


@given(st.binary(max_size=200))
def test_any_other_bytes_are_refused(data):
    with pytest.raises(REFUSALS):
        codec.decode(data)
    with pytest.raises(REFUSALS):
        codec.decode(b"DISTCKPT" + data)


def test_damage_is_told_with_the_path_and_what_was_found():
    data = codec.encode(small_manifest())
    with pytest.raises(
        CorruptCheckpoint, match=r"run/manifest\.binpb: the manifest is damaged"
    ) as caught:
        codec.decode(data[:-1], path="run/manifest.binpb")
    assert caught.value.path == "run/manifest.binpb"
    assert f"{len(data)} bytes, the file has {len(data) - 1}" in str(caught.value)
    with pytest.raises(CorruptCheckpoint, match="its SHA-256 differs"):
        codec.decode(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CorruptCheckpoint, match="cut short: 20 bytes"):
        codec.decode(data[:20])
    with pytest.raises(UnsupportedFormat, match="not a distckpt manifest"):
        codec.decode(b"PK\3\4" + data)


# ----------------------------------------------------------- what a stranger could write on purpose


def payload(manifest=None):
    return codec.unwrap(codec.encode(manifest or small_manifest()))


def as_message(manifest=None):
    return pb.Manifest.FromString(payload(manifest))


def read(tampered):
    """Decode a message in an envelope with a right digest."""
    return codec.decode(codec.wrap(tampered.SerializeToString()))


def refused(tampered, kind=CorruptCheckpoint):
    with pytest.raises(kind) as caught:
        read(tampered)
    return str(caught.value)


def test_a_newer_major_version_is_unsupported_and_a_newer_minor_is_read():
    data = payload()
    with pytest.raises(UnsupportedFormat, match=r"format 2\.0.*up to 1\.x\. Install a newer"):
        codec.decode(codec.wrap(data, major=2))
    with pytest.raises(CorruptCheckpoint, match=r"format 0\.0"):
        codec.decode(codec.wrap(data, major=0))
    assert is_equal(codec.decode(codec.wrap(data, minor=9)), small_manifest())


def test_a_length_that_lies_in_a_rightly_signed_envelope_is_refused():
    data = payload()
    head = struct.pack("<8sHHIQ", b"DISTCKPT", 1, 0, 0, len(data) + 1)
    signed = head + data + hashlib.sha256(head + data).digest()
    with pytest.raises(CorruptCheckpoint, match="payload of"):
        codec.decode(signed)


def test_unknown_fields_are_accepted():
    unknown = b"\xfa\x3f\x03abc" + b"\xf8\x3f\x05"  # field 1023: bytes, and a number
    assert is_equal(codec.decode(codec.wrap(payload() + unknown)), small_manifest())


def test_an_unknown_dtype_asks_for_a_newer_version():
    tampered = as_message()
    tampered.tensors.dtype[0] = 200
    assert "unknown dtype codes [200]; install a newer distckpt" in refused(
        tampered, UnsupportedFormat
    )


BIG = 1 << 40

# What is done to the small manifest `m`, and what the refusal says.
LIES = [
    ("m.save_id = 0", "the save id is 0"),
    ("m.ranks = 0", "saved by no rank"),
    ("m.ranks = 4", "per-rank values"),
    ("m.block_bytes = 0", "block size"),
    ("m.block_bytes = 2048", "block size"),
    ("m.block_bytes = 5000", "block size"),
    ("m.block_bytes = 1 << 31", "block size"),
    ("m.block_bytes = 8192", "length"),
    ("m.tensors.suffix.append('more')", "columns of unequal length for the names"),
    ("m.tensors.shared.append(0)", "columns of unequal length for the names"),
    ("m.tensors.dtype.append(11)", "columns of unequal length for the tensors"),
    ("m.tensors.layout.pop()", "columns of unequal length for the tensors"),
    ("m.tensors.layout[0] = 4", "layout does not exist"),
    ("m.tensors.shared[0] = 1", "shares more"),
    ("m.tensors.shared[1] = 9", "shares more"),
    ("m.tensors.shared[3] = 5", "not a valid manifest"),  # in the middle of é
    ("m.tensors.suffix[1] = ''", "a name is there twice"),
    ("m.tensors.suffix[4] = 'rng'", "a name is there twice"),
    ("m.tensors.suffix[4] = 'epoch'", "a name is there twice"),
    ("m.tensors.suffix[4] = 'a\\0b'", "NUL"),
    ("m.values.name[0] = 'a\\0b'", "NUL"),
    ("m.values.name[0] = 'big'", "a name is there twice"),
    ("m.values.name.pop()", "columns of unequal length for the values"),
    ("m.values.value.add()", "columns of unequal length for the values"),
    ("m.values.value[0].Clear()", "a value of no kind"),
    ("m.values.value[0].array.dtype = 9", "array"),
    ("m.per_rank.name[0] = 'loader'", "a name is there twice"),
    ("m.per_rank.name.append('more')", "columns of unequal length for the per-rank values"),
    ("m.per_rank.length.pop()", "columns of unequal length for the per-rank values"),
    ("m.per_rank.file.pop()", "columns of unequal length for the per-rank values"),
    ("m.per_rank.file[0] = 3", "do not exist"),
    ("m.per_rank.file[0] = 2", "two ranks"),
    ("m.per_rank.length[0] = 11", "length"),
    ("m.per_rank.length[0] = 1 << 63", "beyond all limits"),
    ("m.files.length[0] += 1", "length"),
    ("m.files.length[0] = 0", "length"),
    ("m.files.length[0] = 1 << 63", "beyond all limits"),
    ("m.files.length.append(4096)", "columns of unequal length for the files"),
    ("m.files.data_start.pop()", "columns of unequal length for the files"),
    ("m.files.data_start[0] = 0", "multiple of 4096"),
    ("m.files.data_start[0] = 4097", "multiple of 4096"),
    ("m.files.data_start[0] = 1 << 40", "multiple of 4096"),
    ("m.files.digest = m.files.digest[1:]", "columns of unequal length for the files"),
    ("m.files.digest = b''", "columns of unequal length for the files"),
    ("m.layouts.ndim[0] = 33", "dimensions"),
    ("m.layouts.ndim[0] = 1", "columns of unequal length for the layouts"),
    ("m.layouts.shape.append(1)", "columns of unequal length for the layouts"),
    ("m.layouts.shape[0] = 101", "length"),
    ("m.layouts.shape[0] = 1 << 63", "beyond all limits"),
    ("m.layouts.shape[0] = 1 << 62", "shape"),
    ("m.layouts.shape[2] = 6", "do not cover"),
    ("m.layouts.shape[2] = 0", "not one whole box"),
    ("m.layouts.boxes[1] = 2", "columns of unequal length for the layouts"),
    ("m.layouts.boxes[1] = (1 << 32) - 1", "columns of unequal length for the layouts"),
    ("m.layouts.boxes[2] = 1", "columns of unequal length for the layouts"),
    ("m.layouts.start[2] = 1", "do not cover"),
    ("m.layouts.start[0] = 1 << 62", "do not cover"),
    ("m.layouts.extent[0] = 3", "do not cover"),
    ("m.layouts.extent[0] = 1", "do not cover"),
    ("m.layouts.extent[0] = 0", "empty box"),
    ("m.layouts.extent[0] = 1 << 62", "do not cover"),
    ("m.layouts.start[0], m.layouts.extent[0] = 1 << 62, 1 << 62", "empty box"),
    ("m.layouts.file[0] = 3", "file that does not exist"),
    ("m.layouts.parts[0] = 0", "grid of no or unknown cut"),
    ("m.layouts.parts[0] = 2", "length"),
    ("m.layouts.parts[0] = (1 << 32) - 1", "grid"),
    ("m.layouts.parts[:2] = [1 << 20, 1 << 20]", "grid"),
    ("m.layouts.parts[2] = 2", "not one whole box"),
    ("m.layouts.rule[0] = 2", "grid of no or unknown cut"),
    ("m.layouts.rule[0] = -1", "grid of no or unknown cut"),
    ("m.layouts.file_base[0] = 1", "file that does not exist"),
    ("m.layouts.file_base[0] = (1 << 32) - 1", "file that does not exist"),
    ("m.layouts.file_stride[0] = -1", "file that does not exist"),
    ("m.layouts.file_stride[0] = (1 << 31) - 1", "file that does not exist"),
    ("m.layouts.file_stride[0] = 0", "length"),
    ("m.metadata.integer = 3", "the metadata is not a dict"),
    ("m.metrics.list.item.add()", ""),
    ("m.metadata.dict.key.pop()", "unequal numbers"),
    ("m.metadata.dict.key[0].list.item.add()", ""),
    ("m.ClearField('files')", ""),
    ("m.ClearField('layouts')", "layout does not exist"),
    ("m.ClearField('per_rank')", "length"),
]


@pytest.mark.parametrize(("lie", "message"), LIES)
def test_a_manifest_that_lies_is_refused(lie, message):
    tampered = as_message()
    exec(lie, {"m": tampered})
    with little_memory(32 << 20):
        assert message in refused(tampered)


def test_boxes_out_of_order_are_refused():
    tampered = as_message()
    columns = tampered.layouts
    columns.start[:] = [*columns.start[2:4], *columns.start[:2], *columns.start[4:]]
    columns.extent[:] = [*columns.extent[2:4], *columns.extent[:2], *columns.extent[4:]]
    columns.file[:] = [columns.file[1], columns.file[0], columns.file[2]]
    assert "not in order" in refused(tampered)


def test_numbers_that_only_together_are_too_large_are_refused():
    # Four tensors of 2⁶² bytes make 2⁶⁴, which is 0 in the processor's arithmetic.
    layout = Layout.of_grid((1 << 62,), Grid((1,), (0,), 0, (0,)))
    small = made(
        ["a", "b", "c", "d"],
        [6] * 4,
        [0] * 4,
        [Layout.of_grid((1,), Grid((1,), (0,), 0, (0,)))],
        files=1,
        ranks=1,
    )
    tampered = as_message(small)
    tampered.layouts.shape[0] = layout.shape[0]
    tampered.files.length[0] = 4096 + 4
    refused(tampered)


def test_per_rank_lengths_that_only_together_are_too_large_are_refused():
    small = made(
        [], [], [], [], files=1, ranks=1, per_rank={name: np.array([1]) for name in "abcd"}
    )
    tampered = as_message(small)
    tampered.per_rank.length[:] = [1 << 62] * 4
    tampered.files.length[0] = 4096 + 4
    refused(tampered)


def test_names_that_share_long_prefixes_do_not_multiply():
    tampered = as_message(made([], [], [], [Layout.of_grid((), Grid((), (), 0, ()))], files=1))
    count, long = 20_000, 60_000
    tampered.tensors.suffix.extend(["x" * long, *(f"{n:05}" for n in range(count))])
    tampered.tensors.shared.extend([0, *[long - 10] * count])
    tampered.tensors.dtype.extend([11] * (count + 1))
    tampered.tensors.layout.extend([0] * (count + 1))
    with little_memory(400 << 20):
        assert "names" in refused(tampered)


def test_a_name_longer_than_a_state_may_have_is_refused():
    tampered = as_message()
    tampered.tensors.suffix[4] = "x" * (1 << 16) + "y"
    assert "name" in refused(tampered)


def test_grids_of_many_tensors_do_not_multiply():
    # 100 kB that would be a thousand million boxes.
    files, tensors = 3000, 8000
    layout = Layout.of_grid((files * 64,), Grid((files * 64,), (0,), 0, (0,)))
    empty = made(["w"], [6], [0], [Layout.of_grid((1,), Grid((1,), (0,), 0, (0,)))], files=files)
    tampered = as_message(empty)
    tampered.layouts.shape[0], tampered.layouts.parts[0] = layout.shape[0], files * 64
    tampered.tensors.suffix[:] = [f"{n}" for n in range(tensors)]
    tampered.tensors.shared[:] = [0] * tensors
    tampered.tensors.dtype[:] = [6] * tensors
    tampered.tensors.layout[:] = [0] * tensors
    with little_memory(128 << 20):
        assert "boxes" in refused(tampered)


def test_layouts_of_large_grids_do_not_multiply():
    files, count = 3000, 10_000
    empty = made(["w"], [6], [0], [Layout.of_grid((1,), Grid((1,), (0,), 0, (0,)))], files=files)
    tampered = as_message(empty)
    columns = tampered.layouts
    columns.ndim[:] = [1] * count
    columns.shape[:] = [files * 64] * count
    columns.boxes[:] = [0] * count
    columns.parts[:] = [files * 64] * count
    columns.rule[:] = [0] * count
    columns.file_base[:] = [0] * count
    columns.file_stride[:] = [0] * count
    with little_memory(512 << 20):
        assert "boxes" in refused(tampered)


def test_more_boxes_than_a_reader_accepts_are_not_written():
    layout = Layout.of_grid((1 << 14,), Grid((1 << 14,), (0,), 0, (0,)))
    manifest = dataclasses.replace(
        made(["w"], [6], [0], [layout], files=1),
        names=[f"w{n}" for n in range(1 << 13)],
        dtype=np.full(1 << 13, 6),
        layout=np.zeros(1 << 13, np.int64),
    )
    with little_memory(64 << 20), pytest.raises(LayoutError, match="134217728 boxes"):
        codec.encode(manifest)


def test_boxes_cut_in_more_dimensions_than_a_reader_checks_are_not_written():
    start = np.array(list(itertools.product(range(2), repeat=13)))
    layout = Layout((2,) * 13, start, start + 1, np.zeros(len(start), np.int64))
    manifest = made(["w"], [6], [0], [layout], files=1)
    with pytest.raises(LayoutError, match="8192 boxes in 13 dimensions"):
        codec.encode(manifest)


def test_boxes_cut_in_thirty_two_dimensions_are_judged_at_once():
    ndim = 32
    boxes, start = [], [0] * ndim
    for dim in range(ndim):
        stop = [3] * ndim
        stop[dim] = 1
        boxes.append((list(start), stop))
        start[dim] = 1
    boxes.append((list(start), [3] * ndim))
    boxes.sort()
    low, high = (np.array(side) for side in zip(*boxes, strict=True))
    layout = Layout((3,) * ndim, low, high, np.zeros(len(boxes), np.int64))
    manifest = made(["w"], [6], [0], [layout], files=1)
    with little_memory(32 << 20):
        assert is_equal(codec.decode(codec.encode(manifest)), manifest)
    tampered = as_message(manifest)
    tampered.layouts.extent[0] += 1
    with little_memory(32 << 20):
        assert "do not cover" in refused(tampered)


# ------------------------------------------------------------------------------- tampered at random

EDGES = [
    0,
    1,
    2,
    3,
    63,
    64,
    4096,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 62,
    1 << 63,
    (1 << 64) - 1,
]


# What protobuf raises for a number beyond a field's type.
BEYOND = (ValueError, TypeError, OverflowError)


def fields_of(found):
    """Yield (message, field) of every field that is set, at any depth."""
    for field, value in found.ListFields():
        yield found, field
        if field.type == field.TYPE_MESSAGE:
            for inner in value if field.is_repeated else [value]:
                yield from fields_of(inner)


def mutate(draw, tampered):
    owner, field = draw(st.sampled_from(list(fields_of(tampered))))
    value = getattr(owner, field.name)
    if field.is_repeated:
        at = draw(st.integers(0, len(value) - 1))
        kind = draw(st.sampled_from(["drop", "double", "swap", "clear", "change"]))
        if kind == "drop":
            del value[at]
        elif kind == "clear":
            owner.ClearField(field.name)
        elif field.type == field.TYPE_MESSAGE:
            value.add().CopyFrom(value[at])
        elif kind == "double":
            value.append(value[at])
        elif kind == "swap":
            value[at], value[0] = value[0], value[at]
        else:
            with contextlib.suppress(*BEYOND):
                value[at] = another(draw, field, value[at])
    elif field.type == field.TYPE_MESSAGE or draw(st.booleans()):
        owner.ClearField(field.name)
    else:
        with contextlib.suppress(*BEYOND):
            setattr(owner, field.name, another(draw, field, value))


def another(draw, field, value):
    if field.type == field.TYPE_STRING:
        return draw(texts)
    if field.type == field.TYPE_BYTES:
        return draw(st.binary(max_size=40))
    if field.type == field.TYPE_DOUBLE:
        return draw(st.floats())
    near = st.sampled_from([value - 1, value + 1, -value, value * 2])
    return draw(near | st.sampled_from(EDGES) | st.integers(0, 300))


def is_consistent(manifest):
    """Whether what readers compute from an accepted manifest keeps its invariants."""
    pieces = manifest.pieces
    ends = pieces.offset_bytes + pieces.size_bytes
    start = manifest.file_data_start[pieces.file]
    inside = (pieces.offset_bytes >= start) & (ends <= manifest.file_table_start[pieces.file])
    places = [
        manifest.blob_place(name, rank)
        for name in manifest.per_rank
        for rank in range(manifest.ranks)
    ]
    blobs = all(
        offset + length <= manifest.file_table_start[file]
        for file, offset, length in places
        if length
    )
    return bool(inside.all()) and blobs and is_equal(codec.decode(codec.encode(manifest)), manifest)


@_FUZZ
@given(st.data())
def test_fields_changed_at_random_give_a_sound_manifest_or_a_refusal(data):
    tampered = as_message()
    for _ in range(data.draw(st.integers(1, 3))):
        mutate(data.draw, tampered)
    try:
        found = read(tampered)
    except REFUSALS:
        return
    assert is_consistent(found)


def test_any_flipped_bit_of_the_message_itself_gives_a_sound_manifest_or_a_refusal():
    data = payload()
    for at in range(len(data)):
        for bit in range(8):
            flipped = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
            try:
                found = codec.decode(codec.wrap(flipped))
            except REFUSALS:
                continue
            assert is_consistent(found)


def test_any_truncation_of_the_message_itself_gives_a_sound_manifest_or_a_refusal():
    data = payload()
    for length in range(len(data)):
        try:
            found = codec.decode(codec.wrap(data[:length]))
        except REFUSALS:
            continue
        assert is_consistent(found)


@_MANY
@given(st.data())
def test_bytes_changed_at_random_in_the_message_give_a_sound_manifest_or_a_refusal(data):
    found = bytearray(payload())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(found)))
        kind = data.draw(st.sampled_from(["insert", "drop", "repeat"]))
        if kind == "insert":
            found[at:at] = data.draw(st.binary(max_size=5))
        elif kind == "drop":
            del found[at : at + data.draw(st.integers(1, 5))]
        else:
            found[at:at] = found[at : at + data.draw(st.integers(1, 20))]
    try:
        manifest = codec.decode(codec.wrap(bytes(found)))
    except REFUSALS:
        return
    assert is_consistent(manifest)
