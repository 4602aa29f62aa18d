"""When a Manager saves, and which checkpoints it keeps: pure decisions, combined with | and &."""

from __future__ import annotations

from distckpt.policy.keeping import (
    Entry,
    KeepAt,
    KeepBest,
    KeepEvery,
    KeepFor,
    KeepLast,
    KeepPolicy,
    reasons,
)
from distckpt.policy.saving import (
    AtMostOverhead,
    AtSteps,
    Best,
    EverySeconds,
    EverySteps,
    Moment,
    OnPreemption,
    SavePolicy,
    YoungDaly,
    metrics_of,
    number,
    uses_metrics,
)

__all__ = [
    "AtMostOverhead",
    "AtSteps",
    "Best",
    "Entry",
    "EverySeconds",
    "EverySteps",
    "KeepAt",
    "KeepBest",
    "KeepEvery",
    "KeepFor",
    "KeepLast",
    "KeepPolicy",
    "Moment",
    "OnPreemption",
    "SavePolicy",
    "YoungDaly",
    "metrics_of",
    "number",
    "reasons",
    "uses_metrics",
]
