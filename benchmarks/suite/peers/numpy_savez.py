"""`numpy.savez`: one file of one process. It knows no bfloat16, and gets its bits as integers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.suite import states
from benchmarks.suite.peers import Loaded, Peer, sync_share
from benchmarks.suite.turns import Ranks


def make(state: states.State, ranks: Ranks) -> Peer:
    """Make it ready; see `peers.make`."""
    arrays = {name: _known(states.array_of(leaf)) for name, leaf in state.items()}

    def save(path: Path) -> None:
        path.mkdir()
        np.savez(path / "state.npz", **arrays)
        sync_share(path, ranks)

    def load(path: Path) -> Loaded:
        with np.load(path / "state.npz") as file:
            return {name: file[name] for name in file}

    return Peer(
        save={"default": save},
        load={"default": load},
        missing={"start": "it has no asynchronous save"},
    )


def _known(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array
