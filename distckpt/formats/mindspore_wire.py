"""The bytes of a MindSpore ``.ckpt``: protobuf's wire format, scanned and written by hand.

So a file of any length is read and written in little memory, and no tensor passes through protobuf,
whose messages end at 2 GiB. The messages are::

    Checkpoint     { repeated Value value = 1; }
    Value          { required string tag = 1;
                     oneof { TensorProto tensor = 2; MapTensorProto maptensor = 3; } }
    TensorProto    { repeated int64 dims = 1; required string tensor_type = 2;
                     required bytes tensor_content = 3; }
    MapTensorProto { repeated TensorProto tensor = 1; }

After them there may be a suffix of 17 bytes: ``crc_num`` and the CRC-32 of all that is before it,
big-endian.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Protocol

from distckpt.errors import CorruptCheckpoint
from distckpt.formats.base import Place
from distckpt.state import MAX_DIMENSIONS, MAX_NAME_BYTES

CRC_MARK = b"crc_num"
CRC_BYTES = len(CRC_MARK) + 10

# More entries than any checkpoint has; each costs some hundred bytes of memory.
MAX_ENTRIES = 1 << 20

_WINDOW_BYTES = 16 << 10
_VARINT_BYTES = 10
_MAX_TYPE_BYTES = 64
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Text(Protocol):
    """The plain bytes of a ``.ckpt``, decrypted where it is encrypted."""

    @property
    def url(self) -> str:
        """Of the file."""

    @property
    def length(self) -> int:
        """How many bytes."""

    @property
    def hint(self) -> str:
        """What else a broken structure may come from, for messages; may be empty."""

    def read_into(self, start_byte: int, buffer: memoryview) -> None:
        """Fill a buffer, which lies in the text."""


class PlainText:
    """The text of a file that isn't encrypted.

    Args:
        place: The file.
    """

    hint = ""

    def __init__(self, place: Place) -> None:
        self._place = place
        self.url = place.url
        self.length = place.size()

    def read_into(self, start_byte: int, buffer: memoryview) -> None:
        """See `Text`."""
        self._place.read_into(start_byte, buffer)


@dataclass(frozen=True, slots=True)
class TensorMessage:
    """One TensorProto.

    Attributes:
        dims: As it is written, not judged yet.
        type: Name of the element type.
        start: First byte of its content in the text.
        stop: End of its content.
    """

    dims: tuple[int, ...]
    type: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One Value.

    Attributes:
        tag: Its name.
        is_map: Whether it is a map parameter.
        tensors: One; those of a map parameter: its keys, values and status.
        at: First byte in the text.
        end: Where it ends.
    """

    tag: str
    is_map: bool
    tensors: tuple[TensorMessage, ...]
    at: int
    end: int


class _Field(NamedTuple):  # quick to make: there are several an entry
    number: int
    wire: int
    at: int
    start: int
    stop: int
    value: int


def broken(text: Text, at: int, what: str) -> CorruptCheckpoint:
    """Make the error of a text that isn't a checkpoint's."""
    return CorruptCheckpoint(
        f"{text.url}: byte {at} of {text.length}: {what}: the file is damaged, cut short, or no "
        f"MindSpore checkpoint{text.hint}",
        path=text.url,
        offset_bytes=at,
    )


def crc_suffix(text: Text) -> int | None:
    """Return the CRC that the end of the text shows, if it is one and no tensor's data."""
    if text.length < CRC_BYTES:
        return None
    tail = bytearray(CRC_BYTES)
    text.read_into(text.length - CRC_BYTES, memoryview(tail))
    return int.from_bytes(tail[len(CRC_MARK) :]) if tail.startswith(CRC_MARK) else None


def looks_like_entry(head: bytes, *, if_cut: bool) -> bool:
    """Whether a file's first bytes are the head of an entry, in the order that protobuf writes.

    It looks as far as the name of the type: other protobufs begin like an entry, too.

    Args:
        head: The bytes.
        if_cut: What to answer where they end too early to tell.
    """
    text = _Head(head)
    window = _Window(text)
    try:
        entry = window.field(0, text.length)
        tag = window.field(entry.start, entry.stop)
        tensor = window.field(tag.stop, entry.stop)
        keys = [(entry.number, entry.wire), (tag.number, tag.wire), (tensor.number, tensor.wire)]
        if keys[:2] != [(1, _BYTES)] * 2 or keys[2] not in {(2, _BYTES), (3, _BYTES)}:
            return False
        if tensor.number == 3:  # noqa: PLR2004
            tensor = window.field(tensor.start, tensor.stop)
        part = window.field(tensor.start, tensor.stop)
        while (part.number, part.wire) == (1, _VARINT):
            part = window.field(part.stop, tensor.stop)
    except CorruptCheckpoint as exc:
        return if_cut and (exc.offset_bytes or 0) + _VARINT_BYTES >= len(head)
    else:
        return (part.number, part.wire) == (2, _BYTES)


class _Head:
    """The first bytes of a text of any length, as if zeros followed, which begin no field."""

    url, hint, length = "", "", 1 << 63

    def __init__(self, head: bytes) -> None:
        self._head = head

    def read_into(self, start_byte: int, buffer: memoryview) -> None:
        """See `Text`."""
        part = self._head[start_byte : start_byte + len(buffer)]
        buffer[: len(part)] = part


def scan(text: Text, *, may_have_suffix: bool) -> Iterator[Entry]:
    """Yield the entries; reads no content.

    Args:
        text: The file's.
        may_have_suffix: Whether the end looks like one. It is one if the last entry ends before
            it, for its first byte can't begin an entry; else it is that entry's data.

    Raises:
        CorruptCheckpoint: It doesn't follow the wire format, or lacks what is required.
    """
    window = _Window(text)
    at, count = 0, 0
    while at < text.length:
        if may_have_suffix and at == text.length - CRC_BYTES:
            return
        field = window.field(at, text.length)
        _expect(text, field, 1, "a checkpoint")
        count += 1
        if count > MAX_ENTRIES:
            raise broken(text, at, f"more than {MAX_ENTRIES} entries")
        yield _entry(window, field)
        at = field.stop


def _entry(window: _Window, entry: _Field) -> Entry:
    text = window.text
    tag: str | None = None
    found: tuple[bool, tuple[TensorMessage, ...]] | None = None
    for field in window.fields(entry):
        _expect(text, field, 3, "an entry")
        if field.number == 1:
            _expect_first(text, field, tag, "tag")
            tag = window.string(field, MAX_NAME_BYTES, "a tag")
        else:
            _expect_first(text, field, found, "tensor")
            is_map = field.number == 3  # noqa: PLR2004
            found = is_map, (_map(window, field) if is_map else (_tensor(window, field),))
    if tag is None or found is None:
        missing = "tag" if tag is None else "tensor"
        raise broken(text, entry.at, f"an entry without a {missing}")
    return Entry(tag, *found, entry.at, entry.stop)


def _map(window: _Window, message: _Field) -> tuple[TensorMessage, ...]:
    parts = []
    for field in islice(window.fields(message), 4):
        _expect(window.text, field, 1, "a map parameter")
        parts.append(_tensor(window, field))
    if len(parts) != 3:  # noqa: PLR2004
        raise broken(
            window.text, message.at, "a map parameter holds three tensors: key, value and status"
        )
    return tuple(parts)


def _tensor(window: _Window, message: _Field) -> TensorMessage:
    text = window.text
    dims: list[int] = []
    type_name: str | None = None
    content: tuple[int, int] | None = None
    for field in window.fields(message):
        if field.number == 1:
            _read_dims(window, field, dims)
            continue
        _expect(text, field, 3, "a tensor")
        if field.number == 2:  # noqa: PLR2004
            _expect_first(text, field, type_name, "type")
            type_name = window.string(field, _MAX_TYPE_BYTES, "a type")
        else:
            _expect_first(text, field, content, "content")
            content = field.start, field.stop
    if type_name is None or content is None:
        missing = "type" if type_name is None else "content"
        raise broken(text, message.at, f"a tensor without a {missing}")
    return TensorMessage(tuple(dims), type_name, *content)


def _read_dims(window: _Window, field: _Field, dims: list[int]) -> None:
    """Append the dims of a field: one, or several that are packed, which readers must accept."""
    if field.wire == _VARINT:
        dims.append(_signed(field.value))
    else:
        _expect(window.text, field, 1, "a tensor")
        at = field.start
        while at < field.stop and len(dims) <= MAX_DIMENSIONS:
            value, at = window.varint(at, field.stop)
            dims.append(_signed(value))
    if len(dims) > MAX_DIMENSIONS:
        raise broken(window.text, field.at, f"a tensor of more than {MAX_DIMENSIONS} dimensions")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _expect(text: Text, field: _Field, last_number: int, what: str) -> None:
    # Protobuf would skip a field that it doesn't know, and so drop an entry for one flipped bit.
    if field.wire != _BYTES or field.number > last_number:
        raise broken(
            text,
            field.at,
            f"{what} has no field {field.number} of wire type {field.wire}",
        )


def _expect_first(text: Text, field: _Field, before: object, what: str) -> None:
    if before is not None:
        raise broken(text, field.at, f"a second {what}")


class _Window:
    """Reads the small parts of a text, which lie between large ones, a window at a time."""

    def __init__(self, text: Text) -> None:
        self.text = text
        self._bytes = b""
        self._start = 0

    def field(self, at: int, stop: int) -> _Field:
        """Read the key of the field at a byte, and its extent, which lies before `stop`."""
        key, start = self.varint(at, stop)
        number, wire = key >> 3, key & 7
        if not 0 < number < 1 << 29:
            raise broken(self.text, at, f"field number {number}")
        if wire == _VARINT:
            value, end = self.varint(start, stop)
            return _Field(number, wire, at, start, end, value)
        if wire == _BYTES:
            length, start = self.varint(start, stop)
        elif wire in {_FIXED32, _FIXED64}:
            length = 4 if wire == _FIXED32 else 8
        else:
            raise broken(self.text, at, f"wire type {wire}, which MindSpore doesn't write")
        if length > stop - start:
            raise broken(
                self.text, at, f"{length} bytes are announced where {stop - start} are left"
            )
        return _Field(number, wire, at, start, start + length, 0)

    def fields(self, message: _Field) -> Iterator[_Field]:
        """Yield the fields of a message."""
        at = message.start
        while at < message.stop:
            field = self.field(at, message.stop)
            yield field
            at = field.stop

    def varint(self, at: int, stop: int) -> tuple[int, int]:
        """Read a variable-length number; return it, and where it ends."""
        offset = at - self._start
        if offset < 0 or offset + _VARINT_BYTES > len(self._bytes):
            offset = self._move(at)
        if at < stop and self._bytes[offset] < 0x80:  # noqa: PLR2004
            return self._bytes[offset], at + 1  # most are so short
        value = 0
        for index, byte in enumerate(self._bytes[offset : offset + min(_VARINT_BYTES, stop - at)]):
            value |= (byte & 0x7F) << (7 * index)
            if byte < 0x80:  # noqa: PLR2004
                if value >> 64:
                    break
                return value, at + index + 1
        raise broken(self.text, at, "a number that doesn't end where it must")

    def string(self, field: _Field, limit_bytes: int, what: str) -> str:
        """Read a short text."""
        length = field.stop - field.start
        if length > limit_bytes:
            raise broken(
                self.text, field.at, f"{what} of {length} bytes; there are at most {limit_bytes}"
            )
        offset = field.start - self._start
        if offset < 0 or offset + length > len(self._bytes):
            offset = self._move(field.start, length)
        try:
            return self._bytes[offset : offset + length].decode()
        except UnicodeDecodeError as exc:
            raise broken(self.text, field.start, f"{what} that isn't UTF-8") from exc

    def _move(self, at: int, at_least: int = 0) -> int:
        """Move the window so that it begins at a byte, if its end isn't the text's."""
        if self._start <= at and self._start + len(self._bytes) == self.text.length:
            return at - self._start
        size = min(max(_WINDOW_BYTES, at_least), self.text.length - at)
        buffer = bytearray(size)
        self.text.read_into(at, memoryview(buffer))
        self._bytes, self._start = bytes(buffer), at
        return 0


# --- writing --------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    """Write a variable-length number."""
    out = bytearray()
    while value > 0x7F:  # noqa: PLR2004
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def entry_head(tag: str, dims: tuple[int, ...], type_name: str, content_bytes: int) -> bytes:
    """Write all of an entry that is before its content, with which it ends."""
    name, kind = tag.encode(), type_name.encode()
    tensor = b"".join(b"\x08" + varint(extent) for extent in dims)
    tensor += b"\x12" + varint(len(kind)) + kind + b"\x1a" + varint(content_bytes)
    value = b"\x0a" + varint(len(name)) + name
    value += b"\x12" + varint(len(tensor) + content_bytes) + tensor
    return b"\x0a" + varint(len(value) + content_bytes) + value
