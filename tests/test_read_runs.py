"""Reading several blocks at once, from stores that say that this is faster."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import distckpt
from distckpt import LoadFailed, Shard, commit, prepare, writer
from distckpt.formats import locate
from distckpt.reader import BlockReader, StoredFile
from distckpt.store import PrefixStore, parallel_bytes
from distckpt.testing import MemoryStore, run_ranks

_BLOCK = 4096
_ROWS, _COLUMNS = 160, 32  # 8 bytes each: 10 blocks over the ranks


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(commit, "BLOCK_BYTES", _BLOCK)
    monkeypatch.setattr(prepare, "Layouts", partial(writer.Layouts, block_bytes=_BLOCK))


class CountingStore(MemoryStore):
    """Notes what is read of shards, and likes to be asked for so many blocks at once."""

    def __init__(self, blocks=0):
        super().__init__()
        self.parallel_bytes = blocks * _BLOCK
        self.reads = []

    def read_into(self, name, start_byte, buffer):
        if name.startswith("shard-"):
            self.reads.append((start_byte, len(buffer)))
        super().read_into(name, start_byte, buffer)


def whole():
    return np.arange(_ROWS * _COLUMNS, dtype=np.float64).reshape(_ROWS, _COLUMNS)


def saved(ranks, blocks=0):
    store = CountingStore(blocks)

    def save(comm):
        mine = slice(_ROWS * comm.rank // comm.size, _ROWS * (comm.rank + 1) // comm.size)
        state = {"w": Shard(whole()[mine], (mine.start, 0), (_ROWS, _COLUMNS))}
        distckpt.save(store, state, comm=comm)

    run_ranks(ranks, save)
    store.reads.clear()
    return store


def load(store, ranks=1, **options):
    """Load by columns, into zeros; return the whole, and one report a rank."""

    def load(comm):
        low, high = (_COLUMNS * (comm.rank + n) // comm.size for n in range(2))
        net = {"w": Shard(np.zeros((_ROWS, high - low)), (0, low), (_ROWS, _COLUMNS))}
        report = distckpt.load_into(store, net, comm=comm, **options)
        return net["w"].array, report

    found = run_ranks(ranks, load)
    return np.hstack([array for array, _ in found]), [report for _, report in found]


def shards(store):
    return sorted(name for name in store.objects if name.startswith("shard-"))


def test_blocks_that_follow_one_another_are_read_at_once():
    store = saved(1, blocks=4)
    array, (report,) = load(store)
    assert (array == whole()).all()
    # The first block is the header's.
    data = [(start, length) for start, length in store.reads if length >= _BLOCK]
    assert data == [(_BLOCK, 4 * _BLOCK), (5 * _BLOCK, 4 * _BLOCK), (9 * _BLOCK, 2 * _BLOCK)]
    assert report.bytes_read == sum(length for _, length in store.reads)


def test_other_stores_are_asked_for_one_block_at_a_time():
    store = saved(1)
    load(store)
    assert [length for _, length in store.reads if length >= _BLOCK] == [_BLOCK] * 10


def test_a_run_ends_where_a_block_is_not_wanted_and_where_its_file_does():
    store = saved(2, blocks=8)
    net = {"w": np.zeros((_ROWS, _COLUMNS))}
    array = distckpt.open(store)["w"][:32]
    assert (array == whole()[:32]).all()
    assert (_BLOCK, 2 * _BLOCK) in store.reads
    store.reads.clear()
    distckpt.load_into(store, net, comm=distckpt.Solo())
    assert (net["w"] == whole()).all()
    assert [read for read in store.reads if read[1] >= _BLOCK] == [(_BLOCK, 5 * _BLOCK)] * 2


class EndlessStore(CountingStore):
    """Has zeros wherever it is asked."""

    def read_into(self, name, start_byte, buffer):
        self.reads.append((start_byte, len(buffer)))
        buffer[:] = bytes(len(buffer))


def reader(store, *, block_bytes=_BLOCK):
    """Make a reader of a long file without checksums."""
    return BlockReader(store, {0: StoredFile("x", 1 << 40, b"")}, block_bytes)


def test_only_blocks_that_are_expected_are_read_in_advance():
    store = EndlessStore(blocks=8)
    blocks = reader(store)
    wanted = [0, 1, 3, 4, 5, 9]
    blocks.expect((0, block) for block in wanted)
    for block in wanted:
        blocks.read(0, block)
    assert store.reads == [
        (first * _BLOCK, count * _BLOCK) for first, count in ((0, 2), (3, 3), (9, 1))
    ]


def test_what_was_read_before_is_read_again_when_it_is_expected_again():
    store = EndlessStore(blocks=8)
    blocks = reader(store)
    for _ in range(2):
        blocks.expect([(0, 0), (0, 1)])
        blocks.read(0, 0)
        blocks.read(0, 1)
    assert store.reads == [(0, 2 * _BLOCK)] * 2


def test_no_run_is_longer_than_32_mib_whatever_a_store_likes():
    store = EndlessStore()
    store.parallel_bytes = 1 << 40
    blocks = reader(store, block_bytes=4 << 20)
    blocks.expect((0, block) for block in range(20))
    for block in range(20):
        assert len(blocks.read(0, block)) == 4 << 20
    assert [length >> 20 for _, length in store.reads] == [32, 32, 16]


# ------------------------------------------------------------------------------------------- damage

_damages = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "delete"]), st.integers(0, 2), st.integers(0, 1 << 16)
    ),
    min_size=1,
    max_size=4,
)


def damage(store, damages):
    """Do the same to the same bytes of two stores that hold the same values."""
    for kind, file, byte in damages:
        there = shards(store)
        if not there:
            return
        name = there[file % len(there)]
        data = bytearray(store.objects[name])
        if kind == "delete":
            del store.objects[name]
        elif kind == "cut":
            store.objects[name] = bytes(data[: byte % (len(data) + 1)])
        elif data:
            data[byte % len(data)] ^= 0xFF
            store.objects[name] = bytes(data)


@given(
    saving=st.integers(1, 3),
    loading=st.integers(1, 3),
    blocks=st.integers(2, 12),
    damages=_damages,
)
def test_of_a_damaged_checkpoint_exactly_that_is_lost_which_is_lost_block_by_block(
    saving, loading, blocks, damages
):
    store = saved(saving)
    damage(store, damages)
    expected, (one, *_) = load(store, loading, on_corrupt="skip")
    store.parallel_bytes = blocks * _BLOCK
    found, (other, *_) = load(store, loading, on_corrupt="skip")
    assert np.array_equal(found, expected)
    assert other.skipped == one.skipped
    assert other.damage == one.damage
    untouched = whole()
    for region in one.skipped.get("w", []):
        untouched[region.slices] = 0
    assert np.array_equal(found, untouched)


@given(saving=st.integers(1, 3), blocks=st.integers(2, 12), damages=_damages)
def test_a_load_that_fails_names_the_same_bytes_as_block_by_block(saving, blocks, damages):
    store = saved(saving)
    damage(store, damages)
    said = []
    for count in (0, blocks):
        store.parallel_bytes = count * _BLOCK
        try:
            load(store)
        except LoadFailed as failed:
            said.append(str(failed))
        else:
            said.append(None)
    assert said[0] == said[1]


def test_a_file_that_is_short_is_not_asked_for_runs_any_more():
    store = saved(1, blocks=4)
    (name,) = shards(store)
    store.objects[name] = store.objects[name][: 6 * _BLOCK]
    load(store, on_corrupt="skip")
    data = [(start // _BLOCK, length // _BLOCK) for start, length in store.reads[:-1]]
    assert (1, 4) in data
    assert all(count <= 1 for start, count in data if start > 5)


# ---------------------------------------------------------------------------------- who says what


def test_a_part_of_a_store_and_a_file_of_another_format_say_what_their_store_says(web, tmp_path):
    assert parallel_bytes(PrefixStore(CountingStore(3), "step-1")) == 3 * _BLOCK
    assert parallel_bytes(PrefixStore(MemoryStore(), "step-1")) == 0
    distckpt.save(tmp_path / "run", {"w": whole()})
    distckpt.convert(tmp_path / "run", tmp_path / "w.safetensors")
    assert parallel_bytes(locate(tmp_path / "w.safetensors")) == 0
    url = f"{web(tmp_path, ranges=True)}/w.safetensors"
    assert parallel_bytes(locate(url)) > 32 << 20
    assert (distckpt.load(url)["w"] == whole()).all()
