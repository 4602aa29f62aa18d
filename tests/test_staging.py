"""What an asynchronous save copies, when, and in how much memory."""

from __future__ import annotations

import gc
import sys
import threading
import time
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import distckpt
from distckpt import SaveFailed, dtypes, staging
from distckpt import pending as pending_module
from distckpt.arena import Arena
from distckpt.flat import flatten
from distckpt.manifest import MANIFEST_NAME
from distckpt.shardfile import Piece, ShardImage, ShardLayout, checksum
from distckpt.staging import LATER, NEVER, NOW, Staging, when_copied
from distckpt.store import LocalStore
from distckpt.testing import FaultyStore, MemoryStore, run_ranks
from distckpt.waiting import quick_switches

BLOCK = 4096


def read_only(array):
    array = np.array(array)
    array.flags.writeable = False
    return array


def image_of(arrays):
    pieces = [Piece(f"{i}", dtypes.find(a.dtype), a.shape) for i, a in enumerate(arrays)]
    return ShardImage(ShardLayout(pieces, BLOCK), [(array, 0) for array in arrays])


def content(image):
    whole = np.empty(image.layout.table_start, np.uint8)
    image.fill(whole, 0, len(whole))
    blocks = [whole[at : at + BLOCK].tobytes() for at in range(0, len(whole), BLOCK)]
    return whole.tobytes() + np.array([checksum(block) for block in blocks], "<u4").tobytes()


# ------------------------------------------------------------------------------- what can't change


def when(value):
    (leaf,) = flatten({"x": value}).tensors
    assert when_copied(leaf, lazy=True) in {LATER, NEVER}
    return when_copied(leaf, lazy=False)


@pytest.mark.parametrize(
    "array",
    [
        read_only([1.0]),
        read_only([[1.0, 2.0]])[0],
        read_only([[1.0, 2.0]]).T,
        np.frombuffer(b"12345678", np.uint8),
        distckpt.Shard(read_only([1.0]), (1,), (3,)),
        distckpt.FlatShard(read_only([1.0]), 1, (3,)),
    ],
    ids=["owner", "view", "transposed", "bytes", "shard", "flat"],
)
def test_what_nobody_can_change_is_never_copied(array):
    assert when(array) == NEVER


def test_a_read_only_view_of_what_can_change_is_copied():
    array = np.zeros(4)
    view = array[:2]
    view.flags.writeable = False
    assert when(array) == NOW
    assert when(view) == NOW
    assert when(np.broadcast_to(array, (3, 4))) == NOW
    assert when(np.frombuffer(memoryview(bytearray(8)).toreadonly(), np.uint8)) == NOW


def test_a_jax_array_is_never_copied_and_a_torch_tensor_is():
    jnp = pytest.importorskip("jax.numpy")
    torch = pytest.importorskip("torch")
    assert when(jnp.arange(5.0)) == NEVER
    assert when(jnp.arange(5.0, dtype=jnp.bfloat16)) == NEVER
    assert when(distckpt.Shard(jnp.arange(5.0), (0,), (9,))) == NEVER
    assert when(torch.arange(5.0)) == NOW


# ---------------------------------------------------------------------------------- what comes when


@given(
    st.lists(
        st.tuples(st.sampled_from([NOW, LATER, NEVER]), st.integers(0, 3 * BLOCK)), max_size=8
    ),
    st.none() | st.integers(2, 12),
    st.integers(1, 3),
)
def test_a_file_is_what_was_there_when_each_array_might_still_not_change(kinds, limit, chunk):
    """Whatever may change when, and however little memory there is."""
    rng = np.random.default_rng(len(kinds))
    arrays = [rng.integers(0, 256, size, np.uint8) for _, size in kinds]
    image, arena = image_of(arrays), Arena()
    expected = content(image)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "_CHUNK_BYTES", chunk * BLOCK)
        patch.setattr(staging, "_REQUEST_BYTES", chunk * BLOCK)
        stage = Staging(
            arena,
            {3: image},
            {3: [when for when, _ in kinds]},
            limit_bytes=None if limit is None else limit * BLOCK,
        )
        stage.begin()
        written = bytearray()

        def write():
            stage.copy_rest()
            for part in stage.chunks(3):
                assert part.start_byte == len(written)
                written.extend(part.data.tobytes())

        writing = threading.Thread(target=write)
        writing.start()
        stage.wait_now()
        for array, (when, _) in zip(arrays, kinds, strict=True):
            if when == NOW:
                array[:] = ~array
        stage.wait_copied()
        for array, (when, _) in zip(arrays, kinds, strict=True):
            if when == LATER:
                array[:] = ~array
        writing.join(30)
        if limit is not None:
            assert arena.out_bytes <= limit * BLOCK
        assert bytes(written) == expected
        stage.release()
    assert arena.out_bytes == 0


def test_what_may_not_change_is_not_copied():
    large = read_only(np.zeros(100 * BLOCK, np.uint8))
    image, arena = image_of([large]), Arena()
    stage = Staging(arena, {0: image}, {0: [NEVER]})
    stage.begin()
    assert arena.out_bytes == 0
    stage.wait_copied()  # there is nothing to wait for
    stage.release()


def test_memory_is_never_more_than_allowed():
    arrays = [np.zeros(10 * BLOCK, np.uint8) for _ in range(10)]
    image, arena = image_of(arrays), Arena()
    limit = 4 * BLOCK
    stage = Staging(arena, {0: image}, {0: [NOW] * 10}, limit_bytes=limit)
    stage.begin()
    most = 0
    for _ in stage.chunks(0):
        most = max(most, arena.out_bytes)
    stage.wait_copied()
    assert 0 < most <= limit
    stage.release()


def test_a_kept_buffer_as_long_as_the_limit_leaves_memory_for_what_streams():
    """As after a larger save, or where a Manager has made all of the memory ready."""
    arrays = [np.full(3 * BLOCK, 1, np.uint8), np.full(20 * BLOCK, 2, np.uint8)]
    image, arena = image_of(arrays), Arena()
    limit = 12 * BLOCK
    arena.give_back(arena.take(limit))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "_CHUNK_BYTES", 2 * BLOCK)
        stage = Staging(arena, {0: image}, {0: [NOW, LATER]}, limit_bytes=limit)
        stage.begin()
        written = bytearray()
        writing = threading.Thread(
            target=lambda: [written.extend(part.data.tobytes()) for part in stage.chunks(0)],
            daemon=True,
        )
        writing.start()
        writing.join(20)
    assert not writing.is_alive()
    assert bytes(written) == content(image)
    stage.release()


# ------------------------------------------------------------------------------------- a whole save


class SlowStore(MemoryStore):
    """Holds its writing until it is told to go on."""

    def __init__(self):
        super().__init__()
        self.come, self.go = threading.Event(), threading.Event()

    def create(self, name, length_bytes):
        self.come.set()
        assert self.go.wait(30)
        return super().create(name, length_bytes)


def test_lazy_arrays_may_change_after_the_fence():
    store, state = SlowStore(), {"w": np.arange(3000.0), "b": np.ones(7)}
    before = {name: array.copy() for name, array in state.items()}
    pending = distckpt.save_async(store, state, lazy=True)
    pending.wait_staged()
    for array in state.values():
        array[:] = -1
    store.go.set()
    checkpoint = pending.wait()
    for name, array in before.items():
        assert np.array_equal(checkpoint[name].read(), array)
    assert {phase.name for phase in checkpoint.stats.ranks[0].phases} >= {"copy", "stage"}


def test_what_is_not_lazy_may_change_at_once():
    store = SlowStore()
    state = {"net.w": np.arange(3_000_000.0), "stats.mean": np.ones(3_000_000)}
    pending = distckpt.save_async(store, state, lazy="net.")
    state["stats.mean"][:] = -1
    pending.wait_staged()
    state["net.w"][:] = -1
    store.go.set()
    checkpoint = pending.wait()
    assert np.array_equal(checkpoint["net.w"].read(), np.arange(3_000_000.0))
    assert np.array_equal(checkpoint["stats.mean"].read(), np.ones(3_000_000))


def test_a_change_before_the_fence_is_detected_and_named(monkeypatch):
    state = {"net.w": np.arange(3000.0), "net.b": np.ones(7)}
    begin = Staging.begin

    def begin_late(self):
        begin(self)
        state["net.w"][5] = -1  # as a training step that does not wait

    monkeypatch.setattr(Staging, "begin", begin_late)
    pending = distckpt.save_async(MemoryStore(), state, lazy=True, check_lazy=True)
    pending.wait_staged()  # ends, though it failed
    with pytest.raises(SaveFailed, match=r"lazy arrays have changed.*net\.w.*wait_staged"):
        pending.wait()


def test_a_manager_that_was_given_the_state_has_planned_it_and_has_memory_ready(tmp_path):
    def job(comm):
        w = np.full((300, 1000), comm.rank, np.float32)
        state = {"w": distckpt.Shard(w, (300 * comm.rank, 0), (600, 1000)), "b": np.ones(50_000)}
        with distckpt.Manager(tmp_path / "run", comm=comm, state=state) as manager:
            team = manager._team
            (known,) = team.memory["plans"].values()
            assert known.saves == 0
            arena = team.memory["arena"]
            ready = arena.take(known.layouts.nbytes)
            assert len(ready) >= known.layouts.nbytes
            arena.give_back(ready)
            manager.save(1, state).wait()
            assert list(team.memory["plans"].values()) == [known]
            assert known.saves == 1
            assert arena._kept is ready

    run_ranks(2, job)
    assert distckpt.open(tmp_path / "run" / "step-00000001").verify()


def test_a_state_that_can_not_be_planned_is_refused_when_the_manager_is_made(tmp_path):
    with pytest.raises(distckpt.LayoutError, match="can't be stored"):
        distckpt.Manager(tmp_path, state={"w": object()})


def test_what_does_not_change_passes_the_check():
    state = {"w": np.arange(3000.0)}
    pending = distckpt.save_async(MemoryStore(), state, lazy=True, check_lazy=True)
    assert np.array_equal(pending.wait()["w"].read(), state["w"])


@pytest.mark.parametrize("lazy", [False, True, ["b"]])
def test_a_state_larger_than_its_staging_memory_streams_through(lazy, tmp_path):
    rng = np.random.default_rng(0)
    state = {name: rng.integers(0, 256, 9 << 20, np.uint8) for name in "abc"}
    before = {name: array.copy() for name, array in state.items()}
    pending = distckpt.save_async(tmp_path / "c", state, lazy=lazy, staging_bytes=8 << 20)
    if lazy is not True:
        state["a"][:] = 0
    pending.wait_staged()
    state["b"][:] = 0
    state["c"][:] = 0
    checkpoint = pending.wait()
    for name, array in before.items():
        assert np.array_equal(checkpoint[name].read(), array)
    checkpoint.verify()


def test_two_saves_in_flight_share_the_staging_memory(tmp_path):
    rng = np.random.default_rng(0)
    state = {name: rng.integers(0, 256, 5 << 20, np.uint8) for name in "ab"}
    saves = [
        distckpt.save_async(tmp_path / str(number), state, staging_bytes=12 << 20)
        for number in range(3)
    ]
    for pending in saves:
        assert np.array_equal(pending.wait()["b"].read(), state["b"])


def test_ranks_may_differ_in_what_is_lazy(tmp_path):
    def save(comm):
        state = {"w": distckpt.Shard(np.full((2, 3), comm.rank), (2 * comm.rank, 0), (4, 3))}
        pending = distckpt.save_async(tmp_path / "c", state, comm=comm, lazy=comm.rank == 1)
        pending.wait_staged()
        state["w"].array[:] = -1
        return pending.wait()

    run_ranks(2, save)
    assert distckpt.open(tmp_path / "c")["w"].read()[:, 0].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lazy": [""]}, "prefixes of names"),
        ({"lazy": ""}, "prefixes of names"),
        ({"staging_bytes": 1000}, "at least 8388608"),
    ],
)
def test_what_can_not_be_staged_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        distckpt.save_async(MemoryStore(), {"w": np.ones(2)}, **arguments)


def test_an_immutable_array_is_let_go_when_it_is_written(tmp_path):
    array = read_only(np.ones(1000))
    pending = distckpt.save_async(tmp_path / "c", {"w": array})
    gone = weakref.ref(array)
    del array
    pending.wait()
    gc.collect()
    assert gone() is None


def test_the_interpreters_lock_changes_hands_sooner_while_saves_are_in_flight():
    before = sys.getswitchinterval()
    stores = [SlowStore(), SlowStore()]
    saves = [distckpt.save_async(store, {"w": np.ones(3)}) for store in stores]
    try:
        assert all(store.come.wait(30) for store in stores)
        assert sys.getswitchinterval() < before / 2
        stores[0].go.set()
        saves[0].wait()
        assert sys.getswitchinterval() < before / 2
    finally:
        for store, pending in zip(stores, saves, strict=True):
            store.go.set()
            pending.close()
    wait_for(lambda: sys.getswitchinterval() == before)


def test_a_switch_interval_that_the_program_sets_meanwhile_stays():
    before = sys.getswitchinterval()
    try:
        with quick_switches:
            sys.setswitchinterval(0.25)
        assert sys.getswitchinterval() == 0.25
    finally:
        sys.setswitchinterval(before)


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# ------------------------------------------------------------------------------------- local files


@pytest.fixture
def direct(monkeypatch):
    """Have small files written past the page cache, too; tells what was written so."""
    written = []
    original = distckpt.store.local._LocalSink._write_direct

    def write(self, offset_bytes, data):
        done = original(self, offset_bytes, data)
        written.append((offset_bytes, done))
        return done

    monkeypatch.setattr(distckpt.store.local, "_DIRECT_BYTES", 0)
    monkeypatch.setattr(distckpt.store.local._LocalSink, "_write_direct", write)
    return written


@pytest.mark.parametrize("size", [1, 5000, 100_000, 9_000_001])
@pytest.mark.parametrize("kind", ["save", "save_async"])
def test_files_written_past_the_page_cache_are_whole(size, kind, tmp_path, direct):
    if distckpt.store.local.file_system(tmp_path) not in distckpt.store.local._DIRECT:
        pytest.skip("this file system is not written to directly")
    state = {"w": np.random.default_rng(0).integers(0, 256, size, np.uint8)}
    saved = getattr(distckpt, kind)(tmp_path / "c", state)
    checkpoint = saved if kind == "save" else saved.wait()
    assert sum(done for _, done in direct) >= size
    assert np.array_equal(checkpoint["w"].read(), state["w"])
    checkpoint.verify()


def test_a_file_system_that_refuses_direct_writing_is_written_to_all_the_same(
    tmp_path, monkeypatch, caplog
):
    local = distckpt.store.local
    monkeypatch.setattr(local, "_DIRECT", {local.file_system(tmp_path)})
    monkeypatch.setattr(local, "_ALIGNMENT", 1)  # so that what is odd is tried, and refused
    local._note_indirect.cache_clear()
    state = {"w": np.random.default_rng(0).integers(0, 256, 3_000_001, np.uint8)}
    with caplog.at_level("INFO", logger="distckpt.store.local"):
        for name in "ab":
            checkpoint = distckpt.save(LocalStore(tmp_path / name), state)
            assert np.array_equal(checkpoint["w"].read(), state["w"])
    if local.file_system(tmp_path) in {"ext4", "xfs"}:
        assert sum("page cache" in record.message for record in caplog.records) == 2


def test_a_call_that_is_interrupted_after_it_has_started_its_thread_keeps_nobody_waiting(
    monkeypatch,
):
    submit = pending_module.ThreadPoolExecutor.submit

    def interrupted(pool, work):
        submit(pool, work)
        raise KeyboardInterrupt

    monkeypatch.setattr(pending_module, "_CALL_S", 0.01)
    monkeypatch.setattr(pending_module.ThreadPoolExecutor, "submit", interrupted)
    store = MemoryStore()
    with pytest.raises(KeyboardInterrupt):
        distckpt.save_async(store, {"w": np.ones(3)})
    wait_for(lambda: MANIFEST_NAME in store.objects)
    assert distckpt.open(store)["w"].read().tolist() == [1, 1, 1]


def test_saves_are_written_by_threads_of_saves_before_them():
    found = []

    def note(kind, name, number):
        if kind == "create":
            found.append(threading.current_thread())

    store = FaultyStore(MemoryStore(), on_operation=note)
    for number in range(40):
        distckpt.save_async(store, {"w": np.full(9, number)}, overwrite=True).wait()
    assert len(found) == 40
    assert threading.current_thread() not in found
    assert all(thread.is_alive() for thread in found)
    # A thread whose save has just ended may not yet be idle.
    assert len(set(found)) < 10


def test_where_no_thread_can_be_started_the_caller_writes_once(monkeypatch):
    submit = pending_module.ThreadPoolExecutor.submit
    late = []

    def refuse(pool, work):
        late.append(work)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(pending_module.ThreadPoolExecutor, "submit", refuse)
    store = MemoryStore()
    pending = distckpt.save_async(store, {"w": np.arange(9.0)})
    assert pending.done()
    files = set(store.objects)
    # A pool does it when a thread is free, though it has raised.
    submit(pending_module._threads(), late[0]).result()
    assert set(store.objects) == files
    assert pending.wait()["w"].read().tolist() == list(range(9))


@pytest.mark.parametrize("concurrent", [True, False])
def test_where_a_rank_can_start_no_thread_nobody_need_come_by_again(monkeypatch, concurrent):
    """As in an exit handler: what drives commits in the main thread has run by then."""
    submit = pending_module.ThreadPoolExecutor.submit

    def refuse(pool, work):
        if threading.current_thread().name == "rank-1":
            raise RuntimeError("cannot schedule new futures after shutdown")
        return submit(pool, work)

    monkeypatch.setattr(pending_module.ThreadPoolExecutor, "submit", refuse)
    store = MemoryStore()

    def go(comm):
        pending = distckpt.save_async(store, {"w": np.arange(9.0)}, comm=comm)
        if comm.rank == 1:
            return pending._closed.is_set()
        return pending.wait(20) is not None

    assert run_ranks(2, go, concurrent=concurrent) == [True, True]
    assert distckpt.open(store)["w"].read().tolist() == list(range(9))


def test_what_nobody_foresaw_in_the_thread_is_logged(monkeypatch, caplog):
    store = MemoryStore()

    def broken(save):
        raise ZeroDivisionError("a fault of distckpt")

    monkeypatch.setattr(pending_module, "write", broken)
    pending = distckpt.save_async(store, {"w": np.arange(9.0)}, comm=distckpt.Solo())
    with pytest.raises(TimeoutError):
        pending.wait(0.2)
    assert "a fault of distckpt" in caplog.text
