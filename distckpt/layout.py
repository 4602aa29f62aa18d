"""How tensors are cut, and the check that boxes cover a tensor exactly once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from distckpt.errors import LayoutError, ranks_text
from distckpt.region import Region

BALANCED = 0
CEILING = 1

# Boxes cut in more dimensions than this are compared in pairs, and there may be only so many.
_MAX_CORNER_DIMENSIONS = 8
_MAX_PAIRED_BOXES = 1 << 12


def cut_points(extent: int, parts: int, rule: int) -> np.ndarray:
    """Return the `parts + 1` boundaries that a grid rule cuts *extent* rows at.

    Args:
        extent: Rows.
        parts: Pieces, at least 1.
        rule: `BALANCED` as `numpy.array_split` (sizes differ by at most one), or `CEILING` as
            `torch.chunk` (all alike but the last ones).

    Examples:
        >>> cut_points(10, 3, BALANCED).tolist(), cut_points(10, 4, CEILING).tolist()
        ([0, 4, 7, 10], [0, 3, 6, 9, 10])
    """
    index = np.arange(parts + 1, dtype=np.int64)
    if rule == BALANCED:
        return index * (extent // parts) + np.minimum(index, extent % parts)
    return np.minimum(index * -(-extent // parts), extent)


@dataclass(frozen=True, slots=True)
class Grid:
    """A regular cut of a tensor, in constant space; see ``Layouts`` in ``manifest.proto``.

    Attributes:
        parts: Pieces along each dimension.
        rule: `BALANCED` or `CEILING`, for each dimension.
        file_base: File of the first piece.
        file_stride: How much the file's number grows from a piece to the next, in each dimension.
    """

    parts: tuple[int, ...]
    rule: tuple[int, ...]
    file_base: int
    file_stride: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """A global shape, the boxes that cover it exactly once, and the file that holds each.

    Attributes:
        shape: The tensor's shape.
        start: (boxes, ndim) int64, ascending.
        stop: (boxes, ndim) int64.
        file: (boxes,) int64.
    """

    shape: tuple[int, ...]
    start: np.ndarray
    stop: np.ndarray
    file: np.ndarray

    @classmethod
    def of_grid(cls, shape: tuple[int, ...], grid: Grid) -> Layout:
        """Expand a grid."""
        count = math.prod(grid.parts)
        start = np.empty((count, len(shape)), np.int64)
        stop = np.empty((count, len(shape)), np.int64)
        file = np.full(count, grid.file_base, np.int64)
        for dim, extent in enumerate(shape):
            cuts = cut_points(extent, grid.parts[dim], grid.rule[dim])
            coordinate = np.arange(count) // math.prod(grid.parts[dim + 1 :]) % grid.parts[dim]
            start[:, dim] = cuts[coordinate]
            stop[:, dim] = cuts[coordinate + 1]
            file += grid.file_stride[dim] * coordinate
        if 0 not in shape:
            full = (start < stop).all(axis=1)
            start, stop, file = start[full], stop[full], file[full]
        return cls(shape, start, stop, file)

    @cached_property
    def regions(self) -> list[Region]:
        """The boxes as `Region` objects."""
        return [
            Region(tuple(a), tuple(b))
            for a, b in zip(self.start.tolist(), self.stop.tolist(), strict=True)
        ]

    def __len__(self) -> int:
        return len(self.start)

    def grid(self) -> Grid | None:
        """Recognise a regular grid: return it if it expands to exactly this layout, else None."""
        ndim = len(self.shape)
        if len(self) == 1:
            return Grid((1,) * ndim, (BALANCED,) * ndim, int(self.file[0]), (0,) * ndim)
        starts = [np.unique(self.start[:, dim]) for dim in range(ndim)]
        if math.prod(len(values) for values in starts) != len(self):
            return None
        # For each dimension, the (parts, rule) that give its starts.
        options: list[list[tuple[int, int]]] = []
        for dim, values in enumerate(starts):
            found = [
                (len(values), rule)
                for rule in (BALANCED, CEILING)
                if np.array_equal(cut_points(self.shape[dim], len(values), rule)[:-1], values)
            ]
            if not found:
                return None
            options.append(found)
        parts = tuple(found[0][0] for found in options)
        # Boxes are in ascending order: box i has the grid coordinates unravel_index(i, parts).
        step = [math.prod(parts[dim + 1 :]) for dim in range(ndim)]
        base = int(self.file[0])
        stride = tuple(
            int(self.file[step[dim]]) - base if parts[dim] > 1 else 0 for dim in range(ndim)
        )
        grid = Grid(parts, tuple(found[0][1] for found in options), base, stride)
        return grid if self == Layout.of_grid(self.shape, grid) else None

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Layout)
            and self.shape == other.shape
            and np.array_equal(self.start, other.start)
            and np.array_equal(self.stop, other.stop)
            and np.array_equal(self.file, other.file)
        )

    def __hash__(self) -> int:
        return hash((self.shape, self.start.tobytes(), self.stop.tobytes(), self.file.tobytes()))


def wrong_covers(
    tensor: np.ndarray, start: np.ndarray, stop: np.ndarray, shape: np.ndarray
) -> np.ndarray:
    """Find the tensors whose boxes do not cover them exactly once.

    The signed corners of the boxes, summed, must cancel to those of the whole: the corners
    determine the sum of the boxes' indicator functions, so this is exact in any number of
    dimensions, and it is one sort. Linear in the number of boxes, but exponential in the number of
    dimensions that a tensor is cut in: where those are many, boxes are compared in pairs instead.

    Args:
        tensor: (n,) which tensor each box belongs to.
        start: (n, ndim) boxes, none empty.
        stop: (n, ndim).
        shape: (tensors, ndim) no extent 0.

    Returns:
        Indices of the tensors at fault, ascending; boxes out of range are among the faults.

    Raises:
        LayoutError: Too many boxes of one tensor, cut in too many dimensions, to tell.
    """
    count, ndim = shape.shape
    faulty = [tensor[(start < 0).any(axis=1) | (stop > shape[tensor]).any(axis=1)]]
    # A dimension that no box of a tensor cuts adds nothing but twice as many corners.
    box, dim = np.nonzero((start != 0) | (stop != shape[tensor]))
    cut = np.zeros((count, ndim), bool)
    cut[tensor[box], dim] = True
    patterns, pattern = np.unique(cut, axis=0, return_inverse=True)
    pattern = pattern.reshape(-1)
    tensors, boxes = np.argsort(pattern, kind="stable"), np.argsort(pattern[tensor], kind="stable")
    edges = np.arange(len(patterns) + 1)
    tensor_edges = np.searchsorted(pattern[tensors], edges).tolist()
    box_edges = np.searchsorted(pattern[tensor][boxes], edges).tolist()
    for number, dims in enumerate(patterns):
        some = tensors[tensor_edges[number] : tensor_edges[number + 1]]
        rows = boxes[box_edges[number] : box_edges[number + 1]]
        low, high = start[rows][:, dims], stop[rows][:, dims]
        check = _uncancelled if np.count_nonzero(dims) <= _MAX_CORNER_DIMENSIONS else _unpaired
        faulty.append(check(tensor[rows], low, high, some, shape[some][:, dims]))
    return np.unique(np.concatenate(faulty))


def _uncancelled(
    tensor: np.ndarray, start: np.ndarray, stop: np.ndarray, whole: np.ndarray, shape: np.ndarray
) -> np.ndarray:
    """Return which tensors have corners left over; see `wrong_covers`."""
    dims = shape.shape[1]
    tensor = np.concatenate([tensor, whole])
    low, high = np.concatenate([start, np.zeros_like(shape)]), np.concatenate([stop, shape])
    sign = np.repeat(np.array([1, -1]), [len(start), len(shape)])
    corners, signs = [], []
    for mask in range(1 << dims):
        upper = (mask >> np.arange(dims)) & 1 == 1
        corners.append(np.where(upper, high, low))
        signs.append(-sign if np.count_nonzero(upper) % 2 else sign)
    keys = np.column_stack([np.tile(tensor, 1 << dims), np.concatenate(corners)])
    order = np.lexsort(keys.T[::-1])
    keys = keys[order]
    new = np.ones(len(keys), bool)
    new[1:] = (keys[1:] != keys[:-1]).any(axis=1)
    totals = np.add.reduceat(np.concatenate(signs)[order], np.flatnonzero(new))
    left: np.ndarray = keys[new, 0][totals != 0]
    return left


def _unpaired(
    tensor: np.ndarray, start: np.ndarray, stop: np.ndarray, whole: np.ndarray, shape: np.ndarray
) -> np.ndarray:
    """Return which tensors have boxes that overlap, or don't add up to the whole."""
    faulty = []
    for number, extents in zip(whole.tolist(), shape, strict=True):
        rows = np.flatnonzero(tensor == number)
        if len(rows) > _MAX_PAIRED_BOXES:
            raise LayoutError(
                f"a tensor is cut into {len(rows)} boxes in {len(extents)} dimensions: more than "
                f"{_MAX_PAIRED_BOXES} boxes can be cut in at most {_MAX_CORNER_DIMENSIONS}"
            )
        low, high = start[rows], stop[rows]
        overlaps = sum(
            np.count_nonzero(((low < high[row]) & (low[row] < high)).all(axis=1)) - 1
            for row in range(len(rows))
        )
        size = sum(math.prod(box) for box in (high - low).tolist())
        if overlaps or size != math.prod(extents.tolist()):
            faulty.append(number)
    return np.array(faulty, np.int64)


def cover_faults(shape: Sequence[int], boxes: Sequence[Region], limit: int = 3) -> list[str]:
    """Say in words where boxes do not cover a shape exactly once: the first few of each kind.

    Quadratic in the number of boxes: only for naming a fault that `wrong_covers` has found.

    Returns:
        Texts such as ``"gap: no rank holds [0:2, 3:4]"``; ``{i}`` stands for the name of box i.
    """
    faults = []
    whole = Region.whole(tuple(shape))
    for index, box in enumerate(boxes):
        if any(b > n for b, n in zip(box.stop, shape, strict=True)):
            faults.append(f"out of range: {{{index}}} ends beyond the shape {tuple(shape)}")
    inside = [box & whole for box in boxes]
    # In the order of the dimension that tells most boxes apart, few are candidates for an overlap.
    starts = [len({box.start[dim] for box in boxes}) for dim in range(len(shape))]
    dim = starts.index(max(starts)) if starts else 0
    order = sorted(range(len(boxes)), key=lambda index: boxes[index].start[dim:])
    overlaps: list[str] = []
    for position, index in enumerate(order):
        if len(overlaps) >= limit:
            break
        for other in order[position + 1 :]:
            if shape and boxes[other].start[dim] >= boxes[index].stop[dim]:
                break
            common = boxes[index] & boxes[other]
            if common is not None:
                overlaps.append(f"overlap: {{{index}}} and {{{other}}} both hold {common}")
                break
    gaps = []
    for gap in _gaps(whole, [box for box in inside if box is not None]):
        gaps.append(f"gap: no rank holds {gap}")
        if len(gaps) >= limit:
            break
    return faults[:limit] + overlaps + gaps


def _gaps(whole: Region, boxes: list[Region]) -> Iterator[Region]:
    """Yield disjoint boxes of *whole* that none of *boxes* touches."""
    todo = [(whole, 0)]  # a region, and the first box that it has not been compared with
    while todo:
        region, first = todo.pop()
        for index in range(first, len(boxes)):
            box = boxes[index] & region
            if box is not None:
                break
        else:
            yield region
            continue
        # Peel off, dimension by dimension, what lies before and after the box: it is what is left.
        start, stop = list(region.start), list(region.stop)
        for dim in range(len(start)):
            for a, b in ((box.stop[dim], stop[dim]), (start[dim], box.start[dim])):
                if a < b:
                    rest = Region(
                        (*start[:dim], a, *start[dim + 1 :]), (*stop[:dim], b, *stop[dim + 1 :])
                    )
                    todo.append((rest, index + 1))
            start[dim], stop[dim] = box.start[dim], box.stop[dim]


def describe_faults(
    name: str, shape: Sequence[int], boxes: Sequence[Region], holders: Sequence[Sequence[int]]
) -> str:
    """Put `cover_faults` into one line, with the ranks that hold each box."""
    labels = [
        f"{box} ({ranks_text(ranks, limit=4)})" for box, ranks in zip(boxes, holders, strict=True)
    ]
    texts = [text.format(*labels) for text in cover_faults(shape, boxes)]
    return f"{name!r} of shape {tuple(shape)}: " + "; ".join(texts)
