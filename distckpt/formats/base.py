"""What a format module offers: a `Format`; and what it is given."""

from __future__ import annotations

import importlib
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from distckpt.errors import (
    CheckpointExists,
    CorruptCheckpoint,
    StoreError,
    UnsupportedFormat,
    without_secrets,
)
from distckpt.foreign import Source
from distckpt.region import Region
from distckpt.store import LocalStore, Sink, Store, open_store

# How many times its own length the tensors of a compressed file may have, unless its reader is told
# otherwise: those of an honest file seldom reach 10, those of a bomb a thousand.
MAX_EXPANSION = 64

_COPY_BYTES = 4 << 20
_FREE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """A file, or a folder of files, in a store.

    Attributes:
        url: As the user gave it, without what may be secret in it.
        parent: The folder that it lies in.
        name: Its name there.
    """

    url: str
    parent: Store
    name: str

    @classmethod
    def at(
        cls, url: str | os.PathLike[str], storage_options: Mapping[str, object] | None = None
    ) -> Place:
        """Find the place of a URL; nothing is contacted.

        Raises:
            StoreError: The URL can't be opened.
        """
        text = os.fspath(url)
        if "://" not in text:
            text = str(Path(text).absolute())
        text = text.rstrip("/")
        parent, _, name = text.rpartition("/")
        if not name or parent.endswith(":/"):
            raise StoreError(f"{os.fspath(url)}: expected a file or a folder in a store", url=text)
        store = open_store(parent or "/", storage_options=storage_options)
        return cls(without_secrets(text), store, name)

    def is_file(self) -> bool:
        """Whether it is one object; False where there is nothing, or a folder."""
        if isinstance(self.parent, LocalStore):
            return self.local().is_file()
        try:
            size = self.parent.size(self.name)
        except (FileNotFoundError, StoreError):
            return False
        return size > 0 or not self.entries()  # some file systems give folders a size, of 0

    def exists(self) -> bool:
        """Whether there is a file or a folder with something in it."""
        return self.is_file() or bool(self.entries())

    def size(self) -> int:
        """Length of the file in bytes.

        Raises:
            FileNotFoundError: No such file.
        """
        return self.parent.size(self.name)

    def read(self, start_byte: int, stop_byte: int) -> bytes:
        """Read a range.

        Memory is taken as the bytes come, for a server can say of a file that it has any length.

        Raises:
            CorruptCheckpoint: The file ends before.
        """
        found = bytearray()
        while len(found) < stop_byte - start_byte:
            at = start_byte + len(found)
            step = bytearray(min(stop_byte - at, max(_COPY_BYTES, len(found))))
            self.read_into(at, memoryview(step))
            found += step
        return bytes(found)

    def read_into(self, start_byte: int, buffer: memoryview) -> None:
        """Fill a buffer.

        Raises:
            CorruptCheckpoint: The file ends before.
        """
        try:
            self.parent.read_into(self.name, start_byte, buffer)
        except EOFError as exc:
            raise CorruptCheckpoint(
                f"{self.url}: the file is cut short: {exc}", path=self.url, offset_bytes=start_byte
            ) from exc

    def head(self, length_bytes: int) -> bytes:
        """Return the file's first bytes, for sniffing; fewer, or none, where there are no more."""
        with suppress(CorruptCheckpoint, StoreError, FileNotFoundError):
            if self.is_file():
                return self.read(0, min(length_bytes, self.size()))
        return b""

    def entries(self) -> list[str]:
        """Names of what lies in the folder; empty for a file, and where there is nothing."""
        return self.parent.names(self.name + "/")

    def entry(self, name: str) -> Place:
        """Return a place in the folder; `name` may lie deeper, such as ``rank_0/net.ckpt``."""
        return Place(f"{self.url}/{name}", self.parent, f"{self.name}/{name}")

    def beside(self, name: str) -> Place:
        """Return a place in the same folder."""
        folder, slash, _ = self.name.rpartition("/")
        url = f"{self.url.rpartition('/')[0]}/{name}"
        return Place(url, self.parent, folder + slash + name)

    def create(self, length_bytes: int) -> Sink:
        """Begin to write the file, which must not exist; see `Store.create`."""
        return self.parent.create(self.name, length_bytes)

    def put(self, data: bytes, *, replace: bool) -> None:
        """Write the file atomically and durably; see `Store.put`."""
        self.parent.put(self.name, data, replace=replace)

    def delete(self) -> None:
        """Delete the file; fine where there is none."""
        self.parent.delete([self.name])

    def move_to(self, target: Place, *, replace: bool) -> None:
        """Give the file another name in the same store; atomic and durable on local file systems.

        Raises:
            CheckpointExists: There is a file of that name, and `replace` is False.
            StoreError: The store refused.
        """
        if isinstance(self.parent, LocalStore):
            try:
                if replace:
                    # Who may read the old one may read the new one, and nobody else.
                    with suppress(FileNotFoundError):
                        self.local().chmod(stat.S_IMODE(target.local().stat().st_mode))
                    self.local().replace(target.local())
                else:
                    target.local().hardlink_to(self.local())
            except FileExistsError as exc:
                raise already_there(target) from exc
            except OSError as exc:
                raise StoreError(f"{target.url}: {exc}", url=target.url) from exc
        else:
            if not replace and target.is_file():
                raise already_there(target)
            length = self.size()
            sink = target.create(length)
            try:
                for start in range(0, length, _COPY_BYTES):
                    sink.write_at(start, self.read(start, min(start + _COPY_BYTES, length)))
                sink.commit()
            except BaseException:
                sink.abort()
                raise
        self.delete()  # which also makes the directory's new entry durable

    def local(self) -> Path:
        """Return the local path, for libraries that know nothing else.

        Raises:
            UnsupportedFormat: It isn't on a local file system.
        """
        if not isinstance(self.parent, LocalStore):
            raise UnsupportedFormat(
                f"{self.url}: this format's library reads and writes local files only; copy it"
            )
        return Path(self.parent.url) / self.name


class Readable(Protocol):
    """A tensor to be written; read when it is asked for."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> np.dtype:
        """Its dtype, little-endian; `dtypes.find` has its entry."""

    def read(self, region: Region | None = None) -> np.ndarray:
        """Read it, or a box of it: a new C-contiguous array. Reading it all is the fast way."""


@dataclass(frozen=True, slots=True)
class Writing:
    """How to write a file of a format: steps that the caller runs, maybe on several ranks.

    Nothing is visible under its name before `commit`; what was there stays until then.

    Attributes:
        parts: Each writes one file of its own, and all may run at the same time, on any rank.
        part_bytes: How many bytes each writes, about: to share them out evenly.
        commit: Makes them visible, at last; runs once, when all parts are done.
        abort: Removes what was begun; runs on all ranks in place of `commit`. Never raises.
    """

    parts: Sequence[Callable[[], None]]
    part_bytes: Sequence[int]
    commit: Callable[[], None]
    abort: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be written.

    Attributes:
        tensors: No two of one name.
        values: Plain values by name (int, float, bool, str, bytes, None).
        metadata: The checkpoint's, nested plain values; kept where the format has a place for it.
        token: Text for temporary names: random, and the same on all ranks.
        replace: Whether what is there may be replaced; if not, something there is refused.
    """

    tensors: Sequence[Readable]
    values: Mapping[str, object] = field(default_factory=dict)
    metadata: Mapping[str, object] = field(default_factory=dict)
    token: str = ""
    replace: bool = False


class Format(Protocol):
    """One foreign format. Its module imports foreign libraries inside functions only."""

    @property
    def name(self) -> str:
        """What ``format=`` calls it."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Endings of file names that stand for it when writing; empty for folders."""

    def sniff(self, place: Place) -> bool:
        """Whether this place holds this format: reads a few kB, needs no library, runs nothing.

        Never raises for what a file holds; a truncated or wrong file of this format is still one.
        """

    def open(self, place: Place, **options: Any) -> Source:
        """Open it: reads which tensors there are, none of their bytes.

        Args:
            place: Where.
            options: The format's own, with defaults; see its class.

        Raises:
            CorruptCheckpoint: It breaks the format.
            UnsupportedFormat: It holds what can't be had here, or a library is missing.
        """

    def write(self, place: Place, wanted: Wanted, **options: Any) -> Writing:
        """Say how to write it, in memory bounded by the largest tensor. Reads no tensor yet.

        Args:
            place: Where.
            wanted: What.
            options: The format's own, with defaults; see its class.

        Raises:
            UnsupportedFormat: The format can't hold some of it (all are named), can't be written,
                or a library is missing.
            StoreError: The store refused.
        """


_MOST_LISTED = 50


def already_there(place: Place) -> CheckpointExists:
    """Make the error that refuses to replace something."""
    return CheckpointExists(
        f"{place.url}: something is there already; write elsewhere, or pass overwrite=True"
    )


def write_file(
    place: Place, wanted: Wanted, length_bytes: int, fill: Callable[[Sink], None]
) -> Writing:
    """Say how to write a format that is one file: under a temporary name, which commit changes.

    Args:
        place: Where.
        wanted: Its token and whether it replaces.
        length_bytes: Of the file, about.
        fill: Writes all of it.

    Raises:
        CheckpointExists: Something is there, and may not be replaced.
    """
    if place.entries() or (not wanted.replace and place.is_file()):
        raise already_there(place)
    temporary = place.beside(f"{place.name.rpartition('/')[2]}.{wanted.token}")

    def part() -> None:
        sink = temporary.create(length_bytes)
        try:
            fill(sink)
            sink.commit()
        except BaseException:
            sink.abort()
            raise

    def commit() -> None:
        temporary.move_to(place, replace=wanted.replace)

    def abort() -> None:
        with suppress(Exception):
            if isinstance(place.parent, LocalStore):
                temporary.local().unlink(missing_ok=True)  # the folder stays, even an empty one
            else:
                temporary.delete()

    return Writing([part], [length_bytes], commit, abort)


def check_expansion(place: Place, tensor_bytes: int, limit: float) -> None:
    """Refuse a compressed file whose tensors are far larger than it is.

    Args:
        place: The file.
        tensor_bytes: What they claim in all.
        limit: How many times the file's length that may be, and 1 MiB more.

    Raises:
        UnsupportedFormat: They are larger.
    """
    held = place.size()
    if tensor_bytes > limit * (held + _FREE_BYTES):
        raise UnsupportedFormat(
            f"{place.url}: {tensor_bytes} bytes of tensors are compressed to {held}: it may be a "
            f"bomb. At most {limit:g} times the file's length is read; if you trust it, pass "
            f"options={{'max_expansion': {tensor_bytes // (held + _FREE_BYTES) + 1}}}"
        )


def library(name: str, *, extra: str, format: str) -> Any:
    """Import a foreign library.

    Args:
        name: The module.
        extra: distckpt's extra that installs it.
        format: The format that needs it.

    Raises:
        UnsupportedFormat: It isn't installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as exc:
        raise UnsupportedFormat(
            f"the {format} format needs {name.partition('.')[0]}, which can't be imported ({exc}): "
            f"pip install 'distckpt[{extra}]'"
        ) from exc


def refuse(problems: Mapping[str, str], format: str) -> None:
    """Raise one error for all that a format can't hold.

    Args:
        problems: Name → what is wrong with it.
        format: The format.

    Raises:
        UnsupportedFormat: There are any.
    """
    if problems:
        lines = [f"{name!r}: {what}" for name, what in problems.items()]
        raise UnsupportedFormat(
            f"{len(lines)} entries can't be written as {format}:\n  "
            + "\n  ".join(lines[:_MOST_LISTED])
            + (f"\n  … ({len(lines)} in all)" if len(lines) > _MOST_LISTED else "")
            + "\nLeave them out (only_prefix=, filter_prefix=, select=), or give another dtype=."
        )
