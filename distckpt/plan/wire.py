"""The columns of plans, taken apart into plain values, to be sent from rank to rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from distckpt.plan.holdings import Holdings
from distckpt.plan.read import Fragments
from distckpt.plan.write import WritePart


def _narrow(column: np.ndarray) -> np.ndarray:
    """Use the smallest unsigned type that holds a column: most numbers are small."""
    return column.astype(np.min_scalar_type(int(column.max()) if column.size else 0))


def holdings_to_plain(held: Holdings) -> dict[str, object]:
    """Take apart what a rank holds or wants."""
    return {
        "names": "\0".join(held.names),
        "count": len(held.names),
        "dtype": held.dtype,
        "ndim": held.ndim,
        "kind": held.kind,
        "shape": _narrow(held.shape),
        "start": _narrow(held.start),
        "stop": _narrow(held.stop),
        "per_rank": list(held.per_rank),
    }


def holdings_from_plain(plain: Mapping[str, Any]) -> Holdings:
    """Put together what `holdings_to_plain` took apart."""
    return Holdings(
        tuple(plain["names"].split("\0")) if plain["count"] else (),
        plain["dtype"],
        plain["ndim"],
        plain["kind"],
        plain["shape"].astype(np.int64),
        plain["start"].astype(np.int64),
        plain["stop"].astype(np.int64),
        tuple(plain["per_rank"]),
    )


def part_to_plain(part: WritePart) -> dict[str, object]:
    """Take apart what one rank writes."""
    columns = {name: _narrow(getattr(part, name)) for name in _PART_COLUMNS}
    return columns | {"blob_file": part.blob_file}


def part_from_plain(plain: Mapping[str, Any]) -> WritePart:
    """Put together what `part_to_plain` took apart."""
    columns = {name: plain[name].astype(np.int64) for name in _PART_COLUMNS}
    return WritePart(**columns, blob_file=plain["blob_file"])


_PART_COLUMNS = tuple(name for name in WritePart.__dataclass_fields__ if name != "blob_file")


def fragments_to_plain(fragments: Fragments) -> dict[str, object]:
    """Take apart what one rank reads, sends and receives."""
    return {name: _narrow(getattr(fragments, name)) for name in Fragments.__dataclass_fields__}


def fragments_from_plain(plain: Mapping[str, Any]) -> Fragments:
    """Put together what `fragments_to_plain` took apart."""
    return Fragments(
        **{name: plain[name].astype(np.int64) for name in Fragments.__dataclass_fields__}
    )
