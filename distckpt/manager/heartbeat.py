"""One small message a training step, by which all ranks decide alike.

No rank may decide by its own clock, or by a signal that only it got, when a save begins: the others
would not be in it. So the coordinator tells all ranks at each step what it knows, and what it told
at step n all ranks act on at step n + 1. A rank waits for nothing but the coordinator's step
before: where ranks train together, that has long come. Another rank speaks up only when it has
something new to say, and the coordinator's next message carries it.

Above 65 ranks messages go down a tree, and what ranks say goes up it, merged. All ranks act when
the deepest have heard: at step n + 2 up to 4,161 ranks.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from distckpt.coordinator import Coordinator
from distckpt.errors import CheckpointError
from distckpt.team import COORDINATOR, HEARTBEAT_TAG, Late, Team
from distckpt.waiting import Waiting

_FAN_OUT = 64
# What a message is: down and up the tree, in this order.
_BEAT, _VERDICT, _NEWS, _COMPLAINT, _FAREWELL, _GONE = range(6)
_DOWN = frozenset({_BEAT, _VERDICT})
# Which Manager, kind, number of the beat, step, clock, number of a save, its cost; then UTF-8.
_HEAD = struct.Struct("<IBQqdqd")
_NO_COST = (-1, 0.0)  # number of the save, seconds
_SAME_STEPS = "every rank must make the same steps in the same order"
# How long one that is closed waits for the others to be, too.
_PARTING_S = 1.0
# Found in a team's memory.
_TOPIC = "heartbeat"


class Vote(NamedTuple):
    """What one rank has to say at a step.

    Attributes:
        stop: Why training should stop, or None.
        cost: What its newest measured save has cost: the save's number (they rise, and are the same
            on all ranks) and seconds. None while it has none. Only what is new is sent.
    """

    stop: str | None = None
    cost: tuple[int, float] | None = None


class Beat(NamedTuple):
    """What all ranks know alike at a step.

    Attributes:
        now_s: The coordinator's monotonic clock, in seconds.
        stop: Why training is to stop: the first reason that reached the coordinator, on any rank.
            Never withdrawn. None if it is to go on.
        cost_s: What the newest save has cost, in seconds; the most of those ranks that have told.
            0 while none has.
    """

    now_s: float
    stop: str | None = None
    cost_s: float = 0.0


class _Message(NamedTuple):
    channel: int
    kind: int
    number: int
    step: int
    now_s: float
    save: int
    cost_s: float
    text: str

    def packed(self) -> bytes:
        return _HEAD.pack(*self[:-1]) + self.text.encode()


class Heartbeat:
    """The messages of one Manager.

    Nothing is sent before the first beat: a Manager that only reads takes no part in anything.

    Args:
        team: The ranks.
        timeout_s: How long a rank waits for the coordinator's step before.
    """

    def __init__(self, team: Team, timeout_s: float) -> None:
        self._team = team
        self._timeout_s = timeout_s
        rank, size = team.rank, team.size
        self._leads = rank == COORDINATOR
        self._parent = (rank - 1) // _FAN_OUT
        first = rank * _FAN_OUT + 1
        self._children = range(first, max(first, min(first + _FAN_OUT, size)))
        self._lag = _depth(size)
        self._post: _Post | None = None
        self._channel = 0
        self._is_closed = False
        self._count = 0  # of beats
        self._step = 0  # of the last one
        self._steps: dict[int, int] = {}  # of the beats that we have not acted on yet
        self._heard: deque[_Message] = deque()  # what the coordinator says, to be acted on
        self._now: _Message | None = None  # what is acted on
        self._vote = Vote()  # our last
        self._stop = ""  # what we know, and others may not
        self._cost = _NO_COST
        self._has_news = False
        self._complaint = ""
        self._left: dict[int, _Message] = {}  # who closed first, of those behind a neighbour
        self._parted: set[int] = set()  # neighbours that are closed
        self._error: CheckpointError | None = None

    def beat(self, step: int, vote: Vote) -> Beat:
        """Collective, though nobody waits for all. Say what is new here, and hear what all know.

        Args:
            step: The training step; the same on all ranks.
            vote: This rank's.

        Returns:
            The same on all ranks: what the coordinator knew one step ago (at the first step, and
            always if it is alone: now; above 65 ranks: as many steps ago as the tree is deep).

        Raises:
            CheckpointError: The same on all ranks: they are at different steps, or some have closed
                their Managers and others have not.
            Late: The coordinator is.
        """
        if self._error is not None:
            raise self._error
        if self._post is None:
            self._post = _post_of(self._team)
            self._channel = self._post.open()
        number = self._count
        self._count = number + 1
        self._step = self._steps[number] = step
        if vote != self._vote:
            self._vote = vote
            self._note(vote.stop or "", vote.cost or _NO_COST)
        if self._children:
            self._look()
        if self._leads:
            complaint = self._judged()
            message = self._message(_VERDICT if complaint else _BEAT, number, complaint)
            self._hand_down(message)
            self._heard.append(message)
        elif self._has_news:
            self._has_news = False
            self._send(self._parent, self._message(_NEWS, number))
        wanted = max(0, number - self._lag)
        if not self._heard:
            self._look()
        if not self._act(wanted):
            self._team.drive(self._wait(wanted))
        now = self._now
        if now is None:
            raise CheckpointError("the heartbeat has lost a message; this is a bug")
        return Beat(now.now_s, now.text or None, now.cost_s)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear of ranks that are at another step also while this one waits for them in a save.

        Raises, inside: what `beat` would raise at the next step.
        """
        if self._post is None or self._team.size == 1:
            yield
            return
        ended = False

        def listen() -> bool:
            if not ended:
                self._look()
                self._raise_verdict()
            return ended

        self._team.backlog.add(listen)
        try:
            yield
        finally:
            ended = True
            self._team.backlog.advance()

    def close(self) -> None:
        """Tell the others that this rank makes no further step. Never raises; not collective.

        It waits a second at most for them to say so, too: then nothing is left that MPI would have
        to keep for nobody.
        """
        if self._is_closed:
            return
        if self._post is not None:
            self._look()
            self._is_closed = True
            if self._error is None:
                text = f"rank {self._team.rank} closed its Manager after step {self._step}"
                farewell = self._message(_FAREWELL, self._count - 1, text)
                neighbours = [*self._children, *([] if self._leads else [self._parent])]
                for other in neighbours:
                    self._send(other, farewell)
                self._team.drive(self._part(set(neighbours)))
            self._post.close(self._channel)
        self._is_closed = True
        self._error = self._error or CheckpointError("this Manager is closed")

    def _part(self, neighbours: set[int]) -> Waiting[None]:
        deadline = time.monotonic() + _PARTING_S
        while True:
            self._look()
            if neighbours <= self._parted or time.monotonic() > deadline:
                return
            yield

    # ------------------------------------------------------------------------------- what is said

    def _message(self, kind: int, number: int, text: str = "") -> _Message:
        save, cost_s = self._cost
        return _Message(
            self._channel,
            kind,
            number,
            self._step,
            time.monotonic(),
            save,
            cost_s,
            text or self._stop,
        )

    def _send(self, rank: int, message: _Message) -> None:
        self._team.coordinator.post(rank, HEARTBEAT_TAG, message.packed())

    def _hand_down(self, message: _Message) -> None:
        payload = message.packed()
        post = self._team.coordinator.post
        for child in self._children:
            post(child, HEARTBEAT_TAG, payload)

    # ------------------------------------------------------------------------------ what is heard

    def _look(self) -> None:
        """Take in what has come."""
        while self._post is not None and (found := self._post.take(self._channel)) is not None:
            source, message = found
            if message.kind in _DOWN:
                self._heard.append(message)
                if not self._children:
                    return  # a leaf is told one thing a step
                self._hand_down(message)
            else:
                self._hear(source, message)

    def _note(self, stop: str, cost: tuple[int, float]) -> None:
        """Note what some rank has said."""
        if stop and not self._stop:
            self._stop, self._has_news = stop, True
        if cost > self._cost:
            self._cost, self._has_news = cost, True

    def _hear(self, source: int, message: _Message) -> None:
        """Take in what another rank than the coordinator says."""
        if message.kind == _NEWS:
            self._note(message.text, (message.save, message.cost_s))
        elif message.kind == _COMPLAINT:
            self._complaint = self._complaint or message.text
            if not self._leads:
                self._send(self._parent, message)
        else:
            earlier = self._left.get(source, message)
            self._left[source] = min(earlier, message, key=lambda farewell: farewell.number)
            if message.kind == _FAREWELL:
                self._parted.add(source)
            if not self._leads and source != self._parent and not self._is_closed:
                self._send(self._parent, message._replace(kind=_GONE))

    def _act(self, wanted: int) -> bool:
        """Act on what the coordinator has said at a beat. Returns whether it is here yet."""
        while self._heard and self._heard[0].number <= wanted:
            now = self._now = self._heard.popleft()
            step = self._steps.pop(now.number, now.step)
            if now.kind != _BEAT or step != now.step:
                self._compare(now, step)
        return self._now is not None and self._now.number == wanted

    def _compare(self, theirs: _Message, ours: int) -> None:
        if theirs.kind == _VERDICT:
            self._error = CheckpointError(theirs.text)
            raise self._error
        if ours != theirs.step and not self._complaint:
            self._complaint = (
                f"rank {COORDINATOR} called Manager.step({theirs.step}), but rank "
                f"{self._team.rank} called Manager.step({ours})"
            )
            self._send(self._parent, self._message(_COMPLAINT, theirs.number, self._complaint))

    def _judged(self) -> str:
        """At the coordinator: what is wrong if not all ranks are at the same step, else nothing."""
        if self._left and not self._complaint:
            gone = [left.text for left in self._left.values() if left.number < self._count - 1]
            if gone:
                here = f"rank {COORDINATOR} called Manager.step({self._step})"
                self._complaint = f"{', '.join(gone)}, but {here}"
        return self._complaint and f"{self._complaint}: {_SAME_STEPS}"

    def _raise_verdict(self) -> None:
        """Where this rank waits for others that don't come: no longer than needed."""
        if self._leads and (complaint := self._judged()):
            verdict = self._message(_VERDICT, self._count, complaint)
            self._hand_down(verdict)
            self._heard.append(verdict)
        for message in self._heard:
            self._compare(message, self._steps.get(message.number, message.step))

    def _wait(self, wanted: int) -> Waiting[None]:
        deadline = time.monotonic() + self._timeout_s
        while True:
            self._look()
            if self._act(wanted):
                return
            left = self._left.get(self._parent)
            if left is not None:
                here = f"rank {self._team.rank} called Manager.step({self._step})"
                raise CheckpointError(f"{left.text}, but {here}: {_SAME_STEPS}")
            if time.monotonic() > deadline:
                what = f"call Manager.step({self._steps[wanted]})"
                raise Late([self._parent], self._timeout_s, what)
            yield


class _Post:
    """All heartbeats of a team: one tag, sorted by Manager.

    So there may be any number of Managers, and none ever waits for a tag.
    """

    def __init__(self, coordinator: Coordinator) -> None:
        self._poll = coordinator.poll
        self._opened = 0
        self._boxes: dict[int, deque[tuple[int, _Message]]] = {}

    def open(self) -> int:
        """Number a Manager; the same on all ranks, as they make their first beats in one order."""
        self._opened += 1
        self._boxes.setdefault(self._opened, deque())
        return self._opened

    def close(self, channel: int) -> None:
        """Drop what still comes for a Manager."""
        self._boxes.pop(channel, None)

    def take(self, channel: int) -> tuple[int, _Message] | None:
        """Take a Manager's next message, and its source; None if there is none."""
        box = self._boxes[channel]
        while not box:
            found = self._poll(HEARTBEAT_TAG)
            if found is None:
                return None
            source, payload = found
            text = payload[_HEAD.size :].decode() if len(payload) > _HEAD.size else ""
            message = _Message._make((*_HEAD.unpack_from(payload), text))
            if message.channel == channel:
                return source, message
            # Another rank may be ahead, and have opened what is not open here yet.
            if message.channel > self._opened or message.channel in self._boxes:
                self._boxes.setdefault(message.channel, deque()).append((source, message))
        return box.popleft()


def _post_of(team: Team) -> _Post:
    post = team.memory.get(_TOPIC)
    if not isinstance(post, _Post):
        post = team.memory[_TOPIC] = _Post(team.coordinator)
    return post


def _depth(size: int) -> int:
    """How many messages the last rank is away from the coordinator."""
    depth, rank = 0, size - 1
    while rank > 0:
        rank = (rank - 1) // _FAN_OUT
        depth += 1
    return depth
