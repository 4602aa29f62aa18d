"""Hugging Face's folder: safetensors files, and an index that says which tensor is in which."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial

from distckpt.errors import CheckpointExists, CorruptCheckpoint, UnsupportedFormat
from distckpt.foreign import Contents, ForeignTensor, Source
from distckpt.formats.base import Place, Readable, Wanted, Writing, already_there
from distckpt.formats.safetensors import (
    MAX_HEADER_BYTES,
    FileImage,
    SafetensorsFile,
    check_dtypes,
    metadata_of,
    parse_object,
    readable_bytes,
)
from distckpt.manifest import MANIFEST_NAME

INDEX_NAME = "model.safetensors.index.json"
WHOLE_NAME = "model.safetensors"
INDEX_ENDING = ".safetensors.index.json"

_ENDING = ".safetensors"

_HEADER_SHARE_BYTES = 1000  # of the largest header, for what is no name


class SafetensorsFolderFormat:
    """A folder of safetensors files: ``model.safetensors``, or several and an index.

    Where both are there, ``model.safetensors`` counts, as for transformers. Tensors that the index
    does not name are left out.

    Options for opening:
        index: Name of the index, where the folder has several, or it is called differently.
    Options for writing:
        max_shard_bytes: Tensor bytes of one file, at most; a larger tensor has a file of its own.
        framework: As in `SafetensorsFormat`.
    """

    name = "safetensors-folder"
    suffixes = ()

    def sniff(self, place: Place) -> bool:
        """See `Format`: by the names in the folder."""
        return _find(place.entries()) is not None

    def open(self, place: Place, *, index: str | None = None) -> Source:
        """See `Format`."""
        entries = place.entries()
        found = index or _find(entries)
        if found is None or found not in entries:
            raise UnsupportedFormat(
                f"{place.url}: expected a folder with {index or WHOLE_NAME + ' or ' + INDEX_NAME}, "
                f"found {', '.join(entries[:5]) or 'none'}; options={{'index': …}} names another"
            )
        if found.endswith(".safetensors"):
            return SafetensorsFile(place.entry(found))
        return _Folder(place, found)

    def write(
        self,
        place: Place,
        wanted: Wanted,
        *,
        max_shard_bytes: int = 5_000_000_000,
        framework: str | None = None,
    ) -> Writing:
        """See `Format`. The files have no name before the index has one, which is the commit."""
        # Not by what else is there: another rank may have written files of this one already.
        entries = place.entries()
        committed = {INDEX_NAME, WHOLE_NAME}.intersection(entries)
        if place.is_file() and not entries:
            raise already_there(place)
        if MANIFEST_NAME in entries:
            raise CheckpointExists(
                f"{place.url}: a checkpoint of distckpt is there, whose {MANIFEST_NAME} would hide "
                "the new files; write elsewhere, or delete it"
            )
        if committed and not wanted.replace:
            raise already_there(place)
        check_dtypes(wanted.tensors)
        metadata = metadata_of(wanted, framework)
        groups = list(_grouped(wanted.tensors, max_shard_bytes)) or [[]]
        # What is replaced stays readable until the commit: its files keep their names.
        token = f"-{wanted.token}" if committed else ""
        files = [
            place.entry(f"model{token}-{number:05d}-of-{len(groups):05d}.safetensors")
            for number in range(1, len(groups) + 1)
        ]
        images = [FileImage(group, metadata) for group in groups]
        file_of = {
            tensor.name: file.name.rpartition("/")[2]
            for file, group in zip(files, groups, strict=True)
            for tensor in group
        }
        index = {
            "metadata": {"total_size": sum(map(readable_bytes, wanted.tensors))},
            "weight_map": {tensor.name: file_of[tensor.name] for tensor in wanted.tensors},
        }
        return Writing(
            [partial(_write, file, image) for file, image in zip(files, images, strict=True)],
            [image.length for image in images],
            partial(_commit, place, index, committed, replace=wanted.replace),
            partial(_abort, files),
        )


def _find(entries: Iterable[str]) -> str | None:
    """Find the name of what says which tensors a folder has."""
    found = set(entries)
    for name in (WHOLE_NAME, INDEX_NAME):
        if name in found:
            return name
    others = [name for name in found if name.endswith(INDEX_ENDING)]
    return others[0] if len(others) == 1 else None


def _weight_map(place: Place) -> dict[str, str]:
    """Read an index: tensor → file.

    Raises:
        CorruptCheckpoint: It is none, or names files outside the folder.
    """
    length = place.size()
    if length > MAX_HEADER_BYTES:
        raise CorruptCheckpoint(
            f"{place.url}: {length} bytes; an index has at most {MAX_HEADER_BYTES}", path=place.url
        )
    found = parse_object(place, place.read(0, length)).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise CorruptCheckpoint(
            f"{place.url}: expected a weight_map of tensor to file name, found "
            f"{json.dumps(found)[:200]}",
            path=place.url,
        )
    escaping = sorted({name for name in found.values() if not _is_inside(name)})
    if escaping:
        raise CorruptCheckpoint(
            f"{place.url}: files outside the folder, or no file names: {escaping[:10]}; they are "
            "not opened",
            path=place.url,
        )
    return found


def _is_inside(name: str) -> bool:
    parts = name.split("/")
    return (
        not any(part in {"", ".", ".."} for part in parts)
        and not any(sign in name for sign in "\\:\0")
        and name.isprintable()
    )


class _Folder:
    """The files that an index names, as one `Source`."""

    def __init__(self, place: Place, index: str) -> None:
        weight_map = _weight_map(place.entry(index))
        files = {name: _open(place.entry(name)) for name in dict.fromkeys(weight_map.values())}
        numbers = {
            file: {tensor.name: number for number, tensor in enumerate(opened.contents.tensors)}
            for file, opened in files.items()
        }
        missing = [
            f"{name} in {file}" for name, file in weight_map.items() if name not in numbers[file]
        ]
        if missing:
            raise CorruptCheckpoint(
                f"{place.url}: {len(missing)} tensors are not where {index} says: "
                f"{', '.join(missing[:10])}",
                path=f"{place.url}/{index}",
            )
        self._where = [(files[file], numbers[file][name]) for name, file in weight_map.items()]
        tensors: list[ForeignTensor] = [
            opened.contents.tensors[number] for opened, number in self._where
        ]
        values: dict[str, object] = {}
        metadata: dict[str, object] = {}
        for opened in reversed(files.values()):  # of what differs, the first file's counts
            values |= opened.contents.values
            metadata |= opened.contents.metadata
        values = {name: value for name, value in values.items() if name not in weight_map}
        self.contents = Contents(tensors, values, metadata)

    def read_into(self, tensor: int, piece: int, start_byte: int, buffer: memoryview) -> None:
        """See `Source`."""
        opened, number = self._where[tensor]
        opened.read_into(number, piece, start_byte, buffer)


def _open(place: Place) -> SafetensorsFile:
    try:
        return SafetensorsFile(place)
    except FileNotFoundError as exc:
        raise CorruptCheckpoint(
            f"{place.url}: the index names this file, and it is not there: it was deleted, or not "
            "all files were copied",
            path=place.url,
        ) from exc


def _grouped(tensors: Iterable[Readable], limit_bytes: int) -> Iterable[list[Readable]]:
    """Cut tensors, in their order, into files."""
    group: list[Readable] = []
    size = header = 0
    for tensor in tensors:
        more, text = readable_bytes(tensor), 6 * len(tensor.name) + _HEADER_SHARE_BYTES
        if group and (size + more > limit_bytes or header + text > MAX_HEADER_BYTES // 2):
            yield group
            group, size, header = [], 0, 0
        group.append(tensor)
        size += more
        header += text
    if group:
        yield group


def _write(place: Place, image: FileImage) -> None:
    sink = place.create(image.length)
    try:
        image.write(sink)
        sink.commit()
    except BaseException:
        sink.abort()
        raise


def _commit(
    place: Place, index: Mapping[str, object], committed: set[str], *, replace: bool
) -> None:
    old: set[str] = set()
    if INDEX_NAME in committed:
        with suppress(CorruptCheckpoint, FileNotFoundError):
            old = set(_weight_map(place.entry(INDEX_NAME)).values())
    text = json.dumps(index, indent=2, ensure_ascii=False).encode()
    try:
        place.entry(INDEX_NAME).put(text, replace=replace)
    except FileExistsError as exc:
        raise already_there(place) from exc
    old = {name for name in old if name.endswith(_ENDING)}  # a stranger's index names anything
    # Who looks for one whole file first would still find the old one.
    new = set(index["weight_map"].values())  # type: ignore[attr-defined]
    for name in [WHOLE_NAME] * (WHOLE_NAME in committed) + sorted(old - new):
        place.entry(name).delete()


def _abort(files: Iterable[Place]) -> None:
    for file in files:
        with suppress(Exception):
            file.delete()


FORMAT = SafetensorsFolderFormat()
