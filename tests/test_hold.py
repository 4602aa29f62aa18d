"""Holds: whoever holds a checkpoint can read all of it; whoever died holds nothing for long."""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from interleavings import explore

import distckpt
from distckpt import (
    CheckpointError,
    IncompleteCheckpoint,
    LoadFailed,
    StoreError,
    UnsupportedFormat,
)
from distckpt.clean import clean
from distckpt.deletion import delete_replaced, delete_unless_held, finish_deletions
from distckpt.hold import Hold
from distckpt.manifest import MANIFEST_NAME
from distckpt.marks import name_parts, new_name
from distckpt.reader import read_manifest
from distckpt.store import open_store, read_object
from distckpt.testing import FaultyStore, MemoryStore, run_ranks

LONG_S = 10_000.0  # above any lease


def state(number=0.0):
    return {"a": np.full(40, number), "b": np.full(40, number + 1)}


def saved(store=None, number=0.0):
    """Save a checkpoint of two files."""
    store = MemoryStore() if store is None else store
    distckpt.save(
        store,
        state(number),
        comm=distckpt.Solo(),
        overwrite=True,
    )
    return store, read_manifest(store)


def kinds(store):
    """What lies in a folder beside files and manifest."""
    return sorted(parts[0] for parts in map(name_parts, store.names()) if parts)


# ------------------------------------------------------------------------------------- every order

EARLIER, OLD = saved()
_LATER, NEW = saved(number=7.0)
BEFORE, AFTER = dict(EARLIER.objects), dict(_LATER.objects)


def reader(store):
    """Hold the checkpoint, and look for its file; return whether the hold was had."""
    try:
        hold = Hold(store, OLD.save_id, looks=2)
    except IncompleteCheckpoint:
        return False
    with hold:
        store.size(*OLD.file_names)
    return True


def pruner(store):
    return delete_unless_held(store, OLD)


def next_pruner(store):
    """What comes after a pruner that has crashed: it doesn't know how far that one came."""
    finish_deletions(store)
    try:
        manifest = read_manifest(store)
    except CheckpointError:
        return None
    return manifest.save_id == OLD.save_id and delete_unless_held(store, manifest)


def saver(store):
    """Replace the checkpoint by a new one, as a commit does."""
    for name in NEW.file_names:
        store.put(name, AFTER[name], replace=False)
    store.put(MANIFEST_NAME, AFTER[MANIFEST_NAME], replace=True)
    return delete_replaced(store, OLD)


def finisher(store):
    finish_deletions(store)


def all_of(objects, manifest):
    return {name: objects[name] for name in [*manifest.file_names, MANIFEST_NAME]}


NOW = time.time()


def check(situation):
    """Check what is there if whoever has not ended never goes on."""
    # Who is about to read may be, from now on, as slow as it likes.
    if any(step and step[:2] == ("size", *OLD.file_names) for step in situation.next):
        assert situation.objects >= {(name, BEFORE[name]) for name in OLD.file_names}
    check_objects(situation.objects, all_ended=not any(situation.next))


@functools.cache
def check_objects(objects, *, all_ended):
    """Check that what is committed is whole, and that the rest is cleaned up."""
    store = MemoryStore(clock=lambda: NOW)
    store.objects.update(objects)
    there = store.objects
    if MANIFEST_NAME in there:
        manifest = read_manifest(store)
        whole = BEFORE if manifest.save_id == OLD.save_id else AFTER
        assert all_of(whole, manifest).items() <= there.items()
    if all_ended:
        assert "hold" not in kinds(store)
    # The holds and marks of those who have crashed end; a run that goes on looks at the folder.
    store._began = NOW - LONG_S
    next_pruner(store)
    committed = all_of(AFTER, NEW) if MANIFEST_NAME in there else {}
    left = {name for name, _ in there.items() - committed.items()}
    # A save that crashed leaves what `clean` deletes: its own files, or those that it replaced.
    assert not left or (
        not all_ended and left <= set(OLD.file_names if committed else NEW.file_names)
    )


ACTORS = [
    ((reader, pruner), None),
    ((reader, next_pruner), None),
    ((reader, saver), None),
    ((reader, reader, pruner), 2),
    ((reader, reader, saver), 2),
    ((reader, pruner, next_pruner), 2),
    ((reader, saver, finisher), 2),
]


@pytest.mark.parametrize(
    ("actors", "interruptions"),
    ACTORS,
    ids=["+".join(one.__name__ for one in a) for a, _ in ACTORS],
)
def test_no_order_of_events_takes_a_held_file_away(actors, interruptions):
    states = explore(BEFORE, actors, check, now_s=NOW, interruptions=interruptions)
    assert states > 100


# -------------------------------------------------------------------------------- the reader's side


def test_a_held_checkpoint_is_not_deleted_before_it_is_released(store):
    _, manifest = saved(store)
    checkpoint = distckpt.open(store)
    with checkpoint.hold():
        assert not delete_unless_held(store, manifest)
        checkpoint.verify()
        assert kinds(store) == ["hold"]
    assert delete_unless_held(store, manifest)
    assert not store.names()


def test_an_error_in_the_body_releases_the_hold(store):
    saved(store)
    with pytest.raises(KeyError), distckpt.open(store).hold():
        raise KeyError
    assert kinds(store) == []


def test_a_hold_is_in_force_without_a_with_block_too_and_may_be_released_twice(store):
    _, manifest = saved(store)
    hold = distckpt.open(store).hold()
    assert not delete_unless_held(store, manifest)
    hold.release()
    hold.release()
    assert delete_unless_held(store, manifest)


def test_what_two_readers_hold_stays_until_both_have_released_it(store):
    _, manifest = saved(store)
    with distckpt.open(store).hold():
        with distckpt.open(store).hold():
            assert not delete_unless_held(store, manifest)
        assert not delete_unless_held(store, manifest)
    assert delete_unless_held(store, manifest)


@pytest.mark.parametrize("end", ["pruned", "replaced"])
def test_what_is_gone_can_not_be_held_and_the_attempt_leaves_nothing(store, end):
    _, manifest = saved(store)
    checkpoint = distckpt.open(store)
    if end == "pruned":
        assert delete_unless_held(store, manifest)
    else:
        saved(store, 7.0)
    with pytest.raises(IncompleteCheckpoint, match="no longer there: it was pruned, or another"):
        checkpoint.hold()
    assert kinds(store) == []
    assert bool(store.names()) == (end == "replaced")


def test_another_formats_file_can_not_be_held(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    with pytest.raises(UnsupportedFormat, match="'npz' can't be held: only distckpt's own"):
        distckpt.open(tmp_path / "a.npz").hold()


@pytest.mark.parametrize("lease_s", [0, -1.0, float("nan"), float("inf")])
def test_a_hold_without_a_lease_is_refused(lease_s):
    store, _ = saved()
    with pytest.raises(ValueError, match="lease_s="):
        distckpt.open(store).hold(lease_s=lease_s)
    assert kinds(store) == []


def test_a_store_that_can_not_be_written_to_refuses_a_hold():
    store, _ = saved()

    def read_only(kind, name, number):
        if kind == "put":
            raise StoreError("read-only", refused=True)

    with pytest.raises(StoreError, match="read-only"):
        distckpt.open(FaultyStore(store, on_operation=read_only)).hold()


def test_one_ranks_hold_is_enough_for_a_load_by_all():
    store, manifest = saved()

    def load(comm):
        checkpoint = distckpt.open(store)
        hold = checkpoint.hold() if comm.rank == 0 else None
        comm.post((comm.rank + 1) % 3, 77, b"held") if comm.rank == 0 else None
        net = {name: np.zeros(40) for name in ("a", "b")}
        report = checkpoint.load_into(net, comm=comm, strict=True)
        if hold is not None:
            assert not delete_unless_held(store, manifest)
            hold.release()
        return report.loaded, net["b"][0]

    assert {value for _, value in run_ranks(3, load, timeout_s=60)} == {1.0}


# ------------------------------------------------------------------------------------------- leases


class Clocked:
    """A checkpoint in a store whose clock is the test's."""

    def __init__(self):
        self.now_s = time.time()
        self.store = MemoryStore(clock=lambda: self.now_s)
        self.manifest = saved(self.store)[1]

    def hold(self, **options):
        return Hold(self.store, self.manifest.save_id, looks=2, **options)

    def delete(self):
        return delete_unless_held(self.store, self.manifest)


def forgotten(hold):
    """Have a hold's reader die: nobody renews it any more, or takes it away."""
    hold._released.set()
    hold._thread.join()


def test_a_hold_whose_reader_died_counts_for_its_lease_and_goes_with_the_checkpoint():
    run = Clocked()
    forgotten(run.hold(lease_s=900))
    run.now_s += 890
    assert not run.delete()
    run.now_s += 20
    assert run.delete()
    assert run.store.objects == {}


@pytest.mark.parametrize("skew_s", [-86400 * 365, -3600, 3600, 86400 * 365])
def test_leases_are_by_the_stores_clock_whatever_this_machines_says(skew_s):
    run = Clocked()
    run.now_s += skew_s
    with run.hold():
        assert not run.delete()
    forgotten(run.hold())
    assert not run.delete()
    run.now_s += 601
    assert run.delete()


def test_where_a_store_tells_no_times_what_the_hold_says_counts():
    class Timeless(MemoryStore):
        def modified(self, name):
            super().modified(name)

    store, manifest = saved(Timeless())
    with distckpt.open(store).hold():
        assert not delete_unless_held(store, manifest)
    hold = distckpt.open(store).hold()
    forgotten(hold)
    old = json.loads(store.objects[hold._name])
    old["written_ns"] -= 601 * 10**9
    store.put(hold._name, json.dumps(old).encode(), replace=True)
    assert delete_unless_held(store, manifest)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"lease_s": "x"}',
        b'{"lease_s": 1e999}',
        b"[" * 5000,
        b'{"lease_s": 1' + b"0" * 400 + b"}",
    ],
)
def test_a_hold_that_says_nonsense_has_the_usual_lease(content):
    run = Clocked()
    run.store.put(f"hold-{run.manifest.save_id:016x}-{1:016x}.json", content, replace=False)
    run.now_s += 590
    assert not run.delete()
    run.now_s += 20
    assert run.delete()


def test_a_hold_is_renewed_for_as_long_as_it_lasts():
    store, _ = saved()
    with distckpt.open(store).hold(lease_s=0.2) as hold:
        first_s = store.modified(hold._name)
        wait_for(lambda: store.modified(hold._name) > first_s + 1.0)
        assert hold.lost is None
    assert kinds(store) == []


def wait_for(condition, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.005)


def test_a_reader_that_stood_still_for_too_long_learns_that_it_has_lost_the_hold(caplog):
    run = Clocked()
    hold = run.hold()
    run.now_s += 601
    assert run.delete()
    with caplog.at_level(logging.WARNING):
        hold._renew()
    assert "no longer there" in hold.lost
    assert "the hold is lost: it was not renewed within its lease of 600 s" in caplog.text
    hold.release()
    assert run.store.objects == {}


def test_a_reader_that_stood_still_while_nobody_came_holds_on():
    run = Clocked()
    with run.hold() as hold:
        run.now_s += 601
        hold._renew()
        assert hold.lost is None
        assert not run.delete()


def test_a_renewal_that_fails_is_told_and_the_next_one_goes_well(caplog):
    broken = False

    def fail(kind, name, number):
        if broken and kind == "put":
            raise StoreError("no answer")

    run = Clocked()
    hold = Hold(FaultyStore(run.store, on_operation=fail), run.manifest.save_id)
    broken = True
    run.now_s += 400
    with caplog.at_level(logging.WARNING):
        hold._renew()
    assert "could not be renewed, and ends 600 s after it last was: StoreError" in caplog.text
    broken = False
    hold._renew()
    run.now_s += 400
    assert not run.delete()
    hold.release()


def test_a_release_that_fails_is_told_and_hides_no_error_of_the_body(caplog):
    store, _ = saved()

    def fail(kind, name, number):
        if kind == "delete":
            raise StoreError("no answer")

    with caplog.at_level(logging.WARNING), pytest.raises(KeyError):  # noqa: SIM117
        with distckpt.open(FaultyStore(store, on_operation=fail)).hold():
            raise KeyError
    assert "could not be deleted, and ends in 600 s" in caplog.text


def test_a_forked_process_does_not_release_its_parents_hold():
    store, manifest = saved()
    with distckpt.open(store).hold() as hold:
        hold._process = os.getpid() + 1  # as the child's copy sees it
        hold.release()
        assert not delete_unless_held(store, manifest)
        hold._process = os.getpid()
    assert delete_unless_held(store, manifest)


_HOLDER = """
import sys, time, distckpt
with distckpt.open(sys.argv[1]).hold():
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_killed_readers_hold_ends_a_lease_later(tmp_path):
    store = open_store(tmp_path / "run" / "step-00000001")
    _, manifest = saved(store)
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, store.url], stdout=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout.readline() == "held\n"
        assert not delete_unless_held(store, manifest)
        job.send_signal(signal.SIGKILL)
    assert not delete_unless_held(store, manifest)
    [hold] = (tmp_path / "run/step-00000001").glob("hold-*")
    os.utime(hold, (time.time() - 601,) * 2)
    assert delete_unless_held(store, manifest)
    assert not hold.parent.exists() or not list(hold.parent.iterdir())


# ------------------------------------------------------------------------------- the deleter's side


def operations_of_a_deletion():
    store, manifest = saved()
    faulty = FaultyStore(store)
    assert delete_unless_held(faulty, manifest)
    return len(faulty.operations)


def test_a_deletion_that_fails_at_any_operation_leaves_all_or_what_the_next_one_deletes():
    for fail_at in range(operations_of_a_deletion()):
        store, manifest = saved()
        with pytest.raises(StoreError):
            delete_unless_held(FaultyStore(store, fail_at=fail_at), manifest)
        if MANIFEST_NAME in store.objects:
            distckpt.open(store).verify()
        finish_deletions(store)
        if MANIFEST_NAME in store.objects:
            assert delete_unless_held(store, manifest)
        assert store.objects == {}


def test_what_the_guard_raises_stops_a_deletion_that_leaves_no_mark():
    store, manifest = saved()

    def guard():
        raise StoreError("another Manager has taken over")

    with pytest.raises(StoreError, match="taken over"):
        delete_unless_held(store, manifest, guard=guard)
    assert kinds(store) == []
    distckpt.open(store).verify()


def test_a_deleter_that_stood_still_does_not_begin(monkeypatch):
    store, manifest = saved()
    monkeypatch.setattr("distckpt.deletion._BEGIN_WITHIN_S", -1.0)
    assert not delete_unless_held(store, manifest)
    assert kinds(store) == []
    distckpt.open(store).verify()


def test_the_mark_of_a_deleter_that_died_is_respected_for_ten_minutes():
    run = Clocked()
    crashed = FaultyStore(run.store, on_operation=crash_before("delete"))
    with pytest.raises(StoreError):
        delete_unless_held(crashed, run.manifest)
    assert kinds(run.store) == ["deletion"]
    run.now_s += 590
    with pytest.raises(IncompleteCheckpoint, match="just being deleted"):
        run.hold()
    run.now_s += 20
    with run.hold():
        assert not run.delete()
    assert run.delete()
    assert run.store.objects == {}


def crash_before(kind):
    def crash(found, name, number):
        if found == kind:
            raise StoreError("the process was killed")

    return crash


def test_a_checkpoint_that_was_replaced_meanwhile_is_not_deleted():
    store, old = saved()
    _, new = saved(store, 7.0)
    assert delete_unless_held(store, old)
    assert read_manifest(store).save_id == new.save_id
    distckpt.open(store).verify()


def test_a_mark_that_is_damaged_or_anothers_is_left_with_a_warning(caplog):
    store, manifest = saved()
    store.delete([MANIFEST_NAME])
    mark = f"deletion-{manifest.save_id:016x}-{1:016x}.binpb"
    for content, told in ((b"?", "are left"), (BEFORE[MANIFEST_NAME], "about another checkpoint")):
        store.put(mark, content, replace=True)
        with caplog.at_level(logging.WARNING):
            finish_deletions(store)
        assert told in caplog.text
        assert set(manifest.file_names) <= set(store.names())


def test_finishing_leaves_a_folder_alone_in_which_a_save_is_under_way(store):
    for name in NEW.file_names:
        store.put(name, AFTER[name], replace=False)
    before = store.names()
    finish_deletions(store)
    assert store.names() == before


# ------------------------------------------------------------------------------- saves that replace


def test_what_is_held_outlives_its_replacement_until_it_is_released(store):
    saved(store)
    checkpoint = distckpt.open(store)
    with checkpoint.hold():
        saved(store, 7.0)
        assert checkpoint["a"][0] == 0.0
        assert checkpoint.verify() > 0
        assert distckpt.open(store)["a"][0] == 7.0
        finish_deletions(store)
        assert checkpoint["b"][0] == 1.0
    finish_deletions(store)
    _, manifest = saved(MemoryStore())
    assert sorted(store.names()) == sorted([*read_manifest(store).file_names, MANIFEST_NAME])
    assert len(manifest.file_names) == 1


def test_the_next_replacement_deletes_what_was_held_before(store):
    saved(store)
    with distckpt.open(store).hold():
        saved(store, 7.0)
    saved(store, 8.0)
    assert sorted(store.names()) == sorted([*read_manifest(store).file_names, MANIFEST_NAME])


def test_cleaning_up_leaves_what_is_held_however_short_its_grace_time():
    run = Clocked()
    hold = run.hold()
    run.store.delete([MANIFEST_NAME])
    later = run.now_s + 10
    report = clean(run.store, grace_s=0, dry_run=False, now=lambda: later)
    assert "a reader holds" in str(report)
    assert read_object(run.store, *run.manifest.file_names)
    hold.release()
    clean(run.store, grace_s=0, dry_run=False, now=lambda: later)
    assert run.store.objects == {}


def test_cleaning_up_removes_the_holds_and_marks_of_the_dead_too():
    run = Clocked()
    forgotten(run.hold())
    run.now_s += 601
    with pytest.raises(StoreError):
        delete_unless_held(
            FaultyStore(run.store, on_operation=crash_before("delete")), run.manifest
        )
    assert kinds(run.store) == ["deletion", "hold"]
    run.store.delete([MANIFEST_NAME])
    a_day_later = run.now_s + 24 * 3600 + 1
    clean(run.store, dry_run=False, now=lambda: a_day_later)
    assert run.store.objects == {}


def test_cleaning_up_beside_a_checkpoint_removes_only_what_nobody_respects_any_more():
    run = Clocked()
    checkpoint = sorted(run.store.objects)
    # A reader that dies, and a deleter that does when it has written its mark.
    forgotten(run.hold())
    run.store.put(new_name("deletion", run.manifest.save_id), b"", replace=True)
    assert kinds(run.store) == ["deletion", "hold"]
    for age_s, left in ((599, ["deletion", "hold"]), (601, [])):
        clean(run.store, grace_s=0, dry_run=False, now=lambda at=run.now_s + age_s: at)
        assert kinds(run.store) == left
    assert sorted(run.store.objects) == checkpoint


# ------------------------------------------------------------------------------ readers without one


def test_a_reader_that_does_not_hold_is_told_that_the_checkpoint_was_deleted(store):
    _, manifest = saved(store)
    checkpoint = distckpt.open(store)
    assert delete_unless_held(store, manifest)
    for read in (lambda: checkpoint["a"][...], checkpoint.verify):
        with pytest.raises(IncompleteCheckpoint, match="deleted while it was being read: use a"):
            read()
    net = {"a": np.zeros(40)}
    with pytest.raises((LoadFailed, IncompleteCheckpoint), match="deleted while it was being read"):
        checkpoint.load_into(net)
