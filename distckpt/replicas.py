"""Whether what several ranks claim to hold alike is alike: compared by checksum at each save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from distckpt import dtypes
from distckpt.errors import ranks_text
from distckpt.plan import WritePart, WritePlan
from distckpt.shardfile import checksum_run
from distckpt.state import Array

# All of it is compared when a plan is first used, then a sixteenth at each save, in turn.
_ROTATION = 16
_MOST_LISTED = 20


def _none() -> np.ndarray:
    return np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class Checksums:
    """Checksums of what one rank holds and others, too.

    Attributes:
        check: (n,) number of the comparison; see `WritePart`.
        sum: (n,) CRC32C of what this rank holds.
    """

    check: np.ndarray = field(default_factory=_none)
    sum: np.ndarray = field(default_factory=_none)


def take_checksums(
    arrays: Sequence[Array], dtype: np.ndarray, part: WritePart, *, saves: int
) -> Checksums:
    """Take the checksums that are due.

    Args:
        arrays: This rank's tensors; the part's items are indices into them.
        dtype: (tensors,) the codes of their dtypes.
        part: This rank's part of the plan.
        saves: How many saves the plan was used for before; the same on all ranks.
    """
    rows = np.arange(len(part.check))
    if saves:
        rows = rows[part.check % _ROTATION == saves % _ROTATION]
    sums = [
        checksum_run(
            arrays[part.check_item[row]],
            dtypes.BY_CODE[int(dtype[part.check_item[row]])],
            int(part.check_source[row]),
            int(part.check_size[row]),
        )
        for row in rows.tolist()
    ]
    return Checksums(part.check[rows], np.array(sums, np.int64))


def name_differing(found: Sequence[Checksums], plan: WritePlan) -> str | None:
    """Compare all ranks' checksums.

    Args:
        found: By rank.
        plan: The plan that they were taken by.

    Returns:
        None if all agree, else which tensors differ on which ranks, and the ways out.
    """
    check = np.concatenate([one.check for one in found])
    value = np.concatenate([one.sum for one in found])
    rank = np.repeat(np.arange(len(found)), [len(one.check) for one in found])
    order = np.lexsort((rank, check))
    check, value, rank = check[order], value[order], rank[order]
    if not len(check):
        return None
    first = np.searchsorted(check, check)
    differs = value != value[first]
    if not differs.any():
        return None
    ranks: dict[str, set[int]] = {}
    for row in np.flatnonzero(differs).tolist():
        name = plan.tensor_of_check(int(check[row]))
        ranks.setdefault(name, set()).add(int(rank[row]))
    lines = [
        f"{name!r} on {ranks_text(sorted(found))} differs from the lowest rank's"
        for name, found in ranks.items()
    ]
    return (
        f"{len(lines)} tensors that claim to be the same on several ranks are not:\n  "
        + "\n  ".join(lines[:_MOST_LISTED])
        + ("\n  …" if len(lines) > _MOST_LISTED else "")
        + '\nSynchronise them before saving; or pass replicas={"<name or glob>": "rank0"} to store '
        'the lowest rank\'s, "trust" not to compare; or wrap what differs on purpose in PerRank.'
    )
