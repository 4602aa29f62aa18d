"""Of several Managers on one root, the newest writes: each that begins takes the next epoch.

So a job that is restarted never waits for one that may or may not be dead; should that one still
live, it learns at its next commit that it has been replaced.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import time
from contextlib import suppress
from datetime import UTC, datetime

from distckpt.errors import CheckpointError, SaveFailed, StoreError
from distckpt.run import OWN
from distckpt.store import Store, read_object

_EPOCH = re.compile(r"epoch-([0-9]{8})")
_ATTEMPTS = 100


class Fence:
    """A Manager's epoch. At the coordinator only; safe for several threads, one of which takes it.

    Args:
        store: The run's root.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._token = secrets.token_hex(8)
        self.epoch: int | None = None

    def take(self) -> None:
        """Take the next epoch, if none was taken yet: whoever wrote here before must not any more.

        Raises:
            StoreError: The store failed.
        """
        if self.epoch is not None:
            return
        taken = self._epochs()
        epoch = max(taken, default=0) + 1
        for _ in range(_ATTEMPTS):
            if self._create(epoch):
                break
            epoch += 1
        else:
            raise StoreError(f"{self._store.url}/{OWN}: no epoch is free", url=self._store.url)
        self.epoch = epoch
        with suppress(CheckpointError, OSError):  # without it, the next one is enough
            self._store.delete([_name(found) for found in taken if found < epoch])

    def check(self) -> None:
        """Take an epoch if none was taken, and make sure that it is still the newest.

        Raises:
            SaveFailed: Another Manager has taken over.
            StoreError: The store failed.
        """
        self.take()
        epoch = self.epoch or 0
        is_newest = not self._is_there(epoch + 1)
        if is_newest and self._is_ours(epoch):
            return
        # An epoch is deleted only by who has taken a higher one.
        found = [found for found in self._epochs() if found >= epoch]
        if not found:
            raise SaveFailed(
                f"{self._store.url}: {_name(epoch)}, by which this Manager knows that no other has "
                "taken over this run, is gone: nothing more is saved or deleted by this one. Don't "
                f"delete what lies in {OWN}; start the job again"
            )
        raise SaveFailed(
            f"{self._store.url}: another Manager{self._described(max(found))} has taken over this "
            "run: nothing more is saved or deleted by this one. Stop this job, or let it use "
            "another root"
        )

    def _create(self, epoch: int) -> bool:
        content = {
            "token": self._token,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "begun": datetime.now(UTC).isoformat(timespec="seconds"),
            "time_s": time.time(),
        }
        data = json.dumps(content, indent=1).encode()
        try:
            self._store.put(_name(epoch), data, replace=False)
        except FileExistsError:
            # It may be ours: the answer to an earlier attempt was lost.
            return self._is_ours(epoch)
        except StoreError:
            # Perhaps it can't create exclusively (a file system without links): the last wins, and
            # `check` tells the others.
            if not self._is_there(epoch):
                self._store.put(_name(epoch), data, replace=True)
            return self._is_ours(epoch)
        return True

    def _epochs(self) -> list[int]:
        found = (_EPOCH.fullmatch(name) for name in self._store.names(OWN + "/"))
        return sorted(int(match[1]) for match in found if match)

    def _is_there(self, epoch: int) -> bool:
        try:
            self._store.size(_name(epoch))
        except FileNotFoundError:
            return False
        return True

    def _is_ours(self, epoch: int) -> bool:
        return self._read(epoch).get("token") == self._token

    def _read(self, epoch: int) -> dict[str, object]:
        try:
            found = json.loads(read_object(self._store, _name(epoch), limit_bytes=1 << 16))
        except (FileNotFoundError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def _described(self, epoch: int) -> str:
        found = self._read(epoch)
        return f", begun {found.get('begun', '?')} on {found.get('host', '?')},"


def _name(epoch: int) -> str:
    return f"{OWN}/epoch-{epoch:08d}"
