"""Checkpoints for distributed training under MPI: every rank saves, any number of ranks loads."""

from __future__ import annotations

from distckpt.api import (
    SavePlan,
    load,
    load_into,
    open,
    plan,
    save,
    save_async,
)
from distckpt.checkpoint import Checkpoint, StoredTensor
from distckpt.clean import CleanReport, clean
from distckpt.convert import ConvertReport, convert, name_map
from distckpt.coordinator import Coordinator, Solo
from distckpt.errors import (
    CheckpointError,
    CheckpointExists,
    CheckpointNotFound,
    CorruptCheckpoint,
    IncompleteCheckpoint,
    LayoutError,
    LoadFailed,
    MatchError,
    SaveFailed,
    StoreError,
    UnsupportedFormat,
)
from distckpt.events import Event, JsonLines, TensorBoard
from distckpt.flat import register_net
from distckpt.loader import LoadReport
from distckpt.manager import Manager
from distckpt.match import Matching, match
from distckpt.mesh import Mesh
from distckpt.pending import PendingCheckpoint
from distckpt.policy import (
    AtMostOverhead,
    AtSteps,
    Best,
    EverySeconds,
    EverySteps,
    KeepAt,
    KeepBest,
    KeepEvery,
    KeepFor,
    KeepLast,
    OnPreemption,
    YoungDaly,
)
from distckpt.region import Region
from distckpt.state import FlatShard, LazyArray, Net, PerRank, Shard
from distckpt.stats import SaveStats
from distckpt.store import Store
from distckpt.trace import Trace
from distckpt.watch import watch

__version__ = "0.1.0"

__all__ = [
    "AtMostOverhead",
    "AtSteps",
    "Best",
    "Checkpoint",
    "CheckpointError",
    "CheckpointExists",
    "CheckpointNotFound",
    "CleanReport",
    "ConvertReport",
    "Coordinator",
    "CorruptCheckpoint",
    "Event",
    "EverySeconds",
    "EverySteps",
    "FlatShard",
    "IncompleteCheckpoint",
    "JsonLines",
    "KeepAt",
    "KeepBest",
    "KeepEvery",
    "KeepFor",
    "KeepLast",
    "LayoutError",
    "LazyArray",
    "LoadFailed",
    "LoadReport",
    "Manager",
    "MatchError",
    "Matching",
    "Mesh",
    "Net",
    "OnPreemption",
    "PendingCheckpoint",
    "PerRank",
    "Region",
    "SaveFailed",
    "SavePlan",
    "SaveStats",
    "Shard",
    "Solo",
    "Store",
    "StoreError",
    "StoredTensor",
    "TensorBoard",
    "Trace",
    "UnsupportedFormat",
    "YoungDaly",
    "clean",
    "convert",
    "load",
    "load_into",
    "match",
    "name_map",
    "open",
    "plan",
    "register_net",
    "save",
    "save_async",
    "watch",
]
