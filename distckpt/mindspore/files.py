"""The files of a `ModelCheckpoint`: decided on by the Manager's policies, written as MindSpore's.

A file is one process's own, so nothing here is collective: each process decides for itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from distckpt.errors import CheckpointError, text
from distckpt.events import Teller
from distckpt.formats.base import Place
from distckpt.manager.stopping import Stopping
from distckpt.mindspore.background import PendingSave
from distckpt.mindspore.config import CheckpointConfig
from distckpt.mindspore.options import Hooks, is_async, place_to_write
from distckpt.mindspore.progress import Progress
from distckpt.mindspore.saving import save_file
from distckpt.policy import Entry, Moment
from distckpt.stats import Phase, RankStats, SaveStats
from distckpt.store import open_store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Written:
    """A file that was written.

    Attributes:
        place: Where.
        entry: Its number, and when it was durable, by the callback's clock.
    """

    place: Place
    entry: Entry


class Files:
    """Writes files when a policy says so, and deletes those that another one doesn't keep.

    Args:
        config: What is written when, and what is kept.
        path: Where the progress says that a file lies, without its ending.
        directory: Where a halt file may lie; none is looked for, if None.
        clock: Seconds, for the policies.
        hooks: As for the Manager.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        path: Callable[[Progress], str],
        *,
        directory: str | None,
        clock: Callable[[], float],
        hooks: Hooks,
    ) -> None:
        self.latest = ""
        self.stop_reason: str | None = None
        self._config = config
        self._path = path
        self._due, self._keep = config.save_policy(), config.keep_policy()
        self._clock = clock
        self._tell = Teller(directory or "", hooks.on_event)
        self._stopping: Stopping | None = None
        if hooks.stop_signals or hooks.max_seconds is not None:
            self._stopping = Stopping(
                open_store(directory or "."),
                rank=0,
                signals=hooks.stop_signals,
                max_seconds=hooks.max_seconds,
            )
        self._moment = Moment(0, clock(), last_step=0, last_save_s=clock())
        self._written: list[Written] = []
        self._count = 0
        self._pending: PendingSave | None = None

    def begin(self, step: int) -> None:
        """Count from here on: this step needs no file."""
        self._moment = replace(self._moment, last_step=step)

    def step(self, progress: Progress, net: object) -> PendingSave | None:
        """Save if the policy says so, or the run is to stop.

        Raises:
            CheckpointError: It can't be saved, or an asynchronous save before failed.
        """
        if self._stopping is not None and self.stop_reason is None:
            self.stop_reason = self._stopping.vote()
            if self.stop_reason is not None:
                self._stopping.obey(self.stop_reason)
                self._tell("stop_requested", progress.cur_step_num, reason=self.stop_reason)
        moment = replace(
            self._moment, step=progress.cur_step_num, now_s=self._clock(), stop=self.stop_reason
        )
        due = moment.stop is not None or (self._due is not None and self._due.due(moment))
        return self.save(progress, net) if due and not self.is_saved(moment.step) else None

    def is_saved(self, step: int) -> bool:
        """Whether a step has its file, or needs none."""
        return step == self._moment.last_step

    def save(self, progress: Progress, net: object, *, ending: str = "") -> PendingSave | None:
        """Save now; with an ending to the name it is a file apart, which is never deleted.

        Raises:
            CheckpointError: As in `step`.
        """
        config, step = self._config, progress.cur_step_num
        place = place_to_write(f"{self._path(progress)}{ending}.{config.format}", config.format)
        background = is_async(config.async_save) and not ending
        since = time.monotonic()
        if self._pending is not None and not self._pending.done():
            self._pending.join()
            self._tell("backpressure", step, url=place.url, waited_s=time.monotonic() - since)
        begun_s = time.time()
        self._tell("save_begun", step, url=place.url)

        def ended(error: BaseException | None) -> None:  # by the thread that wrote it
            if error is not None:
                self._tell("save_failed", step, url=place.url, error=text(error))
                return
            stats = _stats(place, begun_s, background=background)
            self._tell("save_committed", step, url=place.url, stats=stats)
            if self._stopping is not None:
                self._stopping.saved(stats.seconds)
            self.latest = place.url
            if not ending:
                self._prune(place)

        pending = save_file(
            place,
            net,
            config.options,
            append_dict=config.entries(epoch=progress.cur_epoch_num, step=step),
            background=background,
            ended=ended,
        )
        if not ending:
            self._pending = pending
            self._moment = replace(self._moment, last_step=step, last_save_s=self._clock())
        return pending

    def wait(self) -> None:
        """Wait until all is durable.

        Raises:
            CheckpointError: An asynchronous save failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.wait()

    def close(self, error: BaseException | None = None) -> None:
        """Put signal handlers back."""
        del error
        if self._stopping is not None:
            self._stopping.close()

    def _prune(self, newest: Place) -> None:
        """Note a file that is durable now, and delete those that aren't kept beside it."""
        self._count += 1  # steps may begin anew
        entry = Entry(self._count, self._clock())
        files = [each for each in self._written if each.place.url != newest.url]
        files.append(Written(newest, entry))
        keep = self._keep.kept([each.entry for each in files]) | {entry.step}
        self._written = [each for each in files if each.entry.step in keep]
        for each in files:
            if each.entry.step in keep:
                continue
            try:
                each.place.parent.delete([each.place.name])
            except CheckpointError:
                logger.warning("%s: can't be deleted", each.place.url, exc_info=True)
            else:
                self._tell("pruned", url=each.place.url, reason=repr(self._keep))


def _stats(place: Place, begun_s: float, *, background: bool) -> SaveStats:
    """What a file cost; the loop was held up unless it was written in the background."""
    phase = Phase("write" if background else "stage", begun_s, time.time())
    return SaveStats({0: RankStats(place.size(), [phase])})
