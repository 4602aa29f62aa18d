"""Ranks in step, contenders that take turns, and what pairs of measurements say."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# How often a rank looks whether the others have come, at first and at last: to spin, or to look all
# the time, would take a core from who works.
_PAUSE_S, _LONGEST_PAUSE_S = 5e-5, 1e-3
# How much later than the last has come all begin: those who had waited for long come a pause too
# late, and what one waits for another would be taken for the time that it needs itself.
_HEAD_START_S = 2e-3


class Ranks:
    """All ranks of a session.

    Args:
        comm: An mpi4py communicator; None for a single process.
    """

    def __init__(self, comm: Any = None) -> None:  # noqa: ANN401  mpi4py may not be installed
        self.comm = comm
        self.rank: int = comm.Get_rank() if comm is not None else 0
        self.size: int = comm.Get_size() if comm is not None else 1

    def meet(self) -> None:
        """Collective. Wait for all ranks, quietly."""
        if self.size > 1:
            _wait(self.comm.Ibarrier())

    def gather(self, value: object) -> list[Any]:
        """Collective. Return every rank's value, on every rank."""
        self.meet()
        return self.comm.allgather(value) if self.size > 1 else [value]

    def most(self, value: float) -> float:
        """Collective. Return the highest of all ranks' numbers."""
        return float(max(self.gather(value)))

    def timed(self, action: Callable[[], object]) -> float:
        """Collective. Return the seconds of the slowest rank; all begin together.

        All ranks are on one machine, and so have one clock.
        """
        start = self.most(time.perf_counter()) + _HEAD_START_S
        time.sleep(max(0.0, start - time.perf_counter()))
        began = time.perf_counter()
        action()
        return self.most(time.perf_counter() - began)


def _wait(request: Any) -> None:  # noqa: ANN401
    pause_s = _PAUSE_S
    while not request.Test():
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.2, _LONGEST_PAUSE_S)


# One measurement: what was measured → a number. What prepares and cleans up is not in the numbers.
Contender = Callable[[], Mapping[str, float]]


def take_turns(
    contenders: Sequence[Contender], rounds: int, *, warm_up: int = 1
) -> dict[str, list[float]]:
    """Let contenders run one after another, round by round.

    Args:
        contenders: What runs.
        rounds: How many count.
        warm_up: How many before don't.

    Returns:
        What was measured → a number a round.
    """
    found: dict[str, list[float]] = {}
    for _ in range(warm_up + rounds):
        for run in contenders:
            for name, value in run().items():
                found.setdefault(name, []).append(value)
    return {name: values[warm_up:] for name, values in found.items()}


def ratios(values: Sequence[float], floor: Sequence[float]) -> list[float]:
    """Divide pair by pair."""
    return [value / base for value, base in zip(values, floor, strict=True)]


def fastest(*series: Sequence[float]) -> Sequence[float]:
    """Return the series with the lowest median."""
    return min(series, key=statistics.median)


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some numbers, and the quartiles around it."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Take them of at least one number."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, median, high)
