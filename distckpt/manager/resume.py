"""Loading the first good checkpoint of several: what is damaged is passed over, and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from distckpt.errors import (
    CheckpointError,
    CheckpointNotFound,
    CorruptCheckpoint,
    IncompleteCheckpoint,
    LoadFailed,
    StoreError,
    UnsupportedFormat,
    text,
)
from distckpt.load_plan import LoadOptions
from distckpt.loader import LoadReport, load_into
from distckpt.manager.folder import Folder, Listing
from distckpt.progress import Progress
from distckpt.team import COORDINATOR, Late, Team

_NO_MANIFEST = "it has no manifest: its save was never committed, or the manifest was deleted"


@dataclass(slots=True)
class Candidates:
    """What may be resumed from, as the coordinator has found it; the same on all ranks.

    Attributes:
        steps: The steps, to be tried in this order.
        save_ids: Step → save id.
        passed_over: Step → why it can't be: its manifest is damaged.
        uncommitted: Steps that have files and no manifest.
    """

    steps: list[int] = field(default_factory=list)
    save_ids: dict[int, int] = field(default_factory=dict)
    passed_over: dict[int, str] = field(default_factory=dict)
    uncommitted: list[int] = field(default_factory=list)


def agree_on_candidates(
    team: Team,
    folder: Folder,
    call: str,
    choose: Callable[[Listing], Sequence[int]],
    *,
    timeout_s: float,
) -> Candidates:
    """Collective. Have the coordinator look what there is.

    Args:
        team: The ranks.
        folder: The run's.
        call: What was called, the same on all ranks.
        choose: Runs at the coordinator: which of the committed steps to try, in order.
        timeout_s: How long to wait for the other ranks.

    Raises:
        LoadFailed: A rank was late.
        StoreError: The store failed.
    """

    def decide(calls: list[Any]) -> list[Any]:
        listing = folder.look()
        steps = list(choose(listing))
        save_ids = {step: listing.committed[step].save_id for step in steps}
        return [(steps, save_ids, listing.damaged, listing.uncommitted)] * len(calls)

    operation = team.operation(timeout_s)
    what = f"resume from {folder.store.url}"
    try:
        found = team.drive(
            operation.agree({"call": f"{call} {folder.store.url!r}", "error": None}, decide, what)
        )
    except Late as late:
        raise LoadFailed(
            f"{folder.store.url}: {late}", failures=dict.fromkeys(late.ranks, str(late))
        ) from late
    return Candidates(*found)


def load_first(
    team: Team,
    folder: Folder,
    net: object,
    options: LoadOptions,
    candidates: Candidates,
    *,
    tell: Callable[..., None],
    progress: Progress,
) -> int | None:
    """Collective. Load the first good one.

    Args:
        team: The ranks.
        folder: The run's.
        net: This rank's net.
        options: As for any load.
        candidates: See `agree_on_candidates`.
        tell: Is told.
        progress: Shows how far the load is.

    Returns:
        Its step; None if there is none at all, not even a damaged one.

    Raises:
        CheckpointNotFound, IncompleteCheckpoint: One was deleted since it was listed, see
            `is_gone`.
        LoadFailed: The same, while it was read. Or all are damaged; or something else went wrong.
        CheckpointError: As in `distckpt.load_into`: what does not fit the net is not passed over.
    """
    leads = team.rank == COORDINATOR
    reasons: dict[int, str] = {}
    touched: dict[str, None] = {}

    def pass_over(step: int, save_id: int | None, why: str) -> None:
        reasons[step] = why
        if leads:
            tell("skipped", step, url=folder.place(step).url, error=why)
            folder.mark_damaged(step, save_id, why)

    order = sorted({*candidates.steps, *candidates.passed_over}, reverse=True)
    newest_first = candidates.steps == sorted(candidates.steps, reverse=True)
    for step in order if newest_first else candidates.steps:
        if step in candidates.passed_over:
            pass_over(step, None, candidates.passed_over[step])
            continue
        place = folder.place(step)
        tell("load_begun", step, url=place.url)
        with progress.begin(f"loading step {step}") as bar:
            try:
                report = load_into(team, place, net, replace(options, progress=bar.update))
            except CheckpointError as exc:
                if not _is_damage(exc):
                    raise
                touched.update(dict.fromkeys(getattr(exc, "touched", ())))
                pass_over(step, candidates.save_ids[step], text(exc))
                continue
        _refuse_leftovers(place.url, report, touched, reasons)
        if leads and newest_first:
            _tell_uncommitted(folder, [one for one in candidates.uncommitted if one > step], tell)
        tell("loaded", step, url=place.url, nbytes=report.bytes_read, seconds=report.seconds)
        return step
    if not reasons:
        return None
    lines = "\n  ".join(f"step {step}: {why}" for step, why in reasons.items())
    raise LoadFailed(
        f"{folder.store.url}: none of {len(reasons)} checkpoints can be loaded:\n  {lines}",
        touched=list(touched),
        damaged=True,
    )


def _tell_uncommitted(folder: Folder, steps: Sequence[int], tell: Callable[..., None]) -> None:
    """Tell of newer steps without a manifest: most likely of saves that died, and no damage.

    But who has lost a manifest, or all that lay there, wonders.
    """
    for step in steps:
        place = folder.place(step)
        with suppress(CheckpointError, OSError):  # the load has succeeded
            names = place.names()
            if not names or any(name.startswith("shard-") for name in names):
                tell("skipped", step, url=place.url, error=_NO_MANIFEST)


def _is_damage(exc: CheckpointError) -> bool:
    """Whether it's the checkpoint that can't be loaded, and not the call, or a store that is away.

    Whoever goes back in time because a network is down loses work.
    """
    if isinstance(exc, LoadFailed):
        return exc.damaged
    if isinstance(exc, StoreError):
        return exc.denied
    return isinstance(exc, CorruptCheckpoint | UnsupportedFormat)


def is_gone(exc: CheckpointError) -> bool:
    """Whether a checkpoint was deleted or replaced since it was listed: another is there by now.

    As by a Manager that goes on, or has not noticed yet that this one has taken over. To go back to
    an older one, which may be there for another reason, would lose what was saved since.
    """
    if isinstance(exc, LoadFailed):
        return exc.gone
    return isinstance(exc, CheckpointNotFound | IncompleteCheckpoint)


def _refuse_leftovers(
    url: str, report: LoadReport, touched: dict[str, None], reasons: dict[int, str]
) -> None:
    """Refuse a net that holds parts of a damaged checkpoint, beside what was loaded."""
    left = [name for name in touched if name not in report.loaded]
    if left:
        raise LoadFailed(
            f"{url}: loaded, but {', '.join(left[:20])}, which this checkpoint does not have, may "
            f"hold parts of damaged ones (steps {', '.join(map(str, reasons))}). Make the net "
            "anew, and leave those names out",
            touched=left,
            damaged=True,
        )
