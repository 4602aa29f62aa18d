"""The checkpoints of a `ModelCheckpoint` with ``format="distckpt"``: a `Manager`'s."""

from __future__ import annotations

from typing import Any

from distckpt.manager import Manager
from distckpt.mindspore.config import CheckpointConfig
from distckpt.mindspore.options import Hooks, is_async
from distckpt.mindspore.progress import Progress
from distckpt.mindspore.values import named
from distckpt.pending import PendingCheckpoint
from distckpt.policy import OnPreemption

_NOTHING = -1


class Managed:
    """Saves all ranks' nets together by a Manager. Its methods are collective.

    Args:
        config: When to save, what, and what to keep.
        root: The run's folder.
        hooks: As for the Manager.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        root: str,
        hooks: Hooks,
    ) -> None:
        self.manager = Manager(
            root,
            save=config.save_policy() or OnPreemption(),
            keep=config.keep_policy(),
            on_event=hooks.on_event,
            stop_signals=hooks.stop_signals,
            max_seconds=hooks.max_seconds,
        )
        self._config = config
        self._latest: PendingCheckpoint | None = None
        self._step = 0

    @property
    def latest(self) -> str:
        """The newest checkpoint's URL, once it is committed; empty before."""
        if self._latest is None:
            return ""
        return self._latest.url if self._latest.done() else ""

    @property
    def stop_reason(self) -> str | None:
        """Why the run should stop, or None."""
        return self.manager.stop_reason

    def begin(self, step: int) -> None:
        """Count from here on: this step needs no checkpoint."""
        self._step = step

    def is_saved(self, step: int) -> bool:
        """Whether a step has its checkpoint, or needs none."""
        return step == self._step

    def step(self, progress: Progress, net: object) -> PendingCheckpoint | None:
        """Save if the policy says so, or the run is to stop."""
        pending = self.manager.step(
            progress.cur_step_num, _state(net), metadata=self._metadata(progress)
        )
        return self._begun(pending, progress) if pending is not None else None

    def save(self, progress: Progress, net: object) -> PendingCheckpoint:
        """Save now."""
        pending = self.manager.save(
            progress.cur_step_num, _state(net), metadata=self._metadata(progress)
        )
        return self._begun(pending, progress)

    def load_latest_into(self, net: object, *, default: int | None, strict: bool) -> Progress:
        """Load the newest good checkpoint; see `Manager.load_latest_into`.

        Returns:
            Where the training was when it was saved.
        """
        found = self.manager.load_latest_into(
            net, default=None if default is None else _NOTHING, strict=strict
        )
        if found == _NOTHING:
            self._step = default or 0
            return Progress(1, self._step, self._step, net)
        self._step = found
        told: Any = self.manager.open(found).metadata
        return Progress(told["cur_epoch_num"], found, found - told["step_in_epoch"], net)

    def wait(self) -> None:
        """Wait until all is durable."""
        self.manager.wait()

    def close(self, error: BaseException | None = None) -> None:
        """Wait, and end the Manager."""
        self.manager.__exit__(type(error) if error else None, error, None)

    def _begun(self, pending: PendingCheckpoint, progress: Progress) -> PendingCheckpoint:
        self._latest, self._step = pending, progress.cur_step_num
        if not is_async(self._config.async_save):
            pending.wait()
        return pending

    def _metadata(self, progress: Progress) -> dict[str, object]:
        told = {"cur_epoch_num": progress.cur_epoch_num, "step_in_epoch": progress.step_in_epoch}
        more = self._config.entries(epoch=progress.cur_epoch_num, step=progress.cur_step_num)
        return {**more, **told}


def _state(net: object) -> object:
    """Name the parameters of a list."""
    return named(net) if isinstance(net, list) else net
