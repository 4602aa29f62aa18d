"""Opened ``.ckpt`` files of MindSpore: what their entries mean, and where the bytes are."""

from __future__ import annotations

import math
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from threading import Lock

import numpy as np

from distckpt import dtypes
from distckpt.errors import CheckpointNotFound, CorruptCheckpoint, UnsupportedFormat
from distckpt.foreign import Contents, ForeignTensor
from distckpt.formats.base import Place
from distckpt.formats.mindspore_crypt import CipherText, Key, mode_of
from distckpt.formats.mindspore_wire import (
    CRC_BYTES,
    Entry,
    PlainText,
    TensorMessage,
    Text,
    broken,
    crc_suffix,
    scan,
)
from distckpt.state import MAX_TENSOR_BYTES

MAX_STRINGS_BYTES = 64 << 20

STRING = "str"
INT4 = "Int4"
LOADABLE = {
    "Bool": "bool",
    "Int8": "int8",
    "Int16": "int16",
    "Int32": "int32",
    "Int64": "int64",
    "UInt8": "uint8",
    "UInt16": "uint16",
    "UInt32": "uint32",
    "UInt64": "uint64",
    "Float16": "float16",
    "Float32": "float32",
    "Float64": "float64",
    "BFloat16": "bfloat16",
    INT4: "int4",
}
# What MindSpore writes, and refuses to load: it would refuse all of the file.
_UNLOADABLE = {
    "Complex64": "complex64",
    "Complex128": "complex128",
    "Float8E4M3FN": "float8_e4m3fn",
    "Float8E5M2": "float8_e5m2",
}
_DTYPES = {kind: dtypes.BY_NAME[name] for kind, name in (LOADABLE | _UNLOADABLE).items()}
# A map parameter's tensors have numpy's names.
_MAP_DTYPES = {dtypes.BY_NAME[name].numpy.name: dtypes.BY_NAME[name] for name in LOADABLE.values()}
_MAP_PARTS = ("key", "value", "status")
_STEP_BYTES = 4 << 20
_MOST_LISTED = 50


class _Fault(Exception):
    """What is wrong with one entry."""

    def __init__(
        self, what: str, kind: type[CorruptCheckpoint | UnsupportedFormat] = CorruptCheckpoint
    ) -> None:
        super().__init__(what)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor, and where it lies: byte ``starts[i]`` of it is byte ``at[i]`` of the text."""

    known: ForeignTensor
    packed: bool
    starts: Sequence[int]
    at: Sequence[int]

    @property
    def name(self) -> str:
        return self.known.name

    @classmethod
    def of(
        cls, name: str, dims: tuple[int, ...], dtype: dtypes.Dtype, parts: Sequence[TensorMessage]
    ) -> _Tensor:
        """Join its parts, if they make a tensor of these dims."""
        kind = parts[0].type
        shown = f"{kind} of dims {list(dims)}"
        if min(dims, default=0) < 0:
            raise _Fault(f"{shown}: one is negative")
        if math.prod(extent or 1 for extent in dims) * dtype.itemsize > MAX_TENSOR_BYTES // 2:
            raise _Fault(f"{shown}: more bytes than any tensor has")
        lengths = [part.stop - part.start for part in parts]
        expected, found = math.prod(dims) * dtype.itemsize, sum(lengths)
        if found != expected:
            slices = f" in {len(parts)} slices" if len(parts) > 1 else ""
            raise _Fault(f"{shown} has {expected} bytes, and its content{slices} has {found}")
        if len(parts) > 1 and not found:
            raise _Fault(f"{shown}, which is empty, comes {len(parts)} times")
        packed = kind == INT4
        if packed and not dims:
            raise _Fault("a scalar of type Int4, whose byte holds two", UnsupportedFormat)
        shape = (*dims[:-1], 2 * dims[-1]) if packed else dims
        filled = [part for part in parts if part.stop > part.start]
        return cls(
            ForeignTensor(name, shape, dtype),
            packed,
            [0, *accumulate(part.stop - part.start for part in filled)],
            [part.start for part in filled],
        )

    def read_into(self, text: Text, start_byte: int, buffer: memoryview) -> None:
        """Fill a buffer with what the file holds of it."""
        done = 0
        while done < len(buffer):
            at = start_byte + done
            part = bisect_right(self.starts, at) - 1
            count = min(self.starts[part + 1] - at, len(buffer) - done)
            text.read_into(self.at[part] + at - self.starts[part], buffer[done : done + count])
            done += count

    def unpack_into(self, text: Text, start_byte: int, buffer: memoryview) -> None:
        """Fill a buffer with a byte for each half of a byte that the file holds."""
        first, stop = start_byte // 2, -(-(start_byte + len(buffer)) // 2)
        packed = np.empty(stop - first, np.uint8)
        self.read_into(text, first, packed.data)
        halves = np.stack([packed & 0x0F, packed >> 4], axis=-1).reshape(-1)
        skipped = start_byte - 2 * first
        buffer[:] = halves[skipped : skipped + len(buffer)].data


class MindSporeSource:
    """An opened ``.ckpt``.

    Args:
        place: The file.
        key: Its key, if it is encrypted: 16, 24 or 32 bytes.
        mode: How it is encrypted: ``"AES-GCM"``, ``"AES-CBC"`` or ``"SM4-CBC"``.
        check_crc: Whether to check its CRC before the first tensor's bytes are handed out; by
            default if it has one. True refuses a file that has none. A file with strings is checked
            when it is opened, because they are handed out then.

    Attributes:
        contents: What is in it, in the order of the file.
        crc: The CRC-32 that the file says it has, or None.

    Raises:
        CheckpointNotFound: No such file.
        CorruptCheckpoint: It breaks the format, or the key is wrong.
        UnsupportedFormat: It holds what can't be had here, or needs a key.
    """

    def __init__(
        self,
        place: Place,
        *,
        key: bytes | None = None,
        mode: str = "AES-GCM",
        check_crc: bool | None = None,
    ) -> None:
        self._text = _open(place, key, mode)
        suffix = crc_suffix(self._text)
        found = _Collected(self._text)
        for tag, group in groupby(
            scan(self._text, may_have_suffix=suffix is not None), lambda entry: entry.tag
        ):
            found.add(tag, list(group))
        found.check()
        self._tensors = found.tensors
        self.contents = Contents([tensor.known for tensor in found.tensors], found.values)
        self.crc = suffix if found.end == self._text.length - CRC_BYTES else None
        if check_crc and self.crc is None:
            raise CorruptCheckpoint(
                f"{place.url}: check_crc=True, and the file has no CRC suffix: it was saved "
                "without one, or has lost its end",
                path=place.url,
            )
        self._unchecked = self.crc is not None and check_crc is not False
        self._lock = Lock()
        if found.values:
            self._check_crc()

    def read_into(self, tensor: int, piece: int, start_byte: int, buffer: memoryview) -> None:
        """See `Source`."""
        del piece  # there is one
        self._check_crc()
        found = self._tensors[tensor]
        (found.unpack_into if found.packed else found.read_into)(self._text, start_byte, buffer)

    def _check_crc(self) -> None:
        with self._lock:
            if self._unchecked:
                self._compare_crc()
                self._unchecked = False

    def _compare_crc(self) -> None:
        found, stop = 0, self._text.length - CRC_BYTES
        buffer = memoryview(bytearray(min(stop, _STEP_BYTES)))
        for start in range(0, stop, _STEP_BYTES):
            step = buffer[: min(_STEP_BYTES, stop - start)]
            self._text.read_into(start, step)
            found = zlib.crc32(step, found)
        if found != self.crc:
            raise CorruptCheckpoint(
                f"{self._text.url}: the CRC-32 of bytes 0:{stop} is {found:08x}, and the file "
                f"says {self.crc:08x}: it is damaged; check_crc=False reads it nevertheless",
                path=self._text.url,
                offset_bytes=0,
            )


def _open(place: Place, key: bytes | None, mode: str) -> Text:
    checked = None if key is None else Key(key, mode)
    if not place.is_file():
        raise CheckpointNotFound(f"{place.url}: there is no such file")
    found = mode_of(place.head(4))
    if found is None and checked is not None:
        raise UnsupportedFormat(f"{place.url}: a key is given, and the file isn't encrypted")
    if found is not None and checked is None:
        raise UnsupportedFormat(
            f"{place.url}: the file is encrypted; it needs its key: "
            f"options={{'key': …, 'mode': {found!r}}}"
        )
    if checked is None:
        return PlainText(place)
    if found != mode:
        raise UnsupportedFormat(f"{place.url}: mode={mode!r}, and the file says {found!r}")
    return CipherText(place, checked)


class _Collected:
    """What the entries make, and what is wrong with them: few of very many."""

    def __init__(self, text: Text) -> None:
        self.tensors: list[_Tensor] = []
        self.values: dict[str, object] = {}
        self.end = 0
        self._text = text
        self._room = MAX_STRINGS_BYTES
        self._first_at: dict[str, int] = {}
        self._faults = 0
        self._lines: list[str] = []
        self._corrupt_at: int | None = None

    def add(self, tag: str, entries: Sequence[Entry]) -> None:
        """Take adjacent entries of one tag."""
        at = entries[0].at
        self.end = entries[-1].end
        try:
            first = entries[0]
            if not first.is_map and first.tensors[0].type == STRING:
                self._claim([tag], at)
                self.values[tag] = self._string(entries)
            else:
                found = _joined(tag, entries)
                self._claim([tensor.name for tensor in found], at)
                self.tensors += found
        except _Fault as fault:
            self._faults += 1
            if len(self._lines) < _MOST_LISTED:
                self._lines.append(f"{tag!r} (byte {at}): {fault}")
            if fault.kind is CorruptCheckpoint and self._corrupt_at is None:
                self._corrupt_at = at

    def check(self) -> None:
        """Refuse what is wrong.

        Raises:
            CorruptCheckpoint, UnsupportedFormat: All faulty entries; or there is none at all.
        """
        url = self._text.url
        if not self._faults and not self._first_at:
            raise broken(self._text, 0, "no entry")
        if not self._faults:
            return
        more = self._faults - len(self._lines)
        message = (
            f"{url}: {self._faults} entries can't be read:\n  "
            + "\n  ".join(self._lines)
            + (f"\n  … and {more} more" if more else "")
        )
        if self._corrupt_at is None:
            raise UnsupportedFormat(message)
        raise CorruptCheckpoint(
            f"{message}\nThe file is damaged{self._text.hint}, or was not written by MindSpore; "
            "save it again.",
            path=url,
            offset_bytes=self._corrupt_at,
        )

    def _claim(self, names: Sequence[str], at: int) -> None:
        for name in names:
            if "\0" in name:
                raise _Fault("a name can't hold a NUL character", UnsupportedFormat)
            if name in self._first_at:
                raise _Fault(
                    f"{name!r} is at byte {self._first_at[name]} already, and slices of one tensor "
                    "lie side by side"
                )
            self._first_at[name] = at

    def _string(self, entries: Sequence[Entry]) -> str:
        (message,) = entries[0].tensors
        length = message.stop - message.start
        if len(entries) > 1:
            raise _Fault(f"a string comes {len(entries)} times")
        if message.dims not in {(), (0,)}:
            raise _Fault(f"dims {list(message.dims)}: a string has none", UnsupportedFormat)
        if length > self._room:
            raise _Fault(
                f"a string of {length} bytes; all strings have at most {MAX_STRINGS_BYTES}",
                UnsupportedFormat,
            )
        self._room -= length
        data = bytearray(length)
        self._text.read_into(message.start, memoryview(data))
        try:
            value = data.decode("utf-32-le")
        except UnicodeDecodeError as exc:
            raise _Fault(f"a string that isn't UTF-32: {exc.reason}") from exc
        return "" if value == "\0" else value  # numpy stores an empty string so


def _joined(tag: str, entries: Sequence[Entry]) -> list[_Tensor]:
    """Join adjacent entries of one tag: slices of a tensor or of a map parameter."""
    is_map = entries[0].is_map
    if any(entry.is_map != is_map for entry in entries):
        raise _Fault("a tensor and a map parameter of one name")
    if is_map:
        found = [
            _joined_rows(f"{tag}.{part}", [entry.tensors[index] for entry in entries])
            for index, part in enumerate(_MAP_PARTS)
        ]
        rows = [tensor.known.shape[0] for tensor in found]
        if len(set(rows)) > 1:
            raise _Fault(f"a map parameter of {' and '.join(map(str, rows))} rows")
        return found
    parts = [entry.tensors[0] for entry in entries]
    first = parts[0]
    for entry, part in zip(entries, parts, strict=True):
        if (part.dims, part.type) != (first.dims, first.type):
            raise _Fault(
                f"{first.type} of dims {list(first.dims)}, and at byte {entry.at} {part.type} of "
                f"dims {list(part.dims)}: not slices of one tensor"
            )
    # Older versions write a scalar so.
    is_scalar = first.dims == (0,) and any(part.stop > part.start for part in parts)
    dims = () if is_scalar else first.dims
    return [_Tensor.of(tag, dims, _dtype(first, _DTYPES), parts)]


def _joined_rows(name: str, parts: Sequence[TensorMessage]) -> _Tensor:
    """Join what a map parameter's slices hold of one of its tensors."""
    first = parts[0]
    for part in parts:
        if (
            not part.dims
            or part.dims[0] < 0
            or (part.dims[1:], part.type) != (first.dims[1:], first.type)
        ):
            raise _Fault(
                f"{name!r}: {first.type} of dims {list(first.dims)}, and {part.type} of dims "
                f"{list(part.dims)}: not rows of one tensor"
            )
    filled = [part for part in parts if part.stop > part.start] or [first]
    dims = (sum(part.dims[0] for part in parts), *first.dims[1:])
    return _Tensor.of(name, dims, _dtype(first, _MAP_DTYPES), filled)


def _dtype(message: TensorMessage, known: dict[str, dtypes.Dtype]) -> dtypes.Dtype:
    if message.type not in known:
        raise _Fault(f"type {message.type!r}; known are {', '.join(known)}", UnsupportedFormat)
    return known[message.type]
