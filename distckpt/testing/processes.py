"""Ranks that are processes of this machine, without MPI: they can be killed, and others live on."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from distckpt import codec
from distckpt.errors import CheckpointError, from_plain, to_plain
from distckpt.pending import finish_saves

_HEADER = struct.Struct("<QI")  # a message's length and tag


@dataclass(frozen=True, slots=True)
class Ended:
    """How a rank of `run_processes` has ended.

    Attributes:
        value: What the function returned; None if it did not return.
        error: What it raised. What is none of distckpt's errors is a CheckpointError that says so.
        signal: The signal that ended it.
        late: Whether it was still running at the end of the time, and was killed then.
    """

    value: object = None
    error: CheckpointError | None = None
    signal: int | None = None
    late: bool = False


class ProcessCoordinator:
    """A Coordinator over sockets; made by `run_processes`. A message to a dead rank is lost."""

    concurrent = True

    def __init__(self, rank: int, sockets: dict[int, socket.socket]) -> None:
        self.rank = rank
        self.size = len(sockets) + 1
        self.node = "node0"
        self._sockets = sockets
        self._received: dict[int, deque[tuple[int, bytes]]] = {}
        self._incoming = {other: bytearray() for other in sockets}
        self._outgoing = {other: bytearray() for other in sockets}
        self._lock = threading.Lock()

    def post(self, dest: int, tag: int, payload: bytes) -> None:
        """See `Coordinator`."""
        with self._lock:
            self._outgoing[dest] += _HEADER.pack(len(payload), tag) + payload
            self._send()

    def poll(self, tag: int, source: int | None = None) -> tuple[int, bytes] | None:
        """See `Coordinator`."""
        with self._lock:
            self._send()
            self._receive()
            box = self._received.get(tag, deque())
            for message in box:
                if source is None or message[0] == source:
                    box.remove(message)
                    return message
        return None

    def _send(self) -> None:
        for other, waiting in self._outgoing.items():
            try:
                while waiting:
                    del waiting[: self._sockets[other].send(waiting)]
            except BlockingIOError:
                continue
            except OSError:
                waiting.clear()  # that rank is dead

    def _receive(self) -> None:
        for other, data in self._incoming.items():
            with contextlib.suppress(OSError):
                while found := self._sockets[other].recv(1 << 20):
                    data.extend(found)
            while len(data) >= _HEADER.size:
                length, tag = _HEADER.unpack_from(data)
                stop = _HEADER.size + length
                if len(data) < stop:
                    break
                message = (other, bytes(data[_HEADER.size : stop]))
                self._received.setdefault(tag, deque()).append(message)
                del data[:stop]


def run_processes(
    size: int, function: Callable[[ProcessCoordinator], object], *, timeout_s: float = 60.0
) -> list[Ended]:
    """Run a function as so many ranks, each a forked process; what is left is killed in the end.

    Call it from a program that has no other threads, since only the calling one goes on in a fork.

    Args:
        size: Number of ranks.
        function: Called once a rank with its coordinator: pass it on as `comm=`. It returns plain
            values; threads that it leaves behind are waited for.
        timeout_s: How long the ranks may take.

    Returns:
        How each rank ended, by rank.
    """
    sockets: list[dict[int, socket.socket]] = [{} for _ in range(size)]
    for low in range(size):
        for high in range(low + 1, size):
            sockets[low][high], sockets[high][low] = socket.socketpair()
    for pairs in sockets:
        for end in pairs.values():
            end.settimeout(0)
    with tempfile.TemporaryDirectory(prefix="distckpt-ranks-") as folder:
        results = [Path(folder, str(rank)) for rank in range(size)]
        pids = []
        for rank in range(size):
            pid = os.fork()
            if not pid:
                _be_rank(ProcessCoordinator(rank, sockets[rank]), function, results[rank])
            pids.append(pid)
        for pairs in sockets:
            for end in pairs.values():
                end.close()
        late = _wait(pids, timeout_s)
        return [
            _ended(result, os.waitpid(pid, 0)[1], late=pid in late)
            for pid, result in zip(pids, results, strict=True)
        ]


def _be_rank(
    comm: ProcessCoordinator, function: Callable[[ProcessCoordinator], object], result: Path
) -> NoReturn:
    """In the child: run the function, and leave what came of it."""
    error = value = None
    try:
        value = codec.pack(function(comm))
        finish_saves()
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
    except BaseException as exc:  # noqa: BLE001  the parent learns of it
        error = to_plain(exc)
        if not isinstance(exc, CheckpointError):
            traceback.print_exc()
    result.write_bytes(codec.pack({"value": value, "error": error}))
    sys.stderr.flush()
    os._exit(0)  # not the parent's exit handlers, nor its caller's `finally`


def _wait(pids: Sequence[int], timeout_s: float) -> set[int]:
    """Wait until all have ended; kill those that are late, and return them."""
    deadline = time.monotonic() + timeout_s
    running = {os.pidfd_open(pid): pid for pid in pids}
    late: set[int] = set()
    with selectors.DefaultSelector() as ends:
        for descriptor in running:
            ends.register(descriptor, selectors.EVENT_READ)
        while running:
            found = ends.select(max(deadline - time.monotonic(), 0))
            if not found and time.monotonic() >= deadline and not late:
                late = set(running.values())
                for pid in late:
                    os.kill(pid, signal.SIGKILL)
                deadline += timeout_s
            for key, _ in found:
                ends.unregister(key.fd)
                os.close(key.fd)
                del running[key.fd]
    return late


def _ended(result: Path, status: int, *, late: bool) -> Ended:
    if os.WIFSIGNALED(status):
        return Ended(signal=os.WTERMSIG(status), late=late)
    try:
        found = codec.unpack(result.read_bytes())
    except FileNotFoundError:
        return Ended(error=CheckpointError(f"the rank ended with status {status}"), late=late)
    if found["error"] is not None:
        return Ended(error=from_plain(found["error"]), late=late)
    return Ended(codec.unpack(found["value"]), late=late)
