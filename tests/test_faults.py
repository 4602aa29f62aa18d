"""Disks that fill up, folders that vanish, clocks that go back, answers that come late or never."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from versions import state, version_of

import distckpt
from distckpt import CheckpointError, KeepLast, Manager, SaveFailed, StoreError
from distckpt.clean import clean
from distckpt.manifest import MANIFEST_NAME
from distckpt.store import open_store
from distckpt.testing import (
    Call,
    Fail,
    Fault,
    FaultyStore,
    Flip,
    Hold,
    Lose,
    MemoryStore,
    Point,
    Truncate,
    points,
    run_ranks,
)

MANIFEST_PUT = Point("put", f"*{MANIFEST_NAME}")


def save(store, version, *, ranks=3, how="save", **options):
    """Save on so many ranks; return the error that all raised alike, or None."""

    def run(comm):
        values = state(version, comm.rank, comm.size)
        try:
            if how == "save":
                distckpt.save(store, values, comm=comm, **options)
            else:
                distckpt.save_async(store, values, comm=comm, **options).wait()
        except CheckpointError as exc:
            return exc
        return None

    errors = run_ranks(ranks, run)
    assert len({(type(error), str(error)) for error in errors}) == 1
    return errors[0]


both_ways = pytest.mark.parametrize("how", ["save", "save_async"])


# -------------------------------------------------------------------------------------- full disks


@both_ways
@pytest.mark.parametrize("kind", ["create", "write", "write-half", "commit", "put"])
def test_a_full_disk_fails_the_save_and_leaves_the_old_checkpoint_and_nothing_else(
    tmp_path, how, kind
):
    save(tmp_path, 1)
    before = sorted(tmp_path.iterdir())
    full = Fault(Point(kind), Fail(OSError(28, "No space left on device")))
    error = save(FaultyStore(open_store(tmp_path), faults=[full]), 2, how=how, overwrite=True)
    assert isinstance(error, SaveFailed)
    assert "No space left on device" in str(error)
    if error.committed is False:
        assert sorted(tmp_path.iterdir()) == before
    assert version_of(tmp_path) == 1


_ON_A_SMALL_DISK = """
import os, subprocess, sys
import numpy as np
import distckpt
from distckpt.testing import run_ranks

disk = sys.argv[1]
def save(version, size):
    def run(comm):
        rows = np.full((4, size), float(version))[2 * comm.rank : 2 * comm.rank + 2]
        shard = distckpt.Shard(rows, (2 * comm.rank, 0), (4, size))
        distckpt.save(disk + "/x", {"w": shard}, comm=comm, overwrite=True)
    run_ranks(2, run)
def holds(version):
    found = distckpt.load(disk + "/x")["w"]
    assert (found == version).all(), found
save(1, 10_000)
before = sorted(os.listdir(disk + "/x"))
try:
    save(2, 100_000)
except distckpt.SaveFailed as exc:
    assert "No space left on device" in str(exc), exc
else:
    raise AssertionError("3 MB fit into 2 MB")
assert sorted(os.listdir(disk + "/x")) == before
holds(1)
save(3, 10_000)
holds(3)
subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
try:
    save(4, 10_000)
except distckpt.CheckpointError as exc:
    assert "Read-only file system" in str(exc), exc
else:
    raise AssertionError("it was written to")
holds(3)
print("passed")
"""


def test_a_disk_that_fills_up_or_is_read_only_leaves_the_old_checkpoint(tmp_path):
    """A real one, of 2 MB, which only this process tree sees."""
    if subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("no mounts in a namespace here; the tests beside this one inject the errors")
    script = tmp_path / "on_a_small_disk.py"
    script.write_text(textwrap.dedent(_ON_A_SMALL_DISK))
    disk = tmp_path / "disk"
    disk.mkdir()
    command = f"mount -t tmpfs -o size=2m tmpfs {disk} && exec {sys.executable} {script} {disk}"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.stdout.strip().endswith("passed"), done.stderr


def test_a_file_size_limit_fails_the_save_and_leaves_the_old_checkpoint(tmp_path):
    distckpt.save(tmp_path, {"w": np.zeros(10)}, comm=distckpt.Solo())
    before = sorted(tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(SaveFailed, match="File too large"):
            distckpt.save(tmp_path, {"w": np.ones(1 << 20)}, comm=distckpt.Solo(), overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(tmp_path.iterdir()) == before
    assert distckpt.load(tmp_path)["w"].tolist() == [0.0] * 10


_WITHOUT_PERMISSION = """
import os, sys
import numpy as np
import distckpt

place = sys.argv[1]
distckpt.save(place, {"w": np.zeros(3)}, comm=distckpt.Solo())
os.chmod(place, 0o555)
if os.getuid() == 0:
    os.setuid(65534)   # permissions don't hold for root
try:
    distckpt.save(place, {"w": np.ones(3)}, comm=distckpt.Solo(), overwrite=True)
except distckpt.SaveFailed as exc:
    assert "Permission denied" in str(exc), exc
else:
    raise AssertionError("it was written to")
assert distckpt.load(place)["w"].tolist() == [0, 0, 0]
print("passed")
"""


def test_a_permission_that_is_lost_fails_the_save_and_leaves_the_old_checkpoint(tmp_path):
    place = tmp_path
    while place != place.parent:  # whoever it becomes must get there
        if place.stat().st_uid == os.getuid():
            place.chmod(place.stat().st_mode | 0o055)
        place = place.parent
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_PERMISSION, str(tmp_path / "x")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.stdout.strip() == "passed", done.stderr


# --------------------------------------------------------------------------- folders that go away


@both_ways
@pytest.mark.parametrize(
    "point",
    [points.IN_WRITE, points.BEFORE_COMMIT_OF_FILE, points.BEFORE_LOOK_UP, points.BEFORE_MANIFEST],
    ids=str,
)
def test_a_folder_that_is_removed_under_a_save_fails_it_on_all_ranks(
    tmp_path, monkeypatch, how, point
):
    monkeypatch.setattr("distckpt.commit._LOOKUP_S", 0.1)
    place = tmp_path / "run"
    remove = Fault(point, Call(lambda _: shutil.rmtree(place, ignore_errors=True)))
    error = save(FaultyStore(open_store(place), faults=[remove]), 1, how=how)
    assert isinstance(error, SaveFailed), "it was committed without its files"
    assert version_of(place) is None
    assert save(place, 2) is None
    assert version_of(place) == 2


def test_a_clock_that_goes_back_changes_neither_the_order_nor_what_is_kept(tmp_path, monkeypatch):
    now = time.time()
    with Manager(tmp_path, comm=distckpt.Solo(), keep=KeepLast(2)) as manager:
        for step in (1, 2, 3):
            monkeypatch.setattr(time, "time", lambda step=step: now - 86_400.0 * step)
            monkeypatch.setattr(
                time, "time_ns", lambda step=step: int((now - 86_400.0 * step) * 1e9)
            )
            manager.save(step, state(step, 0, 1)).wait()
    monkeypatch.undo()
    manager = Manager(tmp_path, comm=distckpt.Solo())
    assert manager.steps() == [2, 3]
    assert manager.latest() == 3
    assert manager.open(3).created < manager.open(2).created


def test_what_was_written_in_the_future_is_not_cleaned(tmp_path):
    store = open_store(tmp_path)
    dead = FaultyStore(store, fail_at=8)
    save(dead, 1, ranks=1)
    left = sorted(tmp_path.iterdir())
    assert left
    clean(tmp_path, grace_s=0, dry_run=False, now=lambda: time.time() - 3600)
    assert sorted(tmp_path.iterdir()) == left
    clean(tmp_path, grace_s=0, dry_run=False, now=lambda: time.time() + 3600)
    assert not tmp_path.exists() or not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------- answers of the store


@both_ways
@pytest.mark.parametrize("overwrite", [False, True], ids=["fresh", "overwriting"])
def test_a_manifest_whose_put_lands_late_never_names_files_that_are_gone(how, overwrite):
    store = MemoryStore()
    if overwrite:
        save(store, 1)
    late = Hold(StoreError("no answer within 60 s"))
    faulty = FaultyStore(store, faults=[Fault(MANIFEST_PUT, late)])
    error = save(faulty, 2, how=how, overwrite=overwrite)
    assert isinstance(error, SaveFailed)
    assert error.committed is None
    assert version_of(store) == (1 if overwrite else None)
    late.land()
    assert version_of(store) == 2


@both_ways
def test_a_manifest_that_was_stored_but_reported_to_have_failed_is_committed(how):
    store = MemoryStore()
    fault = Fault(points.AFTER_MANIFEST, Fail(StoreError("connection reset")))
    assert save(FaultyStore(store, faults=[fault]), 1, how=how) is None
    assert version_of(store) == 1


@both_ways
def test_a_manifest_that_cant_be_read_back_is_unknown_and_nothing_is_deleted(how):
    store = MemoryStore()
    faults = [
        Fault(points.AFTER_MANIFEST, Fail(StoreError("connection reset"))),
        # It is looked for once before, in agreeing on the save.
        Fault(Point("size", f"*{MANIFEST_NAME}"), Fail(StoreError("still down")), at=1, times=None),
    ]
    faulty = FaultyStore(store, faults=faults)
    error = save(faulty, 1, how=how)
    assert isinstance(error, SaveFailed)
    assert error.committed is None
    assert not any(kind == "delete" for kind, _ in faulty.operations)
    assert version_of(store) == 1


@pytest.mark.parametrize(
    "lie",
    [
        Fault(points.IN_WRITE, Lose()),
        Fault(points.BEFORE_WRITE, Flip(100)),
        Fault(points.IN_WRITE, Flip(-1)),
        Fault(points.IN_WRITE, Truncate(7)),
        Fault(points.BEFORE_COMMIT_OF_FILE, Lose()),
    ],
    ids=["a lost write", "a flipped byte", "the last byte", "half a write", "a lost file"],
)
def test_a_store_that_lies_about_a_file_is_found_out_before_a_net_changes(monkeypatch, lie):
    monkeypatch.setattr("distckpt.commit._LOOKUP_S", 0.05)
    store = MemoryStore()
    error = save(FaultyStore(store, faults=[lie]), 1, ranks=1)
    if error is None:
        with pytest.raises(CheckpointError):
            distckpt.open(store).verify()
        net = {"cut": np.full((12, 101), -1.0)}
        with pytest.raises(CheckpointError):
            distckpt.load_into(store, net, comm=distckpt.Solo())
    else:
        assert version_of(store) is None
