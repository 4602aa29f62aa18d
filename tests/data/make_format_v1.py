"""Makes the test vectors of format version 1 (docs/format.md) again, byte for byte the same.

    PYTHONPATH=. python tests/data/make_format_v1.py            # writes tests/data/format-v1
    PYTHONPATH=. python tests/data/make_format_v1.py hexdump    # prints what docs/format.md shows

They must never change: data of a released format stay readable. Only a new version of the format
gets new ones, beside these.

The bytes of every tensor follow from its name, in any language: they are the first bytes of
SHAKE-128 of the name in UTF-8, each masked with what its dtype leaves free (``MASKS``).
"""

from __future__ import annotations

import hashlib
import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np

import distckpt
from distckpt import dtypes
from distckpt.testing import run_ranks
from distckpt.writer import Layouts

FOLDER = Path(__file__).parent / "format-v1"
RANKS = 3
STEP = 12
SAVE_ID = 0x3F9C2A71D04BE816
CREATED_NS = 1_767_225_600_000_000_000  # 2026-01-01T00:00Z
BLOCK_BYTES = 4096  # the smallest, so that tensors lie in several blocks
# What an element's bytes may hold where its type has fewer than 8 bits.
MASKS = {"bool": 0x01, "float6_e2m3fn": 0x3F, "float6_e3m2fn": 0x3F, "float4_e2m1fn": 0x0F}
MASKS |= {"int4": 0x0F, "uint4": 0x0F, "int2": 0x03, "uint2": 0x03}

METADATA = {
    "run": "test vectors",
    "nested": {"list": [1, [2.5, None]], 7: "a key that is a number", (1, "a"): b"\x00\xff"},
}
METRICS = {"loss": 0.125, "accuracy": 1.0}
VALUES = {
    "value.none": None,
    "value.false": False,
    "value.true": True,
    "value.zero": 0,
    "value.negative": -1,
    "value.largest": 2**63 - 1,
    "value.smallest": -(2**63),
    "value.larger": 2**63,
    "value.smaller": -(2**63) - 1,
    "value.huge": 3**100,
    "value.real": 0.1,
    "value.negative zero": -0.0,
    "value.infinite": -math.inf,
    "value.text": "naïve ✓ \U0001f600",
    "value.no text": "",
    "value.bytes": bytes(range(256)),
    "value.no bytes": b"",
}


def tensor(name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Make the whole tensor of a name: see the module's docstring."""
    entry = dtypes.BY_NAME[dtype]
    size = math.prod(shape) * entry.itemsize
    data = np.frombuffer(hashlib.shake_128(name.encode()).digest(size), np.uint8)
    return (data & np.uint8(MASKS.get(dtype, 0xFF))).view(entry.numpy).reshape(shape)


# A dtype and a shape for each name.
TENSORS: dict[str, tuple[str, tuple[int, ...]]] = {
    # Held by all ranks, which share them out.
    **{f"dtype.{entry.name}": (entry.name, (5, 3)) for entry in dtypes.TABLE},
    "scalar.float32": ("float32", ()),
    "scalar.bfloat16": ("bfloat16", ()),
    "eight dimensions": ("int16", (1, 2, 1, 3, 1, 2, 1, 2)),
    "odd/näme @0:1,✓": ("uint8", (3,)),
    "shared.weight": ("float32", (40, 25)),
    # Held by one.
    "empty.first": ("float32", (0, 3)),
    "empty.middle": ("int4", (2, 0, 2)),
    "alone": ("complex128", (2, 2)),
    # Cut.
    "grid.balanced": ("float64", (10, 200)),
    "grid.ceiling": ("float16", (10, 3)),
    "grid.columns": ("int32", (4, 8)),
    "grid.planes": ("uint16", (2, 3, 5)),
    "boxes": ("int64", (6, 5)),
    "flat": ("float32", (4, 5, 3)),
    "flat.vector": ("float8_e5m2", (10,)),
}
FLAT_CUTS = {"flat": (0, 7, 31, 60), "flat.vector": (0, 1, 1, 10)}
BOXES = (
    distckpt.Region((0, 0), (2, 5)),
    distckpt.Region((2, 0), (6, 2)),
    distckpt.Region((2, 2), (6, 5)),
)
SPECS: dict[str, tuple[tuple[str | None, ...], str]] = {
    "grid.balanced": (("tp",), "balanced"),
    "grid.ceiling": (("tp",), "chunk"),
    "grid.columns": ((None, "tp"), "balanced"),
    "grid.planes": ((None, "tp", None), "balanced"),
}


def per_rank(rank: int) -> dict[str, object]:
    """Make a rank's per-rank values."""
    found: dict[str, object] = {
        "rng": {
            "name": "PCG64",
            "state": [2**127 + rank, (rank, -rank)],
            "keys": tensor(f"rng.keys.{rank}", "uint32", (rank, 5)),
            "scale": tensor(f"rng.scale.{rank}", "bfloat16", ()),
        },
        "cursor": rank * 1000,
    }
    if rank == 1:
        found["only rank 1"] = [tensor("only rank 1", "int4", (3,)), "text"]
    return found


def state(rank: int) -> dict[str, object]:
    """Make a rank's state."""
    mesh = distckpt.Mesh(tp=RANKS, rank=rank)
    made: dict[str, object] = {}
    for name, (dtype, shape) in TENSORS.items():
        whole = tensor(name, dtype, shape)
        if name in SPECS:
            spec, uneven = SPECS[name]
            region = mesh.region(spec, shape, uneven=uneven)
            made[name] = mesh.shard(whole[region.slices], spec, shape, uneven=uneven)
        elif name in FLAT_CUTS:
            start, stop = FLAT_CUTS[name][rank : rank + 2]
            made[name] = distckpt.FlatShard(whole.reshape(-1)[start:stop], start, shape)
        elif name == "boxes":
            box = BOXES[rank]
            made[name] = distckpt.Shard(whole[box.slices], box.start, shape)
        elif name != "alone" or rank == 2:
            made[name] = whole
    return {
        **made,
        **VALUES,
        **{name: distckpt.PerRank(value) for name, value in per_rank(rank).items()},
    }


@contextmanager
def fixed(*, block_bytes: int | None = None) -> Iterator[None]:
    """Fix what differs from save to save: the save id and the time; and perhaps the block size."""
    with patch("secrets.randbits", lambda bits: SAVE_ID), patch("time.time_ns", lambda: CREATED_NS):
        if block_bytes is None:
            yield
            return
        layouts = partial(Layouts, block_bytes=block_bytes)
        with (
            patch("distckpt.prepare.Layouts", layouts),
            patch("distckpt.commit.BLOCK_BYTES", block_bytes),
        ):
            yield


def save_everything(root: Path) -> None:
    """Save what has something of everything, by 3 ranks, below *root*."""
    with fixed(block_bytes=BLOCK_BYTES):
        run_ranks(
            RANKS,
            lambda comm: (
                distckpt.Manager(root, comm=comm)
                .save(STEP, state(comm.rank), metrics=METRICS, metadata=METADATA)
                .wait()
            ),
        )


def save_smallest(folder: Path) -> None:
    """Save one tensor of three elements, by one rank."""
    with fixed():
        distckpt.save(folder, {"w": np.array([1, 2, 3], np.float32)}, comm=distckpt.Solo())


def hexdump(data: bytes) -> str:
    """Write bytes as ``hexdump -C`` does."""
    lines, previous = [], b""
    for start in range(0, len(data), 16):
        row = data[start : start + 16]
        if row == previous:
            if lines[-1] != "*":
                lines.append("*")
            continue
        previous = row
        left, right = (" ".join(f"{byte:02x}" for byte in part) for part in (row[:8], row[8:]))
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        lines.append(f"{start:08x}  {left:<23}  {right:<23}  |{text}|")
    return "\n".join([*lines, f"{len(data):08x}"])


def main() -> None:
    """Do what the command line says."""
    if sys.argv[1:] == ["hexdump"]:
        for path in sorted((FOLDER / "smallest").iterdir()):
            sys.stdout.write(f"$ hexdump -C {path.name}\n{hexdump(path.read_bytes())}\n\n")
        return
    if FOLDER.exists():
        shutil.rmtree(FOLDER)
    save_everything(FOLDER)
    save_smallest(FOLDER / "smallest")


if __name__ == "__main__":
    main()
