"""S3, and what speaks its protocol: multipart uploads, conditional creation, parallel ranges."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import NoReturn, Protocol, TypeVar

from distckpt.errors import CheckpointError, StoreError
from distckpt.store.base import Buffer, Sink, partial_name, partial_of, read_object
from distckpt.store.bucket import NO_SUCH_BUCKET, PRECONDITION_FAILED, Bucket, Head, Upload
from distckpt.store.multipart import BucketParts, Parts
from distckpt.store.transfer import (
    PART_BYTES,
    PARTS_AT_ONCE,
    RequestFailed,
    Retries,
    read_ranges,
    run,
)

T = TypeVar("T")
logger = logging.getLogger(__name__)

_MOST_PARTS = 10_000
# Shorter ranges than this are not worth a request of their own.
_LEAST_RANGE_BYTES = 4 << 20
_NO_SUCH_UPLOAD = "NoSuchUpload"
_NOT_FOUND, _RANGE_NOT_SATISFIABLE, _NOT_IMPLEMENTED = 404, 416, 501


# Options of s3fs that obstore would not know of.
_ONLY_S3FS = frozenset(
    {"config_kwargs", "requester_pays", "s3_additional_kwargs", "session", "use_ssl"}
)
_SHARED_CLIENT_OPTIONS = frozenset(
    {
        "aws_access_key_id",
        "aws_secret_access_key",
        "aws_session_token",
        "endpoint_url",
        "region_name",
    }
)


def open_s3(url: str, options: Mapping[str, object]) -> S3Store:
    """Open the store at an ``s3://`` URL; see `distckpt.store.open_store`.

    Raises:
        ValueError: A URL without a bucket, or options that don't go together.
    """
    bucket_name, _, prefix = url.partition("://")[2].partition("/")
    if not bucket_name:
        raise ValueError("it names no bucket: s3://bucket/folder")
    for_s3fs = {name: value for name, value in options.items() if name != "client"}
    bucket = Bucket(bucket_name, for_s3fs)
    if not _by_obstore(options.get("client"), for_s3fs):
        return S3Store(bucket, prefix, url)
    from distckpt.store.bulk import Bulk  # noqa: PLC0415  obstore may not be installed

    retries = Retries()
    return S3Store(bucket, prefix, url, bulk=Bulk(bucket, retries), retries=retries)


def _by_obstore(client: object, options: Mapping[str, object]) -> bool:
    """Choose what carries large reads and uploads."""
    if client not in {None, "obstore", "s3fs"}:
        raise ValueError(f"storage_options['client'] is 'obstore' or 's3fs', not {client!r}")
    of_client = options.get("client_kwargs")
    only = sorted(_ONLY_S3FS & options.keys())
    if isinstance(of_client, Mapping):
        only += sorted(of_client.keys() - _SHARED_CLIENT_OPTIONS)
    if client == "obstore" and only:
        raise ValueError(f"obstore has no such options as {', '.join(only)}: client='s3fs' does")
    installed = importlib.util.find_spec("obstore") is not None
    if client == "obstore" and not installed:
        raise ValueError("obstore isn't installed: pip install 'distckpt[obstore]'")
    return client != "s3fs" and not only and installed


class Transfers(Protocol):
    """What carries large reads and uploads in s3fs's place."""

    @property
    def usable(self) -> bool:
        """Whether it can in this process."""

    async def get(self, key: str, start_byte: int, stop_byte: int) -> Buffer:
        """As `Bucket.get`."""

    def begin(self, key: str, part_bytes: int) -> Parts:
        """Begin an upload in parts."""


class S3Store:
    """Objects of one bucket below a prefix.

    Args:
        bucket: The bucket.
        prefix: What all keys begin with, without the ``/`` that follows; may be empty.
        url: The same as a URL.
        bulk: What carries large reads and uploads; the bucket itself, if None.
        retries: How often to ask.
        part_bytes: Length of the parts and ranges of large objects; S3 wants 5 MiB at least. Twice
            as much is put by one request.
    """

    def __init__(
        self,
        bucket: Bucket,
        prefix: str,
        url: str,
        *,
        bulk: Transfers | None = None,
        retries: Retries | None = None,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self._bucket = bucket
        self._bulk = bulk
        self._prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self._url = url.rstrip("/")
        self._retries = retries or Retries()
        self.part_bytes = part_bytes

    @property
    def url(self) -> str:
        """The URL."""
        return self._url

    @property
    def parallel_bytes(self) -> int:
        """See the function of this name."""
        return PARTS_AT_ONCE * self.part_bytes

    def _where(self, name: str) -> str:
        return f"{self._url}/{name}"

    def _key(self, name: str) -> str:
        return self._prefix + name

    def _carrier(self) -> Transfers | None:
        return self._bulk if self._bulk is not None and self._bulk.usable else None

    def create(self, name: str, length_bytes: int) -> Sink:
        """See `Store`."""
        return _S3Sink(self, name, length_bytes)

    def put(self, name: str, data: bytes, *, replace: bool) -> None:
        """See `Store`. Created with ``If-None-Match: *``."""
        try:
            self._put(name, data, create=not replace)
        except RequestFailed as failed:
            if failed.status == _NOT_IMPLEMENTED and not replace:
                where = self._where(name)
                raise StoreError(
                    f"{where}: this server can't create an object only if it is absent "
                    "(If-None-Match), which a first commit needs; save with overwrite=True",
                    url=where,
                    refused=True,
                ) from failed
            self._raise(failed, name)

    def _put(self, name: str, data: bytes, *, create: bool) -> None:
        put = partial(self._bucket.put, self._key(name), data, create=create)
        run(self._retries.call(put))

    def read_into(self, name: str, start_byte: int, buffer: memoryview) -> None:
        """See `Store`. Several ranges at once."""
        evenly = -(-len(buffer) // PARTS_AT_ONCE)
        part_bytes = min(self.part_bytes, max(evenly, _LEAST_RANGE_BYTES))
        try:
            run(read_ranges(partial(self._read, name), start_byte, buffer, part_bytes=part_bytes))
        except RequestFailed as failed:
            if failed.status == _RANGE_NOT_SATISFIABLE:
                stop = start_byte + len(buffer)
                raise EOFError(
                    f"{self._where(name)} ends before byte {stop}; bytes {start_byte}:{stop} were "
                    "asked for"
                ) from failed
            self._raise(failed, name)

    async def _read(self, name: str, start_byte: int, stop_byte: int) -> Buffer:
        get = (self._carrier() or self._bucket).get

        async def once() -> Buffer:
            data = await get(self._key(name), start_byte, stop_byte)
            wanted = stop_byte - start_byte
            if len(data) == wanted:
                return data
            asked = f"bytes {start_byte}:{stop_byte} were asked for, {len(data)} came"
            if len(data) > wanted:
                raise RequestFailed(f"{asked}: this server ignores ranges", transient=False)
            if (await self._bucket.head(self._key(name))).length_bytes < stop_byte:
                raise EOFError(f"{self._where(name)}: {asked}")
            raise RequestFailed(f"{asked}, although the object is long enough")

        return await self._retries.call(once)

    def size(self, name: str) -> int:
        """See `Store`. Of an upload that is not complete, the length of its parts."""
        return self._head(name).length_bytes

    def modified(self, name: str) -> float | None:
        """See `Store`. Of an upload that is not complete, when its last part came."""
        return self._head(name).modified_s

    def _head(self, name: str) -> Head:
        if partial_of(name) is None:
            return self._ask(partial(self._bucket.head, self._key(name)), name)
        heads = [
            self._ask(partial(self._bucket.parts_of, one), name) for one in self._uploads(name)
        ]
        if not heads:
            raise FileNotFoundError(self._where(name))
        return max(heads, key=lambda head: head.modified_s)

    def names(self, prefix: str = "") -> list[str]:
        """See `Store`. An upload that is not complete is listed as its object's temporary name."""
        below = self._key(prefix)
        found = set(self._ask(partial(self._bucket.names, below), prefix))
        for upload in self._incomplete(below):
            head, slash, _ = upload.key.removeprefix(below).partition("/")
            found.add(head if slash else partial_name(head))
        return sorted(found)

    def delete(self, names: Sequence[str]) -> None:
        """See `Store`. Of an object's temporary name, the uploads are aborted."""
        for name in names:
            for upload in self._uploads(name):
                self._ask(partial(self._bucket.abort, upload.key, upload.id), name)
        keys = [self._key(name) for name in names if partial_of(name) is None]
        if keys:
            self._ask(partial(self._bucket.delete, keys), names[0])

    def _incomplete(self, prefix: str) -> list[Upload]:
        try:
            return run(self._retries.call(partial(self._bucket.uploads, prefix)))
        except RequestFailed as failed:
            # Not every account may list them, and not every server can.
            logger.debug("%s: can't list incomplete uploads: %s", self._url, failed)
            return []

    def _uploads(self, name: str) -> list[Upload]:
        """Find the uploads that a temporary name stands for; none for any other name."""
        whole = partial_of(name)
        if whole is None:
            return []
        key = self._key(whole)
        return [upload for upload in self._incomplete(key) if upload.key == key]

    def _ask(self, request: Callable[[], Awaitable[T]], name: str) -> T:
        try:
            return run(self._retries.call(request))
        except RequestFailed as failed:
            self._raise(failed, name)

    def _raise(self, failed: RequestFailed, name: str) -> NoReturn:
        """Raise what a store promises, and say what to do."""
        where = self._where(name)
        if failed.code == PRECONDITION_FAILED:
            raise FileExistsError(f"{where}: it exists already") from failed
        if failed.status == _NOT_FOUND and failed.code != NO_SUCH_BUCKET:
            # Asked whether it is there, S3 doesn't say whether at least its bucket is.
            if failed.code or run(self._bucket.exists()):
                raise FileNotFoundError(where) from failed
            failed.code = NO_SUCH_BUCKET
        raise StoreError(
            f"{where}: {failed}{self._bucket.advice(failed)}", url=where, refused=failed.refused
        ) from failed

    # What follows is for sinks. A new object's name has a random id: who finds it taken after an
    # attempt whose answer was lost, finds its own.

    def begin(self, name: str, part_bytes: int) -> Parts:
        """Begin an upload in parts. Raises RequestFailed."""
        carrier = self._carrier()
        if carrier is not None:
            return carrier.begin(self._key(name), part_bytes)
        return BucketParts(self._bucket, self._key(name), self._retries)

    def create_whole(self, name: str, data: bytes) -> None:
        """Put a new object; exclusively, where the server can. Raises RequestFailed."""
        try:
            self._put(name, data, create=True)
        except RequestFailed as failed:
            if failed.status == _NOT_IMPLEMENTED:
                self._put(name, data, create=False)
            elif failed.code != PRECONDITION_FAILED or read_object(self, name) != data:
                raise

    @contextmanager
    def creating(self, name: str, length_bytes: int) -> Iterator[None]:
        """Take what a failed request turns out to have made, or raise StoreError."""
        try:
            yield
        except RequestFailed as failed:
            taken = failed.code in {PRECONDITION_FAILED, _NO_SUCH_UPLOAD}
            if taken and not failed.refused:  # the upload was completed, and the answer lost
                with suppress(FileNotFoundError):
                    if self.size(name) == length_bytes:
                        return
            if failed.status == _NOT_FOUND and failed.code != NO_SUCH_BUCKET:
                failed.status = None
            try:
                self._raise(failed, name)
            except FileExistsError as exc:
                raise StoreError(str(exc), url=self._where(name), refused=failed.refused) from exc

    def give_up(self, name: str, parts: Parts) -> None:
        """Abort an upload; never raises."""
        try:
            with suppress(RequestFailed):
                parts.abort()
            # Whoever carried the parts may not have known that it failed.
            self.delete([partial_name(name)])
        except (CheckpointError, OSError) as exc:
            logger.warning(
                "%s: parts of a failed upload are left, and cost storage until they are aborted, "
                "as a lifecycle rule of the bucket can: %s",
                self._where(name),
                exc,
            )


class _S3Sink:
    """An object that is put whole when it is small, and else goes in parts, several at once.

    An upload in parts is not visible before it is completed.
    """

    def __init__(self, store: S3Store, name: str, length_bytes: int) -> None:
        self._store, self._name = store, name
        self._whole_bytes = 2 * store.part_bytes
        self._in_parts = length_bytes > self._whole_bytes
        # All parts but the last are of one length: some servers want that.
        self._part_bytes = max(store.part_bytes, -(-length_bytes // _MOST_PARTS))
        self._rest = bytearray()
        self._length_bytes = 0
        self._parts: Parts | None = None

    def write_at(self, offset_bytes: int, data: Buffer) -> None:
        del offset_bytes  # offsets rise without gaps
        view = memoryview(data).cast("B")
        self._length_bytes += len(view)
        self._in_parts = self._in_parts or self._length_bytes > self._whole_bytes
        if not self._in_parts:
            self._rest += view
            return
        while len(self._rest) + len(view) >= self._part_bytes:
            taken = self._part_bytes - len(self._rest)
            if taken <= 0:  # collected before it was known to be large
                self._send(self._rest[: self._part_bytes])
                del self._rest[: self._part_bytes]
                continue
            if self._rest:
                self._rest += view[:taken]
                self._send(self._rest)
                self._rest = bytearray()
            else:
                self._send(view[:taken])
            view = view[taken:]
        self._rest += view

    def _send(self, part: Buffer | bytearray) -> None:
        with self._store.creating(self._name, self._length_bytes):
            if self._parts is None:
                self._parts = self._store.begin(self._name, self._part_bytes)
            self._parts.write(memoryview(part))

    def commit(self) -> None:
        if self._in_parts and self._rest:
            self._send(self._rest)
        with self._store.creating(self._name, self._length_bytes):
            if self._parts is not None:
                self._parts.complete()
            else:
                self._store.create_whole(self._name, bytes(self._rest))

    def abort(self) -> None:
        self._rest = bytearray()
        if self._parts is not None:
            self._store.give_up(self._name, self._parts)
            self._parts = None
