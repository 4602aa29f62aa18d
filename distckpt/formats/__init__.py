"""Other formats' files: which is it, open it, write one. One module a format."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from typing import cast

from distckpt.errors import StoreError, UnsupportedFormat
from distckpt.foreign import ForeignStore
from distckpt.formats.base import Format, Place
from distckpt.manifest import MANIFEST_NAME
from distckpt.store import Store, open_store, parallel_bytes

OURS = "distckpt"

# Format → the module that has it as FORMAT, in the order in which a place is tried.
_MODULES = {
    "safetensors": "safetensors",
    "safetensors-folder": "safetensors_folder",
    "mindspore": "mindspore",
    "torch": "torch",
    "dcp": "dcp",
    "npz": "npz",
    "npy": "npy",
    "keras": "keras",
    "tensorflow": "tensorflow",
    "orbax": "orbax",
    "mindspore-ranks": "mindspore_ranks",
}


def find(name: str) -> Format:
    """Return a format by its name.

    Raises:
        UnsupportedFormat: There is none of this name.
    """
    if name not in _MODULES:
        known = ", ".join([OURS, *_MODULES])
        raise UnsupportedFormat(f"there is no format {name!r}; there are {known}")
    module = importlib.import_module(f"distckpt.formats.{_MODULES[name]}")
    return cast("Format", module.FORMAT)


def each() -> Iterator[Format]:
    """Yield all foreign formats, in the order in which a place is tried."""
    return map(find, _MODULES)


def for_writing(url: str) -> str:
    """Name the format that a destination's ending stands for; a folder becomes a checkpoint."""
    for form in each():
        if any(url.lower().endswith(suffix) for suffix in form.suffixes):
            return form.name
    return OURS


def locate(
    url: str | os.PathLike[str] | Store,
    *,
    storage_options: Mapping[str, object] | None = None,
    format: str | None = None,
    options: Mapping[str, object] | None = None,
) -> Store:
    """Open what is at a URL: a checkpoint's store, or another format's file as one.

    Args:
        url: Where; a `Store` is returned as it is.
        storage_options: Passed to the fsspec file system.
        format: Name of the format; by default it is told from what is there.
        options: The format's own, such as the key of an encrypted file.

    Returns:
        The store. Where there is nothing that is known, it is the plain one: `read_manifest` says
        what is missing.

    Raises:
        CorruptCheckpoint, UnsupportedFormat: A file of another format can't be opened.
        StoreError: The URL can't be opened.
    """
    store = open_store(url, storage_options=storage_options)
    ours = not isinstance(url, (str, os.PathLike)) or format == OURS
    if ours or (format is None and _is_ours(store)):
        checked_options(OURS, None, options)
        return store
    try:
        place = Place.at(cast("str", url), storage_options)
    except StoreError:
        if format is not None:
            raise
        return store  # a store's root holds no single file
    candidates = [find(format)] if format is not None else list(each())
    for form in candidates:
        if format is not None or form.sniff(place):
            given = checked_options(form.name, form.open, options)
            source = form.open(place, **given)
            at_once = parallel_bytes(place.parent)
            return ForeignStore(source, place.url, form.name, parallel_bytes=at_once)
    if place.is_file():
        raise UnsupportedFormat(
            f"{place.url}: expected a checkpoint, which is a folder, or a file of another format "
            f"({', '.join(_MODULES)}); this file is none of them, or its first bytes are damaged"
        )
    return store


def checked_options(
    format: str, call: Callable[..., object] | None, options: Mapping[str, object] | None
) -> dict[str, object]:
    """Return a format's options, if it has them.

    Args:
        format: The format.
        call: Its `open` or `write`; None where there are no options.
        options: What the user gave.

    Raises:
        UnsupportedFormat: It has no such options: all are named.
    """
    given = dict(options or {})
    known = []
    if call is not None:
        parameters = inspect.signature(call).parameters.values()
        if any(each.kind is each.VAR_KEYWORD for each in parameters):
            return given  # passed on to another format, which looks for itself
        known = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
    unknown = [name for name in given if name not in known]
    if unknown:
        verb = getattr(call, "__name__", "open and write")
        raise UnsupportedFormat(
            f"options={{{', '.join(f'{name!r}: …' for name in unknown)}}}: the {format} format has "
            f"no such option to {verb}; it has {', '.join(known) or 'none'}"
        )
    return given


def _is_ours(store: Store) -> bool:
    """Whether a store holds a checkpoint, or what a save has left of one."""
    try:
        store.size(MANIFEST_NAME)
    except FileNotFoundError:
        return any(name.startswith("shard-") for name in store.names())
    except StoreError:
        return False
    return True
