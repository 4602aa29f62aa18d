"""The training job and the demo in launch/, and the files that start them."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import distckpt

LAUNCH = Path(__file__).parents[1] / "launch"
TRAIN = LAUNCH / "train_digits.py"

pytest.importorskip("sklearn", reason="the data set is scikit-learn's")
sys.path.insert(0, str(LAUNCH))
demo = importlib.import_module("demo")
train_digits = importlib.import_module("train_digits")


# --------------------------------------------------------------------------------- the loss curve


@pytest.fixture(scope="module")
def uninterrupted(mpirun, tmp_path_factory):
    """A run of 100 steps on 4 ranks: its folder, with checkpoints of step 50 and 100, and a log."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    well(mpirun(4, *job(folder, "dp=2,tp=2", steps=100)))
    return folder


@pytest.fixture
def half_way(uninterrupted, tmp_path):
    """A folder in which a run finds the checkpoint of step 50: as if it had been stopped there."""
    step = "checkpoints/step-00000050"
    shutil.copytree(uninterrupted / step, tmp_path / step)
    return tmp_path


def test_the_curve_resumed_on_another_mesh_is_the_uninterrupted_one(
    mpirun, uninterrupted, half_way
):
    well(mpirun(3, *job(half_way, "tp=3", steps=100)))
    expected, found = losses(uninterrupted), losses(half_way)
    assert sorted(found) == list(range(51, 101))
    np.testing.assert_allclose(
        list(found.values()), [expected[step] for step in found], rtol=1e-4, atol=0
    )


def test_the_curve_resumed_on_the_same_mesh_is_bitwise_the_uninterrupted_one(
    mpirun, uninterrupted, half_way
):
    well(mpirun(4, *job(half_way, "dp=2,tp=2", steps=100)))
    expected = losses(uninterrupted)
    assert losses(half_way) == {step: expected[step] for step in range(51, 101)}
    assert everything_in(half_way, 100) == everything_in(uninterrupted, 100)


def test_one_process_resumes_what_four_ranks_saved_without_mpirun(uninterrupted, half_way):
    arguments = [*job(half_way, "dp=1", steps=60), "--evaluate"]
    ended = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=150, check=True
    )
    assert "resumed after step 50 on 1 rank " in ended.stdout
    assert "accuracy on 360 samples" in ended.stdout
    expected = losses(uninterrupted)
    for step, loss in losses(half_way).items():
        assert loss == pytest.approx(expected[step], rel=1e-4)


def test_the_network_learns(uninterrupted):
    curve = losses(uninterrupted)
    assert curve[1] > 2
    assert curve[100] < 0.5


# ---------------------------------------------------------------------------- how a run may end


def test_ranks_killed_in_a_write_leave_the_checkpoint_before_and_other_ranks_resume_it(
    mpirun, tmp_path
):
    markers = [tmp_path / f"log.jsonl.rank-{rank}.in-write" for rank in range(2)]

    def kill_in_the_write(mpirun_process):
        wait_for(mpirun_process, lambda: all(map(demo.process_id, markers)))
        for marker in markers:
            os.kill(demo.process_id(marker), signal.SIGKILL)

    arguments = job(tmp_path, "dp=2", steps=40, save_every=10)
    killed = mpirun(2, *arguments, "--die-in-write-of-step", "20", meanwhile=kill_in_the_write)
    assert killed.status != 0
    assert len(list(tmp_path.glob("checkpoints/step-00000020/shard-*.partial"))) == 2
    assert demo.last_committed(str(tmp_path / "checkpoints")) == 10

    resumed = well(mpirun(3, *job(tmp_path, "tp=3", steps=40, save_every=10)))
    assert "resumed after step 10 on 3 ranks (dp=1,tp=3)" in resumed.output
    assert demo.last_committed(str(tmp_path / "checkpoints")) == 40


def test_after_sigterm_all_ranks_save_the_same_step_and_others_go_on_with_the_same_curve(
    mpirun, tmp_path
):
    folder = tmp_path / "stopped"
    reached, over_s = stopped_by(signal.SIGTERM, mpirun, folder)
    # Within 2 s; where the machine is busy, as much later as everything is: four ranks that do
    # nothing begin and end in half a second.
    began_s = time.monotonic()
    well(mpirun(4, "-c", "from mpi4py import MPI"))
    assert over_s < max(2.0, 4 * (time.monotonic() - began_s))

    steps = reached + 20
    well(mpirun(2, *job(folder, "tp=2", steps=steps)))
    resumed = losses(folder)
    assert sorted(resumed) == list(range(reached + 1, steps + 1))
    well(mpirun(4, *job(tmp_path / "untouched", "dp=2,tp=2", steps=steps, save_every=10**6)))
    expected = losses(tmp_path / "untouched")
    np.testing.assert_allclose(
        list(resumed.values()), [expected[step] for step in resumed], rtol=1e-4, atol=0
    )


def test_the_end_of_its_time_makes_it_save_and_stop(mpirun, tmp_path):
    ended = mpirun(2, *job(tmp_path, "tp=2", steps=10**6), "--max-seconds", "0.5")
    assert "saved and stopped: max_seconds=0.5 is up in " in well(ended).output
    assert demo.last_committed(str(tmp_path / "checkpoints")) == max(losses(tmp_path))


def test_a_mesh_of_other_than_the_ranks_there_are_is_refused(mpirun, tmp_path):
    ended = mpirun(2, *job(tmp_path, "dp=3", steps=1))
    assert ended.status != 0
    assert ended.output.count("the mesh dp=3, tp=1 has 3 ranks, the communicator has 2") == 1


@pytest.mark.parametrize("text", ["pp=2", "dp", "dp=0", "dp=2;tp=2", "tp=-1"])
def test_a_mesh_that_makes_no_sense_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        train_digits.parse_options(["--checkpoints", "x", "--mesh", text])
    assert "expected e.g. dp=2,tp=2" in capsys.readouterr().err


# ------------------------------------------------------------------------------- the mathematics


def test_gradients_are_the_slopes_of_the_loss():
    rng = np.random.default_rng(0)
    weights = train_digits.initial_weights(seed=0)
    x, y = rng.random((5, train_digits.PIXELS)), rng.integers(0, train_digits.CLASSES, 5)

    def loss_and_gradients():
        return train_digits.loss_and_gradients(weights, x, y, len(y), lambda alone: alone)[0]

    gradients = loss_and_gradients()
    for name, weight in weights.items():
        for _ in range(10):
            place = tuple(rng.integers(0, weight.shape))
            value, h = weight[place], 1e-6
            weight[place] = value + h
            above = loss_and_gradients()["loss"][0]
            weight[place] = value - h
            below = loss_and_gradients()["loss"][0]
            weight[place] = value
            assert gradients[name][place] == pytest.approx((above - below) / (2 * h), abs=1e-7)


def test_a_step_has_one_batch_whatever_the_mesh_and_another_the_next_step():
    one, again, other = (train_digits.batch_indices(3, step, 1000, 64) for step in (7, 7, 8))
    assert one.tolist() == again.tolist() != other.tolist()
    assert len(set(one.tolist())) == 64


# -------------------------------------------------------------------------------------- the demo


def test_the_demo_refuses_a_place_where_it_did_not_make_everything(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    distckpt.save("precious/step-00000001", {"x": np.zeros(3)})
    assert demo.main(["--checkpoints", "precious"]) == 1
    assert "the last demo did not make" in " ".join(capsys.readouterr().err.split())
    assert distckpt.open("precious/step-00000001").verify() > 0


def test_the_demo_removes_what_it_made_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()
    distckpt.save("elsewhere/step-00000001", {"x": np.zeros(3)})
    demo.note_what_was_made("elsewhere")
    demo.clear("elsewhere")
    assert not Path("elsewhere/step-00000001").exists()


def test_the_demo_shows_a_broken_promise_and_fails(capsys):
    promises = demo.Promises()
    promises.check(True, "this one")
    assert promises.kept
    promises.check(False, "that one")
    assert not promises.kept
    promises.show()
    assert capsys.readouterr().out.split("\n")[:2] == ["   [kept] this one", "   [BROKEN] that one"]


def test_the_demo_joins_the_killed_and_the_resumed_run_at_the_checkpoint(tmp_path):
    log = tmp_path / "log.jsonl"
    records = [{"event": "start", "step": 0, "seconds": 1.0}]
    records += [{"step": step, "loss": 1 / step, "seconds": 0.1} for step in (1, 2, 3)]
    records += [{"event": "resume", "step": 2, "seconds": 1.0}]
    records += [{"step": step, "loss": 1.1 / step, "seconds": 0.1} for step in (3, 4)]
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    killed, resumed = demo.runs_in(log)
    untouched = demo.Run(0, 1.0, {step: 1 / step for step in (1, 2, 3, 4)})
    curves = demo.Curves.of(killed, resumed, untouched)
    assert curves.largest_before == 0
    assert curves.largest_after == pytest.approx(0.1)


# ----------------------------------------------------------------- the files that start the job


@pytest.mark.parametrize("name", ["graceful.sh", "mpirun.sh", "slurm.sbatch"])
def test_a_script_is_good_bash(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)


@pytest.mark.parametrize(
    ("version", "hosts"),
    [
        ("mpirun (Open MPI) 5.0", "--hostfile HOSTFILE --bind-to none"),
        ("HYDRA build details:", "-f TRANSLATED"),
    ],
    ids=["openmpi", "mpich"],
)
def test_the_mpirun_script_starts_a_rank_a_slot_with_either_mpi(tmp_path, version, hosts):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# two machines\nnode1 slots=4\nnode2  # one rank\n")
    path = stubs(
        tmp_path,
        mpirun=f'[[ $1 == --version ]] && echo "{version}" && exit; printf "%s " "$@"; echo; '
        '[[ $3 == -f ]] && cat "$4"',
    )
    arguments = ["--mesh", "dp=5", "--checkpoints", "a folder"]
    output = subprocess.run(
        [LAUNCH / "mpirun.sh", hostfile, *arguments],
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    assert output.startswith(f"-n 5 {hosts.partition(' ')[0]} ")
    assert f"python -m mpi4py {TRAIN} --mesh dp=5 --checkpoints a folder \n" in output
    if "TRANSLATED" in hosts:
        assert output.endswith("node1:4\nnode2:1\n")
    else:
        assert hosts.replace("HOSTFILE", str(hostfile)) in output


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "USR1", "USR2"])
def test_what_asks_a_graceful_job_to_end_reaches_it_as_sigusr1_and_is_waited_for(tmp_path, name):
    path = stubs(
        tmp_path,
        mpirun="trap 'touch told; sleep 0.1; echo saved; exit 7' USR1\n"
        "touch ready; while true; do sleep 0.01; done",
    )
    graceful = subprocess.Popen(
        [LAUNCH / "graceful.sh", "mpirun", "-n", "4"],
        env=os.environ | {"PATH": path},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    with graceful:
        wait_for(graceful, (tmp_path / "ready").exists)
        graceful.send_signal(signal.Signals[f"SIG{name}"])
        wait_for(graceful, (tmp_path / "told").exists)
        graceful.send_signal(signal.Signals[f"SIG{name}"])
        assert graceful.stdout.read() == "saved\n"
    assert graceful.returncode == 7


@pytest.mark.parametrize(
    ("srun", "requeued"),
    [("done", None), ("time is up", "requeue 17\n"), ("failed", None)],
    ids=["done", "time-is-up", "failed"],
)
def test_the_slurm_script_goes_on_in_another_job_only_when_time_was_up(tmp_path, srun, requeued):
    log = tmp_path / "runs" / "digits.jsonl"
    log.parent.mkdir()
    last_step = 20000 if srun == "done" else 100
    path = stubs(
        tmp_path,
        srun=f'printf "%s\\n" "$@" > {tmp_path}/arguments; '
        f'echo \'{{"step": {last_step}, "loss": 0.1}}\' >> {log}; exit {int(srun == "failed")}',
        scontrol=f'echo "$@" > {tmp_path}/asked-of-slurm',
    )
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "17", "MESH": "dp=2:tp=2"}
    ended = subprocess.run(
        ["bash", LAUNCH / "slurm.sbatch"], env=os.environ | slurm | {"PATH": path}, check=False
    )
    assert ended.returncode == int(srun == "failed")
    asked = tmp_path / "asked-of-slurm"
    assert (asked.read_text() if asked.exists() else None) == requeued
    arguments = (tmp_path / "arguments").read_text().splitlines()
    options = train_digits.parse_options(arguments[arguments.index("launch/train_digits.py") + 1 :])
    assert options.mesh == {"dp": 2, "tp": 2}
    assert options.log == log


def test_the_kubernetes_manifest_starts_as_many_ranks_as_it_has_slots_and_the_mesh_wants():
    text = (LAUNCH / "mpijob.yaml").read_text()
    with contextlib.suppress(ImportError):
        import yaml

        assert [part["kind"] for part in yaml.safe_load_all(text)] == [
            "MPIJob",
            "PersistentVolumeClaim",
        ]
    assert "\t" not in text
    options = train_digits.parse_options(re.findall(r"^ +- (--\w\S*)$", text, re.MULTILINE))
    (ranks,) = re.findall(r'"mpirun", "-n", "(\d+)"', text)
    (slots,) = re.findall(r"^  slotsPerWorker: (\d+)$", text, re.MULTILINE)
    (workers,) = re.findall(r"^    Worker:\n      replicas: (\d+)$", text, re.MULTILINE)
    assert int(ranks) == int(slots) * int(workers) == math.prod(options.mesh.values())


# -----------------------------------------------------------------------------------------------


def job(folder, mesh, *, steps, save_every=50):
    """The training job's program and arguments; it saves and logs in a folder."""
    return [
        *(str(TRAIN), "--mesh", mesh, "--steps", str(steps), "--save-every", str(save_every)),
        *("--checkpoints", str(folder / "checkpoints"), "--log", str(folder / "log.jsonl")),
    ]


def stopped_by(number, mpirun, folder):
    """Train on 4 ranks, and send mpirun a signal when they do.

    Returns the step that all have saved, and how long they took to end, beyond the save.
    """
    told_s = []

    def tell(mpirun_process):
        wait_for(mpirun_process, lambda: losses(folder))
        told_s.append(time.monotonic())
        mpirun_process.send_signal(number)

    arguments = job(folder, "dp=2,tp=2", steps=10**6, save_every=10**6)
    ended = well(mpirun(4, *arguments, meanwhile=tell))
    took_s = time.monotonic() - told_s[0]
    reached = max(losses(folder))
    assert re.search(r"saved and stopped: SIGTERM on rank \d\n", ended.output)
    assert demo.last_committed(str(folder / "checkpoints")) == reached
    assert distckpt.open(demo.step_url(str(folder / "checkpoints"), reached)).ranks == 4
    (save_s,) = demo.runs_in(folder / "log.jsonl")[-1].committed_s.values()
    return reached, took_s - save_s


def losses(folder):
    """Step → loss of the last run in a folder's log, as far as it has been written."""
    log = folder / "log.jsonl"
    runs = demo.runs_in(log) if log.exists() else []
    return runs[-1].losses if runs else {}


def everything_in(folder, step):
    """All tensors of a checkpoint as bytes, all plain and per-rank values."""
    url = demo.step_url(str(folder / "checkpoints"), step)
    checkpoint = distckpt.open(url)
    return (
        {name: array.tobytes() for name, array in distckpt.load(url).items()},
        dict(checkpoint.values),
        {name: list(checkpoint.per_rank[name]) for name in checkpoint.per_rank},
    )


def wait_for(process, condition):
    """Return when a condition holds; fail if the process ends before, or it takes forever."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def stubs(folder, **programs):
    """Make programs of a line of bash each; returns a PATH on which they come first."""
    for name, body in programs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def well(ended):
    """Fail with what the ranks have printed, unless the job has ended well."""
    if ended.status:
        pytest.fail(f"exit status {ended.status}:\n{ended.output}", pytrace=False)
    return ended
