"""The halt file: a run is asked to stop by an object in its folder."""

from __future__ import annotations

import logging
import re
import threading
import time
from dataclasses import dataclass
from datetime import datetime

from distckpt.errors import CheckpointError
from distckpt.store import Store, read_object

logger = logging.getLogger(__name__)

HALT_NAME = "halt"
POLL_S = 5.0

_SETTLE_S = 0.5
_LIMIT_BYTES = 1024
_AFTER = re.compile(r"after (\d{1,9}) saves?")
# How long `close` waits for the file's removal.
_JOIN_S = 10.0


@dataclass(frozen=True, slots=True)
class Halt:
    """What a halt file asks for.

    Attributes:
        at_s: When, in seconds since 1970; at once, if None.
        saves: After how many more saves; at once, if None.
    """

    at_s: float | None = None
    saves: int | None = None


def parse_halt(text: str) -> Halt:
    """Read a halt file: empty (at once), ``at <ISO time>``, or ``after <n> saves``.

    Raises:
        ValueError: It is something else.

    Examples:
        >>> parse_halt(""), parse_halt("after 2 saves")
        (Halt(at_s=None, saves=None), Halt(at_s=None, saves=2))
        >>> parse_halt("at 2030-01-01T12:00:00+00:00")
        Halt(at_s=1893499200.0, saves=None)
    """
    words = " ".join(text.split())
    if words.lower() in {"", "now"}:
        return Halt()
    after = _AFTER.fullmatch(words.lower())
    if after and int(after[1]):
        return Halt(saves=int(after[1]))
    if words.lower().startswith("at "):
        try:
            # Without an offset: in the coordinator's time zone.
            return Halt(at_s=datetime.fromisoformat(words[3:]).timestamp())
        except (ValueError, OverflowError, OSError) as exc:
            raise ValueError(f"{words!r}: {exc}") from exc
    raise ValueError(f"{words[:80]!r}")


def write_halt(store: Store, text: str) -> None:
    """Ask the run in a folder to save and stop; replaces what was asked before.

    Raises:
        ValueError: As in `parse_halt`.
        StoreError: The halt file can't be written.
    """
    parse_halt(text)
    store.put(HALT_NAME, text.encode(), replace=True)


class HaltFile:
    """Looks at the halt file in a thread of its own.

    Attributes:
        due: Why to stop, or None.
    """

    def __init__(self, store: Store, name: str, poll_s: float) -> None:
        self._store = store
        self._name = name
        self._url = f"{store.url.rstrip('/')}/{name}"
        self._poll_s = poll_s
        self._saves = 0
        self._seen: tuple[str, int] | None = None  # its text, and the saves until then
        self._complaint = ""
        self._obeyed = False
        self._wake = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None
        self.due: str | None = None

    def watch(self) -> None:
        """Begin to look, at the first call."""
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._run, name="distckpt-halt", daemon=True)
            self._thread.start()

    def count(self) -> None:
        """Count a save."""
        self._saves += 1
        self._wake.set()

    def obey(self, reason: str) -> None:
        """Have it removed, if it was the reason: the next job shall start."""
        if reason == self.due:
            self._obeyed = True
            self._wake.set()

    def end(self) -> None:
        """End the thread soon."""
        self._closed = True
        self._wake.set()

    def close(self) -> None:
        """End the thread, after what it has to remove."""
        self.end()
        if self._thread is not None:
            self._thread.join(_JOIN_S)

    def _run(self) -> None:
        while True:
            if self._obeyed:
                self._remove()
                return
            if self._closed:
                return
            pause_s = self._poll_s
            if self.due is None and self._look():
                pause_s = min(pause_s, _SETTLE_S)
            self._wake.wait(pause_s)
            self._wake.clear()

    def _look(self) -> bool:
        """Look at the file. What can't be read is logged once, and asks for nothing.

        Returns:
            Whether to look again soon: this content is new, and may be half of what an editor or a
            shell is writing. An empty file would be obeyed at once.
        """
        try:
            text = read_object(self._store, self._name, limit_bytes=_LIMIT_BYTES).decode()
            halt = parse_halt(text)
        except FileNotFoundError:
            self._seen, self._complaint = None, ""
            return False
        except (CheckpointError, OSError, ValueError) as exc:
            self._seen = None
            self._complain(f"{self._url}: {exc}")
            return False
        except Exception as exc:  # noqa: BLE001  a thread that ends would never see it again
            self._complain(f"{self._url}: {type(exc).__name__}: {exc}")
            return False
        if self._seen is None or self._seen[0] != text:
            self._seen = text, self._saves
            return True
        saves = self._saves - self._seen[1]
        if (halt.saves is None or saves >= halt.saves) and (
            halt.at_s is None or time.time() >= halt.at_s
        ):
            self.due = f"the halt file {self._url} says {' '.join(text.split()) or 'now'!r}"
        return False

    def _complain(self, complaint: str) -> None:
        if complaint != self._complaint:
            self._complaint = complaint
            logger.warning(
                "%s; this halt file is ignored. Expected nothing in it (stop now), "
                "'at 2030-01-31T12:00:00+00:00' or 'after 3 saves'",
                complaint,
            )

    def _remove(self) -> None:
        try:
            self._store.delete([self._name])
        except Exception as exc:  # noqa: BLE001  whatever it is: it concerns the next job only
            logger.warning(
                "%s: can't be removed, and so will stop the next job, too: %s", self._url, exc
            )
