"""Each reader of bytes from strangers: how to let it loose on an input, and how to change one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

from fuzz import mutate
from fuzz.guard import GuardedStore, Violation, watched

from distckpt import CheckpointError, codec
from distckpt.checkpoint import Checkpoint
from distckpt.codec.strategy import StrategyFile, decode_json_strategy, decode_strategy
from distckpt.foreign import ForeignStore
from distckpt.formats import each, find
from distckpt.formats.base import Place
from distckpt.formats.mindspore_crypt import mode_of
from distckpt.formats.mindspore_layout import rank_layout
from distckpt.manifest import MANIFEST_NAME
from distckpt.reader import read_manifest

CORPUS = Path(__file__).parent / "corpus"

# What tensors may claim, in terms of what is there; and how large a one is read here.
_EXPANSION = 64
_FREE_BYTES = 1 << 20
_READ_BYTES = 4 << 20
_INPUT = "input"


@dataclass(frozen=True)
class Reader:
    """A reader.

    Attributes:
        read: Reads an input to the end; raises CheckpointError for what is no good.
        mutate: Changes an input so that it stays nearly valid: (input, random) → input.
        multiple: Bytes of memory that it may take for each byte of the input.
    """

    read: Callable[[bytes], None]
    mutate: Callable[[bytes, Random], bytes]
    multiple: int = 64

    def warm(self, inputs: Iterable[bytes]) -> None:
        """Read inputs unwatched: what is imported when it is needed is there from then on."""
        b"x".decode("cp437")  # for names in zip archives
        for data in inputs:
            with suppress(CheckpointError, FileNotFoundError):
                self.read(data)

    def check(self, data: bytes) -> None:
        """Read an input under watch.

        Raises:
            Exception: Anything: the reader breaks a promise.
        """
        with watched((24 << 20) + self.multiple * len(data), 10.0):
            self.read(data)


def _check_foreign(form: str, objects: dict[str, bytes], **options: object) -> None:
    """Sniff and open a file or folder of a format, and read all of it."""
    store = GuardedStore(_INPUT, objects)
    name = next(iter(objects)) if len(objects) == 1 else _INPUT
    place = Place("input", store, name)
    for other in each():
        other.sniff(place)
    source = find(form).open(place, **options)
    _read_tensors(Checkpoint(ForeignStore(source, "input", form)), sum(map(len, objects.values())))


def _read_tensors(checkpoint: Checkpoint, stored_bytes: int) -> None:
    claimed = checkpoint.manifest.tensor_bytes
    if claimed > _EXPANSION * (stored_bytes + _FREE_BYTES):
        raise Violation(f"tensors of {claimed} bytes in {stored_bytes}")
    for name in checkpoint:
        tensor = checkpoint[name]
        if tensor.nbytes <= _READ_BYTES:
            tensor.read()
            tensor[..., :1] if tensor.ndim else tensor[...]
    len(checkpoint.values), len(checkpoint.metadata)


def _read_manifest(data: bytes) -> None:
    store = GuardedStore("", {MANIFEST_NAME: data})
    checkpoint = Checkpoint(store, read_manifest(store))
    len(checkpoint.values), len(checkpoint.metadata), len(checkpoint.metrics), checkpoint.created
    for name in list(checkpoint)[:4]:
        checkpoint.manifest.dtype_of(checkpoint.manifest.index[name])
    for name in checkpoint.per_rank:
        checkpoint.manifest.blob_place(name, checkpoint.ranks - 1)
    checkpoint.verify()  # no file is there


def _read_blob(data: bytes) -> None:
    codec.unpack(data)


def _read_encrypted(data: bytes) -> None:
    mode = mode_of(data[:4]) or "AES-GCM"
    _check_foreign("mindspore", {f"{_INPUT}.ckpt": data}, key=mutate.KEY, mode=mode)


def _read_dcp(data: bytes) -> None:
    metadata, rest = mutate.parted(data)
    _check_foreign("dcp", {f"{_INPUT}/.metadata": metadata, f"{_INPUT}/__0_0.distcp": rest})


def _read_index(data: bytes) -> None:
    index, rest = mutate.parted(data)
    names = ("model.safetensors.index.json", "model-00001-of-00002.safetensors")
    objects = dict(zip((f"{_INPUT}/{name}" for name in names), (index, rest), strict=True))
    _check_foreign("safetensors-folder", objects)


def _read_strategy(data: bytes) -> None:
    _cut(decode_strategy(data, path="input"))


def _read_json_strategy(data: bytes) -> None:
    _cut(decode_json_strategy(data, path="input"))


def _cut(strategy: StrategyFile) -> None:
    for placements in rank_layout(strategy).placements.values():
        for ndim in range(4):
            with suppress(CheckpointError):
                placements[0].cut(ndim)


READERS = {
    "manifest": Reader(_read_manifest, mutate.manifest),
    "blob": Reader(_read_blob, mutate.blob),
    "safetensors": Reader(
        lambda data: _check_foreign("safetensors", {f"{_INPUT}.safetensors": data}),
        mutate.safetensors,
    ),
    "safetensors-folder": Reader(_read_index, mutate.index),
    "ckpt": Reader(lambda data: _check_foreign("mindspore", {f"{_INPUT}.ckpt": data}), mutate.ckpt),
    "ckpt-encrypted": Reader(_read_encrypted, mutate.encrypted),
    "npy": Reader(lambda data: _check_foreign("npy", {f"{_INPUT}.npy": data}), mutate.npy),
    "npz": Reader(lambda data: _check_foreign("npz", {f"{_INPUT}.npz": data}), mutate.npz),
    "torch": Reader(lambda data: _check_foreign("torch", {f"{_INPUT}.pt": data}), mutate.torch),
    "dcp": Reader(_read_dcp, mutate.dcp),
    "strategy": Reader(_read_strategy, mutate.wire),
    "strategy-json": Reader(_read_json_strategy, mutate.json_text),
}


def corpus(reader: str) -> dict[str, bytes]:
    """Return the committed inputs of a reader by name: seeds, and what once broke it."""
    folder = CORPUS / reader
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
