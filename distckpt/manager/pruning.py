"""What a Manager deletes after a commit, and why the rest stays."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from distckpt.deletion import delete_unless_held, finish_deletions
from distckpt.errors import CheckpointError, CheckpointNotFound, text
from distckpt.manager.folder import Folder, Listing
from distckpt.policy import KeepPolicy, reasons
from distckpt.reader import read_manifest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of one checkpoint.

    Attributes:
        step: Its step.
        created: When it was committed, in UTC; None where its manifest can't be read.
        metrics: Its metrics.
        kept: Whether it stays.
        why: Why it stays, or would go.
    """

    step: int
    created: datetime | None
    metrics: dict[str, float]
    kept: bool
    why: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """What retention would do now; printed, a table.

    Attributes:
        verdicts: One a checkpoint, by step.
    """

    verdicts: tuple[Verdict, ...]

    def __iter__(self) -> Iterator[Verdict]:
        return iter(self.verdicts)

    def __len__(self) -> int:
        return len(self.verdicts)

    @property
    def goes(self) -> list[int]:
        """The steps that would be deleted."""
        return [verdict.step for verdict in self.verdicts if not verdict.kept]

    def __str__(self) -> str:
        if not self.verdicts:
            return "no checkpoints"
        rows = [("step", "committed (UTC)", "", "why", "metrics")]
        rows += [
            (
                str(verdict.step),
                f"{verdict.created:%Y-%m-%d %H:%M:%S}" if verdict.created else "?",
                "stays" if verdict.kept else "goes",
                verdict.why,
                ", ".join(f"{name} {value:.4g}" for name, value in verdict.metrics.items()),
            )
            for verdict in self.verdicts
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )


def explain(
    folder: Folder,
    policy: KeepPolicy | None,
    *,
    upto: int | None = None,
    listing: Listing | None = None,
) -> Explanation:
    """Say for each checkpoint of a run why it stays, or would go.

    Args:
        folder: The run's.
        policy: What to keep; everything, if None.
        upto: Of newer steps than this all stay: they are an earlier attempt's, and newer than what
            was resumed from.
        listing: What lies in the folder, if it has been looked at.

    Raises:
        StoreError: The store failed.
    """
    listing = listing or folder.look()
    pins, damage = folder.pins(), folder.damage(listing)
    verdicts = [
        Verdict(step, None, {}, kept=True, why=f"its manifest can't be read: {why}")
        for step, why in listing.damaged.items()
    ]
    good = [found for found in listing.committed.values() if found.step not in damage]
    old = [found.entry for found in good if upto is None or found.step <= upto]
    by_policy = {} if policy is None else reasons(policy, old)
    newest = {found.step for found in good[-1:]} | {entry.step for entry in old[-1:]}
    for step, found in listing.committed.items():
        stays = _why_it_stays(step, pins, damage, newest)
        if policy is None:
            stays = stays or "nothing is deleted without keep="
        elif upto is not None and step > upto:
            stays = stays or f"newer than step {upto}"
        why = ", ".join(filter(None, (stays, by_policy.get(step, ""))))
        verdicts.append(
            Verdict(
                step,
                datetime.fromtimestamp(found.created_s, UTC),
                dict(found.metrics),
                kept=bool(why),
                why=why or "no policy keeps it",
            )
        )
    return Explanation(tuple(sorted(verdicts, key=lambda verdict: verdict.step)))


def _why_it_stays(step: int, pins: dict[int, str], damage: dict[int, str], newest: set[int]) -> str:
    if step in pins:
        return f"pinned: {pins[step]}"
    if step in damage:
        return f"damaged, kept as evidence: {damage[step]}"
    return "the newest" if step in newest else ""


def prune(
    folder: Folder,
    policy: KeepPolicy,
    *,
    upto: int,
    guard: Callable[[], None],
    tell: Callable[..., None],
    first: bool,
) -> None:
    """Delete what is not to stay. At the coordinator, after a commit.

    Args:
        folder: The run's.
        policy: What to keep.
        upto: The step that was committed.
        guard: Called immediately before each deletion; what it raises ends this.
        tell: Is told.
        first: Also look for what other processes have begun to delete.

    Raises:
        CheckpointError: What `guard` raised; or the store can't be listed.
    """
    listing = folder.look()
    explanation = explain(folder, policy, upto=upto, listing=listing)
    _finish(folder, listing, upto=upto, everywhere=first)
    for verdict in explanation:
        if verdict.kept:
            continue
        place = folder.place(verdict.step)
        guard()
        try:
            if delete_unless_held(
                place, read_manifest(place), guard=partial(_guard, folder, verdict.step, guard)
            ):
                tell("pruned", verdict.step, url=place.url, reason=verdict.why)
            else:
                tell("kept_back", verdict.step, url=place.url, reason="a reader holds it")
        except CheckpointNotFound:
            continue  # somebody else has deleted it
        except _Pinned as exc:
            tell("kept_back", verdict.step, url=place.url, reason=str(exc))
        except CheckpointError as exc:
            logger.warning("%s: could not be deleted: %s", place.url, text(exc))


class _Pinned(CheckpointError):
    """It was pinned while deletions went on."""


def _guard(folder: Folder, step: int, guard: Callable[[], None]) -> None:
    # Who pins holds the checkpoint meanwhile, and holds have just been looked for.
    pins = folder.pins()
    if step in pins:
        raise _Pinned(f"pinned: {pins[step]}")
    guard()


def _finish(folder: Folder, listing: Listing, *, upto: int, everywhere: bool) -> None:
    """Finish the deletions that processes which died have begun."""
    steps = [step for step in listing.uncommitted if step <= upto]
    if everywhere:
        steps += listing.committed
    for step in steps:
        place = folder.place(step)
        try:
            finish_deletions(place)
        except (CheckpointError, OSError) as exc:
            logger.warning("%s: a deletion could not be finished: %s", place.url, text(exc))
