"""Ranks that are threads of this process, and messages between them that go wrong."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from distckpt.coordinator import BACKGROUND_TAG, Coordinator, MpiComm, as_mpi, duplicate
from distckpt.errors import CheckpointError
from distckpt.testing.faults import Fault, Faults, Operation

T = TypeVar("T")

# By (in the background, step of an operation): what a save's messages say.
_MESSAGES = {
    (False, 0): "call",
    (False, 1): "answer",
    (False, 2): "description",
    (False, 3): "plan",
    (True, 0): "outcome",
    (True, 1): "decision",
}
_STEPS = 8  # as in `team`: message kinds of one operation


class ThreadCoordinator:
    """A Coordinator for ranks that are threads of one process; made by `run_ranks`."""

    def __init__(
        self,
        rank: int,
        boxes: Sequence[dict[int, deque[tuple[int, bytes]]]],
        *,
        node: str = "node0",
        concurrent: bool = True,
    ) -> None:
        self.rank = rank
        self.size = len(boxes)
        self.node = node
        self.concurrent = concurrent
        self._boxes = boxes

    def post(self, dest: int, tag: int, payload: bytes) -> None:
        """See `Coordinator`."""
        # Not a defaultdict: two threads could each make the deque, and one message be lost.
        self._boxes[dest].setdefault(tag, deque()).append((self.rank, payload))

    def poll(self, tag: int, source: int | None = None) -> tuple[int, bytes] | None:
        """See `Coordinator`."""
        box = self._boxes[self.rank].setdefault(tag, deque())
        for message in list(box):
            if source is None or message[0] == source:
                box.remove(message)
                return message
        return None


class FaultyCoordinator:
    """A Coordinator that counts its messages, and in which chosen ones go wrong.

    Kinds of operations: ``send``, and ``receive`` (it has come, and nobody has seen it yet). Names
    of a save's messages, in their order: ``call`` (to the coordinator: what is called), ``answer``,
    then, unless the plan is known, ``description`` (to the coordinator) and ``plan``; in the
    background ``outcome`` (to the coordinator: this rank's files) and ``decision``. Those of a load
    are ``call``, ``answer`` and ``step-2`` to ``step-7``.

    Args:
        comm: What it stands in front of: a Coordinator, or an mpi4py communicator (then collective:
            it is duplicated).
        faults: What goes wrong.

    Attributes:
        operations: What was sent and received so far, as (kind, name).
    """

    def __init__(self, comm: Coordinator | MpiComm, faults: Sequence[Fault] = ()) -> None:
        communicator = as_mpi(comm)
        if communicator is not None:
            self._inner: Coordinator = duplicate(communicator)
        elif isinstance(comm, Coordinator):
            self._inner = comm
        else:
            raise CheckpointError(f"comm={comm!r}: expected a Coordinator, or a communicator")
        self._faults = Faults(faults, self._inner.rank)
        self.rank = self._inner.rank
        self.size = self._inner.size
        self.node = self._inner.node
        self.concurrent = self._inner.concurrent
        self.operations: list[tuple[str, str]] = []

    def post(self, dest: int, tag: int, payload: bytes) -> None:
        """See `Coordinator`."""
        operation = Operation("send", _message(tag), payload)
        self.operations.append((operation.kind, operation.name))
        self._faults.perform(
            operation, lambda: self._inner.post(dest, tag, bytes(operation.data or b""))
        )

    def poll(self, tag: int, source: int | None = None) -> tuple[int, bytes | bytearray] | None:
        """See `Coordinator`."""
        found = self._inner.poll(tag, source)
        if found is None:
            return None
        operation = Operation("receive", _message(tag), bytes(found[1]))
        self.operations.append((operation.kind, operation.name))

        def do() -> None:
            operation.result = found[0]

        self._faults.perform(operation, do)
        if not isinstance(operation.result, int):
            return None  # lost
        return operation.result, bytes(operation.data or b"")


def _message(tag: int) -> str:
    background, step = tag >= BACKGROUND_TAG, tag % _STEPS
    return _MESSAGES.get((background, step), f"step-{step}")


def run_ranks(
    size: int,
    function: Callable[[ThreadCoordinator], T],
    *,
    nodes: Sequence[str] | None = None,
    concurrent: bool = True,
    timeout_s: float = 60.0,
) -> list[T]:
    """Run a function as so many ranks, each a thread of this process.

    Args:
        size: Number of ranks.
        function: Called once a rank with its coordinator: pass it on as `comm=`.
        nodes: Names of the machines that the ranks pretend to run on.
        concurrent: Whether saves may send messages from the background, as MPI_THREAD_MULTIPLE
            allows.
        timeout_s: How long the ranks may take.

    Returns:
        What each rank returned, by rank.

    Raises:
        BaseException: The first that a rank raised, by rank.
        TimeoutError: Ranks that did not end in time.
    """
    boxes: list[dict[int, deque[tuple[int, bytes]]]] = [{} for _ in range(size)]
    results: dict[int, T] = {}
    errors: dict[int, BaseException] = {}

    def run(rank: int) -> None:
        node = nodes[rank] if nodes is not None else "node0"
        try:
            results[rank] = function(
                ThreadCoordinator(rank, boxes, node=node, concurrent=concurrent)
            )
        except BaseException as exc:  # noqa: BLE001  raised below, in the caller's thread
            errors[rank] = exc

    threads = [
        threading.Thread(target=run, args=(rank,), name=f"rank-{rank}", daemon=True)
        for rank in range(size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
    late = [thread.name for thread in threads if thread.is_alive()]
    if errors:
        raise errors[min(errors)]
    if late:
        raise TimeoutError(f"{', '.join(late)} did not end within {timeout_s:.3g} s")
    return [results[rank] for rank in range(size)]
