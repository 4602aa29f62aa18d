"""What only mpirun can show: the tests of tests/mpi on several ranks, and how whole jobs end."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import numpy as np
import pytest

import distckpt
from distckpt.team import connect

INNER = Path(__file__).parent / "mpi"
JOBS = INNER / "jobs.py"
WHOLE = np.arange(50.0 * 7).reshape(50, 7)  # as in JOBS

# Where MPI lets any thread call it, as it does by default here, and where only one at a time may.
thread_levels = pytest.mark.parametrize("rc", [None, "thread_level=serialized"])


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_the_tests_for_several_ranks_pass(run_inner_tests, ranks):
    run_inner_tests(ranks)


@pytest.mark.parametrize("ranks", [16, 32])
def test_many_ranks_send_one_another_what_the_simulator_says(run_inner_tests, ranks):
    run_inner_tests(ranks, "test_scale.py")


def test_they_pass_where_only_the_main_thread_may_call_mpi(run_inner_tests):
    run_inner_tests(3, rc="thread_level=serialized")


def test_what_four_ranks_saved_three_load_and_one_process_without_mpirun(mpirun, tmp_path):
    well(mpirun(4, JOBS, "save_rows", tmp_path))
    well(mpirun(3, JOBS, "load_columns", tmp_path))
    checkpoint = distckpt.open(tmp_path / "rows")
    assert checkpoint.ranks == 4
    assert checkpoint.values["step"] == 3
    assert (distckpt.load(tmp_path / "rows")["w"] == WHOLE).all()


@thread_levels
def test_saves_that_nobody_waits_for_are_committed_before_the_program_ends(mpirun, tmp_path, rc):
    well(mpirun(3, JOBS, "end_without_waiting", tmp_path, rc=rc))
    for name in ("0", "1"):
        distckpt.open(tmp_path / name).verify()
        assert (distckpt.load(tmp_path / name)["w"] == WHOLE).all()


@thread_levels
@pytest.mark.parametrize("where", ["in-a-save", "in-an-allreduce"])
def test_an_error_on_one_rank_ends_the_job_and_leaves_what_was_committed(
    mpirun, tmp_path, rc, where
):
    ended = mpirun(3, JOBS, "raise_on_one_rank", tmp_path, where, rc=rc)
    assert ended.status != 0
    assert "an error of the program" in ended.output
    assert "Timeout" not in ended.output
    assert (distckpt.load(tmp_path / "before")["w"] == WHOLE).all()
    assert not (tmp_path / "after").exists()
    # The main thread may be where it can't commit; any other ends what was in flight.
    if rc is None or (tmp_path / "meanwhile" / "manifest.binpb").exists():
        assert (distckpt.load(tmp_path / "meanwhile")["w"] == WHOLE).all()


@pytest.mark.parametrize(
    ("rank", "operation"), [(1, "write-half"), (2, "commit"), (0, "put"), (0, "delete")]
)
def test_a_rank_that_is_killed_in_a_save_ends_the_job_and_leaves_a_whole_checkpoint(
    mpirun, tmp_path, rank, operation
):
    folder = tmp_path / "checkpoint"
    ended = mpirun(3, JOBS, "kill_one_rank", folder, rank, operation)
    assert ended.status != 0
    assert "Timeout" not in ended.output
    # The manifest is the commit: what comes after it only clears away what it has replaced.
    expected = -WHOLE if operation == "delete" else WHOLE
    assert distckpt.open(folder).verify() > 0
    assert (distckpt.load(folder)["w"] == expected).all()


@thread_levels
def test_mpirun_passes_sigusr1_on_and_all_ranks_save_the_same_step_and_end_well(
    mpirun, tmp_path, rc
):
    def ask(job):
        while not (tmp_path / "trains").exists():
            assert job.poll() is None
            time.sleep(0.01)
        job.send_signal(signal.SIGUSR1)

    well(mpirun(4, JOBS, "train_until_stopped", tmp_path, rc=rc, meanwhile=ask))
    run = distckpt.Manager(tmp_path / "run", comm=distckpt.Solo(), stop_signals=())
    (step,) = run.steps()
    assert step > 3
    assert list(run.open(step).per_rank["rank"]) == [[rank, step] for rank in range(4)]
    assert (run.open(step)["w"][:] == WHOLE + step).all()


def test_a_process_that_mpirun_did_not_start_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert connect(None).size == 1


def test_a_process_that_torchrun_started_must_say_with_whom_it_saves(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(distckpt.CheckpointError, match=r"WORLD_SIZE=4.*comm="):
        distckpt.save(tmp_path / "a", {"x": np.zeros(3)})
    assert not (tmp_path / "a").exists()
    distckpt.save(tmp_path / "a", {"x": np.zeros(3)}, comm=distckpt.Solo())
    monkeypatch.setenv("WORLD_SIZE", "1")
    distckpt.save(tmp_path / "b", {"x": np.zeros(3)})


@pytest.fixture
def run_inner_tests(mpirun, tmp_path, monkeypatch):
    """Run tests/mpi on so many ranks, and see that they have passed on each."""

    def run(ranks, only="", **keywords):
        monkeypatch.setenv("DISTCKPT_TEST_FOLDER", str(tmp_path / "shared"))
        options = ["--with-mpi", "-x", "-q", "-p", "no:cacheprovider", "--color=no"]
        for option in ("faulthandler_timeout=60", "faulthandler_exit_on_timeout=true"):
            options += ["-o", option]
        ended = well(mpirun(ranks, "-m", "pytest", *options, INNER / only, **keywords))
        if ended.output.count(" passed") != ranks:
            pytest.fail(f"not all ranks have run them:\n{ended.output}", pytrace=False)

    return run


def well(ended):
    """Fail with what the ranks have printed, unless the job has ended well."""
    if ended.status:
        pytest.fail(f"exit status {ended.status}:\n{ended.output}", pytrace=False)
    return ended
