"""TensorFlow's V2 checkpoints: ``<prefix>.index`` and ``<prefix>.data-00000-of-00001``, read only.

Read through TensorFlow's own reader, which checks each tensor's checksum and reads it whole. Names
of the object graph (``model/w/.ATTRIBUTES/VARIABLE_VALUE``) become dotted ones (``model.w``).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from distckpt import dtypes
from distckpt.errors import CheckpointError, CorruptCheckpoint, UnsupportedFormat
from distckpt.foreign import Contents, ForeignTensor, tensor_bytes
from distckpt.formats.base import Place, Wanted, Writing, library
from distckpt.formats.pieces import WholePieces
from distckpt.state import MAX_DIMENSIONS

_log = logging.getLogger(__name__)

_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
_ATTRIBUTES = "/.ATTRIBUTES/"
_INDEX = ".index"
_DATA = re.compile(r"\.data-\d{5}-of-\d{5}")
_TABLE_MAGIC = bytes.fromhex("57fb808b247547db")  # ends a LevelDB table, which the index is
_STATE_LINE = re.compile(r'^model_checkpoint_path:\s*"((?:[^"\\]|\\.)*)"', re.MULTILINE)
_MAX_STATE_BYTES = 1 << 20


class TensorFlowFormat:
    """V2 bundles: the URL is the prefix, the ``.index`` file, or a folder (of a SavedModel, too).

    A folder's ``checkpoint`` file says which bundle is the latest; without one, there may be only
    one bundle.
    """

    name = "tensorflow"
    suffixes: tuple[str, ...] = ()

    def sniff(self, place: Place) -> bool:
        """See `Format`."""
        try:
            return bool(_bundles(place))
        except (CheckpointError, OSError):
            return False

    def open(self, place: Place) -> TensorFlowSource:
        """See `Format`; there are no options."""
        return TensorFlowSource(_bundle(place))

    def write(self, place: Place, wanted: Wanted) -> Writing:
        """Refuse: only TensorFlow, with the model at hand, can write its object graph."""
        del wanted
        raise UnsupportedFormat(
            f"{place.url}: TensorFlow checkpoints are only read. To bring tensors into TensorFlow, "
            "assign those of distckpt.load(url) to the model's variables, and save it there; Keras "
            "models load .weights.h5 files (format='keras')"
        )


class TensorFlowSource:
    """An opened bundle.

    Args:
        prefix: Its place, without ``.index``.
    """

    def __init__(self, prefix: Place) -> None:
        self._url = prefix.url
        stored = _data_bytes(prefix)
        reader = _import_reader()
        with self._translated("index"):
            self._reader = reader(str(prefix.local()))
            shapes: dict[str, list[int]] = self._reader.get_variable_to_shape_map()
            types = self._reader.get_variable_to_dtype_map()
        self._keys: list[str] = []
        tensors: list[ForeignTensor] = []
        values: dict[str, object] = {}
        skipped: dict[str, str] = {}
        seen: dict[str, str] = {}
        total = 0
        for key in sorted(shapes):
            if key == _GRAPH:
                continue
            name, shape = _dotted(key), tuple(shapes[key])
            if name in seen:
                raise UnsupportedFormat(
                    f"{self._url}: {seen[name]!r} and {key!r} both become {name!r}; save one under "
                    "another name"
                )
            seen[name] = key
            kind = types[key]
            if kind.name == "string" and not shape:
                with self._translated(key):
                    values[name] = self._reader.get_tensor(key)
                continue
            entry = dtypes.BY_NAME.get(kind.name)
            if entry is None:
                skipped[name] = f"{kind.name} of shape {list(shape)}"
                continue
            size = tensor_bytes(shape, entry)
            total += size
            # Data is stored uncompressed, so nothing can be longer than the files.
            if len(shape) > MAX_DIMENSIONS or min(shape, default=0) < 0 or total > stored:
                raise CorruptCheckpoint(
                    f"{self._url}{_INDEX}: {key!r} has shape {list(shape)}, {size} bytes of "
                    f"{entry.name}, but the data files have {stored} bytes for all tensors; copy "
                    "them again",
                    path=self._url + _INDEX,
                )
            self._keys.append(key)
            tensors.append(ForeignTensor(name, shape, entry))
        if skipped:
            _log.warning(
                "%s: %d entries can't be had here and are left out: %s",
                self._url,
                len(skipped),
                ", ".join(f"{name} ({what})" for name, what in skipped.items()),
            )
        self._contents = Contents(tensors, values, {"left_out": skipped} if skipped else {})
        self._pieces = WholePieces(self._read)

    @property
    def contents(self) -> Contents:
        """See `Source`. What is left out (arrays of strings) is ``metadata["left_out"]``."""
        return self._contents

    def read_into(self, tensor: int, piece: int, start_byte: int, buffer: memoryview) -> None:
        """See `Source`."""
        found = self._contents.tensors[tensor]
        with self._translated(self._keys[tensor]):
            self._pieces.read_into(
                tensor, piece, start_byte, buffer, shape=found.shape, dtype=found.dtype
            )

    def _read(self, tensor: int, piece: int) -> np.ndarray:
        del piece  # the only one
        return np.asarray(self._reader.get_tensor(self._keys[tensor]))

    @contextlib.contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """Turn TensorFlow's errors, which have no common base but Exception, into ours."""
        try:
            yield
        except MemoryError:
            raise
        except Exception as exc:
            raise CorruptCheckpoint(
                f"{self._url}: TensorFlow can't read {what!r}: {exc}", path=self._url
            ) from exc


def _import_reader() -> Any:
    # TensorFlow reports each CPU feature while it is imported, unless told otherwise before.
    name = "TF_CPP_MIN_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ.setdefault(name, "3")
    try:
        tensorflow = library("tensorflow", extra="tensorflow", format="tensorflow")
        return tensorflow.train.load_checkpoint
    finally:
        if before is None:
            del os.environ[name]


def _dotted(key: str) -> str:
    """Make a dotted name of a key of the object graph; any other key keeps its own dots.

    Examples:
        >>> _dotted("model/layer/kernel/.ATTRIBUTES/VARIABLE_VALUE")
        'model.layer.kernel'
        >>> _dotted("w/.OPTIMIZER_SLOT/adam/m/.ATTRIBUTES/VARIABLE_VALUE")
        'w.OPTIMIZER_SLOT.adam.m'
    """
    path, found, attribute = key.rpartition(_ATTRIBUTES)
    if not found:
        return key.replace("/", ".")
    # The object graph writes '.' in a name as '..', and '/' as '.S'.
    plain = {"..": ".", ".S": "/"}
    parts = [
        re.sub(r"\.\.|\.S", lambda match: plain[match.group()], part)
        if part != ".OPTIMIZER_SLOT"
        else part[1:]
        for part in path.split("/")
    ]
    if attribute != "VARIABLE_VALUE":
        parts += ["ATTRIBUTES", attribute]
    return ".".join(parts)


def _bundles(place: Place) -> dict[str, Place]:
    """Find the bundles at a place: name → prefix. One for a prefix or an index file."""
    if place.is_file():
        stem = place.name.removesuffix(_INDEX)
        return {stem: place.beside(stem)} if stem != place.name and _is_index(place) else {}
    if _is_index(place.beside(place.name + _INDEX)):
        return {place.name: place}
    names = place.entries()
    if "saved_model.pb" in names and "variables" in names:
        place = place.entry("variables")
        names = place.entries()
    return {
        name.removesuffix(_INDEX): place.entry(name.removesuffix(_INDEX))
        for name in names
        if name.endswith(_INDEX)
        and any(
            other.startswith(name.removesuffix(_INDEX)) and _DATA.search(other) for other in names
        )
        and _is_index(place.entry(name))
    }


def _bundle(place: Place) -> Place:
    """Find the one bundle that a place stands for."""
    bundles = _bundles(place)
    if len(bundles) == 1:
        return next(iter(bundles.values()))
    if not bundles:
        raise CorruptCheckpoint(
            f"{place.url}: expected a TensorFlow checkpoint (a prefix, its .index file, or a "
            "folder with one), found none, or one whose .index is cut short",
            path=place.url,
        )
    state = place.entry("checkpoint")
    if state.is_file() and state.size() <= _MAX_STATE_BYTES:
        text = state.read(0, state.size()).decode(errors="replace")
        found = _STATE_LINE.search(text)
        # Only its last part counts: the folder may have been moved, and no other one is opened.
        latest = found.group(1).rpartition("/")[2] if found else ""
        if latest in bundles:
            return bundles[latest]
    raise UnsupportedFormat(
        f"{place.url}: {len(bundles)} TensorFlow checkpoints, and no file 'checkpoint' that names "
        f"the latest; open one of them: {', '.join(sorted(bundles)[:20])}"
    )


def _is_index(place: Place) -> bool:
    if not place.is_file():
        return False
    size, length = place.size(), len(_TABLE_MAGIC)
    return size >= length and place.read(size - length, size) == _TABLE_MAGIC


def _data_bytes(prefix: Place) -> int:
    """Add up the data files; all that their names speak of must be there."""
    path = prefix.local()
    pattern = re.compile(re.escape(path.name) + r"\.data-(\d{5})-of-(\d{5})")
    found = [
        (int(match[1]), int(match[2]), entry.stat().st_size)
        for entry in path.parent.iterdir()
        if (match := pattern.fullmatch(entry.name))
    ]
    count = max((of for _, of, _ in found), default=0)
    numbers = {number for number, of, _ in found if of == count}
    if not found or len(numbers) != count:
        missing = sorted(set(range(count)) - numbers)
        raise CorruptCheckpoint(
            f"{prefix.url}: of its data files, {missing[:20] or 'all'} of {count} are missing; "
            "copy them, too",
            path=prefix.url,
        )
    return sum(size for _, of, size in found if of == count)


FORMAT = TensorFlowFormat()
