"""A store in which things go wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import cast

from distckpt.errors import StoreError
from distckpt.store import Buffer, Sink, Store
from distckpt.testing.faults import Fault, Faults, Operation

OnOperation = Callable[[str, str, int], None]


class FaultyStore:
    """A Store that counts its operations, and in which chosen ones go wrong.

    Kinds of operations: ``create``, ``write``, ``write-half`` (half of a write's bytes are there),
    ``commit`` (of a new object), ``put``, ``size``, ``modified``, ``read``, ``names``, ``delete``
    (one a name).

    Args:
        store: What it stands in front of.
        fail_at: The operation, from 0, at which it fails; it and every later one raise StoreError,
            as after a crash. Never, if None.
        on_operation: Called as (kind, name, number) before each operation; may raise, wait, or kill
            the process.
        faults: What goes wrong.
        rank: Whose store this is, for faults of some ranks only.

    Attributes:
        operations: What was asked for so far, as (kind, name).
    """

    def __init__(
        self,
        store: Store,
        *,
        fail_at: int | None = None,
        on_operation: OnOperation | None = None,
        faults: Sequence[Fault] = (),
        rank: int = 0,
    ) -> None:
        self._store = store
        self._fail_at = fail_at
        self._on_operation = on_operation
        self._faults = Faults(faults, rank)
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

    def perform(self, operation: Operation, do: Callable[[], None]) -> None:
        """Count an operation and do it, unless something goes wrong.

        Raises:
            StoreError: It is time to fail.
        """
        with self._lock:
            number = len(self.operations)
            self.operations.append((operation.kind, operation.name))
        if self._on_operation is not None:
            self._on_operation(operation.kind, operation.name, number)
        if self._fail_at is not None and number >= self._fail_at:
            raise StoreError(
                f"{self.url}/{operation.name}: injected failure of operation {number} "
                f"({operation.kind})",
                refused=True,
            )
        self._faults.perform(operation, do)

    def create(self, name: str, length_bytes: int) -> Sink:
        """See `Store`."""
        operation = Operation("create", name)

        def do() -> None:
            operation.result = self._store.create(name, length_bytes)

        self.perform(operation, do)
        return _FaultySink(self, name, cast("Sink | None", operation.result))

    def put(self, name: str, data: bytes, *, replace: bool) -> None:
        """See `Store`."""
        operation = Operation("put", name, data)
        self.perform(
            operation,
            lambda: self._store.put(name, bytes(operation.data or b""), replace=replace),
        )

    def read_into(self, name: str, start_byte: int, buffer: memoryview) -> None:
        """See `Store`."""
        operation = Operation("read", name, buffer, reads=True)
        self.perform(
            operation,
            lambda: self._store.read_into(
                name, start_byte, memoryview(b"" if operation.data is None else operation.data)
            ),
        )

    def size(self, name: str) -> int:
        """See `Store`."""
        operation = Operation("size", name, result=0)

        def do() -> None:
            operation.result = self._store.size(name)

        self.perform(operation, do)
        return cast("int", operation.result)

    def modified(self, name: str) -> float | None:
        """See `Store`."""
        operation = Operation("modified", name)

        def do() -> None:
            operation.result = self._store.modified(name)

        self.perform(operation, do)
        return cast("float | None", operation.result)

    def names(self, prefix: str = "") -> list[str]:
        """See `Store`."""
        operation = Operation("names", prefix, result=[])

        def do() -> None:
            operation.result = self._store.names(prefix)

        self.perform(operation, do)
        return cast("list[str]", operation.result)

    def delete(self, names: Sequence[str]) -> None:
        """See `Store`; one operation a name."""
        for name in names:
            self.perform(Operation("delete", name), lambda name=name: self._store.delete([name]))  # type: ignore[misc]


class _FaultySink:
    """The sink of a new object; one whose creation was lost takes everything and keeps nothing."""

    def __init__(self, store: FaultyStore, name: str, sink: Sink | None) -> None:
        self._store, self._name, self._sink = store, name, sink

    def write_at(self, offset_bytes: int, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        half = len(view) // 2
        self._write("write", offset_bytes, view[:half])
        self._write("write-half", offset_bytes + half, view[half:])

    def _write(self, kind: str, offset_bytes: int, data: memoryview) -> None:
        operation = Operation(kind, self._name, data)

        def do() -> None:
            if self._sink is not None and operation.data is not None:
                self._sink.write_at(offset_bytes, operation.data)

        self._store.perform(operation, do)

    def commit(self) -> None:
        def do() -> None:
            if self._sink is not None:
                self._sink.commit()

        self._store.perform(Operation("commit", self._name), do)

    def abort(self) -> None:
        if self._sink is not None:
            self._sink.abort()
