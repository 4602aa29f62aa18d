"""Who writes what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from distckpt.errors import LayoutError
from distckpt.layout import Layout
from distckpt.manifest import order_in_file
from distckpt.plan.balance import balance
from distckpt.plan.holdings import Holdings
from distckpt.plan.segments import Segments, Tensors, find_segments, merge
from distckpt.region import boxes_of_runs

REPLICA_RULES = ("check", "rank0", "trust")
Replicas = str | Mapping[str, str]

# safetensors refuses headers from 100 MB on; ours stay well below.
_HEADER_LIMIT_BYTES = 48 << 20
DEFAULT_SHARD_BYTES = 64 << 30
# A cut closer than this to a tensor's end is moved there, so that no tiny fragments are made …
_SNAP_BYTES = 64 << 10
# … unless it is a larger part of a rank's bytes than this.
_SNAP_FRACTION = 1 / 200


@dataclass(frozen=True, slots=True)
class WritePart:
    """What one rank writes and checks; a row of a table is a box, in the order of the rank's files.

    Attributes:
        item: (boxes,) which of the rank's items.
        source: (boxes,) first element in the item's C order; the box is a run of it.
        start: (boxes, width) the box in the whole tensor.
        stop: (boxes, width).
        file: (boxes,) global number of the file.
        check_item: (checks,) items of which a run must equal another rank's.
        check_source: (checks,) first element of the run in the item's C order.
        check_size: (checks,) its elements.
        check: (checks,) number of the comparison; the same on all ranks that take part in it.
        blob_file: Global number of the file for the per-rank values, or -1.
    """

    item: np.ndarray
    source: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    file: np.ndarray
    check_item: np.ndarray
    check_source: np.ndarray
    check_size: np.ndarray
    check: np.ndarray
    blob_file: int


@dataclass(frozen=True, slots=True)
class WritePlan:
    """A save, decided for all ranks; the static part of its manifest.

    Attributes:
        names: Tensor names in the order of the state.
        dtype: (tensors,) dtype codes.
        layout: (tensors,) index into layouts.
        layouts: Each distinct layout once.
        files: Number of shard files.
        file_rank: (files,) which rank writes each.
        parts: What each rank does.
        rank_bytes: (ranks,) bytes of tensors that each rank writes.
        per_rank: Names of the per-rank values.
        check_tensor: (comparisons,) the tensor of each comparison of replicas.
    """

    names: tuple[str, ...]
    dtype: np.ndarray
    layout: np.ndarray
    layouts: list[Layout]
    files: int
    file_rank: np.ndarray
    parts: list[WritePart]
    rank_bytes: np.ndarray
    per_rank: tuple[str, ...]
    check_tensor: np.ndarray


def plan_write(
    holdings: Sequence[Holdings],
    *,
    replicas: Replicas = "check",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> WritePlan:
    """Decide who writes what.

    Args:
        holdings: What each rank holds, by rank.
        replicas: ``"check"``, ``"rank0"`` or ``"trust"``, or a mapping of glob → one of these (the
            first that fits).
        max_shard_bytes: A rank's file is split before it exceeds this.

    Returns:
        The plan for all ranks.

    Raises:
        LayoutError: Ranks that disagree on a tensor, and tensors that are not covered exactly once:
            all of them.
    """
    ranks = len(holdings)
    tensors, items = merge(holdings)
    segments = find_segments(tensors, items)
    rule = _rules(tensors.names, replicas)
    segments = _keep_first_holder(segments, rule)
    shares = _share_out(tensors, segments, ranks)
    return _lay_out(
        tensors, segments, shares, rule=rule, holdings=holdings, max_shard_bytes=max_shard_bytes
    )


def _rules(names: Sequence[str], replicas: Replicas) -> np.ndarray:
    """Return each tensor's rule as an index into REPLICA_RULES."""
    given = dict(replicas) if isinstance(replicas, Mapping) else {"*": replicas}
    if any(rule not in REPLICA_RULES for rule in given.values()):
        raise LayoutError(
            f"replicas={replicas!r}: expected one of {', '.join(map(repr, REPLICA_RULES))}, or a "
            "mapping of glob → one of these"
        )
    if isinstance(replicas, str):
        return np.full(len(names), REPLICA_RULES.index(replicas))
    rules = [
        next((rule for glob, rule in given.items() if fnmatchcase(name, glob)), "check")
        for name in names
    ]
    return np.array([REPLICA_RULES.index(rule) for rule in rules], np.int64)


def _keep_first_holder(segments: Segments, rule: np.ndarray) -> Segments:
    """Under "rank0", only the lowest rank that holds a segment counts."""
    first = np.ones(len(segments.pair_segment), bool)
    first[1:] = segments.pair_segment[1:] != segments.pair_segment[:-1]
    keep = first | (rule[segments.tensor[segments.pair_segment]] != REPLICA_RULES.index("rank0"))
    return Segments(
        segments.tensor,
        segments.start,
        segments.stop,
        segments.first,
        segments.size,
        segments.pair_segment[keep],
        segments.pair_rank[keep],
        segments.pair_item[keep],
        segments.pair_source[keep],
    )


@dataclass(frozen=True, slots=True)
class Shares:
    """Which rank stores which elements of which segment.

    Attributes:
        segment: (shares,) the segment.
        rank: (shares,) who stores it.
        begin: (shares,) its first element in the segment.
        end: (shares,) one past its last.
    """

    segment: np.ndarray
    rank: np.ndarray
    begin: np.ndarray
    end: np.ndarray


def _share_out(tensors: Tensors, segments: Segments, ranks: int) -> Shares:
    """Share what several ranks hold out among them, so that all store the same number of bytes."""
    size_bytes = segments.size * tensors.itemsize[segments.tensor]
    first, holders = _groups(segments)
    single = np.flatnonzero(np.diff(np.append(first, len(segments.pair_segment))) == 1)
    load = np.zeros(ranks, np.int64)
    np.add.at(load, segments.pair_rank[first[single]], size_bytes[single])
    groups = [(np.array(group, np.int64), np.array(members)) for group, members in holders.items()]
    shares = balance(load, [(group, int(size_bytes[members].sum())) for group, members in groups])
    segment = [single]
    rank = [segments.pair_rank[first[single]]]
    begin = [np.zeros(len(single), np.int64)]
    end = [segments.size[single]]
    for (group, members), share in zip(groups, shares, strict=True):
        pieces = _cut_line(
            segments.size[members], tensors.itemsize[segments.tensor[members]], share
        )
        segment.append(members[pieces[0]])
        rank.append(group[pieces[1]])
        begin.append(pieces[2])
        end.append(pieces[3])
    return Shares(*(np.concatenate(column) for column in (segment, rank, begin, end)))


def _groups(segments: Segments) -> tuple[np.ndarray, dict[tuple[int, ...], list[int]]]:
    """Group the segments that several ranks hold.

    Returns:
        Each segment's first pair; and set of ranks, at least two → the segments that exactly they
        hold.
    """
    count = len(segments.tensor)
    first = np.searchsorted(segments.pair_segment, np.arange(count))
    holders: dict[tuple[int, ...], list[int]] = {}
    last = np.append(first, len(segments.pair_segment))[1:]
    for index in np.flatnonzero(last - first > 1).tolist():
        group = tuple(segments.pair_rank[first[index] : last[index]].tolist())
        holders.setdefault(group, []).append(index)
    return first, holders


def _cut_line(
    size: np.ndarray, itemsize: np.ndarray, share: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Lay segments end to end and cut the line into the shares.

    Returns:
        Columns: index of the segment, index of the share, first and last-plus-one element in the
            segment.
    """
    ends = np.cumsum(size * itemsize)
    starts = ends - size * itemsize
    cuts = np.cumsum(share)[:-1]
    at = np.minimum(np.searchsorted(ends, cuts, side="right"), len(ends) - 1)
    into = np.maximum(cuts - starts[at], 0) // itemsize[at] * itemsize[at]
    snap = np.minimum(_SNAP_BYTES, (share.mean() if len(share) else 0) * _SNAP_FRACTION)
    to_end = ends[at] - starts[at] - into
    into = np.where(into < snap, 0, np.where(to_end < snap, ends[at] - starts[at], into))
    cuts = np.maximum.accumulate(starts[at] + into)
    edges = np.unique(np.concatenate([[0], cuts, ends]))
    low, high = edges[:-1], edges[1:]
    segment = np.searchsorted(ends, low, side="right")
    rank = np.searchsorted(cuts, low, side="right")
    return (
        segment,
        rank,
        (low - starts[segment]) // itemsize[segment],
        (high - starts[segment]) // itemsize[segment],
    )


def _lay_out(
    tensors: Tensors,
    segments: Segments,
    shares: Shares,
    *,
    rule: np.ndarray,
    holdings: Sequence[Holdings],
    max_shard_bytes: int,
) -> WritePlan:
    """Turn shares into boxes, files, and each rank's part."""
    ranks = len(holdings)
    # The pair of each share: pairs are sorted by segment and rank.
    pair_key = segments.pair_segment * ranks + segments.pair_rank
    pair = np.searchsorted(pair_key, shares.segment * ranks + shares.rank)
    item = segments.pair_item[pair]
    source = segments.pair_source[pair] + shares.begin
    # Whole boxes stay; the others, and runs, are runs of their parent box and are cut into boxes.
    parent_start, parent_stop = segments.start[shares.segment], segments.stop[shares.segment]
    low = segments.first[shares.segment] + shares.begin
    high = segments.first[shares.segment] + shares.end
    extent = parent_stop - parent_start
    complete = (low == 0) & (high == extent.prod(axis=1))
    cut = np.flatnonzero(~complete)
    of, box_start, box_stop = boxes_of_runs(extent[cut], low[cut], high[cut])
    share = np.concatenate([np.flatnonzero(complete), cut[of]])
    start = np.concatenate([parent_start[complete], box_start + parent_start[cut[of]]])
    stop = np.concatenate([parent_stop[complete], box_stop + parent_start[cut[of]]])
    tensor = segments.tensor[shares.segment[share]]
    order = np.lexsort((*start.T[::-1], tensor))
    share, start, stop, tensor = share[order], start[order], stop[order], tensor[order]
    rank = shares.rank[share]
    # A box begins in its item's C order where its share does, plus the share's boxes before it.
    size = (stop - start).prod(axis=1)
    by_share = np.argsort(share, kind="stable")
    before = np.cumsum(size[by_share]) - size[by_share]
    first_of_share = np.searchsorted(share[by_share], share[by_share])
    inside = np.empty(len(size), np.int64)
    inside[by_share] = before - before[first_of_share]
    box_source = source[share] + inside

    itemsize = tensors.itemsize[tensor]
    size_bytes = size * itemsize
    in_file = order_in_file(rank, itemsize, tensor)
    name_bytes = np.array([len(name) for name in tensors.names], np.int64)
    # A generous estimate of the entry's JSON: names may need escapes, numbers have up to 20 digits.
    entry_bytes = 6 * name_bytes[tensor] + 160 + 66 * tensors.ndim[tensor].astype(np.int64)
    blobs = np.array([bool(held.per_rank) for held in holdings], bool)
    file, file_rank = _files(
        rank[in_file], size_bytes[in_file], entry_bytes[in_file], blobs, max_shard_bytes
    )
    box_file = np.empty(len(file), np.int64)
    box_file[in_file] = file

    layout, layouts = _layouts(tensors, tensor, start, stop, box_file)
    checks = _checks(segments, rule)
    rank_edges = np.searchsorted(rank[in_file], np.arange(ranks + 1))
    check_order = np.argsort(segments.pair_rank[checks[0]], kind="stable")
    check_pair, check_number = checks[0][check_order], checks[1][check_order]
    check_edges = np.searchsorted(segments.pair_rank[check_pair], np.arange(ranks + 1))
    last_file = np.searchsorted(file_rank, np.arange(ranks), side="right") - 1
    parts = []
    for number in range(ranks):
        rows = in_file[rank_edges[number] : rank_edges[number + 1]]
        pairs = check_pair[check_edges[number] : check_edges[number + 1]]
        parts.append(
            WritePart(
                item[share[rows]],
                box_source[rows],
                start[rows],
                stop[rows],
                box_file[rows],
                segments.pair_item[pairs],
                segments.pair_source[pairs],
                segments.size[segments.pair_segment[pairs]],
                check_number[check_edges[number] : check_edges[number + 1]],
                int(last_file[number]) if blobs[number] else -1,
            )
        )
    rank_bytes = np.zeros(ranks, np.int64)
    np.add.at(rank_bytes, rank, size_bytes)
    return WritePlan(
        tensors.names,
        tensors.dtype,
        layout,
        layouts,
        len(file_rank),
        file_rank,
        parts,
        rank_bytes,
        tuple(dict.fromkeys(name for held in holdings for name in held.per_rank)),
        checks[2],
    )


def _files(
    rank: np.ndarray,
    size_bytes: np.ndarray,
    entry_bytes: np.ndarray,
    blobs: np.ndarray,
    max_shard_bytes: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Number the files: one a rank that has anything to write, more where one would grow too large.

    The boxes come in the order in which they lie in the files.

    Returns:
        Each box's file, and each file's rank.
    """
    new = np.zeros(len(rank), bool)
    new[:1] = True
    new[1:] = rank[1:] != rank[:-1]
    size_total, entry_total = np.cumsum(size_bytes), np.cumsum(entry_bytes)
    begin = 0
    while begin < len(rank):  # once a file
        size_before = size_total[begin] - size_bytes[begin]
        entry_before = entry_total[begin] - entry_bytes[begin]
        end = min(
            int(np.searchsorted(rank, rank[begin], side="right")),
            int(np.searchsorted(size_total, size_before + max_shard_bytes, side="right")),
            int(np.searchsorted(entry_total, entry_before + _HEADER_LIMIT_BYTES, side="right")),
        )
        begin = max(end, begin + 1)  # a box larger than the limit still has to go somewhere
        if begin < len(rank):
            new[begin] = True
    ranks_of_files = rank[new]
    file_rank = np.sort(
        np.concatenate([ranks_of_files, np.setdiff1d(np.flatnonzero(blobs), ranks_of_files)])
    )
    number = np.flatnonzero(np.isin(file_rank, ranks_of_files))
    return number[np.cumsum(new) - 1], file_rank


def _layouts(
    tensors: Tensors, tensor: np.ndarray, start: np.ndarray, stop: np.ndarray, file: np.ndarray
) -> tuple[np.ndarray, list[Layout]]:
    """Make each tensor's layout, each distinct one once."""
    edges = np.searchsorted(tensor, np.arange(len(tensors.names) + 1))
    width = start.shape[1]
    index = np.empty(len(tensors.names), np.int64)
    layouts: list[Layout] = []
    known: dict[tuple[object, ...], int] = {}
    ndims = tensors.ndim.tolist()
    for number in range(len(tensors.names)):
        rows = slice(edges[number], edges[number + 1])
        pad = width - ndims[number]
        shape = tensors.true_shape(number)
        low, high = start[rows, pad:], stop[rows, pad:]
        key = (shape, low.tobytes(), high.tobytes(), file[rows].tobytes())
        if key not in known:
            known[key] = len(layouts)
            layouts.append(Layout(shape, low.copy(), high.copy(), file[rows].copy()))
        index[number] = known[key]
    return index, layouts


def _checks(segments: Segments, rule: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """List what must be compared.

    Returns:
        The pairs that take part, the number of each one's comparison, and each comparison's tensor.
    """
    held = np.bincount(segments.pair_segment, minlength=len(segments.tensor))
    checked = (
        (held > 1) & (rule[segments.tensor] == REPLICA_RULES.index("check")) & (segments.size > 0)
    )
    number = np.cumsum(checked) - 1
    pairs = np.flatnonzero(checked[segments.pair_segment])
    return pairs, number[segments.pair_segment[pairs]], segments.tensor[checked]
