"""What makes a run stop: signals, the halt file, and the end of its time."""

from __future__ import annotations

import gc
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt.errors import StoreError
from distckpt.manager import halt
from distckpt.manager.halt import Halt, parse_halt, write_halt
from distckpt.manager.stopping import STOP_SIGNALS, Stopping
from distckpt.testing import MemoryStore

POLL_S = 0.001


class Clock:
    """A clock that goes as far as it is told."""

    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


@pytest.fixture(autouse=True)
def handlers():
    """See that every test leaves the signals as they were."""
    numbers = (*STOP_SIGNALS, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    left = [signal.getsignal(number) for number in numbers]
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    assert left == before


@pytest.fixture
def made():
    """Make a Stopping that is closed after the test, also when the test has failed."""
    everyone = []

    def make(store=None, rank=0, **options):
        store = MemoryStore() if store is None else store
        everyone.append(Stopping(store, rank=rank, poll_s=POLL_S, **options))
        return everyone[-1]

    yield make
    for one in reversed(everyone):
        one.close()


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1e-3)


# ----------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", STOP_SIGNALS)
@pytest.mark.parametrize("rank", [0, 3])
def test_each_of_the_signals_asks_to_stop_on_any_rank(made, number, rank):
    stop = made(rank=rank)
    assert stop.vote() is None
    signal.raise_signal(number)
    assert stop.vote() == stop.vote() == f"{signal.Signals(number).name} on rank {rank}"


def test_other_signals_are_left_alone(made):
    before = signal.getsignal(signal.SIGUSR2)
    made(signals=[signal.SIGUSR1])
    assert signal.getsignal(signal.SIGUSR2) is before


def test_handlers_are_put_back_at_the_end(made):
    mine = lambda number, frame: None  # noqa: E731
    before = signal.signal(signal.SIGUSR1, mine)
    stop = made()
    stop.close()
    stop.close()
    assert signal.getsignal(signal.SIGUSR1) is mine
    signal.signal(signal.SIGUSR1, before)


def test_a_handler_that_was_there_is_called_too(made):
    called = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: called.append((number, frame)))
    stop = made()
    signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGUSR1)
    assert [number for number, _ in called] == [signal.SIGUSR1] * 2
    assert called[0][1] is not None
    assert stop.vote() == "SIGUSR1 on rank 0"
    stop.close()
    signal.signal(signal.SIGUSR1, before)


def test_what_a_handler_that_was_there_raises_is_raised_and_the_signal_noted(made):
    def leave(number, frame):
        raise SystemExit(3)

    before = signal.signal(signal.SIGTERM, leave)
    stop = made()
    with pytest.raises(SystemExit):
        signal.raise_signal(signal.SIGTERM)
    assert stop.vote() == "SIGTERM on rank 0"
    stop.close()
    signal.signal(signal.SIGTERM, before)


def test_a_signal_that_was_ignored_still_asks_to_stop(made):
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    stop = made()
    signal.raise_signal(signal.SIGUSR1)
    assert stop.vote() == "SIGUSR1 on rank 0"
    stop.close()
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
    signal.signal(signal.SIGUSR1, before)


def test_ctrl_c_can_ask_to_stop_and_a_second_one_interrupts(made):
    clock = Clock()
    stop = made(signals=[signal.SIGINT], clock=clock)
    signal.raise_signal(signal.SIGINT)
    assert stop.vote() == "SIGINT on rank 0"
    clock.now_s += 5
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_the_same_request_that_comes_twice_is_one(made):
    clock = Clock()
    stop = made(clock=clock)
    signal.raise_signal(signal.SIGTERM)
    clock.now_s += 0.9
    signal.raise_signal(signal.SIGTERM)
    assert stop.vote() == "SIGTERM on rank 0"


def test_a_second_sigusr1_ends_nothing(made):
    clock = Clock()
    stop = made(clock=clock)
    for _ in range(3):
        signal.raise_signal(signal.SIGUSR1)
        clock.now_s += 60
    assert stop.vote() == "SIGUSR1 on rank 0"


def test_a_second_sigterm_does_what_it_did_before():
    """By default it ends the process."""
    program = """if True:
        import signal
        from distckpt.manager.stopping import Stopping
        from distckpt.testing import MemoryStore
        now = [0.0]
        stop = Stopping(MemoryStore(), rank=0, clock=lambda: now[0])
        signal.raise_signal(signal.SIGTERM)
        print(stop.vote(), flush=True)
        now[0] += 2
        signal.raise_signal(signal.SIGTERM)
        print("still here", flush=True)
        """
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == -signal.SIGTERM, ended.stderr
    assert ended.stdout == "SIGTERM on rank 0\n"


def test_outside_of_the_main_thread_no_handler_is_installed_and_a_warning_says_so(made, caplog):
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    thread = threading.Thread(target=made)
    thread.start()
    thread.join()
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert "outside of the main thread" in caplog.text
    assert "SIGTERM, SIGUSR1, SIGUSR2 will not make it save" in caplog.text


def test_with_no_signals_nothing_is_installed_nor_said(made, caplog):
    thread = threading.Thread(target=made, kwargs={"signals": ()})
    thread.start()
    thread.join()
    assert not caplog.records


def test_a_handler_that_is_not_pythons_is_left_alone(made, caplog, monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda *_: pytest.fail("it can't be put back"))
    made()
    assert "SIGUSR1 is handled by something that isn't Python" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, 0, -3, 12345])
def test_signals_that_nobody_can_handle_are_refused(number):
    with pytest.raises(ValueError, match="stop_signals: "):
        Stopping(MemoryStore(), rank=0, signals=[number])


def test_several_hear_of_one_signal_and_may_be_closed_in_any_order(made):
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2], [0, 2, 1]):
        stops = [made(rank=rank) for rank in range(3)]
        open_ = set(order)
        for which in order:
            stops[which].close()
            open_.discard(which)
            signal.signal(signal.SIGUSR2, signal.getsignal(signal.SIGUSR2))
            if open_:
                signal.raise_signal(signal.SIGUSR2)
        assert [stop.vote() is not None for stop in stops] == [
            which != order[0] for which in range(3)
        ]
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)


def test_a_closed_one_below_another_does_not_end_the_process(made):
    below, above = made(rank=1), made(rank=2)
    below.close()
    signal.raise_signal(signal.SIGTERM)
    assert below.vote() is None
    assert above.vote() == "SIGTERM on rank 2"
    above.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)


def test_a_signal_that_comes_after_all_have_stopped_does_not_end_the_process(made):
    """Ranks get it at different times: the first may have made all save and close."""
    stop = made(rank=1)
    stop.obey("SIGTERM on rank 0")
    stop.close()
    signal.raise_signal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_one_that_is_forgotten_changes_nothing(made):
    called = []
    before = signal.signal(signal.SIGUSR1, lambda *_: called.append(1))
    Stopping(MemoryStore(), rank=0, signals=[signal.SIGUSR1])
    gc.collect()
    signal.raise_signal(signal.SIGUSR1)
    assert called == [1]
    signal.signal(signal.SIGUSR1, before)


def test_one_that_is_forgotten_below_another_does_not_end_the_process(made):
    """By default, the signal would."""
    Stopping(MemoryStore(), rank=0)
    gc.collect()
    stop = made(rank=1)
    signal.raise_signal(signal.SIGTERM)
    assert stop.vote() == "SIGTERM on rank 1"
    stop.close()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# ----------------------------------------------------------------------------------- the halt file


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Halt()),
        (" \n", Halt()),
        ("now\n", Halt()),
        ("after 1 save", Halt(saves=1)),
        ("After 12  saves\n", Halt(saves=12)),
        ("at 2030-01-01T00:00:00Z", Halt(at_s=1893456000.0)),
        ("at 2030-01-01T01:00:00+01:00\n", Halt(at_s=1893456000.0)),
        ("at 2030-01-01", Halt(at_s=datetime(2030, 1, 1).timestamp())),  # noqa: DTZ001  local
    ],
)
def test_a_halt_file_says_now_or_a_time_or_a_number_of_saves(text, expected):
    assert parse_halt(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("after saves", "after 0 saves", "after -1 saves", "after 1.5 saves", "in 3 days"),
        *("at ", "at", "at noon", "2030-01-01", "at 2030-13-01", "stop", "\0"),
        "after 10000000000 saves",
    ],
)
def test_what_else_it_may_say_is_refused(text):
    with pytest.raises(ValueError, match=re.escape(repr(" ".join(text.split()))[:20])):
        parse_halt(text)


@given(st.text())
def test_any_text_is_understood_or_refused(text):
    try:
        found = parse_halt(text)
    except ValueError:
        return
    assert found.saves is None or found.saves > 0


@pytest.fixture
def folder(store):
    """A run's folder, in memory and on the disk."""
    return store


def test_an_empty_halt_file_stops_the_run_and_is_removed_when_that_is_done(made, folder):
    stop = made(folder)
    assert stop.vote() is None
    write_halt(folder, "")
    wait_for(stop.vote)
    reason = stop.vote()
    assert reason == f"the halt file {folder.url}/halt says 'now'"
    assert "halt" in folder.names()
    stop.obey(reason)
    stop.close()
    assert "halt" not in folder.names()


def test_one_that_was_there_before_stops_it_too(made, folder):
    write_halt(folder, "now")
    stop = made(folder)
    wait_for(stop.vote)


def test_only_the_coordinator_looks(made, folder):
    write_halt(folder, "")
    threads = threading.active_count()
    stop = made(folder, rank=1)
    assert stop.vote() is None
    assert threading.active_count() == threads


def test_a_halt_file_that_was_not_the_reason_stays_for_the_next_job(made, folder):
    write_halt(folder, "")
    stop = made(folder)
    wait_for(stop.vote)
    stop.obey("max_seconds=9 is up")
    stop.close()
    assert "halt" in folder.names()


def test_after_so_many_saves(made, folder):
    stop = made(folder)
    stop.vote()
    stop.saved(1)
    write_halt(folder, "after 2 saves")
    wait_for(lambda: stop._halt._seen is not None)
    stop.saved(1)
    assert stop.vote() is None
    stop.saved(1)
    wait_for(stop.vote)
    assert "after 2 saves" in stop.vote()


def test_at_a_time(made, folder):
    now = datetime.now(UTC)
    stop = made(folder)
    write_halt(folder, f"at {(now + timedelta(hours=1)).isoformat()}")
    stop.vote()
    wait_for(lambda: stop._halt._seen is not None)
    assert stop.vote() is None
    write_halt(folder, f"at {(now - timedelta(hours=1)).isoformat()}")
    wait_for(stop.vote)


def test_a_clock_that_jumps_back_takes_no_stop_back(made, folder, monkeypatch):
    write_halt(folder, f"at {datetime.now(UTC).isoformat()}")
    stop = made(folder)
    wait_for(stop.vote)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert stop.vote()


def test_it_can_be_taken_back_and_changed_before_it_is_due(made, folder):
    stop = made(folder)
    write_halt(folder, "after 1 save")
    stop.vote()
    wait_for(lambda: stop._halt._seen is not None)
    folder.delete(["halt"])
    wait_for(lambda: stop._halt._seen is None)
    stop.saved(1)
    write_halt(folder, "after 1 save")
    wait_for(lambda: stop._halt._seen is not None)
    assert stop.vote() is None
    stop.saved(1)
    wait_for(stop.vote)


def test_half_a_file_is_not_obeyed(made, monkeypatch):
    """A shell makes it empty first: that would be 'now'."""
    monkeypatch.setattr(halt, "_SETTLE_S", 0.0)
    looks = []

    class Shell(MemoryStore):
        def size(self, name):
            if name == "halt":
                looks.append(1)
                text = b"" if len(looks) == 1 else b"at 2099-01-01"
                self.put("halt", text, replace=True)
            return super().size(name)

    stop = made(Shell())
    stop.vote()
    wait_for(lambda: len(looks) > 4)
    assert stop.vote() is None


@pytest.mark.parametrize("content", [b"tomorrow", b"\xff\xfe", b"x" * 5000, b"after no saves"])
def test_what_makes_no_sense_is_ignored_with_one_warning(made, folder, caplog, content):
    folder.put("halt", content, replace=True)
    stop = made(folder)
    stop.vote()
    wait_for(lambda: caplog.records)
    looks = count_looks(stop)
    wait_for(lambda: len(looks) > 3)
    assert stop.vote() is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "this halt file is ignored. Expected nothing in it (stop now), 'at " in record.message
    assert "halt" in folder.names()
    write_halt(folder, "")
    wait_for(stop.vote)


def test_a_store_that_fails_is_asked_again(made, caplog):
    class Flaky(MemoryStore):
        broken = True

        def size(self, name):
            if self.broken:
                raise StoreError("503 Slow Down")
            return super().size(name)

    store = Flaky()
    stop = made(store)
    stop.vote()
    wait_for(lambda: "503 Slow Down" in caplog.text)
    write_halt(store, "")
    store.broken = False
    wait_for(stop.vote)


def test_one_that_cannot_be_removed_is_warned_of(made, caplog):
    class ReadOnly(MemoryStore):
        def delete(self, names):
            raise StoreError("read-only file system")

    store = ReadOnly()
    write_halt(store, "")
    stop = made(store)
    wait_for(stop.vote)
    stop.obey(stop.vote())
    stop.close()
    assert "can't be removed, and so will stop the next job, too: read-only" in caplog.text


def test_a_halt_file_that_would_not_be_understood_is_not_written(folder):
    with pytest.raises(ValueError, match="tomorrow"):
        write_halt(folder, "tomorrow")
    assert folder.names() == []


def test_the_thread_ends_with_its_owner(folder):
    stop = Stopping(folder, rank=0, signals=(), poll_s=3600)
    stop.vote()
    (thread,) = (one for one in threading.enumerate() if one.name == "distckpt-halt")
    del stop
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()


def count_looks(stop):
    """A list that grows whenever the halt file has been looked at."""
    looks = []
    look = stop._halt._look

    def counted():
        looks.append(1)
        return look()

    stop._halt._look = counted
    return looks


# ----------------------------------------------------------------------------------------- the time


def test_it_stops_in_time_for_a_save_and_a_step(made):
    clock = Clock()
    stop = made(max_seconds=100, clock=clock)
    stop.saved(20)
    stop.saved(10)
    found = []
    for _ in range(40):
        clock.now_s += 3
        found.append(stop.vote())
    first = 3 * (1 + next(step for step, reason in enumerate(found) if reason))
    assert first == 66  # 34 s are left; 1.5 x 20 s for the save, 2 x 3 s for the steps
    assert found[21] == "max_seconds=100 is up in 34 s; a save takes 20 s and a step 3 s"
    assert set(found[21:]) == {found[21]}


def test_what_comes_before_the_first_step_is_no_measure_of_a_step(made):
    clock = Clock()
    stop = made(max_seconds=100, clock=clock)
    clock.now_s += 60
    assert stop.vote() is None
    clock.now_s += 1
    assert stop.vote() is None


def test_a_slow_step_is_forgotten_after_a_while(made):
    clock = Clock()
    stop = made(max_seconds=1000, clock=clock)
    stop.vote()
    clock.now_s += 300
    assert stop.vote() is None
    for _ in range(690):
        clock.now_s += 1
        assert stop.vote() is None


def test_time_that_is_up_at_once_still_allows_a_step(made):
    clock = Clock()
    stop = made(max_seconds=0.001, clock=clock)
    clock.now_s += 1
    assert "is up in -0.999 s" in stop.vote()


def test_only_the_coordinators_time_counts(made):
    clock = Clock()
    stop = made(rank=1, max_seconds=1, clock=clock)
    clock.now_s += 5
    assert stop.vote() is None


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_limit_that_is_no_time_is_refused(seconds):
    with pytest.raises(ValueError, match="max_seconds="):
        Stopping(MemoryStore(), rank=0, max_seconds=seconds)


# ------------------------------------------------------------------------------- from outside


def test_kill_reaches_it_while_the_program_sleeps(tmp_path):
    """In the middle of whatever the main thread waits for; Python goes on with it afterwards."""
    program = """if True:
        import os, signal, threading
        from distckpt.manager.stopping import Stopping
        from distckpt.store import open_store
        stop = Stopping(open_store("."), rank=2)
        print("ready", flush=True)
        while not stop.vote():
            threading.Event().wait(0.01)
        print(stop.vote(), flush=True)
        stop.close()
        """
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, signal.SIGTERM)
        assert process.stdout.readline() == "SIGTERM on rank 2\n"
    assert process.returncode == 0
    assert list(Path(tmp_path).iterdir()) == []
