"""Whatever layout ranks saved with, they load any other one: bit for bit what numpy slices."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import distckpt
from distckpt.store import open_store

pytestmark = pytest.mark.mpi

DTYPES = ["bool", "u1", ">i2", "i8", "f2", "f4", ">f8", "c8", ml_dtypes.bfloat16]


@pytest.mark.parametrize("case", range(8))
def test_what_one_layout_saved_another_loads_bit_for_bit(comm, folder, case):
    rng = np.random.default_rng([case, comm.size])  # draws the same on every rank
    wholes = {f"t{number}": random_tensor(rng) for number in range(6)}
    saved = {name: cut(rng, whole, comm) for name, whole in wholes.items()}
    expected = {name: cut(rng, whole, comm) for name, whole in wholes.items()}
    state = {"net": present(saved), "step": case, "rng": distckpt.PerRank([comm.rank, case])}
    net = {
        "net": {name: blank(leaf) for name, leaf in present(expected).items()},
        "step": -1,
        "rng": distckpt.PerRank(None),
    }

    distckpt.save(folder, state, comm=comm)
    distckpt.load_into(folder, net, comm=comm, strict=True)

    assert net["step"] == case
    assert net["rng"].value == [comm.rank, case]
    for name, leaf in present(expected).items():
        assert content(net["net"][name]) == content(leaf), (name, leaf)


@pytest.mark.parametrize("case", range(2))
def test_one_process_loads_whole_arrays_of_what_ranks_saved(comm, folder, case):
    rng = np.random.default_rng([100 + case, comm.size])
    wholes = {f"t{number}": random_tensor(rng) for number in range(6)}
    distckpt.save(
        folder, present({name: cut(rng, whole, comm) for name, whole in wholes.items()}), comm=comm
    )
    found = distckpt.load(folder)
    assert {name: content(found[name]) for name in found} == {
        name: content(whole) for name, whole in wholes.items()
    }


def test_ranks_read_each_byte_of_a_checkpoint_once_over_all_of_them(comm, folder):
    whole = np.random.default_rng(0).random((301, 77))
    mesh = distckpt.Mesh(tp=comm.size, comm=comm)
    rows = whole[mesh.region(("tp",), whole.shape).slices]
    distckpt.save(folder, {"cut": mesh.shard(rows, ("tp",), whole.shape), "same": whole}, comm=comm)
    columns = np.empty((301, mesh.region((None, "tp"), whole.shape).shape[1]))
    net = {"cut": mesh.shard(columns, (None, "tp"), whole.shape), "same": np.empty_like(whole)}
    store = ReadsNoted(open_store(folder))

    report = distckpt.load_into(store, net, comm=comm)

    reads = [read for found in comm.allgather(store.reads) for read in found]
    blocks = [read for read in reads if read[1] % (4 << 20) == 0 and read[0] != "manifest.binpb"]
    assert len(blocks) == len(set(blocks))
    assert report.bytes_read < 2 * whole.nbytes + 100 * comm.size**2 + 4096 * comm.size
    np.testing.assert_array_equal(net["same"], whole)
    np.testing.assert_array_equal(columns, whole[mesh.region((None, "tp"), whole.shape).slices])


@pytest.mark.mpi(min_size=2)
def test_more_than_one_round_of_messages_reshards_a_large_tensor(comm, folder):
    if comm.size > 2:
        pytest.skip("a rank reads too little for a second round")
    shape = (4400, 4096)  # 68.75 MiB: more than 32 MiB a rank
    mesh = distckpt.Mesh(tp=comm.size, comm=comm)

    def values(region):
        rows, columns = map(np.arange, region.start, region.stop)
        return np.add.outer(np.float32(3) * rows, columns, dtype="f4")

    saved = values(mesh.region(("tp",), shape))
    distckpt.save(folder, {"w": mesh.shard(saved, ("tp",), shape)}, comm=comm)
    region = mesh.region((None, "tp"), shape)
    found = np.zeros(region.shape, "f4")
    distckpt.load_into(folder, {"w": mesh.shard(found, (None, "tp"), shape)}, comm=comm)
    assert (found == values(region)).all()


class ReadsNoted:
    """A store that notes what is read of it."""

    def __init__(self, store):
        self._store = store
        self.reads = []

    def __getattr__(self, name):
        return getattr(self._store, name)

    def read_into(self, name, start_byte, buffer):
        self.reads.append((name, start_byte))
        self._store.read_into(name, start_byte, buffer)


def random_tensor(rng):
    """Draw an array of any dtype and 0 to 4 dimensions, some of them empty."""
    shape = tuple(rng.integers(0, 9, rng.integers(0, 5)).tolist())
    if rng.random() < 0.8:
        shape = tuple(max(extent, 1) for extent in shape)
    dtype = np.dtype(DTYPES[rng.integers(len(DTYPES))])
    raw = rng.integers(0, 2 if dtype.kind == "b" else 256, (*shape, dtype.itemsize), "u1")
    return raw.reshape(-1).view(dtype).reshape(shape)


def cut(rng, whole, comm):
    """Draw a layout, and return what it gives this rank of the tensor; None for nothing."""
    kinds = ["everywhere", "one", "flat"] + ["boxes", "mesh"] * (whole.ndim > 0)
    kind = kinds[rng.integers(len(kinds))]
    if kind == "everywhere":
        return in_some_order(rng, whole)
    owners = rng.permutation(comm.size)
    place = int(np.flatnonzero(owners == comm.rank)[0])
    if kind == "one":
        return distckpt.Shard(whole, (0,) * whole.ndim, whole.shape) if place == 0 else None
    if kind == "mesh":
        return cut_by_mesh(rng, whole, comm.rank, comm.size)
    dim = rng.integers(whole.ndim) if kind == "boxes" else 0
    extent = whole.shape[dim] if kind == "boxes" else whole.size
    cuts = [0, *np.sort(rng.integers(0, extent + 1, comm.size - 1)).tolist(), extent]
    start, stop = cuts[place], cuts[place + 1]
    if kind == "flat":
        return distckpt.FlatShard(whole.reshape(-1)[start:stop], start, whole.shape)
    where = (slice(None),) * dim + (slice(start, stop),)
    offset = tuple(start if d == dim else 0 for d in range(whole.ndim))
    return distckpt.Shard(in_some_order(rng, whole)[where], offset, whole.shape)


def cut_by_mesh(rng, whole, rank, size):
    """Cut over two axes, or one and hold replicas over the other."""
    fast = rng.choice([axis for axis in range(1, size + 1) if size % axis == 0])
    mesh = distckpt.Mesh(a=size // int(fast), b=int(fast), rank=rank)
    spec = [None] * whole.ndim
    spec[rng.integers(whole.ndim)] = "b"
    free = [dim for dim, axis in enumerate(spec) if axis is None]
    if free and rng.random() < 0.5:
        spec[free[0]] = "a"
    elif rng.random() < 0.5:
        spec[spec.index("b")] = ("a", "b")
    uneven = ["balanced", "chunk"][rng.integers(2)]
    region = mesh.region(spec, whole.shape, uneven=uneven)
    return mesh.shard(whole[region.slices], spec, whole.shape, uneven=uneven)


def in_some_order(rng, array):
    """Lay the elements out in memory in C or in Fortran order."""
    return array.copy(order="F") if rng.random() < 0.5 else array


def present(leaves):
    return {name: leaf for name, leaf in leaves.items() if leaf is not None}


def blank(leaf):
    """Make a leaf of the same layout whose array is to be filled; the dtype in native order."""
    array = getattr(leaf, "array", leaf)
    new = np.zeros(array.shape, array.dtype.newbyteorder("="))
    if isinstance(leaf, distckpt.Shard):
        return distckpt.Shard(new, leaf.offset, leaf.global_shape)
    if isinstance(leaf, distckpt.FlatShard):
        return distckpt.FlatShard(new, leaf.start, leaf.global_shape)
    return new


def content(leaf):
    """Shape, dtype and bytes of a leaf's array."""
    array = np.asarray(getattr(leaf, "array", leaf))
    native = array.astype(array.dtype.newbyteorder("="))
    return native.shape, native.dtype, native.tobytes()
