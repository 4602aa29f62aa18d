"""Sharing work out evenly among ranks that can all do it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def balance(
    load: np.ndarray, groups: Sequence[tuple[np.ndarray, int]], *, rounds: int = 50
) -> list[np.ndarray]:
    """Share amounts out among groups of ranks, so that the loads are as even as they can be.

    Each group in turn pours its amount onto its ranks so that it fills up the lowest
    (water-filling); repeated until nothing moves. This descends on the sum of the squared loads, a
    convex function, block by block, so it ends at the best there is; when groups lie within one
    another (a mesh's do), the first pass from the smallest group up is already there. Groups
    without a common rank don't notice one another, and pour at once.

    Args:
        load: (ranks,) what each rank has anyway.
        groups: (ranks of the group, amount) each.
        rounds: At most so many passes.

    Returns:
        For each group, the amount for each of its ranks: whole numbers that add up to the group's
        amount.
    """
    if not groups:
        return []
    total = load.astype(np.float64)
    batches = [
        _Batch([groups[index] for index in some], some) for some in _batches(groups, len(load))
    ]
    tolerance = 1e-4 * max(1.0, (total.sum() + sum(amount for _, amount in groups)) / len(load))
    for _ in range(rounds if len(groups) > 1 else 1):
        moved = max(batch.pour(total) for batch in batches)
        if moved <= tolerance:
            break
    shares: list[np.ndarray] = [np.zeros(0, np.int64)] * len(groups)
    for batch in batches:
        for index, share in zip(batch.index, batch.whole(), strict=True):
            shares[index] = share
    return shares


def _batches(groups: Sequence[tuple[np.ndarray, int]], ranks: int) -> list[list[int]]:
    """Put groups of one size that have no rank in common together; smaller groups come first."""
    by_size: dict[int, list[int]] = {}
    for index, (members, _) in enumerate(groups):
        by_size.setdefault(len(members), []).append(index)
    batches = []
    for size in sorted(by_size):
        used = [0] * ranks  # bit b: the rank is in batch b of this size
        found: list[list[int]] = []
        for index in by_size[size]:
            members = groups[index][0].tolist()
            taken = 0
            for rank in members:
                taken |= used[rank]
            bit = ~taken & (taken + 1)
            for rank in members:
                used[rank] |= bit
            number = bit.bit_length() - 1
            if number == len(found):
                found.append([])
            found[number].append(index)
        batches += found
    return batches


class _Batch:
    """Groups of one size that have no rank in common.

    Attributes:
        index: Their numbers.
    """

    def __init__(self, groups: Sequence[tuple[np.ndarray, int]], index: list[int]) -> None:
        self.index = index
        self._ranks = np.stack([members for members, _ in groups])
        self._amount = np.array([amount for _, amount in groups], np.int64)
        self._share = np.zeros(self._ranks.shape)

    def pour(self, total: np.ndarray) -> float:
        """Pour all groups' amounts anew; return how much moved."""
        level = total[self._ranks] - self._share
        rows = np.arange(len(level))
        ordered = np.sort(level, axis=1)
        # With the k lowest filled, the surface stands at (amount + sum of their levels) / k.
        surface = self._amount[:, None] + np.cumsum(ordered, axis=1)
        surface /= np.arange(1, level.shape[1] + 1)
        filled = level.shape[1] - 1 - np.argmax((surface >= ordered)[:, ::-1], axis=1)
        share = np.maximum(surface[rows, filled][:, None] - level, 0.0)
        moved = float(np.abs(share - self._share).max())
        total[self._ranks] = level + share
        self._share = share
        return moved

    def whole(self) -> np.ndarray:
        """Return the shares as whole numbers, a row a group."""
        edges = np.rint(np.cumsum(self._share, axis=1)).astype(np.int64)
        edges[:, -1] = self._amount
        return np.diff(np.minimum(edges, self._amount[:, None]), axis=1, prepend=0)
