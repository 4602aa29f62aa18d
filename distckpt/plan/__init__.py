"""Who writes what, and who reads what: computed from descriptions alone, in columns.

No I/O happens here, and no array is looked at.

`plan_write` takes what every rank holds and decides which rank stores which box: replicas are
removed, and what several ranks hold is shared out so that all write the same number of bytes.
`plan_read` takes what every rank wants and decides which rank reads which block of which file, so
that each byte is read once.

Shapes and boxes are padded with leading dimensions (0:1) to one width, at least 1, so that a scalar
is no special case and tensors of all dimensions share one table; leading ones change no C-order
position.
"""

from __future__ import annotations

from distckpt.plan.holdings import Holdings, Seen, describe
from distckpt.plan.parts import WritePart, part_from_bytes
from distckpt.plan.read import Fragments, Wants, plan_read
from distckpt.plan.summary import Summary, summarise
from distckpt.plan.wire import (
    fragments_from_plain,
    fragments_to_plain,
    holdings_from_plain,
    holdings_to_plain,
)
from distckpt.plan.write import DEFAULT_SHARD_BYTES, Replicas, WritePlan, plan_write

__all__ = [
    "DEFAULT_SHARD_BYTES",
    "Fragments",
    "Holdings",
    "Replicas",
    "Seen",
    "Summary",
    "Wants",
    "WritePart",
    "WritePlan",
    "describe",
    "fragments_from_plain",
    "fragments_to_plain",
    "holdings_from_plain",
    "holdings_to_plain",
    "part_from_bytes",
    "plan_read",
    "plan_write",
    "summarise",
]
