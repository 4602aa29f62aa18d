"""Large reads and uploads by obstore, where it is installed: its only door.

To write the same bytes costs it less than half of the processor's time that s3fs needs, and nearly
none of that under the interpreter lock, which training wants. It has s3fs's credentials, region and
endpoint. obstore's own adapter for fsspec isn't used: it doesn't create exclusively, and merges
ranges that touch into one request.
"""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime, timedelta

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store as ObstoreS3

from distckpt.store.base import Buffer
from distckpt.store.bucket import Access, Bucket
from distckpt.store.transfer import PARTS_AT_ONCE, RequestFailed, Retries, run

# obstore asks again for credentials that are about to expire; botocore refreshes them.
_CREDENTIALS_LAST = timedelta(minutes=10)
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_MESSAGE = re.compile(r"<Message>([^<]+)</Message>")
_NOT_A_RANGE = re.compile(r"NotPartial|[Uu]nexpected|non-partial|Requested .*, got")


_IMPORTED_IN = os.getpid()


class Bulk:
    """Transfers of one bucket.

    Args:
        bucket: The bucket, which knows how it is reached.
        retries: For the parts of an upload, which obstore sends again itself.
    """

    def __init__(self, bucket: Bucket, retries: Retries) -> None:
        self._bucket = bucket
        self._retries = retries
        self._credentials: dict[str, object] = {}
        self._once: ObstoreS3 | None = None
        self._retrying: ObstoreS3 | None = None

    @property
    def usable(self) -> bool:
        """Whether obstore's threads are in this process; one that was forked has none."""
        return os.getpid() == _IMPORTED_IN

    async def refresh(self) -> None:
        """Take the bucket's credentials, which it keeps fresh. Before each transfer."""
        access = await self._bucket.access()
        self._credentials = {
            "access_key_id": access.key,
            "secret_access_key": access.secret,
            "token": access.token,
            "expires_at": datetime.now(UTC) + _CREDENTIALS_LAST,
        }
        if self._once is None:
            self._once = self._store(access, attempts=1)
            self._retrying = self._store(access, attempts=self._retries.attempts)

    def _store(self, access: Access, *, attempts: int) -> ObstoreS3:
        retries = self._retries
        return ObstoreS3(
            self._bucket.name,
            config={
                "region": access.region,
                "endpoint": access.endpoint,
                "skip_signature": access.key is None,
            },
            client_options={
                "allow_http": access.endpoint.startswith("http://"),
                "connect_timeout": timedelta(seconds=10),
                "timeout": timedelta(minutes=5),
            },
            retry_config={
                "max_retries": attempts - 1,
                "backoff": {
                    "init_backoff": timedelta(seconds=retries.first_pause_s),
                    "max_backoff": timedelta(seconds=retries.longest_pause_s),
                },
            },
            credential_provider=None if access.key is None else lambda: self._credentials,
        )

    async def get(self, key: str, start_byte: int, stop_byte: int) -> Buffer:
        """Read a range by one request; shorter only where the server sends less."""
        await self.refresh()
        try:
            return memoryview(
                await obstore.get_range_async(self._once, key, start=start_byte, end=stop_byte)
            )
        except (BaseError, OSError, ValueError) as exc:
            raise _failure(exc) from exc

    def begin(self, key: str, part_bytes: int) -> Parts:
        """Begin an upload in parts."""
        run(self.refresh())
        try:
            writer = obstore.open_writer(
                self._retrying, key, buffer_size=part_bytes, max_concurrency=PARTS_AT_ONCE
            )
        except (BaseError, OSError, ValueError) as exc:
            raise _failure(exc) from exc
        return Parts(self, writer)


class Parts:
    """An upload in parts, several at once, each sent again where that may help.

    Args:
        bulk: Keeps the credentials fresh.
        writer: obstore's.
    """

    def __init__(self, bulk: Bulk, writer: obstore.WritableFile) -> None:
        self._bulk = bulk
        self._writer = writer

    def write(self, data: Buffer) -> None:
        """Send a part; waits while there are too many on their way."""
        run(self._bulk.refresh())
        try:
            # A copy: obstore goes on reading what it was given.
            self._writer.write(bytes(data))
        except (BaseError, OSError, ValueError) as exc:
            raise _failure(exc) from exc

    def complete(self) -> None:
        """Make an object of the parts, when they have come."""
        try:
            self._writer.close()
        except (BaseError, OSError, ValueError) as exc:
            raise _failure(exc) from exc

    def abort(self) -> None:
        """Give it up."""
        error = RuntimeError("aborted")
        try:
            self._writer.__exit__(type(error), error, None)
        except (BaseError, OSError, ValueError) as exc:
            raise _failure(exc) from exc


def _failure(exc: Exception) -> RequestFailed:
    """Read obstore's text, which is all that it gives."""
    said = str(exc).partition("\n\nDebug source")[0]
    status, code, message = (found.search(said) for found in (_STATUS, _CODE, _MESSAGE))
    if status is None and _NOT_A_RANGE.search(said):
        return RequestFailed(f"this server ignores ranges: {said}", transient=False)
    if status and code:
        said = f"{status[1]} {code[1]}{': ' + message[1] if message else ''}"
    return RequestFailed(
        said,
        status=int(status[1]) if status else 404 if isinstance(exc, FileNotFoundError) else None,
        code=code[1] if code else "",
        transient=False if isinstance(exc, ValueError) else None,
    )
