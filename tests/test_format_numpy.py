"""numpy's files: any are read without numpy's pickles, and what is written, numpy reads."""

from __future__ import annotations

import io
import math
import struct
import threading
import tracemalloc
import zipfile
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import distckpt
from distckpt import CheckpointExists, CorruptCheckpoint, UnsupportedFormat, dtypes
from distckpt.formats import npz as npz_module
from distckpt.formats.base import Place, Wanted
from distckpt.formats.npy import FORMAT as NPY
from distckpt.formats.npz import FORMAT as NPZ

NATIVE = [entry for entry in dtypes.TABLE if entry.code < 20]
FOREIGN = [entry for entry in dtypes.TABLE if entry.code >= 20]
MIB = 1 << 20


@dataclass
class Tensor:
    """A tensor to be written."""

    name: str
    array: np.ndarray

    @property
    def shape(self):
        return self.array.shape

    @property
    def dtype(self):
        return self.array.dtype

    def read(self, region=None):
        return self.array.copy() if region is None else self.array[region.slices].copy()


def bits(entry, shape, seed=0):
    """An array of a dtype, of any bits that it can have."""
    size = math.prod(shape) * entry.itemsize
    raw = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    if entry.name == "bool":
        raw &= 1
    return raw.view(entry.numpy).reshape(shape)


def write(path, arrays, *, form=NPZ, values=(), metadata=(), replace=False):
    tensors = [Tensor(name, np.asarray(array)) for name, array in dict(arrays).items()]
    wanted = Wanted(tensors, dict(values), dict(metadata), "7", replace)
    writing = form.write(Place.at(path), wanted)
    for part in writing.parts:
        part()
    writing.commit()
    return path


def same(found, expected):
    assert list(found) == list(expected)
    for name, any_array in expected.items():
        array = np.asarray(any_array)
        little = array.dtype.newbyteorder("<")
        assert (found[name].dtype, found[name].shape) == (little, array.shape), name
        assert found[name].tobytes() == array.astype(little).tobytes(), name


def npy_of(array, **options):
    out = io.BytesIO()
    np.lib.format.write_array(out, np.asanyarray(array), **options)
    return out.getvalue()


def with_header(text, data=b"", version=1):
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text.encode() + data


def zip_of(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in dict(members).items():
            archive.writestr(name, data)
    return path


def source_of(path, **options):
    return NPZ.open(Place.at(path), **options)


def read_blocks(source, tensor, size, step):
    out = bytearray(size)
    for start in range(0, size, step):
        source.read_into(tensor, 0, start, memoryview(out)[start : start + step])
    return bytes(out)


# ------------------------------------------------------------------------------------ round trips


@pytest.fixture
def arrays():
    """One tensor of each of numpy's dtypes, a scalar, an empty one, and odd names."""
    found = {f"of.{e.name}": bits(e, (3, 5), seed) for seed, e in enumerate(NATIVE)}
    odd = {"ünï": np.arange(3), "a/b": np.ones(2), "c.npy": np.ones(1), "": np.ones(3)}
    return found | {"scalar": np.float32(2.5), "empty": np.zeros((0, 4))} | odd


def test_all_of_numpys_dtypes_come_back_bit_for_bit_and_in_order(tmp_path, arrays):
    same(distckpt.load(write(tmp_path / "a.npz", arrays)), arrays)


def test_numpy_reads_what_is_written(tmp_path, arrays):
    path = write(tmp_path / "a.npz", arrays, values={"epoch": 3}, metadata={"by": "me"})
    with np.load(path) as file:
        assert set(file.files) == set(arrays)
        same({name: file[name] for name in arrays}, arrays)
    assert zipfile.ZipFile(path).testzip() is None


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_writes_is_read(tmp_path, arrays, save):
    arrays.pop("")
    save(tmp_path / "a.npz", **arrays)
    same(distckpt.load(tmp_path / "a.npz"), arrays)


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=4), max_size=5),
    kinds=st.lists(st.sampled_from(NATIVE), min_size=5, max_size=5),
    layout=st.sampled_from(["C", "F", ">", ">F"]),
    deflated=st.booleans(),
)
def test_any_arrays_of_numpys_are_read_in_any_order_of_bytes_and_dimensions(
    shapes, kinds, layout, deflated
):
    arrays = {}
    for number, (shape, kind) in enumerate(zip(shapes, kinds, strict=False)):
        array = bits(kind, tuple(shape), number)
        array = array.byteswap().view(array.dtype.newbyteorder(">")) if ">" in layout else array
        arrays[f"t{number}"] = np.asarray(array, order="F" if "F" in layout else "C")
    out = io.BytesIO()
    (np.savez_compressed if deflated else np.savez)(out, **arrays)
    place = Place.at("memory://numpy/a.npz")
    place.put(out.getvalue(), replace=True)
    same(distckpt.load("memory://numpy/a.npz"), arrays)


def test_values_and_metadata_come_back(tmp_path):
    values = {"epoch": 3, "raw": b"\0", "none": None, "text": "PK\5\6"}
    metadata = {"by": "me", "nested": [1, {"a": 2.5}]}
    path = write(tmp_path / "a.npz", {"w": np.ones(2)}, values=values, metadata=metadata)
    checkpoint = distckpt.open(path)
    assert dict(checkpoint.values) == values
    assert dict(checkpoint.metadata) == metadata


def test_metadata_without_room_are_left_out_and_values_without_room_refused(tmp_path):
    many = {"note": "x" * 70_000}
    path = write(tmp_path / "a.npz", {"w": np.ones(2)}, values={"n": 1}, metadata=many)
    assert dict(distckpt.open(path).values) == {"n": 1}
    with pytest.raises(UnsupportedFormat, match="'note': a plain value"):
        write(tmp_path / "b.npz", {"w": np.ones(2)}, values=many)


def test_no_arrays_at_all_come_back(tmp_path):
    assert distckpt.load(write(tmp_path / "a.npz", {})) == {}
    np.savez(tmp_path / "b.npz")
    assert distckpt.load(tmp_path / "b.npz") == {}


def test_an_archive_is_told_without_its_ending_too(tmp_path):
    assert distckpt.open(write(tmp_path / "blob", {"w": np.ones(2)})).format == "npz"


def test_members_over_two_gigabytes_get_zip64_entries(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    path = write(tmp_path / "a.npz", {"v": np.ones(3), "w": np.arange(500.0)})
    with np.load(path) as file:
        assert np.array_equal(file["w"], np.arange(500.0))
    same(distckpt.load(path), {"v": np.ones(3), "w": np.arange(500.0)})


def test_convert_goes_there_and_back(tmp_path):
    state = {"w": np.arange(12.0).reshape(3, 4), "epoch": 4}
    distckpt.save(tmp_path / "ours", state)
    distckpt.convert(tmp_path / "ours", tmp_path / "a.npz")
    distckpt.convert(tmp_path / "a.npz", tmp_path / "back")
    back = distckpt.open(tmp_path / "back")
    assert np.array_equal(back["w"][...], state["w"])
    assert back.values["epoch"] == 4


@pytest.mark.parametrize("entry", FOREIGN, ids=lambda entry: entry.name)
@pytest.mark.parametrize("form", [NPZ, NPY], ids=["npz", "npy"])
def test_dtypes_that_numpys_files_lack_are_refused_with_advice(tmp_path, entry, form):
    with pytest.raises(UnsupportedFormat, match=f"(?s)'w'.*{entry.name}.*dtype=.float32"):
        write(tmp_path / "a", {"w": np.zeros(2, entry.numpy)}, form=form)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "int4"])
def test_what_numpy_calls_void_is_read_by_the_option_that_says_what_it_is(tmp_path, name):
    array = bits(dtypes.BY_NAME[name], (3, 4)).astype(np.float32).astype(getattr(ml_dtypes, name))
    np.savez(tmp_path / "a.npz", w=array)
    with pytest.raises(UnsupportedFormat, match=r"a\.npz: w\.npy.*void"):
        distckpt.load(tmp_path / "a.npz")
    found = distckpt.open(tmp_path / "a.npz", options={"void": name})["w"][...]
    assert found.dtype == array.dtype
    assert found.tobytes() == array.tobytes()
    np.save(tmp_path / "a.npy", array)
    assert distckpt.open(tmp_path / "a.npy", options={"void": name})["a"].dtype == array.dtype
    with pytest.raises(UnsupportedFormat, match="no dtype"):
        distckpt.open(tmp_path / "a.npy", options={"void": "bfloat61"})


# ----------------------------------------------------------------------------------- how it is read


def counted(monkeypatch):
    """Count the bytes that are inflated."""
    inflated = [0]
    whole = npz_module._NpzFile._inflate

    def inflate(*arguments):
        data = whole(*arguments)
        inflated[0] += len(data)
        return data

    monkeypatch.setattr(npz_module._NpzFile, "_inflate", inflate)
    return inflated


def test_a_deflated_member_is_inflated_once_when_read_in_blocks(tmp_path, monkeypatch):
    array = np.arange(MIB, dtype=np.int64)
    np.savez_compressed(tmp_path / "a.npz", w=array)
    inflated = counted(monkeypatch)
    found = read_blocks(source_of(tmp_path / "a.npz"), 0, array.nbytes, MIB)
    assert found == array.tobytes()
    assert inflated[0] == array.nbytes + 128


def test_many_deflated_members_may_be_read_in_turns_and_backwards(tmp_path):
    arrays = {f"t{n}": np.arange(n, n + 1000, dtype=np.int64) for n in range(12)}
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    source = source_of(tmp_path / "a.npz")
    for start in [0, 800, 1600, 4000, 800, 7200, 0]:
        for number, array in enumerate(arrays.values()):
            buffer = bytearray(800)
            source.read_into(number, 0, start, memoryview(buffer))
            assert buffer == array.tobytes()[start : start + 800]
    assert len(source._streams) <= 8


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_several_threads_read_at_once(tmp_path, save):
    arrays = {f"t{n}": np.asarray(np.random.default_rng(n).random((50, 60))) for n in range(6)}
    arrays["f"] = np.asfortranarray(arrays["t0"])
    save(tmp_path / "a.npz", **arrays)
    source = source_of(tmp_path / "a.npz")
    wrong = []

    def run():
        for number, array in enumerate(arrays.values()):
            if read_blocks(source, number, array.nbytes, 800) != array.tobytes():
                wrong.append(number)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_array_in_fortran_order_is_read_once_and_then_forgotten(tmp_path, monkeypatch):
    array = np.asfortranarray(np.arange(300_000.0).reshape(300, 1000))
    np.savez_compressed(tmp_path / "a.npz", w=array)
    inflated = counted(monkeypatch)
    found = read_blocks(source_of(tmp_path / "a.npz"), 0, array.nbytes, 80_000)
    assert found == array.tobytes()
    assert inflated[0] == array.nbytes + 128


def test_memory_stays_bounded_by_blocks_however_well_it_deflates(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", w=np.zeros(64 * MIB, np.int8))
    assert (tmp_path / "a.npz").stat().st_size < MIB
    source = source_of(tmp_path / "a.npz")
    buffer = bytearray(4 * MIB)
    tracemalloc.start()
    for start in range(0, 64 * MIB, len(buffer)):
        source.read_into(0, 0, start, memoryview(buffer))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * MIB


def test_writing_holds_one_tensor_at_a_time(tmp_path):
    class Lazy(Tensor):
        def read(self, region=None):
            return np.ones(self.array.shape, self.array.dtype)

    shape = np.broadcast_to(np.ones(1, np.int8), (8 * MIB,))
    wanted = Wanted([Lazy(f"t{n}", shape) for n in range(6)])
    writing = NPZ.write(Place.at(tmp_path / "a.npz"), wanted)
    tracemalloc.start()
    writing.parts[0]()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * MIB
    writing.commit()
    assert distckpt.load(tmp_path / "a.npz")["t5"].all()


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_bit_is_found_when_the_member_was_read_to_its_end(tmp_path, save):
    save(tmp_path / "a.npz", w=np.random.default_rng(0).random(2000))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[8000] ^= 4
    (tmp_path / "a.npz").write_bytes(data)
    checkpoint = distckpt.open(tmp_path / "a.npz")
    with pytest.raises(CorruptCheckpoint, match=r"w\.npy"):
        checkpoint["w"][...]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("off", [-8, 8, 1 << 40])
def test_a_member_whose_size_is_not_its_arrays_is_refused(tmp_path, method, off):
    shape = (1000 + off // 8,)
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}\n"
    path = zip_of(tmp_path / "a.npz", {"w.npy": with_header(text, bytes(8000))}, method)
    with pytest.raises(CorruptCheckpoint, match=r"w\.npy.*makes"):
        distckpt.load(path)


def patched(path, signature, offset, value):
    """Change a field in an archive's one header that begins with a signature."""
    data = bytearray(path.read_bytes())
    at = data.index(signature) + offset
    data[at : at + len(value)] = value
    path.write_bytes(data)
    return path


def test_a_declared_size_beyond_what_deflate_can_make_is_refused(tmp_path):
    text = "{'descr': '|u1', 'fortran_order': False, 'shape': (4000000000,), }\n"
    data = with_header(text, bytes(1000))
    path = zip_of(tmp_path / "a.npz", {"w.npy": data}, zipfile.ZIP_DEFLATED)
    size = len(data) - 1000 + 4_000_000_000
    patched(path, b"PK\1\2", 24, struct.pack("<I", size))
    with pytest.raises(CorruptCheckpoint, match="can't come from"):
        distckpt.load(path)


def test_a_stream_that_ends_early_is_refused(tmp_path):
    text = "{'descr': '|u1', 'fortran_order': False, 'shape': (90000,), }\n"
    data = with_header(text, bytes(80_000))
    path = zip_of(tmp_path / "a.npz", {"w.npy": data}, zipfile.ZIP_DEFLATED)
    patched(path, b"PK\1\2", 24, struct.pack("<I", len(data) + 10_000))
    checkpoint = distckpt.open(path)
    with pytest.raises(CorruptCheckpoint, match="end before the array does"):
        checkpoint["w"][...]


def test_a_stream_that_goes_on_is_stopped_at_the_declared_size(tmp_path):
    text = "{'descr': '|u1', 'fortran_order': False, 'shape': (90,), }\n"
    data = with_header(text, bytes(5_000_000))
    path = zip_of(tmp_path / "a.npz", {"w.npy": data}, zipfile.ZIP_DEFLATED)
    patched(path, b"PK\1\2", 24, struct.pack("<I", len(data) - 5_000_000 + 90))
    with pytest.raises(CorruptCheckpoint, match="CRC"):
        distckpt.load(path)


def test_duplicate_members_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("w.npy", npy_of(np.ones(2)))
        archive.writestr("v.npy", npy_of(np.zeros(2)))
    data = (tmp_path / "a.npz").read_bytes().replace(b"v.npy", b"w.npy")
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match="2 members have this name"):
        distckpt.load(tmp_path / "a.npz")


def test_members_that_share_bytes_are_refused(tmp_path):
    path = zip_of(tmp_path / "a.npz", {"w.npy": npy_of(np.ones(2)), "v.npy": npy_of(np.ones(2))})
    data = bytearray(path.read_bytes())
    second = data.rindex(b"PK\1\2")
    first = data.index(b"PK\3\4")
    at = data.index(b"v.npy")
    data[second + 42 : second + 46] = struct.pack("<I", first)
    data[second + 46 : second + 51] = b"w.npy"
    assert at
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpoint):
        distckpt.load(path)


def test_encrypted_members_are_refused(tmp_path):
    path = zip_of(tmp_path / "a.npz", {"w.npy": npy_of(np.ones(2))})
    patched(path, b"PK\1\2", 8, b"\1\0")
    with pytest.raises(UnsupportedFormat, match="encrypted"):
        distckpt.load(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused(tmp_path, method):
    path = zip_of(tmp_path / "a.npz", {"w.npy": npy_of(np.ones(2))}, method)
    with pytest.raises(UnsupportedFormat, match=f"method {method}"):
        distckpt.load(path)


def test_other_files_in_the_archive_are_refused_by_name(tmp_path):
    path = zip_of(tmp_path / "a.npz", {"w.npy": npy_of(np.ones(2)), "run.sh": "echo"})
    with pytest.raises(UnsupportedFormat, match=r"'run\.sh': no \.npy file"):
        distckpt.load(path)


@pytest.mark.parametrize("name", ["../../w.npy", "/w.npy"])
def test_a_members_name_is_a_tensors_name_and_never_a_path(tmp_path, name):
    path = zip_of(tmp_path / "a.npz", {name: npy_of(np.ones(2))})
    assert list(distckpt.load(path)) == [name.removesuffix(".npy")]


class Evil:
    """What a pickle would run."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


@pytest.mark.parametrize("ending", ["npz", "npy"])
def test_pickled_objects_are_refused_and_not_run(tmp_path, ending):
    objects = npy_of(np.array([Evil()], dtype=object), allow_pickle=True)
    assert b"a pickle was run" in objects
    path = tmp_path / f"a.{ending}"
    path.write_bytes(objects)
    if ending == "npz":
        zip_of(path, {"w.npy": objects})
    with pytest.raises(UnsupportedFormat, match="never read"):
        distckpt.load(path)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros(2, [("a", "<f4"), ("b", "<i4")]), "records"),
        (np.array(["a", "b"]), "<U1"),
        (np.array([b"a"]), "S1"),
        (np.zeros(2, "M8[s]"), "M8"),
        (np.zeros(2, np.longdouble), "f16"),
        (np.zeros(2, "V7"), "void"),
    ],
)
def test_types_that_no_checkpoint_holds_are_refused(tmp_path, array, said):
    path = tmp_path / "a.npy"
    path.write_bytes(npy_of(array))
    with pytest.raises(UnsupportedFormat, match=said):
        distckpt.load(path)


# -------------------------------------------------------------------------------------------- .npy

FINE = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"


@pytest.mark.parametrize("entry", NATIVE, ids=lambda entry: entry.name)
@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (2, 3, 4)])
def test_an_array_comes_back_under_the_files_name(tmp_path, entry, shape):
    array = bits(entry, shape)
    path = write(tmp_path / "weights.npy", {"any": array}, form=NPY)
    same(distckpt.load(path), {"weights": array})
    assert np.load(path).tobytes() == array.tobytes()


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_all_versions_and_orders_are_read(tmp_path, version, order):
    array = np.asarray(np.arange(24, dtype=">i4").reshape(2, 3, 4), order=order)
    (tmp_path / "a.npy").write_bytes(npy_of(array, version=version))
    checkpoint = distckpt.open(tmp_path / "a.npy")
    assert np.array_equal(checkpoint["a"][...], array)
    assert np.array_equal(checkpoint["a"][1:, 1, ::2], array[1:, 1, ::2])


@pytest.mark.parametrize(
    "text",
    [
        "{'shape': (2,), 'descr': '<f4', 'fortran_order': False}",
        "{'descr':'<f4','fortran_order':False,'shape':(2,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2L,), }        \n",
    ],
)
def test_headers_of_other_writers_are_read(tmp_path, text):
    (tmp_path / "a.npy").write_bytes(with_header(text, np.float32([1, 2]).tobytes()))
    assert distckpt.load(tmp_path / "a.npy")["a"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\x93NUMPY", "version 0"),
        (b"\x93NUMPY\x01\x00", "of at|header"),
        (b"\x93NUMPY\x07\x00\x10\x00", "version 7"),
        (with_header(FINE)[:40], "a header of"),
        (with_header(FINE, bytes(7)), "makes"),
        (with_header(FINE, bytes(9)), "makes"),
        (with_header(FINE.replace("2", "1" * 30)), "no memory"),
        (with_header(FINE.replace("2,", "0, " + "9" * 30)), "no memory"),
        (with_header(FINE.replace("2,", "1," * 33), bytes(4)), "no memory"),
        (with_header(FINE.replace("2,", "-2,"), bytes(8)), "descr, fortran_order and shape"),
        (with_header(FINE.replace("2,", "(" * 50), bytes(8)), "descr, fortran_order and shape"),
        (with_header(FINE.replace("False", "0"), bytes(8)), "descr, fortran_order and shape"),
        (with_header(FINE.replace("'<f4'", "__import__('os')")), "descr, fortran_order and shape"),
        (with_header("{'descr': '<f4', 'descr': '<f4'}"), "descr, fortran_order and shape"),
        (with_header("[" * 9000), "descr, fortran_order and shape"),
        (with_header(FINE + " " * 20_000, bytes(8)), "at most 10012"),
        (with_header(FINE, bytes(8), version=2).replace(b"\x39", b"\xff"), "header"),
        (with_header(FINE.replace("<f4", "|f4"), bytes(8)), "no type|void"),
        (with_header(FINE.replace("<f4", "f4"), bytes(8)), "no type"),
    ],
)
def test_an_array_file_that_lies_is_refused(tmp_path, data, said):
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises((CorruptCheckpoint, UnsupportedFormat), match=said) as refused:
        distckpt.load(tmp_path / "a.npy")
    assert str(tmp_path) in str(refused.value)


def load_as(form, path):
    """Load a file as of a format, whatever it looks like."""
    checkpoint = distckpt.open(path, format=form)
    return {name: checkpoint[name][...] for name in checkpoint}


@given(st.data(), st.sampled_from(["npy", "npz", "deflated"]))
def test_a_damaged_file_is_refused_or_read_and_nothing_else_happens(tmp_path_factory, data, kind):
    out = io.BytesIO()
    array = np.arange(12.0).reshape(3, 4)
    if kind == "npy":
        np.save(out, array)
    else:
        (np.savez if kind == "npz" else np.savez_compressed)(
            out, w=array, f=np.asfortranarray(array)
        )
    damaged = bytearray(out.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    path = tmp_path_factory.getbasetemp() / f"damaged.{kind[:3]}"
    path.write_bytes(damaged)
    try:
        load_as("npy" if kind == "npy" else "npz", path)
    except (CorruptCheckpoint, UnsupportedFormat) as exc:
        assert str(path) in str(exc)  # noqa: PT017


def test_an_array_file_takes_one_array_and_no_values(tmp_path):
    for arrays, values, said in [
        ({"a": np.ones(1), "b": np.ones(1)}, {}, "holds one array"),
        ({}, {}, "holds one"),
        ({"a": np.ones(1)}, {"epoch": 3}, "'epoch': a plain value"),
    ]:
        with pytest.raises(UnsupportedFormat, match=said):
            write(tmp_path / "a.npy", arrays, form=NPY, values=values)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", [NPZ, NPY], ids=["npz", "npy"])
def test_what_is_there_stays_unless_it_may_be_replaced(tmp_path, form):
    path = write(tmp_path / f"a{form.suffixes[0]}", {"a": np.ones(2)}, form=form)
    with pytest.raises(CheckpointExists):
        write(path, {"a": np.zeros(2)}, form=form)
    assert distckpt.load(path)["a"].tolist() == [1, 1]
    write(path, {"a": np.zeros(2)}, form=form, replace=True)
    assert distckpt.load(path)["a"].tolist() == [0, 0]
    assert len(list(tmp_path.iterdir())) == 1
