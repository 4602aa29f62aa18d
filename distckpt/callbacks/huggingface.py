"""The Manager as a callback of Hugging Face's ``Trainer``. The door of transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from distckpt.callbacks import rest
from distckpt.manager import Manager


class ManagerCallback(TrainerCallback):
    """Saves by a `Manager`'s policies what a ``Trainer`` trains, and resumes from the newest.

    A checkpoint holds the model, the optimizer, and for each rank the trainer's state, the
    scheduler and the random generators. The trainer itself needs ``save_strategy="no"``::

        callback = ManagerCallback(manager)
        trainer = Trainer(..., callbacks=[callback])
        trainer.train(resume_from_checkpoint=callback.resume(trainer))

    Args:
        manager: Saves and loads. Its steps are the trainer's ``global_step``.
        metrics: Names of the last evaluation's metrics that the Manager is told at each step.
    """

    def __init__(self, manager: Manager, *, metrics: Sequence[str] = ()) -> None:
        self._manager, self._metrics = manager, metrics
        self._measured, self._state = dict[str, float](), dict[str, object]()
        self._loaded: dict[str, Any] = {}
        self._options: list[dict[str, Any]] = []

    def resume(self, trainer: Trainer) -> str | None:
        """Collective. Load the newest checkpoint; to be called before each ``trainer.train``.

        Returns:
            A folder for ``resume_from_checkpoint=``, made anew in the ``output_dir``, since the
            trainer reads its counters and the weights from one; None if there is no checkpoint.
        """
        others, optimizer = rest.Rest(lambda: _others(trainer)), trainer.create_optimizer()
        self._state = {"model": trainer.model, "optimizer": optimizer, "trainer": others}
        new = rest.options_of(optimizer)
        self._loaded = rest.load_newest(self._manager, self._state, others, [optimizer])
        if not self._loaded:
            return None
        self._options = rest.options_of(optimizer)
        rest.set_options(optimizer, new)  # from which the scheduler is made
        folder = Path(trainer.args.output_dir, "distckpt-resume")
        trainer.save_model(str(folder))
        if trainer.args.should_save:
            Path(folder, "trainer_state.json").write_text(self._loaded["state"], encoding="utf-8")
        trainer.accelerator.wait_for_everyone()
        return str(folder)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the scheduler back, and the learning rates, which it has just changed."""
        if not self._state:
            raise RuntimeError("expected train(resume_from_checkpoint=callback.resume(trainer))")
        if self._loaded:
            kwargs["lr_scheduler"].load_state_dict(self._loaded["scheduler"])
            rest.set_options(kwargs["optimizer"], self._options)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the random generators back, if the checkpoint was made between two epochs."""
        if float(state.epoch or 0).is_integer():
            self.on_step_begin(args, state, control)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the random generators back, once the batches done before were skipped."""
        if self._loaded:
            rest.set_random_states(self._loaded["random"])
            self._loaded = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note what was measured."""
        found = kwargs["metrics"]
        self._measured = {name: found[name] for name in self._metrics if name in found}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make a step of the Manager's."""
        self._manager.step(state.global_step, self._state, metrics=self._measured or None)
        control.should_training_stop |= self._manager.should_stop()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait until the last save is durable."""
        self._manager.wait()


def _others(trainer: Trainer) -> dict[str, Any]:
    callbacks = [c for c in trainer.callback_handler.callbacks if isinstance(c, ExportableState)]
    state = asdict(replace(trainer.state, stateful_callbacks=callbacks))
    scheduler = trainer.lr_scheduler.state_dict() if trainer.lr_scheduler else {}
    return {"state": json.dumps(state), "scheduler": scheduler, "random": rest.random_states()}
