"""Encrypted MindSpore ``.ckpt`` files: frames of at most 64 MiB of text, one after the other.

All numbers are little-endian; ``rest`` counts the bytes from the length of the IV on::

    AES-GCM           u32 0x7F3A5ED8 | tag16 | i32 rest | i32 16 | iv16 | i32 length | ciphertext
    AES-CBC, SM4-CBC  u32 0x7F3A5ED9, …DA    | i32 rest | i32 16 | iv16 | i32 length | ciphertext

GCM's nonce is the first 12 bytes of the IV, and nothing but the ciphertext is authenticated. CBC is
padded as PKCS #7 and authenticates nothing.

Any range is decrypted by itself, in little memory: GCM is a counter mode, and of CBC a block needs
the block before it only. The tag of a GCM frame is checked before the first of its bytes is used.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any

from distckpt.errors import CorruptCheckpoint, UnsupportedFormat
from distckpt.formats.base import Place, library
from distckpt.formats.mindspore_wire import CRC_BYTES, CRC_MARK

FRAME_BYTES = 64 << 20

# More frames than 64 TiB have; each costs some hundred bytes of memory.
_MAX_FRAMES = 1 << 20
_BLOCK = 16
_IV_BYTES = 16
_NONCE_BYTES = 12
_STEP_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Mode:
    """A way to encrypt.

    Attributes:
        name: As MindSpore calls it.
        magic: First bytes of a frame.
        algorithm: Name of the block cipher in `cryptography`.
        key_bytes: Lengths that a key may have.
    """

    name: str
    magic: bytes
    algorithm: str
    key_bytes: tuple[int, ...]

    @property
    def authenticates(self) -> bool:
        """Whether a frame has a tag."""
        return self.name == "AES-GCM"

    @property
    def head_bytes(self) -> int:
        """Bytes of a frame before its ciphertext."""
        return 48 if self.authenticates else 32

    def cipher_bytes(self, text_bytes: int) -> int:
        """How long the ciphertext of a frame is."""
        return text_bytes if self.authenticates else (text_bytes // _BLOCK + 1) * _BLOCK


_MODES = {
    mode.name: mode
    for mode in (
        Mode("AES-GCM", struct.pack("<I", 0x7F3A5ED8), "AES", (16, 24, 32)),
        Mode("AES-CBC", struct.pack("<I", 0x7F3A5ED9), "AES", (16, 24, 32)),
        Mode("SM4-CBC", struct.pack("<I", 0x7F3A5EDA), "SM4", (16,)),
    )
}


def mode_of(head: bytes) -> str | None:
    """Name the mode that a file's first bytes stand for; None if it isn't encrypted."""
    return next((mode.name for mode in _MODES.values() if head.startswith(mode.magic)), None)


class Key:
    """A key and the mode that it is for.

    Args:
        key: The key.
        mode: Name of the mode.

    Raises:
        UnsupportedFormat: They don't go together, or `cryptography` is missing.
    """

    def __init__(self, key: bytes, mode: str) -> None:
        if mode not in _MODES:
            raise UnsupportedFormat(f"mode={mode!r}: MindSpore has {', '.join(_MODES)}")
        self.mode = _MODES[mode]
        if not isinstance(key, bytes):
            raise UnsupportedFormat(f"key= is bytes, not {type(key).__name__}")  # never the key
        if len(key) not in self.mode.key_bytes:
            lengths = " or ".join(map(str, self.mode.key_bytes))
            raise UnsupportedFormat(f"key= of {len(key)} bytes: {mode} needs {lengths}")
        module = "cryptography.hazmat.primitives.ciphers"
        self._ciphers = library(module, extra="crypto", format="encrypted MindSpore")
        algorithms = library(f"{module}.algorithms", extra="crypto", format="encrypted MindSpore")
        self._algorithm = getattr(algorithms, self.mode.algorithm)(key)

    def cipher(self, kind: str, *arguments: bytes) -> Any:
        """Make a cipher of a mode of operation: ``CBC``, ``CTR`` or ``GCM``."""
        return self._ciphers.Cipher(self._algorithm, getattr(self._ciphers.modes, kind)(*arguments))


@dataclass(frozen=True, slots=True)
class _Frame:
    at: int
    iv: bytes
    tag: bytes
    length: int

    @property
    def nonce(self) -> bytes:
        return self.iv[:_NONCE_BYTES]


class CipherText:
    """The text of an encrypted file.

    Args:
        place: The file.
        key: Its key.

    Raises:
        CorruptCheckpoint: A frame is cut short or broken, or the key is wrong.
    """

    def __init__(self, place: Place, key: Key) -> None:
        self._place = place
        self._key = key
        self.url = f"{place.url} (decrypted)"
        self.hint = "" if key.mode.authenticates else ", or the key is wrong"
        self._frames: list[_Frame] = []
        self._starts = [0]  # of each frame's text, and the end of the last
        self._verified: set[int] = set()
        self._lock = Lock()
        at, stop = 0, place.size()
        while at < stop and not self._is_suffix(at, stop):
            frame = self._frame(at, stop)
            if len(self._frames) == _MAX_FRAMES:
                raise self._broken(at, f"more than {_MAX_FRAMES} frames")
            self._frames.append(frame)
            padding = 0 if key.mode.authenticates else self._padding(frame)
            self._starts.append(self._starts[-1] + frame.length - padding)
            at = frame.at + frame.length
        self.length = self._starts[-1]

    def _is_suffix(self, at: int, stop: int) -> bool:
        # MindSpore, asked for both a key and a CRC, writes a CRC of nothing after the frames, and
        # can't read its file again.
        return stop - at == CRC_BYTES and self._place.read(at, stop).startswith(CRC_MARK)

    def _frame(self, at: int, stop: int) -> _Frame:
        mode = self._key.mode
        if stop - at < mode.head_bytes:
            raise self._broken(at, f"a frame's head of {mode.head_bytes} bytes is cut short")
        head = self._place.read(at, at + mode.head_bytes)
        if not head.startswith(mode.magic):
            raise self._broken(
                at, f"a frame begins with {mode.magic.hex()} in {mode.name}, not {head[:4].hex()}"
            )
        rest, iv_bytes = struct.unpack_from("<ii", head, len(head) - 28)
        (length,) = struct.unpack_from("<i", head, len(head) - 4)
        left = stop - at - len(head)
        if iv_bytes != _IV_BYTES or rest != 4 + _IV_BYTES + 4 + length:
            raise self._broken(at, f"a frame's lengths ({rest}, {iv_bytes}, {length}) disagree")
        if not 0 < length <= left:
            raise self._broken(at, f"a frame of {length} bytes where {left} are left")
        if not mode.authenticates and length % _BLOCK:
            raise self._broken(at, f"a frame of {length} bytes, which no whole blocks make")
        iv = head[len(head) - 4 - _IV_BYTES : len(head) - 4]
        tag = head[4:20] if mode.authenticates else b""
        return _Frame(at + len(head), iv, tag, length)

    def _broken(self, at: int, what: str) -> CorruptCheckpoint:
        url = self._place.url
        return CorruptCheckpoint(
            f"{url}: byte {at}: {what}: the encrypted file is damaged or cut short",
            path=url,
            offset_bytes=at,
        )

    def _wrong_key(self, frame: _Frame) -> CorruptCheckpoint:
        url = self._place.url
        return CorruptCheckpoint(
            f"{url}: bytes {frame.at}:{frame.at + frame.length} do not decrypt as "
            f"{self._key.mode.name}: the key is wrong, or they are damaged",
            path=url,
            offset_bytes=frame.at,
        )

    def _padding(self, frame: _Frame) -> int:
        last = self._cbc(frame, frame.length - _BLOCK, frame.length)
        count = last[-1]
        if not 0 < count <= _BLOCK or last[-count:] != bytes([count]) * count:
            raise self._wrong_key(frame)
        return count

    def read_into(self, start_byte: int, buffer: memoryview) -> None:
        """See `Text`."""
        done = 0
        while done < len(buffer):
            at = start_byte + done
            index = bisect_right(self._starts, at) - 1
            # Not past the end: a text is asked only for what lies in it.
            first, end = self._starts[index], self._starts[index + 1]
            stop = min(start_byte + len(buffer), end, at + _STEP_BYTES)
            part = self._decrypt(index, at - first, stop - first)
            buffer[done : done + len(part)] = part
            done += len(part)

    def _decrypt(self, index: int, start: int, stop: int) -> bytes:
        """Decrypt a range of a frame's text."""
        frame = self._frames[index]
        before = start % _BLOCK
        first = start - before
        if not self._key.mode.authenticates:
            return self._cbc(frame, first, -(-stop // _BLOCK) * _BLOCK)[before : stop - first]
        with self._lock:
            if index not in self._verified:
                self._verify(frame)
                self._verified.add(index)
        # GCM counts its blocks from 1, and the first is the tag's.
        counter = frame.nonce + (2 + first // _BLOCK).to_bytes(4)
        data = self._bytes(frame.at + first, frame.at + stop)
        text: bytes = self._key.cipher("CTR", counter).decryptor().update(data)
        return text[before:]

    def _cbc(self, frame: _Frame, start: int, stop: int) -> bytes:
        """Decrypt whole blocks."""
        if start:
            data = self._bytes(frame.at + start - _BLOCK, frame.at + stop)
            iv, data = bytes(data[:_BLOCK]), data[_BLOCK:]
        else:
            iv, data = frame.iv, self._bytes(frame.at, frame.at + stop)
        text: bytes = self._key.cipher("CBC", iv).decryptor().update(data)
        return text

    def _bytes(self, start: int, stop: int) -> memoryview:
        buffer = memoryview(bytearray(stop - start))
        self._place.read_into(start, buffer)
        return buffer

    def _verify(self, frame: _Frame) -> None:
        exceptions = library("cryptography.exceptions", extra="crypto", format="MindSpore")
        decryptor = self._key.cipher("GCM", frame.nonce, frame.tag).decryptor()
        for start in range(0, frame.length, _STEP_BYTES):
            stop = min(start + _STEP_BYTES, frame.length)
            decryptor.update(self._bytes(frame.at + start, frame.at + stop))
        try:
            decryptor.finalize()
        except exceptions.InvalidTag:
            raise self._wrong_key(frame) from None


class Encryptor:
    """Encrypts a text as it comes; holds one frame of it in memory.

    Args:
        key: The key.
        text_bytes: How long the whole text will be.
        write: Takes what is encrypted, in order.
        frame_bytes: Text of one frame; MindSpore's is the default.
    """

    def __init__(
        self,
        key: Key,
        text_bytes: int,
        write: Callable[[memoryview], None],
        *,
        frame_bytes: int = FRAME_BYTES,
    ) -> None:
        self._key = key
        self._left = text_bytes
        self._put = write
        self._frame_bytes = frame_bytes
        self._begin()

    def write(self, data: memoryview) -> None:
        """Encrypt some bytes."""
        done = 0
        while done < len(data):
            part = data[done : done + min(self._room, _STEP_BYTES)]
            self._cipher += self._encryptor.update(part)
            self._room -= len(part)
            done += len(part)
            if not self._room:
                self._end()

    def _begin(self) -> None:
        self._length = self._room = min(self._frame_bytes, self._left)
        self._left -= self._length
        self._iv = os.urandom(_IV_BYTES)
        gcm = self._key.mode.authenticates
        iv = self._iv[:_NONCE_BYTES] if gcm else self._iv
        self._encryptor = self._key.cipher("GCM" if gcm else "CBC", iv).encryptor()
        self._cipher = bytearray()

    def _end(self) -> None:
        mode = self._key.mode
        if not mode.authenticates:
            count = _BLOCK - self._length % _BLOCK
            self._cipher += self._encryptor.update(bytes([count]) * count)
        self._cipher += self._encryptor.finalize()
        length = len(self._cipher)
        head = mode.magic + (self._encryptor.tag if mode.authenticates else b"")
        head += struct.pack("<ii", 4 + _IV_BYTES + 4 + length, _IV_BYTES) + self._iv
        self._put(memoryview(head + struct.pack("<i", length)))
        self._put(memoryview(self._cipher))
        if self._left:
            self._begin()


def encrypted_bytes(mode: Mode, text_bytes: int, frame_bytes: int = FRAME_BYTES) -> int:
    """How long the encrypted file of a text is."""
    whole, rest = divmod(text_bytes, frame_bytes)
    frames = [frame_bytes] * whole + [rest] * bool(rest)
    return sum(mode.head_bytes + mode.cipher_bytes(length) for length in frames)
