"""Manifests and plain values to bytes and back: protobuf's only door."""

from __future__ import annotations

from distckpt.codec.envelope import unwrap, wrap
from distckpt.codec.manifest import EncodedStructure, decode, encode, encode_structure
from distckpt.codec.plain import checked_dict, decode_value, encode_value, pack, unpack

__all__ = [
    "EncodedStructure",
    "checked_dict",
    "decode",
    "decode_value",
    "encode",
    "encode_structure",
    "encode_value",
    "pack",
    "unpack",
    "unwrap",
    "wrap",
]
