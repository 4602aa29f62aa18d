"""MindSpore: one process, in an environment of its own. It gets bfloat16's bits as float16."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import mindspore
import numpy as np

from benchmarks.suite import states
from benchmarks.suite.bench import InFlight
from benchmarks.suite.peers import InThread, Loaded, Peer, sync_share
from benchmarks.suite.turns import Ranks

_THREAD = "asyn_save_ckpt"  # its own name for what writes


def make(state: states.State, ranks: Ranks) -> Peer:
    """Make it ready; see `peers.make`."""
    tensors = [
        {"name": name, "data": mindspore.Tensor(_known(states.array_of(leaf)))}
        for name, leaf in state.items()
    ]
    wanted = {name: _known(states.array_of(leaf)) for name, leaf in states.empty(state).items()}

    def write(path: Path, kind: str, *, async_save: bool = False) -> None:
        path.mkdir()
        mindspore.save_checkpoint(
            tensors, str(path / f"model.{kind}"), format=kind, async_save=async_save
        )

    def save(kind: str) -> Callable[[Path], object]:
        def run(path: Path) -> None:
            write(path, kind)
            sync_share(path, ranks)

        return run

    def start(kind: str) -> Callable[[Path], InFlight]:
        def run(path: Path) -> InFlight:
            write(path, kind, async_save=True)

            def finish() -> None:
                for thread in threading.enumerate():
                    if thread.name == _THREAD:
                        thread.join()
                sync_share(path, ranks)

            return InThread(finish)

        return run

    def load(kind: str) -> Callable[[Path], Loaded]:
        def run(path: Path) -> Loaded:
            found = mindspore.load_checkpoint(str(path / f"model.{kind}"), format=kind)
            if kind == "ckpt":
                return {name: value.asnumpy() for name, value in found.items()}
            # These only map the file: not a byte has been read yet.
            for name, array in wanted.items():
                np.copyto(array, found[name].asnumpy())
            return wanted

        return run

    kinds = {"default": "ckpt", "safetensors": "safetensors"}
    return Peer(
        save={name: save(kind) for name, kind in kinds.items()},
        start={name: start(kind) for name, kind in kinds.items()},
        load={name: load(kind) for name, kind in kinds.items()},
    )


def _known(array: np.ndarray) -> np.ndarray:
    return array.view(np.float16) if array.dtype.name == "bfloat16" else array
