"""The points of a save at which a rank can be stopped, in their order; see `Fault`.

``"manifest.binpb*"`` also fits the temporary name under which a local folder's manifest is written.
Points whose kinds begin with ``os.`` are for `FaultyFiles`, ``send`` and ``receive`` for
`FaultyCoordinator`, the others for `FaultyStore`.
"""

from __future__ import annotations

from distckpt.manifest import MANIFEST_NAME
from distckpt.testing.faults import Point

_MANIFEST = MANIFEST_NAME
_SHARD = "*shard-*"
_MESSAGE = ("send", "receive")

# The coordinator passes these when it receives a message of that name, or sends one, the others
# when they send it, or receive it.
BEFORE_CALL = Point(_MESSAGE, "call", text="before the call is agreed on")
BEFORE_STAGING = Point(_MESSAGE, "plan", after=True, text="planned, before staging")
BEFORE_GATHER = Point(_MESSAGE, "outcome", text="before the gather")
BEFORE_DECISION = Point(_MESSAGE, "decision", text="before the decision is told")
AFTER_DECISION = Point(_MESSAGE, "decision", after=True, text="after the decision was told")

# A store's.
BEFORE_CREATE = Point("create", _SHARD, text="before a file is begun")
BEFORE_WRITE = Point("write", _SHARD, text="before a file is written")
IN_WRITE = Point("write-half", _SHARD, text="in the middle of a write")
BEFORE_COMMIT_OF_FILE = Point("commit", _SHARD, text="before a file is made durable and named")
AFTER_COMMIT_OF_FILE = Point("commit", _SHARD, after=True, text="after a file was named")
BEFORE_LOOK_UP = Point("size", _SHARD, text="before the files are looked up")
BEFORE_MANIFEST = Point("put", f"*{_MANIFEST}", text="before the manifest is put")
AFTER_MANIFEST = Point("put", f"*{_MANIFEST}", after=True, text="after the manifest was put")
IN_CLEAN_UP = Point("delete", _SHARD, text="while files are deleted")
AFTER_CLEAN_UP = Point("delete", _SHARD, after=True, text="after a file was deleted")
IN_PRUNING = Point("delete", f"*{_MANIFEST}", text="before an old checkpoint is deleted")
AFTER_PRUNING_BEGAN = Point("delete", f"*{_MANIFEST}", after=True, text="its manifest deleted")

# A local folder's: what a store's `commit` and `put` do.
BEFORE_FSYNC = Point("os.fsync", _SHARD, text="before a file's fsync")
AFTER_FSYNC = Point("os.fsync", _SHARD, after=True, text="after a file's fsync, before its rename")
AFTER_RENAME = Point("os.rename", _SHARD, after=True, text="after a file's rename")
BEFORE_MANIFEST_FSYNC = Point("os.fsync", f"*{_MANIFEST}*", text="before the manifest's fsync")
BEFORE_MANIFEST_RENAME = Point(
    ("os.rename", "os.link"), f"*{_MANIFEST}", text="before the manifest's rename"
)
AFTER_MANIFEST_RENAME = Point(
    ("os.rename", "os.link"), f"*{_MANIFEST}", after=True, text="after the manifest's rename"
)

ALL = tuple(value for value in list(globals().values()) if isinstance(value, Point))
