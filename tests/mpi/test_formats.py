"""Other formats' files under real mpirun: written by all ranks, read once and handed out."""

from __future__ import annotations

import numpy as np
import pytest

import distckpt

pytestmark = pytest.mark.mpi

WHOLE = np.random.default_rng(7).random((301, 77), np.float32)


@pytest.mark.parametrize("format", ["safetensors", "safetensors-folder", "npz", "mindspore"])
def test_ranks_convert_a_checkpoint_to_a_format_and_back(comm, folder, format):
    mesh = distckpt.Mesh(tp=comm.size, comm=comm)
    mine = WHOLE[mesh.region(("tp",), WHOLE.shape).slices]
    state = {"w": mesh.shard(mine, ("tp",), WHOLE.shape), "b": WHOLE[0]}
    distckpt.save(folder / "a", state, comm=comm)
    there = distckpt.convert(folder / "a", folder / "file", comm=comm, format=format)
    assert (there.format, there.tensors) == (format, 2)
    distckpt.convert(folder / "file", folder / "back", comm=comm)
    assert distckpt.open(folder / "back").ranks == comm.size
    found = distckpt.load(folder / "back")
    assert found["w"].tobytes() == WHOLE.tobytes()
    assert found["b"].tobytes() == WHOLE[0].tobytes()


def test_ranks_load_their_columns_out_of_another_formats_file(comm, folder):
    distckpt.save(folder / "a", {"w": WHOLE}, comm=comm)
    distckpt.convert(folder / "a", folder / "x.safetensors", comm=comm)
    mesh = distckpt.Mesh(tp=comm.size, comm=comm)
    region = mesh.region((None, "tp"), WHOLE.shape)
    mine = np.zeros(region.shape, np.float32)
    net = {"w": mesh.shard(mine, (None, "tp"), WHOLE.shape)}
    report = distckpt.load_into(folder / "x.safetensors", net, comm=comm, strict=True)
    assert np.array_equal(mine, WHOLE[region.slices])
    assert report.bytes_read == WHOLE.nbytes


def test_what_a_format_cant_hold_is_refused_on_all_ranks(comm, folder):
    distckpt.save(folder / "a", {"w": WHOLE, "key": b"bytes"}, comm=comm)
    with pytest.raises(distckpt.UnsupportedFormat, match="key"):
        distckpt.convert(folder / "a", folder / "x.ckpt", comm=comm)
    assert not (folder / "x.ckpt").exists()
