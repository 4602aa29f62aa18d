"""One bucket of S3, as single requests: s3fs's only door."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import botocore.exceptions as boto
import urllib3.exceptions
from botocore.parsers import ResponseParserError
from s3fs import S3FileSystem

from distckpt.store.transfer import RequestFailed

NO_SUCH_BUCKET = "NoSuchBucket"
PRECONDITION_FAILED = "PreconditionFailed"
_FORBIDDEN, _NOT_FOUND, _PRECONDITION_FAILED = 403, 404, 412
_MOVED = frozenset({301, 307})
_KEYS_A_DELETION = 1000

_NO_CREDENTIALS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.ProfileNotFound,
    boto.TokenRetrievalError,
    boto.SSOError,
)
_NO_ANSWER = (
    boto.HTTPClientError,
    boto.ConnectionError,
    ResponseParserError,
    aiohttp.ClientError,
    urllib3.exceptions.HTTPError,
    ConnectionError,
    TimeoutError,
)


@dataclass(frozen=True, slots=True)
class Head:
    """What is known of an object without reading it."""

    length_bytes: int
    modified_s: float


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload in parts that is not complete."""

    key: str
    id: str
    begun_s: float


@dataclass(frozen=True, slots=True)
class Access:
    """What another library needs to reach the same bucket; the key is None for anonymous access."""

    endpoint: str
    region: str
    key: str | None
    secret: str | None
    token: str | None


class Bucket:
    """One bucket; each method is one request, made once, and raises RequestFailed.

    Args:
        name: The bucket's.
        options: For `s3fs.S3FileSystem`.
    """

    def __init__(self, name: str, options: Mapping[str, object]) -> None:
        self.name = name
        config: dict[str, object] = {
            "connect_timeout": 10,
            "read_timeout": 60,
            # One layer asks again: the store, which must know whether an answer was lost.
            "retries": {"total_max_attempts": 1},
        }
        given = options.get("config_kwargs")
        config |= given if isinstance(given, Mapping) else {}
        self._options = {**options, "config_kwargs": config}
        self._connect()

    def _connect(self) -> None:
        self._process = os.getpid()
        self._fs = S3FileSystem(**self._options)  # fsspec keeps one for equal options
        self._fs.retries = 1

    @property
    def fs(self) -> S3FileSystem:
        """s3fs's file system; of a process that was forked, its own."""
        if self._process != os.getpid():
            self._connect()
        return self._fs

    async def _call(self, method: str, **arguments: object) -> dict[str, Any]:
        try:
            answer = await self.fs._call_s3(  # noqa: SLF001  async names begin so
                method, Bucket=self.name, **arguments
            )
        except Exception as exc:
            raise _failure(exc) from exc
        return dict(answer)

    async def put(self, key: str, data: bytes, *, create: bool) -> None:
        """Put an object; if told to, only where there is none."""
        await self._call("put_object", Key=key, Body=data, **_condition(create=create))

    async def get(self, key: str, start_byte: int, stop_byte: int) -> bytes:
        """Read a range; shorter only where the server sends less."""
        wanted = f"bytes={start_byte}-{stop_byte - 1}"
        answer = await self._call("get_object", Key=key, Range=wanted)
        body = answer["Body"]
        try:
            _check_range(answer, start_byte, stop_byte)
            return bytes(await body.read())
        except RequestFailed:
            raise
        except Exception as exc:
            raise _failure(exc) from exc
        finally:
            body.close()

    async def head(self, key: str) -> Head:
        """Look an object up."""
        answer = await self._call("head_object", Key=key)
        return Head(answer["ContentLength"], answer["LastModified"].timestamp())

    async def exists(self) -> bool:
        """Whether the bucket is there, as far as can be told."""
        try:
            await self._call("head_bucket")
        except RequestFailed as failed:
            return failed.status != _NOT_FOUND
        return True

    async def names(self, prefix: str) -> list[str]:
        """List what lies directly under a prefix, which is no part of the names."""
        found: list[str] = []
        more: dict[str, object] = {}
        while True:
            answer = await self._call("list_objects_v2", Prefix=prefix, Delimiter="/", **more)
            found += [item["Key"] for item in answer.get("Contents", ())]
            found += [item["Prefix"].rstrip("/") for item in answer.get("CommonPrefixes", ())]
            if not answer.get("IsTruncated"):
                # Some programs put an empty object of a directory's own name.
                return [name.removeprefix(prefix) for name in found if name != prefix]
            more = {"ContinuationToken": answer["NextContinuationToken"]}

    async def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; those that are gone already are fine. A request for each thousand."""
        for first in range(0, len(keys), _KEYS_A_DELETION):
            batch = [{"Key": key} for key in keys[first : first + _KEYS_A_DELETION]]
            answer = await self._call("delete_objects", Delete={"Objects": batch, "Quiet": True})
            for error in answer.get("Errors", ()):
                if error.get("Code") not in {"NoSuchKey", "NoSuchVersion"}:
                    raise RequestFailed(
                        f"{error.get('Key')}: {error.get('Message')}", code=error.get("Code", "")
                    )

    async def begin(self, key: str) -> str:
        """Begin an upload in parts, and return its id."""
        return str((await self._call("create_multipart_upload", Key=key))["UploadId"])

    async def part(self, key: str, upload: str, number: int, data: bytes) -> dict[str, object]:
        """Upload a part, numbered from 1; return what completes the upload."""
        answer = await self._call(
            "upload_part", Key=key, UploadId=upload, PartNumber=number, Body=data
        )
        return {"PartNumber": number, "ETag": answer["ETag"]}

    async def complete(
        self, key: str, upload: str, parts: Sequence[Mapping[str, object]], *, create: bool
    ) -> None:
        """Make an object of its parts; if told to, only where there is none."""
        await self._call(
            "complete_multipart_upload",
            Key=key,
            UploadId=upload,
            MultipartUpload={"Parts": list(parts)},
            **_condition(create=create),
        )

    async def abort(self, key: str, upload: str) -> None:
        """Give an upload up, and all of its parts; one that is gone already is fine."""
        try:
            await self._call("abort_multipart_upload", Key=key, UploadId=upload)
        except RequestFailed as failed:
            if failed.status != _NOT_FOUND:
                raise

    async def uploads(self, prefix: str) -> list[Upload]:
        """List the uploads that are not complete."""
        found: list[Upload] = []
        more: dict[str, object] = {}
        while True:
            answer = await self._call("list_multipart_uploads", Prefix=prefix, **more)
            found += [
                Upload(item["Key"], item["UploadId"], item["Initiated"].timestamp())
                for item in answer.get("Uploads", ())
                if item["Key"].startswith(prefix)
            ]
            if not answer.get("IsTruncated"):
                return found
            more = {
                "KeyMarker": answer["NextKeyMarker"],
                "UploadIdMarker": answer["NextUploadIdMarker"],
            }

    async def parts_of(self, upload: Upload) -> Head:
        """How much of an upload has come, and when the last of it did."""
        length, modified_s = 0, upload.begun_s
        more: dict[str, object] = {}
        while True:
            answer = await self._call("list_parts", Key=upload.key, UploadId=upload.id, **more)
            for part in answer.get("Parts", ()):
                length += part["Size"]
                modified_s = max(modified_s, part["LastModified"].timestamp())
            if not answer.get("IsTruncated"):
                return Head(length, modified_s)
            more = {"PartNumberMarker": answer["NextPartNumberMarker"]}

    async def access(self) -> Access:
        """Tell how it is reached; credentials that expire are fresh. Makes no request of S3."""
        try:
            meta = (await self.fs.set_session()).meta
            key, secret, token = await self._credentials()
        except Exception as exc:
            raise _failure(exc) from exc
        return Access(meta.endpoint_url, meta.region_name or "us-east-1", key, secret, token)

    async def _credentials(self) -> tuple[str | None, str | None, str | None]:
        fs = self.fs
        client = fs.client_kwargs
        if fs.anon:
            return None, None, None
        key = fs.key or client.get("aws_access_key_id")
        if key is not None:
            secret = fs.secret or client.get("aws_secret_access_key")
            return key, secret, fs.token or client.get("aws_session_token")
        found = await fs.session.get_credentials()
        if found is None:
            raise boto.NoCredentialsError
        frozen = await found.get_frozen_credentials()
        return frozen.access_key, frozen.secret_key, frozen.token

    def advice(self, failed: RequestFailed) -> str:
        """Say what to do about a failure; empty where there is nothing to say."""
        cause = failed.__cause__
        if isinstance(cause, _NO_CREDENTIALS):
            return (
                ". Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or pass "
                'storage_options={"key": ..., "secret": ...}; {"anon": True} reads what is public'
            )
        if failed.code == NO_SUCH_BUCKET:
            return (
                f". There is no bucket {self.name!r} at {self._endpoint()}. Make it first, or "
                "correct the URL or AWS_ENDPOINT_URL"
            )
        if isinstance(cause, boto.BotoCoreError) and failed.status is None:
            return (
                ". Is the endpoint right, and can it be reached from here? It is set by "
                'AWS_ENDPOINT_URL, or storage_options={"endpoint_url": ...}'
            )
        if failed.status == _FORBIDDEN:
            return (
                f" (access denied{': ' + failed.code if failed.code else ''}). Are the credentials "
                "right, and may they read, write, delete and list here? Where they may not list, "
                "S3 denies access to what is absent"
            )
        if failed.status in _MOVED or failed.code == "AuthorizationHeaderMalformed":
            return (
                ". The bucket is in another region: set AWS_DEFAULT_REGION, or pass "
                'storage_options={"client_kwargs": {"region_name": ...}}'
            )
        return ""

    def _endpoint(self) -> str:
        return str(self.fs.s3.meta.endpoint_url)


def _check_range(answer: Mapping[str, Any], start_byte: int, stop_byte: int) -> None:
    """Refuse what was not asked for before its body is read: it may be as long as it likes."""
    sent, length = answer.get("ContentRange", ""), answer["ContentLength"]
    if not sent.startswith(f"bytes {start_byte}-") or length > stop_byte - start_byte:
        raise RequestFailed(
            f"bytes {start_byte}:{stop_byte} were asked for, and this server sent "
            f"{sent or 'all'}, {length} bytes: it ignores ranges",
            transient=False,
        )


def _condition(*, create: bool) -> dict[str, object]:
    return {"IfNoneMatch": "*"} if create else {}


def _failure(exc: Exception) -> RequestFailed:
    """Read what s3fs raised, which may have replaced what botocore did."""
    for found in (exc, exc.__cause__):
        response = getattr(found, "response", None)
        if isinstance(response, Mapping):
            error = response.get("Error", {})
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            code = str(error.get("Code", ""))
            if status == _PRECONDITION_FAILED:
                code = PRECONDITION_FAILED
            return RequestFailed(str(found), status=status, code="" if code.isdecimal() else code)
    said = str(exc) or type(exc).__name__
    if isinstance(exc, _NO_ANSWER):
        return RequestFailed(said)
    return RequestFailed(f"{type(exc).__name__}: {said}", transient=False)
