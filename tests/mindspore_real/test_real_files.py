"""Files that we write load in real MindSpore, and its files load here."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

mindspore = pytest.importorskip("mindspore")

import ml_dtypes  # noqa: E402

import distckpt  # noqa: E402
from distckpt.formats.base import Place, Wanted  # noqa: E402
from distckpt.formats.mindspore import FORMAT  # noqa: E402

KEY = b"0123456789abcdef"
MODES = ["AES-GCM", "AES-CBC", "SM4-CBC"]
TENSORS = {
    "conv.weight": np.arange(24, dtype="<f4").reshape(2, 3, 4),
    "half": np.array([1.5, -2], "<f2"),
    "brain": np.array([1.5, -2.25], ml_dtypes.bfloat16),
    "double": np.array([[0.1]], "<f8"),
    "long": np.array([-(1 << 63), 5], "<i8"),
    "bytes": np.arange(5, dtype="u1"),
    "words": np.array([1, 65535], "<u2"),
    "flags": np.array([True, False]),
    "scalar": np.array(3, "<i4"),
    "empty": np.zeros((0, 3), "<f4"),
}
VALUES = {"epoch": 3, "loss": 0.1, "done": True, "tag": "v1 é 🚀", "none": ""}
WAYS = {
    "plain": ({}, {}),
    "sliced": ({"slice_bytes": 7}, {}),
    "with a CRC": ({"crc": True}, {"crc_check": True}),
    "sliced, with a CRC": ({"crc": True, "slice_bytes": 10}, {"crc_check": True}),
} | {
    f"{mode} of {frame_bytes}": (
        {"key": KEY, "mode": mode, "frame_bytes": frame_bytes},
        {"dec_key": KEY, "dec_mode": mode},
    )
    for mode in MODES
    for frame_bytes in (64 << 20, 100)
}


class Held:
    """A tensor to be written."""

    def __init__(self, name, array):
        self.name, self.array = name, array
        self.shape, self.dtype = array.shape, array.dtype

    def read(self, region=None):
        return np.array(self.array if region is None else self.array[region.slices], order="C")


def write(path, tensors, values=None, **options):
    held = [Held(name, array) for name, array in tensors.items()]
    writing = FORMAT.write(Place.at(path), Wanted(held, values or {}, token="t"), **options)
    for part in writing.parts:
        part()
    writing.commit()


def raw(parameter):
    """A parameter's bytes; MindSpore has no numpy bfloat16 that equals ml_dtypes'."""
    return bytes(parameter.get_bytes()) if parameter.size else b""


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_we_write_loads_in_mindspore(tmp_path, way):
    options, loading = WAYS[way]
    path = tmp_path / "ours.ckpt"
    write(path, TENSORS, VALUES, **options)
    loaded = mindspore.load_checkpoint(str(path), **loading)
    assert list(loaded) == [*TENSORS, *VALUES]
    for name, array in TENSORS.items():
        assert tuple(loaded[name].shape) == array.shape, name
        assert raw(loaded[name]) == array.tobytes(), name
        assert str(loaded[name].dtype).lower() == array.dtype.name, name
    assert loaded["tag"] == VALUES["tag"]
    assert loaded["none"] == ""
    assert loaded["epoch"].asnumpy() == 3
    assert loaded["loss"].asnumpy() == 0.1  # Float64: its own save_checkpoint makes it Float32
    assert loaded["done"].asnumpy()


def test_int4_that_we_write_has_mindspores_bytes(tmp_path):
    path = tmp_path / "ours.ckpt"
    write(path, {"q": np.array([[-1, 7, 0, -8]], ml_dtypes.int4)})
    loaded = mindspore.load_checkpoint(str(path))["q"]
    assert loaded.dtype == mindspore.qint4x2
    assert tuple(loaded.shape) == (1, 2)
    assert raw(loaded) == b"\x7f\x80"


@pytest.mark.parametrize("key", [None, KEY])
def test_data_that_look_like_a_crc_suffix_load_in_mindspore(tmp_path, key):
    data = np.frombuffer(b"crc_num" + bytes(10), np.uint8)
    path = tmp_path / "ours.ckpt"
    write(path, {"w": data}, key=key)
    loaded = mindspore.load_checkpoint(str(path), dec_key=key)
    assert raw(loaded["w"]) == data.tobytes()


@pytest.mark.parametrize("way", ["plain", "crc", *MODES])
def test_a_file_that_mindspore_writes_loads_here(tmp_path, way):
    path = tmp_path / "its.ckpt"
    saving, options = {}, {}
    if way == "crc":
        saving, options = {"crc_check": True}, {"check_crc": True}
    elif way in MODES:
        saving, options = {"enc_key": KEY, "enc_mode": way}, {"key": KEY, "mode": way}
    items = [
        {"name": name, "data": mindspore.Tensor(array)}
        for name, array in TENSORS.items()
        if array.size and array.dtype.name != "bfloat16"
    ]
    items.append({"name": "brain", "data": mindspore.Tensor([1.5, -2.25], mindspore.bfloat16)})
    mindspore.save_checkpoint(items, str(path), append_dict={"tag": VALUES["tag"]}, **saving)
    checkpoint = distckpt.open(path, options=options)
    assert list(checkpoint) == [item["name"] for item in items]
    for name in checkpoint:
        found = checkpoint[name].read()
        assert found.dtype == TENSORS[name].dtype
        assert found.tobytes() == TENSORS[name].tobytes()
    assert checkpoint.values == {"tag": VALUES["tag"]}


def test_what_mindspore_slices_loads_here(tmp_path, monkeypatch):
    from mindspore.train import serialization

    monkeypatch.setattr(serialization, "SLICE_SIZE", 1)
    array = np.arange(3000, dtype="<f4").reshape(3, 1000)
    path = tmp_path / "its.ckpt"
    mindspore.save_checkpoint([{"name": "w", "data": mindspore.Tensor(array)}], str(path))
    assert path.read_bytes().count(b"Float32") == 12
    assert distckpt.open(path)["w"].read().tobytes() == array.tobytes()


def test_what_mindspore_writes_with_a_key_and_a_crc_loads_here_only(tmp_path):
    path = tmp_path / "its.ckpt"
    item = {"name": "w", "data": mindspore.Tensor(np.arange(9))}
    mindspore.save_checkpoint([item], str(path), enc_key=KEY, enc_mode="AES-GCM", crc_check=True)
    with pytest.raises(ValueError, match="Failed to read"):
        mindspore.load_checkpoint(str(path), dec_key=KEY, dec_mode="AES-GCM")
    assert distckpt.open(path, options={"key": KEY})["w"].read().tolist() == list(range(9))


def test_mindspore_finds_our_crc_right(tmp_path):
    path = tmp_path / "ours.ckpt"
    write(path, {"w": np.arange(4)}, crc=True)
    data = path.read_bytes()
    assert int.from_bytes(data[-10:]) == zlib.crc32(data[:-17])
    path.write_bytes(data[:30] + bytes([data[30] ^ 1]) + data[31:])
    with pytest.raises(ValueError, match="Failed to read"):
        mindspore.load_checkpoint(str(path), crc_check=True)
