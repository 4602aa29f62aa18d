"""How a dimension is cut: in so many parts by a rule, or each of these parts in parts again.

Tensor parallelism cuts the rows of a matrix in 8, and FSDP the rows of each of these in 1,024.
Where they don't divide, that is no cut of the whole in 8,192, and yet four numbers say it: in how
many parts, and which of them, twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np

from distckpt.layout import BALANCED, CEILING, cut_edges

Cut = tuple[int, int, int]  # extent, first, one past the last: what a rank has of a dimension
Axis = tuple[int, int]  # in how many parts, and which of them
Way = tuple[
    Axis, ...
]  # what a cut is: a part by an axis, or a part by the last of one by the first

_RULES = {axes: list(product((BALANCED, CEILING), repeat=axes)) for axes in (1, 2)}
# Two axes are looked for together among so many: those that say most of the cuts.
_MOST_CANDIDATES = 8


def edges(
    extent: np.ndarray | int, parts: Sequence[int], rules: Sequence[int], index: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and one past the last row of parts, or of parts of parts.

    Args:
        extent: Rows, of any shape that broadcasts with that of *index* but for its last dimension.
        parts: In how many parts each axis cuts, the outermost first.
        rules: By which rules.
        index: (…, axes) which of the parts.
    """
    low: np.ndarray = np.zeros((), np.int64)
    high = np.asarray(extent)
    for axis, (count, rule) in enumerate(zip(parts, rules, strict=True)):
        begin, end = cut_edges(high - low, count, rule, index[..., axis])
        low, high = low + begin, low + end
    return low, high


def rules_of(bits: int, axes: int) -> tuple[int, ...]:
    """Return one of the rules that the bits of `ways_rules` stand for: one an axis."""
    return _RULES[axes][(bits & -bits).bit_length() - 1]


def ways_rules(cut: Cut, way: Way) -> int:
    """Return by which rules a cut is what a way says, as bits; none if it isn't.

    By which of them it was made, one rank can't always tell.
    """
    low: dict[tuple[int, ...], int] = {(): 0}
    high: dict[tuple[int, ...], int] = {(): cut[0]}
    for axis in way:
        parts = {
            (*outer, rule): _part(high[outer] - low[outer], axis, rule)
            for outer in low
            if low[outer] <= cut[1] and cut[2] <= high[outer]
            for rule in (BALANCED, CEILING)
        }
        low, high = (
            {rules: low[rules[:-1]] + part[end] for rules, part in parts.items()} for end in (0, 1)
        )
    return sum(
        1 << bit
        for bit, rules in enumerate(_RULES[len(way)])
        if rules in low and (low[rules], high[rules]) == cut[1:]
    )


def find_ways(cuts: Sequence[Cut], *, rank: int, ranks: int) -> list[Way | None]:
    """Find what each cut is, by as few different axes as can be; None for what follows no rule.

    Any answer is right: what a way says is exactly that cut. Alike on all ranks, the answer is also
    short.

    Args:
        cuts: A rank's.
        rank: The rank.
        ranks: How many there are: parts of which the number divides it are what is looked for.
    """
    said = _candidates(cuts, rank=rank, ranks=ranks)
    found: list[Way | None] = [None] * len(cuts)
    left = set(range(len(cuts)))

    def take(ways: dict[int, Way]) -> None:
        for number in left & ways.keys():
            found[number] = ways[number]
        left.difference_update(ways)

    if left and not any(len(numbers) == len(cuts) for numbers in said.values()):
        take(_best_pair(cuts, said, rank=rank, ranks=ranks))
    while left:
        best = max(said, key=lambda axis: len(said[axis] & left), default=None)
        if best is None or not said[best] & left:
            break
        take(dict.fromkeys(said[best], (best,)))
    for number in left:
        extent, first, last = cuts[number]
        # A part of a cut in equal parts, but for the last, of which the size is not to be seen.
        if first < last < extent and first % (last - first) == 0:
            way = ((-(-extent // (last - first)), first // (last - first)),)
            found[number] = way if ways_rules(cuts[number], way) else None
    return found


def _candidates(cuts: Sequence[Cut], *, rank: int, ranks: int) -> dict[Axis, set[int]]:
    """Return the axes that say any of the cuts, and which, those of most parts first."""
    said: dict[Axis, set[int]] = {}
    for parts in _divisors(ranks):
        spans = [[_indices(cut, parts, rule) for rule in (BALANCED, CEILING)] for cut in cuts]
        indices = {low for pair in spans for low, high in filter(None, pair) if low == high}
        # Where it has no element, a cut doesn't say which part it is: then by the rank's number.
        indices |= {rank % parts, rank // (ranks // parts)}
        for index in sorted(indices):
            numbers = {
                number
                for number, pair in enumerate(spans)
                if any(low <= index <= high for low, high in filter(None, pair))
            }
            if numbers:
                said[parts, index] = numbers
    return said


def _best_pair(
    cuts: Sequence[Cut], said: dict[Axis, set[int]], *, rank: int, ranks: int
) -> dict[int, Way]:
    """Find the two axes that say most cuts, each by itself or one within the other; and how."""
    best: dict[int, Way] = {}
    for outer, inner in _pairs(said, rank=rank, ranks=ranks):
        ways: dict[int, Way] = dict.fromkeys(said[inner], (inner,))
        ways.update(dict.fromkeys(said[outer], (outer,)))
        if ranks % (outer[0] * inner[0]) == 0:
            for number in range(len(cuts)):
                if number not in ways and ways_rules(cuts[number], (outer, inner)):
                    ways[number] = (outer, inner)
        if len(ways) > len(best):
            best = ways
        if len(best) == len(cuts):
            break
    return best


def _pairs(said: dict[Axis, set[int]], *, rank: int, ranks: int) -> Iterator[tuple[Axis, Axis]]:
    """Yield the pairs of axes to try, what is most likely first: two that number all ranks.

    Both may be alike: of a mesh of 8 by 8, rank 9 has part 1 of part 1.
    """
    for parts in _divisors(ranks):
        other = ranks // parts
        for outer, inner in (
            ((parts, rank % parts), (other, rank // parts)),
            ((parts, rank // other), (other, rank % other)),
        ):
            if outer in said and inner in said:
                yield outer, inner
    distinct: dict[frozenset[int], Axis] = {}
    for axis, numbers in said.items():
        distinct.setdefault(frozenset(numbers), axis)
    some = sorted(distinct.values(), key=lambda axis: -len(said[axis]))[:_MOST_CANDIDATES]
    yield from product(some, repeat=2)


def _part(extent: int, axis: Axis, rule: int) -> tuple[int, int]:
    """Return a part of a cut; as `cut_edges`, of plain numbers."""
    parts, index = axis
    if rule == BALANCED:
        size, more = divmod(extent, parts)
        return index * size + min(index, more), (index + 1) * size + min(index + 1, more)
    size = -(-extent // parts)
    return min(index * size, extent), min((index + 1) * size, extent)


def _divisors(number: int) -> list[int]:
    """Return the divisors but 1, the number itself first."""
    small = [found for found in range(1, int(number**0.5) + 1) if number % found == 0]
    return sorted({*small, *(number // found for found in small)} - {1}, reverse=True)


def _indices(cut: Cut, parts: int, rule: int) -> tuple[int, int] | None:
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
