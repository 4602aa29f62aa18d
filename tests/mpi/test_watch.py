"""An evaluation by several ranks: one watches, all load."""

from __future__ import annotations

import numpy as np
import pytest

import distckpt

pytestmark = pytest.mark.mpi


def checkpoints(root, comm, **options):
    """As in docs/evaluation-jobs.md."""
    if comm.rank == 0:
        for checkpoint in distckpt.watch(root, **options):
            comm.bcast(checkpoint.url)
            yield checkpoint
            comm.barrier()
        comm.bcast(None)
    else:
        while (url := comm.bcast(None)) is not None:
            yield distckpt.open(url)
            comm.barrier()


def test_one_ranks_watch_and_hold_serve_all_ranks(comm, folder):
    state = {"w": np.zeros(100)}
    with distckpt.Manager(folder, comm=comm, keep=distckpt.KeepLast(1)) as manager:
        seen = []
        manager.save(1, {"w": np.full(100, 1.0)}).wait()
        comm.barrier()
        for checkpoint in checkpoints(folder, comm, start="all", poll_s=0.01, timeout_s=0):
            step = checkpoint.step
            if step < 4:  # the run goes on, and would delete what is being read
                manager.save(step + 1, {"w": np.full(100, step + 1.0)})
                manager.wait()
            report = checkpoint.load_into(state, comm=comm, strict=True)
            assert list(report.loaded) == ["w"]
            assert (state["w"] == step).all()
            assert (checkpoint["w"][...] == step).all()
            seen.append(step)
    assert seen == [1, 2, 3, 4]
