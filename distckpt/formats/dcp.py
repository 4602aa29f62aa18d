"""PyTorch's distributed checkpoints (DCP): a folder of ``.distcp`` files and a ``.metadata``.

They are read without torch: each piece of a tensor is an archive of torch.save somewhere in a file,
and ``.metadata``, a pickle, says where. Writing takes torch, whose classes this pickle holds.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from distckpt.errors import CheckpointError
from distckpt.foreign import Source
from distckpt.formats.base import Place, Readable, Wanted, Writing, already_there, library
from distckpt.formats.dcp_source import METADATA, DcpSource, files_named
from distckpt.formats.torch_writing import (
    Record,
    archive_bytes,
    archive_records,
    blocks_of,
    check_entries,
    dump_one,
    fill,
    size_of,
    whole,
)
from distckpt.region import Region

_CHUNK_BYTES = 512 << 20
_FILE_BYTES = 1 << 30


class DcpFormat:
    """A folder that ``torch.distributed.checkpoint.save`` wrote.

    Entries that are no tensors are values where they are plain; others are left out, and listed in
    the metadata's ``left_out``.
    """

    name = "dcp"
    suffixes = ()

    def sniff(self, place: Place) -> bool:
        """See `Format`."""
        return place.entry(METADATA).head(1) == b"\x80"

    def open(self, place: Place) -> Source:
        """See `Format`."""
        return DcpSource(place)

    def write(
        self,
        place: Place,
        wanted: Wanted,
        *,
        chunk_bytes: int = _CHUNK_BYTES,
        file_bytes: int = _FILE_BYTES,
    ) -> Writing:
        """See `Format`. Tensors are cut along their first dimension; ``.metadata`` is the commit.

        Args:
            place: The folder.
            wanted: What.
            chunk_bytes: The most bytes of one piece, unless one row has more.
            file_bytes: The most bytes of one file, unless one piece has more.
        """
        if place.is_file() or (not wanted.replace and place.exists()):
            raise already_there(place)
        check_entries(wanted, self.name)
        metadata = library("torch.distributed.checkpoint.metadata", extra="torch", format="dcp")
        items = [*_values(wanted.values), *_chunks(wanted.tensors, chunk_bytes)]
        files = _in_files(items, file_bytes, wanted.token)
        data = _metadata_bytes(metadata, wanted, files)

        def commit() -> None:
            old = files_named(place) if wanted.replace else set()
            try:
                place.entry(METADATA).put(data, replace=wanted.replace)
            except FileExistsError as exc:
                raise already_there(place) from exc
            with suppress(CheckpointError):
                place.parent.delete([f"{place.name}/{name}" for name in old - {*files}])

        def abort() -> None:
            with suppress(CheckpointError):
                place.parent.delete([f"{place.name}/{name}" for name in files])

        return Writing(
            [partial(_write_items, place.entry(name), held) for name, held in files.items()],
            [sum(item.length for item in held) for held in files.values()],
            commit,
            abort,
        )


FORMAT = DcpFormat()


@dataclass(frozen=True, slots=True)
class _Item:
    """An archive to write: a piece of a tensor, or a value.

    Attributes:
        name: The entry's name.
        box: The piece; None for a value.
        records: The archive's.
        length: Its bytes.
    """

    name: str
    box: Region | None
    records: list[Record]
    length: int


def _values(values: Mapping[str, object]) -> Iterator[_Item]:
    for name, value in values.items():
        records = archive_records(dump_one(value), [])
        yield _Item(name, None, records, archive_bytes(records))


def _chunks(tensors: Sequence[Readable], chunk_bytes: int) -> Iterator[_Item]:
    for tensor in tensors:
        for box in _boxes(tensor, chunk_bytes):
            stored = whole(tensor, "0", box.shape)
            size = box.size * tensor.dtype.itemsize
            storage = Record("data/0", size, blocks_of(tensor, box))
            records = archive_records(dump_one(stored), [storage])
            yield _Item(tensor.name, box, records, archive_bytes(records))


def _boxes(tensor: Readable, chunk_bytes: int) -> Iterator[Region]:
    shape = tuple(tensor.shape)
    total = size_of(tensor)
    if not shape or total <= chunk_bytes:
        yield Region.whole(shape)
        return
    step = max(chunk_bytes * shape[0] // total, 1)
    for row in range(0, shape[0], step):
        stop = min(row + step, shape[0])
        yield Region((row, *(0 for _ in shape[1:])), (stop, *shape[1:]))


def _in_files(items: list[_Item], file_bytes: int, token: str) -> dict[str, list[_Item]]:
    """Put items into files, in order. Names differ from those of what may be replaced."""
    groups: list[list[_Item]] = [[]]
    size = 0
    for item in items:
        if groups[-1] and size + item.length > file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += item.length
    ending = f".{token}.distcp" if token else ".distcp"
    return {f"__{number}_0{ending}": held for number, held in enumerate(groups)}


def _write_items(place: Place, items: list[_Item]) -> None:
    sink = place.create(sum(item.length for item in items))
    try:
        fill(sink, (item.records for item in items))
        sink.commit()
    except BaseException:
        sink.abort()
        raise


def _metadata_bytes(metadata: Any, wanted: Wanted, files: Mapping[str, list[_Item]]) -> bytes:
    torch = library("torch", extra="torch", format="dcp")
    filesystem = library("torch.distributed.checkpoint.filesystem", extra="torch", format="dcp")
    entries: dict[str, Any] = {name: metadata.BytesStorageMetadata() for name in wanted.values}
    for tensor in wanted.tensors:
        properties = metadata.TensorProperties(dtype=getattr(torch, tensor.dtype.name))
        entries[tensor.name] = metadata.TensorStorageMetadata(
            properties, torch.Size(tensor.shape), []
        )
    places = {}
    for file, items in files.items():
        at = 0
        for item in items:
            index = metadata.MetadataIndex(item.name, item.box and item.box.start)
            if item.box is not None:
                chunk = metadata.ChunkStorageMetadata(
                    torch.Size(item.box.start), torch.Size(item.box.shape)
                )
                entries[item.name].chunks.append(chunk)
            places[index] = filesystem._StorageInfo(file, at, item.length)  # noqa: SLF001  its own
            at += item.length
    paths = {name: (name,) for name in entries}  # a flat dict
    found = metadata.Metadata(entries, paths, places, metadata.StorageMeta())
    if hasattr(filesystem, "CURRENT_DCP_VERSION"):
        found.version = filesystem.CURRENT_DCP_VERSION
    return pickle.dumps(found, protocol=4)
