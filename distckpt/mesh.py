"""Named axes over ranks, and the piece of a tensor that each rank holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from distckpt.errors import LayoutError
from distckpt.layout import BALANCED, CEILING, cut_points
from distckpt.region import Region
from distckpt.state import Shard

Axes = str | tuple[str, ...] | None
_RULES = {"balanced": BALANCED, "chunk": CEILING}


class _HasRank(Protocol):
    """What a Mesh needs of a communicator: mpi4py's attributes, and a Coordinator's."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...


class Mesh:
    """Named axes over the ranks 0 … product−1, row-major: the last axis is the fastest.

    Args:
        comm: A communicator (anything with `rank` and `size`) that says which rank this is.
        rank: Which rank this is, instead of `comm`. Without either, rank 0 of a mesh of one.
        **axes: Name → size. Their product is the number of ranks.

    Attributes:
        axes: Name → size.
        size: Number of ranks.
        rank: This rank.
        coordinates: Name → this rank's index along the axis.

    Raises:
        LayoutError: The product is not the communicator's size, or the rank is outside.

    Not collective, and imports no MPI.

    Examples:
        >>> mesh = Mesh(dp=2, tp=3, rank=5)
        >>> mesh.coordinates
        {'dp': 1, 'tp': 2}
        >>> print(mesh.region(("tp", None), (100, 8)))
        [67:100, 0:8]
    """

    def __init__(
        self, *, comm: _HasRank | None = None, rank: int | None = None, **axes: int
    ) -> None:
        for name, size in axes.items():
            if size < 1:
                raise LayoutError(
                    f"axis {name!r} of the mesh has size {size}; it must be at least 1"
                )
        self.axes = dict(axes)
        self.size = math.prod(axes.values())
        if comm is not None:
            if comm.size != self.size:
                raise LayoutError(
                    f"the mesh {self._text()} has {self.size} ranks, the communicator has "
                    f"{comm.size}; the product of the axes must be the number of ranks"
                )
            rank = comm.rank if rank is None else rank
        elif rank is None:
            if self.size > 1:
                raise LayoutError(
                    f"the mesh {self._text()} has {self.size} ranks: say which one this is with "
                    "comm= or rank="
                )
            rank = 0
        if not 0 <= rank < self.size:
            raise LayoutError(f"rank {rank} is not in the mesh {self._text()} of {self.size} ranks")
        self.rank = rank
        self.coordinates: dict[str, int] = {}
        for name in reversed(self.axes):
            rank, self.coordinates[name] = divmod(rank, self.axes[name])
        self.coordinates = {name: self.coordinates[name] for name in self.axes}

    def __repr__(self) -> str:
        return f"Mesh({self._text()}, rank={self.rank})"

    def _text(self) -> str:
        return ", ".join(f"{name}={size}" for name, size in self.axes.items())

    def region(
        self, spec: Sequence[Axes], global_shape: Sequence[int], *, uneven: str = "balanced"
    ) -> Region:
        """Return this rank's box of a tensor.

        Args:
            spec: One entry a dimension: the axis that it is cut over, a tuple of axes (the first is
                the slowest), or None for a dimension that isn't cut. Missing entries at the end are
                None.
            global_shape: The whole tensor's shape.
            uneven: ``"balanced"`` cuts as `numpy.array_split` (34/33/33), ``"chunk"`` as
                `torch.chunk` (34/34/32). A rank may get no rows.

        Returns:
            The box, in elements of the whole tensor.

        Raises:
            LayoutError: An unknown or repeated axis, too many entries, or an unknown rule.
        """
        if uneven not in _RULES:
            raise LayoutError(f"uneven={uneven!r}: expected one of {', '.join(map(repr, _RULES))}")
        if len(spec) > len(global_shape):
            raise LayoutError(
                f"the spec {tuple(spec)} has {len(spec)} entries for the {len(global_shape)} "
                f"dimensions of {tuple(global_shape)}"
            )
        start, stop, used = [], [], set[str]()
        for dim, extent in enumerate(global_shape):
            entry = spec[dim] if dim < len(spec) else None
            parts, index = 1, 0
            for axis in () if entry is None else (entry,) if isinstance(entry, str) else entry:
                if axis not in self.axes:
                    raise LayoutError(f"no axis {axis!r} in the mesh {self._text()}")
                if axis in used:
                    raise LayoutError(f"axis {axis!r} is used twice in the spec {tuple(spec)}")
                used.add(axis)
                index = index * self.axes[axis] + self.coordinates[axis]
                parts *= self.axes[axis]
            cuts = cut_points(extent, parts, _RULES[uneven])
            start.append(int(cuts[index]))
            stop.append(int(cuts[index + 1]))
        return Region(tuple(start), tuple(stop))

    def shard(
        self,
        local: np.ndarray,
        spec: Sequence[Axes],
        global_shape: Sequence[int],
        *,
        uneven: str = "balanced",
    ) -> Shard:
        """Wrap this rank's piece of a tensor.

        Args:
            local: The piece, of the shape of `region`. It is not copied.
            spec: As in `region`.
            global_shape: As in `region`.
            uneven: As in `region`.

        Returns:
            A leaf for a state.

        Raises:
            LayoutError: `local` does not have the region's shape.
        """
        region = self.region(spec, global_shape, uneven=uneven)
        if tuple(local.shape) != region.shape:
            raise LayoutError(
                f"rank {self.rank} of {self!r} holds {region} of {tuple(global_shape)}, of shape "
                f"{region.shape}, but the array has shape {tuple(local.shape)}"
            )
        return Shard(local, region.start, tuple(global_shape))
