"""What many ranks have sent, or are sent, in one message: each distinct content once.

At thousands of ranks most of them say the same: that nothing has changed, or what a pipeline stage
holds. So messages are united on their way to the coordinator, and taken apart on their way back.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Ranks pass messages on in groups of so many: neighbours first, which mostly share a machine, then
# the first of each group, and so on. Up to so many ranks, all talk to the coordinator itself.
FANOUT = 16

_HEADER = struct.Struct("<QII")  # the operation's number, ranks, columns
_COUNT = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Distinct:
    """One content a rank, each distinct one once.

    Attributes:
        payloads: The distinct contents.
        of_rank: (ranks,) index of each rank's.
    """

    payloads: Sequence[bytes]
    of_rank: np.ndarray

    @classmethod
    def of(cls, payloads: Sequence[bytes]) -> Distinct:
        """Find the distinct ones among one a rank."""
        number: dict[bytes, int] = {}
        index = [number.setdefault(payload, len(number)) for payload in payloads]
        return cls(list(number), np.array(index, np.int64))

    def __getitem__(self, rank: int) -> bytes:
        return self.payloads[int(self.of_rank[rank])]

    def take(self, rows: np.ndarray) -> Distinct:
        """Select ranks, and only what they need."""
        if len(self.payloads) == 1:
            return Distinct(self.payloads, self.of_rank[rows])
        used, index = np.unique(self.of_rank[rows], return_inverse=True)
        return Distinct([self.payloads[number] for number in used.tolist()], index.reshape(-1))


@dataclass(frozen=True, slots=True)
class Bundle:
    """Several columns of contents for some ranks.

    Attributes:
        ranks: (n,) which ranks, ascending.
        columns: For each column one content a rank of these.
    """

    ranks: np.ndarray
    columns: Sequence[Distinct]

    def encode(self, number: int) -> bytes:
        """Make one message of it, which also holds the number of an operation."""
        parts = [
            _HEADER.pack(number, len(self.ranks), len(self.columns)),
            self.ranks.astype("<u4").tobytes(),
        ]
        for column in self.columns:
            lengths = np.array([len(payload) for payload in column.payloads], "<u8")
            parts += [
                _COUNT.pack(len(lengths)),
                lengths.tobytes(),
                column.of_rank.astype("<u4").tobytes(),
                *column.payloads,
            ]
        return b"".join(parts)

    @staticmethod
    def decode(message: bytes | bytearray) -> tuple[int, Bundle]:
        """Take a message apart: the number of its operation, and the bundle."""
        data = bytes(message)
        number, ranks, count = _HEADER.unpack_from(data)
        at = _HEADER.size + 4 * ranks
        of_ranks = np.frombuffer(data, "<u4", ranks, _HEADER.size).astype(np.int64)
        columns = []
        for _ in range(count):
            (distinct,) = _COUNT.unpack_from(data, at)
            at += _COUNT.size
            lengths = np.frombuffer(data, "<u8", distinct, at).tolist()
            at += 8 * distinct
            index = np.frombuffer(data, "<u4", ranks, at).astype(np.int64)
            at += 4 * ranks
            payloads = []
            for length in lengths:
                payloads.append(data[at : at + length])
                at += length
            columns.append(Distinct(payloads, index))
        return number, Bundle(of_ranks, columns)

    def take(self, rows: np.ndarray) -> Bundle:
        """Select ranks, by their rows here."""
        return Bundle(self.ranks[rows], [column.take(rows) for column in self.columns])


class Collector:
    """Unites bundles of different ranks."""

    def __init__(self, columns: int) -> None:
        self._ranks: list[np.ndarray] = []
        self._number: list[dict[bytes, int]] = [{} for _ in range(columns)]
        self._index: list[list[np.ndarray]] = [[] for _ in range(columns)]

    def add(self, bundle: Bundle) -> None:
        """Add one."""
        self._ranks.append(bundle.ranks)
        for number, index, column in zip(self._number, self._index, bundle.columns, strict=True):
            here = [number.setdefault(payload, len(number)) for payload in column.payloads]
            index.append(np.array(here, np.int64)[column.of_rank])

    def bundle(self) -> Bundle:
        """Return all that was added, in the order of the ranks; the same, whoever came first."""
        ranks = np.concatenate(self._ranks)
        order = np.argsort(ranks)
        return Bundle(
            ranks[order],
            [
                _in_order(list(number), np.concatenate(index)[order])
                for number, index in zip(self._number, self._index, strict=True)
            ],
        )

    def ranks(self) -> np.ndarray:
        """Return whose contents were added."""
        return np.concatenate(self._ranks)


def _in_order(payloads: list[bytes], of_rank: np.ndarray) -> Distinct:
    """Put distinct contents into the order of the first rank that has each."""
    if len(payloads) == 1:
        return Distinct(payloads, of_rank)
    found, first = np.unique(of_rank, return_index=True)
    found = found[np.argsort(first)]
    place = np.empty(len(payloads), np.int64)
    place[found] = np.arange(len(found))
    return Distinct([payloads[number] for number in found.tolist()], place[of_rank])


def _reach(rank: int, size: int) -> int:
    """Return how many ranks from this one on hand their messages to it, at most."""
    reach = 1
    while reach < size and rank % (FANOUT * reach) == 0:
        reach *= FANOUT
    return reach


def subtree(rank: int, size: int) -> tuple[int, int]:
    """Return the ranks ``first … last − 1`` whose messages pass through this one, itself the first.

    Examples:
        >>> subtree(0, 100), subtree(32, 100), subtree(33, 100), subtree(96, 100)
        ((0, 100), (32, 48), (33, 34), (96, 100))
    """
    return rank, min(rank + _reach(rank, size), size)


def parent(rank: int) -> int:
    """Return the rank that this one sends to; 0 is the root.

    Examples:
        >>> parent(5), parent(37), parent(32), parent(256 + 48)
        (0, 32, 0, 256)
    """
    reach = FANOUT
    while rank and rank % reach == 0:
        reach *= FANOUT
    return rank - rank % reach


def children(rank: int, size: int) -> list[int]:
    """Return the ranks whose `parent` is this one."""
    found, step, reach = [], 1, _reach(rank, size)
    while step < reach:
        found += [rank + step * k for k in range(1, FANOUT) if rank + step * k < size]
        step *= FANOUT
    return found


def is_leaf(rank: int, size: int) -> bool:
    """Whether no other rank's messages pass through this one."""
    first, last = subtree(rank, size)
    return last - first == 1
