"""What a rank holds, described in columns: the input of the write plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distckpt.region import boxes_of_runs
from distckpt.state import TensorLeaf

BOX, RUN = 0, 1


@dataclass(frozen=True, slots=True)
class Holdings:
    """What one rank holds, as columns: an item for each of its tensors or pieces of one.

    Attributes:
        names: The tensors' names, each once.
        dtype: (items,) dtype codes.
        ndim: (items,) dimensions before padding.
        kind: (items,) `BOX` or `RUN`.
        shape: (items, width) shapes of the whole tensors.
        start: (items, width) of a box; a run's first element in the last column, zeros before it.
        stop: (items, width) likewise.
        per_rank: Names of the rank's per-rank values.
    """

    names: tuple[str, ...]
    dtype: np.ndarray
    ndim: np.ndarray
    kind: np.ndarray
    shape: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    per_rank: tuple[str, ...] = ()

    def boxes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cut runs into boxes.

        Returns:
            How many boxes each item has (a run without elements has none), and all boxes' start and
            stop, by item.
        """
        runs = np.flatnonzero((self.kind == RUN) & (self.start[:, -1] < self.stop[:, -1]))
        plain = np.flatnonzero(self.kind == BOX)
        of, start, stop = boxes_of_runs(self.shape[runs], self.start[runs, -1], self.stop[runs, -1])
        item = np.concatenate([plain, runs[of]])
        order = np.argsort(item, kind="stable")
        return (
            np.bincount(item, minlength=len(self.names)),
            np.concatenate([self.start[plain], start])[order],
            np.concatenate([self.stop[plain], stop])[order],
        )


def describe(tensors: Sequence[TensorLeaf], per_rank: Sequence[str] = ()) -> Holdings:
    """Describe this rank's tensors in columns."""
    count = len(tensors)
    width = max((len(leaf.shape) for leaf in tensors), default=1) or 1
    shape = np.ones((count, width), np.int64)
    start = np.zeros((count, width), np.int64)
    stop = np.ones((count, width), np.int64)
    kind = np.zeros(count, np.uint8)
    for row, leaf in enumerate(tensors):
        first = width - len(leaf.shape)
        shape[row, first:] = leaf.shape
        if leaf.region is not None:
            start[row, first:] = leaf.region.start
            stop[row, first:] = leaf.region.stop
        else:
            kind[row] = RUN
            stop[row] = 0
            start[row, -1] = leaf.start or 0
            stop[row, -1] = start[row, -1] + leaf.array.size
    return Holdings(
        tuple(leaf.name for leaf in tensors),
        np.array([leaf.dtype.code for leaf in tensors], np.uint8),
        np.array([len(leaf.shape) for leaf in tensors], np.uint8),
        kind,
        shape,
        start,
        stop,
        tuple(per_rank),
    )
