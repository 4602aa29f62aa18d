"""A load before anything is read: agreed on and planned by all ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from distckpt import codec
from distckpt.copies import Work
from distckpt.errors import LoadFailed, MatchError, from_plain, raise_together, to_plain
from distckpt.flat import FlatState
from distckpt.load_plan import LoadOptions, LoadPlan, plan_load
from distckpt.manifest import Manifest
from distckpt.net import Footing, Wanted
from distckpt.plan import Holdings, Seen, describe, fragments_from_plain, holdings_to_plain
from distckpt.reader import StoredFile
from distckpt.team import Gathered, Operation, Team, ToAll
from distckpt.waiting import Waiting

_CACHED_PLANS = 4
_REPORT = ("loaded", "missing", "unexpected", "by_suffix", "cast")


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's part of a plan.

    Attributes:
        footing: What filling takes; `stored` is 0 for what is not loaded.
        first: What is looked at before the net may change: per-rank values, narrowing casts.
        second: All tensors.
        block_bytes: Size of a block.
        blobs: (wanted name, length) of the per-rank values that it reads; their keys follow the
            targets'.
        looks: Whether any rank looks at anything before its net may change.
        same_ranks: As many as saved, so that each gets its own per-rank values back.
        report: What all ranks report.
    """

    footing: Footing
    first: Work
    second: Work
    block_bytes: int
    blobs: list[tuple[str, int]]
    looks: bool
    same_ranks: bool
    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank does in one load.

    Attributes:
        share: Its part of the plan.
        files: Number → file, of those that it reads.
        values: Wanted name → plain value.
        save_id: The checkpoint's.
        neighbours: How many ranks load on this rank's machine, this one included.
    """

    share: Share
    files: dict[int, StoredFile]
    values: dict[str, Any]
    save_id: int
    neighbours: int


@dataclass(frozen=True, slots=True)
class _Known:
    """A plan that the ranks have agreed on.

    Attributes:
        number: The same on all ranks, and of no other plan.
        wants: What this rank wants.
        share: Its part.
        plan: The whole but for the shares, at the coordinator.
        choice: The options that it depends on, at the coordinator.
        manifest: The checkpoint that it was made for, at the coordinator.
    """

    number: int
    wants: _Wants
    share: Share
    plan: LoadPlan | None = None
    choice: tuple[object, ...] | None = None
    manifest: Manifest | None = None


@dataclass(frozen=True, slots=True)
class _Wants:
    """What one rank wants, as far as a plan depends on it."""

    held: Holdings
    values: list[str]
    per_rank: list[str]
    resolves: bool

    def is_like(self, other: _Wants) -> bool:
        """Whether another wants the same."""
        mine = self.values, self.per_rank, self.resolves
        return self.held.is_like(other.held) and mine == (
            other.values,
            other.per_rank,
            other.resolves,
        )

    def plain(self) -> dict[str, Any]:
        """Say it plainly."""
        return {
            "tensors": holdings_to_plain(self.held),
            "values": self.values,
            "per_rank": self.per_rank,
            "resolves": self.resolves,
        }


@dataclass(slots=True)
class LoadMemory:
    """What a rank remembers from load to load.

    Attributes:
        seen: The nets that were loaded last.
        plans: The newest plans, the last one last.
    """

    seen: Seen = field(default_factory=Seen)
    plans: list[_Known] = field(default_factory=list)

    @classmethod
    def of(cls, team: Team) -> LoadMemory:
        """Return a team's."""
        found: LoadMemory = team.memory.setdefault("loads", cls())
        return found

    def find(self, wants: _Wants) -> list[int]:
        """Return the numbers of the plans of what a rank wants."""
        return [known.number for known in self.plans if known.wants.is_like(wants)]

    def fitting(
        self, numbers: AbstractSet[int], manifest: Manifest, options: LoadOptions
    ) -> tuple[int, LoadPlan] | None:
        """At the coordinator, return the one of some plans that fits a checkpoint and options."""
        for known in self.plans:
            if (
                known.number in numbers
                and known.plan is not None
                and known.manifest is not None
                and known.choice == options.planning()
                and manifest.is_like(known.manifest)
            ):
                return known.number, known.plan
        return None

    def keep(self, known: _Known) -> None:
        """Remember a plan."""
        self.plans = [*self.plans, known][-_CACHED_PLANS:]


NOTHING = Wanted(FlatState([], {}, {}), describe([]))


def agree(
    team: Team,
    operation: Operation,
    where: str,
    wanted: Wanted,
    options: LoadOptions,
    *,
    failure: BaseException | None,
    manifest: Callable[[], Manifest],
) -> Waiting[tuple[Operation, Part]]:
    """Collective. Agree on a load, and plan it unless that was done.

    Args:
        team: The ranks.
        operation: The messages of this load.
        where: From where, as text.
        wanted: What this rank wants.
        options: The rest; what is callable counts as the coordinator gives it, but for `per_rank`.
        failure: Why this rank can't.
        manifest: Reads the manifest; called at the coordinator only.

    Returns:
        The operation to go on with, and this rank's part.

    Raises:
        CheckpointError: The same on every rank; no net has changed.
    """
    memory = LoadMemory.of(team)
    wants = _Wants(
        wanted.held, list(wanted.values), list(wanted.per_rank), options.per_rank is not None
    )
    call = {
        "call": f"load_into from {where!r} (strict={options.strict}, cast={options.cast}, "
        f"verify={options.verify}, on_corrupt={options.on_corrupt!r})",
        "error": None if failure is None else to_plain(failure),
        "node": team.coordinator.node,
    }
    numbers = [] if failure is not None else memory.find(wants)
    made: list[tuple[LoadPlan, Manifest]] = []
    decide = partial(
        _decide, where=where, options=options, memory=memory, manifest=manifest, made=made
    )
    told = {**call, "known": numbers, "wants": None if numbers else wants.plain()}
    answer = yield from operation.agree(told, decide, f"join the load from {where}")
    if answer["again"]:
        operation = team.operation(options.timeout_s)
        told = {**call, "known": [], "wants": wants.plain()}
        answer = yield from operation.agree(told, decide, f"join the load from {where}")
    if answer["known"] is not None:
        share = next(known.share for known in memory.plans if known.number == answer["known"])
    else:
        share = _share(wanted.held, answer["share"], answer["report"])
        plan, found = made[-1] if made else (None, None)
        if answer["keep"]:
            kept = None if plan is None else plan.without_shares()
            memory.keep(_Known(operation.number, wants, share, kept, options.planning(), found))
    files = {number: StoredFile(*stored) for number, *stored in answer["files"]}
    return operation, Part(share, files, answer["values"], answer["save_id"], answer["neighbours"])


def _decide(
    calls: Gathered,
    *,
    where: str,
    options: LoadOptions,
    memory: LoadMemory,
    manifest: Callable[[], Manifest],
    made: list[tuple[LoadPlan, Manifest]],
) -> Sequence[Any] | ToAll:
    """At the coordinator: plan the load, if every rank is ready, and no known plan fits."""
    raise_together(calls.errors(), where, LoadFailed, "load", own_kind=True)
    distinct = [call for call, _ in calls.distinct()]
    found = manifest()
    nodes: Counter[str] = Counter()
    for call, some in calls.distinct():
        nodes[call["node"]] += len(some)

    def current(plan: LoadPlan, rank: int) -> dict[str, Any]:
        return {
            "again": False,
            "neighbours": nodes[calls[rank]["node"]],
            **plan.current(found, rank),
        }

    common = set(distinct[0]["known"]).intersection(*(call["known"] for call in distinct))
    fitting = memory.fitting(common, found, options)
    if fitting is not None:
        number, plan = fitting
        return [{"known": number, **current(plan, rank)} for rank in range(len(calls))]
    if any(call["wants"] is None for call in distinct):
        return ToAll({"again": True})
    try:
        plan = plan_load(found, [call["wants"] for call in calls], options)
    except MatchError as exc:
        raise from_plain({**to_plain(exc), "message": f"{where}: {exc}"}) from exc
    made.append((plan, found))
    report = _report_to_plain(plan.report)
    return [
        {
            "known": None,
            "share": share,
            "report": report,
            "keep": options.planning() is not None,
            **current(plan, rank),
        }
        for rank, share in enumerate(plan.shares)
    ]


def _report_to_plain(report: Mapping[str, Any]) -> bytes:
    """Encode it, once for all ranks; names as few long texts, since there may be thousands."""
    texts: dict[str, str | None] = {}
    for name in _REPORT:
        found = report[name]
        texts[name] = "\0".join(found) if found else None
        if isinstance(found, dict):
            texts[f"{name} values"] = "\0".join(found.values())
    return codec.pack(texts)


def _report_from_plain(data: bytes) -> dict[str, Any]:
    texts = codec.unpack(data)
    report: dict[str, Any] = {}
    for name in _REPORT:
        found = [] if texts[name] is None else texts[name].split("\0")
        values = texts.get(f"{name} values")
        report[name] = (
            found if values is None else dict(zip(found, values.split("\0"), strict=False))
        )
    return report


def _share(held: Holdings, plain: Mapping[str, Any], report: bytes) -> Share:
    return Share(
        Footing(held, plain["keep"]),
        Work(fragments_from_plain(plain["first"]), plain["block_bytes"]),
        Work(fragments_from_plain(plain["second"]), plain["block_bytes"]),
        plain["block_bytes"],
        plain["blobs"],
        plain["looks"],
        plain["same_ranks"],
        _report_from_plain(report),
    )
