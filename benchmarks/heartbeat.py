"""Measure what the Manager's heartbeat costs a training step.

::

    mpirun -n 4 python -m mpi4py benchmarks/heartbeat.py

A step is some arithmetic and an all-reduce. Two kinds: over so little data that the processor's
caches keep the heartbeat's code, and over so much (4 MB, of which 1 MB is reduced) that they don't.
Steps with and without a heartbeat take turns, since machines drift. What is printed for each rank,
in microseconds: the median wall and processor time of a bare step's end and of the heartbeat there,
their difference, and the median of whole steps. With more ranks than cores, a wall time may hold
another rank's turn, and each turn begins with cold caches.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from mpi4py import MPI

from distckpt.manager.heartbeat import Heartbeat, Vote
from distckpt.team import connect


def main() -> None:
    """Measure on all ranks of MPI.COMM_WORLD; rank 0 prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--steps", type=int, default=2000, help="of each kind (default %(default)s)"
    )
    steps = parser.parse_args().steps
    comm = MPI.COMM_WORLD
    heartbeat = Heartbeat(connect(comm), timeout_s=600)
    vote = Vote()
    beats = 0

    def beat() -> None:
        nonlocal beats
        heartbeat.beat(beats, vote)
        beats += 1

    show(comm, MPI.Get_library_version().split("\n")[0].strip())
    for name, numbers in (("little data", 1 << 10), ("much data", 1 << 19)):
        work, gradients = np.ones(numbers), np.ones(numbers // 4)
        total = np.empty_like(gradients)
        bare, beating = Times(), Times()
        for _ in range(steps):
            for times, end in ((bare, nothing), (beating, beat)):
                began = time.perf_counter()
                work.sum()
                comm.Allreduce(gradients, total)
                times.take(end, began)
        rows = comm.gather((*bare.medians(), *beating.medians()))
        load = Path("/proc/loadavg").read_text(encoding="utf-8").split()[0]
        show(
            comm, f"{name}: {comm.size} ranks, {steps} steps of each kind, load average {load}; µs"
        )
        show(
            comm, "rank   bare: wall   cpu   heartbeat: wall   cpu   cost: wall   cpu   whole step"
        )
        for rank, (wall, cpu, step, wall_beat, cpu_beat, step_beat) in enumerate(rows or ()):
            show(
                comm,
                f"{rank:4} {wall:12.1f} {cpu:5.1f} {wall_beat:17.1f} {cpu_beat:5.1f} "
                f"{wall_beat - wall:12.1f} {cpu_beat - cpu:5.1f} {step:9.0f} -> {step_beat:.0f}",
            )
    heartbeat.close()


def show(comm: MPI.Comm, line: str) -> None:
    """Print a line, on rank 0."""
    if comm.rank == 0:
        print(line, flush=True)


def nothing() -> None:
    """End a step without a heartbeat."""


class Times:
    """What the ends of some steps took, and the whole steps."""

    def __init__(self) -> None:
        self._wall: list[float] = []
        self._cpu: list[float] = []
        self._step: list[float] = []

    def take(self, end: Callable[[], None], began: float) -> None:
        """Time the end of a step that began then."""
        wall, cpu = time.perf_counter(), time.thread_time()
        end()
        self._cpu.append(time.thread_time() - cpu)
        self._wall.append(time.perf_counter() - wall)
        self._step.append(time.perf_counter() - began)

    def medians(self) -> tuple[float, float, float]:
        """Return the medians in microseconds: wall, processor, whole step."""
        wall, cpu, step = map(statistics.median, (self._wall, self._cpu, self._step))
        return 1e6 * wall, 1e6 * cpu, 1e6 * step


if __name__ == "__main__":
    main()
