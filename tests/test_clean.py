"""What saves that died have left is removed, and nothing else, ever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import distckpt
from distckpt import CheckpointError, Manager, SaveFailed, StoreError, clean
from distckpt.manifest import MANIFEST_NAME
from distckpt.store import open_store
from distckpt.testing import FaultyStore, MemoryStore, run_ranks

SOLO = distckpt.Solo()
LATER = 10 * 24 * 3600.0


def state(value=0):
    return {"w": np.full(100, float(value))}


def die(store, *, overwrite=False, ranks=1):
    """A save whose process is gone when it commits: nothing is cleaned up after it."""

    def go(comm):
        faulty = FaultyStore(store, on_operation=gone)

        with pytest.raises(CheckpointError):
            distckpt.save(faulty, state(9), comm=comm, overwrite=overwrite)

    died = []

    def gone(kind, name, number):
        died.extend([kind] if kind == "put" else [])
        if died:
            raise StoreError("gone")

    run_ranks(ranks, go)


def later(_):
    """A clock that is far ahead of when everything was written."""
    import time

    return time.time() + LATER


def test_what_a_dead_save_left_is_shown_first_and_removed_when_asked_to(tmp_path):
    store = open_store(tmp_path)
    distckpt.save(store, state(1), comm=SOLO)
    committed = sorted(store.names())
    die(store, overwrite=True)
    left = sorted(set(store.names()) - set(committed))
    assert left
    now = later(store)
    report = clean(tmp_path, now=lambda: now)
    assert report.dry_run
    assert [name for found in report.removed for name in found.names] == left
    assert "would remove" in str(report)
    assert sorted(store.names()) == sorted(committed + left)
    report = clean(tmp_path, dry_run=False, now=lambda: now)
    assert report.nbytes > 0
    assert sorted(store.names()) == committed
    assert distckpt.load(tmp_path)["w"][0] == 1
    assert str(clean(tmp_path, now=lambda: now)) == "nothing to clean"


def test_what_is_younger_than_the_grace_time_may_be_running_and_stays(tmp_path):
    store = open_store(tmp_path)
    die(store)
    left = store.names()
    assert left
    report = clean(tmp_path, grace_s=3600, dry_run=False)
    assert not report.removed
    assert "younger than 3600 s" in report.kept[0].why_kept
    assert store.names() == left


@pytest.mark.parametrize("damage", [b"", b"garbage", b"DISTCKPT\x63"])
def test_a_folder_whose_manifest_is_not_understood_is_left_alone(tmp_path, damage):
    distckpt.save(tmp_path, state(), comm=SOLO)
    (tmp_path / MANIFEST_NAME).write_bytes(damage)
    before = sorted(path.name for path in tmp_path.iterdir())
    now = later(None)
    report = clean(tmp_path, dry_run=False, now=lambda: now)
    assert list(report.not_understood) == [str(tmp_path)]
    assert "left alone" in str(report)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_is_not_ours_is_left_alone(tmp_path):
    names = [
        "notes.txt",
        "model.safetensors",
        "shard-00000-of-00001.safetensors",
        "shard-00000-of-00001.0123456789abcdeg.safetensors",
        "my.partial",
        "manifest.binpb.bak",
    ]
    for name in names:
        (tmp_path / name).write_bytes(b"mine")
    now = later(None)
    report = clean(tmp_path, dry_run=False, now=lambda: now)
    assert not report.removed
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_half_written_objects_go_too(tmp_path):
    for name in (
        "shard-00000-of-00002.0123456789abcdef.safetensors",
        "shard-00001-of-00002.0123456789abcdef.safetensors.partial",
        "manifest.binpb.0123456789abcdef.partial",
    ):
        (tmp_path / name).write_bytes(b"half")
    now = later(None)
    report = clean(tmp_path, dry_run=False, now=lambda: now)
    assert {found.save_id for found in report.removed} == {"", "0123456789abcdef"}
    assert not tmp_path.exists() or not list(tmp_path.iterdir())


def test_notes_of_a_manager_that_died_while_it_wrote_them_go_too(tmp_path):
    with Manager(tmp_path, comm=SOLO) as manager:
        manager.save(1, state())
    own = tmp_path / ".distckpt"
    kept = sorted(path.name for path in own.iterdir())
    for name in ("epoch-00000002", "index.json", "pin-00000001.json"):
        (own / f"{name}.0123456789abcdef.partial").write_bytes(b"half")
    (own / "mine.txt.0123456789abcdef.partial").write_bytes(b"mine")
    now = later(None)
    report = clean(tmp_path, dry_run=False, now=lambda: now)
    assert [found.save_id for found in report.removed] == [""]
    assert sorted(path.name for path in own.iterdir()) == sorted(
        [*kept, "mine.txt.0123456789abcdef.partial"]
    )


def test_all_of_a_runs_steps_are_cleaned(tmp_path):
    with Manager(tmp_path, comm=SOLO) as manager:
        for step in (1, 2):
            manager.save(step, state(step))
    die(open_store(tmp_path / "step-00000002"), overwrite=True)
    die(open_store(tmp_path / "step-00000003"))
    now = later(None)
    report = clean(tmp_path, dry_run=False, now=lambda: now)
    assert {found.url.rpartition("/")[2] for found in report.removed} == {
        "step-00000002",
        "step-00000003",
    }
    assert Manager(tmp_path, comm=SOLO).steps() == [1, 2]
    assert distckpt.load(tmp_path / "step-00000002")["w"][0] == 2


def test_a_store_that_does_not_tell_times_keeps_everything():
    class Timeless(MemoryStore):
        def modified(self, name):
            return None

    store = Timeless()
    die(store)
    left = store.names()
    assert left
    now = later(None)
    report = clean(store, dry_run=False, now=lambda: now)
    assert "doesn't tell how old" in report.kept[0].why_kept
    assert store.names() == left


def test_a_save_that_commits_while_it_is_looked_at_stays(tmp_path):
    """The manifest is read once more before the deletion."""
    store = open_store(tmp_path)
    distckpt.save(store, state(5), comm=SOLO)
    manifest = (tmp_path / MANIFEST_NAME).read_bytes()
    (tmp_path / MANIFEST_NAME).unlink()
    looks = []

    def commit_meanwhile(kind, name, number):
        if kind == "size" and name.startswith("shard-") and not looks:
            looks.append(name)
            (tmp_path / MANIFEST_NAME).write_bytes(manifest)

    now = later(None)
    faulty = FaultyStore(store, on_operation=commit_meanwhile)
    report = clean(faulty, dry_run=False, now=lambda: now)
    assert not report.removed
    assert distckpt.load(tmp_path)["w"][0] == 5


def test_a_negative_grace_time_is_refused(tmp_path):
    with pytest.raises(ValueError, match="grace_s=-1"):
        clean(tmp_path, grace_s=-1)


@given(
    ops=st.lists(st.tuples(st.integers(1, 2), st.integers(0, 24), st.booleans()), max_size=6),
    dry_run=st.booleans(),
)
def test_whatever_has_died_the_committed_checkpoint_is_whole_after_cleaning(ops, dry_run):
    store = MemoryStore()
    value = None
    for number, (ranks, at, dies) in enumerate(ops):

        def go(comm, number=number, at=at, dies=dies):
            faulty = FaultyStore(store, fail_at=at if dies else None)
            try:
                distckpt.save(faulty, state(number), comm=comm, overwrite=True)
            except SaveFailed:
                return False
            return True

        if all(run_ranks(ranks, go)):
            value = number
        now = later(None)
        clean(store, dry_run=dry_run, now=lambda now=now: now)
        if value is not None:
            assert distckpt.load(store)["w"][0] == value
            distckpt.open(store).verify()
    if not dry_run:
        named = distckpt.open(store).manifest.file_names if value is not None else []
        assert set(store.objects) <= {MANIFEST_NAME, *named}
