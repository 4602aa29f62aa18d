"""A save in flight."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from distckpt.agreement import unseen_of
from distckpt.arena import Arena
from distckpt.checkpoint import Checkpoint, StorageOptions, Url
from distckpt.commit import commit, write
from distckpt.errors import text
from distckpt.options import Options
from distckpt.prepare import Save, plan_ahead, prepare
from distckpt.stats import SaveStats
from distckpt.store import Store
from distckpt.team import COORDINATOR, Team
from distckpt.waiting import (
    Waiting,
    before_executors_close,
    drive,
    in_thread,
    quick_switches,
    step_back,
)

logger = logging.getLogger(__name__)
# More saves at a time than any program has: who waited for a thread would keep other ranks waiting.
_MOST_THREADS = 1 << 10
# What is left of a call that has started its thread takes much less.
_CALL_S = 1.0


def start_save(
    team: Team,
    url: Url,
    state: object,
    options: Options,
    *,
    storage_options: StorageOptions = None,
    on_committed: Callable[[Checkpoint], None] | None = None,
    on_failed: Callable[[BaseException], None] | None = None,
) -> PendingCheckpoint:
    """Collective. Start a save; see `distckpt.save_async`.

    Args:
        team: The ranks.
        url: Where to.
        state: This rank's state.
        options: The rest.
        storage_options: For fsspec.
        on_committed: Called at the coordinator after the commit, in the background; what it raises
            is logged.

        on_failed: Called at the coordinator with the error, likewise.

    Returns:
        The save in flight.

    Raises:
        CheckpointError: As in `prepare`.
    """
    arena = _arena_of(team)
    found = prepare(team, url, state, options, storage_options=storage_options, arena=arena)
    return PendingCheckpoint(team, found, on_committed, on_failed)


def make_ready(team: Team, store: Store, state: object, options: Options) -> None:
    """Collective. Plan the saves of a state, and have memory for copies made in the background.

    Args:
        team: The ranks.
        store: Where to.
        state: This rank's state, or one like it.
        options: Those of the saves.

    Raises:
        CheckpointError: As in `prepare`.
    """
    size_bytes = plan_ahead(team, store, state, options)
    limit_bytes = options.staging_bytes
    # Each file begins on a page.
    size_bytes += size_bytes // 64
    _arena_of(team).prepare(size_bytes if limit_bytes is None else min(size_bytes, limit_bytes))


@cache
def _threads() -> ThreadPoolExecutor:
    """Return the threads that saves are written by.

    They are kept: the start of one holds up who starts it, by a quarter of a lazy save's call.
    """
    threads = ThreadPoolExecutor(_MOST_THREADS, "distckpt-save", initializer=step_back)
    before_executors_close(threads.shutdown)
    return threads


def finish_saves() -> None:
    """Wait until this process has written its saves in flight, as it does when a program ends.

    For what leaves by ``os._exit``. Saves that are begun afterwards are written by their callers.
    """
    _threads().shutdown()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # it has none of them


def _arena_of(team: Team) -> Arena:
    arena: Arena = team.memory.setdefault("arena", Arena())
    return arena


class PendingCheckpoint:
    """A save in flight, made by `distckpt.save_async` and `Manager.save`.

    It is written by a thread in the background. The commit is driven by that thread, too; where MPI
    was initialised without MPI_THREAD_MULTIPLE, it is driven by the main thread instead, in `done`,
    `wait`, every collective call of distckpt, and at exit. A failure is logged; where nobody waits
    for it, the next save raises it, or the program ends with status 74, unless `on_failure` says
    otherwise. A program that ends finishes its saves first. Where no thread can be started, as in
    an exit handler, all is done when the call returns.
    """

    def __init__(
        self,
        team: Team,
        save: Save,
        on_committed: Callable[[Checkpoint], None] | None = None,
        on_failed: Callable[[BaseException], None] | None = None,
    ) -> None:
        self._team = team
        self._save = save
        self._staging = save.staging
        self._unseen = unseen_of(team)
        self._on_committed = on_committed
        self._on_failed = on_failed
        self._begun = threading.Event()  # the caller may go on
        self._written = threading.Event()
        self._ended = threading.Event()  # committed or failed
        self._closed = threading.Event()  # and what was to be done after the commit, too
        self._result: Checkpoint | None = None
        self._error: BaseException | None = None
        self._commit = self._protocol()
        self._bytes_total = sum(image.layout.length for image in save.images.values())
        self._claimed = threading.Lock()
        concurrent = team.coordinator.concurrent
        is_here = self._in_background(self._write_and_commit if concurrent else self._write)
        if not concurrent:
            team.backlog.add(self._advance)
        self._begun.set()
        if is_here:
            self.close()
        if self._staging is not None and not self._staging.has_begun:
            with save.recorder.phase("stage"):
                self._staging.wait_now()

    def __repr__(self) -> str:
        state = (
            "in flight" if not self._ended.is_set() else "failed" if self._error else "committed"
        )
        return f"<PendingCheckpoint {self._save.store.url!r} {state}>"

    @property
    def url(self) -> str:
        """Where it is saved to."""
        return self._save.store.url

    @property
    def bytes_done(self) -> int:
        """Bytes that this rank has written so far."""
        return self._save.recorder.nbytes

    @property
    def bytes_total(self) -> int:
        """Bytes that this rank writes in all."""
        return self._bytes_total

    @property
    def stats(self) -> SaveStats:
        """What it has cost so far: this rank's part; once committed, at the coordinator, all."""
        if self._result is not None and self._result.stats is not None:
            return self._result.stats
        return SaveStats({self._team.rank: self._save.recorder.stats()})

    def wait_staged(self) -> None:
        """Wait until all arrays may change again. Not collective.

        At once, unless the save was asked to copy some lazily.
        """
        if self._staging is not None:
            self._staging.wait_copied()

    def done(self) -> bool:
        """Whether it has ended, well or not. Never blocks; not collective."""
        if not self._team.coordinator.concurrent:
            self._team.backlog.advance()
        return self._ended.is_set()

    def wait(self, timeout_s: float | None = None) -> Checkpoint:
        """Wait until it is committed. Not collective: some ranks may wait and others not.

        Args:
            timeout_s: How long at most, in seconds; for ever by default (other ranks are not waited
                for longer than the save's own `timeout_s`).

        Returns:
            The checkpoint.

        Raises:
            TimeoutError: It has not ended yet; it goes on.
            SaveFailed, CheckpointExists: It failed, on every rank.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        if self._team.coordinator.concurrent:
            self._ended.wait(timeout_s)
        else:
            pause_s = 2e-5
            while not self.done() and (deadline is None or time.monotonic() < deadline):
                time.sleep(pause_s)
                pause_s = min(1.6 * pause_s, 2e-3)
        if self._ended.is_set():
            if self._error is not None:
                self._unseen.see([self._save.save_id])
                raise self._error
            if self._result is not None:
                return self._result
        raise TimeoutError(f"{self.url}: not committed within {timeout_s:.3g} s; the save goes on")

    def close(self) -> None:
        """Wait until all is done, also what follows the commit. Raises nothing; not collective."""
        if self._team.coordinator.concurrent:
            self._closed.wait()
        while not self._closed.is_set():
            self._team.backlog.advance()
            time.sleep(1e-3)

    def _in_background(self, work: Callable[[], None]) -> bool:
        """Have a thread do what is to be done; or do it here, where there can be no thread.

        Returns:
            Whether it was done here. Then nobody may come by later to drive the commit, either.
        """

        def once() -> None:
            # What no thread could be started for may be done by one that is there, all the same.
            if not self._claimed.acquire(blocking=False):
                return
            try:
                work()
            except BaseException:
                logger.exception("%s: the thread that saves has failed", self.url)
                raise

        try:
            _threads().submit(once)
        except RuntimeError:  # none can be started, or the program is ending
            self._begun.set()
            once()
            return True
        return False

    def _write(self) -> None:
        # Else it would take a core, and the interpreter's lock, from the call that starts it. Not
        # for long: that may have been interrupted.
        self._begun.wait(_CALL_S)
        with quick_switches:
            write(self._save)
        if self._staging is not None:
            self._staging.release()
        self._save.images = {}
        self._written.set()

    def _write_and_commit(self) -> None:
        self._write()
        with quick_switches:
            drive(self._commit)

    def _advance(self) -> bool:
        """Drive the commit a step further, without blocking. Returns whether all is done."""
        if not self._closed.is_set():
            next(self._commit, None)
        return self._closed.is_set()

    def _protocol(self) -> Waiting[None]:
        blocks = self._team.coordinator.concurrent  # the save's own thread drives this
        while not self._written.is_set():
            yield
        try:
            manifest, stats = yield from commit(self._save, blocks=blocks)
            self._result = Checkpoint(self._save.store, manifest, self._save.save_id, stats)
        except BaseException as exc:  # noqa: BLE001  whoever waits raises it
            self._error = exc
            # Not every caller waits; a failure must not go unnoticed.
            logger.error("%s: the save failed: %s", self.url, text(exc))  # noqa: TRY400
            if self._save.options.on_failure == "raise":
                self._unseen.add(self._save.save_id, text(exc))
        self._ended.set()
        if self._team.rank == COORDINATOR and (self._on_committed or self._on_failed):
            try:
                yield from in_thread(self._afterwards, here=blocks)
            except Exception:
                what = "committed" if self._result is not None else "not committed"
                logger.exception(
                    "%s: %s; what was to be done after the commit failed", self.url, what
                )
        self._closed.set()

    def _afterwards(self) -> None:
        """At the coordinator: do what was to be done after the save."""
        if self._result is not None and self._on_committed is not None:
            self._on_committed(self._result)
        if self._error is not None and self._on_failed is not None:
            self._on_failed(self._error)
