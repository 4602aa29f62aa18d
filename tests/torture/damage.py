"""Bytes of a checkpoint's files are flipped, and files cut short: found, or harmless."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
from versions import state

import distckpt
from distckpt import CheckpointError, PerRank
from distckpt.testing import MemoryStore, run_ranks


@cache
def checkpoints():
    """Objects of several checkpoints, small enough that most of their bytes mean something."""

    def of(ranks, make):
        store = MemoryStore()
        run_ranks(ranks, lambda comm: distckpt.save(store, make(comm), comm=comm))
        return store.objects

    return [
        of(1, lambda comm: {"w": np.arange(6, dtype=np.float32), "epoch": 3}),
        of(3, lambda comm: state(1, comm.rank, comm.size)),
        of(2, lambda comm: {"half": np.arange(300, dtype=np.float16), "rng": PerRank([comm.rank])}),
        of(1, lambda comm: {"values": {"a": [1, 2.5, "text", None, True], "b": b"bytes"}}),
    ]


def read(objects):
    """All that a reader gets of a checkpoint: tensors, values, per-rank values."""
    store = MemoryStore()
    store.objects = objects
    checkpoint = distckpt.open(store)
    tensors = {}
    if len(checkpoint):
        tensors = {name: found.tobytes() for name, found in distckpt.load(store).items()}
    per_rank = {name: values[:] for name, values in checkpoint.per_rank.items()}
    return tensors, dict(checkpoint.values), per_rank


def verify(objects):
    """Read all files."""
    store = MemoryStore()
    store.objects = objects
    distckpt.open(store).verify()


def damage(count, *, seed=0):
    """Damage so many times, in turn a flipped byte and a truncation, each on a fresh copy.

    Returns:
        How many were found by reading, how many by `verify` alone, and what is wrong.
    """
    chance = random.Random(seed)
    whole = [read(dict(objects)) for objects in checkpoints()]
    found, by_verify, wrong = 0, 0, []
    for number in range(count):
        which = chance.randrange(len(whole))
        objects = dict(checkpoints()[which])
        name = chance.choice(sorted(objects))
        data = bytearray(objects[name])
        if not data:
            continue
        if number % 4 == 3:
            at = chance.randrange(len(data))
            del data[at:]
            what = f"cut at {at}"
        else:
            at, mask = chance.randrange(len(data)), chance.randrange(1, 256)
            data[at] ^= mask
            what = f"byte {at} ^ {mask}"
        objects[name] = bytes(data)
        where = f"checkpoint {which}, {name}: {what}"
        try:
            if read(objects) != whole[which]:
                wrong.append(f"{where}: something else was read, and no error raised")
        except CheckpointError:
            found += 1
            continue
        except Exception as exc:  # the finding
            wrong.append(f"{where}: {type(exc).__name__}: {exc}")
            continue
        # What no reader needs, such as the header of a shard file, `verify` looks at.
        try:
            verify(objects)
            wrong.append(f"{where}: not found by verify")
        except CheckpointError:
            by_verify += 1
    return found, by_verify, wrong
