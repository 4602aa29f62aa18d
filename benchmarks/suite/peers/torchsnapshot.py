"""torchsnapshot: sharded tensors as torch's ShardedTensors, over gloo."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed._shard.sharded_tensor import Shard, init_from_local_shards
from torchsnapshot import Snapshot, StateDict

import distckpt
from benchmarks.suite import states
from benchmarks.suite.bench import InFlight
from benchmarks.suite.peers import InThread, Loaded, Peer, sync_share
from benchmarks.suite.peers.dcp import numpy_of, start_gloo, torch_of
from benchmarks.suite.turns import Ranks


def make(state: states.State, ranks: Ranks) -> Peer:
    """Make it ready; see `peers.make`."""
    start_gloo(ranks)
    saved = {"state": StateDict(**_tensors(state, ranks))}
    wanted = {"state": StateDict(**_tensors(states.empty(state), ranks))}
    everywhere = [
        f"state/{name}" for name, leaf in state.items() if not isinstance(leaf, distckpt.Shard)
    ]

    def save(path: Path) -> None:
        Snapshot.take(str(path), saved, replicated=everywhere)
        # All files of a folder: those of other ranks may come after this rank's are done.
        ranks.meet()
        sync_share(path, ranks)

    def save_unbatched(path: Path) -> None:
        with _environment("TORCHSNAPSHOT_DISABLE_BATCHING", "1"):
            save(path)

    def start(path: Path) -> InFlight:
        pending = Snapshot.async_take(str(path), saved, replicated=everywhere)

        def finish() -> None:
            pending.wait()
            sync_share(path, ranks)

        return InThread(finish)

    def start_unbatched(path: Path) -> InFlight:
        with _environment("TORCHSNAPSHOT_DISABLE_BATCHING", "1"):
            return start(path)

    def load(path: Path) -> Loaded:
        Snapshot(str(path)).restore(wanted)
        return {name: numpy_of(_local(tensor)) for name, tensor in wanted["state"].items()}

    return Peer(
        save={"default": save, "not batched": save_unbatched},
        start={"default": start, "not batched": start_unbatched},
        load={"default": load, "not batched": load},
    )


def _tensors(state: states.State, ranks: Ranks) -> dict[str, object]:
    return {
        name: init_from_local_shards(
            [Shard.from_tensor_and_offsets(torch_of(leaf.array), list(leaf.offset), ranks.rank)],
            *leaf.global_shape,
        )
        if isinstance(leaf, distckpt.Shard)
        else torch_of(leaf)
        for name, leaf in state.items()
    }


def _local(tensor: object) -> torch.Tensor:
    if isinstance(tensor, torch.Tensor) and not hasattr(tensor, "local_shards"):
        return tensor
    found: torch.Tensor = tensor.local_shards()[0].tensor  # type: ignore[attr-defined]
    return found


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    previous = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if previous is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = previous
