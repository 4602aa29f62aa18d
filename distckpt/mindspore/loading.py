"""`load_checkpoint`: one file, as named parameters."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from distckpt.checkpoint import Checkpoint
from distckpt.errors import CheckpointNotFound, LayoutError
from distckpt.foreign import ForeignStore
from distckpt.formats import find
from distckpt.formats.base import Place
from distckpt.mindspore.background import BACKGROUND
from distckpt.mindspore.nets import (
    Prefixes,
    check_flags,
    keep_names,
    load_param_into_net,
    refuse_redundancy,
)
from distckpt.mindspore.options import FORMATS, Choice, FileOptions, Name, text_of
from distckpt.mindspore.values import Parameters, make_parameter

logger = logging.getLogger(__name__)


class CheckpointFileNotFound(CheckpointNotFound, ValueError):
    """There is no such file. MindSpore raises a ValueError for it."""


def load_checkpoint(
    ckpt_file_name: Name,
    net: object = None,
    strict_load: bool = False,
    filter_prefix: Prefixes = None,
    dec_key: bytes | None = None,
    dec_mode: str = "AES-GCM",
    specify_prefix: Prefixes = None,
    choice_func: Choice = None,
    crc_check: bool = False,
    remove_redundancy: bool = False,
    format: str = "ckpt",
) -> Parameters:
    """Load a file: its parameters by name, and its texts.

    Args:
        ckpt_file_name: A path or any URL that fsspec knows; ends with the format.
        net: If given, what is loaded goes into it, too: see `load_param_into_net`.
        strict_load: For `load_param_into_net`.
        filter_prefix: A prefix or several: names that start with one are left out.
        dec_key: The key of an encrypted file.
        dec_mode: How it is encrypted.
        specify_prefix: A prefix or several: only names that start with one are loaded.
        choice_func: A predicate: only names that it accepts are loaded. As in MindSpore, either
            prefix switches it off.
        crc_check: Whether to ask for a checksum; one that the file has is always checked.
        remove_redundancy: Must be False.
        format: ``"ckpt"`` or ``"safetensors"``.

    Returns:
        A dict: name → Parameter (MindSpore's own where MindSpore is imported) or str. It can be
        edited as a list, too: see `Parameters`.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: Nothing is left, an empty prefix, or a name that doesn't end with the format.
        CheckpointFileNotFound: There is no such file; it is a FileNotFoundError and a ValueError.
        CorruptCheckpoint: The file is damaged, or the key is wrong.
        UnsupportedFormat: It holds what can't be had.
        StoreError: The store failed.
    """
    check_flags(strict_load=strict_load, crc_check=crc_check)
    refuse_redundancy(remove_redundancy=remove_redundancy)
    FileOptions(format, dec_key, dec_mode)
    name = text_of(ckpt_file_name)
    if not name.endswith(format):
        raise ValueError(
            f"{name}: expected a name that ends with .{format}; format= says which format it is, "
            "and distckpt.load opens other formats"
        )
    BACKGROUND.join()
    place = Place.at(name)
    if not place.is_file():
        raise CheckpointFileNotFound(f"{place.url}: there is no such file")
    options = {} if format == "safetensors" else {"key": dec_key, "mode": dec_mode}
    form = find(FORMATS[format])
    source = form.open(place, **options)
    if crc_check and getattr(source, "crc", None) is None:
        logger.warning("%s: crc_check=True, but the file has no checksum", place.url)
    store = ForeignStore(source, place.url, form.name)
    checkpoint = Checkpoint(store, store.manifest)
    names = [*checkpoint, *(n for n, v in checkpoint.values.items() if isinstance(v, str))]
    if not names:
        raise ValueError(f"{place.url}: the file is empty: it holds no parameter")
    kept = keep_names(names, filter_prefix=filter_prefix, specify_prefix=specify_prefix)
    if choice_func is not None and filter_prefix is None and specify_prefix is None:
        kept = [each for each in kept if choice_func(each)]
        if not kept:
            raise ValueError(f"{place.url}: choice_func accepts none of its {len(names)} names")
    found = Parameters()
    for each, short in _shortened(kept, place.url):
        found[short] = (
            checkpoint.values[each]
            if each in checkpoint.values
            else make_parameter(checkpoint[each].read(), short)
        )
    if net is not None:
        load_param_into_net(net, found, strict_load)
    return found


def _shortened(names: Sequence[str], url: str) -> Iterator[tuple[str, str]]:
    """Yield each name with what MindSpore calls it: without the mark of a cached parameter.

    Raises:
        LayoutError: Two would have one name.
    """
    short = [name.partition(".__param_key__")[0] for name in names]
    if len(set(short)) < len(short):
        twice = sorted({name for name in short if short.count(name) > 1})
        raise LayoutError(f"{url}: several parts of {', '.join(twice)}; choose with choice_func=")
    return zip(names, short, strict=True)
