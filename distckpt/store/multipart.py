"""A large object of S3, uploaded in parts while it is being written."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from typing import Protocol

from distckpt.store.base import Buffer
from distckpt.store.bucket import Bucket
from distckpt.store.transfer import PARTS_AT_ONCE, RequestFailed, Retries, run, start

logger = logging.getLogger(__name__)
_NOT_IMPLEMENTED = 501


class Parts(Protocol):
    """An upload in parts; its object isn't visible before it is complete. Raises RequestFailed."""

    def write(self, data: Buffer) -> None:
        """Send a part; waits while too many are on their way. The buffer may change afterwards."""

    def complete(self) -> None:
        """Make an object of the parts, when all have come."""

    def abort(self) -> None:
        """Give it up."""


class BucketParts:
    """An upload in parts by s3fs, several at once.

    Args:
        bucket: Where to.
        key: The object's.
        retries: For each part.
    """

    def __init__(self, bucket: Bucket, key: str, retries: Retries) -> None:
        self._bucket, self._key, self._retries = bucket, key, retries
        self._id = run(retries.call(partial(bucket.begin, key)))
        self._sent: list[Mapping[str, object]] = []
        self._on_their_way: deque[Future[dict[str, object]]] = deque()

    def write(self, data: Buffer) -> None:
        """See `Parts`."""
        if len(self._on_their_way) == PARTS_AT_ONCE:
            self._sent.append(self._on_their_way.popleft().result())
        number = len(self._sent) + len(self._on_their_way) + 1
        part = partial(self._bucket.part, self._key, self._id, number, bytes(data))
        self._on_their_way.append(start(self._retries.call(part)))

    def complete(self) -> None:
        """See `Parts`. Exclusively, where the server can."""
        while self._on_their_way:
            self._sent.append(self._on_their_way.popleft().result())
        complete = partial(self._bucket.complete, self._key, self._id, self._sent)
        try:
            run(self._retries.call(partial(complete, create=True)))
        except RequestFailed as failed:
            if failed.status != _NOT_IMPLEMENTED:
                raise
            run(self._retries.call(partial(complete, create=False)))

    def abort(self) -> None:
        """See `Parts`."""
        for part in self._on_their_way:
            part.cancel()
        self._on_their_way.clear()
        run(self._retries.call(partial(self._bucket.abort, self._key, self._id)))
