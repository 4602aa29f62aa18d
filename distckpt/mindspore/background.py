"""Asynchronous saves: one at a time, and none fails unnoticed."""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Callable

from distckpt.errors import text

logger = logging.getLogger(__name__)


class PendingSave:
    """A save in flight, made by ``save_checkpoint(..., async_save=True)``.

    The file is written by a thread; a program that ends waits for it. A failure is logged at once,
    and raised by `wait`, or else by the next save, or else at the program's end.
    """

    def __init__(self, path: str, write: Callable[[], None]) -> None:
        self._path = path
        self._write = write
        self._error: BaseException | None = None
        self._raised = False
        self._thread = threading.Thread(target=self._run, name="distckpt-mindspore-save")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._write()
        except BaseException as exc:  # noqa: BLE001  whoever waits raises it
            self._error = exc
            logger.error("%s: the save failed: %s", self._path, text(exc))  # noqa: TRY400
        del self._write  # and the copies with it

    def __repr__(self) -> str:
        state = "in flight" if not self.done() else "failed" if self._error else "saved"
        return f"<PendingSave {self._path!r} {state}>"

    def done(self) -> bool:
        """Whether it has ended, well or not. Never blocks."""
        return not self._thread.is_alive()

    def join(self) -> None:
        """Wait until it has ended; raises nothing."""
        self._thread.join()

    def wait(self, timeout_s: float | None = None) -> str:
        """Wait until the file is durable.

        Returns:
            Its path.

        Raises:
            TimeoutError: It isn't yet; the save goes on.
            CheckpointError: It failed; the file that was there before is unchanged.
        """
        self._thread.join(timeout_s)
        if not self.done():
            raise TimeoutError(f"{self._path}: not saved within {timeout_s} s; the save goes on")
        if self._error is not None:
            self._raised = True
            raise self._error
        return self._path

    def raise_unseen(self) -> None:
        """Wait, and raise a failure that nobody was told of yet."""
        self.join()
        if self._error is not None and not self._raised:
            self.wait()


class Background:
    """The asynchronous saves of a process: one at a time, as in MindSpore."""

    def __init__(self) -> None:
        self._last: PendingSave | None = None
        atexit.register(self.settle)

    def start(self, path: str, write: Callable[[], None]) -> PendingSave:
        """Begin a save; the one before must be settled."""
        self._last = PendingSave(path, write)
        return self._last

    def join(self) -> None:
        """Wait for the last one; raises nothing."""
        if self._last is not None:
            self._last.join()

    def settle(self) -> None:
        """Wait for the last one, and raise its failure if nobody was told."""
        last, self._last = self._last, None
        if last is not None:
            last.raise_unseen()


BACKGROUND = Background()
