"""Whole jobs: how they end, and what they leave. tests/test_mpi.py runs them, and looks.

``mpirun -n N python -m mpi4py jobs.py <function> <folder> <argument>...``
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np
from mpi4py import MPI

import distckpt
from distckpt.store import open_store
from distckpt.testing import FaultyStore

comm = MPI.COMM_WORLD
mesh = distckpt.Mesh(tp=comm.size, comm=comm)
WHOLE = np.arange(50.0 * 7).reshape(50, 7)


def rows(values=WHOLE):
    """This rank's rows of a tensor that all have together."""
    mine = values[mesh.region(("tp",), values.shape).slices].copy()
    return mesh.shard(mine, ("tp",), values.shape)


def save_rows(folder):
    state = {"w": rows(), "step": 3, "rank": distckpt.PerRank(comm.rank)}
    distckpt.save(folder / "rows", state)


def load_columns(folder):
    region = mesh.region((None, "tp"), WHOLE.shape)
    found = np.zeros(region.shape)
    net = {"w": mesh.shard(found, (None, "tp"), WHOLE.shape), "rank": distckpt.PerRank(None)}
    distckpt.load_into(
        folder / "rows", net, strict=True, per_rank=lambda saved, rank, size: [saved, rank, size]
    )
    assert (found == WHOLE[region.slices]).all()
    assert net["rank"].value == [[0, 1, 2, 3], comm.rank, comm.size]


def end_without_waiting(folder):
    """Leave two saves in flight: one rank writes its files only once the program has ended."""

    def after_the_end(kind, name, number):
        if kind == "write" and comm.rank == comm.size - 1:
            threading.main_thread().join()

    for number in range(2):
        store = FaultyStore(open_store(folder / str(number)), on_operation=after_the_end)
        distckpt.save_async(store, {"w": rows()})


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


if __name__ == "__main__":
    faulthandler.dump_traceback_later(60, exit=True)
    name, folder, *arguments = sys.argv[1:]
    globals()[name](Path(folder), *arguments)
