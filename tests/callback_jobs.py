"""Trainings with the loops of others, for tests/test_callbacks.py; a program, too, to be killed.

``python callback_jobs.py lightning|huggingface FOLDER JSON-OPTIONS``
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import warnings
from pathlib import Path

import torch

import distckpt

SAMPLES, BATCH, EPOCHS = 48, 8, 4  # 6 batches an epoch


def module():
    return torch.nn.Sequential(
        torch.nn.Linear(5, 9),
        torch.nn.BatchNorm1d(9),
        torch.nn.Dropout(0.3),
        torch.nn.Linear(9, 1),
    )


def samples():
    random = torch.Generator().manual_seed(0)
    return torch.randn(SAMPLES, 5, generator=random), torch.randn(SAMPLES, 1, generator=random)


def manager(folder, options):
    return distckpt.Manager(
        folder / "run",
        save=distckpt.EverySteps(options.get("every", 5)),
        keep=distckpt.KeepLast(2),
        stop_signals=(signal.SIGTERM,),
        comm=distckpt.Solo(),
    )


def interrupted(step, options):
    """Do what the options ask for at this step, before it is made."""
    if step == options.get("kill_at"):
        os.kill(os.getpid(), signal.SIGKILL)
    if step == options.get("terminate_at"):
        signal.raise_signal(signal.SIGTERM)


class StatefulLoader:
    """Batches in order; knows where it is, and goes on from there."""

    def __init__(self, data):
        self._batches = list(zip(*(each.split(BATCH) for each in data), strict=True))
        self._next = 0

    def __len__(self):
        return len(self._batches)

    def __iter__(self):
        self._next %= len(self)  # a whole epoch is followed by another one
        while self._next < len(self):
            self._next += 1
            yield self._batches[self._next - 1]

    def state_dict(self):
        return {"next": self._next}

    def load_state_dict(self, state):
        self._next = state["next"]


def train_lightning(folder, options):
    """Train, or go on; returns steps before → losses of the batches."""
    import lightning.pytorch as lightning
    from torch.utils.data import DataLoader, TensorDataset

    from distckpt.callbacks.lightning import ManagerCallback

    logging.getLogger("lightning").setLevel(logging.ERROR)
    losses = {}

    class Net(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = module()

        def training_step(self, batch, index):
            interrupted(self.global_step, options)
            x, y = batch
            loss = ((self.net(x) - y) ** 2).mean()
            self.log("loss", loss)
            losses.setdefault(self.global_step, []).append(loss.item())
            return loss

        def validation_step(self, batch, index):
            self.log("noise", torch.rand(()))  # a validation that draws random numbers

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=99)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    torch.manual_seed(1)
    data = TensorDataset(*samples())
    with warnings.catch_warnings(), manager(folder, options) as runs:
        warnings.simplefilter("ignore")
        callback = ManagerCallback(runs, metrics=["loss"])
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=EPOCHS,
            accumulate_grad_batches=options.get("accumulate", 1),
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = DataLoader(data, BATCH, shuffle=True)
        if options.get("stateful"):
            loader = StatefulLoader(samples())
        trainer.fit(Net(), loader, DataLoader(data, BATCH, shuffle=False))
    return losses


def train_huggingface(folder, options):
    """Train, or go on; returns steps before → loss, learning rate and norm of the gradient."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from distckpt.callbacks.huggingface import ManagerCallback

    logging.getLogger("transformers").setLevel(logging.ERROR)
    trained = []  # steps, by the number of those before

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = module()

        def forward(self, x, labels):
            out = self.net(x)
            return {"loss": ((out - labels) ** 2).mean(), "logits": out}

    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            trained.append(state.global_step)
            interrupted(state.global_step, options)

    torch.manual_seed(1)
    data = [{"x": x, "labels": y} for x, y in zip(*samples(), strict=True)]
    with warnings.catch_warnings(), manager(folder, options) as runs:
        warnings.simplefilter("ignore")
        callback = ManagerCallback(runs)
        trainer = Trainer(
            Net(),
            TrainingArguments(
                str(folder / "out"),
                num_train_epochs=EPOCHS,
                per_device_train_batch_size=BATCH,
                gradient_accumulation_steps=options.get("accumulate", 1),
                learning_rate=0.05,
                lr_scheduler_type="cosine",
                warmup_steps=4,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=data,
            callbacks=[callback, Interrupt()],
        )
        trainer.train(resume_from_checkpoint=callback.resume(trainer))
    return {
        entry["step"] - 1: [entry["loss"], entry["learning_rate"], entry["grad_norm"]]
        for entry in trainer.state.log_history
        if "loss" in entry and entry["step"] > trained[0]
    }


TRAIN = {"lightning": train_lightning, "huggingface": train_huggingface}

if __name__ == "__main__":
    TRAIN[sys.argv[1]](Path(sys.argv[2]), json.loads(sys.argv[3]))
