"""The checkpoints of a run as they are committed, for a program that runs beside it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from collections.abc import Set as AbstractSet
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

from distckpt.checkpoint import Checkpoint, StorageOptions, Url
from distckpt.errors import (
    CheckpointNotFound,
    CorruptCheckpoint,
    IncompleteCheckpoint,
    StoreError,
    UnsupportedFormat,
    text,
)
from distckpt.manifest import MANIFEST_NAME, Manifest
from distckpt.marks import LEASE_S
from distckpt.reader import read_manifest
from distckpt.run import step_name, step_of
from distckpt.store import PrefixStore, Store, open_store

logger = logging.getLogger(__name__)

# An object that is replaced within the resolution of its store's times looks unchanged: it is read
# again until its time can't come twice. S3's is a second.
_RESOLUTION_S = 3.0
# How often `stop` is asked while nothing comes.
_STOP_S = 0.1


def watch(
    root: Url,
    *,
    start: Literal["new", "all"] | int = "new",
    every: bool = False,
    hold: bool = True,
    poll_s: float = 1.0,
    timeout_s: float | None = None,
    stop: Callable[[], bool] | None = None,
    lease_s: float = LEASE_S,
    storage_options: StorageOptions = None,
) -> Generator[Checkpoint]:
    """Yield each checkpoint of a run when it has been committed, for an evaluation beside it.

    ::

        for checkpoint in distckpt.watch("runs/7"):
            checkpoint.load_into(net, only_prefix="model.")
            print(checkpoint.step, evaluate(net))

    Each is held (`Checkpoint.hold`) while the loop's body runs: it isn't pruned meanwhile. The hold
    ends with the next iteration, with the loop, and with an error in its body. A step that is saved
    again is a new checkpoint. One that can't be read is left out, with a warning. Not collective: a
    program of several ranks watches on one of them, and sends the others the checkpoint's `url`.

    Args:
        root: A Manager's; it need not be there yet.
        start: Where to begin. ``"new"``: with the first that is committed after this call.
            ``"all"``: with those that are there. A number: the same, of steps from there on.
        every: Whether to yield all, by ascending steps; by default only the newest, and what was
            committed before it while the loop's body ran is left out. What was pruned before its
            turn is left out in any case.
        hold: Whether to hold each. Without, nothing is written, and a checkpoint may be pruned
            while it is being read, which then raises IncompleteCheckpoint or LoadFailed.
        poll_s: Pause between two looks at the storage, in seconds: each takes a listing, and one
            small request for each checkpoint that the run keeps.
        timeout_s: End when none has come for so many seconds; None: never.
        stop: Called now and then while none comes, and before each; the loop ends when it returns
            True.
        lease_s: As in `Checkpoint.hold`.
        storage_options: Passed to the fsspec file system.

    Returns:
        A generator; its `close` ends the hold, too.

    Raises:
        StoreError: The store failed, or can't be written to though `hold` is True.
        ValueError: An argument that makes no sense.
    """
    if not (start in {"new", "all"} or (isinstance(start, int) and start >= 0)):
        raise ValueError(f'start={start!r}: expected "new", "all" or a step')
    if not poll_s > 0:
        raise ValueError(f"poll_s={poll_s}: expected seconds, more than 0")
    if timeout_s is not None and not timeout_s >= 0:
        raise ValueError(f"timeout_s={timeout_s}: expected seconds, 0 or more")
    if not lease_s > 0:
        raise ValueError(f"lease_s={lease_s}: expected seconds, more than 0")
    run = _Run(open_store(root, storage_options=storage_options), start)

    def follow() -> Generator[Checkpoint]:
        missed: set[_Commit] = set()  # since the last pause
        since_s = time.monotonic()
        while stop is None or not stop():
            found = run.next(every=every, missed=missed)
            if found is None:
                left_s = poll_s
                if timeout_s is not None:
                    left_s = min(left_s, since_s + timeout_s - time.monotonic())
                    if left_s <= 0:
                        return
                _pause(left_s, stop)
                missed.clear()
                continue
            checkpoint = Checkpoint(run.place(found.step), found.manifest)
            try:
                held = checkpoint.hold(lease_s=lease_s) if hold else nullcontext()
            except IncompleteCheckpoint:
                logger.info("%s: it was pruned or replaced before its turn", checkpoint.url)
                missed.add(found)
                continue
            with held:
                run.pass_by(found)
                yield checkpoint
            since_s = time.monotonic()

    return follow()


def _pause(seconds: float, stop: Callable[[], bool] | None) -> None:
    until_s = time.monotonic() + seconds
    while (left_s := until_s - time.monotonic()) > 0 and not (stop is not None and stop()):
        time.sleep(left_s if stop is None else min(left_s, _STOP_S))


@dataclass(frozen=True, slots=True, eq=False)
class _Commit:
    """One commit of a step: another of the same step is another commit.

    Attributes:
        step: The step.
        manifest: What was committed.
    """

    step: int
    manifest: Manifest

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Commit) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def key(self) -> tuple[int, int]:
        """The step and the save id."""
        return self.step, self.manifest.save_id


@dataclass(slots=True)
class _Look:
    """What was found in a step's folder.

    Attributes:
        modified_s: When the manifest was written, by the store's clock.
        first_s: When this was first seen, by ours.
        commit: What was found; None if it can't be read.
    """

    modified_s: float | None
    first_s: float
    commit: _Commit | None


class _Run:
    """A run's folder as it is seen from outside, and which of its commits have had their turn."""

    def __init__(self, store: Store, start: Literal["new", "all"] | int) -> None:
        self._store = store
        self._first = start if isinstance(start, int) else 0
        self._looks: dict[int, _Look] = {}
        self._passed: dict[int, int] = {}  # step → the save id that had its turn last
        if start == "new":
            for found in self._commits():
                self._passed[found.step] = found.manifest.save_id

    def place(self, step: int) -> Store:
        """Return a step's folder."""
        return PrefixStore(self._store, step_name(step))

    def next(self, *, every: bool, missed: AbstractSet[_Commit] = frozenset()) -> _Commit | None:
        """Look which commit is next: of those that had no turn the first step's, or the last's.

        Args:
            every: The first step's.
            missed: Those that can't be held now. One that is marked by a deleter that has died
                becomes free later.
        """
        waiting = [
            found
            for found in self._commits()
            if self._passed.get(found.step) != found.manifest.save_id
        ]
        if every:
            return next((found for found in waiting if found not in missed), None)
        for found in waiting[:-1]:
            self.pass_by(found)
        return waiting[-1] if waiting and waiting[-1] not in missed else None

    def pass_by(self, commit: _Commit) -> None:
        """Note that a commit has its turn."""
        self._passed[commit.step] = commit.manifest.save_id

    def _commits(self) -> list[_Commit]:
        """List what is committed, by ascending steps."""
        steps = {step_of(name) for name in self._store.names()}
        found = [
            self._look(step)
            for step in sorted(step for step in steps if step is not None)
            if step >= self._first
        ]
        return [commit for commit in found if commit is not None]

    def _look(self, step: int) -> _Commit | None:
        place = self.place(step)
        now_s = time.monotonic()
        try:
            modified_s = place.modified(MANIFEST_NAME)
        except FileNotFoundError:
            self._looks.pop(step, None)
            return None
        before = self._looks.get(step)
        if before is None or modified_s is None or before.modified_s != modified_s:
            first_s = now_s
        else:
            first_s = before.first_s
            if now_s - first_s > _RESOLUTION_S:
                return before.commit
        try:
            commit = _Commit(step, read_manifest(place))
        except (CheckpointNotFound, IncompleteCheckpoint):
            self._looks.pop(step, None)
            return None
        except (CorruptCheckpoint, UnsupportedFormat, StoreError) as exc:
            if _changed(place, modified_s):
                return None  # it was replaced while it was read: the next look tells
            if isinstance(exc, StoreError):
                raise
            if before is None or before.commit is not None or before.modified_s != modified_s:
                logger.warning("%s: left out, as it can't be read: %s", place.url, text(exc))
            commit = None
        self._looks[step] = _Look(modified_s, first_s, commit)
        return commit


def _changed(place: Store, modified_s: float | None) -> bool:
    try:
        return modified_s is None or place.modified(MANIFEST_NAME) != modified_s
    except FileNotFoundError:
        return True
