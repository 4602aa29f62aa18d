"""For tests, also users' own: stores in memory and faulty ones, and ranks as threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from distckpt.errors import StoreError
from distckpt.store import Buffer, Sink, Store

T = TypeVar("T")


class MemoryStore:
    """A Store in this process's memory; every operation is atomic. Safe for several threads.

    Attributes:
        objects: What it holds: name → content.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """A name for messages."""
        return "memory-store"

    def create(self, name: str, length_bytes: int) -> Sink:
        """See `Store`."""
        del length_bytes
        return _MemorySink(self, name)

    def put(self, name: str, data: bytes, *, replace: bool) -> None:
        """See `Store`."""
        with self._lock:
            if not replace and name in self.objects:
                raise FileExistsError(name)
            self.objects[name] = bytes(data)

    def read_into(self, name: str, start_byte: int, buffer: memoryview) -> None:
        """See `Store`."""
        data = self._get(name)[start_byte : start_byte + len(buffer)]
        if len(data) < len(buffer):
            raise EOFError(f"{name} ends at byte {start_byte + len(data)}")
        buffer[:] = data

    def size(self, name: str) -> int:
        """See `Store`."""
        return len(self._get(name))

    def _get(self, name: str) -> bytes:
        with self._lock:
            if name not in self.objects:
                raise FileNotFoundError(name)
            return self.objects[name]

    def names(self, prefix: str = "") -> list[str]:
        """See `Store`."""
        with self._lock:
            return sorted(
                {
                    name[len(prefix) :].partition("/")[0]
                    for name in self.objects
                    if name.startswith(prefix)
                }
            )

    def delete(self, names: Sequence[str]) -> None:
        """See `Store`."""
        with self._lock:
            for name in names:
                self.objects.pop(name, None)


class _MemorySink:
    def __init__(self, store: MemoryStore, name: str) -> None:
        self._store, self._name, self._data = store, name, bytearray()

    def write_at(self, offset_bytes: int, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        self._data[offset_bytes : offset_bytes + len(view)] = view

    def commit(self) -> None:
        self._store.put(self._name, bytes(self._data), replace=False)

    def abort(self) -> None:
        self._data.clear()


OnOperation = Callable[[str, str, int], None]


class FaultyStore:
    """A Store that counts its operations, and fails from one of them on, as after a crash.

    Kinds of operations: create, write, write-half (half of a write's bytes are there), commit (of a
    new object), put, size, read, names, delete.

    Args:
        store: What it stands in front of.
        fail_at: The operation, from 0, at which it fails; it and every later one raise StoreError.
            Never, if None.
        on_operation: Called as (kind, name, number) before each operation; may raise, wait, or kill
            the process.

    Attributes:
        operations: What was asked for so far, as (kind, name).
    """

    def __init__(
        self, store: Store, *, fail_at: int | None = None, on_operation: OnOperation | None = None
    ) -> None:
        self._store = store
        self._fail_at = fail_at
        self._on_operation = on_operation
        self._lock = threading.Lock()
        self.operations: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        """The inner store's."""
        return self._store.url

    def fail_from_now_on(self) -> None:
        """Fail at the next operation, and at every later one."""
        with self._lock:
            self._fail_at = len(self.operations)

    def operate(self, kind: str, name: str) -> None:
        """Count an operation, and fail if it is time to.

        Raises:
            StoreError: It is.
        """
        with self._lock:
            number = len(self.operations)
            self.operations.append((kind, name))
        if self._on_operation is not None:
            self._on_operation(kind, name, number)
        if self._fail_at is not None and number >= self._fail_at:
            raise StoreError(f"{self.url}/{name}: injected failure of operation {number} ({kind})")

    def create(self, name: str, length_bytes: int) -> Sink:
        """See `Store`."""
        self.operate("create", name)
        return _FaultySink(self, name, self._store.create(name, length_bytes))

    def put(self, name: str, data: bytes, *, replace: bool) -> None:
        """See `Store`."""
        self.operate("put", name)
        self._store.put(name, data, replace=replace)

    def read_into(self, name: str, start_byte: int, buffer: memoryview) -> None:
        """See `Store`."""
        self.operate("read", name)
        self._store.read_into(name, start_byte, buffer)

    def size(self, name: str) -> int:
        """See `Store`."""
        self.operate("size", name)
        return self._store.size(name)

    def names(self, prefix: str = "") -> list[str]:
        """See `Store`."""
        self.operate("names", prefix)
        return self._store.names(prefix)

    def delete(self, names: Sequence[str]) -> None:
        """See `Store`; one operation a name."""
        for name in names:
            self.operate("delete", name)
            self._store.delete([name])


class _FaultySink:
    def __init__(self, store: FaultyStore, name: str, sink: Sink) -> None:
        self._store, self._name, self._sink = store, name, sink

    def write_at(self, offset_bytes: int, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        half = len(view) // 2
        self._store.operate("write", self._name)
        self._sink.write_at(offset_bytes, view[:half])
        self._store.operate("write-half", self._name)
        self._sink.write_at(offset_bytes + half, view[half:])

    def commit(self) -> None:
        self._store.operate("commit", self._name)
        self._sink.commit()

    def abort(self) -> None:
        self._sink.abort()


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
