"""The safetensors format: one file. Read and written here, since its library knows not all dtypes.

What safetensors has no room for is kept in ``__metadata__`` under the key ``distckpt``: plain
values, and metadata that are no texts (see `plain`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from distckpt import dtypes
from distckpt.errors import CorruptCheckpoint, UnsupportedFormat
from distckpt.foreign import Contents, ForeignTensor, Source, tensor_bytes
from distckpt.formats import plain
from distckpt.formats.base import Place, Readable, Wanted, Writing, refuse, write_file
from distckpt.formats.safetensors_crc import CRC_KEY, Entry, MindSporeCrc
from distckpt.shardfile import METADATA_KEY, TABLE_KEY
from distckpt.state import MAX_DIMENSIONS, MAX_NAME_BYTES, MAX_TENSOR_BYTES
from distckpt.store import Sink

NAME = "safetensors"
SUFFIX = ".safetensors"
VALUES_KEY = "distckpt"
MAX_HEADER_BYTES = 100_000_000  # the library's own limit

_LENGTH_BYTES = 8
_ALIGNMENT = 64
_MOST_LISTED = 20
# Empty lists take twenty times the memory of their text. An entry has 3 brackets in 48 bytes.
_SMALL_BYTES = 1 << 20
_BRACKET_BYTES = 12
# Of a file, not of what it holds: what marks a checkpoint's shard file.
_SHARD_KEYS = frozenset({"format", "version", "block_bytes"})

_BY_NAME = {entry.safetensors: entry for entry in dtypes.TABLE if entry.safetensors is not None} | {
    # Younger than what most readers know: read, but not written.
    "F8_E4M3FNUZ": dtypes.BY_NAME["float8_e4m3fnuz"],
    "F8_E5M2FNUZ": dtypes.BY_NAME["float8_e5m2fnuz"],
}


class SafetensorsFormat:
    """One ``.safetensors`` file, a shard file of a checkpoint included.

    Options for writing:
        framework: What ``format`` in ``__metadata__`` says, which transformers wants to be ``pt``,
            ``tf``, ``flax`` or ``mlx``. By default what the checkpoint's metadata say, else ``pt``.
    """

    name = NAME
    suffixes = (SUFFIX,)

    def sniff(self, place: Place) -> bool:
        """See `Format`: by the name, or by a header's length and first brace."""
        if place.name.lower().endswith(SUFFIX):
            return place.is_file()
        head = place.head(_LENGTH_BYTES + 1)
        size = int.from_bytes(head[:_LENGTH_BYTES], "little")
        return head[_LENGTH_BYTES:] == b"{" and size <= min(MAX_HEADER_BYTES, place.size())

    def open(self, place: Place) -> Source:
        """See `Format`."""
        return SafetensorsFile(place)

    def write(self, place: Place, wanted: Wanted, *, framework: str | None = None) -> Writing:
        """See `Format`."""
        image = FileImage(wanted.tensors, metadata_of(wanted, framework))
        return write_file(place, wanted, image.length, image.write)


class SafetensorsFile:
    """An opened file; see `Source`.

    Args:
        place: Where.

    Attributes:
        metadata: As they stand in the file.
        contents: What is in it.

    Raises:
        CorruptCheckpoint: The header lies, or isn't one.
        UnsupportedFormat: It has a dtype that is not known here.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        header, self._data_start, length = _read_header(place)
        self.metadata = _metadata(place, header.pop(METADATA_KEY, None))
        self._entries = _entries(place, header, self._data_start, length)
        metadata: dict[str, object] = dict(self.metadata)
        is_shard = metadata.get("format") == "distckpt"
        if is_shard:
            metadata = {key: text for key, text in metadata.items() if key not in _SHARD_KEYS}
            self._entries = [one for one in self._entries if one.tensor.name != TABLE_KEY]
        crc = metadata.pop(CRC_KEY, None) if metadata.get("format") == "ms" else None
        self._crc = (
            None if crc is None else MindSporeCrc(place, str(crc), self._data_start, self._entries)
        )
        values, more = plain.from_text(str(metadata.pop(VALUES_KEY, "{}")), place.url)
        tensors = [entry.tensor for entry in self._entries]
        both = values.keys() & {tensor.name for tensor in tensors}
        if both:
            raise CorruptCheckpoint(
                f"{place.url}: {sorted(both)} are tensors and plain values, too", path=place.url
            )
        self.contents = Contents(tensors, values, metadata | more)

    def read_into(self, tensor: int, piece: int, start_byte: int, buffer: memoryview) -> None:
        """See `Source`."""
        del piece  # there is one
        if self._crc is not None:
            self._crc.check()
        self._place.read_into(self._data_start + self._entries[tensor].start + start_byte, buffer)


def _read_header(place: Place) -> tuple[dict[str, Any], int, int]:
    """Return the header, and where data begin and end."""
    length = place.size()
    if length < _LENGTH_BYTES:
        raise CorruptCheckpoint(
            f"{place.url}: {length} bytes are no safetensors file, which begins with the length "
            "of its header in 8",
            path=place.url,
        )
    size = int.from_bytes(place.read(0, _LENGTH_BYTES), "little")
    if size > min(MAX_HEADER_BYTES, length - _LENGTH_BYTES):
        raise CorruptCheckpoint(
            f"{place.url}: the first 8 bytes say that a header of {size} bytes follows; the file "
            f"has {length} bytes, and a header at most {MAX_HEADER_BYTES}: it is cut short, or no "
            "safetensors file",
            path=place.url,
            offset_bytes=0,
        )
    text = place.read(_LENGTH_BYTES, _LENGTH_BYTES + size)
    return parse_object(place, text, _LENGTH_BYTES), _LENGTH_BYTES + size, length


def parse_object(place: Place, text: bytes, start_byte: int = 0) -> dict[str, Any]:
    """Parse a JSON object strictly: UTF-8, and no key twice at any depth.

    Raises:
        CorruptCheckpoint: It is none.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = [key for key, _ in pairs if key in seen or seen.add(key)]  # type: ignore[func-returns-value]
            raise ValueError(f"the key {twice[0][:200]!r} stands there twice")
        return found

    def no_number(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    def parse() -> object:
        brackets = text.count(b"[") + text.count(b"{")
        if len(text) > _SMALL_BYTES and brackets * _BRACKET_BYTES > len(text):
            raise ValueError("it has more brackets than any header")
        return json.loads(text.decode(), object_pairs_hook=unique, parse_constant=no_number)

    try:
        found = parse()
    except RecursionError:
        problem = "it is nested too deeply"
    except ValueError as exc:
        problem = str(exc)
    else:
        if isinstance(found, dict):
            return found
        problem = f"it is a {type(found).__name__}"
    raise CorruptCheckpoint(
        f"{place.url}: expected a JSON object at byte {start_byte}, in {len(text)} bytes: "
        f"{problem}",
        path=place.url,
        offset_bytes=start_byte,
    )


def _metadata(place: Place, found: object) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise CorruptCheckpoint(
            f"{place.url}: {METADATA_KEY} in the header maps texts to texts, found "
            f"{json.dumps(found)[:200]}",
            path=place.url,
            offset_bytes=_LENGTH_BYTES,
        )
    return found


def _entries(
    place: Place, header: Mapping[str, object], data_start: int, length: int
) -> list[Entry]:
    """Check the header's entries: each by itself, then that together they fill the file."""
    entries: list[Entry] = []
    problems: list[str] = []
    unknown: dict[str, str] = {}
    for name, described in header.items():
        found = _entry(name, described)
        if isinstance(found, Entry):
            entries.append(found)
        elif found.startswith("dtype"):
            unknown[name] = found
        else:
            problems.append(f"{name[:200]!r}: {found}")
    if not problems and not unknown:
        problems = list(_gaps(entries, length - data_start))
    if problems:
        listed = "\n  ".join(problems[:_MOST_LISTED])
        more = f"\n  … and {len(problems) - _MOST_LISTED} more" * (len(problems) > _MOST_LISTED)
        raise CorruptCheckpoint(
            f"{place.url}: {len(problems)} faults in the header (bytes {_LENGTH_BYTES}:"
            f"{data_start}; offsets count from its end):\n  {listed}{more}",
            path=place.url,
            offset_bytes=_LENGTH_BYTES,
        )
    if unknown:
        listed = "\n  ".join(f"{name!r}: {what}" for name, what in unknown.items())
        raise UnsupportedFormat(
            f"{place.url}: {len(unknown)} tensors can't be had here; known are "
            f"{', '.join(_BY_NAME)}:\n  {listed}"
        )
    return entries


def _entry(name: str, described: object) -> Entry | str:
    """Make an entry, or say what is wrong with it."""
    match described:
        case {"dtype": str(kind), "shape": list(shape), "data_offsets": [start, stop]}:
            pass
        case _:
            return "expected dtype, shape, and data_offsets of a start and a stop"
    if not all(type(number) is int and number >= 0 for number in [*shape, start, stop]):
        return "shape and data_offsets hold whole numbers of at least 0"
    problem = name_problem(name)
    if problem is not None:
        return problem
    if len(shape) > MAX_DIMENSIONS:
        return f"{len(shape)} dimensions; a tensor has at most {MAX_DIMENSIONS}"
    if kind not in _BY_NAME:
        return f"dtype {kind[:50]!r} is not known"
    tensor = ForeignTensor(name, tuple(shape), _BY_NAME[kind])
    size = tensor_bytes(shape, tensor.dtype)
    if size != stop - start:
        return (
            f"{kind} {shape} has {_short(size)} bytes, but {_short(start)}:{_short(stop)} is said"
        )
    if tensor_bytes([extent or 1 for extent in shape], tensor.dtype) > MAX_TENSOR_BYTES:
        return f"a shape of {len(shape)} dimensions that no memory could hold"
    return Entry(tensor, start, stop)


def name_problem(name: str) -> str | None:
    """Say why a tensor can't have this name; None if it can."""
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        return "a name that is not valid Unicode"
    if "\0" in name or length > MAX_NAME_BYTES:
        return f"a name has no NUL character, and at most {MAX_NAME_BYTES} bytes"
    return None


def _short(number: int) -> str:
    return str(number) if number < 1 << 64 else "over 2**64"


def _gaps(entries: Sequence[Entry], data_bytes: int) -> Iterator[str]:
    """Say where tensors overlap or leave holes, in the file's order."""
    at, before = 0, ""
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.stop)):
        name, place = repr(entry.tensor.name[:200]), f"{entry.start}:{entry.stop}"
        if entry.stop > data_bytes:
            yield f"{name}: bytes {place} end outside the file, which has {data_bytes} for tensors"
        elif entry.start < at:
            yield f"{name}: bytes {place} overlap those of {before}, which end at {at}"
        elif entry.start > at:
            yield f"{name}: begins at byte {entry.start}; {at}:{entry.start} belong to no tensor"
        at, before = max(at, entry.stop), name
    if at < data_bytes:
        yield f"bytes {at}:{data_bytes}, the last, belong to no tensor"


# ------------------------------------------------------------------------------------------ writing


def metadata_of(wanted: Wanted, framework: str | None) -> dict[str, str]:
    """Make ``__metadata__``: texts as they are, the rest under one key."""
    texts, others = {"format": "pt"}, {}
    for key, value in wanted.metadata.items():
        if isinstance(value, str) and key not in {VALUES_KEY, CRC_KEY}:
            texts[key] = value
        elif key != CRC_KEY:
            others[key] = value
    if framework is not None:
        texts["format"] = framework
    more = plain.to_text(wanted.values, others)
    return texts if more is None else texts | {VALUES_KEY: more}


def check_dtypes(tensors: Sequence[Readable]) -> None:
    """Refuse what a safetensors file can't hold.

    Raises:
        UnsupportedFormat: Dtypes that safetensors lacks, or a reserved name: all are named.
    """
    problems = {}
    for tensor in tensors:
        if _entry_of(tensor).safetensors is None:
            problems[tensor.name] = f"safetensors has no dtype {tensor.dtype.name}"
        elif tensor.name == METADATA_KEY:
            problems[tensor.name] = "safetensors reserves this name; use rename="
    refuse(problems, NAME)


def _entry_of(tensor: Readable) -> dtypes.Dtype:
    return dtypes.BY_NAME[tensor.dtype.name]


def readable_bytes(tensor: Readable) -> int:
    """Bytes of a tensor to be written."""
    return tensor_bytes(tensor.shape, _entry_of(tensor))


class FileImage:
    """A safetensors file that is not written yet.

    The header names tensors in their given order. Their bytes stand in falling item size, so that
    each is aligned to its own; data begin at a multiple of 64.

    Args:
        tensors: What it holds.
        metadata: ``__metadata__``.

    Attributes:
        length: Of the file, in bytes.

    Raises:
        UnsupportedFormat: The format can't hold some of it.
    """

    def __init__(self, tensors: Sequence[Readable], metadata: Mapping[str, str]) -> None:
        check_dtypes(tensors)
        self._order = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
        start_of, at = {}, 0
        for tensor in self._order:
            start_of[tensor.name] = at
            at += readable_bytes(tensor)
        header: dict[str, object] = {METADATA_KEY: dict(metadata)} if metadata else {}
        for tensor in tensors:
            start = start_of[tensor.name]
            header[tensor.name] = {
                "dtype": _entry_of(tensor).safetensors,
                "shape": list(tensor.shape),
                "data_offsets": [start, start + readable_bytes(tensor)],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        size = -(-(_LENGTH_BYTES + len(text)) // _ALIGNMENT) * _ALIGNMENT - _LENGTH_BYTES
        if size > MAX_HEADER_BYTES:
            raise UnsupportedFormat(
                f"{len(tensors)} tensors and their metadata need a header of {size} bytes; a "
                f"safetensors file has one of at most {MAX_HEADER_BYTES}: write a "
                "safetensors-folder with a smaller max_shard_bytes"
            )
        self._header = size.to_bytes(_LENGTH_BYTES, "little") + text.ljust(size)
        self.length = len(self._header) + at

    def write(self, sink: Sink) -> None:
        """Write it all, a tensor at a time."""
        sink.write_at(0, self._header)
        at = len(self._header)
        for tensor in self._order:
            size = readable_bytes(tensor)
            if size:
                sink.write_at(at, tensor.read().reshape(-1).view(np.uint8).data)
            at += size


FORMAT = SafetensorsFormat()
