"""Files of torch.save: read and written without torch, and torch reads what was written."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections import Counter, OrderedDict

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import distckpt
from distckpt import dtypes
from distckpt.errors import (
    CheckpointError,
    CheckpointExists,
    CorruptCheckpoint,
    UnsupportedFormat,
)
from distckpt.formats import torch_pickle, torch_writing
from distckpt.formats.base import Place, Wanted
from distckpt.formats.torch import FORMAT

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
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
]


class Tensor:
    """A tensor to be written, which counts how it is read."""

    def __init__(self, name, array):
        self.name, self.array = name, np.asarray(array)
        self.shape, self.dtype = self.array.shape, self.array.dtype
        self.regions = []

    def read(self, region=None):
        self.regions.append(region)
        return np.array(self.array if region is None else self.array[region.slices], order="C")


def write(path, tensors, values=None, form=FORMAT, **options):
    wanted = Wanted(
        [Tensor(name, array) for name, array in tensors.items()],
        values or {},
        token="7",
        replace=options.pop("replace", False),
    )
    writing = form.write(Place.at(path), wanted, **options)
    for part in writing.parts:
        part()
    writing.commit()
    return writing


def read(path, form="torch"):
    checkpoint = distckpt.open(path, format=form)
    return {name: checkpoint[name].read() for name in checkpoint}, dict(checkpoint.values)


def saved(path, state, **options):
    torch.save(state, path, **options)
    return path


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def archive(path, entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in entries.items():
            file.writestr(f"net/{name}", data)
    return path


# ------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("name", _DTYPES)
def test_every_dtype_is_read_bit_for_bit(name, tmp_path):
    tensor = torch.arange(6).to(getattr(torch, name)).reshape(2, 3)
    found, _ = read(saved(tmp_path / "net.pt", {"w": tensor}))
    assert found["w"].dtype == dtypes.BY_NAME[name].numpy
    assert found["w"].tobytes() == bits(tensor)


def test_nested_containers_have_dotted_names_and_plain_values_stay_values(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "list": [torch.ones(1), torch.nn.Parameter(torch.ones(2)), (1, "two")],
        "buffer": torch.nn.Buffer(torch.ones(3)),
        "counts": Counter(a=2),
        "epoch": 3,
        "big": 1 << 70,
        "nothing": None,
        "flag": True,
        "bytes": b"\0\xff",
        "array": bytearray(b"ab"),
        "size": torch.Size([2, 3]),
        "loss": -0.5,
    }
    found, values = read(saved(tmp_path / "net.pt", state))
    assert found["state_dict.weight"].tolist() == model.weight.tolist()
    assert found["optimizer.state.1.exp_avg"].shape == (2,)
    assert [found[name].size for name in ("list.0", "list.1", "buffer")] == [1, 2, 3]
    assert values["optimizer.param_groups.0.betas.1"] == 0.999
    rest = {name: value for name, value in values.items() if not name.startswith("opt")}
    assert rest == {
        "list.2.0": 1, "list.2.1": "two", "counts.a": 2, "epoch": 3, "big": 1 << 70,
        "nothing": None, "flag": True, "bytes": b"\0\xff", "array": b"ab", "size.0": 2,
        "size.1": 3, "loss": -0.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    "state", [torch.ones(2), [torch.ones(2)], OrderedDict(a=torch.ones(2))], ids=["one", "list", ""]
)
def test_the_root_may_be_anything(state, tmp_path):
    found, _ = read(saved(tmp_path / "net.pt", state))
    assert [array.tolist() for array in found.values()] == [[1, 1]]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.data())
def test_any_strided_view_is_read_in_c_order(tmp_path, data):
    base = torch.arange(120).reshape(data.draw(st.sampled_from([(4, 5, 6), (120,), (2, 60)])))
    view = base
    for _ in range(data.draw(st.integers(0, 3))):
        dim = data.draw(st.integers(0, view.ndim - 1))
        start = data.draw(st.integers(0, view.shape[dim]))
        view = view.movedim(dim, 0)[start :: data.draw(st.integers(1, 3))]
    saved(tmp_path / "net.pt", {"w": view})
    checkpoint = distckpt.open(tmp_path / "net.pt", format="torch")
    assert np.array_equal(checkpoint["w"].read(), view.numpy())
    rows = slice(data.draw(st.integers(0, len(view))), None)
    assert np.array_equal(checkpoint["w"][rows], view.numpy()[rows])


def test_tensors_that_share_a_storage_are_each_read(tmp_path):
    base = torch.arange(10.0)
    state = {"all": base, "even": base[::2], "tail": base[7:], "wide": base[:1].expand(3, 2)}
    found, _ = read(saved(tmp_path / "net.pt", state))
    for name, tensor in state.items():
        assert np.array_equal(found[name], tensor.numpy()), name


def test_a_big_endian_file_is_read(tmp_path):
    swapped = {
        "data.pkl": torch_writing.dump(
            {
                "w": torch_pickle.Stored(
                    torch_pickle.Storage("0", "complex64", 2), dtypes.BY_NAME["complex64"],
                    0, (2,), (1,),
                )
            }
        ),
        "byteorder": b"big",
        "data/0": np.array([1 + 2j, 3 - 4j], ">c8").tobytes(),
        "version": b"3\n",
    }  # fmt: skip
    found, _ = read(archive(tmp_path / "net.pt", swapped))
    assert found["w"].tolist() == [1 + 2j, 3 - 4j]


def test_what_is_neither_a_tensor_nor_plain_is_left_out_and_listed(tmp_path, caplog):
    state = {"w": torch.ones(1), "device": torch.device("cpu"), "dtype": torch.float32, "set": {1}}
    checkpoint = distckpt.open(saved(tmp_path / "net.pt", state), format="torch")
    assert [*checkpoint] == ["w"]
    assert checkpoint.metadata["left_out"] == {
        "device": "torch.device('cpu')",
        "dtype": "torch.float32",
        "set": "set([1])",
    }
    assert "'dtype': torch.float32" in caplog.text


def test_only_what_is_wanted_is_read(tmp_path):
    saved(tmp_path / "net.pt", {"big": torch.zeros(1 << 22), "small": torch.arange(8)})
    checkpoint = distckpt.open(tmp_path / "net.pt", format="torch")
    tracemalloc.start()
    assert checkpoint["small"][2:4].tolist() == [2, 3]
    assert checkpoint["big"][:5].tolist() == [0] * 5
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 << 20  # of 16 MiB


def test_a_file_in_any_store_is_read():
    import fsspec

    data = io.BytesIO()
    torch.save({"w": torch.arange(3)}, data)
    fsspec.filesystem("memory").pipe_file("/nets/net.pt", data.getvalue())
    assert distckpt.open("memory://nets/net.pt", format="torch")["w"].read().tolist() == [0, 1, 2]


def test_a_module_is_loaded_by_suffix(tmp_path):
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    saved(tmp_path / "net.pth", {"state_dict": {"layer." + k: v for k, v in
                                                model.state_dict().items()}})  # fmt: skip
    checkpoint = distckpt.open(tmp_path / "net.pth", format="torch")
    checkpoint.load_into(other)
    assert torch.equal(other.weight, model.weight)


# ------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("mmap", [True, False])
def test_torch_reads_what_was_written(mmap, tmp_path):
    arrays = {name: np.arange(6).reshape(2, 3).astype(dtypes.BY_NAME[name].numpy)
              for name in _DTYPES}  # fmt: skip
    arrays |= {"scalar": np.float32(2.5), "empty": np.zeros((0, 3), "i2"), "layer.w.é": np.ones(1)}
    values = {"a": 1, "b": -(1 << 90), "c": "é", "d": b"\0\xff", "e": None, "f": True, "g": 0.1}
    write(tmp_path / "net.pth", arrays, values)
    found = torch.load(tmp_path / "net.pth", weights_only=True, mmap=mmap)
    assert {name: found.pop(name) for name in values} == values
    assert [*found] == [*arrays]
    for name, tensor in found.items():
        assert tensor.shape == arrays[name].shape
        assert bits(tensor) == arrays[name].tobytes(), name
        assert tensor.data_ptr() % tensor.element_size() == 0


def test_what_was_written_is_a_sound_zip_file_and_is_read_again(tmp_path):
    arrays = {"w": np.arange(12.0).reshape(3, 4), "b": np.ones(3, ml_dtypes.bfloat16)}
    writing = write(tmp_path / "net.pth", arrays, {"epoch": 3})
    assert zipfile.ZipFile(tmp_path / "net.pth").testzip() is None
    assert writing.part_bytes == [(tmp_path / "net.pth").stat().st_size]
    found, values = read(tmp_path / "net.pth")
    assert {name: array.tolist() for name, array in found.items()} == {
        name: array.tolist() for name, array in arrays.items()
    }
    assert values == {"epoch": 3}


def test_a_large_tensor_is_written_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("distckpt.formats.torch_writing._BLOCK_BYTES", 100)
    tensor = Tensor("w", np.arange(70.0).reshape(10, 7))
    writing = FORMAT.write(Place.at(tmp_path / "net.pt"), Wanted([tensor]))
    writing.parts[0]()
    writing.commit()
    assert len(tensor.regions) == 10
    assert np.array_equal(torch.load(tmp_path / "net.pt")["w"].numpy(), tensor.array)


def test_nothing_is_visible_before_the_commit_and_what_was_there_stays(tmp_path):
    path = saved(tmp_path / "net.pt", {"w": torch.ones(1)})
    with pytest.raises(CheckpointExists):
        write(path, {"w": np.zeros(1)})
    wanted = Wanted([Tensor("w", np.zeros(1))], token="7", replace=True)
    writing = FORMAT.write(Place.at(path), wanted)
    writing.parts[0]()
    assert torch.load(path)["w"].tolist() == [1]
    writing.abort()
    assert names_in(tmp_path) == ["net.pt"]
    write(path, {"w": np.zeros(1)}, replace=True)
    assert torch.load(path)["w"].tolist() == [0]
    assert names_in(tmp_path) == ["net.pt"]


# ---------------------------------------------------------------------------------------- bad input


class Evil:
    """Runs something when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def opened(path):
    return distckpt.open(path, format="torch")


def test_a_pickle_that_is_more_than_weights_is_refused_naming_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsupportedFormat, match=r"posix\.mkdir.*state_dict"):
        opened(saved(tmp_path / "net.pt", {"w": Evil()}))
    with pytest.raises(UnsupportedFormat, match=r"torch\.nn\.modules\.linear\.Linear"):
        opened(saved(tmp_path / "net.pt", torch.nn.Linear(2, 2)))
    assert names_in(tmp_path) == ["net.pt"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantized"),
        (lambda: torch.ones(2).to_sparse(), "sparse"),
        (lambda: torch.ones(2, device="meta"), "meta"),
        (lambda: torch.ones(2, dtype=torch.complex64).conj(), "resolve_conj"),
        (lambda: torch.zeros(2, dtype=torch.complex32), "complex32|none"),
    ],
    ids=["quantized", "sparse", "meta", "conj", "complex32"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_numpy_has_no_array_for_are_refused_by_name(make, said, tmp_path):
    path = saved(tmp_path / "net.pt", {"good": torch.ones(1), "layer": {"bad": make()}})
    with pytest.raises(UnsupportedFormat, match=f"'layer.bad'.*({said})"):
        opened(path)


def test_an_old_file_is_refused_saying_what_to_do(tmp_path):
    path = saved(tmp_path / "net.pt", {"w": torch.ones(1)}, _use_new_zipfile_serialization=False)
    assert FORMAT.sniff(Place.at(path))
    with pytest.raises(UnsupportedFormat, match=r"before 1\.6.*torch\.save it again"):
        opened(path)
    path.write_bytes(pickle.dumps({"w": Evil()}))
    with pytest.raises(UnsupportedFormat, match="a pickle"):
        opened(path)


def test_a_program_is_refused(tmp_path):
    archive(tmp_path / "net.pt", {"data.pkl": b"\x80\x02N.", "constants.pkl": b"\x80\x02N."})
    with pytest.raises(UnsupportedFormat, match="TorchScript"):
        opened(tmp_path / "net.pt")


def test_a_file_cut_anywhere_is_refused(tmp_path):
    data = saved(tmp_path / "net.pt", {"w": torch.arange(9.0)}).read_bytes()
    for length in range(4, len(data), 97):
        (tmp_path / "cut.pt").write_bytes(data[:length])
        assert FORMAT.sniff(Place.at(tmp_path / "cut.pt"))
        with pytest.raises(CorruptCheckpoint, match="is the file whole"):
            opened(tmp_path / "cut.pt")


def test_a_flipped_bit_in_a_tensor_is_found_when_it_is_read(tmp_path):
    path = saved(tmp_path / "net.pt", {"w": torch.arange(90.0), "t": torch.ones(9, 8).T})
    data = bytearray(path.read_bytes())
    for start in (data.index(np.arange(90, dtype="f4")), data.index(np.ones(72, "f4"))):
        data[start + 20] ^= 1
    path.write_bytes(data)
    checkpoint = opened(path)
    for name in ("w", "t"):
        with pytest.raises(CheckpointError, match=r"data/. is damaged|'data/.' is damaged"):
            checkpoint[name].read()


def test_a_file_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        saved(tmp_path / "net.pt", {"w": torch.arange(3)})
    finally:
        torch.serialization.set_crc32_options(True)
    assert read(tmp_path / "net.pt")[0]["w"].tolist() == [0, 1, 2]


def tensor_pickle(key="0", count=2, offset=0, shape=(2,), stride=(1,)):
    storage = torch_pickle.Storage(key, "float32", count)
    tensor = torch_pickle.Stored(storage, dtypes.BY_NAME["float32"], offset, shape, stride)
    return torch_writing.dump({"w": tensor})


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"shape": (3,)}, CorruptCheckpoint, "needs 12 bytes.*has 8"),
        ({"shape": (1 << 40,)}, CorruptCheckpoint, "needs"),
        ({"shape": (1 << 40,), "stride": (0,)}, UnsupportedFormat, "expanded"),
        ({"shape": (1 << 61, 0)}, CorruptCheckpoint, "2 dimensions with 1"),
        ({"offset": 1}, CorruptCheckpoint, "needs 12"),
        ({"offset": -1}, CorruptCheckpoint, "-1"),
        ({"stride": (-1,)}, CorruptCheckpoint, "-1"),
        ({"stride": (1 << 61,)}, CorruptCheckpoint, "needs"),
        ({"shape": (1,) * 40, "stride": (1,) * 40}, CorruptCheckpoint, "40 dimensions"),
        ({"key": "1"}, CorruptCheckpoint, "no entry 'data/1'"),
        ({"key": "../../x"}, CorruptCheckpoint, "no entry"),
        ({"count": -1}, CorruptCheckpoint, "-1 elements"),
    ],
    ids=str,
)
def test_a_tensor_that_lies_is_refused_when_it_is_opened(changes, error, said, tmp_path):
    entries = {"data.pkl": tensor_pickle(**changes), "data/0": bytes(8)}
    with pytest.raises(error, match=said):
        opened(archive(tmp_path / "net.pt", entries))


@pytest.mark.parametrize(
    ("data", "error", "said"),
    [
        (b"", CorruptCheckpoint, "EOFError"),
        (b"\x80\x02", CorruptCheckpoint, "EOFError"),
        (b"\x80\x02}(K\x01K\x02u", CorruptCheckpoint, "EOFError"),
        (b"\x80\x02\x82\x01.", CorruptCheckpoint, "KeyError"),
        (b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b".", CorruptCheckpoint, "KeyError"),
        (b"\x80\x05\x8e" + struct.pack("<Q", 1 << 60) + b".", CorruptCheckpoint, "truncated|EOF"),
        (b"\x80\x02]q\x00h\x00a.", CorruptCheckpoint, "contain themselves"),
        (b"\x80\x02c__builtin__\nbytearray\n(J\xff\xff\xff\x7ftR.", CorruptCheckpoint, "bytes of"),
        (b"\x80\x02c__builtin__\neval\n(X\x01\0\0\x001tR.", UnsupportedFormat, "eval"),
        (b"\x80\x02(U\x07storageK\x00K\x00K\x00K\x00tQ.", CorruptCheckpoint, "persistent id"),
        (b"\x80\x02" + b"(" * 9 + b"t" * 9 + b"0.", CorruptCheckpoint, "Error"),
        (b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\0\0\0itemsK\x01sb.", None, ""),
    ],
    ids=range(12),
)  # fmt: skip
def test_a_pickle_that_lies_is_refused(data, error, said, tmp_path):
    path = archive(tmp_path / "net.pt", {"data.pkl": data})
    if error is None:
        assert len(opened(path)) == 0
    else:
        with pytest.raises(error, match=said):
            opened(path)


def test_a_pickle_that_names_one_thing_over_and_over_is_refused(tmp_path):
    laughs = b"\x80\x02]q\x00" + b"".join(
        b"](" + b"h" + bytes([n]) + b"h" + bytes([n]) + b"eq" + bytes([n + 1]) for n in range(50)
    )
    with pytest.raises(CorruptCheckpoint, match="over and over"):
        opened(archive(tmp_path / "net.pt", {"data.pkl": laughs + b"."}))


@pytest.mark.parametrize(
    "use",
    [
        b"c__builtin__\nset\n(h2tR.",
        b"}h2K\x00s.",
        b"(h2h2h2h2h2tQ.",
        b"(h2\x91.",
        b"ccollections\nOrderedDict\n(]h2K\x00\x86atR.",
    ],
    ids=range(5),
)
def test_a_tuple_that_would_take_for_ever_is_never_hashed_or_shown(use, tmp_path):
    laughs = b")q\x00" + b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(50))
    data = b"\x80\x02" + laughs + use.replace(b"h2", b"h\x32")
    with contextlib.suppress(CorruptCheckpoint):
        opened(archive(tmp_path / "net.pt", {"data.pkl": data}))


def test_many_tensors_in_one_place_are_a_bomb(tmp_path):
    torch.save({str(n): tensor for n, tensor in enumerate([torch.zeros(1 << 18)] * 300)},
               tmp_path / "net.pt")  # fmt: skip
    with pytest.raises(CorruptCheckpoint, match="share one place"):
        opened(tmp_path / "net.pt")


def test_a_memo_index_takes_no_memory(tmp_path):
    data = b"\x80\x02]r" + struct.pack("<I", (1 << 32) - 1) + b"."
    tracemalloc.start()
    assert len(opened(archive(tmp_path / "net.pt", {"data.pkl": data}))) == 0
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_compressed_entries_are_refused(tmp_path):
    entries = {"data.pkl": tensor_pickle(), "data/0": bytes(8)}
    with pytest.raises(UnsupportedFormat, match="compressed"):
        opened(archive(tmp_path / "net.pt", entries, zipfile.ZIP_DEFLATED))
    bomb = archive(tmp_path / "bomb.pt", {"data.pkl": bytes(1 << 20)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(CorruptCheckpoint, match="claim 1048576 bytes"):
        opened(bomb)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "net.pt", "w") as file:
        file.writestr("net/data.pkl", tensor_pickle())
        file.writestr("net/data/0", bytes(8))
        file.writestr("net/data/0", bytes(8))
    with pytest.raises(CorruptCheckpoint, match="two entries 'net/data/0'"):
        opened(tmp_path / "net.pt")


def test_two_tensors_of_one_name_are_refused(tmp_path):
    with pytest.raises(CorruptCheckpoint, match=r"two entries have the name 'a\.b'"):
        opened(saved(tmp_path / "net.pt", {"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}))
    with pytest.raises(CorruptCheckpoint, match="two entries have the name '0'"):
        opened(saved(tmp_path / "net.pt", {0: torch.ones(1), "0": torch.ones(1)}))


def test_an_archive_that_torch_did_not_write_is_refused(tmp_path):
    with pytest.raises(CorruptCheckpoint, match=r"data\.pkl"):
        opened(archive(tmp_path / "net.pt", {"w.npy": b""}))
    (tmp_path / "net.pt").write_bytes(b"hello")
    with pytest.raises(UnsupportedFormat, match="found something else"):
        opened(tmp_path / "net.pt")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(st.data())
def test_a_damaged_file_is_refused_or_reads(tmp_path, data):
    path = saved(tmp_path / "net.pt", {"w": torch.arange(4.0), "n": [1, "a"]})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        read(path)


@settings(max_examples=300)
@given(st.data())
def test_a_damaged_pickle_is_refused_or_reads(data):
    buffer = io.BytesIO()
    torch.save({"w": torch.arange(4.0), "p": torch.nn.Parameter(torch.ones(1)), "n": 1}, buffer)
    content = bytearray(zipfile.ZipFile(buffer).read("archive/data.pkl"))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(CorruptCheckpoint, UnsupportedFormat):
        [*torch_pickle.leaves(torch_pickle.load(bytes(content), "net.pt"), "net.pt", 10_000)]


def test_what_torch_can_not_hold_is_refused_all_at_once(tmp_path):
    arrays = {"four": np.ones(2, ml_dtypes.int4), "w": np.ones(1)}
    with pytest.raises(UnsupportedFormat, match=r"(?s)'four'.*int4.*'huge'.*255"):
        write(tmp_path / "net.pt", arrays, {"huge": 1 << 3000})
    assert not names_in(tmp_path)
