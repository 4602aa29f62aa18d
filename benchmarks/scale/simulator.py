"""All ranks of a job in one process: the real protocols and planning, over a mailroom.

What is measured is distckpt's own code, as each rank runs it. What is simulated is the network, by
`Network`, and the storage, by `Storage`.
"""

from __future__ import annotations

import dataclasses
import time
import tracemalloc
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import numpy as np

from benchmarks.scale.layouts import PREFIXES, Layout, State, layout_for, reduced
from benchmarks.scale.models import Model
from distckpt import codec
from distckpt.agreement import Mine, agree, digest_of
from distckpt.alike import Flattened
from distckpt.bundle import Distinct, children
from distckpt.flat import flatten
from distckpt.manifest import BLOCK_BYTES, DATA_ALIGNMENT, Manifest, pad_columns, table_bytes
from distckpt.options import Options
from distckpt.plan import Holdings, WritePlan, describe, part_from_bytes, plan_write, summarise
from distckpt.plan.summary import own_to_bytes
from distckpt.team import Gathered, Operation, Team, ToAll

T = TypeVar("T")


@dataclass(frozen=True)
class Network:
    """Assumed: what a message costs from one rank to another."""

    latency_s: float = 10e-6
    bytes_per_s: float = 10e9

    def seconds(self, messages: int, size_bytes: float) -> float:
        """Return how long one rank takes to receive so many messages, one after another."""
        return messages * self.latency_s + size_bytes / self.bytes_per_s


@dataclass(frozen=True)
class Storage:
    """Assumed: a parallel file system, or an object store."""

    rank_bytes_per_s: float = 2e9
    total_bytes_per_s: float = 1e12
    request_s: float = 5e-3

    def seconds(self, busiest_bytes: float, total_bytes: float, requests: float = 1) -> float:
        """Return how long the ranks take together."""
        slowest = busiest_bytes / self.rank_bytes_per_s + requests * self.request_s
        return max(slowest, total_bytes / self.total_bytes_per_s)


class Mailroom:
    """The messages between ranks that all live in this process, counted.

    Attributes:
        sent: (ranks,) messages that each rank has sent.
        sent_bytes: (ranks,) their bytes.
        received: (ranks,) messages that each rank was sent.
        received_bytes: (ranks,) their bytes.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._boxes: list[dict[int, deque[tuple[int, bytes]]]] = [{} for _ in range(ranks)]
        self.clear()

    def clear(self) -> None:
        """Count from zero."""
        self.sent, self.sent_bytes, self.received, self.received_bytes = (
            np.zeros(self.ranks, np.int64) for _ in range(4)
        )

    def post(self, source: int, dest: int, tag: int, payload: bytes) -> None:
        """Take a message."""
        self.sent[source] += 1
        self.sent_bytes[source] += len(payload)
        self.received[dest] += 1
        self.received_bytes[dest] += len(payload)
        self._boxes[dest].setdefault(tag, deque()).append((source, payload))

    def poll(self, rank: int, tag: int, source: int | None) -> tuple[int, bytes] | None:
        """Hand one out."""
        box = self._boxes[rank].get(tag)
        for message in list(box or ()):
            if source is None or message[0] == source:
                box.remove(message)  # type: ignore[union-attr]
                return message
        return None


@dataclass
class MailCoordinator:
    """One rank's `Coordinator` at a mailroom."""

    rank: int
    mailroom: Mailroom
    node: str = "node"
    concurrent: bool = False

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.mailroom.ranks

    def post(self, dest: int, tag: int, payload: bytes) -> None:
        """See `Coordinator`."""
        self.mailroom.post(self.rank, dest, tag, payload)

    def poll(self, tag: int, source: int | None = None) -> tuple[int, bytes] | None:
        """See `Coordinator`."""
        return self.mailroom.poll(self.rank, tag, source)


def finish(protocol: Generator[None, None, T]) -> T | None:
    """Run a protocol that has all its messages to its end; None if it waits."""
    try:
        next(protocol)
    except StopIteration as end:
        result: T = end.value
        return result
    return None


def run_all(protocols: Sequence[Generator[None, None, T]]) -> list[T]:
    """Run the protocols of all ranks, in turn, until all have ended."""
    results: dict[int, T] = {}
    while len(results) < len(protocols):
        for rank, protocol in enumerate(protocols):
            if rank not in results:
                try:
                    next(protocol)
                except StopIteration as end:
                    results[rank] = end.value
    return [results[rank] for rank in range(len(protocols))]


class Timed:
    """What a stretch of code cost, in processor seconds."""

    cpu_s: float = 0.0

    def __enter__(self) -> Self:
        self._start = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu_s += time.process_time() - self._start


@dataclass
class RankCost:
    """One rank's own part, in processor seconds."""

    flatten_s: float
    describe_s: float
    decode_s: float
    again_s: float

    @property
    def first_s(self) -> float:
        """At the first save."""
        return self.flatten_s + self.describe_s + self.decode_s


@dataclass
class Result:
    """What one layout of one model costs on so many ranks; times are processor seconds."""

    model: str
    layout: str
    kind: str
    ranks: int
    tensors: int = 0
    items: int = 0
    boxes: int = 0
    templates: int = 0
    total_bytes: int = 0
    gather_bytes: int = 0
    scatter_bytes: int = 0
    item_bytes_sent: float = 0.0
    plan_s: float = 0.0
    encode_s: float = 0.0
    decode_s: float = 0.0
    peak_bytes: int = 0
    manifest_bytes: int = 0
    steady_s: float = 0.0
    rank_first_s: float = 0.0
    rank_next_s: float = 0.0
    part_bytes_mean: float = 0.0
    part_bytes_max: int = 0
    busiest_bytes: int = 0
    best_bytes: float = 0.0
    load_layout: str = ""
    load_plan_s: float = 0.0
    load_rows: int = 0
    simulated: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Reduced:
    """The same layout with one tensor of each kind: tensors of a kind are cut alike on every rank.

    Attributes:
        layout: How these are held.
        like: Name of a tensor → the one of its kind that is there.
    """

    layout: Layout
    like: Mapping[str, str]


_COLUMNS = ("dtype", "ndim", "kind", "shape", "start", "stop", "first", "last")


class Job:
    """All ranks of one layout.

    Args:
        layout: What they hold.
        reduced: The same in little; None where the regular part of a rank's state depends on the
            layout's `key` alone.
    """

    def __init__(self, layout: Layout, reduced: Reduced | None) -> None:
        self.layout, self._reduced = layout, reduced
        self.items = 0
        self._known: dict[object, tuple[Any, ...]] = {}
        self._model: Holdings | None = None

    def summary(self, rank: int) -> tuple[bytes, bytes]:
        """Return what a rank sends of its state, by the whole of the real code."""
        held = describe(flatten(self.layout.state(rank)).tensors)
        found = summarise(held, rank=rank, ranks=self.layout.ranks)
        return found.template, found.own

    def summaries(self) -> tuple[Distinct, Distinct]:
        """Return what all ranks send of their states.

        Only for a few ranks is all of it made by way of a state with all of its tensors; `check`
        compares.
        """
        quick = self._by_key if self._reduced is None else self._by_kinds
        pairs = [quick(rank) for rank in range(self.layout.ranks)]
        return Distinct.of([pair[0] for pair in pairs]), Distinct.of([pair[1] for pair in pairs])

    def check(self, summaries: tuple[Distinct, Distinct], sample: Sequence[int]) -> None:
        """Compare with the real code, for some ranks."""
        for rank in sample:
            if self.summary(rank) != (summaries[0][rank], summaries[1][rank]):
                raise AssertionError(f"{self.layout.name}: rank {rank} says something else")

    def _by_kinds(self, rank: int) -> tuple[bytes, bytes]:
        """Say what a rank's tensors of each kind say, for all of that kind."""
        reduced, ranks = self._reduced, self.layout.ranks
        if reduced is None or reduced.layout.boxes is None:
            raise ValueError(f"{self.layout.name}: there is no reduced layout")
        if self._model is None:
            self._model = describe(flatten(reduced.layout.state(rank)).tensors)
        start, stop = reduced.layout.boxes(rank)
        size = (stop - start).prod(axis=1)
        held = dataclasses.replace(self._model, start=start, stop=stop, last=size)
        small = summarise(held, rank=rank, ranks=ranks)
        if small.template not in self._known:
            full = describe(flatten(self.layout.state(rank)).tensors)
            row = {name: number for number, name in enumerate(held.names)}
            rows = np.array([row[reduced.like[name]] for name in full.names])
            template = summarise(full, rank=rank, ranks=ranks).template
            self._known[small.template] = template, full.names, rows
        template, names, rows = self._known[small.template]
        self.items += len(names)
        if not len(small.odd):
            return template, small.own
        odd = np.flatnonzero(np.isin(rows, small.odd))
        columns = {name: getattr(held, name)[rows] for name in _COLUMNS}
        every = dataclasses.replace(held, names=names, **columns)
        return template, own_to_bytes(every, odd, odd, small.coordinates)

    def _by_key(self, rank: int) -> tuple[bytes, bytes]:
        """Say the regular part of a rank's state as the first rank of the same key did."""
        key = self.layout.key(rank)
        if key not in self._known:
            held = describe(flatten(self.layout.state(rank)).tensors)
            full = summarise(held, rank=rank, ranks=self.layout.ranks)
            self._known[key] = full.template, full.coordinates, len(full.regular), held.width
        flat = {} if self.layout.runs is None else self.layout.runs(rank)
        template, coordinates, regular, width = self._known[key]
        held = _widened(describe(flatten(flat).tensors), width)
        self.items += regular + len(flat)
        odd = np.arange(len(flat))
        return template, own_to_bytes(held, odd, regular + odd, coordinates)


def job_of(model: Model, kind: str, layout: Layout) -> Job:
    """Make the job of a layout."""
    if not kind.startswith("fsdp"):
        return Job(layout, None)
    small, like = reduced(model)
    small_layout = layout_for(small, kind, layout.ranks)
    if small_layout is None:
        raise ValueError(f"{layout.name}: there is none of {small.name}, reduced")
    names = {prefix + name: prefix + other for prefix in PREFIXES for name, other in like.items()}
    return Job(layout, Reduced(small_layout, names))


def _widened(held: Holdings, width: int) -> Holdings:
    return dataclasses.replace(
        held,
        shape=pad_columns(held.shape, width, 1),
        start=pad_columns(held.start, width, 0),
        stop=pad_columns(held.stop, width, 1),
    )


def rank_cost(
    state: State, rank: int, ranks: int, told: Sequence[bytes], times: int = 3
) -> RankCost:
    """Measure one rank's own part of a first save, and of the next: the least of several times."""
    costs = []
    for _ in range(times):
        with Timed() as flattening:
            flat = flatten(state)
            like = Flattened(flat)
        with Timed() as describing:
            held = describe(flat.tensors)
            digest_of(held, Options())
            summary = summarise(held, rank=rank, ranks=ranks)
        with Timed() as decoding:
            part_from_bytes(told, held, summary)
        with Timed() as again:
            if like.again(state) is None:
                raise AssertionError(f"rank {rank}'s state is not like itself")
            digest_of(held, Options())
        costs.append([timed.cpu_s for timed in (flattening, describing, decoding, again)])
    return RankCost(*np.min(costs, axis=0).tolist())


def gather(
    mailroom: Mailroom, columns: Sequence[Distinct], number: int = 1
) -> Generator[None, None, list[Distinct] | None]:
    """Send what every rank says up the tree; return the coordinator's protocol, not yet begun."""
    for rank in range(mailroom.ranks - 1, 0, -1):
        operation = Operation(MailCoordinator(rank, mailroom), number, 600.0)
        finish(operation.gather_bytes(2, [column[rank] for column in columns], "say"))
    operation = Operation(MailCoordinator(0, mailroom), number, 600.0)
    return operation.gather_bytes(2, [column[0] for column in columns], "say")


def plan_at_coordinator(
    mailroom: Mailroom, root: Generator[None, None, list[Distinct] | None]
) -> tuple[WritePlan, list[Distinct]]:
    """Do what the coordinator does from the messages that wait for it to those that it sends."""
    columns = finish(root)
    if columns is None:
        raise AssertionError("not all messages have come")
    plan = plan_write(*columns)
    parts = plan.parts()
    operation = Operation(MailCoordinator(0, mailroom), 1, 600.0)
    finish(operation.scatter_bytes(3, parts, "hear"))
    return plan, parts


def make_manifest(plan: WritePlan, ranks: int) -> Manifest:
    """Make a plan's manifest as a commit does, with made-up lengths of headers and digests."""
    digests = np.random.default_rng(0).bytes(16 * plan.files)
    manifest = Manifest(
        save_id=1 << 63,
        created_ns=time.time_ns(),
        ranks=ranks,
        block_bytes=BLOCK_BYTES,
        step=1000,
        names=plan.names,
        dtype=plan.dtype.astype(np.int64),
        layout=plan.layout,
        layouts=plan.layouts,
        file_length=np.zeros(plan.files, np.int64),
        file_data_start=np.full(plan.files, 2 * DATA_ALIGNMENT),
        file_digest=[digests[16 * file : 16 * file + 16] for file in range(plan.files)],
    )
    starts = manifest.file_table_start
    manifest.file_length[:] = [start + table_bytes(start, BLOCK_BYTES) for start in starts.tolist()]
    return manifest


def measure(job: Job, result: Result) -> tuple[Manifest, WritePlan, list[Distinct]]:
    """Fill in a result: one first save, and the steady state.

    Returns:
        The manifest, the plan, and what the ranks are told of it.
    """
    ranks = job.layout.ranks
    sample = sorted({0, 1, ranks // 3, ranks // 2, ranks - 1})
    summaries = job.summaries()
    job.check(summaries, sample)
    result.items, result.templates = job.items, len(summaries[0].payloads)
    sizes = [_sizes(column).sum() for column in summaries]
    result.item_bytes_sent = float(sum(sizes)) / job.items
    mailroom = Mailroom(ranks)
    root = gather(mailroom, summaries)
    result.gather_bytes = int(mailroom.received_bytes[0])
    with Timed() as planning:
        plan, parts = plan_at_coordinator(mailroom, root)
    result.scatter_bytes = int(mailroom.sent_bytes[0])
    with Timed() as encoding:
        manifest = make_manifest(plan, ranks)
        data = codec.encode(manifest)
    with Timed() as decoding:
        codec.decode(data)
    result.peak_bytes = peak_bytes(summaries)
    result.plan_s, result.encode_s, result.decode_s = planning.cpu_s, encoding.cpu_s, decoding.cpu_s
    result.manifest_bytes = len(data)
    result.tensors, result.boxes = len(plan.names), manifest.boxes
    result.total_bytes = int(plan.rank_bytes.sum())
    result.busiest_bytes = int(plan.rank_bytes.max())
    told = sum(_sizes(column) for column in parts)
    result.part_bytes_mean, result.part_bytes_max = float(np.mean(told)), int(np.max(told))
    costs = [
        rank_cost(job.layout.state(rank), rank, ranks, [column[rank] for column in parts])
        for rank in sample
    ]
    result.rank_first_s = float(np.median([cost.first_s for cost in costs]))
    result.rank_next_s = float(np.median([cost.again_s for cost in costs]))
    result.steady_s = min(steady(ranks) for _ in range(2))
    return manifest, plan, parts


def _sizes(column: Distinct) -> np.ndarray:
    """(ranks,) bytes of each rank's content."""
    return np.array([len(payload) for payload in column.payloads])[column.of_rank]


def peak_bytes(summaries: Sequence[Distinct]) -> int:
    """Return how much memory the coordinator allocates at most, from messages to the manifest.

    Not while it is timed: counting what is allocated takes longer than allocating it.
    """
    mailroom = Mailroom(len(summaries[0].of_rank))
    root = gather(mailroom, summaries)
    tracemalloc.start()
    plan, _ = plan_at_coordinator(mailroom, root)
    codec.encode(make_manifest(plan, mailroom.ranks))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def simulate(result: Result, network: Network, storage: Storage) -> None:
    """Add to a result how long a save and a load take on an assumed network and storage."""
    ranks = result.ranks
    levels = [0] + [rank for rank in (16, 256, 4096) if rank < ranks]
    messages = sum(len(children(rank, ranks)) for rank in levels)
    up = network.seconds(messages, result.gather_bytes)
    down = network.seconds(messages, result.scatter_bytes)
    first = result.rank_first_s + up + result.plan_s + down
    again = result.rank_next_s + result.steady_s + 2 * network.seconds(messages, 0)
    write = storage.seconds(result.busiest_bytes, result.total_bytes)
    commit = result.encode_s + 2 * network.seconds(messages, 0) + storage.request_s
    read = storage.seconds(result.total_bytes / ranks, result.total_bytes, requests=2)
    result.simulated = {
        "first plan (s)": first,
        "next plan (s)": again,
        "write (s)": write,
        "first save (s)": first + write + commit,
        "next save (s)": again + write + commit,
        "read (s)": read,
    }


def steady(ranks: int) -> float:
    """Measure the coordinator's planning when nothing has changed: one agreement."""
    mailroom = Mailroom(ranks)
    call: dict[str, Any] = {
        "call": "save to 's3://bucket/run/step-00001000' (step=1000)",
        "error": None,
        "generation": (17, 3),
        "values": bytes(16),
        "unseen": {},
    }
    content = [Distinct([codec.pack(call)], np.zeros(ranks, np.int64))]
    for rank in range(ranks - 1, 0, -1):
        operation = Operation(MailCoordinator(rank, mailroom), 1, 600.0)
        finish(operation.gather_bytes(0, [content[0][rank]], "say"))
    operation = Operation(MailCoordinator(0, mailroom), 1, 600.0)

    def decide(calls: Gathered) -> ToAll:
        distinct = [found for found, _ in calls.distinct()]
        if calls.errors() or len({found["generation"] for found in distinct}) != 1:
            raise AssertionError("the ranks say different things")
        return ToAll({"save_id": 1 << 60, "plan": False, "values": False})

    with Timed() as deciding:
        finish(operation.agree(call, decide, "join"))
    return deciding.cpu_s


def planning_messages(url: str, states: Sequence[State], saves: int = 1) -> list[Mailroom]:
    """Run the planning of saves on all ranks, here; return each save's messages, counted.

    Args:
        url: Where to; nothing is written.
        states: What each rank saves.
        saves: How many times.
    """
    ranks = len(states)
    mailrooms = [Mailroom(ranks) for _ in range(saves)]
    teams = [Team(MailCoordinator(rank, mailrooms[0])) for rank in range(ranks)]
    options = Options(overwrite=True)
    for mailroom in mailrooms:
        protocols = []
        for rank, team in enumerate(teams):
            team.coordinator = MailCoordinator(rank, mailroom)
            mine = Mine(url)
            mine.look_at(
                url, states[rank], options, None, memory=team.memory, is_coordinator=rank == 0
            )
            operation = team.operation(600.0)
            protocols.append(agree(team, operation, mine, options))
        for known, _ in run_all(protocols):
            known.saves += 1
    return mailrooms


def commit_messages(ranks: int) -> np.ndarray:
    """Count the messages that each rank sends at a commit: outcomes up the tree, the decision down.

    Their bytes are not counted: they hold times.
    """
    mailroom = Mailroom(ranks)

    def commit(rank: int) -> Generator[None, None, None]:
        operation = Operation(MailCoordinator(rank, mailroom), 1, 600.0).in_background()
        yield from operation.gather(0, {}, "say")
        yield from operation.broadcast(1, {}, "hear")

    run_all([commit(rank) for rank in range(ranks)])
    return mailroom.sent
