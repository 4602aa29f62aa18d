"""The checkpoints of one run: saved when due, pruned, and resumed from the newest."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import distckpt
from distckpt import (
    CheckpointError,
    CheckpointNotFound,
    EverySteps,
    KeepLast,
    LoadFailed,
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


# ---------------------------------------------------------------------------------- against a model


class Run(RuleBasedStateMachine):
    """A run of jobs, each of another number of ranks; the model is step → salt.

    The salt tells saves of one step apart.
    """

    def __init__(self):
        super().__init__()
        self.store = MemoryStore()
        self.model = {}
        self.salt = 0
        for name, data in FOREIGN.items():
            self.store.put(name, data, replace=False)

    def job(self, ranks, work, store=None, **options):
        """Do some work with a manager on each rank."""

        def go(comm):
            manager = Manager(store or self.store, comm=comm, **options)
            return work(comm, manager)

        return run_ranks(ranks, go, timeout_s=30)

    def prune(self, newest, keep):
        """What keeping the last ones leaves of the steps up to the newest."""
        if keep is not None:
            older = sorted(step for step in self.model if step <= newest)
            for step in older[:-keep]:
                del self.model[step]

    ranks = st.integers(1, 3)
    numbers = st.integers(1, 12)
    keeps = st.none() | st.integers(1, 3)

    @rule(ranks=ranks, step=numbers, keep=keeps)
    def save(self, ranks, step, keep):
        self.salt += 1

        def work(comm, manager):
            with manager:
                manager.save(step, state(comm, step, self.salt), metrics={"loss": 1 / step})

        self.job(ranks, work, keep=None if keep is None else KeepLast(keep))
        self.model[step] = self.salt
        self.prune(step, keep)

    @rule(ranks=ranks, step=numbers, keep=keeps, fail_at=st.integers(0, 30))
    def crash(self, ranks, step, keep, fail_at):
        """The storage is gone from some operation on: saving, committing, or pruning."""
        self.salt += 1
        faulty = FaultyStore(self.store, fail_at=fail_at)

        def work(comm, manager):
            try:
                with manager:
                    manager.save(step, state(comm, step, self.salt))
            except CheckpointError:
                return False
            return True

        options = {"keep": None if keep is None else KeepLast(keep)}
        saved = self.job(ranks, work, store=faulty, **options)
        assert len(set(saved)) == 1
        if saved[0]:
            self.model[step] = self.salt
            if keep is not None:  # of what was to go, some may have stayed
                wanted = dict(self.model)
                self.prune(step, keep)
                there = set(steps(self.store))
                assert set(self.model) <= there <= set(wanted)
                self.model = {found: wanted[found] for found in there}

    @rule(ranks=ranks)
    def resume(self, ranks):
        def work(comm, manager):
            net = empty(comm)
            step = manager.load_latest_into(net, default=-1)
            return step, net, rows(comm)

        for step, net, mine in self.job(ranks, work):
            assert step == max(self.model, default=-1)
            if step == -1:
                assert net["salt"] == -1
                continue
            salt = self.model[step]
            full = np.arange(_ROWS * 2.0).reshape(_ROWS, 2) + step + salt / 16
            assert (net["salt"], net["epoch"]) == (salt, step // 10)
            assert np.array_equal(net["w"].array, full[mine])

    @precondition(lambda self: self.model)
    @rule(ranks=ranks, count=st.integers(1, 4), every=st.integers(1, 3), keep=keeps)
    def go_on(self, ranks, count, every, keep):
        """Resume, train some steps, saving when it is due."""
        self.salt += 1
        first = max(self.model)

        def work(comm, manager):
            with manager:
                start = manager.load_latest_into(empty(comm))
                for step in range(start, start + count + 1):
                    pending = manager.step(step, state(comm, step, self.salt))
                    # What was just resumed from is not saved again.
                    assert (pending is not None) == (step % every == 0 and step > start)
                return start

        keeping = None if keep is None else KeepLast(keep)
        starts = self.job(ranks, work, save=EverySteps(every), keep=keeping)
        assert starts == [first] * ranks
        for step in range(first + 1, first + count + 1):
            if step % every == 0:
                self.model[step] = self.salt
                self.prune(step, keep)

    @invariant()
    def the_steps_are_the_models(self):
        assert steps(self.store) == sorted(self.model)
        manager = Manager(self.store, comm=distckpt.Solo())
        assert manager.latest() == max(self.model, default=None)

    @invariant()
    def every_checkpoint_is_whole(self):
        manager = Manager(self.store, comm=distckpt.Solo())
        for step, salt in self.model.items():
            checkpoint = manager.open(step)
            assert (checkpoint.step, checkpoint.values["salt"]) == (step, salt)
            full = np.arange(_ROWS * 2.0).reshape(_ROWS, 2) + step + salt / 16
            assert np.array_equal(checkpoint["w"][...], full)

    @invariant()
    def what_is_not_ours_is_left_alone(self):
        assert {name: self.store.objects.get(name) for name in FOREIGN} == FOREIGN


TestRun = Run.TestCase
TestRun.settings = settings(
    max_examples=max(10, settings.default.max_examples // 4), stateful_step_count=12
)


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
        "step-00000001",
        "step-00000002",
    ]
    assert distckpt.open(tmp_path / "run" / "step-00000002").step == 2


def test_a_step_of_more_digits_is_found():
    store = MemoryStore()
    with Manager(store, comm=distckpt.Solo()) as manager:
        manager.save(1_234_567_890, {"w": np.zeros(1)})
        manager.save(99_999_999, {"w": np.zeros(1)})
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
    assert len(store.objects) == 2


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
    assert store.objects == {}


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
        if kind in ("create", "put"):
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
    assert {name.partition("/")[0] for name in store.objects} == {"step-00000005", "step-00000006"}


def test_pruned_folders_are_gone(tmp_path):
    train(distckpt.Solo(), tmp_path, 4, keep=KeepLast(1))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


class KeepNothing:
    def kept(self, steps):
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
        if kind in ("put", "delete"):
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
        if kind == "delete":
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
def test_a_newest_checkpoint_that_is_damaged_is_told_and_not_skipped(ranks):
    store = MemoryStore()
    run_ranks(2, lambda comm: train(comm, store, 2))
    shard = next(name for name in store.objects if name.startswith("step-00000002/shard"))
    store.objects[shard] = store.objects[shard][:-1]

    def resume(comm):
        with pytest.raises(LoadFailed, match=r"step-00000002.*\n.*the file is cut short"):
            Manager(store, comm=comm).load_latest_into(empty(comm), default=0)

    run_ranks(ranks, resume)


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
    assert "resumed from step 2: loaded 3 of 3 names" in caplog.text


# ------------------------------------------------------------------------------------- policies


def test_policies_are_checked_when_they_are_made():
    with pytest.raises(ValueError, match="expected at least 1"):
        EverySteps(0)
    with pytest.raises(ValueError, match="expected at least 1"):
        KeepLast(0)


def test_every_steps_is_due_at_multiples():
    assert [step for step in range(1, 13) if EverySteps(4).due(step)] == [4, 8, 12]


def test_keep_last_keeps_the_last():
    assert KeepLast(2).kept([1, 5, 9]) == {5, 9}
    assert KeepLast(5).kept([1, 5]) == {1, 5}
    assert KeepLast(1).kept([]) == set()
