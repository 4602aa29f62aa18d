"""Tensors that thousands of ranks hold alike: planned without listing the boxes of each.

Of a tensor cut 8,960 times by FSDP, each rank has one box, and 3,400 such tensors have 30 million.
Nothing about any single one of them needs to be known. Mostly the boxes are a grid: it covers the
tensor exactly once, and which rank stores which box follows from the box's place in it. Where the
parts of a cut are cut again, they may be none: then those of one tensor are listed, for all that
are of its shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from distckpt.layout import Grid, Layout, cut_edges, used_parts, wrong_covers
from distckpt.plan.columns import distinct_rows
from distckpt.plan.cuts import rules_of
from distckpt.plan.merge import Tensors, Use, World

# Up to so many boxes a tensor, listing them costs nothing, and shares replicas out more evenly.
LISTED_CELLS = 64
# Whole tensors are dealt out to replicas if the loads then differ by no more than this part.
_UNEVEN = 1 / 500


class Cells(Protocol):
    """The boxes that a tensor is cut into, in ascending order."""

    def elements(self, shape: Sequence[int]) -> np.ndarray:
        """(cells,) how many elements each has of a tensor of this padded shape."""

    def layout(self, shape: tuple[int, ...], pad: int, files: np.ndarray) -> Layout:
        """Return the layout of a tensor of this shape.

        Args:
            shape: Without padding.
            pad: Dimensions that padding adds.
            files: (cells,) the file of each.
        """


@dataclass(frozen=True, slots=True)
class GridCells:
    """Boxes that are a grid.

    Attributes:
        dims: Dimensions that are cut.
        rule: By which rule.
        parts: In how many parts that are not empty.
    """

    dims: tuple[int, ...]
    rule: tuple[int, ...]
    parts: tuple[int, ...]

    def elements(self, shape: Sequence[int]) -> np.ndarray:
        """See `Cells`."""
        size = np.ones(self.parts, np.int64)
        for dim, extent in enumerate(shape):
            if dim not in self.dims:
                size *= extent
                continue
            place = self.dims.index(dim)
            count = self.parts[place]
            low, high = cut_edges(extent, count, self.rule[place], np.arange(count))
            size *= (high - low).reshape([-1 if at == place else 1 for at in range(size.ndim)])
        return size.reshape(-1)

    def layout(self, shape: tuple[int, ...], pad: int, files: np.ndarray) -> Layout:
        """See `Cells`."""
        parts, rule, stride = [1] * len(shape), [0] * len(shape), [0] * len(shape)
        affine = file_grid(files, self.parts)
        for place, dim in enumerate(self.dims):
            parts[dim - pad] = self.parts[place]
            rule[dim - pad] = self.rule[place]
            stride[dim - pad] = affine[1][place] if affine is not None else 0
        base = affine[0] if affine is not None else 0
        found = Layout.of_grid(shape, Grid(tuple(parts), tuple(rule), base, tuple(stride)))
        return found if affine is not None else Layout(shape, found.start, found.stop, files)


@dataclass(frozen=True, slots=True)
class ListedCells:
    """Boxes of any kind, of tensors of one shape.

    Attributes:
        start: (cells, width).
        stop: (cells, width).
    """

    start: np.ndarray
    stop: np.ndarray

    def elements(self, shape: Sequence[int]) -> np.ndarray:  # noqa: ARG002  there is one only
        """See `Cells`."""
        size: np.ndarray = (self.stop - self.start).prod(axis=1)
        return size

    def layout(self, shape: tuple[int, ...], pad: int, files: np.ndarray) -> Layout:
        """See `Cells`."""
        return Layout(shape, self.start[:, pad:], self.stop[:, pad:], files)


@dataclass(frozen=True, slots=True)
class Family:
    """Tensors that the same ranks hold in the same boxes.

    Attributes:
        uses: The templates' items, each with the same tensors, in order.
        tensor: (tensors,) the tensors.
        replica: (tensors,) which of a box's holders stores it.
        cells: The boxes.
        holders: (cells, replicas) who holds each box.
    """

    uses: list[Use]
    tensor: np.ndarray
    replica: np.ndarray
    cells: Cells
    holders: np.ndarray

    def cell_bytes(self, tensors: Tensors, *, of_replica: int) -> np.ndarray:
        """Return for each cell the bytes that one of its replicas stores."""
        total = np.zeros(len(self.holders), np.int64)
        mine = self.tensor[self.replica == of_replica]
        shapes, kind = distinct_rows(tensors.shape[mine])
        weights = np.zeros(len(shapes), np.int64)
        np.add.at(weights, kind, tensors.itemsize[mine])
        for row, weight in zip(mine[shapes].tolist(), weights.tolist(), strict=True):
            total += self.cells.elements(tensors.shape[row].tolist()) * weight
        return total


def find_families(
    world: World, *, one_holder: np.ndarray, listed_cells: int = LISTED_CELLS
) -> tuple[list[Family], list[Use]]:
    """Tell the tensors of many boxes that are held alike from the rest.

    Args:
        world: What is held.
        one_holder: (tensors,) of which only the lowest rank that holds a box may store it.
        listed_cells: Tensors of up to so many boxes are not looked at.

    Returns:
        The families of the former, and the uses of the latter.
    """
    large = np.array([use.cells > listed_cells for use in world.uses], bool)
    if not large.any():
        return [], world.uses
    tensor = np.concatenate([use.tensor for use in world.uses])
    of_use = np.repeat(np.arange(len(world.uses)), [len(use.tensor) for use in world.uses])
    row = np.concatenate([np.arange(len(use.tensor)) for use in world.uses])
    regular = np.zeros(len(world.tensors.names), bool)
    regular[tensor[large[of_use]]] = True
    regular[world.odd_tensor[world.odd.first < world.odd.last]] = False
    order = np.lexsort((of_use, tensor))
    order = order[regular[tensor[order]]]
    by_uses: dict[tuple[int, ...], list[np.ndarray]] = {}
    for rows in np.split(order, np.flatnonzero(np.diff(tensor[order])) + 1) if len(order) else []:
        by_uses.setdefault(tuple(of_use[rows].tolist()), []).append(rows)
    families: list[Family] = []
    for key, lists in by_uses.items():
        table = row[np.stack(lists)]  # (tensors, uses) rows in the uses
        mine = [world.uses[index].take(table[:, place]) for place, index in enumerate(key)]
        for family in _families(world.tensors, mine, listed_cells):
            families += _dealt(world.tensors, family, one_holder, ranks=world.ranks)
    taken = np.zeros(len(world.tensors.names), bool)
    for family in families:
        taken[family.tensor] = True
    rest = [use.take(np.flatnonzero(~taken[use.tensor])) for use in world.uses]
    return families, [use for use in rest if len(use.item)]


def _families(tensors: Tensors, uses: list[Use], listed_cells: int) -> Iterator[Family]:
    """Yield families of tensors that are all held by the same uses; leave out what is irregular."""
    shape = tensors.shape[uses[0].tensor]
    left = np.ones(len(shape), bool)
    for rows, cells, ranks, cell in _grids(uses, shape):
        holders = _holders(ranks, cell, cells=int(np.prod(cells.parts)))
        if holders is not None and len(holders) > listed_cells:
            left[rows] = False
            yield _family(uses, rows, cells, holders)
    left = np.flatnonzero(left)
    firsts, kind = distinct_rows(shape[left])
    for number, first in enumerate(left[firsts].tolist()):
        found = _listed(uses, shape[first])
        if found is None:
            continue
        listed, ranks, cell = found
        holders = _holders(ranks, cell, cells=len(listed.start))
        if holders is not None and len(holders) > listed_cells:
            yield _family(uses, left[kind == number], listed, holders)


def _family(uses: Sequence[Use], rows: np.ndarray, cells: Cells, holders: np.ndarray) -> Family:
    some = [use.take(rows) for use in uses]
    return Family(some, some[0].tensor, np.zeros(len(rows), np.int64), cells, holders)


def _grids(
    uses: Sequence[Use], shape: np.ndarray
) -> Iterator[tuple[np.ndarray, GridCells, np.ndarray, np.ndarray]]:
    """Yield the grids that the uses may be.

    Args:
        uses: Of the same tensors.
        shape: (tensors, width) these tensors' shapes.

    Yields:
        Which tensors, their grid, and who holds a part, and which.
    """
    first = uses[0]
    if not first.cuts or any(len(cut.parts) > 1 for cut in first.cuts):
        return
    cut = [(of_dim.dim, of_dim.parts) for of_dim in first.cuts]
    if any([(of_dim.dim, of_dim.parts) for of_dim in use.cuts] != cut for use in uses):
        return
    dims = tuple(dim for dim, _ in cut)
    bits = np.bitwise_and.reduce([[cut.rules for cut in use.cuts] for use in uses])
    if not bits.all():
        return
    rule = tuple(rules_of(of_dim, 1)[0] for of_dim in bits.tolist())
    ranks = np.concatenate([use.ranks for use in uses])
    coordinates = np.concatenate(
        [use.coordinates[:, [cut.columns[0] for cut in use.cuts]] for use in uses]
    )
    used = np.column_stack(
        [
            [used_parts(extent, parts, of_dim) for extent in shape[:, dim].tolist()]
            for (dim, (parts,)), of_dim in zip(cut, rule, strict=True)
        ]
    )
    firsts, kind = distinct_rows(used)
    for number, parts in enumerate(used[firsts]):
        inside = np.flatnonzero((coordinates < parts).all(axis=1))
        yield (
            np.flatnonzero(kind == number),
            GridCells(dims, rule, tuple(parts.tolist())),
            ranks[inside],
            np.ravel_multi_index(tuple(coordinates[inside].T), tuple(parts.tolist())),
        )


def _listed(
    uses: Sequence[Use], shape: np.ndarray
) -> tuple[ListedCells, np.ndarray, np.ndarray] | None:
    """List the boxes of a tensor of a shape; None if they don't cover it exactly once.

    Returns:
        The boxes, and who holds one, and which.
    """
    boxes = [use.boxes(shape[None], use.coordinates) for use in uses]
    start, stop = (np.concatenate([found[end][0] for found in boxes]) for end in (0, 1))
    some = np.flatnonzero((start < stop).all(axis=1))
    firsts, kind = distinct_rows(np.column_stack([start, stop])[some])
    order = np.lexsort(start[some[firsts]].T[::-1])
    listed = ListedCells(start[some[firsts[order]]], stop[some[firsts[order]]])
    none = np.zeros(len(order), np.int64)
    if not len(order) or len(wrong_covers(none, listed.start, listed.stop, shape[None])):
        return None
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    ranks = np.concatenate([use.ranks for use in uses])
    return listed, ranks[some], place[kind]


def _holders(ranks: np.ndarray, cell: np.ndarray, *, cells: int) -> np.ndarray | None:
    """Return who holds each cell, (cells, replicas); None if some are held by more than others."""
    count = np.bincount(cell, minlength=cells)
    if not count.all() or (count != count[0]).any():
        return None
    return ranks[np.lexsort((ranks, cell))].reshape(cells, -1)


def _dealt(tensors: Tensors, family: Family, one_holder: np.ndarray, *, ranks: int) -> list[Family]:
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
        Family(
            [use.take(kept) for use in family.uses],
            family.tensor[kept],
            replica[kept],
            family.cells,
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
