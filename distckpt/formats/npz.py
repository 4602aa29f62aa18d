"""numpy's ``.npz`` format: a zip archive of ``.npy`` files.

Values and metadata of a checkpoint, which numpy has no place for, are kept in the archive's
comment (see `plain`).
"""

from __future__ import annotations

import io
import struct
import threading
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import IO, cast

import numpy as np

from distckpt import dtypes
from distckpt.errors import CheckpointError, CorruptCheckpoint, UnsupportedFormat
from distckpt.foreign import Contents, ForeignTensor, Source, tensor_bytes
from distckpt.formats import plain
from distckpt.formats.base import (
    MAX_EXPANSION,
    Place,
    Readable,
    Wanted,
    Writing,
    check_expansion,
    refuse,
    write_file,
)
from distckpt.formats.npy import (
    BLOCK_BYTES,
    MAX_PREFIX_BYTES,
    ArrayReader,
    Header,
    Kept,
    check_arrays,
    check_void,
    make_header,
    parse_header,
)
from distckpt.formats.npy import SUFFIX as MEMBER_SUFFIX
from distckpt.formats.safetensors import name_problem
from distckpt.store import Sink

NAME = "npz"
SUFFIX = ".npz"

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_MEMBER = b"PK\x03\x04"
_ENCRYPTED = 1
_BEST_DEFLATE = 1033  # deflate makes at most so many bytes of one
_OPEN_STREAMS = 8
_SKIP_BYTES = 1 << 20
_LARGEST_READ = 256 << 20  # an archive's directory of 2 million members
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    ValueError,
    OverflowError,
    LookupError,
)
_MAX_COMMENT_BYTES = 65_535
_MAX_MEMBER_NAME_BYTES = 65_535


class NpzFormat:
    """One ``.npz`` file, stored or deflated; written stored.

    Options for opening:
        void: The dtype of arrays that numpy calls void (``V2``), such as ``"bfloat16"``.
        max_expansion: How many times the file's length its arrays may have.
    """

    name = NAME
    suffixes = (SUFFIX,)

    def sniff(self, place: Place) -> bool:
        """See `Format`: by the first member's name, or the file's."""
        head = place.head(_LOCAL_HEADER.size + 2048)
        if place.name.lower().endswith(SUFFIX):
            return bool(head)
        if not head.startswith(_MEMBER) or len(head) < _LOCAL_HEADER.size:
            return False
        length = _LOCAL_HEADER.unpack_from(head)[9]
        name = head[_LOCAL_HEADER.size : _LOCAL_HEADER.size + length]
        return name.endswith(MEMBER_SUFFIX.encode())

    def open(
        self, place: Place, *, void: str | None = None, max_expansion: float = MAX_EXPANSION
    ) -> Source:
        """See `Format`."""
        check_void(void)
        return _NpzFile(place, void, max_expansion)

    def write(self, place: Place, wanted: Wanted) -> Writing:
        """See `Format`."""
        problems = check_arrays(wanted.tensors)
        for tensor in wanted.tensors:
            if len(tensor.name.encode()) + len(MEMBER_SUFFIX) > _MAX_MEMBER_NAME_BYTES:
                problems[tensor.name] = "a zip archive has no room for so long a name"
        comment = (plain.to_text(wanted.values, wanted.metadata) or "").encode()
        if len(comment) > _MAX_COMMENT_BYTES:
            # Metadata can be done without.
            comment = (plain.to_text(wanted.values, {}) or "").encode()
        if len(comment) > _MAX_COMMENT_BYTES:
            what = f"a plain value; .npz has room for {_MAX_COMMENT_BYTES} bytes of all of them"
            problems |= dict.fromkeys(wanted.values, what)
        refuse(problems, NAME)
        sizes = [len(make_header(one)) + _data_bytes(one) + 512 for one in wanted.tensors]

        def fill(sink: Sink) -> None:
            _write(sink, wanted.tensors, comment)

        return write_file(place, wanted, sum(sizes) + len(comment), fill)


def _data_bytes(tensor: Readable) -> int:
    return tensor_bytes(tensor.shape, dtypes.BY_NAME[tensor.dtype.name])


class _SinkFile(io.RawIOBase):
    """A sink as the file that zipfile writes to, from front to back."""

    def __init__(self, sink: Sink) -> None:
        super().__init__()
        self._sink = sink
        self._at = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def write(self, data: object) -> int:
        view = memoryview(cast("bytes", data)).cast("B")
        self._sink.write_at(self._at, view)
        self._at += len(view)
        return len(view)


def _write(sink: Sink, tensors: Sequence[Readable], comment: bytes) -> None:
    with zipfile.ZipFile(cast("IO[bytes]", _SinkFile(sink)), "w", allowZip64=True) as archive:
        for tensor in tensors:
            header = make_header(tensor)
            info = zipfile.ZipInfo(tensor.name + MEMBER_SUFFIX)
            info.file_size = len(header) + _data_bytes(tensor)
            with archive.open(info, "w") as member:
                member.write(header)
                if _data_bytes(tensor):
                    data = tensor.read().reshape(-1).view(np.uint8).data
                    for start in range(0, len(data), BLOCK_BYTES):
                        member.write(data[start : start + BLOCK_BYTES])
                    del data  # before the next tensor comes
        archive.comment = comment


# ------------------------------------------------------------------------------------------ reading


class _PlaceFile(io.RawIOBase):
    """A place as the file that zipfile reads from."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self._place = place
        self._length = place.size()
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._length)[whence])
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._length - self._at)
        count = left if size is None or size < 0 else min(size, left)
        if count > _LARGEST_READ:
            raise CorruptCheckpoint(
                f"{self._place.url}: the archive's directory has {count} bytes; at most "
                f"{_LARGEST_READ} are read",
                path=self._place.url,
                offset_bytes=self._at,
            )
        data = self._place.read(self._at, self._at + count)
        self._at += count
        return data


@dataclass(slots=True)
class _Member:
    """A member of the archive, and how far it was read in one go.

    Attributes:
        info: What the archive's directory says of it.
        start_byte: Where its bytes begin in the file.
        header: Its array's.
        header_crc: CRC32 of its array's header.
        at: One past the last byte that was read since the beginning, without a gap.
        crc: CRC32 up to there.
    """

    info: zipfile.ZipInfo
    start_byte: int
    header: Header
    header_crc: int
    at: int
    crc: int


class _NpzFile:
    """An opened file; see `Source`.

    Stored members are read where they lie. Deflated ones are streams: a few are kept open, so that
    reading on is cheap; reading back begins again.
    """

    def __init__(self, place: Place, void: str | None, max_expansion: float) -> None:
        self._place = place
        self._lock = threading.Lock()
        self._streams: OrderedDict[int, tuple[IO[bytes], int]] = OrderedDict()
        with self._translated("the archive's directory"):
            self._archive = zipfile.ZipFile(cast("IO[bytes]", _PlaceFile(place)))
        infos = self._archive.infolist()
        self._check_directory(infos)
        check_expansion(place, sum(info.file_size for info in infos), max_expansion)
        self._members = [self._member(info, void) for info in infos]
        self._check_places()
        kept = Kept()
        self._readers = [
            ArrayReader(member.header, self._reader_of(number), kept)
            for number, member in enumerate(self._members)
        ]
        values: dict[str, object] = {}
        metadata: dict[str, object] = {}
        if self._archive.comment.startswith(b"{"):
            text = self._archive.comment.decode(errors="replace")
            values, metadata = plain.from_text(text, f"{place.url}: the comment")
        tensors = [
            ForeignTensor(
                member.info.filename.removesuffix(MEMBER_SUFFIX),
                member.header.shape,
                member.header.dtype,
            )
            for member in self._members
        ]
        self.contents = Contents(tensors, values, metadata)

    def read_into(self, tensor: int, piece: int, start_byte: int, buffer: memoryview) -> None:
        """See `Source`."""
        del piece  # there is one
        self._readers[tensor].read_into(start_byte, buffer)

    def _check_directory(self, infos: Sequence[zipfile.ZipInfo]) -> None:
        """Refuse members that can't be arrays, all at once."""
        damaged: dict[str, str] = {}
        unknown: dict[str, str] = {}
        for name, count in Counter(info.filename for info in infos).items():
            if count > 1:
                damaged[name] = f"{count} members have this name"
        for info in infos:
            stored = info.compress_type == zipfile.ZIP_STORED
            problem = name_problem(info.filename)
            if problem is not None:
                damaged[info.filename[:200]] = problem
            elif not info.filename.endswith(MEMBER_SUFFIX):
                unknown[info.filename] = "no .npy file"
            elif info.flag_bits & _ENCRYPTED:
                unknown[info.filename] = "encrypted; a .npz file has no encryption"
            elif not stored and info.compress_type != zipfile.ZIP_DEFLATED:
                unknown[info.filename] = f"compressed by method {info.compress_type}"
            elif info.file_size > (info.compress_size * (1 if stored else _BEST_DEFLATE)):
                damaged[info.filename] = (
                    f"{info.file_size} bytes can't come from {info.compress_size}, "
                    f"{'stored' if stored else 'deflated'}"
                )
        for problems, error in ((damaged, CorruptCheckpoint), (unknown, UnsupportedFormat)):
            if problems:
                listed = [f"{name!r}: {what}" for name, what in problems.items()]
                raise error(
                    f"{self._place.url}: {len(listed)} members of the archive can't be read:\n  "
                    + "\n  ".join(listed[:20])
                )

    def _member(self, info: zipfile.ZipInfo, void: str | None) -> _Member:
        """Read a member's headers: the archive's, and the array's."""
        where = f"{self._place.url}: {info.filename}"
        if info.header_offset < 0:  # where zipfile takes bytes before the archive for missing
            raise self._corrupt(info, "it begins before the file does")
        fixed = self._place.read(info.header_offset, info.header_offset + _LOCAL_HEADER.size)
        magic, *_, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(fixed)
        start = info.header_offset + len(fixed) + name_bytes + extra_bytes
        if magic != _MEMBER or start + info.compress_size > self._archive.start_dir:
            raise self._corrupt(info, "no member begins here, or it ends behind the members' end")
        count = min(info.file_size, MAX_PREFIX_BYTES)
        with self._translated(info.filename), self._archive.open(info) as stream:
            prefix = stream.read(count)
        header = parse_header(prefix, where, void)
        expected = header.length + header.data_bytes
        if expected != info.file_size:
            raise self._corrupt(
                info,
                f"{info.file_size} bytes; an array of {header.dtype.name} {header.shape} makes "
                f"{expected}",
            )
        crc = zlib.crc32(prefix[: header.length])
        return _Member(info, start, header, crc, header.length, crc)

    def _check_places(self) -> None:
        """Refuse members that lie in one another."""
        end, before = 0, ""
        for member in sorted(self._members, key=lambda member: member.info.header_offset):
            if member.info.header_offset < end:
                raise self._corrupt(member.info, f"it overlaps {before}, which ends at byte {end}")
            end, before = member.start_byte + member.info.compress_size, member.info.filename

    def _reader_of(self, number: int) -> Callable[[int, memoryview], None]:
        member = self._members[number]
        if member.info.compress_type == zipfile.ZIP_STORED:
            return partial(self._read_stored, member)
        return partial(self._read_deflated, number)

    def _read_stored(self, member: _Member, start_byte: int, buffer: memoryview) -> None:
        at = member.header.length + start_byte
        self._place.read_into(member.start_byte + at, buffer)
        with self._lock:
            if not start_byte:
                member.at, member.crc = at, member.header_crc
            if at != member.at:
                return  # not read from end to end
            member.at, member.crc = at + len(buffer), zlib.crc32(buffer, member.crc)
            if member.at == member.info.file_size and member.crc != member.info.CRC:
                raise self._corrupt(
                    member.info,
                    f"damaged: its CRC32 is {member.crc:08x}, saved was {member.info.CRC:08x}",
                )

    def _read_deflated(self, number: int, start_byte: int, buffer: memoryview) -> None:
        member = self._members[number]
        wanted = member.header.length + start_byte
        with self._lock, self._translated(member.info.filename):
            stream, at = self._streams.pop(number, (None, 0))
            if stream is None or at > wanted:
                stream, at = self._archive.open(member.info), 0
            while at < wanted:
                at += len(self._inflate(member, stream, min(wanted - at, _SKIP_BYTES)))
            done = 0
            while done < len(buffer):
                data = self._inflate(member, stream, min(len(buffer) - done, _SKIP_BYTES))
                buffer[done : done + len(data)] = data
                done += len(data)
            if at + done < member.info.file_size:
                self._streams[number] = stream, at + done
                while len(self._streams) > _OPEN_STREAMS:
                    self._streams.popitem(last=False)

    def _inflate(self, member: _Member, stream: IO[bytes], count: int) -> bytes:
        """Read on; zipfile checks the CRC32 with the last byte."""
        data = stream.read(count)
        if not data:
            raise self._corrupt(member.info, "its bytes end before the array does")
        return data

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """Turn zipfile's errors into ours."""
        try:
            yield
        except CheckpointError:
            raise
        except NotImplementedError as exc:
            raise UnsupportedFormat(f"{self._place.url}: {what}: {exc}") from exc
        except (*_ZIP_ERRORS, RuntimeError) as exc:
            raise CorruptCheckpoint(
                f"{self._place.url}: {what} can't be read: {exc}", path=self._place.url
            ) from exc

    def _corrupt(self, info: zipfile.ZipInfo, found: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(
            f"{self._place.url}: {info.filename}: {found}",
            path=self._place.url,
            offset_bytes=info.header_offset,
        )


FORMAT = NpzFormat()
