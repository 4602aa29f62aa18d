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
_MAX_CORNER_DIMENSIONS = 4
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


def cut_edges(
    extent: np.ndarray | int, parts: int, rule: int, index: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and one past the last row of parts of a cut; see `cut_points`.

    Args:
        extent: Rows, of any shape that broadcasts with *index*.
        parts: Pieces.
        rule: `BALANCED` or `CEILING`.
        index: Which of the pieces.
    """
    if rule == BALANCED:
        size, more = extent // parts, extent % parts
        return (
            index * size + np.minimum(index, more),
            (index + 1) * size + np.minimum(index + 1, more),
        )
    size = -(-extent // parts)
    return np.minimum(index * size, extent), np.minimum((index + 1) * size, extent)


def used_parts(extent: int, parts: int, rule: int) -> int:
    """Return how many pieces of a cut have any rows; they are the first ones."""
    if rule == BALANCED:
        return min(extent, parts)
    return -(-extent // -(-extent // parts)) if extent else 0


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


class Layout:
    """A global shape, the boxes that cover it exactly once, and the file that holds each.

    A layout that was made of a grid lists its boxes only when they are asked for: there may be
    thousands, of thousands of tensors.

    Attributes:
        shape: The tensor's shape.
        start: (boxes, ndim) int64, ascending.
        stop: (boxes, ndim) int64.
        file: (boxes,) int64.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        start: np.ndarray | None,
        stop: np.ndarray | None,
        file: np.ndarray | None,
        *,
        grid: Grid | None = None,
    ) -> None:
        self.shape = shape
        self._grid = grid
        if start is not None and stop is not None and file is not None:
            self._boxes = (start, stop, file)  # in the place of what the grid would give

    @classmethod
    def of_grid(cls, shape: tuple[int, ...], grid: Grid) -> Layout:
        """Make the layout that a grid describes; parts without rows have no box."""
        return cls(shape, None, None, None, grid=grid)

    @property
    def start(self) -> np.ndarray:
        """(boxes, ndim) the boxes' first elements."""
        return self._boxes[0]

    @property
    def stop(self) -> np.ndarray:
        """(boxes, ndim) one past the last in each dimension."""
        return self._boxes[1]

    @property
    def file(self) -> np.ndarray:
        """(boxes,) the file that holds each."""
        return self._boxes[2]

    @cached_property
    def regions(self) -> list[Region]:
        """The boxes as `Region` objects."""
        return [
            Region(tuple(a), tuple(b))
            for a, b in zip(self.start.tolist(), self.stop.tolist(), strict=True)
        ]

    def __len__(self) -> int:
        if self._grid is None:
            return len(self.start)
        return math.prod(self.used_parts())

    def __repr__(self) -> str:
        return f"Layout({self.shape}, {len(self)} boxes)"

    @property
    def is_grid(self) -> bool:
        """Whether it was made of a grid."""
        return self._grid is not None

    def used_parts(self) -> tuple[int, ...]:
        """Of a layout made of a grid: how many parts have any rows, in each dimension."""
        if self._grid is None:
            raise ValueError(f"{self!r} was not made of a grid")
        if 0 in self.shape:
            return self._grid.parts
        return tuple(
            used_parts(extent, parts, rule)
            for extent, parts, rule in zip(
                self.shape, self._grid.parts, self._grid.rule, strict=True
            )
        )

    def grid(self) -> Grid | None:
        """Recognise a regular grid: return it if it expands to exactly this layout, else None."""
        if self._grid is not None and self.used_parts() == self._grid.parts:
            return self._grid
        return _recognised(self)

    def count_elements(self, files: int) -> tuple[np.ndarray, np.ndarray]:
        """Return which files hold any of it, ascending, and how many elements each holds."""
        file, elements = self._counted()
        if len(file) < 2 or (file[1:] > file[:-1]).all():  # noqa: PLR2004  in order, each once
            return file, elements
        total = np.zeros(files, np.int64)
        np.add.at(total, file, elements)
        used = np.flatnonzero(np.bincount(file, minlength=files))
        return used, total[used]

    def _counted(self) -> tuple[np.ndarray, np.ndarray]:
        """(boxes,) the file of each box and its number of elements; those of a grid aren't listed.

        A reader counts them for all layouts of a manifest, which may be a stranger's.
        """
        grid = self._grid
        if grid is None or "_boxes" in vars(self):
            return self.file, self.elements()
        file, elements = np.array([grid.file_base]), np.ones(1, np.int64)
        uncut = 1
        for dim, (extent, used) in enumerate(zip(self.shape, self.used_parts(), strict=True)):
            if used == 1:
                uncut *= extent
                continue
            at = np.arange(used)
            start, stop = cut_edges(extent, grid.parts[dim], grid.rule[dim], at)
            file = np.add.outer(file, grid.file_stride[dim] * at).reshape(-1)
            elements = np.multiply.outer(elements, stop - start).reshape(-1)
        return file, elements * uncut

    def elements_before(self) -> np.ndarray:
        """(boxes,) the number of elements that the boxes before each have in the same file."""
        elements = self.elements()
        order = np.argsort(self.file, kind="stable")
        total = np.cumsum(elements[order]) - elements[order]
        first = np.searchsorted(self.file[order], self.file[order])
        before: np.ndarray = np.empty_like(total)
        before[order] = total - total[first]
        return before

    def elements(self) -> np.ndarray:
        """(boxes,) the number of elements of each box."""
        size: np.ndarray = (self.stop - self.start).prod(axis=1)
        return size

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

    @cached_property
    def _boxes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        grid, parts = self._grid, self.used_parts()
        count = math.prod(parts)
        start = np.empty((count, len(parts)), np.int64)
        stop = np.empty((count, len(parts)), np.int64)
        if grid is None:
            raise ValueError(f"{self!r} has neither boxes nor a grid")
        file = np.full(count, grid.file_base, np.int64)
        index = np.arange(count)
        for dim, extent in enumerate(self.shape):
            at = index // math.prod(parts[dim + 1 :]) % parts[dim]
            start[:, dim], stop[:, dim] = cut_edges(extent, grid.parts[dim], grid.rule[dim], at)
            file += grid.file_stride[dim] * at
        return start, stop, file


def _recognised(layout: Layout) -> Grid | None:
    """Find the grid that a list of boxes is, if it is one."""
    ndim, start, file = len(layout.shape), layout.start, layout.file
    if len(layout) == 1:
        return Grid((1,) * ndim, (BALANCED,) * ndim, int(file[0]), (0,) * ndim)
    starts = [np.unique(start[:, dim]) for dim in range(ndim)]
    if math.prod(len(values) for values in starts) != len(layout):
        return None
    parts, rules = [], []
    for extent, values in zip(layout.shape, starts, strict=True):
        # The first rule that gives these starts.
        for rule in (BALANCED, CEILING):
            if np.array_equal(cut_points(extent, len(values), rule)[:-1], values):
                parts.append(len(values))
                rules.append(rule)
                break
        else:
            return None
    # Boxes are in ascending order: box i has the grid coordinates unravel_index(i, parts).
    step = [math.prod(parts[dim + 1 :]) for dim in range(ndim)]
    base = int(file[0])
    stride = tuple(int(file[step[dim]]) - base if parts[dim] > 1 else 0 for dim in range(ndim))
    grid = Grid(tuple(parts), tuple(rules), base, stride)
    return grid if layout == Layout.of_grid(layout.shape, grid) else None


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
