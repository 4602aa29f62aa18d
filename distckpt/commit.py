"""A save in the background: written by each rank, then committed by the coordinator."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from distckpt import codec, replicas, stats
from distckpt.agreement import late_error
from distckpt.cores import cores_for_each
from distckpt.deletion import delete_replaced
from distckpt.errors import (
    CheckpointError,
    CheckpointExists,
    CorruptCheckpoint,
    SaveFailed,
    StoreError,
    UnsupportedFormat,
    from_plain,
    raise_together,
    text,
    to_plain,
)
from distckpt.manifest import BLOCK_BYTES, MANIFEST_NAME, Manifest, shard_name
from distckpt.plan import WritePlan
from distckpt.prepare import Save
from distckpt.reader import why_gone
from distckpt.shardfile import ShardImage
from distckpt.stats import RankStats, SaveStats
from distckpt.store import Store, read_object
from distckpt.team import COORDINATOR, Late
from distckpt.waiting import Waiting, in_thread
from distckpt.writer import FileRecord, write_image, write_staged

logger = logging.getLogger(__name__)
# How long a network file system may take to show the coordinator a file that another node has made.
_LOOKUP_S = 5.0


def write(save: Save) -> None:
    """Write this rank's files. What goes wrong is told at the commit: only Ctrl-C is raised."""
    if save.failure is not None:
        return
    try:
        if save.staging is not None and save.staging.has_rest:
            with save.recorder.phase("copy"):
                save.staging.copy_rest()
        for file, image in save.images.items():
            name = shard_name(file, save.files, save.save_id)
            save.begun.append(name)
            save.written.append(_write_file(save, name, file, image))
    except KeyboardInterrupt:  # the second one
        raise
    except BaseException as exc:  # noqa: BLE001  a library's panic, too: the others learn of it
        save.failure = to_plain(exc)


def _write_file(save: Save, name: str, file: int, image: ShardImage) -> FileRecord:
    if save.staging is None:
        return write_image(
            save.store,
            name,
            image,
            file=file,
            recorder=save.recorder,
            interrupt=save.interrupt,
            cores=cores_for_each(save.known.neighbours),
        )
    return write_staged(
        save.store, name, save.staging, image.layout, file=file, recorder=save.recorder
    )


def commit(save: Save, *, blocks: bool = False) -> Waiting[tuple[Manifest | None, SaveStats]]:
    """Collective. Bring all ranks' outcomes together and write the manifest, which is the commit.

    Args:
        save: The save, written.
        blocks: Whether the thread that drives this may wait for the storage: nothing else needs it.

    Returns:
        At the coordinator the manifest, and what the save cost all ranks; elsewhere None, and what
        it cost this one.

    Raises:
        SaveFailed, CheckpointExists: The same on every rank. This rank's files are gone, unless it
            is unknown whether the commit took place.
    """
    ranks: dict[int, RankStats] = {}
    with save.recorder.phase("commit"):
        manifest = yield from _commit(save, ranks, blocks=blocks)
    ranks[save.operation.rank] = save.recorder.stats()
    return manifest, SaveStats(ranks)


def _commit(save: Save, ranks: dict[int, RankStats], *, blocks: bool) -> Waiting[Manifest | None]:
    """Commit; at the coordinator, *ranks* takes what it cost each."""
    operation, store, plan = save.operation, save.store, save.known.plan
    outcome = {
        "error": save.failure,
        "node": save.node,
        "files": [
            (record.file, record.length, record.data_start, record.digest)
            for record in save.written
        ],
        "blobs": save.blob_lengths,
        "checks": (save.checks.check, save.checks.sum) if len(save.checks.check) else (),
        "stats": stats.to_plain(save.recorder.stats()),
    }
    result: dict[str, Any] = {"error": None}
    manifest: Manifest | None = None
    try:
        # While others still write: they were told their parts a little later.
        if plan is not None and save.known.structure is None:
            save.known.structure = yield from in_thread(
                lambda: codec.encode_structure(plan, files=plan.files), here=blocks
            )
        outcomes = yield from operation.gather(0, outcome, "finish writing")
        if outcomes is not None:
            nodes = Counter(one["node"] for one in outcomes)
            result["neighbours"] = max(nodes.values())
            ranks.update(
                {rank: stats.from_plain(one["stats"]) for rank, one in enumerate(outcomes)}
            )
            manifest = yield from in_thread(
                lambda: _commit_at_coordinator(save, outcomes), here=blocks
            )
    except Late as late:
        result = {"error": to_plain(late_error(late, store.url))}
    except Exception as exc:
        if not isinstance(exc, CheckpointError):
            logger.exception("%s: the commit failed at the coordinator", store.url)
        failed = (
            exc
            if isinstance(exc, SaveFailed | CheckpointExists)
            else _failed_at_coordinator(store, exc)
        )
        result = {"error": to_plain(failed)}
    try:
        result = yield from operation.broadcast(1, result, "decide whether the save is committed")
    except Late as late:
        save.known.stale = True
        raise late_error(late, store.url, committed=None) from late
    if result["error"] is not None:
        save.known.stale = True
        error = from_plain(result["error"])
        if getattr(error, "committed", False) is False:
            _discard(save)
        raise error
    save.known.neighbours = result["neighbours"]
    return manifest


def _failed_at_coordinator(store: Store, exc: Exception) -> SaveFailed:
    return SaveFailed(
        f"{store.url}: the commit failed at the coordinator: {text(exc)}",
        failures={COORDINATOR: text(exc)},
    )


def _discard(save: Save) -> None:
    """Delete the files of a save that will never be committed."""
    # Also one whose writing failed: the store may have kept it all the same.
    if save.begun:
        try:
            save.store.delete(save.begun)
        except (OSError, CheckpointError) as exc:
            logger.warning(
                "%s: %d files of a failed save are left: %s", save.store.url, len(save.begun), exc
            )


def _commit_at_coordinator(save: Save, outcomes: Sequence[Mapping[str, Any]]) -> Manifest:
    store, plan = save.store, save.known.plan
    if plan is None:
        raise SaveFailed(f"{store.url}: the coordinator has no plan of this save")
    raise_together(
        {rank: found["error"] for rank, found in enumerate(outcomes) if found["error"]},
        store.url,
        SaveFailed,
        "save",
    )
    checks = [replicas.Checksums(*outcome["checks"]) for outcome in outcomes]
    differing = replicas.name_differing(checks, plan)
    if differing is not None:
        raise SaveFailed(f"{store.url}: {differing}", failures={COORDINATOR: differing})
    _look_up(save, outcomes)
    manifest = _make_manifest(save, plan, outcomes)
    replaced = _read_replaced(store) if save.options.overwrite else None
    data = codec.encode(manifest, save.known.structure)
    if save.known.saves == 1:
        # What a reader would refuse must not become the last committed checkpoint. Later saves of a
        # plan differ from its first in nothing that a reader could refuse.
        codec.decode(data)
    if save.options.guard is not None:
        save.options.guard()
    _put_manifest(store, manifest.save_id, data, replace=save.options.overwrite)
    _look_again(store, manifest)
    if replaced is not None:
        # Only now: until the new manifest stood, they were the last committed checkpoint.
        try:
            delete_replaced(store, replaced)
        except (OSError, CheckpointError) as exc:
            logger.warning("%s: files of the replaced checkpoint are left: %s", store.url, exc)
    return manifest


def _look_up(save: Save, outcomes: Sequence[Mapping[str, Any]]) -> None:
    """See one new file of each node by its exact name.

    A folder that the nodes do not share would make a checkpoint of holes.
    """
    missing: dict[str, str] = {}
    for rank in range(len(outcomes)):
        outcome = outcomes[rank]
        # The last rank of a node counts, and not the coordinator where another wrote: its own
        # memory:// it always sees.
        if outcome["files"] and (rank != COORDINATOR or outcome["node"] not in missing):
            missing[outcome["node"]] = shard_name(outcome["files"][0][0], save.files, save.save_id)
    deadline = time.monotonic() + _LOOKUP_S
    pause_s = 0.01
    while True:
        for node, name in list(missing.items()):
            with suppress(FileNotFoundError):
                save.store.size(name)
                del missing[node]
        if not missing:
            return
        if time.monotonic() > deadline:
            break
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 1.0)
    nodes = ", ".join(f"{node} ({name})" for node, name in missing.items())
    raise SaveFailed(
        f"{save.store.url}: the coordinator, on {save.node}, can't see what was written on: "
        f"{nodes}. The URL must be one storage for all ranks: not a node's own folder, and not "
        "memory:// over several processes",
        failures={
            rank: "its file is not visible to the coordinator"
            for rank, outcome in enumerate(outcomes)
            if outcome["node"] in missing and outcome["files"]
        },
    )


def _look_again(store: Store, manifest: Manifest) -> None:
    """See once more what the manifest names: the whole folder may have been removed under the save.

    The manifest would have made it anew, and would name nothing.

    Raises:
        SaveFailed: It was.
    """
    for name in manifest.file_names[:1]:
        try:
            store.size(name)
        except FileNotFoundError:
            if why_gone(store, manifest.save_id) is not None:
                return  # by another save, after ours was committed: it has deleted our files
            store.delete([MANIFEST_NAME])
            raise SaveFailed(
                f"{store.url}: the folder was removed while it was saved to: {name} is gone. Save "
                "again",
                failures={COORDINATOR: f"{name} is gone"},
            ) from None
        except (OSError, CheckpointError) as exc:
            logger.warning("%s/%s: can't be seen after the commit: %s", store.url, name, text(exc))


def _make_manifest(save: Save, plan: WritePlan, outcomes: Sequence[Mapping[str, Any]]) -> Manifest:
    records = sorted(record for outcome in outcomes for record in outcome["files"])
    written = [record[0] for record in records]
    if written != list(range(plan.files)):
        raise SaveFailed(
            f"{save.store.url}: {plan.files} files were planned, and those written are {written}"
        )
    ranks = len(outcomes)
    return Manifest(
        save_id=save.save_id,
        created_ns=time.time_ns(),
        ranks=ranks,
        block_bytes=BLOCK_BYTES,
        step=save.options.step,
        names=plan.names,
        dtype=plan.dtype.astype(np.int64),
        layout=plan.layout,
        layouts=plan.layouts,
        file_length=np.array([record[1] for record in records], np.int64),
        file_data_start=np.array([record[2] for record in records], np.int64),
        file_digest=[record[3] for record in records],
        values=save.values,
        per_rank={
            name: np.array([outcome["blobs"].get(name, 0) for outcome in outcomes], np.int64)
            for name in plan.per_rank
        },
        per_rank_file=np.maximum(plan.blob_file, 0) if plan.per_rank else np.zeros(0, np.int64),
        metadata=save.metadata,
        metrics=save.metrics,
    )


def _put_manifest(store: Store, save_id: int, data: bytes, *, replace: bool) -> None:
    """Write the manifest; after any error, read back whether it is there.

    Raises:
        CheckpointExists: Another save's was first.
        SaveFailed: It is not there; or (`committed` is None) that can't be told.
    """
    try:
        # The manifest is the commit: until it exists no reader looks at the shards (invariant I1).
        store.put(MANIFEST_NAME, data, replace=replace)
    except (OSError, CheckpointError) as exc:
        try:
            found = codec.decode(read_object(store, MANIFEST_NAME)).save_id
        except FileNotFoundError:
            found = None
        except (OSError, CheckpointError) as second:
            raise _unknown(store, exc, f"it can't be read back ({text(second)})") from exc
        if found == save_id:
            if getattr(exc, "undurable", False):
                raise _unknown(store, exc, "it is there, but may not survive a power loss") from exc
            logger.info(
                "%s: the manifest was stored although its writing reported: %s", store.url, exc
            )
            return
        if found is not None and not replace:
            raise CheckpointExists(
                f"{store.url}: another save committed here first. Save to another URL, or pass "
                "overwrite=True"
            ) from exc
        if not (getattr(exc, "refused", False) or isinstance(exc, FileExistsError)):
            # A request that got no answer can still arrive, and must not name deleted files.
            raise _unknown(store, exc, "it is not there now, but may still appear") from exc
        raise SaveFailed(
            f"{store.url}: the manifest could not be written: {text(exc)}",
            failures={COORDINATOR: text(exc)},
        ) from exc


def _unknown(store: Store, exc: Exception, why: str) -> SaveFailed:
    return SaveFailed(
        f"{store.url}: the manifest could not be written ({text(exc)}); {why}: the checkpoint may "
        "or may not be committed; nothing was deleted",
        failures={COORDINATOR: text(exc)},
        committed=None,
    )


def _read_replaced(store: Store) -> Manifest | None:
    """Read the manifest to be replaced; None if there is none, or none that can be read."""
    try:
        return codec.decode(read_object(store, MANIFEST_NAME))
    except FileNotFoundError:
        return None
    except (CorruptCheckpoint, UnsupportedFormat) as exc:
        logger.warning(
            "%s: replacing a manifest that can't be read, whose files are left: %s", store.url, exc
        )
        return None
    except StoreError as exc:
        raise SaveFailed(
            f"{store.url}: the checkpoint to be replaced can't be read: {text(exc)}"
        ) from exc
