"""Why a run should stop: a signal, a halt file, or the end of its time.

Each rank only says what it has noticed (`Stopping.vote`); the heartbeat makes one decision of it.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from types import FrameType

from distckpt.manager.halt import HALT_NAME, POLL_S, HaltFile
from distckpt.store import Store
from distckpt.team import COORDINATOR

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

# One request may come several times: mpirun passes on what the whole process group got anyway.
_SAME_REQUEST_S = 1.0
# A second one of these means it, as it does without us.
_INSISTENT = frozenset({signal.SIGTERM, signal.SIGINT})
# A save may take so much longer than the longest until now.
_SAVE_MARGIN = 1.5
_STEPS_REMEMBERED = 16

Handler = Callable[[int, FrameType | None], object] | int | signal.Handlers | None


class Stopping:
    """Notices on this rank why training should stop.

    Signal handlers are installed when it is made, in the main thread; in another, Python allows
    none, and a warning is logged. The coordinator looks at the clock, and in a thread of its own,
    which begins with the first vote, at the halt file.

    Args:
        store: The run's folder, in which the halt file may lie.
        rank: This rank.
        signals: Which ones ask to stop.
        max_seconds: How long the run may take from now on, saves included; any time, if None.
        halt_name: The halt file's name.
        poll_s: Seconds from one look at the halt file to the next.
        clock: Seconds that never go back.

    Raises:
        ValueError: A signal that can't be handled, or `max_seconds` that is no time.
    """

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        signals: Iterable[int] = STOP_SIGNALS,
        max_seconds: float | None = None,
        halt_name: str = HALT_NAME,
        poll_s: float = POLL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        numbers = [_checked(number) for number in dict.fromkeys(signals)]
        if max_seconds is not None and not 0 < max_seconds < math.inf:
            raise ValueError(f"max_seconds={max_seconds}: expected a number above 0, or None")
        self._rank = rank
        self._clock = clock
        self._signal: str | None = None
        self._handlers = _install(self, numbers, clock)
        self._time = None if max_seconds is None else _TimeLimit(max_seconds, clock)
        self._halt = HaltFile(store, halt_name, poll_s)
        # The thread must not outlive an owner that nobody closes.
        weakref.finalize(self, self._halt.end)

    def vote(self) -> str | None:
        """Return why training should stop, as far as this rank knows, or None. Cheap."""
        if self._signal is not None:
            return self._signal
        if self._rank != COORDINATOR:
            return None
        self._halt.watch()
        return self._halt.due or (self._time.due() if self._time else None)

    def saved(self, seconds: float) -> None:
        """Count a save that was committed, and note how long it took. From any thread."""
        self._halt.count()
        if self._time is not None:
            self._time.save_s = max(self._time.save_s, seconds)

    def obey(self, reason: str) -> None:
        """All ranks stop, for this reason. If it was the halt file, it is removed."""
        for handler in self._handlers:
            handler.obeyed = reason.startswith(f"{handler.name} on rank ")
        self._halt.obey(reason)

    def close(self) -> None:
        """Put the previous signal handlers back, and end the thread. In the main thread."""
        for handler in self._handlers:
            handler.retire()
        self._halt.close()

    def note_signal(self, number: int) -> None:
        """Note a signal. Called by its handler."""
        self._signal = self._signal or f"{signal.Signals(number).name} on rank {self._rank}"


# ----------------------------------------------------------------------------------------- signals


def _checked(number: int) -> signal.Signals:
    try:
        found = signal.Signals(number)
    except ValueError as exc:
        raise ValueError(f"stop_signals: {number!r} is no signal of this system") from exc
    if found in {signal.SIGKILL, signal.SIGSTOP}:
        raise ValueError(f"stop_signals: no process can handle {found.name}")
    return found


def _install(
    owner: Stopping, numbers: Iterable[signal.Signals], clock: Callable[[], float]
) -> list[_SignalHandler]:
    numbers = list(numbers)
    if numbers and threading.current_thread() is not threading.main_thread():
        logger.warning(
            "The Manager was made outside of the main thread, where Python allows no signal "
            "handlers: %s will not make it save and stop",
            ", ".join(number.name for number in numbers),
        )
        return []
    handlers = []
    for number in numbers:
        if signal.getsignal(number) is None:
            logger.warning(
                "%s is handled by something that isn't Python, and so can't be handed on to: it "
                "will not make the Manager save and stop",
                number.name,
            )
        else:
            handlers.append(_SignalHandler(owner, number, clock))
    return handlers


class _SignalHandler:
    """Tells its owner of a signal, and hands it on to the handler that was there before.

    What another has installed over it meanwhile stays, and may go on calling it: then it only hands
    on. So it does when its owner is gone, or closed.

    Attributes:
        name: The signal's.
        obeyed: All ranks have stopped for it; one more asks for nothing new.
        previous: The handler that was there before.
    """

    def __init__(self, owner: Stopping, number: signal.Signals, clock: Callable[[], float]) -> None:
        self._owner = weakref.ref(owner)
        self._number = number
        self._clock = clock
        self._first_s: float | None = None
        self._is_retired = False
        self.name = number.name
        self.obeyed = False
        # Before it is installed: it may be called at once.
        self.previous = _with_something_to_say(signal.getsignal(number))
        signal.signal(number, self)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        # Nothing is logged here: the program may be in the middle of logging.
        now_s = self._clock()
        is_first = self._first_s is None
        if self._first_s is None:
            self._first_s = now_s
        owner, before = self._owner(), _with_something_to_say(self.previous)
        if self._is_retired or owner is None:
            if not (is_first and self.obeyed):
                self._as_before(before, frame)
            return
        owner.note_signal(number)
        insists = now_s - self._first_s > _SAME_REQUEST_S and number in _INSISTENT
        if insists or (callable(before) and before is not signal.default_int_handler):
            self._as_before(before, frame)

    def is_passive(self) -> bool:
        """Whether its owner is closed, or gone."""
        return self._is_retired or self._owner() is None

    def retire(self) -> None:
        """Put the previous handler back, if nobody has installed another one meanwhile."""
        self._is_retired = True
        # A signal that has stopped all ranks may reach this one only now: it shall not end a
        # process that has just saved.
        awaits = self.obeyed and self._first_s is None and not callable(self.previous)
        is_installed = signal.getsignal(self._number) is self
        in_main_thread = threading.current_thread() is threading.main_thread()
        if is_installed and in_main_thread and not awaits:
            signal.signal(self._number, self.previous)

    def _as_before(self, before: Handler, frame: FrameType | None) -> None:
        if callable(before):
            before(self._number, frame)
        elif before == signal.SIG_DFL:
            signal.signal(self._number, signal.SIG_DFL)
            signal.raise_signal(self._number)


def _with_something_to_say(handler: Handler) -> Handler:
    """Return a handler, or the next one below those of ours that are passive."""
    while isinstance(handler, _SignalHandler) and handler.is_passive():
        handler = handler.previous
    return handler


# ---------------------------------------------------------------------------------------- the time


class _TimeLimit:
    """How much time is left, with so much kept back as a save takes.

    Attributes:
        save_s: The longest save until now.
    """

    def __init__(self, limit_s: float, clock: Callable[[], float]) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._began_s = clock()
        self._last_s: float | None = None
        self._steps_s: deque[float] = deque(maxlen=_STEPS_REMEMBERED)
        self.save_s = 0.0
        self._reason: str | None = None

    def due(self) -> str | None:
        """Return why to stop, if it is time to; called once a step."""
        now_s = self._clock()
        # Before the first vote lie imports, loading and compiling, which are no measure of a step.
        if self._last_s is not None:
            self._steps_s.append(now_s - self._last_s)
        self._last_s = now_s
        left_s = self._limit_s - (now_s - self._began_s)
        step_s = max(self._steps_s, default=0.0)
        # What is decided now, the ranks do at the next step.
        if self._reason is None and left_s <= _SAVE_MARGIN * self.save_s + 2 * step_s:
            self._reason = (
                f"max_seconds={self._limit_s:g} is up in {left_s:.3g} s; a save takes "
                f"{self.save_s:.3g} s and a step {step_s:.3g} s"
            )
        return self._reason
