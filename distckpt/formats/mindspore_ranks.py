"""MindSpore's distributed checkpoints: a folder for each rank, and a strategy: who has what.

Where MindSpore's own ``transform_checkpoints`` gives up or guesses, this goes on or refuses: any
number of ranks becomes any other; of several saves the newest whole one is taken, by number; ranks
may lack what another replica has; names may hold hyphens; strings are kept.

What no strategy mentions (step counters, strings) must be the same on all ranks that have it; the
lowest rank's is read. A single number or a plain value that differs (a loss scale, a seed) is taken
from there, too, logged, and reported in ``metadata["mindspore_ranks"]["differ"]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from distckpt.errors import CheckpointExists, CorruptCheckpoint, LayoutError, UnsupportedFormat
from distckpt.foreign import Source
from distckpt.formats import checked_options, find
from distckpt.formats.base import Place, Readable, Wanted, Writing, already_there, refuse
from distckpt.formats.mindspore_layout import MAX_RANKS, RankLayout, Strategy, rank_layout
from distckpt.formats.mindspore_rank_files import FORMATS, choose, names_in, rank_folders
from distckpt.formats.mindspore_rank_source import RankSource, row_box, shifted
from distckpt.layout import BALANCED, cut_points
from distckpt.manifest import MANIFEST_NAME
from distckpt.region import Region

NAME = "mindspore-ranks"


@dataclass(frozen=True, slots=True)
class _Slice:
    """A box of a tensor that is to be written."""

    whole: Readable
    box: Region

    @property
    def name(self) -> str:
        return self.whole.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.box.shape

    @property
    def dtype(self) -> np.dtype:
        return self.whole.dtype

    def read(self, region: Region | None = None) -> np.ndarray:
        return self.whole.read(self.box if region is None else shifted(region, self.box.start))


def _cut_by_strategy(tensors: Sequence[Readable], layout: RankLayout) -> list[list[Readable]]:
    """Return what each rank holds.

    Raises:
        UnsupportedFormat: Dimensions that the strategy's parts do not divide, or that it isn't
            for: all of them.
    """
    problems: dict[str, str] = {}
    held: list[list[Readable]] = [[] for _ in range(layout.ranks)]
    for tensor in tensors:
        placements = layout.placements.get(tensor.name, ())
        if not placements:
            for on_rank in held:
                on_rank.append(tensor)
        for placement in placements:
            try:
                cut = placement.cut(len(tensor.shape))
            except (CorruptCheckpoint, UnsupportedFormat) as exc:
                problems[tensor.name] = str(exc)
                continue
            if any(extent % parts for extent, parts in zip(tensor.shape, cut.parts, strict=True)):
                problems[tensor.name] = (
                    f"its shape {tensor.shape} can't be cut into {cut.parts} equal parts, and "
                    "MindSpore loads no others"
                )
                continue
            for rank, block in zip(placement.ranks, cut.block.tolist(), strict=True):
                whole = cut.count == 1
                box = cut.region(block, tensor.shape)
                held[rank].append(tensor if whole else _Slice(tensor, box))
    refuse(problems, f"{NAME} of this strategy")
    return held


def _cut_by_rows(tensors: Sequence[Readable], ranks: int) -> list[list[Readable]]:
    """Return what each rank holds; or the first of them, where there are fewer rows."""
    held: list[list[Readable]] = [[] for _ in range(ranks)]
    for tensor in tensors:
        if not tensor.shape or ranks == 1:
            for on_rank in held:
                on_rank.append(tensor)
            continue
        cuts = cut_points(tensor.shape[0], ranks, BALANCED)
        for rank in range(max(min(ranks, tensor.shape[0]), 1)):
            held[rank].append(_Slice(tensor, row_box(tensor.shape, cuts, rank)))
    return held


def _stale(place: Place, ours: Sequence[str], prefix: str, *, may_replace: bool) -> list[Place]:
    """Find the files that must go when ours are there.

    Raises:
        CheckpointExists: There are files, and they may not be replaced; or not all of them are of
            this name.
    """
    if place.is_file() or MANIFEST_NAME in place.entries():
        raise CheckpointExists(
            f"{place.url}: there is a file or a distckpt checkpoint; write elsewhere, or delete it"
        )
    there = {
        f"{folder.name.rpartition('/')[2]}/{name}": rank
        for rank, folder in rank_folders(place).items()
        for name in names_in(folder)
    }
    if there and not may_replace:
        raise already_there(place)
    stale = {name: rank for name, rank in there.items() if name not in ours}
    others = [
        name
        for name, rank in stale.items()
        if name not in {f"rank_{rank}/{prefix}{rank}{suffix}" for suffix in FORMATS}
    ]
    if others:
        raise CheckpointExists(
            f"{place.url}: overwrite=True replaces files of the prefix {prefix!r}, and there are "
            f"{len(others)} others, such as {others[0]}: beside them ours would not be found. "
            "Write elsewhere, or delete them"
        )
    return [place.entry(name) for name in stale]


class MindSporeRanksFormat:
    """A folder with ``rank_0/``, ``rank_1/``, …, each with ``.ckpt`` or ``.safetensors`` files.

    Options of `open`:

    - ``strategy``: Strategy file: protobuf, or JSON if it ends with ``.json``; or a folder or a
      list of such files, one for each pipeline stage. Without it all ranks must hold the same.
    - ``ranks``: In place of it: what `write` was given as ``ranks``.
    - ``files``: Pattern of file names to choose from, such as ``"net-*.ckpt"``.
    - ``replicas``: ``"check"`` reads what must be the same on all ranks, and compares it, when the
      files are opened: all tensors without a strategy, else those that it doesn't mention.
      ``"trust"`` does not.
    - All others: of the ``mindspore`` format, for ``.ckpt`` files.

    Options of `write`:

    - ``strategy``: As above: who gets what. MindSpore loads equal parts only, so a dimension that
      it doesn't divide is refused. Without it there is one rank.
    - ``ranks``: In place of it: a number of ranks, over which each tensor is cut along its first
      dimension as `numpy.array_split` does; the parts need not be equal.
    - ``prefix``: Rank 3 gets ``rank_3/<prefix>3.ckpt``.
    - ``file_format``: ``"ckpt"`` or ``"safetensors"``.
    - All others: of the format of the files.

    Each file appears whole, one after another: a crash in the midst of `commit` leaves some.
    """

    name = NAME
    suffixes: tuple[str, ...] = ()

    def sniff(self, place: Place) -> bool:
        """See `Format`."""
        return any(names_in(folder) for folder in rank_folders(place).values())

    def open(
        self,
        place: Place,
        *,
        strategy: Strategy | None = None,
        ranks: int | None = None,
        files: str = "*",
        replicas: str = "check",
        **options: Any,
    ) -> RankSource:
        """See `Format`, and the class for the options."""
        _check_ranks(strategy, ranks)
        if replicas not in {"check", "trust"}:
            raise UnsupportedFormat(f"replicas={replicas!r}; expected 'check' or 'trust'")
        chosen = choose(place, files)
        sources: dict[int, Source] = {}
        for rank, file in chosen.places.items():
            form = find(next(to for end, to in FORMATS.items() if file.name.endswith(end)))
            given = checked_options(form.name, form.open, options)
            sources[rank] = form.open(file, **given)
        layout = None
        if strategy is not None:
            names = {tensor.name for found in sources.values() for tensor in found.contents.tensors}
            layout = rank_layout(strategy, names)
        expected = layout.ranks if layout is not None else ranks
        if expected is not None and max(sources) >= expected:
            raise LayoutError(
                f"{place.url}: there are files of rank {max(sources)}, and "
                f"{'the strategy' if ranks is None else 'ranks='} says that there are {expected} "
                "ranks: it belongs to other files"
            )
        return RankSource(place, chosen, sources, layout, rows_of=ranks, check=replicas == "check")

    def write(
        self,
        place: Place,
        wanted: Wanted,
        *,
        strategy: Strategy | None = None,
        ranks: int | None = None,
        prefix: str = "checkpoint",
        file_format: str = "ckpt",
        **options: Any,
    ) -> Writing:
        """See `Format`, and the class for the options."""
        _check_ranks(strategy, ranks)
        if not prefix or "/" in prefix or "\0" in prefix:
            raise UnsupportedFormat(f"prefix={prefix!r}; expected the beginning of a file's name")
        if f".{file_format}" not in FORMATS:
            raise UnsupportedFormat(
                f"file_format={file_format!r}; expected "
                f"{' or '.join(repr(suffix[1:]) for suffix in FORMATS)}"
            )
        if strategy is None:
            held = _cut_by_rows(wanted.tensors, ranks or 1)
        else:
            names = {tensor.name for tensor in wanted.tensors}
            held = _cut_by_strategy(wanted.tensors, rank_layout(strategy, names))
        files = [f"rank_{rank}/{prefix}{rank}.{file_format}" for rank in range(len(held))]
        stale = _stale(place, files, prefix, may_replace=wanted.replace)
        form = find(FORMATS[f".{file_format}"])
        options = checked_options(form.name, form.write, options)
        writings = [
            form.write(place.entry(name), replace(wanted, tensors=tensors), **options)
            for name, tensors in zip(files, held, strict=True)
        ]

        def commit() -> None:
            left = list(writings)
            try:
                while left:
                    left[0].commit()
                    del left[0]
            except BaseException:
                for writing in left:
                    writing.abort()
                raise
            for file in stale:
                file.delete()

        def abort() -> None:
            for writing in writings:
                writing.abort()

        return Writing(
            [part for writing in writings for part in writing.parts],
            [size for writing in writings for size in writing.part_bytes],
            commit,
            abort,
        )


def _check_ranks(strategy: Strategy | None, ranks: int | None) -> None:
    if strategy is not None and ranks is not None:
        raise UnsupportedFormat("strategy= and ranks= exclude each other: both say who has what")
    if ranks is not None and not 1 <= ranks <= MAX_RANKS:
        raise UnsupportedFormat(f"ranks={ranks}; expected 1 to {MAX_RANKS}")


FORMAT = MindSporeRanksFormat()
