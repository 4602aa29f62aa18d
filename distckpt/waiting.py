"""Protocols that wait without blocking: generators that yield while nothing has come."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
Waiting = Generator[None, None, T]


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
