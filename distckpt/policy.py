"""When a Manager saves, and which checkpoints it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class SavePolicy(Protocol):
    """Decides when to save: `EverySteps`, or anything with this method."""

    def due(self, step: int) -> bool:
        """Whether to save at this step. Depends on nothing that differs by rank."""


class KeepPolicy(Protocol):
    """Decides what to keep: `KeepLast`, or anything with this method."""

    def kept(self, steps: Sequence[int]) -> set[int]:
        """Return which of the committed steps (ascending) to keep."""


@dataclass(frozen=True, slots=True)
class EverySteps:
    """Save at every multiple of a number of steps.

    Attributes:
        steps: The number.

    Raises:
        ValueError: Less than one step.

    Examples:
        >>> [step for step in range(7) if EverySteps(3).due(step)]
        [0, 3, 6]
    """

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"EverySteps({self.steps}): expected at least 1")

    def due(self, step: int) -> bool:
        """See `SavePolicy`."""
        return step % self.steps == 0


@dataclass(frozen=True, slots=True)
class KeepLast:
    """Keep the newest checkpoints.

    Attributes:
        count: How many.

    Raises:
        ValueError: Fewer than one: the newest checkpoint is never deleted.

    Examples:
        >>> sorted(KeepLast(2).kept([100, 200, 300]))
        [200, 300]
    """

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"KeepLast({self.count}): expected at least 1")

    def kept(self, steps: Sequence[int]) -> set[int]:
        """See `KeepPolicy`."""
        return set(steps[-self.count :])
