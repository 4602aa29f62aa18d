"""All ranks' holdings in one place: tensors numbered, and each regular way of holding once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from distckpt import dtypes
from distckpt.bundle import Distinct
from distckpt.errors import LayoutError
from distckpt.manifest import pad_columns
from distckpt.plan.columns import distinct_rows
from distckpt.plan.cuts import edges, rules_of
from distckpt.plan.summary import (
    NOTHING,
    WHOLE,
    Odd,
    Template,
    owns_from_bytes,
    template_from_bytes,
)


@dataclass(frozen=True, slots=True)
class Tensors:
    """All tensors, in columns.

    Attributes:
        names: Their names: what rank 0 holds in its order, then the others, sorted.
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

    @property
    def width(self) -> int:
        """Dimensions after padding."""
        return int(self.shape.shape[1])

    def true_shape(self, tensor: int) -> tuple[int, ...]:
        """Return a tensor's shape without padding."""
        return tuple(self.shape[tensor, self.width - int(self.ndim[tensor]) :].tolist())


@dataclass(frozen=True, slots=True)
class Cut:
    """How one dimension is cut; see `cuts`.

    Attributes:
        dim: The dimension.
        columns: The columns of `Use.coordinates` that say which part, the outermost first.
        parts: In how many parts each of these cuts.
        rules: By which rules, as bits: any of them is right.
    """

    dim: int
    columns: tuple[int, ...]
    parts: tuple[int, ...]
    rules: int


@dataclass(frozen=True, slots=True)
class Use:
    """Tensors that the ranks of one template hold in one way.

    Attributes:
        template: Index of the template.
        item: (n,) the items in it.
        tensor: (n,) their tensors.
        cuts: How the dimensions that are cut are cut.
        ranks: (ranks,) who holds them, ascending.
        coordinates: (ranks, axes) which part each of these has.
    """

    template: int
    item: np.ndarray
    tensor: np.ndarray
    cuts: tuple[Cut, ...]
    ranks: np.ndarray
    coordinates: np.ndarray

    @property
    def cells(self) -> int:
        """In how many parts a tensor is cut, empty ones included."""
        return math.prod(parts for cut in self.cuts for parts in cut.parts)

    def take(self, rows: np.ndarray) -> Use:
        """Select items."""
        return replace(self, item=self.item[rows], tensor=self.tensor[rows])

    def boxes(self, shape: np.ndarray, coordinates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the boxes that some coordinates stand for.

        Args:
            shape: (n, width) the tensors' shapes.
            coordinates: (places, axes).

        Returns:
            Start and stop, (n, places, width).
        """
        start = np.zeros((len(shape), len(coordinates), shape.shape[1]), np.int64)
        stop = np.repeat(shape[:, None, :], len(coordinates), axis=1)
        for cut in self.cuts:
            start[:, :, cut.dim], stop[:, :, cut.dim] = edges(
                shape[:, cut.dim, None],
                cut.parts,
                rules_of(cut.rules, len(cut.parts)),
                coordinates[None][:, :, cut.columns],
            )
        return start, stop


@dataclass(frozen=True, slots=True)
class World:
    """What all ranks hold.

    An item of a rank is numbered 2·i where it is number i of its template, 2·i + 1 where it is
    number i of its odd ones.

    Attributes:
        ranks: How many there are.
        tensors: The tensors.
        uses: How the regular items are held.
        odd: The other items, padded to the tensors' width.
        odd_tensor: (odd items,) their tensors.
        odd_item: (odd items,) their numbers.
        odd_ranks: For each content that odd items are from, the ranks that have said it.
        empty: (n, 3) for each tensor without elements, itself, a rank that has it, and its item.
        template: (ranks,) each rank's template.
        templates: How many templates there are.
        per_rank: Names of the per-rank values.
        has_values: (ranks,) whether a rank has any.
    """

    ranks: int
    tensors: Tensors
    uses: list[Use]
    odd: Odd
    odd_tensor: np.ndarray
    odd_item: np.ndarray
    odd_ranks: list[np.ndarray]
    empty: np.ndarray
    template: np.ndarray
    templates: int
    per_rank: tuple[str, ...]
    has_values: np.ndarray


def merge(templates: Distinct, owns: Distinct) -> World:
    """Put what the ranks have sent (`Summary`) in one place.

    Raises:
        LayoutError: Ranks that disagree on a tensor's dtype or shape: all of them.
    """
    ranks = len(templates.of_rank)
    found = [template_from_bytes(payload) for payload in templates.payloads]
    coordinates, odd = owns_from_bytes(owns.payloads)
    template_ranks = _ranks_of(templates)
    odd_ranks = _ranks_of(owns)
    names, template_tensor, odd_tensor = _number(found, odd, templates, owns)
    first_of_own = np.cumsum(np.bincount(odd.of, minlength=len(owns.payloads)))
    first_of_own -= np.bincount(odd.of, minlength=len(owns.payloads))
    odd_item = 2 * (np.arange(len(odd.of)) - first_of_own[odd.of]) + 1
    tensors, odd, empty = _agreed(
        names, found, odd, template_tensor, odd_tensor, odd_item, template_ranks, odd_ranks
    )
    uses: list[Use] = []
    for number, (template, ids) in enumerate(zip(found, template_tensor, strict=True)):
        mine = template_ranks[number]
        said = [coordinates[own] for own in owns.of_rank[mine].tolist()]
        table = np.concatenate(said).astype(np.int64).reshape(len(mine), -1)
        uses += _uses(number, template, ids, tensors, ranks=mine, coordinates=table)
    has_values = np.array([bool(template.per_rank) for template in found], bool)
    return World(
        ranks,
        tensors,
        uses,
        odd,
        odd_tensor,
        odd_item,
        odd_ranks,
        empty,
        templates.of_rank,
        len(found),
        tuple(dict.fromkeys(name for template in found for name in template.per_rank)),
        has_values[templates.of_rank],
    )


def _uses(
    number: int,
    template: Template,
    tensor: np.ndarray,
    tensors: Tensors,
    *,
    ranks: np.ndarray,
    coordinates: np.ndarray,
) -> Iterator[Use]:
    """Yield what the ranks of a template hold, each way of holding once."""
    way = pad_columns(template.way, tensors.width, WHOLE)
    rules = pad_columns(template.rules, tensors.width, 0)
    rows = np.flatnonzero((way != NOTHING).all(axis=1) & (tensors.size[tensor] > 0))
    firsts, kinds = distinct_rows(np.column_stack([way, rules])[rows])
    for kind, row in enumerate(rows[firsts].tolist()):
        some = rows[kinds == kind]
        dims = np.flatnonzero(way[row]).tolist()
        axes = [
            [within - 1, by] if within else [by]
            for within, by in zip(
                *(column[way[row, dims] - 1].tolist() for column in (template.within, template.by)),
                strict=True,
            )
        ]
        used = sorted({axis for of_dim in axes for axis in of_dim})
        cuts = tuple(
            Cut(
                dim,
                tuple(used.index(axis) for axis in of_dim),
                tuple(template.parts[of_dim].tolist()),
                int(rules[row, dim]),
            )
            for dim, of_dim in zip(dims, axes, strict=True)
        )
        yield Use(number, some, tensor[some], cuts, ranks, coordinates[:, used])


def _ranks_of(column: Distinct) -> list[np.ndarray]:
    """Return for each content the ranks that have said it."""
    order = np.argsort(column.of_rank, kind="stable")
    edges = np.searchsorted(column.of_rank[order], np.arange(1, len(column.payloads)))
    return np.split(order, edges)


def _number(
    templates: Sequence[Template], odd: Odd, template_of: Distinct, own_of: Distinct
) -> tuple[tuple[str, ...], list[np.ndarray], np.ndarray]:
    """Number the tensors.

    Returns:
        Their names, the tensor of each item of each template, and of each odd item.
    """
    first = templates[int(template_of.of_rank[0])].names
    mine = np.flatnonzero(odd.of == own_of.of_rank[0]).tolist()
    ordered: list[str] = []
    rest = iter(first)
    for place, row in sorted(zip(odd.number[mine].tolist(), mine, strict=True)):
        ordered.extend(islice(rest, place - len(ordered)))
        ordered.append(odd.names[row])
    ordered.extend(rest)
    number = dict(zip(ordered, range(len(ordered)), strict=True))
    others = set(odd.names).union(*(template.names for template in templates))
    # Sorted names share long prefixes with one another.
    for name in sorted(others.difference(number)):
        number[name] = len(number)
    return (
        tuple(number),
        [np.array(list(map(number.__getitem__, found.names)), np.int64) for found in templates],
        np.array(list(map(number.__getitem__, odd.names)), np.int64),
    )


def _agreed(  # noqa: PLR0917  all of it is one table
    names: tuple[str, ...],
    templates: Sequence[Template],
    odd: Odd,
    template_tensor: Sequence[np.ndarray],
    odd_tensor: np.ndarray,
    odd_item: np.ndarray,
    template_ranks: Sequence[np.ndarray],
    odd_ranks: Sequence[np.ndarray],
) -> tuple[Tensors, Odd, np.ndarray]:
    """Check that all say the same of a tensor.

    Returns:
        The tensors, the odd items padded to their width, and `World.empty`.
    """
    width = max([odd.shape.shape[1], *(found.shape.shape[1] for found in templates)])
    odd = replace(
        odd,
        shape=pad_columns(odd.shape, width, 1),
        start=pad_columns(odd.start, width, 0),
        stop=pad_columns(odd.stop, width, 1),
    )
    counts = [len(found.names) for found in templates]
    lowest = np.array([found[0] for found in template_ranks], np.int64)
    own_lowest = np.array([found[0] for found in odd_ranks], np.int64)
    rank = np.concatenate([np.repeat(lowest, counts), own_lowest[odd.of]])
    tensor = np.concatenate([*template_tensor, odd_tensor])
    item = np.concatenate([*(2 * np.arange(count) for count in counts), odd_item])
    dtype = np.concatenate([*(found.dtype for found in templates), odd.dtype])
    ndim = np.concatenate([*(found.ndim for found in templates), odd.ndim])
    shape = np.concatenate(
        [*(pad_columns(found.shape, width, 1) for found in templates), odd.shape]
    )
    order = np.lexsort((rank, tensor))
    first = order[np.searchsorted(tensor[order], np.arange(len(names)))]
    differs = (
        (dtype != dtype[first][tensor])
        | (ndim != ndim[first][tensor])
        | (shape != shape[first][tensor]).any(axis=1)
    )
    if differs.any():
        lines = []
        for index in np.unique(tensor[differs]).tolist():
            rows = [
                int(first[index]),
                *order[differs[order] & (tensor[order] == index)][:3].tolist(),
            ]
            texts = [
                f"rank {rank[row]} has {dtypes.BY_CODE[int(dtype[row])].name} "
                f"{tuple(shape[row, width - int(ndim[row]) :].tolist())}"
                for row in rows
            ]
            lines.append(f"{names[index]!r}: {', '.join(texts)}")
        raise LayoutError(f"ranks disagree on {len(lines)} tensors:\n  " + "\n  ".join(lines))
    size = shape[first].prod(axis=1)
    itemsize = dtypes.itemsizes(dtype[first])
    tensors = Tensors(names, dtype[first], ndim[first], shape[first], size, itemsize)
    empty = np.flatnonzero(size == 0)
    return tensors, odd, np.column_stack([empty, rank[first[empty]], item[first[empty]]])
