"""Ranks get SIGKILL at every point of a save; then all is looked at.

A case is a scenario (`SCENARIOS`), a victim (a rank, or all at once when that rank is there), and a
moment: the n-th operation that the victim begins, of its store, its messages or its files; or a
named point of `distckpt.testing.points`. `run_cases` runs them on ranks that are forked processes;
mpi_crashes.py runs them under mpirun, with `rank_main` below in each rank.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import multiprocessing
import os
import signal
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from versions import latest_version, state, version_of

import distckpt
from distckpt import KeepLast, Manager, SaveFailed, team
from distckpt.clean import clean
from distckpt.errors import text
from distckpt.store import open_store
from distckpt.testing import (
    Call,
    Fault,
    FaultyCoordinator,
    FaultyFiles,
    FaultyStore,
    Point,
    points,
    run_processes,
)

RANKS = 3
# The old version, and those that are saved.
SCENARIOS = {
    "fresh": (None, [2]),
    "overwriting": (1, [2]),
    "async": (1, [2, 3]),
    "manager": (1, [2, 3]),
}
_EVERYTHING = Point(
    (
        *(
            "create",
            "write",
            "write-half",
            "commit",
            "put",
            "size",
            "modified",
            "read",
            "names",
            "delete",
        ),
        *("send", "receive"),
        *("os.open", "os.write", "os.truncate", "os.allocate", "os.fsync", "os.rename", "os.link"),
        *("os.unlink", "os.mkdir", "os.rmdir"),
    )
)


@dataclass(frozen=True)
class Case:
    """Who is killed, when, and in which scenario.

    Attributes:
        scenario: A key of `SCENARIOS`.
        rank: The victim.
        everyone: Whether all ranks are killed with it.
        moment: Which of the victim's operations isn't begun any more; None: see `point`.
        point: Number of a named point in `points.ALL`.
        at: Which passage of that point.
    """

    scenario: str
    rank: int
    everyone: bool
    moment: int | None = None
    point: int | None = None
    at: int = 0

    def __str__(self):
        when = f"operation {self.moment}" if self.point is None else points.ALL[self.point]
        who = f"all, when rank {self.rank} is" if self.everyone else f"rank {self.rank}"
        return f"{self.scenario}: kill {who} at {when} ({self.at})"


@dataclass
class Log:
    """What a rank has done so far, in its order."""

    operations: list = field(default_factory=list)

    def note(self, operation):
        self.operations.append((operation.kind, operation.name))

    def facts(self):
        """What could be committed by now, for all that this rank knows."""
        done = self.operations
        renames = [
            kind in {"os.rename", "os.link"} and name.endswith("manifest.binpb")
            for kind, name in done
        ]
        return {
            "operations": len(done),
            "commits": sum(renames),
            "outcomes": sum(found == ("send", "outcome") for found in done),
            "last": done[-1] if done else None,
        }


# ------------------------------------------------------------------------------------- on each rank


def rank_main(comm, rank, folder, case, *, timeout_s):
    """Save as the scenario says; be killed as the case says. Returns how it ended, as plain data.

    Args:
        comm: A Coordinator, or an mpi4py communicator.
        rank: This rank.
        folder: The case's.
        case: The case; None: nobody is killed.
        timeout_s: Of the saves.
    """
    team._GRACE_S = timeout_s / 2
    logging.disable()  # what is logged of a failed save is no news
    pids = folder / "pids"
    # By rename, so that a file that is there is whole.
    (pids / f".{rank}").write_text(str(os.getpid()))
    (pids / f".{rank}").rename(pids / str(rank))
    while len(list(pids.glob("[0-9]*"))) < RANKS:
        time.sleep(1e-3)
    log = Log()
    faults = [*_killing(folder, case, rank, log), Fault(_EVERYTHING, Call(log.note), times=None)]
    started = time.monotonic()
    error = None
    try:
        with FaultyFiles(folder / "run", faults, rank=rank):
            _save(FaultyCoordinator(comm, faults), rank, folder, case, faults, timeout_s=timeout_s)
    except distckpt.CheckpointError as exc:
        failures = sorted(getattr(exc, "failures", {}))
        error = {"kind": type(exc).__name__, "text": str(exc), "ranks": failures}
    return {"error": error, "seconds": time.monotonic() - started, **log.facts()}


def _killing(folder, case, rank, log):
    """The fault of a case, if this rank is its victim. Noted first, so that the log is whole."""
    if case is None or case.rank != rank:
        return []

    def kill(operation):
        if case.point is None and len(log.operations) != case.moment:
            return
        facts = log.facts() | {"at": [operation.kind, operation.name]}
        _write(folder / "killed", json.dumps(facts))
        if case.everyone:
            for other in range(RANKS):
                if other != rank:
                    os.kill(int((folder / "pids" / str(other)).read_text()), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    if case.point is None:
        return [Fault(_EVERYTHING, Call(kill), times=None)]
    return [Fault(points.ALL[case.point], Call(kill), at=case.at)]


def _write(path, text):
    """Write a file of ours, past those that are watched."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(text)
    partial.rename(path)


def _save(comm, rank, folder, case, faults, *, timeout_s):
    scenario = "overwriting" if case is None else case.scenario
    old, versions = SCENARIOS[scenario]
    if scenario == "manager":
        store = FaultyStore(open_store(folder / "run"), faults=faults, rank=rank)
        with Manager(store, comm=comm, keep=KeepLast(1), timeout_s=timeout_s) as manager:
            for version in versions:
                manager.save(version, state(version, rank, RANKS)).wait()
                _write(folder / f"ack-{rank}-{version}", "")
        return
    store = FaultyStore(open_store(folder / "run" / "checkpoint"), faults=faults, rank=rank)
    options = {"comm": comm, "overwrite": old is not None, "timeout_s": timeout_s}
    for version in versions:
        if scenario == "async":
            distckpt.save_async(store, state(version, rank, RANKS), **options).wait()
        else:
            distckpt.save(store, state(version, rank, RANKS), **options)
        _write(folder / f"ack-{rank}-{version}", "")


# ------------------------------------------------------------------------------------------- before


def prepare(folder, scenario):
    """Make a case's folder, with the old version where the scenario has one."""
    (folder / "pids").mkdir(parents=True)
    (folder / "run").mkdir()
    old, _ = SCENARIOS[scenario]
    if old is None:
        return
    if scenario == "manager":
        with Manager(folder / "run", comm=distckpt.Solo()) as manager:
            manager.save(old, state(old, 0, 1))
    else:
        distckpt.save(folder / "run" / "checkpoint", state(old, 0, 1), comm=distckpt.Solo())


# -------------------------------------------------------------------------------------------- after


def check(folder, case, ends, *, timeout_s):
    """Look at all that a case has left.

    Args:
        folder: The case's.
        case: The case.
        ends: How each rank ended: what `rank_main` returned, or None if it was killed, or "late";
            None as a whole: the launcher ended them.
        timeout_s: Of the saves.

    Returns:
        What is wrong, as a list of texts; and whether anybody was killed.
    """
    wrong = []
    killed = None
    with contextlib.suppress(FileNotFoundError):
        killed = json.loads((folder / "killed").read_text())
    old, _ = SCENARIOS[case.scenario]
    acknowledged = [int(path.name.split("-")[2]) for path in folder.glob("ack-*")]
    floor = max(acknowledged, default=old)
    try:
        found = _version(folder, case)
        if found not in _possible(case, killed, floor):
            wrong.append(f"version {found}; possible {_possible(case, killed, floor)}")
        # A new job saves over what is there, and resumes from it.
        _recover(folder, case)
    except Exception as exc:  # whatever it is, it is the finding
        wrong.append(text(exc))
    if ends is not None:
        wrong += _judge(case, killed, ends, timeout_s)
    return wrong, killed is not None


def _version(folder, case):
    if case.scenario == "manager":
        return latest_version(folder / "run")
    return version_of(folder / "run" / "checkpoint")


def _possible(case, killed, floor):
    """The versions that may be there now."""
    old, versions = SCENARIOS[case.scenario]
    line = [old, *versions]
    if killed is None:
        return {versions[-1]}
    if case.rank == 0:
        # Only the coordinator commits: so many times it had.
        return {line[killed["commits"]]}
    # The others commit without it what it has told its outcome of.
    most = line[killed["outcomes"]]
    return {most} if not case.everyone else set(line[line.index(floor) : line.index(most) + 1])


def _recover(folder, case):
    found = _version(folder, case)
    place = folder / "run"
    # An hour later, when nobody respects the mark of a deleter that died.
    clean(
        place if case.scenario == "manager" else place / "checkpoint",
        grace_s=0,
        dry_run=False,
        now=lambda: time.time() + 3600,
    )
    assert _version(folder, case) == found, "cleaning changed what is there"
    _assert_clean(folder)
    if case.scenario == "manager":
        with Manager(place, comm=distckpt.Solo(), keep=KeepLast(1)) as manager:
            manager.save(9, state(9, 0, 1)).wait()
    else:
        distckpt.save(place / "checkpoint", state(9, 0, 1), comm=distckpt.Solo(), overwrite=True)
    assert _version(folder, case) == 9, "what was left can't be saved over"


def _assert_clean(folder):
    """Nothing lies in the checkpoints' folders but what manifests name."""
    for place in (folder / "run").glob("[!.]*"):
        there = {path.name for path in place.glob("*")}
        if not there:
            continue
        named = {"manifest.binpb", *distckpt.open(place).manifest.file_names}
        assert there == named, f"left after cleaning: {sorted(there - named)}"


def _judge(case, killed, ends, timeout_s):
    """Who lives on is told the same, in time."""
    if killed is None:
        errors = [end for end in ends if not isinstance(end, dict) or end["error"]]
        return [f"nobody was killed, and yet: {errors}"] if errors else []
    wrong = []
    errors = []
    for rank, end in enumerate(ends):
        if rank == case.rank:
            if end is not None:
                wrong.append(f"rank {rank} was to be killed: {end}")
        elif case.everyone:
            # It may have come to its end before.
            if end is not None and (not isinstance(end, dict) or end["error"]):
                wrong.append(f"rank {rank} was to be killed, or to end well: {end}")
        elif not isinstance(end, dict):
            wrong.append(f"rank {rank} ended otherwise: {end}")
        elif end["error"]:
            errors.append(end["error"])
            if (
                end["error"]["kind"] != SaveFailed.__name__
                or case.rank not in end["error"]["ranks"]
            ):
                wrong.append(f"rank {rank} was told: {end['error']}")
            # Two waits at most follow one another: of a save's call, and of its end.
            if end["seconds"] > 5 * timeout_s:
                wrong.append(f"rank {rank} was told after {end['seconds']:.1f} s")
    # A dead coordinator tells nobody; each finds that out where it is.
    if case.rank != 0 and len({error["text"] for error in errors}) > 1:
        wrong.append(f"the ranks were told different things: {errors}")
    return wrong


# ------------------------------------------------------------------------------ as forked processes


def run_case(case, *, timeout_s):
    """Run a case on forked ranks. Returns what is wrong, and whether anybody was killed."""
    with tempfile.TemporaryDirectory(prefix="distckpt-crash-") as name:
        folder = Path(name)
        prepare(folder, case.scenario)
        ended = run_processes(
            RANKS,
            lambda comm: rank_main(comm, comm.rank, folder, case, timeout_s=timeout_s),
            timeout_s=12 * timeout_s,
        )
        ends = [
            "late" if end.late else None if end.signal else end.value or f"raised {end.error}"
            for end in ended
        ]
        return check(folder, case, ends, timeout_s=timeout_s)


def count_operations(scenario, *, timeout_s=20.0):
    """How many operations each rank begins in a scenario."""
    with tempfile.TemporaryDirectory(prefix="distckpt-crash-") as name:
        folder = Path(name)
        prepare(folder, scenario)
        nobody = Case(scenario, rank=-1, everyone=False, moment=0)
        ended = run_processes(
            RANKS, lambda comm: rank_main(comm, comm.rank, folder, nobody, timeout_s=timeout_s)
        )
        return [end.value["operations"] for end in ended]


def every_case():
    """All moments of all ranks in all scenarios, each alone and with everyone."""
    for scenario in SCENARIOS:
        for rank, operations in enumerate(count_operations(scenario)):
            for moment in range(operations):
                for everyone in (False, True):
                    yield Case(scenario, rank, everyone, moment)


def named_cases():
    """All named points, passed for the first time, × scenarios × the coordinator, a rank, all."""
    victims = ((0, False), (RANKS - 1, False), (0, True))
    for number, scenario, victim in itertools.product(range(len(points.ALL)), SCENARIOS, victims):
        yield Case(scenario, *victim, point=number)


def covering(cases, count):
    """So many of the cases, in which each pair of a point and a scenario, … is there if possible.

    A greedy choice: at each turn the case with the most pairs of attributes not seen yet.
    """

    def pairs(case):
        return set(
            itertools.combinations(
                enumerate((case.scenario, (case.rank, case.everyone), case.point or case.moment)), 2
            )
        )

    left, seen, chosen = list(cases), set(), []
    if count >= len(left):
        return left
    while left and len(chosen) < count:
        best = max(left, key=lambda case: len(pairs(case) - seen))
        left.remove(best)
        seen |= pairs(best)
        chosen.append(best)
    return chosen


def run_cases(cases, *, workers, timeout_s):
    """Run cases on forked ranks, so many at once: most of the time they wait for a dead rank.

    Returns:
        How many had a victim, and what is wrong: (case, texts).
    """
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    cases = list(cases)
    processes = [
        context.Process(target=_work, args=(cases[index::workers], timeout_s, queue))
        for index in range(workers)
    ]
    for process in processes:
        process.start()
    killed, wrong = 0, []
    for _ in cases:
        case, found, hit = queue.get()
        killed += hit
        if found:
            wrong.append((str(Case(**case)), found))
    for process in processes:
        process.join()
    return killed, wrong


def _work(cases, timeout_s, queue):
    for case in cases:
        try:
            found, hit = run_case(case, timeout_s=timeout_s)
        except Exception as exc:  # the finding
            found, hit = [text(exc)], False
        queue.put((asdict(case), found, hit))
