"""A time line of saves and loads, in Chrome's trace format: for Perfetto and chrome://tracing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from distckpt.events import Event
from distckpt.stats import Phase, SaveStats

# Row numbers. What overlaps on a row has lanes: the next numbers.
_ROWS = ("events", "plan", "check", "stage", "copy", "write", "sync", "commit", "wait", "load")
_LANES = 100

_BEGIN, _END = b"[\n", b"\n]\n"
_TAIL_BYTES = 1 << 16

# What each kind of metadata tells.
_META = {
    "process_name": "name",
    "process_sort_index": "sort_index",
    "thread_name": "name",
    "thread_sort_index": "sort_index",
}

Entry = dict[str, object]


class Trace:
    """Writes what each rank did when into a file that trace viewers open.

    Each rank is a process with a row for each phase of a save (`distckpt.stats.Phase`); the
    coordinator has further ones for loads, for waiting until a save before is done, and for single
    events. Rows of ranks on several nodes are as well aligned as their clocks are.

    The file holds a whole JSON array after each save. A crash while it is extended may leave the
    array without its end, which viewers accept and the next run mends: a run that is resumed
    continues the time line.

    Args:
        path: A local file, made with its folder if it isn't there; ``.json`` by habit.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._named: set[tuple[int, int]] = set()
        self._busy_until: dict[tuple[int, int], int] = {}

    def __repr__(self) -> str:
        return f"Trace({str(self._path)!r})"

    def __call__(self, event: Event) -> None:
        """Write what an event tells.

        Raises:
            OSError: The file can't be written.
            ValueError: There is a file that isn't a trace of this class.
        """
        entries = list(self._entries(event))
        if entries:
            append(self._path, [*self._new_names(entries), *entries])

    def _entries(self, event: Event) -> Iterator[Entry]:
        stats = event.values.get("stats")
        told = {"step": event.step, "url": event.url}
        if event.kind == "save_committed" and isinstance(stats, SaveStats):
            for rank, each in sorted(stats.ranks.items()):
                for phase in each.phases:
                    more = {"bytes": each.nbytes} if phase.name == "write" else {}
                    yield self._slice(rank, phase, "save", {**told, **more})
        elif event.kind in {"backpressure", "loaded"}:
            name, key = (
                ("wait", "waited_s") if event.kind == "backpressure" else ("load", "seconds")
            )
            seconds = event.values.get(key)
            if isinstance(seconds, (int, float)):
                phase = Phase(name, event.time_s - seconds, event.time_s)
                yield self._slice(event.rank, phase, name, told)
        elif event.kind not in {"save_begun", "load_begun"}:
            yield {
                "name": event.kind,
                "cat": "event",
                "ph": "i",
                "s": "t",
                "ts": _microseconds(event.time_s),
                "pid": event.rank,
                "tid": 0,
                "args": {**event.plain()},
            }

    def _slice(self, rank: int, phase: Phase, category: str, told: Mapping[str, object]) -> Entry:
        name = phase.name
        start, stop = _microseconds(phase.start_s), _microseconds(phase.stop_s)
        row = (_ROWS.index(name) if name in _ROWS else len(_ROWS)) * _LANES
        # Slices of one row may not overlap; files of one rank and saves in flight may.
        while self._busy_until.get((rank, row), 0) > start and row % _LANES < _LANES - 1:
            row += 1
        self._busy_until[rank, row] = max(stop, self._busy_until.get((rank, row), 0))
        return {
            "name": name,
            "cat": category,
            "ph": "X",
            "ts": start,
            "dur": max(stop - start, 0),
            "pid": rank,
            "tid": row,
            "args": told,
        }

    def _new_names(self, entries: list[Entry]) -> Iterator[Entry]:
        """Name the processes and rows that this object has not written to before."""
        for entry in entries:
            rank, row = entry["pid"], entry["tid"]
            if not isinstance(rank, int) or not isinstance(row, int) or (rank, row) in self._named:
                continue
            if not any(known == rank for known, _ in self._named):
                yield _meta(rank, row, "process_name", f"rank {rank}")
                yield _meta(rank, row, "process_sort_index", rank)
            self._named.add((rank, row))
            title = "events" if row == 0 else str(entry["name"])
            lane = f" {row % _LANES + 1}" if row % _LANES else ""
            yield _meta(rank, row, "thread_name", f"{title}{lane}")
            yield _meta(rank, row, "thread_sort_index", row)


def append(path: Path, entries: list[Entry]) -> None:
    """Put entries at the end of a file's JSON array, in one write.

    Raises:
        OSError: The file can't be written.
        ValueError: It holds something else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = b",\n".join(json.dumps(entry, ensure_ascii=False).encode() for entry in entries)
    path.touch()
    with path.open("r+b", buffering=0) as file:
        stop, separator = _end_of_entries(file, path)
        if file.seek(0, os.SEEK_END) > stop + len(_END):
            file.truncate(stop)  # what a crash left
        file.seek(stop)
        file.write(separator + lines + _END)  # over the array's end


def _end_of_entries(file: BinaryIO, path: Path) -> tuple[int, bytes]:
    """Return where the last whole entry ends, and what must be written before the next one."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size < len(_BEGIN) or file.read(len(_BEGIN)) != _BEGIN:
        if size:
            raise ValueError(f"{path} is there and is no trace that can be continued: move it away")
        return 0, _BEGIN
    start = max(len(_BEGIN), size - _TAIL_BYTES)
    file.seek(start)
    tail = file.read()
    if tail.endswith(_END):
        return size - len(_END), b",\n"
    # A write was cut short. Each entry has a line of its own; the last one may be whole.
    line = tail.rfind(b"\n") + 1
    last = tail[line:].rstrip(b",\n]")
    whole = _is_json(last)
    stop = line + len(last) if whole else tail.rfind(b"}", 0, line) + 1
    return (start + stop, b",\n") if stop else (len(_BEGIN), b"")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _meta(rank: int, row: int, name: str, told: object) -> Entry:
    return {"name": name, "ph": "M", "ts": 0, "pid": rank, "tid": row, "args": {_META[name]: told}}


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)
