"""Whole jobs: how they end, and what they leave. tests/test_mpi.py runs them, and looks.

``mpirun -n N python -m mpi4py jobs.py <function> <folder> <argument>...``
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
from mpi4py import MPI

import distckpt
from distckpt.mindspore import CheckpointConfig, ModelCheckpoint
from distckpt.store import open_store
from distckpt.store.transfer import Retries
from distckpt.testing import FaultyStore

comm = MPI.COMM_WORLD
mesh = distckpt.Mesh(tp=comm.size, comm=comm)
WHOLE = np.arange(50.0 * 7).reshape(50, 7)


def rows(values=WHOLE):
    """This rank's rows of a tensor that all have together."""
    mine = values[mesh.region(("tp",), values.shape).slices].copy()
    return mesh.shard(mine, ("tp",), values.shape)


def save_rows(folder):
    save_rows_to(folder / "rows")


def save_rows_to(url):
    state = {"w": rows(), "step": 3, "rank": distckpt.PerRank(comm.rank)}
    distckpt.save(url, state)


def load_columns(folder):
    load_columns_from(folder / "rows")


def load_columns_from(url):
    region = mesh.region((None, "tp"), WHOLE.shape)
    found = np.zeros(region.shape)
    net = {"w": mesh.shard(found, (None, "tp"), WHOLE.shape), "rank": distckpt.PerRank(None)}
    distckpt.load_into(
        url, net, strict=True, per_rank=lambda saved, rank, size: [saved, rank, size]
    )
    assert (found == WHOLE[region.slices]).all()
    assert net["rank"].value == [[0, 1, 2, 3], comm.rank, comm.size]


def end_without_waiting(folder):
    """Leave two saves in flight: one rank writes its files only once the program has ended.

    The folder may be a URL.
    """

    def after_the_end(kind, name, number):
        if kind == "write" and comm.rank == comm.size - 1:
            while not threading._SHUTTING_DOWN:  # the main thread is joined later than this
                time.sleep(1e-3)

    for number in range(2):
        store = FaultyStore(open_store(f"{folder}/{number}"), on_operation=after_the_end)
        distckpt.save_async(store, {"w": rows(), "rank": distckpt.PerRank(comm.rank)})


def end_while_the_server_goes(url):
    """Leave a save in flight; the store gives up soon."""
    store = open_store(url, storage_options={"client": "s3fs"})
    store._retries = Retries(4, first_pause_s=0.05)
    distckpt.save_async(store, {"w": rows()})
    print("the program has ended", flush=True)  # noqa: T201  it is looked for


def raise_on_one_rank(folder, where):
    """Leave the others alone in a call for all, with one save committed and one in flight."""
    distckpt.save(folder / "before", {"w": rows()})
    distckpt.save_async(folder / "meanwhile", {"w": rows()})
    if comm.rank == 1:
        raise RuntimeError("an error of the program")
    if where == "in-a-save":
        distckpt.save(folder / "after", {"w": rows()})
    else:
        comm.Allreduce(np.zeros(1), np.zeros(1))
    raise AssertionError("the others can't get here")


def kill_one_rank(folder, rank, operation):
    """Overwrite a checkpoint; one rank gets SIGKILL before the store does the named operation."""
    distckpt.save(folder, {"w": rows()})

    def kill(kind, name, number):
        if comm.rank == int(rank) and kind == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    store = FaultyStore(open_store(folder), on_operation=kill)
    distckpt.save(store, {"w": rows(-WHOLE)}, overwrite=True)
    raise AssertionError("the save can't succeed")


def train_until_stopped(folder):
    """Train for ever; the file ``trains`` says that it does."""
    whole = WHOLE.copy()
    with distckpt.Manager(folder / "run", comm=comm, save=distckpt.EverySteps(10**9)) as manager:
        step = 0
        while not manager.should_stop():
            step += 1
            comm.Allreduce(np.ones(1), np.zeros(1))
            whole += 1
            state = {"w": rows(whole), "step": step, "rank": distckpt.PerRank([comm.rank, step])}
            manager.step(step, state)
            if step == 3 and comm.rank == 0:
                (folder / "trains").touch()


def train_with_mindspores_callback(folder, begin, steps):
    """Train on as many ranks as there are, each with its rows; go on from the newest checkpoint."""
    region = mesh.region(("tp",), WHOLE.shape)
    mine = np.zeros(region.shape)
    net = {"w": mesh.shard(mine, ("tp",), WHOLE.shape)}
    config = CheckpointConfig(save_checkpoint_steps=3, keep_checkpoint_max=2, format="distckpt")
    with ModelCheckpoint("net", folder, config) as callback:
        assert callback.load_latest_into(net, default=0) == int(begin)
        assert (mine == int(begin) * WHOLE[region.slices]).all()
        for _ in range(int(steps)):
            mine += WHOLE[region.slices]
            callback.step_end(net=net)
        callback.end()


if __name__ == "__main__":
    faulthandler.dump_traceback_later(60, exit=True)
    name, folder, *arguments = sys.argv[1:]
    globals()[name](folder if "://" in folder else Path(folder), *arguments)
