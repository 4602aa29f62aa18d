"""safetensors: one file of one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from benchmarks.suite import states
from benchmarks.suite.peers import Loaded, Peer, sync_share
from benchmarks.suite.turns import Ranks


def make(state: states.State, ranks: Ranks) -> Peer:
    """Make it ready; see `peers.make`."""
    arrays = {name: states.array_of(leaf) for name, leaf in state.items()}
    wanted = {name: states.array_of(leaf) for name, leaf in states.empty(state).items()}

    def save(path: Path) -> None:
        path.mkdir()
        save_file(arrays, path / "model.safetensors")
        sync_share(path, ranks)

    def load(path: Path) -> Loaded:
        return load_file(path / "model.safetensors")

    def load_into(path: Path) -> Loaded:
        with safe_open(path / "model.safetensors", framework="np") as file:
            for name, array in wanted.items():
                np.copyto(array, file.get_tensor(name))
        return wanted

    return Peer(
        save={"default": save},
        load={"default": load, "into arrays that are there": load_into},
        missing={"start": "it has no asynchronous save"},
    )
