"""The ranks of a job together: gather, scatter and broadcast with time-outs that name the late.

All of it is made of a `Coordinator`'s messages, as generators that yield while nothing has come. So
the same protocol can be driven by a background thread, or step by step by the main thread where MPI
allows no other.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from distckpt import codec
from distckpt.coordinator import (
    BACKGROUND_TAG,
    Coordinator,
    MpiComm,
    Solo,
    as_mpi,
    backlog,
    duplicate,
    keep,
    kept,
    launched_by_mpi,
    world,
)
from distckpt.errors import CheckpointError, from_plain, ranks_text, to_plain
from distckpt.waiting import Backlog, T, Waiting

logger = logging.getLogger(__name__)
COORDINATOR = 0
_STEPS = 8  # message kinds of one operation
_OPERATIONS = BACKGROUND_TAG // _STEPS
# Above so many ranks a broadcast goes down a tree.
_FLAT_BROADCAST = 64
# How much longer than the coordinator the others wait, so that its answer, which names the late,
# arrives first.
_GRACE_S = 15.0
# Left with a user's coordinator, so that its team is found again.
_TEAM_ATTRIBUTE = "_distckpt_team"


class Late(CheckpointError):
    """Ranks did not answer in time.

    Attributes:
        ranks: Who.
        told: What makes an equal one on the ranks that are told of it.
    """

    def __init__(self, ranks: Iterable[int], waited_s: float, what: str) -> None:
        self.ranks = sorted(ranks)
        self.told = (self.ranks, waited_s, what)
        super().__init__(
            f"{ranks_text(self.ranks, limit=20)} did not {what} within {waited_s:.3g} s. Every "
            "rank must make the same calls; a rank that needs longer needs a larger timeout_s"
        )


class Team:
    """The ranks of a job, and what they remember between calls.

    Attributes:
        coordinator: Their messages.
        memory: Kept for whoever plans; by topic.
        backlog: The saves whose commit is driven by the main thread, also those of other teams that
            it belongs to.
    """

    def __init__(self, coordinator: Coordinator, backlog: Backlog | None = None) -> None:
        self.coordinator = coordinator
        self.memory: dict[str, Any] = {}
        self.backlog = Backlog() if backlog is None else backlog
        self._operations = 0

    @property
    def rank(self) -> int:
        """This rank."""
        return self.coordinator.rank

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.coordinator.size

    def operation(self, timeout_s: float) -> Operation:
        """Begin the next operation; every rank begins the same ones in the same order."""
        self._operations += 1
        return Operation(self.coordinator, self._operations, timeout_s)

    def drive(self, protocol: Waiting[T]) -> T:
        """Run a protocol to its end in the calling thread."""
        return self.backlog.drive(protocol)


class Operation:
    """One operation that all ranks take part in: gather, scatter and broadcast of plain values.

    Args:
        coordinator: The messages.
        number: The same on every rank; part of each message, so that a late one of another
            operation is not mistaken.
        timeout_s: How long any wait may take.
        background: Whether it uses the messages for saves in the background.
    """

    def __init__(
        self, coordinator: Coordinator, number: int, timeout_s: float, *, background: bool = False
    ) -> None:
        self.number = number
        self.timeout_s = timeout_s
        self.rank = coordinator.rank
        self.size = coordinator.size
        self._coordinator = coordinator
        self._first_tag = number % _OPERATIONS * _STEPS + BACKGROUND_TAG * background

    def in_background(self) -> Operation:
        """The same operation, on the messages for the background."""
        return Operation(self._coordinator, self.number, self.timeout_s, background=True)

    def agree(
        self, call: Mapping[str, Any], decide: Callable[[list[Any]], list[Any]], what: str
    ) -> Waiting[Any]:
        """Have the coordinator decide from every rank's part of a call. Uses the steps 0 and 1.

        Args:
            call: Plain. ``call["call"]`` says what is called, as text, and must be the same on all
                ranks; ``call["error"]`` is None, or what went wrong before (`to_plain`).
            decide: Runs at the coordinator: calls by rank → answers by rank. What it raises, all
                ranks raise.
            what: What a late rank did not do.

        Returns:
            This rank's answer.

        Raises:
            CheckpointError: What `decide` raised; ranks that called different things; `Late`.
        """
        try:
            calls = yield from self.gather(0, call, what)
        except Late as late:
            # The late ones find this waiting when they come.
            yield from self.scatter(1, [{"late": late.told}] * self.size, what)
            raise
        answers: list[Any] | None = None
        if calls is not None:
            try:
                _check_same_call(calls)
                answers = [{"error": None, "answer": answer} for answer in decide(calls)]
            except Exception as exc:  # whatever it is, no rank may be left waiting
                answers = [{"error": to_plain(exc)}] * self.size
                if not isinstance(exc, CheckpointError):
                    logger.exception("%s failed at the coordinator", what)
        answer = yield from self.scatter(1, answers, f"answer to {what}")
        if "late" in answer:
            raise Late(*answer["late"])
        if answer["error"] is not None:
            raise from_plain(answer["error"])
        return answer["answer"]

    def gather(self, step: int, value: object, what: str) -> Waiting[list[Any] | None]:
        """Bring every rank's value to the coordinator.

        Returns:
            The values by rank at the coordinator, None elsewhere.

        Raises:
            Late: At the coordinator, naming the ranks whose value has not come; `what` they did not
                do.
        """
        if self.rank != COORDINATOR:
            self.send(COORDINATOR, step, value)
            return None
        values: list[Any] = [None] * self.size
        missing = set(range(self.size)) - {self.rank}
        values[self.rank] = value
        deadline = time.monotonic() + self.timeout_s
        while missing:
            found = self._receive(step, None)
            if found is not None:
                source, values[source] = found
                missing.discard(source)
            elif time.monotonic() > deadline:
                raise Late(missing, self.timeout_s, what)
            else:
                yield
        return values

    def scatter(self, step: int, values: list[Any] | None, what: str) -> Waiting[Any]:
        """Send each rank its own value from the coordinator; `values` is None elsewhere.

        Raises:
            Late: Elsewhere, when the coordinator does not answer.
        """
        if values is None:
            return (yield from self.receive(COORDINATOR, step, what, grace_s=_GRACE_S))
        for rank in range(self.size):
            if rank != self.rank:
                self.send(rank, step, values[rank])
        return values[self.rank]

    def broadcast(self, step: int, value: object, what: str) -> Waiting[Any]:
        """Send one value from the coordinator to all; `value` is ignored elsewhere.

        Raises:
            Late: Elsewhere, when it does not come.
        """
        tree = self.size > _FLAT_BROADCAST
        if self.rank != COORDINATOR:
            parent = (self.rank - 1) // 2 if tree else COORDINATOR
            value = yield from self.receive(parent, step, what, grace_s=_GRACE_S)
        if tree:
            children = [rank for rank in (2 * self.rank + 1, 2 * self.rank + 2) if rank < self.size]
        else:
            children = [rank for rank in range(self.size) if rank != self.rank]
            children = children if self.rank == COORDINATOR else []
        for rank in children:
            self.send(rank, step, value)
        return value

    def send(self, dest: int, step: int, value: object) -> None:
        """Send one value to one rank."""
        payload = codec.pack((self.number, value))
        self._coordinator.post(dest, self._first_tag + step, payload)

    def receive(self, source: int, step: int, what: str, *, grace_s: float = 0.0) -> Waiting[Any]:
        """Wait for one value from one rank.

        Raises:
            Late: It did not come.
        """
        deadline = time.monotonic() + self.timeout_s + grace_s
        while True:
            found = self._receive(step, source)
            if found is not None:
                return found[1]
            if time.monotonic() > deadline:
                raise Late([source], self.timeout_s + grace_s, what)
            yield

    def _receive(self, step: int, source: int | None) -> tuple[int, Any] | None:
        while True:
            found = self._coordinator.poll(self._first_tag + step, source)
            if found is None:
                return None
            origin, payload = found
            # Tags are reused: what is left of an operation that was given up is dropped.
            number, value = codec.unpack(payload, copy=False)
            if number == self.number:
                return origin, value


def _check_same_call(calls: list[Any]) -> None:
    ranks: dict[str, list[int]] = {}
    for rank, call in enumerate(calls):
        ranks.setdefault(call["call"], []).append(rank)
    if len(ranks) > 1:
        lines = [f"{ranks_text(found)}: {text}" for text, found in ranks.items()]
        raise CheckpointError(
            "the ranks made different calls; every rank must make the same ones in the same order:"
            "\n  " + "\n  ".join(lines)
        )


def connect(comm: object = None, *, timeout_s: float = 600.0) -> Team:
    """Find the team to work with.

    Args:
        comm: An mpi4py communicator, a `Coordinator`, a `Team`, or None: then ``MPI.COMM_WORLD``
            when an MPI launcher started this process with more than one rank, else this process
            alone.
        timeout_s: How long to wait for the other ranks at the first call.

    Raises:
        CheckpointError: None was given under torchrun with several ranks, `comm` is something else,
            or not all ranks came in time.

    Returns:
        The team; the same for the same communicator.

    The first call with a communicator duplicates it, and so is collective.
    """
    if isinstance(comm, Team):
        return comm
    if comm is None:
        if launched_by_mpi():
            return _mpi_team(world(), timeout_s)
        ranks = os.environ.get("WORLD_SIZE", "1")
        if ranks.isdigit() and int(ranks) > 1:
            raise CheckpointError(
                f"WORLD_SIZE={ranks}: this looks like a job of {ranks} processes that MPI did not "
                "start. Pass comm= (an mpi4py communicator or any Coordinator), or "
                "comm=distckpt.Solo() if each process saves alone"
            )
        return _alone()
    communicator = as_mpi(comm)
    if communicator is not None:
        if not communicator:
            raise CheckpointError(
                "comm is MPI.COMM_NULL: this rank is not in that communicator, and takes no part "
                "in its saves and loads"
            )
        return _mpi_team(communicator, timeout_s)
    if isinstance(comm, Coordinator):
        team = getattr(comm, _TEAM_ATTRIBUTE, None)
        if not isinstance(team, Team):
            team = Team(comm)
            setattr(comm, _TEAM_ATTRIBUTE, team)
        return team
    raise CheckpointError(
        f"comm={comm!r}: expected an mpi4py communicator, a distckpt Coordinator, or None"
    )


# A process alone has no communicator that its team could be kept with. One for each thread, since
# what a team remembers is not made for several.
_ALONE = threading.local()


def _alone() -> Team:
    """Return the team of this process alone, in this thread; make it at the first call."""
    team: Team | None = getattr(_ALONE, "team", None)
    if team is None:
        team = _ALONE.team = Team(Solo())
    return team


def _mpi_team(comm: MpiComm, timeout_s: float) -> Team:
    """Return the team kept with a communicator; make it at the first call.

    MPI libraries stop at about 2,000 communicators: the duplicates are made once.
    """
    team = kept(comm)
    if not isinstance(team, Team):
        coordinator = duplicate(comm, timeout_s=timeout_s)
        team = Team(coordinator, backlog())
        keep(comm, team, coordinator)
    return team
