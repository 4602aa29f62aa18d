"""All ranks or none: what goes wrong on one rank is told on every rank, alike, and nothing hangs.

Ranks are threads here; tests/mpi tries the same on processes.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import distckpt
from distckpt import (
    CheckpointError,
    CheckpointNotFound,
    FlatShard,
    LayoutError,
    LoadFailed,
    MatchError,
    PerRank,
    SaveFailed,
    Shard,
    StoreError,
)
from distckpt.manifest import MANIFEST_NAME
from distckpt.options import Options
from distckpt.pending import start_save
from distckpt.team import connect
from distckpt.testing import FaultyStore, MemoryStore, run_ranks

_SHORT_S = 0.3


def outcomes(ranks, function, **options):
    """Run a function as ranks; return what each returned, or the distckpt error that it raised."""

    def run(comm):
        try:
            return function(comm)
        except CheckpointError as exc:
            return exc

    return run_ranks(ranks, run, timeout_s=30, **options)


def same_error(found):
    """The error that every rank raised, of one class and text."""
    assert {type(error) for error in found} == {type(found[0])}
    assert {str(error) for error in found} == {str(found[0])}
    assert len({repr(vars(error)) for error in found}) == 1
    assert isinstance(found[0], CheckpointError)
    return found[0]


def cut(comm, version=0, rows=6):
    """A tensor that is cut over the ranks."""
    mine = slice(rows * comm.rank // comm.size, rows * (comm.rank + 1) // comm.size)
    return Shard(np.arange(rows * 5.0).reshape(rows, 5)[mine] + version, (mine.start, 0), (rows, 5))


def whole(version=0, rows=6):
    return np.arange(rows * 5.0).reshape(rows, 5) + version


class Failing:
    """A FaultyStore's on_operation that fails a kind of operation on some ranks."""

    def __init__(self, kind, only=""):
        self.kind, self.only = kind, only

    def __call__(self, kind, name, number):
        if kind == self.kind and name.startswith(self.only):
            raise StoreError(f"no {kind} today", refused=True)


class Nowhere:
    """Memory for staging that there is none of."""

    def take(self, size_bytes, most_bytes=None):
        raise MemoryError("no room to stage")

    def give_back(self, buffer):
        pass


_EVERY_RANK = pytest.mark.parametrize("broken", [0, 1, 2])
_BOTH_SAVES = pytest.mark.parametrize("how", ["save", "save_async"])


def save(store, state, comm, how="save", **options):
    if how == "save":
        return distckpt.save(store, state, comm=comm, **options)
    return distckpt.save_async(store, state, comm=comm, **options).wait()


# ------------------------------------------------------------------- a rank that fails in a save


def saves_after(store, before):
    """What a failed save must have left: nothing new; and the next one must work."""
    assert store.objects == before
    found = outcomes(3, lambda comm: distckpt.save(store, {"w": cut(comm)}, comm=comm))
    assert not any(isinstance(outcome, Exception) for outcome in found)
    assert np.array_equal(distckpt.load(store)["w"], whole())


@_EVERY_RANK
@_BOTH_SAVES
def test_a_leaf_that_cant_be_stored_on_one_rank_fails_all(broken, how):
    store = MemoryStore()

    def go(comm):
        leaf = np.array([object()]) if comm.rank == broken else cut(comm)
        save(store, {"w": leaf}, comm, how)

    error = same_error(outcomes(3, go))
    assert type(error) is LayoutError
    assert f"on rank {broken}: 1 leaves of the state can't be stored" in str(error)
    saves_after(store, {})


@_EVERY_RANK
@_BOTH_SAVES
def test_a_net_whose_tensors_raise_on_one_rank_fails_all(broken, how):
    store = MemoryStore()

    class Net:
        def __init__(self, comm):
            self.comm = comm

        def tensors(self):
            if self.comm.rank == broken:
                raise ZeroDivisionError("my own fault")
            return {"w": cut(self.comm)}

        def assign(self, name, value):
            raise NotImplementedError

    error = same_error(outcomes(3, lambda comm: save(store, Net(comm), comm, how)))
    assert type(error) is SaveFailed
    assert error.failures == {broken: "CheckpointError: ZeroDivisionError: my own fault"}
    assert error.committed is False
    saves_after(store, {})


def test_the_rank_that_failed_keeps_the_cause():
    def go(comm):
        save(MemoryStore(), {"w": 1j if comm.rank == 1 else 1}, comm)

    found = outcomes(3, go)
    same_error(found)
    assert isinstance(found[1].__cause__, LayoutError)
    assert found[0].__cause__ is None


@_BOTH_SAVES
@pytest.mark.parametrize("fault", ["gap", "overlap", "shape", "dtype", "value", "kind"])
def test_states_that_do_not_fit_together_fail_all(fault, how):
    store = MemoryStore()

    def go(comm):
        last = comm.rank == 2
        leaves = {
            "gap": Shard(np.zeros(1), (3 if last else comm.rank,), (4,)),
            "overlap": Shard(np.zeros(2), (min(comm.rank, 1),), (4,))
            if comm.rank < 2
            else Shard(np.zeros(1), (3,), (4,)),
            "shape": Shard(np.zeros(1), (comm.rank,), (4 if last else 3,)),
            "dtype": Shard(np.zeros(1, np.int32 if last else float), (comm.rank,), (3,)),
            "value": 1 if last else 2,
            "kind": 1 if last else np.zeros(3),
        }
        save(store, {fault: leaves[fault]}, comm, how)

    error = same_error(outcomes(3, go))
    assert type(error) is LayoutError
    assert f"'{fault}'" in str(error)
    saves_after(store, {})


@_EVERY_RANK
@_BOTH_SAVES
def test_a_file_that_cant_be_made_up_on_one_rank_fails_all(broken, how):
    """Two tensors of one rank that need one key in its file."""
    store = MemoryStore()

    def go(comm):
        state = {"w": cut(comm)}
        if comm.rank == broken:
            state[f"w@{2 * broken}:{2 * broken + 2},0:5"] = np.zeros(2)
        save(store, state, comm, how)

    error = same_error(outcomes(3, go))
    assert type(error) is SaveFailed
    assert list(error.failures) == [broken]
    assert "this key is needed twice in one shard file; rename the tensor" in str(error)
    saves_after(store, {})


@_EVERY_RANK
def test_a_rank_without_memory_to_stage_fails_all(broken):
    store = MemoryStore()

    def go(comm):
        if comm.rank == broken:
            connect(comm).memory["arena"] = Nowhere()
        save(store, {"w": cut(comm)}, comm, "save_async")

    error = same_error(outcomes(3, go))
    assert error.failures == {broken: "CheckpointError: MemoryError: no room to stage"}
    saves_after(store, {})


@_EVERY_RANK
@_BOTH_SAVES
@pytest.mark.parametrize("kind", ["create", "write", "write-half", "commit"])
def test_a_file_that_cant_be_written_on_one_rank_fails_all(broken, how, kind):
    store = MemoryStore()

    def go(comm):
        own = FaultyStore(store, on_operation=Failing(kind) if comm.rank == broken else None)
        save(own, {"w": cut(comm), "rng": PerRank(comm.rank)}, comm, how)

    error = same_error(outcomes(3, go))
    assert type(error) is SaveFailed
    assert error.failures == {broken: f"StoreError: no {kind} today"}
    assert error.committed is False
    saves_after(store, {})


@_BOTH_SAVES
def test_all_ranks_that_fail_are_named(how):
    store = MemoryStore()

    def go(comm):
        own = FaultyStore(store, on_operation=Failing("commit") if comm.rank else None)
        save(own, {"w": cut(comm)}, comm, how)

    error = same_error(outcomes(3, go))
    assert list(error.failures) == [1, 2]
    assert "the save failed on ranks 1, 2" in str(error)


@_BOTH_SAVES
@pytest.mark.parametrize("kind", ["put", "size"])
def test_a_commit_that_fails_at_the_coordinator_fails_all(how, kind):
    store = MemoryStore()

    def go(comm):
        only = MANIFEST_NAME if kind == "put" else "shard-"
        save(FaultyStore(store, on_operation=Failing(kind, only)), {"w": cut(comm)}, comm, how)

    error = same_error(outcomes(3, go))
    assert type(error) is SaveFailed
    assert f"no {kind} today" in str(error)
    assert list(error.failures) == [0]
    saves_after(store, {})


@_BOTH_SAVES
def test_a_store_that_cant_be_asked_whether_there_is_a_checkpoint_fails_all(how):
    store = MemoryStore()

    def go(comm):
        faulty = FaultyStore(store, on_operation=Failing("size", MANIFEST_NAME))
        save(faulty, {"w": cut(comm)}, comm, how)

    error = same_error(outcomes(3, go))
    assert type(error) is StoreError
    assert "no size today" in str(error)
    saves_after(store, {})


def test_what_follows_a_commit_can_fail_and_the_save_is_committed_all_the_same(caplog):
    store = MemoryStore()

    def follow(checkpoint):
        raise ZeroDivisionError("in my own code")

    def go(comm):
        pending = start_save(connect(comm), store, {"w": cut(comm)}, Options(), on_committed=follow)
        pending.close()
        return pending.wait().ranks

    assert outcomes(3, go) == [3, 3, 3]
    assert "committed; what was to be done after the commit failed" in caplog.text


def test_a_failure_that_nobody_waits_for_is_logged(caplog):
    store = MemoryStore()

    def go(comm):
        own = FaultyStore(store, on_operation=Failing("commit") if comm.rank == 1 else None)
        pending = distckpt.save_async(own, {"w": cut(comm)}, comm=comm)
        pending.close()
        assert pending.done()
        assert "failed" in repr(pending)

    outcomes(3, go)
    assert [record.levelname for record in caplog.records] == ["ERROR"] * 3
    assert "no commit today" in caplog.text


# ------------------------------------------------------------------- a rank that fails in a load


@pytest.fixture
def saved():
    store = MemoryStore()

    def go(comm):
        state = {"w": cut(comm), "same": np.ones(4), "rng": PerRank(comm.rank), "epoch": 3}
        distckpt.save(store, state, comm=comm)

    run_ranks(2, go)
    return store


def untouched(net):
    return not net["w"].any()


@_EVERY_RANK
def test_a_net_that_cant_be_filled_on_one_rank_fails_all(saved, broken):
    nets = [{"w": np.zeros((6, 5))} for _ in range(3)]

    def go(comm):
        net = (nets[comm.rank], object()) if comm.rank == broken else nets[comm.rank]
        distckpt.load_into(saved, net, comm=comm)

    error = same_error(outcomes(3, go))
    assert type(error) is LayoutError
    assert f"on rank {broken}: 1 leaves of the state can't be stored" in str(error)
    assert all(map(untouched, nets))


@_EVERY_RANK
def test_a_net_whose_tensors_raise_on_one_rank_fails_all_loads(saved, broken):
    class Net:
        def tensors(self):
            raise ZeroDivisionError("my own fault")

        def assign(self, name, value):
            raise NotImplementedError

    nets = [{"w": np.zeros((6, 5))} for _ in range(3)]

    def go(comm):
        net = Net() if comm.rank == broken else nets[comm.rank]
        distckpt.load_into(saved, net, comm=comm)

    error = same_error(outcomes(3, go))
    assert type(error) is LoadFailed
    assert error.failures == {broken: "CheckpointError: ZeroDivisionError: my own fault"}
    assert error.touched == []
    assert all(map(untouched, nets))


@_EVERY_RANK
def test_a_shape_that_differs_on_one_rank_fails_all(saved, broken):
    nets = [{"w": np.zeros((6, 5))} for _ in range(3)]
    nets[broken] = {"w": np.zeros((5, 6))}
    error = same_error(
        outcomes(3, lambda comm: distckpt.load_into(saved, nets[comm.rank], comm=comm))
    )
    assert type(error) is MatchError
    assert error.mismatched == {"w": "wants shape (5, 6), saved is (6, 5) ('w')"}
    assert all(map(untouched, nets))


@pytest.mark.parametrize("argument", ["select", "rename"])
def test_a_callable_that_raises_in_the_matching_fails_all(saved, argument):
    def mine(name):
        raise ZeroDivisionError("my own fault")

    def go(comm):
        distckpt.load_into(saved, {"w": np.zeros((6, 5))}, comm=comm, **{argument: mine})

    error = same_error(outcomes(3, go))
    assert "ZeroDivisionError: my own fault" in str(error)


def test_an_error_of_the_users_own_class_reaches_every_rank(saved):
    class Mine(MatchError):
        pass

    def select(name):
        raise Mine("not this one", missing=["x"])

    def go(comm):
        distckpt.load_into(saved, {"w": np.zeros((6, 5))}, comm=comm, select=select)

    error = same_error(outcomes(3, go))
    assert type(error) is MatchError
    assert error.missing == ["x"]


def test_a_manifest_that_is_not_there_fails_all():
    error = same_error(outcomes(3, lambda comm: distckpt.load_into(MemoryStore(), {}, comm=comm)))
    assert type(error) is CheckpointNotFound


@_EVERY_RANK
@pytest.mark.parametrize("first_pass", [False, True], ids=["tensors", "before the net changes"])
def test_a_read_that_fails_on_one_rank_fails_all(saved, broken, first_pass):
    nets = [{"w": np.zeros((6, 5))} for _ in range(3)]
    if first_pass:
        for net in nets:
            net["w"] = np.zeros((6, 5), np.float32)  # a narrowing cast is looked at first

    def go(comm):
        own = FaultyStore(
            saved, on_operation=Failing("read", "shard") if comm.rank == broken else None
        )
        mine = {"w": nets[comm.rank]["w"]}
        if comm.rank == broken:
            mine["same"] = np.zeros(4)
        distckpt.load_into(own, mine, comm=comm, timeout_s=20)

    found = outcomes(3, go)
    if isinstance(found[broken], CheckpointError):
        error = same_error(found)
        assert type(error) is LoadFailed
        assert "no read today" in str(error)
        assert broken in error.failures
        if first_pass:
            assert error.touched == []
            assert all(map(untouched, nets))
    else:  # its blocks were read by others
        assert all(np.array_equal(net["w"], whole()) for net in nets)


def test_a_reader_alone_that_fails_fails_all(saved):
    """What one rank can't read, others wait for."""

    def go(comm):
        own = FaultyStore(saved, on_operation=Failing("read", "shard"))
        distckpt.load_into(own, {"w": np.zeros((6, 5))}, comm=comm)

    error = same_error(outcomes(3, go))
    assert type(error) is LoadFailed
    assert error.failures.keys() == {0, 1, 2}
    assert "no read today" in str(error)


@_EVERY_RANK
def test_a_per_rank_callable_that_raises_on_one_rank_fails_all(saved, broken):
    nets = [{"w": np.zeros((6, 5)), "rng": PerRank(None)} for _ in range(3)]

    def decide(values, rank, size):
        if rank == broken:
            raise ZeroDivisionError("undecided")
        return values[0]

    def go(comm):
        distckpt.load_into(saved, nets[comm.rank], comm=comm, per_rank=decide)

    error = same_error(outcomes(3, go))
    assert type(error) is LoadFailed
    assert error.failures == {broken: "CheckpointError: ZeroDivisionError: undecided"}
    assert error.touched == []
    assert all(map(untouched, nets))
    assert all(net["rng"].value is None for net in nets)


@_EVERY_RANK
@pytest.mark.parametrize("name", ["w", "epoch"])
def test_an_assign_that_raises_on_one_rank_fails_all(saved, broken, name):
    class Net:
        def __init__(self, rank):
            self.rank = rank

        def tensors(self):
            return {"w": np.zeros((6, 5)), "epoch": 0}

        def assign(self, given, value):
            if (self.rank, given) == (broken, name):
                raise ZeroDivisionError("I take nothing")

    def go(comm):
        distckpt.load_into(saved, Net(comm.rank), comm=comm)

    error = same_error(outcomes(3, go))
    assert type(error) is LoadFailed
    assert error.failures[broken] == "CheckpointError: ZeroDivisionError: I take nothing"
    assert name in error.touched


@_EVERY_RANK
def test_after_a_failed_load_the_next_one_works(saved, broken):
    def go(comm):
        bad = {"w": np.zeros(1 if comm.rank == broken else (6, 5))}
        with pytest.raises(MatchError):
            distckpt.load_into(saved, bad, comm=comm)
        net = {"w": np.zeros((6, 5))}
        distckpt.load_into(saved, net, comm=comm)
        assert np.array_equal(net["w"], whole())

    run_ranks(3, go)


# ------------------------------------------------------------------------------- different calls


def test_saves_in_another_order_are_told(saved):
    a, b, c = Named("a"), Named("b"), Named("c")

    def go(comm):
        found = []
        for store in (a, b) if comm.rank else (b, a):
            with pytest.raises(CheckpointError, match="the ranks made different calls") as caught:
                distckpt.save(store, {"w": cut(comm)}, comm=comm)
            found.append(str(caught.value))
        distckpt.save(c, {"w": np.zeros(1)}, comm=comm)  # and go on
        return found

    first, second = run_ranks(3, go)[0]
    assert "rank 0: save to 'b'\n" in first
    assert "ranks 1, 2: save to 'a'" in first
    assert "rank 0: save to 'a'\n" in second
    assert a.objects == b.objects == {}


class Named(MemoryStore):
    def __init__(self, name):
        super().__init__()
        self.name = name

    @property
    def url(self):
        return self.name


@pytest.mark.parametrize(
    "other",
    [
        lambda store, comm: distckpt.load_into(store, {"w": np.zeros((6, 5))}, comm=comm),
        lambda store, comm: distckpt.plan({"w": cut(comm)}, comm=comm),
        lambda store, comm: distckpt.save(store, {"w": cut(comm)}, comm=comm, overwrite=True),
        lambda store, comm: distckpt.save(store, {"w": cut(comm)}, comm=comm, replicas="trust"),
        lambda store, comm: distckpt.save(store, {"w": cut(comm)}, comm=comm, replicas=None),
        lambda store, comm: distckpt.save(store, {"w": cut(comm)}, comm=comm, max_shard_bytes=9),
        lambda store, comm: distckpt.Manager(store, comm=comm).load_latest_into({}, default=0),
        lambda store, comm: distckpt.Manager(store, comm=comm).save(1, {"w": cut(comm)}).wait(),
    ],
    ids=["load", "plan", "overwrite", "replicas", "replicas of no kind", "split", "resume", "step"],
)
def test_a_rank_that_calls_something_else_is_told(other):
    store = MemoryStore()

    def go(comm):
        if comm.rank == 1:
            other(store, comm)
        else:
            distckpt.save(store, {"w": cut(comm)}, comm=comm)

    error = same_error(outcomes(3, go))
    assert type(error) is CheckpointError
    assert "ranks 0, 2: save to 'memory-store'" in str(error)
    assert store.objects == {}


def test_loads_with_other_options_are_told(saved):
    def go(comm):
        distckpt.load_into(saved, {"w": np.zeros((6, 5))}, comm=comm, strict=comm.rank == 0)

    assert "strict=True" in str(same_error(outcomes(3, go)))


def test_an_exception_between_two_saves_is_the_programs_own_and_the_others_are_told():
    """A rank that skips a save after an error of its own: the next calls do not fit, and say so."""
    store = MemoryStore()

    def go(comm):
        with contextlib.suppress(ZeroDivisionError):
            share = 1 / (comm.rank - 1)
            distckpt.save(store, {"w": cut(comm), "share": share**2}, comm=comm)
        distckpt.load_into(store, {"w": np.zeros((6, 5))}, comm=comm)

    found = outcomes(3, go)
    assert "rank 1: load_into from" in str(same_error(found))


# ------------------------------------------------------------------------------------ late ranks


@_EVERY_RANK
@pytest.mark.parametrize("call", ["save", "save_async", "load_into", "plan", "resume"])
def test_a_rank_that_comes_late_is_named_and_told_when_it_comes(saved, call, broken):
    together = threading.Barrier(2)  # the others come
    gone = threading.Barrier(2)  # and have given up
    store = MemoryStore()
    left = Counter()
    lock = threading.Lock()

    def go(comm):
        (gone if comm.rank == broken else together).wait(20)
        try:
            if call == "load_into":
                distckpt.load_into(saved, {"w": np.zeros((6, 5))}, comm=comm, timeout_s=_SHORT_S)
            elif call == "plan":
                distckpt.plan({"w": cut(comm)}, comm=comm, timeout_s=_SHORT_S)
            elif call == "resume":
                manager = distckpt.Manager(store, comm=comm, timeout_s=_SHORT_S)
                manager.load_latest_into({}, default=0)
            else:
                save(store, {"w": cut(comm)}, comm, call, timeout_s=_SHORT_S)
        finally:
            if comm.rank != broken:
                with lock:
                    left["ranks"] += 1
                    last = left["ranks"] == 2
                if last:
                    gone.wait(20)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distckpt.team._GRACE_S", 0.2)
        found = outcomes(3, go)
    if broken:
        error = same_error(found)
        kind = LoadFailed if call in ("load_into", "resume") else SaveFailed
        assert type(error) is kind
        assert f"rank {broken} did not" in str(error)
        assert f"within {_SHORT_S} s" in str(error)
        assert "a rank that needs longer needs a larger timeout_s" in str(error)
        assert list(error.failures) == [broken]
    else:
        # Nobody can tell for a coordinator that is late: those who wait for it give up.
        assert all("rank 0 did not answer to" in str(error) for error in found[1:])
    assert store.objects == {}


def test_several_late_ranks_are_all_named():
    def go(comm):
        if comm.rank in (0, 2):
            distckpt.save(MemoryStore(), {"w": cut(comm)}, comm=comm, timeout_s=_SHORT_S)

    found = outcomes(4, go)
    assert "ranks 1, 3 did not join the save" in str(found[0])
    assert str(found[0]) == str(found[2])
    assert list(found[0].failures) == [1, 3]


def test_a_rank_that_writes_too_long_is_named_and_its_files_are_gone():
    store = MemoryStore()
    given_up = threading.Event()

    def stall(kind, name, number):
        if kind == "commit":
            given_up.wait(20)

    def go(comm):
        slow = comm.rank == 1
        own = FaultyStore(store, on_operation=stall if slow else None)
        try:
            save(own, {"w": cut(comm)}, comm, timeout_s=_SHORT_S)
        finally:
            if comm.rank == 0:
                given_up.set()

    error = same_error(outcomes(3, go))
    assert type(error) is SaveFailed
    assert "rank 1 did not finish writing within" in str(error)
    assert error.committed is False
    assert store.objects == {}


def test_a_rank_that_reads_too_long_is_named(saved):
    given_up = threading.Event()

    def stall(kind, name, number):
        if kind == "read" and name.startswith("shard"):
            given_up.wait(20)

    nets = [{"w": cut(run)} for run in (_Rank(0), _Rank(1), _Rank(2))]

    def go(comm):
        own = FaultyStore(saved, on_operation=stall if comm.rank == 2 else None)
        try:
            distckpt.load_into(own, nets[comm.rank], comm=comm, timeout_s=_SHORT_S)
        finally:
            if comm.rank == 0:
                given_up.set()

    error = same_error(outcomes(3, go))
    assert type(error) is LoadFailed
    assert f"within {_SHORT_S} s" in str(error)
    # Rank 1, which waits for what rank 2 reads, may be late with it.
    assert "2" in re.search("ranks? ([0-9, ]+) did not", str(error))[1]


class _Rank:
    size = 3

    def __init__(self, rank):
        self.rank = rank


def test_after_a_late_rank_has_come_all_go_on():
    store = MemoryStore()
    given_up = threading.Event()

    def go(comm):
        if comm.rank == 1:
            given_up.wait(20)
        with pytest.raises(SaveFailed):
            distckpt.save(store, {"w": cut(comm)}, comm=comm, timeout_s=_SHORT_S)
        if comm.rank == 0:
            given_up.set()
        distckpt.save(store, {"w": cut(comm)}, comm=comm)

    run_ranks(3, go)
    assert np.array_equal(distckpt.load(store)["w"], whole())


# ---------------------------------------------------------------------------- saves in flight


class Gate(FaultyStore):
    """Lets no file be committed before it is opened."""

    def __init__(self, store):
        self.open = threading.Event()
        super().__init__(store, on_operation=self._wait)

    def _wait(self, kind, name, number):
        if kind == "commit":
            self.open.wait(20)


@pytest.fixture(params=[True, False], ids=["concurrent", "driven by the main thread"])
def concurrent(request):
    return request.param


def test_a_save_in_flight_is_not_there_and_then_is(concurrent):
    store = MemoryStore()
    gate = Gate(store)
    looked = threading.Barrier(3)

    def go(comm):
        pending = distckpt.save_async(gate, {"w": cut(comm)}, comm=comm)
        pending.wait_staged()
        assert not pending.done()
        assert repr(pending) == "<PendingCheckpoint 'memory-store' in flight>"
        assert pending.url == "memory-store"
        with pytest.raises(CheckpointError):
            distckpt.open(store)
        with pytest.raises(TimeoutError, match=r"not committed within 0\.01 s; the save goes on"):
            pending.wait(timeout_s=0.01)
        with pytest.raises(TimeoutError):
            pending.wait(timeout_s=0)
        looked.wait(20)
        gate.open.set()
        assert pending.wait(timeout_s=20)["w"].shape == (6, 5)
        assert pending.done()
        assert repr(pending) == "<PendingCheckpoint 'memory-store' committed>"
        assert pending.wait(timeout_s=0) is pending.wait()

    run_ranks(3, go, concurrent=concurrent)
    assert np.array_equal(distckpt.load(store)["w"], whole())


def test_two_saves_in_flight_may_be_waited_for_in_any_order(concurrent):
    stores = [MemoryStore(), MemoryStore()]
    gates = [Gate(store) for store in stores]
    started = threading.Barrier(3)

    def go(comm):
        pending = [
            distckpt.save_async(gate, {"w": cut(comm, version)}, comm=comm)
            for version, gate in enumerate(gates)
        ]
        started.wait(20)
        for gate in gates[:: -1 if comm.rank else 1]:
            gate.open.set()
        for one in pending[:: 1 if comm.rank == 1 else -1]:
            one.wait()

    run_ranks(3, go, concurrent=concurrent)
    for version, store in enumerate(stores):
        assert np.array_equal(distckpt.load(store)["w"], whole(version))


def test_the_second_of_two_saves_may_be_committed_first(concurrent):
    stores = [MemoryStore(), MemoryStore()]
    gate = Gate(stores[0])
    all_have_looked = threading.Barrier(3, timeout=60)

    def go(comm):
        first = distckpt.save_async(gate, {"w": cut(comm, 1)}, comm=comm)
        second = distckpt.save_async(stores[1], {"w": cut(comm, 2)}, comm=comm)
        second.wait()
        assert not first.done()
        all_have_looked.wait()
        gate.open.set()
        first.wait()

    run_ranks(3, go, concurrent=concurrent)
    for version, store in enumerate(stores, 1):
        assert np.array_equal(distckpt.load(store)["w"], whole(version))


def test_a_save_that_fails_beside_one_that_does_not():
    good = MemoryStore()

    def go(comm):
        bad = FaultyStore(MemoryStore(), on_operation=Failing("commit"))
        first = distckpt.save_async(bad, {"w": cut(comm)}, comm=comm)
        second = distckpt.save_async(good, {"w": cut(comm)}, comm=comm)
        second.wait()
        for _ in range(2):
            with pytest.raises(SaveFailed, match="no commit today"):
                first.wait()

    run_ranks(3, go)
    assert np.array_equal(distckpt.load(good)["w"], whole())


def test_a_save_may_be_waited_for_by_some_ranks_only():
    store = MemoryStore()

    def go(comm):
        pending = distckpt.save_async(store, {"w": cut(comm)}, comm=comm)
        if comm.rank == 1:
            pending.wait()
            return None
        return pending

    left = run_ranks(3, go)
    assert np.array_equal(distckpt.load(store)["w"], whole())
    for pending in (left[0], left[2]):
        pending.close()


def test_a_save_that_nobody_waits_for_is_committed():
    store = MemoryStore()
    pending = run_ranks(3, lambda comm: distckpt.save_async(store, {"w": cut(comm)}, comm=comm))
    for one in pending:
        one.close()
    assert np.array_equal(distckpt.load(store)["w"], whole())


def test_arrays_may_change_when_save_async_has_returned(concurrent):
    store = MemoryStore()
    gate = Gate(store)

    def go(comm):
        piece = cut(comm)
        state = {"w": piece, "same": np.ones(5), "rng": PerRank([comm.rank]), "epoch": 1}
        metadata = {"notes": ["before"]}
        pending = distckpt.save_async(gate, state, comm=comm, metadata=metadata)
        piece.array[...] = -1
        state["same"][...] = -1
        state["rng"].value.append("changed")
        state["epoch"] = -1
        metadata["notes"].append("after")
        gate.open.set()
        pending.wait()

    run_ranks(3, go, concurrent=concurrent)
    checkpoint = distckpt.open(store)
    assert np.array_equal(checkpoint["w"][...], whole())
    assert np.array_equal(checkpoint["same"][...], np.ones(5))
    assert checkpoint.per_rank["rng"][:] == [[0], [1], [2]]
    assert checkpoint.values == {"epoch": 1}
    assert checkpoint.metadata == {"notes": ["before"]}


def test_other_collective_calls_drive_a_commit_that_no_thread_may_drive():
    """`plan` here, which writes nothing; nobody waits, and nobody asks whether it is done."""
    store = MemoryStore()
    meet = threading.Barrier(3)
    committed = [False] * 3

    def go(comm):
        pending = distckpt.save_async(store, {"w": cut(comm)}, comm=comm)
        while True:
            distckpt.plan({"w": cut(comm)}, comm=comm)
            committed[comm.rank] = "committed" in repr(pending)
            meet.wait(20)
            over = all(committed)
            meet.wait(20)
            if over:
                return

    run_ranks(3, go, concurrent=False)
    assert np.array_equal(distckpt.load(store)["w"], whole())


def test_done_alone_drives_a_commit_that_no_thread_may_drive():
    store = MemoryStore()

    def go(comm):
        pending = distckpt.save_async(store, {"w": cut(comm)}, comm=comm)
        while not pending.done():
            os.sched_yield()

    run_ranks(3, go, concurrent=False)
    assert np.array_equal(distckpt.load(store)["w"], whole())


def test_a_commit_that_no_thread_may_drive_waits_for_its_driver():
    store = MemoryStore()
    looked = threading.Barrier(3)

    def go(comm):
        pending = distckpt.save_async(store, {"w": cut(comm)}, comm=comm)
        pending._written.wait(20)
        looked.wait(20)
        assert "in flight" in repr(pending)
        assert MANIFEST_NAME not in store.objects
        looked.wait(20)
        pending.wait()

    run_ranks(3, go, concurrent=False)


def test_a_failed_save_that_the_main_thread_drives_fails_all():
    store = MemoryStore()

    def go(comm):
        own = FaultyStore(store, on_operation=Failing("commit") if comm.rank == 2 else None)
        save(own, {"w": cut(comm)}, comm, "save_async")

    error = same_error(outcomes(3, go, concurrent=False))
    assert error.failures == {2: "StoreError: no commit today"}
    assert store.objects == {}


def test_a_blocking_save_beside_one_in_flight(concurrent):
    first, second = MemoryStore(), MemoryStore()

    def go(comm):
        pending = distckpt.save_async(first, {"w": cut(comm, 1)}, comm=comm)
        distckpt.save(second, {"w": cut(comm, 2)}, comm=comm)
        pending.wait()
        net = {"w": np.zeros((6, 5))}
        distckpt.load_into(first, net, comm=comm)
        return net["w"]

    assert np.array_equal(run_ranks(3, go, concurrent=concurrent)[2], whole(1))
    assert np.array_equal(distckpt.load(second)["w"], whole(2))


# -------------------------------------------------------------------------------- the plan cache


class Counting:
    """A Coordinator that counts what it sends."""

    concurrent = True

    def __init__(self, comm):
        self.comm = comm
        self.rank, self.size, self.node = comm.rank, comm.size, comm.node
        self.sent = 0
        self.sent_bytes = 0

    def post(self, dest, tag, payload):
        self.sent += 1
        self.sent_bytes += len(payload)
        self.comm.post(dest, tag, payload)

    def poll(self, tag, source=None):
        return self.comm.poll(tag, source)

    def spent(self):
        found, self.sent, self.sent_bytes = (self.sent, self.sent_bytes), 0, 0
        return found


def test_a_second_save_of_the_same_layout_plans_nothing_again():
    many = [f"layer.{index**5}.weight" for index in range(400)]
    store = MemoryStore()

    def go(comm):
        counting = Counting(comm)
        spent = []
        for version in range(3):
            state = {name: cut(comm, version) for name in many} | {"epoch": version}
            distckpt.save(store, state, comm=counting, overwrite=True)
            spent.append(counting.spent())
        return spent

    for rank, (first, second, third) in enumerate(run_ranks(3, go)):
        # To each other rank: the call (or answer), the state (or plan), and the outcome.
        assert first[0] == (3 if rank else 6)
        assert second[0] == third[0] == (2 if rank else 4)
        assert second[1] < first[1] / 2


@pytest.mark.parametrize("change", ["shape", "dtype", "name", "replicas", "layout", "per rank"])
def test_what_changed_is_planned_anew(change):
    store = MemoryStore()

    def go(comm):
        counting = Counting(comm)
        distckpt.save(store, {"w": cut(comm)}, comm=counting)
        before = counting.spent()
        state, options = {"w": cut(comm)}, {}
        if change == "shape":
            state = {"w": cut(comm, rows=7)}
        elif change == "dtype":
            piece = cut(comm)
            state = {"w": Shard(piece.array.astype(np.float32), piece.offset, piece.global_shape)}
        elif change == "name":
            state = {"v": cut(comm)}
        elif change == "layout":
            state = {"w": FlatShard(np.zeros(10), 10 * comm.rank, (6, 5))}
        elif change == "per rank":
            state["rng"] = PerRank(comm.rank)
        else:
            options = {"replicas": "trust"}
        distckpt.save(store, state, comm=counting, overwrite=True, **options)
        return before[0] == counting.spent()[0]

    assert run_ranks(3, go) == [True] * 3
    assert distckpt.open(store).verify()


def test_a_layout_that_changes_on_one_rank_only_is_planned_anew():
    store = MemoryStore()
    array = np.arange(10.0)

    def go(comm):
        for edge in (5, 5, 7):
            run = (0, 5) if comm.rank == 0 else (10 - edge, 10)
            state = {"w": FlatShard(array[slice(*run)], run[0], (10,))}
            distckpt.save(store, state, comm=comm, overwrite=True)

    run_ranks(2, go)
    assert np.array_equal(distckpt.load(store)["w"], array)


def test_values_that_change_need_no_plan_and_are_kept():
    store = MemoryStore()

    def go(comm):
        counting = Counting(comm)
        spent = []
        for epoch in range(3):
            state = {"w": cut(comm), "epoch": epoch}
            distckpt.save(store, state, comm=counting, overwrite=True)
            spent.append(counting.spent()[0])
            assert distckpt.open(store).values == {"epoch": epoch}
        return spent

    assert run_ranks(2, go)[1] == [3, 2, 2]


def test_values_that_only_some_ranks_have_are_united_whenever_they_change():
    store = MemoryStore()

    def go(comm):
        for epoch in range(3):
            state = {"w": cut(comm), f"of {comm.rank}": epoch}
            distckpt.save(store, state, comm=comm, overwrite=True)
            assert distckpt.open(store).values == {"of 0": epoch, "of 1": epoch}

    run_ranks(2, go)


def test_a_name_that_becomes_a_value_on_one_rank_is_refused_also_where_nothing_is_planned():
    store = MemoryStore()

    def go(comm):
        state = {"w": cut(comm)} | ({"only": np.ones(2)} if comm.rank == 0 else {})
        distckpt.save(store, state, comm=comm)
        if comm.rank == 1:
            state["only"] = 5
        distckpt.save(store, state, comm=comm, overwrite=True)

    error = same_error(outcomes(2, go))
    assert type(error) is LayoutError
    assert "'only': a tensor and a plain value" in str(error)
    assert distckpt.open(store).values == {}


def test_a_failed_save_makes_the_next_one_plan_anew():
    store = MemoryStore()

    def go(comm):
        counting = Counting(comm)
        own = FaultyStore(store, on_operation=Failing("commit") if comm.rank == 1 else None)
        spent = []
        for target in (store, store, own, store, store):
            try:
                distckpt.save(target, {"w": cut(comm)}, comm=counting, overwrite=True)
            except SaveFailed:
                spent.append("failed")
            spent.append(counting.spent()[0])
        return spent

    assert run_ranks(3, go)[1] == [3, 2, "failed", 2, 3, 2]


# ------------------------------------------------------------------------------------- replicas


def differing(comm, names, *, where):
    """A state of replicated tensors of which some differ on one rank."""
    return {name: np.arange(20.0) + (name in where and comm.rank == 1) for name in names} | {
        "w": cut(comm)
    }


@_BOTH_SAVES
def test_replicas_that_differ_are_named_with_the_ranks_and_the_ways_out(how):
    store = MemoryStore()
    error = same_error(
        outcomes(3, lambda comm: save(store, differing(comm, "abc", where="ac"), comm, how))
    )
    assert type(error) is SaveFailed
    assert "2 tensors that claim to be the same on several ranks are not" in str(error)
    assert "'a' on rank 1 differs" in str(error)
    assert "'c' on rank 1 differs" in str(error)
    assert "'b'" not in str(error)
    for way in ('replicas={"<name or glob>": "rank0"}', '"trust" not to compare', "PerRank"):
        assert way in str(error)
    assert store.objects == {}


def test_shards_that_several_ranks_hold_are_compared_too():
    store = MemoryStore()

    def go(comm):
        half = comm.rank % 2
        piece = np.arange(4.0) + (comm.rank == 3)
        save(store, {"w": Shard(piece, (4 * half,), (8,))}, comm)

    assert "'w' on rank 3 differs" in str(same_error(outcomes(4, go)))


def test_runs_that_overlap_are_compared_where_they_do():
    store = MemoryStore()

    def go(comm, wrong):
        array = np.arange(10.0)
        if comm.rank == 1:
            array[wrong] = -1
        run = ((0, 6), (4, 10))[comm.rank]
        save(store, {"w": FlatShard(array[slice(*run)], run[0], (10,))}, comm)

    assert "'w' on rank 1" in str(same_error(outcomes(2, lambda comm: go(comm, wrong=5))))
    assert outcomes(2, lambda comm: go(comm, wrong=6)) == [None, None]


def test_not_a_number_is_equal_to_itself_and_minus_zero_is_not_zero():
    store = MemoryStore()

    def go(comm, values):
        save(store, {"w": np.array([values[comm.rank]])}, comm, overwrite=True)

    assert outcomes(2, lambda comm: go(comm, [np.nan, np.nan])) == [None, None]
    assert isinstance(outcomes(2, lambda comm: go(comm, [0.0, -0.0]))[0], SaveFailed)


def test_replicas_that_lie_in_memory_in_another_way_are_equal():
    array = np.arange(12.0).reshape(3, 4)
    copies = [array, np.array(array, order="F"), array.astype(">f8"), array[::-1].copy()[::-1]]
    store = MemoryStore()
    run_ranks(4, lambda comm: save(store, {"w": copies[comm.rank]}, comm))
    assert np.array_equal(distckpt.load(store)["w"], array)


@pytest.mark.parametrize("first_differ", [False, True])
def test_replicas_that_differ_are_found_again_by_the_next_save(first_differ):
    """Not only when a plan is first used: a save that failed starts anew."""
    store = MemoryStore()

    def go(comm):
        found = []
        for differs in (first_differ, True, True):
            try:
                state = differing(comm, "a", where="a" if differs else "")
                distckpt.save(store, state, comm=comm, overwrite=True)
                found.append("saved")
            except SaveFailed:
                found.append("refused")
        return found

    assert run_ranks(3, go)[0] == (
        ["refused"] * 3 if first_differ else ["saved", *run_later(store)]
    )


def run_later(store):
    """A sample of one tensor in sixteen saves: its turn is not at once."""
    assert "a" in distckpt.open(store)
    return ["saved", "saved"]


def test_later_saves_compare_a_rotating_sample_so_that_a_difference_is_found_in_time():
    names = [f"t{index}" for index in range(16)]
    store = MemoryStore()

    def go(comm):
        for number in range(17):
            state = differing(comm, names, where=["t11"] if number else [])
            distckpt.save(store, state, comm=comm, overwrite=True)

    error = same_error(outcomes(3, go))
    assert type(error) is SaveFailed
    assert "'t11' on rank 1 differs" in str(error)


@pytest.mark.parametrize("rule", ["rank0", "trust"])
def test_replicas_that_may_differ_are_stored_once(rule):
    store = MemoryStore()

    def go(comm):
        state = {"a": np.full(90, comm.rank), "w": cut(comm)}
        distckpt.save(store, state, comm=comm, replicas=rule)

    run_ranks(3, go)
    found = distckpt.load(store)["a"]
    if rule == "rank0":
        assert (found == 0).all()
    assert set(found.tolist()) <= {0, 1, 2}
    assert np.array_equal(distckpt.load(store)["w"], whole())


def test_a_rule_for_some_replicas_is_a_glob_and_the_first_that_fits_counts():
    store = MemoryStore()
    rules = {"norm.weight": "check", "norm.*": "rank0"}

    def go(comm, where):
        state = differing(comm, ["norm.mean", "norm.weight", "other"], where=where)
        save(store, state, comm, replicas=rules, overwrite=True)

    assert outcomes(2, lambda comm: go(comm, ["norm.mean"])) == [None, None]
    assert np.array_equal(distckpt.load(store)["norm.mean"], np.arange(20.0))
    for wrong in ("norm.weight", "other"):
        error = same_error(outcomes(2, lambda comm, wrong=wrong: go(comm, [wrong])))
        assert f"'{wrong}' on rank 1 differs" in str(error)


def test_the_order_of_the_rules_is_part_of_the_plan():
    rules = [("a", "check"), ("*", "trust")]
    store = MemoryStore()

    def go(comm):
        def attempt(chosen):
            state = differing(comm, "ab", where="a")
            distckpt.save(store, state, comm=comm, replicas=dict(chosen), overwrite=True)

        attempt(rules[::-1])
        with pytest.raises(SaveFailed, match="'a' on rank 1 differs"):
            attempt(rules)

    run_ranks(2, go)


def test_plain_values_that_differ_are_named_with_the_ranks():
    def go(comm):
        state = {"lr": 0.1, "epoch": comm.rank // 2, "nested": {"name": f"run{comm.rank}"}}
        save(MemoryStore(), state, comm)

    error = same_error(outcomes(3, go))
    assert type(error) is LayoutError
    assert "2 plain values are not the same on all ranks" in str(error)
    assert "'epoch': 0 on rank 0, 1 on rank 2" in str(error)
    assert "'nested.name': 'run0' on rank 0, 'run1' on rank 1, 'run2' on rank 2" in str(error)
    assert "wrap what differs on purpose in PerRank" in str(error)
    assert "lr" not in str(error)


@pytest.mark.parametrize("values", [(1, 1.0), (1, True), (0.0, -0.0), ("1", b"1"), (None, 0)])
def test_plain_values_of_another_kind_are_not_the_same(values):
    found = outcomes(2, lambda comm: save(MemoryStore(), {"x": values[comm.rank]}, comm))
    assert type(same_error(found)) is LayoutError


def test_equal_plain_values_are_equal_also_if_they_are_no_numbers():
    store = MemoryStore()
    run_ranks(2, lambda comm: save(store, {"x": float("nan"), "y": 3}, comm))
    assert repr(distckpt.open(store).values) == "{'x': nan, 'y': 3}"


# ------------------------------------------------------------------------------------- run_ranks


def test_run_ranks_returns_by_rank_and_raises_the_lowest_ranks_error():
    assert run_ranks(3, lambda comm: (comm.rank, comm.size)) == [(0, 3), (1, 3), (2, 3)]

    def go(comm):
        if comm.rank:
            raise ValueError(f"rank {comm.rank}")

    with pytest.raises(ValueError, match="rank 1"):
        run_ranks(3, go)


def test_run_ranks_names_who_did_not_end():
    over = threading.Event()
    with pytest.raises(TimeoutError, match=r"rank-1 did not end within 0.1 s"):
        run_ranks(2, lambda comm: comm.rank and over.wait(20), timeout_s=0.1)
    over.set()


def in_a_thread(function):
    """Run a function in a new thread, whose team nothing has used; return what it returns."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(function).result()


def test_a_process_alone_keeps_its_plan_and_its_staging_memory_from_save_to_save(tmp_path):
    state = {"w": np.arange(1 << 16)}

    def save_twice():
        kept = []
        for name in ("a", "b"):
            distckpt.save_async(tmp_path / name, state).wait()
            (plan,) = connect().memory["plans"].values()
            kept.append((connect(), plan, connect().memory["arena"]._kept))
        return kept

    first, second = in_a_thread(save_twice)
    assert first[2] is not None
    assert all(one is other for one, other in zip(first, second, strict=True))


def test_threads_of_a_process_alone_do_not_share_what_they_keep():
    assert in_a_thread(connect) is not connect()
