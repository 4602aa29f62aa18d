"""Measure saves and loads against the floor that memcpy, write + fsync and read set.

``make bench`` (``QUICK=1``: smaller and shorter) runs this. It starts itself under mpirun for each
number of ranks and each kind of storage, and writes ``benchmarks/results/latest.json`` and
``latest.md``. Floor and system take turns within one run, since machines drift; what counts is the
ratio, pair by pair: its median and quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import distckpt

RESULTS = Path(__file__).parent / "results"
# What is measured, by name: what it is divided by.
ROWS = {
    "durable save": "write + fsync of the same bytes",
    "async stall": "memcpy into memory that was used before",
    "async until committed": "write + fsync of the same bytes",
    "load": "read of the same bytes into the same arrays",
    "load, verify=False": "read of the same bytes into the same arrays",
    "load, rows saved and columns wanted": "read of the same bytes into the same arrays",
}


def main() -> None:
    """Run all measurements, or one (``--inside``, under mpirun)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less data, fewer pairs")
    parser.add_argument("--inside", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        measure(Path(options.inside), Path(options.output), quick=options.quick)
        return
    runs = []
    for place, parent in places().items():
        for ranks in (1, 2):
            with tempfile.TemporaryDirectory(prefix="distckpt-bench-", dir=parent) as folder:
                output = Path(folder) / "result.json"
                command = [str(Path(sys.executable).with_name("mpirun")), "-n", str(ranks)]
                command += [sys.executable, "-m", "mpi4py", __file__, "--inside", folder]
                command += ["--output", str(output)] + (["--quick"] if options.quick else [])
                environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
                subprocess.run(command, check=True, env=environment)
                runs.append({"place": place, "ranks": ranks, **json.loads(output.read_text())})
                print(f"{place}, {ranks} ranks: done", flush=True)
    report = {"machine": machine(), "quick": options.quick, "runs": runs}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "latest.json").write_text(json.dumps(report, indent=1) + "\n")
    text = table(report)
    (RESULTS / "latest.md").write_text(text)
    print(text)


def places() -> dict[str, str]:
    """Name the kinds of storage here, and a folder on each."""
    found = {"disk": tempfile.gettempdir()}
    if Path("/dev/shm").is_dir():  # noqa: S108  a tmpfs is what is asked for
        found["tmpfs"] = "/dev/shm"  # noqa: S108
    return found


def machine() -> dict[str, object]:
    """Describe the machine."""
    return {
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "distckpt": distckpt.__version__,
    }


def make_state(rank: int, ranks: int, megabytes: int) -> dict[str, object]:
    """Make a state: three quarters sharded by rows, one quarter the same on every rank."""
    rng = np.random.default_rng(rank)
    columns = 2048
    rows = max(ranks, megabytes * 3 // 4 * 2**20 // (64 * columns * 4)) // ranks
    shape = (rows * ranks, columns)
    state: dict[str, object] = {
        f"sharded.{index}": distckpt.Shard(
            rng.standard_normal((rows, columns), np.float32), (rows * rank, 0), shape
        )
        for index in range(64)
    }
    same = np.random.default_rng(1234)
    rows = max(1, megabytes // 4 * 2**20 // (64 * columns * 4))
    for index in range(64):
        state[f"replicated.{index}"] = same.standard_normal((rows, columns), np.float32)
    return state


def measure(folder: Path, output: Path, *, quick: bool) -> None:
    """Collective. Measure everything in turn, and write the ratios of each pair."""
    from mpi4py import MPI  # noqa: PLC0415  only under mpirun

    comm = MPI.COMM_WORLD
    megabytes, pairs = (96, 5) if quick else (640, 11)
    state = make_state(comm.rank, comm.size, megabytes)
    part = distckpt.plan(state, comm=comm)
    mine = np.ones(part.rank_bytes[comm.rank], np.uint8)
    warm = np.ones_like(mine)
    url, floor_file = folder / "checkpoint", folder / f"floor-{comm.rank}"
    empty = {name: like(leaf) for name, leaf in state.items()}
    turned = {name: columns_of(leaf, comm.rank, comm.size) for name, leaf in state.items()}
    pending: list[distckpt.PendingCheckpoint] = []

    def timed(function: Callable[[], object]) -> float:
        comm.Barrier()
        started = time.perf_counter()
        function()
        return float(comm.allreduce(time.perf_counter() - started, MPI.MAX))

    def save_async() -> None:
        pending.append(distckpt.save_async(url, state, comm=comm, overwrite=True))

    seconds: dict[str, list[float]] = {}

    def note(name: str, value: float) -> float:
        seconds.setdefault(name, []).append(value)
        return value

    ratios: dict[str, list[float]] = {name: [] for name in ROWS}
    for pair in range(pairs + 1):
        floor = note("write + fsync", timed(lambda: write_and_sync(floor_file, mine)))
        save = note(
            "durable save", timed(lambda: distckpt.save(url, state, comm=comm, overwrite=True))
        )
        copy = note("memcpy", timed(lambda: np.copyto(warm, mine)))
        stall = note("async stall", timed(save_async))
        rest = timed(lambda: pending.pop().wait())
        reading = note("read", timed(lambda: read(floor_file, warm)))
        loads = [
            note("load", timed(lambda: distckpt.load_into(url, empty, comm=comm, strict=True))),
            note(
                "load, verify=False",
                timed(lambda: distckpt.load_into(url, empty, comm=comm, strict=True, verify=False)),
            ),
            note(
                "load, columns",
                timed(lambda: distckpt.load_into(url, turned, comm=comm, strict=True)),
            ),
        ]
        if pair:  # the first warms up
            found = [
                save / floor,
                stall / copy,
                (stall + rest) / floor,
                *(x / reading for x in loads),
            ]
            for name, ratio in zip(ROWS, found, strict=True):
                ratios[name].append(ratio)
    if comm.rank == 0:
        medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
        result = {"bytes": part.bytes, "pairs": pairs, "ratios": ratios, "seconds": medians}
        output.write_text(json.dumps(result))
    comm.Barrier()
    if comm.rank == 0:
        shutil.rmtree(url)


def write_and_sync(path: Path, data: np.ndarray) -> None:
    """Write a new file and wait until it is durable: the floor of a save."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)
    os.close(descriptor)


def read(path: Path, data: np.ndarray) -> None:
    """Fill an array from a file: the floor of a load."""
    descriptor = os.open(path, os.O_RDONLY)
    at = 0
    while at < len(data):
        at += os.preadv(descriptor, [data[at:]], at)
    os.close(descriptor)


def like(leaf: object) -> object:
    """Make an empty place of a leaf's layout."""
    if isinstance(leaf, distckpt.Shard):
        return distckpt.Shard(np.empty_like(leaf.array), leaf.offset, leaf.global_shape)
    return np.empty_like(leaf)


def columns_of(leaf: object, rank: int, ranks: int) -> object:
    """Make an empty place that wants columns where the leaf is rows."""
    if not isinstance(leaf, distckpt.Shard):
        return np.empty_like(leaf)
    region = distckpt.Mesh(tp=ranks, rank=rank).region((None, "tp"), leaf.global_shape)
    return distckpt.Shard(np.empty(region.shape, leaf.array.dtype), region.start, leaf.global_shape)


def table(report: dict[str, object]) -> str:
    """Write the report as Markdown."""
    facts = report["machine"]
    runs = report["runs"]
    if not isinstance(facts, dict) or not isinstance(runs, list):
        raise TypeError("not a report of this program")
    described = ", ".join(f"{name} {value}" for name, value in facts.items())
    lines = [
        f"{described}. Ratios: median [quartiles] of pairs in one run; smaller is better.",
        "",
        "| what ÷ floor | where | ranks | ratio | MB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, floor in ROWS.items():
        for run in runs:
            low, middle, high = statistics.quantiles(run["ratios"][name], n=4)
            lines.append(
                f"| {name} ÷ {floor} | {run['place']} | {run['ranks']} "
                f"| {middle:.2f} [{low:.2f}, {high:.2f}] | {run['bytes'] / 1e6:.0f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
