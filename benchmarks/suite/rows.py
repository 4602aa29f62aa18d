"""The rows of the table: what is measured, what it is divided by, and its limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from benchmarks.suite.turns import Spread


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that is measured.

    Attributes:
        title: What, in the table's words.
        against: What it is divided by; empty for a plain number.
        limit: Place → the limit of its median, or the same everywhere; none if there is none.
        unit: Of the number.
        sense: Whether the limit is the most or the least.
        limit_at: The limit holds for this state and these numbers of ranks; elsewhere the row is
            for information.
        section: Where in the table.
    """

    title: str
    against: str = ""
    limit: float | Mapping[str, float] | None = None
    unit: Literal["×", "MiB", "ms", "blocks"] = "×"
    sense: Literal["at most", "at least"] = "at most"
    limit_at: tuple[str, Sequence[int]] = ("transformer", (2,))
    section: str = ""

    def limit_for(self, place: str, state: str, ranks: int) -> float | None:
        """Return the limit of one measurement."""
        wanted, numbers = self.limit_at
        if not state.startswith(wanted) or ranks not in numbers:
            return None
        return self.limit.get(place) if isinstance(self.limit, Mapping) else self.limit


_WRITE = "write + fsync of the same bytes"
_COPY = "memcpy of the state's arrays into warm memory"
_READ = "preadv of the same bytes into the same arrays"
_PEER = "distckpt in the same run"
_ANY = ("", (1, 2, 4))
_BOUNDS = "Without distckpt, for comparison"

ROWS: dict[str, Row] = {
    # Saving.
    "save": Row("durable save", _WRITE, {"disk": 0.95, "tmpfs": 1.10}, section="Saving"),
    "save-best": Row(
        "durable save", "the faster of buffered and O_DIRECT write + fsync", section="Saving"
    ),
    "stall": Row("async save: steady stall", _COPY, 1.10, section="Saving"),
    "stall-one": Row(
        "async save: steady stall",
        "memcpy of as many bytes out of one array in huge pages",
        section="Saving",
    ),
    "stall-first": Row(
        "async save: first stall, the Manager made a second before",
        "its steady stall",
        1.2,
        section="Saving",
    ),
    "committed": Row("async save: until committed", _WRITE, section="Saving"),
    "lazy-stall": Row("lazy save: stall", _COPY, 0.05, section="Saving"),
    "lazy-fence": Row("lazy save: stall and fence, waited for at once", _COPY, section="Saving"),
    "lazy-slowdown": Row(
        "lazy save: a numpy loop is slowed while it copies", _COPY, 1.2, section="Saving"
    ),
    "slowdown": Row("training slowdown a checkpoint, all included", _COPY, 2.0, section="Saving"),
    "slowdown-cpu": Row(
        "training slowdown a checkpoint, all included",
        "processor time of memcpy, write and fsync",
        section="Saving",
    ),
    # Loading.
    "load": Row("load, warm", _READ, 1.20, section="Loading"),
    "load-unverified": Row("load, warm, verify=False", _READ, 1.05, section="Loading"),
    "load-strided": Row("load, warm, into strided arrays", _READ, 1.25, section="Loading"),
    "load-turned": Row("load, warm, rows ↔ columns", _READ, section="Loading"),
    "load-cold": Row("load, cold", "preadv of the same bytes, cold", section="Loading"),
    "reshard": Row(
        "load by 3 ranks of what 4 saved",
        "load by 4 ranks",
        1.3,
        limit_at=("transformer", (4,)),
        section="Loading",
    ),
    "single": Row("load by one process of what 4 ranks saved", _READ, section="Loading"),
    "partial": Row("load of 1 % of the tensors", "load of all", section="Loading"),
    "read-amplification": Row(
        "bytes read by all ranks", "bytes wanted", 1.02, limit_at=_ANY, section="Loading"
    ),
    "partial-blocks": Row(
        "read too much by a load of 1 % of the tensors, a tensor",
        limit=2.0,
        unit="blocks",
        limit_at=_ANY,
        section="Loading",
    ),
    # Many small tensors.
    "small-save": Row(
        "10,000 × 4 KB: durable save, plan cached",
        "the same bytes in 8 tensors",
        1.8,
        limit_at=_ANY,
        section="Many small tensors",
    ),
    "small-first": Row(
        "10,000 × 4 KB: first save",
        "the same bytes in 8 tensors",
        3.5,
        limit_at=_ANY,
        section="Many small tensors",
    ),
    "small-load": Row(
        "10,000 × 4 KB: load",
        "the same bytes in 8 tensors",
        1.8,
        limit_at=_ANY,
        section="Many small tensors",
    ),
    # Beside training.
    "spinner-save": Row(
        "background write beside a spinning Python thread",
        "the same without",
        1.3,
        limit_at=_ANY,
        section="Beside training",
    ),
    "spinner-speed": Row(
        "speed of that thread",
        "its speed alone",
        0.95,
        sense="at least",
        limit_at=_ANY,
        section="Beside training",
    ),
    "commit-latency": Row(
        "committed after the slowest rank was done",
        limit=10.0,
        unit="ms",
        limit_at=_ANY,
        section="Beside training",
    ),
    "commit-cpu": Row(
        "processor time of the commit, busiest rank",
        limit=0.5,
        unit="ms",
        limit_at=_ANY,
        section="Beside training",
    ),
    # Memory.
    "memory-save": Row(
        "peak memory of a blocking save", limit=64, unit="MiB", limit_at=_ANY, section="Memory"
    ),
    "memory-async": Row(
        "peak memory of an async save, beyond the bytes it writes",
        limit=64,
        unit="MiB",
        limit_at=_ANY,
        section="Memory",
    ),
    "memory-bounded": Row(
        "peak memory of an async save beyond staging_bytes, a quarter of the bytes it writes",
        limit=64,
        unit="MiB",
        limit_at=_ANY,
        section="Memory",
    ),
    "memory-load": Row(
        "peak memory of a load, beyond the destination",
        limit=128,
        unit="MiB",
        limit_at=_ANY,
        section="Memory",
    ),
    # Without distckpt: what no save and no load can be below.
    "bound-write": Row("write + fsync from the state's arrays", _WRITE, section=_BOUNDS),
    "bound-write-checked": Row(
        "write + fsync from the state's arrays, CRC32C taken", _WRITE, section=_BOUNDS
    ),
    "bound-processor": Row("processor time of memcpy, write and fsync", _COPY, section=_BOUNDS),
    "bound-read-checked": Row("preadv, CRC32C taken", _READ, section=_BOUNDS),
    "bound-strided": Row(
        "preadv into 1 MiB, CRC32C taken, copied to strided arrays", _READ, section=_BOUNDS
    ),
    "bound-three": Row(
        "preadv by 3 ranks", "preadv by 4 ranks", limit_at=("transformer", (4,)), section=_BOUNDS
    ),
    # Against peers: their time ÷ ours.
    "peer-save": Row("durable save", _PEER, sense="at least", section="Peers"),
    "peer-stall": Row("async save: steady stall", _PEER, sense="at least", section="Peers"),
    "peer-committed": Row("async save: until committed", _PEER, sense="at least", section="Peers"),
    "peer-load": Row("load, warm", _PEER, sense="at least", section="Peers"),
    "peer-slowdown": Row(
        "training slowdown a checkpoint", _PEER, sense="at least", section="Peers"
    ),
}
# Module in `peers` → the library's name.
PEERS = {
    "dcp": "PyTorch DCP",
    "torchsnapshot": "torchsnapshot",
    "orbax": "Orbax",
    "safetensors": "safetensors",
    "numpy_savez": "numpy.savez",
    "mindspore": "MindSpore",
}
# DCP at its best must take so many times as long as distckpt; every other peer must be behind.
PEER_LIMITS: dict[str, dict[str, float | dict[str, float]]] = {
    "dcp": {
        "peer-save": {"disk": 1.7, "tmpfs": 2.0},
        "peer-load": 3.0,
        "peer-stall": 1.0,
        "peer-slowdown": 5.0,
    }
}
PEER_LIMIT = 1.0


@dataclass(slots=True)
class Measured:
    """What came out for one row: numbers, or the reason why there are none.

    Attributes:
        row: Key in `ROWS`.
        state: What was saved.
        place: Where: ``"disk"`` or ``"tmpfs"``.
        ranks: By how many.
        values: One number a pair: ratios, or plain numbers.
        mpi: Which MPI, where it matters.
        peer: Whose time was divided by ours, a key of `PEERS`; empty for our own rows.
        setting: With which of its settings.
        is_best: Whether that is the peer's fastest setting here.
        seconds: What was measured → its median, in seconds.
        nbytes: Over all ranks.
        note: What else is to be known.
        missing: Why there are no numbers.
    """

    row: str
    state: str
    place: str
    ranks: int
    values: list[float] = field(default_factory=list)
    mpi: str = ""
    peer: str = ""
    setting: str = ""
    is_best: bool = True
    seconds: dict[str, float] = field(default_factory=dict)
    nbytes: int = 0
    note: str = ""
    missing: str = ""

    @property
    def spread(self) -> Spread | None:
        """Median and quartiles; None if there are no numbers."""
        return Spread.of(self.values) if self.values else None

    @property
    def limit(self) -> float | None:
        """The limit of the median; None if there is none here."""
        row = ROWS[self.row]
        if not self.peer:
            return row.limit_for(self.place, self.state, self.ranks)
        if not self.is_best or not self.state.startswith("transformer"):
            return None
        limit = PEER_LIMITS.get(self.peer, {}).get(self.row, PEER_LIMIT)
        return limit[self.place] if isinstance(limit, dict) else limit

    @property
    def is_met(self) -> bool | None:
        """Whether the median keeps the limit; None if there is no number, or no limit."""
        if self.spread is None or self.limit is None:
            return None
        median = self.spread.median
        at_most = ROWS[self.row].sense == "at most"
        return median <= self.limit if at_most else median >= self.limit

    def to_json(self) -> dict[str, Any]:
        """Make plain values, with what is computed."""
        spread = self.spread
        return {
            **asdict(self),
            "median": spread and spread.median,
            "quartiles": spread and [spread.low, spread.high],
            "limit": self.limit,
            "is_met": self.is_met,
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Measured:
        """Make what `to_json` took apart."""
        names = cls.__dataclass_fields__
        return cls(**{name: value for name, value in plain.items() if name in names})
