"""Real MindSpore cuts what we have written as we do, and reads our strategy files."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest

mindspore = pytest.importorskip("mindspore")

import distckpt  # noqa: E402
from distckpt.codec.strategy import (  # noqa: E402
    OperatorStrategy,
    ParameterStrategy,
    StrategyFile,
    decode_strategy,
    encode_json_strategy,
    encode_strategy,
)
from distckpt.formats import find  # noqa: E402
from distckpt.formats.base import Place, Wanted  # noqa: E402
from distckpt.mindspore.transform import (  # noqa: E402
    build_searched_strategy,
    merge_pipeline_strategys,
    transform_checkpoints,
)

OPERATORS = {"op0": OperatorStrategy(0, ((1, 1),))}
SHAPES = {"w": (8, 4), "b": (16,), "e": (16, 6), "n3": (8, 4, 4)}


class Array:
    def __init__(self, name, array):
        self.name, self.array = name, array
        self.shape, self.dtype = array.shape, array.dtype

    def read(self, region=None):
        return np.array(self.array if region is None else self.array[region.slices], order="C")


def flat(matrix, *tensor_map, step=0, size=0):
    rows = tensor_map if any(isinstance(row, tuple) for row in tensor_map) else (tensor_map,)
    rows = tuple(row if isinstance(row, tuple) else (row,) for row in rows)
    return ParameterStrategy(
        tuple(matrix), rows, opt_weight_shard_step=step, opt_weight_shard_size=size
    )


LAYOUTS = {
    "rows": {
        "w": flat([4], 0, -1),
        "b": flat([4], 0),
        "e": flat([4], 0, -1),
        "n3": flat([4], -1, 0, -1),
    },
    "grid and optimizer": {
        "w": flat([2, 2], 1, 0),
        "b": flat([2, 2], -1, step=1, size=4),
        "e": flat([2, 2], 0, -1, step=2, size=2),
        "n3": flat([2, 2], -1, 0, 1),
    },
    "nested": {
        "w": flat([2, 2, 2], (1, 0), (2,)),
        "b": flat([2, 2, 2], 2),
        "e": flat([2, 2, 2], (0, 2), (-1,)),
        "n3": flat([2, 2, 2], (-1,), (2, 0), (1,)),
    },
    "replicas apart": {
        "w": flat([2, 2, 2], 1, -1, step=1, size=4),
        "b": flat([2, 2, 2], -1),
        "e": flat([2, 2, 2], 1, -1, step=1, size=2),
        "n3": flat([2, 2, 2], 2, 1, 0),
    },
    "all replicas": {
        "w": flat([2, 2, 2], 0, -1, step=2, size=-1),
        "b": flat([2, 2, 2], -1),
        "e": flat([2, 2, 2], -1, 1, step=1, size=2),
        "n3": flat([2, 2, 2], 0, -1, -1, step=2, size=2),
    },
    "two": {
        "w": flat([2], -1, 0),
        "b": flat([2], 0),
        "e": flat([2], -1, -1),
        "n3": flat([2], 0, -1, -1),
    },
}


@pytest.fixture
def whole():
    return {
        name: np.arange(prod(shape), dtype=np.float32).reshape(shape)
        for name, shape in SHAPES.items()
    }


def strategy_file(path, layouts):
    path.write_bytes(encode_strategy(StrategyFile(layouts, OPERATORS)))
    return str(path)


def write(folder, whole, strategy):
    tensors = [Array(name, array) for name, array in whole.items()]
    options = {"strategy": strategy, "prefix": "net-1_"}
    writing = find("mindspore-ranks").write(Place.at(folder), Wanted(tensors), **options)
    for part in writing.parts:
        part()
    writing.commit()


def read(folder, strategy):
    checkpoint = distckpt.open(folder, options={"strategy": strategy})
    return {name: checkpoint[name][...] for name in checkpoint}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(found[name], array), name


@pytest.mark.parametrize("layouts", LAYOUTS)
def test_mindspore_joins_what_we_have_cut(tmp_path, whole, layouts):
    strategy = strategy_file(tmp_path / "s.ckpt", LAYOUTS[layouts])
    write(tmp_path / "src", whole, strategy)
    mindspore.transform_checkpoints(
        str(tmp_path / "src"), str(tmp_path / "dst"), "t", strategy, None
    )
    same(distckpt.load(tmp_path / "dst" / "rank_0" / "t0.ckpt"), whole)


@pytest.mark.parametrize("layouts", LAYOUTS)
def test_we_join_what_mindspore_has_cut(tmp_path, whole, layouts):
    strategy = strategy_file(tmp_path / "s.ckpt", LAYOUTS[layouts])
    parameters = [{"name": n, "data": mindspore.Tensor(a)} for n, a in whole.items()]
    (tmp_path / "src" / "rank_0").mkdir(parents=True)
    mindspore.save_checkpoint(parameters, str(tmp_path / "src" / "rank_0" / "net.ckpt"))
    mindspore.transform_checkpoints(
        str(tmp_path / "src"), str(tmp_path / "dst"), "t", None, strategy
    )
    same(read(tmp_path / "dst", strategy), whole)


def test_both_cut_anew_alike(tmp_path, whole):
    source = strategy_file(tmp_path / "4.ckpt", LAYOUTS["grid and optimizer"])
    target = strategy_file(tmp_path / "2.ckpt", LAYOUTS["two"])
    write(tmp_path / "src", whole, source)
    mindspore.transform_checkpoints(
        str(tmp_path / "src"), str(tmp_path / "theirs"), "t", source, target
    )
    transform_checkpoints(tmp_path / "src", tmp_path / "ours", "t", source, target)
    for rank in range(2):
        name = f"rank_{rank}/t{rank}.ckpt"
        same(distckpt.load(tmp_path / "ours" / name), distckpt.load(tmp_path / "theirs" / name))


def test_mindspore_reads_our_strategy_files(tmp_path):
    layouts = LAYOUTS["grid and optimizer"]
    protobuf = strategy_file(tmp_path / "s.ckpt", layouts)
    (tmp_path / "s.json").write_bytes(encode_json_strategy(StrategyFile(layouts, OPERATORS)))
    for path in (protobuf, str(tmp_path / "s.json")):
        found = mindspore.build_searched_strategy(path)
        assert found.keys() == layouts.keys()
        for name, theirs in found.items():
            assert tuple(theirs.dev_matrix[0].dim) == layouts[name].dev_matrix
            assert tuple(theirs.tensor_map[0].dim) == layouts[name].tensor_map[0]
            assert theirs.opt_weight_shard_size == layouts[name].opt_weight_shard_size


def test_both_merge_pipeline_stages_alike(tmp_path, whole):
    (tmp_path / "stages").mkdir()
    for stage, names in enumerate((("w", "b"), ("e", "n3"))):
        layouts = {name: LAYOUTS["two"][name] for name in names}
        strategy = StrategyFile(layouts, {f"op{stage}": OperatorStrategy(stage, ((1, 1),))})
        (tmp_path / "stages" / f"s{stage}.ckpt").write_bytes(encode_strategy(strategy))
    mindspore.merge_pipeline_strategys(str(tmp_path / "stages"), str(tmp_path / "theirs.ckpt"))
    merge_pipeline_strategys(tmp_path / "stages", tmp_path / "ours.ckpt")
    ours = build_searched_strategy(tmp_path / "ours.ckpt")
    assert ours == decode_strategy((tmp_path / "theirs.ckpt").read_bytes()).parameters
    write(tmp_path / "src", whole, tmp_path / "ours.ckpt")
    mindspore.transform_checkpoints(
        str(tmp_path / "src"), str(tmp_path / "dst"), "t", str(tmp_path / "theirs.ckpt"), None
    )
    same(distckpt.load(tmp_path / "dst" / "rank_0" / "t0.ckpt"), whole)
