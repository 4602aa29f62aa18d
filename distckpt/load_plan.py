"""A load, decided by the coordinator: what goes where, and who reads what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from distckpt import dtypes
from distckpt.errors import MatchError
from distckpt.manifest import Manifest, Pieces, pad_columns, shard_name
from distckpt.match import Matching, Prefixes, Rename, match
from distckpt.plan import (
    Fragments,
    Holdings,
    Wants,
    fragments_to_plain,
    holdings_from_plain,
    plan_read,
)

ResolvePerRank = Callable[[list[Any], int, int], object]
OnCorrupt = Literal["raise", "skip"]


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What a load was asked for, besides from where and into what; see `distckpt.load_into`.

    `progress` is called with the bytes that this rank has read, and has to read in all.
    """

    strict: bool = False
    filter_prefix: Prefixes = ()
    only_prefix: Prefixes = ()
    select: Callable[[str], bool] | None = None
    rename: Rename | None = None
    cast: bool = True
    verify: bool = True
    per_rank: ResolvePerRank | None = None
    timeout_s: float = 600.0
    on_corrupt: OnCorrupt = "raise"
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        if self.on_corrupt not in get_args(OnCorrupt):
            raise ValueError(f"on_corrupt={self.on_corrupt!r}: expected 'raise' or 'skip'")

    def planning(self) -> tuple[object, ...] | None:
        """The options that a plan depends on; None if a callable decides, since it may differ."""
        if self.select is not None or callable(self.rename):
            return None
        rename = None if self.rename is None else dict(self.rename)
        prefixes = [
            (found,) if isinstance(found, str) else tuple(found)
            for found in (self.filter_prefix, self.only_prefix)
        ]
        return (self.strict, self.cast, *prefixes, rename)


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What a load does; of checkpoints that are alike, nets that are alike are loaded by one plan.

    Attributes:
        shares: Each rank's part, plain.
        report: What all ranks report, plain.
        files: For each rank, the numbers of the files that it reads.
        values: For each rank, the plain values that it wants: wanted → saved name.
    """

    shares: Sequence[dict[str, Any]]
    report: dict[str, Any]
    files: Sequence[list[int]]
    values: Sequence[dict[str, str]]

    def without_shares(self) -> LoadPlan:
        """Return it to be remembered: of thousands of ranks, the shares need much memory."""
        return replace(self, shares=())

    def current(self, manifest: Manifest, rank: int) -> dict[str, Any]:
        """Return what a rank needs to know of this checkpoint, plain."""
        return {
            "files": [(number, *_stored_file(manifest, number)) for number in self.files[rank]],
            "values": {name: manifest.values[saved] for name, saved in self.values[rank].items()},
            "save_id": manifest.save_id,
        }


def plan_load(
    manifest: Manifest, calls: Sequence[Mapping[str, Any]], options: LoadOptions
) -> LoadPlan:
    """Match, check, and decide who reads what.

    Args:
        manifest: The checkpoint's.
        calls: What each rank wants, by rank.
        options: The coordinator's.

    Raises:
        MatchError: Names, shapes, dtypes and kinds that do not fit, all at once.
    """
    ranks = len(calls)
    helds, like = _held(calls)
    names: dict[str, None] = {}
    for rank, call in enumerate(calls):
        if like[rank] == rank:
            names.update(dict.fromkeys(helds[rank].names))
        names.update(dict.fromkeys((*call["values"], *call["per_rank"])))
    matching = match(
        manifest.all_names,
        names,
        strict=options.strict,
        filter_prefix=options.filter_prefix,
        only_prefix=options.only_prefix,
        select=options.select,
        rename=options.rename,
    )
    mismatched: dict[str, str] = {}
    cast: dict[str, str] = {}
    kinds = sorted(set(like))
    for rank in kinds:
        _compare(manifest, matching, helds[rank], options=options, mismatched=mismatched, cast=cast)
    for rank, call in enumerate(calls):
        found = _compare_kinds(manifest, matching, call, rank=rank, ranks=ranks)
        mismatched.update(found)
    if mismatched:
        lines = "\n  ".join(f"{name!r}: {what}" for name, what in mismatched.items())
        raise MatchError(
            f"{len(mismatched)} names of the net do not fit what is saved under them; nothing was "
            f"loaded:\n  {lines}",
            mismatched=mismatched,
        )
    of_kind = {rank: _saved(manifest, matching, helds[rank].names) for rank in kinds}
    targets = [
        _Targets.of(manifest, held, of_kind[first]) for held, first in zip(helds, like, strict=True)
    ]
    pieces, itemsize, blobs, wants = _wants(manifest, matching, targets, calls)
    is_blob = wants.tensor >= len(manifest.names)
    narrow_row = np.zeros(len(wants.tensor), bool)
    if cast:
        stored = np.concatenate([target.keep for target in targets])
        wanted = np.concatenate(
            [held.dtype[target.item] for held, target in zip(helds, targets, strict=True)]
        )[stored > 0]
        narrow_row[~is_blob] = [
            saved != code and dtypes.is_narrowing(dtypes.BY_CODE[saved], dtypes.BY_CODE[code])
            for saved, code in zip(stored[stored > 0].tolist(), wanted.tolist(), strict=True)
        ]

    def read(which: np.ndarray) -> Fragments:
        rows = np.flatnonzero(which)
        some = Wants(*(getattr(wants, name)[rows] for name in Wants.__dataclass_fields__))
        return plan_read(pieces, itemsize, some, block_bytes=manifest.block_bytes, ranks=ranks)

    firsts, seconds = read(is_blob | narrow_row), read(~is_blob)
    first_rows, second_rows = firsts.by_rank(ranks), seconds.by_rank(ranks)
    shares, files = [], []
    for rank in range(ranks):
        first, second = firsts.take(first_rows[rank]), seconds.take(second_rows[rank])
        used = np.union1d(first.file[first.reader == rank], second.file[second.reader == rank])
        files.append(used.tolist())
        shares.append(
            {
                "keep": targets[rank].keep,
                "first": fragments_to_plain(first),
                "second": fragments_to_plain(second),
                "block_bytes": manifest.block_bytes,
                "blobs": blobs[rank],
                "looks": len(firsts.reader) > 0 or any(blobs),
                "same_ranks": manifest.ranks == ranks,
            }
        )
    pairs = matching.pairs
    return LoadPlan(
        shares,
        {
            "loaded": pairs,
            "missing": matching.missing,
            "unexpected": matching.unexpected,
            "by_suffix": matching.by_suffix,
            "cast": cast,
        },
        files,
        [{name: pairs[name] for name in call["values"] if name in pairs} for call in calls],
    )


def _stored_file(manifest: Manifest, number: int) -> tuple[str, int, bytes]:
    """Return a file's name, where its checksum table begins, and the table's digest."""
    return (
        shard_name(number, len(manifest.file_length), manifest.save_id),
        int(manifest.file_table_start[number]),
        manifest.file_digest[number],
    )


def _compare(
    manifest: Manifest,
    matching: Matching,
    held: Holdings,
    *,
    options: LoadOptions,
    mismatched: dict[str, str],
    cast: dict[str, str],
) -> None:
    """Compare shapes and dtypes of wanted and saved tensors; the two dicts take what differs."""
    width = held.shape.shape[1]
    pairs, indices = matching.pairs, manifest.index
    shapes, ndims, codes = held.shape.tolist(), held.ndim.tolist(), held.dtype.tolist()
    layouts, saved_codes = manifest.layout.tolist(), manifest.dtype.tolist()
    saved_shapes = [list(layout.shape) for layout in manifest.layouts]
    for row, name in enumerate(held.names):
        saved = pairs.get(name)
        if saved is None:
            continue
        index = indices.get(saved)
        if index is None:
            mismatched[name] = f"wants a tensor, saved is {_kind(manifest, saved)}"
            continue
        extents = shapes[row][width - ndims[row] :]
        if extents == saved_shapes[layouts[index]] and codes[row] == saved_codes[index]:
            continue
        shape, stored_shape = tuple(extents), manifest.layout_of(index).shape
        wanted, stored = dtypes.BY_CODE[codes[row]], manifest.dtype_of(index)
        if shape != stored_shape:
            mismatched[name] = f"wants shape {shape}, saved is {stored_shape} ({saved!r})"
        elif wanted != stored:
            if options.strict or not options.cast:
                why = "strict=True never converts" if options.strict else "cast=False"
                mismatched[name] = f"wants {wanted.name}, saved is {stored.name} ({why})"
            elif not dtypes.can_convert(stored, wanted):
                mismatched[name] = (
                    f"wants {wanted.name}, saved is {stored.name}; only floats are converted to "
                    "floats, and signed integers to signed integers"
                )
            else:
                cast[name] = f"{stored.name} → {wanted.name}"


def _compare_kinds(
    manifest: Manifest,
    matching: Matching,
    call: Mapping[str, Any],
    *,
    rank: int,
    ranks: int,
) -> dict[str, str]:
    """Compare what is wanted and saved as plain values and as per-rank values.

    Returns:
        Wanted name → what differs.
    """
    mismatched: dict[str, str] = {}
    for name in call["values"]:
        saved = matching.pairs.get(name)
        if saved is not None and saved not in manifest.values:
            mismatched[name] = f"wants a plain value, saved is {_kind(manifest, saved)}"
    for name in call["per_rank"]:
        saved = matching.pairs.get(name)
        if saved is None:
            continue
        if saved not in manifest.per_rank:
            mismatched[name] = f"wants a per-rank value, saved is {_kind(manifest, saved)}"
        elif manifest.ranks != ranks and not call["resolves"]:
            mismatched[name] = (
                f"a per-rank value saved by {manifest.ranks} ranks is wanted on {ranks}; pass "
                "per_rank= (a callable: list of the saved values, rank, size → this rank's value), "
                "or leave it out of the net"
            )
        elif manifest.ranks == ranks and not manifest.per_rank[saved][rank]:
            mismatched[name] = f"rank {rank} saved no value under {saved!r}"
    return mismatched


def _kind(manifest: Manifest, saved: str) -> str:
    if saved in manifest.values:
        return f"the plain value {manifest.values[saved]!r:.60}"
    return "a per-rank value" if saved in manifest.per_rank else "a tensor"


def _held(calls: Sequence[Mapping[str, Any]]) -> tuple[list[Holdings], list[int]]:
    """Read which tensors each rank wants.

    Returns:
        These, and for each rank the first that wants tensors of the same names, types and shapes.
        Of thousands of ranks, most do.
    """
    helds: list[Holdings] = []
    like: list[int] = []
    first: dict[tuple[object, ...], int] = {}
    for rank, call in enumerate(calls):
        plain = call["tensors"]
        columns = [plain[name] for name in ("dtype", "ndim", "shape")]
        kind = plain["names"], *((column.dtype.str, column.tobytes()) for column in columns)
        like.append(first.setdefault(kind, rank))
        names = helds[like[-1]].names if like[-1] < rank else None
        helds.append(holdings_from_plain(plain, names))
    return helds, like


def _saved(manifest: Manifest, matching: Matching, names: Sequence[str]) -> np.ndarray:
    """Return the saved tensor of each wanted name; -1 where nothing is loaded."""
    pairs, index = matching.pairs, manifest.index
    found = [index[pairs[name]] if name in pairs else -1 for name in names]
    return np.array(found, np.int64)


@dataclass(frozen=True, slots=True)
class _Targets:
    """The boxes that a rank wants: a run has several.

    Attributes:
        item: (targets,) which of its tensors each is of.
        tensor: (targets,) the saved tensor, or -1.
        keep: (targets,) the saved tensor's dtype code; 0 where nothing is loaded.
        start: (targets, width).
        stop: (targets, width).
    """

    item: np.ndarray
    tensor: np.ndarray
    keep: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    @classmethod
    def of(cls, manifest: Manifest, held: Holdings, saved: np.ndarray) -> _Targets:
        """Make them of what a rank wants, and of the saved tensor of each item."""
        item, start, stop = held.keys()
        tensor = saved[item]
        keep = np.zeros(len(item), np.int64)
        loaded = tensor >= 0
        keep[loaded] = manifest.dtype[tensor[loaded]]
        return cls(item, tensor, keep, start, stop)


def _wants(
    manifest: Manifest,
    matching: Matching,
    targets: Sequence[_Targets],
    calls: Sequence[Mapping[str, Any]],
) -> tuple[Pieces, np.ndarray, list[list[tuple[str, int]]], Wants]:
    """Put all ranks' wants into one table; a per-rank value is read like one more tensor of bytes.

    Returns:
        What is stored, with an entry for each such value; the item sizes; each rank's per-rank
        values (name, length); and the wants.
    """
    width = max([manifest.width] + [target.start.shape[1] for target in targets])
    rank_, key, tensor, start, stop = [], [], [], [], []
    blobs: list[list[tuple[str, int]]] = []
    places: dict[tuple[str, int], int] = {}
    for rank, (target, call) in enumerate(zip(targets, calls, strict=True)):
        rows = np.flatnonzero(target.keep)
        rank_.append(np.full(len(rows), rank))
        key.append(rows)
        tensor.append(target.tensor[rows])
        start.append(pad_columns(target.start[rows], width, 0))
        stop.append(pad_columns(target.stop[rows], width, 1))
        mine: list[tuple[str, int]] = []
        for name in call["per_rank"]:
            saved = matching.pairs.get(name)
            if saved is None:
                continue
            holders = [rank] if manifest.ranks == len(calls) else list(range(manifest.ranks))
            for holder in holders:
                length = int(manifest.per_rank[saved][holder])
                if length:
                    places.setdefault((saved, holder), len(manifest.names) + len(places))
                    key.append(np.array([len(target.keep) + len(mine)]))
                    rank_.append(np.array([rank]))
                    tensor.append(np.array([places[saved, holder]]))
                    start.append(np.zeros((1, width), np.int64))
                    stop.append(np.array([[1] * (width - 1) + [length]]))
                mine.append((name, length))
        blobs.append(mine)
    wants = Wants(*(np.concatenate(column) for column in (rank_, key, tensor, start, stop)))
    of_tensor = np.flatnonzero(wants.tensor < len(manifest.names))
    pieces = manifest.pieces_for(
        *(column[of_tensor] for column in (wants.tensor, wants.start, wants.stop))
    )
    found = [manifest.blob_place(saved, holder) for saved, holder in places]
    count = len(found)
    file, offset, length_ = (np.array([place[n] for place in found], np.int64) for n in range(3))
    blob_stop = np.ones((count, width), np.int64)
    blob_stop[:, -1] = length_
    pieces = Pieces(
        np.concatenate([pieces.tensor, len(manifest.names) + np.arange(count)]),
        np.concatenate([pad_columns(pieces.start, width, 0), np.zeros((count, width), np.int64)]),
        np.concatenate([pad_columns(pieces.stop, width, 1), blob_stop]),
        np.concatenate([pieces.file, file]),
        np.concatenate([pieces.offset_bytes, offset]),
        np.concatenate([pieces.size_bytes, length_]),
    )
    return pieces, np.concatenate([manifest.itemsize, np.ones(count, np.int64)]), blobs, wants
