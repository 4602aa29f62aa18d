"""Where checkpoints lie: fsspec's and the S3 libraries' only door, and a fast path for local files.

A `Store` is a flat namespace of objects under one URL. Names use ``/`` to group them. Local
directories are served with the system's own calls, S3 with requests of its own, web servers
read-only, every other URL as its fsspec file system serves it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from distckpt.errors import StoreError, tellable
from distckpt.store.base import (
    Buffer,
    OpenObject,
    PrefixStore,
    Sink,
    Store,
    open_object,
    opens,
    parallel_bytes,
    partial_name,
    partial_of,
    read_object,
    total_bytes,
    wants_aligned,
    writes_at_once,
)
from distckpt.store.filesystem import FsspecStore
from distckpt.store.local import LocalStore

__all__ = [
    "Buffer",
    "FsspecStore",
    "LocalStore",
    "OpenObject",
    "PrefixStore",
    "Sink",
    "Store",
    "open_object",
    "open_store",
    "opens",
    "parallel_bytes",
    "partial_name",
    "partial_of",
    "read_object",
    "total_bytes",
    "wants_aligned",
    "writes_at_once",
]

_S3 = ("s3://", "s3a://")
_HTTP = ("http://", "https://")


def open_store(
    url: str | os.PathLike[str] | Store, *, storage_options: Mapping[str, object] | None = None
) -> Store:
    """Open the store at a URL. Nothing is made or contacted yet.

    Args:
        url: A path, or any URL that fsspec knows; a `Store` is returned as it is.
        storage_options: For the fsspec file system. For ``s3://``, those of `s3fs.S3FileSystem`,
            and ``client``: ``"obstore"`` or ``"s3fs"``, which carries large reads and uploads; by
            default obstore if it is installed.

    Returns:
        A store of the URL's kind.

    Raises:
        StoreError: An unknown scheme, or one whose library isn't installed.
    """
    # Whether something is a store is asked last: it takes longer than all else here.
    if not isinstance(url, (str, os.PathLike)) and isinstance(url, Store):
        return url
    text = os.fspath(url)
    options = dict(storage_options or {})
    if not options and ":" not in text and not text.startswith("~"):
        # A mere path, as fsspec sees it, too; each save and load opens one.
        return LocalStore(Path(text).absolute())
    # Its library's messages would repeat it.
    if text.startswith(_S3) and "@" in text.partition("://")[2].partition("/")[0]:
        raise StoreError(
            f"{text}: no bucket's name has an @; credentials belong into the environment, or "
            "storage_options, and not into a URL",
            url=text,
        )
    try:
        if text.startswith(_S3):
            from distckpt.store.s3 import open_s3  # noqa: PLC0415  its libraries may be absent

            return open_s3(text, options)
        file_system, path = fsspec.core.url_to_fs(text, **options)
        if text.startswith(_HTTP):
            from distckpt.store.http import HttpStore  # noqa: PLC0415  likewise

            return HttpStore(file_system, path)
    except ImportError as exc:
        advice = "; pip install 'distckpt[s3]'" if text.startswith(_S3) else ""
        raise StoreError(f"{text}: can't open this URL: {exc}{advice}", url=text) from tellable(exc)
    except (ValueError, OSError, TypeError) as exc:
        raise StoreError(f"{text}: can't open this URL: {exc}", url=text) from tellable(exc)
    if type(file_system) is LocalFileSystem:
        return LocalStore(Path(path).absolute())
    return FsspecStore(file_system, path, text)
