"""Read-only objects of a web server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from email.utils import parsedate_to_datetime
from functools import partial
from typing import NoReturn
from urllib.parse import quote, unquote

import aiohttp
from fsspec import AbstractFileSystem

from distckpt.errors import StoreError
from distckpt.store.base import Buffer, Sink, translated
from distckpt.store.filesystem import FsspecStore
from distckpt.store.transfer import (
    PART_BYTES,
    PARTS_AT_ONCE,
    RequestFailed,
    Retries,
    read_ranges,
    run,
)

# Where a server sends objects only whole, those up to this length are read, and cut; a larger one
# would be sent once for each of its blocks.
_WHOLE_BYTES = 16 << 20
_OK, _PARTIAL_CONTENT, _RANGE_NOT_SATISFIABLE = 200, 206, 416
_ABSENT = frozenset({404, 410})
_NO_HEAD = frozenset({403, 405, 501})


class HttpStore(FsspecStore):
    """Objects of a web server, read-only: parallel ranged reads, retried.

    Args:
        file_system: fsspec's, whose session, headers and credentials are used.
        url: Where the objects lie.
        retries: How often to ask.
    """

    def __init__(
        self, file_system: AbstractFileSystem, url: str, *, retries: Retries | None = None
    ) -> None:
        super().__init__(file_system, url, url)
        self._retries = retries or Retries()

    @property
    def parallel_bytes(self) -> int:
        """See the function of this name."""
        return PARTS_AT_ONCE * PART_BYTES

    def _where(self, name: str) -> str:
        return f"{self._root}/{quote(name)}"

    def names(self, prefix: str = "") -> list[str]:
        """See `Store`. What the server's page about a directory links to."""
        return sorted({unquote(name) for name in super().names(prefix)})

    def create(self, name: str, length_bytes: int) -> Sink:
        """Refuse."""
        del length_bytes
        self._refuse(name)

    def put(self, name: str, data: bytes, *, replace: bool) -> None:
        """Refuse."""
        del data, replace
        self._refuse(name)

    def delete(self, names: Sequence[str]) -> None:
        """Refuse, unless there is nothing to delete."""
        for name in names:
            self._refuse(name)

    def _refuse(self, name: str) -> NoReturn:
        where = self._where(name)
        raise StoreError(
            f"{where}: a web server is only read from; save to a file system or an object store",
            url=where,
            refused=True,
        )

    def read_into(self, name: str, start_byte: int, buffer: memoryview) -> None:
        """See `Store`. Several ranges at once."""
        where = self._where(name)
        with translated(where), _explained(where):
            run(read_ranges(partial(self._read, where), start_byte, buffer))

    async def _read(self, where: str, start_byte: int, stop_byte: int) -> Buffer:
        return await self._retries.call(partial(self._read_once, where, start_byte, stop_byte))

    async def _read_once(self, where: str, start_byte: int, stop_byte: int) -> Buffer:
        wanted = stop_byte - start_byte
        headers = {"Range": f"bytes={start_byte}-{stop_byte - 1}"}
        asked = f"{where}: bytes {start_byte}:{stop_byte} were asked for"
        async with self._answer("GET", where, headers) as answer:
            if answer.status == _RANGE_NOT_SATISFIABLE:
                raise EOFError(f"{asked}, and it has not so many")
            length = answer.content_length
            if answer.status == _OK:
                if length is None or length > _WHOLE_BYTES:
                    # Before its body is read: it may be as long as it likes.
                    raise StoreError(
                        f"{asked}, and this server ignores ranges: it sends all of it, "
                        f"{'of unknown length' if length is None else f'{length} bytes'}. Only "
                        f"objects up to {_WHOLE_BYTES >> 20} MiB are read that way: serve it with "
                        "ranges, or download it",
                        url=where,
                    )
                data: bytes = (await answer.read())[start_byte:stop_byte]
            else:
                sent = answer.headers.get("Content-Range", "")
                if not sent.startswith(f"bytes {start_byte}-") or (length or 0) > wanted:
                    raise StoreError(
                        f"{asked}, and this server sent {sent or 'a range without its place'}, "
                        f"{length} bytes: it does not honour ranges",
                        url=where,
                    )
                data = await answer.content.read(wanted + 1)
                while len(data) <= wanted and (more := await answer.content.read(wanted + 1)):
                    data += more
        if len(data) < wanted:
            raise EOFError(f"{asked}, {len(data)} came")
        if len(data) > wanted:
            raise StoreError(f"{asked}, and more came: it does not honour ranges", url=where)
        return data

    def size(self, name: str) -> int:
        """See `Store`."""
        where = self._where(name)
        length: int | None = self._look(where).content_length
        if length is None:
            raise StoreError(f"{where}: this server does not tell its length", url=where)
        return length

    def modified(self, name: str) -> float | None:
        """See `Store`."""
        when = self._look(self._where(name)).headers.get("Last-Modified")
        try:
            return None if when is None else parsedate_to_datetime(when).timestamp()
        except ValueError:
            return None

    def _look(self, where: str) -> aiohttp.ClientResponse:
        async def ask(method: str) -> aiohttp.ClientResponse:
            async with self._answer(method, where, {}) as answer:
                return answer

        async def look() -> aiohttp.ClientResponse:
            try:
                return await self._retries.call(partial(ask, "HEAD"))
            except RequestFailed as failed:
                if failed.status not in _NO_HEAD:
                    raise
            return await self._retries.call(partial(ask, "GET"))

        with translated(where), _explained(where):
            return run(look())

    @asynccontextmanager
    async def _answer(
        self, method: str, where: str, headers: dict[str, str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Ask; the body isn't read yet. Not compressed, so that lengths are what they seem."""
        options = dict(self._fs.kwargs)
        options["headers"] = {**options.get("headers", {}), "Accept-Encoding": "identity"} | headers
        try:
            session = await self._fs.set_session()
            async with session.request(
                method, self._fs.encode_url(where), allow_redirects=True, **options
            ) as answer:
                if answer.status in _ABSENT:
                    raise FileNotFoundError(where)
                if answer.status not in {_OK, _PARTIAL_CONTENT, _RANGE_NOT_SATISFIABLE}:
                    raise RequestFailed(
                        f"the server answered {answer.status} {answer.reason}", status=answer.status
                    )
                yield answer
        except (TimeoutError, aiohttp.ClientError, ConnectionError) as exc:
            raise RequestFailed(
                f"{type(exc).__name__}: {exc}",
                transient=not isinstance(exc, aiohttp.InvalidURL),
            ) from exc


@contextmanager
def _explained(where: str) -> Iterator[None]:
    try:
        yield
    except RequestFailed as failed:
        raise StoreError(f"{where}: {failed}", url=where) from failed
