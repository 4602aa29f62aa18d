"""Keras weights in HDF5, through h5py: ``.weights.h5`` files, and the legacy ``.h5`` ones.

A tensor's name is its dataset's path with dots: ``layers/dense/vars/0`` is ``layers.dense.vars.0``.
"""

from __future__ import annotations

import itertools
import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from distckpt import dtypes
from distckpt.errors import CheckpointError, CorruptCheckpoint, StoreError, UnsupportedFormat
from distckpt.foreign import Contents, ForeignTensor, tensor_bytes
from distckpt.formats.base import (
    MAX_EXPANSION,
    Place,
    Readable,
    Wanted,
    Writing,
    already_there,
    check_expansion,
    library,
    refuse,
)
from distckpt.formats.pieces import WholePieces, grid
from distckpt.region import Region, boxes_of_run
from distckpt.state import MAX_DIMENSIONS, MAX_NAME_BYTES, MAX_TENSOR_BYTES

_MAGIC = b"\x89HDF\r\n\x1a\n"
_COPY_BYTES = 16 << 20
# By HDF5's numbers: filters that make data smaller, of which one is enough (two make a bomb of a
# thousand times a thousand), and others. One that is not known would be looked for as a plug-in.
_DEFLATE = 1
_COMPRESSION = {_DEFLATE: "deflate", 4: "szip", 32000: "lzf"}
_OTHER_FILTERS = {2: "shuffle", 3: "fletcher32", 5: "nbit", 6: "scaleoffset"}
_CHECKSUM_BYTES = 4
# Deflate makes nothing smaller than 1:1032.
_BEST_RATIO = 1100
# Keras writes bfloat16 as opaque bytes with this attribute; HDF5 has no such type.
_TYPE_ATTRIBUTE = "dtype"
_OPAQUE = frozenset({"bfloat16"})


class KerasFormat:
    """HDF5 files of weights. Attributes are not read, but for the dtype of bfloat16 datasets.

    Options for opening:
        max_expansion: How many times the file's length compressed datasets may have.
    """

    name = "keras"
    suffixes: tuple[str, ...] = (".weights.h5", ".h5", ".hdf5")

    def sniff(self, place: Place) -> bool:
        """See `Format`."""
        return place.head(len(_MAGIC)) == _MAGIC

    def open(self, place: Place, *, max_expansion: float = MAX_EXPANSION) -> KerasSource:
        """See `Format`."""
        return KerasSource(place, max_expansion)

    def write(self, place: Place, wanted: Wanted) -> Writing:
        """See `Format`; there are no options.

        Keras' ``load_weights`` takes the file where the names are Keras' own, as of a file that
        Keras wrote. Metadata is left out.
        """
        h5py = library("h5py", extra="keras", format="keras")
        refuse(_problems(wanted), self.name)
        if place.entries() or (not wanted.replace and place.is_file()):
            raise already_there(place)
        temporary = place.beside(f"{place.url.rpartition('/')[2]}.{wanted.token}")
        path = temporary.local()  # refuses stores that HDF5 can't write to

        def part() -> None:
            temporary.put(b"", replace=False)  # the store makes the folder, durably
            with _writing(temporary), h5py.File(path, "w") as file:
                for tensor in wanted.tensors:
                    _write(file, tensor)
            _sync(path)

        def commit() -> None:
            temporary.move_to(place, replace=wanted.replace)

        def abort() -> None:
            with suppress(Exception):
                temporary.delete()

        size = sum(tensor_bytes(each.shape, _entry(each)) for each in wanted.tensors)
        return Writing([part], [size], commit, abort)


class KerasSource:
    """An opened HDF5 file; it stays open as long as this object lives.

    Args:
        place: The file.
        max_expansion: How many times the file's length compressed datasets may have.
    """

    def __init__(self, place: Place, max_expansion: float = MAX_EXPANSION) -> None:
        self._url = place.url
        self._h5py = library("h5py", extra="keras", format="keras")
        path = place.local()
        self._datasets: list[Any] = []
        problems: dict[str, str] = {}
        tensors: dict[str, ForeignTensor] = {}
        with self._translated("/"):
            self._file = self._h5py.File(path, "r", locking="best-effort")
            for path_in_file, dataset in self._walk(problems):
                name = path_in_file.replace("/", ".")
                found = "another dataset has the same name" if name in tensors else None
                found = found or self._problem(dataset, path.stat().st_size)
                if found is None:
                    tensors[name] = self._tensor(name, dataset)
                    self._datasets.append(dataset)
                else:
                    problems[path_in_file] = found
        if problems:
            self._file.close()
            listed = "\n  ".join(f"{name[:200]!r}: {what}" for name, what in problems.items())
            raise UnsupportedFormat(
                f"{self._url}: {len(problems)} entries are not weights, or not in this file:\n  "
                f"{listed}\nSave the weights alone, with Keras' save_weights"
            )
        check_expansion(
            place,
            sum(tensor_bytes(one.shape, one.dtype) for one in tensors.values()),
            max_expansion,
        )
        self._contents = Contents(list(tensors.values()))
        self._pieces = WholePieces(self._read)

    @property
    def contents(self) -> Contents:
        """See `Source`."""
        return self._contents

    def read_into(self, tensor: int, piece: int, start_byte: int, buffer: memoryview) -> None:
        """See `Source`."""
        found = self._contents.tensors[tensor]
        box = found.boxes[piece]
        dataset = self._datasets[tensor]
        with self._translated(found.name):
            if dataset.chunks is not None:
                # A chunk may be compressed, so that no part of it can be read alone.
                self._pieces.read_into(
                    tensor, piece, start_byte, buffer, shape=box.shape, dtype=found.dtype
                )
                return
            first, size = start_byte // found.dtype.itemsize, found.dtype.itemsize
            done = 0
            for part in boxes_of_run(found.shape, first, first + len(buffer) // size):
                data = self._box(tensor, part)
                buffer[done : done + data.nbytes] = data.reshape(-1).view(np.uint8).data
                done += data.nbytes

    def _read(self, tensor: int, piece: int) -> np.ndarray:
        return self._box(tensor, self._contents.tensors[tensor].boxes[piece])

    def _box(self, tensor: int, box: Region) -> np.ndarray:
        """Read a box, C-contiguous and little-endian."""
        self._check_chunks(tensor, box)
        found = np.asarray(self._datasets[tensor][box.slices if box.start else ()])
        target = self._contents.tensors[tensor].dtype.numpy
        if found.dtype.kind == "V":
            found = found.view(target)
        return np.ascontiguousarray(found, target).reshape(box.shape)

    def _check_chunks(self, tensor: int, box: Region) -> None:
        """Refuse deflated chunks that make more than a chunk: HDF5 would inflate them whole."""
        dataset = self._datasets[tensor]
        if dataset.chunks is None or _DEFLATE not in _filters(dataset):
            return
        limit = tensor_bytes(dataset.chunks, self._contents.tensors[tensor].dtype) + _CHECKSUM_BYTES
        steps = zip(box.start, box.stop, dataset.chunks, strict=True)
        for start in itertools.product(*(range(a - a % c, b, c) for a, b, c in steps)):
            info = dataset.id.get_chunk_info_by_coord(start)
            if info.byte_offset is None or info.filter_mask:
                continue  # not there, or not inflated
            if info.size > 2 * limit:
                raise CorruptCheckpoint(f"a chunk of {info.size} bytes for one of {limit}")
            inflate = zlib.decompressobj()
            left, made = dataset.id.read_direct_chunk(start)[1], 0
            while left and not inflate.eof:
                made += len(inflate.decompress(left, _COPY_BYTES))
                if made > limit:
                    raise CorruptCheckpoint(f"a chunk that inflates to more than {limit} bytes")
                left = inflate.unconsumed_tail

    def _walk(self, problems: dict[str, str]) -> Iterator[tuple[str, Any]]:
        """Yield (path, dataset) in order; follows hard links alone, and enters a group once."""
        h5py = self._h5py
        stack: list[tuple[str, Any]] = [("", self._file)]
        seen = {h5py.h5o.get_info(self._file.id).addr}
        while stack:
            prefix, node = stack.pop()
            if isinstance(node, h5py.Dataset):
                yield prefix, node
                continue
            below = []
            for key in node:
                path = f"{prefix}/{key}" if prefix else key
                if len(path) > MAX_NAME_BYTES:
                    problems[path[:40] + "…"] = f"a path of {len(path)} characters"
                    continue
                link = node.get(key, getlink=True)
                if not isinstance(link, h5py.HardLink):
                    where = getattr(link, "filename", "") + ":" if hasattr(link, "filename") else ""
                    problems[path] = f"a link to {where}{link.path}, which is not followed"
                    continue
                found = node[key]
                if not isinstance(found, (h5py.Group, h5py.Dataset)):
                    problems[path] = "neither a group nor a dataset"
                    continue
                if isinstance(found, h5py.Group):
                    address = h5py.h5o.get_info(found.id).addr
                    if address in seen:
                        problems[path] = "a group that is elsewhere in the file, too"
                        continue
                    seen.add(address)
                below.append((path, found))
            stack += reversed(below)

    def _problem(self, dataset: Any, file_bytes: int) -> str | None:
        """Say why a dataset can't be read; nothing of it has been."""
        if dataset.is_virtual:
            return "a virtual dataset, made of other datasets, maybe of other files"
        if dataset.external:
            return f"its data lies in another file, {dataset.external[0][0]!r}"
        if dataset.shape is None:
            return "an empty dataset, without a shape"
        entry = self._find_dtype(dataset)
        if entry is None:
            return f"dtype {dataset.dtype} (of HDF5 class {dataset.id.get_type().get_class()})"
        if len(dataset.shape) > MAX_DIMENSIONS:
            return f"{len(dataset.shape)} dimensions"
        filters = _filters(dataset)
        packed = [number for number in filters if number in _COMPRESSION]
        if len(packed) > 1 or set(filters) - _COMPRESSION.keys() - _OTHER_FILTERS.keys():
            return f"filters {filters}; known are one compression and {_OTHER_FILTERS}"
        size = tensor_bytes(dataset.shape, entry)
        stored = dataset.id.get_storage_size()
        limit = stored * _BEST_RATIO if filters else stored
        if size > min(limit, MAX_TENSOR_BYTES) or stored > file_bytes:
            return (
                f"shape {list(dataset.shape)} needs {size} bytes, {stored} are stored in a file "
                f"of {file_bytes}: it was never written whole, or lies"
            )
        if dataset.chunks is not None:
            chunk = tensor_bytes(dataset.chunks, entry)
            if chunk > max(2 * size, _COPY_BYTES):
                return f"chunks of {chunk} bytes, more than all of it ({size})"
        return None

    def _find_dtype(self, dataset: Any) -> dtypes.Dtype | None:
        kind = dataset.dtype
        if kind.kind != "V" or kind.fields is not None or kind.subdtype is not None:
            return dtypes.find(kind)
        name = dataset.attrs.get(_TYPE_ATTRIBUTE)
        entry = dtypes.BY_NAME.get(name) if isinstance(name, str) and name in _OPAQUE else None
        return entry if entry is not None and entry.itemsize == kind.itemsize else None

    def _tensor(self, name: str, dataset: Any) -> ForeignTensor:
        entry = self._find_dtype(dataset)
        if entry is None:
            raise TypeError(name)  # _problem would have said so
        pieces = None
        if dataset.chunks is not None:
            pieces = grid(dataset.shape, dataset.chunks, entry.itemsize)
        return ForeignTensor(name, dataset.shape, entry, pieces)

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """Turn h5py's errors, of many kinds, into ours."""
        try:
            yield
        except (CheckpointError, MemoryError):
            raise
        except FileNotFoundError:
            raise
        except Exception as exc:
            raise CorruptCheckpoint(
                f"{self._url}: HDF5 can't read {what!r}: {exc}", path=self._url
            ) from exc


def _filters(dataset: Any) -> list[int]:
    """Return the numbers of a dataset's filters, in the order of writing."""
    if dataset.chunks is None:
        return []
    made = dataset.id.get_create_plist()
    return [made.get_filter(number)[0] for number in range(made.get_nfilters())]


def _entry(tensor: Readable) -> dtypes.Dtype:
    entry = dtypes.find(tensor.dtype)
    if entry is None:
        raise UnsupportedFormat(f"{tensor.name!r}: dtype {tensor.dtype}")
    return entry


def _problems(wanted: Wanted) -> dict[str, str]:
    """Name what HDF5, or Keras, has no place for."""
    problems = dict.fromkeys(wanted.values, "a plain value; weights files hold arrays only")
    names = {tensor.name for tensor in wanted.tensors}
    for tensor in wanted.tensors:
        parts = tensor.name.split(".")
        above = {".".join(parts[:count]) for count in range(1, len(parts))} & names
        entry = _entry(tensor)
        if not all(parts) or "/" in tensor.name:
            problems[tensor.name] = "not a path: an empty part between dots, or a slash"
        elif above:
            problems[tensor.name] = f"a dataset can't lie in another one, {above.pop()!r}"
        elif hasattr(ml_dtypes, entry.name) and entry.name not in _OPAQUE:
            problems[tensor.name] = f"dtype {entry.name}, which HDF5 has no type for"
    return problems


def _write(file: Any, tensor: Readable) -> None:
    """Write a tensor, a few MiB at a time."""
    entry = _entry(tensor)
    opaque = entry.name in _OPAQUE
    stored = np.dtype(f"V{entry.itemsize}") if opaque else entry.numpy
    dataset = file.create_dataset(tensor.name.replace(".", "/"), tensor.shape, stored)
    if opaque:
        dataset.attrs[_TYPE_ATTRIBUTE] = entry.name
    count, step = math.prod(tensor.shape), _COPY_BYTES // entry.itemsize
    for start in range(0, count, step):
        for box in boxes_of_run(tensor.shape, start, min(start + step, count)):
            data = tensor.read(box)
            dataset[box.slices if box.start else ()] = data.view(stored) if opaque else data


@contextmanager
def _writing(place: Place) -> Iterator[None]:
    """Turn h5py's errors in writing into ours."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, RuntimeError, ValueError) as exc:
        raise StoreError(f"{place.url}: {exc}", url=place.url) from exc


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


FORMAT = KerasFormat()
