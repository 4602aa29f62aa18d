"""What lies beside a checkpoint while it is read or deleted: holds and marks of deletion.

A hold, ``hold-<save id>-<random>.json``, says that somebody reads; it counts for its lease since it
was last written, by the store's clock. A mark, ``deletion-<save id>-<random>.binpb``, says that
somebody deletes; it has the manifest's bytes, so that anybody can finish that. How both sides use
them is in docs/adr/0007-write-then-look.md.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import time
from collections.abc import Iterable
from typing import Literal

from distckpt import codec
from distckpt.manifest import MANIFEST_NAME
from distckpt.store import Store, partial_of, read_object

Kind = Literal["hold", "deletion"]

LEASE_S = 600.0
# How long readers respect a mark: that of a process that died must not be in the way for ever.
MARK_S = 600.0

_ENDINGS = {"hold": "json", "deletion": "binpb"}
_NAME = re.compile(r"(hold|deletion)-([0-9a-f]{16})-[0-9a-f]{16}\.(?:json|binpb)")
_LARGEST_HOLD_BYTES = 1 << 16


def new_name(kind: Kind, save_id: int) -> str:
    """Make the name of a new hold or mark."""
    return f"{kind}-{save_id:016x}-{secrets.token_hex(8)}.{_ENDINGS[kind]}"


def name_parts(name: str) -> tuple[str, int] | None:
    """Take the name of a hold or a mark apart, also a temporary one.

    Returns:
        ``"hold"`` or ``"deletion"``, and the save id; None for another object.

    Examples:
        >>> name_parts("hold-0000000000000007-3f9c2a71d04be816.json")
        ('hold', 7)
        >>> name_parts("manifest.binpb")
    """
    match = _NAME.fullmatch(partial_of(name) or name)
    return (match[1], int(match[2], 16)) if match else None


def names_of(store: Store, kind: Kind, save_id: int) -> list[str]:
    """List a checkpoint's holds or marks, without those that are just being written.

    Raises:
        StoreError: The store failed.
    """
    return [
        name
        for name in store.names()
        if name_parts(name) == (kind, save_id) and partial_of(name) is None
    ]


def committed_id(store: Store) -> int | None:
    """Return the save id of the manifest in a folder; None where there is none.

    Raises:
        CheckpointError: It can't be read.
    """
    try:
        data = read_object(store, MANIFEST_NAME)
    except FileNotFoundError:
        return None
    return codec.decode(data, path=f"{store.url}/{MANIFEST_NAME}").save_id


def modified_s(store: Store, name: str) -> float | None:
    """Return when an object was written; minus infinity if it is not there.

    Raises:
        StoreError: The store failed.
    """
    try:
        return store.modified(name)
    except FileNotFoundError:
        return -math.inf


def is_held(store: Store, save_id: int, *, now_s: float) -> bool:
    """Whether somebody holds a checkpoint.

    Args:
        store: Its folder.
        save_id: Its save's.
        now_s: The time, in seconds since 1970, by another clock than the store's: what seems to be
            written later, by more than its lease, is not believed.

    Raises:
        StoreError: The store failed.
    """
    return any(
        abs(age_s) <= lease_s
        for age_s, lease_s in _ages(store, names_of(store, "hold", save_id), now_s)
    )


def is_held_at(store: Store, save_id: int, mark: str) -> bool:
    """Whether somebody holds a checkpoint, as of when a mark was just written.

    By the store's clock alone. A mark that somebody else has taken away tells no time: then all
    holds count.

    Raises:
        StoreError: The store failed.
    """
    holds = names_of(store, "hold", save_id)
    if not holds:
        return False
    return any(age_s <= lease_s for age_s, lease_s in _ages(store, holds, modified_s(store, mark)))


def is_old(store: Store, name: str, *, now_s: float) -> bool:
    """Whether nobody respects a hold or a mark any more; see `is_held` for the clock."""
    [(age_s, lease_s)] = _ages(store, [name], now_s)
    return abs(age_s) > max(MARK_S, lease_s)


def _ages(store: Store, names: Iterable[str], now_s: float | None) -> list[tuple[float, float]]:
    """Return the age and the lease of each, in seconds; where no store tells, as they say."""
    ages = []
    for name in names:
        time_s, by_s = modified_s(store, name), now_s
        lease_s = _number(store, name, "lease_s", LEASE_S)
        if time_s is None or by_s is None:
            time_s, by_s = _number(store, name, "written_ns", -math.inf) / 1e9, time.time()
        ages.append((by_s - time_s, lease_s))
    return ages


def _number(store: Store, name: str, key: str, default: float) -> float:
    """Read a number from a hold; what can't be understood is as if it said the default."""
    if not name.startswith("hold"):
        return default
    try:
        found = float(json.loads(read_object(store, name, limit_bytes=_LARGEST_HOLD_BYTES))[key])
    except (FileNotFoundError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return default
    return found if 0 <= found < math.inf else default
