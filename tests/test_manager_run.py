"""What a Manager does over a run: policies, pins, epochs, several saves in flight, events."""

from __future__ import annotations

import contextlib
import json
import signal
import threading

import numpy as np
import pytest

import distckpt
from distckpt import (
    AtSteps,
    Best,
    CheckpointError,
    CheckpointNotFound,
    EverySeconds,
    EverySteps,
    KeepBest,
    KeepEvery,
    KeepLast,
    Manager,
    OnPreemption,
    SaveFailed,
    StoreError,
)
from distckpt.testing import FaultyStore, MemoryStore, run_ranks

SOLO = distckpt.Solo()


def state(step=0):
    return {"w": np.full(50, float(step))}


def saved_steps(store):
    return Manager(store, comm=SOLO).steps()


# ------------------------------------------------------------------------------------ when it saves


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_coordinators_metrics_decide_where_they_differ(ranks):
    store = MemoryStore()
    losses = {1: 0.5, 2: 0.7, 3: float("nan"), 4: 0.4, 5: 0.4, 6: 0.3}

    def go(comm):
        with Manager(store, comm=comm, save=Best("loss"), stop_signals=()) as manager:
            return [
                step
                for step, loss in losses.items()
                if manager.step(step, state(step), metrics={"loss": loss + comm.rank * 10 * step})
            ]

    assert run_ranks(ranks, go) == [[1, 4, 6]] * ranks


def test_what_an_earlier_job_has_saved_counts_for_best():
    store = MemoryStore()
    with Manager(store, comm=SOLO) as manager:
        manager.save(1, state(), metrics={"loss": 0.1})
    with Manager(store, comm=SOLO, save=Best("loss"), stop_signals=()) as manager:
        assert manager.step(2, state(), metrics={"loss": 0.2}) is None
        assert manager.step(3, state(), metrics={"loss": 0.05}) is not None


def test_without_metrics_best_says_no():
    with Manager(MemoryStore(), comm=SOLO, save=Best("loss"), stop_signals=()) as manager:
        assert manager.step(1, state()) is None


def test_policies_combined_save_when_either_says_so():
    store = MemoryStore()
    policy = EverySteps(4) | AtSteps(3) | EverySeconds(10_000)
    with Manager(store, comm=SOLO, save=policy, stop_signals=()) as manager:
        for step in range(1, 9):
            manager.step(step, state(step))
    assert saved_steps(store) == [3, 4, 8]


@pytest.mark.parametrize("ranks", [1, 3])
def test_seconds_are_the_coordinators_on_all_ranks(ranks):
    """A policy of no time at all is due at each step after the first, everywhere."""
    store = MemoryStore()

    def go(comm):
        with Manager(store, comm=comm, save=EverySeconds(1e-9), stop_signals=()) as manager:
            return [manager.step(step, state()) is not None for step in range(1, 6)]

    found = run_ranks(ranks, go)
    assert found == [found[0]] * ranks
    assert sum(found[0]) >= 3


def test_on_preemption_saves_when_asked_to_stop():
    store = MemoryStore()
    with Manager(store, comm=SOLO, save=OnPreemption()) as manager:
        for step in range(1, 10):
            if step == 4:
                signal.raise_signal(signal.SIGUSR1)
            manager.step(step, state(step))
            if manager.should_stop():
                break
    assert "SIGUSR1" in manager.stop_reason
    assert saved_steps(store) == [step]
    assert 4 <= step <= 5


@pytest.mark.parametrize("bad", [-1, True])
def test_a_step_that_is_no_number_from_0_on_is_refused(bad):
    with (
        Manager(MemoryStore(), comm=SOLO) as manager,
        pytest.raises(ValueError, match="expected a number from 0 on"),
    ):
        manager.save(bad, state())


@pytest.mark.parametrize(
    "arguments", [{"save": 100}, {"keep": "last"}, {"on_event": 3}, {"save": KeepLast(1)}]
)
def test_what_is_no_policy_is_refused_at_once(arguments):
    with pytest.raises(TypeError):
        Manager(MemoryStore(), comm=SOLO, **arguments)


@pytest.mark.parametrize("arguments", [{"max_pending": 0}, {"on_failure": "ignore"}])
def test_arguments_that_cannot_be_are_refused_at_once(arguments):
    with pytest.raises(ValueError, match="expected"):
        Manager(MemoryStore(), comm=SOLO, **arguments)


# -------------------------------------------------------------------------------- what is in flight


class Gate:
    """Holds up writing until it is opened."""

    def __init__(self, only=""):
        self.event, self.only = threading.Event(), only

    def __call__(self, kind, name, number):
        if kind == "write" and self.only in name:
            assert self.event.wait(30)


def test_so_many_saves_are_in_flight_and_one_more_waits():
    gate, told = Gate(), []
    store = FaultyStore(MemoryStore(), on_operation=gate)
    with Manager(store, comm=SOLO, max_pending=2, on_event=told.append) as manager:
        first = manager.save(1, state(1))
        second = manager.save(2, state(2))
        assert not first.done()
        assert not second.done()
        threading.Timer(0.05, gate.event.set).start()
        manager.save(3, state(3))
        assert first.done()
    waits = [event for event in told if event.kind == "backpressure"]
    assert [event.step for event in waits] == [3]
    assert waits[0].values["waited_s"] > 0
    assert saved_steps(store) == [1, 2, 3]


@pytest.mark.parametrize("ranks", [1, 2])
def test_with_warn_a_failed_save_is_told_and_training_goes_on(ranks, caplog):
    store, told = MemoryStore(), []

    def fail(kind, name, number):
        if kind == "commit" and "step-00000002" in name:
            raise StoreError("full", refused=True)

    def go(comm):
        faulty = FaultyStore(store, on_operation=fail)
        with Manager(faulty, comm=comm, on_failure="warn", on_event=told.append) as manager:
            for step in (1, 2, 3):
                manager.save(step, state(step))

    run_ranks(ranks, go)
    assert saved_steps(store) == [1, 3]
    assert [event.step for event in told if event.kind == "save_failed"] == [2]
    assert "full" in caplog.text


def test_after_its_end_a_manager_saves_nothing_more_and_still_reads():
    store = MemoryStore()
    with Manager(store, comm=SOLO) as manager:
        manager.save(1, state())
    with pytest.raises(CheckpointError, match="closed"):
        manager.save(2, state())
    assert manager.steps() == [1]
    manager.close()


# ------------------------------------------------------------------------------------- what is kept


def test_the_newest_is_kept_also_when_it_is_not_the_best():
    store = MemoryStore()
    with Manager(store, comm=SOLO, keep=KeepBest("loss")) as manager:
        for step, loss in enumerate([0.5, 0.1, 0.9, 0.8], 1):
            manager.save(step, state(), metrics={"loss": loss})
    assert manager.steps() == [2, 4]


def test_keep_policies_are_combined():
    store = MemoryStore()
    keep = KeepLast(2) | KeepEvery(4) | KeepBest("loss", 1, lowest=False)
    with Manager(store, comm=SOLO, keep=keep) as manager:
        for step in range(1, 11):
            manager.save(step, state(), metrics={"loss": float(step == 3)})
    assert manager.steps() == [3, 4, 8, 9, 10]


def test_what_is_pinned_stays_until_it_is_unpinned():
    store = MemoryStore()
    with Manager(store, comm=SOLO, keep=KeepLast(1)) as manager:
        manager.save(1, state())
        manager.wait()
        manager.pin(1, "for the paper")
        manager.save(2, state())
        manager.save(3, state())
        manager.wait()
        assert manager.steps() == [1, 3]
        assert "pinned: for the paper" in str(manager.explain())
        manager.unpin(1)
        manager.save(4, state())
    assert manager.steps() == [4]


def test_what_is_not_there_cannot_be_pinned():
    store = MemoryStore()
    with pytest.raises(CheckpointNotFound):
        Manager(store, comm=SOLO).pin(7, "why not")
    assert store.objects == {}


def test_explain_says_for_each_step_why_and_deletes_nothing():
    store = MemoryStore()
    with Manager(store, comm=SOLO) as manager:
        for step in (1, 2, 3, 4):
            manager.save(step, state(), metrics={"loss": abs(step - 2.0)})
    before = dict(store.objects)
    explanation = Manager(store, comm=SOLO, keep=KeepBest("loss") | KeepLast(2)).explain()
    assert explanation.goes == [1]
    table = str(explanation).splitlines()
    assert table[0].split() == ["step", "committed", "(UTC)", "why", "metrics"]
    assert "goes" in table[1]
    assert "KeepBest" in table[2]
    assert "the newest" in table[4]
    assert "loss 2" in table[4]
    assert store.objects == before


def test_without_a_policy_everything_stays_and_explain_says_so():
    store = MemoryStore()
    with Manager(store, comm=SOLO) as manager:
        manager.save(1, state())
        manager.save(2, state())
    assert manager.explain().goes == []
    assert str(Manager(MemoryStore(), comm=SOLO).explain()) == "no checkpoints"


# -------------------------------------------------------------------------------------- two at once


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_newer_manager_takes_over_and_the_older_is_told_at_its_next_commit(ranks):
    store, told = MemoryStore(), []

    def go(comm):
        options = {"comm": comm, "save": EverySteps(1), "stop_signals": ()}
        old = Manager(store, **options, keep=KeepLast(1), on_event=told.append)
        old.step(1, state(1))
        old.wait()
        with Manager(store, **options) as new:
            assert new.load_latest_into(state()) == 1
            old.step(2, state(2))
            with pytest.raises(SaveFailed, match=r"another Manager, begun .* has taken over"):
                old.wait()
            new.step(3, state(3))
        old.close()

    run_ranks(ranks, go)
    assert saved_steps(store) == [1, 3]
    assert [event.step for event in told if event.kind == "fenced"] == [2]


def test_the_older_manager_deletes_nothing_any_more():
    store = MemoryStore()
    gate = threading.Event()
    entered = threading.Event()

    def wait_before_pruning(kind, name, number):
        if kind == "put" and "deletion-" in name:
            entered.set()
            assert gate.wait(30)

    old = Manager(FaultyStore(store, on_operation=wait_before_pruning), comm=SOLO, keep=KeepLast(1))
    old.save(1, state())
    old.save(2, state())
    assert entered.wait(30)  # 2 is committed, and 1 is about to be deleted
    with Manager(store, comm=SOLO) as new:
        new.save(3, state())
        new.wait()
        gate.set()
        old.close()
    assert saved_steps(store) == [1, 2, 3]


def test_a_manager_that_only_reads_takes_nothing_over():
    store = MemoryStore()
    with Manager(store, comm=SOLO) as training:
        training.save(1, state())
        training.wait()
        reader = Manager(store, comm=SOLO)
        assert reader.load_latest_into(state()) == 1
        assert reader.steps() == [1]
        training.save(2, state())
    assert saved_steps(store) == [1, 2]


def test_of_many_that_begin_at_once_exactly_one_is_the_newest(tmp_path):
    barrier = threading.Barrier(6)
    outcomes = []

    def run(number):
        manager = Manager(tmp_path, comm=distckpt.Solo())
        barrier.wait()
        with contextlib.suppress(SaveFailed), manager:
            manager.save(number, state())
        barrier.wait()  # all have tried
        try:
            manager._fence.check()
        except SaveFailed:
            outcomes.append(False)
        else:
            outcomes.append(True)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [False] * 5 + [True]
    epochs = [path.name for path in (tmp_path / ".distckpt").glob("epoch-*")]
    assert "epoch-00000006" in epochs


# ---------------------------------------------------------------------------------------- the index


def test_the_index_spares_reading_the_manifests(tmp_path):
    with Manager(tmp_path, comm=SOLO) as manager:
        for step in range(1, 6):
            manager.save(step, state(), metrics={"loss": float(step)})
    read = []

    def note(kind, name, number):
        if kind == "read":
            read.append(name)

    reader = Manager(FaultyStore(distckpt.store.open_store(tmp_path), on_operation=note), comm=SOLO)
    assert reader.best("loss") == 1
    assert read == [".distckpt/index.json"]


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"\x00",
        b"[]",
        b'{"version": 1, "steps": {"step-00000001": {}}}',
        b'{"version": 1, "steps": {"step-00000001": {"step": 2, "save_id": "x"}}}',
        b'{"version": 99, "steps": {}}',
        b"[" * 100_000,
    ],
)
def test_an_index_that_is_damaged_is_made_anew(tmp_path, index):
    with Manager(tmp_path, comm=SOLO) as manager:
        manager.save(1, state(), metrics={"loss": 1.0})
    (tmp_path / ".distckpt" / "index.json").write_bytes(index)
    assert Manager(tmp_path, comm=SOLO).best("loss") == 1
    with Manager(tmp_path, comm=SOLO) as manager:
        manager.steps()
        manager.save(2, state())
    assert len(json.loads((tmp_path / ".distckpt" / "index.json").read_text())["steps"]) == 2


def test_an_index_that_lies_about_what_is_there_is_not_believed(tmp_path):
    with Manager(tmp_path, comm=SOLO) as manager:
        manager.save(1, state(), metrics={"loss": 1.0})
        manager.save(2, state(), metrics={"loss": 2.0})
    index = tmp_path / ".distckpt" / "index.json"
    content = json.loads(index.read_text())
    content["steps"]["step-00000009"] = content["steps"]["step-00000001"] | {"step": 9}
    content["steps"]["step-00000002"]["bytes"] += 1
    content["steps"]["step-00000002"]["metrics"] = {"loss": 0.0}
    index.write_text(json.dumps(content))
    manager = Manager(tmp_path, comm=SOLO)
    assert manager.steps() == [1, 2]
    assert manager.best("loss") == 1


# ------------------------------------------------------------------------------------------- events


def test_a_run_is_told_as_events():
    store, told = MemoryStore(), []
    with Manager(store, comm=SOLO, keep=KeepLast(1), on_event=told.append) as manager:
        manager.save(1, state(), metrics={"loss": 0.5})
        manager.save(2, state())
    Manager(store, comm=SOLO, on_event=told.append).load_latest_into(state())
    kinds = [(event.kind, event.step) for event in told if event.kind != "backpressure"]
    assert kinds == [
        ("save_begun", 1),
        ("save_committed", 1),
        ("save_begun", 2),
        ("save_committed", 2),
        ("pruned", 1),
        ("load_begun", 2),
        ("loaded", 2),
    ]
    committed = told[1]
    assert committed.values["metrics"] == {"loss": 0.5}
    assert committed.values["stats"].nbytes > 400
    assert committed.url == "memory-store/step-00000001"


def test_only_rank_0_tells():
    store, told = MemoryStore(), []

    def go(comm):
        mine = []
        with Manager(store, comm=comm, on_event=mine.append) as manager:
            manager.save(1, state())
        told.append((comm.rank, len(mine)))

    run_ranks(3, go)
    assert sorted(told) == [(0, 2), (1, 0), (2, 0)]
