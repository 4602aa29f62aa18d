"""Saving, opening and loading checkpoints: what users call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from distckpt.bundle import Distinct
from distckpt.checkpoint import Checkpoint, StorageOptions, Url
from distckpt.commit import commit, write
from distckpt.errors import SaveFailed, raise_together, to_plain
from distckpt.flat import FlatState, flatten
from distckpt.formats import locate
from distckpt.load_plan import LoadOptions, OnCorrupt, ResolvePerRank
from distckpt.loader import LoadReport
from distckpt.loader import load_into as load_net
from distckpt.match import Prefixes, Rename, filter_names
from distckpt.options import Lazy, OnFailure, Options, check_on_failure, check_staging
from distckpt.pending import PendingCheckpoint, start_save
from distckpt.plan import (
    DEFAULT_SHARD_BYTES,
    Replicas,
    describe,
    plan_write,
    summarise,
)
from distckpt.prepare import prepare
from distckpt.reader import read_manifest
from distckpt.team import Late, connect
from distckpt.waiting import deferred_interrupt


def save(
    url: Url,
    state: object,
    *,
    comm: object = None,
    metadata: Mapping[str, object] | None = None,
    overwrite: bool = False,
    replicas: Replicas = "check",
    timeout_s: float = 600,
    storage_options: StorageOptions = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Checkpoint:
    """Collective. Save a state; when this returns, it is durable and committed.

    Args:
        url: A path or any URL that fsspec knows, the same on every rank.
        state: Nested dicts, lists, tuples and dataclasses, or an object with `tensors()` and
            `assign()`; their leaves are arrays (the same on every rank), `Shard`, `FlatShard`,
            `PerRank`, and plain values.
        comm: An mpi4py communicator or a `Coordinator`. None: ``MPI.COMM_WORLD`` under an MPI
            launcher with more than one rank, else this process alone.
        metadata: Kept with the checkpoint: nested plain values. The coordinator's counts.
        overwrite: Replace a checkpoint that is there. It stays readable until the new one is
            committed.
        replicas: What to do about arrays that several ranks hold: ``"check"`` that they are equal,
            store ``"rank0"``'s, or ``"trust"``; or a mapping of glob → one of these.
        timeout_s: How long to wait for other ranks at any one point, in seconds.
        storage_options: Passed to the fsspec file system.
        max_shard_bytes: A rank's file is split before it exceeds this.

    Returns:
        The checkpoint.

    Raises:
        LayoutError: The pieces do not make whole tensors, or can't be stored.
        CheckpointExists: There is a checkpoint, and `overwrite` is False.
        SaveFailed: A rank failed or was late.
        StoreError: The URL can't be opened.

    All are raised on every rank alike, and nothing is committed. Ctrl-C ends a save early: its
    files are deleted, the other ranks get a `SaveFailed`, and KeyboardInterrupt is raised here.
    """
    team = connect(comm, timeout_s=timeout_s)
    options = Options(
        overwrite=overwrite,
        replicas=replicas,
        max_shard_bytes=max_shard_bytes,
        metadata=metadata,
        timeout_s=timeout_s,
    )
    with deferred_interrupt() as interrupt:
        found = prepare(team, url, state, options, storage_options=storage_options)
        found.interrupt = interrupt
        write(found)
        manifest, stats = team.drive(commit(found))
    return Checkpoint(found.store, manifest, found.save_id, stats)


def save_async(
    url: Url,
    state: object,
    *,
    lazy: Lazy = False,
    check_lazy: bool = False,
    staging_bytes: int | None = None,
    comm: object = None,
    metadata: Mapping[str, object] | None = None,
    overwrite: bool = False,
    replicas: Replicas = "check",
    timeout_s: float = 600,
    storage_options: StorageOptions = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    on_failure: OnFailure = "raise",
) -> PendingCheckpoint:
    """Collective. Start a save: the arrays are copied, and may change when this returns.

    The files are written and committed in the background; with `lazy`, copying goes on there, too.

    Args:
        url: As in `save`, and so are the other arguments.
        state: As in `save`.
        lazy: Copy in the background, too: all arrays, or those whose names begin with one of these
            prefixes. They may not change before `PendingCheckpoint.wait_staged` returns. Arrays
            that nobody can change, such as JAX's, are never copied.
        check_lazy: Detect if such an array does change, which fails the save; for debugging, since
            it reads all of them once more. What was changed and changed back is not seen.
        staging_bytes: Memory of this rank for copies, of all saves in flight together; as much as
            it takes by default. If it is less than that, this returns later: when all but so many
            bytes are written.
        comm: As in `save`.
        metadata: As in `save`.
        overwrite: As in `save`.
        replicas: As in `save`.
        timeout_s: As in `save`.
        storage_options: As in `save`.
        max_shard_bytes: As in `save`.
        on_failure: What happens when it fails and nobody waits for it. ``"raise"``: the next save
            of these ranks raises it, or, where none follows, the program ends with status 74.
            ``"warn"``: it is only logged. `wait` raises in any case.

    Returns:
        The save in flight. Several may be; each rank starts the same ones in the same order, and
        may wait for them in any order, or not at all.

    Raises:
        CheckpointError: As in `save`, for what is wrong with the call; or an earlier save failed,
            and nobody waited for it. What goes wrong later, `wait` raises.
        ValueError: Another `on_failure`, an empty prefix, or too few `staging_bytes` (less than
            8 MiB).
    """
    check_on_failure(on_failure)
    check_staging(lazy, staging_bytes)
    options = Options(
        overwrite=overwrite,
        replicas=replicas,
        max_shard_bytes=max_shard_bytes,
        lazy=lazy,
        check_lazy=check_lazy,
        staging_bytes=staging_bytes,
        metadata=metadata,
        timeout_s=timeout_s,
        on_failure=on_failure,
    )
    team = connect(comm, timeout_s=timeout_s)
    return start_save(team, url, state, options, storage_options=storage_options)


@dataclass(frozen=True, slots=True)
class SavePlan:
    """What a save would write, over all ranks.

    Attributes:
        tensors: Number of tensors.
        bytes: Of all tensors, each counted once.
        rank_bytes: By rank, what it would write.
        rank_files: By rank, how many files.
    """

    tensors: int
    bytes: int
    rank_bytes: tuple[int, ...]
    rank_files: tuple[int, ...]

    def __str__(self) -> str:
        lines = [
            (
                f"{self.tensors} tensors, {self.bytes:,} bytes, in {sum(self.rank_files)} files "
                f"by {len(self.rank_bytes)} ranks"
            )
        ]
        lines += [
            f"  rank {rank}: {size:,} bytes in {files} file{'' if files == 1 else 's'}"
            for rank, (size, files) in enumerate(zip(self.rank_bytes, self.rank_files, strict=True))
        ]
        return "\n".join(lines)


def plan(
    state: object,
    *,
    comm: object = None,
    replicas: Replicas = "check",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    timeout_s: float = 600,
) -> SavePlan:
    """Collective. Say what a save of this state would write, and write nothing.

    Args:
        state: As in `save`.
        comm: As in `save`.
        replicas: As in `save`.
        max_shard_bytes: As in `save`.
        timeout_s: As in `save`.

    Returns:
        The plan, the same on every rank; printed, it is a table of the ranks.

    Raises:
        LayoutError: As in `save`.
        SaveFailed: A rank failed or was late.
    """
    team = connect(comm, timeout_s=timeout_s)
    flat, failure = FlatState([], {}, {}), None
    try:
        flat = flatten(state)
    except Exception as exc:  # noqa: BLE001  a rank that fails still takes part
        failure = exc
    held = describe(flat.tensors, list(flat.per_rank))
    summary = summarise(held, rank=team.rank, ranks=team.size)

    def decide(calls: list[Any]) -> list[Any]:
        errors = {rank: call["error"] for rank, call in enumerate(calls) if call["error"]}
        raise_together(errors, "plan", SaveFailed, "plan", own_kind=True)
        found = plan_write(
            Distinct.of([call["template"] for call in calls]),
            Distinct.of([call["own"] for call in calls]),
            replicas=replicas,
            max_shard_bytes=max_shard_bytes,
        )
        files = np.bincount(found.file_rank, minlength=len(calls)).tolist()
        sizes = found.rank_bytes.tolist()
        return [(len(found.names), sum(sizes), tuple(sizes), tuple(files))] * len(calls)

    call = {
        "call": f"plan{Options(replicas=replicas, max_shard_bytes=max_shard_bytes)}",
        "error": None if failure is None else to_plain(failure),
        "template": summary.template,
        "own": summary.own,
    }
    try:
        return SavePlan(*team.drive(team.operation(timeout_s).agree(call, decide, "join the plan")))
    except Late as late:
        raise SaveFailed(str(late), failures=dict.fromkeys(late.ranks, str(late))) from late


def open(
    url: Url,
    *,
    storage_options: StorageOptions = None,
    format: str | None = None,
    options: Mapping[str, object] | None = None,
) -> Checkpoint:
    """Open a checkpoint, or another format's file: no tensor is read. Not collective.

    Args:
        url: Where it is.
        storage_options: Passed to the fsspec file system.
        format: Name of its format (see `distckpt.formats`); by default it is told from what is
            there.
        options: The format's own, such as the key of an encrypted file.

    Returns:
        A handle; tensors are read when it is asked for them.

    Raises:
        CheckpointNotFound: There is nothing.
        IncompleteCheckpoint: A save was begun here and not committed.
        CorruptCheckpoint: The manifest, or the other format's file, is damaged.
        UnsupportedFormat: It is a file of no known format, or of a newer version, or holds what
            can't be had here, or a library is missing: the message says which.
        StoreError: The store failed.
    """
    store = locate(url, storage_options=storage_options, format=format, options=options)
    return Checkpoint(store, read_manifest(store))


def load(
    url: Url,
    *,
    filter_prefix: Prefixes = (),
    only_prefix: Prefixes = (),
    select: Callable[[str], bool] | None = None,
    storage_options: StorageOptions = None,
    format: str | None = None,
    options: Mapping[str, object] | None = None,
) -> dict[str, np.ndarray]:
    """Load a checkpoint's tensors whole into this process. Not collective.

    It does not matter which layout they were saved with. Every byte is verified.

    Args:
        url: Where it is.
        filter_prefix: A prefix or several: names that start with one are left out.
        only_prefix: A prefix or several: only names that start with one are loaded.
        select: A predicate: only names that it accepts are loaded.
        storage_options: Passed to the fsspec file system.
        format: As in `open`.
        options: As in `open`.

    Returns:
        Name → array, in the order of the state. Plain values are in `Checkpoint.values`.

    Raises:
        MatchError: The filters leave nothing.
        LoadFailed: A file is missing or damaged.
        CheckpointError: As in `open`.
    """
    checkpoint = open(url, storage_options=storage_options, format=format, options=options)
    names = filter_names(
        checkpoint, filter_prefix=filter_prefix, only_prefix=only_prefix, select=select
    )
    net = {name: np.empty(checkpoint[name].shape, checkpoint[name].dtype) for name in names}
    checkpoint.load_into(net, strict=True)
    return net


def load_into(
    url: Url,
    net: object,
    *,
    comm: object = None,
    strict: bool = False,
    filter_prefix: Prefixes = (),
    only_prefix: Prefixes = (),
    select: Callable[[str], bool] | None = None,
    rename: Rename | None = None,
    cast: bool = True,
    verify: bool = True,
    per_rank: ResolvePerRank | None = None,
    on_corrupt: OnCorrupt = "raise",
    timeout_s: float = 600,
    storage_options: StorageOptions = None,
    format: str | None = None,
    options: Mapping[str, object] | None = None,
) -> LoadReport:
    """Collective. Load a checkpoint, or another format's file, into a net.

    It does not matter which layout, or how many ranks, it was saved with.

    Args:
        url: Where it is.
        net: Nested dicts, lists, tuples and dataclasses of arrays (filled in place), `Shard` and
            `FlatShard` (each rank its own piece), `PerRank` and plain values (replaced); a list of
            ``{"name", "data"}`` dicts; a torch module or optimizer, a MindSpore cell, a JAX pytree;
            what `register_net` knows; or an object with `tensors()` and `assign()`.
        comm: As in `save`. Each byte is read by one rank, and sent to the others that want it.
        strict: Only exact names match, everything wanted must be there, and nothing is converted.
        filter_prefix: A prefix or several: saved names that start with one are left out.
        only_prefix: A prefix or several: only saved names that start with one are used.
        select: A predicate: only saved names that it accepts are used.
        rename: Saved name → name to match under: a mapping or a callable.
        cast: Whether to convert among floats and among signed integers; a value that does not fit
            is refused.
        verify: Whether to check the checksums of what is read.
        per_rank: Decides about per-rank values on another number of ranks: called with the list of
            the saved values, the rank and the number of ranks, it returns this rank's value.
        on_corrupt: What happens where bytes are damaged or a file is missing. ``"raise"``: the load
            fails. ``"skip"``: what can't be read keeps what the net held, a warning is logged, and
            the report's `skipped` says which regions of which tensors these are.
        timeout_s: As in `save`.
        storage_options: Passed to the fsspec file system.
        format: As in `open`.
        options: As in `open`.

    Returns:
        What was loaded, the same on every rank; its `.net` is the loaded net.

    Raises:
        MatchError: Names, shapes, dtypes or values that don't fit, all of them; the net is
            unchanged.
        LoadFailed: A file is damaged or missing, or a rank failed; `.touched` names what may be
            partly changed.
        CheckpointError: As in `open`.

    All are raised on every rank alike.
    """
    chosen = LoadOptions(
        strict,
        filter_prefix,
        only_prefix,
        select,
        rename,
        cast,
        verify,
        per_rank,
        timeout_s,
        on_corrupt,
    )
    team = connect(comm, timeout_s=timeout_s)
    return load_net(
        team,
        url,
        net,
        chosen,
        storage_options=storage_options,
        format=format,
        format_options=options,
    )
