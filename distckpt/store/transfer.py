"""Requests to servers: on fsspec's event loop, several at once, and again when they fail."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from fsspec.asyn import get_loop

from distckpt.store.base import Buffer

T = TypeVar("T")

# A part of an object, and how many are on their way at once: so much is in memory for each object.
PART_BYTES = 8 << 20
PARTS_AT_ONCE = 8

# 409: of two conditional writes at one moment, S3 refuses one before it knows the other's outcome.
_TRY_AGAIN = frozenset({408, 409, 429})
_NOT_IMPLEMENTED = 501
_SERVER_ERRORS = 500
_TRANSIENT_CODES = frozenset({"SlowDown", "RequestTimeout", "ConditionalRequestConflict"})


class RequestFailed(Exception):
    """One request failed. Internal: stores turn it into what they promise to raise.

    Attributes:
        status: Of the server's HTTP answer; None if none came.
        code: The server's word for it, such as ``NoSuchBucket``; may be empty.
        transient: Whether to try again.
        refused: Whether the server certainly did not, and will not, do what was asked. After
            `Retries.call`, of all attempts.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str = "",
        transient: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        if transient is None:
            transient = (
                status is None
                or status in _TRY_AGAIN
                or (status >= _SERVER_ERRORS and status != _NOT_IMPLEMENTED)
                or code in _TRANSIENT_CODES
            )
        self.transient = transient
        # Not what only came too often or too fast: the HTTP library may have sent it again by
        # itself, on another connection, after the first answer was lost.
        self.refused = not transient


@dataclass(frozen=True, slots=True)
class Retries:
    """How often to ask, with pauses of random length whose bound doubles.

    Attributes:
        attempts: How often at most.
        first_pause_s: Bound of the first pause.
        longest_pause_s: Bound of any.
    """

    attempts: int = 8
    first_pause_s: float = 0.1
    longest_pause_s: float = 10.0

    async def call(self, request: Callable[[], Awaitable[T]]) -> T:
        """Make a request until it succeeds.

        Raises:
            RequestFailed: The last one's failure, or the first that trying again doesn't mend.
        """
        refused = True
        attempt = 1
        while True:
            try:
                return await request()
            except RequestFailed as failed:
                refused = failed.refused = refused and failed.refused
                if not failed.transient or attempt >= self.attempts:
                    raise
            bound_s = min(self.longest_pause_s, self.first_pause_s * 2 ** (attempt - 1))
            await asyncio.sleep(random.uniform(0, bound_s))  # noqa: S311  not for secrets
            attempt += 1


def start(work: Coroutine[None, None, T]) -> Future[T]:
    """Start a coroutine on fsspec's event loop, which has a thread of its own."""
    return asyncio.run_coroutine_threadsafe(work, get_loop())


def run(work: Coroutine[None, None, T]) -> T:
    """Run a coroutine there, and wait for it; interrupted, it is cancelled."""
    future = start(work)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


async def all_of(works: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Do all, a few at once. After the first failure the others are cancelled, and it is raised."""
    places = asyncio.Semaphore(PARTS_AT_ONCE)

    async def one(work: Callable[[], Awaitable[None]]) -> None:
        async with places:
            await work()

    tasks = [asyncio.ensure_future(one(work)) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def read_ranges(
    read: Callable[[int, int], Awaitable[Buffer]],
    start_byte: int,
    buffer: memoryview,
    *,
    part_bytes: int = PART_BYTES,
) -> None:
    """Fill a buffer with ranges that are read at once, each straight into its place.

    Args:
        read: Reads the bytes from a start to a stop; must return exactly as many.
        start_byte: Where the buffer's bytes begin.
        buffer: What to fill.
        part_bytes: Length of a range.
    """

    async def fill(offset: int) -> None:
        part = buffer[offset : offset + part_bytes]
        part[:] = await read(start_byte + offset, start_byte + offset + len(part))

    await all_of([partial(fill, offset) for offset in range(0, len(buffer), part_bytes)])
