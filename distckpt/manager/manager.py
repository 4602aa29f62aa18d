"""The Manager: saves when it should, keeps what it should, resumes, and stops in time."""

from __future__ import annotations

import logging
import operator
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, Self

from distckpt.api import open as open_checkpoint
from distckpt.checkpoint import Checkpoint, StorageOptions, Url
from distckpt.errors import CheckpointError, CheckpointNotFound, SaveFailed, text
from distckpt.events import OnEvent, Teller
from distckpt.load_plan import LoadOptions, OnCorrupt, ResolvePerRank
from distckpt.manager.fence import Fence
from distckpt.manager.folder import Folder, Listing
from distckpt.manager.heartbeat import Beat, Heartbeat, Vote
from distckpt.manager.pruning import Explanation, explain, prune
from distckpt.manager.resume import agree_on_candidates, is_gone, load_first
from distckpt.manager.stopping import STOP_SIGNALS, Stopping
from distckpt.match import Prefixes, Rename
from distckpt.options import Lazy, OnFailure, Options, check_on_failure, check_staging
from distckpt.pending import PendingCheckpoint, make_ready, start_save
from distckpt.plan import Replicas
from distckpt.policy import KeepPolicy, Moment, SavePolicy, metrics_of, number, uses_metrics
from distckpt.policy.keeping import ranking
from distckpt.progress import Bar, Progress
from distckpt.store import Store, open_store
from distckpt.team import COORDINATOR, Late, Team, connect

logger = logging.getLogger(__name__)

# What a manifest, and the heartbeat's message, have room for.
_TOO_MANY_STEPS = 1 << 63
# How often a load looks what is there, when what it has found is deleted before it is read.
_ATTEMPTS = 5


@dataclass(slots=True)
class _Flight:
    """A save in flight.

    Attributes:
        step: Its step.
        begun_s: When it was begun, by this process's monotonic clock.
        pending: Itself, once it is begun.
        bar: Shows how far it is.
    """

    step: int
    begun_s: float
    pending: PendingCheckpoint | None = None
    bar: Bar | None = None

    def count(self) -> tuple[int, int]:
        """Return how many bytes are written on this rank, and how many there are."""
        pending = self.pending
        return (0, 0) if pending is None else (pending.bytes_done, pending.bytes_total)

    def show_end(self, text: str) -> None:
        """Show what became of it."""
        if self.bar is not None:
            self.bar.end(text)


class Manager:
    """Looks after the checkpoints of one run, each at ``<root>/step-<step>``.

    Args:
        root: Where they lie. Other things there are left alone.
        comm: As in `distckpt.save`.
        save: When `step` saves: policies such as ``EverySteps(100) | EverySeconds(600)``; never, if
            None.
        keep: What is kept after each commit, likewise: ``KeepLast(3) | KeepBest("loss")``;
            everything, if None. The newest committed checkpoint always is, and what is pinned, held
            by a reader, or damaged.
        max_pending: How many saves may be in flight. One more waits for the first of them.
        lazy: As in `distckpt.save_async`, and so are the next two.
        check_lazy: See there.
        staging_bytes: See there.
        state: What will be saved, or a state like it: it is planned, and memory for its copies is
            made ready in the background, so that the first save stalls hardly longer than others.
            Not kept. With it, this is collective.
        replicas: As in `distckpt.save`.
        on_failure: ``"raise"``: a save that failed is raised by the save or `wait` that waits for
            it. ``"warn"``: it is logged, told as an event, and training goes on.
        stop_signals: Which signals ask the run to save and stop. None: SIGTERM, SIGUSR1 and
            SIGUSR2 where `save` is given, else none. Handlers that were there are called, too.
        max_seconds: The run is asked to stop so early that its last save is done so many seconds
            after the Manager was made.
        on_event: Called with each `distckpt.events.Event`, at rank 0, in the training thread or
            another; one or several. What it raises is logged.
        progress: Whether rank 0 shows how far saves and loads are.
        timeout_s: As in `distckpt.save`.
        storage_options: Passed to the fsspec file system.

    Raises:
        ValueError: An argument that can't be.
        CheckpointError: As `distckpt.save` for `comm` and `root`.

    Used as a context manager it waits for the last save at the end. `step`, `save` and the loads
    are collective: every rank makes the same calls in the same order. Everything else is not, and
    may be called on any rank; what changes the run (`pin`, `unpin`) on one.

    Of several Managers on one root, the last to begin is the one that saves: from its first step,
    save or load on (a load counts only where `save` is given), all saves of earlier ones fail.
    """

    def __init__(
        self,
        root: Url,
        *,
        comm: object = None,
        save: SavePolicy | None = None,
        keep: KeepPolicy | None = None,
        max_pending: int = 1,
        lazy: Lazy = False,
        check_lazy: bool = False,
        staging_bytes: int | None = None,
        state: object = None,
        replicas: Replicas = "check",
        on_failure: OnFailure = "raise",
        stop_signals: Iterable[int] | None = None,
        max_seconds: float | None = None,
        on_event: OnEvent | Iterable[OnEvent] | None = None,
        progress: bool = False,
        timeout_s: float = 600,
        storage_options: StorageOptions = None,
    ) -> None:
        check_on_failure(on_failure)
        check_staging(lazy, staging_bytes)
        if max_pending < 1:
            raise ValueError(f"max_pending={max_pending}: expected at least 1")
        self._policy = _checked(save, "save", "due")
        self._keep = _checked(keep, "keep", "kept")
        self._max_pending = max_pending
        self._replicas = replicas
        self._lazy, self._check_lazy, self._staging_bytes = lazy, check_lazy, staging_bytes
        self._on_failure: OnFailure = on_failure
        self._timeout_s = timeout_s
        self._store: Store = open_store(root, storage_options=storage_options)
        self._team: Team = connect(comm, timeout_s=timeout_s)
        leads = self._team.rank == COORDINATOR
        self._folder = Folder(self._store)
        self._fence = Fence(self._store)
        self._tell = Teller(self._store.url, on_event) if leads else _tell_nobody
        self._progress = Progress(enabled=progress and leads)
        self._heartbeat = Heartbeat(self._team, timeout_s)
        if stop_signals is None:
            stop_signals = () if save is None else STOP_SIGNALS
        self._stopping = Stopping(
            self._store, rank=self._team.rank, signals=stop_signals, max_seconds=max_seconds
        )
        self._pending: deque[PendingCheckpoint] = deque()
        self._beat: Beat | None = None
        self._begun = 0  # saves
        self._cost: tuple[int, float] | None = None
        self._last_step = -1
        self._last_saved: int | None = None
        self._last_save_s = 0.0
        self._saved_metrics: list[Mapping[str, float]] | None = None
        self._missed_metrics: set[str] = set()
        self._has_committed = False
        self._is_stopping = False
        self._is_closed = False
        if state is not None:
            make_ready(self._team, self._store, state, self._options())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except CheckpointError:
            if error is None:
                raise
            # The loop's own error is what its caller must see.
            logger.exception("%s: the last save failed, too", self._store.url)

    def __repr__(self) -> str:
        return f"<Manager {self._store.url!r}>"

    def _options(self) -> Options:
        """Return what all saves have in common."""
        return Options(
            overwrite=True,
            replicas=self._replicas,
            lazy=self._lazy,
            check_lazy=self._check_lazy,
            staging_bytes=self._staging_bytes,
            timeout_s=self._timeout_s,
            on_failure=self._on_failure,
        )

    # --------------------------------------------------------------------------------------- saving

    def due(self, step: int) -> bool:
        """Whether `step` would save at this step, as far as is known now. Not collective.

        What this step's metrics would say is not known.
        """
        return self._is_due(self._moment(step, None))

    def step(
        self,
        step: int,
        state: object,
        *,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, object] | None = None,
    ) -> PendingCheckpoint | None:
        """Collective. Save if the policy says so, or if the run is asked to stop.

        Args:
            step: The training step that the state is of; the same on every rank.
            state: As in `distckpt.save`.
            metrics: Numbers to keep with it, such as the loss. The coordinator's count; given on
                all ranks or on none.
            metadata: As in `distckpt.save`.

        Returns:
            The save in flight, or None.

        Raises:
            CheckpointError: What is wrong with this save, or went wrong with the one before; or
                ranks are at different steps.
            ValueError: `step` is no number from 0 on, or lower than the one before.
        """
        step = self._checked_step(step)
        for pending in self._pending:
            pending.done()  # which drives its commit, where no other thread may
        is_first = self._beat is None
        self._beat = self._heartbeat.beat(step, Vote(self._stopping.vote(), self._cost))
        if is_first:
            self._last_save_s = self._beat.now_s
            if self._policy is not None:
                self._take_over()
        reason = self._beat.stop
        if reason is not None and not self._is_stopping:
            self._is_stopping = True
            self._stopping.obey(reason)
            self._tell("stop_requested", step, reason=reason)
        if not self._decide(self._moment(step, metrics)):
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
            CheckpointError: As in `step`; also that another Manager has taken over this root.
            ValueError: As in `step`.
        """
        step = self._checked_step(step)
        since_s = time.monotonic()
        self._take_over()
        self._make_room(step)
        self._note_metrics(self._keep, metrics or {})
        options = replace(
            self._options(),
            metadata=metadata,
            metrics=metrics,
            step=step,
            guard=partial(self._guard, step),
        )
        place = self._folder.place(step)
        flight = _Flight(step, time.monotonic())
        flight.bar = self._progress.begin(f"saving step {step}", flight.count)
        self._tell("save_begun", step, url=place.url)
        try:
            with self._heartbeat.listening():
                flight.pending = pending = start_save(
                    self._team,
                    place,
                    state,
                    options,
                    on_committed=partial(self._committed, flight),
                    on_failed=partial(self._failed, flight),
                )
        except BaseException as exc:
            flight.show_end("failed")
            self._tell("save_failed", step, url=place.url, error=text(exc))
            raise
        self._pending.append(pending)
        self._begun += 1
        # For so long the training loop was held up.
        self._cost = (self._begun, time.monotonic() - since_s)
        self._last_saved = step
        self._last_save_s = self._beat.now_s if self._beat is not None else 0.0
        if self._saved_metrics is not None and metrics is not None:
            self._saved_metrics.append(dict(metrics))
        return pending

    def wait(self) -> None:
        """Wait for the saves in flight, and for what is deleted after them. Not collective.

        Raises:
            SaveFailed: One failed; raised once. With ``on_failure="warn"`` it is only logged.
        """
        first: CheckpointError | None = None
        while self._pending:
            try:
                self._end(self._pending.popleft())
            except CheckpointError as exc:
                first = first or exc
        if first is not None:
            raise first

    def close(self) -> None:
        """Wait for the saves in flight, and put the signal handlers back. Not collective.

        Called at the end of a ``with`` block; a second call does nothing. What reads goes on to
        work.

        Raises:
            SaveFailed: As in `wait`.
        """
        self._is_closed = True
        try:
            self.wait()
        finally:
            self._heartbeat.close()
            self._stopping.close()

    def should_stop(self) -> bool:
        """Whether the run is asked to stop: the same on all ranks, as of the last `step`."""
        return self._is_stopping

    @property
    def stop_reason(self) -> str | None:
        """Why the run is asked to stop: a signal, the halt file, the end of its time; or None."""
        return None if self._beat is None else self._beat.stop

    # -------------------------------------------------------------------------------------- looking

    def steps(self) -> list[int]:
        """List the steps of the committed checkpoints, ascending. Not collective.

        One whose manifest can't be read is left out, with a warning.

        Raises:
            StoreError: The store can't be listed or read.
        """
        return list(self._folder.look().committed)

    def latest(self) -> int | None:
        """Return the newest committed step, or None. Not collective.

        Raises:
            StoreError: As in `steps`.
        """
        steps = self.steps()
        return steps[-1] if steps else None

    def best(self, metric: str, *, lowest: bool = True) -> int | None:
        """Return the committed step with the best metric, or None where none has it.

        Of equals the newest. Not collective.

        Args:
            metric: Its name.
            lowest: Whether lower is better.

        Raises:
            StoreError: As in `steps`.
        """
        found = ranking(self._folder.look().entries, metric, lowest=lowest)
        return found[0] if found else None

    def open(self, step: int) -> Checkpoint:
        """Open a step's checkpoint. Not collective.

        Raises:
            CheckpointError: As in `distckpt.open`.
        """
        return open_checkpoint(self._folder.place(step))

    # -------------------------------------------------------------------------------------- keeping

    def pin(self, step: int, reason: str) -> None:
        """Keep a checkpoint, whatever the policy says, until `unpin`. Not collective.

        Args:
            step: Its step.
            reason: Why, for people; `explain` says it.

        Raises:
            CheckpointNotFound: It isn't there.
            IncompleteCheckpoint: It is just being deleted; or was, by a Manager that died within
                the last ten minutes, and then it may stay.
            StoreError: The store failed.
        """
        # Held meanwhile: no deletion comes between.
        with self.open(step).hold():
            self._folder.pin(step, reason)

    def unpin(self, step: int) -> None:
        """Take a pin away; one that isn't there is fine. Not collective.

        Raises:
            StoreError: The store failed.
        """
        self._folder.unpin(step)

    def explain(self) -> Explanation:
        """Say for each checkpoint why it is kept, or would go at the next commit. Not collective.

        Nothing is deleted. Printed, a table.

        Raises:
            StoreError: The store failed.
        """
        return explain(self._folder, self._keep)

    # ------------------------------------------------------------------------------------- resuming

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
        on_corrupt: OnCorrupt = "raise",
    ) -> int:
        """Collective. Load the newest good checkpoint into a net, on any number of ranks.

        One that turns out to be damaged is passed over with a warning, marked, and never deleted or
        changed; then the one before is tried. What does not fit the net is not damage, and raised.

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
            on_corrupt: As in `distckpt.load_into`: with ``"skip"``, no checkpoint is passed over
                for damaged bytes.

        Returns:
            The step that was loaded, or `default`.

        Raises:
            CheckpointNotFound: There is none, and no `default`.
            LoadFailed: There are some, and all are damaged; or as in `distckpt.load_into`.
            CheckpointError: As in `distckpt.load_into`.
        """
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
            on_corrupt,
        )
        step = self._load(
            net, options, "load_latest_into from", lambda found: sorted(found.committed)[::-1]
        )
        if step is None and default is None:
            raise CheckpointNotFound(
                f"{self._store.url}: no committed checkpoint to resume from; pass default= to "
                "start anew"
            )
        return default if step is None else step  # type: ignore[return-value]

    def load_best_into(
        self,
        net: object,
        metric: str,
        *,
        lowest: bool = True,
        strict: bool = True,
        filter_prefix: Prefixes = (),
        only_prefix: Prefixes = (),
        select: Callable[[str], bool] | None = None,
        rename: Rename | None = None,
        cast: bool = True,
        verify: bool = True,
        per_rank: ResolvePerRank | None = None,
        on_corrupt: OnCorrupt = "raise",
    ) -> int:
        """Collective. Load the checkpoint with the best metric; see `load_latest_into`.

        Args:
            net: As in `load_latest_into`, and so are the other arguments.
            metric: Its name.
            lowest: Whether lower is better.
            strict: As in `load_latest_into`.
            filter_prefix: As in `load_latest_into`.
            only_prefix: As in `load_latest_into`.
            select: As in `load_latest_into`.
            rename: As in `load_latest_into`.
            cast: As in `load_latest_into`.
            verify: As in `load_latest_into`.
            per_rank: As in `load_latest_into`.
            on_corrupt: As in `load_latest_into`.

        Returns:
            The step that was loaded.

        Raises:
            CheckpointNotFound: None has this metric.
            CheckpointError: As in `load_latest_into`.
        """
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
            on_corrupt,
        )
        step = self._load(
            net,
            options,
            f"load_best_into by {metric} (lowest={lowest}) from",
            lambda found: ranking(found.entries, metric, lowest=lowest),
            only_chosen=True,
        )
        if step is None:
            raise CheckpointNotFound(
                f"{self._store.url}: no committed checkpoint has the metric {metric!r}"
            )
        return step

    # --------------------------------------------------------------------------------------- inside

    def _load(
        self,
        net: object,
        options: LoadOptions,
        call: str,
        choose: Callable[[Listing], list[int]],
        *,
        only_chosen: bool = False,
    ) -> int | None:
        self.wait()
        if self._policy is not None:
            self._take_over()
        for attempt in range(_ATTEMPTS):
            candidates = agree_on_candidates(
                self._team, self._folder, call, choose, timeout_s=self._timeout_s
            )
            if only_chosen:
                candidates.passed_over.clear()
            try:
                step = load_first(
                    self._team,
                    self._folder,
                    net,
                    options,
                    candidates,
                    tell=self._tell,
                    progress=self._progress,
                )
                break
            except CheckpointError as exc:
                if not is_gone(exc) or attempt == _ATTEMPTS - 1:
                    raise
                logger.info("%s: looking again: %s", self._store.url, text(exc))
        if step is not None:
            self._last_saved = self._last_step = step
        return step

    def _take_over(self) -> None:
        """Have who wrote here before know that it must not any more. Never raises."""
        # Not only at the commit: of two jobs, the one that began last must win, and not the one
        # that hung for longest. What goes wrong here goes wrong again at the commit, on all ranks.
        if self._team.rank == COORDINATOR:
            try:
                self._fence.take()
            except (CheckpointError, OSError) as exc:
                logger.warning("%s: not taken over yet: %s", self._store.url, text(exc))

    def _moment(self, step: int, metrics: Mapping[str, float] | None) -> Moment:
        beat = self._beat or Beat(0.0)
        return Moment(
            step=step,
            now_s=beat.now_s,
            last_step=self._last_saved,
            last_save_s=self._last_save_s,
            cost_s=beat.cost_s,
            saves=self._begun,
            stop=beat.stop,
            metrics=metrics,
            saved=self._saved_metrics or (),
        )

    def _is_due(self, moment: Moment) -> bool:
        if self._policy is None or moment.step == self._last_saved:
            return False
        return moment.stop is not None or self._policy.due(moment)

    def _decide(self, moment: Moment) -> bool:
        """Decide whether to save, the same on all ranks."""
        if self._policy is None or moment.metrics is None or not uses_metrics(self._policy):
            return self._is_due(moment)

        self._note_metrics(self._policy, moment.metrics)

        # Metrics may differ by rank.
        def decide(calls: list[Any]) -> list[Any]:
            if self._saved_metrics is None:
                committed = self._folder.look().committed.values()
                self._saved_metrics = [found.metrics for found in committed]
            return [self._is_due(self._moment(moment.step, moment.metrics))] * len(calls)

        call = {"call": f"Manager.step({moment.step}) with metrics", "error": None}
        operation = self._team.operation(self._timeout_s)
        try:
            return bool(
                self._team.drive(
                    operation.agree(call, decide, f"call Manager.step({moment.step}) with metrics")
                )
            )
        except Late as late:
            raise SaveFailed(
                f"{self._store.url}: {late}", failures=dict.fromkeys(late.ranks, str(late))
            ) from late

    def _note_metrics(self, policy: object, metrics: Mapping[str, float]) -> None:
        """Say once, at the coordinator, that a policy looks for what isn't there."""
        if self._team.rank != COORDINATOR:
            return
        for name in sorted(metrics_of(policy) - self._missed_metrics):
            if name not in metrics or number(metrics, name) is None:
                self._missed_metrics.add(name)
                logger.warning(
                    "%s: %r has no number for %s: this step is not among the best (said once)",
                    self._store.url,
                    metrics,
                    name,
                )

    def _checked_step(self, step: int) -> int:
        if self._is_closed:
            raise CheckpointError(f"{self._store.url}: this Manager is closed; make a new one")
        try:
            found = -1 if isinstance(step, bool) else operator.index(step)
        except TypeError:
            found = -1
        if not 0 <= found < _TOO_MANY_STEPS:
            raise ValueError(f"step={step!r}: expected a number from 0 on")
        if found < self._last_step:
            raise ValueError(
                f"step={found}, after step {self._last_step}: steps count a whole run, not an "
                "epoch, and the highest is what a run resumes from. To go back on purpose, load an "
                "older checkpoint with this Manager, or make a new one"
            )
        self._last_step = found
        return found

    def _make_room(self, step: int) -> None:
        """Wait for saves in flight until one more may be."""
        while len(self._pending) >= self._max_pending:
            pending = self._pending.popleft()
            if not pending.done():
                since = time.monotonic()
                pending.close()
                self._tell("backpressure", step, waited_s=time.monotonic() - since)
            self._end(pending)

    def _end(self, pending: PendingCheckpoint) -> None:
        """Wait for a save, and raise what went wrong."""
        pending.close()
        try:
            pending.wait()
        except CheckpointError:
            if self._on_failure == "raise":
                raise

    def _guard(self, step: int) -> None:
        """At the coordinator, immediately before a commit."""
        try:
            self._fence.check()
        except SaveFailed as exc:
            self._tell("fenced", step, error=text(exc))
            raise

    def _committed(self, flight: _Flight, checkpoint: Checkpoint) -> None:
        """At the coordinator, in the background, after a commit."""
        flight.show_end(str(checkpoint.stats))
        self._stopping.saved(time.monotonic() - flight.begun_s)
        self._tell(
            "save_committed",
            flight.step,
            url=checkpoint.url,
            stats=checkpoint.stats,
            metrics=checkpoint.metrics,
        )
        try:
            self._folder.note(flight.step, checkpoint.manifest)
            first, self._has_committed = not self._has_committed, True
            if first:
                self._warn_of_newer(flight.step)
            if self._keep is not None:
                prune(
                    self._folder,
                    self._keep,
                    upto=flight.step,
                    guard=self._fence.check,
                    tell=self._tell,
                    first=first,
                )
        except SaveFailed as exc:
            self._tell("fenced", flight.step, error=text(exc))
        self._folder.write_index()

    def _warn_of_newer(self, step: int) -> None:
        """Say if the run's newest checkpoints are not this job's."""
        listing = self._folder.look()
        damage = self._folder.damage(listing)
        newer = [found for found in listing.committed if found > step and found not in damage]
        if newer:
            logger.warning(
                "%s: step %d was saved, but %s is there, too, from before, and the highest is what "
                "a run resumes from. Load before training, use another root, or delete them",
                *(self._store.url, step, ", ".join(f"step {found}" for found in newer[:8])),
            )

    def _failed(self, flight: _Flight, error: BaseException) -> None:
        """At the coordinator, in the background, after a save that failed."""
        flight.show_end("failed")
        self._saved_metrics = None  # to be read anew: its own were not saved
        url = self._folder.place(flight.step).url
        self._tell("save_failed", flight.step, url=url, error=text(error))


def _checked(policy: Any, name: str, method: str) -> Any:  # noqa: ANN401  any class with the method
    if policy is not None and not callable(getattr(policy, method, None)):
        raise TypeError(f"{name}={policy!r}: expected a policy, which has a method {method}()")
    return policy


def _tell_nobody(*_: object, **__: object) -> None:
    """Only the coordinator tells."""
