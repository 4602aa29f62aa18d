"""The archives of torch.save, as they are read: zip files of a pickle and of storages."""

from __future__ import annotations

import io
import math
import struct
import threading
import zipfile
import zlib

import numpy as np

from distckpt.errors import CorruptCheckpoint, UnsupportedFormat
from distckpt.formats.base import Place
from distckpt.formats.torch_pickle import MAX_PICKLE_BYTES, Stored, load

LOCAL_BYTES = 30
_BLOCK = 4 << 20
# What a file may claim beyond what it holds: an expanded tensor has one place for many elements.
_MAX_EXPANDED_BYTES = 1 << 26


class Window(io.RawIOBase):
    """A range of a place's bytes as a file, which never takes memory for more than there is."""

    def __init__(self, place: Place, start_byte: int, stop_byte: int) -> None:
        super().__init__()
        self._place, self._start, self._length = place, start_byte, stop_byte - start_byte
        self._at = 0

    def seekable(self) -> bool:
        """Say yes."""
        return True

    def readable(self) -> bool:
        """Say yes."""
        return True

    def tell(self) -> int:
        """Where the next byte is read."""
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        """See `io.IOBase.seek`."""
        at = offset + (0, self._at, self._length)[whence]
        if at < 0:
            raise ValueError(f"a seek to byte {at}")
        self._at = at
        return at

    def read(self, size: int | None = -1) -> bytes:
        """Read up to so many bytes."""
        left = max(self._length - self._at, 0)
        count = left if size is None or size < 0 else min(size, left)
        data = self._place.read(self._start + self._at, self._start + self._at + count)
        self._at += count
        return data


class Archive:
    """An archive of torch.save, in a file or in a range of one.

    Args:
        place: The file.
        start_byte: Where the archive begins in it.
        stop_byte: Where it ends; the end of the file by default.

    Attributes:
        root: What was saved: see `torch_pickle.load`.
        pickle_bytes: Length of its pickle.

    Raises:
        CorruptCheckpoint: It's no such archive, or cut short.
        UnsupportedFormat: It holds more than weights.
    """

    def __init__(self, place: Place, start_byte: int = 0, stop_byte: int | None = None) -> None:
        self._place = place
        self._start = start_byte
        self._stop = place.size() if stop_byte is None else stop_byte
        self._gathered = threading.Lock()
        self._last: tuple[Stored, np.ndarray] | None = None
        self._checking = threading.Lock()
        self._checked: dict[str, tuple[int, int]] = {}  # entry → bytes seen from its start, CRC
        infos = self._directory()
        roots = [name for name in infos if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(roots) != 1:
            raise self._corrupt(
                f"expected one entry …/data.pkl in the archive, found {len(roots)}: it is no file "
                "of torch.save"
            )
        prefix = roots[0].removesuffix("data.pkl")
        if f"{prefix}constants.pkl" in infos:
            raise UnsupportedFormat(
                f"{place.url}: a TorchScript program, not weights; save "
                "torch.jit.load(path).state_dict() with torch.save"
            )
        self._records = {
            name.removeprefix(prefix): info
            for name, info in infos.items()
            if name.startswith(prefix)
        }
        order = self._read("byteorder", 16) if "byteorder" in self._records else b"little"
        if order not in {b"little", b"big"}:
            raise self._corrupt(f"entry byteorder: expected little or big, found {order!r}")
        self._swapped = order == b"big"
        data = self._read("data.pkl", MAX_PICKLE_BYTES)
        self.pickle_bytes = len(data)
        self.root = load(data, f"{place.url}: {roots[0]}")

    def _directory(self) -> dict[str, zipfile.ZipInfo]:
        try:
            with zipfile.ZipFile(Window(self._place, self._start, self._stop)) as archive:
                infos = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OSError) as exc:
            if isinstance(exc, CorruptCheckpoint):
                raise
            raise self._corrupt(
                f"expected a zip archive's directory at the end of its {self._stop - self._start} "
                f"bytes: {exc}; is the file whole? Copy it again"
            ) from exc
        found: dict[str, zipfile.ZipInfo] = {}
        for info in infos:
            if info.filename in found:
                raise self._corrupt(f"two entries {info.filename!r}")
            found[info.filename] = info
        claimed = sum(info.file_size for info in infos)
        if claimed > self._stop - self._start:
            raise self._corrupt(
                f"its entries claim {claimed} bytes, and the archive has {self._stop - self._start}"
            )
        return found

    def _record(self, name: str) -> tuple[int, int]:
        """Find where an entry's bytes lie: start and stop in the place."""
        info = self._records.get(name)
        if info is None:
            raise self._corrupt(f"the archive has no entry {name!r}, which its pickle names")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise UnsupportedFormat(
                f"{self._place.url}: entry {name!r} is compressed or encrypted, which torch never "
                "does; save it again with torch.save"
            )
        header = self._start + info.header_offset
        if info.header_offset < 0 or header + LOCAL_BYTES > self._stop:
            raise self._corrupt(f"entry {name!r} begins at byte {header}, beyond the end", header)
        local = self._place.read(header, header + LOCAL_BYTES)
        name_bytes, extra_bytes = struct.unpack_from("<HH", local, 26)
        start = header + LOCAL_BYTES + name_bytes + extra_bytes
        if local[:4] != b"PK\x03\x04" or start + info.file_size > self._stop:
            raise self._corrupt(
                f"entry {name!r}: expected its header and {info.file_size} bytes at byte {header} "
                f"of {self._stop}",
                header,
            )
        return start, start + info.file_size

    def _read(self, name: str, limit_bytes: int) -> bytes:
        start, stop = self._record(name)
        if stop - start > limit_bytes:
            raise self._corrupt(f"entry {name!r} has {stop - start} bytes, at most {limit_bytes}")
        data = self._place.read(start, stop)
        self._verify(name, 0, memoryview(data))
        return data

    def _verify(self, name: str, at: int, data: memoryview) -> None:
        """Follow the checksum of an entry that is read from its start to its end.

        torch writes 0 where it was told to write no checksums; what is read in part isn't checked.
        """
        info = self._records[name]
        if not info.CRC:
            return
        with self._checking:
            seen, crc = self._checked.pop(name, (0, 0)) if at else (0, 0)
        if seen != at:
            return
        crc = zlib.crc32(data, crc)
        if at + len(data) < info.file_size:
            with self._checking:
                self._checked[name] = at + len(data), crc
        elif crc != info.CRC:
            raise self._corrupt(
                f"entry {name!r} is damaged: its bytes have the CRC-32 {crc:08x}, expected "
                f"{info.CRC:08x}; copy the file again"
            )

    def _corrupt(self, what: str, offset_bytes: int | None = None) -> CorruptCheckpoint:
        where = f" at byte {self._start}" if self._start else ""
        url = self._place.url
        return CorruptCheckpoint(f"{url}{where}: {what}", path=url, offset_bytes=offset_bytes)

    def check(self, name: str, tensor: Stored) -> None:
        """Check that a tensor lies in its storage, before memory is taken for it.

        Raises:
            CorruptCheckpoint: It doesn't.
            UnsupportedFormat: An expanded tensor that is far larger than its storage.
        """
        start, stop = self._record(f"data/{tensor.storage.key}")
        held = stop - start
        needed = tensor.span[1] * tensor.dtype.itemsize
        if needed > held:
            raise self._corrupt(
                f"tensor {name!r} of {tensor.dtype.name}{list(tensor.shape)} needs {needed} bytes "
                f"of storage {tensor.storage.key!r}, which has {held}",
                start,
            )
        size = math.prod(tensor.shape) * tensor.dtype.itemsize
        if size > max(held, _MAX_EXPANDED_BYTES):
            raise UnsupportedFormat(
                f"{self._place.url}: tensor {name!r} is expanded: {size} bytes of {held} stored; "
                "save its .contiguous()"
            )

    def read_into(self, tensor: Stored, start_byte: int, buffer: memoryview) -> None:
        """Fill a buffer with bytes of a tensor, as if it lay little-endian in C order."""
        if tensor.contiguous:
            name = f"data/{tensor.storage.key}"
            at = tensor.offset * tensor.dtype.itemsize + start_byte
            self._place.read_into(self._record(name)[0] + at, buffer)
            self._verify(name, at, buffer)
            if self._swapped:
                np.frombuffer(buffer, _unit(tensor)).byteswap(inplace=True)
            return
        with self._gathered:
            if self._last is None or self._last[0] != tensor:
                self._last = None
                self._last = tensor, self._gather(tensor)
            flat = self._last[1].reshape(-1).view(np.uint8)
            stop = start_byte + len(buffer)
            buffer[:] = flat[start_byte:stop].data
            if stop == len(flat):
                self._last = None

    def _gather(self, tensor: Stored) -> np.ndarray:
        """Read what a strided tensor spans, and lay it out anew."""
        itemsize = tensor.dtype.itemsize
        first, last = (element * itemsize for element in tensor.span)
        name = f"data/{tensor.storage.key}"
        at = self._record(name)[0]
        data = np.empty(last - first, np.uint8)
        for done in range(0, len(data), _BLOCK):
            block = data[done : done + _BLOCK].data
            self._place.read_into(at + first + done, block)
            self._verify(name, first + done, block)
        if self._swapped:
            data.view(_unit(tensor)).byteswap(inplace=True)
        strides = tuple(step * itemsize for step in tensor.stride)
        view = np.ndarray(tensor.shape, tensor.dtype.numpy, data.data, 0, strides)
        return np.ascontiguousarray(view)


def _unit(tensor: Stored) -> np.dtype:
    """Return the integer whose bytes are swapped: a complex number's parts are swapped each."""
    parts = 2 if tensor.dtype.numpy.kind == "c" else 1
    return np.dtype(f"u{tensor.dtype.itemsize // parts}")
