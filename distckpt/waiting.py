"""Protocols that wait without blocking: generators that yield while nothing has come."""

from __future__ import annotations

import atexit
import math
import sys
import threading
import time
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
Waiting = Generator[None, None, T]

# How long a process whose program ends with an error goes on with what is left to do.
_PATIENCE_AFTER_ERROR_S = 3.0


def drive(protocol: Waiting[T], meanwhile: Callable[[], None] | None = None) -> T:
    """Run a protocol to its end in this thread, with growing pauses while nothing comes.

    A blocking receive would spin on a core that training needs.
    """
    pause_s = 2e-5
    while True:
        try:
            next(protocol)
        except StopIteration as end:
            result: T = end.value
            return result
        if meanwhile is not None:
            meanwhile()
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.6, 2e-3)


class Backlog:
    """Protocols that no thread of their own may drive.

    The main thread does, whenever it waits for something here, and at exit.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], bool]] = []

    def add(self, step: Callable[[], bool]) -> None:
        """Add a protocol.

        Args:
            step: Advances it without blocking; returns whether it has ended.
        """
        if not self._steps:
            atexit.register(self._finish)
        self._steps.append(step)

    def advance(self) -> None:
        """Advance all."""
        self._steps = [step for step in self._steps if not step()]
        if not self._steps:
            atexit.unregister(self._finish)

    def drive(self, protocol: Waiting[T]) -> T:
        """Run a protocol to its end in this thread, and advance these meanwhile."""
        return drive(protocol, self.advance if self._steps else None)

    def _finish(self) -> None:
        """At exit: without this, other ranks would wait for a commit that nobody drives."""
        # After an error in the program the others may be anywhere, and the job is to end.
        failed = getattr(sys, "last_value", None) is not None
        deadline = time.monotonic() + (_PATIENCE_AFTER_ERROR_S if failed else math.inf)
        while self._steps and time.monotonic() < deadline:
            self.advance()
            time.sleep(1e-3)


def in_thread(function: Callable[[], T]) -> Waiting[T]:
    """Run a function in a thread of its own, and wait for it without blocking.

    For I/O inside a protocol. Raises what the function raises.
    """
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(function())
        except BaseException as exc:  # noqa: BLE001  raised below, where the protocol is driven
            failed.append(exc)

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
        raise failed[0]
    return done[0]
