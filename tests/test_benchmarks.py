"""The benchmark suite: its arithmetic, its floors, its report, and one small session."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest

import distckpt
from benchmarks.suite import floors, jobs, machine, ours, plots, report, run, states
from benchmarks.suite.memory import peak_extra_bytes
from benchmarks.suite.rows import PEERS, ROWS, Measured
from benchmarks.suite.turns import Ranks, Spread, fastest, ratios, take_turns
from distckpt.testing import run_ranks

ABOUT = {"cores": 2, "places": {"disk": "ext4"}, "seconds": 12, "quick": False}


def measured(row, values, **more):
    found = {"state": "transformer", "place": "disk", "ranks": 2} | more
    return Measured(row, values=list(values), **found)


# -------------------------------------------------------------------------------------- arithmetic


def test_contenders_take_turns_and_the_warm_up_does_not_count():
    order = []

    def contender(name):
        def run():
            order.append(name)
            return {name: float(len(order))}

        return run

    found = take_turns([contender("a"), contender("b")], 2)
    assert order == ["a", "b"] * 3
    assert found == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_one_contender_may_give_several_numbers():
    assert take_turns([lambda: {"stall": 1.0, "rest": 2.0}], 2) == {
        "stall": [1.0, 1.0],
        "rest": [2.0, 2.0],
    }


def test_ratios_are_of_pairs_and_not_of_medians():
    # The machine gets slower by the pair: each pair says 2, while the series drift.
    assert ratios([2.0, 4.0, 20.0], [1.0, 2.0, 10.0]) == [2.0, 2.0, 2.0]
    with pytest.raises(ValueError, match="argument"):
        ratios([1.0], [1.0, 2.0])


def test_a_spread_has_the_median_and_the_quartiles():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    low, median, high = np.percentile(values, [25, 50, 75])
    assert Spread.of(values) == Spread(low, median, high)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_the_fastest_series_is_that_with_the_lowest_median():
    slow, fast = [3.0, 3.0, 0.1], [2.0, 2.0, 9.0]
    assert fastest(slow, fast) is fast


def test_the_slowest_rank_counts_and_is_waited_for():
    late = iter([False, False, True])
    comm = SimpleNamespace(
        Get_rank=lambda: 0,
        Get_size=lambda: 2,
        Ibarrier=lambda: SimpleNamespace(Test=lambda: next(late)),
        allgather=lambda value: [value, 5.0],
    )
    assert Ranks(comm).most(1.0) == 5.0
    assert next(late, None) is None
    assert 0 <= Ranks(None).timed(lambda: None) < 1


# ------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize(
    ("row", "value", "more", "limit", "is_met"),
    [
        ("save", 0.95, {}, 0.95, True),
        ("save", 0.96, {}, 0.95, False),
        ("save", 1.10, {"place": "tmpfs"}, 1.10, True),
        ("save", 9.0, {"ranks": 4}, None, None),
        ("save", 9.0, {"state": "few large"}, None, None),
        ("save-best", 9.0, {}, None, None),
        ("spinner-speed", 0.94, {"ranks": 1}, 0.95, False),
        ("spinner-speed", 0.96, {"ranks": 1}, 0.95, True),
        ("reshard", 1.2, {"ranks": 4}, 1.3, True),
        ("peer-save", 1.6, {"peer": "dcp"}, 1.7, False),
        ("peer-save", 1.9, {"peer": "dcp", "place": "tmpfs"}, 2.0, False),
        ("peer-save", 0.1, {"peer": "dcp", "is_best": False}, None, None),
        ("peer-save", 1.1, {"peer": "orbax", "ranks": 1}, 1.0, True),
    ],
)
def test_a_limit_holds_for_the_median_where_it_is_meant(row, value, more, limit, is_met):
    found = measured(row, [value, value, 1e9 if value < 5 else 0.0], **more)
    assert found.limit == limit
    assert found.is_met is is_met


def test_what_was_not_measured_is_neither_met_nor_not():
    found = measured("save", [], missing="no such thing here")
    assert (found.spread, found.is_met) == (None, None)


# ------------------------------------------------------------------------------------------ report


def test_a_report_comes_back_from_json_as_it_was(tmp_path):
    rows = [
        measured("save", [0.9, 0.8, 1.0], seconds={"distckpt": 0.25}, nbytes=7),
        measured("peer-load", [3.0], peer="dcp", setting="default"),
        measured("load-cold", [], missing="a tmpfs is the page cache"),
    ]
    report.write(tmp_path, ABOUT, rows)
    assert report.read(tmp_path / "latest.json") == (ABOUT, rows)
    plain = json.loads((tmp_path / "latest.json").read_text())["rows"][0]
    assert (plain["median"], plain["limit"], plain["is_met"]) == (0.9, 0.95, True)


def test_the_table_shows_each_limit_and_what_does_not_meet_it():
    rows = [
        measured("save", [0.9, 0.8, 1.0]),
        measured("stall", [1.5, 1.4, 1.6]),
        measured("memory-load", [21.5, 21.5, 21.5]),
        measured("load-cold", [], missing="a tmpfs is the page cache", place="tmpfs"),
        measured("peer-save", [1.8], peer="dcp", setting="default", is_best=False),
        measured("peer-save", [1.6], peer="dcp", setting="2 threads"),
    ]
    page = report.markdown(ABOUT, rows)
    assert "2 of 4 limits met" in page
    assert "| ≤ 0.95 | 0.90 [0.85, 0.95] ✓ |" in page
    assert "| ≤ 1.1 | 1.50 [1.45, 1.55] **✗** |" in page
    assert "| ≤ 128 MiB | 21.5 MiB [21.5, 21.5] ✓ |" in page
    assert "PyTorch DCP, 2 ranks | default | 1.80 |" in page
    assert "PyTorch DCP, 2 ranks | fastest | 1.60 **✗** |" in page
    assert "PyTorch DCP, 2 threads: durable save on disk" in page
    assert "a tmpfs is the page cache: load, cold (tmpfs, 2 ranks)" in page


def test_pictures_are_drawn_of_what_there_is(tmp_path):
    rows = [
        measured("save", [0.9, 0.8, 1.0]),
        measured("slowdown", [-0.5, 0.1, 0.2]),
        measured("peer-save", [1.6], peer="dcp", setting="default"),
    ]
    found = plots.draw(tmp_path, ABOUT, rows)
    assert [path.name for path in found] == ["floors.png", "peers.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in found)
    assert plots.draw(tmp_path, ABOUT, []) == []


def test_the_machine_is_described_without_its_name_and_paths(tmp_path):
    text = json.dumps(machine.describe({"disk": str(tmp_path)}))
    assert os.uname().nodename not in text.split('"')
    assert str(tmp_path) not in text
    assert '"cores"' in text


# ------------------------------------------------------------------------------------------ floors


@pytest.mark.parametrize("write", [floors.write_buffered, floors.write_direct])
@pytest.mark.parametrize("nbytes", [1, 4096, 3 * 4096 + 17])
def test_a_floor_writes_and_reads_all_bytes(tmp_path, write, nbytes):
    data = floors.aligned(nbytes)
    data[:] = np.random.default_rng(3).integers(0, 256, nbytes, np.uint8)
    path = tmp_path / "file"
    try:
        write(path, data)
    except OSError as exc:
        pytest.skip(f"no O_DIRECT here: {exc}")
    assert path.read_bytes() == data.tobytes()
    parts = [np.empty(nbytes // 2, np.uint8), np.empty(nbytes - nbytes // 2, np.uint8)]
    floors.read_into([path], parts)
    assert np.array_equal(np.concatenate(parts), data)


def test_a_floor_reads_several_files_as_one(tmp_path):
    data = np.random.default_rng(4).integers(0, 256, 1000, np.uint8)
    paths = [tmp_path / name for name in "abc"]
    for path, part in zip(paths, np.split(data, [10, 600]), strict=True):
        path.write_bytes(part.tobytes())
    arrays = [np.empty(length, np.uint8) for length in (7, 3, 500, 0, 200, 150)]
    floors.read_into(paths, arrays)
    assert np.array_equal(np.concatenate(arrays), data[:860])


def test_a_floor_reads_more_arrays_than_one_request_takes(tmp_path):
    data = np.arange(3000, dtype=np.uint16).view(np.uint8)
    floors.write_buffered(tmp_path / "file", data)
    arrays = [np.empty(2, np.uint8) for _ in range(3000)]
    floors.read_into([tmp_path / "file"], arrays)
    assert np.array_equal(np.concatenate(arrays), data)
    with pytest.raises(OSError, match="2 bytes too short"):
        floors.read_into([tmp_path / "file"], [*arrays, np.empty(2, np.uint8)])


@pytest.mark.parametrize("checked", [False, True])
def test_a_floor_writes_from_many_arrays_and_reads_into_them(tmp_path, monkeypatch, checked):
    monkeypatch.setattr(floors, "_BLOCK_BYTES", 1000)
    data = np.random.default_rng(5).integers(0, 256, 5000, np.uint8)
    arrays = np.split(data, [7, 7, 1100, 4000])
    floors.write_arrays(tmp_path / "file", arrays, checked=checked)
    assert (tmp_path / "file").read_bytes() == data.tobytes()
    found = [np.empty_like(array) for array in arrays]
    floors.read_into([tmp_path / "file"], found, checked=checked)
    assert np.array_equal(np.concatenate(found), data)


def test_a_floor_fills_arrays_that_are_not_contiguous(tmp_path, monkeypatch):
    monkeypatch.setattr(floors, "_SCRATCH_BYTES", 64)
    data = np.arange(600, dtype=np.uint16)
    floors.write_buffered(tmp_path / "file", data.view(np.uint8))
    wide = np.zeros((30, 15), np.uint16)
    floors.read_strided(tmp_path / "file", [wide[:, :10], wide[0, 12:14]])
    assert np.array_equal(wide[:, :10].reshape(-1), data[:300])
    assert wide[0, 12:14].tolist() == [300, 301]
    assert not wide[1:, 10:].any()
    floors.read_strided(tmp_path / "file", [wide[:, :10], wide[:, 5:]])  # from the begin again
    with pytest.raises(OSError, match="less than"):
        floors.read_strided(tmp_path / "file", [np.zeros((1, 601), np.uint16)])


def test_the_kernel_is_asked_what_it_still_has_of_a_file(tmp_path):
    path = tmp_path / "file"
    floors.write_buffered(path, floors.aligned(1 << 20))
    with path.open("rb") as file:
        assert floors.resident(file.fileno()).mean() > 0.9
    if machine.describe({"here": str(tmp_path)})["places"]["here"] in {"tmpfs", "overlay"}:
        pytest.skip("what lies in memory can't be forgotten")
    assert floors.drop_cache([path]) < 0.1
    assert floors.drop_cache([]) == 0.0


def test_peak_memory_is_seen_after_it_has_gone():
    def act():
        np.ones(64 << 20, np.uint8)

    assert 48 << 20 < peak_extra_bytes(act) < 128 << 20
    assert peak_extra_bytes(lambda: None) < 16 << 20


# ------------------------------------------------------------------------------------------ states


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(
    "make",
    [
        lambda rank, ranks: states.transformer(rank, ranks, 40),
        lambda rank, ranks: states.many_small(rank, ranks, 50),
        lambda rank, ranks: states.few_large(rank, ranks, 2, 16 * 4096),
    ],
    ids=["transformer", "many small", "few large"],
)
def test_a_state_is_whole_and_loads_back(tmp_path, make, ranks):
    def work(comm):
        state = make(comm.rank, comm.size)
        distckpt.save(tmp_path / "x", state, comm=comm)
        whole = distckpt.plan(state, comm=comm).bytes
        wrong = []
        for net in (states.empty(state), states.strided(state)):
            distckpt.load_into(tmp_path / "x", net, comm=comm, strict=True)
            wrong += states.differing(state, net)
        turned = states.turned(state, comm.rank, comm.size)
        distckpt.load_into(tmp_path / "x", turned, comm=comm, strict=True)
        return whole, wrong

    whole = sum(states.array_of(leaf).nbytes for leaf in make(0, 1).values())
    assert run_ranks(ranks, work) == [(whole, [])] * ranks


def test_the_transformers_have_about_the_bytes_that_they_are_asked_for():
    assert states.nbytes_of(states.transformer(0, 1, 100)) == pytest.approx(100e6, rel=0.15)


# -------------------------------------------------------------------------------------------- jobs


def test_each_row_comes_from_one_measurement():
    given = [key for _, keys in ours.MEASURES.values() for key in keys]
    assert sorted(given) == sorted(key for key in ROWS if not key.startswith("peer-"))


@pytest.mark.parametrize("every", [jobs.all_jobs, jobs.quick_jobs])
def test_jobs_name_what_there_is(every):
    for job in every():
        assert job.state in states.STATES
        assert job.place in jobs.PLACES
        assert job.pairs >= 3
        if job.peer:
            assert job.peer in PEERS
        else:
            assert set(job.measures) <= set(ours.MEASURES)


def test_the_whole_suite_measures_all_rows_and_peers_in_both_places():
    every = list(jobs.all_jobs())
    assert {name for job in every if not job.peer for name in job.measures} == set(ours.MEASURES)
    assert {(job.peer, job.place) for job in every if job.peer} == {
        (peer, place) for peer in PEERS for place in jobs.PLACES
    }
    assert all(job.pairs >= 10 for job in every if not job.peer or job.peer == "dcp")


def test_rows_are_chosen_by_key_or_by_a_part_of_their_title():
    assert list(run.measures_of("stall")) == ["async_save"]
    assert list(run.measures_of("Lazy save")) == ["lazy_save", "lazy_slowdown"]
    assert list(run.measures_of("durable_save")) == ["durable_save"]
    assert list(run.measures_of("no such row")) == []
    found = list(jobs.chosen(jobs.all_jobs(), measures=["spinner"], place="disk", pairs=3))
    assert [(job.measures, job.pairs, job.peer) for job in found] == [(["spinner"], 3, "")]
    assert {job.peer for job in jobs.chosen(jobs.all_jobs(), peers=["orbax"])} == {"orbax"}


def test_the_command_line_says_what_there_is(capsys):
    assert run.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(ROWS)
    assert run.main(["--only", "no such row"]) == 2


# ----------------------------------------------------------------------------------------- session


def test_a_session_measures_and_a_missing_environment_is_no_error(tmp_path):
    job = jobs.Job(["durable_save", "warm_load", "reshard"], "tiny", "disk", 1, 2, mpi="")
    rows = {row.row: row for row in run.run_job(job, str(tmp_path))}
    assert rows["reshard"].missing == "needs 4 ranks"
    assert not any(
        row.missing for key, row in rows.items() if key not in ours.MEASURES["reshard"][1]
    )
    assert len(rows["save"].values) == len(rows["load"].values) == 2
    assert min(rows["save"].values) > 0
    assert rows["save"].nbytes == 3 * 64 * 4096
    assert 1 <= rows["read-amplification"].values[0] < 1.02
    assert list(tmp_path.iterdir()) == []

    absent = jobs.Job(["commit"], "tiny", "disk", 2, 2, mpi="openmpi")
    (first, _) = run.run_job(absent, str(tmp_path), environments=tmp_path)
    assert "not installed" in first.missing


def test_a_measurement_that_fails_is_reported_and_the_next_one_goes_on(tmp_path):
    # What needs a communicator of its own fails without MPI.
    job = jobs.Job(["memory", "durable_save"], "tiny", "disk", 1, 1, mpi="")
    rows = list(run.run_job(job, str(tmp_path)))
    assert {row.row for row in rows if row.missing} == set(ours.MEASURES["memory"][1])
    assert all("AttributeError" in row.missing for row in rows if row.missing)
    assert [row.row for row in rows if row.values] == list(ours.MEASURES["durable_save"][1])
