"""What goes wrong on one rank: all are told the same, within the time-out, and nothing hangs."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

import distckpt
from distckpt import commit, team
from distckpt.store import open_store
from distckpt.testing import FaultyStore

pytestmark = pytest.mark.mpi


@contextlib.contextmanager
def every_rank_raises(comm, kind):
    """Expect the same error on every rank; yields what will hold it."""
    caught = Caught()
    with pytest.raises(kind) as failure:
        yield caught
    caught.text = str(failure.value)
    caught.error = failure.value
    assert len(set(comm.allgather((type(failure.value), caught.text)))) == 1


class Caught:
    text = ""
    error = None


@pytest.mark.mpi(min_size=2)
def test_ranks_that_save_in_a_different_order_are_told_so(comm, folder):
    order = ["a", "b"] if comm.rank == 0 else ["b", "a"]
    for name in order:
        with every_rank_raises(comm, distckpt.CheckpointError) as caught:
            distckpt.save(folder / name, {"x": np.arange(3)}, comm=comm)
        assert "different calls" in caught.text
        assert f"{folder}/a" in caught.text
        assert f"{folder}/b" in caught.text
    distckpt.save(folder / "c", {"x": np.arange(3)}, comm=comm)
    assert not (folder / "a").exists()


@pytest.mark.mpi(min_size=2)
def test_ranks_that_start_background_saves_in_a_different_order_are_told_so(comm, folder):
    for name in ["a", "b"] if comm.rank == 0 else ["b", "a"]:
        with every_rank_raises(comm, distckpt.CheckpointError) as caught:
            distckpt.save_async(folder / name, {"x": np.arange(3)}, comm=comm)
        assert "different calls" in caught.text


@pytest.mark.mpi(min_size=2)
def test_a_rank_that_loads_while_the_others_save_is_told_so(comm, folder):
    with every_rank_raises(comm, distckpt.CheckpointError) as caught:
        if comm.rank == comm.size - 1:
            distckpt.load_into(folder, {"x": np.arange(3)}, comm=comm)
        else:
            distckpt.save(folder, {"x": np.arange(3)}, comm=comm)
    assert "save to" in caught.text
    assert "load_into from" in caught.text


@pytest.mark.parametrize("broken", [0, -1], ids=["the-first", "the-last"])
def test_a_state_that_one_rank_cannot_save_fails_all(comm, folder, broken):
    broken %= comm.size
    leaf = np.array([object()]) if comm.rank == broken else np.zeros(1)
    with every_rank_raises(comm, distckpt.LayoutError) as caught:
        distckpt.save(folder, {"x": leaf}, comm=comm)
    assert f"rank {broken}" in caught.text
    assert "object" in caught.text
    assert distckpt.save(folder, {"x": np.zeros(1)}, comm=comm).ranks == comm.size


@pytest.mark.parametrize("broken", [0, -1], ids=["the-first", "the-last"])
def test_a_write_that_fails_on_one_rank_fails_all_and_leaves_the_last_checkpoint(
    comm, folder, broken
):
    broken %= comm.size
    distckpt.save(folder, {"x": np.zeros(1000)}, comm=comm)
    store = FaultyStore(open_store(folder), on_operation=fail_on(comm.rank == broken, "write-half"))
    with every_rank_raises(comm, distckpt.SaveFailed) as caught:
        distckpt.save(store, {"x": np.ones(1000)}, comm=comm, overwrite=True)
    assert list(caught.error.failures) == [broken]
    assert "disk full" in caught.text
    assert distckpt.load(folder)["x"].tolist() == [0] * 1000
    comm.Barrier()
    assert len(list(folder.iterdir())) == 1 + distckpt.open(folder).ranks


def test_a_manifest_that_cannot_be_written_fails_all_and_leaves_the_last_checkpoint(comm, folder):
    distckpt.save(folder, {"x": np.zeros(10)}, comm=comm)
    store = FaultyStore(open_store(folder), on_operation=fail_on(True, "put"))
    with every_rank_raises(comm, distckpt.SaveFailed) as caught:
        distckpt.save(store, {"x": np.ones(10)}, comm=comm, overwrite=True)
    assert caught.error.committed is False
    assert distckpt.load(folder)["x"].tolist() == [0] * 10


@pytest.mark.mpi(min_size=2)
def test_replicas_that_differ_fail_all_and_are_named(comm, folder):
    with every_rank_raises(comm, distckpt.SaveFailed) as caught:
        distckpt.save(folder, {"same": np.arange(3), "not": np.full(3, comm.rank)}, comm=comm)
    assert "'not'" in caught.text
    assert "'same'" not in caught.text


@pytest.mark.mpi(min_size=2)
def test_plain_values_that_differ_fail_all_and_are_named(comm, folder):
    with every_rank_raises(comm, distckpt.LayoutError) as caught:
        distckpt.save(folder, {"epoch": comm.rank}, comm=comm)
    assert "'epoch'" in caught.text


@pytest.mark.mpi(min_size=2)
def test_memory_of_several_processes_is_refused_and_the_nodes_are_named(comm, folder, monkeypatch):
    from mpi4py import MPI

    monkeypatch.setattr(commit, "_LOOKUP_S", 0.1)
    with every_rank_raises(comm, distckpt.SaveFailed) as caught:
        distckpt.save(f"memory://{folder}", {"x": np.zeros(1000)}, comm=comm)
    assert MPI.Get_processor_name() in caught.text
    assert "memory://" in caught.text


def test_a_second_save_to_one_place_is_refused_on_all(comm, folder):
    distckpt.save(folder, {"x": np.zeros(3)}, comm=comm)
    with every_rank_raises(comm, distckpt.CheckpointExists):
        distckpt.save(folder, {"x": np.zeros(3)}, comm=comm)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("late", [0, -1], ids=["the-first", "the-last"])
def test_a_rank_that_does_not_come_is_named_and_told_when_it_does(comm, folder, monkeypatch, late):
    monkeypatch.setattr(team, "_GRACE_S", 0.5)
    late %= comm.size
    passing = comm.Dup()  # after this the ranks don't count the same calls any more
    distckpt.plan({}, comm=passing)
    if comm.rank == late:
        for _ in range(comm.size - 1):
            comm.recv()  # the others have given up
    with pytest.raises(distckpt.SaveFailed, match="Every rank must make the same calls") as failure:
        distckpt.save(folder, {"x": np.zeros(3)}, comm=passing, timeout_s=0.2)
    if comm.rank != late:
        comm.send(None, late)
    if late > 0 or comm.rank > 0:
        assert late in failure.value.failures
    comm.Barrier()
    passing.Free()
    assert not folder.exists()


@pytest.mark.mpi(min_size=2)
def test_ranks_whose_first_call_one_does_not_join_are_told_so_in_time(comm, folder):
    passing = comm.Dup()
    if comm.rank > 0:
        with pytest.raises(distckpt.CheckpointError, match=r"not all .* ranks .* within 0.1 s"):
            distckpt.save(folder, {"x": np.zeros(3)}, comm=passing, timeout_s=0.1)
        comm.send(None, 0)
    else:
        for _ in range(comm.size - 1):
            comm.recv()  # the others have given up
        with pytest.raises(distckpt.CheckpointError, match=r"not all .* ranks"):
            distckpt.save(folder, {"x": np.zeros(3)}, comm=passing, timeout_s=0.1)
    comm.Barrier()
    passing.Free()
    assert not folder.exists()


def test_a_damaged_byte_fails_the_load_on_all_ranks(comm, folder):
    distckpt.save(folder, {"x": np.arange(10000)}, comm=comm)
    comm.Barrier()
    if comm.rank == 0:
        shard = max(folder.glob("shard-*"))
        damaged = bytearray(shard.read_bytes())
        damaged[5000] ^= 1
        shard.write_bytes(damaged)
    comm.Barrier()
    with every_rank_raises(comm, distckpt.LoadFailed) as caught:
        distckpt.load_into(folder, {"x": np.zeros(10000, int)}, comm=comm)
    assert "CRC32C" in caught.text


@pytest.mark.parametrize("broken", [0, -1], ids=["the-first", "the-last"])
def test_a_file_that_one_rank_cannot_read_fails_the_load_on_all(comm, folder, broken):
    distckpt.save(folder, {"x": np.arange(10000), "y": np.arange(10000)}, comm=comm)
    broken %= comm.size
    store = FaultyStore(open_store(folder), on_operation=fail_on(comm.rank == broken, "read", 1))
    net = {"x": np.zeros(10000, int), "y": np.zeros(10000, int)}
    with every_rank_raises(comm, distckpt.LoadFailed) as caught:
        distckpt.load_into(store, net, comm=comm)
    assert broken in caught.error.failures
    assert "disk full" in caught.text
    distckpt.load_into(folder, net, comm=comm)
    assert net["y"].tolist() == list(range(10000))


def test_a_net_that_does_not_fit_on_one_rank_fails_the_load_on_all(comm, folder):
    distckpt.save(folder, {"x": np.arange(10)}, comm=comm)
    x = np.zeros(11 if comm.rank == comm.size - 1 else 10, int)
    with every_rank_raises(comm, distckpt.MatchError) as caught:
        distckpt.load_into(folder, {"x": x}, comm=comm)
    assert list(caught.error.mismatched) == ["x"]
    assert not x.any()


def fail_on(here, kind, number=0):
    """Make a store's operations of a kind fail on this rank, from one of them on."""
    seen = []

    def on_operation(operation, name, _):
        if here and operation == kind and name != "":
            seen.append(name)
            if len(seen) > number:
                if kind == "put":  # a store says whether it has certainly not stored it
                    raise distckpt.StoreError("disk full", refused=True)
                raise OSError(28, "disk full")

    return on_operation
