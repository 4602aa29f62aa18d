"""Time lines: what viewers of Chrome's trace format are given, and what a crash leaves of it."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt import EverySteps, Manager, Shard
from distckpt.events import Event
from distckpt.stats import Phase, RankStats, SaveStats
from distckpt.testing import run_ranks
from distckpt.trace import Trace

PHASES = ["plan", "check", "stage", "write", "sync", "commit"]


def saved(step, ranks):
    return Event("save_committed", 99.0, step, f"run/{step}", values={"stats": SaveStats(ranks)})


def usual(step, ranks=3, start_s=100.0):
    phases = [Phase(name, start_s + i, start_s + i + 0.5) for i, name in enumerate(PHASES)]
    return saved(step, {rank: RankStats(10 * rank, phases) for rank in range(ranks)})


def read(path):
    entries = json.loads(path.read_text())
    for entry in entries:
        assert isinstance(entry["name"], str)
        assert entry["ph"] in {"X", "M", "i"}
        assert all(isinstance(entry[key], int) for key in ("ts", "pid", "tid"))
        assert isinstance(entry["args"], dict)
        if entry["ph"] == "X":
            assert isinstance(entry["dur"], int)
            assert entry["dur"] >= 0
    return entries


def slices(entries):
    return [entry for entry in entries if entry["ph"] == "X"]


def names(entries, kind="thread_name"):
    """(pid, tid) → the name that the viewer shows."""
    return {
        (entry["pid"], entry["tid"]): entry["args"]["name"]
        for entry in entries
        if entry["name"] == kind
    }


def test_each_rank_is_a_process_with_a_row_a_phase(tmp_path):
    path = tmp_path / "made" / "trace.json"
    Trace(path)(usual(7))
    entries = read(path)
    assert sorted(names(entries, "process_name").values()) == ["rank 0", "rank 1", "rank 2"]
    rows = names(entries)
    for rank in range(3):
        assert sorted(rows[key] for key in rows if key[0] == rank) == sorted(PHASES)
    write = [entry for entry in slices(entries) if entry["name"] == "write"]
    assert [(each["pid"], each["ts"], each["dur"]) for each in write] == [
        (rank, 100_000_000 + 1_000_000 * PHASES.index("write"), 500_000) for rank in range(3)
    ]
    assert write[2]["args"] == {"step": 7, "url": "run/7", "bytes": 20}


def test_rows_are_named_once(tmp_path):
    trace = Trace(tmp_path / "trace.json")
    for step in range(4):
        trace(usual(step, start_s=100.0 + 10 * step))
    entries = read(tmp_path / "trace.json")
    assert len([entry for entry in entries if entry["name"] == "thread_name"]) == 3 * len(PHASES)
    assert len(slices(entries)) == 4 * 3 * len(PHASES)


def test_loads_waits_and_single_events_have_rows_of_their_own(tmp_path):
    trace = Trace(tmp_path / "trace.json")
    trace(Event("load_begun", 50.0, 6, "run/6"))
    trace(Event("loaded", 52.0, 6, "run/6", values={"seconds": 1.5}))
    trace(Event("backpressure", 60.0, 7, "run/7", values={"waited_s": 0.5}))
    trace(Event("skipped", 61.0, 7, "run/7", values={"error": "bad block"}))
    entries = read(tmp_path / "trace.json")
    rows = names(entries)
    assert [(rows[0, e["tid"]], e["ts"], e["dur"]) for e in slices(entries)] == [
        ("load", 50_500_000, 1_500_000),
        ("wait", 59_500_000, 500_000),
    ]
    (single,) = [entry for entry in entries if entry["ph"] == "i"]
    assert (single["name"], rows[0, single["tid"]]) == ("skipped", "events")
    assert single["args"]["error"] == "bad block"


SECONDS = st.integers(0, 40).map(lambda quarter: 1.7e9 + quarter / 4)
A_PHASE = st.builds(
    lambda name, start, length: Phase(name, start, start + length / 4),
    st.sampled_from([*PHASES, "verify"]),
    SECONDS,
    st.integers(0, 8),
)
SAVES = st.lists(
    st.dictionaries(
        st.integers(0, 3), st.builds(RankStats, st.integers(0), st.lists(A_PHASE)), min_size=1
    ),
    max_size=4,
)


@given(SAVES)
def test_slices_of_a_row_do_not_overlap_and_none_is_lost(tmp_path_factory, saves):
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    trace = Trace(path)
    for step, ranks in enumerate(saves):
        trace(saved(step, ranks))
    found = slices(read(path)) if path.exists() else []
    expected = [
        (rank, phase.name, round(phase.start_s * 1e6), round(phase.stop_s * 1e6))
        for ranks in saves
        for rank, each in ranks.items()
        for phase in each.phases
    ]
    assert sorted((e["pid"], e["name"], e["ts"], e["ts"] + e["dur"]) for e in found) == sorted(
        expected
    )
    found.sort(key=lambda e: (e["pid"], e["tid"], e["ts"], e["ts"] + e["dur"]))
    for before, after in itertools.pairwise(found):
        if (before["pid"], before["tid"]) == (after["pid"], after["tid"]):
            assert before["name"] == after["name"]
            assert before["ts"] + before["dur"] <= after["ts"]


def test_a_run_that_is_resumed_continues_the_time_line(tmp_path):
    path = tmp_path / "trace.json"
    Trace(path)(usual(1, start_s=100.0))
    Trace(path)(usual(2, start_s=200.0))
    steps = [entry["args"]["step"] for entry in slices(read(path))]
    assert steps == [1] * 3 * len(PHASES) + [2] * 3 * len(PHASES)


def test_a_file_cut_anywhere_in_the_last_write_is_mended_and_loses_nothing_before(tmp_path):
    path = tmp_path / "trace.json"
    trace = Trace(path)
    trace(usual(1, ranks=1))
    before = path.read_bytes()
    trace(usual(2, ranks=1, start_s=200.0))
    whole = path.read_bytes()
    for length in range(len(before) - 3, len(whole) + 1):
        path.write_bytes(whole[:length])
        Trace(path)(usual(3, ranks=1, start_s=300.0))
        steps = [entry["args"]["step"] for entry in slices(read(path))]
        each = len(PHASES)
        assert steps == [1] * each + [2] * (len(steps) - 2 * each) + [3] * each


@pytest.mark.parametrize("content", [b"{}", b"[1]\n", b"not a trace", b"["])
def test_another_file_is_not_touched(tmp_path, content):
    path = tmp_path / "trace.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="move it away"):
        Trace(path)(usual(1))
    assert path.read_bytes() == content


def test_a_manager_of_three_ranks_writes_one_time_line_of_all(tmp_path):
    path = tmp_path / "trace.json"

    def train(coordinator):
        rows = np.ones((2, 1000))
        shard = Shard(rows, (2 * coordinator.rank, 0), (6, 1000))
        with Manager(
            tmp_path / "run",
            comm=coordinator,
            save=EverySteps(1),
            stop_signals=(),
            on_event=Trace(path),
        ) as manager:
            for step in (1, 2):
                manager.step(step, {"w": shard})
            manager.load_latest_into({"w": shard})

    run_ranks(3, train)
    entries = read(path)
    assert sorted(names(entries, "process_name").values()) == ["rank 0", "rank 1", "rank 2"]
    for step in (1, 2):
        told = {(e["pid"], e["name"]) for e in slices(entries) if e["args"]["step"] == step}
        wanted = {(rank, name) for rank in range(3) for name in ("plan", "stage", "write")}
        assert told >= wanted | {(0, "commit")}
    (load,) = [entry for entry in slices(entries) if entry["name"] == "load"]
    assert (load["pid"], load["args"]["step"]) == (0, 2)
