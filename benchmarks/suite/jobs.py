"""Which sessions there are: what is measured where, over which state, by how many ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

PLACES = ("disk", "tmpfs")
_SAVING = ("durable_save", "async_save", "first_stall", "lazy_save", "lazy_slowdown", "slowdown")
_LOADING = ("warm_load", "cold_load", "partial_load")
_MAIN = ("durable_save", "async_save", "warm_load")
_PEER = ("save", "async_save", "load", "slowdown")


@dataclass(frozen=True, slots=True)
class Job:
    """One session.

    Attributes:
        measures: Names in `ours.MEASURES`, or of a peer's in `against.MEASURES`.
        state: Name in `states.STATES`.
        place: Where.
        ranks: How many.
        pairs: How many pairs count.
        peer: Module in `peers`; empty for distckpt alone.
        mpi: ``"mpich"`` or ``"openmpi"``; empty for one process without MPI.
    """

    measures: Sequence[str]
    state: str
    place: str
    ranks: int
    pairs: int
    peer: str = ""
    mpi: str = "mpich"

    def __str__(self) -> str:
        who = f"{self.peer} · " if self.peer else ""
        return f"{who}{self.state} · {self.place} · {self.ranks} ranks"


def all_jobs() -> Iterator[Job]:
    """Yield the sessions of the whole suite, the most telling first."""
    for place in PLACES:
        yield Job(_SAVING + _LOADING, "transformer", place, 2, 10)
    for place in PLACES:
        yield Job(_PEER, "transformer", place, 2, 10, peer="dcp")
    yield from _aspects("transformer", 10)
    for peer in ("torchsnapshot", "orbax", "safetensors", "numpy_savez", "mindspore"):
        ranks = 2 if peer == "torchsnapshot" else 1
        mpi = "" if peer == "mindspore" else "mpich"
        for place in PLACES:
            # They take long, and differ by more than the spread of a few pairs. One rank leaves a
            # core free: there is nothing to be slowed down.
            measures = _PEER if place == "disk" and ranks > 1 else _PEER[:3]
            yield Job(measures, "transformer", place, ranks, 3, peer=peer, mpi=mpi)
    for state, ranks in (("transformer", 1), ("transformer", 4), ("few large", 2)):
        yield Job(_MAIN, state, "disk", ranks, 10)
    yield Job(_MAIN, "transformer", "tmpfs", 4, 10)
    for place in PLACES:
        yield Job(_MAIN, "many small", place, 2, 10)


def quick_jobs() -> Iterator[Job]:
    """Yield fewer sessions, over less data."""
    for place in PLACES:
        yield Job(_SAVING + _LOADING, "transformer, small", place, 2, 5)
    yield Job(_PEER, "transformer, small", "disk", 2, 5, peer="dcp")
    yield from (job for job in _aspects("transformer, small", 5) if job.mpi != "openmpi")


def _aspects(transformer: str, pairs: int) -> Iterator[Job]:
    yield Job(("reshard",), transformer, "tmpfs", 4, pairs)
    for place in PLACES:
        yield Job(("spinner",), transformer, place, 1, pairs)
        yield Job(("small", "partial_load"), "many small", place, 2, pairs)
    for mpi in ("mpich", "openmpi"):
        for ranks in (2, 4):
            yield Job(("commit",), "transformer, small", "tmpfs", ranks, pairs, mpi=mpi)
    yield Job(("memory",), transformer, "disk", 2, pairs)


def chosen(
    jobs: Iterable[Job],
    *,
    measures: Sequence[str] | None = None,
    peers: Sequence[str] | None = None,
    place: str | None = None,
    ranks: int | None = None,
    state: str | None = None,
    pairs: int | None = None,
) -> Iterator[Job]:
    """Yield the sessions that are asked for; None asks for all.

    Args:
        jobs: All.
        measures: Only these measurements of distckpt, and no peers.
        peers: Only sessions with these; ``""`` stands for those with none.
        place: Only there.
        ranks: Only by so many.
        state: Only those whose name begins so.
        pairs: So many pairs instead of the session's own.
    """
    for job in jobs:
        some = [name for name in job.measures if measures is None or name in measures]
        if (
            some
            and (measures is None or not job.peer)
            and (peers is None or job.peer in peers)
            and place in {None, job.place}
            and ranks in {None, job.ranks}
            and (state is None or job.state.startswith(state))
        ):
            yield replace(job, measures=some, pairs=pairs or job.pairs)
