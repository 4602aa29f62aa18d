"""launch/evaluate_digits.py beside a run that it watches."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch"

pytest.importorskip("sklearn", reason="the data set is scikit-learn's")


def test_a_run_is_evaluated_while_it_trains_and_keeps_one_checkpoint(mpirun, tmp_path):
    root, log = tmp_path / "checkpoints", tmp_path / "scores.jsonl"
    command = [sys.executable, LAUNCH / "evaluate_digits.py", "--checkpoints", root]
    command += ["--until-step", "100", "--poll", "0.005", "--timeout", "120", "--log", log]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as evaluation:
        train = [LAUNCH / "train_digits.py", "--mesh", "tp=2", "--steps", "100", "--evaluate"]
        train += ["--save-every", "5", "--keep", "1", "--checkpoints", root]
        trained = mpirun(2, *train)
        assert trained.status == 0, trained.output
        printed, _ = evaluation.communicate(timeout=120)
    assert evaluation.returncode == 0
    scores = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [score["step"] for score in scores]
    assert steps == sorted(set(steps))
    assert set(steps) <= set(range(5, 101, 5))
    assert steps[-1] == 100
    assert f"evaluated {len(steps)} checkpoints" in printed
    # The same network on the same samples as the run itself has at its end.
    [own] = re.findall(r"accuracy on 360 samples.*: ([\d.]+%)", trained.output)
    assert f"{scores[-1]['accuracy']:.1%}" == own
    left = sorted(path.name for path in root.glob("step-*"))
    assert left[-1] == "step-00000100"
    # And perhaps one that was being read when the run's last save deleted the others.
    assert len(left) <= 2
    assert not list(root.glob("step-*/hold-*"))
