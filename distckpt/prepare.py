"""A save before it is written: agreed on, and copied as far as that can't wait.

This runs in the calling thread: all ranks agree (`agreement`), and then each takes from its arrays
what must not change any more.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from distckpt import replicas
from distckpt.agreement import Known, Mine, look_and_agree
from distckpt.arena import Arena
from distckpt.errors import SaveFailed, to_plain
from distckpt.flat import FlatState
from distckpt.options import Lazy, Options
from distckpt.shardfile import ShardImage
from distckpt.staging import LATER, NEVER, NOW, Staging, when_copied
from distckpt.stats import Recorder
from distckpt.store import Store
from distckpt.team import Operation, Team
from distckpt.waiting import Interrupt, no_collections
from distckpt.writer import FileRecord, Layouts


@dataclass(slots=True)
class Save:
    """A save between `prepare` and its end, on one rank.

    Attributes:
        store: Where to.
        operation: The ranks' messages about it, in the background.
        options: What was asked for.
        save_id: Its 64 random bits.
        files: Number of files of all ranks.
        blob_lengths: Bytes of this rank's per-rank values, by name.
        node: This rank's machine.
        known: The plan; all of it at the coordinator.
        values: The plain values of all ranks.
        metadata: The user's own; at the coordinator only.
        metrics: Numbers by name; at the coordinator only.
        images: This rank's files, by number.
        staging: Their copies; None where the arrays do not change meanwhile.
        checks: Checksums of what other ranks hold, too.
        failure: What went wrong on this rank (`to_plain`).
        begun: Names of the files that were begun, whether or not they are there.
        written: The files that are there.
        recorder: Takes the times.
        interrupt: Whether the user wants it to end.
    """

    store: Store
    operation: Operation
    options: Options
    save_id: int
    files: int
    blob_lengths: dict[str, int]
    node: str
    known: Known
    values: dict[str, object]
    metadata: Mapping[str, object] | None
    metrics: Mapping[str, float] | None
    images: dict[int, ShardImage] = field(default_factory=dict)
    staging: Staging | None = None
    checks: replicas.Checksums = field(default_factory=replicas.Checksums)
    failure: dict[str, object] | None = None
    begun: list[str] = field(default_factory=list)
    written: list[FileRecord] = field(default_factory=list)
    recorder: Recorder = field(default_factory=Recorder)
    interrupt: Interrupt | None = None


def prepare(
    team: Team,
    url: str | os.PathLike[str] | Store,
    state: object,
    options: Options,
    *,
    storage_options: Mapping[str, object] | None = None,
    arena: Arena | None = None,
) -> Save:
    """Collective. Agree on a save, plan it, and take what must not change any more.

    Args:
        team: The ranks.
        url: Where to.
        state: This rank's state.
        options: The rest.
        storage_options: For fsspec.
        arena: Memory to copy the arrays to, so that they may change when this returns; None if they
            won't.

    Returns:
        The save, to be written and committed; what goes wrong from here on is told at the commit.

    Raises:
        CheckpointError: The same on every rank; nothing was written.
    """
    recorder = Recorder()
    with recorder.phase("plan"), no_collections():
        operation = team.operation(options.timeout_s)
        mine, known, shared = look_and_agree(
            team, operation, url, state, options, storage_options=storage_options
        )
    if mine.store is None:
        raise SaveFailed(f"{mine.where}: this storage is not open")
    save = Save(
        store=mine.store,
        operation=operation.in_background(),
        options=options,
        save_id=shared["save_id"],
        files=known.files,
        blob_lengths={name: len(blob) for name, blob in mine.blobs.items()},
        node=team.coordinator.node,
        known=known,
        values=shared["values"],
        metadata=mine.metadata,
        metrics=mine.metrics,
        recorder=recorder,
    )
    try:
        with recorder.phase("check"):
            save.checks = replicas.take_checksums(
                mine.flat.arrays, mine.held.dtype, known.part, saves=known.saves
            )
        with recorder.phase("stage"), no_collections():
            layouts = _layouts(known, mine, rank=team.rank)
            save.images = layouts.images(mine.flat.arrays, mine.blobs)
            if arena is not None:
                save.staging = Staging(
                    arena,
                    save.images,
                    layouts.by_piece(_when(mine.flat, options.lazy), NEVER),
                    limit_bytes=options.staging_bytes,
                    check=options.check_lazy,
                )
                save.staging.begin()
    except Exception as exc:  # noqa: BLE001  the others learn of it at the commit
        save.failure = to_plain(exc)
    known.saves += 1
    return save


def plan_ahead(team: Team, store: Store, state: object, options: Options) -> int:
    """Collective. Plan the saves of a state, so that the first finds its plan made.

    Args:
        team: The ranks.
        store: Where to; only its name is used.
        state: This rank's state, or one like it.
        options: Those of the saves.

    Returns:
        How many bytes this rank's files will have.

    Raises:
        CheckpointError: The same on every rank.
    """
    with no_collections():
        # Whether there is a checkpoint already is asked when one is saved.
        mine, known, _ = look_and_agree(
            team,
            team.operation(options.timeout_s),
            store,
            state,
            replace(options, overwrite=True),
        )
        return _layouts(known, mine, rank=team.rank).nbytes


def _layouts(known: Known, mine: Mine, *, rank: int) -> Layouts:
    """Return what is where in this rank's files: as in the save before, unless that was other."""
    blobs = {name: len(blob) for name, blob in mine.blobs.items()}
    if known.layouts is None or known.layouts.blobs != blobs:
        known.layouts = Layouts(mine.held, known.part, blobs, rank=rank)
    return known.layouts


def _when(flat: FlatState, lazy: Lazy) -> list[int]:
    """Say when each tensor is copied."""
    if isinstance(lazy, bool):
        most = LATER if lazy else NOW
        return [
            # Asked first what is true of most.
            most
            if type(array) is np.ndarray and array.flags.writeable
            else when_copied(flat.tensors[item], lazy=lazy)
            for item, array in enumerate(flat.arrays)
        ]
    prefixes = (lazy,) if isinstance(lazy, str) else tuple(lazy)
    return [when_copied(leaf, lazy=leaf.name.startswith(prefixes)) for leaf in flat.tensors]
