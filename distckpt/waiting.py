"""Protocols that wait without blocking: generators that yield while nothing has come."""

from __future__ import annotations

import atexit
import gc
import importlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

T = TypeVar("T")
Waiting = Generator[None, None, T]

# A step of a protocol that takes longer has not only looked whether something has come.
_STEP_S = 1e-3
_SHORTEST_PAUSE_S = 2e-5
# Who stands still meanwhile looks for so long without a pause: the shortest takes three times as
# long as it should.
_BUSY_S = 1e-3
# How long a thread of a save waits for the interpreter's lock while another runs Python.
_SWITCH_S = 1e-4
# How long a process whose program ends with an error goes on with what is left to do.
_PATIENCE_AFTER_ERROR_S = 3.0
# How often a long load searches for cycles that other threads have left.
_COLLECT_S = 10.0


def drive(
    protocol: Waiting[T], meanwhile: Callable[[], None] | None = None, *, patient: bool = True
) -> T:
    """Run a protocol to its end in this thread, with growing pauses while nothing comes.

    A blocking receive would spin on a core that training needs.

    Args:
        protocol: The protocol.
        meanwhile: Called after each of its steps.
        patient: Whether training goes on meanwhile, so that the processor counts for more than the
            moment. Else the pauses grow with the time that it has waited.
    """
    began = since = time.monotonic()
    pause_s = _SHORTEST_PAUSE_S
    while True:
        try:
            next(protocol)
        except StopIteration as end:
            result: T = end.value
            return result
        if meanwhile is not None:
            meanwhile()
        now = time.monotonic()
        if now - began > _STEP_S:  # something had come
            since, pause_s = now, _SHORTEST_PAUSE_S
        if not patient and now - since < _BUSY_S:
            _let_others()
            began = time.monotonic()
            continue
        time.sleep(pause_s)
        began = time.monotonic()
        longest_s = 2e-3 if patient else min(max(2e-4, (began - since) / 16), 2e-3)
        pause_s = min(pause_s * 1.6, longest_s)


def _let_others() -> None:
    """Let others have the processor, if they wait for it."""
    if hasattr(os, "sched_yield"):
        os.sched_yield()
    else:
        time.sleep(0)


class Backlog:
    """Protocols that no thread of their own may drive.

    The main thread does, whenever it waits for something here, and at exit.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], bool]] = []
        self._is_at_exit = False

    def add(self, step: Callable[[], bool]) -> None:
        """Add a protocol.

        Args:
            step: Advances it without blocking; returns whether it has ended.
        """
        if not self._is_at_exit:
            self._is_at_exit = True
            before_executors_close(self._finish)
        self._steps.append(step)

    def advance(self) -> None:
        """Advance all."""
        self._steps = [step for step in self._steps if not step()]

    def drive(self, protocol: Waiting[T]) -> T:
        """Run a protocol to its end in this thread, which waits for it; advance these meanwhile."""
        return drive(protocol, self.advance if self._steps else None, patient=False)

    def _finish(self) -> None:
        """At exit: without this, other ranks would wait for a commit that nobody drives."""
        # After an error in the program the others may be anywhere, and the job is to end.
        failed = getattr(sys, "last_value", None) is not None
        deadline = time.monotonic() + (_PATIENCE_AFTER_ERROR_S if failed else math.inf)
        while self._steps and time.monotonic() < deadline:
            self.advance()
            time.sleep(1e-3)


def before_executors_close(function: Callable[[], None]) -> None:
    """Have a function called in the main thread when the program ends.

    Earlier than `atexit` has it: remote stores need threads and executors, which are gone by then.
    """
    # Its own hook closes all executors; the newest hook is called first.
    importlib.import_module("concurrent.futures.thread")
    # Not public, but in every Python since 3.9; without it, local saves still finish.
    register = getattr(threading, "_register_atexit", atexit.register)
    with suppress(RuntimeError):  # the program is ending already
        register(function)


@contextmanager
def no_collections() -> Iterator[None]:
    """Put off Python's search for unreachable cycles, for what makes thousands of objects.

    It would look at all of them, and at all of the program's, several times; none is garbage. What
    isn't in a cycle is freed all the same.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Collections:
    """Python's search for unreachable cycles, from time to time where `no_collections` lasts."""

    def __init__(self) -> None:
        self._due = time.monotonic() + _COLLECT_S

    def remind(self) -> None:
        """Search, if the last one was long ago."""
        if time.monotonic() > self._due and not gc.isenabled():
            gc.collect()
            self._due = time.monotonic() + _COLLECT_S


def step_back() -> None:
    """Have the kernel treat this thread as one that works in the background.

    It then doesn't interrupt training when it wakes up, and gets its share of the processor still.
    """
    with suppress(OSError, AttributeError):  # not this system, or not allowed
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


class _QuickSwitches:
    """While in this context, a thread waits less long for the interpreter's lock.

    One that comes back from the kernel waits until whoever runs Python gives the lock up: by
    default for 5 ms, and a save comes back dozens of times. Training notices only while a thread
    waits, a few microseconds each time. From several threads at once, the first sets it and the
    last puts it back, unless the program has set it meanwhile.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before_s = self._ours_s = 0.0

    def __enter__(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._before_s = sys.getswitchinterval()
                sys.setswitchinterval(min(self._before_s, _SWITCH_S))
                self._ours_s = sys.getswitchinterval()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users and sys.getswitchinterval() == self._ours_s:
                sys.setswitchinterval(self._before_s)


quick_switches = _QuickSwitches()


def in_thread(function: Callable[[], T], *, here: bool = False) -> Waiting[T]:
    """Run a function in a thread of its own, and wait for it without blocking.

    For I/O inside a protocol; *here* runs it in this thread, which has nothing else to do. Raises
    what the function raises; what is no Exception, such as a library's panic, as a RuntimeError,
    since a protocol handles those.
    """
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(function())
        except BaseException as exc:  # noqa: BLE001  raised below, where the protocol is driven
            failed.append(exc)

    if here:
        run()
    else:
        try:
            thread = threading.Thread(target=run, name="distckpt-commit")
            thread.start()
        except RuntimeError:  # the interpreter is shutting down: there is nothing left to stall
            run()
        else:
            while thread.is_alive():
                yield
            thread.join()
    if failed:
        if not isinstance(failed[0], Exception):
            raise RuntimeError(f"{type(failed[0]).__name__}: {failed[0]}") from failed[0]
        raise failed[0]
    return done[0]


class Interrupt:
    """Whether Ctrl-C was pressed while `deferred_interrupt` held it back.

    Attributes:
        came: It was.
    """

    def __init__(self) -> None:
        self.came = False

    def check(self) -> None:
        """Raise if it was.

        Raises:
            InterruptedError: It was.
        """
        if self.came:
            raise InterruptedError("interrupted (Ctrl-C)")


@contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Hold back Ctrl-C while ranks talk to one another, and raise KeyboardInterrupt afterwards.

    A rank that leaves in the middle would keep the others waiting. What takes long looks at
    `Interrupt.came`, and ends early. A second Ctrl-C is raised at once. In another thread than the
    main one, and where the program handles the signal itself, nothing is changed.
    """
    interrupt = Interrupt()
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )

    def note(number: int, frame: object) -> None:
        del number, frame
        if interrupt.came:
            raise KeyboardInterrupt
        interrupt.came = True

    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield interrupt
    except Exception as exc:
        if interrupt.came:
            raise KeyboardInterrupt from exc
        raise
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if interrupt.came:
        raise KeyboardInterrupt
