"""Changes to inputs that get past what stops blind ones: checksums, lengths, and grammars.

Every function takes an input and a `random.Random`, and returns another input: of the same grammar,
with something in it that is not as it should be. An input that the grammar doesn't fit is changed
bytewise.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from random import Random

from distckpt import CheckpointError
from distckpt.codec import unwrap, wrap
from distckpt.formats.base import Place
from distckpt.formats.mindspore_crypt import CipherText, Encryptor, Key, mode_of
from distckpt.testing import MemoryStore

KEY = bytes(range(16))

_LIMITS = [0, 1, 2, 7, 8, 63, 64, 127, 128, 255, 256, 4095, 4096, 65535, 65536, 1 << 20, 1 << 26,
           (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, (1 << 61) - 1, 1 << 62,
           (1 << 63) - 1, 1 << 63, (1 << 64) - 1]  # fmt: skip
_NAMES = ["", ".", "..", "../x", "/etc/passwd", "a/../../b", "file:///etc/passwd", "s3://b/k", "\\",
          "a\0b", "c:x", "w", "w.w", "\ud800", "é", "__metadata__", "manifest.binpb"]  # fmt: skip


def raw(data: bytes, random: Random) -> bytes:
    """Change bytes, blindly."""
    out = bytearray(data)
    for _ in range(random.choice([1, 1, 2, 4])):
        at = random.randrange(len(out) + 1)
        match random.randrange(7):
            case 0:
                out[at : at + 1] = bytes([random.randrange(256)])
            case 1:
                out[at : at + random.choice([1, 2, 8, 64])] = b""
            case 2:
                out[at:at] = random.randbytes(random.choice([1, 2, 8]))
            case 3:
                size = random.choice([1, 2, 4, 8])
                value = random.choice(_LIMITS) % (1 << 8 * size)
                out[at : at + size] = value.to_bytes(size, random.choice(["little", "big"]))
            case 4:
                out[at:at] = out[at : at + random.choice([4, 16, 64])]
            case 5:
                del out[at:]
            case 6 if out:
                out[at % len(out)] ^= 1 << random.randrange(8)
    return bytes(out)


def _or_raw(change: Callable[[bytes, Random], bytes]) -> Callable[[bytes, Random], bytes]:
    def changed(data: bytes, random: Random) -> bytes:
        if random.randrange(8):
            try:
                return change(data, random)
            except _UNFIT:
                pass
        return raw(data, random)

    return changed


_UNFIT = (ValueError, LookupError, struct.error, zipfile.BadZipFile, zlib.error, RecursionError,
          NotImplementedError, EOFError, OverflowError, TypeError, RuntimeError, StopIteration,
          CheckpointError)  # fmt: skip


def parted(data: bytes) -> tuple[bytes, bytes]:
    """Take an input of two files apart: the length of the first is before it."""
    length = int.from_bytes(data[:4], "little")
    return data[4 : 4 + length], data[4 + length :]


def joined(first: bytes, second: bytes) -> bytes:
    """Make an input of two files."""
    return len(first).to_bytes(4, "little") + first + second


def _either(
    first: Callable[[bytes, Random], bytes], second: Callable[[bytes, Random], bytes]
) -> Callable[[bytes, Random], bytes]:
    def changed(data: bytes, random: Random) -> bytes:
        one, other = parted(data)
        if random.randrange(4):
            return joined(first(one, random), other)
        return joined(one, second(other, random))

    return changed


# ------------------------------------------------------------------------------- protobuf's wire


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value & (1 << 64) - 1, at
        if shift > 63:
            raise ValueError


def _fields(data: bytes) -> list[tuple[int, int, int | bytes]]:
    found, at = [], 0
    while at < len(data):
        key, at = _read_varint(data, at)
        number, kind = key >> 3, key & 7
        value: int | bytes
        if kind == 0:
            value, at = _read_varint(data, at)
        else:
            size = {1: 8, 5: 4}.get(kind)
            if size is None:
                if kind != 2:
                    raise ValueError
                size, at = _read_varint(data, at)
            value = data[at : at + size]
            if len(value) < size or not number:
                raise ValueError
            at += size
        found.append((number, kind, value))
    return found


def _encoded(fields: list[tuple[int, int, int | bytes]]) -> bytes:
    out = bytearray()
    for number, kind, value in fields:
        out += _varint(number << 3 | kind)
        if isinstance(value, int):
            out += _varint(value)
        else:
            out += (_varint(len(value)) if kind == 2 else b"") + value
    return bytes(out)


def _wire(data: bytes, random: Random, depth: int = 0) -> bytes:
    fields = _fields(data)
    if not fields:
        raise ValueError
    at = random.randrange(len(fields))
    number, kind, value = fields[at]
    if isinstance(value, bytes) and kind == 2 and depth < 12 and random.randrange(5):
        fields[at] = number, kind, _inner(value, random, depth)
        return _encoded(fields)
    match random.randrange(7):
        case 0:
            del fields[at]
        case 1:
            fields.insert(at, fields[at])
        case 2:
            other = random.randrange(len(fields))
            fields[at], fields[other] = fields[other], fields[at]
        case 3:
            fields[at] = random.randrange(1, 24), kind, value
        case 4:
            fields[at] = number, 0, random.choice(_LIMITS)
        case 5:
            fields[at] = number, 2, random.choice(_NAMES).encode("utf-8", "surrogatepass")
        case 6:
            fields[at:at] = [fields[at]] * random.choice([2, 16, 200])
    return _encoded(fields)


def _inner(value: bytes, random: Random, depth: int) -> bytes:
    """Change what may be a message, packed numbers, or a text."""
    match random.randrange(4):
        case 0 | 1:
            try:
                return _wire(value, random, depth + 1)
            except (ValueError, IndexError):
                return raw(value, random)
        case 2:
            try:
                numbers, at = [], 0
                while at < len(value):
                    number, at = _read_varint(value, at)
                    numbers.append(number)
                numbers[random.randrange(len(numbers))] = random.choice(
                    [*_LIMITS, *numbers, random.randrange(300)]
                )
                if not random.randrange(3):
                    numbers *= random.choice([1, 2, 40])
                return b"".join(map(_varint, numbers))
            except (ValueError, IndexError):
                return raw(value, random)
    return raw(value, random)


wire = _or_raw(_wire)
ckpt = wire


@_or_raw
def manifest(data: bytes, random: Random) -> bytes:
    """Change the message in the envelope, and make its checksum right again."""
    if not random.randrange(16):
        body = raw(data[:-32], random)
        return body + hashlib.sha256(body).digest()
    return wrap(wire(unwrap(data), random))


@_or_raw
def blob(data: bytes, random: Random) -> bytes:
    """Change the tree before the arrays."""
    length = int.from_bytes(data[:8], "little")
    tree = wire(data[8 : 8 + length], random)
    return len(tree).to_bytes(8, "little") + tree + data[8 + length :]


@_or_raw
def encrypted(data: bytes, random: Random) -> bytes:
    """Decrypt, change, encrypt."""
    store = MemoryStore()
    store.objects["x"] = data
    key = Key(KEY, mode_of(data[:4]) or "")
    text = CipherText(Place("x", store, "x"), key)
    plain = bytearray(text.length)
    text.read_into(0, memoryview(plain))
    changed = ckpt(bytes(plain), random) or b"\0"
    out = bytearray()
    frame_bytes = random.choice([16, 17, 64, 1 << 20])
    Encryptor(key, len(changed), out.extend, frame_bytes=frame_bytes).write(memoryview(changed))
    return bytes(out)


# ---------------------------------------------------------------------------------------- JSON


def _spots(node: object) -> Iterator[tuple[object, object]]:
    below = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in list(below):
        yield node, key
        if isinstance(value, (dict, list)):
            yield from _spots(value)


def _json(text: bytes, random: Random) -> bytes:
    root = [json.loads(text)]
    holder, key = random.choice(list(_spots(root)))
    match random.randrange(6):
        case 0:
            holder[key] = random.choice(
                [None, True, -1, 0.5, 1e300, [], {}, [[]], 10**30, 10**400, *_LIMITS, *_NAMES]
            )
        case 1 if holder is not root:
            del holder[key]
        case 2 if isinstance(holder, dict):
            holder[random.choice([*_NAMES, *holder, "$dict", "$tuple", "$bytes", "$int"])] = holder[
                key
            ]
        case 3 if isinstance(holder, list):
            holder[:] = holder * random.choice([2, 3, 40])
        case 4:
            holder[key] = [holder[key]] * random.choice([0, 1, 40])
        case 5:
            holder[key] = {random.choice(["$dict", "$tuple", "$int", "$float", "x"]): holder[key]}
    out = json.dumps(root[0])
    if not random.randrange(6):
        out = (
            out.replace("{", '{"w":1,', 1)
            if random.randrange(2)
            else out.replace("1", "1" * 5000, 1)
        )
    return out.encode("utf-8", "surrogatepass")


json_text = _or_raw(_json)


@_or_raw
def safetensors(data: bytes, random: Random) -> bytes:
    """Change the header, and make its length right again."""
    size = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + size], data[8 + size :]
    if not random.randrange(6):
        rest = raw(rest, random)
    else:
        header = json_text(header, random)
    return len(header).to_bytes(8, "little") + header + rest


index = _either(json_text, safetensors)

# ------------------------------------------------------------------------------- numpy, and zip


@_or_raw
def npy(data: bytes, random: Random) -> bytes:
    """Change the dict in the header, and make its length right again."""
    length = int.from_bytes(data[8:10], "little")
    text, rest = data[10 : 10 + length].decode("latin-1").rstrip(), data[10 + length :]
    match random.randrange(5):
        case 0:
            numbers = [at for at, sign in enumerate(text) if sign.isdigit()]
            at = random.choice(numbers)
            new = random.choice([*map(str, _LIMITS), "-1", "9" * 30, "9" * 5000])
            text = text[:at] + new + text[at + 1 :]
        case 1:
            kinds = [
                "'|O'",
                "'<f4'",
                "'>f8'",
                "'<V2'",
                "'|u1'",
                "'<U9'",
                "[('a', '<f4')]",
                "'<c16'",
            ]
            before, _, after = text.partition("'descr': ")
            text = f"{before}'descr': {random.choice(kinds)}{after[5:]}"
        case 2:
            text = text.replace("False", random.choice(["True", "None", "0"]), 1)
        case 3:
            text = text.replace(")", random.choice([", 0)", ", 1L)", "," * 99 + ")", ", 3"]), 1)
        case 4:
            text = raw(text.encode("latin-1"), random).decode("latin-1")
    header = text.encode("latin-1")[:65000] + b" " * random.choice([0, 1, 7]) + b"\n"
    return data[:8] + len(header).to_bytes(2, "little") + header + rest


def _zip(data: bytes, random: Random, change: Callable[[str, bytes, Random], bytes]) -> bytes:
    """Pack an archive anew, with one member changed; then maybe lie about another."""
    members = []
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        comment = archive.comment
        for info in archive.infolist():
            if info.file_size > 1 << 20:
                raise ValueError
            members.append((info.filename, archive.read(info), info.compress_type))
    at = random.randrange(len(members))
    name, content, method = members[at]
    match random.randrange(8):
        case 0:
            members.insert(at, (random.choice(_NAMES), content, method))
        case 1:
            del members[at]
        case 2:
            members[at] = name, content, random.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
        case 3 if comment:
            comment = json_text(comment, random)[:65535]
        case _:
            members[at] = name, change(name, content, random), method
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content, method in members:
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=method)
        archive.comment = comment
    packed = bytearray(out.getvalue())
    if not random.randrange(3):  # in a directory entry: sizes, lengths, offsets
        entries = [i for i in range(len(packed)) if packed[i : i + 4] == b"PK\x01\x02"]
        where = random.choice(entries) + random.choice([8, 10, 16, 20, 24, 28, 30, 32, 42])
        packed[where : where + 4] = (random.choice(_LIMITS) % (1 << 32)).to_bytes(4, "little")
    return bytes(packed)


@_or_raw
def npz(data: bytes, random: Random) -> bytes:
    """Change a member, or the archive."""
    return _zip(data, random, lambda _, content, random: npy(content, random))


# ------------------------------------------------------------------------------------- pickles


_GLOBALS = [b"posix\nsystem\n", b"builtins\neval\n", b"builtins\ngetattr\n", b"torch\nSize\n",
            b"collections\nOrderedDict\n", b"builtins\nbytearray\n", b"torch\nfloat32\n",
            b"builtins\nset\n", b"collections\ndefaultdict\n", b"_codecs\nencode\n",
            b"torch._utils\n_rebuild_tensor_v2\n", b"torch.storage\nUntypedStorage\n",
            b"torch._utils\n_rebuild_parameter\n", b"torch\ndevice\n"]  # fmt: skip
_OPERATIONS = b"(tld]})Rb021QsueaNo\x81\x85\x86\x87\x88\x8f\x90\x91\x93\x94\x97\x98"


def _pickle(data: bytes, random: Random) -> bytes:
    """Change one operation, or move some."""
    starts = [at for _, _, at in pickletools.genops(data)]
    parts = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
    at = random.randrange(len(parts))
    match random.randrange(9):
        case 0:
            del parts[at]
        case 1:
            parts.insert(at, parts[random.randrange(len(parts))])
        case 2:
            other = random.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        case 3:
            parts[at:at] = parts[at : at + random.randrange(12)]
        case 4:
            number = random.choice(_LIMITS) - random.choice([0, 0, 1 << 63])
            raw_number = number.to_bytes(10, "little", signed=True)
            parts[at] = b"\x8a\x0a" + raw_number
        case 5:
            parts[at] = b"c" + random.choice(_GLOBALS)
        case 6:
            parts[at:at] = [bytes([random.choice(_OPERATIONS)])]
        case 7:
            name = random.choice(_NAMES).encode("utf-8", "surrogatepass")
            parts[at] = b"X" + struct.pack("<I", len(name)) + name
        case 8:
            parts[at] = raw(parts[at], random)
    return b"".join(parts)


pickled = _or_raw(_pickle)


@_or_raw
def torch(data: bytes, random: Random) -> bytes:
    """Change the pickle or a storage, or the archive."""

    def change(name: str, content: bytes, random: Random) -> bytes:
        return pickled(content, random) if name.endswith(".pkl") else raw(content, random)

    if random.randrange(3):  # mostly the pickle
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".pkl"))
            members = {info.filename: archive.read(info) for info in archive.infolist()}
        members[name] = pickled(members[name], random)
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for member, content in members.items():
                archive.writestr(zipfile.ZipInfo(member), content)
        return out.getvalue()
    return _zip(data, random, change)


dcp = _either(pickled, raw)
