"""Plain values and metadata as JSON text, for formats that have room for a text but not for those.

Everything comes back as it was. What JSON has no form for is an object of one key: ``{"$bytes":
base64}``, ``{"$int": hexadecimal}`` (of more than 64 bits), ``{"$float": "nan"}``, ``{"$tuple":
[…]}``, and ``{"$dict": [[key, value], …]}`` where a key is no text, or begins with ``$``.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping

from distckpt.codec import checked_dict
from distckpt.errors import CorruptCheckpoint, UnsupportedFormat

_INT_BITS = 64
_MAX_DEPTH = 50


def to_text(values: Mapping[str, object], metadata: Mapping[str, object]) -> str | None:
    """Encode a checkpoint's values and metadata; None where there are neither.

    Raises:
        UnsupportedFormat: Something that is no plain value.
    """
    parts = {"values": dict(values), "metadata": dict(metadata)}
    kept = {key: _encode(part, key) for key, part in parts.items() if part}
    return json.dumps(kept, separators=(",", ":"), allow_nan=False) if kept else None


def from_text(text: str, where: str) -> tuple[dict[str, object], dict[str, object]]:
    """Decode the values and the metadata.

    Args:
        text: What `to_text` made.
        where: What it was found in, for messages.

    Raises:
        CorruptCheckpoint: It is something else.
    """
    try:
        parts = _decode(json.loads(text))
    except (ValueError, TypeError, RecursionError) as exc:
        raise _corrupt(where, str(exc)) from exc
    if not isinstance(parts, dict) or not parts.keys() <= {"values", "metadata"}:
        raise _corrupt(where, "no object of values and metadata")
    values, metadata = parts.get("values", {}), parts.get("metadata", {})
    if not isinstance(values, dict) or not isinstance(metadata, dict):
        raise _corrupt(where, "values or metadata are no object")
    if any(isinstance(value, list | tuple | dict) for value in values.values()):
        raise _corrupt(where, "a value is nested")
    if not all(isinstance(key, str) for key in [*values, *metadata]):
        raise _corrupt(where, "a key is no text")
    return values, metadata


def _corrupt(where: str, found: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"{where}: expected distckpt's values and metadata as JSON, found {found[:200]}"
    )


def _encode(value: object, where: str, depth: int = 0) -> object:
    if depth > _MAX_DEPTH:
        raise UnsupportedFormat(f"{where}: nested deeper than {_MAX_DEPTH}")
    match value:
        case None | bool() | str():
            return value
        case int():
            small = value.bit_length() < _INT_BITS
            return int(value) if small else {"$int": hex(value)}
        case float():
            return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
        case bytes():
            return {"$bytes": base64.b64encode(value).decode()}
        case list():
            return [_encode(item, where, depth + 1) for item in value]
        case tuple():
            return {"$tuple": [_encode(item, where, depth + 1) for item in value]}
        case dict() if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _encode(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
        case dict():
            pairs = [[key, item] for key, item in value.items()]
            return {"$dict": [_encode(pair, where, depth + 1) for pair in pairs]}
        case _:
            raise UnsupportedFormat(f"{where}: {type(value).__name__} is no plain value")


def _decode(value: object) -> object:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    match next(iter(value.items()), ("", None)):
        case "$bytes", str(text):
            return base64.b64decode(text, validate=True)
        case "$int", str(text):
            return int(text, 16)
        case "$float", str(text):
            return float(text)
        case "$tuple", list(items):
            return tuple(map(_decode, items))
        case "$dict", list(pairs):
            keys, items = [], []
            for key, item in pairs:
                keys.append(_decode(key))
                items.append(_decode(item))
            return checked_dict(keys, items)
    return {key: _decode(item) for key, item in value.items()}
