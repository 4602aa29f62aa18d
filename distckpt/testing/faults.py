"""Faults: at which point of a save or a load something goes wrong, and what."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Protocol

from distckpt.errors import StoreError
from distckpt.store import Buffer


@dataclass(frozen=True, slots=True)
class Point:
    """A point that a rank passes: operations of some kinds on names that match.

    Attributes:
        kinds: Kinds of operations of a `FaultyStore` (``"write"``), a `FaultyCoordinator`
            (``"send"``) or `FaultyFiles` (``"os.fsync"``); see there.
        name: A glob for the object's, message's or file's name.
        after: Whether the point is passed when the operation has been done, not before it is.
        text: What it is called in messages.
    """

    kinds: str | tuple[str, ...]
    name: str = "*"
    after: bool = False
    text: str = ""

    def __str__(self) -> str:
        kinds = self.kinds if isinstance(self.kinds, str) else "|".join(self.kinds)
        return self.text or f"{'after' if self.after else 'before'} {kinds} {self.name}"

    def fits(self, kind: str, name: str) -> bool:
        """Whether an operation is one of these."""
        kinds = (self.kinds,) if isinstance(self.kinds, str) else self.kinds
        return kind in kinds and fnmatchcase(name, self.name)


@dataclass(slots=True)
class Operation:
    """One operation that is about to be done, as an action sees it.

    Attributes:
        kind: Its kind.
        name: Name of the object, the message or the file.
        data: What it writes or sends, or the buffer that it reads into; None if neither. What an
            action puts here is written instead.
        reads: Whether `data` is filled by it.
        result: What it returned; what an action puts here is returned instead.
    """

    kind: str
    name: str
    data: Buffer | None = None
    reads: bool = False
    result: object = None


class Action(Protocol):
    """What happens at a point: `Fail`, `Kill`, …, or any function of this form."""

    def __call__(self, operation: Operation, proceed: Callable[[], None]) -> None:
        """Do something, and call `proceed`, or don't, to have the operation done."""


@dataclass(frozen=True, slots=True)
class Fail:
    """Raise an error instead of doing the operation; at a point after it, although it was done.

    Attributes:
        error: The error, or makes it; a StoreError by default.
    """

    error: BaseException | Callable[[], BaseException] | None = None

    def __call__(self, operation: Operation, proceed: Callable[[], None]) -> None:
        """See `Action`."""
        del proceed
        if isinstance(self.error, BaseException):
            raise self.error
        if self.error is not None:
            raise self.error()
        raise StoreError(f"{operation.name}: injected failure of {operation.kind}")


@dataclass(frozen=True, slots=True)
class Lose:
    """Lie: report success and do nothing. A message is lost; an fsync keeps nothing."""

    def __call__(self, operation: Operation, proceed: Callable[[], None]) -> None:
        """See `Action`."""
        del operation, proceed


@dataclass(frozen=True, slots=True)
class Truncate:
    """Lie: do it with the first bytes only. What is read ends there.

    Attributes:
        bytes: How many.
    """

    bytes: int

    def __call__(self, operation: Operation, proceed: Callable[[], None]) -> None:
        """See `Action`."""
        if operation.data is not None:
            operation.data = memoryview(operation.data).cast("B")[: self.bytes]
        proceed()
        if operation.reads:
            raise EOFError(f"{operation.name} ends {self.bytes} bytes later")


@dataclass(frozen=True, slots=True)
class Flip:
    """Lie: write, send or read something else, one byte of it.

    Attributes:
        byte: Which, from 0, or from -1 for the last.
        mask: The bits that are flipped.
    """

    byte: int = 0
    mask: int = 1

    def __call__(self, operation: Operation, proceed: Callable[[], None]) -> None:
        """See `Action`."""
        if operation.reads:
            proceed()
            if operation.data:
                memoryview(operation.data).cast("B")[self.byte] ^= self.mask
        else:
            changed = bytearray(operation.data or b"")
            if changed:
                changed[self.byte] ^= self.mask
                operation.data = bytes(changed)
            proceed()


@dataclass(frozen=True, slots=True)
class Delay:
    """Do it later.

    Attributes:
        seconds: How much.
    """

    seconds: float

    def __call__(self, operation: Operation, proceed: Callable[[], None]) -> None:
        """See `Action`."""
        del operation
        time.sleep(self.seconds)
        proceed()


@dataclass(frozen=True, slots=True)
class Stall:
    """Wait before doing it, until `release` is set.

    Attributes:
        release: An event; `reached` is set meanwhile.
        reached: Tells a test that the point has been reached.
    """

    release: threading.Event = field(default_factory=threading.Event)
    reached: threading.Event = field(default_factory=threading.Event)

    def __call__(self, operation: Operation, proceed: Callable[[], None]) -> None:
        """See `Action`."""
        del operation
        self.reached.set()
        self.release.wait()
        proceed()


@dataclass(frozen=True, slots=True)
class Hold:
    """Do it when `land` is called: a request that lands late. Until then it has reported success.

    Attributes:
        error: What is raised instead, as after waiting for its answer too long.
        held: What is to be done.
    """

    error: BaseException | None = None
    held: list[Callable[[], None]] = field(default_factory=list)

    def __call__(self, operation: Operation, proceed: Callable[[], None]) -> None:
        """See `Action`."""
        del operation
        self.held.append(proceed)
        if self.error is not None:
            raise self.error

    def land(self) -> None:
        """Do what was held back, in its order."""
        while self.held:
            self.held.pop(0)()


@dataclass(frozen=True, slots=True)
class Kill:
    """Send SIGKILL to this process.

    Attributes:
        others: Returns process ids that are killed first, such as those of all ranks.
    """

    others: Callable[[], Sequence[int]] = tuple

    def __call__(self, operation: Operation, proceed: Callable[[], None]) -> None:
        """See `Action`."""
        del operation, proceed
        me = os.getpid()
        for pid in self.others():
            if pid != me:
                os.kill(pid, signal.SIGKILL)
        os.kill(me, signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Call:
    """Call a function, and go on.

    Attributes:
        function: Called with the operation; may raise.
    """

    function: Callable[[Operation], object]

    def __call__(self, operation: Operation, proceed: Callable[[], None]) -> None:
        """See `Action`."""
        self.function(operation)
        proceed()


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong at a point.

    Attributes:
        point: Where.
        action: What happens.
        at: At which passage of the point, from 0, counted by each store, coordinator or folder that
            stands for a rank.
        times: For how many passages from there on; None: for ever.
        ranks: On which ranks; None: on all.
    """

    point: Point
    action: Action
    at: int = 0
    times: int | None = 1
    ranks: Collection[int] | None = None


class Faults:
    """The faults of one rank's store, coordinator or folder, counted. Safe for several threads.

    Where several are due before one operation, the first is first, and may keep it from the others.

    Args:
        faults: What goes wrong.
        rank: Whose these are.
    """

    def __init__(self, faults: Sequence[Fault], rank: int) -> None:
        self._faults = [fault for fault in faults if fault.ranks is None or rank in fault.ranks]
        self._passed = [0] * len(self._faults)
        self._lock = threading.Lock()

    def perform(self, operation: Operation, do: Callable[[], None]) -> None:
        """Do an operation, with whatever goes wrong before, in or after it."""
        for action in reversed(self._due(operation, after=False)):
            do = _around(action, operation, do)
        do()
        for action in self._due(operation, after=True):
            action(operation, _nothing)

    def _due(self, operation: Operation, *, after: bool) -> list[Action]:
        found = []
        with self._lock:
            for index, fault in enumerate(self._faults):
                if fault.point.after is after and fault.point.fits(operation.kind, operation.name):
                    passage = self._passed[index] - fault.at
                    self._passed[index] += 1
                    if passage >= 0 and (fault.times is None or passage < fault.times):
                        found.append(fault.action)
        return found


def _around(action: Action, operation: Operation, do: Callable[[], None]) -> Callable[[], None]:
    return lambda: action(operation, do)


def _nothing() -> None:
    """What is left to be done after an operation."""
