"""Loading what is left of a damaged checkpoint."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import distckpt
from distckpt import (
    CorruptCheckpoint,
    FlatShard,
    LoadFailed,
    MatchError,
    PerRank,
    Region,
    Shard,
    commit,
    prepare,
    writer,
)
from distckpt.testing import MemoryStore, run_ranks

_BLOCK = 4096
_ROWS, _COLUMNS = 96, 32  # 8 bytes each: 6 blocks over the ranks


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(commit, "BLOCK_BYTES", _BLOCK)
    monkeypatch.setattr(prepare, "Layouts", partial(writer.Layouts, block_bytes=_BLOCK))


def whole():
    return np.arange(_ROWS * _COLUMNS, dtype=np.float64).reshape(_ROWS, _COLUMNS)


def saved(ranks=2):
    """A tensor cut by rows, a small one, and a value that differs by rank."""
    store = MemoryStore()

    def save(comm):
        mine = slice(_ROWS * comm.rank // comm.size, _ROWS * (comm.rank + 1) // comm.size)
        state = {
            "big": Shard(whole()[mine], (mine.start, 0), (_ROWS, _COLUMNS)),
            "small": np.arange(5, dtype=np.int32),
            "rng": PerRank(bytes(range(100)) * 50 + bytes([comm.rank])),
            "epoch": 7,
        }
        distckpt.save(store, state, comm=comm)

    run_ranks(ranks, save)
    return store


def names(store):
    return distckpt.open(store).manifest.file_names


def flip(store, name, byte):
    data = bytearray(store.objects[name])
    data[byte] ^= 0xFF
    store.objects[name] = bytes(data)


def load_by_columns(store, ranks, **options):
    """Load the big tensor by columns into zeros; return the whole of it and one report a rank."""

    def load(comm):
        low, high = (_COLUMNS * (comm.rank + n) // comm.size for n in range(2))
        net = {"big": Shard(np.zeros((_ROWS, high - low)), (0, low), (_ROWS, _COLUMNS))}
        report = distckpt.load_into(store, net, comm=comm, only_prefix="big", **options)
        return net["big"].array, report

    found = run_ranks(ranks, load)
    return np.hstack([array for array, _ in found]), [report for _, report in found]


@given(
    saving=st.integers(1, 3),
    loading=st.integers(1, 3),
    flips=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1 << 16)), min_size=1, max_size=4),
)
def test_what_is_reported_as_skipped_keeps_what_it_held_and_all_else_is_loaded(
    saving, loading, flips
):
    store = saved(saving)
    for file, byte in flips:
        name = names(store)[file % saving]
        flip(store, name, byte % len(store.objects[name]))
    array, reports = load_by_columns(store, loading, on_corrupt="skip")
    expected = whole()
    for region in reports[0].skipped.get("big", []):
        expected[region.slices] = 0
    assert np.array_equal(array, expected)
    assert all(report.skipped == reports[0].skipped for report in reports)
    assert bool(reports[0].damage) >= bool(reports[0].skipped)


def test_damage_is_reported_by_region_file_and_bytes(caplog):
    store = saved(1)
    flip(store, names(store)[0], _BLOCK + 10)
    array, (report,) = load_by_columns(store, 1, on_corrupt="skip")
    assert report.skipped == {"big": [Region((0, 0), (16, _COLUMNS))]}
    assert not array[:16].any()
    assert np.array_equal(array[16:], whole()[16:])
    assert len(report.damage) == 1
    assert f"{names(store)[0]}: bytes {_BLOCK}:{2 * _BLOCK} are damaged" in report.damage[0]
    assert "big[0:16, 0:32]" in str(report)
    assert "loaded in part" in caplog.text


def test_without_it_the_load_fails_and_names_what_it_touched():
    store = saved(1)
    flip(store, names(store)[0], 2 * _BLOCK + 10)
    with pytest.raises(LoadFailed, match="damaged") as caught:
        load_by_columns(store, 1)
    assert caught.value.touched == ["big"]


def test_a_file_that_is_missing_is_skipped_whole():
    store = saved(2)
    del store.objects[names(store)[1]]
    array, reports = load_by_columns(store, 3, on_corrupt="skip")
    assert np.array_equal(array[: _ROWS // 2], whole()[: _ROWS // 2])
    assert not array[_ROWS // 2 :].any()
    assert "is not there" in reports[0].damage[0]


def test_a_checkpoint_replaced_meanwhile_is_not_taken_for_a_damaged_one():
    store = saved(1)
    checkpoint = distckpt.open(store)
    distckpt.save(store, {"big": whole() + 1}, comm=distckpt.Solo(), overwrite=True)
    net = {"big": np.zeros((_ROWS, _COLUMNS))}
    with pytest.raises(LoadFailed, match="replaced while it was being read"):
        checkpoint.load_into(net, on_corrupt="skip")


def test_a_damaged_checksum_table_condemns_its_file_only():
    store = saved(2)
    name = names(store)[0]
    flip(store, name, len(store.objects[name]) - 1)
    array, reports = load_by_columns(store, 1, on_corrupt="skip")
    assert not array[: _ROWS // 2].any()
    assert np.array_equal(array[_ROWS // 2 :], whole()[_ROWS // 2 :])
    assert any("checksum table" in line for line in reports[0].damage)


def test_a_per_rank_value_that_is_damaged_is_left_out():
    store = saved(1)
    file, offset, _ = distckpt.open(store).manifest.blob_place("rng", 0)
    flip(store, names(store)[file], offset + 10)
    net = {"rng": PerRank("mine"), "epoch": 0}
    report = distckpt.load_into(store, net, comm=distckpt.Solo(), on_corrupt="skip")
    assert report.skipped == {"rng": []}
    assert net["rng"].value == "mine"
    assert net["epoch"] == 7


def test_a_run_of_a_flattened_tensor_keeps_what_was_damaged():
    store = saved(1)
    flip(store, names(store)[0], _BLOCK + 10)  # elements 0 to 511
    net = {"big": FlatShard(np.full(1000, -1.0), 500, (_ROWS, _COLUMNS))}
    report = distckpt.load_into(store, net, comm=distckpt.Solo(), on_corrupt="skip")
    assert (net["big"].array[:12] == -1).all()
    assert np.array_equal(net["big"].array[12:], np.arange(512.0, 1500.0))
    assert sum(region.size for region in report.skipped["big"]) == 12


def test_names_that_do_not_fit_are_refused_all_the_same():
    store = saved(1)
    flip(store, names(store)[0], _BLOCK + 10)
    net = {"big": np.zeros((2, 2))}
    with pytest.raises(MatchError):
        distckpt.load_into(store, net, comm=distckpt.Solo(), on_corrupt="skip")


def test_a_manifest_that_is_damaged_is_nothing_to_skip():
    store = saved(1)
    flip(store, "manifest.binpb", 30)
    with pytest.raises(CorruptCheckpoint):
        load_by_columns(store, 1, on_corrupt="skip")


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="on_corrupt='ignore'"):
        load_by_columns(saved(1), 1, on_corrupt="ignore")
