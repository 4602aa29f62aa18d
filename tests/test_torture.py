"""What `make torture` tries at large, a little of each; and that it would find what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys

import crashes
import machine
import power_loss
import pytest
import run
from versions import state, version_of

import distckpt
from distckpt.testing import PowerLossDisk

# Fuzzing has tests of its own; every byte is damaged in test_corruption.py.
_PARTS = [
    "crashes under mpirun",
    "crashes of forked ranks",
    "power losses",
    "races of two jobs",
    "state machine, seed 0",
    "damaged bytes, seed 0",
]


@pytest.mark.parametrize("name", _PARTS)
def test_nothing_is_lost_and_nothing_hangs(name):
    """In a process of its own: ranks are forked, which a process with threads can't do."""
    done = subprocess.run(
        [sys.executable, run.__file__, "--part", name, "--scale", "test"],
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["wrong"] == []
    assert result["cases"] > 0


# ---------------------------------------------------------------------- would it find what is wrong


@pytest.mark.parametrize("forgets", ["a file", "a directory"])
def test_a_forgotten_fsync_is_found(tmp_path, monkeypatch, forgets):
    class Forgets(PowerLossDisk):
        def perform(self, call, do):
            directory = "." not in call.name.strip("./")
            if call.kind == "os.fsync" and directory is (forgets == "a directory"):
                return
            super().perform(call, do)

    monkeypatch.setattr(power_loss, "PowerLossDisk", Forgets)
    _, wrong = power_loss.lose_power_everywhere("fresh", seeds=3)
    assert wrong


def test_a_cleaning_that_trusts_a_stale_listing_is_found(monkeypatch):
    def careless(store, **options):
        names = store.names()
        if "manifest.binpb" not in names:
            store.delete(names)

    monkeypatch.setattr(machine, "clean", careless)

    def play():
        for chance in range(50):
            played = machine.Checkpoints()
            played.begin(chance)
            played.save("a", overwrite=False, ranks=1)
            played.clean("a", 0.0)
            played.what_was_committed_is_readable_and_equal()

    with pytest.raises(distckpt.CheckpointError, match="is not there"):
        play()


def test_a_lost_checkpoint_is_found_after_a_crash(tmp_path):
    case = crashes.Case("overwriting", rank=1, everyone=False, moment=0)
    crashes.prepare(tmp_path, "overwriting")
    (tmp_path / "killed").write_text(json.dumps({"commits": 0, "outcomes": 0}))
    told = {"error": {"kind": "SaveFailed", "text": "", "ranks": [1]}, "seconds": 1.0}
    assert crashes.check(tmp_path, case, [told, None, told], timeout_s=1.0) == ([], True)
    (tmp_path / "run" / "checkpoint" / "manifest.binpb").unlink()
    wrong, _ = crashes.check(tmp_path, case, [told, None, told], timeout_s=1.0)
    assert "version None; possible {1}" in wrong


@pytest.mark.parametrize(
    ("end", "finding"),
    [
        ("late", "rank 2 ended otherwise: late"),
        ({"error": None, "seconds": 99.0}, None),
        ({"error": {"kind": "SaveFailed", "text": "x", "ranks": [2]}, "seconds": 1}, "was told"),
        ({"error": {"kind": "SaveFailed", "text": "x", "ranks": [1]}, "seconds": 99}, "after 99.0"),
        ({"error": {"kind": "SaveFailed", "text": "y", "ranks": [1]}, "seconds": 1}, "different"),
    ],
)
def test_a_rank_that_hangs_or_is_told_something_else_is_found(end, finding):
    case = crashes.Case("overwriting", rank=1, everyone=False, moment=0)
    told = {"error": {"kind": "SaveFailed", "text": "x", "ranks": [1]}, "seconds": 1.0}
    wrong = crashes._judge(case, {"commits": 0}, [told, None, end], timeout_s=4.0)
    assert bool(wrong) == bool(finding)
    assert finding is None or finding in str(wrong)


def test_a_version_is_told_from_another(tmp_path):
    distckpt.save(tmp_path, state(4, 0, 1), comm=distckpt.Solo())
    assert version_of(tmp_path) == 4
    assert version_of(tmp_path / "nothing") is None
