"""What a rank holds, described in columns: the input of the write plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from distckpt.alike import Flattened, flatten_dicts
from distckpt.flat import FlatState, flatten
from distckpt.leaves import LeafModel, TensorLeaf
from distckpt.region import Region, boxes_of_runs

BOX, RUN = 0, 1
# A model and its optimizer may be loaded, or saved, in turns.
_REMEMBERED = 2


@dataclass(frozen=True, slots=True)
class Holdings:
    """What one rank holds, as columns: an item for each of its tensors or pieces of one.

    An item is a run of the C order of a box: of a box held whole, all of it.

    Attributes:
        names: The tensors' names, each once.
        dtype: (items,) dtype codes.
        ndim: (items,) dimensions before padding.
        kind: (items,) `BOX` or `RUN`.
        shape: (items, width) shapes of the whole tensors.
        start: (items, width) the box.
        stop: (items, width).
        first: (items,) the run's first element in the C order of the box.
        last: (items,) one past its last.
        per_rank: Names of the rank's per-rank values.
    """

    names: tuple[str, ...]
    dtype: np.ndarray
    ndim: np.ndarray
    kind: np.ndarray
    shape: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    first: np.ndarray
    last: np.ndarray
    per_rank: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """Dimensions after padding."""
        return int(self.shape.shape[1])

    def is_like(self, other: Holdings) -> bool:
        """Whether another rank, or this one at another time, holds the same."""
        if self is other:
            return True
        names = self.__dataclass_fields__
        return (self.names, self.per_rank) == (other.names, other.per_rank) and all(
            np.array_equal(getattr(self, name), getattr(other, name))
            for name in names
            if name not in {"names", "per_rank"}
        )

    def keys(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """List the boxes that the items are made of; the place of each is its key.

        A run is cut into boxes; one without elements has none.

        Returns:
            (keys,) the number of its item, rising; (keys, width) its start and stop.
        """
        if not (self.kind == RUN).any():
            return np.arange(len(self.names)), self.start, self.stop
        runs = np.flatnonzero((self.kind == RUN) & (self.first < self.last))
        plain = np.flatnonzero(self.kind == BOX)
        of, start, stop = boxes_of_runs(
            self.stop[runs] - self.start[runs], self.first[runs], self.last[runs]
        )
        item = np.concatenate([plain, runs[of]])
        order = np.argsort(item, kind="stable")
        origin = self.start[runs[of]]
        return (
            item[order],
            np.concatenate([self.start[plain], start + origin])[order],
            np.concatenate([self.stop[plain], stop + origin])[order],
        )


def describe(tensors: Sequence[TensorLeaf], per_rank: Sequence[str] = ()) -> Holdings:
    """Describe this rank's tensors in columns."""
    model = LeafModel.of(tensors)
    ndim = list(map(len, model.shape))
    width = max(ndim, default=1) or 1
    runs = [row for row, box in enumerate(model.region) if box is None]
    boxes = [
        box or parent or Region.whole(shape)
        for box, parent, shape in zip(model.region, model.parent, model.shape, strict=True)
    ]
    start = _padded([box.start for box in boxes], ndim, width, fill=0)
    stop = _padded([box.stop for box in boxes], ndim, width, fill=1)
    kind, first = np.zeros(len(ndim), np.uint8), np.zeros(len(ndim), np.int64)
    last = (stop - start).prod(axis=1)
    kind[runs] = RUN
    first[runs] = [model.start[row] or 0 for row in runs]
    last[runs] = first[runs] + np.array([tensors[row].array.size for row in runs], np.int64)
    return Holdings(
        tuple(model.names),
        np.array([dtype.code for dtype in model.dtype], np.uint8),
        np.array(ndim, np.uint8),
        kind,
        _padded(model.shape, ndim, width, fill=1),
        start,
        stop,
        first,
        last,
        tuple(per_rank),
    )


def _padded(
    rows: Sequence[tuple[int, ...]], ndim: Sequence[int], width: int, *, fill: int
) -> np.ndarray:
    """Make a table of rows, padded on their left."""
    if min(ndim, default=width) < width:
        pads = [(fill,) * (width - dims) for dims in range(width + 1)]
        rows = [pads[dims] + row for row, dims in zip(rows, ndim, strict=True)]
    numbers = np.fromiter(chain.from_iterable(rows), np.int64, len(rows) * width)
    return numbers.reshape(len(rows), width)


class Seen:
    """The states that were taken apart last, to do it faster with those that are like them.

    Keeps none of their arrays.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[Flattened, Holdings]] = []

    def take_apart(self, state: object, *, replaces: bool = False) -> tuple[FlatState, Holdings]:
        """Take a state apart.

        Args:
            state: The state.
            replaces: Whether leaves may be replaced.

        Returns:
            Its leaves; and its tensors in columns, the same object as long as nothing changes.

        Raises:
            LayoutError: As `flatten` does.
        """
        for flattened, held in reversed(self._seen):
            found = flattened.again(state, replaces=replaces)
            if found is not None:
                return found, held
        flat = flatten_dicts(state, replaces=replaces) or flatten(state)
        held = describe(flat.tensors, list(flat.per_rank))
        self._seen = [*self._seen, (Flattened(flat), held)][-_REMEMBERED:]
        return flat, held
