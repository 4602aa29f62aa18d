"""The checkpoints of one run: saved when due, pruned, and resumed from the newest."""

from __future__ import annotations

import logging

import numpy as np
import pytest

import distckpt
from distckpt import (
    CheckpointError,
    CheckpointNotFound,
    EverySteps,
    KeepLast,
    Manager,
    MatchError,
    PerRank,
    SaveFailed,
    Shard,
    StoreError,
)
from distckpt.manifest import MANIFEST_NAME
from distckpt.store import PrefixStore, open_store
from distckpt.testing import FaultyStore, MemoryStore, run_ranks

_ROWS = 7
FOREIGN = {
    "notes.txt": b"mine",
    "step-12/model.pt": b"not of ours: its number is too short",
    "step-00000001x/manifest.binpb": b"not of ours either",
    "step-00000099/readme": b"a step without a checkpoint",
    "best/manifest.binpb": b"somebody else's",
}


def rows(comm):
    return slice(_ROWS * comm.rank // comm.size, _ROWS * (comm.rank + 1) // comm.size)


def state(comm, step, salt=0):
    full = np.arange(_ROWS * 2.0).reshape(_ROWS, 2) + step + salt / 16
    mine = rows(comm)
    return {
        "w": Shard(full[mine], (mine.start, 0), (_ROWS, 2)),
        "salt": salt,
        "epoch": step // 10,
        "rng": PerRank([step, comm.rank]),
    }


def empty(comm):
    mine = rows(comm)
    return {
        "w": Shard(np.zeros((mine.stop - mine.start, 2)), (mine.start, 0), (_ROWS, 2)),
        "salt": -1,
        "epoch": -1,
    }


def train(comm, root, last, *, save=1, keep=None, start=0, **options):
    """Save the steps from *start* on."""
    manager = Manager(root, comm=comm, save=EverySteps(save), keep=keep, **options)
    with manager:
        for step in range(start + 1, last + 1):
            manager.step(step, state(comm, step))


def steps(store):
    return Manager(store, comm=distckpt.Solo()).steps()


# ---------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_manager_saves_when_its_policy_says_so(ranks):
    store = MemoryStore()
    run_ranks(ranks, lambda comm: train(comm, store, 10, save=3))
    assert steps(store) == [3, 6, 9]
    checkpoint = distckpt.Manager(store, comm=distckpt.Solo()).open(6)
    assert checkpoint.step == 6
    assert np.array_equal(checkpoint["w"][0], [6, 7])


def test_each_checkpoint_lies_in_a_folder_of_its_step(tmp_path):
    train(distckpt.Solo(), tmp_path / "run", 2)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        ".distckpt",
        "step-00000001",
        "step-00000002",
    ]
    assert distckpt.open(tmp_path / "run" / "step-00000002").step == 2


def test_a_step_of_more_digits_is_found():
    store = MemoryStore()
    with Manager(store, comm=distckpt.Solo()) as manager:
        manager.save(99_999_999, {"w": np.zeros(1)})
        manager.save(1_234_567_890, {"w": np.zeros(1)})
    assert manager.steps() == [99_999_999, 1_234_567_890]


def test_without_a_policy_nothing_is_due():
    manager = Manager(MemoryStore(), comm=distckpt.Solo())
    assert not manager.due(0)
    assert manager.step(0, {"w": np.zeros(1)}) is None
    assert manager.steps() == []


def test_a_step_that_was_just_saved_is_not_saved_again():
    store = MemoryStore()
    with Manager(store, comm=distckpt.Solo(), save=EverySteps(5)) as manager:
        manager.save(5, {"w": np.zeros(1)})
        assert not manager.due(5)
        assert manager.step(5, {"w": np.ones(1)}) is None
    assert distckpt.load(store_of(store, 5))["w"] == 0


def store_of(store, step):
    return PrefixStore(store, f"step-{step:08d}")


def test_saving_a_step_again_replaces_it():
    """As after resuming from an older checkpoint."""
    store = MemoryStore()
    for value in (1, 2):
        with Manager(store, comm=distckpt.Solo()) as manager:
            manager.save(5, {"w": np.full(3, value)})
    assert distckpt.load(store_of(store, 5))["w"].tolist() == [2, 2, 2]
    assert len([name for name in store.objects if name.startswith("step-")]) == 2


def test_metrics_and_metadata_are_kept():
    store = MemoryStore()

    def go(comm):
        with Manager(store, comm=comm, save=EverySteps(1)) as manager:
            metrics = {"loss": np.float32(0.5), "accuracy": 1}
            manager.step(1, state(comm, 1), metrics=metrics, metadata={"git": "c0ffee"})

    run_ranks(2, go)
    checkpoint = distckpt.open(store_of(store, 1))
    assert checkpoint.metrics == {"loss": 0.5, "accuracy": 1.0}
    assert checkpoint.metadata == {"git": "c0ffee"}


@pytest.mark.parametrize("ranks", [1, 3])
def test_metrics_that_are_no_numbers_fail_all_ranks(ranks):
    store = MemoryStore()

    def go(comm):
        manager = Manager(store, comm=comm)
        with pytest.raises(CheckpointError, match="could not convert string to float: 'low'"):
            manager.save(1, state(comm, 1), metrics={"loss": "low"})

    run_ranks(ranks, go)
    assert not any(name.startswith("step-") for name in store.objects)


def test_the_metrics_of_the_other_ranks_do_not_matter():
    store = MemoryStore()

    def go(comm):
        with Manager(store, comm=comm) as manager:
            metrics = {"loss": 0.25} if comm.rank == 0 else {"loss": "not known here"}
            manager.save(1, state(comm, 1), metrics=metrics)

    run_ranks(2, go)
    assert distckpt.open(store_of(store, 1)).metrics == {"loss": 0.25}


def test_a_save_waits_for_the_one_before():
    store = MemoryStore()
    events = []

    def note(kind, name, number):
        if kind in ("create", "put") and name.startswith("step-"):
            events.append(name.partition("/")[0])

    with Manager(FaultyStore(store, on_operation=note), comm=distckpt.Solo()) as manager:
        for step in (1, 2, 3):
            manager.save(step, {"w": np.zeros(1)})
    assert events == [f"step-{step:08d}" for step in (1, 1, 2, 2, 3, 3)]


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_failed_save_is_raised_by_the_next_one_and_the_run_goes_on(ranks):
    store = MemoryStore()

    def go(comm):
        fails = {"now": True}

        def fail(kind, name, number):
            if kind == "commit" and fails["now"]:
                raise StoreError("full")

        with Manager(FaultyStore(store, on_operation=fail), comm=comm) as manager:
            manager.save(1, state(comm, 1))
            with pytest.raises(SaveFailed, match="full"):
                manager.save(2, state(comm, 2))
            fails["now"] = False
            manager.save(3, state(comm, 3))
        return manager.steps()

    assert run_ranks(ranks, go) == [[3]] * ranks


def test_leaving_the_block_waits_for_the_last_save_and_raises_its_failure():
    def fail(kind, name, number):
        if kind == "commit":
            raise StoreError("full")

    manager = Manager(FaultyStore(MemoryStore(), on_operation=fail), comm=distckpt.Solo())
    with pytest.raises(SaveFailed, match="full"), manager:
        manager.save(1, {"w": np.zeros(1)})
    manager.wait()  # it is raised once


def test_the_loops_own_error_is_what_leaves_the_block(caplog):
    def fail(kind, name, number):
        if kind == "commit":
            raise StoreError("full")

    manager = Manager(FaultyStore(MemoryStore(), on_operation=fail), comm=distckpt.Solo())

    def loop():
        with manager:
            manager.save(1, {"w": np.zeros(1)})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()
    assert "the last save failed, too" in caplog.text


def test_a_manager_prints_its_root():
    assert repr(Manager("memory://runs/7", comm=distckpt.Solo())) == "<Manager 'memory://runs/7'>"


# -------------------------------------------------------------------------------------- retention


@pytest.mark.parametrize("ranks", [1, 3])
def test_only_the_newest_are_kept(ranks):
    store = MemoryStore()
    run_ranks(ranks, lambda comm: train(comm, store, 6, keep=KeepLast(2)))
    assert steps(store) == [5, 6]
    folders = {name.partition("/")[0] for name in store.objects}
    assert folders == {".distckpt", "step-00000005", "step-00000006"}


def test_pruned_folders_are_gone(tmp_path):
    train(distckpt.Solo(), tmp_path, 4, keep=KeepLast(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".distckpt", "step-00000004"]


class KeepNothing:
    def kept(self, entries):
        return set()


def test_the_newest_checkpoint_is_never_deleted():
    store = MemoryStore()
    train(distckpt.Solo(), store, 3, keep=KeepNothing())
    assert steps(store) == [3]


def test_the_older_ones_stay_until_the_new_one_is_committed():
    store = MemoryStore()
    train(distckpt.Solo(), store, 1)
    order = []

    def note(kind, name, number):
        # A mark says what is to be deleted, first: see the hold of a reader.
        if kind in ("put", "delete") and name.startswith("step-") and "deletion-" not in name:
            order.append((kind, name.partition("/")[0]))

    train(distckpt.Solo(), FaultyStore(store, on_operation=note), 2, start=1, keep=KeepLast(1))
    assert order[0] == ("put", "step-00000002")
    assert set(order[1:]) == {("delete", "step-00000001")}


def test_a_deletion_takes_the_manifest_first_and_then_what_it_named():
    store = MemoryStore()
    train(distckpt.Solo(), store, 1)
    store.put("step-00000001/notes", b"mine", replace=False)
    deleted = []

    def note(kind, name, number):
        if kind == "delete" and name.startswith("step-") and "deletion-" not in name:
            deleted.append(name)

    faulty = FaultyStore(store, on_operation=note)
    train(distckpt.Solo(), faulty, 2, start=1, keep=KeepLast(1))
    assert deleted[0] == f"step-00000001/{MANIFEST_NAME}"
    assert all(name.startswith("step-00000001/shard-") for name in deleted[1:])
    assert store.objects["step-00000001/notes"] == b"mine"


def test_a_failed_deletion_is_logged_and_fails_no_save(caplog):
    store = MemoryStore()

    def fail(kind, name, number):
        if kind == "delete":
            raise StoreError("held by somebody")

    faulty = FaultyStore(store, on_operation=fail)
    run_ranks(2, lambda comm: train(comm, faulty, 3, keep=KeepLast(1)))
    assert steps(store) == [1, 2, 3]
    assert "held by somebody" in caplog.text


def test_after_resuming_from_an_older_step_newer_ones_are_left_alone():
    """Somebody chose that older one, and may still want what came after it."""
    store = MemoryStore()
    train(distckpt.Solo(), store, 5)
    with Manager(store, comm=distckpt.Solo(), keep=KeepLast(1)) as manager:
        manager.save(3, state(distckpt.Solo(), 3))
    assert manager.steps() == [3, 4, 5]


# ------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_run_is_resumed_on_any_number_of_ranks(ranks, tmp_path):
    run_ranks(3, lambda comm: train(comm, tmp_path, 3))

    def resume(comm):
        net = empty(comm)
        return Manager(tmp_path, comm=comm).load_latest_into(net), net["w"].array

    found = run_ranks(ranks, resume)
    assert [step for step, _ in found] == [3] * ranks
    full = np.concatenate([array for _, array in found])
    assert np.array_equal(full, np.arange(_ROWS * 2.0).reshape(_ROWS, 2) + 3)


@pytest.mark.parametrize("ranks", [1, 3])
def test_without_a_checkpoint_the_default_is_returned_and_the_net_is_left(ranks):
    store = MemoryStore()

    def go(comm):
        net = empty(comm)
        assert Manager(store, comm=comm).load_latest_into(net, default=0) == 0
        assert net["salt"] == -1
        with pytest.raises(CheckpointNotFound, match="no committed checkpoint to resume from"):
            Manager(store, comm=comm).load_latest_into(net)

    run_ranks(ranks, go)


def test_what_is_resumed_from_must_have_everything():
    store = MemoryStore()
    train(distckpt.Solo(), store, 1)
    manager = Manager(store, comm=distckpt.Solo())
    net = {"w": np.zeros((_ROWS, 2)), "new": np.zeros(2)}
    with pytest.raises(MatchError, match=r"strict=True") as caught:
        manager.load_latest_into(net)
    assert caught.value.missing == ["new"]
    assert manager.load_latest_into(net, strict=False) == 1


def test_load_intos_options_reach_it():
    store = MemoryStore()
    run_ranks(2, lambda comm: train(comm, store, 1))
    manager = Manager(store, comm=distckpt.Solo())
    net = {"weights": np.zeros((_ROWS, 2), np.float32), "rng": PerRank(None)}
    manager.load_latest_into(
        net,
        strict=False,
        rename={"w": "weights"},
        filter_prefix="epoch",
        select=lambda name: name != "salt",
        per_rank=lambda values, rank, size: values[::-1],
    )
    assert net["weights"][0].tolist() == [1, 2]
    assert net["rng"].value == [[1, 1], [1, 0]]


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_store_that_fails_is_not_taken_for_a_run_without_checkpoints(ranks):
    store = MemoryStore()
    train(distckpt.Solo(), store, 2)
    for broken in ("names", "size", "read"):

        def fail(kind, name, number, broken=broken):
            if kind == broken:
                raise StoreError("no route")

        def resume(comm, fail=fail):
            faulty = FaultyStore(store, on_operation=fail)
            with pytest.raises(StoreError, match="no route"):
                Manager(faulty, comm=comm).load_latest_into(empty(comm), default=0)

        run_ranks(ranks, resume)


def test_a_save_that_was_not_committed_is_not_resumed_from():
    store = MemoryStore()
    train(distckpt.Solo(), store, 2)
    store.delete([f"step-00000002/{MANIFEST_NAME}"])
    manager = Manager(store, comm=distckpt.Solo())
    assert manager.steps() == [1]
    assert manager.load_latest_into(empty(distckpt.Solo())) == 1


def test_what_is_no_checkpoint_is_no_step(tmp_path):
    store = open_store(tmp_path)
    for name, data in FOREIGN.items():
        store.put(name, data, replace=False)
    (tmp_path / "step-00000007").mkdir()
    (tmp_path / "step-00000008").write_bytes(b"a file")
    manager = Manager(tmp_path, comm=distckpt.Solo())
    assert (manager.steps(), manager.latest()) == ([], None)
    train(distckpt.Solo(), tmp_path, 1, keep=KeepLast(1))
    assert manager.steps() == [1]
    for name, data in FOREIGN.items():
        assert (tmp_path / name).read_bytes() == data


def test_only_the_coordinator_looks_for_the_newest():
    store = MemoryStore()
    train(distckpt.Solo(), store, 2)

    def resume(comm):
        listed = []

        def note(kind, name, number):
            if kind == "names":
                listed.append(name)

        faulty = FaultyStore(store, on_operation=note)
        assert Manager(faulty, comm=comm).load_latest_into(empty(comm)) == 2
        return len(listed)

    assert run_ranks(3, resume)[1:] == [0, 0]


def test_resuming_is_logged(caplog):
    caplog.set_level(logging.INFO, "distckpt")
    store = MemoryStore()
    train(distckpt.Solo(), store, 2)
    Manager(store, comm=distckpt.Solo()).load_latest_into(empty(distckpt.Solo()))
    assert "step-00000002: loaded: " in caplog.text
