"""Damage to what lies in the storage is found, whatever it is, before a net gets one wrong byte."""

from __future__ import annotations

import os
import re
from functools import partial

import numpy as np
import pytest

import distckpt
from distckpt import (
    CheckpointError,
    CheckpointNotFound,
    CorruptCheckpoint,
    IncompleteCheckpoint,
    LoadFailed,
    PerRank,
    Shard,
    StoreError,
    UnsupportedFormat,
    commit,
    prepare,
    writer,
)
from distckpt.manifest import MANIFEST_NAME
from distckpt.store import open_store
from distckpt.testing import FaultyStore, MemoryStore, run_ranks

_BLOCK = 4096


class Damaged(MemoryStore):
    """A copy of a store in which one object holds something else."""

    def __init__(self, objects, name, data):
        super().__init__()
        self.objects = objects | ({} if data is None else {name: data})
        if data is None:
            del self.objects[name]


def flipped(data, byte, mask):
    changed = bytearray(data)
    changed[byte] ^= mask
    return bytes(changed)


def a_mask(byte):
    """One bit, or all of them, or some: another one for each byte."""
    return (1, 2, 4, 8, 16, 32, 64, 128, 255, 0x55)[byte % 10]


STATE = {
    "w": np.arange(12.0).reshape(3, 4),
    "half": np.arange(5, dtype=np.float16),
    "rng": PerRank({"state": 7}),
    "epoch": 3,
}


@pytest.fixture(scope="module")
def small():
    """A checkpoint of one small file: its objects, and the file's name."""
    store = MemoryStore()
    distckpt.save(store, STATE)
    (shard,) = store.objects.keys() - {MANIFEST_NAME}
    return store.objects, shard


def damaged_reads(store):
    """What must notice damage in a file of one block: everything that reads of it."""
    checkpoint = distckpt.open(store)
    return {
        "load": lambda: distckpt.load(store),
        "verify": checkpoint.verify,
        "a tensor": lambda: checkpoint["half"][2:3],
        "a per-rank value": lambda: checkpoint.per_rank["rng"][0],
    }


# ----------------------------------------------------------------------- every byte of a shard file


def test_the_undamaged_file_is_read(small):
    objects, shard = small
    for read in damaged_reads(Damaged(objects, shard, objects[shard])).values():
        read()


def test_every_flipped_byte_of_a_shard_file_is_found_by_verify(small):
    objects, shard = small
    store = Damaged(objects, shard, objects[shard])
    checkpoint = distckpt.open(store)
    for byte in range(len(objects[shard])):
        store.objects[shard] = flipped(objects[shard], byte, a_mask(byte))
        with pytest.raises(CorruptCheckpoint, match=shard):
            checkpoint.verify()


@pytest.mark.parametrize("read", ["load", "a tensor", "a per-rank value"])
def test_every_flipped_byte_of_a_shard_file_is_found_by_reading(small, read):
    objects, shard = small
    data = objects[shard]
    start = int(distckpt.open(Damaged(objects, shard, data)).manifest.file_data_start[0])
    # All of the tensors and of the checksums, and some of the header and its padding.
    for byte in [*range(0, start, 61), *range(start, len(data))]:
        store = Damaged(objects, shard, flipped(data, byte, a_mask(byte)))
        with pytest.raises((CorruptCheckpoint, LoadFailed), match=f"{shard}: .* damaged"):
            damaged_reads(store)[read]()


def test_every_truncation_of_a_shard_file_is_found_by_verify(small):
    objects, shard = small
    data = objects[shard]
    store = Damaged(objects, shard, data)
    checkpoint = distckpt.open(store)
    for length in range(len(data)):
        store.objects[shard] = data[:length]
        with pytest.raises(CorruptCheckpoint, match=f"{length} bytes long, saved were {len(data)}"):
            checkpoint.verify()


@pytest.mark.parametrize("read", ["load", "a tensor", "a per-rank value"])
def test_every_truncation_of_a_shard_file_is_found_by_reading(small, read):
    objects, shard = small
    data = objects[shard]
    for length in [*range(0, len(data) - 200, 61), *range(len(data) - 200, len(data))]:
        store = Damaged(objects, shard, data[:length])
        with pytest.raises((CorruptCheckpoint, LoadFailed), match="the file is cut short"):
            damaged_reads(store)[read]()


def test_bytes_behind_the_end_of_a_shard_file_are_found_by_verify(small):
    objects, shard = small
    store = Damaged(objects, shard, objects[shard] + b"\0")
    with pytest.raises(CorruptCheckpoint, match="bytes long, saved were"):
        distckpt.open(store).verify()


@pytest.mark.parametrize("read", ["load", "verify", "a tensor", "a per-rank value"])
def test_a_missing_shard_file_is_found(small, read):
    objects, shard = small
    store = Damaged(objects, shard, None)
    with pytest.raises(CheckpointError, match=f"{shard}: .* not there") as caught:
        damaged_reads(store)[read]()
    kinds = {"load": LoadFailed, "verify": CorruptCheckpoint}
    assert type(caught.value) is kinds.get(read, IncompleteCheckpoint)


def test_a_shard_file_of_another_save_of_the_same_shape_is_found(small):
    """Of the same name and length, but for its bytes a valid file."""
    objects, shard = small
    other = MemoryStore()
    distckpt.save(other, STATE | {"w": STATE["w"] + 1})
    (name,) = other.objects.keys() - {MANIFEST_NAME}
    assert len(other.objects[name]) == len(objects[shard])
    store = Damaged(objects, shard, other.objects[name])
    for read in damaged_reads(store).values():
        with pytest.raises((CorruptCheckpoint, LoadFailed), match="its checksum table"):
            read()


# ---------------------------------------------------------------------------- files of many blocks


@pytest.fixture
def large(monkeypatch):
    """A checkpoint of two ranks and several blocks a file; "a" lies before "b" in each."""
    monkeypatch.setattr(commit, "BLOCK_BYTES", _BLOCK)
    monkeypatch.setattr(prepare, "Layouts", partial(writer.Layouts, block_bytes=_BLOCK))
    store = MemoryStore()

    def save(comm):
        half = slice(1000 * comm.rank, 1000 * comm.rank + 1000)
        state = {
            "a": Shard(np.arange(2000)[half], (half.start,), (2000,)),
            "b": Shard(np.arange(2000)[half], (half.start,), (2000,)),
        }
        distckpt.save(store, state, comm=comm)

    run_ranks(2, save)
    return store


def damage(store, file, byte):
    """Flip a byte of a file; return its name."""
    name = distckpt.open(store).manifest.file_names[file]
    store.objects[name] = flipped(store.objects[name], byte, 1)
    return name


def test_damage_in_the_padding_of_the_header_is_found_by_verify_alone(large):
    name = damage(large, 0, 4000)
    assert np.array_equal(distckpt.load(large)["a"], np.arange(2000))
    with pytest.raises(CorruptCheckpoint) as caught:
        distckpt.open(large).verify()
    assert f"{name}: bytes 0:4096 are damaged" in str(caught.value)
    assert "holds no tensor: header or per-rank values" in str(caught.value)
    assert (caught.value.path, caught.value.offset_bytes) == (name, 0)


def test_damage_is_found_by_reading_the_tensor_that_lies_there_and_by_no_other(large):
    name = damage(large, 1, 4096 + 8000 + 5000)  # in the second half of rank 1's "b"
    checkpoint = distckpt.open(large)
    assert np.array_equal(checkpoint["a"][...], np.arange(2000))
    assert np.array_equal(checkpoint["b"][:1000], np.arange(1000))
    with pytest.raises(CorruptCheckpoint, match="bytes 16384:20096 are damaged") as caught:
        checkpoint["b"][...]
    assert (caught.value.path, caught.value.offset_bytes) == (name, 16384)
    with pytest.raises(CorruptCheckpoint):
        checkpoint["b"][1999]


def test_verify_names_every_damaged_place_with_what_lies_there(large):
    first = damage(large, 0, 5000)
    damage(large, 0, 13_000)
    second = distckpt.open(large).manifest.file_names[1]
    length = len(large.objects[second])
    large.objects[second] = large.objects[second][:-1]
    with pytest.raises(CorruptCheckpoint) as caught:
        distckpt.open(large).verify()
    lines = str(caught.value).splitlines()
    assert lines[0] == "memory-store: 3 damaged places:"
    assert re.search(f"{first}: bytes 4096:8192 are damaged.*holds a.0:512.\\)", lines[1])
    assert re.search(f"{first}: bytes 12288:16384 are damaged.*holds b.24:536.\\)", lines[2])
    assert f"{second}: {length - 1} bytes long, saved were {length}" in lines[3]
    assert "holds a[1000:2000], b[1000:2000]" in lines[3]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_the_verification_and_all_raise_all_damage(large, ranks):
    total = sum(len(data) for name, data in large.objects.items() if name != MANIFEST_NAME)
    counted = FaultyStore(large)
    read = run_ranks(ranks, lambda comm: distckpt.open(counted).verify(comm=comm))
    # Each stretch of a file comes with the file's table, which is read once a thread.
    assert len(set(read)) == 1
    assert read[0] >= total
    names = [damage(large, 0, 5000), damage(large, 1, 13_000)]

    def verify(comm):
        with pytest.raises(CorruptCheckpoint) as caught:
            distckpt.open(large).verify(comm=comm)
        return str(caught.value)

    texts = run_ranks(ranks, verify)
    assert len(set(texts)) == 1
    assert "2 damaged places" in texts[0]
    assert all(name in texts[0] for name in names)


def test_a_verification_that_fails_on_one_rank_fails_on_all(large):
    def verify(comm):
        fail_at = 3 if comm.rank == 1 else None
        with pytest.raises(StoreError, match="injected") as caught:
            distckpt.open(FaultyStore(large, fail_at=fail_at)).verify(comm=comm)
        return str(caught.value)

    assert len(set(run_ranks(2, verify))) == 1


def test_verify_reads_every_byte(large):
    total = sum(len(data) for name, data in large.objects.items() if name != MANIFEST_NAME)
    assert distckpt.open(large).verify() == total


def test_damage_that_is_found_half_way_names_what_was_touched(large):
    name = damage(large, 1, 4096 + 8000 + 5000)
    net = {"a": np.zeros(2000, np.int64), "b": np.zeros(2000, np.int64), "other": 3}
    with pytest.raises(LoadFailed, match=f"{name}: bytes 16384:20096 are damaged") as caught:
        distckpt.load_into(large, net)
    assert set(caught.value.touched) == {"a", "b"}
    assert list(caught.value.failures) == [0]
    # What is there is right: no wrong byte was ever put in place.
    for array in (net["a"], net["b"]):
        assert ((array == np.arange(2000)) | (array == 0)).all()


@pytest.mark.parametrize("ranks", [2, 4])
def test_damage_that_one_rank_reads_for_others_reaches_all(large, ranks):
    damage(large, 0, 5000)

    def load(comm):
        net = {"a": np.zeros(2000, np.int64)}
        with pytest.raises(LoadFailed, match="bytes 4096:8192 are damaged") as caught:
            distckpt.load_into(large, net, comm=comm)
        assert ((net["a"] == np.arange(2000)) | (net["a"] == 0)).all()
        assert (net["a"][1:511] == 0).all()  # what lies in the damaged block
        return str(caught.value), caught.value.failures, caught.value.touched

    found = run_ranks(ranks, load)
    assert found == [found[0]] * ranks


def test_a_load_that_is_told_not_to_verify_takes_what_there_is(large):
    damage(large, 0, 4096 + 8)
    net = {"a": np.zeros(2000, np.int64)}
    distckpt.load_into(large, net, verify=False)
    assert net["a"][1] == 0
    assert np.array_equal(net["a"][2:], np.arange(2, 2000))


# ------------------------------------------------------------------------------------- the manifest


def every_call(store):
    """Everything that reads a manifest, on one rank and on three."""

    def load(comm):
        try:
            distckpt.load_into(store, {"w": np.zeros((3, 4))}, comm=comm)
        except CheckpointError as exc:
            return exc
        return None

    def alone(call):
        try:
            call()
        except CheckpointError as exc:
            return exc
        return None

    together = run_ranks(3, load)
    assert len({str(error) for error in together}) == 1
    return [
        alone(lambda: distckpt.open(store)),
        alone(lambda: distckpt.load(store)),
        alone(lambda: distckpt.load_into(store, {"w": np.zeros((3, 4))})),
        *together,
    ]


def test_every_flipped_byte_of_a_manifest_is_found(small):
    objects, _ = small
    data = objects[MANIFEST_NAME]
    for byte in range(len(data)):
        store = Damaged(objects, MANIFEST_NAME, flipped(data, byte, a_mask(byte)))
        kind = UnsupportedFormat if byte < 8 else CorruptCheckpoint
        with pytest.raises(kind, match=MANIFEST_NAME):
            distckpt.open(store)


def test_every_truncation_of_a_manifest_is_found(small):
    objects, _ = small
    data = objects[MANIFEST_NAME]
    for length in range(len(data)):
        store = Damaged(objects, MANIFEST_NAME, data[:length])
        with pytest.raises((CorruptCheckpoint, UnsupportedFormat), match=MANIFEST_NAME):
            distckpt.open(store)


def test_a_longer_manifest_is_found(small):
    objects, _ = small
    store = Damaged(objects, MANIFEST_NAME, objects[MANIFEST_NAME] + b"\0")
    with pytest.raises(CorruptCheckpoint, match="the manifest is damaged"):
        distckpt.open(store)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda data: None, IncompleteCheckpoint),
        (lambda data: b"", UnsupportedFormat),
        (lambda data: b"{}", UnsupportedFormat),
        (lambda data: data[:-1], CorruptCheckpoint),
        (lambda data: flipped(data, 60, 4), CorruptCheckpoint),
        (lambda data: bytes(len(data)), UnsupportedFormat),
    ],
    ids=["missing", "empty", "another format", "cut short", "a flipped bit", "zeros"],
)
def test_every_call_raises_what_fits_the_damage_of_the_manifest(small, change, kind):
    objects, _ = small
    store = Damaged(objects, MANIFEST_NAME, change(objects[MANIFEST_NAME]))
    errors = every_call(store)
    assert {type(error) for error in errors} == {kind}


def test_every_call_raises_not_found_where_nothing_is():
    errors = every_call(MemoryStore())
    assert {type(error) for error in errors} == {CheckpointNotFound}
    assert all(isinstance(error, FileNotFoundError) for error in errors)
    assert str(errors[0]) == (
        "memory-store: expected a checkpoint (manifest.binpb), or a file of another format, found "
        "nothing"
    )


def test_every_call_says_what_else_it_found():
    store = MemoryStore()
    store.put("model.pt", b"", replace=False)
    store.put("sub/x", b"", replace=False)
    errors = every_call(store)
    assert {type(error) for error in errors} == {CheckpointNotFound}
    assert all("found a folder with model.pt, sub" in str(error) for error in errors)


@pytest.mark.parametrize("kind", ["size", "read"])
def test_a_store_that_fails_is_not_taken_for_damage(small, kind):
    objects, _ = small

    def fail(found, name, number):
        if found == kind and name == MANIFEST_NAME:
            raise StoreError("unreachable")

    store = Damaged(objects, "x", b"")
    errors = every_call(FaultyStore(store, on_operation=fail))
    assert {type(error) for error in errors} == {StoreError}


# ---------------------------------------------------------------------------------- on a real disk


@pytest.fixture
def folder(tmp_path):
    distckpt.save(tmp_path / "run", STATE)
    return tmp_path / "run"


def test_a_folder_without_files_is_no_checkpoint(tmp_path):
    (tmp_path / "empty").mkdir()
    for where in (tmp_path / "empty", tmp_path / "no" / "such"):
        with pytest.raises(CheckpointNotFound, match="found nothing"):
            distckpt.open(where)


def test_a_file_is_no_checkpoint(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"weights")
    with pytest.raises(UnsupportedFormat, match="this file is none of them"):
        distckpt.open(tmp_path / "model.pt")


def test_a_folder_of_shard_files_is_an_incomplete_checkpoint(folder):
    (folder / MANIFEST_NAME).unlink()
    with pytest.raises(IncompleteCheckpoint, match="1 files of a save, but no manifest"):
        distckpt.load(folder)


def test_a_copy_that_broke_off_is_found(folder):
    (shard,) = folder.glob("*.safetensors")
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(LoadFailed, match="the file is cut short"):
        distckpt.load(folder)
    with pytest.raises(CorruptCheckpoint, match=r"bytes long, saved were .*holds w.0:3, 0:4."):
        distckpt.open(folder).verify()


def test_a_copied_and_a_moved_checkpoint_stay_valid(folder, tmp_path):
    target = open_store(f"memory://{tmp_path}/copy")
    for path in folder.iterdir():
        target.put(path.name, path.read_bytes(), replace=False)
    folder.rename(tmp_path / "moved")
    for where in (target, tmp_path / "moved"):
        assert np.array_equal(distckpt.load(where)["w"], STATE["w"])
        assert distckpt.open(where).verify() > 0
