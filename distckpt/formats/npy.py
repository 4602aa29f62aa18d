"""numpy's ``.npy`` format: one array. Its header is read here, since numpy's would run pickles."""

from __future__ import annotations

import io
import math
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from distckpt import dtypes
from distckpt.errors import CorruptCheckpoint, UnsupportedFormat
from distckpt.foreign import Contents, ForeignTensor, Source, tensor_bytes
from distckpt.formats.base import Place, Readable, Wanted, Writing, refuse, write_file
from distckpt.shardfile import copy_run
from distckpt.state import MAX_DIMENSIONS, MAX_TENSOR_BYTES
from distckpt.store import Sink

NAME = "npy"
SUFFIX = ".npy"
MAX_PREFIX_BYTES = 10_012  # numpy, too, reads no header of more than 10,000 bytes
BLOCK_BYTES = 4 << 20

_MAGIC = b"\x93NUMPY"
_LENGTH_BYTES = {1: 2, 2: 4, 3: 4}  # by major version
_ENTRY = re.compile(
    r"\s*'(descr|fortran_order|shape)'\s*:\s*('[^'\\]*'|\[.*\]|True|False|\([\dL,\s]*\))\s*(?:,|$)",
    re.DOTALL,
)
# Python makes no number of more than 4,300 digits. The `+` after a repetition: what it took, it
# keeps, so that there is one way to read a text, and not as many as it has spaces.
_EXTENTS = re.compile(r"\(\s*+((?:\d{1,4000}+L?\s*+,\s*+)*+)(\d{1,4000}+L?)?\s*+\)")
_PLAIN_DESCR = re.compile(r"'([<>|])([biufc]\d{1,2})'")
_VOID_DESCR = re.compile(r"'[<|]([Vf]\d{1,2})'")
_REGISTERED = 2  # numpy's mark of types that others, such as ml_dtypes, have added
_NUMPY_NAMES = {
    entry.numpy.str[1:]: entry for entry in dtypes.TABLE if entry.numpy.isbuiltin != _REGISTERED
}


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before an array's bytes.

    Attributes:
        dtype: Its type.
        shape: Its shape.
        swapped: Whether it is big-endian.
        fortran: Whether its first dimension is the fastest, where that makes a difference.
        length: Bytes before the first element.
    """

    dtype: dtypes.Dtype
    shape: tuple[int, ...]
    swapped: bool
    fortran: bool
    length: int

    @property
    def data_bytes(self) -> int:
        """Bytes of all elements."""
        return tensor_bytes(self.shape, self.dtype)


def parse_header(prefix: bytes, where: str, void: str | None) -> Header:
    """Parse an array's header.

    Args:
        prefix: The first bytes of the array's file, `MAX_PREFIX_BYTES` if it has so many.
        where: What they are from, for messages.
        void: The option of this name.

    Raises:
        CorruptCheckpoint: It is none.
        UnsupportedFormat: It is an array of something that can't be had.
    """
    if not prefix.startswith(_MAGIC):
        raise CorruptCheckpoint(
            f"{where}: a .npy file begins with {_MAGIC!r}, found {prefix[:6]!r}", offset_bytes=0
        )
    major = prefix[6] if len(prefix) > 6 else 0  # noqa: PLR2004
    if major not in _LENGTH_BYTES:
        raise UnsupportedFormat(f"{where}: version {major} of .npy; known are 1, 2 and 3")
    start = 8 + _LENGTH_BYTES[major]
    length = start + int.from_bytes(prefix[8:start], "little")
    if length > len(prefix):
        raise CorruptCheckpoint(
            f"{where}: a header of {length} bytes is said, at most {MAX_PREFIX_BYTES} are read, "
            f"and {len(prefix)} are there",
            offset_bytes=8,
        )
    text = prefix[start:length].decode("latin-1")
    entries = _parse_dict(text.strip())
    shape = _EXTENTS.fullmatch(entries.get("shape", ""))
    order = {"True": True, "False": False}.get(entries.get("fortran_order", ""))
    if shape is None or order is None or "descr" not in entries:
        raise CorruptCheckpoint(
            f"{where}: expected a header of descr, fortran_order and shape, found {text[:200]!r}",
            offset_bytes=start,
        )
    dtype, swapped = _parse_descr(entries["descr"], where, void)
    extents = tuple(int(number) for number in re.findall(r"\d+", shape[0]))
    if len(extents) > MAX_DIMENSIONS or (
        math.prod(extent or 1 for extent in extents) * dtype.itemsize > MAX_TENSOR_BYTES
    ):
        raise CorruptCheckpoint(
            f"{where}: no memory could hold an array of shape {shape[0][:200]}", offset_bytes=start
        )
    return Header(dtype, extents, swapped, order and len(extents) > 1, length)


def _parse_dict(text: str) -> dict[str, str]:
    """Take a header's dict apart; an empty one where it is none."""
    entries: dict[str, str] = {}
    if not (text.startswith("{") and text.endswith("}")):
        return {}
    inner, at = text[1:-1].rstrip(), 0
    while at < len(inner):
        found = _ENTRY.match(inner, at)
        if found is None or found[1] in entries:
            return {}
        entries[found[1]] = found[2]
        at = found.end()
    return entries


def _parse_descr(descr: str, where: str, void: str | None) -> tuple[dtypes.Dtype, bool]:
    plain = _PLAIN_DESCR.fullmatch(descr)
    if plain is not None and plain[2] in _NUMPY_NAMES:
        entry = _NUMPY_NAMES[plain[2]]
        if plain[1] != "|" or entry.itemsize == 1:
            return entry, plain[1] == ">"
    raw = _VOID_DESCR.fullmatch(descr)
    if raw is not None and void is not None:
        entry = dtypes.BY_NAME[void]
        if raw[1] == entry.numpy.str[1:]:
            return entry, False
    if descr[2:3] == "O":
        what = "Python objects, which are a pickle; pickles are never read"
    elif raw is not None:
        what = (
            "elements that numpy's files have no type for, maybe bfloat16: options={'void': "
            "'bfloat16'} says so"
        )
    elif descr.startswith("["):
        what = "records; save their fields as arrays"
    else:
        what = "elements of no type that a checkpoint can hold"
    raise UnsupportedFormat(f"{where}: an array of {what}. Its descr is {descr[:200]}")


def check_void(void: str | None) -> None:
    """Check the option.

    Raises:
        UnsupportedFormat: No such dtype.
    """
    if void is not None and void not in dtypes.BY_NAME:
        raise UnsupportedFormat(f"void={void!r} is no dtype; there are {', '.join(dtypes.BY_NAME)}")


def check_arrays(tensors: Sequence[Readable]) -> dict[str, str]:
    """Say which tensors numpy's files can't hold."""
    return {
        tensor.name: (
            f"numpy's files have no type for {tensor.dtype.name}, only raw bytes; convert it with "
            'dtype="float32", say'
        )
        for tensor in tensors
        if tensor.dtype.str[1:] not in _NUMPY_NAMES
    }


def make_header(tensor: Readable) -> bytes:
    """Make an array's header."""
    out = io.BytesIO()
    described = {
        "descr": tensor.dtype.str,
        "fortran_order": False,
        "shape": tuple(map(int, tensor.shape)),
    }
    np.lib.format.write_array_header_1_0(out, described)
    return out.getvalue()


class Kept:
    """Keeps one array that lies in Fortran order: the one that was last asked for."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.owner: ArrayReader | None = None
        self.array = np.empty(0)


class ArrayReader:
    """Reads an array in C order, little-endian, however it is stored.

    One in Fortran order is read whole at once, since each run of C order is scattered all over it.

    Args:
        header: The array's.
        read_stored: Fills a buffer with the array's bytes as stored, from a start byte on.
        kept: Where to keep such an array; shared by the readers of a file.
    """

    def __init__(
        self, header: Header, read_stored: Callable[[int, memoryview], None], kept: Kept
    ) -> None:
        self._header = header
        self._read_stored = read_stored
        self._kept = kept

    def read_into(self, start_byte: int, buffer: memoryview) -> None:
        """See `Source`."""
        dtype = self._header.dtype
        if self._header.fortran:
            first, count = start_byte // dtype.itemsize, len(buffer) // dtype.itemsize
            with self._kept.lock:
                copy_run(self._whole(), dtype, first, count, np.frombuffer(buffer, np.uint8))
                if start_byte + len(buffer) == self._header.data_bytes:
                    self._keep(None, np.empty(0))
        else:
            self._read_stored(start_byte, buffer)
            if self._header.swapped:
                np.frombuffer(buffer, dtype.numpy).byteswap(inplace=True)

    def _whole(self) -> np.ndarray:
        if self._kept.owner is not self:
            self._keep(None, np.empty(0))  # not both at once
            header = self._header
            data = np.empty(header.data_bytes, np.uint8)
            for start in range(0, len(data), BLOCK_BYTES):
                self._read_stored(start, data[start : start + BLOCK_BYTES].data)
            stored = header.dtype.numpy.newbyteorder(">" if header.swapped else "<")
            self._keep(self, data.view(stored).reshape(header.shape, order="F"))
        return self._kept.array

    def _keep(self, owner: ArrayReader | None, array: np.ndarray) -> None:
        self._kept.owner, self._kept.array = owner, array


class NpyFormat:
    """One ``.npy`` file: one array, named as the file is, without the ending.

    Options for opening:
        void: The dtype of an array that numpy calls void (``V2``), such as ``"bfloat16"``.
    """

    name = NAME
    suffixes = (SUFFIX,)

    def sniff(self, place: Place) -> bool:
        """See `Format`."""
        return place.head(len(_MAGIC)) == _MAGIC

    def open(self, place: Place, *, void: str | None = None) -> Source:
        """See `Format`."""
        check_void(void)
        return _NpyFile(place, void)

    def write(self, place: Place, wanted: Wanted) -> Writing:
        """See `Format`."""
        problems = check_arrays(wanted.tensors)
        problems |= dict.fromkeys(wanted.values, "a plain value; a .npy file holds an array")
        if len(wanted.tensors) != 1:
            extra = [tensor.name for tensor in wanted.tensors[1:]]
            problems |= dict.fromkeys(extra, "a .npy file holds one array; a .npz file several")
            if not extra:
                problems[""] = "no tensor is wanted; a .npy file holds one"
        refuse(problems, NAME)
        (tensor,) = wanted.tensors
        header = make_header(tensor)
        data_bytes = tensor_bytes(tensor.shape, dtypes.BY_NAME[tensor.dtype.name])

        def fill(sink: Sink) -> None:
            sink.write_at(0, header)
            if data_bytes:
                sink.write_at(len(header), tensor.read().reshape(-1).view(np.uint8).data)

        return write_file(place, wanted, len(header) + data_bytes, fill)


class _NpyFile:
    """An opened file; see `Source`."""

    def __init__(self, place: Place, void: str | None) -> None:
        self._place = place
        length = place.size()
        prefix = place.read(0, min(length, MAX_PREFIX_BYTES))
        self._header = parse_header(prefix, place.url, void)
        expected = self._header.length + self._header.data_bytes
        if expected != length:
            raise CorruptCheckpoint(
                f"{place.url}: {length} bytes; an array of {self._header.dtype.name} "
                f"{self._header.shape} makes {expected}",
                path=place.url,
                offset_bytes=min(expected, length),
            )
        self._reader = ArrayReader(self._header, self._read_stored, Kept())
        name = place.url.removesuffix("?…").rpartition("/")[2]
        name = name[: -len(SUFFIX)] if name.lower().endswith(SUFFIX) else name
        self.contents = Contents([ForeignTensor(name, self._header.shape, self._header.dtype)])

    def read_into(self, tensor: int, piece: int, start_byte: int, buffer: memoryview) -> None:
        """See `Source`."""
        del tensor, piece  # there is one
        self._reader.read_into(start_byte, buffer)

    def _read_stored(self, start_byte: int, buffer: memoryview) -> None:
        self._place.read_into(self._header.length + start_byte, buffer)


FORMAT = NpyFormat()
