"""safetensors files: any are read, lying ones refused, and what is written, others read."""

from __future__ import annotations

import json
import math
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

import distckpt
from distckpt import CheckpointExists, CorruptCheckpoint, UnsupportedFormat, dtypes
from distckpt.formats import plain
from distckpt.formats import safetensors as module
from distckpt.formats.base import Place, Wanted
from distckpt.formats.safetensors import FORMAT
from distckpt.formats.safetensors_folder import FORMAT as FOLDER
from distckpt.testing import run_ranks

GOLDEN = Path(__file__).parent / "data" / "golden"
INDEX = "model.safetensors.index.json"
STORED = [entry for entry in dtypes.TABLE if entry.safetensors is not None]
LACKING = [entry for entry in dtypes.TABLE if entry.safetensors is None]


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


def write(
    path, arrays, *, form=FORMAT, values=(), metadata=(), token="7", replace=False, **options
):
    tensors = [Tensor(name, np.asarray(array)) for name, array in dict(arrays).items()]
    wanted = Wanted(tensors, dict(values), dict(metadata), token, replace)
    writing = form.write(Place.at(path), wanted, **options)
    for part in writing.parts:
        part()
    writing.commit()
    return path


def same(found, expected):
    assert list(found) == list(expected)
    for name, any_array in expected.items():
        array = np.asarray(any_array)
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def raw_file(path, header, data=b"", length=None):
    """A file with this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def entry(start, stop, shape, dtype="U8", **more):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop], **more}


@pytest.fixture
def arrays():
    """One tensor of each dtype, a scalar, and an empty one."""
    found = {f"of.{e.name}": bits(e, (3, 5), seed) for seed, e in enumerate(STORED)}
    return found | {"scalar": np.float32(2.5), "empty": np.zeros((0, 4)), "ünï/cødé": np.arange(3)}


# ------------------------------------------------------------------------------------ round trips


def test_all_dtypes_come_back_bit_for_bit_and_in_order(tmp_path, arrays):
    path = write(tmp_path / "a.safetensors", arrays)
    same(distckpt.load(path), arrays)


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=4), max_size=6),
    kinds=st.lists(st.sampled_from(STORED), min_size=6, max_size=6),
)
def test_any_shapes_and_dtypes_come_back_in_any_store(shapes, kinds):
    arrays = {
        f"t{number}": bits(kind, tuple(shape), number)
        for number, (shape, kind) in enumerate(zip(shapes, kinds, strict=False))
    }
    path = write("memory://round/a.safetensors", arrays, replace=True)
    same(distckpt.load(path), arrays)


def test_the_library_reads_what_is_written(tmp_path, arrays):
    path = write(tmp_path / "a.safetensors", arrays)
    with safetensors.safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(arrays)
        for name, array in arrays.items():
            found = file.get_tensor(name)
            assert tuple(found.shape) == array.shape
            assert found.numel() * found.element_size() == array.nbytes
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.get_tensor("of.bfloat16").tobytes() == arrays["of.bfloat16"].tobytes()
        assert file.metadata() == {"format": "pt"}


def test_what_the_library_writes_is_read(tmp_path):
    arrays = {"b": np.arange(6.0).reshape(2, 3), "a": np.array(3, np.int16), "c": np.zeros((2, 0))}
    safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors", metadata={"by": "me"})
    checkpoint = distckpt.open(tmp_path / "a.safetensors")
    assert checkpoint.metadata == {"by": "me"}
    found = distckpt.load(tmp_path / "a.safetensors")
    same({name: found[name] for name in arrays}, arrays)


def test_data_and_every_tensor_are_aligned(tmp_path):
    arrays = {"a": np.ones(3, np.int8), "b": np.ones(3), "c": np.ones(5, np.int16)}
    path = write(tmp_path / "a.safetensors", arrays)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert (8 + size) % 64 == 0
    assert [header[name]["data_offsets"][0] for name in "bca"] == [0, 24, 34]


def test_no_tensors_at_all_come_back(tmp_path):
    assert distckpt.load(write(tmp_path / "a.safetensors", {})) == {}


def test_metadata_and_values_come_back(tmp_path):
    values = {
        "epoch": 3,
        "huge": -(10**5000),
        "lr": 0.1,
        "nan": math.inf,
        "on": True,
        "who": "me",
        "raw": b"\0\xff",
        "none": None,
    }
    metadata = {
        "format": "tf",
        "note": "ü",
        "distckpt": "a text",
        "nested": {"a": [1, (2.5, None)], "$b": b"x", 3: "three"},
    }
    path = write(tmp_path / "a.safetensors", {"w": np.ones(2)}, values=values, metadata=metadata)
    checkpoint = distckpt.open(path)
    assert dict(checkpoint.values) == values
    assert dict(checkpoint.metadata) == metadata
    with safetensors.safe_open(path, framework="numpy") as file:
        assert {"format": "tf", "note": "ü"}.items() <= file.metadata().items()


def test_slices_are_read_alone(tmp_path):
    big = np.arange(3_000_000, dtype=np.float32).reshape(3000, 1000)
    path = write(tmp_path / "a.safetensors", {"small": np.ones(7, np.int8), "big": big})
    found = distckpt.open(path)["big"]
    assert np.array_equal(found[1500:1502, ::3], big[1500:1502, ::3])
    assert np.array_equal(found[...], big)


def test_convert_goes_there_and_back(tmp_path):
    state = {"w": np.arange(12.0).reshape(3, 4), "epoch": 4}
    distckpt.save(tmp_path / "ours", state, metadata={"by": "me", "n": 1})
    distckpt.convert(tmp_path / "ours", tmp_path / "a.safetensors")
    distckpt.convert(tmp_path / "a.safetensors", tmp_path / "back")
    back = distckpt.open(tmp_path / "back")
    assert np.array_equal(back["w"][...], state["w"])
    assert back.values["epoch"] == 4
    assert {"by": "me", "n": 1}.items() <= back.metadata.items()


def test_a_lone_shard_file_of_a_checkpoint_opens_like_any_file(tmp_path):
    state = {"w": np.arange(12.0).reshape(3, 4), "n": np.arange(3, dtype=np.int8)}
    distckpt.save(tmp_path / "ours", state)
    (shard,) = (tmp_path / "ours").glob("*.safetensors")
    checkpoint = distckpt.open(shard)
    assert set(checkpoint) == {"w", "n"}
    assert dict(checkpoint.metadata) == {}
    assert np.array_equal(checkpoint["w"][...], state["w"])


def test_it_is_told_without_its_ending_too(tmp_path):
    path = write(tmp_path / "blob", {"w": np.ones(2)}, replace=True)
    assert distckpt.open(path).format == "safetensors"


_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=5) | st.integers() | st.just("$int"), inner, max_size=3)
    ),
)


@given(st.dictionaries(st.text(max_size=5), _PLAIN, max_size=4))
def test_any_nested_metadata_come_back_from_their_text(metadata):
    text = plain.to_text({}, metadata) or "{}"
    assert repr(plain.from_text(text, "here")) == repr(({}, metadata))


def test_what_is_no_plain_value_is_refused_by_name():
    with pytest.raises(UnsupportedFormat, match=r"metadata\.a\.b: ndarray"):
        plain.to_text({}, {"a": {"b": np.ones(2)}})


# -------------------------------------------------------------------------------------- MindSpore


@pytest.mark.parametrize("name", ["cell.safetensors", "dtypes.safetensors"])
def test_mindspores_files_read_bit_for_bit(name):
    described = json.loads((GOLDEN / f"{name}.json").read_text())
    found = distckpt.load(GOLDEN / name)
    with np.load(GOLDEN / f"{name}.npz") as expected:
        assert found.keys() == {one["name"] for one in described["params"]}
        for one in described["params"]:
            array = expected[one["npz_key"]]
            assert found[one["name"]].shape == array.shape
            assert found[one["name"]].tobytes() == array.tobytes()


def with_crc(path, arrays, crc):
    header = {"__metadata__": {"format": "ms", "crc_num": crc}}
    data = b""
    for name, array in arrays.items():
        kind = dtypes.find(array.dtype).safetensors
        end = len(data) + array.nbytes
        header[name] = entry(len(data), end, list(array.shape), kind)
        data += array.tobytes()
    return raw_file(path, header, data)


CHECKED = {"b": np.arange(5, dtype=np.int32), "a": np.float32([1.5, 2]), "n": np.array(5)}


def crc_of(number):
    """What MindSpore computes: names and bytes, sorted by name; `number` stands for n."""
    parts = [b"a", CHECKED["a"].tobytes(), b"b", CHECKED["b"].tobytes(), b"n", number]
    return str(zlib.crc32(b"".join(parts)))


@pytest.mark.parametrize("number", [bytes(np.array(5)), np.array(5).tobytes()])
def test_mindspores_checksum_is_accepted_also_where_it_took_a_number_for_zeros(tmp_path, number):
    path = with_crc(tmp_path / "a.safetensors", CHECKED, crc_of(number))
    assert dict(distckpt.open(path).metadata) == {"format": "ms"}
    same(distckpt.load(path), CHECKED)


def test_damage_is_found_by_mindspores_checksum_at_the_first_read(tmp_path):
    path = with_crc(tmp_path / "a.safetensors", CHECKED, crc_of(bytes(5)))
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    checkpoint = distckpt.open(path)
    with pytest.raises(CorruptCheckpoint, match="crc_num"):
        checkpoint["b"][...]


def test_a_checksum_that_is_no_number_is_refused(tmp_path):
    path = with_crc(tmp_path / "a.safetensors", CHECKED, "-3")
    with pytest.raises(CorruptCheckpoint, match="decimal CRC32"):
        distckpt.open(path).manifest  # noqa: B018


def test_mindspores_checksum_is_not_carried_into_another_file(tmp_path):
    metadata = {"format": "ms", "crc_num": "1"}
    path = write(tmp_path / "a.safetensors", {"w": np.ones(2)}, metadata=metadata)
    assert distckpt.load(path)["w"].tolist() == [1, 1]


# --------------------------------------------------------------------------------- headers that lie

LIES = {
    "overlap": ({"a": entry(0, 4, [4]), "b": entry(2, 6, [4])}, 6, "overlap"),
    "twice the same bytes": ({"a": entry(0, 4, [4]), "b": entry(0, 4, [4])}, 4, "overlap"),
    "hole": ({"a": entry(0, 4, [4]), "b": entry(6, 8, [2])}, 8, "4:6 belong to no tensor"),
    "hole in front": ({"a": entry(2, 6, [4])}, 6, "0:2 belong to no tensor"),
    "bytes behind": ({"a": entry(0, 4, [4])}, 9, "4:9, the last"),
    "beyond the file": ({"a": entry(0, 4, [4])}, 3, "outside the file"),
    "far beyond": ({"a": entry(0, 1 << 60, [1 << 60])}, 3, "outside the file"),
    "length": ({"a": entry(0, 4, [3])}, 4, "has 3 bytes"),
    "itemsize": ({"a": entry(0, 4, [4], "F32")}, 4, "has 16 bytes"),
    "backwards": ({"a": entry(4, 0, [4])}, 4, "bytes"),
    "negative extent": ({"a": entry(0, 4, [-2, -2])}, 4, "whole numbers"),
    "negative offset": ({"a": entry(-4, 0, [4])}, 4, "whole numbers"),
    "bool extent": ({"a": entry(0, 1, [True])}, 1, "whole numbers"),
    "float extent": ({"a": entry(0, 4, [4.0])}, 4, "whole numbers"),
    "huge extent": ({"a": entry(0, 4, [1 << 70])}, 4, "over 2\\*\\*64"),
    "huge but empty": ({"a": entry(0, 0, [1 << 70, 0])}, 0, "no memory"),
    "dimensions": ({"a": entry(0, 1, [1] * 33)}, 1, "33 dimensions"),
    "three offsets": ({"a": {**entry(0, 4, [4]), "data_offsets": [0, 2, 4]}}, 4, "expected dtype"),
    "no shape": ({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, 4, "expected dtype"),
    "no object": ({"a": 3}, 0, "expected dtype"),
    "NUL in a name": ({"a\0b": entry(0, 4, [4])}, 4, "NUL"),
    "long name": ({"a" * 70_000: entry(0, 4, [4])}, 4, "65536"),
    "surrogate": (b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1, "Unicode"),
    "metadata": ({"__metadata__": {"a": 1}}, 0, "texts to texts"),
    "metadata list": ({"__metadata__": []}, 0, "texts to texts"),
    "duplicate": (b'{"a":1,"a":2}', 0, "'a' stands there twice"),
    "duplicate inside": (b'{"a":{"dtype":"U8","dtype":"I8"}}', 0, "stands there twice"),
    "no JSON": (b"{nonsense}", 0, "expected a JSON object"),
    "a list": (b"[1, 2]", 0, "it is a list"),
    "not UTF-8": (b'{"\xff":1}', 0, "expected a JSON object"),
    "NaN": (b'{"a":NaN}', 0, "NaN"),
    "deep": (b"{" + b'"a":[' * 1 + b"[" * 200_000, 0, "too deeply"),
    "brackets": (b'{"a":[' + b"[]," * 400_000 + b"[]]}", 0, "more brackets"),
    "long number": (b'{"a":' + b"9" * 10_000 + b"}", 0, "expected a JSON object"),
    "our values": ({"__metadata__": {"distckpt": "[]"}}, 0, "values and metadata"),
    "a value and a tensor": (
        {"__metadata__": {"distckpt": '{"values":{"a":1}}'}, "a": entry(0, 1, [1])},
        1,
        "plain values, too",
    ),
}


@pytest.mark.parametrize(("header", "data", "said"), LIES.values(), ids=LIES)
def test_a_header_that_lies_is_refused(tmp_path, header, data, said):
    path = raw_file(tmp_path / "a.safetensors", header, bytes(data))
    with pytest.raises(CorruptCheckpoint, match=said) as refused:
        distckpt.load(path)
    assert str(path) in str(refused.value)


def test_all_faults_of_a_header_are_named_at_once(tmp_path):
    header = {"a": entry(0, 4, [3]), "b": entry(4, 8, [-1]), "c": 7}
    path = raw_file(tmp_path / "a.safetensors", header, bytes(8))
    with pytest.raises(CorruptCheckpoint, match=r"(?s)3 faults.*'a'.*'b'.*'c'"):
        distckpt.load(path)


@pytest.mark.parametrize("size", [3, 100, 100_000_001, 1 << 63])
def test_a_header_longer_than_file_or_limit_is_refused_before_it_is_read(tmp_path, size):
    path = raw_file(tmp_path / "a.safetensors", b"{", length=size)
    if size == 100_000_001:
        with path.open("r+b") as file:
            file.truncate(size + 100)  # sparse: nothing of it is read
    with pytest.raises(CorruptCheckpoint, match="cut short"):
        distckpt.load(path)


@given(st.data())
def test_a_damaged_header_is_refused_or_read_and_nothing_else_happens(tmp_path_factory, data):
    whole = safetensors.numpy.save({"a": np.arange(3.0), "b": np.arange(2, dtype=np.int8)})
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(damaged)
    try:
        distckpt.load(path)
    except (CorruptCheckpoint, UnsupportedFormat) as exc:
        assert str(path) in str(exc)  # noqa: PT017


def test_unknown_dtypes_are_named_with_those_that_are_known(tmp_path):
    header = {"a": entry(0, 4, [4], "F4"), "b": entry(4, 8, [4])}
    path = raw_file(tmp_path / "a.safetensors", header, bytes(8))
    with pytest.raises(UnsupportedFormat, match=r"(?s)BF16.*'a': dtype 'F4'"):
        distckpt.load(path)


def test_a_file_that_becomes_shorter_is_refused(tmp_path):
    path = write(tmp_path / "a.safetensors", {"w": np.arange(9.0)})
    checkpoint = distckpt.open(path)
    assert len(checkpoint) == 1
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CorruptCheckpoint, match="cut short"):
        checkpoint["w"][...]


# ---------------------------------------------------------------------------------------- writing


def test_dtypes_that_safetensors_lacks_are_refused_by_name(tmp_path):
    arrays = {entry.name: np.zeros(2, entry.numpy) for entry in LACKING}
    with pytest.raises(UnsupportedFormat, match="safetensors") as refused:
        write(tmp_path / "a.safetensors", arrays | {"fine": np.ones(2)})
    assert all(repr(name) in str(refused.value) for name in arrays)
    assert list(tmp_path.iterdir()) == []


def test_the_reserved_name_is_refused(tmp_path):
    with pytest.raises(UnsupportedFormat, match="reserves"):
        write(tmp_path / "a.safetensors", {"__metadata__": np.ones(2)})


@pytest.mark.parametrize("form", [FORMAT, FOLDER], ids=["file", "folder"])
def test_what_is_there_stays_without_replace(tmp_path, form):
    path = write(tmp_path / "a.safetensors", {"w": np.ones(2)}, form=form)
    with pytest.raises(CheckpointExists):
        write(path, {"w": np.zeros(2)}, form=form)
    assert distckpt.load(path)["w"].tolist() == [1, 1]


@pytest.mark.parametrize("form", [FORMAT, FOLDER], ids=["file", "folder"])
@pytest.mark.parametrize("root", ["memory", "local"])
def test_what_is_there_is_read_until_the_commit_and_then_replaced(tmp_path, form, root):
    where = tmp_path if root == "local" else f"memory://{tmp_path}"
    path = write(f"{where}/model", {"w": np.ones(2)}, form=form)
    wanted = Wanted([Tensor("w", np.zeros(2))], token="8", replace=True)
    writing = form.write(Place.at(path), wanted)
    for part in writing.parts:
        part()
    assert distckpt.load(path)["w"].tolist() == [1, 1]
    writing.commit()
    assert distckpt.load(path)["w"].tolist() == [0, 0]
    if form is FOLDER:
        assert len(Place.at(path).entries()) == 2
    else:
        assert Place.at(where).entries() == ["model"]


@pytest.mark.parametrize("form", [FORMAT, FOLDER], ids=["file", "folder"])
def test_an_aborted_write_leaves_nothing(tmp_path, form):
    tensors = [Tensor("w", np.zeros(2)), Tensor("v", np.zeros(2))]
    writing = form.write(Place.at(tmp_path / "new"), Wanted(tensors, token="8"))
    for part in writing.parts:
        part()
    writing.abort()
    assert list(tmp_path.rglob("*")) == []


def test_a_read_that_fails_leaves_nothing(tmp_path):
    class Broken(Tensor):
        def read(self, region=None):
            raise CorruptCheckpoint("broken")

    wanted = Wanted([Tensor("v", np.ones(2)), Broken("w", np.ones(2))])
    writing = FORMAT.write(Place.at(tmp_path / "a.safetensors"), wanted)
    with pytest.raises(CorruptCheckpoint, match="broken"):
        writing.parts[0]()
    writing.abort()
    assert list(tmp_path.iterdir()) == []


def test_of_two_writers_exactly_one_wins(tmp_path):
    outcomes = []
    writings = [
        FORMAT.write(
            Place.at(tmp_path / "a.safetensors"),
            Wanted([Tensor("w", np.full(2, number))], token=str(number)),
        )
        for number in range(4)
    ]

    def run(writing):
        writing.parts[0]()
        try:
            writing.commit()
        except CheckpointExists as exc:
            writing.abort()
            outcomes.append(exc)

    threads = [threading.Thread(target=run, args=[writing]) for writing in writings]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


# --------------------------------------------------------------------------- Hugging Face's folder


def some_arrays():
    return {f"layer.{n}.weight": bits(STORED[n % 12], (40, 3), n) for n in range(12)}


def test_a_folder_comes_back_bit_for_bit_and_in_order(tmp_path):
    arrays = some_arrays()
    path = write(tmp_path / "model", arrays, form=FOLDER, max_shard_bytes=1000, values={"n": 1})
    names = sorted(one.name for one in path.iterdir())
    count = len(names) - 1
    assert count > 3
    shards = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert names == [*shards, INDEX]
    same(distckpt.load(path), arrays)
    checkpoint = distckpt.open(path)
    assert checkpoint.format == "safetensors-folder"
    assert checkpoint.values["n"] == 1
    index = json.loads((path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    assert list(index["weight_map"]) == list(arrays)


def test_no_file_of_a_folder_has_more_tensor_bytes_than_asked_for(tmp_path):
    arrays = {"big": np.zeros(500)} | {f"t{n}": np.zeros(30) for n in range(20)}
    path = write(tmp_path / "model", arrays, form=FOLDER, max_shard_bytes=1000)
    for shard in path.glob("*.safetensors"):
        with safetensors.safe_open(shard, framework="numpy") as file:
            names = list(file.keys())
            assert names == ["big"] or sum(arrays[name].nbytes for name in names) <= 1000


@pytest.mark.parametrize("overwrite", [False, True])
def test_ranks_share_the_files_of_a_folder(tmp_path, overwrite):
    arrays = some_arrays()
    write(tmp_path / "a.safetensors", arrays)
    if overwrite:
        write(tmp_path / "model", {"old": np.ones(2)}, form=FOLDER)

    def run(comm):
        return distckpt.convert(
            tmp_path / "a.safetensors",
            tmp_path / "model",
            comm=comm,
            format="safetensors-folder",
            options={"max_shard_bytes": 500},
            overwrite=overwrite,
        )

    run_ranks(3, run, timeout_s=30)
    same(distckpt.load(tmp_path / "model"), arrays)


def test_the_library_reads_each_file_of_a_folder_by_the_index(tmp_path):
    arrays = some_arrays()
    path = write(tmp_path / "model", arrays, form=FOLDER, max_shard_bytes=1000)
    index = json.loads((path / INDEX).read_text())
    for name, file in index["weight_map"].items():
        with safetensors.safe_open(path / file, framework="pt") as opened:
            assert tuple(opened.get_tensor(name).shape) == arrays[name].shape
            assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize("sharded", [False, True])
def test_transformers_reads_what_is_written_and_we_read_what_it_writes(tmp_path, sharded):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=50,
        max_position_embeddings=16,
    )
    model = transformers.BertModel(config)
    theirs = tmp_path / "theirs"
    model.save_pretrained(theirs, max_shard_size="10KB" if sharded else "1GB")
    assert (theirs / INDEX).exists() == sharded
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    found = distckpt.load(theirs)
    same({name: found[name] for name in weights}, weights)

    ours = tmp_path / "ours"
    options = {"max_shard_bytes": 10_000} if sharded else {}
    distckpt.convert(theirs, ours, format="safetensors-folder", options=options)
    (ours / "config.json").write_bytes((theirs / "config.json").read_bytes())
    again = transformers.BertModel.from_pretrained(ours)
    same({name: tensor.numpy() for name, tensor in again.state_dict().items()}, weights)


def test_a_folder_with_one_whole_file_is_read(tmp_path):
    (tmp_path / "model").mkdir()
    write(tmp_path / "model" / "model.safetensors", {"w": np.ones(2)})
    (tmp_path / "model" / "config.json").write_text("{}")
    assert distckpt.load(tmp_path / "model")["w"].tolist() == [1, 1]


def test_replacing_a_whole_file_by_an_index_removes_it_last(tmp_path):
    (tmp_path / "model").mkdir()
    write(tmp_path / "model" / "model.safetensors", {"w": np.ones(2)})
    write(tmp_path / "model", {"w": np.zeros(2)}, form=FOLDER, replace=True)
    assert not (tmp_path / "model" / "model.safetensors").exists()
    assert distckpt.load(tmp_path / "model")["w"].tolist() == [0, 0]


def test_other_files_of_the_folder_stay(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    path = write(tmp_path / "model", {"w": np.ones(2)}, form=FOLDER)
    write(path, {"w": np.zeros(2)}, form=FOLDER, replace=True, token="9")
    assert (path / "config.json").exists()
    assert len(list(path.iterdir())) == 3


def test_a_folder_is_not_written_into_a_checkpoint_of_ours(tmp_path):
    distckpt.save(tmp_path / "ours", {"w": np.ones(2)})
    with pytest.raises(CheckpointExists, match="hide"):
        write(tmp_path / "ours", {"w": np.ones(2)}, form=FOLDER, replace=True)


def index_of(folder, weight_map, name=INDEX):
    folder.mkdir(exist_ok=True)
    text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    "name",
    ["../out.safetensors", "/etc/passwd", "a/../../b", "..", "", "a//b", "s3://b/k", "a\\b", "C:x"],
)
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    write(tmp_path / "out.safetensors", {"w": np.ones(2)})
    folder = index_of(tmp_path / "model", {"w": name})
    with pytest.raises(CorruptCheckpoint, match="outside the folder"):
        distckpt.load(folder)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("[]", "expected a JSON object"),
        ("{}", "weight_map"),
        ('{"weight_map": {"w": 3}}', "weight_map"),
        ('{"weight_map": {"w": "a", "w": "b"}}', "stands there twice"),
        ('{"weight_map": {"w": "gone.safetensors"}}', "not all files were copied"),
        ('{"weight_map": {"v": "w.safetensors"}}', "v in w.safetensors"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, index, said):
    folder = index_of(tmp_path / "model", index)
    write(folder / "w.safetensors", {"w": np.ones(2)})
    with pytest.raises(CorruptCheckpoint, match=said):
        distckpt.load(folder)


def test_the_index_decides_what_is_read(tmp_path):
    folder = index_of(tmp_path / "model", {"w": "a.safetensors"})
    write(folder / "a.safetensors", {"w": np.ones(2), "more": np.ones(3)})
    assert list(distckpt.load(folder)) == ["w"]


def test_an_index_of_another_name_is_found_alone_or_given(tmp_path):
    folder = index_of(tmp_path / "model", {"w": "a.safetensors"}, "other.safetensors.index.json")
    write(folder / "a.safetensors", {"w": np.ones(2)})
    assert list(distckpt.load(folder)) == ["w"]
    index_of(folder, {"w": "a.safetensors"}, "map.json")
    checkpoint = distckpt.open(folder, format="safetensors-folder", options={"index": "map.json"})
    assert list(checkpoint) == ["w"]


def test_a_folder_without_safetensors_is_refused_by_name(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UnsupportedFormat, match=r"a\.txt"):
        distckpt.open(tmp_path, format="safetensors-folder")


def test_a_header_beyond_the_limit_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_HEADER_BYTES", 200)
    with pytest.raises(UnsupportedFormat, match="header of"):
        write(tmp_path / "a.safetensors", {f"name{n}": np.ones(1) for n in range(9)})
