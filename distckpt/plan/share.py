"""Sharing out what several ranks hold, so that all store as many bytes as can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distckpt.plan.balance import balance
from distckpt.plan.columns import distinct_lists
from distckpt.plan.merge import Tensors
from distckpt.plan.segments import Segments

# A cut is moved by at most so much of what its ranks store: to a tensor's end, so that no tiny
# fragments are made, or to the end of a row, where one box is left of three.
_SNAP_FRACTION = 1 / 1000


@dataclass(frozen=True, slots=True)
class Shares:
    """Which rank stores which elements of which segment.

    Attributes:
        segment: (shares,) the segment.
        rank: (shares,) who stores it.
        pair: (shares,) which pair of the segments says so.
        begin: (shares,) its first element in the segment.
        end: (shares,) one past its last.
    """

    segment: np.ndarray
    rank: np.ndarray
    pair: np.ndarray
    begin: np.ndarray
    end: np.ndarray


@dataclass(frozen=True, slots=True)
class _Group:
    """Ranks that hold the same segments, ascending, and which of a segment's pairs each is in."""

    ranks: np.ndarray
    pair: np.ndarray


def share_out(
    tensors: Tensors, segments: Segments, sets: Sequence[np.ndarray], load: np.ndarray
) -> Shares:
    """Share out what several ranks hold among them.

    Args:
        tensors: All tensors.
        segments: What is to be stored.
        sets: The sets of ranks that hold it.
        load: (ranks,) bytes that each rank stores besides.
    """
    count = len(segments.tensor)
    edges = np.searchsorted(segments.pair_segment, np.arange(count + 1))
    firsts, kind = distinct_lists(segments.pair_holders, edges)
    groups = [
        _group([sets[number] for number in segments.pair_holders[edges[row] : edges[row + 1]]])
        for row in firsts.tolist()
    ]
    members = np.array([len(group.ranks) for group in groups], np.int64)
    size_bytes = segments.size * tensors.itemsize[segments.tensor]
    lowest = np.array([group.ranks[0] for group in groups], np.int64)
    single = np.flatnonzero(members[kind] == 1) if count else np.zeros(0, np.int64)
    shared = np.flatnonzero(members[kind] > 1) if count else np.zeros(0, np.int64)
    load = load.copy()
    np.add.at(load, lowest[kind[single]], size_bytes[single])
    # Line by line: the segments of each group, laid end to end.
    place = segments.start[shared].T[::-1]
    shared = shared[
        np.lexsort((segments.first[shared], *place, segments.tensor[shared], kind[shared]))
    ]
    used, line = np.unique(kind[shared], return_inverse=True)
    amounts = np.zeros(len(used), np.int64)
    np.add.at(amounts, line.reshape(-1), size_bytes[shared])
    mine = [groups[number] for number in used.tolist()]
    shares = balance(
        load,
        [(group.ranks, amount) for group, amount in zip(mine, amounts.tolist(), strict=True)],
    )
    for group, share in zip(mine, shares, strict=True):
        load[group.ranks] += share
    lightest = np.array([load[group.ranks].min() for group in mine], np.int64)
    row, member, begin, end = _cut_lines(
        tensors, segments, shared, amounts, shares, snap_bytes=lightest * _SNAP_FRACTION
    )
    ranks = np.concatenate([*(group.ranks for group in mine), np.zeros(0, np.int64)])
    pairs = np.concatenate([*(group.pair for group in mine), np.zeros(0, np.int64)])
    return Shares(
        np.concatenate([single, shared[row]]),
        np.concatenate([lowest[kind[single]], ranks[member]]),
        np.concatenate([edges[single], edges[shared[row]] + pairs[member]]),
        np.concatenate([np.zeros(len(single), np.int64), begin]),
        np.concatenate([segments.size[single], end]),
    )


def _group(sets: Sequence[np.ndarray]) -> _Group:
    if len(sets) == 1:
        return _Group(sets[0], np.zeros(len(sets[0]), np.int64))
    ranks = np.concatenate(sets)
    pair = np.repeat(np.arange(len(sets)), [len(found) for found in sets])
    order = np.argsort(ranks)
    return _Group(ranks[order], pair[order])


def _cut_lines(
    tensors: Tensors,
    segments: Segments,
    rows: np.ndarray,
    amounts: np.ndarray,
    shares: Sequence[np.ndarray],
    *,
    snap_bytes: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Cut the lines of all groups, one after another, into their members' shares.

    Args:
        tensors: All tensors.
        segments: All segments.
        rows: The segments of the lines, in order.
        amounts: (lines,) bytes of each.
        shares: Of each line, one a member.
        snap_bytes: (lines,) how far a cut may be moved.

    Returns:
        Columns: index into *rows*, number of the member over all lines, first and one past the last
        element in the segment.
    """
    if not len(rows):
        return (np.zeros(0, np.int64),) * 4
    itemsize = tensors.itemsize[segments.tensor[rows]]
    first = segments.first[rows]
    ends = np.cumsum(segments.size[rows] * itemsize)
    starts = ends - segments.size[rows] * itemsize
    line_ends = np.cumsum(amounts)
    members = np.array([len(share) for share in shares], np.int64)
    line = np.repeat(np.arange(len(members)), members)
    # Every member but a line's last has a cut at its end.
    cut_ends = np.cumsum(np.concatenate(shares))
    at = np.searchsorted(ends, np.minimum(cut_ends, line_ends[line] - 1), side="right")
    into = (cut_ends - starts[at]) // itemsize[at] * itemsize[at]
    snap = snap_bytes[line]
    unit = itemsize[at].copy()
    extent = (segments.stop - segments.start)[rows[at]]
    row_bytes = itemsize[at].copy()
    for dim in range(extent.shape[1] - 1, 0, -1):
        row_bytes *= extent[:, dim]
        unit = np.where(row_bytes <= snap, row_bytes, unit)
    begin = first[at] * itemsize[at]
    into = np.maximum((begin + into) // unit * unit - begin, 0)
    whole = ends[at] - starts[at]
    into = np.where(into < snap, 0, np.where(whole - into < snap, whole, into))
    cuts = starts[at] + into
    cuts[np.cumsum(members) - 1] = line_ends
    cuts = np.maximum.accumulate(cuts)
    edges = np.unique(np.concatenate([[0], cuts, ends]))
    low, high = edges[:-1], edges[1:]
    row = np.searchsorted(ends, low, side="right")
    return (
        row,
        np.searchsorted(cuts, low, side="right"),
        (low - starts[row]) // itemsize[row],
        (high - starts[row]) // itemsize[row],
    )
