"""What a measurement works with: ranks, a state, folders in one place, and floors over them."""

from __future__ import annotations

import gc
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import distckpt
from benchmarks.suite import floors, states
from benchmarks.suite.rows import Measured
from benchmarks.suite.training import Loop
from benchmarks.suite.turns import Contender, Ranks

# From here on an array is copied as fast as it is long.
_LARGE_BYTES = 256 << 10


class InFlight(Protocol):
    """A save that runs in the background."""

    def done(self) -> bool:
        """Whether it is committed."""
        ...

    def wait(self) -> object:
        """Wait until it is committed; raises what went wrong."""
        ...


Save = Callable[[Path], object]
Start = Callable[[Path], InFlight]
Load = Callable[[Path], object]


class Unavailable(Exception):
    """This can't be measured here; the text says why."""


class Bench:
    """One session's means.

    Args:
        ranks: All ranks.
        folder: An empty folder in the place that is measured, the same for all ranks.
        place: That place's name.
        state: Name in `states.STATES`.
        pairs: How many pairs count.
        mpi: Which MPI library it is.
    """

    def __init__(
        self, ranks: Ranks, folder: Path, *, place: str, state: str, pairs: int, mpi: str = ""
    ) -> None:
        self.ranks = ranks
        self.place = place
        self.pairs = pairs
        self._folder = folder
        self.state_name = state
        self._mpi = mpi
        self._made = 0
        self.peer = ""  # who is measured beside distckpt
        self.saved: Mapping[str, object] = {}  # by distckpt, beside it
        self.state = states.STATES[state](ranks.rank, ranks.size)

    @property
    def comm(self) -> Any:  # noqa: ANN401  an mpi4py communicator
        """The communicator, for distckpt."""
        return self.ranks.comm

    @cached_property
    def plan(self) -> distckpt.SavePlan:
        """What a save writes."""
        return distckpt.plan(self.state, comm=self.comm)

    @cached_property
    def mine(self) -> np.ndarray:
        """As many bytes as this rank writes, in aligned memory (uint8)."""
        return floors.aligned(self.plan.rank_bytes[self.ranks.rank])

    @cached_property
    def warm(self) -> np.ndarray:
        """As much memory, which has its pages."""
        return floors.aligned(self.mine.nbytes)

    @cached_property
    def loop(self) -> Loop:
        """A training loop."""
        return Loop()

    def row(
        self,
        key: str,
        values: list[float],
        seconds: Mapping[str, list[float]] | None = None,
        **more: Any,  # noqa: ANN401  the fields of `Measured` that are left
    ) -> Measured:
        """Make a row of what was measured here: numbers, and what they were made of."""
        return Measured(
            row=key,
            state=self.state_name,
            place=self.place,
            ranks=self.ranks.size,
            mpi=self._mpi,
            values=values,
            seconds={name: statistics.median(found) for name, found in (seconds or {}).items()},
            nbytes=self.plan.bytes,
            **more,
        )

    # -------------------------------------------------------------------------------------- folders

    def fresh(self) -> Path:
        """Name a folder that is not there yet, the same on all ranks."""
        self._made += 1
        return self._folder / f"{self._made:04}"

    def remove(self, path: Path) -> None:
        """Collective. Remove a folder, and have the file system be done with that."""
        self.ranks.meet()
        if self.ranks.rank == 0:
            shutil.rmtree(path, ignore_errors=True)
            if self.place != "tmpfs":
                os.sync()  # a later fsync would have to, and would look slow
        self.ranks.meet()

    @contextmanager
    def checkpoint(self) -> Iterator[Path]:
        """Collective. Save the state, and remove it in the end."""
        path = self.fresh()
        distckpt.save(path, self.state, comm=self.comm)
        try:
            yield path
        finally:
            self.remove(path)

    @contextmanager
    def new_comm(self) -> Iterator[Any]:
        """Collective. Make a communicator of which distckpt knows nothing: no plan, no memory."""
        comm = self.comm.Dup()
        try:
            yield comm
        finally:
            self.ranks.meet()
            comm.Free()
            gc.collect()

    # --------------------------------------------------------------------------------------- saving

    def saving(self, name: str, save: Save) -> Contender:
        """Measure a blocking save to a new folder."""

        def run() -> Mapping[str, float]:
            path = self.fresh()
            seconds = self.ranks.timed(lambda: save(path))
            self.remove(path)
            return {name: seconds}

        return run

    def starting(self, name: str, start: Start) -> Contender:
        """Measure an asynchronous save: its stall, and until it is committed."""

        def run() -> Mapping[str, float]:
            path = self.fresh()
            found: list[InFlight] = []
            stall = self.ranks.timed(lambda: found.append(start(path)))
            rest = self.ranks.timed(found[0].wait)
            self.remove(path)
            return {f"{name}: stall": stall, f"{name}: committed": stall + rest}

        return run

    def writing(self, name: str, write: Callable[[Path, np.ndarray], None]) -> Contender:
        """Measure a floor: each rank writes as many bytes as a save does."""

        def run() -> Mapping[str, float]:
            path = self.fresh()
            path.mkdir(exist_ok=True)
            seconds = self.ranks.timed(lambda: write(path / f"{self.ranks.rank}", self.mine))
            self.remove(path)
            return {name: seconds}

        return run

    def copying(self, name: str) -> Contender:
        """Measure a floor: each rank copies as many bytes as a save does, to memory with pages.

        Out of the arrays of the state, where they are large: what the kernel has given them, small
        pages or huge ones, is a quarter of the time. In place of small ones, one array.
        """

        def copy() -> None:
            at = 0
            for source in self.sources:
                np.copyto(self.warm[at : at + len(source)], source)
                at += len(source)

        return lambda: {name: self.ranks.timed(copy)}

    def copying_one(self, name: str) -> Contender:
        """Measure the same out of one array in huge pages: the least that a copy can take."""
        return lambda: {name: self.ranks.timed(lambda: np.copyto(self.warm, self.mine))}

    @cached_property
    def sources(self) -> list[np.ndarray]:
        """As many bytes as this rank writes, out of the state's arrays (uint8), if large."""
        left, found = self.mine.nbytes, []
        for leaf in self.state.values():
            array = states.flat_bytes(states.array_of(leaf))
            if len(array) >= _LARGE_BYTES and left:
                found.append(array[:left])
                left -= len(found[-1])
        return [*found, self.mine[:left]]

    def slowing(self, name: str, start: Start, least_s: float) -> Contender:
        """Measure by how much a save slows down a loop that computes, from its call to its commit.

        The loop goes on until the save is committed, so that none of its work is left out. Of all
        ranks the slowest counts, for which the others would have to wait.

        Args:
            name: Of the result.
            start: Starts the save.
            least_s: How long the loop runs at least.
        """
        steps = max(1, int(least_s / self.loop.step_s))

        def run() -> Mapping[str, float]:
            self.ranks.meet()
            began = time.perf_counter()
            self.loop.run(steps)
            step_s = (time.perf_counter() - began) / steps
            path = self.fresh()
            self.ranks.meet()
            began = time.perf_counter()
            pending = start(path)
            self.loop.run(steps)
            made = steps
            while not pending.done():
                self.loop.run(steps // 20 + 1)
                made += steps // 20 + 1
            slowed = time.perf_counter() - began - made * step_s
            slowest = self.ranks.most(slowed)
            pending.wait()
            self.remove(path)
            return {name: slowest}

        return run

    # -------------------------------------------------------------------------------------- loading

    def loading(self, name: str, load: Load, path: Path) -> Contender:
        """Measure a load of what is there."""
        return lambda: {name: self.ranks.timed(lambda: load(path))}
