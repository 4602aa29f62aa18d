"""Orbax directories (OCDBT or not, zarr 2 or 3), read through tensorstore.

A directory has a ``_METADATA`` file, JSON, that lists the leaves of the tree; each array is a zarr
array named by its path, joined with dots, in a directory of its own or in one OCDBT database.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from distckpt import dtypes
from distckpt.errors import (
    CheckpointError,
    CorruptCheckpoint,
    IncompleteCheckpoint,
    UnsupportedFormat,
)
from distckpt.foreign import Contents, ForeignTensor, tensor_bytes
from distckpt.formats.base import Place, Wanted, Writing, library
from distckpt.formats.pieces import WholePieces, grid
from distckpt.state import MAX_DIMENSIONS, MAX_NAME_BYTES, MAX_TENSOR_BYTES

METADATA = "_METADATA"
_STRINGS = "_strings.json"
_OCDBT = "manifest.ocdbt"
# What a directory of several items has beside them, by Orbax's version.
_STEP_MARKS = frozenset({"_CHECKPOINT_METADATA", "orbax.checkpoint", "default", "pytree"})
_UNCOMMITTED = ".orbax-checkpoint-tmp"
_MAX_JSON_BYTES = 256 << 20
_MOST_ITEMS = 100
# A chunk may stick out of its array, but not be a bomb.
_CHUNK_EXCESS = 16
_CHUNK_BYTES = 1 << 20


class OrbaxFormat:
    """Directories that Orbax's StandardCheckpointer, PyTreeCheckpointer and managers write.

    The URL is such a directory, or one step of a CheckpointManager with one tree in it.
    """

    name = "orbax"
    suffixes: tuple[str, ...] = ()

    def sniff(self, place: Place) -> bool:
        """See `Format`."""
        try:
            return bool(_items(place))
        except (CheckpointError, OSError):
            return False

    def open(self, place: Place) -> OrbaxSource:
        """See `Format`; there are no options."""
        items = _items(place)
        if len(items) > 1 and not {"default"} & items.keys():
            raise UnsupportedFormat(
                f"{place.url}: {len(items)} trees in one step; open one of them: "
                + ", ".join(f"{place.url}/{name}" for name in sorted(items))
            )
        if not items:
            raise CorruptCheckpoint(
                f"{place.url}: expected an Orbax directory ({METADATA}), found "
                f"{', '.join(place.entries()[:10]) or 'nothing'}. Of a CheckpointManager, open one "
                "step",
                path=place.url,
            )
        return OrbaxSource(items.get("default") or next(iter(items.values())))

    def write(self, place: Place, wanted: Wanted) -> Writing:
        """Refuse."""
        del wanted
        raise UnsupportedFormat(
            f"{place.url}: Orbax directories are only read. Load what is to be written into a JAX "
            "tree (distckpt.load_into), and save that with orbax.checkpoint.StandardCheckpointer"
        )


class OrbaxSource:
    """An opened Orbax directory.

    Args:
        place: The directory, with ``_METADATA`` in it.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._tensorstore = library("tensorstore", extra="orbax", format="orbax")
        if _UNCOMMITTED in place.url:
            raise IncompleteCheckpoint(
                f"{place.url}: Orbax has not finished writing this directory; open another step"
            )
        self._head = _json(place.entry(METADATA))
        leaves = self._leaves()
        values: dict[str, object] = {}
        strings = _json(place.entry(_STRINGS)) if place.entry(_STRINGS).is_file() else {}
        for name, kind in leaves.items():
            if kind == "None":
                values[name] = None
            elif kind == "string":
                values[name] = strings.get(name)
                if not isinstance(values[name], str):
                    raise self._corrupt(f"{_STRINGS} holds no text of this name", name)
        arrays = {name: kind for name, kind in leaves.items() if name not in values}
        opened = [(name, self._open(name)) for name in arrays]
        self._arrays: list[Any] = []
        tensors: list[ForeignTensor] = []
        for name, promise in opened:
            with self._translated(name):
                array = promise.result()
            tensor = self._tensor(name, array)
            if arrays[name] == "scalar" and not tensor.shape:
                with self._translated(name):
                    self._check_stored(name, array)
                    values[name] = array.read().result()[()].item()
                if not isinstance(values[name], (bool, int, float)):
                    raise self._corrupt(f"a scalar of dtype {tensor.dtype.name}", name)
            else:
                tensors.append(tensor)
                self._arrays.append(array)
        custom = self._head.get("custom_metadata")
        metadata = custom if isinstance(custom, dict) else {}
        self._contents = Contents(tensors, values, metadata)
        self._pieces = WholePieces(self._read)

    @property
    def contents(self) -> Contents:
        """See `Source`. Python's scalars and texts in the tree are values."""
        return self._contents

    def read_into(self, tensor: int, piece: int, start_byte: int, buffer: memoryview) -> None:
        """See `Source`."""
        found = self._contents.tensors[tensor]
        shape = found.boxes[piece].shape
        self._pieces.read_into(tensor, piece, start_byte, buffer, shape=shape, dtype=found.dtype)

    def _read(self, tensor: int, piece: int) -> np.ndarray:
        found = self._contents.tensors[tensor]
        with self._translated(found.name):
            box = self._arrays[tensor][found.boxes[piece].slices]
            self._check_stored(found.name, box)
            return np.asarray(box.read().result())

    def _check_stored(self, name: str, box: Any) -> None:
        """Refuse chunks that are not there: zarr reads them as zeros."""
        if not self._head.get("store_array_data_equal_to_fill_value", False):
            return  # chunks of nothing but zeros were left out on purpose
        if 0 in box.shape or box.storage_statistics(query_fully_stored=True).result().fully_stored:
            return
        raise self._corrupt("some of its chunks are missing; copy the directory again", name)

    def _leaves(self) -> dict[str, str]:
        """Read which leaves there are: name → kind, without empty containers."""
        tree = self._head.get("tree_metadata")
        if not isinstance(tree, dict):
            raise self._corrupt("expected 'tree_metadata', an object")
        leaves: dict[str, str] = {}
        for path, leaf in tree.items():
            try:
                keys = [entry["key"] for entry in leaf["key_metadata"]]
                kind, skipped = leaf["value_metadata"]["value_type"], False
                skipped = bool(leaf["value_metadata"].get("skip_deserialize", False))
            except (TypeError, KeyError, AttributeError) as exc:
                raise self._corrupt(f"the entry {path[:100]!r} breaks the format: {exc!r}") from exc
            if not all(isinstance(text, str) for text in [*keys, kind]):
                raise self._corrupt(f"the entry {path[:100]!r} has a key or a type that is no text")
            name = ".".join(keys)
            if len(name) > MAX_NAME_BYTES:
                raise self._corrupt(f"a name of {len(name)} characters: {name[:40]!r}…")
            if name in leaves:
                raise self._corrupt("two leaves have this name", name)
            if not skipped or kind == "None":
                leaves[name] = kind
        return leaves

    def _open(self, name: str) -> Any:
        """Begin to open an array; only what lies in the directory is ever opened."""
        if not name or "\0" in name or {"", ".", ".."} & set(name.split("/")):
            raise self._corrupt("no name of a directory, which an array here needs", name)
        folder = str(self._place.local())
        store: dict[str, object] = {"driver": "file", "path": f"{folder}/{name}/"}
        if self._head.get("use_ocdbt", self._place.entry(_OCDBT).is_file()):
            base = {"driver": "file", "path": f"{folder}/"}
            store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        driver = "zarr3" if self._head.get("use_zarr3", False) else "zarr"
        with self._translated(name):
            return self._tensorstore.open(
                {"driver": driver, "kvstore": store}, open=True, create=False, read=True
            )

    def _tensor(self, name: str, array: Any) -> ForeignTensor:
        shape = tuple(array.shape)
        entry = dtypes.find(np.dtype(array.dtype.numpy_dtype))
        if entry is None:
            raise UnsupportedFormat(
                f"{self._place.url}: {name!r}: no dtype {array.dtype.name} here"
            )
        size = tensor_bytes([extent or 1 for extent in shape], entry)
        if len(shape) > MAX_DIMENSIONS or size > MAX_TENSOR_BYTES:
            raise self._corrupt(f"an absurd shape: {list(shape)}", name)
        if not shape:
            return ForeignTensor(name, shape, entry)
        chunk = [extent or 1 for extent in array.chunk_layout.read_chunk.shape]
        chunk_bytes = tensor_bytes(chunk, entry)
        if chunk_bytes > max(_CHUNK_EXCESS * size, _CHUNK_BYTES):
            raise self._corrupt(f"chunks of shape {chunk}, but the array has {list(shape)}", name)
        return ForeignTensor(name, shape, entry, grid(shape, chunk, entry.itemsize))

    @contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        """Turn tensorstore's errors, which are ValueErrors and the like, into ours."""
        try:
            yield
        except (CheckpointError, MemoryError):
            raise
        except Exception as exc:
            what = str(exc).partition(" [tensorstore_spec=")[0]
            raise self._corrupt(f"tensorstore can't read it: {what}", name) from exc

    def _corrupt(self, what: str, name: str | None = None) -> CorruptCheckpoint:
        where = f"{self._place.url}/{METADATA}" if name is None else self._place.url
        subject = "" if name is None else f"{name[:100]!r}: "
        return CorruptCheckpoint(f"{where}: {subject}{what}", path=where)


def _items(place: Place) -> dict[str, Place]:
    """Find the trees at a place: the directory itself, or the items of a step."""
    names = place.entries()
    if METADATA in names:
        return {"default": place}
    if not _STEP_MARKS & set(names):
        return {}
    items = {name: place.entry(name) for name in names[:_MOST_ITEMS]}
    return {name: item for name, item in items.items() if item.entry(METADATA).is_file()}


def _json(place: Place) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CorruptCheckpoint: It is something else.
    """
    size = place.size()
    if size > _MAX_JSON_BYTES:
        raise CorruptCheckpoint(f"{place.url}: {size} bytes are too many for it", path=place.url)
    try:
        found = json.loads(place.read(0, size).decode())
    except (ValueError, RecursionError) as exc:
        raise CorruptCheckpoint(f"{place.url}: it is no JSON: {exc}", path=place.url) from exc
    if not isinstance(found, dict):
        raise CorruptCheckpoint(f"{place.url}: expected a JSON object", path=place.url)
    return found


FORMAT = OrbaxFormat()
