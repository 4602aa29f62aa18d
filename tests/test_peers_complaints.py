"""What goes wrong for users of other checkpoint libraries, and must not here.

docs/reliability.md has the list of complaints, with these tests' names and those of others.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

import distckpt
from distckpt import KeepLast, Manager, SaveFailed, Shard, UnsupportedFormat
from distckpt.clean import clean
from distckpt.manifest import MANIFEST_NAME
from distckpt.store import open_store
from distckpt.testing import (
    Call,
    Fail,
    Fault,
    FaultyCoordinator,
    FaultyStore,
    MemoryStore,
    Point,
    Stall,
    points,
    run_ranks,
)

SOLO = distckpt.Solo()


# ------------------------------------------------------------------------------ errors, swallowed


def test_a_writers_error_is_not_swallowed():
    """Not at `wait`, not at the next save, and no checkpoint is there."""
    store = MemoryStore()
    full = Fault(points.IN_WRITE, Fail(OSError(28, "No space left on device")))
    pending = distckpt.save_async(FaultyStore(store, faults=[full]), {"w": np.zeros(3)}, comm=SOLO)
    with pytest.raises(SaveFailed, match="No space left on device"):
        pending.wait()
    with pytest.raises(distckpt.CheckpointError):
        distckpt.load(store)


def test_a_failed_save_of_a_manager_is_raised_by_its_next_call(tmp_path):
    full = Fault(points.IN_WRITE, Fail(OSError(28, "No space left on device")))
    manager = Manager(FaultyStore(open_store(tmp_path), faults=[full]), comm=SOLO)
    manager.save(1, {"w": np.zeros(3)})
    with pytest.raises(SaveFailed, match="No space left on device"):
        manager.save(2, {"w": np.zeros(3)})


# ------------------------------------------------------------------------- values that were changed


def test_an_asynchronous_save_does_not_write_later_values():
    store = MemoryStore()
    stall = Stall()
    array = np.arange(5000.0)
    pending = distckpt.save_async(
        FaultyStore(store, faults=[Fault(points.BEFORE_WRITE, stall)]), {"w": array}, comm=SOLO
    )
    array[:] = -1
    stall.release.set()
    pending.wait()
    assert distckpt.load(store)["w"].tolist() == list(range(5000))


def test_staging_memory_is_not_reused_while_it_is_being_written():
    stores, stall = [MemoryStore(), MemoryStore()], Stall()
    held = FaultyStore(stores[0], faults=[Fault(points.BEFORE_WRITE, stall)])
    first = distckpt.save_async(held, {"w": np.zeros(5000)}, comm=SOLO)
    assert stall.reached.wait(30)
    distckpt.save_async(stores[1], {"w": np.ones(5000)}, comm=SOLO).wait()
    stall.release.set()
    first.wait()
    assert not distckpt.load(stores[0])["w"].any()
    assert distckpt.load(stores[1])["w"].all()


def test_a_stale_result_of_a_failed_save_does_not_finish_the_next_one():
    """Rank 1's outcome of the first save is sent when the second is under way."""
    store = MemoryStore()
    late = []

    def hold(operation):
        late.append(operation)
        raise SaveFailed("held back")

    def run(comm):
        own = FaultyCoordinator(comm, [Fault(points.BEFORE_GATHER, Call(hold), ranks={1})])
        state = {"w": Shard(np.full(4, comm.rank), (4 * comm.rank,), (8,))}
        with pytest.raises(SaveFailed):
            distckpt.save(store, state, comm=own, timeout_s=0.3)
        if comm.rank == 1:
            # The tag of a save's outcome; the number in the message is the first save's.
            comm.post(0, 1 << 14 | 8, bytes(late[0].data))
        state["w"].array[:] = 10 + comm.rank
        distckpt.save(store, state, comm=own)

    run_ranks(2, run)
    assert distckpt.load(store)["w"].tolist() == [10] * 4 + [11] * 4
    distckpt.open(store).verify()


# --------------------------------------------------------------------------------------- the order


def test_nothing_is_latest_before_it_is_durable_and_nothing_old_goes_before_it_is():
    operations = FaultyStore(MemoryStore())

    def run(comm):
        with Manager(operations, comm=comm, keep=KeepLast(1)) as manager:
            for step in (1, 2):
                manager.save(step, {"w": Shard(np.zeros(4), (4 * comm.rank,), (8,))}).wait()

    run_ranks(2, run)
    seen = [f"{kind} {name}" for kind, name in operations.operations]
    second = [text for text in seen if "step-00000002" in text]
    put = second.index(f"put step-00000002/{MANIFEST_NAME}")
    assert sum(text.startswith("commit") for text in second[:put]) == 2
    assert not any(text.startswith("commit") for text in second[put:])
    deleted = [at for at, text in enumerate(seen) if text.startswith("delete step-00000001")]
    assert deleted
    assert min(deleted) > seen.index(f"put step-00000002/{MANIFEST_NAME}")


@pytest.mark.parametrize("name", ["x.tmp", "x.orbax-checkpoint-tmp-7", "step-7.partial", "copy 2"])
def test_a_copied_checkpoint_is_one_whatever_it_is_called_and_is_not_deleted(tmp_path, name):
    distckpt.save(tmp_path / "step-00000007", {"w": np.arange(3)}, comm=SOLO)
    shutil.copytree(tmp_path / "step-00000007", tmp_path / name)
    with Manager(tmp_path, comm=SOLO, keep=KeepLast(1)) as manager:
        manager.save(8, {"w": np.arange(3)})
    clean(tmp_path, grace_s=0, dry_run=False)
    assert distckpt.load(tmp_path / name)["w"].tolist() == [0, 1, 2]
    distckpt.open(tmp_path / name).verify()


@pytest.mark.parametrize("kind", ["path", "file://", "memory://", "a store"])
def test_a_checkpoint_exists_when_its_manifest_does_on_every_kind_of_store(tmp_path, kind):
    place = {
        "path": tmp_path / "x.tmp",
        "file://": f"file://{tmp_path}/x.tmp",
        "memory://": f"memory://{tmp_path}/x.tmp",
        "a store": MemoryStore(),
    }[kind]
    distckpt.save(place, {"w": np.arange(3)}, comm=SOLO)
    assert distckpt.load(place)["w"].tolist() == [0, 1, 2]
    open_store(place).delete([MANIFEST_NAME])
    with pytest.raises(distckpt.IncompleteCheckpoint):
        distckpt.open(place)


def test_whatever_a_policy_says_the_newest_checkpoint_stays(tmp_path):
    class Worst:
        def kept(self, steps):
            return {1}

    with Manager(tmp_path, comm=SOLO, keep=Worst()) as manager:
        for step in (1, 2, 3):
            manager.save(step, {"w": np.full(3, step)})
    assert Manager(tmp_path, comm=SOLO).load_latest_into({"w": np.zeros(3, int)}) == 3


# ------------------------------------------------------------------------------------------- hangs


def test_a_rank_that_lags_is_named_in_time_and_told_when_it_comes(monkeypatch):
    monkeypatch.setattr("distckpt.team._GRACE_S", 5.0)
    store = MemoryStore()
    stall = Stall()

    def run(comm):
        faults = [Fault(points.BEFORE_GATHER, stall, ranks={2})]
        began = time.monotonic()
        with pytest.raises(SaveFailed, match="rank 2") as caught:
            distckpt.save(
                store,
                {"w": np.zeros(3)},
                comm=FaultyCoordinator(comm, faults),
                timeout_s=0.3,
            )
        stall.release.set()
        return list(caught.value.failures), time.monotonic() - began

    for ranks, seconds in run_ranks(3, run):
        assert ranks == [2]
        assert seconds < 20


def test_a_rank_that_failed_leaves_no_other_in_a_barrier():
    store = MemoryStore()

    def run(comm):
        broken = Fault(points.BEFORE_WRITE, Fail(OSError(5, "Input/output error")), ranks={1})
        own = FaultyStore(store, faults=[broken], rank=comm.rank)
        state = {"w": Shard(np.zeros(4), (4 * comm.rank,), (12,))}
        with pytest.raises(SaveFailed) as caught:
            # The time-out is no part of it: the others know at once.
            distckpt.save(own, state, comm=comm, timeout_s=600)
        return str(caught.value)

    assert len(set(run_ranks(3, run, timeout_s=30))) == 1


# ----------------------------------------------------------------------------------------- planning


def test_a_rank_is_sent_its_own_part_of_the_plan_and_no_other():
    def longest_plan(ranks):
        sizes = []

        def run(comm):
            seen = Fault(
                Point("send", "plan"), Call(lambda op: sizes.append(len(op.data))), times=None
            )
            state = {
                f"w{index}": Shard(np.zeros(2), (2 * comm.rank,), (2 * ranks,))
                for index in range(64)
            }
            distckpt.save(store, state, comm=FaultyCoordinator(comm, [seen]))

        store = MemoryStore()
        run_ranks(ranks, run)
        return max(sizes)

    assert longest_plan(8) < 1.5 * longest_plan(2)


# ------------------------------------------------------------------------------------------- memory

_MEMORY = """
import resource, sys, tempfile
import numpy as np
import distckpt

MB = 1 << 20
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB

folder, what = sys.argv[1:]
state = {f"w{i}": np.full(16 * MB // 8, float(i)) for i in range(8)}
if what == "load":
    before = peak()
    distckpt.load_into(folder, state, comm=distckpt.Solo())
else:
    distckpt.save(folder + "/warm", {"w": np.zeros(3)}, comm=distckpt.Solo())
    before = peak()
    if what == "save":
        distckpt.save(folder + "/x", state, comm=distckpt.Solo())
    else:
        distckpt.save_async(folder + "/x", state, comm=distckpt.Solo()).wait()
print((peak() - before) / 128)
"""


def share_of_the_state(folder, what):
    """How much memory it takes beside a state of 128 MB, as a share of that."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_MEMORY), str(folder), what],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_a_save_takes_a_small_part_of_the_states_memory_and_a_load_too(tmp_path):
    assert share_of_the_state(tmp_path, "save") < 0.3
    assert share_of_the_state(tmp_path / "x", "load") < 0.3


def test_an_asynchronous_save_takes_one_copy_of_the_state_and_not_three(tmp_path):
    assert share_of_the_state(tmp_path, "save_async") < 1.3


# ------------------------------------------------------------------------------------------ reading


def test_ranges_are_coalesced_and_read_in_their_order():
    store = MemoryStore()
    names = [f"w{index}" for index in range(200)]
    distckpt.save(store, {name: np.full(100, 1.0) for name in names}, comm=SOLO)
    faulty = FaultyStore(store)
    net = {name: np.zeros(100) for name in reversed(names)}
    distckpt.load_into(faulty, net, comm=SOLO)
    reads = [name for kind, name in faulty.operations if kind == "read" and "shard" in name]
    assert len(reads) <= 3  # the table, and one block that holds all 200


def test_what_is_missing_and_what_is_unused_is_listed():
    store = MemoryStore()
    distckpt.save(store, {"a": np.zeros(1), "b": np.ones(1), "c": np.ones(1)}, comm=SOLO)
    report = distckpt.load_into(store, {"a": np.zeros(1), "x": np.zeros(1)}, comm=SOLO)
    assert report.missing == ["x"]
    assert report.unexpected == ["b", "c"]
    with pytest.raises(distckpt.MatchError) as caught:
        distckpt.load_into(store, {"a": np.zeros(1), "x": np.zeros(1)}, comm=SOLO, strict=True)
    assert list(caught.value.missing) == ["x"]
    assert list(caught.value.unexpected) == ["b", "c"]


def test_a_pickle_in_a_manifests_place_is_refused_and_not_run(tmp_path):
    import pickle

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    distckpt.save(tmp_path / "x", {"w": np.zeros(3)}, comm=SOLO)
    (tmp_path / "x" / MANIFEST_NAME).write_bytes(pickle.dumps(Attack()))
    with pytest.raises(UnsupportedFormat):
        distckpt.open(tmp_path / "x")
    with pytest.raises(distckpt.LayoutError):
        distckpt.save(tmp_path / "y", {"w": Attack()}, comm=SOLO)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(("saved", "loaded"), [(4, 3), (3, 7), (7, 1), (1, 4)])
def test_any_number_of_ranks_loads_what_any_other_saved(saved, loaded):
    store = MemoryStore()
    whole = np.arange(23.0 * 5).reshape(23, 5)

    def cut(comm, values):
        mine = slice(23 * comm.rank // comm.size, 23 * (comm.rank + 1) // comm.size)
        return Shard(values[mine].copy(), (mine.start, 0), whole.shape), mine

    def load(comm):
        shard, mine = cut(comm, np.zeros_like(whole))
        distckpt.load_into(store, {"w": shard}, comm=comm, strict=True)
        assert np.array_equal(shard.array, whole[mine])

    run_ranks(saved, lambda comm: distckpt.save(store, {"w": cut(comm, whole)[0]}, comm=comm))
    run_ranks(loaded, load)


def test_a_newest_checkpoint_whose_manifest_is_damaged_does_not_keep_a_run_from_resuming(tmp_path):
    with Manager(tmp_path, comm=SOLO) as manager:
        for step in (1, 2):
            manager.save(step, {"w": np.full(3, step)})
    path = tmp_path / "step-00000002" / MANIFEST_NAME
    path.write_bytes(path.read_bytes()[:-1])
    net = {"w": np.zeros(3, int)}
    assert Manager(tmp_path, comm=SOLO).load_latest_into(net) == 1
    assert net["w"].tolist() == [1, 1, 1]
