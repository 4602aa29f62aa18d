"""A shard file is a safetensors file, and every block of it has a checksum."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import threading

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import distckpt
from distckpt import LayoutError, Region, commit, dtypes
from distckpt.manifest import BLOCK_BYTES, table_bytes
from distckpt.shardfile import (
    Piece,
    ShardImage,
    ShardLayout,
    blob_key,
    checksum,
    checksum_run,
    copy_run,
    piece_key,
    table_digest,
)
from distckpt.stats import Recorder
from distckpt.store import local, open_store
from distckpt.testing import MemoryStore, run_ranks
from distckpt.writer import write_image

_MANY = settings(max_examples=3 * settings.default.max_examples)

TABLE = "__crc32c__"
# What safetensors' own numpy reader makes arrays of; it knows no float8.
READABLE = [e for e in dtypes.TABLE if e.safetensors and not e.safetensors.startswith("F8")]


def file_of(image):
    """Make the whole file, block by block, with its table."""
    data = bytearray()
    for index in range(image.layout.blocks):
        start, stop = image.layout.block(index)
        block = np.full(stop - start, 0xAA, np.uint8)
        image.fill(block, start, stop)
        data += block.tobytes()
    starts = range(0, len(data), image.layout.block_bytes)
    table = [checksum(bytes(data[start : start + image.layout.block_bytes])) for start in starts]
    return bytes(data) + struct.pack(f"<{len(table)}I", *table)


def header_of(data):
    """Parse the header as the safetensors specification says."""
    (length,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + length]), 8 + length


def piece(key, array, first=0, shape=None):
    shape = array.shape if shape is None else shape
    return Piece(key, dtypes.find(array.dtype), shape), (array, first)


def image_of(pieces, block_bytes):
    layout = ShardLayout([piece for piece, _ in pieces], block_bytes)
    return ShardImage(layout, [source for _, source in pieces])


def random_array(entry, shape, seed=0):
    """Any bits of a dtype, NaNs among them; small kinds have their unused bits zero."""
    size = math.prod(shape)
    raw = np.random.default_rng(seed).integers(0, 256, size * entry.itemsize, np.uint8)
    if entry.name == "bool":
        raw &= 1
    return raw.view(entry.numpy).reshape(shape)


def as_bytes(array):
    """The bytes of an array in a file: little-endian, C order."""
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()


# -------------------------------------------------------------------------------------- safetensors


@pytest.mark.parametrize("entry", READABLE, ids=lambda entry: entry.name)
def test_a_tensor_opens_with_safetensors_and_is_equal(entry, tmp_path):
    array = random_array(entry, (3, 5))
    path = tmp_path / "shard.safetensors"
    path.write_bytes(file_of(image_of([piece("net.w", array)], 4096)))
    with safe_open(path, "numpy") as opened:
        assert list(opened.keys()) == [TABLE, "net.w"]
        found = opened.get_tensor("net.w")
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert found.tobytes() == array.tobytes()
        assert opened.metadata() == {"format": "distckpt", "version": "1", "block_bytes": "4096"}


def test_a_file_with_every_dtype_opens_with_safetensors(tmp_path):
    entries = sorted(dtypes.TABLE, key=lambda entry: -entry.itemsize)
    arrays = {entry.name: random_array(entry, (2, 3), entry.code) for entry in entries}
    path = tmp_path / "shard.safetensors"
    path.write_bytes(file_of(image_of([piece(k, a) for k, a in arrays.items()], 4096)))
    with safe_open(path, "numpy") as opened:
        assert set(opened.keys()) == {TABLE, *arrays}
        for entry in READABLE:
            assert opened.get_tensor(entry.name).tobytes() == arrays[entry.name].tobytes()
        for entry in set(dtypes.TABLE) - set(READABLE):
            assert opened.get_slice(entry.name).get_dtype() == (entry.safetensors or "U8")


@pytest.mark.parametrize(
    ("dtype", "stored", "shape"),
    [
        (np.complex128, "U8", [2, 3, 16]),
        (ml_dtypes.int4, "U8", [2, 3]),
        (ml_dtypes.uint4, "U8", [2, 3]),
        (ml_dtypes.float8_e4m3b11fnuz, "U8", [2, 3]),
        (ml_dtypes.float4_e2m1fn, "U8", [2, 3]),
        (ml_dtypes.float8_e4m3fn, "F8_E4M3", [2, 3]),
        (ml_dtypes.float8_e5m2, "F8_E5M2", [2, 3]),
        (ml_dtypes.bfloat16, "BF16", [2, 3]),
        (np.complex64, "C64", [2, 3]),
    ],
)
def test_what_safetensors_lacks_is_stored_as_bytes(dtype, stored, shape, tmp_path):
    array = np.arange(6).astype(dtype).reshape(2, 3)
    data = file_of(image_of([piece("w", array)], 4096))
    header, start = header_of(data)
    entry = header["w"]
    assert (entry["dtype"], entry["shape"]) == (stored, shape)
    begin, end = entry["data_offsets"]
    assert data[start + begin : start + end] == as_bytes(array)
    if stored == "U8":
        path = tmp_path / "shard.safetensors"
        path.write_bytes(data)
        with safe_open(path, "numpy") as opened:
            assert opened.get_tensor("w").tobytes() == as_bytes(array)


@pytest.mark.parametrize(
    "name", ["", "a.b", "é語", 'quote " \\ \n \x01', "a@b:c", "with space", "😀"]
)
def test_any_name_survives_in_the_header(name, tmp_path):
    path = tmp_path / "shard.safetensors"
    path.write_bytes(file_of(image_of([piece(name, np.ones(3, np.float32))], 4096)))
    with safe_open(path, "numpy") as opened:
        assert set(opened.keys()) == {name, TABLE}
        assert opened.get_tensor(name).tolist() == [1, 1, 1]


def test_scalars_and_empty_tensors_open_with_safetensors(tmp_path):
    pieces = [
        piece("empty", np.zeros((3, 0, 2))),
        piece("scalar", np.array(2.5)),
        piece("also empty", np.zeros(0, np.int8)),
    ]
    path = tmp_path / "shard.safetensors"
    path.write_bytes(file_of(image_of(pieces, 4096)))
    with safe_open(path, "numpy") as opened:
        assert opened.get_tensor("scalar")[()] == 2.5
        assert opened.get_slice("empty").get_shape() == [3, 0, 2]
        assert opened.get_slice("also empty").get_shape() == [0]


# ----------------------------------------------------------------------------- header and alignment


def some_pieces(count, size=10):
    return [piece(f"layers.{n}.weight", np.full(size, n, np.float32)) for n in range(count)]


@pytest.mark.parametrize("count", [0, 1, 2, 30, 40, 41, 42, 43, 44, 45, 100, 1000])
def test_data_starts_at_the_first_multiple_of_4096_that_the_header_fits_before(count):
    image = image_of(some_pieces(count), 4096)
    data = file_of(image)
    (length,) = struct.unpack_from("<Q", data)
    text = data[8 : 8 + length].rstrip(b" ")
    assert 8 + length == image.layout.data_start == len(image.layout.header)
    assert image.layout.data_start % 4096 == 0
    assert image.layout.data_start - 4096 < 8 + len(text) <= image.layout.data_start
    assert text.endswith(b"}}")
    assert data[: image.layout.data_start] == image.layout.header


def test_the_header_names_the_pieces_in_the_order_of_the_file_without_holes():
    pieces = [
        piece("c", np.zeros(3, np.complex128)),
        piece("f", np.zeros((2, 2), np.float32)),
        piece("h", np.zeros(5, np.float16)),
        piece("b", np.zeros(7, bool)),
    ]
    image = image_of(pieces, 4096)
    header, start = header_of(file_of(image))
    assert list(header) == ["__metadata__", "c", "f", "h", "b", TABLE]
    at = 0
    for key in list(header)[1:]:
        begin, end = header[key]["data_offsets"]
        assert begin == at
        at = end
    assert start + at == image.layout.length


def test_every_tensor_of_a_state_is_aligned_to_its_own_size():
    state = {e.name: random_array(e, (3,), e.code) for e in reversed(dtypes.TABLE)}
    store = MemoryStore()
    distckpt.save(store, state, comm=distckpt.Solo())
    (shard,) = distckpt.open(store).manifest.file_names
    header, start = header_of(store.objects[shard])
    sizes = []
    for name, entry in header.items():
        if name not in {"__metadata__", TABLE}:
            item = dtypes.BY_NAME[name].itemsize
            sizes.append(item)
            assert (start + entry["data_offsets"][0]) % item == 0
    assert sizes == sorted(sizes, reverse=True)
    assert list(header)[-1] == TABLE


@pytest.mark.parametrize(
    ("shape", "region", "key"),
    [
        ((4, 6), Region((0, 0), (4, 6)), "w"),
        ((4, 6), Region((0, 2), (4, 6)), "w@0:4,2:6"),
        ((10,), Region((3,), (4,)), "w@3:4"),
        ((), Region((), ()), "w"),
        ((3, 0), Region((0, 0), (3, 0)), "w"),
    ],
)
def test_a_piece_is_named_with_its_box_unless_it_is_the_whole(shape, region, key):
    assert piece_key("w", shape, region) == key


def test_a_per_rank_value_is_named_with_its_rank():
    assert blob_key("rng", 12) == "rng@rank12"


@pytest.mark.parametrize("key", ["__crc32c__", "__metadata__"])
def test_a_reserved_key_is_refused(key):
    with pytest.raises(LayoutError, match=f"'{key}': this key is reserved; rename the tensor"):
        image_of([piece(key, np.ones(1))], 4096)


def test_a_key_that_is_needed_twice_is_refused():
    with pytest.raises(LayoutError, match="'w@0:2': this key is needed twice in one shard file"):
        image_of([piece("w@0:2", np.ones(2)), piece("w@0:2", np.ones(2))], 4096)


# ---------------------------------------------------------------------------------------- checksums


def crc32c_by_hand(data):
    """CRC32C a bit at a time, as RFC 3720 defines it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_the_checksum_is_crc32c():
    assert checksum(b"123456789") == 0xE3069283
    assert checksum(b"") == 0
    assert checksum(bytes(32)) == 0x8A9136AA


@given(st.binary(max_size=100))
def test_the_checksum_is_crc32c_of_any_bytes(data):
    assert checksum(data) == crc32c_by_hand(data)


def table_of(data):
    header, start = header_of(data)
    begin, end = header[TABLE]["data_offsets"]
    assert header[TABLE]["dtype"] == "U8"
    assert header[TABLE]["shape"] == [end - begin]
    assert start + end == len(data)
    return start + begin, np.frombuffer(data[start + begin :], "<u4").tolist()


def test_the_last_tensor_is_the_checksum_of_every_block_before_it():
    image = image_of(some_pieces(3, size=1500), 4096)
    data = file_of(image)
    table_start, table = table_of(data)
    assert table_start == image.layout.table_start == 4096 + 3 * 6000
    blocks = [data[at : min(at + 4096, table_start)] for at in range(0, table_start, 4096)]
    assert table == [crc32c_by_hand(block) for block in blocks]
    assert len(table) == image.layout.blocks == 6
    assert image.layout.length == len(data) == table_start + table_bytes(table_start, 4096)


@pytest.mark.parametrize("block_bytes", [4096, BLOCK_BYTES])
def test_blocks_count_from_the_first_byte_of_the_file(block_bytes):
    array = np.arange(3 * block_bytes // 4 // 2 * 2, dtype=np.float32)
    data = file_of(image_of([piece("w", array)], block_bytes))
    table_start, table = table_of(data)
    blocks = range(0, table_start, block_bytes)
    assert table == [checksum(data[at : min(at + block_bytes, table_start)]) for at in blocks]
    assert len(table) == 4


def test_a_file_that_ends_with_a_block_has_no_block_more():
    image = image_of([piece("w", np.zeros(4096, np.uint8))], 4096)
    assert (image.layout.blocks, image.layout.table_start) == (2, 8192)
    assert image.layout.block(1) == (4096, 8192)


def test_a_file_without_tensors_has_the_checksum_of_its_header():
    data = file_of(image_of([], 4096))
    assert table_of(data) == (4096, [crc32c_by_hand(data[:4096])])


def test_the_digest_of_a_table_is_the_first_half_of_its_sha256():
    assert table_digest(b"table") == hashlib.sha256(b"table").digest()[:16]


# ------------------------------------------------------------------------------------------ sources


@st.composite
def sources(draw):
    """Arrays with any strides and byte order, and a run of their elements."""
    entry = draw(st.sampled_from(dtypes.TABLE))
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=4)))
    array = random_array(entry, shape, draw(st.integers(0, 5)))
    for dim in range(array.ndim):
        array = array[
            (slice(None),) * dim + (slice(None, None, draw(st.sampled_from([1, 1, 2, -1, -3]))),)
        ]
    if array.ndim > 1:
        array = array.transpose(draw(st.permutations(range(array.ndim))))
    if draw(st.booleans()):
        array = np.asfortranarray(array)
    if draw(st.booleans()):
        array = array.astype(array.dtype.newbyteorder(">"))
    array.flags.writeable = draw(st.booleans()) and array.flags.writeable
    first, last = sorted(draw(st.tuples(*[st.integers(0, array.size)] * 2)))
    return entry, array, first, last - first


@_MANY
@given(sources())
def test_a_run_of_any_array_is_copied_in_c_order_and_little_endian(source):
    entry, array, first, count = source
    expected = as_bytes(array)[first * entry.itemsize :][: count * entry.itemsize]
    out = np.full(count * entry.itemsize, 0xAA, np.uint8)
    copy_run(array, entry, first, count, out)
    assert out.tobytes() == expected
    assert checksum_run(array, entry, first, count) == checksum(expected)


def test_the_checksum_of_a_long_run_is_taken_in_steps():
    array = np.arange(700_000, dtype=">f8").reshape(700, 1000).T
    entry = dtypes.find(array.dtype)
    expected = as_bytes(array)[8 * 12_345 : 8 * 650_001]
    assert checksum_run(array, entry, 12_345, 650_001 - 12_345) == checksum(expected)


@_MANY
@given(st.lists(sources(), max_size=5), st.sampled_from([4096, 8192]), st.data())
def test_a_file_holds_the_runs_whatever_their_arrays(found, block_bytes, data):
    found.sort(key=lambda source: -source[0].itemsize)
    pieces = [
        (Piece(f"p{number}", entry, (count,)), (array, first))
        for number, (entry, array, first, count) in enumerate(found)
    ]
    image = image_of(pieces, block_bytes)
    written = file_of(image)
    header, start = header_of(written)
    for number, (entry, array, first, count) in enumerate(found):
        begin, end = header[f"p{number}"]["data_offsets"]
        expected = as_bytes(array)[first * entry.itemsize :][: count * entry.itemsize]
        assert written[start + begin : start + end] == expected
    # Any range of whole blocks is produced alike, in whatever order it is asked for.
    low, high = sorted(data.draw(st.tuples(*[st.integers(0, image.layout.blocks)] * 2)))
    low, high = (min(at * block_bytes, image.layout.table_start) for at in (low, high))
    buffer = np.zeros(high - low, np.uint8)
    image.fill(buffer, low, high)
    assert buffer.tobytes() == written[low:high]


LARGE = np.arange(40_000, dtype=np.int32)


@pytest.mark.parametrize(
    "array",
    [
        LARGE.reshape(200, 200).T,
        np.asfortranarray(LARGE.reshape(200, 200)),
        LARGE[::-1],
        LARGE[::3],
        LARGE.astype(">i4"),
        LARGE.reshape(20, 10, 200)[::2, ::-1, 5:-5],
        np.broadcast_to(LARGE[:100], (50, 100)),
    ],
    ids=["transposed", "fortran", "reversed", "strided", "big-endian", "cut", "broadcast"],
)
def test_an_array_over_many_blocks_is_stored_as_numpy_reads_it(array, tmp_path):
    path = tmp_path / "shard.safetensors"
    path.write_bytes(file_of(image_of([piece("w", array)], 4096)))
    with safe_open(path, "numpy") as opened:
        assert np.array_equal(opened.get_tensor("w"), array)


def test_a_box_inside_an_array_is_stored_as_a_run_of_it(tmp_path):
    array = np.arange(24.0).reshape(4, 6)
    path = tmp_path / "shard.safetensors"
    path.write_bytes(file_of(image_of([piece("w@1:3,0:6", array, 6, (2, 6))], 4096)))
    with safe_open(path, "numpy") as opened:
        assert np.array_equal(opened.get_tensor("w@1:3,0:6"), array[1:3])


def test_the_sources_are_not_changed():
    array = np.arange(10.0)[::-1].copy()
    array.flags.writeable = False
    before = array.copy()
    file_of(image_of([piece("w", array)], 4096))
    assert np.array_equal(array, before)


# --------------------------------------------------------------------------------------- as written


@pytest.mark.parametrize("cores", [1, 2, 8])
def test_a_file_in_the_page_cache_is_written_by_two_threads_where_a_core_is_free(
    cores, tmp_path, monkeypatch
):
    monkeypatch.setattr("distckpt.store.local._DIRECT", frozenset())
    image = image_of([piece("a", LARGE[::-1])], 4096)
    writers, together = set(), threading.Barrier(min(cores, 2), timeout=20)
    original = local._LocalSink.write_at

    def write_at(sink, start, data):
        if threading.get_ident() not in writers and start < image.layout.table_start:
            writers.add(threading.get_ident())
            together.wait()  # neither goes on without the other
        original(sink, start, data)

    monkeypatch.setattr(local._LocalSink, "write_at", write_at)
    write_image(open_store(tmp_path), "shard", image, file=0, recorder=Recorder(), cores=cores)
    assert len(writers) == min(cores, 2)
    assert (tmp_path / "shard").read_bytes() == file_of(image)


def test_ranks_share_the_cores_of_the_machine_that_has_most_of_them(monkeypatch):
    asked = []
    monkeypatch.setattr(commit, "cores_for_each", lambda neighbours: asked.append(neighbours) or 1)
    store = MemoryStore()
    run_ranks(
        4,
        lambda comm: [
            distckpt.save(store, {"w": np.ones(3)}, comm=comm, overwrite=True) for _ in range(2)
        ],
        nodes=["a", "b", "a", "a"],
    )
    files = len(asked) // 2
    assert files
    assert asked == [4] * files + [3] * files  # the first commit tells who is where


def test_a_written_file_is_the_image_and_its_table():
    image = image_of([piece("a", LARGE[::-1]), piece("b", np.arange(9, dtype=np.int8))], 4096)
    store, recorder = MemoryStore(), Recorder()
    record = write_image(store, "shard", image, file=7, recorder=recorder)
    assert recorder.nbytes == image.layout.length
    data = file_of(image)
    table_start, _ = table_of(data)
    assert store.objects == {"shard": data}
    assert (record.file, record.length) == (7, len(data))
    assert record.data_start == image.layout.data_start
    assert record.digest == table_digest(data[table_start:])


@given(st.lists(st.integers(0, 700), max_size=40), st.integers(0, 1000))
def test_any_stretch_of_a_file_is_produced_alike(lengths, seed):
    """Small arrays together, parts of large ones, and what must be copied element by element."""
    rng = np.random.default_rng(seed)
    arrays = [rng.integers(0, 256, length, np.uint8) for length in lengths]
    arrays = [array[::-1] if rng.random() < 0.2 else array for array in arrays]
    image = image_of([piece(f"{i}", array) for i, array in enumerate(arrays)], 4096)
    whole = np.empty(image.layout.table_start, np.uint8)
    image.fill(whole, 0, len(whole))
    data = image.layout.data_start
    assert whole[:data].tobytes() == image.layout.header
    assert whole[data:].tobytes() == b"".join(map(as_bytes, arrays))
    start, stop = sorted(rng.integers(0, len(whole) + 1, 2).tolist())
    part = np.empty(stop - start, np.uint8)
    image.fill(part, start, stop)
    assert part.tobytes() == whole[start:stop].tobytes()
    again = np.empty_like(part)
    value = image.fill_checked(again, start, stop, piece_bytes=1 << rng.integers(4, 12))
    assert again.tobytes() == part.tobytes()
    assert value == checksum(part.data)
    found = [
        i
        for i in range(len(arrays))
        if max(start, image.layout.starts[i]) < min(stop, image.layout.starts[i + 1])
    ]
    assert [i for i in image.layout.pieces_in(start, stop) if lengths[i]] == found
