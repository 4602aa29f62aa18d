"""Progress: bars on a terminal, log lines elsewhere, nothing where it is off."""

from __future__ import annotations

import io
import logging
import re
import sys
import threading

import numpy as np
import pytest

from distckpt import Manager, Solo
from distckpt.progress import Progress

WAIT_S = 60


class Terminal(io.StringIO):
    """A stream that says that somebody is looking."""

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


class Count:
    """Half of a save; knows when somebody has asked twice: what was told first is shown then."""

    def __init__(self):
        self.asked = 0
        self.shown = threading.Event()

    def __call__(self):
        self.asked += 1
        if self.asked > 3:
            self.shown.set()
        return 1_000_000, 2_000_000


def threads():
    return [each for each in threading.enumerate() if each.name == "distckpt-progress"]


def ended():
    for thread in threads():
        thread.join(WAIT_S)
    return not threads()


def test_a_bar_on_a_terminal_shows_bytes_speed_and_what_became_of_it(terminal):
    count = Count()
    bar = Progress(stream=terminal).begin("saving [step 7]", count)
    assert count.shown.wait(WAIT_S)
    bar.end("2.0 MB in 1.00 s (0.0 GB/s), rank 3 was the last")
    text = terminal.getvalue()
    assert "saving [step 7]" in text
    assert re.search(r"1\.0 MB of 2\.0 MB on this rank, 0\.\d GB/s", text)
    assert "saving [step 7]: 2.0 MB in 1.00 s (0.0 GB/s), rank 3 was the last\n" in text
    assert ended()


def test_several_bars_are_shown_at_once_and_the_last_one_ends_the_thread(terminal):
    progress = Progress(stream=terminal)
    counts = [Count(), Count()]
    bars = [progress.begin(f"save {n}", count) for n, count in enumerate(counts)]
    assert len(threads()) == 1
    assert all(count.shown.wait(WAIT_S) for count in counts)
    bars[0].end()
    bars[0].end()
    assert len(threads()) == 1
    bars[1].end()
    assert ended()
    # and again
    count = Count()
    with progress.begin("save 2", count):
        assert count.shown.wait(WAIT_S)
    assert "save 2" in terminal.getvalue()
    assert ended()


def test_the_cursor_is_there_whatever_kills_the_program(terminal):
    with Progress(stream=terminal).begin("saving"):
        hidden, shown = (terminal.getvalue().rfind(f"\x1b[?25{which}") for which in "lh")
        assert shown > hidden


@pytest.mark.parametrize("looking", ["nobody", "dumb", "without rich"])
def test_elsewhere_log_lines_are_written_now_and_then(caplog, monkeypatch, terminal, looking):
    caplog.set_level(logging.INFO, "distckpt")
    if looking == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    if looking == "without rich":
        monkeypatch.setitem(sys.modules, "rich.console", None)
    stream = io.StringIO() if looking == "nobody" else terminal
    count = Count()
    with Progress(stream=stream, log_every_s=0.001).begin("saving step 7", count):
        assert count.shown.wait(WAIT_S)
    assert ended()
    assert caplog.messages[0].startswith("saving step 7: 1.0 MB of 2.0 MB on this rank, 0.")
    assert stream.getvalue() == ""


def test_a_short_save_logs_no_progress(caplog):
    caplog.set_level(logging.INFO, "distckpt")
    with Progress(stream=io.StringIO()).begin("saving", Count()):
        pass
    assert ended()
    assert caplog.messages == []


def test_a_load_tells_by_itself_how_far_it_is():
    with Progress(enabled=False).begin("loading") as bar:
        assert bar.count() == (0, 0)
        bar.update(5_000, 10_000)
        assert bar.text().startswith("5.0 kB of 10.0 kB on this rank, ")


def test_where_it_is_off_nothing_is_asked_drawn_or_started(terminal):
    count = Count()
    bar = Progress(enabled=False, stream=terminal).begin("saving", count)
    assert threads() == []
    bar.end("done")
    assert (count.asked, terminal.getvalue()) == (0, "")


@pytest.mark.parametrize("shown", [True, False])
def test_a_manager_shows_what_became_of_its_saves_if_it_is_asked_to(
    monkeypatch, terminal, tmp_path, shown
):
    monkeypatch.setattr(sys, "stderr", terminal)
    state = {"w": np.ones(50_000)}
    with Manager(tmp_path, comm=Solo(), progress=shown) as manager:
        manager.save(7, state)
        manager.wait()
        manager.load_latest_into(state)
    assert ended()
    text = terminal.getvalue()
    found = re.search(r"saving step 7: 4\d\d\.\d kB in \d+\.\d\d s \(\d\.\d GB/s\)", text)
    assert bool(found) == shown
    assert shown or text == ""
