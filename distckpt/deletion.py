"""Deleting a checkpoint that nobody reads; the deleter's side of `distckpt.hold`.

A deleter writes a mark, and only then looks for holds. Nothing is changed before, and nothing is
ever put back: a deleter that dies leaves a whole checkpoint, or a mark with which whoever comes
next does the rest (`finish_deletions`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from distckpt import codec
from distckpt.errors import CheckpointError
from distckpt.manifest import MANIFEST_NAME, Manifest
from distckpt.marks import committed_id, is_held_at, is_old, name_parts, names_of, new_name
from distckpt.store import Store, partial_of, read_object

logger = logging.getLogger(__name__)

# Readers respect a mark for so long that a deletion which begins within this is over, or the
# manifest at least gone, before they don't.
_BEGIN_WITHIN_S = 60.0


def delete_unless_held(
    store: Store, manifest: Manifest, *, guard: Callable[[], None] | None = None
) -> bool:
    """Delete a checkpoint, the manifest first, unless a reader holds it. Not collective.

    Args:
        store: Its folder.
        manifest: Its manifest. Where the folder has another one by now, that one stays.
        guard: Called immediately before the manifest is deleted; what it raises is passed on, and
            nothing is deleted.

    Returns:
        Whether it is gone; False if it is held.

    Raises:
        StoreError: The store failed; whether the manifest is gone can't be told, and
            `finish_deletions` does the rest.
    """
    save_id = manifest.save_id
    began_s = time.monotonic()
    mark = new_name("deletion", save_id)
    try:
        store.put(mark, codec.encode(manifest), replace=True)
        # Only now: whoever puts a hold later sees the mark.
        gives_way = is_held_at(store, save_id, mark)
        is_there = not gives_way and committed_id(store) == save_id
        if not gives_way and guard is not None:
            guard()
        # Readers don't respect a mark for ever.
        gives_way = gives_way or time.monotonic() - began_s > _BEGIN_WITHIN_S
    except BaseException:
        with suppress(OSError, CheckpointError):
            store.delete([mark])
        raise
    if gives_way:
        store.delete([mark])
        return False
    if is_there:
        store.delete([MANIFEST_NAME])
    _delete_rest(store, manifest)
    return True


def delete_replaced(store: Store, manifest: Manifest) -> bool:
    """Delete the files of a checkpoint whose manifest another has replaced, unless it is held.

    Then a mark says that they are to go, and `finish_deletions` deletes them later.

    Args:
        store: The folder.
        manifest: The replaced manifest.

    Returns:
        Whether they are gone.

    Raises:
        StoreError: The store failed.
    """
    save_id = manifest.save_id
    found = [name for name in store.names() if name_parts(name)]
    if not found:
        store.delete(manifest.file_names)
        return True
    if any(name_parts(name) == ("hold", save_id) for name in found):
        mark = new_name("deletion", save_id)
        store.put(mark, codec.encode(manifest), replace=True)
        if is_held_at(store, save_id, mark):
            return False
    _delete_rest(store, manifest)
    finish_deletions(store)
    return True


def finish_deletions(store: Store) -> None:
    """Finish the deletions in a folder that others have begun, unless a reader holds the files.

    Safe at any time, also while those others go on. A checkpoint that is there whole stays. One
    listing, where there is nothing to do. Not collective.

    Args:
        store: A checkpoint's folder, with or without one.

    Raises:
        CheckpointError: The store failed, or the manifest can't be read, and nothing is deleted.
    """
    ours: dict[int, list[str]] = {}
    for name in store.names():
        parts = name_parts(name)
        if parts:
            ours.setdefault(parts[1], []).append(name)
    if not ours:
        return
    committed = committed_id(store)
    for save_id, names in ours.items():
        marks = [name for name in names if name.startswith("deletion") and partial_of(name) is None]
        if save_id == committed:
            _delete_old(store, marks)
        elif not marks:
            # Of readers that came too late, and died before they could take their hold away.
            _delete_old(store, names)
        else:
            _finish(store, save_id, marks[0])


def _finish(store: Store, save_id: int, mark: str) -> None:
    try:
        data = read_object(store, mark)
        manifest = codec.decode(data, path=f"{store.url}/{mark}")
    except FileNotFoundError:
        return  # somebody else has finished
    except CheckpointError as exc:
        logger.warning("%s: the files of a deleted checkpoint are left: %s", store.url, exc)
        return
    if manifest.save_id != save_id:
        logger.warning("%s/%s: it is about another checkpoint, and left", store.url, mark)
        return
    if names_of(store, "hold", save_id):
        store.put(mark, data, replace=True)
        if is_held_at(store, save_id, mark):
            return
    _delete_rest(store, manifest)
    logger.info("%s: finished the deletion of save %016x", store.url, save_id)


def _delete_rest(store: Store, manifest: Manifest) -> None:
    """Delete all of a checkpoint but the manifest; the marks, which tell of it, last."""
    store.delete(manifest.file_names)
    found = [(name, name_parts(name)) for name in store.names()]
    for kind in ("hold", "deletion"):
        names = [name for name, parts in found if parts == (kind, manifest.save_id)]
        if names:
            store.delete(names)


def _delete_old(store: Store, names: Sequence[str]) -> None:
    """Delete what nobody respects any more, by this machine's clock."""
    now_s = time.time()
    old = [name for name in names if is_old(store, name, now_s=now_s)]
    if old:
        store.delete(old)
