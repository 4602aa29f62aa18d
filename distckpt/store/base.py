"""What a store is: a flat namespace of objects under one URL, and the ways to look at one."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Protocol, runtime_checkable

from distckpt.errors import CheckpointError, StoreError, tellable, without_secrets

Buffer = memoryview | bytes

_PARTIAL = ".partial"
_PARTIAL_ID_DIGITS = 16
_NBYTES = attrgetter("nbytes")


class Sink(Protocol):
    """A new object being written. It isn't visible under its name before `commit`.

    One that takes its bytes in any order, from several threads, and is faster then, says so by an
    attribute more; and so does one that is faster with aligned memory. See `writes_at_once` and
    `wants_aligned`.
    """

    def write_at(self, offset_bytes: int, data: Buffer) -> None:
        """Write at an offset; offsets rise without gaps. The buffer may change afterwards."""

    def commit(self) -> None:
        """Make the object durable, then visible."""

    def abort(self) -> None:
        """Give the object up; never raises."""


@runtime_checkable
class Store(Protocol):
    """A flat namespace of objects under one URL.

    Absence is an answer, so reading raises `FileNotFoundError`, and writing `FileExistsError`;
    every other failure is a `StoreError`. Not collective; several threads use a store at once.

    A store whose long reads are faster, since they are made of several at once, says so by an
    attribute more, which others need not have: see `parallel_bytes`. One that fills several buffers
    as fast as one has a method more: see `open_object`.
    """

    @property
    def url(self) -> str:
        """Where it is, for messages."""

    def create(self, name: str, length_bytes: int) -> Sink:
        """Begin a new object; a name is never created twice.

        Args:
            name: Its name.
            length_bytes: How long it will be.

        Returns:
            Takes its content; nothing is visible before `Sink.commit`.

        Raises:
            StoreError: It can't be begun.
        """

    def put(self, name: str, data: bytes, *, replace: bool) -> None:
        """Write a whole object atomically and durably: all of it or nothing is visible, ever.

        Raises:
            FileExistsError: It exists and `replace` is False. Of two that race, exactly one
                succeeds. It may be our own, whose first answer was lost: read it.
            StoreError: Anything else. Where ``refused`` is True, the object was not written and
                will not be. Otherwise it may be there, or, after a request without an answer,
                appear later; and where ``undurable`` is True it is there, but may not survive a
                power loss.
        """

    def read_into(self, name: str, start_byte: int, buffer: memoryview) -> None:
        """Fill a buffer from an object.

        Args:
            name: The object.
            start_byte: First byte to read.
            buffer: Writable bytes; its length says how many to read.

        Raises:
            FileNotFoundError: No such object.
            EOFError: It ends before the buffer is full.
        """

    def size(self, name: str) -> int:
        """Length of an object in bytes, read from the store and not from a cache.

        Raises:
            FileNotFoundError: No such object.
        """

    def modified(self, name: str) -> float | None:
        """Seconds since 1970 when an object was last written, by the store's clock.

        Returns:
            None where this kind of store doesn't tell.

        Raises:
            FileNotFoundError: No such object.
        """

    def names(self, prefix: str = "") -> list[str]:
        """List what lies directly under a prefix, sorted; empty where nothing does.

        Objects that are still being written, or were when their process died, are listed as
        `partial_of` recognises them, where the store shows them at all.

        Args:
            prefix: Empty, or ends with ``/``; it is no part of the names returned.
        """

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects for good; those that are gone already are fine."""


def parallel_bytes(store: Store) -> int:
    """Return how many bytes one `read_into` of a store brings at once.

    Its attribute ``parallel_bytes``; 0 where there is none, or where short reads are as fast, as
    from a local disk.
    """
    return int(getattr(store, "parallel_bytes", 0))


def writes_at_once(sink: Sink) -> int:
    """Return from how many threads a sink may be written to, in any order: 1 for most.

    More than one is faster where a device works meanwhile (`wants_aligned`), or a core is free.
    """
    return int(getattr(sink, "writes_at_once", 1))


def wants_aligned(sink: Sink) -> bool:
    """Whether a sink is faster with memory, offsets and lengths that are multiples of 4096."""
    return bool(getattr(sink, "wants_aligned", False))


def total_bytes(buffers: Iterable[memoryview]) -> int:
    """Return how many bytes some buffers have together."""
    return sum(map(_NBYTES, buffers))


class OpenObject(Protocol):
    """An object that stays open from read to read, until nobody refers to this."""

    def read_into(self, start_byte: int, buffers: Sequence[memoryview]) -> None:
        """Fill several buffers, of any lengths, from one stretch.

        Args:
            start_byte: First byte to read.
            buffers: Writable and contiguous; filled in this order.

        Raises:
            EOFError: It ends before the buffers are full.
            StoreError: The store failed.
        """

    def view(self, start_byte: int, length_bytes: int) -> memoryview | None:
        """Look at a stretch where the system has it in memory, without a copy.

        Args:
            start_byte: Where it begins.
            length_bytes: Its length, at least 1.

        Returns:
            Read-only, and valid as long as it is referred to; None where that can't be done, or
            where to read it is faster.

        Raises:
            StoreError: The store failed.
        """


def opens(store: Store) -> bool:
    """Whether a store has a method ``open_object``, so that the function may be called."""
    return callable(getattr(store, "open_object", None))


def open_object(store: Store, name: str) -> OpenObject:
    """Open an object of a store to read several buffers at once, and more than once.

    Args:
        store: One of which `opens` is true.
        name: The object.

    Raises:
        FileNotFoundError: No such object.
        StoreError: The store failed.
    """
    found: OpenObject = store.open_object(name)  # type: ignore[attr-defined]
    return found


def partial_name(name: str, attempt: str = "") -> str:
    """Return the temporary name under which an object is written, before it has its own.

    Args:
        name: The object.
        attempt: Tells writers of one name apart: 16 hexadecimal digits, or empty.
    """
    return f"{name}.{attempt}{_PARTIAL}" if attempt else name + _PARTIAL


def partial_of(name: str) -> str | None:
    """Return which object a temporary name is of; None if it is no temporary name.

    >>> partial_of("manifest.binpb.3f9c2a71d04be816.partial")
    'manifest.binpb'
    >>> partial_of("shard-00000-of-00004.3f9c2a71d04be816.safetensors.partial")
    'shard-00000-of-00004.3f9c2a71d04be816.safetensors'
    """
    if not name.endswith(_PARTIAL):
        return None
    whole = name.removesuffix(_PARTIAL)
    rest, _, attempt = whole.rpartition(".")
    if rest and len(attempt) == _PARTIAL_ID_DIGITS and not attempt.strip("0123456789abcdef"):
        return rest
    return whole


class PrefixStore:
    """The objects of another store whose names begin with a prefix, such as one step's of a run.

    Args:
        store: The other store.
        prefix: The prefix, without the ``/`` that follows it.
    """

    def __init__(self, store: Store, prefix: str) -> None:
        self._store = store
        self._prefix = prefix + "/"

    @property
    def url(self) -> str:
        """Where it is."""
        return f"{self._store.url.rstrip('/')}/{self._prefix[:-1]}"

    @property
    def parallel_bytes(self) -> int:
        """As many as the other's; see the function of this name."""
        return parallel_bytes(self._store)

    @property
    def open_object(self) -> Callable[[str], OpenObject] | None:
        """The other's, if it has one; see the function of this name."""
        if not opens(self._store):
            return None
        return lambda name: open_object(self._store, self._prefix + name)

    def create(self, name: str, length_bytes: int) -> Sink:
        """See `Store`."""
        return self._store.create(self._prefix + name, length_bytes)

    def put(self, name: str, data: bytes, *, replace: bool) -> None:
        """See `Store`."""
        self._store.put(self._prefix + name, data, replace=replace)

    def read_into(self, name: str, start_byte: int, buffer: memoryview) -> None:
        """See `Store`."""
        self._store.read_into(self._prefix + name, start_byte, buffer)

    def size(self, name: str) -> int:
        """See `Store`."""
        return self._store.size(self._prefix + name)

    def modified(self, name: str) -> float | None:
        """See `Store`."""
        return self._store.modified(self._prefix + name)

    def names(self, prefix: str = "") -> list[str]:
        """See `Store`."""
        return self._store.names(self._prefix + prefix)

    def delete(self, names: Sequence[str]) -> None:
        """See `Store`."""
        self._store.delete([self._prefix + name for name in names])


def read_object(store: Store, name: str, *, limit_bytes: int = 1 << 31) -> bytes:
    """Read a whole object.

    Raises:
        FileNotFoundError: No such object.
        StoreError: It is larger than the limit, or changed while it was read.
    """
    size = store.size(name)
    if size > limit_bytes:
        raise StoreError(
            f"{store.url}/{name}: {size} bytes are more than any such object has", url=store.url
        )
    buffer = bytearray(size)
    try:
        store.read_into(name, 0, memoryview(buffer))
    except EOFError as exc:
        raise StoreError(
            f"{store.url}/{name}: it became shorter while it was read", url=store.url
        ) from exc
    return bytes(buffer)


@contextmanager
def translated(where: str, *, writes: bool = False) -> Iterator[None]:
    """Turn the foreign errors of a store into StoreError.

    Absence passes, but not in writing: there it means that the parent can't be made. What would lie
    below a file is absent.
    """
    try:
        yield
    except (FileExistsError, EOFError, CheckpointError):
        raise
    except (FileNotFoundError, NotADirectoryError) as exc:
        if writes:
            raise StoreError(f"{where}: {exc}", url=where) from tellable(exc)
        if isinstance(exc, FileNotFoundError) and tellable(exc):
            raise
        raise FileNotFoundError(
            errno.ENOENT, os.strerror(errno.ENOENT), without_secrets(where)
        ) from tellable(exc)
    except OSError as exc:
        is_denied = isinstance(exc, PermissionError)
        raise StoreError(
            f"{where}: {exc}",
            url=where,
            refused=writes and is_denied,
            denied=not writes and (is_denied or isinstance(exc, IsADirectoryError)),
        ) from tellable(exc)
    except (ValueError, NotImplementedError, RuntimeError) as exc:
        said = f"{where}: {type(exc).__name__}: {exc}"
        raise StoreError(said, url=where) from tellable(exc)
