"""A save in flight."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial

from distckpt.arena import Arena
from distckpt.checkpoint import Checkpoint, StorageOptions, Url
from distckpt.commit import commit, write
from distckpt.errors import text
from distckpt.prepare import Options, Save, prepare
from distckpt.team import COORDINATOR, Team
from distckpt.waiting import Waiting, drive, in_thread

logger = logging.getLogger(__name__)


def start_save(
    team: Team,
    url: Url,
    state: object,
    options: Options,
    *,
    storage_options: StorageOptions = None,
    on_committed: Callable[[Checkpoint], None] | None = None,
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

    Returns:
        The save in flight.

    Raises:
        CheckpointError: As in `prepare`.
    """
    arena: Arena = team.memory.setdefault("arena", Arena())
    found = prepare(team, url, state, options, storage_options=storage_options, arena=arena)
    return PendingCheckpoint(team, found, arena, on_committed)


class PendingCheckpoint:
    """A save in flight, made by `distckpt.save_async` and `Manager.save`.

    It is written by a thread of its own. The commit is driven by that thread, too; where MPI was
    initialised without MPI_THREAD_MULTIPLE, it is driven by the main thread instead, in `done`,
    `wait`, every collective call of distckpt, and at exit. A failure that nobody waits for is
    logged.
    """

    def __init__(
        self,
        team: Team,
        save: Save,
        arena: Arena,
        on_committed: Callable[[Checkpoint], None] | None = None,
    ) -> None:
        self._team = team
        self._save = save
        self._arena = arena
        self._on_committed = on_committed
        self._written = threading.Event()
        self._ended = threading.Event()  # committed or failed
        self._closed = threading.Event()  # and what was to be done after the commit, too
        self._result: Checkpoint | None = None
        self._error: BaseException | None = None
        self._commit = self._protocol()
        concurrent = team.coordinator.concurrent
        self._thread = threading.Thread(
            target=self._write_and_commit if concurrent else self._write, name="distckpt-save"
        )
        self._thread.start()
        if not concurrent:
            team.backlog.add(self._advance)

    def __repr__(self) -> str:
        state = (
            "in flight" if not self._ended.is_set() else "failed" if self._error else "committed"
        )
        return f"<PendingCheckpoint {self._save.store.url!r} {state}>"

    @property
    def url(self) -> str:
        """Where it is saved to."""
        return self._save.store.url

    def wait_staged(self) -> None:
        """Wait until the arrays may change again. Not collective.

        Returns at once: they were copied before this object was made.
        """

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

    def _write(self) -> None:
        write(self._save)
        for staged in self._save.staged.values():
            self._arena.give_back(staged.buffer)
        self._save.staged = {}
        self._save.images = {}
        self._written.set()

    def _write_and_commit(self) -> None:
        self._write()
        drive(self._commit)

    def _advance(self) -> bool:
        """Drive the commit a step further, without blocking. Returns whether all is done."""
        if not self._closed.is_set():
            next(self._commit, None)
        return self._closed.is_set()

    def _protocol(self) -> Waiting[None]:
        while not self._written.is_set():
            yield
        try:
            manifest = yield from commit(self._save)
            self._result = Checkpoint(self._save.store, manifest, self._save.save_id)
        except BaseException as exc:  # noqa: BLE001  whoever waits raises it
            self._error = exc
            # Not every caller waits; a failure must not go unnoticed.
            logger.error("%s: the save failed: %s", self.url, text(exc))  # noqa: TRY400
        self._ended.set()
        committed, action = self._result, self._on_committed
        if committed is not None and action is not None and self._team.rank == COORDINATOR:
            try:
                yield from in_thread(partial(action, committed))
            except Exception:
                logger.exception(
                    "%s: committed; what was to be done after the commit failed", self.url
                )
        self._closed.set()
