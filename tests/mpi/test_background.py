"""Saves in the background, while the main thread computes and communicates."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import distckpt
from distckpt.store import open_store
from distckpt.testing import FaultyStore

pytestmark = pytest.mark.mpi


def test_fifty_saves_beside_a_loop_of_all_reduces_disturb_neither(comm, folder):
    mesh = distckpt.Mesh(dp=comm.size, comm=comm)
    mine, total = np.zeros(100), np.empty(100)
    state = {"w": mesh.shard(mine, ("dp",), (100 * comm.size,)), "step": 0}
    pending = []
    for step in range(1, 51):
        for part in range(10):
            mine[:] = step * 10 + part + comm.rank
            comm.Allreduce(mine, total)
            assert (total == comm.size * (step * 10 + part) + sum(range(comm.size))).all()
        state["step"] = step
        pending.append(distckpt.save_async(folder / str(step), state, comm=comm))
        mine[:] = -1
        if step > 2:
            pending[step - 3].wait()
    assert [save.wait().values["step"] for save in pending] == list(range(1, 51))
    for step in (comm.rank + 1, 50 - comm.rank):
        saved = distckpt.open(folder / str(step))["w"][:]
        assert (saved == np.repeat(np.arange(comm.size) + step * 10 + 9, 100)).all()


@pytest.mark.parametrize("first", [0, 1], ids=["in-order", "in-reverse"])
def test_two_saves_in_flight_are_waited_for_in_any_order(comm, folder, first):
    pending = [
        distckpt.save_async(folder / str(n), {"x": np.full(1000, n)}, comm=comm) for n in range(2)
    ]
    order = (first + comm.rank) % 2  # another one on the next rank
    assert pending[order].wait()["x"][0] == order
    assert pending[1 - order].wait()["x"][0] == 1 - order


@pytest.mark.parametrize("waiting", [0, -1], ids=["the-first", "the-last"])
def test_one_rank_waits_and_the_others_go_on_to_the_next_call(comm, folder, waiting):
    pending = distckpt.save_async(folder / "a", {"x": np.arange(9)}, comm=comm)
    if comm.rank == waiting % comm.size:
        assert pending.wait()["x"][8] == 8
    distckpt.save(folder / "b", {"x": np.arange(9)}, comm=comm)
    while not pending.done():
        distckpt.plan({"x": np.arange(9)}, comm=distckpt.Solo())
    assert distckpt.open(folder / "a")["x"][8] == 8


def test_a_save_that_one_rank_holds_up_lets_later_ones_pass(comm, folder):
    store, go_on = held_up(folder / "slow", on=comm.rank == comm.size - 1)
    slow = distckpt.save_async(store, {"x": np.arange(3)}, comm=comm)
    fast = distckpt.save_async(folder / "fast", {"x": np.arange(3)}, comm=comm)
    assert fast.wait()["x"][2] == 2
    assert not slow.done()
    comm.Barrier()
    go_on.set()
    assert slow.wait()["x"][2] == 2


def test_what_is_saved_is_what_the_arrays_held_at_the_call(comm, folder):
    store, go_on = held_up(folder)
    x, nested = np.arange(1000), {"list": [1, 2]}
    pending = distckpt.save_async(
        store, {"x": x, "rng": distckpt.PerRank(nested)}, comm=comm, metadata=nested
    )
    x[:] = 0
    nested["list"].append(3)
    go_on.set()
    checkpoint = pending.wait()
    assert checkpoint["x"][:].tolist() == list(range(1000))
    assert checkpoint.per_rank["rng"][comm.rank] == {"list": [1, 2]}
    assert checkpoint.metadata == {"list": [1, 2]}


def test_a_wait_that_takes_too_long_ends_and_the_save_goes_on(comm, folder):
    store, go_on = held_up(folder)
    pending = distckpt.save_async(store, {"x": np.arange(3)}, comm=comm)
    with pytest.raises(TimeoutError, match="goes on"):
        pending.wait(timeout_s=0.01)
    comm.Barrier()
    go_on.set()
    assert pending.wait(timeout_s=60)["x"][2] == 2


def test_a_write_that_fails_on_one_rank_is_told_to_all_that_wait(comm, folder, caplog):
    broken = comm.size - 1
    store = FaultyStore(open_store(folder), fail_at=1 if comm.rank == broken else None)
    pending = distckpt.save_async(store, {"x": np.arange(1000)}, comm=comm)
    with pytest.raises(distckpt.SaveFailed, match="injected") as failure:
        pending.wait()
    assert list(failure.value.failures) == [broken]
    assert failure.value.committed is False
    assert "the save failed" in caplog.text
    assert distckpt.save(folder, {"x": np.arange(3)}, comm=comm)["x"][2] == 2


def held_up(folder, *, on=True):
    """A store whose writes wait for an event, and the event; on other ranks they don't wait."""
    go_on = threading.Event()
    wait = go_on.wait if on else bool
    return (
        FaultyStore(open_store(folder), on_operation=lambda kind, *_: kind != "write" or wait()),
        go_on,
    )
