"""MindSpore's .ckpt: its own files are read bit for bit, what is wrong is refused, ours are its."""

from __future__ import annotations

import json
import struct
import sys
import threading
import tracemalloc
import zlib
from contextlib import suppress
from pathlib import Path

import fsspec
import ml_dtypes
import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given
from hypothesis import strategies as st

import distckpt
from distckpt import dtypes
from distckpt.errors import (
    CheckpointError,
    CheckpointExists,
    CheckpointNotFound,
    CorruptCheckpoint,
    UnsupportedFormat,
)
from distckpt.formats import mindspore, mindspore_wire
from distckpt.formats.base import Place, Wanted
from distckpt.formats.mindspore import FORMAT, MindSporeSource

GOLDEN = Path(__file__).parent / "data" / "golden"
WRITTEN = sorted(path.name.removesuffix(".npz") for path in GOLDEN.glob("*.ckpt.npz"))
MODES = ["AES-GCM", "AES-CBC", "SM4-CBC"]
KEY = b"0123456789abcdef"
NAMES = {entry.numpy: entry.name for entry in dtypes.TABLE}


def _messages():
    """Protobuf's own messages of the format: what reads and writes it independently of us."""
    file = descriptor_pb2.FileDescriptorProto(name="t.proto", package="t", syntax="proto2")

    def message(name, *fields):
        added = file.message_type.add(name=name)
        for number, (field, label, kind) in enumerate(fields, 1):
            typed = added.field.add(name=field, number=number, label=label)
            if isinstance(kind, str):
                typed.type, typed.type_name = 11, f".t.{kind}"
            else:
                typed.type = kind

    # Labels: 1 optional, 2 required, 3 repeated. Types: 3 int64, 9 string, 12 bytes.
    message("Tensor", ("dims", 3, 3), ("tensor_type", 2, 9), ("tensor_content", 2, 12))
    message("Map", ("tensor", 3, "Tensor"))
    message("Value", ("tag", 2, 9), ("tensor", 1, "Tensor"), ("maptensor", 1, "Map"))
    message("Checkpoint", ("value", 3, "Value"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Checkpoint"))


Checkpoint = _messages()


def proto(*entries):
    """Serialize entries of (tag, dims, type, content)."""
    checkpoint = Checkpoint()
    for tag, dims, kind, content in entries:
        value = checkpoint.value.add(tag=tag)
        value.tensor.dims.extend(dims)
        value.tensor.tensor_type, value.tensor.tensor_content = kind, content
    return checkpoint.SerializeToString()


def floats(*values):
    return np.array(values, "<f4").tobytes()


def with_crc(data, crc=None):
    return data + b"crc_num" + (zlib.crc32(data) if crc is None else crc).to_bytes(10)


class Held:
    """A tensor to be written."""

    def __init__(self, name, array):
        self.name, self.array = name, np.asarray(array)
        self.shape, self.dtype = self.array.shape, self.array.dtype

    def read(self, region=None):
        return np.array(self.array if region is None else self.array[region.slices], order="C")


def write(path, tensors=None, values=None, *, replace=False, **options):
    """Write a file, and return its bytes."""
    held = [Held(name, array) for name, array in (tensors or {}).items()]
    place = Place.at(path)
    writing = FORMAT.write(
        place, Wanted(held, values or {}, token="token", replace=replace), **options
    )
    for part in writing.parts:
        part()
    writing.commit()
    return place.read(0, place.size())


def everything(source, step=7):
    """Read all of a source: name → array, in steps that suit nothing."""
    arrays = {}
    for index, tensor in enumerate(source.contents.tensors):
        array = np.empty(tensor.shape, tensor.dtype.numpy)
        raw = array.reshape(-1).view(np.uint8).data
        stride = step * tensor.dtype.itemsize
        for start in range(0, len(raw), stride):
            source.read_into(index, 0, start, raw[start : start + stride])
        arrays[tensor.name] = array
    return arrays


@pytest.fixture
def reading(tmp_path):
    """Read bytes as a file: (arrays, values)."""

    def read(data, **options):
        path = tmp_path / "read.ckpt"
        path.write_bytes(data)
        source = FORMAT.open(Place.at(path), **options)
        return everything(source), dict(source.contents.values)

    return read


def same(found, expected):
    return (
        found.dtype == expected.dtype
        and found.shape == expected.shape
        and found.tobytes() == expected.tobytes()
    )


# --- MindSpore's own files ------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITTEN)
def test_a_file_that_mindspore_wrote_reads_bit_for_bit(name):
    told = json.loads((GOLDEN / f"{name}.json").read_text())
    options = {}
    if "key_hex" in told:
        options = {"key": bytes.fromhex(told["key_hex"]), "mode": told["enc_mode"]}
    checkpoint = distckpt.open(GOLDEN / name, options=options)
    assert checkpoint.format == "mindspore"
    tensors = [entry for entry in told["params"] if entry["kind"] == "tensor"]
    assert list(checkpoint) == [entry["name"] for entry in tensors]
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        for entry in tensors:
            expected = arrays[entry["npz_key"]]
            if entry["dtype"] == "BFloat16":
                expected = expected.view(ml_dtypes.bfloat16)
            assert same(checkpoint[entry["name"]].read(), expected), entry["name"]
    strings = {entry["name"]: entry["value"] for entry in told["params"] if entry["kind"] == "str"}
    assert checkpoint.values == strings


def test_every_ckpt_among_the_golden_files_is_known_by_its_first_bytes():
    for path in GOLDEN.rglob("*.ckpt"):
        is_strategy = path.parent.name == "dist"
        assert FORMAT.sniff(Place.at(path)) is not is_strategy, path


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("dist/*/*/*.ckpt")), ids=str)
def test_files_of_ranks_are_opened(path):
    assert len(everything(FORMAT.open(Place.at(path)))) > 0


HAND = {
    "dims0_scalar": np.array(1, "<f4"),
    "slices_adjacent": np.array([1, 2, 3, 4], "<f4"),
    "dims0_empty": np.zeros(0, "<f4"),
    "dims03_empty": np.zeros((0, 3), "<f4"),
    "short": (CorruptCheckpoint, r"'a' \(byte 0\): Float32 of dims \[4\] has 16 bytes.* has 7"),
    "long": (CorruptCheckpoint, r"Float32 of dims \[2\] has 8 bytes, and its content has 16"),
    "neg_dim": (CorruptCheckpoint, r"'a' .*dims \[-1\]: one is negative"),
    "unknown_dtype": (UnsupportedFormat, r"'a' .*type 'Weird'; known are Bool, Int8"),
}


@pytest.mark.parametrize("name", HAND)
def test_a_file_made_by_hand_is_read_as_it_says_or_refused(name):
    assert f"hand_{name}.ckpt" in json.loads((GOLDEN / "handmade.json").read_text())["files"]
    place, expected = Place.at(GOLDEN / f"hand_{name}.ckpt"), HAND[name]
    if isinstance(expected, np.ndarray):
        assert same(everything(FORMAT.open(place))["a"], expected)
    else:
        with pytest.raises(expected[0], match=expected[1]):
            FORMAT.open(place)


# --- meaning --------------------------------------------------------------------------------------


def test_slices_are_joined_where_they_cut_elements(reading):
    data = floats(1, 2, 3)
    cuts = [data[:5], data[5:5], data[5:6], data[6:]]
    arrays, _ = reading(proto(*[("w", [3], "Float32", cut) for cut in cuts]))
    assert arrays["w"].tolist() == [1, 2, 3]


def test_strings_are_plain_values_and_keep_their_nul_characters(reading):
    texts = {"a": "v1", "b": "你好 🚀", "c": "", "d": "x\0"}
    entries = [
        (name, [0], "str", (text or "\0").encode("utf-32-le")) for name, text in texts.items()
    ]
    assert reading(proto(*entries)) == ({}, texts)


def test_complex_and_float8_are_read_which_mindspore_writes_and_cannot_load(reading):
    complexes = np.array([1 + 2j, 3], "<c8")
    eights = np.array([1.5, -2], ml_dtypes.float8_e4m3fn)
    arrays, _ = reading(
        proto(
            ("c", [2], "Complex64", complexes.tobytes()),
            ("e", [2], "Float8E4M3FN", eights.tobytes()),
        )
    )
    assert same(arrays["c"], complexes)
    assert same(arrays["e"], eights)


def test_int4_holds_two_numbers_a_byte_the_lower_half_first(reading):
    arrays, _ = reading(proto(("q", [1, 2], "Int4", b"\x7f\x80")))
    assert arrays["q"].dtype == ml_dtypes.int4
    assert arrays["q"].tolist() == [[-1, 7, 0, -8]]


def test_a_map_parameter_becomes_three_tensors(reading):
    checkpoint = Checkpoint()
    for keys, values in (([7], [[1, 2]]), ([8, 9], [[3, 4], [5, 6]])):
        parts = checkpoint.value.add(tag="m").maptensor
        status = np.zeros(len(keys), "<i4")
        for array in (np.array(keys, "<i4"), np.array(values, "<f4"), status):
            parts.tensor.add(
                dims=array.shape, tensor_type=str(array.dtype), tensor_content=array.tobytes()
            )
    arrays, _ = reading(checkpoint.SerializeToString())
    assert list(arrays) == ["m.key", "m.value", "m.status"]
    assert arrays["m.key"].tolist() == [7, 8, 9]
    assert arrays["m.value"].tolist() == [[1, 2], [3, 4], [5, 6]]


def test_dims_may_be_packed(reading):
    unpacked = proto(("w", [2, 1], "Float32", floats(1, 2)))
    packed = unpacked.replace(b"\x08\x02\x08\x01", b"\x0a\x02\x02\x01")
    assert packed != unpacked
    assert reading(packed)[0]["w"].tolist() == [[1], [2]]


def test_names_keep_mindspores_endings(reading):
    name = "moments.w.__param_key__3"
    assert list(reading(proto((name, [1], "Float32", floats(1))))[0]) == [name]


def test_a_slice_of_a_tensor_reads_no_more_than_the_file_holds_of_it(tmp_path):
    path = tmp_path / "a.ckpt"
    path.write_bytes(proto(("w", [4, 2], "Float32", floats(*range(8)))))
    tensor = distckpt.open(path)["w"]
    assert tensor[1:3].tolist() == [[2, 3], [4, 5]]


# --- what is wrong --------------------------------------------------------------------------------

W = ("w", [2], "Float32", floats(1, 2))
HALVES = [("w", [2], "Float32", floats(1)), ("w", [2], "Float32", floats(2))]
STRING = ("s", [0], "str", "ab".encode("utf-32-le"))
WRONG = {
    "slices apart": ([HALVES[0], ("v", [], "Bool", b"\1"), HALVES[1]], "'w'.*content has 4"),
    "whole copies apart": ([W, ("v", [], "Bool", b"\1"), W], "'w' is at byte 0 already"),
    "whole copies side by side": ([W, W], "has 8 bytes, and its content in 2 slices has 16"),
    "slices of other dims": ([HALVES[0], ("w", [3], "Float32", floats(2))], "not slices of one"),
    "slices of other types": ([HALVES[0], ("w", [2], "Int32", floats(2))], "not slices of one"),
    "an empty tensor twice": ([("e", [0, 3], "Bool", b"")] * 2, "empty, comes 2 times"),
    "a string twice": ([STRING, STRING], "a string comes 2 times"),
    "a string and a tensor": ([STRING, ("s", [], "Bool", b"\1")], "a string comes 2 times"),
    "a string that is no UTF-32": ([("s", [0], "str", b"abc")], "isn't UTF-32"),
    "absurd dims": ([("w", [1 << 40, 1 << 40], "Float32", b"")], "more bytes than any"),
    "absurd dims of an empty one": ([("w", [0, 1 << 62], "Float32", b"")], "more bytes than any"),
    "a scalar of two elements": ([("w", [], "Float32", floats(1, 2))], "has 4 bytes.* has 8"),
    "old scalar of two elements": ([("w", [0], "Float32", floats(1, 2))], "has 4 bytes.* has 8"),
    "too many dims": ([("w", [1] * 33, "Float32", floats(1))], "more than 32 dimensions"),
    "a long name": ([("w" * 65537, [], "Bool", b"\1")], "a tag of 65537 bytes"),
    "a long type": ([("w", [], "x" * 65, b"\1")], "a type of 65 bytes"),
    "nothing": ([], "no entry"),
}


@pytest.mark.parametrize("what", WRONG)
def test_it_is_refused(reading, what):
    entries, message = WRONG[what]
    with pytest.raises(CorruptCheckpoint, match=message):
        reading(proto(*entries))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (("w", [2], "float32", floats(1, 2)), "type 'float32'; known are"),
        (("w\0", [2], "Float32", floats(1, 2)), "NUL"),
        (("w", [], "Int4", b"\1"), "a scalar of type Int4"),
        (("s", [2], "str", b"\0" * 8), "a string has none"),
    ],
)
def test_what_cannot_be_had_here_is_refused_by_name(reading, entry, message):
    with pytest.raises(UnsupportedFormat, match=f"{entry[0][0]}.*{message}"):
        reading(proto(entry))


def test_all_faulty_entries_are_named_at_once(reading):
    faulty = [
        ("a", [2], "Weird", b""),
        ("b", [2], "Float32", b""),
        ("c", [-1], "Float32", b""),
    ]
    with pytest.raises(CorruptCheckpoint, match=r"3 entries(?s:.)*'a'(?s:.)*'b'(?s:.)*'c'"):
        reading(proto(W, *faulty))


def test_of_very_many_faults_some_are_listed(reading):
    with pytest.raises(UnsupportedFormat, match=r"300 entries(?s:.)*and 250 more"):
        reading(proto(*[(f"n{index}", [], "Weird", b"") for index in range(300)]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x0a\xff\xff\xff\xff\x0f\x0a", "4294967295 bytes are announced where 1 are left"),
        (b"\x0a" + b"\xff" * 10, "a number that doesn't end"),
        (b"\x0a\x00", "without a tag"),
        (b"\x0a\x03\x0a\x01w", "without a tensor"),
        (b"\x0a\x05\x0a\x01w\x12\x00", "a tensor without a type"),
        (b"\x0a\x05\x0a\x01w\x1a\x00", "three tensors"),
        (b"\x0b\x00", "wire type 3"),
        (b"\x12\x00", "no field 2"),
        (b"\x08\x00", "no field 1 of wire type 0"),
        (b"\x0a\x06\x0a\x01w\x0a\x01w", "a second tag"),
        (b"\x0a\x03\x0a\x01\xff", "isn't UTF-8"),
        (bytes(100), "field number 0"),
    ],
)
def test_a_broken_structure_is_refused_where_it_breaks(reading, data, message):
    with pytest.raises(CorruptCheckpoint, match=rf"read\.ckpt: byte \d+ of .*{message}"):
        reading(data)


def test_no_memory_is_taken_for_what_a_damaged_file_announces(tmp_path):
    path = tmp_path / "a.ckpt"
    lies = [
        b"\x0a\xff\xff\xff\xff\x7f\x0a\xff\xff\xff\xff\x7f",
        proto(("w", [1 << 30], "Float32", b"")),
        proto(("w", [0], "str", b"")).replace(b"\x1a\x00", b"\x1a\xff\xff\xff\x7f"),
    ]
    tracemalloc.start()
    try:
        for data in lies:
            path.write_bytes(data)
            with pytest.raises(CorruptCheckpoint):
                FORMAT.open(Place.at(path))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


SMALL = with_crc(
    proto(
        W,
        ("s", [0], "str", "é".encode("utf-32-le")),
        ("n", [], "Int64", b"\7" + bytes(7)),
        *[("v", [2, 2], "Int8", bytes([index])) for index in range(4)],
    )
)


def test_a_file_cut_at_any_byte_is_refused_or_has_whole_entries_only(reading):
    whole, _ = reading(SMALL)
    for stop in range(len(SMALL)):
        try:
            arrays, _ = reading(SMALL[:stop])
        except CheckpointError:
            continue
        assert all(same(array, whole[name]) for name, array in arrays.items())
        assert len(arrays) < len(whole) or stop == len(SMALL) - 17


@given(st.data())
def test_flipped_bits_give_an_error_of_ours_or_an_honest_result(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("flipped") / "a.ckpt"
    spoilt = bytearray(SMALL)
    bits = st.integers(0, 8 * len(SMALL) - 1)
    for bit in data.draw(st.lists(bits, min_size=1, max_size=6, unique=True)):
        spoilt[bit // 8] ^= 1 << bit % 8
    path.write_bytes(spoilt)
    for check_crc in (None, False):
        try:
            arrays = everything(FORMAT.open(Place.at(path), check_crc=check_crc))
        except CheckpointError:
            continue
        assert sum(array.nbytes for array in arrays.values()) <= len(SMALL)


@given(st.binary(max_size=200))
def test_any_bytes_give_an_error_of_ours_or_a_checkpoint(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("any") / "a.ckpt"
    path.write_bytes(data)
    place = Place.at(path)
    FORMAT.sniff(place)
    with suppress(CheckpointError):
        everything(FORMAT.open(place))


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(CheckpointNotFound, match=r"none\.ckpt: there is no such file"):
        FORMAT.open(Place.at(tmp_path / "none.ckpt"))


def test_text_that_begins_with_empty_lines_is_no_checkpoint(tmp_path):
    path = tmp_path / "notes.txt"
    for text in ("\n", "\n" * 50, "\n\n\nhello", "", "\n\x08\n\2hi"):
        path.write_text(text)
        assert not FORMAT.sniff(Place.at(path))


def test_a_file_cut_at_any_byte_is_still_known_by_its_ending(tmp_path):
    for stop in range(len(SMALL)):
        path = tmp_path / "a.ckpt"
        path.write_bytes(SMALL[:stop])
        assert FORMAT.sniff(Place.at(path)), stop


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "a.ckpt").touch()
    with pytest.raises(CorruptCheckpoint, match="byte 0 of 0: no entry"):
        distckpt.open(tmp_path / "a.ckpt")


def test_more_entries_than_any_checkpoint_has_are_refused(reading, tmp_path, monkeypatch):
    monkeypatch.setattr(mindspore_wire, "MAX_ENTRIES", 2)
    with pytest.raises(CorruptCheckpoint, match="more than 2 entries"):
        reading(proto(*[(f"w{index}", [], "Bool", b"\1") for index in range(3)]))
    monkeypatch.setattr(mindspore, "MAX_ENTRIES", 2)
    with pytest.raises(UnsupportedFormat, match=r"3 entries to write; a \.ckpt has at most 2"):
        write(tmp_path / "b.ckpt", {"w": np.zeros(3)}, slice_bytes=8)


# --- CRC ------------------------------------------------------------------------------------------


def test_a_damaged_file_with_a_crc_is_refused_before_its_first_tensor():
    source = FORMAT.open(Place.at(GOLDEN / "crc_corrupt.ckpt"))
    for _ in range(2):
        with pytest.raises(CorruptCheckpoint, match=r"CRC-32 of bytes 0:385 .* says 24de8087"):
            source.read_into(0, 0, 0, memoryview(bytearray(4)))


def test_a_damaged_file_is_read_where_its_crc_is_not_to_be_checked():
    place = Place.at(GOLDEN / "crc_corrupt.ckpt")
    assert len(everything(FORMAT.open(place, check_crc=False))) == 8


def test_the_crc_is_checked_at_the_opening_where_there_are_strings(reading):
    with pytest.raises(CorruptCheckpoint, match="CRC-32"):
        reading(with_crc(proto(STRING), crc=1))


def test_a_file_without_a_crc_is_refused_where_one_is_asked_for(reading):
    with pytest.raises(CorruptCheckpoint, match="check_crc=True, and the file has no CRC suffix"):
        reading(proto(W), check_crc=True)
    assert reading(with_crc(proto(W)), check_crc=True)[0]["w"].tolist() == [1, 2]


@pytest.mark.parametrize("crc", [None, 1])
def test_data_that_look_like_a_crc_suffix_are_data(reading, crc):
    data = with_crc(b"", crc)
    arrays, _ = reading(proto(("w", [17], "UInt8", data)))
    assert arrays["w"].tobytes() == data


def test_a_crc_suffix_after_data_that_look_like_one_is_a_suffix(reading):
    data = with_crc(b"")
    arrays, _ = reading(with_crc(proto(("w", [17], "UInt8", data))))
    assert arrays["w"].tobytes() == data


@pytest.mark.parametrize(
    "array",
    [
        np.frombuffer(b"x" + with_crc(b""), np.uint8),
        np.frombuffer(bytes(7) + with_crc(b""), "<f8").reshape(3, 1, 1),
        np.frombuffer(bytes(983) + with_crc(b""), np.uint8).reshape(10, 100),
        np.frombuffer(bytes(983) + with_crc(b""), np.uint8).reshape(100, 5, 2),
    ],
)
@pytest.mark.parametrize("key", [None, KEY])
def test_data_that_look_like_a_suffix_are_followed_by_a_true_one(tmp_path, array, key):
    # MindSpore cuts off whatever looks like one.
    write(tmp_path / "a.ckpt", {"w": array}, key=key)
    source = FORMAT.open(Place.at(tmp_path / "a.ckpt"), key=key, check_crc=True)
    assert same(everything(source)["w"], array)


def test_int4_whose_packed_bytes_look_like_a_suffix_are_followed_by_a_true_one(tmp_path):
    packed = np.frombuffer(bytes(83) + with_crc(b""), np.int8).reshape(2, 50)
    array = np.stack([packed << 4 >> 4, packed >> 4], axis=-1).reshape(2, 100)
    array = array.astype(ml_dtypes.int4)
    write(tmp_path / "a.ckpt", {"w": array})
    source = FORMAT.open(Place.at(tmp_path / "a.ckpt"), check_crc=True)
    assert same(everything(source)["w"], array)


# --- encryption -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("frame_bytes", [1, 16, 33, 100, 1 << 20])
def test_an_encrypted_file_reads_as_it_was_written(tmp_path, mode, frame_bytes):
    tensors = {"a": np.arange(100, dtype="<i2"), "b": np.float32(1)}
    plain = write(tmp_path / "plain.ckpt", tensors, {"s": "text"})
    data = write(
        tmp_path / "a.ckpt", tensors, {"s": "text"}, key=KEY, mode=mode, frame_bytes=frame_bytes
    )
    assert plain[10:40] not in data
    source = FORMAT.open(Place.at(tmp_path / "a.ckpt"), key=KEY, mode=mode)
    assert source.contents.values == {"s": "text"}
    arrays = everything(source)
    assert all(same(arrays[name], np.asarray(array)) for name, array in tensors.items())


@pytest.mark.parametrize("mode", MODES)
def test_a_wrong_key_is_refused(tmp_path, mode):
    write(tmp_path / "a.ckpt", {"w": np.arange(9)}, key=KEY, mode=mode)
    for index in range(300):  # of CBC's paddings, one in 256 looks right
        with pytest.raises(CorruptCheckpoint, match=r"key is wrong"):
            FORMAT.open(Place.at(tmp_path / "a.ckpt"), key=b"%016d" % index, mode=mode)


def test_a_flipped_bit_of_a_gcm_frame_is_refused(tmp_path):
    path = tmp_path / "a.ckpt"
    data = write(path, {"w": np.arange(9)}, key=KEY, frame_bytes=50)
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        # Of the 16 bytes of an IV, GCM uses 12.
        if at % 98 in range(40, 44) and at < 196:
            continue
        with pytest.raises((CorruptCheckpoint, UnsupportedFormat)):
            everything(FORMAT.open(Place.at(path), key=KEY))


@pytest.mark.parametrize("mode", MODES)
def test_an_encrypted_file_cut_at_any_byte_is_refused_or_has_whole_entries_only(tmp_path, mode):
    path = tmp_path / "a.ckpt"
    whole = {"a": np.arange(9), "b": np.arange(3)}
    data = write(path, whole, key=KEY, mode=mode, frame_bytes=64)
    for stop in range(len(data)):
        path.write_bytes(data[:stop])
        try:
            arrays = everything(FORMAT.open(Place.at(path), key=KEY, mode=mode))
        except CheckpointError:
            continue
        assert len(arrays) < 2
        assert all(same(array, whole[name]) for name, array in arrays.items())


def test_no_memory_is_taken_for_a_frame_longer_than_the_file(tmp_path):
    path = tmp_path / "a.ckpt"
    length = (1 << 31) - 64
    head = struct.pack("<I16sii16si", 0x7F3A5ED8, b"", 24 + length, 16, b"", length)
    path.write_bytes(head + bytes(100))
    with pytest.raises(CorruptCheckpoint, match=rf"a frame of {length} bytes where 100 are left"):
        FORMAT.open(Place.at(path), key=KEY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "is encrypted; it needs its key: options=.*'SM4-CBC'"),
        ({"key": KEY}, "mode='AES-GCM', and the file says 'SM4-CBC'"),
        ({"key": KEY, "mode": "ROT13"}, "mode='ROT13': MindSpore has AES-GCM"),
        ({"key": KEY + b"x" * 8, "mode": "SM4-CBC"}, "key= of 24 bytes: SM4-CBC needs 16"),
        ({"key": "0" * 16, "mode": "SM4-CBC"}, "key= is bytes, not str"),
    ],
)
def test_a_key_that_does_not_fit_is_refused(options, message):
    with pytest.raises(UnsupportedFormat, match=message):
        FORMAT.open(Place.at(GOLDEN / "enc_sm4_cbc.ckpt"), **options)


def test_a_key_for_a_plain_file_is_refused(reading):
    with pytest.raises(UnsupportedFormat, match="the file isn't encrypted"):
        reading(proto(W), key=KEY)


def test_what_mindspore_wrote_with_a_key_and_a_crc_and_cannot_read_is_read(reading, tmp_path):
    data = write(tmp_path / "a.ckpt", {"w": np.arange(9)}, key=KEY)
    arrays, _ = reading(with_crc(data, crc=0), key=KEY)
    assert arrays["w"].tolist() == list(range(9))


def test_a_key_and_a_crc_are_refused_before_a_file_is_touched(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(b"old")
    with pytest.raises(UnsupportedFormat, match="crc= and key= exclude each other"):
        write(tmp_path / "a.ckpt", {"w": np.arange(3)}, key=KEY, crc=True, replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
    assert (tmp_path / "a.ckpt").read_bytes() == b"old"


def test_two_threads_read_an_encrypted_file_at_once(tmp_path):
    expected = np.arange(200_000)
    write(tmp_path / "a.ckpt", {"w": expected}, key=KEY, frame_bytes=1 << 18)
    source = FORMAT.open(Place.at(tmp_path / "a.ckpt"), key=KEY)
    found = [None] * 4

    def read(index):
        found[index] = everything(source, step=20_000)["w"]

    threads = [threading.Thread(target=read, args=[index]) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(array, expected) for array in found)


# --- writing --------------------------------------------------------------------------------------


def test_protobuf_reads_the_entries_that_we_write(tmp_path):
    tensors = {
        "w": np.arange(6, dtype="<f4").reshape(2, 3),
        "b": np.array([1, 2], ml_dtypes.bfloat16),
        "n": np.array(7, "<i8"),
        "e": np.zeros((0, 3), "<f8"),
        "q": np.array([-1, 7, 0, -8], ml_dtypes.int4),
    }
    values = {"s": "é", "empty": "", "i": -3, "f": 0.1, "t": True}
    data = write(tmp_path / "a.ckpt", tensors, values, crc=True)
    assert data[-17:-10] == b"crc_num"
    assert int.from_bytes(data[-10:]) == zlib.crc32(data[:-17])
    found = [
        (value.tag, list(value.tensor.dims), value.tensor.tensor_type, value.tensor.tensor_content)
        for value in Checkpoint.FromString(data[:-17]).value
    ]
    assert found == [
        ("w", [2, 3], "Float32", tensors["w"].tobytes()),
        ("b", [2], "BFloat16", tensors["b"].tobytes()),
        ("n", [], "Int64", tensors["n"].tobytes()),
        ("e", [0, 3], "Float64", b""),
        ("q", [2], "Int4", b"\x7f\x80"),
        ("s", [0], "str", "é".encode("utf-32-le")),
        ("empty", [0], "str", bytes(4)),
        ("i", [], "Int64", struct.pack("<q", -3)),
        ("f", [], "Float64", struct.pack("<d", 0.1)),
        ("t", [], "Bool", b"\1"),
    ]


def test_we_write_the_very_bytes_that_mindspore_writes(tmp_path):
    for name in ("cell", "crc", "dtypes"):
        golden = GOLDEN / f"{name}.ckpt"
        tensors = everything(FORMAT.open(Place.at(golden)))
        data = write(tmp_path / golden.name, tensors, crc=name == "crc")
        assert data == golden.read_bytes(), name


def test_slices_are_cut_where_mindspore_cuts_them(tmp_path):
    golden = GOLDEN / "sliced_sync.ckpt"
    tensors = everything(FORMAT.open(Place.at(golden)))
    assert write(tmp_path / "a.ckpt", tensors, slice_bytes=1024) == golden.read_bytes()


TYPES = [
    name
    for name in dtypes.BY_NAME
    if not name.startswith(("float8", "float4", "float6", "complex"))
]
TYPES = [name for name in TYPES if name not in {"uint4", "int2", "uint2", "int4"}]
PLACES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)


@st.composite
def states(draw):
    names = draw(st.lists(PLACES, min_size=1, max_size=5, unique=True))
    tensors, values = {}, {}
    for name in names:
        if draw(st.booleans()):
            dtype = dtypes.BY_NAME[draw(st.sampled_from(TYPES))].numpy
            shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
            size = int(np.prod(shape)) * dtype.itemsize
            raw = draw(st.binary(min_size=size, max_size=size))
            tensors[name] = np.frombuffer(raw, dtype).reshape(shape)
        else:
            text = draw(PLACES)
            values[name] = text
    return tensors, values


@given(states(), st.data())
def test_any_state_reads_as_it_was_written(tmp_path_factory, state, data):
    tensors, values = state
    path = tmp_path_factory.mktemp("state") / "a.ckpt"
    options, opened = {}, {}
    if data.draw(st.booleans()):
        mode = data.draw(st.sampled_from(MODES))
        options = opened = {"key": KEY, "mode": mode}
        options = {**options, "frame_bytes": data.draw(st.integers(1, 300))}
    elif data.draw(st.booleans()):
        options, opened = {"crc": True}, {"check_crc": True}
    write(path, tensors, values, slice_bytes=data.draw(st.integers(1, 50)), **options)
    source = FORMAT.open(Place.at(path), **opened)
    assert source.contents.values == values
    arrays = everything(source)
    assert list(arrays) == list(tensors)
    assert all(same(arrays[name], array) for name, array in tensors.items())


def test_what_mindspore_cannot_load_is_refused_by_name_all_at_once(tmp_path):
    tensors = {
        "c": np.zeros(2, "<c8"),
        "e": np.zeros(2, ml_dtypes.float8_e5m2),
        "q": np.zeros(3, ml_dtypes.int4),
    }
    values = {"b": b"x", "none": None, "big": 1 << 63, "nul": "x\0", "bad": "\ud800"}
    with pytest.raises(UnsupportedFormat, match="8 entries") as raised:
        write(tmp_path / "a.ckpt", {"w": np.zeros(2), **tensors}, {"s": "", **values})
    text = str(raised.value)
    assert all(repr(name) in text for name in [*tensors, *values])
    assert "'w'" not in text
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_write_is_refused(tmp_path):
    with pytest.raises(UnsupportedFormat, match="nothing to write"):
        write(tmp_path / "a.ckpt")


@pytest.mark.parametrize("options", [{"slice_bytes": 0}, {"frame_bytes": (64 << 20) + 1}])
def test_sizes_that_make_no_file_are_refused(tmp_path, options):
    with pytest.raises(UnsupportedFormat, match=str(*options.values())):
        write(tmp_path / "a.ckpt", {"w": np.zeros(2)}, **options)


def test_what_is_there_stays_until_the_commit(tmp_path):
    path = tmp_path / "a.ckpt"
    path.write_bytes(b"old")
    with pytest.raises(CheckpointExists):
        write(path, {"w": np.zeros(2)})
    wanted = Wanted([Held("w", np.zeros(2))], token="t", replace=True)
    writing = FORMAT.write(Place.at(path), wanted)
    writing.parts[0]()
    assert path.read_bytes() == b"old"
    writing.abort()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.ckpt"]
    write(path, {"w": np.zeros(2)}, replace=True)
    assert list(distckpt.open(path)) == ["w"]


def test_files_in_any_store_are_read_and_written():
    url = "memory://mindspore-format/a.ckpt"
    try:
        write(url, {"w": np.arange(3)}, {"s": "text"}, crc=True)
        checkpoint = distckpt.open(url)
        assert checkpoint.format == "mindspore"
        assert checkpoint["w"].read().tolist() == [0, 1, 2]
    finally:
        fsspec.filesystem("memory").rm("/mindspore-format", recursive=True)


class Sparse:
    """A tensor of zeros, whose bytes are there while they are read only."""

    def __init__(self, name, mebibytes):
        self.name, self.shape, self.dtype = name, (mebibytes, 1 << 20), np.dtype("i1")

    def read(self, region=None):
        shape = self.shape if region is None else region.shape
        return np.zeros(shape, self.dtype)


@pytest.mark.parametrize("options", [{}, {"crc": True}, {"key": KEY}])
def test_writing_and_reading_take_the_memory_of_one_tensor(tmp_path, options):
    place = Place.at(tmp_path / "a.ckpt")
    wanted = Wanted([Sparse(f"w{index}", 8) for index in range(5)], token="t")
    tracemalloc.start()
    try:
        writing = FORMAT.write(place, wanted, frame_bytes=1 << 20, **options)
        writing.parts[0]()
        writing.commit()
        assert tracemalloc.get_traced_memory()[1] < 14 << 20
        tracemalloc.reset_peak()
        source = FORMAT.open(place, key=options.get("key"))
        buffer = memoryview(bytearray(1 << 20))
        for index in range(5):
            for start in range(0, 8 << 20, 1 << 20):
                source.read_into(index, 0, start, buffer)
        assert tracemalloc.get_traced_memory()[1] < 14 << 20
    finally:
        tracemalloc.stop()


def test_a_missing_cryptography_is_told_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers", None)
    with pytest.raises(UnsupportedFormat, match=r"pip install 'distckpt\[crypto\]'"):
        FORMAT.open(Place.at(GOLDEN / "enc_sm4_cbc.ckpt"), key=KEY, mode="SM4-CBC")


def test_the_source_says_which_crc_the_file_has():
    assert MindSporeSource(Place.at(GOLDEN / "crc.ckpt")).crc == 0x24DE8087
    assert MindSporeSource(Place.at(GOLDEN / "cell.ckpt")).crc is None
