"""Folders of torch.distributed.checkpoint: read without torch, and torch reads what was written."""

from __future__ import annotations

import io
import os
import pickle
import threading
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata

import distckpt
from distckpt import dtypes
from distckpt.errors import (
    CheckpointError,
    CheckpointExists,
    CorruptCheckpoint,
    UnsupportedFormat,
)
from distckpt.formats import find
from distckpt.formats.base import Place, Wanted

FORMAT = find("dcp")

_DTYPES = [
    "bool",
    "uint8",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
    "complex64",
    "complex128",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
]


class Tensor:
    """A tensor to be written."""

    def __init__(self, name, array):
        self.name, self.array = name, np.asarray(array)
        self.shape, self.dtype = self.array.shape, self.array.dtype

    def read(self, region=None):
        return np.array(self.array if region is None else self.array[region.slices], order="C")


def begin(path, tensors, values=None, *, replace=False, token="7", **options):
    wanted = Wanted(
        [Tensor(name, array) for name, array in tensors.items()],
        values or {},
        token=token,
        replace=replace,
    )
    return FORMAT.write(Place.at(path), wanted, **options)


def write(path, tensors, values=None, **options):
    writing = begin(path, tensors, values, **options)
    threads = [threading.Thread(target=part) for part in writing.parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writing.commit()
    return writing


def opened(path):
    return distckpt.open(path, format="dcp")


def read(path):
    checkpoint = opened(path)
    return {name: checkpoint[name].read() for name in checkpoint}, dict(checkpoint.values)


def save(path, state):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=path, no_dist=True)
    return path


def load(path, state):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=path, no_dist=True)
    return state


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def edited(path, change):
    """Change what a folder's metadata say."""
    file = path / ".metadata"
    content = pickle.loads(file.read_bytes())
    change(content)
    file.write_bytes(pickle.dumps(content))


# ------------------------------------------------------------------------------------------ reading


def test_what_torch_saved_is_read_bit_for_bit(tmp_path):
    state = {name: torch.arange(6).to(getattr(torch, name)).reshape(2, 3) for name in _DTYPES}
    state |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "turned": torch.ones(3, 2).T}
    save(tmp_path / "c", state)
    found, _ = read(tmp_path / "c")
    assert {*found} == {*state}
    for name, tensor in state.items():
        assert found[name].shape == tensor.shape
        assert found[name].tobytes() == bits(tensor), name


def test_a_model_and_its_optimizer_are_read_under_flat_names(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3,
             "name": "é", "none": None, "bytes": b"\0\xff"}  # fmt: skip
    found, values = read(save(tmp_path / "c", state))
    assert found["model.weight"].tolist() == model.weight.tolist()
    assert found["optimizer.state.0.exp_avg"].shape == (2, 3)
    assert values["optimizer.param_groups.0.lr"] == 0.01
    assert {name: values[name] for name in ("epoch", "name", "none", "bytes")} == {
        "epoch": 3, "name": "é", "none": None, "bytes": b"\0\xff",
    }  # fmt: skip


def test_pieces_of_several_ranks_become_one_tensor(tmp_path):
    whole = torch.arange(28.0).reshape(7, 4)
    folder = tmp_path / "c"
    folder.mkdir()
    places, chunks = {}, []
    for rank, rows in enumerate([slice(3, 7), slice(0, 3)]):
        start = (rows.start, 0)
        buffer = io.BytesIO(b"something before")
        buffer.seek(0, 2)
        offset = buffer.tell()
        torch.save(whole[rows].clone(), buffer)
        file = f"__{rank}_0.distcp"
        (folder / file).write_bytes(buffer.getvalue())
        chunks.append(
            metadata.ChunkStorageMetadata(torch.Size(start), torch.Size(whole[rows].shape))
        )
        places[metadata.MetadataIndex("w", start, rank)] = filesystem._StorageInfo(
            file, offset, buffer.tell() - offset
        )
    described = metadata.TensorStorageMetadata(
        metadata.TensorProperties(torch.float32), whole.shape, chunks
    )
    content = metadata.Metadata({"w": described}, None, places)
    (folder / ".metadata").write_bytes(pickle.dumps(content))
    checkpoint = opened(folder)
    assert np.array_equal(checkpoint["w"].read(), whole.numpy())
    assert np.array_equal(checkpoint["w"][2:5, 1:], whole.numpy()[2:5, 1:])
    # A piece that is missing leaves a hole.
    edited(folder, lambda content: content.state_dict_metadata["w"].chunks.pop())
    with pytest.raises(CorruptCheckpoint, match="w"):
        opened(folder)


def test_objects_that_are_more_than_values_are_left_out_and_listed(tmp_path, caplog):
    state = {"w": torch.ones(1), "path": Path("a"), "device": torch.device("cpu"), "set": {1}}
    checkpoint = opened(save(tmp_path / "c", state))
    assert [*checkpoint] == ["w"]
    left_out = checkpoint.metadata["left_out"]
    assert {*left_out} == {"path", "device", "set"}
    assert "pathlib" in left_out["path"]
    assert "'path'" in caplog.text


def test_a_folder_in_any_store_is_read(tmp_path):
    import fsspec

    save(tmp_path / "c", {"w": torch.arange(3)})
    memory = fsspec.filesystem("memory")
    for file in names_in(tmp_path / "c"):
        memory.pipe_file(f"/dcp/run/{file}", (tmp_path / "c" / file).read_bytes())
    assert opened("memory://dcp/run")["w"].read().tolist() == [0, 1, 2]


def test_a_folder_is_told_by_its_metadata(tmp_path):
    save(tmp_path / "c", {"w": torch.arange(3)})
    assert FORMAT.sniff(Place.at(tmp_path / "c"))
    assert not FORMAT.sniff(Place.at(tmp_path / "c" / ".metadata"))
    assert not FORMAT.sniff(Place.at(tmp_path))
    assert not FORMAT.sniff(Place.at(tmp_path / "nothing"))


# ------------------------------------------------------------------------------------------ writing


def test_torch_loads_what_was_written(tmp_path):
    arrays = {name: np.arange(6).reshape(2, 3).astype(dtypes.BY_NAME[name].numpy)
              for name in _DTYPES}  # fmt: skip
    arrays |= {"scalar": np.float32(2.5), "empty": np.zeros((0, 3), "i2")}
    values = {"epoch": 3, "name": "é", "none": None, "flag": True, "bytes": b"\0\xff", "x": 0.5}
    write(tmp_path / "c", arrays, values)
    state = {name: torch.zeros(array.shape, dtype=getattr(torch, array.dtype.name))
             for name, array in arrays.items()}  # fmt: skip
    state |= dict.fromkeys(values, "?")
    load(tmp_path / "c", state)
    assert {name: state.pop(name) for name in values} == values
    for name, tensor in state.items():
        assert bits(tensor) == arrays[name].tobytes(), name
    found, again = read(tmp_path / "c")
    assert again == values
    assert {name: array.tobytes() for name, array in found.items()} == {
        name: array.tobytes() for name, array in arrays.items()
    }


def test_torchs_own_converter_takes_what_was_written(tmp_path):
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    write(tmp_path / "c", {"layer.w": np.arange(3.0)}, {"epoch": 3})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(tmp_path / "c", tmp_path / "net.pt")
    found = torch.load(tmp_path / "net.pt", weights_only=True)
    assert found["layer.w"].tolist() == [0, 1, 2]
    assert found["epoch"] == 3


def test_large_tensors_are_cut_and_spread_over_files(tmp_path):
    arrays = {"w": np.arange(1000.0).reshape(100, 10), "row": np.arange(300.0).reshape(1, 300),
              "b": np.ones(3, ml_dtypes.bfloat16)}  # fmt: skip
    writing = write(tmp_path / "c", arrays, chunk_bytes=1000, file_bytes=3000)
    files = [file for file in names_in(tmp_path / "c") if file.endswith(".distcp")]
    assert len(files) == len(writing.parts) > 3
    sizes = sorted((tmp_path / "c" / file).stat().st_size for file in files)
    assert sizes == sorted(writing.part_bytes)
    assert max(sizes) < 6000
    state = {"w": torch.zeros(100, 10, dtype=torch.float64), "row": torch.zeros(1, 300).double()}
    load(tmp_path / "c", state)
    assert np.array_equal(state["w"].numpy(), arrays["w"])
    assert np.array_equal(state["row"].numpy(), arrays["row"])
    checkpoint = opened(tmp_path / "c")
    assert np.array_equal(checkpoint["w"][11:37, 3:5], arrays["w"][11:37, 3:5])


def test_the_metadata_are_the_commit_and_what_was_there_stays(tmp_path):
    folder = tmp_path / "c"
    write(folder, {"w": np.ones(2)}, token="1")
    with pytest.raises(CheckpointExists):
        begin(folder, {"w": np.zeros(2)})
    writing = begin(folder, {"w": np.zeros(2)}, replace=True, token="2")
    writing.parts[0]()
    assert read(folder)[0]["w"].tolist() == [1, 1]
    writing.abort()
    assert names_in(folder) == [".metadata", "__0_0.1.distcp"]
    write(folder, {"w": np.zeros(2)}, replace=True, token="3")
    assert read(folder)[0]["w"].tolist() == [0, 0]
    assert names_in(folder) == [".metadata", "__0_0.3.distcp"]


# ---------------------------------------------------------------------------------------- bad input


@pytest.fixture
def folder(tmp_path):
    """A folder of one tensor, one value."""
    return save(tmp_path / "c", {"w": torch.arange(6.0).reshape(2, 3), "epoch": 3})


class Evil:
    """Runs something when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_metadata_that_run_something_are_refused_naming_it(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    edited(folder, lambda content: setattr(content, "planner_data", Evil()))
    with pytest.raises(UnsupportedFormat, match=r"posix\.mkdir"):
        opened(folder)
    assert names_in(tmp_path) == ["c"]


def test_a_tensor_that_runs_something_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    torch.save(Evil(), buffer)
    (folder / "evil.distcp").write_bytes(buffer.getvalue())

    def change(content):
        for index, info in content.storage_data.items():
            if index.fqn == "w":
                info.relative_path, info.offset, info.length = "evil.distcp", 0, buffer.tell()

    edited(folder, change)
    with pytest.raises(CheckpointError, match=r"posix\.mkdir"):
        read(folder)
    assert names_in(tmp_path) == ["c"]


def of(name):
    return lambda content: next(
        info for index, info in content.storage_data.items() if index.fqn == name
    )


@pytest.mark.parametrize(
    "path",
    ["../x.distcp", "/etc/hostname", "a/../../x", "http://x/y", "..\\x", "", "a//b", None, 3],
)
def test_files_outside_the_folder_are_refused(path, folder):
    edited(folder, lambda content: setattr(of("w")(content), "relative_path", path))
    with pytest.raises(CorruptCheckpoint, match="no file of this folder"):
        opened(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: setattr(of("w")(c), "offset", -1), "lies in bytes -1"),
        (lambda c: setattr(of("w")(c), "length", 1 << 60), "copy the folder again"),
        (lambda c: setattr(of("w")(c), "length", "x"), "TypeError"),
        (lambda c: setattr(of("w")(c), "length", 3), "24 bytes, and 3 are stored"),
        (lambda c: setattr(of("w")(c), "relative_path", "gone.distcp"), "gone.distcp is missing"),
        (lambda c: setattr(of("w")(c), "transform_descriptors", ["zstd"]), "zstd"),
        (lambda c: c.storage_data.clear(), "is in no file"),
        (lambda c: setattr(c, "storage_data", None), "storage_data is a NoneType"),
        (lambda c: setattr(c, "state_dict_metadata", [1]), "AttributeError"),
        (lambda c: c.state_dict_metadata.update(x=3), "'x' is a int"),
        (lambda c: setattr(c.state_dict_metadata["w"], "size", torch.Size([9, 9])), "w"),
        (lambda c: setattr(c.state_dict_metadata["w"], "size", torch.Size([1 << 61, 9])), "w"),
        (lambda c: setattr(c.state_dict_metadata["w"], "size", torch.Size([1, 3])), "outside its"),
        (lambda c: setattr(c.state_dict_metadata["w"], "size", (2, 3.0)), "extents"),
        (lambda c: setattr(c.state_dict_metadata["w"], "chunks", []), "w"),
        (
            lambda c: setattr(c.state_dict_metadata["w"].properties, "dtype", torch.qint8),
            "qint8, which numpy lacks",
        ),
        (
            lambda c: setattr(c.state_dict_metadata["w"].properties, "dtype", torch.complex128),
            "holds|takes|expected|stored",
        ),
    ],
)
def test_metadata_that_lie_are_refused(change, said, folder):
    edited(folder, change)
    with pytest.raises((CheckpointError, distckpt.LoadFailed), match=said):
        read(folder)


def test_a_metadata_file_that_is_something_else_is_refused(folder):
    (folder / ".metadata").write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(CorruptCheckpoint, match=r"\.metadata: expected the metadata of torch"):
        opened(folder)
    (folder / ".metadata").write_bytes(b"\x80\x04")
    with pytest.raises(CorruptCheckpoint, match="EOFError"):
        opened(folder)


def test_a_flipped_bit_is_found_when_the_tensor_is_read(folder):
    file = folder / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[data.index(np.arange(6, dtype="f4").tobytes()) + 9] ^= 4
    file.write_bytes(data)
    checkpoint = opened(folder)
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint["w"].read()


def test_metadata_cut_anywhere_are_refused(folder):
    file = folder / ".metadata"
    data = file.read_bytes()
    for length in range(1, len(data), 13):
        file.write_bytes(data[:length])
        with pytest.raises(CorruptCheckpoint):
            opened(folder)


def test_what_torch_can_not_hold_is_refused_all_at_once(tmp_path):
    with pytest.raises(UnsupportedFormat, match=r"(?s)'four'.*int4.*'huge'"):
        begin(tmp_path / "c", {"four": np.ones(2, ml_dtypes.int4)}, {"huge": 1 << 3000})
    assert not names_in(tmp_path)
