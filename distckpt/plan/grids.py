"""Tensors that thousands of ranks hold as one regular grid: planned without listing their boxes.

Of a tensor cut 8,960 times by FSDP, each rank has one box, and 3,400 such tensors have 30 million.
Nothing about any single one of them needs to be known: the grid covers the tensor exactly once, and
which rank stores which box follows from the box's place in the grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distckpt.layout import cut_edges, used_parts
from distckpt.plan.columns import distinct_rows
from distckpt.plan.merge import Tensors, Use, World, a_rule

# Up to so many boxes a tensor, listing them costs nothing, and shares replicas out more evenly.
LISTED_CELLS = 64
# Whole tensors are dealt out to replicas if the loads then differ by no more than this part.
_UNEVEN = 1 / 500


@dataclass(frozen=True, slots=True)
class GridFamily:
    """Tensors that the same ranks hold in the same grid.

    Attributes:
        uses: The templates' items, each with the same tensors, in order.
        tensor: (tensors,) the tensors.
        replica: (tensors,) which of a box's holders stores it.
        dims: Dimensions that are cut.
        rule: By which rule.
        parts: In how many parts that are not empty.
        holders: (cells, replicas) who holds each box, in the order of the grid.
    """

    uses: list[Use]
    tensor: np.ndarray
    replica: np.ndarray
    dims: tuple[int, ...]
    rule: tuple[int, ...]
    parts: tuple[int, ...]
    holders: np.ndarray

    def cell_bytes(self, tensors: Tensors, *, of_replica: int) -> np.ndarray:
        """Return for each cell the bytes that one of its replicas stores."""
        total = np.zeros(len(self.holders), np.int64)
        mine = self.tensor[self.replica == of_replica]
        shapes, kind = distinct_rows(tensors.shape[mine])
        weights = np.zeros(len(shapes), np.int64)
        np.add.at(weights, kind, tensors.itemsize[mine])
        coordinates = np.unravel_index(np.arange(len(self.holders)), self.parts)
        for row, weight in zip(mine[shapes].tolist(), weights.tolist(), strict=True):
            size = np.full(len(self.holders), weight)
            for dim, extent in enumerate(tensors.shape[row].tolist()):
                if dim in self.dims:
                    index = self.dims.index(dim)
                    low, high = cut_edges(
                        extent, self.parts[index], self.rule[index], coordinates[index]
                    )
                    size *= high - low
                else:
                    size *= extent
            total += size
        return total


def find_grids(
    world: World, *, one_holder: np.ndarray, listed_cells: int = LISTED_CELLS
) -> tuple[list[GridFamily], list[Use]]:
    """Tell the regular tensors of many boxes from the rest.

    Args:
        world: What is held.
        one_holder: (tensors,) of which only the lowest rank that holds a box may store it.
        listed_cells: Tensors of up to so many boxes are not looked at.

    Returns:
        The families of the former, and the uses of the latter.
    """
    large = np.array([math.prod(use.parts) > listed_cells for use in world.uses], bool)
    if not large.any():
        return [], world.uses
    tensor = np.concatenate([use.tensor for use in world.uses])
    of_use = np.repeat(np.arange(len(world.uses)), [len(use.tensor) for use in world.uses])
    row = np.concatenate([np.arange(len(use.tensor)) for use in world.uses])
    regular = np.ones(len(world.tensors.names), bool)
    regular[tensor[~large[of_use]]] = False
    regular[world.odd_tensor[world.odd.first < world.odd.last]] = False
    order = np.lexsort((of_use, tensor))
    order = order[regular[tensor[order]]]
    by_uses: dict[tuple[int, ...], list[np.ndarray]] = {}
    for rows in np.split(order, np.flatnonzero(np.diff(tensor[order])) + 1) if len(order) else []:
        by_uses.setdefault(tuple(of_use[rows].tolist()), []).append(rows)
    families: list[GridFamily] = []
    for key, lists in by_uses.items():
        table = row[np.stack(lists)]  # (tensors, uses) rows in the uses
        mine = [world.uses[index].take(table[:, place]) for place, index in enumerate(key)]
        families += _families(world, mine, one_holder, listed_cells)
    taken = np.zeros(len(world.tensors.names), bool)
    for family in families:
        taken[family.tensor] = True
    rest = [use.take(np.flatnonzero(~taken[use.tensor])) for use in world.uses]
    return families, [use for use in rest if len(use.item)]


def _families(
    world: World, uses: list[Use], one_holder: np.ndarray, listed_cells: int
) -> list[GridFamily]:
    """Make families of tensors that are all held by the same uses; leave out what is irregular."""
    tensors, first = world.tensors, uses[0]
    if not first.dims or any((use.dims, use.parts) != (first.dims, first.parts) for use in uses):
        return []
    rules = np.bitwise_and.reduce([use.rules for use in uses])
    if not rules.all():
        return []
    rule = tuple(a_rule(bits) for bits in rules.tolist())
    ranks = np.concatenate([use.ranks for use in uses])
    coordinates = np.concatenate([use.coordinates for use in uses])
    shape = tensors.shape[first.tensor]
    used = np.column_stack(
        [
            [used_parts(extent, parts, rule) for extent in shape[:, dim].tolist()]
            for dim, parts, rule in zip(first.dims, first.parts, rule, strict=True)
        ]
    )
    firsts, kind = distinct_rows(used)
    found = []
    for number, parts in enumerate(used[firsts]):
        rows = np.flatnonzero(kind == number)
        cells = int(parts.prod())
        inside = np.flatnonzero((coordinates < parts).all(axis=1))
        if not listed_cells < cells <= len(inside) or len(inside) % cells:
            continue
        cell = np.ravel_multi_index(tuple(coordinates[inside].T), tuple(parts.tolist()))
        count = np.bincount(cell, minlength=cells)
        if (count != count[0]).any():
            continue
        inside = inside[np.lexsort((ranks[inside], cell))]
        holders = ranks[inside].reshape(cells, -1)
        some = [use.take(rows) for use in uses]
        found += _dealt(
            tensors,
            GridFamily(
                some,
                some[0].tensor,
                np.zeros(len(rows), np.int64),
                first.dims,
                rule,
                tuple(parts.tolist()),
                holders,
            ),
            one_holder,
            ranks=world.ranks,
        )
    return found


def _dealt(
    tensors: Tensors, family: GridFamily, one_holder: np.ndarray, *, ranks: int
) -> list[GridFamily]:
    """Deal whole tensors out to the replicas; leave the largest out where that would be uneven."""
    replicas = family.holders.shape[1]
    if replicas == 1:
        return [family]
    size = tensors.size[family.tensor] * tensors.itemsize[family.tensor]
    fair = float((tensors.size * tensors.itemsize).sum()) / ranks * len(family.holders)
    order = np.argsort(-size, kind="stable")
    kept = order
    for left_out in (0, 2 * replicas, 8 * replicas):
        kept = order[left_out:]
        if not len(kept):
            return []
        load = np.zeros(replicas)
        replica = np.zeros(len(size), np.int64)
        for row in kept.tolist():
            least = 0 if one_holder[family.tensor[row]] else int(load.argmin())
            replica[row] = least
            load[least] += size[row]
        if load.max() - load.min() <= _UNEVEN * fair or one_holder[family.tensor[kept]].all():
            break
    else:
        return []
    kept = np.sort(kept)
    return [
        GridFamily(
            [use.take(kept) for use in family.uses],
            family.tensor[kept],
            replica[kept],
            family.dims,
            family.rule,
            family.parts,
            family.holders,
        )
    ]


def file_grid(numbers: np.ndarray, parts: Sequence[int]) -> tuple[int, tuple[int, ...]] | None:
    """Write the file of each cell as base + Σ stride·coordinate; None if it is not so."""
    grid = numbers.reshape(tuple(parts))
    base = int(numbers[0])
    strides = []
    expected = np.full(grid.shape, base)
    for dim, count in enumerate(parts):
        step = int(np.take(grid, 1, axis=dim).flat[0]) - base if count > 1 else 0
        strides.append(step)
        shape = [1] * len(parts)
        shape[dim] = count
        expected = expected + (step * np.arange(count)).reshape(shape)
    return (base, tuple(strides)) if np.array_equal(expected, grid) else None
