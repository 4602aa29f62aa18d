"""What stops a run on several ranks: all save the same step, and leave after it."""

from __future__ import annotations

import gc
import os
import signal
import time
from contextlib import ExitStack

import numpy as np
import pytest

from distckpt import CheckpointError, EverySteps, Manager
from distckpt.manager.halt import write_halt
from distckpt.manager.heartbeat import Heartbeat, Vote
from distckpt.store import open_store
from distckpt.team import connect
from distckpt.testing import FaultyStore

LAST = 50


def kill_myself(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def train(comm, *managers, before_step=lambda step: None, start=0):
    """Train until all managers say stop; returns the step."""
    total = np.zeros(1)
    for step in range(start + 1, LAST):
        comm.Allreduce(np.ones(1), total)
        before_step(step)
        for manager in managers:
            manager.step(step, {"step": step, "w": np.full(100, float(step))})
        stops = [manager.should_stop() for manager in managers]
        if all(stops):
            return step
    return None


def assert_stopped(comm, manager, step, reason):
    """All ranks have left after this step, for this reason, and it is committed."""
    assert comm.allgather((step, reason)) == [(step, reason)] * comm.size
    assert comm.allgather(manager.stop_reason) == [reason] * comm.size
    assert manager.latest() == step
    assert manager.open(step).values["step"] == step
    comm.Barrier()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_to_any_one_rank_stops_all_after_the_same_step(comm, folder, number):
    for victim in {0, comm.size // 2, comm.size - 1}:

        def signalled(step, victim=victim):
            if step == 5 and comm.rank == victim:
                kill_myself(number)

        with Manager(folder / str(victim), comm=comm, save=EverySteps(1000)) as manager:
            step = train(comm, manager, before_step=signalled)
        assert_stopped(comm, manager, step, f"{number.name} on rank {victim}")
        assert 5 <= step <= 10


def test_a_signal_to_all_of_them_does(comm, folder):
    with Manager(folder, comm=comm, save=EverySteps(1000)) as manager:
        step = train(comm, manager, before_step=lambda step: step == 5 and kill_myself())
    reasons = comm.allgather(manager.stop_reason)
    assert reasons == reasons[:1] * comm.size
    assert reasons[0].startswith("SIGTERM on rank ")
    assert manager.latest() == step
    comm.Barrier()


def test_the_step_that_it_stops_at_is_not_saved_twice(comm, folder):
    with Manager(folder, comm=comm, save=EverySteps(1)) as manager:
        step = train(comm, manager, before_step=lambda step: step == 5 and kill_myself())
    assert manager.steps() == list(range(1, step + 1))
    comm.Barrier()


def test_without_a_policy_nothing_is_saved(comm, folder):
    with Manager(folder, comm=comm, stop_signals=[signal.SIGTERM]) as manager:
        step = train(comm, manager, before_step=lambda step: step == 5 and kill_myself())
    assert 5 <= step <= 10
    assert manager.steps() == []
    comm.Barrier()


def test_a_signal_in_the_middle_of_a_save_leaves_that_and_the_last_one(comm, folder):
    last = comm.size - 1

    def signalled(kind, name, number):
        if comm.rank == last and kind == "write-half" and name.startswith("step-00000004/"):
            kill_myself()

    store = FaultyStore(open_store(folder), on_operation=signalled)
    with Manager(store, comm=comm, save=EverySteps(4)) as manager:
        step = train(comm, manager)
    assert_stopped(comm, manager, step, f"SIGTERM on rank {last}")
    assert 4 in manager.steps()


def test_a_signal_while_resuming_stops_as_soon_as_it_trains(comm, folder):
    with Manager(folder, comm=comm, save=EverySteps(3)) as manager:
        manager.step(3, {"step": 3, "w": np.ones(100)})
    comm.Barrier()
    killed = []

    def signalled(kind, name, number):
        if comm.rank == 0 and kind == "read" and not killed:
            killed.append(True)
            kill_myself()

    state = {"step": 0, "w": np.zeros(100)}
    store = FaultyStore(open_store(folder), on_operation=signalled)
    with Manager(store, comm=comm, save=EverySteps(1000)) as manager:
        assert manager.load_latest_into(state) == 3
        step = train(comm, manager, start=3)
    assert_stopped(comm, manager, step, "SIGTERM on rank 0")
    assert step <= 8


def test_several_managers_on_one_communicator_all_stop(comm, folder):
    """Each at the same step on all ranks; one may hear of the signal a step later than another."""
    with ExitStack() as stack:
        managers = [
            stack.enter_context(
                Manager(folder / str(number), comm=comm, save=EverySteps(1000), keep=None)
            )
            for number in range(3)
        ]
        step = train(
            comm,
            *managers,
            before_step=lambda step: step == 5 and comm.rank == comm.size - 1 and kill_myself(),
        )
    for manager in managers:
        saved = comm.allgather((manager.latest(), manager.stop_reason))
        assert saved == [(saved[0][0], f"SIGTERM on rank {comm.size - 1}")] * comm.size
        assert step - 2 <= saved[0][0] <= step
    comm.Barrier()


def test_the_halt_file_stops_all_and_is_gone_after(comm, folder):
    if comm.rank == 0:
        write_halt(open_store(folder), "")
    comm.Barrier()

    with Manager(folder, comm=comm, save=EverySteps(10**6)) as manager:
        step = 0
        while not manager.should_stop():
            step += 1
            comm.Allreduce(np.ones(1), np.zeros(1))
            manager.step(step, {"step": step})
    comm.Barrier()
    assert manager.stop_reason == f"the halt file {folder}/halt says 'now'"
    assert manager.latest() == step
    assert not (folder / "halt").exists()


def test_the_end_of_its_time_stops_all(comm, folder):
    with Manager(folder, comm=comm, save=EverySteps(10**6), max_seconds=0.05) as manager:
        step = 0
        while not manager.should_stop():
            step += 1
            comm.Allreduce(np.ones(1), np.zeros(1))
            manager.step(step, {"step": step})
    assert_stopped(comm, manager, step, manager.stop_reason)
    assert manager.stop_reason.startswith("max_seconds=0.05 is up in ")


# ---------------------------------------------------------------------------------- the heartbeat


def test_many_beats_among_many_messages_of_others(comm):
    team = connect(comm)
    pulses = [Heartbeat(team, 60) for _ in range(3)]
    total = np.zeros(1)
    for step in range(200):
        for number, pulse in enumerate(pulses):
            wants = step > 100 and comm.rank == number % comm.size
            beat = pulse.beat(step, Vote(f"{number}" if wants else None, (step // 10, 1.0)))
            if step > 120:
                assert beat.stop == f"{number}"
        if step % 10 == 0:
            operation = team.operation(60)
            call = {"call": "meet", "error": None}
            assert team.drive(operation.agree(call, lambda calls: calls, "meet")) == call
        if step > 100:
            comm.Allreduce(np.ones(1), total)
    for pulse in pulses:
        pulse.close()
    comm.Barrier()


def test_ranks_at_different_steps_are_told_apart(comm):
    if comm.size == 1:
        pytest.skip("there is nobody to differ from")
    pulse = Heartbeat(connect(comm), 60)
    wrong = comm.size - 1

    def differ():
        for step in range(30):
            comm.Barrier()
            pulse.beat(step + (comm.rank == wrong), Vote())

    with pytest.raises(CheckpointError, match=rf"step\(0\), but rank {wrong} called .*step\(1\)"):
        differ()
    comm.Barrier()  # all have raised after the same step, and none is in one


def test_what_nobody_has_heard_does_not_keep_a_communicator(comm, folder):
    """The last message of a Manager's never is heard."""
    for number in range(3):
        passing = comm.Dup()
        with Manager(folder / str(number), comm=passing) as manager:
            for step in range(1, 4):
                manager.step(step, {"step": step})
        del manager
        passing.Free()
    gc.collect()
    comm.Barrier()
    connect(comm.Dup())  # which frees what was left


def test_a_coordinator_that_is_far_ahead_costs_no_more_than_its_messages(comm):
    """Nobody takes them meanwhile: MPI has to keep them."""
    pulse = Heartbeat(connect(comm), 60)
    pulse.beat(0, Vote())
    comm.Barrier()
    began = time.perf_counter()
    if comm.rank == 0:
        for step in range(1, 1_001):
            pulse.beat(step, Vote())
    comm.Barrier()
    if comm.rank:
        for step in range(1, 1_001):
            pulse.beat(step, Vote())
    comm.Barrier()
    assert time.perf_counter() - began < 60
    pulse.close()
