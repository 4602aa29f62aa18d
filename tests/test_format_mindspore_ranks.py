"""MindSpore's rank folders: any layout is read whole, and written for any strategy it can load."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import distckpt
from distckpt.codec.strategy import (
    OperatorStrategy,
    ParameterStrategy,
    StrategyFile,
    decode_json_strategy,
    decode_strategy,
    encode_json_strategy,
    encode_strategy,
)
from distckpt.errors import (
    CheckpointExists,
    CheckpointNotFound,
    CorruptCheckpoint,
    IncompleteCheckpoint,
    LayoutError,
    UnsupportedFormat,
)
from distckpt.foreign import ForeignStore
from distckpt.formats import find
from distckpt.formats.base import Place, Wanted
from distckpt.formats.mindspore_layout import rank_layout
from distckpt.mindspore.transform import (
    build_searched_strategy,
    merge_pipeline_strategys,
    transform_checkpoints,
)
from distckpt.testing import MemoryStore, run_ranks

GOLDEN = Path(__file__).parent / "data" / "golden" / "dist"
RANKS = find("mindspore-ranks")
SUFFIX = {"mindspore": "ckpt", "safetensors": "safetensors"}


@dataclass
class Array:
    """An array to be written."""

    name: str
    array: np.ndarray

    @property
    def shape(self):
        return self.array.shape

    @property
    def dtype(self):
        return self.array.dtype

    def read(self, region=None):
        return np.array(self.array if region is None else self.array[region.slices], order="C")


def wanted_of(arrays, **more):
    return Wanted([Array(name, np.asarray(array)) for name, array in arrays.items()], **more)


def run(writing):
    for part in writing.parts:
        part()
    writing.commit()


def put(path, arrays, values=(), form="mindspore"):
    """Write one file, as one rank of MindSpore does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    run(find(form).write(Place.at(path), wanted_of(arrays, values=dict(values))))


def put_ranks(folder, ranks, name="net-1_1.ckpt"):
    for rank, arrays in enumerate(ranks):
        put(folder / f"rank_{rank}" / name, arrays)
    return folder


def layout(matrix, tensor_map, step=0, size=0):
    rows = tensor_map if any(isinstance(row, tuple) for row in tensor_map) else (tensor_map,)
    rows = tuple(row if isinstance(row, tuple) else (row,) for row in rows)
    return ParameterStrategy(
        tuple(matrix), rows, opt_weight_shard_step=step, opt_weight_shard_size=size
    )


def flat(matrix, *tensor_map, step=0, size=0):
    return layout(matrix, (tuple(tensor_map),), step, size)


def read(folder, **options):
    checkpoint = distckpt.open(folder, format="mindspore-ranks", options=options)
    return {name: checkpoint[name][...] for name in checkpoint}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes(), name


def weights(*shape, dtype=np.float32):
    return np.arange(1, prod(shape) + 1).reshape(shape).astype(dtype)


def about(folder, **options):
    return distckpt.open(folder, options=options).metadata["mindspore_ranks"]


@pytest.fixture
def full():
    with np.load(GOLDEN / "full.npz") as found:
        return dict(found)


# ---------------------------------------------------------------------- what MindSpore has written


@pytest.mark.parametrize(
    ("folder", "strategy"),
    [("src4", "s4.ckpt"), ("dst4", "s4.ckpt"), ("dst2", "d2.ckpt"), ("dst1", None)],
)
def test_the_rank_folders_that_mindspore_wrote_are_read_whole(folder, strategy, full):
    found = read(GOLDEN / folder, strategy=strategy and GOLDEN / strategy)
    same({name: array for name, array in found.items() if name in full}, full)


def test_a_rank_folder_is_recognized_without_being_told():
    checkpoint = distckpt.open(GOLDEN / "src4", options={"strategy": GOLDEN / "s4.ckpt"})
    assert checkpoint["w"].shape == (8, 4)


def test_a_slice_of_a_parameter_comes_from_the_ranks_that_hold_it(full):
    checkpoint = distckpt.open(GOLDEN / "src4", options={"strategy": GOLDEN / "s4.ckpt"})
    assert np.array_equal(checkpoint["w"][3:6, 1:3], full["w"][3:6, 1:3])


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (("src4", "s4.ckpt"), ("dst2", "d2.ckpt")),
        (("src4", "s4.ckpt"), ("dst1", None)),
        (("dst1", None), ("dst4", "s4.ckpt")),
    ],
)
def test_what_is_cut_anew_equals_what_mindspore_cut_anew(tmp_path, full, source, target):
    (source, strategy), (target, wanted) = source, target
    transform_checkpoints(
        GOLDEN / source,
        tmp_path / "to",
        "t_",
        strategy and GOLDEN / strategy,
        wanted and GOLDEN / wanted,
    )
    theirs = sorted(path.relative_to(GOLDEN / target) for path in GOLDEN.glob(f"{target}/*/*"))
    ours = sorted(path.relative_to(tmp_path / "to") for path in tmp_path.glob("to/*/*"))
    assert ours == theirs
    for path in theirs:
        expected = distckpt.load(GOLDEN / target / path)
        found = distckpt.load(tmp_path / "to" / path)
        # Their global_step is the one of some rank; ours is rank 0's.
        same(
            {n: a for n, a in found.items() if n in full},
            {n: expected[n] for n in full if n in expected},
        )


def test_a_strategy_file_of_mindspore_is_written_back_byte_for_byte():
    for name in ("s4.ckpt", "d2.ckpt"):
        data = (GOLDEN / name).read_bytes()
        assert encode_strategy(decode_strategy(data)) == data


def test_a_strategy_file_says_what_its_layouts_are():
    expected = json.loads((GOLDEN / "layouts.json").read_text())["S4"]
    for name, found in build_searched_strategy(GOLDEN / "s4.ckpt").items():
        matrix, tensor_map, step, size = expected[name]
        assert found == flat(matrix, *tensor_map, step=step, size=size)


# ----------------------------------------------------------------------------------- to any number


def test_four_ranks_become_three_and_come_back(tmp_path, full):
    transform_checkpoints(GOLDEN / "src4", tmp_path / "3", "c", GOLDEN / "s4.ckpt", dst_ranks=3)
    assert sorted(path.name for path in (tmp_path / "3").iterdir()) == [
        "rank_0",
        "rank_1",
        "rank_2",
    ]
    assert distckpt.load(tmp_path / "3" / "rank_2" / "c2.ckpt")["w"].shape == (2, 4)
    found = read(tmp_path / "3", ranks=3)
    same({name: found[name] for name in full}, full)


def test_three_ranks_load_what_four_have_saved(full):
    def load(comm):
        mesh = distckpt.Mesh(tp=3, comm=comm)
        into = {}
        for name, array in full.items():
            box = mesh.region(("tp", *[None] * (array.ndim - 1)), array.shape)
            local = np.zeros(box.shape, array.dtype)
            into[name] = mesh.shard(local, ("tp", *[None] * (array.ndim - 1)), array.shape)
        checkpoint = distckpt.open(GOLDEN / "src4", options={"strategy": GOLDEN / "s4.ckpt"})
        checkpoint.load_into(into, comm=comm)
        return {name: shard.array for name, shard in into.items()}

    parts = run_ranks(3, load)
    for name, array in full.items():
        assert np.array_equal(np.concatenate([part[name] for part in parts]), array)


def test_what_three_ranks_have_saved_becomes_four_rank_folders(tmp_path, full):
    def save(comm):
        mesh = distckpt.Mesh(tp=3, comm=comm)
        state = {}
        for name, array in full.items():
            axes = ("tp", *[None] * (array.ndim - 1))
            local = np.ascontiguousarray(array[mesh.region(axes, array.shape).slices])
            state[name] = mesh.shard(local, axes, array.shape)
        distckpt.save(tmp_path / "ours", state, comm=comm)

    run_ranks(3, save)
    options = {"strategy": GOLDEN / "s4.ckpt"}
    distckpt.convert(tmp_path / "ours", tmp_path / "r", format="mindspore-ranks", options=options)
    for rank in range(4):
        expected = distckpt.load(GOLDEN / f"src4/rank_{rank}/net-1_2.ckpt")
        found = distckpt.load(tmp_path / f"r/rank_{rank}/checkpoint{rank}.ckpt")
        same(found, {name: expected[name] for name in full})


def test_several_ranks_share_the_work(tmp_path, full):
    def transform(comm):
        strategies = (GOLDEN / "s4.ckpt", GOLDEN / "d2.ckpt")
        transform_checkpoints(GOLDEN / "src4", tmp_path / "r", "t_", *strategies, comm=comm)

    run_ranks(3, transform)
    found = read(tmp_path / "r", strategy=GOLDEN / "d2.ckpt")
    same({name: found[name] for name in full}, full)


def test_a_tensor_of_fewer_rows_than_ranks_lies_on_the_first_ranks(tmp_path):
    arrays = {
        "two": weights(2, 3),
        "none": np.zeros((0, 3), np.int32),
        "one": np.float64(7.5).reshape(()),
    }
    run(RANKS.write(Place.at(tmp_path / "r"), wanted_of(arrays), ranks=4))
    same(read(tmp_path / "r", ranks=4), arrays)


def test_a_lost_rank_of_a_cut_by_rows_is_noticed(tmp_path):
    run(RANKS.write(Place.at(tmp_path / "r"), wanted_of({"w": weights(7, 2)}), ranks=3))
    shutil.rmtree(tmp_path / "r" / "rank_1")
    with pytest.raises(LayoutError, match=r"'w': it has .* rows on the ranks; expected"):
        read(tmp_path / "r", ranks=3)


def test_parts_that_would_not_be_equal_are_refused_all_at_once(tmp_path):
    strategy = {"w": flat([3], 0), "v": flat([3], -1, 0), "fits": flat([3], 0)}
    arrays = {"w": weights(4), "v": weights(3, 5), "fits": weights(6)}
    with pytest.raises(UnsupportedFormat, match="2 entries") as caught:
        RANKS.write(Place.at(tmp_path / "r"), wanted_of(arrays), strategy=strategy)
    assert "'w': its shape (4,) can't be cut into (3,) equal parts" in str(caught.value)
    assert not (tmp_path / "r").exists()


# ------------------------------------------------------------------------------- against an oracle


def blocks(array, matrix, axes_of, step, size):
    """Cut as plainly as can be: each rank's part, in the order of the ranks."""
    found = []
    for rank, coordinate in enumerate(product(*(range(extent) for extent in matrix))):
        part = array
        for dim, axes in enumerate(axes_of):
            for axis in axes:
                if axis >= 0:
                    at = len(matrix) - 1 - axis
                    part = np.split(part, matrix[at], axis=dim)[coordinate[at]]
        if size > 1:
            part = np.split(part, size)[rank // step % size]
        found.append(part)
    return found


@st.composite
def cuts(draw, matrix):
    """Draw a layout on this device matrix, and an array that it divides."""
    ndim = draw(st.integers(1, 3))
    axes = draw(st.permutations(range(len(matrix))))
    used = axes[: draw(st.integers(0, len(axes)))]
    axes_of = [[] for _ in range(ndim)]
    for axis in used:
        axes_of[draw(st.integers(0, ndim - 1))].append(axis)
    free = [axis for axis in range(len(matrix)) if axis not in used]
    step, size = 0, 0
    if free and draw(st.booleans()):
        # The replicas that share a part are neighbours: no other free axis is faster.
        axis = min((axis for axis in free if matrix[-1 - axis] > 1), default=free[0])
        step = prod(matrix[len(matrix) - axis :])
        size = draw(st.sampled_from([n for n in range(1, 5) if matrix[-1 - axis] % n == 0]))
    parts = [prod(matrix[-1 - axis] for axis in axes) for axes in axes_of]
    parts[0] *= max(size, 1)
    shape = [n * draw(st.integers(1, 2)) for n in parts]
    rows = tuple(tuple(axes) or (-1,) for axes in axes_of)
    nested = any(len(row) > 1 for row in rows) or (ndim > 1 and draw(st.booleans()))
    tensor_map = rows if nested else (tuple(row[0] for row in rows),)
    dtype = draw(st.sampled_from([np.float32, np.int8, np.float64]))
    strategy = ParameterStrategy(
        tuple(matrix), tensor_map, opt_weight_shard_step=step, opt_weight_shard_size=size
    )
    array = weights(*shape, dtype=dtype)
    return array, strategy, blocks(array, matrix, axes_of, step, size)


@st.composite
def networks(draw):
    """Draw parameters of some pipeline stages: whole, by rank, and their merged strategy."""
    matrix = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    stages = draw(st.integers(1, 2))
    ranks = prod(matrix)
    whole, strategies = {}, {}
    held = [{} for _ in range(stages * ranks)]
    for stage in range(stages):
        for number in range(draw(st.integers(1, 2))):
            array, strategy, parts = draw(cuts(matrix))
            name = f"{stage}.w-{number}"
            whole[name] = array
            strategies[f"{stage}-{name}" if stages > 1 else name] = strategy
            for rank, part in enumerate(parts):
                held[stage * ranks + rank][name] = part
    return whole, held, StrategyFile(strategies)


@given(networks(), st.sampled_from(["mindspore", "safetensors"]), st.booleans())
def test_ranks_of_any_layout_are_read_whole(network, form, as_json):
    whole, held, strategy = network
    place = Place("mem", MemoryStore(), "r")
    for rank, arrays in enumerate(held):
        file = place.entry(f"rank_{rank}/n-1_1.{SUFFIX[form]}")
        run(find(form).write(file, wanted_of(arrays)))
    if as_json:
        strategy = decode_json_strategy(encode_json_strategy(strategy))
    else:
        strategy = decode_strategy(encode_strategy(strategy))
    source = RANKS.open(place, strategy=strategy)
    checkpoint = distckpt.open(ForeignStore(source, "mem", RANKS.name))
    same({name: checkpoint[name][...] for name in checkpoint}, whole)


@given(networks())
def test_each_rank_is_written_what_the_layout_gives_it(network):
    whole, held, strategy = network
    place = Place("mem", MemoryStore(), "r")
    run(RANKS.write(place, wanted_of(whole), strategy=strategy, prefix="p"))
    for rank, arrays in enumerate(held):
        source = find("mindspore").open(place.entry(f"rank_{rank}/p{rank}.ckpt"))
        checkpoint = distckpt.open(ForeignStore(source, "mem", "mindspore"))
        same({name: checkpoint[name][...] for name in checkpoint}, arrays)


def test_optimizer_sharding_over_all_replicas_needs_no_size(tmp_path):
    array = weights(8, 2)
    parts = [np.split(np.split(array, 2)[rank % 2], 2)[rank // 2] for rank in range(4)]
    put_ranks(tmp_path, [{"w": part} for part in parts])
    same(read(tmp_path, strategy={"w": flat([2, 2], 0, -1, step=2, size=-1)}), {"w": array})


def test_optimizer_sharding_over_replicas_that_are_not_evenly_apart_goes_by_their_order(tmp_path):
    array = weights(8, 2)
    held = [{} for _ in range(8)]
    for a, b, c in product(range(2), repeat=3):
        held[4 * a + 2 * b + c]["w"] = np.split(np.split(array, 2)[b], 4)[2 * a + c]
    put_ranks(tmp_path, held)
    same(read(tmp_path, strategy={"w": flat([2, 2, 2], 1, -1, step=1, size=4)}), {"w": array})


def test_one_row_for_one_dimension_may_name_several_axes(tmp_path):
    array = weights(8)
    put_ranks(tmp_path, [{"w": part} for part in np.split(array, 4)])
    same(read(tmp_path, strategy={"w": flat([2, 2], 1, 0)}), {"w": array})


# --------------------------------------------------------------------------------- pipeline stages


def stage_files(folder):
    """Two stages of two ranks: `a` in the first, `b` in the second, `tied` in both."""
    first = StrategyFile(
        {"a": flat([2], 0), "tied": flat([2], -1)}, {"op0": OperatorStrategy(0, ((1, 1),))}
    )
    second = StrategyFile({"b": flat([2], 0), "tied": flat([2], 0)}, {"op1": OperatorStrategy(1)})
    folder.mkdir()
    (folder / "stage0.ckpt").write_bytes(encode_strategy(first))
    (folder / "stage1.ckpt").write_bytes(encode_strategy(second))
    a, b, tied = weights(4), weights(6), weights(2)
    held = [
        {"a": a[:2], "tied": tied},
        {"a": a[2:], "tied": tied},
        {"b": b[:3], "tied": tied[:1]},
        {"b": b[3:], "tied": tied[1:]},
    ]
    return held, {"a": a, "tied": tied, "b": b}


@pytest.mark.parametrize("way", ["folder", "list", "merged.ckpt", "merged.json"])
def test_the_strategies_of_pipeline_stages_are_joined(tmp_path, way):
    held, whole = stage_files(tmp_path / "s")
    put_ranks(tmp_path / "r", held)
    strategy = {
        "folder": tmp_path / "s",
        "list": [tmp_path / "s" / "stage1.ckpt", tmp_path / "s" / "stage0.ckpt"],
    }.get(way, tmp_path / way)
    if way.startswith("merged"):
        merge_pipeline_strategys(tmp_path / "s", strategy)
        assert "1-tied" in build_searched_strategy(strategy)
    same(read(tmp_path / "r", strategy=strategy), whole)


def test_a_parameter_of_two_stages_is_written_to_both(tmp_path):
    held, whole = stage_files(tmp_path / "s")
    run(RANKS.write(Place.at(tmp_path / "r"), wanted_of(whole), strategy=tmp_path / "s"))
    for rank, arrays in enumerate(held):
        same(distckpt.load(tmp_path / "r" / f"rank_{rank}" / f"checkpoint{rank}.ckpt"), arrays)


def test_a_parameter_of_two_stages_is_read_from_the_one_that_is_whole(tmp_path):
    held, whole = stage_files(tmp_path / "s")
    del held[0]["tied"], held[1]["tied"]
    put_ranks(tmp_path / "r", held)
    assert np.array_equal(read(tmp_path / "r", strategy=tmp_path / "s")["tied"], whole["tied"])


def test_a_stage_whose_strategy_is_not_given_is_missed(tmp_path):
    _, whole = stage_files(tmp_path / "s")
    merge_pipeline_strategys(tmp_path / "s", tmp_path / "m.json")
    content = json.loads((tmp_path / "m.json").read_text())
    for name in ("0-a", "0-tied"):
        del content["parallel_layout_item"][name]
    (tmp_path / "m.json").write_text(json.dumps(content))
    with pytest.raises(LayoutError, match=r"pipeline stages \[1\]; expected those of all, 0 to 1"):
        rank_layout(tmp_path / "m.json", whole)


@pytest.mark.parametrize("name", ["0-w", "my-net.w", "1-2-w"])
def test_a_name_may_hold_a_hyphen(tmp_path, name):
    array = weights(4)
    put_ranks(tmp_path, [{name: array[:2]}, {name: array[2:]}])
    same(read(tmp_path, strategy={name: flat([2], 0)}), {name: array})


# -------------------------------------------------------------------------------------- which file


def test_of_ten_saves_the_newest_by_number_is_read(tmp_path):
    for step in range(1, 11):
        put_ranks(tmp_path, [{"w": weights(2) * step}] * 2, f"net-1_{step}.ckpt")
    same(read(tmp_path), {"w": weights(2) * 10})
    assert about(tmp_path)["save"] == [1, 10]
    assert about(tmp_path)["files"]["1"] == "rank_1/net-1_10.ckpt"


def test_a_save_that_a_rank_lacks_does_not_count_and_is_told(tmp_path):
    put_ranks(tmp_path, [{"w": weights(2)}] * 2, "net-1_9.ckpt")
    put(tmp_path / "rank_0" / "net-1_10.ckpt", {"w": weights(2) * 2})
    same(read(tmp_path), {"w": weights(2)})
    assert about(tmp_path)["incomplete_newer"] == [[1, 10]]


def test_saves_of_which_none_is_on_all_ranks_are_refused(tmp_path):
    put(tmp_path / "rank_0" / "net-1_3.ckpt", {"w": weights(2)})
    put(tmp_path / "rank_1" / "net-1_2.ckpt", {"w": weights(2)})
    with pytest.raises(IncompleteCheckpoint, match="1_2: rank 1\n  1_3: rank 0"):
        read(tmp_path)


def test_a_number_that_is_the_rank_is_no_save(tmp_path):
    for rank in range(3):
        for step in (2, 10):
            put(tmp_path / f"rank_{rank}" / f"r{rank}-{step}.ckpt", {"w": weights(2) * step})
    assert about(tmp_path)["save"] == [10]


def test_files_of_two_runs_are_not_guessed_between(tmp_path):
    put(tmp_path / "rank_0" / "net-9_9.ckpt", {"w": weights(2)})
    put(tmp_path / "rank_0" / "net_1-1_1.ckpt", {"w": weights(2) * 2})
    with pytest.raises(CorruptCheckpoint, match=r"don't say which is newer.*files="):
        read(tmp_path)
    same(read(tmp_path, files="net_1-*"), {"w": weights(2) * 2})


def test_two_files_of_one_save_are_not_guessed_between(tmp_path):
    put(tmp_path / "rank_0" / "net-1_1.ckpt", {"w": weights(2)})
    put(tmp_path / "rank_0" / "net-1_1.safetensors", {"w": weights(2)}, form="safetensors")
    with pytest.raises(CorruptCheckpoint, match="don't say which is newer"):
        read(tmp_path)


def test_ranks_may_have_files_of_different_formats(tmp_path):
    array = weights(4)
    put(tmp_path / "rank_0" / "net-1_1.ckpt", {"w": array[:2]})
    put(tmp_path / "rank_1" / "net-1_1.safetensors", {"w": array[2:]}, form="safetensors")
    same(read(tmp_path, strategy={"w": flat([2], 0)}), {"w": array})


def test_other_files_in_a_rank_folder_do_not_matter(tmp_path):
    put_ranks(tmp_path, [{"w": weights(2)}])
    (tmp_path / "rank_0" / "net-graph.meta").write_bytes(b"x")
    (tmp_path / "rank_x").mkdir()
    same(read(tmp_path), {"w": weights(2)})


def test_a_folder_without_ranks_is_none(tmp_path):
    (tmp_path / "rank_0").mkdir()
    assert not RANKS.sniff(Place.at(tmp_path))
    with pytest.raises(CheckpointNotFound, match="rank_0/, rank_1/"):
        read(tmp_path)


# ------------------------------------------------------------------- replicas, and what is missing


def test_a_replica_that_other_ranks_lack_serves_for_all(tmp_path):
    array = weights(4)
    put_ranks(tmp_path, [{"x": weights(1)}, {"w": array[2:]}, {"w": array[:2]}, {"x": weights(1)}])
    strategy = {"w": flat([2, 2], 0), "x": flat([2, 2], -1)}
    same(read(tmp_path, strategy=strategy), {"x": weights(1), "w": array})


def test_a_rank_folder_that_no_part_needs_may_be_missing(tmp_path):
    array = weights(4)
    put_ranks(tmp_path, [{"w": array[:2]}, {"w": array[2:]}])
    same(read(tmp_path, strategy={"w": flat([2, 2], 0)}), {"w": array})


def test_a_part_that_no_rank_has_is_named_with_its_ranks(tmp_path):
    put_ranks(tmp_path, [{"w": weights(2), "v": weights(2)}, {"v": weights(2)}])
    strategy = {"w": flat([2, 2], 0), "v": flat([2, 2], 0)}
    with pytest.raises(
        IncompleteCheckpoint, match=r"'w': of 2 parts, number 1 .* none of ranks 1, 3"
    ):
        read(tmp_path, strategy=strategy)


def test_a_parameter_that_was_not_saved_is_told(tmp_path):
    put_ranks(tmp_path, [{"w": weights(2)}])
    strategy = {"w": flat([1], 0), "moments.w": flat([1], 0)}
    assert about(tmp_path, strategy=strategy)["not_saved"] == ["moments.w"]


def test_a_number_that_differs_between_ranks_is_the_lowest_rank_s_and_told(tmp_path):
    for rank in range(2):
        put(
            tmp_path / f"rank_{rank}" / "net-1_1.ckpt",
            {"w": weights(2), "loss_scale": np.float32(rank).reshape(())},
            {"note": f"rank {rank}", "name": "same"},
        )
    checkpoint = distckpt.open(tmp_path)
    assert checkpoint["loss_scale"][...] == 0
    assert checkpoint.values == {"note": "rank 0", "name": "same"}
    assert checkpoint.metadata["mindspore_ranks"]["differ"] == ["note", "loss_scale"]


def test_without_a_strategy_tensors_that_differ_are_refused_as_parts(tmp_path):
    put_ranks(
        tmp_path, [{"w": weights(2), "b": weights(3)}, {"w": weights(2) + 1, "b": weights(3)}]
    )
    with pytest.raises(LayoutError, match=r"1 tensors(?s:.)*'w'(?s:.)*Give strategy="):
        read(tmp_path)
    same(read(tmp_path, replicas="trust"), {"w": weights(2), "b": weights(3)})


def test_a_tensor_that_the_strategy_forgot_is_refused_if_it_differs(tmp_path):
    put_ranks(tmp_path, [{"w": weights(2), "v": weights(2)}, {"w": weights(2), "v": -weights(2)}])
    with pytest.raises(LayoutError, match="'v': the strategy doesn't say how it is cut"):
        read(tmp_path, strategy={"w": flat([2], -1)})


# -------------------------------------------------------------------------------- strings, writing


def test_strings_and_numbers_go_to_every_rank(tmp_path):
    put(tmp_path / "a" / "rank_0" / "n.ckpt", {"w": weights(4)}, {"net": "lenet-5", "empty": ""})
    transform_checkpoints(tmp_path / "a", tmp_path / "b", "n", None, {"w": flat([2], 0)})
    for rank in range(2):
        found = distckpt.open(tmp_path / "b" / f"rank_{rank}" / f"n{rank}.ckpt")
        assert found.values == {"net": "lenet-5", "empty": ""}


def test_files_can_be_written_as_safetensors(tmp_path):
    strategy = {"w": flat([2], 0)}
    options = {"strategy": strategy, "file_format": "safetensors"}
    run(RANKS.write(Place.at(tmp_path / "r"), wanted_of({"w": weights(4)}), **options))
    same(distckpt.load(tmp_path / "r/rank_1/checkpoint1.safetensors"), {"w": weights(4)[2:]})


def test_files_can_be_encrypted(tmp_path):
    key = b"0123456789abcdef"
    array = weights(4)
    run(RANKS.write(Place.at(tmp_path / "r"), wanted_of({"w": array}), ranks=2, key=key))
    with pytest.raises(UnsupportedFormat, match="encrypted"):
        read(tmp_path / "r", ranks=2)
    same(read(tmp_path / "r", ranks=2, key=key), {"w": array})


def test_nothing_is_visible_before_the_commit(tmp_path):
    writing = RANKS.write(Place.at(tmp_path / "r"), wanted_of({"w": weights(4)}), ranks=2)
    assert len(writing.parts) == len(writing.part_bytes) == 2
    for part in writing.parts:
        part()
    assert not RANKS.sniff(Place.at(tmp_path / "r"))
    writing.abort()
    assert not list(tmp_path.rglob("*.*"))


def test_what_is_there_is_replaced_only_when_told_and_then_wholly(tmp_path):
    place = Place.at(tmp_path / "r")
    run(RANKS.write(place, wanted_of({"w": weights(4)}), ranks=4))
    more = wanted_of({"w": weights(6)})
    with pytest.raises(CheckpointExists):
        RANKS.write(place, more, ranks=2)
    run(RANKS.write(place, replace(more, replace=True, token="1"), ranks=2))
    same(read(tmp_path / "r", ranks=2), {"w": weights(6)})


def test_another_run_s_files_are_never_deleted(tmp_path):
    put_ranks(tmp_path, [{"w": weights(2)}])
    with pytest.raises(CheckpointExists, match=r"1 others, such as rank_0/net-1_1\.ckpt"):
        RANKS.write(Place.at(tmp_path), wanted_of({"w": weights(2)}, replace=True), ranks=2)


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (flat([2], 1), "each axis from 0 to 0 at most once"),
        (flat([2], -2), "each axis from 0 to 0 at most once"),
        (flat([2], 1 << 40), "each axis from 0 to 0"),
        (layout([2], ((0,), (0,))), "not one for 1 dimensions"),
        (flat([2], 0, -1), "not one for 1 dimensions"),
        (layout([2], ()), "not one for 1 dimensions"),
        (flat([2], -1, step=1, size=3), "optimizer sharding"),
        (flat([2], -1, step=1, size=-2), "optimizer sharding"),
        (flat([2], -1, step=0, size=2), "optimizer sharding"),
        (flat([2], -1, step=1 << 70, size=2), "optimizer sharding"),
        (flat([2], 0, step=1, size=2), "optimizer sharding"),
        (flat([2], -1, step=2, size=2), "ranks that hold a block's parts are 1 apart"),
        (flat([0], 0), "expected positive numbers"),
        (flat([-2], 0), "expected positive numbers"),
        (flat([1 << 31, 1 << 31], 0), "there are at most 65536"),
        (flat([1], 0), "rank 1, and the strategy says that there are 1"),
        (replace(flat([2], 0), field=4), "cut by fields or by hand"),
        (replace(flat([2], 0), param_split_shape=(1, 3)), "cut by fields or by hand"),
    ],
)
def test_a_strategy_that_can_not_be_is_refused(tmp_path, strategy, expected):
    put_ranks(tmp_path, [{"w": weights(2)}] * 2)
    with pytest.raises((CorruptCheckpoint, LayoutError, UnsupportedFormat), match=expected):
        read(tmp_path, strategy={"w": strategy})


def test_device_matrices_of_different_sizes_are_refused(tmp_path):
    with pytest.raises(CorruptCheckpoint, match="4 for 'w', 2 for 'v'"):
        rank_layout({"w": flat([2, 2], 0), "v": flat([2], 0)})


def test_too_many_ranks_over_the_stages_are_refused():
    parameters = {f"{stage}-w": flat([1 << 16], 0) for stage in range(2)}
    with pytest.raises(CorruptCheckpoint, match="131072 ranks"):
        rank_layout(parameters)


def test_shapes_that_differ_between_ranks_are_refused(tmp_path):
    put_ranks(tmp_path, [{"w": weights(2)}, {"w": weights(3)}])
    with pytest.raises(
        CorruptCheckpoint, match=r"float32 \[2\] on rank 0; float32 \[3\] on rank 1"
    ):
        read(tmp_path, strategy={"w": flat([2], 0)})


def test_dtypes_that_differ_between_ranks_are_refused(tmp_path):
    put_ranks(tmp_path, [{"w": weights(2)}, {"w": weights(2, dtype=np.int32)}])
    with pytest.raises(CorruptCheckpoint, match=r"float32.* on rank 0; int32.* on rank 1"):
        read(tmp_path)


def test_a_name_that_is_a_string_on_one_rank_and_a_tensor_on_another_is_refused(tmp_path):
    put(tmp_path / "rank_0" / "n-1_1.ckpt", {"w": weights(2)})
    put(tmp_path / "rank_1" / "n-1_1.ckpt", {"x": weights(2)}, {"w": "text"})
    with pytest.raises(CorruptCheckpoint, match="'w' is a tensor on one rank"):
        read(tmp_path)


def test_a_scalar_is_not_cut(tmp_path):
    put_ranks(tmp_path, [{"s": np.float32(1).reshape(())}] * 2)
    assert read(tmp_path, strategy={"s": flat([2], -1)})["s"] == 1
    with pytest.raises(CorruptCheckpoint, match="a scalar is cut"):
        read(tmp_path, strategy={"s": flat([2], -1, step=1, size=2)})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 40,
        (GOLDEN / "s4.ckpt").read_bytes()[:-1],
        encode_strategy(StrategyFile({})),
        b"{}",
    ],
)
def test_what_is_no_strategy_file_is_refused(tmp_path, data):
    (tmp_path / "s.ckpt").write_bytes(data)
    with pytest.raises((CorruptCheckpoint, LayoutError), match=r"s\.ckpt"):
        rank_layout(tmp_path / "s.ckpt")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "the file: expected an object"),
        ('{"parallel_layout_item": {"w": {"dev_matrix": [2]}}}', "tensor_map: expected a list"),
        ('{"parallel_layout_item": {"w": {"dev_matrix": [2.5], "tensor_map": [0]}}}', "an integer"),
        ('{"parallel_layout_item": {"w": {"dev_matrix": 2, "tensor_map": [0]}}}', "a list"),
        ('{"parallel_layout_item": {"w": {"dev_matrix": [true], "tensor_map": []}}}', "an integer"),
        ('{"parallel_layout_item": {"w": 3}}', "expected an object"),
        ('{"parallel_strategy_item": {"o": {"parallel_strategy": 1}}}', "expected a list"),
        ('{"current_stage": "1"}', "an integer"),
        (f'{{"current_stage": {"9" * 5000}}}', "not JSON"),
    ],
)
def test_what_is_no_json_strategy_is_refused(content, expected):
    with pytest.raises(CorruptCheckpoint, match=f"here.json: .*{expected}"):
        decode_json_strategy(content.encode(), path="here.json")


@given(st.binary(max_size=200))
def test_no_bytes_make_the_strategy_reader_fail_otherwise(data):
    for decode in (decode_strategy, decode_json_strategy):
        with contextlib.suppress(CorruptCheckpoint):
            decode(data)


def test_stages_that_contradict_one_another_are_refused(tmp_path):
    for number in range(2):
        strategy = StrategyFile({"w": flat([number + 1], -1)}, {"o": OperatorStrategy(0)})
        (tmp_path / f"{number}.ckpt").write_bytes(encode_strategy(strategy))
    with pytest.raises(LayoutError, match="another strategy for stage 0"):
        rank_layout(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"ranks": 0},
        {"ranks": 1 << 20},
        {"ranks": 2, "strategy": {"w": flat([2], 0)}},
        {"prefix": "a/b"},
        {"prefix": ""},
        {"file_format": "pt"},
    ],
)
def test_options_that_can_not_be_are_refused(tmp_path, options):
    with pytest.raises(UnsupportedFormat):
        RANKS.write(Place.at(tmp_path / "r"), wanted_of({"w": weights(2)}), **options)


def test_a_strategy_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointNotFound, match="expected a strategy file"):
        rank_layout(tmp_path / "s.ckpt")
