"""One process group: some measurements over one state in one place. Started by `run`.

::

    mpirun -n 2 python -m mpi4py -m benchmarks.suite.session job.json folder found.jsonl

A line of JSON is written for each measurement that has come to its end, so that what one of them
breaks is lost for that one only.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.suite import against, ours
from benchmarks.suite.bench import Bench, Unavailable
from benchmarks.suite.jobs import Job
from benchmarks.suite.peers import Peer
from benchmarks.suite.rows import Measured
from benchmarks.suite.turns import Ranks


def main() -> None:
    """Measure what the job says."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    folder, output = Path(sys.argv[2]), Path(sys.argv[3])
    # A peer's advice about its own future is not for this program's user.
    warnings.simplefilter("ignore")
    comm = _world() if job.mpi else None
    ranks = Ranks(comm)
    bench = Bench(ranks, folder, place=job.place, state=job.state, pairs=job.pairs, mpi=job.mpi)
    todo = {name: ours.MEASURES[name][0] for name in job.measures if not job.peer}
    if job.peer:
        todo = _with_peer(job, bench)
    for name, measure in todo.items():
        line: dict[str, Any] = {"measure": name, "rows": [], "missing": ""}
        try:
            line["rows"] = [row.to_json() for row in measure(bench)]
        except Unavailable as exc:
            line["missing"] = str(exc)
        except Exception as exc:  # noqa: BLE001  the program goes on without this row
            # The other ranks may wait for this one: end them all.
            traceback.print_exc()
            line["missing"] = f"{type(exc).__name__}: {exc}"
            _append(output, line)
            if comm is not None:
                comm.Abort(1)
            sys.exit(1)
        if ranks.rank == 0:
            _append(output, line)


def _with_peer(job: Job, bench: Bench) -> dict[str, Callable[[Bench], list[Measured]]]:
    """Return the measurements beside a peer; if it isn't there, each says so."""
    try:
        peer = against.make(job.peer, bench)
    except Unavailable as exc:
        why = str(exc)

        def unavailable(_: Bench) -> list[Measured]:
            raise Unavailable(why)

        return dict.fromkeys(job.measures, unavailable)
    return {name: partial(_measure, against.MEASURES[name], peer) for name in job.measures}


def _measure(
    measure: Callable[[Bench, Peer], list[Measured]], peer: Peer, bench: Bench
) -> list[Measured]:
    return measure(bench, peer)


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _world() -> Any:  # noqa: ANN401
    from mpi4py import MPI  # noqa: PLC0415  not everywhere installed

    return MPI.COMM_WORLD


def to_json(job: Job) -> str:
    """Write a job down."""
    return json.dumps(asdict(job))


if __name__ == "__main__":
    main()
