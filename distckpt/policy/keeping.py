"""Which checkpoints a Manager keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

from distckpt.policy.saving import checked_seconds, checked_steps, number


@dataclass(frozen=True, slots=True)
class Entry:
    """A committed checkpoint of a run, as a keep policy sees it.

    Attributes:
        step: Its step.
        created_s: When it was committed, in seconds since 1970, by the coordinator's clock.
        metrics: Its metrics.
    """

    step: int
    created_s: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)


class KeepPolicy(Protocol):
    """Decides what to keep: `KeepLast`, …, or anything with this method."""

    def kept(self, entries: Sequence[Entry]) -> set[int]:
        """Return which steps to keep, of the committed ones (ascending).

        A Manager keeps the newest in any case.
        """


class Combinable:
    """Has ``a | b`` (keep what either keeps) and ``a & b`` (what both keep)."""

    __slots__ = ()

    def __or__(self, other: KeepPolicy) -> AnyOf:
        return AnyOf((*_parts(self, AnyOf), *_parts(other, AnyOf)))

    def __and__(self, other: KeepPolicy) -> AllOf:
        return AllOf((*_parts(self, AllOf), *_parts(other, AllOf)))


def _parts(policy: object, kind: type[AnyOf | AllOf]) -> tuple[KeepPolicy, ...]:
    if isinstance(policy, kind):
        return policy.policies
    if not callable(getattr(policy, "kept", None)):
        raise TypeError(f"{policy!r} is no keep policy: it has no method kept(entries)")
    return (policy,)  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class AnyOf(Combinable):
    """Keep what one of several policies keeps; made by ``|``."""

    policies: tuple[KeepPolicy, ...]

    def __repr__(self) -> str:
        return f"({' | '.join(map(repr, self.policies))})"

    def kept(self, entries: Sequence[Entry]) -> set[int]:
        """See `KeepPolicy`."""
        return set().union(*(policy.kept(entries) for policy in self.policies))


@dataclass(frozen=True, slots=True)
class AllOf(Combinable):
    """Keep what all of several policies keep; made by ``&``.

    Raises:
        ValueError: They can never agree.
    """

    policies: tuple[KeepPolicy, ...]

    def __repr__(self) -> str:
        return f"({' & '.join(map(repr, self.policies))})"

    def __post_init__(self) -> None:
        listed = [policy for policy in self.policies if isinstance(policy, KeepAt)]
        by_step = [
            policy
            for policy in self.policies
            if isinstance(policy, KeepAt) or (isinstance(policy, KeepEvery) and policy.steps)
        ]
        if listed and not any(
            all(policy.kept([Entry(step)]) for policy in by_step) for step in listed[0].steps
        ):
            raise ValueError(f"{self!r}: no step fits all of them")

    def kept(self, entries: Sequence[Entry]) -> set[int]:
        """See `KeepPolicy`."""
        first, *others = self.policies
        return first.kept(entries).intersection(*(policy.kept(entries) for policy in others))


@dataclass(frozen=True, slots=True)
class KeepLast(Combinable):
    """Keep the newest checkpoints.

    Attributes:
        count: How many.

    Raises:
        ValueError: Fewer than one: the newest checkpoint is never deleted.

    Examples:
        >>> sorted(KeepLast(2).kept([Entry(100), Entry(200), Entry(300)]))
        [200, 300]
    """

    count: int

    def __post_init__(self) -> None:
        _check_count(self, self.count)

    def kept(self, entries: Sequence[Entry]) -> set[int]:
        """See `KeepPolicy`."""
        return {entry.step for entry in entries[-self.count :]}


@dataclass(frozen=True, slots=True)
class KeepEvery(Combinable):
    """Keep one checkpoint of every so many steps, or every so much time.

    Attributes:
        steps: Keep the multiples of this number; None if time counts.
        seconds: Keep the first, and each that is so much younger than the one kept before; None if
            steps count. A timedelta is fine.

    Raises:
        ValueError: Both or none are given, or less than 1 step, or no time.

    Examples:
        >>> sorted(KeepEvery(1000).kept([Entry(900), Entry(1000), Entry(1100)]))
        [1000]
        >>> hourly = KeepEvery(seconds=timedelta(hours=1))
        >>> sorted(hourly.kept([Entry(1, 0.0), Entry(2, 1800.0), Entry(3, 3600.0)]))
        [1, 3]
    """

    steps: int | None
    seconds: float | None

    def __init__(
        self, steps: int | None = None, *, seconds: float | timedelta | None = None
    ) -> None:
        if (steps is None) == (seconds is None):
            raise ValueError("KeepEvery: expected either steps or seconds=")
        if steps is not None:
            _check_count("KeepEvery", steps)
        object.__setattr__(self, "steps", steps)
        found = None if seconds is None else checked_seconds("KeepEvery", seconds)
        object.__setattr__(self, "seconds", found)

    def kept(self, entries: Sequence[Entry]) -> set[int]:
        """See `KeepPolicy`."""
        if self.steps is not None:
            return {entry.step for entry in entries if entry.step % self.steps == 0}
        kept: set[int] = set()
        last_s: float | None = None
        for entry in entries:
            # A clock that was set back would otherwise keep nothing for as long.
            if (
                last_s is None
                or entry.created_s < last_s
                or entry.created_s - last_s >= (self.seconds or 0)
            ):
                kept.add(entry.step)
                last_s = entry.created_s
        return kept


@dataclass(frozen=True, slots=True)
class KeepBest(Combinable):
    """Keep the checkpoints with the best metric; of equals the newest.

    What has no such metric, or NaN, is not among them.

    Attributes:
        metric: Its name.
        count: How many.
        lowest: Whether lower is better.

    Raises:
        ValueError: Fewer than one.

    Examples:
        >>> entries = [Entry(1, metrics={"loss": 0.5}), Entry(2, metrics={"loss": 0.9}), Entry(3)]
        >>> KeepBest("loss").kept(entries), KeepBest("loss", lowest=False).kept(entries)
        ({1}, {2})
    """

    metric: str
    count: int = 1
    lowest: bool = True

    def __post_init__(self) -> None:
        _check_count(self, self.count)

    def kept(self, entries: Sequence[Entry]) -> set[int]:
        """See `KeepPolicy`."""
        return set(ranking(entries, self.metric, lowest=self.lowest)[: self.count])


@dataclass(frozen=True, slots=True)
class KeepAt(Combinable):
    """Keep listed steps.

    Attributes:
        steps: Which, ascending.

    Raises:
        ValueError: None are listed, or one is negative.
    """

    steps: tuple[int, ...]

    def __init__(self, *steps: int | Iterable[int]) -> None:
        object.__setattr__(self, "steps", checked_steps("KeepAt", steps))

    def kept(self, entries: Sequence[Entry]) -> set[int]:
        """See `KeepPolicy`."""
        return {entry.step for entry in entries} & set(self.steps)


@dataclass(frozen=True, slots=True)
class KeepFor(Combinable):
    """Keep what is not older than a duration, counted back from the newest checkpoint.

    So a run that pauses, or a clock that is set, deletes nothing.

    Attributes:
        seconds: The duration; a timedelta is fine.

    Raises:
        ValueError: No time, or an infinite one.
    """

    seconds: float

    def __init__(self, seconds: float | timedelta) -> None:
        object.__setattr__(self, "seconds", checked_seconds("KeepFor", seconds))

    def kept(self, entries: Sequence[Entry]) -> set[int]:
        """See `KeepPolicy`."""
        if not entries:
            return set()
        since_s = entries[-1].created_s - self.seconds
        return {entry.step for entry in entries if entry.created_s >= since_s}


def ranking(entries: Sequence[Entry], metric: str, *, lowest: bool) -> list[int]:
    """List the steps that have a metric, the best first; of equals the newest first."""
    found = [(number(entry.metrics, metric), entry.step) for entry in entries]
    sign = 1 if lowest else -1
    values = [(sign * value, -step) for value, step in found if value is not None]
    return [-step for _, step in sorted(values)]


def reasons(policy: KeepPolicy, entries: Sequence[Entry]) -> dict[int, str]:
    """Say for each step that a policy keeps which of its parts do.

    Examples:
        >>> reasons(KeepLast(1) | KeepAt(1), [Entry(1), Entry(2)])
        {1: 'KeepAt(steps=(1,))', 2: 'KeepLast(count=1)'}
    """
    if isinstance(policy, AnyOf | AllOf):
        word = " and " if isinstance(policy, AllOf) else ", "
        parts = [reasons(part, entries) for part in policy.policies]
        return {
            step: word.join(part[step] for part in parts if step in part)
            for step in sorted(policy.kept(entries))
        }
    return {step: repr(policy) for step in sorted(policy.kept(entries))}


def _check_count(who: object, count: int) -> None:
    if count < 1:
        name = who if isinstance(who, str) else repr(who)
        raise ValueError(f"{name}: {count}: expected at least 1")
