"""What a loop needs beside tensors to go on exactly: its counters, and random generators."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from distckpt.frameworks.torch import make_state
from distckpt.manager import Manager
from distckpt.state import PerRank


class Rest:
    """A net of one value a rank, captured when a save asks for it.

    Args:
        capture: Returns nested plain values and arrays.
    """

    def __init__(self, capture: Callable[[], dict[str, Any]]) -> None:
        self._capture = capture
        self.loaded: dict[str, Any] = {}

    def tensors(self) -> Mapping[str, object]:
        """Capture it."""
        return {"rest": PerRank(self._capture())}

    def assign(self, name: str, value: Any) -> None:
        """Take what was loaded."""
        self.loaded = value.value


def load_newest(
    manager: Manager, state: Mapping[str, object], rest: Rest, optimizers: Sequence[Any]
) -> dict[str, Any]:
    """Collective. Load the newest checkpoint into the state of a loop that hasn't begun yet.

    On another number of ranks than it was saved by, each takes the rest of one of those: counters
    are alike, and random numbers of several ranks may be.

    Args:
        manager: Loads it.
        state: What to load into.
        rest: A part of it.
        optimizers: Others.

    Returns:
        What the rest was; empty where there is no checkpoint, and all is as it was.
    """
    blank = [each for each in optimizers if not each.state]
    for optimizer in blank:
        make_state(optimizer)
    manager.load_latest_into(
        state, default=0, per_rank=lambda saved, rank, _size: saved[rank % len(saved)]
    )
    if not rest.loaded:
        for optimizer in blank:
            optimizer.state.clear()
    return rest.loaded


def random_states() -> dict[str, Any]:
    """Copy the states of this process's global generators: Python's, numpy's, torch's, CUDA's."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state().numpy(),
        "cuda": [state.numpy() for state in torch.cuda.get_rng_state_all()],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put what `random_states` copied back; GPUs' where there are as many as then."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(torch.from_numpy(states["torch"].copy()))
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([torch.from_numpy(each.copy()) for each in states["cuda"]])


def options_of(optimizer: Any) -> list[dict[str, Any]]:
    """Copy the learning rates, and whatever else an optimizer's groups have beside parameters."""
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def set_options(optimizer: Any, options: list[dict[str, Any]]) -> None:
    """Put what `options_of` copied back."""
    for group, kept in zip(optimizer.param_groups, options, strict=True):
        group.update(kept)
