"""Format version 1, held still: committed data, golden bytes, a second reader, and the page itself.

The committed checkpoints in tests/data/format-v1 are made, byte for byte, by
``PYTHONPATH=. python tests/data/make_format_v1.py``; they never change once a version is released.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import math
import re
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import distckpt
from distckpt import dtypes
from distckpt.testing import run_ranks

TESTS = Path(__file__).parent
DATA = TESTS / "data" / "format-v1"
PAGE = (TESTS.parent / "docs" / "format.md").read_text(encoding="utf-8")


def import_file(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = import_file(TESTS / "data" / "make_format_v1.py")
second = import_file(TESTS / "independent_reader.py")

EVERYTHING = DATA / f"step-{make.STEP:08d}"
SMALLEST = DATA / "smallest"
PER_RANK = [make.per_rank(rank) for rank in range(make.RANKS)]
PER_RANK_NAMES = list(PER_RANK[1])


def essence(value):
    """What must be equal: types, bytes and shapes; what numpy lacks and its stand-in are alike."""
    if isinstance(value, dict):
        return {essence(key): essence(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return (type(value).__name__, *map(essence, value))
    if isinstance(value, np.ndarray):
        return (value.shape, value.dtype.itemsize, value.tobytes())
    return (type(value).__name__, repr(value))


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".distckpt" not in path.parts  # a Manager's own notes
    }


# ------------------------------------------------------------------------- the committed checkpoint


@pytest.mark.parametrize("name", make.TENSORS)
def test_a_tensor_of_the_committed_checkpoint_reads_as_it_was_saved(name):
    dtype, shape = make.TENSORS[name]
    stored = distckpt.open(EVERYTHING)[name]
    assert (stored.dtype, stored.shape) == (dtypes.BY_NAME[dtype].numpy, shape)
    assert essence(stored.read()) == essence(make.tensor(name, dtype, shape))


def test_the_committed_checkpoint_has_every_dtype_and_these_names_only():
    checkpoint = distckpt.open(EVERYTHING)
    # What rank 0 doesn't hold comes last.
    assert list(checkpoint) == [name for name in make.TENSORS if name != "alone"] + ["alone"]
    assert {checkpoint[name].dtype for name in checkpoint} == {e.numpy for e in dtypes.TABLE}


def test_values_metadata_and_metrics_of_the_committed_checkpoint_read_as_they_were_saved():
    checkpoint = distckpt.open(EVERYTHING)
    assert essence(checkpoint.values) == essence(make.VALUES)
    assert essence(checkpoint.metadata) == essence(make.METADATA)
    assert essence(checkpoint.metrics) == essence(make.METRICS)
    assert (checkpoint.step, checkpoint.ranks) == (make.STEP, make.RANKS)
    assert checkpoint.created.isoformat() == "2026-01-01T00:00:00+00:00"


@pytest.mark.parametrize("rank", range(make.RANKS))
@pytest.mark.parametrize("name", PER_RANK_NAMES)
def test_a_per_rank_value_of_the_committed_checkpoint_reads_as_it_was_saved(name, rank):
    values = distckpt.open(EVERYTHING).per_rank[name]
    if name in PER_RANK[rank]:
        assert essence(values[rank]) == essence(PER_RANK[rank][name])
    else:
        with pytest.raises(distckpt.MatchError):
            values[rank]


@pytest.mark.parametrize("folder", [EVERYTHING, SMALLEST], ids=["everything", "smallest"])
def test_every_byte_of_the_committed_checkpoints_is_as_its_checksum_says(folder):
    assert distckpt.open(folder).verify() == sum(
        len(data) for name, data in files_of(folder).items() if name != "manifest.binpb"
    )


def test_the_committed_checkpoint_loads_into_another_number_of_ranks():
    dtype, shape = make.TENSORS["shared.weight"]

    def load(comm):
        mesh = distckpt.Mesh(tp=2, comm=comm)
        region = mesh.region((None, "tp"), shape)
        mine = np.empty(region.shape, dtype)
        net = {"shared.weight": mesh.shard(mine, (None, "tp"), shape)}
        distckpt.load_into(EVERYTHING, net, comm=comm, strict=True)
        return mine

    whole = np.concatenate(run_ranks(2, load), axis=1)
    assert essence(whole) == essence(make.tensor("shared.weight", dtype, shape))


# ------------------------------------------------------------------------------------- golden bytes


def test_the_same_save_with_the_same_id_and_time_writes_the_committed_bytes(tmp_path):
    make.save_everything(tmp_path)
    make.save_smallest(tmp_path / "smallest")
    made, committed = files_of(tmp_path), files_of(DATA)
    assert made.keys() == committed.keys()
    assert [name for name in made if made[name] != committed[name]] == []


# -------------------------------------------------------------------------------- the second reader


def assert_the_second_reader_agrees(folder):
    checkpoint, reader = distckpt.open(folder), second.Reader(folder)
    assert reader.names == list(checkpoint)
    for name in checkpoint:
        assert reader.shapes[name] == checkpoint[name].shape
        assert essence(reader.tensor(name)) == essence(checkpoint[name].read())
    assert essence(reader.values) == essence(checkpoint.values)
    assert essence(reader.metadata or {}) == essence(checkpoint.metadata)
    assert essence(reader.metrics or {}) == essence(checkpoint.metrics)
    assert reader.step == checkpoint.step
    lengths = checkpoint.manifest.per_rank
    held = {(name, rank) for name in lengths for rank in np.flatnonzero(lengths[name]).tolist()}
    assert set(reader.blobs) == held
    for name, rank in held:
        assert essence(reader.per_rank(name, rank)) == essence(checkpoint.per_rank[name][rank])


@pytest.mark.parametrize("folder", [EVERYTHING, SMALLEST], ids=["everything", "smallest"])
def test_the_second_reader_agrees_on_the_committed_checkpoints(folder):
    assert_the_second_reader_agrees(folder)


DTYPES = [entry.name for entry in dtypes.TABLE]
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def saves(draw):
    """A number of ranks, each rank's state, and how large a file may become."""
    ranks = draw(st.integers(1, 4))
    states = [{} for _ in range(ranks)]
    for number in range(draw(st.integers(0, 6))):
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=4)))
        whole = make.tensor(f"t{number}", draw(st.sampled_from(DTYPES)), shape)
        kinds = ["whole", "one", "flat"] + (["rows", "columns"] if shape else [])
        kind = draw(st.sampled_from(kinds))
        inner = st.integers(0, whole.size)
        cuts = [0, *sorted(draw(st.lists(inner, min_size=ranks - 1, max_size=ranks - 1))), None]
        dim = 0 if kind == "rows" else len(shape) - 1
        spec = (*[None] * dim, "all")
        uneven = draw(st.sampled_from(["balanced", "chunk"]))
        for rank in range(ranks):
            mesh = distckpt.Mesh(all=ranks, rank=rank)
            piece = whole
            if kind == "flat":
                piece = whole.reshape(-1)[cuts[rank] : cuts[rank + 1]]
                piece = distckpt.FlatShard(piece, cuts[rank], shape)
            elif kind in ("rows", "columns"):
                box = mesh.region(spec, shape, uneven=uneven)
                piece = mesh.shard(whole[box.slices], spec, shape, uneven=uneven)
            if kind != "one" or rank == ranks - 1:
                states[rank][f"t{number}"] = piece
    for number, value in enumerate(draw(st.lists(plain, max_size=3))):
        for state in states:
            state[f"v{number}"] = str(value) if isinstance(value, dict | list | tuple) else value
        rank = draw(st.integers(0, ranks - 1))
        states[rank][f"r{number}"] = distckpt.PerRank([value, np.arange(number)])
    return states, draw(st.sampled_from([1, 500, 1 << 30]))


@settings(max_examples=max(1, settings.default.max_examples // 2))
@given(saves())
def test_the_second_reader_agrees_on_any_checkpoint(save):
    states, max_shard_bytes = save
    with tempfile.TemporaryDirectory() as folder, make.fixed(block_bytes=4096):
        run_ranks(
            len(states),
            lambda comm: distckpt.save(
                folder + "/checkpoint",
                states[comm.rank],
                comm=comm,
                metadata={"ranks": len(states)},
                max_shard_bytes=max_shard_bytes,
            ),
        )
        assert_the_second_reader_agrees(folder + "/checkpoint")


@pytest.mark.parametrize("name", sorted(files_of(SMALLEST)))
def test_the_second_reader_refuses_a_flip_of_any_byte(name, tmp_path):
    shutil.copytree(SMALLEST, tmp_path, dirs_exist_ok=True)
    good = (tmp_path / name).read_bytes()
    # The header's padding is many bytes alike: a few of them will do.
    some = set(range(0, len(good), 97)) | set(range(200)) | set(range(len(good) - 100, len(good)))
    for at in sorted(some & set(range(len(good)))):
        (tmp_path / name).write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(ValueError, match="refused"):
            second.Reader(tmp_path).tensor("w")


def test_the_second_reader_is_short_and_imports_numpy_and_the_generated_code_only():
    source = (TESTS / "independent_reader.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) < 150
    imported = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    outside = {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names)
    assert outside == {"numpy"}


# ----------------------------------------------------------------------------------------- the page


@pytest.mark.parametrize("name", sorted(files_of(SMALLEST)))
def test_the_hex_dumps_of_the_page_are_the_bytes_of_the_smallest_checkpoint(name):
    shown = re.search(rf"```text\n\$ hexdump -C {re.escape(name)}\n(.*?)\n```", PAGE, re.DOTALL)
    assert shown is not None
    assert shown[1] == make.hexdump((SMALLEST / name).read_bytes())


def test_the_page_lists_the_files_of_the_committed_checkpoint_with_their_lengths():
    shown = re.findall(r"^[├└]── (\S+) +([0-9,]+) bytes$", PAGE, re.MULTILINE)
    found = {name: int(length.replace(",", "")) for name, length in shown}
    assert found == {name: len(data) for name, data in files_of(EVERYTHING).items()}


def test_the_page_lists_every_dtype_with_its_code_size_and_safetensors_name():
    shown = re.findall(r"^\| (\d+) \| `(\w+)` \| (\d+) \| ([\w-]+) \|", PAGE, re.MULTILINE)
    assert shown == [
        (str(entry.code), entry.name, str(entry.itemsize), entry.safetensors or "-")
        for entry in dtypes.TABLE
    ]


def test_the_page_shows_the_checksums_of_the_check_value():
    crc = second.crc32c(b"123456789")
    assert crc == 0xE3069283
    assert f"{crc:08x}" in PAGE


def test_the_test_vectors_follow_from_their_names_as_the_page_says():
    name, (dtype, shape) = "grid.columns", make.TENSORS["grid.columns"]
    size = math.prod(shape) * 4
    expected = hashlib.shake_128(name.encode()).digest(size)
    assert make.tensor(name, dtype, shape).tobytes() == expected
    assert distckpt.open(EVERYTHING)[name].read().tobytes() == expected
