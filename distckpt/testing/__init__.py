"""For tests, also users' own: stores that fail or lie, ranks that can be killed, power loss.

See docs/testing.md. Nothing here is needed, or imported, by the rest of the library.
"""

from __future__ import annotations

from distckpt.testing import points
from distckpt.testing.faults import (
    Action,
    Call,
    Delay,
    Fail,
    Fault,
    Flip,
    Hold,
    Kill,
    Lose,
    Operation,
    Point,
    Stall,
    Truncate,
)
from distckpt.testing.faulty_store import FaultyStore
from distckpt.testing.files import FaultyFiles, FileCall, WatchedFiles
from distckpt.testing.power import PowerLossDisk
from distckpt.testing.processes import Ended, ProcessCoordinator, run_processes
from distckpt.testing.ranks import FaultyCoordinator, ThreadCoordinator, run_ranks
from distckpt.testing.stores import LaggingStore, MemoryStore

__all__ = [
    "Action",
    "Call",
    "Delay",
    "Ended",
    "Fail",
    "Fault",
    "FaultyCoordinator",
    "FaultyFiles",
    "FaultyStore",
    "FileCall",
    "Flip",
    "Hold",
    "Kill",
    "LaggingStore",
    "Lose",
    "MemoryStore",
    "Operation",
    "Point",
    "PowerLossDisk",
    "ProcessCoordinator",
    "Stall",
    "ThreadCoordinator",
    "Truncate",
    "WatchedFiles",
    "points",
    "run_processes",
    "run_ranks",
]
