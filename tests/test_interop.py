"""Shard files are safetensors files: what reads those reads them."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import safetensors
import safetensors.numpy

import distckpt
from distckpt import FlatShard, PerRank, Shard, dtypes
from distckpt.testing import run_ranks

# What safetensors has no type for is stored as bytes; what its numpy reader doesn't know is told.
_NATIVE = {entry.name: entry for entry in dtypes.TABLE if entry.safetensors is not None}
_AS_BYTES = {entry.name: entry for entry in dtypes.TABLE if entry.safetensors is None}
_NUMPY_CANT = {"float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"}


def some(entry, shape, seed=0):
    """An array of any values of a dtype."""
    rng = np.random.default_rng(seed)
    if entry.name == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    if entry.name == "bfloat16" or entry.numpy.kind in "fc":
        return rng.normal(size=shape).astype(entry.numpy)
    return rng.integers(0, 2, shape).astype(entry.numpy)


@pytest.fixture
def of_one_rank(tmp_path):
    """A checkpoint of one rank: its state, and its one file."""
    state = {name: some(entry, (3, 5), seed) for seed, (name, entry) in enumerate(_NATIVE.items())}
    state["scalar"] = np.float32(2.5)
    state["empty"] = np.zeros((0, 4), np.float64)
    state["nested"] = {"layer.0": {"weight": np.arange(6, dtype=np.int32).reshape(2, 3)}}
    distckpt.save(tmp_path, state | {"epoch": 3})
    (path,) = tmp_path.glob("*.safetensors")
    state["nested.layer.0.weight"] = state.pop("nested")["layer.0"]["weight"]
    return state, path


def header_of(path):
    """The header, and where the data starts: as the format of safetensors says."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), 8 + length, data


def test_a_checkpoint_of_one_rank_has_all_tensors_by_name_for_numpy(of_one_rank):
    state, path = of_one_rank
    with safetensors.safe_open(path, framework="numpy") as file:
        assert set(file.keys()) == state.keys() | {"__crc32c__"}
        for name in state.keys() - _NUMPY_CANT:
            found = file.get_tensor(name)
            expected = np.asarray(state[name])
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert found.tobytes() == expected.tobytes()


def test_a_checkpoint_of_one_rank_has_all_tensors_by_name_for_torch(of_one_rank):
    import torch

    state, path = of_one_rank
    with safetensors.safe_open(path, framework="pt") as file:
        assert set(file.keys()) == state.keys() | {"__crc32c__"}
        for name, array in state.items():
            found = file.get_tensor(name)
            expected = np.asarray(array)
            assert tuple(found.shape) == expected.shape
            assert found.element_size() == expected.itemsize
            if found.numel():
                raw = found.reshape(-1).view(torch.uint8).numpy()
                assert raw.tobytes() == expected.tobytes()
        types = {name: file.get_tensor(name).dtype for name in _NATIVE}
    assert types == {name: getattr(torch, name) for name in _NATIVE}


def test_a_whole_file_is_loaded_by_torch_at_once(of_one_rank):
    import safetensors.torch
    import torch

    state, path = of_one_rank
    found = safetensors.torch.load_file(path)
    assert found.keys() == state.keys() | {"__crc32c__"}
    assert torch.equal(found["float32"], torch.from_numpy(state["float32"]))
    assert found["bfloat16"].dtype == torch.bfloat16


def test_a_part_of_a_tensor_is_read_by_numpy_and_torch(of_one_rank):
    state, path = of_one_rank
    for framework in ("numpy", "pt"):
        with safetensors.safe_open(path, framework=framework) as file:
            part = np.asarray(file.get_slice("float64")[1:3, 2:])
        assert np.array_equal(part, state["float64"][1:3, 2:])


def test_a_file_says_what_wrote_it(of_one_rank):
    _, path = of_one_rank
    with safetensors.safe_open(path, framework="numpy") as file:
        found = file.metadata()
    assert found == {"format": "distckpt", "version": "1", "block_bytes": "4194304"}


def test_what_safetensors_has_no_type_for_is_stored_as_bytes(tmp_path):
    state = {name: some(entry, (3, 5), 7) for name, entry in _AS_BYTES.items()}
    distckpt.save(tmp_path, state)
    (path,) = tmp_path.glob("*.safetensors")
    found = safetensors.numpy.load_file(path)
    for name, array in state.items():
        assert found[name].dtype == np.uint8
        assert found[name].shape[:2] == (3, 5)
        assert found[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("framework", ["numpy", "pt"])
def test_the_pieces_of_several_ranks_are_named_by_their_boxes_and_make_up_the_whole(
    tmp_path, framework
):
    array = np.arange(60.0).reshape(6, 10)
    flat = np.arange(70, dtype=np.int16).reshape(7, 10)

    def save(comm):
        rows = slice(2 * comm.rank, 2 * comm.rank + 2)
        run = slice(*[(0, 23), (23, 50), (50, 70)][comm.rank])
        state = {
            "w": Shard(array[rows], (rows.start, 0), array.shape),
            "f": FlatShard(flat.reshape(-1)[run], run.start, flat.shape),
            "r": np.arange(9, dtype=np.int8),
            "rng": PerRank(comm.rank),
        }
        distckpt.save(tmp_path, state, comm=comm)

    run_ranks(3, save)
    found = {name: np.zeros_like(whole) for name, whole in (("w", array), ("f", flat))}
    found["r"] = np.full(9, -1, np.int8)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 3
    for rank, path in enumerate(files):
        with safetensors.safe_open(path, framework=framework) as file:
            assert f"rng@rank{rank}" in file.keys()  # noqa: SIM118  it is no dict
            for key in file.keys():  # noqa: SIM118
                name, _, box = key.partition("@")
                if name in found:
                    ends = [part.split(":") for part in box.split(",")]
                    where = tuple(slice(int(start), int(stop)) for start, stop in ends)
                    found[name][where] = np.asarray(file.get_tensor(key))
    assert np.array_equal(found["w"], array)
    assert np.array_equal(found["f"], flat)
    assert np.array_equal(found["r"], np.arange(9))


def test_a_file_of_many_blocks_is_read_too(tmp_path):
    array = np.arange(3_000_000, dtype=np.float32)
    distckpt.save(tmp_path, {"w": array, "b": np.ones(3, np.int8)})
    (path,) = tmp_path.glob("*.safetensors")
    found = safetensors.numpy.load_file(path)
    assert np.array_equal(found["w"], array)
    assert found["__crc32c__"].nbytes == 4 * 3
    with safetensors.safe_open(path, framework="pt") as file:
        assert np.array_equal(file.get_tensor("w").numpy(), array)


def test_the_data_are_aligned_and_leave_no_hole(of_one_rank):
    _, path = of_one_rank
    header, start, data = header_of(path)
    assert start % 4096 == 0
    assert header.pop("__metadata__")["format"] == "distckpt"
    ends = sorted(tuple(entry["data_offsets"]) for entry in header.values())
    assert ends[0][0] == 0
    assert all(stop == next_ for (_, stop), (next_, _) in itertools.pairwise(ends))
    assert start + ends[-1][1] == len(data)
    for name, entry in header.items():
        if name in _NATIVE:
            assert (start + entry["data_offsets"][0]) % _NATIVE[name].itemsize == 0


def test_names_of_any_characters_come_through(tmp_path):
    names = [
        "ünï.cödé",
        "with space",
        'q"uote',
        "back\\slash",
        "new\nline",
        "",
        "a/b",
        "\x1f",
        "🧠",
    ]
    distckpt.save(tmp_path, {name: np.full(2, index) for index, name in enumerate(names)})
    (path,) = tmp_path.glob("*.safetensors")
    found = safetensors.numpy.load_file(path)
    assert {name: found[name][0] for name in names} == {
        name: index for index, name in enumerate(names)
    }


def test_tensors_of_torch_are_saved_and_filled_where_they_are(tmp_path):
    import torch

    weight = torch.arange(6.0).reshape(2, 3)
    parameter = torch.nn.Parameter(torch.ones(4))
    state = {"w": weight.T, "p": parameter, "shard": Shard(weight, (0, 0), (2, 3))}
    distckpt.save(tmp_path, state)
    assert np.array_equal(distckpt.load(tmp_path)["w"], weight.T.numpy())
    kept = torch.zeros(3, 2), torch.nn.Parameter(torch.zeros(4)), torch.zeros(2, 3)
    net = {"w": kept[0], "p": kept[1], "shard": Shard(kept[2], (0, 0), (2, 3))}
    distckpt.load_into(tmp_path, net, strict=True)
    assert net["w"] is kept[0]
    assert net["p"] is kept[1]
    assert torch.equal(kept[0], weight.T)
    assert torch.equal(kept[1], parameter)
    assert torch.equal(kept[2], weight)


def test_tensors_of_torch_keep_the_dtypes_that_numpy_has_not(tmp_path):
    import torch

    kinds = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    saved = {str(kind): torch.arange(-6.0, 6.0).reshape(3, 4).to(kind) for kind in kinds}
    saved["scalar"] = torch.tensor(1.5, dtype=torch.bfloat16, requires_grad=True)
    saved["turned"] = saved["torch.bfloat16"].T
    checkpoint = distckpt.save(tmp_path / "c", saved)
    assert checkpoint["scalar"].dtype.name == "bfloat16"

    net = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    places = {name: tensor.data_ptr() for name, tensor in net.items()}
    distckpt.load_into(tmp_path / "c", net, strict=True)
    for name, tensor in saved.items():
        assert torch.equal(net[name].float(), tensor.detach().float()), name
        assert net[name].data_ptr() == places[name]  # filled where it is
