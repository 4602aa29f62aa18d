"""PyTorch's distributed checkpoints as they are read: without torch, and running no pickle."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from distckpt import dtypes
from distckpt.errors import CheckpointError, CorruptCheckpoint, UnsupportedFormat
from distckpt.foreign import Contents, ForeignTensor
from distckpt.formats import torch_pickle
from distckpt.formats.base import Place
from distckpt.formats.torch import sorted_out
from distckpt.formats.torch_pickle import Fields, Other, Stored, shown
from distckpt.formats.torch_zip import Archive
from distckpt.region import Region
from distckpt.state import MAX_DIMENSIONS, MAX_TENSOR_BYTES

METADATA = ".metadata"
_ENDING = ".distcp"
_OPEN_ARCHIVES = 16


class _Fields(Fields):
    """What a dataclass in the metadata holds."""

    def get(self, name: str) -> Any:
        if not isinstance(self.state, Mapping):
            raise TypeError(f"a {type(self).__name__} of {shown(self.state)}")
        return self.state.get(name)


class _Metadata(_Fields): ...


class _OfTensor(_Fields): ...


class _OfBytes(_Fields): ...


class _Properties(_Fields): ...


class _Chunk(_Fields): ...


class _Index(_Fields): ...


class _Info(_Fields): ...


_PACKAGE = "torch.distributed.checkpoint"
_CLASSES: dict[tuple[str, str], Any] = {
    (f"{_PACKAGE}.metadata", "Metadata"): _Metadata,
    (f"{_PACKAGE}.metadata", "TensorStorageMetadata"): _OfTensor,
    (f"{_PACKAGE}.metadata", "BytesStorageMetadata"): _OfBytes,
    (f"{_PACKAGE}.metadata", "TensorProperties"): _Properties,
    (f"{_PACKAGE}.metadata", "ChunkStorageMetadata"): _Chunk,
    (f"{_PACKAGE}.metadata", "MetadataIndex"): _Index,
    (f"{_PACKAGE}.metadata", "StorageMeta"): _Fields,
    (f"{_PACKAGE}.metadata", "_MEM_FORMAT_ENCODING"): lambda *_: None,
    (f"{_PACKAGE}.filesystem", "_StorageInfo"): _Info,
    (f"{_PACKAGE}.filesystem", "_StoragePrefix"): _Fields,
    # Where they were until torch 2.2.
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"): _Properties,
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"): lambda *_: None,
    # The folder's path when it was saved, which is of no use.
    ("pathlib", "PosixPath"): lambda *_: None,
    ("pathlib", "WindowsPath"): lambda *_: None,
    ("pathlib._local", "PosixPath"): lambda *_: None,
    ("pathlib._local", "WindowsPath"): lambda *_: None,
}


@dataclass(frozen=True, slots=True)
class _Part:
    """Where an archive lies in a file of the folder."""

    file: str
    start_byte: int
    stop_byte: int


class DcpSource:
    """An opened folder."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._where = f"{place.url}/{METADATA}"
        self._archives: dict[_Part, Archive] = {}
        self._lock = threading.Lock()
        self._parts: list[list[_Part]] = []
        metadata = _read_metadata(place)
        try:
            self._contents = self._described(metadata)
        except (CorruptCheckpoint, UnsupportedFormat):
            raise
        except (TypeError, ValueError, AttributeError, LookupError, OverflowError) as exc:
            raise CorruptCheckpoint(
                f"{self._where}: expected the metadata of torch.distributed.checkpoint, found "
                f"{type(exc).__name__}: {exc}",
                path=self._where,
            ) from exc

    @property
    def contents(self) -> Contents:
        """See `Source`."""
        return self._contents

    def read_into(self, tensor: int, piece: int, start_byte: int, buffer: memoryview) -> None:
        """See `Source`."""
        if not len(buffer):
            return
        described = self._contents.tensors[tensor]
        part, box = self._parts[tensor][piece], described.boxes[piece]
        archive = self._archive(part)
        stored = archive.root
        if not isinstance(stored, Stored):
            raise self._corrupt(f"{described.name!r}: expected a tensor in {part}, found another")
        if stored.shape != box.shape or stored.dtype != described.dtype:
            raise self._corrupt(
                f"{described.name!r}: expected {described.dtype.name}{list(box.shape)} in {part}, "
                f"found {stored.dtype.name}{list(stored.shape)}"
            )
        archive.check(described.name, stored)
        archive.read_into(stored, start_byte, buffer)

    def _archive(self, part: _Part) -> Archive:
        with self._lock:
            found = self._archives.get(part)
        if found is None:
            found = Archive(self._place.entry(part.file), part.start_byte, part.stop_byte)
            with self._lock:
                while len(self._archives) >= _OPEN_ARCHIVES:
                    self._archives.pop(next(iter(self._archives)))
                self._archives[part] = found
        return found

    def _corrupt(self, what: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(f"{self._where}: {what}", path=self._where)

    def _described(self, metadata: _Metadata) -> Contents:
        parts = self._located(metadata.get("storage_data"))
        tensors: list[ForeignTensor] = []
        others: list[tuple[str, object]] = []
        for name, kind in metadata.get("state_dict_metadata").items():
            if not isinstance(name, str):
                raise TypeError(f"a name {shown(name)}")
            if isinstance(kind, _OfTensor):
                described, where = self._tensor(name, kind, parts)
                tensors.append(described)
                self._parts.append(where)
            elif isinstance(kind, _OfBytes):
                part = parts.get((name, None))
                if part is None:
                    raise self._corrupt(f"{name!r} is in no file")
                try:
                    others += list(self._below(name, part))
                except UnsupportedFormat as exc:
                    others.append((name, Other(str(exc))))
            else:
                raise TypeError(f"{name!r} is a {type(kind).__name__}")
        taken = [each.name for each in tensors]
        entries = sorted_out(others, self._where, taken)
        return Contents(tensors, entries.values, entries.metadata)

    def _below(self, name: str, part: _Part) -> Iterator[tuple[str, object]]:
        """Yield the plain values of an entry that is no tensor."""
        archive = Archive(self._place.entry(part.file), part.start_byte, part.stop_byte)
        where = f"{self._where}: {name[:200]!r}"
        for below, leaf in torch_pickle.leaves(archive.root, where, archive.pickle_bytes, name):
            if isinstance(leaf, (Stored, torch_pickle.Refused)):
                raise UnsupportedFormat("tensors inside of a pickled object")
            yield below, leaf

    def _located(self, storage: object) -> dict[tuple[str, tuple[int, ...] | None], _Part]:
        """Index where everything lies: (name, offset of the piece) → place."""
        if not isinstance(storage, Mapping):
            raise TypeError(f"storage_data is a {type(storage).__name__}")
        claimed, sizes = 0, dict[str, int]()
        parts: dict[tuple[str, tuple[int, ...] | None], _Part] = {}
        for index, info in storage.items():
            if not isinstance(index, _Index) or not isinstance(info, _Info):
                raise TypeError(f"storage_data of {type(index).__name__}: {type(info).__name__}")
            name, offset = index.get("fqn"), index.get("offset")
            file, start, length = (
                info.get(field) for field in ("relative_path", "offset", "length")
            )
            if not isinstance(name, str):
                raise TypeError(f"a name {shown(name)}")
            if type(start) is not int or type(length) is not int:
                raise TypeError(f"{name!r} at {shown(start)}, of {shown(length)} bytes")
            if info.get("transform_descriptors"):
                raise UnsupportedFormat(
                    f"{self._where}: {name!r} was transformed by "
                    f"{shown(info.get('transform_descriptors'))}; save it without extensions"
                )
            if not isinstance(file, str) or file not in sizes:
                sizes[file] = self._size(file)
            stop = start + length
            if not 0 <= start <= stop <= sizes[file]:
                raise self._corrupt(
                    f"{name!r} lies in bytes {start}:{stop} of {file}, which has {sizes[file]}; "
                    "copy the folder again"
                )
            claimed += stop - start
            parts[name, None if offset is None else _extents(offset)] = _Part(file, start, stop)
        if claimed > sum(sizes.values()):
            raise self._corrupt(
                f"its pieces claim {claimed} bytes, and its files have {sum(sizes.values())}"
            )
        return parts

    def _size(self, file: object) -> int:
        """Length of a file of the folder, and of no other."""
        steps = file.split("/") if isinstance(file, str) else [".."]
        if not isinstance(file, str) or {*"\\:\0"} & {*file} or {"", ".", ".."} & {*steps}:
            raise self._corrupt(
                f"{shown(file)} is no file of this folder; nothing outside it is read"
            )
        try:
            return self._place.entry(file).size()
        except FileNotFoundError as exc:
            raise self._corrupt(f"file {file} is missing; copy the folder again") from exc

    def _tensor(
        self, name: str, kind: _OfTensor, parts: Mapping[Any, _Part]
    ) -> tuple[ForeignTensor, list[_Part]]:
        dtype = _dtype_name(kind.get("properties"))
        if dtype not in dtypes.BY_NAME:
            raise UnsupportedFormat(f"{self._where}: {name!r} has dtype {dtype}, which numpy lacks")
        shape = _extents(kind.get("size"))
        entry = dtypes.BY_NAME[dtype]
        if math.prod(extent or 1 for extent in shape) * entry.itemsize > MAX_TENSOR_BYTES:
            raise self._corrupt(f"{name!r} has a shape of {list(shape)}")
        if 0 in shape:
            return ForeignTensor(name, shape, entry), []
        boxes, where = [], []
        seen: set[tuple[int, ...]] = set()
        for chunk in kind.get("chunks"):
            start, extents = _extents(chunk.get("offsets")), _extents(chunk.get("sizes"))
            if start in seen:  # one chunk can stand there a million times, for each tensor
                raise self._corrupt(f"two pieces of {name!r} begin at {list(start)}")
            seen.add(start)
            stop = tuple(a + n for a, n in zip(start, extents, strict=True))
            if any(b > n for b, n in zip(stop, shape, strict=True)):
                raise self._corrupt(
                    f"{name!r} has a piece {Region(start, stop)} outside its shape {list(shape)}"
                )
            part = parts.get((name, start))
            if part is None:
                raise self._corrupt(f"the piece {Region(start, stop)} of {name!r} is in no file")
            if 0 not in extents:
                boxes.append(Region(start, stop))
                where.append(part)
        self._check_room(name, entry, boxes, where)
        return ForeignTensor(name, shape, entry, tuple(boxes)), where

    def _check_room(
        self, name: str, dtype: dtypes.Dtype, boxes: list[Region], where: list[_Part]
    ) -> None:
        for box, part in zip(boxes, where, strict=True):
            held, needed = part.stop_byte - part.start_byte, box.size * dtype.itemsize
            if needed > held:
                raise self._corrupt(
                    f"the piece {box} of {name!r} takes {needed} bytes, and {held} are stored: "
                    f"bytes {part.start_byte}:{part.stop_byte} of {part.file}"
                )


def _read_metadata(place: Place) -> _Metadata:
    entry = place.entry(METADATA)
    size = entry.size()
    if size > torch_pickle.MAX_PICKLE_BYTES:
        raise CorruptCheckpoint(f"{entry.url}: {size} bytes of metadata", path=entry.url)
    found = torch_pickle.load(entry.read(0, size), entry.url, _CLASSES)
    if not isinstance(found, _Metadata):
        raise CorruptCheckpoint(
            f"{entry.url}: expected the metadata of torch.distributed.checkpoint, found a "
            f"{type(found).__name__}",
            path=entry.url,
        )
    return found


def files_named(place: Place) -> set[str]:
    """Name the files of a checkpoint that is about to be replaced; none if it can't be read."""
    with suppress(CheckpointError, FileNotFoundError, AttributeError, TypeError):
        infos = _read_metadata(place).get("storage_data").values()
        names = [info.get("relative_path") for info in infos]
        ours = {name for name in names if isinstance(name, str) and name.endswith(_ENDING)}
        return ours & {*place.entries()}
    return set()


def _dtype_name(properties: _Properties) -> str:
    state = properties.state
    dtype = state.get("dtype") if isinstance(state, Mapping) else state[0]  # type: ignore[index]
    if not isinstance(dtype, torch_pickle.Named):
        raise TypeError(f"a dtype {shown(dtype)}")
    return dtype.name


def _extents(sizes: Any) -> tuple[int, ...]:
    if not isinstance(sizes, tuple) or len(sizes) > MAX_DIMENSIONS:
        raise TypeError(f"extents {shown(sizes)}")
    if not all(type(extent) is int and 0 <= extent <= MAX_TENSOR_BYTES for extent in sizes):
        raise ValueError(f"extents {shown(sizes)}")
    return sizes
