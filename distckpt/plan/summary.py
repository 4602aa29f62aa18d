"""What a rank holds, said so that ranks which hold the like say the same.

Most boxes follow a rule: dimension d is cut into so many parts, evenly or by ceiling, and this rank
has part number i. Said as the rule (a *template*, alike on thousands of ranks) and the rank's own
numbers i (its *coordinates*), the holdings of all ranks are a few templates and a few numbers a
rank, whatever the number of tensors. What follows no rule, such as the runs of flat buffers, is
said one by one: *odd* items.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distckpt.layout import BALANCED, CEILING
from distckpt.plan.columns import (
    columns_from_bytes,
    columns_to_bytes,
    deflate,
    distinct_rows,
    inflate,
    text_column,
    texts_of,
)
from distckpt.plan.holdings import RUN, Holdings

# In a template's `axis`: the whole extent; 1 … are its axes; no element, and no part of any cut.
WHOLE, NOTHING = 0, 255
_MOST_AXES = 32
# A rank that cuts in more different ways than this is not regular.
_MOST_CUTS = 256
_OWN = struct.Struct("<BHIII")  # bytes of a number, width, axes, odd items, bytes of their names
_FIXED = 6  # numbers of an odd item beside its shape and its box


@dataclass(frozen=True, slots=True)
class Template:
    """The regular items of ranks that hold the like.

    Attributes:
        names: The tensors' names.
        dtype: (items,) dtype codes.
        ndim: (items,) dimensions before padding.
        shape: (items, width) shapes of the whole tensors.
        axis: (items, width) how each dimension is cut: `WHOLE`, one plus the index of an axis, or
            `NOTHING` where the rank holds no element of it.
        rules: (items, width) by which rules: bit `BALANCED` and bit `CEILING` are set where such a
            cut gives just these boxes. Which one is meant, one rank may not be able to tell.
        parts: (axes,) in how many parts an axis cuts.
        per_rank: Names of the per-rank values.
    """

    names: list[str]
    dtype: np.ndarray
    ndim: np.ndarray
    shape: np.ndarray
    axis: np.ndarray
    rules: np.ndarray
    parts: np.ndarray
    per_rank: list[str]


@dataclass(frozen=True, slots=True)
class Odd:
    """Items that follow no rule, those of one content after another; columns as in `Holdings`.

    Attributes:
        of: (items,) index of the content that an item is from.
        number: (items,) the item's number in the holdings that it is from.
        names: The tensors' names.
        dtype: (items,).
        ndim: (items,).
        kind: (items,).
        first: (items,).
        last: (items,).
        shape: (items, width).
        start: (items, width).
        stop: (items, width).
    """

    of: np.ndarray
    number: np.ndarray
    names: list[str]
    dtype: np.ndarray
    ndim: np.ndarray
    kind: np.ndarray
    first: np.ndarray
    last: np.ndarray
    shape: np.ndarray
    start: np.ndarray
    stop: np.ndarray


@dataclass(frozen=True, slots=True)
class Summary:
    """A rank's holdings, said briefly.

    Attributes:
        regular: The numbers of the items in the template.
        odd: The numbers of the others.
        template: `Template` as bytes.
        own: The rank's coordinates, and its `Odd` items, as bytes.
        coordinates: Its place on the template's axes.
    """

    regular: np.ndarray
    odd: np.ndarray
    template: bytes
    own: bytes
    coordinates: np.ndarray


def summarise(held: Holdings, *, rank: int, ranks: int) -> Summary:
    """Say briefly what a rank holds.

    Args:
        held: What it holds.
        rank: Which rank this is.
        ranks: How many there are: cuts into a divisor of it are what is looked for first.
    """
    cut = ((held.start != 0) | (held.stop != held.shape)) & (held.kind != RUN)[:, None]
    item, dim = np.nonzero(cut)
    table = np.column_stack([held.shape[cut], held.start[cut], held.stop[cut]])
    first, which = distinct_rows(table)
    axis_of, rules_of = np.full(len(first), NOTHING), np.zeros(len(first), np.int64)
    regular = held.kind != RUN
    axes: list[_Axis] = []
    if len(first) <= _MOST_CUTS:
        cuts = [tuple(row) for row in table[first].tolist()]
        found = _axes(cuts, rank=rank, ranks=ranks)
        axes = sorted({axis for axis in found if axis is not None}, key=found.index)[:_MOST_AXES]
        for number, (cut_, axis_) in enumerate(zip(cuts, found, strict=True)):
            if axis_ in axes:
                axis_of[number] = 1 + axes.index(axis_)
                rules_of[number] = _rules(cut_, *axis_)
    axis, rules = np.full(held.shape.shape, WHOLE), np.zeros(held.shape.shape, np.int64)
    axis[item, dim], rules[item, dim] = axis_of[which], rules_of[which]
    # No rule, and some elements: this one has to be said as it is.
    regular &= ~((axis == NOTHING) & (held.start < held.stop)).any(axis=1)
    rows, odd = np.flatnonzero(regular), np.flatnonzero(~regular)
    template = columns_to_bytes(
        [
            np.array([len(rows), held.width, len(held.per_rank)]),
            text_column([held.names[row] for row in rows.tolist()]),
            held.dtype[rows],
            held.ndim[rows],
            held.shape[rows],
            axis[rows],
            rules[rows],
            np.array([parts for parts, _ in axes], np.int64),
            text_column(held.per_rank),
        ]
    )
    coordinates = np.array([index for _, index in axes], np.int64)
    own = own_to_bytes(held, odd, odd, coordinates)
    return Summary(rows, odd, template, own, coordinates)


def own_to_bytes(
    held: Holdings, odd: np.ndarray, number: np.ndarray, coordinates: np.ndarray
) -> bytes:
    """Write what a rank says of its own.

    Args:
        held: What it holds.
        odd: The items to say one by one.
        number: (odd,) what they are said to be the numbers of.
        coordinates: Its place on the template's axes.
    """
    names = "\0".join([held.names[row] for row in odd.tolist()]).encode()
    table = np.column_stack(
        [
            number,
            *(column[odd] for column in (held.dtype, held.ndim, held.kind, held.first, held.last)),
            held.shape[odd],
            held.start[odd],
            held.stop[odd],
        ]
    ).astype(np.int64)
    numbers = np.concatenate([coordinates, table.reshape(-1)])
    itemsize = 4 if not numbers.size or int(numbers.max()) < 1 << 32 else 8
    header = _OWN.pack(itemsize, held.width, len(coordinates), len(odd), len(names))
    return deflate(header + names + numbers.astype(f"<u{itemsize}").tobytes())


def template_from_bytes(data: bytes) -> Template:
    """Read the template of a `Summary`."""
    head, names, dtype, ndim, shape, axis, rules, parts, per_rank = columns_from_bytes(data)
    items, width, values = head.tolist()
    return Template(
        texts_of(names, items),
        dtype,
        ndim,
        shape.reshape(items, width),
        axis.reshape(items, width),
        rules.reshape(items, width),
        parts,
        texts_of(per_rank, values),
    )


def owns_from_bytes(payloads: Sequence[bytes]) -> tuple[list[np.ndarray], Odd]:
    """Read what the ranks say of their own: many contents at once, in columns.

    Returns:
        Each content's coordinates, and all odd items.
    """
    coordinates: list[np.ndarray] = []
    texts, contents, of_, widths = [], [], [], []
    for number, payload in enumerate(payloads):
        data = inflate(payload)
        itemsize, width, axes, items, length = _OWN.unpack_from(data)
        at = _OWN.size + length
        numbers = np.frombuffer(data, f"<u{itemsize}", offset=at)
        coordinates.append(numbers[:axes])
        if items:
            texts.append(data[_OWN.size : at])
            contents.append(numbers[axes:])
            of_.append((number, items))
            widths.append(width)
    width = max(widths, default=1)
    counts = np.array([items for _, items in of_], np.int64)
    numbers_ = np.array([number for number, _ in of_], np.int64)
    total = int(counts.sum())
    table = np.empty((total, _FIXED + 3 * width), np.int64)
    edges = np.cumsum(counts) - counts
    for each in sorted(set(widths)):
        some = [index for index, found in enumerate(widths) if found == each]
        rows = np.concatenate(
            [np.arange(edges[index], edges[index] + counts[index]) for index in some]
        )
        values = np.concatenate([contents[index] for index in some]).astype(np.int64)
        values = values.reshape(len(rows), _FIXED + 3 * each)
        pad = width - each
        part = np.zeros((len(rows), table.shape[1]), np.int64)
        part[:, :_FIXED] = values[:, :_FIXED]
        for block, fill in enumerate((1, 0, 1)):
            begin = _FIXED + block * width
            part[:, begin : begin + pad] = fill
            part[:, begin + pad : begin + width] = values[
                :, _FIXED + block * each : _FIXED + (block + 1) * each
            ]
        table[rows] = part
    shape, start, stop = (
        table[:, _FIXED + block * width : _FIXED + (block + 1) * width] for block in range(3)
    )
    names = b"\0".join(texts).decode().split("\0") if total else []
    number, dtype, ndim, kind, first, last = table[:, :_FIXED].T
    of = np.repeat(numbers_, counts)
    odd = Odd(of, number, names, dtype, ndim, kind, first, last, shape, start, stop)
    return coordinates, odd


# ---------------------------------------------------------------------------------- finding a rule

_Cut = tuple[int, ...]  # extent, first, one past the last
_Axis = tuple[int, int]  # parts, index


def _axes(cuts: Sequence[_Cut], *, rank: int, ranks: int) -> list[_Axis | None]:
    """Find for each cut the parts that it is one of, and which; as few different ones as can be.

    Any answer is right: what a cut's axis says is exactly that cut. Alike on all ranks, the answer
    is also short.
    """
    found: list[_Axis | None] = [None] * len(cuts)
    left = set(range(len(cuts)))
    fits = {
        parts: [[_indices(cut, parts, rule) for rule in (BALANCED, CEILING)] for cut in cuts]
        for parts in _divisors(ranks)
    }
    while left:
        best: tuple[int, _Axis | None] = (0, None)
        for parts, spans in fits.items():
            known = [span for number in left for span in spans[number] if span is not None]
            candidates = {low for low, high in known if low == high}
            if parts == ranks:
                candidates.add(rank)
            for index in sorted(candidates):
                count = sum(_holds(spans[number], index) for number in left)
                if count > best[0]:
                    best = (count, (parts, index))
        axis = best[1]
        if axis is None:
            break
        for number in list(left):
            if _holds(fits[axis[0]][number], axis[1]):
                found[number] = axis
                left.discard(number)
    for number in left:
        extent, first, last = cuts[number]
        # A part of a cut in equal parts, but for the last, of which the size is not to be seen.
        if first < last < extent and first % (last - first) == 0:
            axis = -(-extent // (last - first)), first // (last - first)
            found[number] = axis if _rules(cuts[number], *axis) else None
    return found


def _holds(spans: Sequence[tuple[int, int] | None], index: int) -> bool:
    return any(span is not None and span[0] <= index <= span[1] for span in spans)


def _rules(cut: _Cut, parts: int, index: int) -> int:
    """Return by which rules this part of a cut is this one, as bits."""
    spans = {rule: _indices(cut, parts, rule) for rule in (BALANCED, CEILING)}
    return sum(1 << rule for rule, span in spans.items() if _holds([span], index))


def _divisors(number: int) -> list[int]:
    """Return the divisors but 1, the number itself first."""
    small = [found for found in range(1, int(number**0.5) + 1) if number % found == 0]
    return sorted({*small, *(number // found for found in small)} - {1}, reverse=True)


def _indices(cut: _Cut, parts: int, rule: int) -> tuple[int, int] | None:
    """Return which parts of a cut are this one: several only where it has no element."""
    extent, first, last = cut
    size, more = divmod(extent, parts)
    if rule == CEILING:
        size, more = -(-extent // parts), 0
    if first == last:
        used = -(-extent // size) if rule == CEILING else min(extent, parts)
        return (used, parts - 1) if first == extent and used < parts else None
    if rule == CEILING:
        index = first // size
        fits = first % size == 0 and last == min(extent, first + size)
    else:
        larger = first < more * (size + 1)
        index = (
            first // (size + 1) if larger else more + (first - more * (size + 1)) // max(size, 1)
        )
        begin = index * size + min(index, more)
        fits = begin == first and last == begin + size + (index < more)
    return (index, index) if fits and index < parts else None
