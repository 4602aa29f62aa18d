"""What a Manager does with what should not be: steps, metrics, clocks, storage, other Managers."""

from __future__ import annotations

import math
import threading
import time

import numpy as np
import pytest

import distckpt
from distckpt import (
    AtMostOverhead,
    Best,
    EverySteps,
    IncompleteCheckpoint,
    KeepBest,
    KeepFor,
    KeepLast,
    Manager,
    SaveFailed,
    StoreError,
    YoungDaly,
)
from distckpt.testing import FaultyStore, MemoryStore, run_ranks


def state(step=0):
    return {"w": np.full(50, float(step))}


def run_of(*steps, **options):
    store = MemoryStore()
    with Manager(store, comm=distckpt.Solo(), **options) as manager:
        for step in steps:
            manager.save(step, state(step))
    return store


def steps_of(store):
    return Manager(store, comm=distckpt.Solo()).steps()


def refusing(store, *kinds, why="read-only", only=""):
    """A store that carries out some kinds of operations no more, while `refuses` holds."""

    def refuse(kind, name, number):
        if found.refuses and kind in kinds and only in name:
            raise StoreError(f"{name}: {why}", refused=True)

    found = FaultyStore(store, on_operation=refuse)
    found.refuses = True
    return found


# -------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_step_that_goes_back_is_refused_on_all_ranks(ranks):
    """Most likely it counts within an epoch; the run would resume from the wrong one."""
    store = MemoryStore()

    def go(comm):
        with Manager(store, comm=comm, save=EverySteps(5), stop_signals=()) as manager:
            manager.step(10, state(10))
            for call in (manager.step, manager.save):
                with pytest.raises(ValueError, match="step=5, after step 10: steps count a whole"):
                    call(5, state(5))
            manager.step(15, state(15))

    run_ranks(ranks, go)
    assert steps_of(store) == [10, 15]


def test_who_loads_an_older_checkpoint_goes_on_from_there():
    store = MemoryStore()
    with Manager(store, comm=distckpt.Solo()) as manager:
        for step, loss in enumerate([0.3, 0.1, 0.9], 1):
            manager.save(step, state(step), metrics={"loss": loss})
        net = state()
        assert manager.load_best_into(net, "loss") == 2
        assert net["w"][0] == 2
        manager.save(3, state(30))
    assert manager.open(3)["w"][0] == 30


@pytest.mark.parametrize("step", [1.0, "1", None, 2**63])
def test_what_is_no_step_is_refused(step):
    with (
        Manager(MemoryStore(), comm=distckpt.Solo()) as manager,
        pytest.raises(ValueError, match="expected a number from 0 on"),
    ):
        manager.step(step, state())


def test_numpys_numbers_are_steps():
    store = run_of(np.int64(7), np.uint8(200))
    assert steps_of(store) == [7, 200]


def test_who_forgets_to_resume_is_told_that_the_run_goes_on_from_elsewhere(caplog):
    store = run_of(100, 200)
    with Manager(store, comm=distckpt.Solo()) as manager:
        manager.save(10, state())
        manager.save(11, state())
    said = [line for line in caplog.text.splitlines() if "was saved, but" in line]
    assert len(said) == 1
    assert "step 10 was saved, but step 100, step 200 is there" in said[0]


# ------------------------------------------------------------------------------------------ metrics


@pytest.mark.parametrize("metrics", [{}, {"loss": math.nan}, {"accuracy": 1.0}])
def test_a_metric_that_is_missing_or_nan_is_warned_of_once(metrics, caplog):
    store = MemoryStore()
    options = {"save": Best("loss") | EverySteps(1), "keep": KeepBest("loss"), "stop_signals": ()}
    with Manager(store, comm=distckpt.Solo(), **options) as manager:
        manager.step(1, state(), metrics={"loss": 0.5})
        for step in (2, 3, 4):
            manager.step(step, state(), metrics=metrics)
    assert manager.steps() == [1, 4]
    assert manager.best("loss") == 1
    assert caplog.text.count("has no number for loss") == 1


def test_what_could_not_be_saved_is_not_the_best_so_far():
    store = MemoryStore()
    faulty = refusing(store, "commit", only="step-00000002")
    options = {"save": Best("loss"), "on_failure": "warn", "stop_signals": ()}
    with Manager(faulty, comm=distckpt.Solo(), **options) as manager:
        for step, loss in enumerate([0.5, 0.1, 0.3, 0.4], 1):
            manager.step(step, state(), metrics={"loss": loss})
            manager.wait()
    assert steps_of(store) == [1, 3]


# -------------------------------------------------------------------------------------------- costs


@pytest.mark.parametrize("policy", [AtMostOverhead(1e-9), YoungDaly(1e12)])
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_cost_that_is_not_known_yet_does_not_save_at_each_step(policy, ranks):
    store = MemoryStore()

    def go(comm):
        with Manager(store, comm=comm, save=policy, stop_signals=()) as manager:
            return [manager.step(step, state()) is not None for step in range(1, 7)]

    assert run_ranks(ranks, go) == [[True, False, False, False, False, False]] * ranks


def test_waiting_for_the_save_before_is_a_part_of_the_cost():
    def slow(kind, name, number):
        if kind == "commit":
            time.sleep(0.2)

    told = []
    store = FaultyStore(MemoryStore(), on_operation=slow)
    options = {"save": EverySteps(1), "stop_signals": (), "on_event": told.append}
    with Manager(store, comm=distckpt.Solo(), **options) as manager:
        manager.step(1, state())
        manager.step(2, state())
        manager.step(3, state())
        cost_s = manager._moment(3, None).cost_s
    waits = {event.step: event.values["waited_s"] for event in told if event.kind == "backpressure"}
    assert cost_s >= waits.get(2, 0.0)


# ------------------------------------------------------------------------------------------- clocks


def test_a_clock_that_jumps_deletes_nothing_that_the_policy_keeps(monkeypatch):
    store, clock = MemoryStore(), {"offset_ns": 0}
    real = time.time_ns
    monkeypatch.setattr("distckpt.commit.time.time_ns", lambda: real() + clock["offset_ns"])
    day_ns = 86_400 * 10**9
    with Manager(store, comm=distckpt.Solo(), keep=KeepFor(3600)) as manager:
        for step, offset_ns in enumerate([0, day_ns, 0], 1):
            clock["offset_ns"] = offset_ns
            manager.save(step, state(step))
            manager.wait()
            assert manager.latest() == step  # by its number, and not by the clock
    # The first went when the clock said that it is a day old; then it was set back.
    assert manager.steps() == [2, 3]


# ------------------------------------------------------------------------------------------ storage


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_root_that_cannot_be_written_to_fails_the_save_on_all_ranks(ranks, caplog):
    inner = run_of(1)
    before = dict(inner.objects)

    def go(comm):
        store = refusing(inner, "create", "put", "delete")
        manager = Manager(store, comm=comm, save=EverySteps(1), stop_signals=())
        assert manager.load_latest_into(state()) == 1
        manager.step(2, state(2))
        with pytest.raises(SaveFailed, match="read-only") as caught:
            manager.wait()
        manager.close()
        return str(caught.value)

    assert len(set(run_ranks(ranks, go))) == 1
    assert inner.objects == before
    assert "not taken over yet" in caplog.text


def test_a_full_root_costs_saves_and_not_the_run():
    inner = run_of(1)
    store = refusing(inner, "write", "put", why="no space left")
    told = []
    options = {"keep": KeepLast(1), "on_failure": "warn", "on_event": told.append}
    with Manager(store, comm=distckpt.Solo(), **options) as manager:
        manager.save(2, state(2))
        manager.save(3, state(3))
        manager.wait()
        assert manager.steps() == [1]
        store.refuses = False
        manager.save(4, state(4))
    assert steps_of(inner) == [4]
    assert [event.step for event in told if event.kind == "save_failed"] == [2, 3]
    assert "no space left" in str(told)


def test_of_several_saves_in_flight_all_are_ended_before_one_raises():
    gate = threading.Event()

    def refuse(kind, name, number):
        assert kind != "write" or gate.wait(30)
        if kind == "commit":
            raise StoreError("read-only", refused=True)

    store = FaultyStore(MemoryStore(), on_operation=refuse)
    manager = Manager(
        store, comm=distckpt.Solo(), max_pending=3, save=EverySteps(1), stop_signals=()
    )
    pending = [manager.step(step, state(step)) for step in (1, 2, 3)]
    gate.set()
    with pytest.raises(SaveFailed, match="step-00000001"):
        manager.close()
    assert all(found.done() for found in pending)


# -------------------------------------------------------------------------------------- two at once


@pytest.mark.parametrize("first_call", ["step", "save", "load"])
def test_the_manager_that_began_last_wins_also_if_the_other_commits_first(first_call):
    """One whose first save hung until another was started in its place."""
    store = run_of(1)
    options = {"save": EverySteps(2), "stop_signals": ()}

    def begin(manager, step):
        if first_call == "step":
            manager.step(step, state())
        elif first_call == "load":
            manager.load_latest_into(state())
        else:
            manager.save(step, state())
            manager.wait()

    old, new = (Manager(store, comm=distckpt.Solo(), **options) for _ in range(2))
    begin(old, 3)
    begin(new, 5)
    old.save(8, state(8))
    with pytest.raises(SaveFailed, match="has taken over"):
        old.wait()
    new.save(9, state(9))
    new.close()
    old.close()
    assert 8 not in steps_of(store)
    assert 9 in steps_of(store)


def test_a_store_without_exclusive_creation_has_one_newest_manager_too():
    class NoLinks(MemoryStore):
        def put(self, name, data, *, replace):
            if not replace and "epoch-" in name:
                raise StoreError("no hard links here", refused=True)
            super().put(name, data, replace=True)

    store = NoLinks()
    old, new = (Manager(store, comm=distckpt.Solo()) for _ in range(2))
    old._fence.take()
    # Both have found the same epoch free.
    new._fence.take()
    name = ".distckpt/epoch-00000001"
    store.put(name, store.objects[".distckpt/epoch-00000002"], replace=True)
    store.delete([".distckpt/epoch-00000002"])
    with pytest.raises(SaveFailed, match="another Manager, begun"):
        old.save(1, state()).wait()
    with pytest.raises(SaveFailed):
        old.close()
    new.close()


def test_who_deletes_the_managers_own_objects_is_told():
    store = MemoryStore()
    manager = Manager(store, comm=distckpt.Solo())
    manager.save(1, state())
    manager.wait()
    store.delete([name for name in store.objects if name.startswith(".distckpt/")])
    manager.save(2, state())
    with pytest.raises(SaveFailed, match="is gone: nothing more is saved"):
        manager.close()
    assert steps_of(store) == [1]


def test_a_pin_that_comes_while_deletions_go_on_counts():
    store, told = MemoryStore(), []

    def pin(kind, name, number):
        if kind == "put" and name.startswith("step-00000001/deletion-"):
            Manager(store, comm=distckpt.Solo()).pin(1, "just in time")

    faulty = FaultyStore(store, on_operation=pin)
    with Manager(faulty, comm=distckpt.Solo(), keep=KeepLast(1), on_event=told.append) as manager:
        manager.save(1, state(1))
        manager.save(2, state(2))
    assert steps_of(store) == [1, 2]
    kept = [event for event in told if event.kind == "kept_back"]
    assert [event.values["reason"] for event in kept] == ["pinned: just in time"]


def test_a_pin_that_comes_too_late_is_refused():
    store, refused = MemoryStore(), []

    def pin(kind, name, number):
        if kind == "delete" and name == "step-00000001/manifest.binpb":
            with pytest.raises(IncompleteCheckpoint, match="deleted"):
                Manager(store, comm=distckpt.Solo()).pin(1, "too late")
            refused.append(1)

    with Manager(
        FaultyStore(store, on_operation=pin), comm=distckpt.Solo(), keep=KeepLast(1)
    ) as manager:
        manager.save(1, state(1))
        manager.save(2, state(2))
    assert refused == [1]
    assert steps_of(store) == [2]
    assert not any("pin-" in name for name in store.objects)
