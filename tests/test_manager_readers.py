"""The Manager and those who read beside it: what is held stays; what vanishes is no damage."""

from __future__ import annotations

import numpy as np
import pytest

import distckpt
from distckpt import IncompleteCheckpoint, KeepLast, Manager
from distckpt.run import OWN, step_name
from distckpt.testing import FaultyStore, MemoryStore, run_ranks

SOLO = distckpt.Solo()


def save(store, *steps, keep=None, events=None, pinned=()):
    with Manager(store, comm=SOLO, keep=keep, on_event=events) as manager:
        for step in steps:
            manager.save(step, {"w": np.full(6, float(step))})
            manager.wait()
            if step in pinned:
                manager.pin(step, "to be compared with")


def told(events):
    return [(event.kind, event.step) for event in events if event.kind in {"pruned", "kept_back"}]


def test_what_is_held_is_kept_back_and_goes_after_the_next_commit():
    store, events = MemoryStore(), []
    save(store, 1)
    with Manager(store, comm=SOLO).open(1).hold():
        save(store, 2, keep=KeepLast(1), events=events.append)
        assert told(events) == [("kept_back", 1)]
    save(store, 3, keep=KeepLast(1), events=events.append)
    assert told(events)[1:] == [("pruned", 1), ("pruned", 2)]
    assert not [name for name in store.objects if name.startswith(step_name(1))]


def test_a_step_that_is_saved_again_leaves_the_held_ones_files_to_its_reader():
    store = MemoryStore()
    save(store, 1)
    checkpoint = Manager(store, comm=SOLO).open(1)
    with checkpoint.hold():
        with Manager(store, comm=SOLO) as manager:
            manager.save(1, {"w": np.full(6, 7.0)})
        assert (checkpoint["w"][...] == 1.0).all()
        assert (manager.open(1)["w"][...] == 7.0).all()
    save(store, 2, keep=KeepLast(1))
    assert Manager(store, comm=SOLO).steps() == [2]
    assert not [name for name in store.objects if name.startswith(step_name(1))]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_load_goes_on_with_what_is_there_when_the_run_prunes_what_it_has_found(ranks):
    """At any operation of the load, another job commits a step, and prunes what isn't pinned."""

    def load(at):
        """Load; return the step, and how many operations that took."""
        store = MemoryStore()
        save(store, 1, 2, pinned=[1])

        def meanwhile(kind, name, number):
            if number == at:
                save(store, 3, keep=KeepLast(1))

        watched = FaultyStore(store, on_operation=meanwhile)

        def resume(comm):
            net = {"w": np.zeros(6)}
            # The other job isn't fenced off: this one only reads.
            step = Manager(watched if comm.rank == 0 else store, comm=comm).load_latest_into(net)
            assert (net["w"] == step).all()
            return step

        steps = set(run_ranks(ranks, resume, timeout_s=30))
        assert not [name for name in store.names(OWN + "/") if name.startswith("damaged")]
        [step] = steps
        return step, len(watched.operations)

    step, count = load(None)
    assert step == 2
    found = {load(at)[0] for at in range(count)}
    assert found == {3}


def test_a_load_of_what_vanishes_each_time_ends_with_an_error():
    store = MemoryStore()
    save(store, 1)
    steps = iter(range(2, 100))

    def meanwhile(kind, name, number):
        if kind == "read" and "shard" in name:
            save(store, next(steps), keep=KeepLast(1))

    manager = Manager(FaultyStore(store, on_operation=meanwhile), comm=SOLO)
    with pytest.raises((distckpt.LoadFailed, IncompleteCheckpoint), match="deleted while it was"):
        manager.load_latest_into({"w": np.zeros(6)})
    assert next(steps) == 7
