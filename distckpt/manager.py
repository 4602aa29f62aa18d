"""The checkpoints of one run, by step: when to save, what to keep, where to resume."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from distckpt.api import open as open_checkpoint
from distckpt.checkpoint import Checkpoint, StorageOptions, Url
from distckpt.commit import delete_checkpoint
from distckpt.errors import (
    CheckpointError,
    CheckpointNotFound,
    IncompleteCheckpoint,
    LoadFailed,
    StoreError,
)
from distckpt.load_plan import LoadOptions, ResolvePerRank
from distckpt.loader import LoadReport
from distckpt.loader import load_into as load_net
from distckpt.match import Prefixes, Rename
from distckpt.pending import PendingCheckpoint, start_save
from distckpt.plan import Replicas
from distckpt.policy import KeepPolicy, SavePolicy
from distckpt.prepare import Options
from distckpt.store import PrefixStore, Store, open_store
from distckpt.team import COORDINATOR, Late, Team, connect

logger = logging.getLogger(__name__)

_STEP = re.compile(r"step-(\d{8,})")


def step_name(step: int) -> str:
    """Name of a step's checkpoint below the root."""
    return f"step-{step:08d}"


class Manager:
    """Looks after the checkpoints of one run, each at ``<root>/step-<step>``.

    Args:
        root: Where they lie. Other things there are left alone.
        comm: As in `distckpt.save`.
        save: When `step` saves; never, if None.
        keep: What is kept after each commit; everything, if None. The newest committed checkpoint
            always is.
        replicas: As in `distckpt.save`.
        timeout_s: As in `distckpt.save`.
        storage_options: Passed to the fsspec file system.

    One save is in flight at a time: the next one waits for it. Used as a context manager it waits
    for the last one. Every method that saves or loads is collective: every rank makes the same
    calls in the same order.
    """

    def __init__(
        self,
        root: Url,
        *,
        comm: object = None,
        save: SavePolicy | None = None,
        keep: KeepPolicy | None = None,
        replicas: Replicas = "check",
        timeout_s: float = 600,
        storage_options: StorageOptions = None,
    ) -> None:
        self._store: Store = open_store(root, storage_options=storage_options)
        self._team: Team = connect(comm, timeout_s=timeout_s)
        self._policy = save
        self._keep = keep
        self._replicas = replicas
        self._timeout_s = timeout_s
        self._pending: PendingCheckpoint | None = None
        self._last_saved: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except CheckpointError:
            if error is None:
                raise
            # The loop's own error is what its caller must see.
            logger.exception("%s: the last save failed, too", self._store.url)

    def __repr__(self) -> str:
        return f"<Manager {self._store.url!r}>"

    def due(self, step: int) -> bool:
        """Whether `step` would save at this step. Not collective."""
        return self._policy is not None and step != self._last_saved and self._policy.due(step)

    def step(
        self,
        step: int,
        state: object,
        *,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, object] | None = None,
    ) -> PendingCheckpoint | None:
        """Collective. Save if the policy says so.

        Args:
            step: The training step that the state is of.
            state: As in `distckpt.save`.
            metrics: Numbers to keep with it, such as the loss. The coordinator's count.
            metadata: As in `distckpt.save`.

        Returns:
            The save in flight, or None.

        Raises:
            CheckpointError: What is wrong with this save, or went wrong with the one before.
        """
        if self._pending is not None:
            self._pending.done()  # which drives its commit, where no other thread may
        if not self.due(step):
            return None
        return self.save(step, state, metrics=metrics, metadata=metadata)

    def save(
        self,
        step: int,
        state: object,
        *,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, object] | None = None,
    ) -> PendingCheckpoint:
        """Collective. Save now, asynchronously; see `step`.

        A checkpoint of the same step that is there already, as after resuming from an older one, is
        replaced.

        Args:
            step: As in `step`, and so are the other arguments.
            state: As in `step`.
            metrics: As in `step`.
            metadata: As in `step`.

        Returns:
            The save in flight.

        Raises:
            CheckpointError: As in `step`.
        """
        self.wait()
        options = Options(
            overwrite=True,
            replicas=self._replicas,
            metadata=metadata,
            metrics=metrics,
            step=step,
            timeout_s=self._timeout_s,
        )
        place = PrefixStore(self._store, step_name(step))
        self._pending = start_save(
            self._team, place, state, options, on_committed=lambda _: self._prune(step)
        )
        self._last_saved = step
        return self._pending

    def wait(self) -> None:
        """Wait for the save in flight, if there is one. Not collective.

        Raises:
            SaveFailed: It failed; raised once.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.close()
            pending.wait()

    def steps(self) -> list[int]:
        """List the steps of the committed checkpoints, ascending. Not collective.

        Raises:
            StoreError: The store can't be listed or read.
        """
        found = []
        for name in self._store.names():
            match = _STEP.fullmatch(name)
            if match and self._is_committed(name):
                found.append(int(match[1]))
        return sorted(found)

    def _is_committed(self, name: str) -> bool:
        try:
            open_checkpoint(PrefixStore(self._store, name))
        except (CheckpointNotFound, IncompleteCheckpoint):
            return False
        except StoreError:
            # Nobody knows what is there: a run that went on without it could start anew.
            raise
        except CheckpointError as exc:
            logger.warning("%s/%s: this checkpoint can't be opened: %s", self._store.url, name, exc)
            return False
        return True

    def latest(self) -> int | None:
        """Return the newest committed step, or None. Not collective.

        Raises:
            StoreError: As in `steps`.
        """
        steps = self.steps()
        return steps[-1] if steps else None

    def open(self, step: int) -> Checkpoint:
        """Open a step's checkpoint. Not collective.

        Raises:
            CheckpointError: As in `distckpt.open`.
        """
        return open_checkpoint(PrefixStore(self._store, step_name(step)))

    def load_latest_into(
        self,
        net: object,
        *,
        default: int | None = None,
        strict: bool = True,
        filter_prefix: Prefixes = (),
        only_prefix: Prefixes = (),
        select: Callable[[str], bool] | None = None,
        rename: Rename | None = None,
        cast: bool = True,
        verify: bool = True,
        per_rank: ResolvePerRank | None = None,
    ) -> int:
        """Collective. Load the newest committed checkpoint into a net, on any number of ranks.

        Args:
            net: As in `distckpt.load_into`, and so are the other arguments; but `strict` is True by
                default, since a run that resumes with half of its state would be silently wrong.
            default: What to return when there is no checkpoint.
            strict: As in `distckpt.load_into`.
            filter_prefix: As in `distckpt.load_into`.
            only_prefix: As in `distckpt.load_into`.
            select: As in `distckpt.load_into`.
            rename: As in `distckpt.load_into`.
            cast: As in `distckpt.load_into`.
            verify: As in `distckpt.load_into`.
            per_rank: As in `distckpt.load_into`.

        Returns:
            The step that was loaded, or `default`.

        Raises:
            CheckpointNotFound: There is none, and no `default`.
            CheckpointError: As in `distckpt.load_into`.
        """
        self.wait()
        step = self._agree_on_latest()
        if step is None:
            if default is None:
                raise CheckpointNotFound(
                    f"{self._store.url}: no committed checkpoint to resume from; pass default= to "
                    "start anew"
                )
            return default
        options = LoadOptions(
            strict,
            filter_prefix,
            only_prefix,
            select,
            rename,
            cast,
            verify,
            per_rank,
            self._timeout_s,
        )
        report: LoadReport = load_net(
            self._team, PrefixStore(self._store, step_name(step)), net, options
        )
        if self._team.rank == COORDINATOR:
            logger.info("%s: resumed from step %d: %s", self._store.url, step, report)
        self._last_saved = step
        return step

    def _agree_on_latest(self) -> int | None:
        """The coordinator looks, and tells the others."""

        def decide(calls: list[Any]) -> list[Any]:
            return [self.latest()] * len(calls)

        call = {"call": f"load_latest_into from {self._store.url!r}", "error": None}
        operation = self._team.operation(self._timeout_s)
        try:
            step: int | None = self._team.drive(
                operation.agree(call, decide, f"resume from {self._store.url}")
            )
        except Late as late:
            raise LoadFailed(
                f"{self._store.url}: {late}", failures=dict.fromkeys(late.ranks, str(late))
            ) from late
        return step

    def _prune(self, newest: int) -> None:
        """At the coordinator, after a commit: delete what the policy does not keep."""
        if self._keep is None:
            return
        steps = [step for step in self.steps() if step <= newest]
        kept = self._keep.kept(steps) | {newest}
        for step in steps:
            if step not in kept:
                place = PrefixStore(self._store, step_name(step))
                delete_checkpoint(place, open_checkpoint(place).manifest)
                logger.info("%s: deleted, as the policy keeps %s", place.url, sorted(kept))
