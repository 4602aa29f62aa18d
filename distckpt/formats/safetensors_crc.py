"""The checksum that MindSpore puts into a safetensors file."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from distckpt.errors import CorruptCheckpoint
from distckpt.foreign import ForeignTensor
from distckpt.formats.base import Place

CRC_KEY = "crc_num"

_BLOCK_BYTES = 4 << 20
_MOST_ZEROS = 1 << 30


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor, and where its bytes lie behind the header.

    Attributes:
        tensor: The tensor.
        start: Its first byte.
        stop: One past its last.
    """

    tensor: ForeignTensor
    start: int
    stop: int


class MindSporeCrc:
    """MindSpore's checksum over the whole file, checked once: when the first tensor is read.

    Args:
        place: The file.
        expected: The checksum, as the header has it.
        data_start: Where its tensors' bytes begin.
        entries: All its tensors.

    Raises:
        CorruptCheckpoint: It is no checksum.
    """

    def __init__(
        self, place: Place, expected: str, data_start: int, entries: Sequence[Entry]
    ) -> None:
        if not (expected.isascii() and expected.isdigit() and len(expected) <= 10):  # noqa: PLR2004
            raise CorruptCheckpoint(
                f"{place.url}: {CRC_KEY} in the header is a decimal CRC32, found {expected[:50]!r}",
                path=place.url,
            )
        self._place = place
        self._data_start = data_start
        self._expected = int(expected)
        self._entries = sorted(entries, key=lambda entry: entry.tensor.name)
        self._lock = threading.Lock()
        self._found: set[int] | None = None

    def check(self) -> None:
        """Raise CorruptCheckpoint if the file is damaged."""
        with self._lock:
            if self._found is None:
                self._found = self._compute()
        if self._expected not in self._found:
            raise CorruptCheckpoint(
                f"{self._place.url}: damaged: the CRC32 of all tensors is {min(self._found)}, "
                f"MindSpore wrote {self._expected} ({CRC_KEY})",
                path=self._place.url,
                offset_bytes=self._data_start,
            )

    def _compute(self) -> set[int]:
        """CRC32 of names and bytes, sorted by name.

        MindSpore 2.10 takes ``bytes(array)`` of the arrays, which for a whole number without
        dimensions are as many zeros as it says. Both readings count as good.
        """
        right = literal = 0
        zeros_left = _MOST_ZEROS
        for entry in self._entries:
            name, kind = entry.tensor.name.encode(), entry.tensor.dtype.numpy.kind
            right, literal = zlib.crc32(name, right), zlib.crc32(name, literal)
            is_number = kind in "iu" and not entry.tensor.shape
            data = b""
            for start in range(entry.start, entry.stop, _BLOCK_BYTES):
                stop = min(start + _BLOCK_BYTES, entry.stop)
                data = self._place.read(self._data_start + start, self._data_start + stop)
                right = zlib.crc32(data, right)
                literal = literal if is_number else zlib.crc32(data, literal)
            if is_number:
                said = int.from_bytes(data, "little", signed=kind == "i")
                zeros = max(0, min(said, zeros_left))
                zeros_left -= zeros
                for start in range(0, zeros, _BLOCK_BYTES):
                    literal = zlib.crc32(bytes(min(_BLOCK_BYTES, zeros - start)), literal)
        return {right, literal}
