"""The Manager as a callback of Lightning's ``Trainer``. The door of lightning."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Any

from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from distckpt.callbacks.rest import Rest, load_newest, random_states, set_random_states
from distckpt.manager import Manager


class ManagerCallback(Callback):
    """Saves by a `Manager`'s policies what ``trainer.fit`` trains, and resumes from the newest.

    A checkpoint holds the module, the optimizers, and for each rank the loops' counters, the
    schedulers and the random generators. A handler of SIGTERM that is there before the fit, such as
    the Manager's, counts, and not Lightning's own, which would end one rank before the others.

    Args:
        manager: Saves and loads. Its steps are the trainer's ``global_step``.
        metrics: Names of logged values that the Manager is told at each step, once they are there.
    """

    def __init__(self, manager: Manager, *, metrics: Sequence[str] = ()) -> None:
        self._manager, self._metrics = manager, metrics
        self._state: dict[str, object] = {}
        self._loaded, self._epoch_began = dict[str, Any](), dict[str, Any]()
        self._epochs, self._last_step = 0, -1  # epochs that have ended in this fit
        self._on_sigterm: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the newest checkpoint, if there is one."""
        self._on_sigterm = signal.getsignal(signal.SIGTERM)
        self._epoch_began, self._epochs = random_states(), 0
        rest = Rest(lambda: self._rest(trainer))
        self._state = {"model": pl_module, "optimizer": trainer.optimizers, "trainer": rest}
        found = load_newest(self._manager, self._state, rest, trainer.optimizers)
        if found:
            trainer.fit_loop.load_state_dict(found["loop"])
            for each, state in zip(trainer.lr_scheduler_configs, found["schedulers"], strict=True):
                each.scheduler.load_state_dict(state)
            self._epoch_began = found["epoch_began"] if found["batches"] else found["now"]
            set_random_states(self._epoch_began)
        self._loaded, self._last_step = found, trainer.global_step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the epoch's batches anew, in their order, without those trained on before."""
        if callable(self._on_sigterm):
            signal.signal(signal.SIGTERM, self._on_sigterm)
        found, self._loaded = self._loaded, {}
        if found and "combined_loader" not in found["loop"]["state_dict"]:  # else Lightning did it
            set_random_states(self._epoch_began)
            batches: Any = trainer.fit_loop._data_fetcher  # noqa: SLF001  nothing public skips
            for loader in batches.combined_loader.flattened:
                _set_sampler_epoch(loader, trainer.fit_loop.epoch_progress.current.processed)
            iter(batches)
            for _ in range(found["batches"]):
                next(batches)
            batches.fetched -= found["batches"]  # which the loop adds by itself
        if found.get("batches"):
            set_random_states(found["now"])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note on what the order of the epoch's batches depends; the first one is begun before."""
        if self._epochs:
            self._epoch_began = random_states()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Make a step of the Manager's; an epoch's last one only when its validation is over."""
        if not trainer.is_last_batch:
            self._step(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the epoch's last step."""
        self._epochs += 1
        self._step(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait until the last save is durable."""
        self._manager.wait()

    def _step(self, trainer: Trainer) -> None:
        if trainer.global_step != self._last_step:  # else gradients were accumulated
            self._last_step, logged = trainer.global_step, trainer.callback_metrics
            metrics = {name: float(logged[name]) for name in self._metrics if name in logged}
            self._manager.step(trainer.global_step, self._state, metrics=metrics or None)
            trainer.should_stop |= self._manager.should_stop()

    def _rest(self, trainer: Trainer) -> dict[str, Any]:
        loop, progress = trainer.fit_loop.state_dict(), trainer.fit_loop.epoch_loop.batch_progress
        batches = 0 if trainer.is_last_batch else progress.current.ready
        schedulers = [each.scheduler.state_dict() for each in trainer.lr_scheduler_configs]
        states = {"epoch_began": self._epoch_began, "now": random_states()}
        return {"loop": loop, "batches": batches, "schedulers": schedulers, **states}
