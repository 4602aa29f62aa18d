"""Checkpoints from attackers: refused, in little memory and time, and nothing is done for them."""

from __future__ import annotations

import io
import json
import os
import struct
import traceback
import tracemalloc
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path
from random import Random

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fuzz import mutate
from fuzz.guard import GuardedStore, Violation, run_lap, watched
from fuzz.readers import READERS, corpus

import distckpt
from distckpt import (
    CheckpointError,
    CheckpointNotFound,
    CorruptCheckpoint,
    SaveFailed,
    StoreError,
    UnsupportedFormat,
    codec,
)
from distckpt._pb import manifest_pb2 as pb
from distckpt.codec import wrap
from distckpt.codec.strategy import decode_json_strategy, decode_strategy
from distckpt.formats import torch_pickle
from distckpt.formats.base import Place
from distckpt.manifest import MANIFEST_NAME
from distckpt.store import FsspecStore
from distckpt.testing import MemoryStore

each_reader = pytest.mark.parametrize("reader", READERS)
MIB = 1 << 20


@pytest.fixture(autouse=True, scope="module")
def _imported():
    """Import what is imported late: the watch can't tell that from what an attacker wants."""
    for reader in READERS:
        READERS[reader].warm(corpus(reader).values())


@contextmanager
def refused(error=CheckpointError, match=None, *, within_bytes):
    """Expect an error, and measure the memory that it took to find out."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        with pytest.raises(error, match=match):
            yield
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak <= within_bytes, f"{peak} bytes; {within_bytes} are allowed"


# ----------------------------------------------------------------------------------- the fuzzers


@pytest.mark.parametrize(
    ("reader", "name"), [(reader, name) for reader in READERS for name in corpus(reader)]
)
def test_no_input_of_the_corpus_breaks_a_promise(reader, name):
    READERS[reader].check(corpus(reader)[name])


@each_reader
def test_nearly_valid_inputs_break_no_promise(reader):
    random, seeds = Random(reader), list(corpus(reader).values())
    for _ in range(30):
        data = random.choice(seeds)
        for _ in range(random.choice([1, 1, 2, 5])):
            data = READERS[reader].mutate(data, random)
        READERS[reader].check(data)


@each_reader
def test_the_fuzzers_inputs_are_not_all_refused(reader):
    def is_read(data):
        try:
            READERS[reader].read(data)
        except CheckpointError as exc:
            return "the manifest names this file" in str(exc) or "damaged places" in str(exc)
        return True

    seeds = {name: data for name, data in corpus(reader).items() if name.startswith("seed-")}
    assert any(map(is_read, seeds.values()))


def burn():
    for _ in range(100):
        run_lap()


@pytest.mark.parametrize(
    ("crime", "told"),
    [
        (lambda: Path("/etc/hostname").read_bytes(), "open"),
        (lambda: os.system("true"), "os.system"),
        (lambda: exec("1"), "compile|exec"),
        (lambda: list(Path("/").iterdir()), "os.listdir|os.scandir"),
        (lambda: bytearray(2 << 20), "bytes of memory"),
        (burn, "s; 0.05 are allowed"),
        (lambda: GuardedStore("x", {}).size("x/../y"), "asked the store"),
        (lambda: GuardedStore("x", {}).size("y"), "asked the store"),
    ],
)
def test_the_guard_sees_what_is_forbidden(crime, told):
    with pytest.raises(Violation, match=told), watched(1 << 20, 0.05):
        crime()


def test_the_guard_lets_other_errors_through():
    with pytest.raises(ZeroDivisionError), watched(1 << 20, 0.2):
        _ = 1 / 0


def test_the_guard_sees_what_was_caught():
    def catch():
        try:
            Path("/etc/hostname").read_bytes()
        except Exception as exc:
            raise CheckpointError("as a reader does") from exc

    with pytest.raises(Violation, match="open"), watched(1 << 20, 1.0):
        catch()


# ---------------------------------------------------------------------------- PyTorch's pickles


def torch_file(pickle, storages=(("0", bytes(64)),)):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a/data.pkl", pickle)
        for key, data in storages:
            archive.writestr(f"a/data/{key}", data)
    return out.getvalue()


def opened(name, data, **options):
    store = MemoryStore()
    store.objects[name] = data
    place = Place(name, store, name)
    form = distckpt.formats.find(
        {"pt": "torch", "ckpt": "mindspore"}.get(name.rpartition(".")[2], name.rpartition(".")[2])
    )
    return form.open(place, **options)


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x10tQ"
TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00K\x02K\x02\x86K\x02K\x01\x86\x89}tR"
)


def doubled(times, begin, step):
    """Say a thing that holds itself twice, and that twice, and so on."""
    return begin + b"\x94" + b"".join(step(bytes([n])) + b"\x94" for n in range(times))


def test_a_pickle_whose_names_repeat_a_long_one_is_refused():
    pickle = b"\x80\x04}" + text("k" * 60_000) + b"](" + b"N" * 50_000 + b"es."  # 3 GB of names
    with refused(CorruptCheckpoint, "over and over", within_bytes=96 * len(pickle)):
        opened("x.pt", torch_file(pickle))


def test_a_list_that_contains_itself_a_million_times_is_refused():
    pickle = b"\x80\x04]\x94(" + b"h\x00" * 1_000_000 + b"e."
    with refused(CorruptCheckpoint, "contain themselves", within_bytes=64 * len(pickle)):
        opened("x.pt", torch_file(pickle))


@pytest.mark.parametrize(
    ("large", "call"),
    [
        (b"](" + b"N" * 50_000 + b"e", b"ctorch\nSize\nh\x00\x85R"),
        (b"](" + b"K\x01" * 50_000 + b"e", b"cbuiltins\nbytes\nh\x00\x85R"),
        (b"](" + b"K\x01N\x86" * 30_000 + b"e", b"ccollections\nOrderedDict\nh\x00\x85R"),
        (text("x" * 50_000), b"c_codecs\nencode\nh\x00" + text("latin1") + b"\x86R"),
        (text("x" * 50_000), b"c_codecs\nencode\n(h\x00" + text("latin1") + b"tR"),
        (text("x" * 50_000), b"(c_codecs\nencode\nh\x00" + text("latin1") + b"o"),
        (text("x" * 50_000), b"(h\x00" + text("latin1") + b"i_codecs\nencode\n"),
        (b"](" + b"N" * 50_000 + b"e", b"ctorch\nSize\nh\x00\x85\x81"),
    ],
    ids=["Size", "bytes", "OrderedDict", "encode", "REDUCE", "OBJ", "INST", "NEWOBJ"],
)
def test_a_pickle_that_makes_much_of_little_is_refused(large, call):
    pickle = b"\x80\x04" + large + b"\x940](" + call * 4000 + b"e."
    with refused(CorruptCheckpoint, "far more", within_bytes=160 * len(pickle)):
        opened("x.pt", torch_file(pickle))


def test_a_set_of_endless_things_is_described_in_few_words():
    def step(at):
        return b"ccollections\nOrderedDict\n)R(K\x00h" + at + b"K\x01h" + at + b"u"

    deep = doubled(40, b"ccollections\nOrderedDict\n)R", step)  # its repr has 2^40 letters
    found = torch_pickle.load(b"\x80\x04(" + deep + b"1cbuiltins\nset\nh\x28\x85R.", "x")
    assert str(found) == "set(a _Dict)"


def test_a_tensor_cannot_be_changed_after_its_checks():
    lies = b"](" + STORAGE + b"ctorch\nfloat32\nJ\xf0\xff\xff\xff" + b"K\x04\x85K\x01\x85eb."
    with refused(CorruptCheckpoint, "a state for a Stored", within_bytes=MIB):
        opened("x.pt", torch_file(b"\x80\x04" + TENSOR + lies))


@pytest.mark.parametrize(
    ("target", "name", "attribute"),
    [
        (b"ctorch._utils\n_rebuild_tensor_v2\n", ("torch._utils", "_rebuild_tensor_v2"), "__doc__"),
        (b"ctorch\nTensor\n", ("torch", "Tensor"), "name"),
        (b"ccollections\nOrderedDict\n", ("collections", "OrderedDict"), "__doc__"),
    ],
)
def test_a_pickle_cannot_change_what_its_names_stand_for(target, name, attribute):
    known = torch_pickle._KNOWN[name]
    before = getattr(known, attribute)
    for state in (
        b"N}" + text(attribute) + text("evil") + b"s\x86",
        b"](" + text("evil") * 2 + b"e",
    ):
        with refused(CorruptCheckpoint, within_bytes=MIB):
            opened("x.pt", torch_file(b"\x80\x04" + target + state + b"b."))
    assert getattr(known, attribute) == before


def test_a_key_of_more_digits_than_python_prints_is_refused():
    key = b"\x8b" + struct.pack("<i", 4000) + b"\x7f" * 4000
    with refused(CorruptCheckpoint, "a key", within_bytes=MIB):
        opened("x.pt", torch_file(b"\x80\x04}" + key + b"Ns."))


@pytest.mark.parametrize(
    "name",
    [
        "os\nsystem",
        "builtins\neval",
        "builtins\ngetattr",
        "torch\nload",
        "torch._utils\n__builtins__",
        "distckpt\nload",
        "codecs\nencode",
        "torch.hub\nload",
        "numpy\nload",
    ],
)
def test_a_pickle_that_names_anything_else_is_refused_and_not_run(name):
    pickle = b"\x80\x04c" + name.encode() + b"\n" + text("touch /tmp/evil") + b"\x85R."
    data = torch_file(pickle)
    with watched(MIB, 5.0), pytest.raises(UnsupportedFormat, match="holds more than weights"):
        opened("x.pt", data)


@pytest.mark.parametrize(
    ("name", "make", "multiple"),
    [
        (
            "x.safetensors",
            lambda n: safetensors(
                json.dumps(
                    {
                        str(i): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
                        for i in range(n)
                    }
                ).encode()
            ),
            64,
        ),
        (
            "x.ckpt",
            lambda n: b"".join(ckpt(tensor((0,), b"Int8"), tag=b"%x" % i) for i in range(n)),
            64,
        ),
        ("x.npz", lambda n: bytes(packed([(f"{i}.npy", ARRAY) for i in range(n // 10)])), 64),
        *(
            ("x.pt", lambda n, say=say: torch_file(b"\x80\x04](" + say * n + b"e."), 250)
            for say in (b"N", b"K\x01", b"]", b"}", b"]Na", b"}NNs", b"]\x94")
        ),
    ],
    ids=["safetensors", "ckpt", "npz", "N", "K1", "list", "dict", "[N]", "{N:N}", "memo"],
)
def test_opening_takes_a_small_multiple_of_the_length(name, make, multiple):
    data = make(5_000)
    with watched(MIB + multiple * len(data), 60.0):
        assert opened(name, data).contents is not None


# -------------------------------------------------------------------------------------- DCP


def dcp(pickle, data=bytes(64)):
    store = MemoryStore()
    store.objects |= {"x/.metadata": pickle, "x/__0_0.distcp": data}
    return distckpt.formats.find("dcp").open(Place("x", store, "x"))


def thing(kind, module="metadata", **fields):
    state = b"".join(text(name) + value for name, value in fields.items())
    return f"ctorch.distributed.checkpoint.{module}\n{kind}\n".encode() + b")\x81}(" + state + b"ub"


def tuple_of(*numbers):
    return b"(" + b"".join(b"K%c" % number for number in numbers) + b"t"


def metadata(tensors, storage):
    return b"\x80\x04" + thing("Metadata", state_dict_metadata=tensors, storage_data=storage) + b"."


FILE, FIRST = text("__0_0.distcp"), tuple_of(0)


def entry(name, file=FILE, start=b"K\x00", length=b"K\x01"):
    return thing("MetadataIndex", fqn=name, offset=FIRST) + thing(
        "_StorageInfo", "filesystem", relative_path=file, offset=start, length=length
    )


def test_a_chunk_that_stands_a_million_times_in_each_tensor_is_refused():
    chunk = thing("ChunkStorageMetadata", offsets=tuple_of(0), sizes=tuple_of(1))
    chunks = b"](" + chunk + b"\x94" + b"h\x00" * 200_000 + b"e\x94"
    properties = thing("TensorProperties", dtype=b"ctorch\nuint8\n")
    names = [f"w{number}" for number in range(60)]
    tensors, storage = b"}(", b"}("
    for number, name in enumerate(names):
        tensors += text(name) + thing(
            "TensorStorageMetadata",
            properties=properties,
            size=tuple_of(1),
            chunks=chunks if not number else b"h\x01",
        )
        storage += entry(text(name))
    pickle = metadata(tensors + b"u", storage + b"u")
    with refused(CorruptCheckpoint, "begin at", within_bytes=160 * len(pickle)):
        dcp(pickle)


@pytest.mark.parametrize("field", ["name", "file", "start", "length"])
def test_endless_things_in_the_metadata_are_refused(field):
    endless = doubled(50, b"N", lambda at: b"h" + at + b"h" + at + b"\x86")
    values = {
        "name": text("w"),
        "file": text("__0_0.distcp"),
        "start": b"K\x00",
        "length": b"K\x01",
    }
    lists = doubled(50, b"]", lambda at: b"](h" + at + b"h" + at + b"e")
    for bomb in (endless, lists):
        pickle = b"\x80\x04(" + bomb + b"1"
        both = {field: b"h\x32"} | ({"length": b"h\x32"} if field == "start" else {})
        storage = b"}" + entry(**values | both) + b"s"
        pickle += metadata(b"}", storage)[2:]
        with refused(CorruptCheckpoint, within_bytes=MIB):
            dcp(pickle)


def test_a_path_that_doubles_is_not_joined():
    begin = b"cpathlib\nPosixPath\n" + text("a" * 100) + b"\x85R"

    def step(at):
        return b"cpathlib\nPosixPath\nh" + at + b"h" + at + b"\x86R"

    pickle = b"\x80\x04(" + doubled(40, begin, step) + b"1" + metadata(b"}", b"}")[2:]
    tracemalloc.start()
    dcp(pickle)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MIB


OUTSIDE = [
    "../x",
    "/etc/passwd",
    "a/../../x",
    "file:///etc/passwd",
    "s3://b/k",
    "a\\b",
    "",
    ".",
    "x//y",
]


@pytest.mark.parametrize("path", OUTSIDE)
def test_files_outside_a_folder_are_not_opened(path):
    pickle = metadata(b"}", b"}" + entry(text("w"), text(path)) + b"s")
    with refused(CorruptCheckpoint, "no file of this folder", within_bytes=MIB):
        dcp(pickle)
    index = json.dumps({"weight_map": {"w": path}}).encode()
    store = MemoryStore()
    store.objects["x/model.safetensors.index.json"] = index
    with refused(CorruptCheckpoint, "outside the folder", within_bytes=MIB):
        distckpt.formats.find("safetensors-folder").open(Place("x", store, "x"))


# ------------------------------------------------------------------------------------- numpy


def npy(header, data=b""):
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


@pytest.mark.parametrize(
    "shape",
    [b"9" * 5000, b"9" * 4300, b"(" * 4000, b" " * 9000 + b"L", b"1" + b" " * 9000 + b"x",
     b"0," + b" " * 9000 + b"x", b"1," * 4000, b"18446744073709551616, 0", b"-1"],
)  # fmt: skip
def test_a_header_of_absurd_numbers_is_refused_at_once(shape):
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + shape + b",), }"
    with watched(MIB, 1.0), pytest.raises(CorruptCheckpoint):
        opened("x.npy", npy(header))


def test_a_zip_bomb_is_refused_before_it_goes_off():
    out = io.BytesIO()
    header = npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d,), }" % (100 * MIB))
    archive = zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED)
    with archive, archive.open("w.npy", "w") as member:
        member.write(header)
        for _ in range(100):
            member.write(bytes(MIB))
    with refused(UnsupportedFormat, "may be a bomb.*max_expansion", within_bytes=MIB):
        opened("x.npz", out.getvalue())
    source = opened("x.npz", out.getvalue(), max_expansion=100)
    buffer = bytearray(1000)
    source.read_into(0, 0, 50 * MIB, memoryview(buffer))
    assert bytes(buffer) == bytes(1000)


def packed(members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return bytearray(out.getvalue())


ARRAY = npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (4,), }", bytes(4))


@pytest.mark.parametrize(
    ("offset", "value", "why"),
    [
        (24, 1 << 30, "can't come from"),
        (24, 5, "its bytes end|array|can't be read"),
        (20, 1 << 30, "ends behind"),
        (42, 1, "no member begins here|overlaps"),
        (16, 1, "can't be read|CRC"),
        (10, 99, "method 99"),
    ],
    ids=["size", "short", "stored", "offset", "checksum", "method"],
)
def test_a_directory_of_an_archive_that_lies_is_refused(offset, value, why):
    data = packed([("w.npy", ARRAY)])
    at = data.index(b"PK\x01\x02") + offset
    size = 2 if offset == 10 else 4
    data[at : at + size] = value.to_bytes(size, "little")
    with refused(CheckpointError, why, within_bytes=MIB):
        source = opened("x.npz", bytes(data))
        source.read_into(0, 0, 0, memoryview(bytearray(4)))


def test_members_that_lie_in_one_another_are_refused():
    data = packed([("a.npy", ARRAY), ("b.npy", ARRAY)])
    first, second = (at for at in range(len(data)) if data[at : at + 4] == b"PK\x01\x02")
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    with refused(CorruptCheckpoint, "overlaps|differ", within_bytes=MIB):
        opened("x.npz", bytes(data))


def test_an_archive_in_an_archive_is_not_opened():
    with refused(UnsupportedFormat, "no .npy file", within_bytes=MIB):
        opened("x.npz", bytes(packed([("x.npz", bytes(packed([("w.npy", ARRAY)])))])))


# ------------------------------------------------------------------------------- safetensors


def safetensors(header, size=None):
    return struct.pack("<Q", len(header) if size is None else size) + header


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (safetensors(b"{}", 1 << 63), "cut short"),
        (safetensors(b"{}", (1 << 64) - 1), "cut short"),
        (safetensors(b"[" * 100_000), "nested too deeply|brackets|JSON"),
        (safetensors(b'{"a":' * 100_000), "nested too deeply|brackets|JSON"),
        (safetensors(b'{"w":{"dtype":"U8","shape":[' + b"9" * 5000 + b"]}}"), "JSON"),
        (
            safetensors(b'{"w":{"dtype":"U8","shape":[1e400],"data_offsets":[0,1]}}'),
            "whole numbers",
        ),
        (safetensors(b'{"w":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}'), "whole numbers"),
        (
            safetensors(
                b'{"w":{"dtype":"F64","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'
            ),
            "over 2\\*\\*64",
        ),
        (safetensors(b'{"w":1,"w":2}'), "twice"),
        (safetensors(b'{"a\\u0000b":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "NUL"),
        (safetensors(b"\xff\xfe{}"), "JSON"),
        (
            safetensors(json.dumps({"__metadata__": {"distckpt": "[" * 50_000}}).encode()),
            "JSON",
        ),
        (
            safetensors(
                json.dumps(
                    {"__metadata__": {"distckpt": '{"values":{"a":{"$int":"zz"}}}'}}
                ).encode()
            ),
            "JSON",
        ),
    ],
)
def test_a_safetensors_header_that_lies_is_refused(data, why):
    with refused(CorruptCheckpoint, why, within_bytes=2 * MIB + 64 * len(data)):
        opened("x.safetensors", data)


def test_a_header_of_brackets_takes_no_twenty_times_its_length():
    data = safetensors(b'{"w":[' + b"[]," * 700_000 + b"[]]}")
    with refused(CorruptCheckpoint, "brackets", within_bytes=4 * len(data)):
        opened("x.safetensors", data)


def colliding(count):
    """Return numbers of one hash: a dict of them takes the square of their number."""
    return [number * ((1 << 61) - 1) for number in range(1, count + 1)]


def test_keys_that_collide_are_refused():
    pairs = [[number, 0] for number in colliding(20_000)]
    note = json.dumps({"metadata": {"$dict": [["x", {"$dict": pairs}]]}})
    header = json.dumps({"__metadata__": {"distckpt": note}}).encode()
    with watched(128 * MIB, 10.0), pytest.raises(CorruptCheckpoint, match="collide"):
        opened("x.safetensors", safetensors(header))
    keys = [pb.Value(big_integer=number.to_bytes(12, "little")) for number in colliding(20_000)]
    tree = pb.Value(dict=pb.Dict(key=keys, item=[pb.Value(null=True)] * len(keys)))
    data = tree.SerializeToString()
    with watched(128 * MIB, 10.0), pytest.raises(CorruptCheckpoint, match="collide"):
        codec.unpack(struct.pack("<Q", len(data)) + data)


# ---------------------------------------------------------------------------------- manifests


def checkpoint_of(message):
    store = MemoryStore()
    store.objects[MANIFEST_NAME] = wrap(message.SerializeToString())
    checkpoint = distckpt.open(store)
    return checkpoint.manifest.pieces


def good(**changes):
    message = pb.Manifest(save_id=1, created_ns=1, ranks=1, block_bytes=1 << 22)
    message.MergeFrom(pb.Manifest(**changes))
    return message


@pytest.mark.parametrize(
    "message",
    [
        good(
            layouts=pb.Layouts(
                ndim=[2],
                shape=[1 << 20] * 2,
                boxes=[0],
                parts=[1 << 20] * 2,
                rule=[pb.BALANCED] * 2,
                file_base=[0],
                file_stride=[1, 0],
            )
        ),
        good(
            layouts=pb.Layouts(
                ndim=[3],
                shape=[1 << 20] * 3,
                boxes=[0],
                parts=[1 << 20] * 3,
                rule=[pb.BALANCED] * 3,
                file_base=[0],
                file_stride=[0] * 3,
            )
        ),
        good(layouts=pb.Layouts(ndim=[1], shape=[4], boxes=[10**9])),
        good(layouts=pb.Layouts(ndim=[10**9])),
        good(
            layouts=pb.Layouts(
                ndim=[32],
                shape=[(1 << 62) - 1] * 32,
                boxes=[1],
                start=[0] * 32,
                extent=[(1 << 62) - 1] * 32,
                file=[0],
            )
        ),
        good(ranks=10**9, per_rank=pb.PerRank(name=["rng"], length=[8], file=[0])),
        good(files=pb.Files(length=[1 << 62], data_start=[4096], digest=bytes(16))),
        good(files=pb.Files(length=[1 << 63], data_start=[1 << 63], digest=bytes(16))),
        good(
            tensors=pb.Tensors(
                suffix=["w"] * 2, shared=[0, 1 << 31], dtype=[11] * 2, layout=[0] * 2
            )
        ),
        good(
            tensors=pb.Tensors(
                suffix=["w" * 65_000, *[""] * 10_000],
                shared=[0, *[65_000] * 10_000],
                dtype=[11] * 10_001,
                layout=[0] * 10_001,
            )
        ),
        good(tensors=pb.Tensors(suffix=["a"], shared=[0], dtype=[11], layout=[1 << 31])),
    ],
    ids=[
        "2^40 cells",
        "2^60 cells",
        "10^9 boxes",
        "10^9 dimensions",
        "product",
        "10^9 ranks",
        "length",
        "2^63",
        "shared",
        "650 MB of names",
        "layout",
    ],
)
def test_counts_in_a_manifest_that_nothing_backs_are_refused(message):
    with refused(CorruptCheckpoint, within_bytes=2 * MIB + 64 * message.ByteSize()):
        checkpoint_of(message)


def grids(count, files, shape, parts, stride):
    ndim = len(shape)
    return good(
        files=pb.Files(length=[8192] * files, data_start=[4096] * files, digest=bytes(16 * files)),
        layouts=pb.Layouts(
            ndim=[ndim] * count,
            shape=shape * count,
            boxes=[0] * count,
            parts=parts * count,
            rule=[pb.BALANCED] * ndim * count,
            file_base=[0] * count,
            file_stride=stride * count,
        ),
        tensors=pb.Tensors(
            suffix=map(str, range(count)),
            shared=[0] * count,
            dtype=[11] * count,
            layout=range(count),
        ),
    )


def boxes(ndim, count):
    return good(
        files=pb.Files(length=[8192], data_start=[4096], digest=bytes(16)),
        layouts=pb.Layouts(
            ndim=[ndim],
            shape=[101] * ndim,
            boxes=[count],
            start=[at % 100 for at in range(count) for _ in range(ndim)],
            extent=[1] * ndim * count,
            file=[0] * count,
        ),
    )


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (grids(20, 400, [1] * 31 + [1 << 20], [1] * 31 + [25_600], [0] * 32), "length"),
        (grids(1000, 1000, [1 << 20], [1000], [1]), "length"),
        (boxes(8, 1000), "cover"),
        (boxes(5, 1000), "cover"),
        (boxes(4, 5000), "cover"),
        (boxes(8, 5000), "5000 boxes in 8 dimensions"),
    ],
    ids=["wide grids", "many grids", "8 dims", "5 dims", "4 dims", "8 dims, many"],
)
def test_a_manifest_of_many_boxes_is_judged_in_little_memory(message, why):
    size = message.ByteSize()
    with refused(CorruptCheckpoint, why, within_bytes=4 * MIB + 300 * size):
        checkpoint_of(message)


def test_values_nested_a_hundred_deep_are_refused():
    value = pb.Value(null=True)
    data = value.SerializeToString()
    for _ in range(2000):
        inner = b"\x0a" + mutate._varint(len(data)) + data
        number = pb.Value.DESCRIPTOR.fields_by_name["list"].number
        data = mutate._varint(number << 3 | 2) + mutate._varint(len(inner)) + inner
    with refused(CorruptCheckpoint, within_bytes=64 * len(data) + MIB):
        codec.unpack(struct.pack("<Q", len(data)) + data)


@pytest.mark.parametrize(
    ("shape", "offset"),
    [
        ([1 << 62, 1 << 62], 0),
        ([(1 << 64) - 1], 0),
        ([2] * 33, 0),
        ([1], 1 << 63),
        ([0, 1 << 63], 0),
    ],
)
def test_an_array_in_a_blob_that_lies_is_refused(shape, offset):
    tree = pb.Value(array=pb.Array(dtype=11, shape=shape, offset=offset)).SerializeToString()
    with refused(CorruptCheckpoint, within_bytes=MIB):
        codec.unpack(struct.pack("<Q", len(tree)) + tree + bytes(16))


def test_an_array_of_a_million_dimensions_is_refused_at_once():
    shape = [(1 << 64) - 1] * 300_000
    tree = pb.Value(array=pb.Array(dtype=11, shape=shape)).SerializeToString()
    with watched(64 * MIB, 2.0), pytest.raises(CorruptCheckpoint):
        codec.unpack(struct.pack("<Q", len(tree)) + tree)


# ------------------------------------------------------------------------------- MindSpore


def field(number, content):
    return mutate._varint(number << 3 | 2) + mutate._varint(len(content)) + content


def tensor(dims, kind=b"Float32", content=b"", claimed=None):
    data = b"".join(b"\x08" + mutate._varint(extent % (1 << 64)) for extent in dims)
    data += field(2, kind)
    return data + b"\x1a" + mutate._varint(len(content) if claimed is None else claimed) + content


def ckpt(*tensors, tag=b"w", number=2):
    return b"".join(field(1, field(1, tag) + field(number, one)) for one in tensors)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (ckpt(tensor((4,), claimed=1 << 31)), "announced"),
        (ckpt(tensor((0,), b"str", claimed=1 << 31)), "announced"),
        (ckpt(tensor((4,), claimed=(1 << 64) - 1)), "announced"),
        (ckpt(tensor((1 << 62, 1 << 62))), "more bytes than any"),
        (ckpt(tensor((-1, -1), content=bytes(4))), "negative"),
        (ckpt(tensor((1,) * 33, content=bytes(4))), "more than 32"),
        (ckpt(tensor((1,), content=bytes(4)), tensor((2,), content=bytes(8))), "not slices"),
        (ckpt(tensor((1,), b"x" * 65, bytes(4))), "a type of 65"),
        (ckpt(tensor((1,), content=bytes(4)), tag=b"a\0b"), "NUL"),
        (ckpt(tensor((1,), content=bytes(4)), tag=b"\xff"), "UTF-8"),
        (ckpt(tensor((1,), content=bytes(4)), tag=b"n" * 70_000), "a tag of 70000"),
        (b"\x0a" + b"\xff" * 10 + b"\x01", "doesn't end"),
        (b"\x0b" * 1000, "wire type 3"),
        (b"\x0a\x00" * 1000, "without a tag"),
    ],
)
def test_a_ckpt_that_lies_is_refused(data, why):
    with refused(CheckpointError, why, within_bytes=MIB + 64 * len(data)):
        opened("x.ckpt", data)


def test_rows_of_a_map_parameter_are_not_negative():
    def rows(count, content):
        parts = (tensor((count,), b"int32", content), tensor((count,), b"float32", content),
                 tensor((count,), b"int32", content))  # fmt: skip
        return b"".join(field(1, part) for part in parts)

    data = ckpt(rows(-1, b""), rows(2, bytes(4)), number=3)
    with refused(CorruptCheckpoint, "not rows", within_bytes=MIB):
        opened("x.ckpt", data)


@pytest.mark.parametrize("length", [-1, 0, (1 << 31) - 1, 17])
@pytest.mark.parametrize("mode", ["AES-GCM", "AES-CBC", "SM4-CBC"])
def test_a_frame_that_lies_about_its_length_is_refused(mode, length):
    data = bytearray(corpus("ckpt-encrypted")[f"seed-{mode.lower()}-one"])
    at = 44 if mode == "AES-GCM" else 28
    data[at : at + 4] = struct.pack("<i", length)
    rest = at - 24
    data[rest : rest + 4] = struct.pack("<I", (24 + length) % (1 << 32))
    with refused(CorruptCheckpoint, within_bytes=MIB):
        source = opened("x.ckpt", bytes(data), key=mutate.KEY, mode=mode)
        source.read_into(0, 0, 0, memoryview(bytearray(4)))


def test_strategies_in_other_encodings_are_refused():
    with refused(CorruptCheckpoint, "UTF-8", within_bytes=MIB):
        decode_strategy(
            b"\x08\x01\x1a\x16\x0a\x01\xff\x12\x11\x0a\x00\x12\x00\x1a\x00\x22\x00\x28\x00\x30\x00\x38\x00".replace(
                b"\x16", b"\x13"
            ).replace(b"\x11", b"\x0e")
        )
    with refused(CorruptCheckpoint, "not JSON", within_bytes=MIB):
        decode_json_strategy('{"a": 1}'.encode("utf-32"))
    with refused(CorruptCheckpoint, "not JSON", within_bytes=8 * MIB):
        decode_json_strategy(b'{"a":' * 100_000)


# ------------------------------------------------------------------------------------- HDF5


@pytest.fixture
def h5(tmp_path):
    h5py = pytest.importorskip("h5py")

    def make(fill):
        path = tmp_path / "x.h5"
        with h5py.File(path, "w") as file:
            fill(file, h5py)
        return path

    return make


def chunked(file, h5py, size, *filters):
    """Make a dataset of one chunk with a pipeline of filters."""
    made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    made.set_chunk((size,))
    for _ in filters:
        made.set_deflate(9)
    space = h5py.h5s.create_simple((size,))
    return h5py.h5d.create(file.id, b"w", h5py.h5t.NATIVE_UINT8, space, made)


def test_a_dataset_that_is_deflated_twice_is_refused(h5):
    def fill(file, h5py):
        chunked(file, h5py, MIB, "deflate", "deflate").write(
            h5py.h5s.ALL, h5py.h5s.ALL, np.zeros(MIB, np.uint8)
        )

    path = h5(fill)
    with refused(UnsupportedFormat, "one compression", within_bytes=MIB):
        distckpt.load(path)


def test_a_chunk_that_inflates_to_more_than_a_chunk_is_refused(h5):
    def fill(file, h5py):
        bomb = zlib.compress(bytes(1000 * 4096), 9)  # a chunk has 4096
        chunked(file, h5py, 4096, "deflate").write_direct_chunk((0,), bomb)

    path = h5(fill)
    with refused(CheckpointError, "inflates to more", within_bytes=17 * MIB):
        distckpt.load(path)


def test_a_compressed_dataset_of_zeros_is_a_bomb_unless_it_is_trusted(h5):
    def fill(file, h5py):
        file.create_dataset(
            "w", data=np.zeros(100 * MIB, np.uint8), compression="gzip", chunks=(MIB,)
        )

    path = h5(fill)
    with refused(UnsupportedFormat, "max_expansion", within_bytes=MIB):
        distckpt.open(path)
    checkpoint = distckpt.open(path, options={"max_expansion": 100})
    assert not checkpoint["w"][50 * MIB : 50 * MIB + 10].any()


# --------------------------------------------------------------------------------- the store


def test_a_server_that_lies_about_a_length_costs_what_it_sends():
    class Liar(MemoryStore):
        def size(self, name):
            return 1 << 40

    store = Liar()
    store.objects["x"] = bytes(10 * MIB)
    with refused(CorruptCheckpoint, "cut short", within_bytes=64 * MIB):
        Place("x", store, "x").read(0, 1 << 40)


SECRET = "hunter2"


@pytest.mark.parametrize(
    "url",
    [
        "https://me:{}@host/c",
        "https://host:8080/a/x.npz?X-Amz-Signature={}&b=1",
        "https://host/x.npz%3Fsig%3D{}",
        "s3://key:{}@bucket/c",
    ],
)
def test_no_error_tells_a_secret_of_a_url(url):
    url = url.format(SECRET)
    errors = [CheckpointError(f"{url}: damaged"), CorruptCheckpoint(f"({url})", path=url)]
    errors += [StoreError(f"no {url!r}.", url=url), CheckpointNotFound(f"{url}/x")]
    errors += [SaveFailed(f"{url}:\n  rank 0: {url}: gone", failures={0: f"{url}: gone"})]
    for error in errors:
        said = str(error) + repr(error) + repr(vars(error))
        assert SECRET not in said
        assert "://" in said


@pytest.mark.parametrize("url", ["nosuch://me:{}@host/c", "memory://me:{}@host/c", "s3://k:{}@b/"])
def test_no_secret_of_a_url_that_is_opened_is_told(url, caplog):
    caplog.set_level("DEBUG", "distckpt")
    with pytest.raises(CheckpointError) as told:
        distckpt.open(url.format(SECRET))
    said = "".join(traceback.format_exception(told.value)) + caplog.text
    assert SECRET not in said + repr(vars(told.value))


def test_a_secret_in_the_cause_of_an_error_is_not_told():
    class Leaky(MemoryFileSystem):
        protocol = "leaky"

        def info(self, path, **_):
            raise OSError(f"403: https://me:{SECRET}@host/{path}?sig={SECRET}")

    store = FsspecStore(Leaky(), "c", f"leaky://me:{SECRET}@host/c")
    with pytest.raises(StoreError) as told:
        store.size("x")
    said = "".join(traceback.format_exception(told.value)) + repr(vars(told.value)) + store.url
    assert SECRET not in said
    assert "403" in said


def test_links_are_followed_as_hugging_faces_cache_needs(tmp_path):
    distckpt.convert(
        distckpt.save(tmp_path / "c", {"w": np.arange(3)}).url, tmp_path / "blob.safetensors"
    )
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(tmp_path / "blob.safetensors")
    assert distckpt.load(folder)["w"].tolist() == [0, 1, 2]


def test_what_a_link_points_to_is_neither_written_nor_deleted(tmp_path):
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    target = tmp_path / "x.npz"
    target.symlink_to(precious)
    checkpoint = distckpt.save(tmp_path / "c", {"w": np.arange(3)})
    distckpt.convert(checkpoint.url, target, overwrite=True)
    assert precious.read_bytes() == b"precious"
    assert not target.is_symlink()


@pytest.mark.parametrize("name", [MANIFEST_NAME, "model.safetensors"])
def test_a_pipe_in_the_place_of_a_file_does_not_hang(tmp_path, name):
    folder = tmp_path / "c"
    folder.mkdir()
    os.mkfifo(folder / name)
    with refused(CheckpointError, within_bytes=MIB):
        distckpt.load(folder)


def test_overwriting_a_strangers_folder_deletes_no_file_that_it_names(tmp_path):
    folder = tmp_path / "f"
    checkpoint = distckpt.save(tmp_path / "c", {"w": np.arange(3)})
    distckpt.convert(checkpoint.url, folder, format="safetensors-folder")
    (folder / "notes.txt").write_text("mine")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "notes.txt"}}))
    distckpt.convert(checkpoint.url, folder, format="safetensors-folder", overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
