"""PyTorch's distributed checkpoint (DCP): sharded tensors as DTensors, over gloo."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

import distckpt
from benchmarks.suite import states
from benchmarks.suite.bench import InFlight
from benchmarks.suite.peers import Loaded, Peer
from benchmarks.suite.turns import Ranks


def make(state: states.State, ranks: Ranks) -> Peer:
    """Make it ready; see `peers.make`."""
    start_gloo(ranks)
    mesh = DeviceMesh("cpu", list(range(ranks.size)))
    saved = {name: _tensor(leaf, mesh) for name, leaf in state.items()}
    wanted = {name: _tensor(leaf, mesh) for name, leaf in states.empty(state).items()}
    # Its documentation wants a group of its own for what runs beside training.
    group = dist.new_group(backend="gloo")
    kept = DefaultStager(StagingOptions(*[False] * 4))
    shared = DefaultStager(
        StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=True,
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
    )

    def save(threads: int) -> Callable[[Path], object]:
        return lambda path: dcp.save(
            saved,
            storage_writer=FileSystemWriter(path, thread_count=threads),
            planner=DefaultSavePlanner(enable_plan_caching=True),
        )

    def start(stager: DefaultStager, threads: int, kind: Any) -> Callable[[Path], InFlight]:  # noqa: ANN401
        def run(path: Path) -> InFlight:
            future = dcp.async_save(
                saved,
                storage_writer=FileSystemWriter(path, thread_count=threads),
                planner=DefaultSavePlanner(enable_plan_caching=True),
                async_stager=stager,
                async_checkpointer_type=kind,
                process_group=group if kind == AsyncCheckpointerType.THREAD else None,
            )
            return _Future(future)

        return run

    def load(path: Path) -> Loaded:
        dcp.load(wanted, checkpoint_id=path)
        return {name: numpy_of(_local(tensor)) for name, tensor in wanted.items()}

    def load_fsspec(path: Path) -> Loaded:
        dcp.load(wanted, storage_reader=FsspecReader(path))
        return {name: numpy_of(_local(tensor)) for name, tensor in wanted.items()}

    thread = AsyncCheckpointerType.THREAD
    return Peer(
        save={
            "default": lambda path: dcp.save(saved, checkpoint_id=path),
            "plan cached": save(1),
            "plan cached, 2 threads": save(2),
            "fsspec": lambda path: dcp.save(saved, storage_writer=FsspecWriter(path)),
        },
        start={
            "default": lambda path: _Future(
                dcp.async_save(saved, checkpoint_id=path, process_group=group)
            ),
            "stager kept, plan cached": start(kept, 1, thread),
            "stager kept, plan cached, 2 threads": start(kept, 2, thread),
            "process, stager kept, plan cached": start(shared, 1, AsyncCheckpointerType.PROCESS),
        },
        load={"default": load, "fsspec": load_fsspec},
    )


class _Future:
    """DCP's future as a save in flight."""

    def __init__(self, future: Any) -> None:  # noqa: ANN401
        self._future = future

    def done(self) -> bool:
        return bool(self._future.done())

    def wait(self) -> None:
        self._future.result()


def start_gloo(ranks: Ranks) -> None:
    """Collective. Start torch's own ranks beside MPI's, over the loopback device."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(ranks.gather(port)[0]),
        "RANK": str(ranks.rank),
        "WORLD_SIZE": str(ranks.size),
        "LOCAL_RANK": str(ranks.rank),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo")


def torch_of(array: np.ndarray) -> torch.Tensor:
    """View an array as a tensor."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def numpy_of(tensor: torch.Tensor) -> np.ndarray:
    """View a tensor as an array."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy()
    return tensor.numpy()


def _tensor(leaf: states.Leaf, mesh: DeviceMesh) -> torch.Tensor:
    if not isinstance(leaf, distckpt.Shard):
        return torch_of(leaf)
    whole = torch.Size(leaf.global_shape)
    cut = [dim for dim, size in enumerate(leaf.array.shape) if size < leaf.global_shape[dim]]
    stride = torch.empty(whole, device="meta").stride()
    return DTensor.from_local(
        torch_of(leaf.array),
        mesh,
        [Shard(cut[0] if cut else 0)],
        run_check=False,
        shape=whole,
        stride=stride,
    )


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
