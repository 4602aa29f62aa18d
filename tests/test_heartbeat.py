"""How all ranks come to know the same at each step, and what is wrong if they can't."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt import CheckpointError
from distckpt.coordinator import Solo
from distckpt.manager import heartbeat
from distckpt.manager.heartbeat import Heartbeat, Vote
from distckpt.team import HEARTBEAT_TAG, Late, connect
from distckpt.testing import run_ranks

QUIET = Vote()
SAME = ": every rank must make the same steps in the same order"


def beats(team, count, votes=None, timeout_s=30.0):
    """Make beats of the steps 0, 1, …; *votes*: number of the beat → vote."""
    pulse = Heartbeat(team, timeout_s)
    return [pulse.beat(step, (votes or {}).get(step, QUIET)) for step in range(count)]


def stops(found):
    return [beat.stop for beat in found]


# ----------------------------------------------------------------------------------- what is known


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("who", ["first", "last"])
def test_what_one_rank_wants_all_know_at_the_same_step_and_soon(size, who):
    chosen = 0 if who == "first" else size - 1
    meet = threading.Barrier(size)

    def run(comm):
        pulse = Heartbeat(connect(comm), 30)
        found = []
        for step in range(10):
            meet.wait()
            vote = Vote(stop=f"rank {chosen} wants") if comm.rank == chosen and step >= 3 else QUIET
            found.append(pulse.beat(step, vote))
        return found

    everyone = run_ranks(size, run)
    assert all(found == everyone[0] for found in everyone)
    told = stops(everyone[0])
    first = told.index(f"rank {chosen} wants")
    assert first in ({3} if size == 1 else {4, 5})
    assert set(told[:first]) == {None}
    assert set(told[first:]) == {f"rank {chosen} wants"}


@given(data=st.data())
@settings(max_examples=30)
def test_whatever_the_ranks_say_and_however_they_lag_all_hear_the_same(data):
    size = data.draw(st.integers(1, 5))
    count = data.draw(st.integers(1, 12))
    votes = [
        data.draw(
            st.dictionaries(
                st.integers(0, count - 1),
                st.builds(
                    Vote,
                    stop=st.none() | st.just(f"rank {rank}"),
                    cost=st.none() | st.tuples(st.integers(0, 3), st.floats(0, 9)),
                ),
            )
        )
        for rank in range(size)
    ]
    everyone = run_ranks(size, lambda comm: beats(connect(comm), count, votes[comm.rank]))
    assert all(found == everyone[0] for found in everyone)
    reasons = {vote.stop for given in votes for vote in given.values()} | {None}
    told = stops(everyone[0])
    assert set(told) <= reasons
    assert len({*told} - {None}) <= 1
    assert told == sorted(told, key=lambda reason: reason is not None)
    clock = [beat.now_s for beat in everyone[0]]
    assert clock == sorted(clock)


def test_the_cost_of_the_newest_save_is_that_of_its_slowest_rank():
    meet = threading.Barrier(3)

    def run(comm):
        pulse = Heartbeat(connect(comm), 30)
        found = []
        for step in range(12):
            meet.wait()
            save = step // 4
            vote = Vote(cost=(save, 10.0 * (3 - save) + comm.rank)) if step % 4 == 0 else QUIET
            found.append(pulse.beat(step, vote).cost_s)
        return found

    everyone = run_ranks(3, run)
    assert everyone[0] == everyone[1] == everyone[2]
    assert everyone[0][3] == 32
    assert everyone[0][7] == 22
    assert everyone[0][11] == 12


def test_only_what_is_new_is_sent():
    sent = []

    def run(comm):
        post = comm.post
        if comm.rank == 1:
            comm.post = lambda dest, tag, payload: (sent.append(payload), post(dest, tag, payload))
        beats(connect(comm), 20, {step: Vote("now", (1, 0.5)) for step in range(5, 20)})

    run_ranks(2, run)
    assert len(sent) == 1


def test_a_rank_waits_for_nothing_but_the_coordinators_step_before():
    ahead = threading.Event()

    def run(comm):
        pulse = Heartbeat(connect(comm), 30)
        if comm.rank == 2:
            assert ahead.wait(30)
        for step in range(50):
            pulse.beat(step, QUIET)
        if comm.rank == 0:
            ahead.set()

    run_ranks(3, run)


# ------------------------------------------------------------------------------------ many of them


def test_any_number_of_managers_share_a_communicator():
    def run(comm):
        team = connect(comm)
        pulses = [Heartbeat(team, 30) for _ in range(40)]
        found = []
        for step in range(6):
            for number, pulse in enumerate(pulses):
                vote = Vote(stop=f"{number}") if number % 3 == comm.rank and step == 0 else QUIET
                found.append(pulse.beat(step, vote).stop)
            if step == 3:
                for pulse in pulses[::2]:
                    pulse.close()
                pulses = pulses[1::2]
        return found

    one, two, three = run_ranks(3, run)
    assert one == two == three


def test_a_manager_that_only_one_rank_makes_takes_no_part():
    def run(comm):
        team = connect(comm)
        if comm.rank == 1:
            Heartbeat(team, 30).close()
        return stops(beats(team, 5, {0: Vote("now")}))[-1]

    assert run_ranks(2, run) == ["now", "now"]


def test_what_is_left_of_a_closed_one_is_not_taken_for_the_next_ones():
    def run(comm):
        team = connect(comm)
        for number in range(5):
            pulse = Heartbeat(team, 30)
            for step in range(3):
                pulse.beat(step + 10 * number, Vote(f"{number}"))
            assert pulse.beat(3 + 10 * number, QUIET).stop == f"{number}"
            pulse.close()

    run_ranks(3, run)


@pytest.mark.parametrize("fan_out", [64, 2])
def test_nothing_is_left_when_all_are_closed(fan_out, monkeypatch):
    monkeypatch.setattr(heartbeat, "_FAN_OUT", fan_out)
    monkeypatch.setattr(heartbeat, "_PARTING_S", 30)

    def run(comm):
        pulse = Heartbeat(connect(comm), 30)
        for step in range(comm.rank, comm.rank + 5):
            pulse.beat(step - comm.rank, Vote(f"{comm.rank}", (step, 1.0)))
        pulse.close()
        return comm

    comms = run_ranks(7, run)
    assert [comm.poll(HEARTBEAT_TAG) for comm in comms] == [None] * 7


def test_one_that_is_closed_does_not_wait_long_for_the_others(monkeypatch):
    monkeypatch.setattr(heartbeat, "_PARTING_S", 0.01)

    def run(comm):
        pulse = Heartbeat(connect(comm), 30)
        pulse.beat(0, QUIET)
        if comm.rank == 1:
            pulse.close()

    run_ranks(3, run)


def test_a_hundred_thousand_beats_among_thousands_of_other_operations():
    """Operations' tags wrap around several times meanwhile."""

    def run(comm):
        team = connect(comm)
        pulse = Heartbeat(team, 60)
        found = []
        for step in range(100_000):
            found.append(pulse.beat(step, QUIET if step < 90_000 else Vote(f"{comm.rank}")).stop)
            if step % 20 == 0:
                operation = team.operation(60)
                call = {"call": "meet", "error": None}
                answer = team.drive(operation.agree(call, lambda calls: calls, "meet"))
                assert answer == call
        return found

    one, two = run_ranks(2, run, timeout_s=250)
    assert one == two
    assert set(one[:90_000]) == {None}
    assert set(one[90_002:]) == {"0"}


def test_they_work_where_only_the_main_thread_may_communicate():
    found = run_ranks(
        3, lambda comm: beats(connect(comm), 9, {2: Vote(f"{comm.rank}")}), concurrent=False
    )
    assert found[0] == found[1] == found[2]


# ------------------------------------------------------------------------------------- in a tree


@pytest.mark.parametrize("size", [4, 7, 13])
def test_in_a_tree_all_know_the_same_and_act_when_the_deepest_has_heard(size, monkeypatch):
    monkeypatch.setattr(heartbeat, "_FAN_OUT", 2)
    meet = threading.Barrier(size)
    depth = heartbeat._depth(size)

    def run(comm):
        pulse = Heartbeat(connect(comm), 30)
        found = []
        for step in range(20):
            meet.wait()
            last = comm.rank == size - 1
            vote = Vote("the last", (step, 7.0)) if last and step >= 3 else QUIET
            found.append(pulse.beat(step, vote))
        pulse.close()
        return found

    everyone = run_ranks(size, run)
    assert all(found == everyone[0] for found in everyone)
    first = stops(everyone[0]).index("the last")
    assert depth <= first - 3 <= 2 * depth
    assert everyone[0][-1].cost_s == 7


def test_in_a_tree_ranks_at_another_step_are_told_of_by_all(monkeypatch):
    monkeypatch.setattr(heartbeat, "_FAN_OUT", 2)
    meet = threading.Barrier(7)

    def run(comm):
        pulse = Heartbeat(connect(comm), 30)
        for step in range(40):
            meet.wait()
            pulse.beat(step + (comm.rank == 6 and step > 20), QUIET)

    (error,) = errors_of(7, run)
    assert error == f"rank 0 called Manager.step(21), but rank 6 called Manager.step(22){SAME}"


def test_the_tree_is_as_deep_as_said():
    assert [heartbeat._depth(size) for size in (1, 2, 65, 66, 4161, 4162)] == [0, 1, 1, 2, 2, 3]


# --------------------------------------------------------------------------------- what goes wrong


def errors_of(size, run):
    """The texts of the CheckpointErrors that the ranks end with; each must."""

    def caught(comm):
        try:
            run(comm)
        except CheckpointError as exc:
            return str(exc)
        return "no error"

    return set(run_ranks(size, caught))


@pytest.mark.parametrize("wrong", [0, 1, 2])
@pytest.mark.parametrize("begin", [0, 5])
def test_ranks_at_different_steps_are_named_everywhere_and_at_the_same_beat(wrong, begin):
    meet = threading.Barrier(3)
    counts = [0] * 3

    def run(comm):
        pulse = Heartbeat(connect(comm), 30)
        for step in range(20):
            meet.wait()  # as training does: who is alone here hangs
            counts[comm.rank] = step
            pulse.beat(step + (comm.rank == wrong and step >= begin), QUIET)

    (error,) = errors_of(3, run)
    theirs = begin + (wrong == 0)
    assert error.startswith(f"rank 0 called Manager.step({theirs}), but rank ")
    assert error.endswith(SAME)
    if wrong:
        assert f"rank {wrong} called Manager.step({begin + 1})" in error
    assert counts[0] == counts[1] == counts[2] <= begin + 4


@pytest.mark.parametrize("saving", ["the others", "one"])
def test_ranks_that_wait_in_a_save_for_one_at_another_step_learn_of_it(saving):
    """One has counted a step more, and so the ranks don't agree when a save is due."""

    def run(comm):
        team = connect(comm)
        pulse = Heartbeat(team, 30)
        for count in range(10_000):
            time.sleep(1e-3)  # trains: so much that nobody is through before the others have begun
            step = count + (comm.rank == 2)
            pulse.beat(step, QUIET)
            if step == 4 and (comm.rank == 2) == (saving == "one"):
                with pulse.listening():
                    operation = team.operation(30)
                    call = {"call": "save step 4", "error": None}
                    team.drive(operation.agree(call, lambda calls: calls, "save"))

    (error,) = errors_of(3, run)
    assert error.endswith(f"but rank 2 called Manager.step(1){SAME}")


def test_a_rank_that_leaves_early_is_told_of_to_all():
    def run(comm):
        pulse = Heartbeat(connect(comm), 30)
        for step in range(10 if comm.rank == 1 else 10_000):
            time.sleep(1e-3)
            pulse.beat(step, QUIET)
        pulse.close()
        raise CheckpointError("rank 1 closed its Manager after step 9, but")

    errors = errors_of(3, run)
    assert all(error.startswith("rank 1 closed its Manager after step 9, but") for error in errors)
    assert len(errors) == 2


def test_a_coordinator_that_leaves_early_is_told_of_to_all():
    def run(comm):
        pulse = Heartbeat(connect(comm), 30)
        for step in range(10 if comm.rank == 0 else 12):
            pulse.beat(step, QUIET)
        pulse.close()

    assert errors_of(3, run) == {
        "no error",
        *(
            f"rank 0 closed its Manager after step 9, but rank {rank} called Manager.step(11){SAME}"
            for rank in (1, 2)
        ),
    }


def test_a_coordinator_that_does_not_come_is_named_in_time():
    ended = threading.Barrier(3)

    def run(comm):
        pulse = Heartbeat(connect(comm), 0.2)
        try:
            for step in range(7, 9 + 3 * (comm.rank > 0)):
                pulse.beat(step, QUIET)
        finally:
            ended.wait()

    late = "rank 0 did not call Manager.step(9) within 0.2 s."
    errors = errors_of(3, run)
    assert errors - {"no error"}
    assert all(error.startswith(late) for error in errors - {"no error"})


def test_the_late_are_named_as_such():
    def run(comm):
        if comm.rank == 1:
            with pytest.raises(Late) as caught:
                beats(connect(comm), 1, timeout_s=0.1)
            assert caught.value.ranks == [0]

    run_ranks(2, run)


def test_after_an_error_each_further_beat_has_the_same():
    def run(comm):
        pulse = Heartbeat(connect(comm), 30)

        def differ():
            for step in range(10_000):
                time.sleep(1e-3)
                pulse.beat(step + comm.rank, QUIET)

        with pytest.raises(CheckpointError) as first:
            differ()
        with pytest.raises(CheckpointError) as second:
            pulse.beat(0, QUIET)
        assert second.value is first.value

    run_ranks(2, run)


def test_a_closed_one_says_so():
    pulse = Heartbeat(connect(Solo()), 30)
    pulse.beat(0, QUIET)
    pulse.close()
    pulse.close()
    with pytest.raises(CheckpointError, match="closed"):
        pulse.beat(1, QUIET)


def test_the_clock_is_the_coordinators_and_never_goes_back(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: pytest.fail("the wall clock may jump"))
    before = time.monotonic()
    clock = [beat.now_s for beat in run_ranks(2, lambda comm: beats(connect(comm), 9))[1]]
    assert clock == sorted(clock)
    assert before <= clock[0] <= clock[-1] <= time.monotonic()
