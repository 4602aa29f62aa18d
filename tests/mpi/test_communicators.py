"""Whose ranks take part: all of mpirun's, those of a communicator, or one alone."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import distckpt
from distckpt import coordinator, team
from distckpt.store import open_store
from distckpt.testing import FaultyStore

pytestmark = pytest.mark.mpi


def test_without_comm_all_ranks_that_mpirun_started_take_part(comm, folder):
    mesh = distckpt.Mesh(dp=comm.size, comm=comm)
    mine = np.full(1, comm.rank)
    checkpoint = distckpt.save(folder, {"x": mesh.shard(mine, ("dp",), (comm.size,))})
    assert checkpoint.ranks == comm.size
    assert checkpoint["x"][:].tolist() == list(range(comm.size))


@pytest.mark.mpi(min_size=2)
def test_half_of_the_ranks_save_and_the_other_half_loads(comm, folder):
    first = comm.rank < comm.size // 2
    half = comm.Split(first)
    mesh = distckpt.Mesh(x=half.size, comm=half)
    whole = np.arange(50)
    mine = whole[mesh.region(("x",), whole.shape).slices]
    if first:
        distckpt.save(folder, {"w": mesh.shard(mine, ("x",), whole.shape)}, comm=half)
    comm.Barrier()
    if not first:
        found = np.zeros_like(mine)
        distckpt.load_into(folder, {"w": mesh.shard(found, ("x",), whole.shape)}, comm=half)
        assert found.tolist() == mine.tolist()
    half.Free()


def test_on_comm_self_each_rank_saves_alone(comm, folder):
    from mpi4py import MPI

    distckpt.save(folder / str(comm.rank), {"mine": np.array(comm.rank)}, comm=MPI.COMM_SELF)
    comm.Barrier()
    for rank in range(comm.size):
        checkpoint = distckpt.open(folder / str(rank))
        assert checkpoint.ranks == 1
        assert checkpoint["mine"][()] == rank


@pytest.mark.mpi(min_size=2)
def test_saves_over_several_communicators_at_once_do_not_mix(comm, folder):
    pair = comm.Split(comm.rank // 2)
    state = {"pair": np.arange(10) + comm.rank // 2}
    theirs = distckpt.save_async(folder / f"pair-{comm.rank // 2}", state, comm=pair)
    ours = distckpt.save_async(folder / "all", {"all": np.arange(10)}, comm=comm)
    assert ours.wait().ranks == comm.size
    assert theirs.wait()["pair"][0] == comm.rank // 2
    comm.Barrier()
    pair.Free()


@pytest.mark.mpi(min_size=2)
def test_saves_over_two_communicators_are_waited_for_in_any_order(comm, folder):
    other = comm.Dup()
    pending = [
        distckpt.save_async(folder / "ours", {"x": np.arange(3)}, comm=comm),
        distckpt.save_async(folder / "other", {"x": np.arange(3)}, comm=other),
    ]
    for number in (0, 1) if comm.rank == 0 else (1, 0):
        assert pending[number].wait(timeout_s=60)["x"][2] == 2
    comm.Barrier()
    other.Free()


@pytest.mark.mpi(min_size=2)
def test_a_save_goes_on_while_a_rank_waits_for_others_to_use_a_new_communicator(comm, folder):
    other = comm.Dup()
    pending = distckpt.save_async(folder, {"x": np.arange(3)}, comm=comm)
    if comm.rank > 0:
        pending.wait(timeout_s=60)
    distckpt.plan({}, comm=other)
    assert pending.wait(timeout_s=60)["x"][2] == 2
    other.Free()


@pytest.mark.mpi(min_size=2)
def test_a_rank_outside_a_communicator_is_told_so(comm, folder):
    from mpi4py import MPI

    inside = comm.rank > 0
    some = comm.Split(0 if inside else MPI.UNDEFINED)
    if inside:
        distckpt.save(folder, {"x": np.zeros(3)}, comm=some)
        some.Free()
    else:
        with pytest.raises(distckpt.CheckpointError, match="COMM_NULL"):
            distckpt.save(folder, {"x": np.zeros(3)}, comm=some)


def test_a_duplicate_of_a_communicator_has_duplicates_of_its_own(comm):
    ours = team.connect(comm)
    another = comm.Dup()
    assert team.connect(another) is not ours
    assert team.connect(comm) is ours
    another.Free()


@pytest.mark.parametrize("background", [False, True], ids=["save", "save-async"])
def test_what_a_freed_communicator_was_given_is_freed_when_the_next_is_connected(
    comm, folder, background
):
    from mpi4py import MPI

    first = comm.Dup()
    if background:
        distckpt.save_async(folder, {"x": np.zeros(3)}, comm=first).wait()
    else:
        distckpt.save(folder, {"x": np.zeros(3)}, comm=first)
    duplicates = team.connect(first).coordinator._comms
    first.Free()
    assert all(comm != MPI.COMM_NULL for comm in duplicates)
    second = comm.Dup()
    team.connect(second)
    assert all(comm == MPI.COMM_NULL for comm in duplicates)
    second.Free()


@pytest.mark.mpi(min_size=2)
def test_communicators_can_be_made_and_freed_without_end(comm, folder):
    from mpi4py import MPI

    # MPICH has 2,048 in all, and each of these takes three. OpenMPI has more; making one is slow.
    many = 800 if comm.size == 2 and MPI.get_vendor()[0] == "MPICH" else 41
    for number in range(many):
        passing = comm.Dup()
        if number % 20 == 0:
            distckpt.save(folder / str(number), {"n": number}, comm=passing)
        else:
            team.connect(passing)
        passing.Free()
    assert len(coordinator._marks().abandoned) < 3
    assert distckpt.open(folder / "40").values["n"] == 40


def test_a_save_ends_well_when_its_communicator_is_freed_meanwhile(comm, folder):
    from mpi4py import MPI

    go_on = threading.Event()
    store = FaultyStore(
        open_store(folder), on_operation=lambda kind, *_: kind != "create" or go_on.wait()
    )
    passing = comm.Dup()
    pending = distckpt.save_async(store, {"x": np.arange(3)}, comm=passing)
    duplicates = pending._team.coordinator._comms
    passing.Free()
    another = comm.Dup()
    team.connect(another)
    assert all(comm != MPI.COMM_NULL for comm in duplicates)
    go_on.set()
    assert pending.wait()["x"][:].tolist() == [0, 1, 2]
    another.Free()


@pytest.mark.parametrize("comm", ["COMM_WORLD", 3], ids=repr)
def test_what_is_no_communicator_is_refused(comm, folder):
    with pytest.raises(distckpt.CheckpointError, match="expected an mpi4py communicator"):
        distckpt.save(folder, {}, comm=comm)
