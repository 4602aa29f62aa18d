"""The folder of a run: the names of its steps' checkpoints."""

from __future__ import annotations

import re

# What a Manager keeps there for itself.
OWN = ".distckpt"

_STEP = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,})")
_NOTE = re.compile(
    r"epoch-[0-9]{8}|index\.json|pin-[0-9]{8,}\.json|damaged-[0-9]{8,}-[0-9a-f]{16}\.json"
)


def step_name(step: int) -> str:
    """Name of a step's checkpoint below the root.

    Examples:
        >>> step_name(1000)
        'step-00001000'
    """
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """Return which step's checkpoint lies under a name; None if the name is none of a run's.

    Examples:
        >>> step_of("step-00001000"), step_of("step-1000"), step_of("best")
        (1000, None, None)
    """
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def is_note(name: str) -> bool:
    """Whether an object in a Manager's own folder is one of its notes.

    Examples:
        >>> is_note("epoch-00000007"), is_note("pin-00001000.json"), is_note("notes.txt")
        (True, True, False)
    """
    return _NOTE.fullmatch(name) is not None
