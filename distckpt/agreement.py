"""What the ranks agree on before a save: that it is the same one, who writes what, plain values."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distckpt import codec, failures
from distckpt.bundle import Distinct
from distckpt.errors import (
    CheckpointError,
    CheckpointExists,
    LayoutError,
    SaveFailed,
    from_plain,
    raise_together,
    to_plain,
)
from distckpt.flat import FlatState
from distckpt.manifest import MANIFEST_NAME
from distckpt.options import Options
from distckpt.plan import (
    Holdings,
    Seen,
    WritePart,
    WritePlan,
    describe,
    part_from_bytes,
    plan_write,
    summarise,
)
from distckpt.shardfile import RESERVED_KEYS
from distckpt.store import Store, open_store
from distckpt.team import COORDINATOR, Gathered, Late, Operation, Team, ToAll
from distckpt.waiting import Waiting
from distckpt.writer import Layouts

_CACHED_PLANS = 4
_NOTHING = describe([])


@dataclass(slots=True)
class Known:
    """A plan that the ranks have agreed on.

    Attributes:
        generation: The same on all ranks, and of no other plan.
        part: This rank's.
        files: Number of files of all ranks.
        plan: The whole, at the coordinator; None elsewhere.
        saves: How many were begun with it.
        stale: One failed: plan anew, and compare the replicas in full.
        neighbours: How many ranks save on a machine, where they are the most; until the first
            commit tells, it might be all.
        layouts: This rank's files, once it has written some.
        structure: What all its manifests have in common, at the coordinator, once committed.
    """

    generation: int
    part: WritePart
    files: int
    plan: WritePlan | None
    neighbours: int
    saves: int = 0
    stale: bool = False
    layouts: Layouts | None = None
    structure: codec.EncodedStructure | None = None


@dataclass(slots=True)
class Mine:
    """What this rank brings to a save, or why it can't.

    Attributes:
        where: Where to, as text.
        store: The same, opened.
        flat: The state, taken apart.
        held: Its tensors in columns.
        values: Its plain values by name, encoded.
        blobs: Its per-rank values by name, encoded.
        metadata: The user's own; at the coordinator only.
        metrics: Numbers by name; at the coordinator only.
        failure: What went wrong; the rest is there as far as it came.
    """

    where: str
    store: Store | None = None
    flat: FlatState = field(default_factory=lambda: FlatState([], {}, {}))
    held: Holdings = _NOTHING
    values: dict[str, bytes] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    metadata: Mapping[str, object] | None = None
    metrics: Mapping[str, float] | None = None
    failure: BaseException | None = None

    def look_at(
        self,
        url: str | os.PathLike[str] | Store,
        state: object,
        options: Options,
        storage_options: Mapping[str, object] | None,
        *,
        memory: dict[str, Any],
        is_coordinator: bool,
    ) -> None:
        """Open the store and take the state apart; what was found before an error stays.

        *memory* is kept from save to save: a state like the last one is taken apart much faster.
        """
        self.store = open_store(url, storage_options=storage_options)
        self.where = self.store.url
        seen: Seen = memory.setdefault("seen", Seen())
        self.flat, self.held = seen.take_apart(state)
        # Here, and not where a file of it is made: whether a tensor is cut decides about its key.
        reserved = sorted(RESERVED_KEYS.intersection(self.held.names))
        if reserved:
            raise LayoutError(
                f"{', '.join(map(repr, reserved))}: shard files need this name; rename the tensor"
            )
        for name, leaf in self.flat.values.items():
            self.values[name] = codec.encode_value(leaf.value)
        for name, leaf in self.flat.per_rank.items():
            self.blobs[name] = codec.pack(leaf.value.value)  # type: ignore[attr-defined]
        if is_coordinator:
            # Copied now, like everything else that the caller may change when this returns.
            self.metadata = _copied(options.metadata)
            numbers = {name: float(value) for name, value in (options.metrics or {}).items()}
            self.metrics = None if options.metrics is None else _copied(numbers)


def look_and_agree(
    team: Team,
    operation: Operation,
    url: str | os.PathLike[str] | Store,
    state: object,
    options: Options,
    *,
    storage_options: Mapping[str, object] | None = None,
) -> tuple[Mine, Known, dict[str, Any]]:
    """Take the state apart and agree on its plan.

    Returns:
        What is here; the plan; and what the coordinator decided.
    """
    mine = Mine(str(url))
    try:
        mine.look_at(
            url,
            state,
            options,
            storage_options,
            memory=team.memory,
            is_coordinator=team.rank == COORDINATOR,
        )
    except Exception as exc:  # noqa: BLE001  a rank that fails still takes part
        mine.failure = exc
    try:
        known, shared = team.drive(agree(team, operation, mine, options))
    except Late as late:
        raise late_error(late, mine.where) from late
    except CheckpointError as exc:
        if mine.failure is not None:
            raise exc from mine.failure
        raise
    return mine, known, shared


def agree(
    team: Team, operation: Operation, mine: Mine, options: Options
) -> Waiting[tuple[Known, dict[str, Any]]]:
    """Agree on the call; plan if any rank holds something new.

    Returns:
        The plan, and what the coordinator decided.
    """
    store, where, values = mine.store, mine.where, mine.values
    plans: dict[bytes, Known] = team.memory.setdefault("plans", {})
    digest = _digest(team, mine.held, options)
    known = plans.get(digest)
    known = None if known is None or known.stale else known
    in_the_way: Exception | None = None
    if operation.rank == COORDINATOR and store is not None and not options.overwrite:
        # While the others come, and not when all wait for the answer.
        in_the_way = _found_existing(store)

    def decide(calls: Gathered) -> ToAll:
        raise_together(calls.errors(), where, SaveFailed, "save", own_kind=True)
        # Ranks mostly say the same: each distinct call is looked at once.
        distinct = [call for call, _ in calls.distinct()]
        failed = {key: text for found in distinct for key, text in found["unseen"].items()}
        if failed:
            return ToAll({"unseen": failed})
        if isinstance(in_the_way, CheckpointExists) and store is not None:
            _refuse_existing(store)  # unless a rank that came later has deleted it
        elif in_the_way is not None:
            raise in_the_way
        generations = {found["generation"] for found in distinct}
        same_values = len({found["values"] for found in distinct}) == 1
        answer = {
            "save_id": secrets.randbits(64) or 1,
            "plan": len(generations) > 1 or None in generations,
            "values": not same_values,
        }
        return ToAll(answer)

    answer = yield from operation.agree(
        {
            "call": f"save to {where!r}{options}",
            "error": None if mine.failure is None else to_plain(mine.failure),
            # Ranks that differ in what to compare next would compare nothing.
            "generation": (known.generation, known.saves) if known else None,
            "values": _digest_values(values),
            "unseen": unseen_of(team).pending(),
        },
        decide,
        f"join the save to {where}",
    )
    unseen_of(team).raise_together(where, answer.get("unseen"))
    merged = dict(values)
    if answer["plan"] or answer["values"]:
        try:
            known, merged = yield from _plan_together(operation, mine, options, answer, known)
        except CheckpointError:
            plans.clear()
            raise
    if known is None:
        raise SaveFailed(f"{where}: nothing was planned, and this rank knows no plan")
    plans.pop(digest, None)
    plans[digest] = known  # the newest last
    while len(plans) > _CACHED_PLANS:
        del plans[next(iter(plans))]
    return known, {
        **answer,
        "values": {name: codec.decode_value(found) for name, found in merged.items()},
    }


def _plan_together(
    operation: Operation,
    mine: Mine,
    options: Options,
    answer: Mapping[str, bool],
    known: Known | None,
) -> Waiting[tuple[Known | None, dict[str, bytes]]]:
    """Tell the coordinator what is here, and take this rank's part of the plan that it makes.

    Returns:
        The plan, and all ranks' plain values.
    """
    where, ranks = mine.where, operation.size
    summary = summarise(mine.held, rank=operation.rank, ranks=ranks)
    contents = [
        summary.template if answer["plan"] else b"",
        summary.own if answer["plan"] else b"",
        codec.pack(mine.values) if answer["values"] else b"",
    ]
    try:
        described = yield from operation.gather_bytes(
            2, contents, f"describe its state for the save to {where}"
        )
    except Late as late:
        yield from operation.scatter_bytes(3, _told({"late": late.told}, ranks), "plan")
        raise
    plan: WritePlan | None = None
    merged = dict(mine.values)
    told: list[Distinct] | None = None
    if described is not None:
        try:
            plan, merged = _plan(described, merged, answer, options, known)
            told = _told({"error": None, "files": plan.files if plan else None}, ranks)
            told += plan.parts() if plan else []
        except Exception as exc:  # noqa: BLE001  whatever it is, no rank may be left waiting
            told = _told({"error": to_plain(exc)}, ranks)
    head, *part = yield from operation.scatter_bytes(3, told, f"plan the save to {where}")
    outcome = codec.unpack(head)
    if "late" in outcome:
        raise Late(*outcome["late"])
    if outcome["error"] is not None:
        raise from_plain(outcome["error"])
    if answer["plan"]:
        mine_of_it = part_from_bytes(part, mine.held, summary)
        known = Known(operation.number, mine_of_it, outcome["files"], plan, neighbours=ranks)
    return known, merged


def _told(value: object, ranks: int) -> list[Distinct]:
    """Tell all ranks the same."""
    return [Distinct([codec.pack(value)], np.zeros(ranks, np.int64))]


def _plan(
    described: Sequence[Distinct],
    values: dict[str, bytes],
    answer: Mapping[str, bool],
    options: Options,
    known: Known | None,
) -> tuple[WritePlan | None, dict[str, bytes]]:
    """At the coordinator: plan if that is needed, and unite the ranks' plain values.

    Raises:
        LayoutError: What the ranks hold does not fit together.
    """
    templates, owns, plain = described
    plan = None if known is None else known.plan
    if answer["values"]:
        values = _merge_values(Gathered(plain))
    if answer["plan"]:
        plan = plan_write(
            templates,
            owns,
            replicas=options.replicas,
            max_shard_bytes=options.max_shard_bytes,
        )
    if plan is not None:
        _refuse_two_kinds(plan, values)
    return plan if answer["plan"] else None, values


def _copied(value: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Copy nested plain values; raises LayoutError for any other."""
    if value is None:
        return None
    copy: dict[str, Any] = codec.decode_value(codec.encode_value(dict(value)))
    return copy


def _found_existing(store: Store) -> Exception | None:
    """Return what `_refuse_existing` raises; None if it raises nothing."""
    try:
        _refuse_existing(store)
    except Exception as exc:  # noqa: BLE001  raised once all ranks have come
        return exc
    return None


def _refuse_existing(store: Store) -> None:
    """Check that there is no manifest.

    Raises:
        CheckpointExists: There is one.
        StoreError: The store failed.
    """
    try:
        store.size(MANIFEST_NAME)
    except FileNotFoundError:
        return
    raise CheckpointExists(
        f"{store.url}: there is a checkpoint already. Save to another URL, or pass overwrite=True"
    )


def unseen_of(team: Team) -> failures.Unseen:
    """Return the failures of a team's asynchronous saves that nobody was told of."""
    unseen: failures.Unseen = team.memory.setdefault("unseen", failures.Unseen())
    return unseen


def late_error(late: Late, where: str, *, committed: bool | None = False) -> SaveFailed:
    """Make the error of a save in which ranks were late."""
    return SaveFailed(
        f"{where}: {late}", failures=dict.fromkeys(late.ranks, str(late)), committed=committed
    )


def _digest(team: Team, held: Holdings, options: Options) -> bytes:
    """Identify what a plan depends on; what was held at the save before is known already."""
    before: tuple[Holdings, str, bytes] | None = team.memory.get("digest")
    planning = options.planning()
    if before is None or before[0] is not held or before[1] != planning:
        before = team.memory["digest"] = held, planning, digest_of(held, options)
    return before[2]


def digest_of(held: Holdings, options: Options) -> bytes:
    """Identify what a plan depends on."""
    found = hashlib.blake2b(options.planning().encode(), digest_size=16)
    found.update("\0".join(held.names).encode() + b"\1" + "\0".join(held.per_rank).encode())
    for column in (
        held.dtype,
        held.ndim,
        held.kind,
        held.shape,
        held.start,
        held.stop,
        held.first,
        held.last,
    ):
        found.update(str(column.shape).encode())
        found.update(np.ascontiguousarray(column).data)
    return found.digest()


def _digest_values(values: Mapping[str, bytes]) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(values):
        for part in (name.encode(), values[name]):
            found.update(len(part).to_bytes(8, "little"))
            found.update(part)
    return found.digest()


def _merge_values(found: Sequence[Mapping[str, bytes]]) -> dict[str, bytes]:
    """Unite the ranks' plain values.

    Raises:
        LayoutError: Ranks have different values of one name.
    """
    merged: dict[str, bytes] = {}
    variants: dict[str, dict[bytes, int]] = {}
    for rank, values in enumerate(found):
        for name, value in values.items():
            merged.setdefault(name, value)
            variants.setdefault(name, {}).setdefault(value, rank)
    wrong = {name: seen for name, seen in variants.items() if len(seen) > 1}
    if wrong:
        lines = []
        for name, seen in wrong.items():
            shown = [
                f"{codec.decode_value(value)!r} on rank {rank}"
                for value, rank in list(seen.items())[:4]
            ]
            lines.append(f"{name!r}: {', '.join(shown)}")
        raise LayoutError(
            f"{len(wrong)} plain values are not the same on all ranks; wrap what differs on "
            "purpose in PerRank:\n  " + "\n  ".join(lines)
        )
    return merged


def _refuse_two_kinds(plan: WritePlan, values: Mapping[str, bytes]) -> None:
    """Check that no name is one thing on one rank, and another on another.

    Raises:
        LayoutError: Names that are: all of them.
    """
    tensors, others = set(plan.names), set(plan.per_rank) | set(values)
    if tensors.isdisjoint(others) and len(others) == len(plan.per_rank) + len(values):
        return
    kinds: dict[str, list[str]] = {}
    for kind, names in (
        ("a tensor", plan.names),
        ("a per-rank value", plan.per_rank),
        ("a plain value", values),
    ):
        for name in names:
            kinds.setdefault(name, []).append(kind)
    wrong = [f"{name!r}: {' and '.join(found)}" for name, found in kinds.items() if len(found) > 1]
    if wrong:
        raise LayoutError(
            f"{len(wrong)} names are of different kinds on different ranks:\n  "
            + "\n  ".join(wrong)
        )
