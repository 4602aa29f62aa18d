"""Orbax: JAX arrays, one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from benchmarks.suite import states
from benchmarks.suite.bench import InFlight
from benchmarks.suite.peers import InThread, Loaded, Peer, sync_share
from benchmarks.suite.turns import Ranks


def make(state: states.State, ranks: Ranks) -> Peer:
    """Make it ready; see `peers.make`."""
    if ranks.size > 1:
        raise ValueError("orbax is measured on one rank")
    tree = {name: jnp.asarray(states.array_of(leaf)) for name, leaf in state.items()}
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
    handlers = {
        "default": ocp.StandardCheckpointer(),
        "zarr 3, no compression": _checkpointer(use_zarr3=True, use_compression=False),
        "no OCDBT, no compression": _checkpointer(use_ocdbt=False, use_compression=False),
    }

    def begin(name: str, path: Path) -> None:
        if name == "default":
            handlers[name].save(path, tree)
        else:
            handlers[name].save(path, args=ocp.args.PyTreeSave(tree))

    def save(name: str) -> Callable[[Path], object]:
        def run(path: Path) -> None:
            begin(name, path)
            handlers[name].wait_until_finished()
            sync_share(path, ranks)

        return run

    def start(name: str) -> Callable[[Path], InFlight]:
        def run(path: Path) -> InFlight:
            begin(name, path)

            def finish() -> None:
                handlers[name].wait_until_finished()
                sync_share(path, ranks)

            return InThread(finish)

        return run

    def load(name: str) -> Callable[[Path], Loaded]:
        def run(path: Path) -> Loaded:
            if name == "default":
                found = handlers[name].restore(path, target)
            else:
                arguments = ocp.checkpoint_utils.construct_restore_args(target)
                found = handlers[name].restore(
                    path, args=ocp.args.PyTreeRestore(restore_args=arguments)
                )
            jax.block_until_ready(found)
            return {key: np.asarray(value) for key, value in found.items()}

        return run

    return Peer(
        save={name: save(name) for name in handlers},
        start={name: start(name) for name in handlers},
        load={name: load(name) for name in handlers},
        state=tree,
    )


def _checkpointer(**options: bool) -> ocp.AsyncCheckpointer:
    return ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(**options))
