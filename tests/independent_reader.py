"""A second reader of distckpt's format, written from docs/format.md alone (the § are its sections).

It shares no code with distckpt but the generated message class, and needs numpy and protobuf only.
Elements of a dtype that numpy lacks come back as unsigned integers of the same size.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import math
import struct
from pathlib import Path

import numpy as np

_GENERATED = Path(__file__).parents[1] / "distckpt/_pb/manifest_pb2.py"
_SPEC = importlib.util.spec_from_file_location("manifest_pb2", _GENERATED)
pb = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(pb)

_CODES = (*"?bhiqBHIQefdFD", *" " * 5, "H", *"B" * 15)  # §8: of code 1, 2, …
DTYPES = {code: np.dtype(f"<{kind}") for code, kind in enumerate(_CODES, 1) if kind != " "}
CRC_TABLE = list(range(256))
for _ in range(8):
    CRC_TABLE = [(value >> 1) ^ (0x82F63B78 * (value & 1)) for value in CRC_TABLE]


def need(condition, fault):
    if not condition:
        raise ValueError(f"refused: {fault}")


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC_TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def plain(value, arrays=b""):
    """Decode a Value; its arrays lie in the bytes behind it (§7.4)."""
    kind = value.WhichOneof("kind")
    need(kind, "a value of no kind")
    content = getattr(value, kind)
    if kind in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[kind](plain(item, arrays) for item in content.item)
    if kind == "dict":
        pairs = zip(content.key, content.item, strict=True)
        return {plain(key): plain(item, arrays) for key, item in pairs}
    if kind == "array":
        size, dtype = math.prod(content.shape), DTYPES[content.dtype]
        data = arrays[content.offset : content.offset + size * dtype.itemsize]
        return np.frombuffer(data, dtype).reshape(content.shape)
    if kind == "big_integer":
        return int.from_bytes(content, "little", signed=True)
    return None if kind == "null" else content


def edge(piece, extent, parts, rule):  # where a piece of a grid begins (§7.3)
    if rule == pb.BALANCED:
        return piece * (extent // parts) + min(piece, extent % parts)
    return min(piece * -(-extent // parts), extent)


class Reader:
    """A checkpoint in a folder: its tensors' names, dtypes and shapes; its values."""

    def __init__(self, folder):
        self.folder = Path(folder)
        data = (self.folder / "manifest.binpb").read_bytes()
        need(len(data) >= 56 and data[:8] == b"DISTCKPT", "not a manifest")  # §7.1
        need(hashlib.sha256(data[:-32]).digest() == data[-32:], "a damaged manifest")
        major, _, _, length = struct.unpack_from("<HHIQ", data, 8)
        need(major == 1 and length == len(data) - 56, "its version or length")
        self.manifest = m = pb.Manifest.FromString(data[24:-32])
        self.names, name = [], b""
        for shared, suffix in zip(m.tensors.shared, m.tensors.suffix, strict=True):  # §7.2
            name = name[:shared] + suffix.encode()
            self.names.append(name.decode())
        layouts = list(self._layouts(m.layouts))
        self.shapes, self.boxes, self.dtypes, lying = {}, {}, {}, []
        for name, code, layout in zip(self.names, m.tensors.dtype, m.tensors.layout, strict=True):
            self.shapes[name], boxes = layouts[layout]
            self.dtypes[name], self.boxes[name] = DTYPES[code], []
            lying += [(file, -DTYPES[code].itemsize, len(self.boxes), a, b) for a, b, file in boxes]
        ends = list(m.files.data_start)
        for file, negative_size, number, start, stop in sorted(lying):  # §6.3
            self.boxes[self.names[number - 1]].append((start, stop, file, ends[file]))
            ends[file] -= negative_size * math.prod(np.subtract(stop, start).tolist())
        self.values = {n: plain(v) for n, v in zip(m.values.name, m.values.value, strict=True)}
        self.metadata = plain(m.metadata) if m.HasField("metadata") else None
        self.metrics = plain(m.metrics) if m.HasField("metrics") else None
        self.step = m.step if m.HasField("step") else None
        self.blobs = {}
        for index, length in enumerate(m.per_rank.length):
            name, file = m.per_rank.name[index // m.ranks], m.per_rank.file[index % m.ranks]
            if length:
                self.blobs[name, index % m.ranks] = (file, ends[file], ends[file] + length)
                ends[file] += length
        self.table_starts, size = ends, m.block_bytes
        need([end + 4 * -(-end // size) for end in ends] == m.files.length, "a file's length")

    def _layouts(self, columns):
        """Yield each layout's shape and boxes: start, stop and file (§7.3)."""
        column = {name: iter(getattr(columns, name)) for name in columns.DESCRIPTOR.fields_by_name}
        for ndim, count in zip(columns.ndim, columns.boxes, strict=True):
            take = lambda name, n=ndim: tuple(itertools.islice(column[name], n))  # noqa: E731
            shape, boxes = take("shape"), []
            for _ in range(count):
                start, extent = take("start"), take("extent")
                boxes.append((start, tuple(np.add(start, extent).tolist()), next(column["file"])))
            if not count:
                grid, stride = (shape, take("parts"), take("rule")), take("file_stride")
                base = next(column["file_base"])
                for cell in np.ndindex(*grid[1]):
                    low = tuple(map(edge, cell, *grid))
                    high = tuple(map(edge, np.add(cell, 1).tolist(), *grid))
                    boxes.append((low, high, base + sum(np.multiply(cell, stride).tolist())))
            held = sum(math.prod(np.subtract(stop, start).tolist()) for start, stop, _ in boxes)
            need(held == math.prod(shape), "boxes that do not cover their tensor once")
            yield shape, boxes

    def _read(self, file, start, stop):
        """Read a stretch of a file and verify every block of it (§10)."""
        m, size, table_start = self.manifest, self.manifest.block_bytes, self.table_starts[file]
        name = f"shard-{file:05d}-of-{len(m.files.length):05d}.{m.save_id:016x}.safetensors"
        data = (self.folder / name).read_bytes()
        digest = hashlib.sha256(data[table_start:]).digest()[:16]
        need(digest == m.files.digest[16 * file : 16 * file + 16], f"the table of {name}")
        for block in range(start // size, -(-stop // size)):
            found = crc32c(data[block * size : min(block * size + size, table_start)])
            expected = struct.unpack_from("<I", data, table_start + 4 * block)[0]
            need(found == expected, f"block {block} of {name}")
        return data[start:stop]

    def tensor(self, name):
        dtype, whole = self.dtypes[name], np.empty(self.shapes[name], self.dtypes[name])
        for start, stop, file, offset in self.boxes[name]:
            target = whole[(*map(slice, start, stop), ...)]
            data = self._read(file, offset, offset + target.size * dtype.itemsize)
            target[...] = np.frombuffer(data, dtype).reshape(target.shape)
        return whole

    def per_rank(self, name, rank):
        blob = self._read(*self.blobs[name, rank])
        end = 8 + int.from_bytes(blob[:8], "little")
        return plain(pb.Value.FromString(blob[8:end]), blob[end:])
