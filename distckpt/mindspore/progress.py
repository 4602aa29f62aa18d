"""Where a training is, and how its files are called."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Progress:
    """Where the training is; has the names that callables given to `ModelCheckpoint` know.

    Attributes:
        cur_epoch_num: The epoch, from 1.
        cur_step_num: Steps done since the training began.
        first_step: Steps done before this epoch.
        train_network: The net.
    """

    cur_epoch_num: int = 1
    cur_step_num: int = 0
    first_step: int = 0
    train_network: object = None

    @classmethod
    def of(cls, run_context: Any) -> Progress:
        """Take it from MindSpore's context; what that doesn't hold yet is 0."""
        told = run_context.original_args()
        step, steps = told.get("cur_step_num", 0), told.get("batch_num", 0)
        in_epoch = (step - 1) % steps + 1 if step and steps else step
        epoch = told.get("cur_epoch_num", 0)
        return cls(epoch, step, step - in_epoch, told.get("train_network"))

    @property
    def step_in_epoch(self) -> int:
        """The step in the epoch, from 1."""
        return self.cur_step_num - self.first_step


def free_prefix(prefix: str, names: Iterable[str]) -> str:
    """Return a prefix that no checkpoint file in a folder has.

    Examples:
        >>> free_prefix("lenet", ["lenet-2019.ckpt", "lenetto-1_1.ckpt"])
        'lenet'
        >>> free_prefix("lenet", ["lenet-1_10.ckpt", "lenet_4-2_10_breakpoint.ckpt"])
        'lenet_5'
    """
    pattern = re.compile(
        rf"{re.escape(prefix)}(?:_(\d+))?-\d+_\d+(?:_breakpoint)?\.(?:ckpt|safetensors)"
    )
    found = [match for match in map(pattern.fullmatch, names) if match]
    numbers = [int(match[1] or 0) for match in found]
    return f"{prefix}_{max(numbers) + 1}" if numbers else prefix
