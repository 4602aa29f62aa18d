"""When a Manager saves, and which checkpoints it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class SavePolicy(Protocol):
    """Decides when to save."""

    def due(self, step: int) -> bool:
        """Whether to save at this step. Depends on nothing that differs by rank."""


class KeepPolicy(Protocol):
    """Decides what to keep."""

    def kept(self, steps: Sequence[int]) -> set[int]:
        """Return which of the committed steps (ascending) to keep."""


@dataclass(frozen=True, slots=True)
class EverySteps:
    """Save at every multiple of a number of steps.

    Raises:
        ValueError: Less than one step.
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

    Raises:
        ValueError: Fewer than one: the newest checkpoint is never deleted.
    """

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"KeepLast({self.count}): expected at least 1")

    def kept(self, steps: Sequence[int]) -> set[int]:
        """See `KeepPolicy`."""
        return set(steps[-self.count :])
