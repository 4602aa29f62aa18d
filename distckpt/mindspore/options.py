"""What the functions here have in common: files' names and options."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from distckpt.events import OnEvent
from distckpt.formats.base import Place
from distckpt.mindspore.nets import check_flags

Choice = Callable[[str], bool] | None
Name = str | os.PathLike[str]

FORMATS = {"ckpt": "mindspore", "safetensors": "safetensors"}
# What a `ModelCheckpoint` saves through a Manager: no file.
MANAGED = "distckpt"
_MODES = ("AES-GCM", "AES-CBC", "SM4-CBC")


@dataclass(frozen=True, slots=True)
class FileOptions:
    """How a file is written and read.

    Attributes:
        format: ``"ckpt"`` or ``"safetensors"``.
        key: To encrypt or decrypt with: 16, 24 or 32 bytes; None for a plain file.
        mode: ``"AES-GCM"``, ``"AES-CBC"`` or ``"SM4-CBC"``.
        crc: Whether a checksum is written.

    Raises:
        TypeError: A value of the wrong type.
        ValueError: An unknown format or mode; a checksum of an encrypted file; encryption in
            another format than ``.ckpt``.
    """

    format: str = "ckpt"
    key: bytes | None = None
    mode: str = "AES-GCM"
    crc: bool = False

    def __post_init__(self) -> None:
        check_flags(crc_check=self.crc)
        if self.key is not None and not isinstance(self.key, bytes):
            raise TypeError(f"a key is bytes or None, not {type(self.key).__name__}")
        if self.format not in FORMATS:
            raise ValueError(f"format={self.format!r}: expected 'ckpt' or 'safetensors'")
        if self.mode not in _MODES:
            raise ValueError(f"mode {self.mode!r}: expected one of {', '.join(_MODES)}")
        if self.key is not None and self.crc:
            raise ValueError(
                "crc_check=True with a key: MindSpore could not decrypt such a file again. AES-GCM "
                "detects every change by itself: leave crc_check out"
            )
        if self.format == "safetensors" and (self.key is not None or self.crc):
            raise ValueError(
                "format='safetensors' with a key or crc_check: only .ckpt files have these"
            )

    def of_writing(self) -> dict[str, object]:
        """Options of `Format.write`."""
        if self.format == "safetensors":
            return {}
        return {"key": self.key, "mode": self.mode, "crc": self.crc}


@dataclass(frozen=True, slots=True)
class Hooks:
    """What a `ModelCheckpoint` and a Manager take alike.

    Attributes:
        on_event: See `distckpt.Manager`.
        stop_signals: See `distckpt.Manager`.
        max_seconds: See `distckpt.Manager`.
    """

    on_event: OnEvent | Iterable[OnEvent] | None = None
    stop_signals: Iterable[int] = ()
    max_seconds: float | None = None


def is_async(async_save: object) -> bool:
    """Read MindSpore's argument of this name.

    Raises:
        TypeError: Neither bool nor str.
        ValueError: A str that is neither ``"thread"`` nor ``"process"``.
    """
    if isinstance(async_save, bool):
        return async_save
    if not isinstance(async_save, str):
        raise TypeError(f"async_save={async_save!r}: expected a bool, 'thread' or 'process'")
    if async_save not in ("thread", "process"):
        raise ValueError(f"async_save={async_save!r}: expected 'thread' or 'process'")
    return True


def place_to_write(path: Name, format: str) -> Place:
    """Find the place of a file to be written, as MindSpore names it.

    Raises:
        TypeError: The path is bytes.
        IsADirectoryError: There is a folder.
        FileNotFoundError: The folder that it lies in does not exist.
    """
    name = text_of(path)
    if not name.endswith(format):
        name += f".{format}"
    if "://" not in name:
        name = os.path.realpath(name)  # what a link points to is replaced, and not the link
        if Path(name).is_dir():
            raise IsADirectoryError(f"{name} is a folder; expected a file name")
        if not Path(name).parent.is_dir():
            raise FileNotFoundError(f"{name}: its folder does not exist; make it first")
    return Place.at(name)


def text_of(path: Name) -> str:
    """Return a path as text.

    Raises:
        TypeError: It is bytes.
    """
    found = os.fspath(path)
    if not isinstance(found, str):
        raise TypeError(f"a file name is a str or a path, not {type(found).__name__}")
    return found
