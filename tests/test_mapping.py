"""Local files that are copied from the page cache as it is mapped."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import distckpt
from distckpt import LoadFailed, commit, prepare, reader, schedule, writer
from distckpt.errors import StoreError
from distckpt.store import local, mapping, open_object, open_store

_BLOCK = 4096


def failing(number):
    def fail(*arguments, **options):
        raise OSError(number, os.strerror(number))

    return fail


def mapping_any(monkeypatch):
    """Have files be looked at in the page cache on any file system."""
    monkeypatch.setattr(local, "_MAPPED", {local.file_system(Path(tempfile.gettempdir()))})
    real = os.preadv
    # A tmpfs does not tell what it has in memory: all.
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at, flags=0: real(fd, buffers, at))


@given(st.integers(0, 20_000), st.integers(1, 20_000))
def test_a_local_file_is_shown_as_it_is(tmp_path_factory, start, length):
    folder = tmp_path_factory.mktemp("store")
    content = np.random.default_rng(1).integers(0, 256, 20_000, np.uint8).tobytes()
    (folder / "x").write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        mapping_any(patch)
        found = open_object(open_store(folder), "x").view(start, length)
    if start + length > len(content):
        assert found is None  # reading it says what is wrong
        return
    assert found.readonly
    (folder / "x").unlink()
    assert bytes(found) == content[start : start + length]


def test_a_local_file_is_not_shown_where_it_would_have_to_be_read(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(bytes(1000))
    opened = open_object(open_store(tmp_path), "x")
    mapping_any(monkeypatch)
    assert opened.view(0, 1000) is not None
    asked = []

    def uncached(descriptor, buffers, at, flags):
        asked.append(at)
        if at == missing:
            raise BlockingIOError(errno.EAGAIN, "not in the page cache")
        return 1

    monkeypatch.setattr(os, "preadv", uncached)
    for missing in (10, 60, 109):
        asked.clear()
        assert opened.view(10, 100) is None
        assert asked[-1] == missing
    for number in (errno.EOPNOTSUPP, errno.EINVAL):
        monkeypatch.setattr(os, "preadv", failing(number))
        assert opened.view(10, 100) is None
    monkeypatch.setattr(os, "preadv", failing(errno.EIO))
    with pytest.raises(StoreError, match="Input/output error"):
        opened.view(10, 100)
    monkeypatch.setattr(mapping, "_ONLY_CACHED", None)
    assert opened.view(10, 100) is None
    monkeypatch.undo()
    mapping_any(monkeypatch)
    monkeypatch.setattr(mmap, "mmap", failing(errno.ENOMEM))
    assert opened.view(10, 100) is None
    monkeypatch.setattr(local, "_MAPPED", {"another"})
    assert opened.view(10, 100) is None


@pytest.mark.parametrize("verify", [True, False])
def test_a_load_of_long_tensors_copies_them_from_the_page_cache(tmp_path, monkeypatch, verify):
    monkeypatch.setattr(commit, "BLOCK_BYTES", _BLOCK)
    monkeypatch.setattr(prepare, "Layouts", partial(writer.Layouts, block_bytes=_BLOCK))
    state = {"w": np.random.default_rng(0).random((1000, 200)), "b": np.arange(1000.0)}
    distckpt.save(tmp_path / "c", state)
    mapping_any(monkeypatch)
    mapped = []
    real = mmap.mmap

    def noted(descriptor, length, **options):
        mapped.append(length)
        return real(descriptor, length, **options)

    monkeypatch.setattr(mmap, "mmap", noted)
    monkeypatch.setattr(reader, "_PIECE_BYTES", 2000)
    monkeypatch.setattr(schedule, "_WORTH_BYTES", 512)
    net = {"w": np.zeros((1000, 200)), "b": np.zeros(1000)}
    report = distckpt.load_into(tmp_path / "c", net, verify=verify)
    assert all(np.array_equal(net[name], state[name]) for name in state)
    (shard,) = (tmp_path / "c").glob("shard-*")
    assert 1_608_000 <= sum(mapped) <= shard.stat().st_size
    assert sum(mapped) <= report.bytes_read <= shard.stat().st_size
    # Damage is found before a byte of the block goes anywhere.
    if verify:
        data = bytearray(shard.read_bytes())
        data[5 * _BLOCK + 7] ^= 1
        shard.write_bytes(data)
        net = {"w": np.zeros((1000, 200))}
        with pytest.raises(LoadFailed, match=f"bytes {5 * _BLOCK}:{6 * _BLOCK} are damaged"):
            distckpt.load_into(tmp_path / "c", net)
        assert not net["w"].reshape(-1)[5 * _BLOCK // 8 :].any()
    shard.write_bytes(shard.read_bytes()[:-2000])
    with pytest.raises(LoadFailed, match="cut short"):
        distckpt.load_into(tmp_path / "c", net, verify=verify)
