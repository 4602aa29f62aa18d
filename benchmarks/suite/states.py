"""What is saved: many small tensors, few large ones, and a transformer with its optimizer.

A state is a dict of name → array or `distckpt.Shard`: a bare array is the same on every rank that
has it. Contents are random, so that nothing can be compressed away, and equal from run to run.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np

import distckpt

Leaf = np.ndarray | distckpt.Shard
State = dict[str, Leaf]

_HIDDEN, _VOCABULARY = 512, 32_768
_BYTES_A_PARAMETER = 2 + 3 * 4  # a bfloat16 weight; in float32 a master copy and two moments
_ONE = 0x3F80  # bfloat16's 1.0: lower bit patterns are its positive numbers below that


def transformer(rank: int, ranks: int, megabytes: int) -> State:
    """Make a transformer's state as mixed-precision training with Adam holds it.

    Matrices are cut over the ranks as in tensor parallelism, some by rows and some by columns, and
    so are their master copies and moments. The embedding and the norms are the same on all ranks;
    their optimizer state is cut by rows, as ZeRO does.
    """
    layer_parameters = 12 * _HIDDEN**2
    parameters = megabytes * 10**6 // _BYTES_A_PARAMETER
    vocabulary = min(_VOCABULARY, parameters // (2 * _HIDDEN) // 64 * 64)
    layers = max(1, round((parameters - vocabulary * _HIDDEN) / layer_parameters))
    weights: dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]] = {
        "embedding.weight": ((vocabulary, _HIDDEN), (None, None)),
        "norm.weight": ((_HIDDEN,), (None,)),
    }
    for layer in range(layers):
        weights |= {
            f"layers.{layer}.attention.qkv.weight": ((3 * _HIDDEN, _HIDDEN), ("tp", None)),
            f"layers.{layer}.attention.out.weight": ((_HIDDEN, _HIDDEN), (None, "tp")),
            f"layers.{layer}.mlp.up.weight": ((4 * _HIDDEN, _HIDDEN), ("tp", None)),
            f"layers.{layer}.mlp.down.weight": ((_HIDDEN, 4 * _HIDDEN), (None, "tp")),
            f"layers.{layer}.norm1.weight": ((_HIDDEN,), (None,)),
            f"layers.{layer}.norm2.weight": ((_HIDDEN,), (None,)),
        }
    mesh = distckpt.Mesh(tp=ranks, rank=rank)
    state: State = {}
    for name, (shape, axes) in weights.items():
        state[f"model.{name}"] = _leaf(mesh, f"model.{name}", shape, axes, ml_dtypes.bfloat16)
    for name, (shape, axes) in weights.items():
        cut = axes if "tp" in axes else ("tp", *axes[1:])
        for what in ("master", "exp_avg", "exp_avg_sq"):
            key = f"optimizer.{name}.{what}"
            state[key] = _leaf(mesh, key, shape, cut, np.float32)
    return state


def many_small(rank: int, ranks: int, count: int = 10_000) -> State:
    """Make tensors of 4 KB, each on one rank, as layers are in a pipeline."""
    return {
        f"small.{index}": _random(f"small.{index}", (1024,), np.float32)
        for index in range(rank, count, ranks)
    }


def few_large(rank: int, ranks: int, count: int = 8, nbytes: int = 128 << 20) -> State:
    """Make large tensors, cut by rows."""
    mesh = distckpt.Mesh(fsdp=ranks, rank=rank)
    rows = nbytes // 4096
    return {
        f"large.{index}": _leaf(mesh, f"large.{index}", (rows, 1024), ("fsdp", None), np.float32)
        for index in range(count)
    }


def _leaf(
    mesh: distckpt.Mesh,
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    dtype: type,
) -> Leaf:
    if not any(axes):
        return _random(name, shape, dtype)
    region = mesh.region(axes, shape)
    return distckpt.Shard(_random(f"{name}{region}", region.shape, dtype), region.start, shape)


def _random(seed: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(seed.encode()))
    if dtype is np.float32:
        return rng.random(shape, np.float32)
    return rng.integers(0, _ONE, shape, np.uint16).view(dtype)


# ------------------------------------------------------------------------------- as destinations


def array_of(leaf: Leaf) -> np.ndarray:
    """Return a leaf's own array."""
    return leaf.array if isinstance(leaf, distckpt.Shard) else leaf


def flat_bytes(array: np.ndarray) -> np.ndarray:
    """View a contiguous array as (bytes,) uint8."""
    return array.reshape(-1).view(np.uint8)


def nbytes_of(state: State) -> int:
    """Count the bytes of this rank's arrays."""
    return sum(array_of(leaf).nbytes for leaf in state.values())


def mapped(state: State, function: Callable[[np.ndarray], np.ndarray]) -> State:
    """Make a state of the same layout with other arrays of the same shapes."""
    return {
        name: distckpt.Shard(function(leaf.array), leaf.offset, leaf.global_shape)
        if isinstance(leaf, distckpt.Shard)
        else function(leaf)
        for name, leaf in state.items()
    }


def empty(state: State) -> State:
    """Make arrays to load into, in memory that has pages already."""
    return mapped(state, lambda array: np.full_like(array, 0))


def strided(state: State) -> State:
    """Make arrays to load into that are not contiguous: columns of wider ones."""
    return mapped(
        state,
        lambda array: np.zeros((*array.shape[:-1], array.shape[-1] + 64), array.dtype)[
            ..., : array.shape[-1]
        ],
    )


def turned(state: State, rank: int, ranks: int) -> State:
    """Make arrays to load into: cut by columns where the state is cut by rows, and vice versa."""
    mesh = distckpt.Mesh(x=ranks, rank=rank)
    found: State = {}
    for name, leaf in state.items():
        if not isinstance(leaf, distckpt.Shard) or len(leaf.global_shape) == 1:
            found[name] = mapped({name: leaf}, lambda array: np.full_like(array, 0))[name]
            continue
        by_rows = leaf.array.shape[0] < leaf.global_shape[0]
        region = mesh.region((None, "x") if by_rows else ("x", None), leaf.global_shape)
        array = np.full(region.shape, 0, leaf.array.dtype)
        found[name] = distckpt.Shard(array, region.start, leaf.global_shape)
    return found


def differing(state: State, loaded: State) -> Iterator[str]:
    """Yield the names whose bytes are not the state's, for destinations of the same layout."""
    for name, leaf in loaded.items():
        found, expected = np.ascontiguousarray(array_of(leaf)), array_of(state[name])
        if not np.array_equal(flat_bytes(found), flat_bytes(expected)):
            yield name


STATES: dict[str, Callable[[int, int], State]] = {
    "transformer": lambda rank, ranks: transformer(rank, ranks, 700),
    "transformer, small": lambda rank, ranks: transformer(rank, ranks, 175),
    "many small": many_small,
    "few large": few_large,
    # As many bytes as the small ones.
    "few": lambda rank, ranks: few_large(rank, ranks, nbytes=1250 * 4096),
    # For tests of the suite itself.
    "tiny": lambda rank, ranks: few_large(rank, ranks, count=3, nbytes=64 * 4096),
}
