"""Every order in which a few actors' operations on one store can happen, and every crash of theirs.

An actor is a function of a store. What it does next depends only on what its operations so far have
answered, so it is run anew, with these answers, to see its next operation: once for all orders in
which it is told the same. What remains is a search among states: what the store holds, and how far
each actor is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from distckpt.marks import name_parts
from distckpt.store import Store
from distckpt.testing import MemoryStore

Objects = frozenset[tuple[str, bytes]]


@dataclass(frozen=True)
class Situation:
    """What was reached by some order of operations.

    Attributes:
        objects: What the store holds.
        next: By actor that has not ended, its next operation: kind, name, and more. It may have
            crashed before, and never go on.
        results: By actor, what it has returned.
    """

    objects: Objects
    next: tuple[tuple[object, ...] | None, ...]
    results: tuple[object, ...]


def explore(
    objects: dict[str, bytes],
    actors: Sequence[Callable[[Store], object]],
    check: Callable[[Situation], None],
    *,
    now_s: float,
    interruptions: int | None = None,
) -> int:
    """Follow all orders, and check each situation on the way; return how many states there are.

    Args:
        objects: What the store holds at first.
        actors: What they do. What one raises fails the test.
        check: Raises where a situation must not be.
        now_s: The store's time, which stands still.
        interruptions: Follow only orders in which so often, at most, one goes on before another
            has ended; None: all. Of three actors there are many more than of two.
    """
    told = [[((), _next(actor, number, ()))] for number, actor in enumerate(actors)]
    follow: dict[tuple[int, int, object], int] = {}  # actor, node, answer → node

    @cache
    def perform(objects: Objects, operation: tuple[object, ...]) -> tuple[object, Objects]:
        return _perform(objects, operation, now_s)

    check = cache(check)
    start = frozenset(objects.items()), (0,) * len(actors), None
    came_from: dict[object, tuple[object, str]] = {start: (None, "")}
    fewest = {start: 0}
    todo = deque([(0, start)])
    while todo:
        interrupted, state = todo.popleft()
        if interrupted > fewest[state]:
            continue
        there, nodes, last = state
        steps = [told[number][node][1] for number, node in enumerate(nodes)]
        going = [number for number, step in enumerate(steps) if isinstance(step, tuple)]
        operations = tuple(step if n in going else None for n, step in enumerate(steps))
        results = tuple(None if n in going else step.result for n, step in enumerate(steps))
        try:
            check(Situation(there, operations, results))
            for number in going:
                interrupts = last in going and number != last
                if interrupts and interrupted == interruptions:
                    continue
                answer, then = perform(there, steps[number])
                key = number, nodes[number], answer
                if key not in follow:
                    answers = (*told[number][nodes[number]][0], answer)
                    found = _next(actors[number], number, answers)
                    follow[key] = len(told[number])
                    told[number].append((answers, found))
                by = None if interruptions is None else number
                new = then, (*nodes[:number], follow[key], *nodes[number + 1 :]), by
                cost = interrupted + interrupts if interruptions is not None else 0
                if cost < fewest.get(new, cost + 1):
                    fewest[new] = cost
                    came_from[new] = state, f"actor {number}: {steps[number][:2]}"
                    (todo.append if interrupts else todo.appendleft)((cost, new))
        except BaseException as exc:
            exc.add_note("\n".join(_story(came_from, state)))
            raise
    return len(came_from)


def _story(came_from, state):
    events = []
    while state is not None:
        state, event = came_from[state]
        events.append(event)
    return reversed(events)


@dataclass(frozen=True)
class _Ended:
    result: object


class _Pending(BaseException):
    """The operation that this actor does next has no answer yet."""


def _next(actor, number, answers):
    """Return an actor's next operation, after it got some answers; or its end."""
    store = _Replayed(number, answers)
    try:
        return _Ended(actor(store))
    except _Pending:
        return store.pending


class _Replayed:
    """A store that gives known answers, as far as there are any."""

    url = "replayed"

    def __init__(self, number, answers):
        self._number = number
        self._answers = list(reversed(answers))
        self._told = {}
        self.pending = None

    def _ask(self, kind, name, *more):
        # What is done in passing, when an exception comes by, is no next operation.
        if self.pending is None and not self._answers:
            self.pending = kind, self._name(name), *more
        if self.pending is not None:
            raise _Pending
        self._name(name)
        answer = self._answers.pop()
        if isinstance(answer, type):
            raise answer(name)
        return answer

    def _name(self, name):
        """Return a stand-in for a random name of this actor's: the same whenever it is run."""
        if name_parts(name) is None or "-000000" in name:
            return name
        if name not in self._told:
            head, _, rest = name.rpartition("-")
            token = f"{0:08x}{self._number:04x}{len(self._told):04x}"
            self._told[name] = f"{head}-{token}.{rest.partition('.')[2]}"
        return self._told[name]

    def put(self, name, data, *, replace):
        self._ask("put", name, bytes(data), replace)

    def read_into(self, name, start_byte, buffer):
        buffer[:] = self._ask("read", name, start_byte, len(buffer))

    def size(self, name):
        return self._ask("size", name)

    def modified(self, name):
        return self._ask("modified", name)

    def names(self, prefix=""):
        return list(self._ask("names", prefix))

    def delete(self, names):
        for name in names:
            self._ask("delete", name)


def _perform(objects, operation, now_s):
    """Do an operation; return its answer, and what the store holds then."""
    store = MemoryStore(clock=lambda: now_s)
    store.objects.update(objects)
    kind, name, *more = operation
    try:
        if kind == "put":
            store.put(name, more[0], replace=more[1])
            answer = None
        elif kind == "read":
            answer = bytearray(more[1])
            store.read_into(name, more[0], memoryview(answer))
            answer = bytes(answer)
        elif kind == "names":
            # Who looks for holds and marks minds no others; told apart, they make more states.
            answer = tuple(found for found in store.names(name) if name_parts(found))
        elif kind == "delete":
            answer = store.delete([name])
        else:
            answer = getattr(store, kind)(name)
    except (FileNotFoundError, FileExistsError, EOFError) as exc:
        answer = type(exc)
    return answer, frozenset(store.objects.items())
