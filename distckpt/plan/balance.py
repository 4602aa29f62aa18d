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
    another (a mesh's do), the first pass from the smallest group up is already there.

    Args:
        load: (ranks,) what each rank has anyway.
        groups: (ranks of the group, amount) each.
        rounds: At most so many passes.

    Returns:
        For each group, the amount for each of its ranks: whole numbers that add up to the group's
        amount.
    """
    total = load.astype(np.float64)
    shares = [np.zeros(len(ranks)) for ranks, _ in groups]
    order = sorted(range(len(groups)), key=lambda index: len(groups[index][0]))
    tolerance = 1e-4 * max(1.0, (total.sum() + sum(amount for _, amount in groups)) / len(load))
    for _ in range(rounds if len(groups) > 1 else 1):
        moved = 0.0
        for index in order:
            ranks, amount = groups[index]
            others = total[ranks] - shares[index]
            new = _pour(others, amount)
            moved = max(moved, float(np.abs(new - shares[index]).max()))
            total[ranks] = others + new
            shares[index] = new
        if moved <= tolerance:
            break
    whole = []
    for share, (_, amount) in zip(shares, groups, strict=True):
        edges = np.rint(np.cumsum(share)).astype(np.int64)
        edges[-1] = amount
        whole.append(np.diff(np.minimum(edges, amount), prepend=0))
    return whole


def _pour(level: np.ndarray, amount: float) -> np.ndarray:
    """Water-filling: how much each vessel gets when *amount* fills up the lowest first."""
    order = np.argsort(level, kind="stable")
    sorted_level = level[order]
    # With the k lowest filled, the surface stands at (amount + sum of their levels) / k.
    surface = (amount + np.cumsum(sorted_level)) / np.arange(1, len(level) + 1)
    filled = int(np.flatnonzero(surface >= sorted_level)[-1])
    poured: np.ndarray = np.maximum(surface[filled] - level, 0.0)
    return poured
