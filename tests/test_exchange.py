"""Bytes that are read, sent and received where they belong, and those that must be copied."""

from __future__ import annotations

import dataclasses
import threading
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import split

import distckpt
from distckpt import (
    FlatShard,
    LoadFailed,
    Region,
    Shard,
    checkpoint,
    commit,
    copies,
    cores,
    crew,
    exchange,
    loader,
    prepare,
    reader,
    schedule,
    writer,
)
from distckpt.copies import find_runs
from distckpt.load_plan import LoadOptions
from distckpt.net import Filling
from distckpt.store import PrefixStore, open_object, open_store, opens
from distckpt.team import connect
from distckpt.testing import MemoryStore, run_ranks

_BLOCK = 4096


@pytest.fixture(autouse=True)
def _small_sizes():
    """Make small tensors have what large ones have: several blocks, parts and messages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commit, "BLOCK_BYTES", _BLOCK)
        patch.setattr(prepare, "Layouts", partial(writer.Layouts, block_bytes=_BLOCK))
        patch.setattr(schedule, "_WORTH_BYTES", 512)
        patch.setattr(copies, "_LONG_BYTES", 1024)
        patch.setattr(schedule, "_TOGETHER_BYTES", 1500)
        patch.setattr(schedule, "_PART_BYTES", 1024)
        patch.setattr(schedule, "_LINE_BYTES", 256)
        patch.setattr(schedule, "_GAP_BYTES", 200)
        yield


_BY_THREADS = pytest.mark.parametrize("threads", [1, 3])
_SHOWN = pytest.mark.parametrize("shown", [False, True])


@contextmanager
def reading_by(threads, *, shown=False):
    """Have so many threads read for each rank, however little it is.

    Args:
        threads: How many.
        shown: Whether the store shows bytes where they are, however few, instead of reading them.
    """
    with pytest.MonkeyPatch.context() as patch:
        if shown:
            patch.setattr(reader, "_PIECE_BYTES", 1)
            patch.setattr(OpenedObject, "view", OpenedObject.show)
        for module in (loader, checkpoint):
            patch.setattr(module, "threads_for", lambda neighbours: threads)
        patch.setattr(exchange, "_MUCH_BYTES", 0)
        yield


class ScatteringStore(MemoryStore):
    """Fills several buffers at once, and notes how many, and of how many bytes."""

    def __init__(self):
        super().__init__()
        self.scattered = []
        self.shown = []

    def open_object(self, name):
        return OpenedObject(self, name)


class OpenedObject:
    def __init__(self, store, name):
        self.store, self.name = store, name

    def read_into(self, start_byte, buffers):
        found = self.name, start_byte, [buffer.nbytes for buffer in buffers]
        self.store.scattered.append(found)
        for buffer in buffers:
            self.store.read_into(self.name, start_byte, buffer.cast("B"))
            start_byte += buffer.nbytes

    def view(self, start_byte, length_bytes):
        return None

    def show(self, start_byte, length_bytes):
        content = memoryview(bytes(self.store.objects[self.name]))
        stop_byte = start_byte + length_bytes
        if stop_byte > len(content):
            return None
        self.store.shown.append((self.name, start_byte, length_bytes))
        return content[start_byte:stop_byte]


# ------------------------------------------------------------------------------------------- plans


@given(st.data())
def test_a_box_is_a_run_if_its_elements_follow_one_another(data):
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    box = [sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2))) for n in shape]
    box = [(a, b) if a < b else (0, n) for (a, b), n in zip(box, shape, strict=True)]
    places = (
        np.arange(np.prod(shape)).reshape(shape)[tuple(slice(*ends) for ends in box)].reshape(-1)
    )
    first, is_run = find_runs(
        np.array([shape]), np.array([[a for a, _ in box]]), np.array([[b for _, b in box]])
    )
    assert first[0] == places[0]
    assert is_run[0] == (places == places[0] + np.arange(len(places))).all()


# ------------------------------------------------------------------------------------------- loads

_DTYPES = ["u1", ">i2", "f4", "f8", ml_dtypes.bfloat16, "c16"]


@st.composite
def memories(draw, shape, dtype):
    """An array of zeros: of one piece, a view of a larger one, transposed, or in another order."""
    kind = draw(st.sampled_from(["C", "C", "C", "wide", "F", "swapped", "reversed"]))
    if kind == "wide":
        return np.zeros((*shape[:-1], 2 * shape[-1] + 1), dtype)[..., : shape[-1]]
    if kind == "F":
        return np.zeros(shape, dtype, "F")
    if kind == "swapped" and np.dtype(dtype).kind in "fi":
        return np.zeros(shape, np.dtype(dtype).newbyteorder())
    return np.zeros(shape, dtype)[:: -1 if kind == "reversed" else 1]


@st.composite
def holdings(draw, shape, dtype, ranks, *, cover):
    """What each rank has of a tensor: leaves by rank; together all of it, if `cover`."""
    kind = draw(st.sampled_from(["boxes", "runs", "same"]))
    if kind == "same":
        return [draw(memories(shape, dtype)) for _ in range(ranks)]
    if kind == "runs":
        size = int(np.prod(shape))
        cuts = [0, *sorted(draw(st.integers(0, size)) for _ in range(ranks - 1)), size]
        return [FlatShard(np.zeros(b - a, dtype), a, shape) for a, b in pairwise(cuts)]
    boxes = split(draw, Region.whole(shape), ranks)
    boxes += [Region((0,) * len(shape), (0,) * len(shape))] * (ranks - len(boxes))
    if not cover and draw(st.booleans()):
        boxes[0] = Region.whole(shape)  # others have parts of it, too
    return [
        Shard(
            draw(memories(box.shape, dtype)) if box.size else np.zeros(box.shape, dtype),
            box.start,
            shape,
        )
        for box in boxes
    ]


def array_of(leaf):
    return leaf if isinstance(leaf, np.ndarray) else leaf.array


def part_of(whole, leaf):
    """Return what of a tensor belongs into a leaf."""
    if isinstance(leaf, FlatShard):
        return whole.reshape(-1)[leaf.start : leaf.start + len(leaf.array)]
    return whole[leaf.region.slices] if isinstance(leaf, Shard) else whole


@st.composite
def cases(draw):
    """Tensors, and who has what of them: saved, and wanted."""
    saving, loading = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    tensors = []
    for number in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(1, 24), min_size=1, max_size=3)))
        dtype = draw(st.sampled_from(_DTYPES))
        seed = np.random.default_rng(number).integers(0, 200, shape)
        tensors.append(
            (
                seed.astype(dtype),
                draw(holdings(shape, dtype, saving, cover=True)),
                draw(holdings(shape, dtype, loading, cover=False)),
            )
        )
    return saving, loading, tensors


def save(store, saving, tensors):
    def go(comm):
        state = {}
        for number, (whole, held, _) in enumerate(tensors):
            leaf = held[comm.rank]
            array_of(leaf)[...] = part_of(whole, leaf)
            state[f"t{number}"] = leaf
        distckpt.save(store, state, comm=comm)

    run_ranks(saving, go)


def load(store, loading, tensors, **options):
    """Load into zeros; returns a report a rank."""

    def go(comm):
        net = {f"t{number}": wanted[comm.rank] for number, (_, _, wanted) in enumerate(tensors)}
        for leaf in net.values():
            array_of(leaf)[...] = 0
        return distckpt.load_into(store, net, comm=comm, **options)

    return run_ranks(loading, go)


def right(tensors):
    return all(
        np.array_equal(array_of(leaf), part_of(whole, leaf))
        for whole, _, wanted in tensors
        for leaf in wanted
    )


@_SHOWN
@_BY_THREADS
@given(case=cases(), verify=st.booleans())
def test_any_layout_and_any_memory_gets_just_its_bytes(threads, shown, case, verify):
    saving, loading, tensors = case
    store = ScatteringStore()
    save(store, saving, tensors)
    with reading_by(threads, shown=shown):
        load(store, loading, tensors, verify=verify)
    assert right(tensors)


def remade(leaf, memory):
    """A leaf like another, in other memory."""
    array = array_of(leaf)
    if memory == "strided":
        new = np.zeros((*array.shape, 2), array.dtype)[..., 0]
    else:
        new = np.zeros(array.shape, array.dtype)
        new.flags.writeable = memory != "read-only"
    return new if leaf is array else dataclasses.replace(leaf, array=new)


_STEPS = st.fixed_dictionaries(
    {
        "memory": st.sampled_from(["plain", "strided", "read-only"]),
        "verify": st.booleans(),
        "on_corrupt": st.sampled_from(["raise", "skip"]),
    }
)


@_BY_THREADS
@given(case=cases(), steps=st.lists(_STEPS, min_size=2, max_size=5))
def test_what_one_load_has_worked_out_serves_only_loads_that_are_like_it(threads, case, steps):
    saving, loading, tensors = case
    store = ScatteringStore()
    save(store, saving, tensors)

    def go(comm):
        for memory, options in [(step.pop("memory"), step) for step in map(dict, steps)]:
            wants = {
                f"t{number}": remade(wanted[comm.rank], memory)
                for number, (_, _, wanted) in enumerate(tensors)
            }
            distckpt.load_into(store, wants, comm=comm, **options)
            for number, (whole, _, _) in enumerate(tensors):
                leaf = wants[f"t{number}"]
                assert np.array_equal(array_of(leaf), part_of(whole, leaf))

    with reading_by(threads):
        run_ranks(loading, go)


def test_loads_that_are_alike_work_out_once_what_goes_where(monkeypatch):
    made = []

    class Counted(schedule.Schedule):
        def __init__(self, work, setting):
            made.append(setting.places)
            super().__init__(work, setting)

    monkeypatch.setattr(exchange, "Schedule", Counted)
    store = ScatteringStore()
    distckpt.save(store, {"w": np.arange(4000.0), "b": np.ones(3)})

    ways = [
        (width, verify, skip) for width in (1, 2) for verify in (True, False) for skip in (0, 1)
    ]

    def go(comm):
        found = []
        for width, verify, skip in [ways[number] for number in (0, 0, 1, 2, 3, 0, 4, 1, 0)]:
            wants = {"w": np.zeros((4000, width))[:, 0], "b": np.zeros(3)}
            on_corrupt = "skip" if skip else "raise"
            distckpt.load_into(store, wants, comm=comm, verify=verify, on_corrupt=on_corrupt)
            assert np.array_equal(wants["w"], np.arange(4000.0))
            found.append(len(made))
        return found

    # Four are kept: the second was forgotten when a fifth came, and with it the next one.
    assert run_ranks(1, go) == [[1, 1, 2, 3, 4, 4, 5, 6, 6]]


def test_no_line_of_a_tensor_is_copied_in_two(monkeypatch):
    monkeypatch.setattr(commit, "BLOCK_BYTES", 1 << 16)
    monkeypatch.setattr(prepare, "Layouts", partial(writer.Layouts, block_bytes=1 << 16))
    monkeypatch.setattr(schedule, "_PART_BYTES", 3000)
    monkeypatch.setattr(schedule, "_LINE_BYTES", 900)
    found = {}

    class Noting(Filling):
        def put(self, key, start, values):
            found.setdefault(key, []).append(values.shape)
            super().put(key, start, values)

    monkeypatch.setattr(loader, "Filling", Noting)
    store = ScatteringStore()
    state = {
        "odd": np.ones((3, 7, 11), "f8"),
        "w": np.arange(64 * 200, dtype="f4").reshape(64, 200),
        "cube": np.arange(8 * 5 * 30, dtype="f4").reshape(8, 5, 30),
    }
    distckpt.save(store, state)
    loaded = {name: remade(array, "strided") for name, array in state.items()}
    distckpt.load_into(store, loaded)
    assert all(np.array_equal(loaded[name], state[name]) for name in state)
    assert {shape[1:] for shape in found[0]} == {(7, 11)}
    assert {shape[-1] for shape in found[1]} == {200}
    assert {shape[1:] for shape in found[2]} == {(5, 30)}
    assert len(found[1]) > 10  # in parts all the same


@_SHOWN
@_BY_THREADS
@given(case=cases(), place=st.integers(0, 1 << 20))
def test_damage_fails_a_load_and_every_changed_tensor_is_named(threads, shown, case, place):
    saving, loading, tensors = case
    store = ScatteringStore()
    save(store, saving, tensors)
    names = sorted(name for name in store.objects if name.startswith("shard-"))
    name = names[place % len(names)]
    data = bytearray(store.objects[name])
    data[place % len(data)] ^= 1
    store.objects[name] = bytes(data)
    failed = None
    try:
        with reading_by(threads, shown=shown):
            load(store, loading, tensors)
    except LoadFailed as exc:
        failed = exc
    changed = {
        f"t{number}"
        for number, (_, _, wanted) in enumerate(tensors)
        if any(array_of(leaf).any() for leaf in wanted)
    }
    if failed is None:
        assert right(tensors)  # nobody wanted a byte of that block
    else:
        assert failed.damaged
        assert changed <= set(failed.touched)
    # What is damaged keeps what it held, and all else is there.
    reports = load(store, loading, tensors, on_corrupt="skip")
    for number, (whole, _, wanted) in enumerate(tensors):
        left = whole.copy()
        for region in reports[0].skipped.get(f"t{number}", []):
            left[region.slices] = 0
        for leaf in wanted:
            found = array_of(leaf)
            assert ((found == part_of(left, leaf)) | (found == part_of(whole, leaf))).all()


@pytest.mark.parametrize("where", ["__init__", "_prepared"])
@given(case=cases(), bad=st.integers(0, 3), after=st.integers(0, 3))
def test_a_rank_that_fails_unforeseen_keeps_no_other_waiting(where, case, bad, after):
    saving, loading, tensors = case
    store = ScatteringStore()
    save(store, saving, tensors)
    original = getattr(exchange._Exchange, where)
    calls = []

    def failing(self, *arguments, **options):
        operation = arguments[0] if where == "__init__" else self._operation
        if operation.rank == bad:
            calls.append(1)
            if len(calls) > after:
                raise MemoryError("no memory")
        return original(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange._Exchange, where, failing)
        failed = None
        try:
            load(store, loading, tensors, timeout_s=5)
        except LoadFailed as exc:
            failed = exc
    assert (failed is None) == (len(calls) <= after)
    if failed is None:
        assert right(tensors)
    else:
        assert "no memory" in failed.failures[bad]
        assert not any("within" in text for text in failed.failures.values())
    load(store, loading, tensors)
    assert right(tensors)


def test_a_tensor_that_has_no_byte_here_is_not_named_as_changed():
    store = ScatteringStore()
    distckpt.save(store, {"w": np.ones(4000), "v": np.ones(6)})
    (name,) = shards_of(store)
    data = bytearray(store.objects[name])
    data[2 * _BLOCK] ^= 1
    store.objects[name] = bytes(data)
    wants = {"w": np.zeros(4000), "v": FlatShard(np.zeros(0), 0, (6,))}
    with pytest.raises(LoadFailed) as failed:
        distckpt.load_into(store, wants)
    assert failed.value.touched == ["w"]


@_SHOWN
@_BY_THREADS
@given(data=st.data())
def test_a_slice_is_numpys(threads, shown, data):
    shape = data.draw(st.sampled_from([(3000,), (40, 60), (6, 20, 30)]))
    whole = np.arange(np.prod(shape), dtype="f4").reshape(shape)
    store = ScatteringStore()
    distckpt.save(store, {"w": whole})
    box = data.draw(st.tuples(*[st.tuples(st.integers(0, n), st.integers(0, n)) for n in shape]))
    index = tuple(slice(min(ends), max(ends)) for ends in box)
    with reading_by(threads, shown=shown):
        assert np.array_equal(distckpt.open(store)["w"][index], whole[index])


def test_a_slice_takes_no_time_for_each_index():
    store = ScatteringStore()
    distckpt.save(store, {"w": np.zeros((1 << 40, 0))})
    tensor = distckpt.open(store)["w"]
    for rows in (slice(None), slice(7, None, 3), slice(None, None, -2)):
        assert tensor[rows].shape == (len(range(1 << 40)[rows]), 0)


# ------------------------------------------------------------------------------------ what is read


def shards_of(store):
    return {name: len(data) for name, data in store.objects.items() if name.startswith("shard-")}


def test_tensors_that_lie_in_one_stretch_are_filled_by_one_call_a_block():
    store = ScatteringStore()
    state = {f"t{number}": np.full(100, number, "f8") for number in range(12)}
    distckpt.save(store, state)
    net = {name: np.zeros(100) for name in state}
    distckpt.load_into(store, net)
    assert all(np.array_equal(net[name], state[name]) for name in state)
    data = [found for found in store.scattered if found[1] >= _BLOCK]
    assert [start for _, start, _ in data] == [_BLOCK, 2 * _BLOCK, 3 * _BLOCK]
    assert data[0][2] == [800] * 5 + [96]  # the block's end is the sixth tensor's beginning
    assert data[1][2] == [704] + [800] * 4 + [192]


def test_only_wanted_bytes_are_read_where_nothing_is_checked(monkeypatch):
    monkeypatch.setattr(schedule, "_WORTH_BYTES", 1)
    store = ScatteringStore()
    state = {f"t{number}": np.full(500, number, "f8") for number in range(8)}
    distckpt.save(store, state)
    net = {name: np.zeros(500) for name in ("t1", "t2", "t6")}
    report = distckpt.load_into(store, net, verify=False)
    assert all((net[name] == state[name]).all() for name in net)
    # Across blocks, at whose ends a tensor's memory is cut; the header takes the first.
    assert [(start - _BLOCK, sizes) for _, start, sizes in store.scattered] == [
        (4000, [96, 3904, 192, 3808]),
        (24000, [576, 3424]),
    ]
    assert report.bytes_read == 3 * 4000


def test_a_block_of_which_little_is_wanted_is_checked_before_anything_changes():
    store = ScatteringStore()
    distckpt.save(store, {"small": np.ones(20), "large": np.ones(3000)})
    (name,) = shards_of(store)
    data = bytearray(store.objects[name])
    data[_BLOCK + 10] ^= 1
    store.objects[name] = bytes(data)
    net = {"small": np.zeros(20)}
    with pytest.raises(LoadFailed, match="damaged") as caught:
        distckpt.load_into(store, net)
    assert not net["small"].any()
    assert caught.value.touched == []


@_SHOWN
@_BY_THREADS
def test_each_byte_is_read_once_however_many_ranks_want_it(threads, shown):
    store = ScatteringStore()
    whole = np.random.default_rng(0).random((100, 100))
    distckpt.save(store, {"w": whole, "v": whole[0]})

    def go(comm):
        net = {"w": np.zeros((100, 100)), "v": np.zeros(100)}
        report = distckpt.load_into(store, net, comm=comm)
        assert np.array_equal(net["w"], whole)
        assert np.array_equal(net["v"], whole[0])
        return report.bytes_read

    with reading_by(threads, shown=shown):
        read = run_ranks(3, go)
    assert bool(store.shown) == shown
    assert max(read) <= sum(shards_of(store).values()) + 2 * 100  # a checksum table a rank


def test_without_the_method_a_store_is_read_block_by_block():
    class Plain(MemoryStore):
        pass

    assert not opens(Plain())
    assert not opens(PrefixStore(Plain(), "x"))
    assert opens(PrefixStore(ScatteringStore(), "x"))


# ------------------------------------------------------------------------------------------ threads


class Watched(dict):
    """A net that notes which threads put new arrays in place."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.threads = []

    def __setitem__(self, name, value):
        self.threads.append(threading.current_thread())
        super().__setitem__(name, value)


def read_only(shape, dtype):
    array = np.zeros(shape, dtype)
    array.flags.writeable = False
    return array


@_BY_THREADS
def test_threads_share_the_blocks_but_new_arrays_are_put_in_place_by_the_caller(threads):
    state = {f"t{number}": np.full((50, 40), number, "f4") for number in range(30)}
    store = ScatteringStore()
    distckpt.save(store, state)
    told = []
    net = Watched()
    for number, name in enumerate(state):
        kinds = [
            np.zeros((50, 40), "f4"),  # in place
            np.zeros((50, 80), "f4")[:, ::2],  # and box by box
            np.zeros((50, 40), "f8"),  # and converted
            read_only((50, 40), "f4"),
            read_only((50, 40), "f8"),
        ]
        dict.__setitem__(net, name, kinds[number % len(kinds)])
    options = LoadOptions(
        progress=lambda done, total: told.append((threading.current_thread(), done))
    )
    with reading_by(threads):
        report = loader.load_into(connect(), store, net, options)
    assert all((net[name] == state[name]).all() for name in state)
    caller = threading.current_thread()
    assert len(net.threads) == 12
    assert set(net.threads) == {caller}
    assert {thread for thread, _ in told} == {caller}
    done = [count for _, count in told]
    assert done == sorted(done)
    # All of the file, but for the block that has its header only.
    assert report.bytes_read == sum(shards_of(store).values()) - _BLOCK


@_BY_THREADS
def test_a_failure_of_one_thread_fails_the_load_when_all_have_ended(threads):
    class Failing(ScatteringStore):
        def read_into(self, name, start_byte, buffer):
            if start_byte // _BLOCK == 40:
                raise distckpt.StoreError("the disk is gone", url="x")
            super().read_into(name, start_byte, buffer)

    store = Failing()
    distckpt.save(store, {f"t{number}": np.ones(1024, "f4") for number in range(200)})
    before = threading.active_count()
    with reading_by(threads), pytest.raises(LoadFailed, match="the disk is gone") as caught:
        distckpt.load_into(store, {f"t{number}": np.zeros(1024, "f4") for number in range(200)})
    assert caught.value.touched
    assert threading.active_count() == before
    # What comes after it is left.
    assert len(store.scattered) < 190


@pytest.mark.parametrize("started", [0, 1])
def test_where_no_thread_can_be_started_the_caller_reads_all(monkeypatch, started):
    """As when the program is ending already."""
    tried = []
    submit = crew.ThreadPoolExecutor.submit

    def refuse(pool, *arguments):
        tried.append(arguments)
        if len(tried) > started:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")
        return submit(pool, *arguments)

    monkeypatch.setattr(crew.ThreadPoolExecutor, "submit", refuse)
    store = ScatteringStore()
    distckpt.save(store, {"w": np.arange(4000.0)})
    net = {"w": np.zeros(4000)}
    with reading_by(3):
        distckpt.load_into(store, net)
    assert tried
    assert np.array_equal(net["w"], np.arange(4000.0))


def test_there_are_as_many_threads_as_cores_for_each_rank_of_the_machine(monkeypatch):
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda process: set(range(8)))
    assert [crew.threads_for(ranks) for ranks in (1, 2, 3, 4, 8, 100)] == [4, 4, 2, 2, 1, 1]
    neighbours = []
    monkeypatch.setattr(loader, "threads_for", lambda ranks: neighbours.append(ranks) or 1)
    store = MemoryStore()
    distckpt.save(store, {"w": np.ones(3)})
    run_ranks(
        3,
        lambda comm: distckpt.load_into(store, {"w": np.zeros(3)}, comm=comm),
        nodes=["a", "b", "a"],
    )
    assert sorted(neighbours) == [1, 2, 2]


# ------------------------------------------------------------------------------------------- stores


@given(st.lists(st.integers(0, 50), max_size=3000), st.integers(0, 100))
def test_a_local_file_fills_any_number_of_buffers(tmp_path_factory, sizes, start):
    folder = tmp_path_factory.mktemp("store")
    content = np.random.default_rng(1).integers(0, 256, start + sum(sizes), np.uint8).tobytes()
    (folder / "x").write_bytes(content)
    buffers = [memoryview(bytearray(size)) for size in sizes]
    open_object(open_store(folder), "x").read_into(start, buffers)
    assert b"".join(buffers) == content[start:]
    if sum(sizes):
        (folder / "x").write_bytes(content[:-1])
        with pytest.raises(EOFError, match=f"ends at byte {len(content) - 1}"):
            open_object(open_store(folder), "x").read_into(start, buffers)
    with pytest.raises(FileNotFoundError):
        open_object(open_store(folder), "y").read_into(0, buffers)


def test_a_part_of_a_store_scatters_under_its_prefix():
    store = ScatteringStore()
    store.put("step-1/x", bytes(range(10)), replace=True)
    buffers = [memoryview(bytearray(3)), memoryview(bytearray(2))]
    open_object(PrefixStore(store, "step-1"), "x").read_into(4, buffers)
    assert [bytes(buffer) for buffer in buffers] == [bytes([4, 5, 6]), bytes([7, 8])]
