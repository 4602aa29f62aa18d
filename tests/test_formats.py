"""What holds for all formats: which is it, what is missing, what is never read."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import distckpt
from distckpt import CheckpointNotFound, UnsupportedFormat, convert, formats
from distckpt.formats.base import Place


@pytest.fixture
def source(tmp_path):
    state = {"net": {"w": np.ones((3, 4), np.float32)}, "opt": {"m": np.zeros(1 << 20)}}
    distckpt.save(tmp_path / "source", state)
    return tmp_path / "source"


@pytest.mark.parametrize("format", [form.name for form in formats.each()])
def test_nothing_and_an_empty_folder_and_any_text_are_no_format(tmp_path, format):
    form = formats.find(format)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("Some text, and nothing else.\n" * 99)
    (tmp_path / "zero").write_bytes(b"")
    for name in ("nothing", "empty", "text", "zero"):
        assert not form.sniff(Place.at(tmp_path / name)), name


def test_what_is_no_format_is_no_checkpoint(tmp_path):
    (tmp_path / "text").write_text("Some text, and nothing else.\n")
    with pytest.raises(CheckpointNotFound, match=r"or a file of another format, found nothing"):
        distckpt.open(tmp_path / "nothing")
    with pytest.raises(UnsupportedFormat, match=r"text: expected .* this file is none of them"):
        distckpt.open(tmp_path / "text")


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt", "x.pth", "x.npz", "x.weights.h5"])
def test_each_file_is_told_from_what_is_in_it_and_not_by_its_name(source, tmp_path, name):
    report = convert(source, tmp_path / name)
    (tmp_path / name).rename(tmp_path / "renamed.dat")
    assert distckpt.open(tmp_path / "renamed.dat").format == report.format


@pytest.mark.parametrize(
    ("format", "name"),
    [
        ("safetensors", "x.safetensors"),
        ("safetensors-folder", "x"),
        ("torch", "x.pth"),
        ("dcp", "x"),
        ("mindspore", "x.ckpt"),
        ("npz", "x.npz"),
    ],
)
def test_bytes_that_the_filters_drop_are_never_read(source, tmp_path, format, name):
    convert(source, tmp_path / name, format=format)
    net = {"net": {"w": np.zeros((3, 4), np.float32)}}
    for filters in (
        {"filter_prefix": "opt"},
        {"only_prefix": ("net",)},
        {"select": lambda each: each.endswith("w")},
    ):
        net["net"]["w"][...] = 0
        report = distckpt.load_into(tmp_path / name, net, strict=True, **filters)
        assert net["net"]["w"].all()
        assert report.bytes_read == 48
        assert list(distckpt.load(tmp_path / name, **filters)) == ["net.w"]


@pytest.mark.parametrize(
    ("format", "library", "extra"),
    [
        ("keras", "h5py", "keras"),
        ("orbax", "tensorstore", "orbax"),
        ("tensorflow", "tensorflow", "tensorflow"),
    ],
)
def test_a_missing_library_is_named_with_what_installs_it(
    tmp_path, monkeypatch, format, library, extra
):
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "_METADATA").write_text('{"tree_metadata": {}}')
    (tmp_path / "y.index").write_bytes(bytes(40) + bytes.fromhex("57fb808b247547db"))
    (tmp_path / "y.data-00000-of-00001").write_bytes(b"")
    (tmp_path / "x.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    target = tmp_path / {"keras": "x.h5", "orbax": "x", "tensorflow": "y"}[format]
    with pytest.raises(UnsupportedFormat, match=rf"{library}.*pip install 'distckpt\[{extra}\]'"):
        distckpt.open(target, format=format)


@pytest.mark.parametrize("format", [form.name for form in formats.each()])
def test_an_option_that_a_format_does_not_have_is_refused(source, tmp_path, format):
    with pytest.raises(UnsupportedFormat, match="'colour'"):
        convert(source, tmp_path / "x", format=format, options={"colour": "red"})
    if format != "mindspore-ranks":  # which passes options on to the format of its files
        with pytest.raises(UnsupportedFormat, match="'colour'"):
            distckpt.open(tmp_path / "nothing", format=format, options={"colour": "red"})


def test_a_checkpoint_has_no_options(source, tmp_path):
    with pytest.raises(UnsupportedFormat, match=r"'key'.*distckpt format has no such option"):
        distckpt.open(source, options={"key": b""})
    with pytest.raises(UnsupportedFormat, match=r"'key'.*distckpt format has no such option"):
        convert(source, tmp_path / "x", options={"key": b""})


def test_a_load_takes_the_options_of_the_format(source, tmp_path):
    key = bytes(range(16))
    convert(source, tmp_path / "x.ckpt", options={"key": key})
    with pytest.raises(UnsupportedFormat, match="needs its key"):
        distckpt.load(tmp_path / "x.ckpt")
    assert distckpt.load(tmp_path / "x.ckpt", options={"key": key})["net.w"].all()
    net = {"w": np.zeros((3, 4), np.float32)}
    distckpt.load_into(tmp_path / "x.ckpt", net, options={"key": key})
    assert net["w"].all()


def test_files_are_opened_and_written_at_any_url(source, tmp_path):
    for name in ("x.safetensors", "x.ckpt", "x.pth", "x.npz"):
        url = f"memory://formats/{tmp_path.name}/{name}"
        convert(source, url)
        assert distckpt.load(url)["net.w"].all()
