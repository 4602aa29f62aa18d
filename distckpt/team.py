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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distckpt import codec
from distckpt.bundle import (
    FANOUT,
    Bundle,
    Collector,
    Distinct,
    children,
    is_leaf,
    parent,
    subtree,
)
from distckpt.coordinator import (
    BACKGROUND_TAG,
    Coordinator,
    MpiComm,
    Solo,
    as_mpi,
    backlog,
    duplicate,
    fills_memory,
    keep,
    kept,
    launched_by_mpi,
    poll_into,
    world,
)
from distckpt.errors import CheckpointError, from_plain, ranks_text, to_plain
from distckpt.waiting import Backlog, T, Waiting

logger = logging.getLogger(__name__)
COORDINATOR = 0
_STEPS = 8  # message kinds of one operation
_OPERATIONS = BACKGROUND_TAG // _STEPS - 1
# The tags that this leaves free are for what outlives operations.
HEARTBEAT_TAG = _OPERATIONS * _STEPS
# How often one looks for a message that was announced: MPI brings it while somebody looks.
_POLLS = 20
# How long the coordinator waits for ranks to say that they are there, before it names the late: in
# all, less than the others wait for it, and since the last has answered.
_ROLL_CALL_S, _QUIET_S = 10.0, 2.0
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


class Gathered(list[Any]):
    """The values that the ranks have sent, by rank; equal ones are one object.

    Args:
        column: The values as bytes.
    """

    def __init__(self, column: Distinct) -> None:
        self._values = [codec.unpack(payload, copy=False) for payload in column.payloads]
        self._of_rank = column.of_rank
        super().__init__([self._values[index] for index in column.of_rank.tolist()])

    def distinct(self) -> list[tuple[Any, Sequence[int]]]:
        """Return each distinct value, and the ranks that have sent it."""
        if len(self._values) == 1:
            return [(self._values[0], range(len(self)))]
        order = np.argsort(self._of_rank, kind="stable")
        edges = np.searchsorted(self._of_rank[order], np.arange(1, len(self._values)))
        found = np.split(order, edges)
        return [(value, some.tolist()) for value, some in zip(self._values, found, strict=True)]

    def errors(self) -> dict[int, Any]:
        """Return rank → its ``"error"``, for the ranks that have one."""
        found = {
            rank: value["error"]
            for value, ranks in self.distinct()
            if value["error"] is not None
            for rank in ranks
        }
        return {rank: found[rank] for rank in sorted(found)}


@dataclass(frozen=True, slots=True)
class ToAll:
    """One value for all ranks, instead of a list of thousands that are the same."""

    value: Any


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
        self._asked: int | None = None  # the step of the last gather
        self._direct = False  # ranks were late: nothing goes down the tree any more
        self._dropped: dict[tuple[int, int], int] = {}  # (tag, rank) → messages of no use

    def in_background(self) -> Operation:
        """The same operation, on the messages for the background."""
        return Operation(self._coordinator, self.number, self.timeout_s, background=True)

    def agree(
        self,
        call: Mapping[str, Any],
        decide: Callable[[Gathered], Sequence[Any] | ToAll],
        what: str,
    ) -> Waiting[Any]:
        """Have the coordinator decide from every rank's part of a call. Uses the steps 0 and 1.

        Args:
            call: Plain. ``call["call"]`` says what is called, as text, and must be the same on all
                ranks; ``call["error"]`` is None, or what went wrong before (`to_plain`).
            decide: Runs at the coordinator: calls by rank → answers by rank, or one `ToAll`. What
                it raises, all ranks raise.
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
            yield from self.scatter(1, ToAll({"late": late.told}), what)
            raise
        answers: Sequence[Any] | ToAll | None = None
        if calls is not None:
            try:
                _check_same_call(calls)
                decided = decide(calls)
                if isinstance(decided, ToAll):
                    answers = ToAll({"error": None, "answer": decided.value})
                else:
                    answers = [{"error": None, "answer": answer} for answer in decided]
            except Exception as exc:  # whatever it is, no rank may be left waiting
                answers = ToAll({"error": to_plain(exc)})
                if not isinstance(exc, CheckpointError):
                    logger.exception("%s failed at the coordinator", what)
        answer = yield from self.scatter(1, answers, f"answer to {what}")
        if "late" in answer:
            raise Late(*answer["late"])
        if answer["error"] is not None:
            raise from_plain(answer["error"])
        return answer["answer"]

    def gather(self, step: int, value: object, what: str) -> Waiting[Gathered | None]:
        """Bring every rank's value to the coordinator; equal ones travel, and are decoded, once.

        Returns:
            The values by rank at the coordinator, None elsewhere.

        Raises:
            Late: At the coordinator, naming the ranks whose value has not come; `what` they did not
                do.
        """
        found = yield from self.gather_bytes(step, [codec.pack(value)], what)
        return None if found is None else Gathered(found[0])

    def scatter(self, step: int, values: Sequence[Any] | ToAll | None, what: str) -> Waiting[Any]:
        """Send each rank its own value from the coordinator; `values` is None elsewhere.

        Raises:
            Late: Elsewhere, when the coordinator does not answer.
        """
        column = None
        if isinstance(values, ToAll):
            return (yield from self.broadcast(step, values.value, what))
        if values is not None and self.size == 1:
            return values[0]
        if values is not None:
            distinct = {id(value): value for value in values}
            number = {key: place for place, key in enumerate(distinct)}
            index = np.array([number[id(value)] for value in values], np.int64)
            column = [Distinct([codec.pack(value) for value in distinct.values()], index)]
        found = yield from self.scatter_bytes(step, column, what)
        return codec.unpack(found[0], copy=False) if values is None else values[self.rank]

    def broadcast(self, step: int, value: object, what: str) -> Waiting[Any]:
        """Send one value from the coordinator to all; `value` is ignored elsewhere.

        Raises:
            Late: Elsewhere, when it does not come.
        """
        column = None
        if self.size == 1:
            return value
        if self.rank == COORDINATOR:
            column = [Distinct([codec.pack(value)], np.zeros(self.size, np.int64))]
        found = yield from self.scatter_bytes(step, column, what)
        return value if column is not None else codec.unpack(found[0], copy=False)

    def gather_bytes(
        self, step: int, contents: Sequence[bytes], what: str
    ) -> Waiting[list[Distinct] | None]:
        """Bring several contents of every rank to the coordinator, in columns, up a tree.

        Returns:
            The columns at the coordinator, None elsewhere.

        Raises:
            Late: As in `gather`.
        """
        self._asked = step
        collector = Collector(len(contents))
        zero = np.zeros(1, np.int64)
        collector.add(
            Bundle(np.array([self.rank]), [Distinct([content], zero) for content in contents])
        )
        missing = subtree(self.rank, self.size)[1] - self.rank - 1
        deadline = time.monotonic() + self.timeout_s
        while missing:
            found = self._receive_bundle(step)
            if found is not None:
                if not found.columns:  # the coordinator asks who is there
                    self._post(COORDINATOR, step, Bundle(np.array([self.rank]), []))
                    return None
                collector.add(found)
                missing -= len(found.ranks)
            elif time.monotonic() <= deadline:
                yield
            elif self.rank == COORDINATOR:
                yield from self._name_late(step, collector, what)
                missing = 0
            elif time.monotonic() <= deadline + _GRACE_S:
                yield
            else:  # the coordinator has given up, too
                return None
        bundle = collector.bundle()
        if self.rank == COORDINATOR:
            return list(bundle.columns)
        self._post(parent(self.rank), step, bundle)
        return None

    def _name_late(self, step: int, collector: Collector, what: str) -> Waiting[None]:
        """Find out who is late: who is there may only wait for others to hand its content on.

        Raises:
            Late: Unless all has come in the meantime.
        """
        absent = set(range(self.size)) - set(collector.ranks().tolist())
        incomplete = set(absent)
        relayed = [rank for rank in absent if not is_leaf(rank, self.size) or parent(rank)]
        for rank in relayed:
            self._post(rank, step, Bundle(np.array([COORDINATOR]), []))
        asked_at = heard_at = time.monotonic()
        while relayed and incomplete:
            found = self._receive_bundle(step)
            now = time.monotonic()
            if found is None:
                if now > heard_at + _QUIET_S or now > asked_at + _ROLL_CALL_S:
                    break
                yield
                continue
            heard_at = now
            absent.difference_update(found.ranks.tolist())
            if found.columns:
                collector.add(found)
                incomplete.difference_update(found.ranks.tolist())
        if incomplete:
            self._direct = True
            raise Late(absent or incomplete, self.timeout_s, what)

    def scatter_bytes(
        self, step: int, columns: Sequence[Distinct] | None, what: str
    ) -> Waiting[list[bytes]]:
        """Send each rank its own contents from the coordinator; `columns` is None elsewhere.

        Down a tree; but where ranks were late, to each rank by itself: the late can't hand it on.

        Raises:
            Late: Elsewhere, when the coordinator does not answer.
        """
        if columns is None:
            bundle = yield from self._answer(step, what)
        else:
            bundle = Bundle(np.arange(self.size), columns)
        if self._direct:
            for rank in range(self.size):
                if rank != self.rank:
                    self._post(rank, step, bundle.take(np.array([rank])))
        else:
            for child in children(self.rank, self.size):
                rows = np.searchsorted(bundle.ranks, subtree(child, self.size))
                if rows[0] < rows[1]:
                    self._post(child, step, bundle.take(np.arange(rows[0], rows[1])))
        row = int(np.searchsorted(bundle.ranks, self.rank))
        return [column[row] for column in bundle.columns]

    def _answer(self, step: int, what: str) -> Waiting[Bundle]:
        """Wait for what the coordinator sends; meanwhile, say that this rank is there if asked."""
        deadline = time.monotonic() + self.timeout_s + _GRACE_S
        while True:
            found = self._receive_bundle(step)
            if found is not None:
                return found
            if self._asked is not None and self.size > FANOUT:
                asked = self._receive_bundle(self._asked)
                if asked is not None and not asked.columns:
                    self._post(COORDINATOR, self._asked, Bundle(np.array([self.rank]), []))
            if time.monotonic() > deadline:
                raise Late([COORDINATOR], self.timeout_s + _GRACE_S, what)
            yield

    def _post(self, dest: int, step: int, bundle: Bundle) -> None:
        self._coordinator.post(dest, self._first_tag + step, bundle.encode(self.number))

    def _receive_bundle(self, step: int) -> Bundle | None:
        while True:
            found = self._coordinator.poll(self._first_tag + step, None)
            if found is None:
                return None
            number, bundle = Bundle.decode(found[1])
            # Tags are reused: what is left of an operation that was given up is dropped.
            if number == self.number:
                return bundle

    def send(self, dest: int, step: int, value: object, parts: Sequence[memoryview] = ()) -> None:
        """Send one value to one rank, and memory with it.

        Args:
            dest: The rank.
            step: Tells the messages of the operation apart.
            value: A plain value.
            parts: Contiguous memory, taken by one `receive_into` each. It may not change until the
                other rank says that it has it.
        """
        tag = self._first_tag + step
        self._coordinator.post(dest, tag, codec.pack((self.number, value, len(parts))))
        fills = fills_memory(self._coordinator)
        for part in parts:
            content = part.cast("B")
            # Not every coordinator sends what is no bytes.
            self._coordinator.post(dest, tag, content if fills else bytes(content))  # type: ignore[arg-type]

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

    def receive_into(self, source: int, step: int, memory: memoryview, what: str) -> Waiting[None]:
        """Wait for the next of the parts that came with a value, and put it into memory.

        Args:
            source: The rank that it is from.
            step: As in `send`.
            memory: Contiguous, writable, and as long as what was sent.
            what: What a late rank did not do.

        Raises:
            Late: It did not come.
        """
        deadline = time.monotonic() + self.timeout_s
        content = memory.cast("B")
        tag = self._first_tag + step
        while not any(poll_into(self._coordinator, tag, source, content) for _ in range(_POLLS)):
            if time.monotonic() > deadline:
                raise Late([source], self.timeout_s, what)
            yield

    def _receive(self, step: int, source: int | None) -> tuple[int, Any] | None:
        tag = self._first_tag + step
        while True:
            found = self._coordinator.poll(tag, source)
            if found is None:
                return None
            origin, payload = found
            if self._dropped.get((tag, origin)):
                self._dropped[tag, origin] -= 1
                continue
            number, value, parts = codec.unpack(payload, copy=False)
            if number == self.number:
                return origin, value
            # Tags are reused: what is left of an operation that was given up is dropped.
            self._dropped[tag, origin] = parts


def _check_same_call(calls: Gathered) -> None:
    ranks: dict[str, list[int]] = {}
    for call, found in calls.distinct():
        ranks.setdefault(call["call"], []).extend(found)
    if len(ranks) > 1:
        lines = [f"{ranks_text(sorted(found))}: {text}" for text, found in ranks.items()]
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
