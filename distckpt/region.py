"""Boxes in a tensor's index space: one of them (`Region`), or many as columns.

Columns of boxes are two int64 arrays ``start`` and ``stop`` of shape (number of boxes, dimensions).
Boxes are half-open. The order of elements is always C order (last dimension fastest).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, order=True)
class Region:
    """A half-open box in a tensor's global index space. A scalar's region is ``Region((), ())``.

    Attributes:
        start: Index of the first element, one int a dimension.
        stop: One past the last, in each dimension. A box may be empty.

    Raises:
        ValueError: Start and stop that make no box.

    Examples:
        >>> Region((0, 2), (4, 6)) & Region((2, 0), (8, 3))
        Region(start=(2, 2), stop=(4, 3))
        >>> print(Region((0, 2), (4, 6)))
        [0:4, 2:6]
    """

    start: tuple[int, ...]
    stop: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.start) != len(self.stop):
            raise ValueError(f"start {self.start} and stop {self.stop} differ in dimensions")
        for first, last in zip(self.start, self.stop, strict=True):
            if first < 0 or last < first:
                raise ValueError(f"not a box: start {self.start}, stop {self.stop}")

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Region:
        """Make the region of a whole tensor."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Extent in each dimension."""
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The numpy index that selects this region of the whole tensor."""
        return tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))

    def __and__(self, other: Region) -> Region | None:
        """Return the common part; None if there is none."""
        if len(self.start) != len(other.start):
            raise ValueError(f"{self} and {other} differ in dimensions")
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return Region(start, stop) if all(a < b for a, b in zip(start, stop, strict=True)) else None

    def relative_to(self, origin: tuple[int, ...]) -> Region:
        """Shift, so that *origin* becomes the zero point."""
        return Region(
            tuple(a - o for a, o in zip(self.start, origin, strict=True)),
            tuple(b - o for b, o in zip(self.stop, origin, strict=True)),
        )

    def shifted(self, origin: tuple[int, ...]) -> Region:
        """Shift back: the zero point becomes *origin*."""
        return Region(
            tuple(a + o for a, o in zip(self.start, origin, strict=True)),
            tuple(b + o for b, o in zip(self.stop, origin, strict=True)),
        )

    def __str__(self) -> str:
        return "[" + ", ".join(f"{a}:{b}" for a, b in zip(self.start, self.stop, strict=True)) + "]"


def boxes_of_runs(
    shape: np.ndarray, start: np.ndarray, stop: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut runs of C-order elements into boxes, at most 2·ndim−1 each.

    A run is cut where its ends are not aligned to whole rows, planes, and so on: small boxes
    towards the ends, one large one in the middle. Each box is itself a run, and the boxes of a run
    follow one another.

    Args:
        shape: (n, ndim) the shape that each run lies in; ndim ≥ 1, no extent 0.
        start: (n,) first element of each run.
        stop: (n,) one past the last. An empty run has no boxes.

    Returns:
        The index of each box's run, and the boxes' start and stop, in order of run and element.
    """
    count, ndim = shape.shape
    # unit[d]: elements in a whole sub-tensor of the dimensions d, d+1, …
    unit = np.ones((ndim + 1, count), np.int64)
    for dim in range(ndim - 1, -1, -1):
        unit[dim] = unit[dim + 1] * shape[:, dim]
    low = -(-start // unit) * unit
    high = stop // unit * unit
    run_of, starts, stops, first = [], [], [], []

    def add(where: np.ndarray, level: int, begin: np.ndarray, end: np.ndarray) -> None:
        """Add the boxes of whole sub-tensors of *level*, all within one of the level above."""
        index = np.flatnonzero(where & (begin < end))
        if not index.size:
            return
        begin, end = begin[index], end[index]
        box_start = np.zeros((index.size, ndim), np.int64)
        box_stop = shape[index].copy()
        for dim in range(level):
            box_start[:, dim] = begin // unit[dim + 1, index] % shape[index, dim]
            box_stop[:, dim] = box_start[:, dim] + 1
        if level:
            box_stop[:, level - 1] = box_start[:, level - 1] + (end - begin) // unit[level, index]
        run_of.append(index)
        starts.append(box_start)
        stops.append(box_stop)
        first.append(begin)

    fits = low <= high  # (level, run): a boundary of this level lies in the run
    for level in range(ndim, -1, -1):
        coarser = fits[level - 1] if level else np.zeros(count, bool)
        add(fits[level] & ~coarser, level, low[level], high[level])
        if level:
            add(coarser, level, low[level], low[level - 1])
            add(coarser, level, high[level - 1], high[level])
    if not run_of:
        empty = np.zeros((0, ndim), np.int64)
        return np.zeros(0, np.int64), empty, empty
    runs = np.concatenate(run_of)
    order = np.lexsort((np.concatenate(first), runs))
    return runs[order], np.concatenate(starts)[order], np.concatenate(stops)[order]


def boxes_of_run(shape: tuple[int, ...], start: int, stop: int) -> list[Region]:
    """Cut one run of C-order elements into boxes; see `boxes_of_runs`.

    Examples:
        >>> [str(box) for box in boxes_of_run((4, 3), 2, 10)]
        ['[0:1, 2:3]', '[1:3, 0:3]', '[3:4, 0:1]']
    """
    if start >= stop:
        return []
    if start == 0 and stop == math.prod(shape):
        return [Region.whole(shape)]
    _, starts, stops = boxes_of_runs(
        np.array([shape], np.int64), np.array([start], np.int64), np.array([stop], np.int64)
    )
    return [
        Region(tuple(a), tuple(b)) for a, b in zip(starts.tolist(), stops.tolist(), strict=True)
    ]


def ranges(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Concatenate the ranges ``first[i] … first[i] + count[i]``."""
    ends = np.cumsum(count)
    total = int(ends[-1]) if len(ends) else 0
    found: np.ndarray = np.arange(total) + np.repeat(first - (ends - count), count)
    return found
