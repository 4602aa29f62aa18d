"""MindSpore's ``.ckpt`` files: plain, sliced, with a CRC, encrypted.

Where MindSpore 2.10 reads a damaged file in silence, this refuses it: the content of all slices of
a tensor must be as long as its shape says, slices lie side by side, and no name comes twice.

- Strings are plain values. All else is a tensor; a number that `save_checkpoint` was given in its
  ``append_dict`` is one of shape ``()``.
- ``dims`` of ``[0]`` mean ``()`` if there is one element of content, which older versions wrote,
  and ``(0,)`` if there is none.
- ``Int4`` holds two numbers a byte along the last dimension, the lower half first, and MindSpore
  counts bytes: its ``(2, 3)`` are ``(2, 6)`` elements of int4.
- A map parameter ``m`` becomes the tensors ``m.key``, ``m.value`` and ``m.status``.
- Names keep MindSpore's own endings, such as ``.__param_key__1``.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

from distckpt import dtypes
from distckpt.errors import UnsupportedFormat
from distckpt.formats.base import Place, Readable, Wanted, Writing, refuse, write_file
from distckpt.formats.mindspore_crypt import (
    FRAME_BYTES,
    Encryptor,
    Key,
    encrypted_bytes,
    mode_of,
)
from distckpt.formats.mindspore_source import (
    INT4,
    LOADABLE,
    MAX_STRINGS_BYTES,
    STRING,
    MindSporeSource,
)
from distckpt.formats.mindspore_wire import (
    CRC_BYTES,
    CRC_MARK,
    MAX_ENTRIES,
    entry_head,
    looks_like_entry,
)
from distckpt.region import Region
from distckpt.state import MAX_NAME_BYTES
from distckpt.store import Sink

# What its slices have at most, and ours exactly.
SLICE_BYTES = 512 << 20

_HEAD_BYTES = 4096
_TYPES = {dtypes.BY_NAME[name].numpy: kind for kind, name in LOADABLE.items()}


class _Output:
    """Puts bytes at the end of a sink."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._at = 0

    def write(self, data: memoryview) -> None:
        self._sink.write_at(self._at, data)
        self._at += len(data)


@dataclass(frozen=True, slots=True)
class _Item:
    """What becomes one entry, or several slices."""

    name: str
    dims: tuple[int, ...]
    type: str
    length: int
    source: Readable | bytes

    @classmethod
    def of_tensor(cls, tensor: Readable) -> _Item | str:
        """Make one of a tensor, or say why there is none."""
        problem = _name_problem(tensor.name)
        if problem:
            return problem
        kind = _TYPES.get(tensor.dtype)
        if kind is None:
            return f"MindSpore loads no file with a {tensor.dtype}"
        dims = tensor.shape
        if kind == INT4:
            if not dims or dims[-1] % 2:
                return "int4 of an odd last dimension; MindSpore holds two in a byte"
            dims = (*dims[:-1], dims[-1] // 2)
        return cls(tensor.name, dims, kind, math.prod(dims) * tensor.dtype.itemsize, tensor)

    @classmethod
    def of_value(cls, name: str, value: object) -> _Item | str:
        """Make one of a plain value, or say why there is none."""
        problem = _name_problem(name)
        if problem:
            return problem
        if isinstance(value, str):
            return cls._of_string(name, value)
        if isinstance(value, bool):
            data, kind = np.bool_(value).tobytes(), "Bool"
        elif isinstance(value, int):
            if not -(1 << 63) <= value < 1 << 63:
                return f"the int {value} has more than 64 bits"
            data, kind = value.to_bytes(8, "little", signed=True), "Int64"
        elif isinstance(value, float):
            # MindSpore's save_checkpoint makes it Float32, which isn't what it was given.
            data, kind = np.float64(value).astype("<f8").tobytes(), "Float64"
        else:
            return f"a plain value of type {type(value).__name__}"
        return cls(name, (), kind, len(data), data)

    @classmethod
    def _of_string(cls, name: str, value: str) -> _Item | str:
        if value.endswith("\0"):
            return "a string that ends with NUL, which MindSpore drops"
        try:
            data = (value or "\0").encode("utf-32-le")
        except UnicodeEncodeError as exc:
            return f"a string that isn't valid Unicode ({exc.reason})"
        if len(data) > MAX_STRINGS_BYTES:
            return f"a string of {len(data)} bytes; it has at most {MAX_STRINGS_BYTES}"
        return cls(name, (0,), STRING, len(data), data)

    def slices(self, slice_bytes: int) -> Iterator[tuple[bytes, int, int]]:
        """Yield each slice's head, and which bytes it has; an empty tensor has one, too."""
        if self.type == STRING:
            slice_bytes = self.length  # MindSpore can't join them
        for start in range(0, self.length or 1, slice_bytes):
            stop = min(start + slice_bytes, self.length)
            yield entry_head(self.name, self.dims, self.type, stop - start), start, stop

    def parts(self, slice_bytes: int) -> Iterator[memoryview]:
        """Read it, and yield its bytes in the file."""
        data = self.data()
        for head, start, stop in self.slices(slice_bytes):
            yield memoryview(head)
            yield data[start:stop]

    def data(self, region: Region | None = None) -> memoryview:
        """Read it, or a box of it."""
        if isinstance(self.source, bytes):
            return memoryview(self.source)
        array = np.ascontiguousarray(self.source.read(region))
        raw: np.ndarray = array.reshape(-1).view(np.uint8)
        if self.type == INT4:
            raw = raw[::2] & 0x0F | raw[1::2] << 4
        return raw.data

    def looks_like_suffix(self) -> bool:
        """Whether its last bytes do; reads little more than them."""
        if self.length < CRC_BYTES:
            return False
        region = None if isinstance(self.source, bytes) else _tail(self.source)
        return bytes(self.data(region)[-CRC_BYTES:]).startswith(CRC_MARK)


def _tail(tensor: Readable) -> Region:
    """Return a small box that has the tensor's last bytes, in order."""
    stop = tensor.shape
    start = [0] * len(stop)
    inner = tensor.dtype.itemsize
    for axis in reversed(range(len(stop))):
        # Twice as many as needed, and even: int4 goes in pairs.
        start[axis] = max(0, stop[axis] - -(-4 * CRC_BYTES // inner) // 2 * 2)
        inner *= stop[axis]
        if inner >= 2 * CRC_BYTES:
            start[:axis] = [extent - 1 for extent in stop[:axis]]
            break
    return Region(tuple(start), stop)


def _name_problem(name: str) -> str | None:
    try:
        length = len(name.encode())
    except UnicodeEncodeError as exc:
        return f"a name that isn't valid Unicode ({exc.reason})"
    return None if length <= MAX_NAME_BYTES else f"a name of {length} bytes"


class MindSporeFormat:
    """MindSpore's ``.ckpt``.

    Options of `open`: see `MindSporeSource`. Options of `write`:

    - ``crc``: Add the CRC suffix. Not together with a key: MindSpore can't read both.
    - ``key``, ``mode``: Encrypt.
    - ``slice_bytes``: Where a tensor is cut; MindSpore's 512 MiB by default.
    - ``frame_bytes``: Text of one encrypted frame; MindSpore's 64 MiB by default, and at most.
    """

    name = "mindspore"
    suffixes = (".ckpt",)

    def sniff(self, place: Place) -> bool:
        """See `Format`."""
        is_named = place.name.endswith(self.suffixes)
        head = place.head(_HEAD_BYTES)
        if not head:
            return is_named and place.is_file()
        return mode_of(head) is not None or looks_like_entry(head, if_cut=is_named)

    def open(
        self,
        place: Place,
        *,
        key: bytes | None = None,
        mode: str = "AES-GCM",
        check_crc: bool | None = None,
    ) -> MindSporeSource:
        """See `Format`, and `MindSporeSource` for the options."""
        return MindSporeSource(place, key=key, mode=mode, check_crc=check_crc)

    def write(
        self,
        place: Place,
        wanted: Wanted,
        *,
        crc: bool = False,
        key: bytes | None = None,
        mode: str = "AES-GCM",
        slice_bytes: int = SLICE_BYTES,
        frame_bytes: int = FRAME_BYTES,
    ) -> Writing:
        """See `Format`, and the class for the options."""
        if crc and key is not None:
            raise UnsupportedFormat(
                f"{place.url}: crc= and key= exclude each other: MindSpore can't read such a file; "
                "AES-GCM authenticates by itself"
            )
        if slice_bytes <= 0 or not 0 < frame_bytes <= FRAME_BYTES:
            raise UnsupportedFormat(
                f"slice_bytes={slice_bytes}, frame_bytes={frame_bytes}: both are positive, and "
                f"frames have at most {FRAME_BYTES}"
            )
        checked = None if key is None else Key(key, mode)
        items = _items(wanted)
        count = length = 0
        for item in items:
            for head, start, stop in item.slices(slice_bytes):
                count += 1
                length += len(head) + stop - start
        if count > MAX_ENTRIES:
            raise UnsupportedFormat(
                f"{place.url}: {count} entries to write; a .ckpt has at most {MAX_ENTRIES}"
            )

        def fill(sink: Sink) -> None:
            # MindSpore cuts off whatever looks like a suffix, and can't read the rest then: so a
            # file whose data end so gets a true one.
            has_suffix = crc or items[-1].looks_like_suffix()
            write = _Output(sink).write
            if checked is not None:
                text_bytes = length + CRC_BYTES * has_suffix
                write = Encryptor(checked, text_bytes, write, frame_bytes=frame_bytes).write
            found = 0
            for part in chain.from_iterable(item.parts(slice_bytes) for item in items):
                write(part)
                if has_suffix:
                    found = zlib.crc32(part, found)
                part.release()  # lets go of the tensor before the next is read
            if has_suffix:
                write(memoryview(CRC_MARK + found.to_bytes(10)))

        size = length if checked is None else encrypted_bytes(checked.mode, length, frame_bytes)
        return write_file(place, wanted, size, fill)


def _items(wanted: Wanted) -> list[_Item]:
    """Say what the entries will be.

    Raises:
        UnsupportedFormat: Some can't be: all of them; or there is none.
    """
    problems: dict[str, str] = {}
    items = []
    made: Iterator[tuple[str, _Item | str]] = chain(
        ((tensor.name, _Item.of_tensor(tensor)) for tensor in wanted.tensors),
        ((name, _Item.of_value(name, value)) for name, value in wanted.values.items()),
    )
    for name, item in made:
        if isinstance(item, str):
            problems[name] = item
        else:
            items.append(item)
    refuse(problems, MindSporeFormat.name)
    if not items:
        raise UnsupportedFormat("nothing to write: MindSpore can't load a .ckpt with no entry")
    return items


FORMAT = MindSporeFormat()
