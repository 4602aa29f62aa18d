"""Stores for tests: one in memory, and one whose answers lag behind."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet

from distckpt.store import Buffer, Sink, Store


class MemoryStore:
    """A Store in this process's memory; every operation is atomic. Safe for several threads.

    Attributes:
        objects: What it holds: name → content.
        clock: Returns the time that `modified` tells, in seconds since 1970.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.objects: dict[str, bytes] = {}
        self.clock = clock
        self._began = clock()
        self._times: dict[str, float] = {}
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
            self._times[name] = self.clock()

    def read_into(self, name: str, start_byte: int, buffer: memoryview) -> None:
        """See `Store`."""
        data = self._get(name)[start_byte : start_byte + len(buffer)]
        if len(data) < len(buffer):
            raise EOFError(f"{name} ends at byte {start_byte + len(data)}")
        buffer[:] = data

    def size(self, name: str) -> int:
        """See `Store`."""
        return len(self._get(name))

    def modified(self, name: str) -> float:
        """See `Store`. What was put into `objects` directly is as old as the store."""
        self._get(name)
        return self._times.get(name, self._began)

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


class LaggingStore:
    """A Store whose answers lag behind, as far as distckpt's design allows a store's to.

    A listing (`names`) is that of some changes ago: it shows what is gone, misses what is new, and
    may repeat a name. A new object is not found by `size` for the first few times, until another
    is put whole, as a manifest is: that one, and what it names, all see. All else is as of now.

    Args:
        store: What it stands in front of; empty.
        chance: Draws how much an answer lags: called with the most that is possible, it returns a
            number from 0 to that.

    Attributes:
        misses_new: Whether a listing misses what is new. Object stores of today don't.
    """

    def __init__(self, store: Store, chance: Callable[[int], int]) -> None:
        self._store = store
        self._chance = chance
        self.misses_new = True
        self._past: deque[set[str]] = deque([set()], maxlen=8)
        self._unseen: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """The inner store's."""
        return self._store.url

    def create(self, name: str, length_bytes: int) -> Sink:
        """See `Store`."""
        return _LaggingSink(self, name, self._store.create(name, length_bytes))

    def put(self, name: str, data: bytes, *, replace: bool) -> None:
        """See `Store`."""
        self._store.put(name, data, replace=replace)
        self._change(added={name})
        with self._lock:
            self._unseen.clear()

    def read_into(self, name: str, start_byte: int, buffer: memoryview) -> None:
        """See `Store`."""
        self._store.read_into(name, start_byte, buffer)

    def size(self, name: str) -> int:
        """See `Store`."""
        with self._lock:
            if self._unseen.get(name):
                self._unseen[name] -= 1
                raise FileNotFoundError(name)
        return self._store.size(name)

    def modified(self, name: str) -> float | None:
        """See `Store`."""
        return self._store.modified(name)

    def names(self, prefix: str = "") -> list[str]:
        """See `Store`; a name may come twice."""
        with self._lock:
            then = self._past[-1 - self._chance(len(self._past) - 1)]
            if not self.misses_new:
                then = then | self._past[-1]
            twice = self._chance(1)
        found = {name[len(prefix) :].partition("/")[0] for name in then if name.startswith(prefix)}
        return sorted([*found, *list(found)[:twice]])

    def delete(self, names: Sequence[str]) -> None:
        """See `Store`."""
        self._store.delete(names)
        self._change(removed=set(names))

    def created(self, name: str) -> None:
        """Note that a new object was committed."""
        self._change(added={name})
        with self._lock:
            self._unseen[name] = self._chance(2)

    def _change(
        self, *, added: AbstractSet[str] = frozenset(), removed: AbstractSet[str] = frozenset()
    ) -> None:
        with self._lock:
            self._past.append((self._past[-1] | added) - removed)


class _LaggingSink:
    def __init__(self, store: LaggingStore, name: str, sink: Sink) -> None:
        self._store, self._name, self._sink = store, name, sink

    def write_at(self, offset_bytes: int, data: Buffer) -> None:
        self._sink.write_at(offset_bytes, data)

    def commit(self) -> None:
        self._sink.commit()
        self._store.created(self._name)

    def abort(self) -> None:
        self._sink.abort()
