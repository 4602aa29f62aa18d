"""`save_checkpoint`: a net, or named values, as one file."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distckpt.errors import LayoutError
from distckpt.flat import flatten
from distckpt.formats import find
from distckpt.formats.base import Place, Wanted
from distckpt.mindspore.background import BACKGROUND, PendingSave
from distckpt.mindspore.nets import check_flags, refuse_redundancy
from distckpt.mindspore.options import (
    FORMATS,
    Choice,
    FileOptions,
    Name,
    is_async,
    place_to_write,
)
from distckpt.mindspore.values import entries, named
from distckpt.region import Region
from distckpt.state import FlatShard, LazyArray, Shard


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor in memory, to be written; see `formats.base.Readable`."""

    name: str
    array: np.ndarray | LazyArray
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.array.shape

    def read(self, region: Region | None = None) -> np.ndarray:
        """Copy it, or a box of it."""
        if isinstance(self.array, LazyArray):
            found = self.array.read(region)
        else:
            found = self.array if region is None else self.array[region.slices]
        return np.array(found, self.dtype, order="C")


def save_checkpoint(
    save_obj: object,
    ckpt_file_name: Name,
    integrated_save: bool = True,
    async_save: bool | str = False,
    append_dict: Mapping[str, Any] | None = None,
    enc_key: bytes | None = None,
    enc_mode: str = "AES-GCM",
    choice_func: Choice = None,
    crc_check: bool = False,
    format: str = "ckpt",
    **kwargs: Any,
) -> PendingSave | None:
    """Save a net, or named values, as a file; what was there is replaced when all is durable.

    Args:
        save_obj: A ``mindspore.nn.Cell``; nested dicts, lists and dataclasses of arrays; what
            `load_checkpoint` returned; a list of Parameters or of ``{"name", "data"}`` dicts.
        ckpt_file_name: A path or any URL that fsspec knows; the format is appended if it doesn't
            end with it.
        integrated_save: Accepted; arrays are whole here.
        async_save: True, ``"thread"`` or ``"process"``: copy the arrays, and write in the
            background (always by a thread).
        append_dict: Further entries: name → int, float, bool, str, Parameter or Tensor.
        enc_key: Encrypts the file: 16, 24 or 32 bytes.
        enc_mode: ``"AES-GCM"``, ``"AES-CBC"`` or ``"SM4-CBC"``.
        choice_func: A predicate: only names that it accepts are saved.
        crc_check: Whether to write a checksum.
        format: ``"ckpt"`` or ``"safetensors"``.
        **kwargs: MindSpore's ``incremental``, ``global_step_num`` and ``remove_redundancy``, which
            must not ask for anything.

    Returns:
        The save in flight where it is asynchronous, else None.

    Raises:
        TypeError: An argument is of the wrong type, or a value is no array, number or str.
        LayoutError: Two entries of one name, or nothing to save.
        UnsupportedFormat: The format can't hold some of it.
        FileNotFoundError: The folder does not exist.
        StoreError: The store failed; the file that was there is unchanged.
        CheckpointError: An asynchronous save before failed, and nobody was told; not saved.
    """
    check_flags(integrated_save=integrated_save)
    _check_rest(kwargs)
    options = FileOptions(format, enc_key, enc_mode, crc_check)
    background = is_async(async_save)
    place = place_to_write(ckpt_file_name, format)
    return save_file(
        place,
        save_obj,
        options,
        append_dict=append_dict,
        choice_func=choice_func,
        background=background,
    )


def save_file(
    place: Place,
    save_obj: object,
    options: FileOptions,
    *,
    append_dict: Mapping[str, Any] | None = None,
    choice_func: Choice = None,
    background: bool = False,
    ended: Callable[[BaseException | None], None] = lambda _: None,
) -> PendingSave | None:
    """Save a file; see `save_checkpoint`.

    Args:
        place: Where.
        save_obj: What.
        options: How.
        append_dict: See `save_checkpoint`.
        choice_func: See `save_checkpoint`.
        background: Whether to copy now and write later.
        ended: Called when the file is durable, or with what failed, by the thread that wrote it.

    Returns:
        The save in flight if it is in the background.
    """
    BACKGROUND.settle()
    held, texts = collect_entries(save_obj, append_dict, choice_func)
    if background:
        held = [Held(each.name, each.read(), each.dtype) for each in held]
    write = writer(place, held, texts, options)

    def save() -> None:
        try:
            write()
        except BaseException as exc:
            ended(exc)
            raise
        ended(None)

    if background:
        return BACKGROUND.start(place.url, save)
    save()
    return None


def collect_entries(
    save_obj: object, append_dict: Mapping[str, Any] | None, choice_func: Choice
) -> tuple[list[Held], dict[str, str]]:
    """Take what is to be saved apart: tensors, and texts by name.

    Raises:
        TypeError, LayoutError: See `save_checkpoint`.
    """
    if append_dict is not None and not isinstance(append_dict, Mapping):
        raise TypeError(f"append_dict is a {type(append_dict).__name__}; expected a dict")
    state = named(save_obj) if isinstance(save_obj, list) else save_obj
    if isinstance(state, (tuple, str, bytes, int, float, type(None))):
        raise TypeError(
            f"save_obj is a {type(state).__name__}; expected a net, a dict, or a list of "
            'Parameters or of {"name", "data"} dicts'
        )
    flat = flatten(state)
    pieces = [t.name for t in flat.tensors if isinstance(t.leaf.value, (Shard, FlatShard))]
    pieces += flat.per_rank
    if pieces:
        raise LayoutError(
            f"{', '.join(map(repr, pieces))}: pieces of tensors, or values that differ by rank, "
            "have no place in one rank's file; use distckpt.save"
        )
    held = [Held(tensor.name, tensor.array, tensor.dtype.numpy) for tensor in flat.tensors]
    plain = entries({name: leaf.value for name, leaf in flat.values.items()})
    if choice_func is not None:
        held = [each for each in held if choice_func(each.name)]
        plain = {name: value for name, value in plain.items() if choice_func(name)}
    more = entries(append_dict or {})
    twice = sorted({each.name for each in held}.union(plain) & set(more))
    if twice:
        raise LayoutError(
            f"{', '.join(map(repr, twice))}: append_dict has names of save_obj; rename them"
        )
    plain |= more
    texts = {name: value for name, value in plain.items() if isinstance(value, str)}
    arrays = {name: value for name, value in plain.items() if isinstance(value, np.ndarray)}
    held += [Held(name, array, array.dtype) for name, array in arrays.items()]
    if not held and not texts:
        raise LayoutError(
            "nothing to save: save_obj is empty, or choice_func accepts no name of it"
        )
    return held, texts


def writer(
    place: Place, held: Sequence[Held], texts: Mapping[str, str], options: FileOptions
) -> Callable[[], None]:
    """Say how to write a file; what is wrong with the content is refused now."""
    form = find(FORMATS[options.format])
    metadata = {"format": "ms"} if options.format == "safetensors" else {}
    wanted = Wanted(held, texts, metadata, token=secrets.token_hex(8), replace=True)
    writing = form.write(place, wanted, **options.of_writing())

    def write() -> None:
        try:
            for part in writing.parts:
                part()
        except BaseException:
            writing.abort()
            raise
        writing.commit()

    return write


def _check_rest(kwargs: Mapping[str, object]) -> None:
    rest = dict(kwargs)
    refuse_redundancy(remove_redundancy=rest.pop("remove_redundancy", None) or False)
    if rest.pop("incremental", False):
        raise TypeError("incremental=True: only MindSpore itself saves map parameters so")
    rest.pop("global_step_num", None)
    if rest:
        raise TypeError(f"save_checkpoint has no argument {', '.join(rest)}")
