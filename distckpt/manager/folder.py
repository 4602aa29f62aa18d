"""A run's folder: which steps are committed, and what a Manager notes beside them."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from distckpt.errors import (
    CheckpointError,
    CheckpointNotFound,
    IncompleteCheckpoint,
    StoreError,
    text,
)
from distckpt.manifest import MANIFEST_NAME, Manifest
from distckpt.policy import Entry
from distckpt.reader import read_manifest
from distckpt.run import OWN, step_name, step_of
from distckpt.store import PrefixStore, Store, read_object

logger = logging.getLogger(__name__)

_INDEX = f"{OWN}/index.json"
_INDEX_VERSION = 1
_INDEX_BYTES = 1 << 26
_PIN = re.compile(r"pin-([0-9]{8,})\.json")
_DAMAGE = re.compile(r"damaged-([0-9]{8,})-([0-9a-f]{16})\.json")
# In place of a save id, where the manifest can't be read.
_UNKNOWN = "0" * 16
# How often it is looked what is there, while it changes.
_LOOKS = 5


@dataclass(frozen=True, slots=True)
class Committed:
    """A committed checkpoint, as an index remembers it.

    Attributes:
        step: Its step.
        save_id: Its save's.
        created_s: When it was committed, in seconds since 1970.
        metrics: Its metrics.
        stamp: Length and time of the manifest: where they are the same, so is it.
    """

    step: int
    save_id: int
    created_s: float
    metrics: dict[str, float]
    stamp: tuple[int, float | None]

    @property
    def entry(self) -> Entry:
        """As a policy sees it."""
        return Entry(self.step, self.created_s, self.metrics)


@dataclass(frozen=True, slots=True)
class Listing:
    """What lies in a run's folder.

    Attributes:
        committed: Step → checkpoint, ascending.
        damaged: Step → why its manifest can't be read.
        uncommitted: Steps that have files and no manifest, or are being deleted.
    """

    committed: dict[int, Committed] = field(default_factory=dict)
    damaged: dict[int, str] = field(default_factory=dict)
    uncommitted: list[int] = field(default_factory=list)

    @property
    def entries(self) -> list[Entry]:
        """What is committed, as a policy sees it."""
        return [found.entry for found in self.committed.values()]


class Folder:
    """The root of a run. Not collective; safe for several threads.

    What it remembers of manifests is only a cache, in memory and in ``.distckpt/index.json``: where
    a manifest's length and time differ, it is read again.

    Args:
        store: The root.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._known: dict[str, Committed] | None = None
        self._told: set[str] = set()

    def place(self, step: int) -> PrefixStore:
        """Where a step's checkpoint lies."""
        return PrefixStore(self.store, step_name(step))

    # ---------------------------------------------------------------------------------- checkpoints

    def look(self) -> Listing:
        """Look what is there.

        Raises:
            StoreError: The store can't be listed or read: nobody knows what is there, and a run
                that went on without it could start anew.
        """
        for _ in range(_LOOKS):
            steps = self._steps()
            found = self._look_at_all(steps)
            newest = max(found.committed, default=-1)
            # What was the newest may have been pruned since it was listed. Then a newer one is
            # there, and without it the run would seem to end with an older one, kept on purpose.
            if all(step < newest for step in found.uncommitted) or self._steps() <= steps:
                break
        return found

    def _steps(self) -> set[int]:
        return {step for name in self.store.names() if (step := step_of(name)) is not None}

    def _look_at_all(self, steps: AbstractSet[int]) -> Listing:
        found = Listing()
        known = self._index()
        seen: dict[str, Committed] = {}
        # Ascending: what is committed is seen, if what it has replaced is seen to be gone.
        for step in sorted(steps):
            name = step_name(step)
            try:
                committed = self._look_at(step, known.get(name))
            except (CheckpointNotFound, IncompleteCheckpoint):
                found.uncommitted.append(step)
            except CheckpointError as exc:
                if isinstance(exc, StoreError) and not exc.denied:
                    raise
                found.damaged[step] = text(exc)
                self._warn(name, exc)
            else:
                found.committed[step] = seen[name] = committed
        self._known = seen
        return found

    def _look_at(self, step: int, known: Committed | None) -> Committed:
        place = self.place(step)
        try:
            stamp = place.size(MANIFEST_NAME), place.modified(MANIFEST_NAME)
        except FileNotFoundError:
            raise CheckpointNotFound(f"{place.url}: no manifest") from None
        if known is not None and known.stamp == stamp and stamp[1] is not None:
            return known
        return _committed(step, read_manifest(place), stamp)

    def note(self, step: int, manifest: Manifest) -> None:
        """Remember a checkpoint that was just committed."""
        place = self.place(step)
        stamp = place.size(MANIFEST_NAME), place.modified(MANIFEST_NAME)
        self._index()[step_name(step)] = _committed(step, manifest, stamp)

    def _warn(self, name: str, exc: CheckpointError) -> None:
        """Say once what can't be read."""
        if (said := f"{name}: {exc}") not in self._told:
            self._told.add(said)
            logger.warning(
                "%s/%s: this checkpoint can't be opened: %s", self.store.url, name, text(exc)
            )

    # ------------------------------------------------------------------------------- the index file

    def _index(self) -> dict[str, Committed]:
        if self._known is None:
            self._known = self._read_index()
        return self._known

    def _read_index(self) -> dict[str, Committed]:
        """Read the index; whatever is wrong with it, it is only a cache."""
        try:
            content = json.loads(read_object(self.store, _INDEX, limit_bytes=_INDEX_BYTES))
            if content["version"] != _INDEX_VERSION:
                return {}
            return {
                str(name): Committed(
                    int(one["step"]),
                    int(one["save_id"], 16),
                    float(one["created_s"]),
                    {str(key): float(value) for key, value in one["metrics"].items()},
                    (int(one["bytes"]), float(one["time_s"])),
                )
                for name, one in content["steps"].items()
                if step_of(name) == one["step"]
            }
        except (CheckpointError, OSError):
            return {}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            logger.debug("%s/%s: not an index; it is made anew", self.store.url, _INDEX)
            return {}

    def write_index(self) -> None:
        """Write what is remembered, for the next process. Never raises."""
        steps = {
            name: {
                "step": one.step,
                "save_id": f"{one.save_id:016x}",
                "created_s": one.created_s,
                "metrics": one.metrics,
                "bytes": one.stamp[0],
                "time_s": one.stamp[1],
            }
            for name, one in (self._known or {}).items()
            if one.stamp[1] is not None
        }
        try:
            data = json.dumps({"version": _INDEX_VERSION, "steps": steps}, indent=1).encode()
            self.store.put(_INDEX, data, replace=True)
        except (CheckpointError, OSError, TypeError, ValueError) as exc:  # metrics of a stranger
            logger.debug("%s/%s: the index was not written: %s", self.store.url, _INDEX, exc)

    # ---------------------------------------------------------------------------------------- notes

    def pins(self) -> dict[int, str]:
        """Return the pinned steps, and why.

        Raises:
            StoreError: The store failed.
        """
        return {int(match[1]): reason for match, reason in self._notes(_PIN)}

    def pin(self, step: int, reason: str) -> None:
        """Note that a step is to stay.

        Raises:
            StoreError: The store failed.
        """
        self._put_note(f"pin-{step:08d}.json", {"reason": reason, "time_s": time.time()})

    def unpin(self, step: int) -> None:
        """Take a pin away; one that isn't there is fine.

        Raises:
            StoreError: The store failed.
        """
        self.store.delete([f"{OWN}/pin-{step:08d}.json"])

    def damage(self, listing: Listing) -> dict[int, str]:
        """Return the steps that a load has found damaged, as they are now, and why.

        Raises:
            StoreError: The store failed.
        """
        found = {}
        for match, reason in self._notes(_DAMAGE):
            step, save_id = int(match[1]), match[2]
            committed = listing.committed.get(step)
            if (committed is not None and f"{committed.save_id:016x}" == save_id) or (
                step in listing.damaged and save_id == _UNKNOWN
            ):
                found[step] = reason
        return found

    def mark_damaged(self, step: int, save_id: int | None, reason: str) -> None:
        """Note that a checkpoint is damaged, so that it is kept as evidence. Never raises."""
        which = _UNKNOWN if save_id is None else f"{save_id:016x}"
        try:
            self._put_note(
                f"damaged-{step:08d}-{which}.json", {"reason": reason, "time_s": time.time()}
            )
        except (CheckpointError, OSError) as exc:
            logger.warning(
                "%s: the damage of step %d could not be noted: %s", self.store.url, step, text(exc)
            )

    def _put_note(self, name: str, content: Mapping[str, object]) -> None:
        self.store.put(f"{OWN}/{name}", json.dumps(content, indent=1).encode(), replace=True)

    def _notes(self, pattern: re.Pattern[str]) -> list[tuple[re.Match[str], str]]:
        names = self.store.names(OWN + "/")
        found = []
        for name in names:
            match = pattern.fullmatch(name)
            if match:
                found.append((match, self._reason(name)))
        return found

    def _reason(self, name: str) -> str:
        """Read a note's reason; a note counts whatever it says."""
        try:
            content = json.loads(read_object(self.store, f"{OWN}/{name}", limit_bytes=1 << 20))
            return str(content["reason"])
        except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
            return "?"


def _committed(step: int, manifest: Manifest, stamp: tuple[int, float | None]) -> Committed:
    return Committed(
        step, manifest.save_id, manifest.created_ns / 1e9, dict(manifest.metrics or {}), stamp
    )
