"""Loops that compute, as training does, beside which saves run."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

_SIDE = 192  # three matrices of this size stay in a core's cache: memory's speed is not measured


class Loop:
    """A CPU-bound loop of numpy; a step is a matrix product and a non-linearity, about 1 ms."""

    def __init__(self) -> None:
        rng = np.random.default_rng(7)
        self._weights = rng.standard_normal((_SIDE, _SIDE), np.float32) / _SIDE
        self._input = rng.standard_normal((_SIDE, _SIDE), np.float32)
        self._output = np.empty_like(self._input)
        self.run(20)
        began = time.perf_counter()
        self.run(100)
        self.step_s = (time.perf_counter() - began) / 100

    def run(self, steps: int) -> None:
        """Make so many steps."""
        for _ in range(steps):
            np.matmul(self._input, self._weights, out=self._output)
            np.tanh(self._output, out=self._output)
            np.add(self._input, self._output, out=self._output)


def spin(until: Callable[[], bool]) -> float:
    """Run Python, which holds the interpreter's lock, until asked to stop.

    Returns:
        Additions a second.
    """
    began, count = time.perf_counter(), 0
    while not until():
        for _ in range(20_000):
            count += 1
    return count / (time.perf_counter() - began)
