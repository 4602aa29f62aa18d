"""When a Manager saves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Moment:
    """What a save policy decides from: the same on all ranks.

    Attributes:
        step: The training step that has just been done.
        now_s: The coordinator's monotonic clock, in seconds, as of the step before.
        last_step: The step that was saved last, or resumed from; None before.
        last_save_s: `now_s` when the last save was begun; before the first one, when the Manager's
            first step was made.
        cost_s: Seconds of training that the newest measured save has cost; 0.0 while none is known.
        saves: How many saves the Manager has begun.
        stop: Why the run is asked to stop, or None.
        metrics: This step's, as the coordinator gives them; None where none are given.
        saved: The metrics of the checkpoints saved before; only where a policy `uses_metrics`.
    """

    step: int
    now_s: float = 0.0
    last_step: int | None = None
    last_save_s: float = 0.0
    cost_s: float = 0.0
    saves: int = 0
    stop: str | None = None
    metrics: Mapping[str, float] | None = None
    saved: Sequence[Mapping[str, float]] = ()


class SavePolicy(Protocol):
    """Decides when to save: `EverySteps`, …, or anything with this method."""

    def due(self, moment: Moment) -> bool:
        """Whether to save now. Depends on the moment only, so that all ranks decide alike."""


def uses_metrics(policy: SavePolicy) -> bool:
    """Whether a policy looks at metrics, which may differ by rank: then the coordinator decides.

    A policy says so by an attribute of this name.
    """
    return bool(getattr(policy, "uses_metrics", False))


def metrics_of(policy: object) -> set[str]:
    """Return which metrics a policy, of saving or keeping, looks at: its parts' ``metric``."""
    found = getattr(policy, "metric", None)
    return set().union(
        [found] if isinstance(found, str) else (),
        *(metrics_of(part) for part in getattr(policy, "policies", ())),
    )


class Combinable:
    """Has ``a | b`` (save if either says so) and ``a & b`` (if both do)."""

    __slots__ = ()

    def __or__(self, other: SavePolicy) -> AnyOf:
        return AnyOf((*_parts(self, AnyOf), *_parts(other, AnyOf)))

    def __and__(self, other: SavePolicy) -> AllOf:
        return AllOf((*_parts(self, AllOf), *_parts(other, AllOf)))


def _parts(policy: object, kind: type[AnyOf | AllOf]) -> tuple[SavePolicy, ...]:
    if isinstance(policy, kind):
        return policy.policies
    if not callable(getattr(policy, "due", None)):
        raise TypeError(f"{policy!r} is no save policy: it has no method due(moment)")
    return (policy,)  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class AnyOf(Combinable):
    """Save if one of several policies says so; made by ``|``."""

    policies: tuple[SavePolicy, ...]

    def __repr__(self) -> str:
        return f"({' | '.join(map(repr, self.policies))})"

    @property
    def uses_metrics(self) -> bool:
        """See `uses_metrics`."""
        return any(map(uses_metrics, self.policies))

    def due(self, moment: Moment) -> bool:
        """See `SavePolicy`."""
        return any(policy.due(moment) for policy in self.policies)


@dataclass(frozen=True, slots=True)
class AllOf(Combinable):
    """Save if all of several policies say so; made by ``&``.

    Raises:
        ValueError: They can never agree.
    """

    policies: tuple[SavePolicy, ...]

    def __repr__(self) -> str:
        return f"({' & '.join(map(repr, self.policies))})"

    def __post_init__(self) -> None:
        listed = [policy for policy in self.policies if isinstance(policy, AtSteps)]
        by_step = [p for p in self.policies if isinstance(p, (AtSteps, EverySteps))]
        if listed and not any(
            all(policy.due(Moment(step)) for policy in by_step) for step in listed[0].steps
        ):
            raise ValueError(f"{self!r}: no step fits all of them")

    @property
    def uses_metrics(self) -> bool:
        """See `uses_metrics`."""
        return any(map(uses_metrics, self.policies))

    def due(self, moment: Moment) -> bool:
        """See `SavePolicy`."""
        return all(policy.due(moment) for policy in self.policies)


@dataclass(frozen=True, slots=True)
class EverySteps(Combinable):
    """Save at every multiple of a number of steps.

    Attributes:
        steps: The number.

    Raises:
        ValueError: Less than one step.

    Examples:
        >>> [step for step in range(7) if EverySteps(3).due(Moment(step))]
        [0, 3, 6]
    """

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"EverySteps({self.steps}): expected at least 1")

    def due(self, moment: Moment) -> bool:
        """See `SavePolicy`."""
        return moment.step % self.steps == 0


@dataclass(frozen=True, slots=True)
class EverySeconds(Combinable):
    """Save when so much time has passed since the last save was begun.

    Attributes:
        seconds: How much; a timedelta is fine.

    Raises:
        ValueError: No time, or an infinite one.
    """

    seconds: float

    def __init__(self, seconds: float | timedelta) -> None:
        object.__setattr__(self, "seconds", checked_seconds("EverySeconds", seconds))

    def due(self, moment: Moment) -> bool:
        """See `SavePolicy`."""
        return moment.now_s - moment.last_save_s >= self.seconds


@dataclass(frozen=True, slots=True)
class AtSteps(Combinable):
    """Save at listed steps.

    Attributes:
        steps: Which, ascending.

    Raises:
        ValueError: None are listed, or one is negative.

    Examples:
        >>> AtSteps(30, 10), AtSteps([1, 2])
        (AtSteps(steps=(10, 30)), AtSteps(steps=(1, 2)))
    """

    steps: tuple[int, ...]

    def __init__(self, *steps: int | Iterable[int]) -> None:
        object.__setattr__(self, "steps", checked_steps("AtSteps", steps))

    def due(self, moment: Moment) -> bool:
        """See `SavePolicy`."""
        return moment.step in self.steps


@dataclass(frozen=True, slots=True)
class OnPreemption(Combinable):
    """Save when the run is asked to stop: by a signal, the halt file or the end of its time.

    A Manager with any policy does so anyway; alone, it saves then only.
    """

    def due(self, moment: Moment) -> bool:
        """See `SavePolicy`."""
        return moment.stop is not None


@dataclass(frozen=True, slots=True)
class Best(Combinable):
    """Save when a metric is better than that of every checkpoint saved before.

    At steps for which no metrics are given, it says no. A metric that is missing, or NaN, is never
    better.

    Attributes:
        metric: Its name.
        lowest: Whether lower is better.
        min_delta: By how much, at least.

    Raises:
        ValueError: A negative `min_delta`.

    Examples:
        >>> best = Best("loss")
        >>> before = [{"loss": 0.5}, {}]
        >>> [best.due(Moment(9, metrics={"loss": x}, saved=before)) for x in (0.4, 0.5, math.nan)]
        [True, False, False]
    """

    metric: str
    lowest: bool = True
    min_delta: float = 0.0

    @property
    def uses_metrics(self) -> bool:
        """See `uses_metrics`."""
        return True

    def __post_init__(self) -> None:
        if not self.min_delta >= 0:
            raise ValueError(f"{self!r}: expected a min_delta of at least 0")

    def due(self, moment: Moment) -> bool:
        """See `SavePolicy`."""
        value = number(moment.metrics, self.metric)
        if value is None:
            return False
        before = [number(metrics, self.metric) for metrics in moment.saved]
        sign = 1 if self.lowest else -1
        return all(
            found is None or (sign * value < sign * found - self.min_delta) for found in before
        )


@dataclass(frozen=True, slots=True)
class AtMostOverhead(Combinable):
    """Save as often as costs at most a fraction of the time.

    The cost is measured: the seconds for which a save held up the training loop, waiting for the
    one before included. The first step saves, so that there is a measurement.

    Attributes:
        fraction: Of the time, such as 0.01.

    Raises:
        ValueError: Not between 0 and 1.
    """

    fraction: float

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ValueError(f"{self!r}: expected a fraction between 0 and 1")

    def due(self, moment: Moment) -> bool:
        """See `SavePolicy`."""
        if moment.cost_s <= 0:
            return moment.saves == 0
        return (moment.now_s - moment.last_save_s) * self.fraction >= moment.cost_s


@dataclass(frozen=True, slots=True)
class YoungDaly(Combinable):
    """Save at the interval that loses the least time to saves and to failures together.

    That is √(2 · cost · mean time between failures), after J. W. Young (1974) and J. T. Daly
    (2006); the cost is measured as for `AtMostOverhead`.

    Attributes:
        mtbf_s: Mean seconds between failures of the whole job; a timedelta is fine.

    Raises:
        ValueError: No time, or an infinite one.

    Examples:
        >>> daily = YoungDaly(timedelta(days=1))
        >>> daily.interval_s(cost_s=3.0)
        720.0
    """

    mtbf_s: float

    def __init__(self, mtbf_s: float | timedelta) -> None:
        object.__setattr__(self, "mtbf_s", checked_seconds("YoungDaly", mtbf_s))

    def interval_s(self, cost_s: float) -> float:
        """Seconds from one save to the next, for saves of this cost."""
        return math.sqrt(2 * cost_s * self.mtbf_s)

    def due(self, moment: Moment) -> bool:
        """See `SavePolicy`."""
        if moment.cost_s <= 0:
            return moment.saves == 0
        return moment.now_s - moment.last_save_s >= self.interval_s(moment.cost_s)


def checked_seconds(who: str, seconds: float | timedelta) -> float:
    """Return a duration in seconds.

    Raises:
        ValueError: No time, or an infinite one.
    """
    found = seconds.total_seconds() if isinstance(seconds, timedelta) else float(seconds)
    if not 0 < found < math.inf:
        raise ValueError(f"{who}({seconds}): expected a time above 0")
    return found


def checked_steps(who: str, steps: Iterable[int | Iterable[int]]) -> tuple[int, ...]:
    """Return listed steps, ascending.

    Raises:
        ValueError: There are none, or a negative one.
    """
    found: set[int] = set()
    for step in steps:
        found |= {step} if isinstance(step, int) else set(step)
    if not found or min(found) < 0:
        raise ValueError(f"{who}({sorted(found)}): expected steps from 0 on, at least one")
    return tuple(sorted(found))


def number(metrics: Mapping[str, float] | None, name: str) -> float | None:
    """Return a metric; None if it is missing, NaN or no number."""
    try:
        value = float((metrics or {}).get(name, math.nan))
    except (TypeError, ValueError, OverflowError):
        return None
    return None if math.isnan(value) else value
