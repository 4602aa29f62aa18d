"""How far saves and loads are: bars on a terminal, log lines elsewhere. A door of rich."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self, TextIO

from distckpt.errors import size_text

logger = logging.getLogger(__name__)

Count = Callable[[], tuple[int, int]]


class Progress:
    """Shows how far saves and loads are, on one rank.

    Args:
        enabled: Whether anything is shown.
        stream: Where bars are drawn, if it is a terminal and rich is installed; the process's
            standard error by default. Elsewhere a log line is written now and then, at level INFO.
        log_every_s: Seconds between two log lines of one save or load.

    May be used from any thread. A thread of its own asks and draws, only while something is shown.
    """

    def __init__(
        self, *, enabled: bool = True, stream: TextIO | None = None, log_every_s: float = 10.0
    ) -> None:
        self._enabled = enabled
        self._stream = stream
        self._log_every_s = log_every_s
        self._lock = threading.Lock()
        self._bars: list[Bar] = []
        self._screen: Screen | None = None
        self._wanted = threading.Event()  # set while a thread shows something

    def begin(self, title: str, count: Count | None = None) -> Bar:
        """Begin to show a save or a load.

        Args:
            title: What it is.
            count: Returns (bytes done, bytes in all) of this rank. It is called by another thread;
                by default `Bar.update` is told.

        Returns:
            What must be ended, whatever happens.
        """
        bar = Bar(self, title, count)
        if self._enabled:
            with self._lock:
                self._bars.append(bar)
                if self._screen is None:
                    self._screen = self._new_screen()
                    thread = threading.Thread(
                        target=self._run, args=(self._screen,), name="distckpt-progress"
                    )
                    thread.daemon = True  # what it shows is no reason to go on living
                    thread.start()
        return bar

    def _new_screen(self) -> Screen:
        stream = sys.stderr if self._stream is None else self._stream
        # Asked first, so that nothing imports rich where nobody is looking.
        return (_bars_on(stream) if stream.isatty() else None) or Lines(self._log_every_s)

    def _run(self, screen: Screen) -> None:
        while not screen.over.wait(screen.interval_s):
            with self._lock:
                if not screen.over.is_set():
                    for bar in self._bars:
                        screen.show(bar)

    def _end(self, bar: Bar, text: str) -> None:
        with self._lock:
            if bar not in self._bars or self._screen is None:
                return
            self._bars.remove(bar)
            self._screen.end(bar, text)
            if not self._bars:
                self._screen.over.set()
                self._screen.close()
                self._screen = None


class Bar:
    """A save or a load that is shown while it runs; as a context manager it ends by itself."""

    def __init__(self, owner: Progress, title: str, count: Count | None) -> None:
        self.title = title
        self._owner = owner
        self._count = count
        self._told = (0, 0)
        self._since_s = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def update(self, done_bytes: int, total_bytes: int) -> None:
        """Say how far this rank is, where nobody is asked."""
        self._told = (done_bytes, total_bytes)

    def end(self, text: str = "") -> None:
        """Show it no longer; a second call does nothing.

        Args:
            text: What became of it, left on the terminal.
        """
        self._owner._end(self, text)  # noqa: SLF001  two halves of one thing

    def count(self) -> tuple[int, int]:
        """Return bytes done and in all, on this rank."""
        return self._count() if self._count is not None else self._told

    def text(self) -> str:
        """Say how far it is: ``1.2 MB of 3.0 MB on this rank, 0.1 GB/s``."""
        done, total = self.count()
        seconds = time.monotonic() - self._since_s
        speed = done / 1e9 / seconds if seconds > 0 else 0.0
        return f"{size_text(done)} of {size_text(total)} on this rank, {speed:.1f} GB/s"


class Screen(Protocol):
    """Where bars are shown.

    Attributes:
        interval_s: Seconds between two looks.
        over: Set when nobody looks any more.
    """

    interval_s: float
    over: threading.Event

    def show(self, bar: Bar) -> None:
        """Show how far it is."""

    def end(self, bar: Bar, text: str) -> None:
        """Show it no longer."""

    def close(self) -> None:
        """Show nothing any more."""


class Lines:
    """Log lines. What became of a save or a load is logged by who ends it."""

    def __init__(self, interval_s: float) -> None:
        self.interval_s = interval_s
        self.over = threading.Event()

    def show(self, bar: Bar) -> None:
        """See `Screen`."""
        logger.info("%s: %s", bar.title, bar.text())

    def end(self, bar: Bar, text: str) -> None:
        """See `Screen`."""

    def close(self) -> None:
        """See `Screen`."""


def _bars_on(stream: TextIO) -> Screen | None:
    """Return bars on a terminal, or None where rich is missing, or the terminal can't."""
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import BarColumn, TaskID, TextColumn
        from rich.progress import Progress as RichProgress
    except ImportError:
        return None
    console = Console(file=stream)
    if not console.is_terminal or console.is_dumb_terminal:
        return None

    class Bars:
        interval_s = 0.1

        def __init__(self) -> None:
            self.over = threading.Event()
            self._tasks: dict[Bar, TaskID] = {}
            self._progress = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                console=console,
                auto_refresh=False,
                transient=True,
            )
            self._progress.start()
            console.show_cursor(show=True)  # a job that is killed leaves no terminal without one

        def show(self, bar: Bar) -> None:
            if bar not in self._tasks:
                self._tasks[bar] = self._progress.add_task(escape(bar.title), text="")
            done, total = bar.count()
            self._progress.update(
                self._tasks[bar], completed=done, total=total or None, text=bar.text()
            )
            self._progress.refresh()

        def end(self, bar: Bar, text: str) -> None:
            task = self._tasks.pop(bar, None)
            if task is not None:
                self._progress.remove_task(task)
            if text:
                console.print(f"{bar.title}: {text}", markup=False, highlight=False)

        def close(self) -> None:
            self._progress.stop()

    return Bars()
