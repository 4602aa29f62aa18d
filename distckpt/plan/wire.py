"""The columns of plans, taken apart into plain values, to be sent from rank to rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from distckpt.plan.columns import narrow
from distckpt.plan.holdings import Holdings
from distckpt.plan.read import Fragments


def holdings_to_plain(held: Holdings) -> dict[str, object]:
    """Take apart what a rank holds or wants."""
    columns = {name: narrow(getattr(held, name)) for name in _TABLES}
    return columns | {
        "names": "\0".join(held.names),
        "count": len(held.names),
        "per_rank": list(held.per_rank),
    }


def holdings_from_plain(plain: Mapping[str, Any], names: tuple[str, ...] | None = None) -> Holdings:
    """Put together what `holdings_to_plain` took apart; its *names* may be known."""
    if names is None:
        names = tuple(plain["names"].split("\0")) if plain["count"] else ()
    return Holdings(
        names,
        **{name: plain[name].astype(np.int64) for name in _TABLES},
        per_rank=tuple(plain["per_rank"]),
    )


_TABLES = ("dtype", "ndim", "kind", "shape", "start", "stop", "first", "last")


def fragments_to_plain(fragments: Fragments) -> dict[str, object]:
    """Take apart what one rank reads, sends and receives."""
    return {name: narrow(getattr(fragments, name)) for name in Fragments.__dataclass_fields__}


def fragments_from_plain(plain: Mapping[str, Any]) -> Fragments:
    """Put together what `fragments_to_plain` took apart."""
    return Fragments(
        **{name: plain[name].astype(np.int64) for name in Fragments.__dataclass_fields__}
    )
