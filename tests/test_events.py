"""Events: who is told, what log lines say, and the files that they are written to."""

from __future__ import annotations

import json
import logging
import sys
import threading
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt import events
from distckpt.errors import UnsupportedFormat
from distckpt.events import Event, JsonLines, Teller, TensorBoard
from distckpt.stats import Phase, RankStats, SaveStats

STATS = SaveStats(
    {
        0: RankStats(1_000_000, [Phase("stage", 10.0, 10.5), Phase("write", 10.5, 11.5)]),
        1: RankStats(2_000_000, [Phase("stage", 10.0, 10.25), Phase("write", 10.5, 12.0)]),
    }
)


def saved(step=7, **values):
    url = f"run/step-{step:08d}"
    return Event("save_committed", 12.0, step, url, values={"stats": STATS, **values})


# ------------------------------------------------------------------------------------ being told


def test_an_event_has_its_time_its_place_and_its_values():
    told = []
    Teller("run", told.append)("pruned", 3, url="run/step-00000003", reason="old")
    (event,) = told
    assert (event.kind, event.step, event.url, event.rank) == ("pruned", 3, "run/step-00000003", 0)
    assert event.values == {"reason": "old"}
    assert event.time_s > 1.7e9


def test_several_are_told_in_order_though_one_fails(caplog):
    told = []

    def fails(event):
        told.append("fails")
        raise OSError("the disk is full")

    Teller("run", [lambda _: told.append("first"), fails, lambda _: told.append("last")])("fenced")
    assert told == ["first", "fails", "last"]
    assert "the disk is full" in caplog.text
    assert "fails" in caplog.text


@pytest.mark.parametrize("wrong", [5, ["no function"], [print, None]])
def test_what_cannot_be_called_is_refused(wrong):
    with pytest.raises(TypeError, match=r"on_event|not iterable"):
        Teller("run", wrong)


def test_nobody_is_told_two_events_at_once():
    inside, at_once, both = [], [], threading.Barrier(2)

    def listen(event):
        inside.append(event)
        at_once.append(len(inside))
        inside.remove(event)

    tell = Teller("run", listen)

    def many():
        both.wait()
        for step in range(200):
            tell("save_begun", step)

    threads = [threading.Thread(target=many) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert at_once == [1] * 400


def test_a_listener_may_tell_something_itself():
    told = []

    def listen(event):
        told.append(event.kind)
        if event.kind == "skipped":
            tell("loaded", 1)

    tell = Teller("run", listen)
    tell("skipped", 2)
    assert told == ["skipped", "loaded"]


# ------------------------------------------------------------------------------------- log lines


def test_a_save_is_one_log_line(caplog):
    caplog.set_level(logging.INFO, "distckpt")
    tell = Teller("run")
    tell("save_begun", 7, url="run/step-00000007")
    tell("save_committed", 7, url="run/step-00000007", stats=STATS, metrics={"loss": 0.123456})
    (record,) = caplog.records
    assert record.getMessage() == (
        "run/step-00000007: saved: 3.0 MB in 2.00 s (0.0 GB/s), stall 0.500 s, rank 1 was the "
        "last, loss 0.1235"
    )


def test_sizes_and_times_are_written_for_people():
    values = {"nbytes": 12_300_000, "seconds": 1.234}
    assert str(Event("loaded", 1.0, 7, "run/7", values=values)) == "run/7: loaded: 12.3 MB, 1.23 s"
    waited = Event("backpressure", 1.0, 7, "run", values={"waited_s": 0.5})
    assert str(waited) == "run: the loop waited for a save before: 0.50 s"


def test_every_kind_has_a_line():
    for kind in events._LINES:
        assert str(Event(kind, 0.0, 1, "run", values={"waited_s": 1.5, "why": "x"})).startswith(
            "run: "
        )


def test_what_a_person_must_know_is_a_warning(caplog):
    Teller("run")("skipped", 5, error="bad block")
    Teller("run")("stop_requested", 5, reason="SIGTERM on rank 3")
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "passed over: bad block" in caplog.text


# ------------------------------------------------------------------------------------ JSON lines


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_event_is_a_line_of_json(tmp_path):
    path = tmp_path / "made" / "events.jsonl"
    write = JsonLines(path)
    write(saved(metrics={"loss": np.float32(0.5)}))
    write(Event("pruned", 13.0, None, "rün", 2))
    first, second = lines(path)
    assert first["stats"] == {
        "nbytes": 3_000_000,
        "seconds": 2.0,
        "gb_per_s": 0.0015,
        "stall_s": 0.5,
        "slowest_rank": 1,
    }
    assert first["metrics"] == {"loss": 0.5}
    assert second == {"kind": "pruned", "time_s": 13.0, "step": None, "url": "rün", "rank": 2}


def test_another_run_goes_on_in_the_same_file(tmp_path):
    for step in range(3):
        JsonLines(tmp_path / "events")(saved(step))
    assert [line["step"] for line in lines(tmp_path / "events")] == [0, 1, 2]


def test_a_line_that_a_crash_has_torn_spoils_no_other(tmp_path):
    path = tmp_path / "events"
    JsonLines(path)(saved(1))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:20])
    JsonLines(path)(saved(2))
    first, torn, last = path.read_text().splitlines()
    assert [json.loads(first)["step"], json.loads(last)["step"]] == [1, 2]
    assert torn == whole[:20].decode()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.builds(object)
    | st.floats(width=32).map(np.float32) | st.integers(0, 9).map(np.int64),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


@given(st.dictionaries(st.sampled_from(["a", "b", "metrics"]), VALUES))
def test_whatever_the_values_are_the_line_is_strict_json(values):
    event = Event("loaded", 1.0, 1, "run", values=values)
    assert json.loads(json.dumps(event.plain()), parse_constant=refuse)["kind"] == "loaded"
    assert str(event)


# ----------------------------------------------------------------------------------- TensorBoard


def test_tensorboard_reads_what_saves_and_loads_cost(tmp_path, monkeypatch):
    # TensorBoard's own way to be without TensorFlow, which takes so long to import.
    monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", ModuleType("notf"))
    from tensorboard.backend.event_processing import event_accumulator

    write = TensorBoard(tmp_path)
    write(saved(100))
    write(saved(200))
    write(Event("backpressure", 13.0, 200, "run", values={"waited_s": 0.25}))
    write(Event("loaded", 14.0, 200, "run", values={"nbytes": 5, "seconds": 1.5}))
    write(Event("skipped", 15.0, 200, "run", values={"error": "bad block"}))
    write(Event("pruned", 15.0, 100, "run"))
    write.close()
    found = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    shown = {
        name: [(each.step, round(each.value, 6)) for each in found.Scalars(name)]
        for name in found.Tags()["scalars"]
    }
    assert shown == {
        "checkpoint/seconds": [(100, 2.0), (200, 2.0)],
        "checkpoint/gigabytes": [(100, 0.003), (200, 0.003)],
        "checkpoint/gb_per_s": [(100, 0.0015), (200, 0.0015)],
        "checkpoint/stall_s": [(100, 0.5), (200, 0.5)],
        "checkpoint/waited_s": [(200, 0.25)],
        "checkpoint/load_seconds": [(200, 1.5)],
    }
    assert found.Scalars("checkpoint/seconds")[0].wall_time == 12.0
    (text,) = found.Tags()["tensors"]
    assert b"bad block" in found.Tensors(text)[0].tensor_proto.string_val[0]


def test_events_are_in_the_file_before_it_is_closed(tmp_path):
    write = TensorBoard(tmp_path)
    write(saved())
    (file,) = tmp_path.iterdir()
    assert b"checkpoint/stall_s" in file.read_bytes()
    write.close()
    write.close()


def test_a_file_that_was_closed_is_left_alone(tmp_path):
    write = TensorBoard(tmp_path)
    for _ in range(3):  # within a second
        write(saved())
        write.close()
    assert len(list(tmp_path.iterdir())) == 3


def test_what_has_no_numbers_makes_no_file(tmp_path):
    TensorBoard(tmp_path / "none")(Event("pruned", 1.0, 1, "run"))
    assert not Path(tmp_path / "none").exists()


def test_without_the_library_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboardX.event_file_writer", None)
    with pytest.raises(UnsupportedFormat, match=r"pip install 'distckpt\[tensorboard\]'"):
        TensorBoard(tmp_path)
