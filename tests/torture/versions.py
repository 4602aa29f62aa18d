"""Checkpoints that can be told apart: version *n* of a state, and which version lies somewhere."""

from __future__ import annotations

import numpy as np

import distckpt
from distckpt import CheckpointNotFound, IncompleteCheckpoint, PerRank, Shard

_ROWS, _COLUMNS = 12, 101


def state(version, rank, size):
    """Something of each kind: cut over the ranks, the same on all, a value, and one a rank."""
    rows = np.arange(_ROWS * _COLUMNS, dtype=float).reshape(_ROWS, _COLUMNS) + version
    mine = slice(_ROWS * rank // size, _ROWS * (rank + 1) // size)
    return {
        "cut": Shard(rows[mine].copy(), (mine.start, 0), rows.shape),
        "same": np.full(700, version, np.int32),
        "version": version,
        "rng": PerRank([version, rank]),
    }


def version_of(place, *, verify=True):
    """Which version a place holds, all of it read and compared; None if there is no checkpoint."""
    try:
        checkpoint = distckpt.open(place)
    except (CheckpointNotFound, IncompleteCheckpoint):
        return None
    version = checkpoint.values["version"]
    if verify:
        checkpoint.verify()
    found = {name: checkpoint[name][...] for name in checkpoint}
    rows = np.arange(_ROWS * _COLUMNS, dtype=float).reshape(_ROWS, _COLUMNS) + version
    assert np.array_equal(found["cut"], rows), "cut"
    assert np.array_equal(found["same"], np.full(700, version, np.int32)), "same"
    saved = [[version, rank] for rank in range(checkpoint.ranks)]
    assert checkpoint.per_rank["rng"][:] == saved, "rng"
    return version


def latest_version(root):
    """Which version a run would resume from; None if it would start anew."""
    manager = distckpt.Manager(root, comm=distckpt.Solo())
    step = manager.latest()
    if step is None:
        return None
    version = version_of(f"{root}/{distckpt_step(step)}")
    assert version == step, f"step {step} holds version {version}"
    return version


def distckpt_step(step):
    """Name of a step's folder."""
    return f"step-{step:08d}"
