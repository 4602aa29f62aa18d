"""What a save costs: the bytes that each rank wrote, and when each of its phases was."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from distckpt.errors import size_text

_STALLING = frozenset({"plan", "check", "stage"})


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of time on one rank.

    Attributes:
        name: ``"plan"`` (agree and plan, over all ranks), ``"check"`` (take checksums of what other
            ranks hold, too), ``"stage"`` (copy the arrays), ``"copy"`` (copy those that
            may change later, in the background), ``"write"``, ``"sync"`` (make a file
            durable, and name it) or ``"commit"`` (wait for the slowest rank; at the coordinator,
            write the manifest, too). Where a rank writes several files, it has several of a name.
        start_s: Its begin, in seconds since 1970.
        stop_s: Its end.
    """

    name: str
    start_s: float
    stop_s: float

    @property
    def seconds(self) -> float:
        """How long it was."""
        return self.stop_s - self.start_s


@dataclass(frozen=True, slots=True)
class RankStats:
    """One rank's part of a save.

    Attributes:
        nbytes: Bytes that it wrote.
        phases: What it did when, in this order.
    """

    nbytes: int
    phases: Sequence[Phase]

    @property
    def stall_s(self) -> float:
        """Seconds for which the training loop was held up: until the arrays might change again."""
        return sum(phase.seconds for phase in self.phases if phase.name in _STALLING)

    @property
    def written_s(self) -> float:
        """When its last byte was durable, in seconds since 1970; 0.0 if it wrote none."""
        stops = [phase.stop_s for phase in self.phases if phase.name in {"write", "sync"}]
        return max(stops, default=0.0)


@dataclass(frozen=True, slots=True)
class SaveStats:
    """What a save cost.

    Attributes:
        ranks: Rank → its part. All ranks' at the coordinator, once the save is committed; before,
            and on the others, this rank's.

    Examples:
        >>> phases = [Phase("plan", 1.0, 1.5), Phase("write", 2.0, 4.0)]
        >>> print(SaveStats({0: RankStats(8_000, phases)}))
        8.0 kB in 3.00 s (0.0 GB/s), stall 0.500 s
    """

    ranks: Mapping[int, RankStats]

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return sum(rank.nbytes for rank in self.ranks.values())

    @property
    def seconds(self) -> float:
        """From the first rank's begin to the last one's end."""
        phases = [phase for rank in self.ranks.values() for phase in rank.phases]
        if not phases:
            return 0.0
        return max(phase.stop_s for phase in phases) - min(phase.start_s for phase in phases)

    @property
    def gb_per_s(self) -> float:
        """Written, in 10⁹ bytes a second, by all ranks together."""
        return self.nbytes / 1e9 / self.seconds if self.seconds > 0 else 0.0

    @property
    def stall_s(self) -> float:
        """Seconds for which the slowest rank's training loop was held up."""
        return max((rank.stall_s for rank in self.ranks.values()), default=0.0)

    @property
    def slowest_rank(self) -> int:
        """The rank whose last byte was durable last."""
        return max(self.ranks, key=lambda rank: self.ranks[rank].written_s, default=0)

    def __str__(self) -> str:
        slowest = f", rank {self.slowest_rank} was the last" if len(self.ranks) > 1 else ""
        return (
            f"{size_text(self.nbytes)} in {self.seconds:.2f} s ({self.gb_per_s:.1f} GB/s), "
            f"stall {self.stall_s:.3f} s{slowest}"
        )


@dataclass(slots=True)
class Recorder:
    """Takes one rank's stats while it saves; another thread may look on.

    Attributes:
        nbytes: Bytes written so far.
        phases: Those that have ended.
    """

    nbytes: int = 0
    phases: list[Phase] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Take the time of what is done inside; its length is right though the clock be set."""
        start_s, since = time.time(), time.monotonic()
        try:
            yield
        finally:
            self.phases.append(Phase(name, start_s, start_s + time.monotonic() - since))

    def stats(self) -> RankStats:
        """What was taken so far."""
        return RankStats(self.nbytes, tuple(self.phases))


def to_plain(stats: RankStats) -> tuple[int, str, bytes]:
    """Take a rank's stats apart, to be sent to the coordinator: few values, each takes time."""
    times = [time_s for phase in stats.phases for time_s in (phase.start_s, phase.stop_s)]
    names = ",".join(phase.name for phase in stats.phases)
    return stats.nbytes, names, struct.pack(f"<{len(times)}d", *times)


def from_plain(plain: tuple[int, str, bytes]) -> RankStats:
    """Make what `to_plain` took apart."""
    nbytes, names, times = plain
    pairs = struct.iter_unpack("<2d", times)
    found = zip(names.split(","), pairs, strict=True) if names else ()
    return RankStats(nbytes, tuple(Phase(name, *pair) for name, pair in found))
