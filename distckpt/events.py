"""What happens to a run's checkpoints, as events: told to functions, and written to files."""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, Literal

from distckpt.errors import size_text
from distckpt.formats.base import library
from distckpt.stats import SaveStats

logger = logging.getLogger(__name__)

Kind = Literal[
    "save_begun",
    "save_committed",
    "save_failed",
    "backpressure",
    "pruned",
    "kept_back",
    "load_begun",
    "loaded",
    "skipped",
    "stop_requested",
    "fenced",
]

# What each kind is called in a log line, and how loud it is. A save is one line when it ends; a
# failure is an error's own message already.
_LINES: dict[Kind, tuple[int, str]] = {
    "save_begun": (logging.DEBUG, "saving"),
    "save_committed": (logging.INFO, "saved"),
    "save_failed": (logging.DEBUG, "not saved"),
    "backpressure": (logging.INFO, "the loop waited for a save before"),
    "pruned": (logging.DEBUG, "deleted"),
    "kept_back": (logging.INFO, "not deleted"),
    "load_begun": (logging.DEBUG, "loading"),
    "loaded": (logging.INFO, "loaded"),
    "skipped": (logging.WARNING, "passed over"),
    "stop_requested": (logging.WARNING, "asked to stop"),
    "fenced": (logging.ERROR, "taken over by another Manager"),
}


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a run's checkpoints.

    Attributes:
        kind: What; the table in ``docs/observing.md`` lists the kinds, and the values of each.
        time_s: When, in seconds since 1970.
        step: The step that it is about, or None.
        url: The checkpoint or the run that it is about.
        rank: The rank that tells it: the coordinator's, which is 0.
        values: More, by kind: plain values, and ``stats``, a `distckpt.stats.SaveStats`.

    Examples:
        >>> event = Event("pruned", 0.0, 100, "run7/step-00000100", 0, {"reason": "KeepLast(3)"})
        >>> print(event)
        run7/step-00000100: deleted: KeepLast(3)
    """

    kind: Kind
    time_s: float
    step: int | None
    url: str
    rank: int = 0
    values: Mapping[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        told = ", ".join(filter(None, map(self._text, self.values)))
        return f"{self.url}: {_LINES[self.kind][1]}{told and ': '}{told}"

    def _text(self, name: str) -> str:
        value = self.values[name]
        if isinstance(value, Mapping):
            return ", ".join(f"{key} {_number(each)}" for key, each in value.items())
        if name == "nbytes" and isinstance(value, int):
            return size_text(value)
        if name.endswith(("_s", "seconds")) and isinstance(value, float):
            return f"{value:.2f} s"
        bare = isinstance(value, (str, SaveStats))
        return str(value) if bare else f"{name} {_number(value)}"

    def plain(self) -> dict[str, object]:
        """Return it as what JSON can hold; numbers that are not finite become texts."""
        return {
            "kind": self.kind,
            "time_s": self.time_s,
            "step": self.step,
            "url": self.url,
            "rank": self.rank,
            **{name: _plain(value) for name, value in self.values.items()},
        }


OnEvent = Callable[[Event], None]


class Teller:
    """Makes events, logs each, and calls who wants to know, one event at a time.

    Args:
        url: Of the run.
        on_event: A function, several, or None. What one raises is logged.
        rank: The rank that tells.

    May be called from any thread. Nothing reaches the caller: a full disk under a log of events is
    no reason to stop a training.
    """

    def __init__(
        self, url: str, on_event: OnEvent | Iterable[OnEvent] | None = None, *, rank: int = 0
    ) -> None:
        self._url = url
        self._rank = rank
        found = () if on_event is None else (on_event,) if callable(on_event) else tuple(on_event)
        for each in found:
            if not callable(each):
                raise TypeError(f"on_event: {each!r:.60} can't be called; expected Event -> None")
        self._listeners = found
        self._lock = threading.RLock()  # a listener may do what is told, too

    def __call__(
        self, kind: Kind, step: int | None = None, *, url: str | None = None, **values: object
    ) -> None:
        """Tell an event.

        Args:
            kind: What happened.
            step: To which step.
            url: To which checkpoint; the run's by default.
            **values: More about it.
        """
        event = Event(kind, time.time(), step, url or self._url, self._rank, values)
        logger.log(_LINES[kind][0], "%s", event)
        with self._lock:
            for listener in self._listeners:
                try:
                    listener(event)
                except Exception:
                    logger.exception("on_event=%r failed; the event was: %s", listener, event)


class JsonLines:
    r"""Writes each event as a line of JSON at the end of a file: `Event.plain`.

    A line is written at once and in one piece: a crash leaves whole lines, and at most one torn
    one, which the next run begins a new line after.

    Args:
        path: A local file, made with its folder if it isn't there.

    Examples:
        >>> write = JsonLines("events.jsonl")
        >>> write(Event("pruned", 0.0, 100, "run7/step-00000100"))
        >>> Path("events.jsonl").read_text()
        '{"kind": "pruned", "time_s": 0.0, "step": 100, "url": "run7/step-00000100", "rank": 0}\n'
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)

    def __repr__(self) -> str:
        return f"JsonLines({str(self._path)!r})"

    def __call__(self, event: Event) -> None:
        """Write an event.

        Raises:
            OSError: The file can't be written.
        """
        line = json.dumps(event.plain(), ensure_ascii=False).encode() + b"\n"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab+", buffering=0) as file:
            if file.tell() and not _ends_with_newline(file):
                line = b"\n" + line
            file.write(line)


class TensorBoard:
    """Writes what saves and loads cost into TensorBoard's event files, by step.

    Scalars are ``checkpoint/seconds``, ``checkpoint/gigabytes``, ``checkpoint/gb_per_s`` and
    ``checkpoint/stall_s`` of each save, ``checkpoint/waited_s`` of each wait for the save before,
    and ``checkpoint/load_seconds``; failures and what was passed over are texts.

    Args:
        folder: Where to, as for TensorBoard's ``--logdir``; each run of the program adds a file.

    Raises:
        UnsupportedFormat: tensorboardX isn't installed: it is in distckpt's extra ``tensorboard``.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = os.fspath(folder)
        self._writer: Any = None
        _tensorboardx("event_file_writer")

    def __repr__(self) -> str:
        return f"TensorBoard({self._folder!r})"

    def __call__(self, event: Event) -> None:
        """Write an event; one without numbers or an error is left out."""
        scalars, texts = _shown(event)
        if not scalars and not texts:
            return
        if self._writer is None:
            _tensorboardx("record_writer").directory_check(self._folder)
            # Names end with the second: two of one second must differ.
            self._writer = _tensorboardx("event_file_writer").EventsWriter(
                f"{self._folder.rstrip('/')}/events", f".{secrets.token_hex(4)}"
            )
        summary, message = _tensorboardx("summary"), _tensorboardx("proto.event_pb2").Event
        found = [summary.scalar(f"checkpoint/{name}", value) for name, value in scalars.items()]
        found += [summary.text(f"checkpoint/{name}", text) for name, text in texts.items()]
        for each in found:
            self._writer.write_event(message(wall_time=event.time_s, step=event.step, summary=each))
        self._writer.flush()

    def close(self) -> None:
        """Close the file; the next event begins another one."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _tensorboardx(module: str) -> Any:  # noqa: ANN401  it has no types
    return library(f"tensorboardX.{module}", extra="tensorboard", format="TensorBoard")


def _shown(event: Event) -> tuple[dict[str, float], dict[str, str]]:
    """Return the numbers and the texts that TensorBoard shows of an event."""
    values, stats = event.values, event.values.get("stats")
    if event.kind == "save_committed" and isinstance(stats, SaveStats):
        return {
            "seconds": stats.seconds,
            "gigabytes": stats.nbytes / 1e9,
            "gb_per_s": stats.gb_per_s,
            "stall_s": stats.stall_s,
        }, {}
    names = {"backpressure": ("waited_s", "waited_s"), "loaded": ("seconds", "load_seconds")}
    if event.kind in names:
        source, name = names[event.kind]
        number = values.get(source)
        return ({name: float(number)} if isinstance(number, (int, float)) else {}), {}
    if event.kind in {"save_failed", "skipped", "fenced", "stop_requested"}:
        return {}, {event.kind: str(event)}
    return {}, {}


def _plain(value: object) -> object:
    if isinstance(value, SaveStats):
        names = ("nbytes", "seconds", "gb_per_s", "stall_s", "slowest_rank")
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if value is None or isinstance(value, (str, bool, int)):
        return value
    item = getattr(value, "item", None)  # a number of numpy's, or of a framework's
    return _plain(item()) if callable(item) and getattr(value, "ndim", 0) == 0 else str(value)


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _ends_with_newline(file: FileIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
