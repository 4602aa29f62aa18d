"""Holds, the reader's side: what is being read is not deleted.

The reader writes a hold beside the checkpoint, and only then looks for marks of deletion and for
the manifest; the deleter (`distckpt.deletion`) writes a mark, and only then looks for holds. So of
two that meet, one sees the other, whatever the order of their steps, and gives way.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import threading
import time
from types import TracebackType
from typing import Self

from distckpt.errors import CheckpointError, IncompleteCheckpoint, text
from distckpt.marks import LEASE_S, MARK_S, committed_id, modified_s, names_of, new_name
from distckpt.store import Store

logger = logging.getLogger(__name__)

# How often a reader that finds a mark looks again, with doubled pauses: about a second in all. The
# deleter may just be giving way.
_LOOKS = 10


class Hold:
    """Keeps one checkpoint from being deleted; made by `Checkpoint.hold`, in force from then on.

    A context manager that ends it. A thread renews it three times a lease; it ends with the
    process, too, at the latest a lease later.

    Attributes:
        lost: Why it is no longer in force though nobody has released it: this process, or its
            store, stood still for longer than the lease, and the checkpoint was deleted. Else None.
    """

    def __init__(
        self, store: Store, save_id: int, *, lease_s: float = LEASE_S, looks: int = _LOOKS
    ) -> None:
        if not 0 < lease_s < math.inf:
            raise ValueError(f"lease_s={lease_s}: expected a number of seconds above 0")
        self.lost: str | None = None
        self._store = store
        self._save_id = save_id
        self._lease_s = lease_s
        self._looks = looks
        self._name = new_name("hold", save_id)
        self._process = os.getpid()
        self._released = threading.Event()
        self._take()
        self._thread = threading.Thread(
            target=self._renew_until_released, name="distckpt-hold", daemon=True
        )
        try:
            self._thread.start()
        except RuntimeError:  # the interpreter is shutting down
            self._drop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<Hold {self._store.url!r}>"

    def release(self) -> None:
        """End it: from now on the checkpoint may be deleted. Never raises; twice is fine."""
        # Of a forked process's copy nothing is the parent's to lose.
        if os.getpid() == self._process and not self._released.is_set():
            self._released.set()
            self._thread.join()
            self._drop()

    def _renew(self) -> None:
        """Renew it, as its thread does three times a lease. Never raises."""
        try:
            before_s = modified_s(self._store, self._name)
            self._put()
            after_s = self._store.modified(self._name)
            if before_s == -math.inf or (
                before_s is not None and after_s is not None and after_s > before_s + self._lease_s
            ):
                # It had ended: a deleter may have been there.
                self._look()
        except IncompleteCheckpoint as exc:
            self.lost = text(exc)
            self._drop()
            logger.warning(
                "%s: the hold is lost: it was not renewed within its lease of %g s, and %s",
                *(self._store.url, self._lease_s, self.lost),
            )
        except (OSError, CheckpointError) as exc:
            logger.warning(
                "%s: the hold could not be renewed, and ends %g s after it last was: %s",
                *(self._store.url, self._lease_s, text(exc)),
            )

    def _renew_until_released(self) -> None:
        while self.lost is None and not self._released.wait(self._lease_s / 3):
            self._renew()

    def _take(self) -> None:
        try:
            self._put()
        except CheckpointError as exc:
            # A folder that is being deleted may also refuse the hold.
            if committed_id(self._store) != self._save_id:
                raise self._gone() from exc
            raise
        try:
            self._look()
        except BaseException:
            self._drop()
            raise

    def _put(self) -> None:
        # Of the same length each time, so that who reads it while it is replaced isn't misled.
        content = {
            "lease_s": self._lease_s,
            "written_ns": time.time_ns(),
            "host": socket.gethostname(),
            "process": self._process,
        }
        self._store.put(self._name, json.dumps(content, indent=1).encode(), replace=True)

    def _look(self) -> None:
        """Look whether the checkpoint is there, and nobody deletes it.

        The marks first: when a deleter takes its mark away, the manifest is gone already.

        Raises:
            IncompleteCheckpoint: It isn't, or somebody does.
        """
        for look in range(self._looks):
            marked = self._is_marked()
            if committed_id(self._store) != self._save_id:
                raise self._gone()
            if not marked:
                return
            time.sleep(1e-3 * 2**look)
        raise IncompleteCheckpoint(
            f"{self._store.url}: this checkpoint is just being deleted: use a newer one"
        )

    def _is_marked(self) -> bool:
        marks = names_of(self._store, "deletion", self._save_id)
        if not marks:
            return False
        now_s = modified_s(self._store, self._name)
        times = [modified_s(self._store, mark) for mark in marks]
        return any(now_s is None or time_s is None or now_s - time_s <= MARK_S for time_s in times)

    def _gone(self) -> IncompleteCheckpoint:
        return IncompleteCheckpoint(
            f"{self._store.url}: this checkpoint is no longer there: it was pruned, or another "
            "save has replaced it. Open the run's newest one"
        )

    def _drop(self) -> None:
        try:
            self._store.delete([self._name])
        except (OSError, CheckpointError) as exc:
            logger.warning(
                "%s: the hold %s could not be deleted, and ends in %g s: %s",
                *(self._store.url, self._name, self._lease_s, text(exc)),
            )
