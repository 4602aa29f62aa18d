"""From what the ranks hold to distinct stretches, each held whole by one or more ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distckpt.errors import LayoutError
from distckpt.layout import describe_faults, wrong_covers
from distckpt.plan.columns import distinct_rows
from distckpt.plan.holdings import RUN
from distckpt.plan.merge import Tensors, Use, World
from distckpt.region import Region, boxes_of_runs, ranges

_MOST_LISTED = 3


@dataclass(frozen=True, slots=True)
class Occurrences:
    """Who holds what: a row is a run of a box of a tensor, held by a set of ranks.

    Attributes:
        tensor: (rows,) index of the tensor.
        holders: (rows,) index of the set of ranks.
        item: (rows,) the number of the item on all these ranks; see `World`.
        is_run: (rows,) whether it was given as a run.
        start: (rows, width) the box.
        stop: (rows, width).
        first: (rows,) first element in the C order of the box.
        last: (rows,) one past the last.
        sets: The sets of ranks, each ascending.
    """

    tensor: np.ndarray
    holders: np.ndarray
    item: np.ndarray
    is_run: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    first: np.ndarray
    last: np.ndarray
    sets: list[np.ndarray]

    def take(self, rows: np.ndarray) -> Occurrences:
        """Select rows."""
        return Occurrences(
            self.tensor[rows],
            self.holders[rows],
            self.item[rows],
            self.is_run[rows],
            self.start[rows],
            self.stop[rows],
            self.first[rows],
            self.last[rows],
            self.sets,
        )


@dataclass(frozen=True, slots=True)
class Segments:
    """Distinct stretches of tensors, each held whole by one or more sets of ranks.

    A segment is a run of a box of the tensor, often all of it. `pair_*` lists who holds what,
    sorted by segment, then set: the segment, the set of ranks, the item on these, and where in the
    item's C order the segment begins.

    Attributes:
        tensor: (segments,) index of its tensor.
        start: (segments, width) the box.
        stop: (segments, width).
        first: (segments,) first element in the C order of the box.
        size: (segments,) elements.
        pair_segment: (pairs,) the segment.
        pair_holders: (pairs,) a set of ranks that hold it.
        pair_item: (pairs,) the item that it lies in there.
        pair_source: (pairs,) its first element in the item's C order.
    """

    tensor: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    first: np.ndarray
    size: np.ndarray
    pair_segment: np.ndarray
    pair_holders: np.ndarray
    pair_item: np.ndarray
    pair_source: np.ndarray


def expand(world: World, uses: Sequence[Use]) -> Occurrences:
    """List what is held: the items of these uses, and all odd ones, but for what has no element.

    A use has one row for each item and each distinct place of ranks in it, not for each rank.
    """
    sets: list[np.ndarray] = []
    columns: list[list[np.ndarray]] = [[] for _ in range(6)]
    for use in uses:
        firsts, cell = distinct_rows(use.coordinates)
        order = np.argsort(cell, kind="stable")
        numbers = len(sets) + np.arange(len(firsts))
        sets += np.split(use.ranks[order], np.searchsorted(cell[order], np.arange(1, len(firsts))))
        start, stop = use.boxes(world.tensors.shape[use.tensor], use.coordinates[firsts])
        count, cells = start.shape[:2]
        flat = (
            np.repeat(use.tensor, cells),
            np.tile(numbers, count),
            np.repeat(2 * use.item, cells),
            np.zeros(count * cells, bool),
            start.reshape(count * cells, -1),
            stop.reshape(count * cells, -1),
        )
        for column, part in zip(columns, flat, strict=True):
            column.append(part)
    odd = world.odd
    flat = (
        world.odd_tensor,
        len(sets) + odd.of,
        world.odd_item,
        odd.kind == RUN,
        odd.start,
        odd.stop,
    )
    for column, part in zip(columns, flat, strict=True):
        column.append(part)
    sets += world.odd_ranks
    tensor, holders, item, is_run, start, stop = (np.concatenate(column) for column in columns)
    size = (stop - start).prod(axis=1)
    whole = len(size) - len(odd.of)
    first = np.concatenate([np.zeros(whole, np.int64), odd.first])
    last = np.concatenate([size[:whole], odd.last])
    found = Occurrences(tensor, holders, item, is_run, start, stop, first, last, sets)
    return found.take(np.flatnonzero((first < last) & (world.tensors.size[tensor] > 0)))


def find_segments(tensors: Tensors, held: Occurrences, others: np.ndarray) -> Segments:
    """Find the distinct stretches, and who holds them.

    Args:
        tensors: All tensors.
        held: What is held.
        others: (n,) tensors that need no holder here.

    Raises:
        LayoutError: Tensors that are not covered exactly once: all of them.
    """
    missing = np.ones(len(tensors.names), bool)
    missing[held.tensor] = False
    missing[others] = False
    whole, held = _single(tensors, held)
    # Runs are refined within the boxes that they are runs of, if those cover the tensor.
    firsts, box = distinct_rows(np.column_stack([held.tensor, held.start, held.stop]))
    used, dense = np.unique(held.tensor[firsts], return_inverse=True)
    faulty = used[
        wrong_covers(dense.reshape(-1), held.start[firsts], held.stop[firsts], tensors.shape[used])
    ]
    as_boxes = np.zeros(len(tensors.names), bool)
    as_boxes[faulty] = True
    in_boxes = as_boxes[held.tensor]
    problems: list[tuple[int, str]] = []
    of_runs = _refined(tensors, held, box, np.flatnonzero(~in_boxes), problems)
    of_boxes = _merged(tensors, held.take(np.flatnonzero(in_boxes)), problems)
    for tensor in np.flatnonzero(missing).tolist():
        text = f"{tensors.names[tensor]!r} of shape {tensors.true_shape(tensor)}"
        problems.append((tensor, f"{text}: gap: no rank holds any of it"))
    if problems:
        raise LayoutError(
            f"{len(problems)} tensors are not covered exactly once by what the ranks hold:\n  "
            + "\n  ".join(text for _, text in sorted(problems))
        )
    return _join([whole, of_runs, of_boxes])


def _single(tensors: Tensors, held: Occurrences) -> tuple[Segments, Occurrences]:
    """Separate what needs no look at others: tensors that are held once, and whole.

    By a set of ranks, so that most are in a pipeline, and what is on all ranks.

    Returns:
        Their segments, and what is held of the others.
    """
    shape, size = tensors.shape[held.tensor], tensors.size[held.tensor]
    single = np.bincount(held.tensor, minlength=len(tensors.names))[held.tensor] == 1
    single &= (held.start == 0).all(axis=1) & (held.stop == shape).all(axis=1)
    single &= (held.first == 0) & (held.last == size)
    found = held.take(np.flatnonzero(single))
    segments = Segments(
        found.tensor,
        found.start,
        found.stop,
        found.first,
        found.last,
        np.arange(len(found.tensor)),
        found.holders,
        found.item,
        found.first,
    )
    return segments, held.take(np.flatnonzero(~single))


def _join(tables: Sequence[Segments]) -> Segments:
    """Concatenate tables of segments, and sort their pairs."""
    offsets = np.cumsum([0] + [len(table.tensor) for table in tables])
    pair_segment = np.concatenate(
        [table.pair_segment + offset for table, offset in zip(tables, offsets, strict=False)]
    )
    pair_holders = np.concatenate([table.pair_holders for table in tables])
    pairs = np.lexsort((pair_holders, pair_segment))
    return Segments(
        np.concatenate([table.tensor for table in tables]),
        np.concatenate([table.start for table in tables]),
        np.concatenate([table.stop for table in tables]),
        np.concatenate([table.first for table in tables]),
        np.concatenate([table.size for table in tables]),
        pair_segment[pairs],
        pair_holders[pairs],
        np.concatenate([table.pair_item for table in tables])[pairs],
        np.concatenate([table.pair_source for table in tables])[pairs],
    )


def _refined(
    tensors: Tensors,
    held: Occurrences,
    box: np.ndarray,
    rows: np.ndarray,
    problems: list[tuple[int, str]],
) -> Segments:
    """Refine runs at the union of their cuts, so that replicas cut differently share segments.

    Args:
        tensors: All tensors.
        held: What is held.
        box: (occurrences,) number of the box that each is a run of.
        rows: The occurrences to look at.
        problems: Takes faults: tensor and text.
    """
    boxes, first, place = np.unique(box[rows], return_index=True, return_inverse=True)
    place = place.reshape(-1)
    model = rows[first]
    size = (held.stop[model] - held.start[model]).prod(axis=1)
    # One line of positions for all boxes: box b occupies base[b] … base[b] + size[b].
    base = np.cumsum(size + 1) - size - 1
    begin, end = base[place] + held.first[rows], base[place] + held.last[rows]
    cuts = np.unique(np.concatenate([begin, end, base, base + size]))
    owner = np.searchsorted(base, cuts, side="right") - 1 if len(boxes) else cuts
    inner = np.flatnonzero(owner[:-1] == owner[1:])  # not the step from one box to the next
    low, high, of = cuts[inner], cuts[inner + 1], owner[inner]
    from_ = np.searchsorted(low, begin)
    count = np.searchsorted(low, end) - from_
    pair_row = np.repeat(np.arange(len(rows)), count)
    pair_segment = ranges(from_, count)
    is_held = np.zeros(len(low), bool)
    is_held[pair_segment] = True
    missing = np.flatnonzero(~is_held)
    tensor = held.tensor[model[of]]
    for index in np.unique(tensor[missing]).tolist():
        texts = []
        for gap in missing[tensor[missing] == index][:_MOST_LISTED].tolist():
            origin, row = base[of[gap]], int(model[of[gap]])
            pad = tensors.width - int(tensors.ndim[index])
            region = Region(
                tuple(held.start[row, pad:].tolist()), tuple(held.stop[row, pad:].tolist())
            )
            whole = region == Region.whole(tensors.true_shape(index))
            texts.append(
                f"{low[gap] - origin}:{high[gap] - origin}" + f" of {region}" * (not whole)
            )
        problems.append(
            (
                index,
                (
                    f"{tensors.names[index]!r} of shape {tensors.true_shape(index)}: gap: no rank "
                    f"holds elements {', '.join(texts)}"
                ),
            )
        )
    some = rows[pair_row]
    first_of = low - base[of]
    return Segments(
        tensor,
        held.start[model[of]],
        held.stop[model[of]],
        first_of,
        high - low,
        pair_segment,
        held.holders[some],
        held.item[some],
        first_of[pair_segment] - held.first[some],
    )


def _merged(tensors: Tensors, held: Occurrences, problems: list[tuple[int, str]]) -> Segments:
    """Cut runs into boxes, and unite equal ones."""
    size = (held.stop - held.start).prod(axis=1)
    runs = np.flatnonzero((held.first > 0) | (held.last < size))
    plain = np.flatnonzero((held.first == 0) & (held.last == size))
    run_of, run_start, run_stop = boxes_of_runs(
        (held.stop - held.start)[runs], held.first[runs], held.last[runs]
    )
    origin = held.start[runs[run_of]]
    row = np.concatenate([plain, runs[run_of]])
    start = np.concatenate([held.start[plain], run_start + origin])
    stop = np.concatenate([held.stop[plain], run_stop + origin])
    # The boxes of a run follow one another in it.
    sizes = (run_stop - run_start).prod(axis=1)
    before = np.cumsum(sizes) - sizes
    begins = np.searchsorted(run_of, run_of)
    source = np.concatenate([np.zeros(len(plain), np.int64), before - before[begins]])
    tensor = held.tensor[row]
    firsts, which = distinct_rows(np.column_stack([tensor, start, stop]))
    segment_tensor, segment_start, segment_stop = tensor[firsts], start[firsts], stop[firsts]
    used, dense = np.unique(segment_tensor, return_inverse=True)
    faulty = used[wrong_covers(dense.reshape(-1), segment_start, segment_stop, tensors.shape[used])]
    for index in faulty.tolist():
        pad = tensors.width - int(tensors.ndim[index])
        mine = np.flatnonzero(segment_tensor == index)
        mine = mine[np.lexsort((*segment_stop[mine].T[::-1], *segment_start[mine].T[::-1]))]
        boxes = [
            Region(tuple(a), tuple(b))
            for a, b in zip(
                segment_start[mine, pad:].tolist(), segment_stop[mine, pad:].tolist(), strict=True
            )
        ]
        holders = [
            sorted(
                rank
                for number in held.holders[row[which == segment]].tolist()
                for rank in held.sets[number].tolist()
            )
            for segment in mine.tolist()
        ]
        problems.append(
            (
                index,
                describe_faults(tensors.names[index], tensors.true_shape(index), boxes, holders),
            )
        )
    return Segments(
        segment_tensor,
        segment_start,
        segment_stop,
        np.zeros(len(firsts), np.int64),
        (segment_stop - segment_start).prod(axis=1),
        which,
        held.holders[row],
        held.item[row],
        source,
    )
