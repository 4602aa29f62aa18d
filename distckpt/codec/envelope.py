"""The wrapping of a manifest, which shows any flipped bit and any truncation."""

from __future__ import annotations

import hashlib
import struct

from distckpt.errors import CorruptCheckpoint, UnsupportedFormat

MAGIC = b"DISTCKPT"
MAJOR, MINOR = 1, 0
_HEAD = struct.Struct("<8sHHIQ")
_DIGEST_BYTES = hashlib.sha256().digest_size


def wrap(payload: bytes, *, major: int = MAJOR, minor: int = MINOR) -> bytes:
    """Put a payload into the envelope: magic, version, length, payload, SHA-256 of all that."""
    head = _HEAD.pack(MAGIC, major, minor, 0, len(payload))
    return head + payload + hashlib.sha256(head + payload).digest()


def unwrap(data: bytes, *, path: str = "") -> bytes:
    """Take the payload out of the envelope.

    Raises:
        UnsupportedFormat: Not our magic, or a newer major version.
        CorruptCheckpoint: Any bit differs, or the file is cut short or too long.
    """
    if data[: len(MAGIC)] != MAGIC:
        raise UnsupportedFormat(
            f"{path}: not a distckpt manifest, or its first bytes are damaged: expected "
            f"{MAGIC!r}, found {bytes(data[: len(MAGIC)])!r}"
        )
    if len(data) < _HEAD.size + _DIGEST_BYTES:
        raise CorruptCheckpoint(
            f"{path}: the manifest is cut short: {len(data)} bytes",
            path=path,
            offset_bytes=len(data),
        )
    _, major, minor, _, length = _HEAD.unpack_from(data)
    if hashlib.sha256(data[:-_DIGEST_BYTES]).digest() != data[-_DIGEST_BYTES:]:
        expected = _HEAD.size + length + _DIGEST_BYTES
        if len(data) != expected:
            what = f"its header says {expected} bytes, the file has {len(data)}"
        else:
            what = "its SHA-256 differs"
        raise CorruptCheckpoint(
            f"{path}: the manifest is damaged: {what}", path=path, offset_bytes=0
        )
    if major > MAJOR:
        raise UnsupportedFormat(
            f"{path}: written in format {major}.{minor}; this version of distckpt reads up to "
            f"{MAJOR}.x. Install a newer distckpt"
        )
    if major < 1 or length != len(data) - _HEAD.size - _DIGEST_BYTES:
        raise CorruptCheckpoint(
            f"{path}: format {major}.{minor} with a payload of {length} bytes in a file of "
            f"{len(data)}",
            path=path,
        )
    return bytes(data[_HEAD.size : -_DIGEST_BYTES])
