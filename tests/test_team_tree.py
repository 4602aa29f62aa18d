"""Many ranks: messages go through other ranks, and still only those who are late are named."""

from __future__ import annotations

import pytest

from distckpt.bundle import FANOUT
from distckpt.errors import CheckpointError
from distckpt.team import Late, Team, ToAll
from distckpt.testing import run_ranks

RANKS = 2 * FANOUT + 5


def agree(comm, decide, *, absent=(), timeout_s=20.0):
    if comm.rank in absent:
        return None
    team = Team(comm)
    call = {"call": "meet", "error": None, "rank": comm.rank}
    try:
        return team.drive(team.operation(timeout_s).agree(call, decide, "meet"))
    except CheckpointError as exc:
        return exc


def test_every_rank_gets_its_own_answer_through_others():
    def decide(calls):
        return [("answer", call["rank"]) for call in calls]

    found = run_ranks(RANKS, lambda comm: agree(comm, decide))
    assert found == [("answer", rank) for rank in range(RANKS)]


def test_equal_values_are_seen_once_by_the_coordinator():
    def go(comm):
        team = Team(comm)
        return team.drive(team.operation(20.0).gather(0, {"half": comm.rank % 2}, "say"))

    gathered, *others = run_ranks(RANKS, go)
    assert others == [None] * (RANKS - 1)
    assert [value["half"] for value in gathered] == [rank % 2 for rank in range(RANKS)]
    distinct = sorted((value["half"], list(ranks)) for value, ranks in gathered.distinct())
    assert distinct == [
        (0, list(range(0, RANKS, 2))),
        (1, list(range(1, RANKS, 2))),
    ]


@pytest.mark.parametrize("absent", [{FANOUT}, {FANOUT + 3}, {2, FANOUT, 2 * FANOUT + 1}])
def test_who_is_late_is_named_and_not_who_waits_behind_it(absent):
    found = run_ranks(
        RANKS, lambda comm: agree(comm, lambda _: ToAll(1), absent=absent, timeout_s=3.0)
    )
    for rank, error in enumerate(found):
        if rank not in absent:
            assert isinstance(error, Late)
            assert error.ranks == sorted(absent)


def test_what_raises_at_the_coordinator_reaches_ranks_behind_others():
    def decide(calls):
        raise CheckpointError(f"no, for {len(calls)}")

    found = run_ranks(RANKS, lambda comm: agree(comm, decide))
    assert {str(error) for error in found} == {f"no, for {RANKS}"}
