"""What saves that died have left: found, shown, and deleted."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from distckpt.checkpoint import StorageOptions, Url
from distckpt.errors import CheckpointError, size_text, text
from distckpt.manifest import MANIFEST_NAME
from distckpt.marks import is_held, is_old, name_parts
from distckpt.reader import read_manifest
from distckpt.run import OWN, is_note, step_of
from distckpt.store import PrefixStore, Store, open_store, partial_of

logger = logging.getLogger(__name__)

GRACE_S = 24 * 3600.0

_SHARD = re.compile(r"shard-\d{5,}-of-\d{5,}\.(?P<save_id>[0-9a-f]{16})\.safetensors")


@dataclass(frozen=True, slots=True)
class Leftover:
    """The objects of one save that was never committed, or was replaced and not wholly deleted.

    Attributes:
        url: The folder that they lie in.
        save_id: The save's, as in the names; empty for half-written manifests and notes of a
            Manager's.
        names: The objects.
        nbytes: Their lengths together.
        newest_s: When the newest was written, in seconds since 1970; None where the store does not
            tell, and then they are never removed.
        why_kept: Why they stay; empty if they go.
    """

    url: str
    save_id: str
    names: tuple[str, ...]
    nbytes: int
    newest_s: float | None
    why_kept: str = ""

    def __str__(self) -> str:
        what = f"save {self.save_id}" if self.save_id else "half-written notes"
        files = f"{len(self.names)} file{'s' if len(self.names) > 1 else ''}"
        kept = f"; kept: {self.why_kept}" if self.why_kept else ""
        return f"{self.url}: {what}, {files}, {size_text(self.nbytes)}{kept}"


@dataclass(frozen=True, slots=True)
class CleanReport:
    """What `clean` found.

    Attributes:
        removed: What it has deleted; in a dry run, what it would.
        kept: What it has left, and why.
        dry_run: Whether it only looked.
        not_understood: Folders whose manifest can't be read (URL → why): all in them stays.
    """

    removed: list[Leftover] = field(default_factory=list)
    kept: list[Leftover] = field(default_factory=list)
    dry_run: bool = True
    not_understood: dict[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes freed, or that would be."""
        return sum(found.nbytes for found in self.removed)

    def __str__(self) -> str:
        if not (self.removed or self.kept or self.not_understood):
            return "nothing to clean"
        verb = "would remove" if self.dry_run else "removed"
        lines = [f"{verb} {found}" for found in self.removed]
        lines += [str(found) for found in self.kept]
        lines += [f"{url}: left alone: {why}" for url, why in self.not_understood.items()]
        lines.append(f"{verb} {size_text(self.nbytes)}")
        return "\n".join(lines)


def clean(
    url: Url,
    *,
    grace_s: float = GRACE_S,
    dry_run: bool = True,
    storage_options: StorageOptions = None,
    now: Callable[[], float] = time.time,
) -> CleanReport:
    """Delete what saves that died have left in a checkpoint's folder, or in all of a run's.

    A save is removed only if no manifest names its id, and all of its objects are older than the
    grace time: a save that is still running looks the same as one that died (invariant I5). Beside
    a checkpoint, those holds and marks of deletion go that nobody respects any more. Where there is
    a manifest that can't be read, or one of a newer version, nothing is removed. Not collective:
    call it on one rank.

    Args:
        url: A checkpoint's folder, or the root of a run.
        grace_s: Seconds; longer than any save takes. A day by default.
        dry_run: Only look, and say what would be removed.
        storage_options: Passed to the fsspec file system.
        now: The clock that the objects' times are compared with, in seconds since 1970. Give
            another where the store's differs much.

    Returns:
        What was, or would be, removed, and what is kept and why; printed, a list.

    Raises:
        ValueError: A negative grace time.
        StoreError: The store can't be listed, read, or deleted from.
    """
    if not grace_s >= 0:
        raise ValueError(f"grace_s={grace_s}: expected seconds, 0 or more")
    root = open_store(url, storage_options=storage_options)
    report = CleanReport(dry_run=dry_run)
    names = root.names()
    _clean_folder(root, names, report, grace_s=grace_s, now=now)
    for name in names:
        if step_of(name) is not None or name == OWN:
            folder = PrefixStore(root, name)
            _clean_folder(folder, folder.names(), report, grace_s=grace_s, now=now)
    return report


def _clean_folder(
    store: Store,
    names: Sequence[str],
    report: CleanReport,
    *,
    grace_s: float,
    now: Callable[[], float],
) -> None:
    """Look at one folder's objects, and delete what must go."""
    groups: dict[str, list[str]] = {}
    for name in names:
        save_id = _save_id(name)
        if save_id is not None:
            groups.setdefault(save_id, []).append(name)
    # The manifest is read after the names are listed: what was committed in between, it names.
    try:
        committed = _committed(store)
    except CheckpointError as exc:
        if groups:
            report.not_understood[store.url] = text(exc)
        return
    for save_id, everything in sorted(groups.items()):
        is_committed = bool(save_id) and save_id == committed
        members = everything
        if is_committed:
            # Beside a checkpoint: holds of readers, and marks of deleters, that died.
            beside = [name for name in everything if name_parts(name)]
            members = [name for name in beside if is_old(store, name, now_s=now())]
            if not members:
                continue
        found = _look_at(store, save_id, members, before_s=now() - grace_s, grace_s=grace_s)
        if found.why_kept:
            report.kept.append(found)
            continue
        if not report.dry_run:
            # Once more, as late as can be: looking at a large folder takes its time.
            if save_id and not is_committed and _committed(store) == save_id:
                continue
            store.delete(found.names)
            logger.info("removed %s", found)
        report.removed.append(found)


def _save_id(name: str) -> str | None:
    """Return which save an object is of; empty for a manifest or note under a temporary name."""
    whole = partial_of(name)
    if whole is not None and (whole == MANIFEST_NAME or is_note(whole)):
        return ""
    beside = name_parts(name)  # a hold, or a mark of deletion
    if beside is not None:
        return f"{beside[1]:016x}"
    match = _SHARD.fullmatch(whole or name)
    return match["save_id"] if match else None


def _committed(store: Store) -> str | None:
    """Return the id that the folder's manifest names; None where there is no manifest.

    Raises:
        CheckpointError: There is one that can't be read.
    """
    try:
        store.size(MANIFEST_NAME)
    except FileNotFoundError:
        return None
    return f"{read_manifest(store).save_id:016x}"


def _look_at(
    store: Store, save_id: str, names: Sequence[str], *, before_s: float, grace_s: float
) -> Leftover:
    """Take the sizes and times of a save's objects, and decide."""
    nbytes, times = 0, []
    for name in names:
        try:
            nbytes += store.size(name)
            times.append(store.modified(name))
        except FileNotFoundError:  # somebody else cleans, too; or it was given its own name
            times.append(None)
    known = [time_s for time_s in times if time_s is not None]
    newest_s = max(known) if len(known) == len(times) else None
    if newest_s is None:
        why = "the store doesn't tell how old they are"
    elif newest_s > before_s:
        why = f"the newest is younger than {grace_s:.0f} s, and may be of a save that still runs"
    elif save_id and is_held(store, int(save_id, 16), now_s=before_s + grace_s):
        why = "a reader holds what was replaced or deleted"
    else:
        why = ""
    return Leftover(store.url, save_id, tuple(names), nbytes, newest_s, why)
