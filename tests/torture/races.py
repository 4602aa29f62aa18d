"""Two jobs save to one place at the same time, in processes of their own, while a third reads."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from versions import state, version_of

import distckpt
from distckpt import CheckpointError, CheckpointExists, IncompleteCheckpoint, LoadFailed
from distckpt.errors import text
from distckpt.testing import run_processes, run_ranks

_BARRIER, _READER = 7, 2


def race(rounds, *, overwrite):
    """Have two jobs of two ranks race so many times.

    Returns:
        What is wrong.
    """
    with tempfile.TemporaryDirectory(prefix="distckpt-race-") as name:
        folder = Path(name)
        ended = run_processes(
            3, lambda comm: _take_part(comm, folder, rounds, overwrite), timeout_s=60 + rounds
        )
        wrong = [f"process {rank}: {end}" for rank, end in enumerate(ended) if end.value is None]
        if wrong:
            return wrong
        jobs = [end.value for end in ended[:_READER]]
        wrong += ended[_READER].value
        for number, answers in enumerate(zip(*jobs, strict=True)):
            place = folder / (f"{number}" if not overwrite else "one")
            wrong += [f"round {number}: {found}" for found in _judge(place, answers, overwrite)]
        if overwrite:
            left = version_of(folder / "one")
            if left not in {_version(rounds - 1, job) for job in (0, 1)}:
                wrong.append(f"version {left} is there in the end")
        return wrong


def _version(number, job):
    return 2 * number + job


def _judge(place, answers, overwrite):
    if overwrite:
        return [answer for answer in answers if answer]
    winners = [job for job, answer in enumerate(answers) if not answer]
    if len(winners) != 1:
        return [f"{len(winners)} saves won: {answers}"]
    if answers[1 - winners[0]] != CheckpointExists.__name__:
        return [f"the loser was told: {answers}"]
    found = version_of(place)
    left = {path.name for path in place.iterdir()}
    named = {"manifest.binpb", *distckpt.open(place).manifest.file_names}
    wrong = [] if left == named else [f"left over: {left - named}"]
    return wrong + ([] if found % 2 == winners[0] else [f"version {found} is not the winner's"])


def _take_part(comm, folder, rounds, overwrite):
    """Save in each round, or read all the time; returns the answers, or what is wrong."""
    if comm.rank == _READER:
        return _keep_reading(comm, folder / "one") if overwrite else _wait(comm, 2) or []
    answers = []
    for number in range(rounds):
        comm.post(1 - comm.rank, _BARRIER, b"")
        _wait(comm, 1)
        place = folder / (f"{number}" if not overwrite else "one")
        answers.append(_save(place, _version(number, comm.rank), overwrite))
    comm.post(_READER, _BARRIER, b"")
    return answers


def _save(place, version, overwrite):
    def one(comm):
        values = state(version, comm.rank, comm.size)
        try:
            distckpt.save(place, values, comm=comm, overwrite=overwrite)
        except CheckpointExists as exc:
            return type(exc).__name__
        except CheckpointError as exc:
            return text(exc)
        return ""

    answers = set(run_ranks(2, one))
    return answers.pop() if len(answers) == 1 else f"different answers: {sorted(answers)}"


def _keep_reading(comm, place):
    wrong, missing = [], 2
    seen = False
    while missing:
        missing -= comm.poll(_BARRIER) is not None
        try:
            found = version_of(place)
            seen = seen or found is not None
            if seen and found is None:
                wrong.append("there was no checkpoint for a while")
        except (IncompleteCheckpoint, LoadFailed) as exc:
            if "replaced" not in str(exc):
                wrong.append(text(exc))
        except Exception as exc:  # the finding
            wrong.append(text(exc))
    return wrong


def _wait(comm, messages):
    while messages:
        messages -= comm.poll(_BARRIER) is not None
        time.sleep(1e-4)
