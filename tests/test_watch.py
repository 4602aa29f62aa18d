"""Watching a run: each new checkpoint is seen, held while it is read, and seen once."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import subprocess
import sys
import threading
import time
import uuid

import numpy as np
import pytest
from servers import BUCKET

import distckpt
from distckpt import IncompleteCheckpoint, KeepLast, Manager, StoreError
from distckpt.manifest import MANIFEST_NAME
from distckpt.marks import name_parts
from distckpt.run import step_name
from distckpt.store import PrefixStore, open_store
from distckpt.testing import FaultyStore, MemoryStore
from distckpt.watch import watch

NOW = {"poll_s": 0.001, "timeout_s": 0}  # yields what is there, and ends


def save(root, *steps, salt=0, keep=None):
    with Manager(root, comm=distckpt.Solo(), keep=keep) as manager:
        for step in steps:
            manager.save(step, {"w": np.full(4, step + salt / 16)}).wait()


def seen(checkpoints):
    return [(found.step, found["w"][0]) for found in checkpoints]


@pytest.fixture(params=["memory", "local", "memory-url"])
def root(request, tmp_path):
    """The root of a run: not there yet."""
    if request.param == "memory":
        return MemoryStore()
    return f"memory://{uuid.uuid4().hex}" if request.param == "memory-url" else tmp_path / "run"


# --------------------------------------------------------------------------------- what is yielded


def test_only_what_is_committed_after_the_call_is_new(root):
    save(root, 1, 2)
    watched = watch(root, **NOW)
    save(root, 3)
    assert seen(watched) == [(3, 3.0)]


def test_the_newest_of_those_that_are_there_can_be_wanted_too(root):
    save(root, 1, 2)
    assert seen(watch(root, start="all", **NOW)) == [(2, 2.0)]


def test_every_one_comes_in_the_order_of_steps_if_that_is_wanted(root):
    save(root, 1, 3)
    save(root, 2)
    assert seen(watch(root, start="all", every=True, **NOW)) == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_watch_can_begin_at_a_step(root):
    save(root, 1, 2, 3)
    assert seen(watch(root, start=2, every=True, **NOW)) == [(2, 2.0), (3, 3.0)]
    assert seen(watch(root, start=4, **NOW)) == []


def test_a_run_that_begins_later_than_the_watch_is_seen(root):
    watched = watch(root, poll_s=0.001, timeout_s=60)
    thread = threading.Thread(target=save, args=(root, 1))
    thread.start()
    assert next(watched).step == 1
    thread.join()
    watched.close()


def test_a_slow_reader_gets_the_newest_and_none_twice(root):
    save(root, 1)
    watched = watch(root, start="all", **NOW)
    assert next(watched).step == 1
    save(root, 2, 3, 4)
    assert [found.step for found in watched] == [4]


def test_a_slow_reader_that_wants_every_one_gets_those_that_are_still_there(root):
    save(root, 1)
    watched = watch(root, start="all", every=True, **NOW)
    assert next(watched).step == 1
    save(root, 2, 3, 4, keep=KeepLast(2))
    assert [found.step for found in watched] == [3, 4]


def test_a_step_that_is_saved_again_is_a_new_checkpoint(root):
    save(root, 1, 2)
    watched = watch(root, start="all", every=True, poll_s=0.001, timeout_s=0)
    first = [(found.step, found["w"][0]) for found in itertools.islice(watched, 2)]
    save(root, 1, salt=1)
    assert first + seen(watched) == [(1, 1.0), (2, 2.0), (1, 1 + 1 / 16)]


def test_a_step_that_is_saved_again_within_the_resolution_of_the_stores_clock_is_seen():
    store = MemoryStore(clock=lambda: 1e9)
    save(store, 1)
    watched = watch(store, start="all", **NOW)
    assert next(watched)["w"][0] == 1.0
    save(store, 1, salt=1)
    assert seen(watched) == [(1, 1 + 1 / 16)]


def test_what_is_copied_or_touched_is_not_new(tmp_path):
    save(tmp_path, 1)
    watched = watch(tmp_path, start="all", **NOW)
    assert next(watched).step == 1
    (tmp_path / step_name(1) / MANIFEST_NAME).touch()
    assert seen(watched) == []


def test_a_manifest_is_read_once_and_not_at_each_look():
    store = MemoryStore(clock=lambda: 1e9)
    save(store, *range(1, 6))
    counted = FaultyStore(store)
    now = iter(range(0, 10**6, 10))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: next(now))
        assert list(watch(counted, poll_s=1, stop=Countdown(50))) == []
    reads = [name for kind, name in counted.operations if kind == "read"]
    assert len(reads) == len(set(reads)) == 5
    assert len([kind for kind, _ in counted.operations if kind == "names"]) > 10


class Countdown:
    """Says True from the n-th time on."""

    def __init__(self, count):
        self.count = count

    def __call__(self):
        self.count -= 1
        return self.count < 0


def test_a_save_that_is_not_committed_and_foreign_things_are_not_seen(root):
    save(root, 1)
    store = open_store(root)
    store.put("step-00000002/shard-00000-of-00001.0123456789abcdef.safetensors", b"", replace=False)
    store.put("step-3/manifest.binpb", b"not of ours", replace=False)
    store.put("best/manifest.binpb", b"not of ours", replace=False)
    store.put("notes.txt", b"mine", replace=False)
    assert seen(watch(root, start="all", every=True, **NOW)) == [(1, 1.0)]


def test_a_damaged_manifest_is_told_once_and_passed_over(root, caplog):
    save(root, 1, 2, 3)
    open_store(root).put(f"{step_name(2)}/{MANIFEST_NAME}", b"damaged", replace=True)
    with caplog.at_level(logging.WARNING, "distckpt.watch"):
        watched = watch(root, start="all", every=True, poll_s=0.001, stop=Countdown(20))
        assert seen(watched) == [(1, 1.0), (3, 3.0)]
    [warning] = [record for record in caplog.records if record.name == "distckpt.watch"]
    assert f"{step_name(2)}: left out, as it can't be read: " in warning.getMessage()


def test_a_damaged_checkpoint_that_is_saved_again_is_seen(root):
    save(root, 1)
    open_store(root).put(f"{step_name(1)}/{MANIFEST_NAME}", b"damaged", replace=True)
    watched = watch(root, start="all", poll_s=0.001, timeout_s=60)
    thread = threading.Thread(target=save, args=(root, 1), kwargs={"salt": 1})
    thread.start()
    assert next(watched)["w"][0] == 1 + 1 / 16
    thread.join()
    watched.close()


# ------------------------------------------------------------------------------------- how it ends


def test_it_ends_when_nothing_has_come_for_so_long(root):
    began = time.monotonic()
    assert seen(watch(root, poll_s=3600, timeout_s=0.05)) == []
    assert 0.05 <= time.monotonic() - began < 60


def test_the_time_that_the_loop_takes_is_no_waiting(root):
    save(root, 1)
    watched = watch(root, start="all", poll_s=0.001, timeout_s=0.2)
    next(watched)
    until = time.monotonic() + 0.25
    while time.monotonic() < until:  # the loop's work
        pass
    save(root, 2)
    assert seen(watched) == [(2, 2.0)]


def test_it_ends_when_it_is_told_to_also_in_the_middle_of_a_pause(root):
    told = threading.Event()
    asked = []

    def stop():
        asked.append(1)
        if len(asked) == 3:
            told.set()
        return told.is_set()

    assert seen(watch(root, poll_s=3600, stop=stop)) == []


def test_it_ends_before_the_next_checkpoint_when_it_is_told_to_in_the_body(root):
    save(root, 1, 2)
    told = threading.Event()
    steps = []
    for checkpoint in watch(root, start="all", every=True, stop=told.is_set):
        steps.append(checkpoint.step)
        told.set()
    assert steps == [1]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("start", "newest"),
        ("start", -1),
        ("start", None),
        ("poll_s", 0),
        ("poll_s", float("nan")),
        ("timeout_s", -1),
        ("lease_s", 0),
    ],
)
def test_arguments_that_make_no_sense_are_refused_at_once(argument, value):
    with pytest.raises(ValueError, match=f"{argument}="):
        watch(MemoryStore(), **{argument: value})


def test_a_store_that_fails_is_raised():
    store = FaultyStore(MemoryStore())
    watched = watch(store, start="all")
    store.fail_from_now_on()
    with pytest.raises(StoreError):
        next(watched)


# ------------------------------------------------------------------------------------------- holds


def holds(root, step):
    store = PrefixStore(open_store(root), step_name(step))
    return [name for name in store.names() if name_parts(name)]


def test_each_is_held_until_the_next_iteration(root):
    save(root, 1)
    watched = watch(root, start="all", **NOW)
    checkpoint = next(watched)
    save(root, 2, keep=KeepLast(1))
    assert len(holds(root, 1)) == 1
    assert checkpoint["w"][3] == 1.0
    assert next(watched).step == 2
    assert holds(root, 1) == []
    assert len(holds(root, 2)) == 1
    save(root, 3, keep=KeepLast(1))
    with pytest.raises(IncompleteCheckpoint):
        checkpoint["w"][3]
    watched.close()
    assert holds(root, 2) == []


@pytest.mark.parametrize("leave", ["break", "error"])
def test_leaving_the_loop_releases_the_hold(root, leave):
    save(root, 1)

    def body():
        for _ in watch(root, start="all", **NOW):
            assert len(holds(root, 1)) == 1
            if leave == "error":
                raise KeyError
            break

    if leave == "error":
        with pytest.raises(KeyError):
            body()
    else:
        body()
    assert holds(root, 1) == []


def test_without_holds_nothing_is_written(root):
    save(root, 1)
    names = open_store(root).names(f"{step_name(1)}/")
    for checkpoint in watch(root, start="all", hold=False, **NOW):
        assert open_store(root).names(f"{step_name(1)}/") == names
        assert checkpoint["w"][0] == 1.0


def test_a_checkpoint_that_is_pruned_before_it_can_be_held_is_passed_over(caplog):
    store = MemoryStore()
    save(store, 1)
    pruned = []

    def prune(kind, name, number):
        """Let the run go on, and prune, at the worst moment."""
        if kind == "put" and "/hold-" in name and not pruned:
            pruned.append(name)
            save(store, 2, keep=KeepLast(1))

    watched = watch(FaultyStore(store, on_operation=prune), start="all", **NOW)
    with caplog.at_level(logging.INFO, "distckpt.watch"):
        assert seen(watched) == [(2, 2.0)]
    assert "step-00000001: it was pruned or replaced before its turn" in caplog.text
    assert not [name for name in store.objects if name.startswith(step_name(1))]


def mark(store, step):
    """Leave what a process leaves that has died when it was about to delete a checkpoint."""
    save_id = Manager(store, comm=distckpt.Solo()).open(step).manifest.save_id
    name = f"{step_name(step)}/deletion-{save_id:016x}-{1:016x}.binpb"
    store.put(name, b"", replace=False)
    return name


@pytest.mark.parametrize("every", [False, True])
def test_a_checkpoint_that_a_dead_process_was_deleting_does_not_hide_the_next(every):
    store = MemoryStore()
    save(store, 1)
    name = mark(store, 1)
    watched = watch(store, start="all", every=every, poll_s=0.001, timeout_s=60)
    thread = threading.Thread(target=save, args=(store, 2))
    thread.start()
    assert next(watched).step == 2
    thread.join()
    store.delete([name])
    save(store, 3)
    assert next(watched).step == 3
    if every:  # which has become free, and is looked at again when nothing else comes
        assert next(watched).step == 1
    watched.close()


def test_a_checkpoint_that_a_dead_process_was_deleting_keeps_no_watch_busy():
    store = MemoryStore()
    save(store, 1)
    mark(store, 1)
    counted = FaultyStore(store)
    assert seen(watch(counted, start="all", poll_s=3600, timeout_s=0.01)) == []
    assert len([name for kind, name in counted.operations if kind == "put"]) <= 3


# -------------------------------------------------------------------------------- beside a real run

_TRAIN = """
import pathlib, sys, numpy as np, distckpt
root, stop = sys.argv[1], pathlib.Path(sys.argv[2])
arrays = {f"layer{i}": np.zeros(20_000) for i in range(4)}
step = 0
with distckpt.Manager(root, save=distckpt.EverySteps(1), keep=distckpt.KeepLast(1)) as manager:
    while not stop.exists():
        step += 1
        for array in arrays.values():
            array.fill(step)
        manager.step(step, arrays)
print(step)
"""

_EVALUATE = """
import itertools, json, sys, time, distckpt
root, count, hold = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "hold"
manager = distckpt.Manager(root)
watched = distckpt.watch(root, start="all", hold=hold, poll_s=0.002)
for checkpoint in itertools.islice(watched, count):
    step = checkpoint.step
    try:
        # Until the run has pruned what it would prune meanwhile.
        while (manager.latest() or 0) < step + 3:
            time.sleep(0.001)
        for name in checkpoint:
            assert (checkpoint[name][...] == step).all(), (step, name)
        checkpoint.verify()
        print(json.dumps([step, "read"]))
    except (distckpt.IncompleteCheckpoint, distckpt.LoadFailed) as exc:
        print(json.dumps([step, str(exc)]))
"""


@contextlib.contextmanager
def program(text, *arguments):
    """Run a program; it has ended well at the end of the block, or is killed."""
    job = subprocess.Popen(
        [sys.executable, "-c", text, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield lambda: output_of(job)
        if not job.stdout.closed:
            output_of(job)
    finally:
        job.kill()
        job.wait()


def output_of(job):
    output, errors = job.communicate(timeout=200)
    assert job.returncode == 0, errors
    return [json.loads(line) for line in output.splitlines()]


def read_beside_a_run(root, readers, count, how):
    """Run readers of so many checkpoints beside a run that saves and prunes as fast as it can."""
    stop = root.with_name("stop")
    with program(_TRAIN, root, stop) as run, contextlib.ExitStack() as stack:
        stack.callback(stop.touch)
        jobs = [stack.enter_context(program(_EVALUATE, root, count, how)) for _ in range(readers)]
        found = [job() for job in jobs]
        stop.touch()
        [last] = run()
    return found, last


def test_whoever_holds_never_sees_a_checkpoint_vanish_however_fast_the_run_saves(tmp_path):
    root = tmp_path / "run"
    found, last = read_beside_a_run(root, readers=2, count=8, how="hold")
    for read in found:
        steps = [step for step, _ in read]
        assert steps == sorted(set(steps))
        assert [what for _, what in read] == ["read"] * 8
    assert [path.name for path in root.glob("step-*")] == [step_name(last)]
    assert holds(root, last) == []


def test_whoever_does_not_hold_is_told_that_it_has_vanished(tmp_path):
    [read], _ = read_beside_a_run(tmp_path / "run", readers=1, count=3, how="without")
    assert len(read) == 3
    assert all("deleted while it was being read" in what for _, what in read)


def test_threads_that_hold_never_see_a_checkpoint_vanish():
    store = MemoryStore()
    ended = threading.Event()
    found, errors = [], []

    def evaluate():
        try:
            for checkpoint in watch(store, start="all", poll_s=0.001, stop=ended.is_set):
                for _ in range(3):
                    assert (checkpoint["w"][...] == checkpoint.step).all()
                    time.sleep(0)
                found.append(checkpoint.step)
        except BaseException as exc:  # noqa: BLE001  raised below
            errors.append(exc)

    threads = [threading.Thread(target=evaluate) for _ in range(3)]
    for thread in threads:
        thread.start()
    with Manager(store, comm=distckpt.Solo(), keep=KeepLast(1)) as manager:
        for step in range(1, 80):
            manager.save(step, {"w": np.full(64, float(step))})
    ended.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(found) > 10


# ------------------------------------------------------------------------------------------- S3


def test_a_run_on_s3_is_watched_by_polling(moto):
    root = f"s3://{BUCKET}/{uuid.uuid4().hex}/run"
    options = {"storage_options": moto.options()}

    def run():
        with Manager(root, comm=distckpt.Solo(), keep=KeepLast(1), **options) as manager:
            for step in range(1, 6):
                manager.save(step, {"w": np.full(4, float(step))}).wait()

    thread = threading.Thread(target=run)
    watched = watch(root, poll_s=0.01, timeout_s=60, **options)
    thread.start()
    steps = []
    for checkpoint in watched:
        if not steps:
            thread.join()  # it goes on for four more
        assert checkpoint["w"][0] == checkpoint.step
        steps.append(checkpoint.step)
        if checkpoint.step == 5:
            break
    watched.close()
    assert steps == sorted(set(steps))
    left = open_store(root, **options).names(f"{step_name(5)}/")
    assert not [name for name in left if name_parts(name)]
