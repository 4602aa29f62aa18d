"""Ranks get SIGKILL at named points of a save, under a real mpirun; see crashes.py.

mpich's mpirun ends a job when a rank is killed: so it is looked at what is left. Where a launcher
doesn't, as on another node, the others must find out by themselves. mpirun does that only for ranks
that it can't reach: in sessions of their own (`setsid`), and told not to clean up.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import crashes

_LEFT_ALONE = ("-disable-auto-cleanup",)
_IN_A_SESSION = ("setsid", "--wait")
# Ranks are more than cores, and need not each compile what they import.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}


def run_case(case, *, survivors, timeout_s):
    """Run a case under mpirun. Returns what is wrong, and whether anybody was killed.

    Args:
        case: The case.
        survivors: Whether the launcher leaves the others alone.
        timeout_s: Of the saves.
    """
    with tempfile.TemporaryDirectory(prefix="distckpt-mpi-crash-") as name:
        folder = Path(name)
        crashes.prepare(folder, case.scenario)
        mpirun = Path(sys.executable).with_name("mpirun")
        command = [str(mpirun), *(_LEFT_ALONE if survivors else ()), "-n", str(crashes.RANKS)]
        command += [*(_IN_A_SESSION if survivors else ()), sys.executable, "-m", "mpi4py"]
        command += [__file__, name, json.dumps(asdict(case)), str(timeout_s), str(survivors)]
        with (folder / "output").open("wb") as output:
            job = subprocess.Popen(
                command,
                env=os.environ | _ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        hung = []
        try:
            job.wait(30 + 12 * timeout_s)
            ends = _ends(folder, case, deadline=time.monotonic() + 12 * timeout_s)
        except subprocess.TimeoutExpired:
            hung, ends = ["the launcher did not end"], None
        finally:
            _end(job, folder)
        killed = (folder / "killed").exists()
        # If nobody was killed, all ranks say how they ended.
        wrong, hit = crashes.check(
            folder, case, ends if survivors or not killed else None, timeout_s=timeout_s
        )
        if hit and not hung and job.returncode == 0:
            wrong.append("the launcher took it for success")
        wrong += hung
        if wrong:
            wrong.append((folder / "output").read_text(errors="replace")[-2000:])
        return wrong, hit


def _ends(folder, case, *, deadline):
    """What the ranks have left; those that are to live are waited for."""
    ends = []
    for rank in range(crashes.RANKS):
        path = folder / f"ended-{rank}"
        victim = (folder / "killed").exists() and (case.everyone or rank == case.rank)
        while not victim and not path.exists() and time.monotonic() < deadline:
            if not _alive(folder, rank):
                break
            time.sleep(0.01)
        ends.append(json.loads(path.read_text()) if path.exists() else None if victim else "late")
    return ends


def _alive(folder, rank):
    try:
        os.kill(int((folder / "pids" / str(rank)).read_text()), 0)
    except (ProcessLookupError, FileNotFoundError):
        return (folder / f"ended-{rank}").exists()
    return True


def _end(job, folder):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    for path in (folder / "pids").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(path.read_text()), signal.SIGKILL)


def run_cases(cases, *, workers, timeout_s):
    """Run (case, survivors), so many at once.

    Returns:
        How many had a victim, and what is wrong: (case, texts).
    """

    def run(job):
        case, survivors = job
        how = "the others live on" if survivors else "the launcher ends the job"
        found, hit = run_case(case, survivors=survivors, timeout_s=timeout_s)
        return f"{case}; {how}", found, hit

    with ThreadPoolExecutor(workers) as pool:
        ended = list(pool.map(run, cases))
    return sum(hit for _, _, hit in ended), [(name, found) for name, found, _ in ended if found]


def every_case():
    """Each named case, ended by the launcher; those of one victim also left alone."""
    for case in crashes.named_cases():
        yield case, False
        if not case.everyone:
            yield case, True


def covering(cases, count):
    """So many of the cases: of each way in which a job ends, those that `crashes.covering` chooses.

    Points that a launcher and a rank pass alike are tried without mpirun, too.
    """
    cases = list(cases)
    if count >= len(cases):
        return cases
    ended = crashes.covering([case for case, survivors in cases if not survivors], count // 2)
    alone = crashes.covering([case for case, survivors in cases if survivors], count - count // 2)
    return [*((case, False) for case in ended), *((case, True) for case in alone)]


def _rank(folder, case, timeout_s, survivors):
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    ended = crashes.rank_main(
        comm, comm.rank, Path(folder), crashes.Case(**json.loads(case)), timeout_s=float(timeout_s)
    )
    crashes._write(Path(folder) / f"ended-{comm.rank}", json.dumps(ended))
    if ended["error"] or survivors == "True":
        os._exit(3)  # MPI's own end would wait for the dead


if __name__ == "__main__":
    _rank(*sys.argv[1:])
