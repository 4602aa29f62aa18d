"""What `distckpt.testing` gives to users' tests does what it says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

import distckpt
from distckpt import SaveFailed, StoreError
from distckpt.store import open_store
from distckpt.testing import (
    Call,
    Delay,
    Fail,
    Fault,
    FaultyCoordinator,
    FaultyFiles,
    FaultyStore,
    Flip,
    Hold,
    Kill,
    LaggingStore,
    Lose,
    MemoryStore,
    Point,
    PowerLossDisk,
    Stall,
    Truncate,
    points,
    run_ranks,
)
from distckpt.testing.files import contents

PUT = Point("put")


def faulty(*faults, **options):
    """A faulty store in front of an empty one; both."""
    inner = MemoryStore()
    return FaultyStore(inner, faults=faults, **options), inner


# ------------------------------------------------------------------------------------------- faults


def test_a_fault_happens_at_its_passage_and_so_many_times():
    store, inner = faulty(Fault(PUT, Fail(), at=1, times=2))
    outcomes = []
    for name in "abcd":
        try:
            store.put(name, b"x", replace=False)
            outcomes.append(True)
        except StoreError:
            outcomes.append(False)
    assert outcomes == [True, False, False, True]
    assert sorted(inner.objects) == ["a", "d"]


def test_a_fault_without_an_end_goes_on_for_ever():
    store, _ = faulty(Fault(PUT, Fail(), times=None))
    for _ in range(5):
        with pytest.raises(StoreError):
            store.put("a", b"x", replace=True)


def test_a_fault_of_other_ranks_does_not_happen():
    fault = Fault(PUT, Fail(), ranks={1})
    faulty(fault, rank=0)[0].put("a", b"x", replace=False)
    with pytest.raises(StoreError):
        faulty(fault, rank=1)[0].put("a", b"x", replace=False)


def test_names_are_globs():
    store, _ = faulty(Fault(Point("put", "b*"), Fail()))
    store.put("ab", b"", replace=False)
    with pytest.raises(StoreError):
        store.put("ba", b"", replace=False)


def test_what_fails_before_is_not_done_and_what_fails_after_is():
    store, inner = faulty(
        Fault(Point("put", "a"), Fail(KeyError("before"))),
        Fault(Point("put", "b", after=True), Fail(lambda: KeyError("after"))),
    )
    with pytest.raises(KeyError, match="before"):
        store.put("a", b"x", replace=False)
    with pytest.raises(KeyError, match="after"):
        store.put("b", b"x", replace=False)
    assert list(inner.objects) == ["b"]


@pytest.mark.parametrize(
    ("action", "stored"),
    [
        (Lose(), None),
        (Truncate(2), b"ab"),
        (Flip(0, 3), b"bbcd"),
        (Flip(-1), b"abce"),
        (Delay(0.0), b"abcd"),
        (Call(lambda operation: None), b"abcd"),
    ],
    ids=["lose", "truncate", "flip", "flip the last", "delay", "call"],
)
def test_lies_about_what_is_stored(action, stored):
    store, inner = faulty(Fault(PUT, action))
    store.put("a", b"abcd", replace=False)
    assert inner.objects.get("a") == stored


def test_lies_about_what_is_read():
    store, inner = faulty(Fault(Point("read"), Flip(1, 3)), Fault(Point("read"), Truncate(1), at=1))
    inner.put("a", b"abcd", replace=False)
    buffer = bytearray(4)
    store.read_into("a", 0, memoryview(buffer))
    assert buffer == b"aacd"
    with pytest.raises(EOFError):
        store.read_into("a", 0, memoryview(buffer))


def test_a_held_operation_lands_late():
    late = Hold()
    store, inner = faulty(Fault(PUT, late))
    store.put("a", b"x", replace=False)
    assert not inner.objects
    late.land()
    assert inner.objects == {"a": b"x"}


def test_a_stalled_operation_goes_on_when_it_is_released():
    stall = Stall()
    store, inner = faulty(Fault(PUT, stall))
    thread = threading.Thread(target=lambda: store.put("a", b"x", replace=False))
    thread.start()
    assert stall.reached.wait(30)
    assert not inner.objects
    stall.release.set()
    thread.join(30)
    assert inner.objects == {"a": b"x"}


def test_every_write_has_a_middle():
    seen = []
    store, inner = faulty(
        Fault(
            Point(("write", "write-half")),
            Call(lambda operation: seen.append((operation.kind, bytes(operation.data)))),
            times=None,
        )
    )
    sink = store.create("a", 4)
    sink.write_at(0, b"abcd")
    sink.commit()
    assert seen == [("write", b"ab"), ("write-half", b"cd")]
    assert inner.objects == {"a": b"abcd"}


# --------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("point", [points.BEFORE_STAGING, points.BEFORE_GATHER], ids=str)
def test_a_rank_that_fails_at_a_message_is_named_or_names_itself(monkeypatch, rank, point):
    monkeypatch.setattr("distckpt.team._GRACE_S", 0.3)
    fault = Fault(point, Fail(), ranks={rank})

    def run(comm):
        own = FaultyCoordinator(comm, [fault])
        try:
            distckpt.save(MemoryStore(), {"w": np.zeros(3)}, comm=own, timeout_s=0.5)
        except distckpt.CheckpointError as exc:
            return exc
        return None

    errors = run_ranks(3, run)
    assert errors[rank] is not None
    for other in {0, 1, 2} - {rank}:
        assert isinstance(errors[other], SaveFailed)
        assert rank in errors[other].failures


def test_a_lost_message_is_a_late_rank(monkeypatch):
    monkeypatch.setattr("distckpt.team._GRACE_S", 1.0)
    lost = Fault(Point("send", "outcome"), Lose(), ranks={1})
    store = MemoryStore()

    def run(comm):
        with pytest.raises(SaveFailed) as caught:
            distckpt.save(
                store, {"w": np.zeros(3)}, comm=FaultyCoordinator(comm, [lost]), timeout_s=0.5
            )
        return str(caught.value), list(caught.value.failures)

    assert len({(message, *ranks) for message, ranks in run_ranks(2, run)}) == 1
    assert not any(name == "manifest.binpb" for name in store.objects)


def test_messages_of_a_save_are_named():
    def run(comm):
        own = FaultyCoordinator(comm)
        distckpt.save(store, {"w": np.zeros(3)}, comm=own)
        return own.operations

    store = MemoryStore()
    first, second = run_ranks(2, run)
    assert second == [
        ("send", "call"),
        ("receive", "answer"),
        ("send", "description"),
        ("receive", "plan"),
        ("send", "outcome"),
        ("receive", "decision"),
    ]
    assert first == [("receive" if kind == "send" else "send", name) for kind, name in second]


def test_what_is_no_coordinator_is_refused():
    with pytest.raises(distckpt.CheckpointError, match="expected a Coordinator"):
        FaultyCoordinator("comm")


# ------------------------------------------------------------------------------------------ files


def test_the_calls_of_a_save_to_files_are_seen_in_their_order(tmp_path):
    with FaultyFiles(tmp_path) as files:
        distckpt.save(tmp_path / "run", {"w": np.zeros(300)}, comm=distckpt.Solo())
    kinds = [kind for kind, name in files.operations if "shard-" in name]
    assert kinds[0] == "os.open"
    assert kinds[-2:] == ["os.fsync", "os.rename"]
    assert set(kinds[1:-2]) <= {"os.open", "os.write", "os.allocate", "os.truncate", "os.fsync"}
    names = [name for kind, name in files.operations if kind == "os.fsync"]
    assert "." in names  # where the folder itself was made
    assert names[-1] == "run"


def test_calls_elsewhere_and_afterwards_are_left_alone(tmp_path):
    (tmp_path / "watched").mkdir()
    before = os.open
    with FaultyFiles(tmp_path / "watched", [Fault(Point("os.open"), Fail(), times=None)]) as files:
        distckpt.save(tmp_path / "run", {"w": np.zeros(3)}, comm=distckpt.Solo())
    assert files.operations == []
    assert os.open is before


def test_two_watchers_at_once_are_refused(tmp_path):
    with FaultyFiles(tmp_path), pytest.raises(RuntimeError, match="already"):
        FaultyFiles(tmp_path / "other").__enter__()


def test_a_short_write_is_gone_on_with(tmp_path):
    """The system may write less than it was told to."""
    with FaultyFiles(tmp_path, [Fault(Point("os.write", "*shard*"), Truncate(5), times=3)]):
        distckpt.save(tmp_path / "run", {"w": np.arange(9.0)}, comm=distckpt.Solo())
    assert distckpt.load(tmp_path / "run")["w"].tolist() == list(range(9))


@pytest.mark.parametrize("kind", ["os.open", "os.write", "os.fsync", "os.rename", "os.mkdir"])
def test_a_call_that_fails_fails_the_save(tmp_path, kind):
    error = OSError(5, "Input/output error")
    with (
        FaultyFiles(tmp_path, [Fault(Point(kind), Fail(error), times=None)]),
        pytest.raises(SaveFailed, match="Input/output error"),
    ):
        distckpt.save(tmp_path / "run", {"w": np.zeros(3)}, comm=distckpt.Solo())
    with pytest.raises((distckpt.CheckpointNotFound, distckpt.IncompleteCheckpoint)):
        distckpt.open(tmp_path / "run")


# ------------------------------------------------------------------------------------- power loss


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_calls_replayed_whole_make_the_folder(tmp_path, overwrite):
    """So nothing that changes files is done past what is watched."""
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir(), after.mkdir()
    if overwrite:
        distckpt.save(before / "run", {"w": np.zeros(3000)}, comm=distckpt.Solo())
    with PowerLossDisk(before) as disk:
        run_ranks(
            2,
            lambda comm: distckpt.save(
                before / "run", {"w": np.ones(3000)}, comm=comm, overwrite=overwrite
            ),
        )
    disk.lose_power(after=disk.calls, seed=1, into=after)
    assert contents(after) == contents(before)


def test_what_was_not_synced_may_be_lost_in_any_part(tmp_path):
    before = tmp_path / "before"
    before.mkdir()
    with PowerLossDisk(before) as disk:
        descriptor = os.open(before / "a", os.O_CREAT | os.O_WRONLY)
        os.pwrite(descriptor, b"x" * 2000, 0)
        os.close(descriptor)
        (before / "b").mkdir()
    seen = set()
    for seed in range(60):
        into = tmp_path / str(seed)
        into.mkdir()
        disk.lose_power(after=disk.calls, seed=seed, into=into)
        seen.add(tuple(sorted(contents(into).items(), key=str)))
    assert () in seen
    assert (("a", b"x" * 2000), ("b", None)) in seen
    assert (("b", None),) in seen
    assert (("a", b""),) in seen or (("a", b""), ("b", None)) in seen
    assert len(seen) > 10  # and torn in many ways


def test_what_was_synced_is_there_however_power_is_lost(tmp_path):
    before = tmp_path / "before"
    before.mkdir()
    with PowerLossDisk(before) as disk:
        descriptor = os.open(before / "a", os.O_CREAT | os.O_WRONLY)
        os.write(descriptor, b"abc")
        os.write(descriptor, b"def")
        os.fsync(descriptor)
        os.close(descriptor)
        (before / "a").rename(before / "b")
        folder = os.open(before, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        (before / "b").unlink()
    for seed in range(20):
        into = tmp_path / str(seed)
        into.mkdir()
        disk.lose_power(after=disk.calls - 1, seed=seed, into=into)
        assert contents(into) == {"b": b"abcdef"}


# ----------------------------------------------------------------------------------- other stores


def test_a_lagging_listing_shows_what_is_gone_and_misses_what_is_new():
    lag = 0
    store = LaggingStore(MemoryStore(), lambda most: min(lag, most))
    store.put("a", b"", replace=False)
    store.put("b", b"", replace=False)
    store.delete(["a"])
    assert store.names() == ["b"]
    lag = 1
    assert set(store.names()) == {"a", "b"}
    lag = 2
    assert set(store.names()) == {"a"}
    store.misses_new = False
    assert set(store.names()) == {"a", "b"}


def test_a_new_object_is_found_after_some_looks_or_when_a_manifest_is_put():
    store = LaggingStore(MemoryStore(), lambda most: most)
    for name in "ab":
        sink = store.create(name, 1)
        sink.write_at(0, b"x")
        sink.commit()
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            store.size("a")
    assert store.size("a") == 1
    store.put("m", b"", replace=False)
    assert store.size("b") == 1


# --------------------------------------------------------------------------------- killed processes


_KILLED = """
import os, signal, sys
import numpy as np
import distckpt
from distckpt import team
from distckpt.store import open_store
from distckpt.testing import Fault, FaultyStore, Kill, points, run_processes
import logging
logging.disable()
team._GRACE_S = 1.0
folder = sys.argv[1]
fault = Fault(points.IN_WRITE, Kill(), ranks={1})

def job(comm):
    if comm.rank == 2 and sys.argv[2] == "late":
        os.kill(os.getpid(), signal.SIGSTOP)
    store = FaultyStore(open_store(folder), faults=[fault], rank=comm.rank)
    distckpt.save(store, {"w": np.arange(9000.0)}, comm=comm, timeout_s=2)
    return [comm.rank, comm.size]

ends = run_processes(3, job, timeout_s=30 if sys.argv[2] != "late" else 3.5)
for end in ends:
    print(end.value, type(end.error).__name__, sorted(getattr(end.error, "failures", {})),
          end.signal, end.late)
"""


def run_killed(folder, how):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_KILLED), str(folder), how],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_of_ranks_that_are_processes_one_is_killed_and_the_others_name_it(tmp_path):
    killed = f"None NoneType [] {int(signal.SIGKILL)} False"
    told = "None SaveFailed [1] None False"
    assert run_killed(tmp_path / "x", "killed") == [told, killed, told]


def test_a_process_that_hangs_is_killed_at_the_end_of_the_time(tmp_path):
    lines = run_killed(tmp_path / "x", "late")
    assert lines[2] == f"None NoneType [] {int(signal.SIGKILL)} True"


def test_kill_ends_this_process_by_a_signal():
    done = subprocess.run(
        [sys.executable, "-c", "from distckpt.testing import Kill; Kill()(None, None)"],
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == -signal.SIGKILL
    assert Kill().others() == ()


def test_every_named_point_is_passed_by_some_save(tmp_path):
    """A point that nothing passes tests nothing."""
    passed = set()
    faults = [
        Fault(point, Call(lambda _, point=point: passed.add(point)), times=None)
        for point in points.ALL
    ]
    with FaultyFiles(tmp_path, faults):

        def run(comm):
            store = FaultyStore(open_store(tmp_path / "run"), faults=faults, rank=comm.rank)
            own = FaultyCoordinator(comm, faults)
            with distckpt.Manager(store, comm=own, keep=distckpt.KeepLast(1)) as manager:
                for step in (1, 2, 2):
                    manager.save(step, {"w": np.zeros(300)})

        run_ranks(2, run)
    assert passed == set(points.ALL)
    assert len({str(point) for point in points.ALL}) == len(points.ALL)
