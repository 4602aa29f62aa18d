"""From what the ranks hold to distinct stretches, each held whole by one or more ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from distckpt import dtypes
from distckpt.errors import LayoutError
from distckpt.layout import describe_faults, wrong_covers
from distckpt.manifest import pad_columns
from distckpt.plan.holdings import BOX, RUN, Holdings
from distckpt.region import Region, boxes_of_runs


@dataclass(frozen=True, slots=True)
class Items:
    """All ranks' items in one table.

    Attributes:
        tensor: (items,) index of its tensor.
        rank: (items,) who holds it.
        item: (items,) its number among the rank's.
        kind: (items,) `BOX` or `RUN`.
        start: (items, width) as in `Holdings`.
        stop: (items, width).
    """

    tensor: np.ndarray
    rank: np.ndarray
    item: np.ndarray
    kind: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    def take(self, index: np.ndarray) -> Items:
        """Select rows."""
        return Items(
            self.tensor[index],
            self.rank[index],
            self.item[index],
            self.kind[index],
            self.start[index],
            self.stop[index],
        )


@dataclass(frozen=True, slots=True)
class Tensors:
    """All tensors, in columns.

    Attributes:
        names: Their names, in the order in which they were first seen.
        dtype: (tensors,) dtype codes.
        ndim: (tensors,) dimensions before padding.
        shape: (tensors, width) padded shapes.
        size: (tensors,) elements.
        itemsize: (tensors,) bytes of an element.
    """

    names: tuple[str, ...]
    dtype: np.ndarray
    ndim: np.ndarray
    shape: np.ndarray
    size: np.ndarray
    itemsize: np.ndarray

    def true_shape(self, tensor: int) -> tuple[int, ...]:
        """Return a tensor's shape without padding."""
        return tuple(self.shape[tensor, self.shape.shape[1] - int(self.ndim[tensor]) :].tolist())


@dataclass(frozen=True, slots=True)
class Segments:
    """Distinct stretches of tensors, each held whole by one or more ranks.

    `pair_*` lists who holds what, sorted by segment, then rank: the segment, the rank, its item,
    and where in the item's C order the segment begins. A segment is a box with its own C order, or
    a run of the whole tensor, whose box is then the whole tensor and `first` the element where it
    begins.

    Attributes:
        tensor: (segments,) index of its tensor.
        start: (segments, width) the box.
        stop: (segments, width).
        first: (segments,) first element in the C order of the box; 0 unless it is a run.
        size: (segments,) elements.
        pair_segment: (pairs,) the segment.
        pair_rank: (pairs,) a rank that holds it.
        pair_item: (pairs,) the rank's item that it lies in.
        pair_source: (pairs,) its first element in the item's C order.
    """

    tensor: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    first: np.ndarray
    size: np.ndarray
    pair_segment: np.ndarray
    pair_rank: np.ndarray
    pair_item: np.ndarray
    pair_source: np.ndarray


def merge(holdings: Sequence[Holdings]) -> tuple[Tensors, Items]:
    """Put all ranks' items into one table; tensors are numbered in the order of their first holder.

    Raises:
        LayoutError: Ranks that disagree on a tensor's dtype or shape: all of them.
    """
    width = max((held.shape.shape[1] for held in holdings), default=1)
    number: dict[str, int] = {}
    seen: dict[tuple[str, ...], np.ndarray] = {}  # ranks mostly hold the same names
    tensor = []
    for held in holdings:
        if held.names not in seen:
            seen[held.names] = np.array(
                [number.setdefault(name, len(number)) for name in held.names], np.int64
            )
        tensor.append(seen[held.names])
    counts = [len(held.names) for held in holdings]
    table = Items(
        np.concatenate(tensor),
        np.repeat(np.arange(len(holdings)), counts),
        np.concatenate([np.arange(count) for count in counts]),
        np.concatenate([held.kind for held in holdings]),
        np.concatenate([pad_columns(held.start, width, 0) for held in holdings]),
        np.concatenate(
            [
                np.where(
                    (held.kind == RUN)[:, None],
                    pad_columns(held.stop, width, 0),
                    pad_columns(held.stop, width, 1),
                )
                for held in holdings
            ]
        ),
    )
    dtype = np.concatenate([held.dtype for held in holdings])
    ndim = np.concatenate([held.ndim for held in holdings])
    shape = np.concatenate([pad_columns(held.shape, width, 1) for held in holdings])
    _, first = np.unique(table.tensor, return_index=True)
    differs = (
        (dtype != dtype[first][table.tensor])
        | (ndim != ndim[first][table.tensor])
        | (shape != shape[first][table.tensor]).any(axis=1)
    )
    names = tuple(number)
    codes = dtype[first]
    itemsize = np.array([dtypes.BY_CODE[code].itemsize for code in codes.tolist()], np.int64)
    tensors = Tensors(names, codes, ndim[first], shape[first], shape[first].prod(axis=1), itemsize)
    wrong = np.flatnonzero(differs)
    if wrong.size:

        def text(row: int) -> str:
            true = tuple(shape[row, width - int(ndim[row]) :].tolist())
            return f"rank {table.rank[row]} has {dtypes.BY_CODE[int(dtype[row])].name} {true}"

        raise LayoutError(_disagreement(tensors, table, wrong, first, text))
    return tensors, table


def _disagreement(
    tensors: Tensors,
    table: Items,
    wrong: np.ndarray,
    first: np.ndarray,
    text: Callable[[int], str],
) -> str:
    lines = []
    for tensor in np.unique(table.tensor[wrong]).tolist():
        rows = wrong[table.tensor[wrong] == tensor]
        others = ", ".join(text(row) for row in rows[:3].tolist())
        lines.append(f"{tensors.names[tensor]!r}: {text(int(first[tensor]))}, {others}")
    return f"ranks disagree on {len(lines)} tensors:\n  " + "\n  ".join(lines)


def find_segments(tensors: Tensors, items: Items) -> Segments:
    """Find the distinct stretches, and who holds them.

    Raises:
        LayoutError: Tensors that they do not cover exactly once: all of them.
    """
    empty_tensor = tensors.size[items.tensor] == 0
    is_run = items.kind == RUN
    length = np.where(
        is_run, items.stop[:, -1] - items.start[:, -1], (items.stop - items.start).prod(axis=1)
    )
    # A whole tensor is a run, too: it may be held whole by some ranks and as flat shards by others.
    whole = ~is_run & (length == tensors.size[items.tensor])
    has_run = np.zeros(len(tensors.names), bool)
    has_run[items.tensor[is_run & (length > 0)]] = True
    has_box = np.zeros(len(tensors.names), bool)
    has_box[items.tensor[~is_run & ~whole & (length > 0)]] = True
    as_runs = (has_run & ~has_box)[items.tensor] & ~empty_tensor & (length > 0)
    as_boxes = ~as_runs & ~empty_tensor & (length > 0)

    # Of a tensor without elements, the first holder stores the whole (empty) box.
    rows = np.flatnonzero(empty_tensor)
    _, first = np.unique(items.tensor[rows], return_index=True)
    rows = rows[first]
    nothing = Segments(
        items.tensor[rows],
        np.zeros_like(items.start[rows]),
        tensors.shape[items.tensor[rows]],
        np.zeros(len(rows), np.int64),
        np.zeros(len(rows), np.int64),
        np.arange(len(rows)),
        items.rank[rows],
        items.item[rows],
        np.zeros(len(rows), np.int64),
    )
    problems: list[str] = []
    of_runs = _run_segments(tensors, items.take(np.flatnonzero(as_runs)), problems)
    of_boxes = _box_segments(tensors, items.take(np.flatnonzero(as_boxes)), problems)
    held = np.zeros(len(tensors.names), bool)
    held[items.tensor[empty_tensor | (length > 0)]] = True
    problems += [
        f"{tensors.names[tensor]!r} of shape {tensors.true_shape(tensor)}: gap: no rank holds any "
        "of it"
        for tensor in np.flatnonzero(~held).tolist()
    ]
    if problems:
        raise LayoutError(
            f"{len(problems)} tensors are not covered exactly once by what the ranks hold:\n  "
            + "\n  ".join(problems)
        )
    return _join([nothing, of_runs, of_boxes])


def _join(tables: Sequence[Segments]) -> Segments:
    """Concatenate tables of segments, and sort by tensor and place."""
    offsets = np.cumsum([0] + [len(table.tensor) for table in tables])
    tensor = np.concatenate([table.tensor for table in tables])
    start = np.concatenate([table.start for table in tables])
    first = np.concatenate([table.first for table in tables])
    pair_segment = np.concatenate(
        [table.pair_segment + offset for table, offset in zip(tables, offsets, strict=False)]
    )
    pair_rank = np.concatenate([table.pair_rank for table in tables])
    order = np.lexsort((first, *start.T[::-1], tensor))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    pair_segment = place[pair_segment]
    pairs = np.lexsort((pair_rank, pair_segment))
    return Segments(
        tensor[order],
        start[order],
        np.concatenate([table.stop for table in tables])[order],
        first[order],
        np.concatenate([table.size for table in tables])[order],
        pair_segment[pairs],
        pair_rank[pairs],
        np.concatenate([table.pair_item for table in tables])[pairs],
        np.concatenate([table.pair_source for table in tables])[pairs],
    )


def _run_segments(tensors: Tensors, items: Items, problems: list[str]) -> Segments:
    """Refine runs at the union of their cuts, so that replicas cut differently share segments."""
    is_run = items.kind == RUN
    begin = np.where(is_run, items.start[:, -1], 0)
    end = np.where(is_run, items.stop[:, -1], tensors.size[items.tensor])
    used = np.unique(items.tensor)
    # One line of positions for all tensors: tensor t occupies base[t] … base[t] + size[t].
    base = np.zeros(len(tensors.names), np.int64)
    base[used] = np.cumsum(tensors.size[used] + 1) - tensors.size[used] - 1
    cuts = np.unique(
        np.concatenate(
            [
                base[items.tensor] + begin,
                base[items.tensor] + end,
                base[used],
                base[used] + tensors.size[used],
            ]
        )
    )
    owner = used[np.searchsorted(base[used], cuts, side="right") - 1] if len(used) else used
    inner = np.flatnonzero(owner[:-1] == owner[1:])  # not the step from one tensor to the next
    low, high, tensor = cuts[inner], cuts[inner + 1], owner[inner]
    from_ = np.searchsorted(low, base[items.tensor] + begin)
    to = np.searchsorted(low, base[items.tensor] + end)
    count = to - from_
    pair_row = np.repeat(np.arange(len(count)), count)
    pair_segment = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count - from_, count)
    held = np.zeros(len(low), bool)
    held[pair_segment] = True
    missing = np.flatnonzero(~held)
    for index in np.unique(tensor[missing]).tolist():
        gaps = missing[tensor[missing] == index]
        texts = [f"{low[gap] - base[index]}:{high[gap] - base[index]}" for gap in gaps[:3].tolist()]
        problems.append(
            f"{tensors.names[index]!r} of shape {tensors.true_shape(index)}: gap: no rank holds "
            f"elements {', '.join(texts)}"
        )
    first = low - base[tensor]
    return Segments(
        tensor,
        np.zeros((len(tensor), tensors.shape.shape[1]), np.int64),
        tensors.shape[tensor],
        first,
        high - low,
        pair_segment,
        items.rank[pair_row],
        items.item[pair_row],
        first[pair_segment] - begin[pair_row],
    )


def _box_segments(tensors: Tensors, items: Items, problems: list[str]) -> Segments:
    """Merge equal boxes; runs among them are cut into boxes first."""
    rows = np.arange(len(items.tensor))
    runs = np.flatnonzero(items.kind == RUN)
    plain = np.flatnonzero(items.kind == BOX)
    run_of, run_start, run_stop = boxes_of_runs(
        tensors.shape[items.tensor[runs]], items.start[runs, -1], items.stop[runs, -1]
    )
    row = np.concatenate([rows[plain], runs[run_of]])
    start = np.concatenate([items.start[plain], run_start])
    stop = np.concatenate([items.stop[plain], run_stop])
    run_sizes = (run_stop - run_start).prod(axis=1)
    ends = np.cumsum(run_sizes)
    new_run = np.flatnonzero(np.diff(run_of, prepend=-1))
    base = np.zeros(len(runs), np.int64)
    base[run_of[new_run]] = (ends - run_sizes)[new_run]
    source = np.concatenate([np.zeros(len(plain), np.int64), ends - run_sizes - base[run_of]])
    tensor = items.tensor[row]
    keys, which = np.unique(np.column_stack([tensor, start, stop]), axis=0, return_inverse=True)
    which = which.reshape(-1)
    width = start.shape[1]
    segment_tensor = keys[:, 0]
    segment_start, segment_stop = keys[:, 1 : 1 + width], keys[:, 1 + width :]
    used, dense = np.unique(segment_tensor, return_inverse=True)
    faulty = used[wrong_covers(dense.reshape(-1), segment_start, segment_stop, tensors.shape[used])]
    for index in faulty.tolist():
        ndim = int(tensors.ndim[index])
        mine = np.flatnonzero(segment_tensor == index)
        boxes = [
            Region(tuple(a), tuple(b))
            for a, b in zip(
                segment_start[mine, width - ndim :].tolist(),
                segment_stop[mine, width - ndim :].tolist(),
                strict=True,
            )
        ]
        holders = [items.rank[row[which == segment]].tolist() for segment in mine.tolist()]
        problems.append(
            describe_faults(tensors.names[index], tensors.true_shape(index), boxes, holders)
        )
    return Segments(
        segment_tensor,
        segment_start,
        segment_stop,
        np.zeros(len(keys), np.int64),
        (segment_stop - segment_start).prod(axis=1),
        which,
        items.rank[row],
        items.item[row],
        source,
    )
