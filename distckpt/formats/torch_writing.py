"""Archives of torch.save, as they are written: front to back, without torch, in bounded memory."""

from __future__ import annotations

import math
import pickle
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distckpt import dtypes
from distckpt.formats.base import Readable, Wanted, refuse
from distckpt.formats.torch_pickle import STORAGES, Storage, Stored
from distckpt.formats.torch_zip import LOCAL_BYTES
from distckpt.region import Region
from distckpt.store import Sink

_ALIGNMENT = 64  # of a storage in the file, as torch's own
_BLOCK_BYTES = 64 << 20
_ROOT = "archive"  # the folder in an archive
_STORAGE_OF = {dtype: name for name, dtype in STORAGES.items() if dtype}
# Dtypes that torch has, of those that a checkpoint can hold.
_WRITABLE = {*_STORAGE_OF, "uint16", "uint32", "uint64", "float8_e4m3fn"} | {
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
}


# -------------------------------------------------------------------------------------- pickles


def dump(entries: Mapping[str, object]) -> bytes:
    """Make the pickle of a flat dict, as torch.save makes it.

    Args:
        entries: Name → plain value or `Stored`.

    Raises:
        OverflowError: An integer of more than 255 bytes.
    """
    return (
        b"\x80\x02}("
        + b"".join(dumped(name) + dumped(value) for name, value in entries.items())
        + b"u."
    )


def dump_one(value: object) -> bytes:
    """Make the pickle of one plain value or `Stored`."""
    return b"\x80\x02" + dumped(value) + b"."


def dumped(value: object) -> bytes:
    """Make the opcodes that push a value."""
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        if -(1 << 31) <= value < 1 << 31:
            return b"J" + struct.pack("<i", value)
        data = pickle.encode_long(int(value))
        if len(data) > 255:  # noqa: PLR2004
            raise OverflowError(f"an integer of {len(data)} bytes; torch reads at most 255")
        return b"\x8a" + bytes([len(data)]) + data
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        data = value.encode("utf-8")
        return b"X" + struct.pack("<I", len(data)) + data
    if isinstance(value, bytes):
        return b"c_codecs\nencode\n(" + dumped(value.decode("latin1")) + dumped("latin1") + b"tR"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(dumped, value)) + b"t"
    if isinstance(value, Stored):
        return _dumped_tensor(value)
    raise TypeError(f"a {type(value).__name__} has no place in a file of weights")


def _dumped_tensor(tensor: Stored) -> bytes:
    name = tensor.dtype.name
    storage = _STORAGE_OF.get(name)
    count = tensor.storage.count if storage else tensor.storage.count * tensor.dtype.itemsize
    kind = f"ctorch\n{storage}\n" if storage else "ctorch.storage\nUntypedStorage\n"
    parts = [
        b"ctorch._utils\n" + (b"_rebuild_tensor_v2\n" if storage else b"_rebuild_tensor_v3\n"),
        b"((" + dumped("storage") + kind.encode() + dumped(tensor.storage.key) + dumped("cpu"),
        dumped(count) + b"tQ",
        dumped(tensor.offset) + dumped(tensor.shape) + dumped(tensor.stride) + b"\x89",
        b"ccollections\nOrderedDict\n)R",
        b"" if storage else f"ctorch\n{name}\n".encode(),
        b"tR",
    ]
    return b"".join(parts)


# ------------------------------------------------------------------------------------- archives


@dataclass(frozen=True, slots=True)
class Record:
    """An entry to write.

    Attributes:
        name: Its name below the archive's root.
        length: Its bytes.
        blocks: Makes them, in blocks.
    """

    name: str
    length: int
    blocks: Callable[[], Iterator[memoryview | bytes]]

    @classmethod
    def of(cls, name: str, data: bytes) -> Record:
        """Make the entry of bytes that are there already."""
        return cls(name, len(data), lambda: iter((data,)))


def archive_records(pickle: bytes, storages: Sequence[Record]) -> list[Record]:
    """List the entries of an archive in torch's order."""
    return [
        Record.of("data.pkl", pickle),
        Record.of("byteorder", b"little"),
        *storages,
        Record.of("version", b"3\n"),
    ]


def archive_bytes(records: Sequence[Record]) -> int:
    """Length of the archive, before any of it is written."""
    at = 0
    for record in records:
        at += len(_local(record, at)) + record.length + len(_descriptor(0, record.length))
    sizes = [len(_central(record, 0, 0)) for record in records]
    return at + sum(sizes) + len(_end(0, 0, 0))


def write_archive(write: Callable[[memoryview | bytes], Any], records: Sequence[Record]) -> int:
    """Write an archive from front to back.

    Each storage's checksum is known only when it is written, so it follows the storage, as zip
    files allow it.

    Args:
        write: Takes what comes next.
        records: The entries, from `archive_records`.

    Returns:
        Its length.

    Raises:
        ValueError: A record made more or fewer bytes than it said.
    """
    at, directory = 0, b""
    for record in records:
        header = _local(record, at)
        write(header)
        crc, length = 0, 0
        for block in record.blocks():
            crc = zlib.crc32(block, crc)
            length += memoryview(block).nbytes
            write(block)
        if length != record.length:
            raise ValueError(f"{record.name}: {length} bytes came, {record.length} were expected")
        write(_descriptor(crc, length))
        directory += _central(record, crc, at)
        at += len(header) + length + len(_descriptor(crc, length))
    end = _end(len(records), at, len(directory))
    write(directory + end)
    return at + len(directory) + len(end)


# Sizes and offsets always in 64 bits (zip64): so lengths don't depend on what is written.
_FLAGS = 0x0808  # the checksum follows; names are UTF-8
_IN_64_BITS = 0xFFFFFFFF


def _local(record: Record, at: int) -> bytes:
    name = f"{_ROOT}/{record.name}".encode()
    sizes = struct.pack("<HHQQ", 1, 16, record.length, record.length)
    # An extra field of any kind pads: torch's own is called FB.
    begin = at + LOCAL_BYTES + len(name) + len(sizes) + 4
    padding = -begin % _ALIGNMENT
    extra = sizes + b"FB" + struct.pack("<H", padding) + b"Z" * padding
    fixed = struct.pack(
        "<4s5HIIIHH", b"PK\x03\x04", 45, _FLAGS, 0, 0, 33, 0, _IN_64_BITS, _IN_64_BITS,
        len(name), len(extra),
    )  # fmt: skip
    return fixed + name + extra


def _descriptor(crc: int, length: int) -> bytes:
    return struct.pack("<4sIQQ", b"PK\x07\x08", crc, length, length)


def _central(record: Record, crc: int, at: int) -> bytes:
    name = f"{_ROOT}/{record.name}".encode()
    extra = struct.pack("<HHQQQ", 1, 24, record.length, record.length, at)
    fixed = struct.pack(
        "<4s6HIIIHHHHHII", b"PK\x01\x02", 45, 45, _FLAGS, 0, 0, 33, crc, _IN_64_BITS, _IN_64_BITS,
        len(name), len(extra), 0, 0, 0, 0, _IN_64_BITS,
    )  # fmt: skip
    return fixed + name + extra


def _end(count: int, at: int, length: int) -> bytes:
    return (
        struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, length, at)
        + struct.pack("<4sIQI", b"PK\x06\x07", 0, at + length, 1)
        + struct.pack(
            "<4sHHHHIIH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, _IN_64_BITS, _IN_64_BITS, 0
        )
    )


# -------------------------------------------------------------------------------------- tensors


def check_entries(wanted: Wanted, format: str) -> None:
    """Check that all that is wanted can be written.

    Raises:
        UnsupportedFormat: Some of it can't; all are named.
    """
    problems = {}
    for tensor in wanted.tensors:
        entry = dtypes.find(tensor.dtype)
        if entry is None or entry.name not in _WRITABLE:
            problems[tensor.name] = f"torch has no dtype {tensor.dtype}"
    for name, value in wanted.values.items():
        try:
            dumped(value)
        except (OverflowError, TypeError) as exc:
            problems[name] = str(exc)
    refuse(problems, format)


def size_of(tensor: Readable) -> int:
    """Bytes of a tensor."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def whole(tensor: Readable, key: str, shape: Sequence[int] | None = None) -> Stored:
    """Describe a tensor, or a box of it, that has a storage of its own in C order."""
    shape = tuple(tensor.shape if shape is None else shape)
    stride, step = [], 1
    for extent in reversed(shape):
        stride.append(step)
        step *= max(extent, 1)
    entry = dtypes.BY_NAME[tensor.dtype.name]
    storage = Storage(key, entry.name, math.prod(shape))
    return Stored(storage, entry, 0, shape, tuple(reversed(stride)))


def blocks_of(tensor: Readable, box: Region) -> Callable[[], Iterator[memoryview]]:
    """Return what reads a box of a tensor in blocks along its first dimension."""

    def blocks() -> Iterator[memoryview]:
        rows = box.shape[0] if box.shape else 1
        row_bytes = box.size * tensor.dtype.itemsize // max(rows, 1)
        step = max(_BLOCK_BYTES // max(row_bytes, 1), 1)
        if rows <= step:
            yield _bytes(tensor.read(None if box.shape == tensor.shape else box))
            return
        first = box.start[0]
        for row in range(first, first + rows, step):
            stop = min(row + step, first + rows)
            yield _bytes(tensor.read(Region((row, *box.start[1:]), (stop, *box.stop[1:]))))

    return blocks


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def fill(sink: Sink, archives: Iterable[Sequence[Record]]) -> None:
    """Write a file that is one archive after another."""
    at = 0

    def write(data: memoryview | bytes) -> None:
        nonlocal at
        sink.write_at(at, data)
        at += memoryview(data).nbytes

    for records in archives:
        write_archive(write, records)
