"""The callbacks for Lightning's and Hugging Face's trainers: killed, resumed, the same curve."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import distckpt

pytest.importorskip("lightning")
pytest.importorskip("transformers")

import callback_jobs
import torch
from callback_jobs import EPOCHS, TRAIN

STEPS = 6 * EPOCHS

# The libraries warn of much, at import, too.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]

each_library = pytest.mark.parametrize("library", TRAIN)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Nets as small as these are slower with several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The losses of a training that nothing interrupts, by library and options."""
    known = {}

    def train(library, **options):
        key = (library, *options.items())
        if key not in known:
            known[key] = TRAIN[library](tmp_path_factory.mktemp("whole"), options)
        return known[key]

    return train


def test_the_trainings_themselves_are_as_they_should_be(whole):
    for library in TRAIN:
        losses = whole(library)
        assert list(losses) == list(range(STEPS))
        assert len({str(each) for each in losses.values()}) == STEPS


@each_library
def test_a_training_that_is_killed_resumes_with_the_same_curve(library, tmp_path, whole):
    program = [sys.executable, callback_jobs.__file__, library, str(tmp_path)]
    done = subprocess.run(
        [*program, json.dumps({"every": 4, "kill_at": 11})],
        env=os.environ | {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == -9, done.stderr.decode()
    resumed = TRAIN[library](tmp_path, {"every": 4})
    # Maybe the last save before the kill was not committed yet.
    assert min(resumed) in {4, 8}
    assert resumed == {n: loss for n, loss in whole(library).items() if n >= min(resumed)}
    assert saved(tmp_path) == [STEPS - 4, STEPS]


@each_library
@pytest.mark.parametrize(
    ("stopped_after", "accumulate"),
    [(2, 1), (6, 1), (7, 1), (11, 1), (12, 1), (4, 2)],
    ids=["first epoch", "its end", "second", "its last but one", "its end", "accumulated"],
)
def test_a_training_that_is_asked_to_stop_goes_on_where_it_was(
    library, stopped_after, accumulate, tmp_path, whole
):
    options = {"every": 100, "accumulate": accumulate}
    stopped = TRAIN[library](tmp_path, {**options, "terminate_at": stopped_after - 1})
    assert max(stopped) == stopped_after - 1
    assert saved(tmp_path) == [stopped_after]
    resumed = TRAIN[library](tmp_path, options)
    assert min(resumed) == stopped_after
    assert stopped | resumed == whole(library, **({"accumulate": 2} if accumulate > 1 else {}))


@pytest.mark.parametrize("stopped_after", [4, 9, 12])
def test_a_loader_that_has_a_state_goes_on_by_itself(stopped_after, tmp_path, whole):
    options = {"every": 100, "stateful": True}
    stopped = TRAIN["lightning"](tmp_path, {**options, "terminate_at": stopped_after - 1})
    resumed = TRAIN["lightning"](tmp_path, options)
    assert (max(stopped), min(resumed)) == (stopped_after - 1, stopped_after)
    assert list(stopped | resumed) == list(range(STEPS))
    assert stopped | resumed == whole("lightning", stateful=True)


def saved(folder):
    return distckpt.Manager(folder / "run", comm=distckpt.Solo()).steps()


def test_lightnings_metrics_reach_the_checkpoints(tmp_path):
    TRAIN["lightning"](tmp_path, {"every": 20})
    runs = distckpt.Manager(tmp_path / "run", comm=distckpt.Solo())
    assert 0 < runs.open(20).metrics["loss"] < 10


def test_a_trainer_that_was_not_resumed_is_told_how(tmp_path):
    from distckpt.callbacks.huggingface import ManagerCallback

    with (
        callback_jobs.manager(tmp_path, {}) as runs,
        pytest.raises(RuntimeError, match=r"callback\.resume\(trainer\)"),
    ):
        ManagerCallback(runs).on_train_begin(None, None, None)


def test_a_callback_is_less_than_a_hundred_lines():
    folder = Path(distckpt.__file__).parent / "callbacks"
    for name in ("lightning.py", "huggingface.py"):
        assert len((folder / name).read_text().splitlines()) < 100
