"""The checkpoints of one run, looked after."""

from __future__ import annotations

from distckpt.manager.manager import Manager
from distckpt.manager.pruning import Explanation

__all__ = ["Explanation", "Manager"]
