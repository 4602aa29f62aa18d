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
from distckpt.loader import LoadReport
from distckpt.manager import Manager
from distckpt.match import Matching, match
from distckpt.mesh import Mesh
from distckpt.pending import PendingCheckpoint
from distckpt.policy import EverySteps, KeepLast
from distckpt.region import Region
from distckpt.state import FlatShard, LazyArray, Net, PerRank, Shard, register_net
from distckpt.store import Store

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointExists",
    "CheckpointNotFound",
    "ConvertReport",
    "Coordinator",
    "CorruptCheckpoint",
    "EverySteps",
    "FlatShard",
    "IncompleteCheckpoint",
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
    "PendingCheckpoint",
    "PerRank",
    "Region",
    "SaveFailed",
    "SavePlan",
    "Shard",
    "Solo",
    "Store",
    "StoreError",
    "StoredTensor",
    "UnsupportedFormat",
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
]
