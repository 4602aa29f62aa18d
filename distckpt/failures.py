"""Failures of asynchronous saves that nobody has been told of yet: they must not go unnoticed."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress

from distckpt.errors import SaveFailed, some_names

logger = logging.getLogger(__name__)

# What a process ends with whose last saves failed, and nobody asked: EX_IOERR of sysexits.h.
EXIT_STATUS = 74


class Unseen:
    """The failed saves of one team that no `wait` has raised.

    The next save raises them, on every rank; where none follows, the process ends with
    `EXIT_STATUS`. Safe for several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failed: dict[int, str] = {}
        self._told: set[int] = set()

    def add(self, save_id: int, message: str) -> None:
        """Note a failed save, unless its failure was raised already (by another rank's news)."""
        with self._lock:
            if save_id in self._told:
                self._told.discard(save_id)
                return
            if not self._failed:
                atexit.register(self._end)
            self._failed[save_id] = message

    def see(self, save_ids: Iterable[int]) -> None:
        """Note that these failures have been raised; also those that this rank learns of later."""
        with self._lock:
            for save_id in save_ids:
                if self._failed.pop(save_id, None) is None:
                    self._told.add(save_id)
            if not self._failed:
                atexit.unregister(self._end)

    def pending(self) -> dict[int, str]:
        """Return what nobody was told of: save id → message."""
        with self._lock:
            return dict(self._failed)

    def raise_together(self, url: str, failed: Mapping[int, str] | None) -> None:
        """Raise what any rank was not told of.

        Every rank learns which failures these are, so that each is raised once.

        Args:
            url: What is not saved because of them.
            failed: Those of all ranks; nothing is done if there are none.

        Raises:
            SaveFailed: There are some.
        """
        if failed:
            self.see(failed)
            raise SaveFailed(f"{url}: not saved: {_summary(failed.values())}. Save again to go on")

    def _end(self) -> None:
        """At exit, nothing but the process's status can tell any more."""
        logger.critical("%s", _summary(self.pending().values()))
        if getattr(sys, "last_value", None) is not None:
            return  # it ends with an error anyway
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        # Python has no other way to change the status from here. MPI is not finalized: a launcher
        # takes that for what it is, a job that failed.
        os._exit(EXIT_STATUS)


def _summary(messages: Collection[str]) -> str:
    """Say what failed, in one message."""
    many = len(messages) > 1
    return (
        f"{len(messages)} earlier asynchronous save{'s' if many else ''} failed, and nobody waited "
        f"for {'them' if many else 'it'} (pending.wait() would have raised this; "
        f'on_failure="warn" only logs it): {some_names(list(messages), limit=3)}'
    )
