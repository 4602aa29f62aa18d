"""How training frameworks hold a model on many ranks: the state that each rank would save.

Each rank has bfloat16 weights, and in float32 a master copy and two moments. Arrays take no memory:
they repeat one element.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import ml_dtypes
import numpy as np

from benchmarks.scale.models import Model, Parameter
from distckpt import FlatShard, Region, Shard
from distckpt.layout import BALANCED, CEILING, cut_edges

MOMENTS = ("master", "exp_avg", "exp_avg_sq")
PREFIXES = ("model.", *(f"optimizer.{moment}." for moment in MOMENTS))  # of tensors' names
BF16, FP32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)

# Parameters above which a model is cut by tensor parallelism, in 4 and in 16 pipeline stages.
SMALL, MIDDLE, LARGE = 1e9, 5e10, 3e11
FEW_RANKS = 1024

State = dict[str, object]


@lru_cache(1 << 16)
def blank(dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Make an array that takes no memory, however large."""
    return np.broadcast_to(np.zeros((), dtype), shape)


@dataclass(frozen=True)
class Layout:
    """How a model is held.

    Attributes:
        name: What it is called, with its sizes.
        ranks: Number of ranks.
        state: Rank → what it holds.
        sizes: The sizes of its axes.
        key: Rank → what the regular part of its state depends on.
        runs: Rank → the rest of its state, the runs of flat buffers; None if there are none.
        boxes: Rank → start and stop of all that it holds, as the columns of `Holdings`; None where
            there are runs.
    """

    name: str
    ranks: int
    state: Callable[[int], State]
    sizes: dict[str, int]
    key: Callable[[int], object]
    runs: Callable[[int], State] | None = None
    boxes: Callable[[int], tuple[np.ndarray, np.ndarray]] | None = None


@lru_cache(1 << 16)
def _cut(extent: int, parts: int, index: int, rule: int = BALANCED) -> tuple[int, int]:
    low, high = cut_edges(np.int64(extent), parts, rule, np.int64(index))
    return int(low), int(high)


def _box(shape: tuple[int, ...], dim: int | None, parts: int, index: int) -> Region:
    start, stop = [0] * len(shape), list(shape)
    if dim is not None and parts > 1:
        start[dim], stop[dim] = _cut(shape[dim], parts, index)
    return Region(tuple(start), tuple(stop))


def _piece(dtype: np.dtype, region: Region, shape: tuple[int, ...]) -> object:
    if region.shape == shape:
        return blank(dtype, shape)
    return Shard(blank(dtype, region.shape), region.start, shape)


def _stages(model: Model, count: int) -> list[list[Parameter]]:
    """Share out the layers in equal runs; what is before and after them is at the ends."""
    last = [_cut(model.layers, count, stage)[1] - 1 for stage in range(count)]
    stages: list[list[Parameter]] = [[] for _ in range(count)]
    for parameter in model.parameters:
        layer = min(max(parameter.layer, 0), model.layers - 1)
        stages[bisect_left(last, layer)].append(parameter)
    return stages


def _zero1(
    held: list[tuple[Parameter, Region]], replicas: int, index: int
) -> Iterator[tuple[str, object]]:
    """Yield the optimizer's state of one of the ranks that hold alike: a run of the flat buffer.

    The buffer is all of their parameters' boxes, flattened and laid end to end; each rank has an
    equal part, the last one what is left.
    """
    total = sum(region.size for _, region in held)
    part = -(-total // replicas)
    begin, end = min(index * part, total), min((index + 1) * part, total)
    at = 0
    for parameter, region in held:
        low, high = max(begin, at), min(end, at + region.size)
        if low < high:
            box = None if region.shape == parameter.shape else region
            for moment in MOMENTS:
                array = blank(FP32, (high - low,))
                yield (
                    f"optimizer.{moment}.{parameter.name}",
                    FlatShard(array, low - at, parameter.shape, box),
                )
        at += region.size


def megatron(model: Model, *, tp: int, pp: int, dp: int) -> Layout:
    """TP × PP × DP with ZeRO-1: tensor parallel ranks are neighbours, then data parallel ones."""
    stages = _stages(model, pp)

    @cache
    def boxes(stage: int, tp_rank: int) -> list[tuple[Parameter, Region]]:
        return [
            (parameter, _box(parameter.shape, parameter.tp_dim, tp, tp_rank))
            for parameter in stages[stage]
        ]

    @cache
    def weights(stage: int, tp_rank: int) -> State:
        return {
            f"model.{parameter.name}": _piece(BF16, region, parameter.shape)
            for parameter, region in boxes(stage, tp_rank)
        }

    def runs(rank: int) -> State:
        stage, dp_rank, tp_rank = rank // (dp * tp), rank // tp % dp, rank % tp
        return dict(_zero1(boxes(stage, tp_rank), dp, dp_rank))

    return Layout(
        f"TP{tp}×PP{pp}×DP{dp}, ZeRO-1",
        tp * pp * dp,
        lambda rank: weights(rank // (dp * tp), rank % tp) | runs(rank),
        {"tp": tp, "pp": pp, "dp": dp},
        lambda rank: (rank // (dp * tp), rank % tp),
        runs,
    )


def _sharded(model: Model, region_of: Callable[[Parameter], Region]) -> State:
    regions = [(parameter, region_of(parameter)) for parameter in model.parameters]
    return {
        prefix + parameter.name: _piece(dtype, region, parameter.shape)
        for prefix, dtype in zip(PREFIXES, (BF16, FP32, FP32, FP32), strict=True)
        for parameter, region in regions
    }


def _boxes_of(model: Model, *, tp: int) -> Callable[[int, int, int], tuple[np.ndarray, np.ndarray]]:
    """Return what gives the boxes of all tensors at once: by FSDP ranks, this one, and TP rank."""
    width = max(len(parameter.shape) for parameter in model.parameters)
    pad = np.array([width - len(parameter.shape) for parameter in model.parameters])
    shape = np.array([(1,) * (width - len(p.shape)) + p.shape for p in model.parameters])
    row = np.arange(len(shape))
    cut = np.array([n for n, p in enumerate(model.parameters) if p.tp_dim is not None and tp > 1])
    dim = np.array([pad[n] + model.parameters[n].tp_dim for n in cut], np.int64)

    def boxes(fsdp: int, fsdp_rank: int, tp_rank: int) -> tuple[np.ndarray, np.ndarray]:
        start, stop = np.zeros_like(shape), shape.copy()
        if len(cut):
            edges = cut_edges(shape[cut, dim], tp, BALANCED, np.int64(tp_rank))
            start[cut, dim], stop[cut, dim] = edges
        origin = start[row, pad].copy()
        low, high = cut_edges(stop[row, pad] - origin, fsdp, CEILING, np.int64(fsdp_rank))
        start[row, pad], stop[row, pad] = origin + low, origin + high
        return np.tile(start, (len(PREFIXES), 1)), np.tile(stop, (len(PREFIXES), 1))

    return boxes


def fsdp(model: Model, *, ranks: int) -> Layout:
    """Every tensor cut along its first dimension, as `torch.chunk` does."""

    def state(rank: int) -> State:
        def region(parameter: Parameter) -> Region:
            low, high = _cut(parameter.shape[0], ranks, rank, CEILING)
            return Region((low, *(0,) * (len(parameter.shape) - 1)), (high, *parameter.shape[1:]))

        return _sharded(model, region)

    boxes = _boxes_of(model, tp=1)
    return Layout(
        f"FSDP{ranks}",
        ranks,
        state,
        {"fsdp": ranks},
        lambda rank: rank,
        boxes=lambda rank: boxes(ranks, rank, 0),
    )


def fsdp_tp(model: Model, *, fsdp: int, tp: int) -> Layout:
    """Cut by tensor parallelism, and each piece by FSDP along its first dimension."""

    def state(rank: int) -> State:
        fsdp_rank, tp_rank = divmod(rank, tp)

        def region(parameter: Parameter) -> Region:
            box = _box(parameter.shape, parameter.tp_dim, tp, tp_rank)
            low, high = _cut(box.shape[0], fsdp, fsdp_rank, CEILING)
            origin = box.start[0]
            return Region((origin + low, *box.start[1:]), (origin + high, *box.stop[1:]))

        return _sharded(model, region)

    boxes = _boxes_of(model, tp=tp)
    return Layout(
        f"FSDP{fsdp}×TP{tp}",
        fsdp * tp,
        state,
        {"fsdp": fsdp, "tp": tp},
        lambda rank: rank,
        boxes=lambda rank: boxes(fsdp, *divmod(rank, tp)),
    )


def experts(model: Model, *, pp: int, ep: int, dp: int) -> Layout:
    """PP × EP × DP with ZeRO-1: a rank has some experts whole, and the rest of its stage whole."""
    stages = _stages(model, pp)

    @cache
    def held(stage: int, ep_rank: int) -> tuple[list[tuple[Parameter, Region]], ...]:
        low, high = _cut(model.experts, ep, ep_rank)
        whole = [(parameter, Region.whole(parameter.shape)) for parameter in stages[stage]]
        return (
            [pair for pair in whole if pair[0].expert is None],
            [pair for pair in whole if pair[0].expert is not None and low <= pair[0].expert < high],
        )

    @cache
    def weights(stage: int, ep_rank: int) -> State:
        return {
            f"model.{parameter.name}": blank(BF16, parameter.shape)
            for some in held(stage, ep_rank)
            for parameter, _ in some
        }

    def runs(rank: int) -> State:
        stage, dp_rank, ep_rank = rank // (dp * ep), rank // ep % dp, rank % ep
        shared, mine = held(stage, ep_rank)
        return dict((*_zero1(shared, ep * dp, dp_rank * ep + ep_rank), *_zero1(mine, dp, dp_rank)))

    return Layout(
        f"PP{pp}×EP{ep}×DP{dp}, ZeRO-1",
        pp * ep * dp,
        lambda rank: weights(rank // (dp * ep), rank % ep) | runs(rank),
        {"pp": pp, "ep": ep, "dp": dp},
        lambda rank: (rank // (dp * ep), rank % ep),
        runs,
    )


def layout_for(model: Model, kind: str, ranks: int) -> Layout | None:
    """Return the layout of a kind that suits a model on so many ranks; None where there is none."""
    small, large = model.size < SMALL, model.size > LARGE
    if kind == "megatron":
        tp = 1 if small else 8
        pp = 16 if large else 4 if model.size > MIDDLE else 1
        pp = min(pp, max(1, ranks // tp))
        if model.experts or ranks % (tp * pp):
            return None
        return megatron(model, tp=tp, pp=pp, dp=ranks // (tp * pp))
    if kind == "fsdp":
        return None if model.experts else fsdp(model, ranks=ranks)
    if kind == "fsdp-tp":
        return None if model.experts or ranks % 8 else fsdp_tp(model, fsdp=ranks // 8, tp=8)
    if kind == "experts" and model.experts:
        pp = 4 if ranks < FEW_RANKS else 16
        ep = math.gcd(64, ranks // pp)
        return experts(model, pp=pp, ep=ep, dp=ranks // (pp * ep))
    return None


def reduced(model: Model) -> tuple[Model, dict[str, str]]:
    """Return a model of one parameter of each kind, in order; and for each parameter its like."""
    kinds: dict[object, Parameter] = {}
    like = {}
    for parameter in model.parameters:
        inner = 0 <= parameter.layer < model.layers
        kind = parameter.shape, parameter.tp_dim, inner or parameter.name
        like[parameter.name] = kinds.setdefault(kind, parameter).name
    return replace(model, parameters=list(kinds.values())), like


def reshaped(model: Model, kind: str, layout: Layout) -> Layout:
    """Return another layout of the same kind, as one would load into after a change of the mesh."""
    sizes = layout.sizes
    if kind == "megatron":
        tp, pp = max(1, sizes["tp"] // 2), max(1, sizes["pp"] // 2)
        return megatron(model, tp=tp, pp=pp, dp=layout.ranks // (tp * pp))
    if kind == "experts":
        pp, ep = max(1, sizes["pp"] // 2), max(1, sizes["ep"] // 2)
        return experts(model, pp=pp, ep=ep, dp=layout.ranks // (pp * ep))
    return fsdp(model, ranks=layout.ranks // 2)


def least_busiest(model: Model, kind: str, layout: Layout) -> float:
    """Return a bound that no plan can beat: the bytes of the busiest rank, at least.

    What only some ranks hold must be stored by these: the bytes held by no one outside a set of
    ranks, divided by the size of the set, for the sets that the layout is made of. It is counted
    from the parameters, not by the planner.
    """
    sizes = layout.sizes
    bytes_each = BF16.itemsize + len(MOMENTS) * FP32.itemsize
    if kind in ("fsdp", "fsdp-tp"):
        # What rank 0 holds is held by it alone, but for what tensor parallelism leaves whole.
        tp = sizes.get("tp", 1)
        total = 0.0
        for parameter in model.parameters:
            cut = parameter.tp_dim is not None and tp > 1
            shape = list(parameter.shape)
            if cut:
                low, high = _cut(shape[parameter.tp_dim or 0], tp, 0)
                shape[parameter.tp_dim or 0] = high - low
            low, high = _cut(shape[0], sizes["fsdp"], 0, CEILING)
            total += (
                (high - low) * math.prod(shape[1:]) * bytes_each / (1 if cut or tp == 1 else tp)
            )
        return total
    bounds = []
    for mine in _stages(model, sizes["pp"]):
        ranks = layout.ranks / sizes["pp"]
        total = sum(p.size for p in mine)
        bounds.append(total * bytes_each / ranks)
        if kind == "megatron":
            # What is cut is held by as many ranks as there are replicas.
            cut = sum(p.size for p in mine if p.tp_dim is not None) / sizes["tp"]
            bounds.append(cut * bytes_each / sizes["dp"])
            continue
        of_expert = np.zeros(model.experts)
        for parameter in mine:
            if parameter.expert is not None:
                of_expert[parameter.expert] += parameter.size
        for ep_rank in range(sizes["ep"]):
            low, high = _cut(model.experts, sizes["ep"], ep_rank)
            bounds.append(float(of_expert[low:high].sum()) * bytes_each / sizes["dp"])
    return max(bounds)
