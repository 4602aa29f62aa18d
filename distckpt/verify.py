"""Reading every byte of a checkpoint, by all ranks and several threads, and naming the damage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np

from distckpt.errors import (
    CheckpointError,
    CorruptCheckpoint,
    IncompleteCheckpoint,
    LoadFailed,
    from_plain,
    raise_together,
    to_plain,
)
from distckpt.manifest import Manifest
from distckpt.reader import BlockReader, StoredFile, stored_files, why_gone
from distckpt.region import Region, boxes_of_run
from distckpt.store import Store
from distckpt.team import Late, Team

# Blocks to a task: 64 MiB at the usual block size.
_BLOCKS = 16
# Enough for a local device, and for the latency of a remote store.
_THREADS = 4
_MOST_LISTED = 8


@dataclass(frozen=True, slots=True)
class _Task:
    """A stretch of a file.

    Attributes:
        file: Its number.
        first: First block.
        stop: One past the last.
    """

    file: int
    first: int
    stop: int


def verify(team: Team, store: Store, manifest: Manifest, *, timeout_s: float) -> int:
    """Collective. Read every byte of every file, and compare it with its checksum.

    Memory: a block for each of four threads.

    Args:
        team: The ranks, which share the work.
        store: Where the checkpoint lies.
        manifest: Its manifest.
        timeout_s: How much later than the first rank any may come to its end.

    Returns:
        The bytes read by all ranks.

    Raises:
        CorruptCheckpoint: All damage at once.
        IncompleteCheckpoint: Another save has replaced it meanwhile.
        LoadFailed: A rank failed otherwise, or was late.
    """
    found: list[tuple[CheckpointError, str]] = []
    failure: BaseException | None = None
    read = 0
    try:
        read = _verify_share(store, manifest, found, rank=team.rank, ranks=team.size)
    except Exception as exc:  # a rank that fails still takes part
        if team.size == 1:
            raise
        failure = exc

    def decide(calls: list[Any]) -> list[Any]:
        errors = {rank: call["error"] for rank, call in enumerate(calls) if call["error"]}
        raise_together(errors, store.url, LoadFailed, "verification", own_kind=True)
        damage = [(from_plain(error), held) for call in calls for error, held in call["found"]]
        _raise_damage(store, manifest, damage)
        return [sum(call["bytes"] for call in calls)] * len(calls)

    call = {
        "call": f"verify {store.url!r}",
        "error": None if failure is None else to_plain(failure),
        "found": [(to_plain(error), held) for error, held in found],
        "bytes": read,
    }
    operation = team.operation(timeout_s)
    try:
        total: int = team.drive(operation.agree(call, decide, f"verify {store.url}"))
    except Late as late:
        raise LoadFailed(
            f"{store.url}: {late}", failures=dict.fromkeys(late.ranks, str(late))
        ) from late
    return total


def _verify_share(
    store: Store,
    manifest: Manifest,
    found: list[tuple[CheckpointError, str]],
    *,
    rank: int,
    ranks: int,
) -> int:
    """Verify this rank's share; *found* takes the damage, and what lies there. Returns the bytes.

    Raises:
        StoreError: The store failed.
    """
    files = dict(enumerate(stored_files(manifest)))
    tasks = list(_tasks(files, manifest.block_bytes))[rank::ranks]
    readers: SimpleQueue[BlockReader] = SimpleQueue()
    made = [BlockReader(store, files, manifest.block_bytes)]
    made += [
        BlockReader(store, files, manifest.block_bytes, like=made[0]) for _ in range(_THREADS - 1)
    ]
    for reader in made:
        readers.put(reader)

    def work(task: _Task) -> list[tuple[CheckpointError, str]]:
        reader = readers.get()
        try:
            return _verify_stretch(store, manifest, files[task.file], task, reader)
        finally:
            readers.put(reader)

    with ThreadPoolExecutor(_THREADS, "distckpt-verify") as pool:
        for damage in pool.map(work, tasks):
            found += damage
    return sum(reader.bytes_read for reader in made)


def _tasks(files: Mapping[int, StoredFile], block_bytes: int) -> Iterator[_Task]:
    for number, stored in files.items():
        blocks = -(-stored.table_start // block_bytes)
        for first in range(0, max(blocks, 1), _BLOCKS):
            yield _Task(number, first, min(first + _BLOCKS, blocks))


def _verify_stretch(
    store: Store, manifest: Manifest, stored: StoredFile, task: _Task, reader: BlockReader
) -> list[tuple[CheckpointError, str]]:
    """Verify a stretch; of a file that is wrong as a whole, only the first stretch says so."""
    size = manifest.block_bytes
    try:
        _check_length(store, stored.name, int(manifest.file_length[task.file]))
        if stored.digest:
            reader.table(task.file)
    except (CorruptCheckpoint, IncompleteCheckpoint) as exc:
        if task.first:
            return []
        return [(exc, _held(manifest, task.file, 0, stored.table_start))]
    found: list[tuple[CheckpointError, str]] = []
    for block in range(task.first, task.stop):
        try:
            reader.read(task.file, block)
        except (CorruptCheckpoint, IncompleteCheckpoint) as exc:
            found.append((exc, _held(manifest, task.file, block * size, (block + 1) * size)))
    return found


def _check_length(store: Store, name: str, expected: int) -> None:
    try:
        found = store.size(name)
    except FileNotFoundError:
        raise IncompleteCheckpoint(f"{store.url}/{name}: the file is not there") from None
    if found != expected:
        raise CorruptCheckpoint(
            f"{store.url}/{name}: {found} bytes long, saved were {expected}",
            path=name,
            offset_bytes=min(found, expected),
        )


def _held(manifest: Manifest, file: int, start_byte: int, stop_byte: int) -> str:
    """Name the tensors, and their regions, in a stretch of a file."""
    pieces = manifest.pieces
    rows = np.flatnonzero(
        (pieces.file == file)
        & (pieces.offset_bytes < stop_byte)
        & (pieces.offset_bytes + pieces.size_bytes > start_byte)
    )
    names = []
    for row in rows[:_MOST_LISTED].tolist():
        tensor = int(pieces.tensor[row])
        pad = pieces.start.shape[1] - len(manifest.layout_of(tensor).shape)
        box = Region(
            tuple(pieces.start[row, pad:].tolist()), tuple(pieces.stop[row, pad:].tolist())
        )
        item, offset = int(manifest.itemsize[tensor]), int(pieces.offset_bytes[row])
        first = max(start_byte - offset, 0) // item
        last = min(-(-(stop_byte - offset) // item), box.size)
        if (first, last) == (0, box.size):
            names.append(f"{manifest.names[tensor]}{box}")
            continue
        names += [
            f"{manifest.names[tensor]}{part.shifted(box.start)}"
            for part in boxes_of_run(box.shape, first, last)
        ]
    more = f", … ({len(rows)} pieces)" if len(rows) > _MOST_LISTED else ""
    return (", ".join(names) or "no tensor: header or per-rank values") + more


def _raise_damage(
    store: Store, manifest: Manifest, damage: list[tuple[CheckpointError, str]]
) -> None:
    """Raise all damage at once, if there is any."""
    if not damage:
        return
    missing = any(isinstance(error, IncompleteCheckpoint) for error, _ in damage)
    gone = why_gone(store, manifest.save_id) if missing else None
    if gone is not None:
        raise IncompleteCheckpoint(f"{store.url}: {gone}")
    damage = sorted(damage, key=lambda found: _place(found[0]))
    lines = [f"{error} (holds {held})" for error, held in damage]
    path, offset_bytes = _place(damage[0][0])
    raise CorruptCheckpoint(
        f"{store.url}: {len(damage)} damaged places:\n  " + "\n  ".join(lines),
        path=path or None,
        offset_bytes=offset_bytes,
    )


def _place(error: CheckpointError) -> tuple[str, int]:
    """Where damage is; a file that is missing comes first."""
    if isinstance(error, CorruptCheckpoint):
        return error.path or "", error.offset_bytes or 0
    return "", 0
