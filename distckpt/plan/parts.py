"""What each rank is told of a plan: the tables of all ranks, and one rank's part of them.

A part has three columns, so that what several ranks are told alike is sent once: the grids that the
ranks of a template hold, what they hold that others do, and what a rank alone has to do.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distckpt import dtypes
from distckpt.bundle import Distinct
from distckpt.plan.columns import columns_from_bytes, columns_to_bytes, distinct_lists
from distckpt.plan.grids import Family
from distckpt.plan.holdings import Holdings
from distckpt.plan.summary import Summary
from distckpt.region import ranges

# Bytes of a number, width, rows, checks, grids, and one plus the values' and the grids' file.
_OWN = struct.Struct("<BHIIIII")
_ROW, _CHECK, _GRID = 4, 4, 3  # numbers of a row beside its box, of a check, of a grid


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
class RowTable:
    """Boxes to be stored, in the order of the ranks and their files.

    Attributes:
        rank: (rows,) who stores it.
        item: (rows,) number of the item; see `World`.
        tensor: (rows,) index of the tensor.
        source: (rows,) first element in the item's C order.
        start: (rows, width) the box.
        stop: (rows, width).
        file: (rows,) the file.
    """

    rank: np.ndarray
    item: np.ndarray
    tensor: np.ndarray
    source: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    file: np.ndarray


@dataclass(frozen=True, slots=True)
class CheckTable:
    """What sets of ranks have to compare with others.

    Attributes:
        holders: (rows,) index of the set.
        item: (rows,) number of the item; see `World`.
        source: (rows,) first element in its C order.
        size: (rows,) elements.
        check: (rows,) number of the comparison.
    """

    holders: np.ndarray
    item: np.ndarray
    source: np.ndarray
    size: np.ndarray
    check: np.ndarray


@dataclass(frozen=True, slots=True)
class GridTable:
    """The families of grids, and the first comparison of each of their tensors, or -1."""

    families: Sequence[Family]
    check: Sequence[np.ndarray]


@dataclass(frozen=True, slots=True)
class PartTables:
    """What all ranks are told.

    Attributes:
        template: (ranks,) each rank's template.
        templates: How many templates there are.
        rows: Boxes.
        checks: Comparisons.
        grids: Grids.
        blob_file: (ranks,) the file of a rank's per-rank values, or -1.
        grid_file: (ranks,) the file of a rank's boxes of grids, or -1.
        sets: The sets of ranks that the comparisons name.
    """

    template: np.ndarray
    templates: int
    rows: RowTable
    checks: CheckTable
    grids: GridTable
    blob_file: np.ndarray
    grid_file: np.ndarray
    sets: Sequence[np.ndarray]


def parts_to_bytes(tables: PartTables) -> list[Distinct]:
    """Make the three columns of what each rank is told."""
    ranks = len(tables.template)
    shared, own_checks = _shared_checks(tables, ranks)
    return [
        Distinct(_grids_to_bytes(tables), tables.template),
        shared,
        Distinct(_owns_to_bytes(tables, own_checks), np.arange(ranks)),
    ]


def _grids_to_bytes(tables: PartTables) -> list[bytes]:
    """Tell each template which items are grids: item, tensor, family, replica, comparison."""
    columns: list[list[list[np.ndarray]]] = [
        [[np.zeros(0, np.int64)] for _ in range(5)] for _ in range(tables.templates)
    ]
    for number, (family, check) in enumerate(
        zip(tables.grids.families, tables.grids.check, strict=True)
    ):
        for use in family.uses:
            values = (
                use.item,
                use.tensor,
                np.full(len(use.item), number),
                family.replica,
                check + 1,
            )
            for column, value in zip(columns[use.template], values, strict=True):
                column.append(value)
    return [
        columns_to_bytes([np.concatenate(column) for column in of_template])
        for of_template in columns
    ]


def _shared_checks(
    tables: PartTables, ranks: int
) -> tuple[Distinct, tuple[np.ndarray, np.ndarray]]:
    """Tell what sets of several ranks have to compare: ranks of the same sets are told the same.

    Returns:
        One content a rank; and who else, and which row of the checks, is told by itself.
    """
    checks = tables.checks
    order = np.argsort(checks.holders, kind="stable")
    holders = checks.holders[order]
    used, first = np.unique(holders, return_index=True)
    count = np.diff(np.append(first, len(holders)))
    members = np.array([len(tables.sets[number]) for number in used.tolist()], np.int64)
    # (rank, place of its set): the lists of sets that have anything to compare.
    alone = np.flatnonzero(members == 1)
    several = np.flatnonzero(members > 1)
    sets = [tables.sets[number] for number in used[several].tolist()]
    rank = np.concatenate([*sets, np.zeros(0, np.int64)])
    place = np.repeat(several, members[several])
    by_rank = np.lexsort((place, rank))
    rank, place = rank[by_rank], place[by_rank]
    told, edges = np.unique(rank, return_index=True)
    edges = np.append(edges, len(rank))
    firsts, kind = distinct_lists(place, edges)
    payloads = [columns_to_bytes([np.zeros(0, np.int64)] * _CHECK)]
    for number in firsts.tolist():
        some = place[edges[number] : edges[number + 1]]
        rows = order[ranges(first[some], count[some])]
        payloads.append(
            columns_to_bytes(
                [checks.item[rows], checks.source[rows], checks.size[rows], checks.check[rows]]
            )
        )
    of_rank = np.zeros(ranks, np.int64)
    of_rank[told] = kind + 1
    own_rank = np.array([int(tables.sets[number][0]) for number in used[alone].tolist()], np.int64)
    return Distinct(payloads, of_rank), (
        np.repeat(own_rank, count[alone]),
        order[ranges(first[alone], count[alone])],
    )


def _owns_to_bytes(tables: PartTables, own_checks: tuple[np.ndarray, np.ndarray]) -> list[bytes]:
    """Tell each rank what it alone has to do: rows, checks, and its place in the grids."""
    ranks = len(tables.template)
    rows, checks = tables.rows, tables.checks
    row_table = np.column_stack(
        [rows.item, rows.tensor, rows.source, rows.file, rows.start, rows.stop]
    )
    check_rank, some = own_checks
    by_rank = np.argsort(check_rank, kind="stable")
    check_rank, some = check_rank[by_rank], some[by_rank]
    check_table = np.column_stack(
        [checks.item[some], checks.source[some], checks.size[some], checks.check[some]]
    )
    grids = [np.zeros((0, 1 + _GRID), np.int64)]
    for number, family in enumerate(tables.grids.families):
        cells, replicas = family.holders.shape
        grids.append(
            np.column_stack(
                [
                    family.holders.reshape(-1),
                    np.full(cells * replicas, number),
                    np.tile(np.arange(replicas), cells),
                    np.repeat(np.arange(cells), replicas),
                ]
            )
        )
    grid_table = np.concatenate(grids)
    grid_table = grid_table[np.argsort(grid_table[:, 0], kind="stable")]
    numbers = np.arange(ranks + 1)
    row_edges = np.searchsorted(rows.rank, numbers)
    check_edges = np.searchsorted(check_rank, numbers)
    grid_edges = np.searchsorted(grid_table[:, 0], numbers)
    highest = max(
        (int(found.max()) for found in (row_table, check_table, grid_table) if found.size),
        default=0,
    )
    itemsize = 4 if highest < 1 << 32 else 8
    width = rows.start.shape[1]
    row_bytes = row_table.astype(f"<u{itemsize}").tobytes()
    check_bytes = check_table.astype(f"<u{itemsize}").tobytes()
    grid_bytes = np.ascontiguousarray(grid_table[:, 1:]).astype(f"<u{itemsize}").tobytes()
    row_step, check_step = itemsize * row_table.shape[1], itemsize * _CHECK
    grid_step = itemsize * _GRID
    payloads = []
    row_at, check_at, grid_at = row_edges.tolist(), check_edges.tolist(), grid_edges.tolist()
    blobs, files = tables.blob_file.tolist(), tables.grid_file.tolist()
    for rank in range(ranks):
        row, row_end = row_at[rank], row_at[rank + 1]
        check, check_end = check_at[rank], check_at[rank + 1]
        grid, grid_end = grid_at[rank], grid_at[rank + 1]
        payloads.append(
            _OWN.pack(
                itemsize,
                width,
                row_end - row,
                check_end - check,
                grid_end - grid,
                blobs[rank] + 1,
                files[rank] + 1,
            )
            + row_bytes[row * row_step : row_end * row_step]
            + check_bytes[check * check_step : check_end * check_step]
            + grid_bytes[grid * grid_step : grid_end * grid_step]
        )
    return payloads


def part_from_bytes(told: Sequence[bytes], held: Holdings, summary: Summary) -> WritePart:
    """Read a rank's part.

    Args:
        told: The rank's contents of the three columns.
        held: What it holds.
        summary: What it has said of that.
    """
    grid_item, grid_tensor, family, replica, check = columns_from_bytes(told[0])
    shared = columns_from_bytes(told[1])
    itemsize, width, rows, checks, grids, blob, file = _OWN.unpack_from(told[2])
    numbers = np.frombuffer(told[2], f"<u{itemsize}", offset=_OWN.size).astype(np.int64)
    table, rest = np.split(numbers, [rows * (_ROW + 2 * width)])
    table = table.reshape(rows, _ROW + 2 * width)
    own, places = np.split(rest, [checks * _CHECK])
    own, places = own.reshape(checks, _CHECK), places.reshape(grids, _GRID)

    # What is stored of the grids: whole items of this rank, if the replica is this rank's.
    families = int(family.max()) + 1 if len(family) else 0
    my_replica, my_cell = np.full(families, -1), np.full(families, -1)
    known = places[:, 0] < families
    my_replica[places[known, 0]], my_cell[places[known, 0]] = places[known, 1], places[known, 2]
    stored = np.flatnonzero(replica == my_replica[family])
    items = summary.regular[grid_item[stored]]
    item = np.concatenate([_item_numbers(table[:, 0], summary), items])
    tensor = np.concatenate([table[:, 1], grid_tensor[stored]])
    pad = ((0, 0), (width - held.width, 0))
    start = np.concatenate([table[:, _ROW : _ROW + width], np.pad(held.start[items], pad)])
    stop = np.concatenate(
        [table[:, _ROW + width :], np.pad(held.stop[items], pad, constant_values=1)]
    )
    source = np.concatenate([table[:, 2], np.zeros(len(items), np.int64)])
    files = np.concatenate([table[:, 3], np.full(len(items), file - 1)])
    order = np.lexsort((*start.T[::-1], tensor, -dtypes.itemsizes(held.dtype[item]), files))

    compared = np.flatnonzero((check > 0) & (my_cell[family] >= 0))
    grid_items = summary.regular[grid_item[compared]]
    size = held.last - held.first
    return WritePart(
        item[order],
        source[order],
        start[order],
        stop[order],
        files[order],
        np.concatenate([_item_numbers(np.append(shared[0], own[:, 0]), summary), grid_items]),
        np.concatenate([shared[1], own[:, 1], np.zeros(len(grid_items), np.int64)]),
        np.concatenate([shared[2], own[:, 2], size[grid_items]]),
        np.concatenate([shared[3], own[:, 3], check[compared] - 1 + my_cell[family[compared]]]),
        blob - 1,
    )


def _item_numbers(items: np.ndarray, summary: Summary) -> np.ndarray:
    """Find the rank's own numbers of items; see `World`."""
    number = np.empty(len(items), np.int64)
    is_odd = items % 2 == 1
    number[is_odd] = summary.odd[items[is_odd] // 2]
    number[~is_odd] = summary.regular[items[~is_odd] // 2]
    return number
