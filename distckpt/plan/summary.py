"""What a rank holds, said so that ranks which hold the like say the same.

Most boxes follow a rule: dimension d is cut into so many parts, evenly or by ceiling, and this rank
has part number i; or that part is cut once more (`cuts`). Said as the rule (a *template*, alike on
thousands of ranks) and the rank's own numbers i (its *coordinates*), the holdings of all ranks are
a few templates and a few numbers a rank, whatever the number of tensors. What follows no rule, such
as the runs of flat buffers, is said one by one: *odd* items.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distckpt.plan.columns import (
    columns_from_bytes,
    columns_to_bytes,
    deflate,
    distinct_rows,
    inflate,
    text_column,
    texts_of,
)
from distckpt.plan.cuts import Axis, Way, find_ways, ways_rules
from distckpt.plan.holdings import RUN, Holdings

# In a template's `way`: the whole extent; 1 … are its ways; no element, and no part of any cut.
WHOLE, NOTHING = 0, 255
_MOST_AXES, _MOST_WAYS = 32, NOTHING - 1
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
        way: (items, width) how each dimension is cut: `WHOLE`, one plus the index of a way, or
            `NOTHING` where the rank holds no element of it.
        rules: (items, width) by which rules, as bits; see `cuts.ways_rules`.
        within: (ways,) one plus the axis whose parts a way cuts; 0 where it cuts the whole.
        by: (ways,) the axis that it cuts by.
        parts: (axes,) in how many parts an axis cuts.
        per_rank: Names of the per-rank values.
    """

    names: list[str]
    dtype: np.ndarray
    ndim: np.ndarray
    shape: np.ndarray
    way: np.ndarray
    rules: np.ndarray
    within: np.ndarray
    by: np.ndarray
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
    way_of, rules_of = np.full(len(first), NOTHING), np.zeros(len(first), np.int64)
    axes: dict[Axis, int] = {}
    ways: dict[Way, int] = {}
    if len(first) <= _MOST_CUTS:
        cuts = [(extent, low, high) for extent, low, high in table[first].tolist()]
        for number, way in enumerate(find_ways(cuts, rank=rank, ranks=ranks)):
            if way is None or (way not in ways and len(ways) == _MOST_WAYS):
                continue
            if len(axes.keys() | set(way)) <= _MOST_AXES:
                for axis in way:
                    axes.setdefault(axis, len(axes))
                way_of[number] = 1 + ways.setdefault(way, len(ways))
                rules_of[number] = ways_rules(cuts[number], way)
    way_, rules = np.full(held.shape.shape, WHOLE), np.zeros(held.shape.shape, np.int64)
    way_[item, dim], rules[item, dim] = way_of[which], rules_of[which]
    # No rule, and some elements: this one has to be said as it is.
    unsaid = ((way_ == NOTHING) & (held.start < held.stop)).any(axis=1)
    regular = (held.kind != RUN) & ~unsaid
    rows, odd = np.flatnonzero(regular), np.flatnonzero(~regular)
    template = columns_to_bytes(
        [
            np.array([len(rows), held.width, len(held.per_rank)]),
            text_column([held.names[row] for row in rows.tolist()]),
            held.dtype[rows],
            held.ndim[rows],
            held.shape[rows],
            way_[rows],
            rules[rows],
            np.array([[1 + axes[a] for a in way[:-1]] or [0] for way in ways], np.int64),
            np.array([axes[way[-1]] for way in ways], np.int64),
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
    head, names, dtype, ndim, shape, way, rules, within, by, parts, per_rank = columns_from_bytes(
        data
    )
    items, width, values = head.tolist()
    return Template(
        texts_of(names, items),
        dtype,
        ndim,
        shape.reshape(items, width),
        way.reshape(items, width),
        rules.reshape(items, width),
        within,
        by,
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
