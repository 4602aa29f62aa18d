"""The opened files of all ranks of a MindSpore checkpoint, as one source."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from distckpt.errors import (
    CheckpointError,
    CorruptCheckpoint,
    IncompleteCheckpoint,
    LayoutError,
    UnsupportedFormat,
    ranks_text,
)
from distckpt.foreign import Contents, ForeignTensor, Source, tensor_bytes
from distckpt.formats.base import Place
from distckpt.formats.mindspore_layout import Cut, Placement, RankLayout
from distckpt.formats.mindspore_rank_files import RankFiles
from distckpt.layout import BALANCED, cut_points
from distckpt.region import Region
from distckpt.state import MAX_TENSOR_BYTES

METADATA_KEY = "mindspore_ranks"
_COMPARED_BYTES = 1 << 20
_MOST_LISTED = 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Held:
    """A tensor in one rank's file."""

    source: Source
    index: int

    @property
    def tensor(self) -> ForeignTensor:
        return self.source.contents.tensors[self.index]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A piece of a tensor, and the piece of a rank's file that it is."""

    region: Region
    source: Source
    tensor: int
    piece: int


class RankSource:
    """The opened files of all ranks, as one; see `Source`.

    Args:
        place: The folder.
        files: The ranks' files.
        sources: The same, opened.
        layout: Who has what; None where all ranks have the same.
        rows_of: In place of it: over how many ranks tensors are cut along their first dimension.
        check: Whether to compare what must be the same on all ranks.

    Attributes:
        contents: What they hold together.

    Raises:
        IncompleteCheckpoint: A part of a parameter that no rank has: all of them.
        CorruptCheckpoint, LayoutError, UnsupportedFormat: Files and strategy do not fit together.
    """

    def __init__(
        self,
        place: Place,
        files: RankFiles,
        sources: Mapping[int, Source],
        layout: RankLayout | None,
        *,
        rows_of: int | None,
        check: bool,
    ) -> None:
        self._where = place.url
        self._check = check
        self._differ: list[str] = []
        held = _by_name(sources)
        values = self._values(sources, held)
        self._tensors: list[ForeignTensor] = []
        self._pieces: list[list[_Piece]] = []
        missing: dict[str, CheckpointError] = {}
        unfit: dict[str, CheckpointError] = {}
        for name, on in held.items():
            try:
                placements = () if layout is None else layout.placements.get(name, ())
                if placements:
                    self._add(name, *_blocks(on, placements))
                elif rows_of is not None and next(iter(on.values())).tensor.shape:
                    self._add(name, *_rows(on, rows_of))
                else:
                    self._add(name, *self._replicated(name, on))
            except IncompleteCheckpoint as exc:
                missing[name] = exc
            except (CorruptCheckpoint, LayoutError, UnsupportedFormat) as exc:
                unfit[name] = exc
        if unfit:
            kinds = {type(exc) for exc in unfit.values()}
            raise (kinds.pop() if len(kinds) == 1 else LayoutError)(
                f"{self._where}: {len(unfit)} tensors do not fit together:\n  {_lines(unfit)}\n"
                "Give strategy=, the strategy file that these files were saved with (one for each "
                "pipeline stage)"
            )
        if missing:
            raise IncompleteCheckpoint(
                f"{self._where}: parts of {len(missing)} parameters are on no rank:\n  "
                f"{_lines(missing)}"
            )
        if self._differ:
            _log.warning(
                "%s: %s differ between ranks; the lowest rank's are taken",
                self._where,
                ", ".join(self._differ[:_MOST_LISTED]),
            )
        absent = [] if layout is None else [name for name in layout.placements if name not in held]
        about = {
            "files": {
                str(rank): file.url.removeprefix(place.url + "/")
                for rank, file in files.places.items()
            },
            "save": list(files.numbers),
            "incomplete_newer": [list(numbers) for numbers in files.incomplete],
            "differ": self._differ,
            "not_saved": absent,
        }
        self.contents = Contents(self._tensors, values, {METADATA_KEY: about})

    def read_into(self, tensor: int, piece: int, start_byte: int, buffer: memoryview) -> None:
        """See `Source`."""
        found = self._pieces[tensor][piece]
        found.source.read_into(found.tensor, found.piece, start_byte, buffer)

    def _add(self, name: str, shape: tuple[int, ...], blocks: list[tuple[Region, _Held]]) -> None:
        """Add a tensor that is stored in blocks; a file may store a block in pieces."""
        dtype = blocks[0][1].tensor.dtype
        if tensor_bytes([extent or 1 for extent in shape], dtype) > MAX_TENSOR_BYTES:
            raise CorruptCheckpoint(f"a shape of {shape} is more than any tensor has")
        pieces = [
            _Piece(shifted(box, block.start), held.source, held.index, number)
            for block, held in blocks
            for number, box in enumerate(held.tensor.boxes)
        ]
        cut = None if len(pieces) == 1 else tuple(piece.region for piece in pieces)
        self._tensors.append(ForeignTensor(name, shape, dtype, cut))
        self._pieces.append(pieces)

    def _replicated(
        self, name: str, on: Mapping[int, _Held]
    ) -> tuple[tuple[int, ...], list[tuple[Region, _Held]]]:
        """Take what is the same on all ranks from the lowest."""
        first, *others = on.values()
        shape = _same_kind(on)
        if self._check and any(_differs(first, other) for other in others):
            if math.prod(shape) > 1:
                raise LayoutError(
                    "the strategy doesn't say how it is cut, and its values differ between "
                    f"{ranks_text(list(on))}: they are parts, and each has shape {shape}; or "
                    "replicas that have come apart (replicas='trust' takes the lowest rank's)"
                )
            self._differ.append(name)
        return shape, [(Region.whole(shape), first)]

    def _values(
        self, sources: Mapping[int, Source], held: Mapping[str, object]
    ) -> dict[str, object]:
        """Unite the plain values; the lowest rank's count."""
        values: dict[str, object] = {}
        for source in sources.values():
            for name, value in source.contents.values.items():
                if name in held:
                    raise CorruptCheckpoint(
                        f"{self._where}: {name!r} is a tensor on one rank and a plain value on "
                        "another",
                        path=self._where,
                    )
                # By their text: NaN is equal to itself, and 1 is not True.
                if repr(values.setdefault(name, value)) != repr(value):
                    self._differ.append(name)
        self._differ = list(dict.fromkeys(self._differ))
        return values


def _lines(found: Mapping[str, CheckpointError]) -> str:
    lines = [f"{name!r}: {exc}" for name, exc in islice(found.items(), _MOST_LISTED)]
    more = len(found) - len(lines)
    return "\n  ".join(lines) + (f"\n  … and {more} more" if more else "")


def _by_name(sources: Mapping[int, Source]) -> dict[str, dict[int, _Held]]:
    """Return name → rank → where, both in the order of the ranks and of their files."""
    held: dict[str, dict[int, _Held]] = {}
    for rank, source in sources.items():
        for index, tensor in enumerate(source.contents.tensors):
            held.setdefault(tensor.name, {})[rank] = _Held(source, index)
    return held


def _same_kind(on: Mapping[int, _Held], *, skip_rows: bool = False) -> tuple[int, ...]:
    """Check that shape (maybe but for the first extent) and dtype are the same on all ranks.

    Returns:
        The lowest rank's shape.
    """
    kinds: dict[str, list[int]] = {}
    for rank, held in on.items():
        shape = list(held.tensor.shape)
        text = f"{held.tensor.dtype.name} {['…', *shape[1:]] if skip_rows and shape else shape}"
        kinds.setdefault(text, []).append(rank)
    if len(kinds) > 1:
        listed = "; ".join(f"{kind} on {ranks_text(ranks)}" for kind, ranks in kinds.items())
        raise CorruptCheckpoint(f"expected the same dtype and shape on all ranks, found {listed}")
    return next(iter(on.values())).tensor.shape


def _differs(one: _Held, other: _Held) -> bool:
    """Compare two tensors of one shape and dtype, block by block."""
    for number, box in enumerate(one.tensor.boxes):
        size = box.size * one.tensor.dtype.itemsize
        for start in range(0, size, _COMPARED_BYTES):
            count = min(_COMPARED_BYTES, size - start)
            first, second = bytearray(count), bytearray(count)
            one.source.read_into(one.index, number, start, memoryview(first))
            other.source.read_into(other.index, number, start, memoryview(second))
            if first != second:
                return True
    return False


def shifted(box: Region, by: tuple[int, ...]) -> Region:
    """Shift a box of a block, that begins there, into the whole tensor."""
    return Region(
        tuple(a + b for a, b in zip(box.start, by, strict=True)),
        tuple(a + b for a, b in zip(box.stop, by, strict=True)),
    )


def _blocks(
    on: Mapping[int, _Held], placements: Sequence[Placement]
) -> tuple[tuple[int, ...], list[tuple[Region, _Held]]]:
    """Find each block of a parameter on the lowest rank that has it.

    Stages that share a parameter each have all of it: the first stage that is whole serves.
    """
    lacking: list[str] = []
    for placement in placements:
        here = {rank: held for rank, held in on.items() if rank in placement.ranks}
        if not here:
            continue
        local = _same_kind(here)
        cut = placement.cut(len(local))
        found: dict[int, _Held] = {}
        for rank, held in here.items():
            found.setdefault(int(cut.block[rank - placement.first_rank]), held)
        if len(found) == cut.count:
            shape = tuple(extent * parts for extent, parts in zip(local, cut.parts, strict=True))
            if 0 in shape:
                return shape, [(Region.whole(shape), next(iter(found.values())))]
            return shape, [
                (cut.region(block, shape), held) for block, held in sorted(found.items())
            ]
        lacking.append(_lacking(placement, cut, found))
    if lacking:
        raise IncompleteCheckpoint("; ".join(lacking))
    stages = ", ".join(f"{found.ranks[0]} to {found.ranks[-1]}" for found in placements)
    raise LayoutError(f"the strategy places it on ranks {stages}; it is on {ranks_text(list(on))}")


def _lacking(placement: Placement, cut: Cut, found: Mapping[int, _Held]) -> str:
    absent = [block for block in range(cut.count) if block not in found]
    ranks = [rank + placement.first_rank for rank in cut.ranks_of(absent[0])]
    more = f" (and {len(absent) - 1} parts more)" if len(absent) > 1 else ""
    return (
        f"of {cut.count} parts, number {absent[0]} is in the file of none of {ranks_text(ranks)}"
        f"{more}"
    )


def _rows(
    on: Mapping[int, _Held], ranks: int
) -> tuple[tuple[int, ...], list[tuple[Region, _Held]]]:
    """Put a tensor together that was cut as `numpy.array_split` cuts, in the order of the ranks.

    A tensor of fewer rows than there are ranks is on the first ranks only.
    """
    _same_kind(on, skip_rows=True)
    rows = {rank: held.tensor.shape[0] for rank, held in on.items()}
    cuts = cut_points(sum(rows.values()), ranks, BALANCED)
    expected = {rank: count for rank, count in enumerate(np.diff(cuts).tolist()) if count}
    if rows != (expected or {0: 0}):
        raise LayoutError(
            f"it has {rows} rows on the ranks; expected {expected}: a cut along the first "
            f"dimension into {ranks} nearly equal parts"
        )
    rest = next(iter(on.values())).tensor.shape[1:]
    shape = (sum(rows.values()), *rest)
    return shape, [(row_box(shape, cuts, rank), held) for rank, held in on.items()]


def row_box(shape: tuple[int, ...], cuts: np.ndarray, rank: int) -> Region:
    """Return the rows that a rank has."""
    rest = shape[1:]
    return Region((int(cuts[rank]), *(0 for _ in rest)), (int(cuts[rank + 1]), *rest))
