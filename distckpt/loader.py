"""One load into a net: planned by the coordinator, then read once and handed out by all ranks."""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from distckpt import codec, dtypes
from distckpt.copies import Places
from distckpt.crew import threads_for
from distckpt.errors import (
    CheckpointError,
    IncompleteCheckpoint,
    LoadFailed,
    MatchError,
    from_plain,
    raise_together,
    size_text,
    some_names,
    text,
    to_plain,
)
from distckpt.exchange import Skipped, exchange
from distckpt.formats import locate
from distckpt.leaves import TensorLeaf
from distckpt.load_plan import LoadOptions
from distckpt.manifest import Manifest
from distckpt.net import Filling, Wanted
from distckpt.prepare_load import NOTHING, LoadMemory, Part, Share, agree
from distckpt.reader import BlockReader, read_manifest, why_gone
from distckpt.region import Region
from distckpt.state import PerRank
from distckpt.store import Store
from distckpt.team import COORDINATOR, Late, Operation, Team
from distckpt.waiting import Waiting, no_collections

logger = logging.getLogger(__name__)
_MOST_LISTED = 20
_DAMAGE = frozenset({"CorruptCheckpoint", "IncompleteCheckpoint"})


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load did, over all ranks.

    Attributes:
        loaded: Wanted name → saved name.
        missing: Wanted names that the checkpoint doesn't have; they kept what they held.
        unexpected: Saved names that nothing wanted.
        by_suffix: The wanted names that were matched by suffix.
        cast: Wanted name → the conversion, such as ``"float32 → float16"``.
        skipped: With ``on_corrupt="skip"``: wanted name → the regions of the whole tensor that
            could not be read, and that kept what they held; empty for a per-rank value.
        damage: What was wrong with them: which file and bytes.
        bytes_read: From the storage, by all ranks together.
        seconds: From the call to its end on this rank.
        net: This rank's net, loaded. It is the one that was handed in, unless that is an immutable
            container (a tuple, a frozen dataclass, a JAX pytree) of what can't be filled in place:
            then it is a new one, and the old one is as it was.
    """

    loaded: dict[str, str]
    missing: list[str]
    unexpected: list[str]
    by_suffix: list[str] = field(default_factory=list)
    cast: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, list[Region]] = field(default_factory=dict)
    damage: list[str] = field(default_factory=list)
    bytes_read: int = 0
    seconds: float = 0.0
    net: object = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        lines = [
            (
                f"loaded {len(self.loaded)} of {len(self.loaded) + len(self.missing)} names: "
                f"{size_text(self.bytes_read)} read in {self.seconds:.2f} s"
            )
        ]
        if self.by_suffix:
            pairs = [f"{wanted} ← {self.loaded[wanted]}" for wanted in self.by_suffix]
            lines.append(f"  by suffix: {some_names(pairs)}")
        if self.cast:
            lines.append(
                f"  converted: {some_names([f'{name} ({how})' for name, how in self.cast.items()])}"
            )
        if self.skipped:
            regions = [
                f"{name}{', '.join(map(str, found))}" for name, found in self.skipped.items()
            ]
            lines.append(f"  damaged (kept as they were): {some_names(regions)}")
            lines += [f"    {what}" for what in self.damage[:_MOST_LISTED]]
        if self.missing:
            lines.append(f"  missing (kept as they were): {some_names(self.missing)}")
        if self.unexpected:
            lines.append(f"  saved and unused: {some_names(self.unexpected)}")
        return "\n".join(lines)


@no_collections()
def load_into(
    team: Team,
    url: str | os.PathLike[str] | Store,
    net: object,
    options: LoadOptions,
    *,
    manifest: Callable[[Store], Manifest] = read_manifest,
    storage_options: Mapping[str, object] | None = None,
    format: str | None = None,
    format_options: Mapping[str, object] | None = None,
) -> LoadReport:
    """Collective. Load a checkpoint into a net.

    Args:
        team: The ranks.
        url: Where the checkpoint lies.
        manifest: Reads the manifest; called at the coordinator only.
        storage_options: For fsspec.
        format: Name of its format, where it is not to be told from what is there.
        format_options: The format's own.
        net: This rank's net.
        options: The rest; what is callable counts as the coordinator gives it, but for `per_rank`.

    Returns:
        What was loaded, the same on every rank but for the seconds.

    Raises:
        CheckpointError: The same on every rank.
    """
    started = time.monotonic()
    operation = team.operation(options.timeout_s)
    wanted = NOTHING
    store: Store | None = None
    failure: BaseException | None = None
    try:
        store = locate(url, storage_options=storage_options, format=format, options=format_options)
        wanted = Wanted(*LoadMemory.of(team).seen.take_apart(net, replaces=True))
    except Exception as exc:  # noqa: BLE001  a rank that fails still takes part
        failure = exc
    where = store.url if store is not None else str(url)
    try:
        agreeing = agree(
            team,
            operation,
            where,
            wanted,
            options,
            failure=failure,
            manifest=lambda: manifest(_opened(store, where)),
        )
        operation, part = team.drive(agreeing)
        report = team.drive(
            _execute(
                operation, _opened(store, where), wanted, part, options=options, started=started
            )
        )
    except Late as late:
        raise LoadFailed(
            f"{where}: {late}", failures=dict.fromkeys(late.ranks, str(late))
        ) from late
    except CheckpointError as exc:
        if failure is not None:
            raise exc from failure
        raise
    if team.rank == COORDINATOR and report.skipped:
        logger.warning("%s: loaded in part, since bytes are damaged:\n%s", where, report)
    elif team.rank == COORDINATOR and (report.missing or report.by_suffix):
        logger.warning("%s: not all names were matched exactly:\n%s", where, report)
    return report


def _opened(store: Store | None, where: str) -> Store:
    """Return the store; where it could not be opened, the ranks have not come this far."""
    if store is None:
        raise CheckpointError(f"{where}: this storage is not open")
    return store


def _execute(
    operation: Operation,
    store: Store,
    wanted: Wanted,
    part: Part,
    *,
    options: LoadOptions,
    started: float,
) -> Waiting[LoadReport]:
    share = part.share
    blocks = BlockReader(store, part.files, share.block_bytes, verify=options.verify)
    if options.progress is not None:
        total = blocks.bytes_to_read([share.first, share.second], operation.rank)
        blocks.on_read = partial(_advance, options.progress, total)
    skipped = Skipped() if options.on_corrupt == "skip" else None
    buffers = [np.empty(length, np.uint8) for _, length in share.blobs]
    looking = _Looking(wanted, share.footing.stored, buffers)
    filling = Filling(wanted, share.footing)
    settle = _Settle(operation, store, part.save_id)
    failure = yield from exchange(operation, 2, share.first, blocks, looking, skipped=skipped)
    per_rank: dict[str, object] = {}
    if failure is None:
        try:
            _refuse_loss(looking.lost, wanted.tensors)
            read = _read_blobs(share, buffers, _lacking(share, skipped))
            per_rank = _resolve(share, read, operation.rank, operation.size, options)
        except Exception as exc:  # noqa: BLE001
            failure = exc if isinstance(exc, CheckpointError) else CheckpointError(text(exc))
    # Until here no byte of any net has changed; beyond, only damage found while reading can leave
    # it partly changed.
    if share.looks:
        yield from settle(4, failure)
    failure = yield from exchange(
        operation,
        2,
        share.second,
        blocks,
        filling,
        skipped=skipped,
        threads=threads_for(part.neighbours),
    )
    touched = filling.names
    if failure is None:
        try:
            _finish(wanted, share)
            for name, value in per_rank.items():
                touched.append(name)
                wanted.per_rank[name].replace(PerRank(value))
            for name, value in part.values.items():
                touched.append(name)
                wanted.values[name].replace(value)
        except Exception as exc:  # noqa: BLE001  a net's own assign() may raise anything
            failure = CheckpointError(text(exc))
    told = yield from settle(
        6, failure, touched, blocks.bytes_read, _skipped_plain(wanted, share, skipped)
    )
    return LoadReport(
        **{name: copy.copy(found) for name, found in share.report.items()},
        skipped={
            name: [Region(tuple(start), tuple(stop)) for start, stop in boxes]
            for name, boxes in told["skipped"].items()
        },
        damage=told["damage"],
        bytes_read=told["bytes"],
        seconds=time.monotonic() - started,
        net=wanted.flat.rebuilt(),
    )


@dataclass(slots=True)
class _Looking:
    """Takes what must be looked at before the net may change.

    Attributes:
        wanted: What the net wants; the keys of the per-rank values follow its boxes'.
        keep: As in `Share`.
        buffers: Take the per-rank values.
        lost: Name → how many values its dtype can't hold.
    """

    wanted: Wanted
    keep: np.ndarray
    buffers: Sequence[np.ndarray]
    lost: dict[str, int] = field(default_factory=dict)

    @property
    def places(self) -> Places | None:
        """All is looked at."""
        return None

    def dtype(self, key: int) -> np.dtype:
        """See `Landing`."""
        if key >= len(self.keep):
            return np.dtype(np.uint8)
        return dtypes.BY_CODE[int(self.keep[key])].numpy

    def memories(
        self, key: Sequence[int], start: Sequence[int], stop: Sequence[int]
    ) -> list[memoryview]:
        """There are no places."""
        raise NotImplementedError

    def takes_any(self, key: np.ndarray) -> bool:
        """See `Landing`: what is lost is counted by one."""
        del key
        return False

    def put(self, key: int, start: tuple[int, ...], values: np.ndarray) -> None:
        """See `Landing`."""
        if key >= len(self.keep):
            first = start[-1]
            self.buffers[key - len(self.keep)][first : first + values.size] = values.reshape(-1)
            return
        tensor = self.wanted.targets[key].destination.tensor
        count = dtypes.count_lost(values, tensor.dtype)
        if count:
            self.lost[tensor.name] = self.lost.get(tensor.name, 0) + count


@dataclass(frozen=True, slots=True)
class _Settle:
    """Brings the ranks' outcomes together; raises on all if one failed."""

    operation: Operation
    store: Store
    save_id: int

    def __call__(
        self,
        step: int,
        failure: CheckpointError | None,
        touched: Collection[str] = (),
        bytes_read: int = 0,
        skipped: Mapping[str, Any] | None = None,
    ) -> Waiting[dict[str, Any]]:
        """Return the bytes that all ranks have read, and what they had to skip."""
        outcome = {
            "error": None if failure is None else to_plain(failure),
            # As one text: there may be thousands, and mostly nobody asks.
            "touched": "\0".join(touched) if touched else None,
            "bytes": bytes_read,
            "skipped": skipped,
        }
        result: dict[str, Any] = {"error": None}
        try:
            outcomes = yield from self.operation.gather(step, outcome, "finish reading")
            if outcomes is not None:
                self._raise_failures(outcomes)
                result = {"error": None, **_united(outcomes)}
        except Late as late:
            causes = dict.fromkeys(late.ranks, str(late))
            failed = LoadFailed(f"{self.store.url}: {late}", failures=causes, touched=list(touched))
            result["error"] = to_plain(failed)
        except CheckpointError as exc:
            result["error"] = to_plain(exc)
        result = yield from self.operation.broadcast(
            step + 1, result, "decide whether the load succeeded"
        )
        if result["error"] is not None:
            raise from_plain(result["error"]) from failure
        return dict(result)

    def _raise_failures(self, outcomes: Sequence[Mapping[str, Any]]) -> None:
        errors = {rank: found["error"] for rank, found in enumerate(outcomes) if found["error"]}
        verb = "load"
        missing = any(error["kind"] == "IncompleteCheckpoint" for error in errors.values())
        missing |= any(found["skipped"] and found["skipped"]["missing"] for found in outcomes)
        gone = why_gone(self.store, self.save_id) if missing else None
        if gone is not None:
            verb = f"load ({gone})"
            if not errors:
                # What is skipped is damage; of another checkpoint nothing may be mixed in.
                errors = {COORDINATOR: to_plain(IncompleteCheckpoint(gone))}
        if not errors:
            return
        texts = [found["touched"] for found in outcomes if found["touched"] is not None]
        names = list(dict.fromkeys(name for found in texts for name in found.split("\0")))
        damaged = gone is None and any(
            error["kind"] in _DAMAGE or error["attributes"].get("denied")
            for error in errors.values()
        )
        raise_together(
            errors,
            self.store.url,
            LoadFailed,
            verb,
            own_kind=not names,
            touched=names,
            damaged=damaged,
            gone=gone is not None,
        )


def _united(outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Unite what the ranks have read, and had to skip."""
    regions: dict[str, dict[tuple[Any, Any], None]] = {}
    damage: dict[str, None] = {}
    for found in outcomes:
        if found["skipped"]:
            damage.update(dict.fromkeys(found["skipped"]["damage"]))
            for name, boxes in found["skipped"]["regions"].items():
                regions.setdefault(name, {}).update(dict.fromkeys(boxes))
    return {
        "bytes": sum(found["bytes"] for found in outcomes),
        "skipped": {name: sorted(boxes) for name, boxes in regions.items()},
        "damage": list(damage),
    }


def _lacking(share: Share, skipped: Skipped | None) -> set[str]:
    """Name the per-rank values that could not be read."""
    regions = [] if skipped is None else skipped.regions
    targets = len(share.footing.stored)
    return {share.blobs[key - targets][0] for key, _ in regions if key >= targets}


def _skipped_plain(wanted: Wanted, share: Share, skipped: Skipped | None) -> dict[str, Any] | None:
    """Say plainly what this rank had to skip."""
    if skipped is None:
        return None
    regions: dict[str, list[tuple[Any, Any]]] = {
        name: [] for name in sorted(_lacking(share, skipped))
    }
    for key, region in skipped.regions:
        if key < len(share.footing.stored):
            target = wanted.targets[key]
            pad = len(region.start) - len(target.region.start)
            box = (region.start[pad:], region.stop[pad:])
            regions.setdefault(target.destination.tensor.name, []).append(box)
    return {"regions": regions, "damage": skipped.damage, "missing": skipped.missing}


def _advance(progress: Callable[[int, int], None], total: int, done: int) -> None:
    progress(min(done, total), total)


def _refuse_loss(lost: Mapping[str, int], tensors: Sequence[TensorLeaf]) -> None:
    if lost:
        kinds = {tensor.name: tensor.dtype.name for tensor in tensors}
        lines = [
            f"{name!r}: {count} values do not fit into {kinds[name]}"
            for name, count in lost.items()
        ]
        raise MatchError(
            "the conversion would lose values (they would become infinite, or wrap around); "
            "nothing was loaded:\n  "
            + "\n  ".join(lines)
            + "\nUse a net of a wider dtype, or leave these names out.",
            mismatched={
                name: f"{count} values do not fit into {kinds[name]}"
                for name, count in lost.items()
            },
        )


def _read_blobs(
    share: Share, buffers: Sequence[np.ndarray], lacking: set[str]
) -> dict[str, list[Any]]:
    """Decode the per-rank values that this rank has read: wanted name → one, or every rank's."""
    found: dict[str, list[Any]] = {}
    for (name, length), buffer in zip(share.blobs, buffers, strict=True):
        if name not in lacking:
            found.setdefault(name, []).append(codec.unpack(buffer.data) if length else None)
    return found


def _resolve(
    share: Share, found: Mapping[str, list[Any]], rank: int, size: int, options: LoadOptions
) -> dict[str, object]:
    """Take the per-rank values; where the number of ranks changed, let the caller decide."""
    if share.same_ranks:
        return {name: values[0] for name, values in found.items()}
    if options.per_rank is None:
        return {}
    return {name: options.per_rank(values, rank, size) for name, values in found.items()}


def _finish(wanted: Wanted, share: Share) -> None:
    """Put tensors without elements in place: no byte arrives for them."""
    held = wanted.held
    for item in np.flatnonzero(held.first == held.last).tolist():
        destination = wanted.destinations[item]
        if held.names[item] in share.report["loaded"] and not destination.in_place:
            destination.finish()
