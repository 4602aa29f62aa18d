"""What MindSpore's strategies mean: which block of a parameter each rank holds.

MindSpore cuts a parameter into a regular grid of equal blocks. The ranks of a pipeline stage are an
array (the device matrix, last axis fastest); the tensor map says which of its axes cut which
dimension; what is replicated after that may be cut once more along the first dimension, over the
replicas (the optimizer's sharding).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from distckpt.codec.strategy import (
    ParameterStrategy,
    StrategyFile,
    decode_json_strategy,
    decode_strategy,
)
from distckpt.errors import CheckpointNotFound, CorruptCheckpoint, LayoutError, UnsupportedFormat
from distckpt.formats.base import Place
from distckpt.region import Region

Strategy = (
    str | os.PathLike[str] | StrategyFile | Mapping[str, ParameterStrategy] | Sequence["Strategy"]
)

# More than any job has. It bounds what a few bytes of a strategy file can make us do.
MAX_RANKS = 1 << 16
_MAX_FILE_BYTES = 1 << 26
_STAGED = re.compile(r"(0|[1-9][0-9]{0,8})-(.+)", re.DOTALL)


@dataclass(frozen=True)
class Cut:
    """A parameter, cut into a grid of equal blocks over the ranks of a stage.

    Attributes:
        parts: Blocks along each dimension.
        block: (ranks,) number of the block that each rank holds, in C order.
    """

    parts: tuple[int, ...]
    block: np.ndarray

    @property
    def count(self) -> int:
        """Number of blocks."""
        return math.prod(self.parts)

    def region(self, block: int, shape: tuple[int, ...]) -> Region:
        """Return the box of a block in a parameter whose extents the parts divide."""
        extent = [size // parts for size, parts in zip(shape, self.parts, strict=True)]
        at = [int(index) for index in np.unravel_index(block, self.parts)] if self.parts else []
        start = tuple(index * size for index, size in zip(at, extent, strict=True))
        return Region(start, tuple(a + size for a, size in zip(start, extent, strict=True)))

    def ranks_of(self, block: int) -> list[int]:
        """Return the ranks of the stage that hold a block."""
        found: list[int] = np.flatnonzero(self.block == block).tolist()
        return found


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a parameter lies.

    Attributes:
        first_rank: The first rank of its pipeline stage.
        strategy: How the stage's ranks share it.
    """

    first_rank: int
    strategy: ParameterStrategy

    @property
    def ranks(self) -> range:
        """The ranks of its stage."""
        count = math.prod(self.strategy.dev_matrix)
        return range(self.first_rank, self.first_rank + count)

    def cut(self, ndim: int) -> Cut:
        """How it is cut; see `cut_of`."""
        return cut_of(self.strategy, ndim)


@dataclass(frozen=True)
class RankLayout:
    """How all parameters are shared by all ranks.

    Attributes:
        stages: Number of ranks of each pipeline stage.
        placements: Parameter → where it lies; in several stages, if they share it.
    """

    stages: tuple[int, ...]
    placements: Mapping[str, tuple[Placement, ...]]

    @cached_property
    def ranks(self) -> int:
        """Number of ranks."""
        return sum(self.stages)


def read_strategy(url: str | os.PathLike[str]) -> StrategyFile:
    """Read a strategy file: JSON if its name ends with ``.json``, else protobuf.

    Raises:
        CheckpointNotFound: There is none.
        CorruptCheckpoint: It isn't one.
    """
    return _read(Place.at(url))


def _read(place: Place) -> StrategyFile:
    if not place.is_file():
        raise CheckpointNotFound(f"{place.url}: there is no such strategy file")
    size = place.size()
    if not 0 < size <= _MAX_FILE_BYTES:
        raise CorruptCheckpoint(
            f"{place.url}: a strategy file of {size} bytes; expected 1 to {_MAX_FILE_BYTES}",
            path=place.url,
        )
    decode = decode_json_strategy if place.name.endswith(".json") else decode_strategy
    return decode(place.read(0, size), path=place.url)


def strategy_files(strategy: Strategy) -> list[tuple[str, StrategyFile]]:
    """Read what an option ``strategy=`` names: (where, what it says) for each file.

    Args:
        strategy: A file, a folder of such files, what is read already, or several of these.
    """
    if isinstance(strategy, StrategyFile):
        return [("strategy", strategy)]
    if isinstance(strategy, Mapping):
        return [("strategy", StrategyFile(strategy))]
    if not isinstance(strategy, (str, os.PathLike)):
        return [found for each in strategy for found in strategy_files(each)]
    place = Place.at(strategy)
    if place.is_file():
        return [(place.url, _read(place))]
    names = [name for name in place.entries() if name.endswith((".ckpt", ".json"))]
    if not names:
        raise CheckpointNotFound(
            f"{place.url}: expected a strategy file, or a folder with some (.ckpt or .json), one "
            "for each pipeline stage; there is none"
        )
    return [(place.entry(name).url, _read(place.entry(name))) for name in names]


def rank_layout(strategy: Strategy, names: Collection[str] = ()) -> RankLayout:
    """Read strategies and join them.

    Args:
        strategy: One file, possibly merged from those of several pipeline stages, or one for each
            stage; see `strategy_files`.
        names: Names of parameters: they decide whether ``0-w`` is the parameter ``w`` of stage 0,
            or a parameter of this name.

    Raises:
        CorruptCheckpoint: A strategy that contradicts itself.
        LayoutError: Strategies that do not make a whole.
        CheckpointNotFound: No such file.
    """
    files = strategy_files(strategy)
    if not files:
        raise LayoutError("strategy=: expected at least one strategy file, found none")
    where = files[0][0] + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    if len(files) > 1:
        stages = {stage: found.parameters for stage, found in by_stage(files).items()}
    else:
        stages = _unmerged(files[0][1], names)
    if not any(stages.values()):
        raise LayoutError(f"{where}: it says of no parameter how it is cut")
    if sorted(stages) != list(range(len(stages))):
        raise LayoutError(
            f"{where}: strategies of the pipeline stages {sorted(stages)}; expected those of all, "
            f"0 to {max(stages)}: give each stage's file, as a list or in a folder"
        )
    sizes = [_stage_ranks(stages[stage], stage, where) for stage in range(len(stages))]
    if sum(sizes) > MAX_RANKS:
        raise CorruptCheckpoint(f"{where}: {sum(sizes)} ranks; there are at most {MAX_RANKS}")
    placements: dict[str, tuple[Placement, ...]] = {}
    for stage, parameters in sorted(stages.items()):
        for name, found in parameters.items():
            here = Placement(sum(sizes[:stage]), found)
            placements[name] = (*placements.get(name, ()), here)
    return RankLayout(tuple(sizes), placements)


def by_stage(files: Sequence[tuple[str, StrategyFile]]) -> dict[int, StrategyFile]:
    """Sort strategy files by their pipeline stage, ascending.

    Raises:
        LayoutError: A file that doesn't say its stage, or different strategies of one stage.
    """
    stages: dict[int, StrategyFile] = {}
    for url, found in files:
        if not found.operators:
            raise LayoutError(
                f"{url}: it holds no operator, so its pipeline stage can't be told; give a file "
                "that was merged by MindSpore's merge_pipeline_strategys"
            )
        stage = next(iter(found.operators.values())).stage
        # Each rank may have written its own: those of a stage are alike.
        if stages.setdefault(stage, found).parameters != found.parameters:
            raise LayoutError(f"{url}: another file has another strategy for stage {stage}")
    return dict(sorted(stages.items()))


def _unmerged(
    found: StrategyFile, names: Collection[str]
) -> dict[int, Mapping[str, ParameterStrategy]]:
    """Take a merged file apart, in which the parameter ``w`` of stage 2 is called ``2-w``."""
    stages: dict[int, dict[str, ParameterStrategy]] = {}
    for name, layout in found.parameters.items():
        match = _STAGED.fullmatch(name)
        if match is None or name in names:
            return {0: found.parameters}
        stages.setdefault(int(match[1]), {})[match[2]] = layout
    if sorted(stages) != list(range(len(stages))) and not names:
        return {0: found.parameters}
    return dict(stages)


def _stage_ranks(parameters: Mapping[str, ParameterStrategy], stage: int, where: str) -> int:
    ranks: dict[int, str] = {}
    for name, found in parameters.items():
        if any(size < 1 for size in found.dev_matrix):
            raise CorruptCheckpoint(
                f"{where}: parameter {name!r}: device matrix {list(found.dev_matrix)}; expected "
                "positive numbers",
                path=where,
            )
        count = math.prod(found.dev_matrix)
        if count > MAX_RANKS:
            raise CorruptCheckpoint(
                f"{where}: parameter {name!r}: device matrix {list(found.dev_matrix)} means "
                f"{count} ranks; there are at most {MAX_RANKS}",
                path=where,
            )
        ranks.setdefault(count, name)
    if len(ranks) > 1:
        listed = ", ".join(f"{count} for {name!r}" for count, name in ranks.items())
        raise CorruptCheckpoint(
            f"{where}: the parameters of stage {stage} have device matrices of different numbers "
            f"of ranks: {listed}; expected one number",
            path=where,
        )
    return next(iter(ranks), 0)


@lru_cache(maxsize=64)  # a network has few different ones
def cut_of(strategy: ParameterStrategy, ndim: int) -> Cut:
    """Work out which block of a parameter each rank of its stage holds.

    Args:
        strategy: What the strategy file says of the parameter.
        ndim: Its number of dimensions.

    Raises:
        CorruptCheckpoint: The strategy contradicts itself, or isn't one for so many dimensions.
        UnsupportedFormat: It cuts an embedding by fields, or by hand into unequal parts.
    """
    if strategy.field or strategy.param_split_shape:
        raise UnsupportedFormat(
            f"it is cut by fields or by hand (field {strategy.field}, param_split_shape "
            f"{list(strategy.param_split_shape)}): only equal parts are known here; merge it with "
            "MindSpore's merge_sliced_parameter first"
        )
    matrix = strategy.dev_matrix
    used: set[int] = set()
    ranks = math.prod(matrix)
    coordinate = np.unravel_index(np.arange(ranks), matrix) if matrix else ()
    parts, index = [], []
    for axes in _axes(strategy, ndim):
        part, at = 1, np.zeros(ranks, np.int64)
        for axis in axes:
            if not -1 <= axis < len(matrix) or (axis in used and matrix[-1 - axis] > 1):
                raise CorruptCheckpoint(
                    f"tensor map {_map_text(strategy)} for the device matrix {list(matrix)}: "
                    f"expected each axis from 0 to {len(matrix) - 1} at most once, or -1; found "
                    f"{axis}"
                )
            if axis >= 0:
                used.add(axis)
                part *= matrix[-1 - axis]
                at = at * matrix[-1 - axis] + coordinate[-1 - axis]
        parts.append(part)
        index.append(at)
    size = _shard_size(strategy, ranks // math.prod(parts))
    if size > 1:
        if not parts:
            raise CorruptCheckpoint(f"a scalar is cut into {size} parts by optimizer sharding")
        index[0] = index[0] * size + _shard_of(_flat(index, parts), strategy, size)
        parts[0] *= size
    return Cut(tuple(parts), _flat(index, parts) if parts else np.zeros(ranks, np.int64))


def _flat(index: Sequence[np.ndarray], parts: Sequence[int]) -> np.ndarray:
    flat: np.ndarray = np.ravel_multi_index(tuple(index), tuple(parts))
    return flat


def _map_text(strategy: ParameterStrategy) -> str:
    rows = [list(row) for row in strategy.tensor_map]
    return str(rows[0] if len(rows) == 1 else rows)


def _axes(strategy: ParameterStrategy, ndim: int) -> Sequence[tuple[int, ...]]:
    """Return the axes that cut each dimension, the slowest first."""
    rows = strategy.tensor_map
    row = rows[0] if len(rows) == 1 else ()
    if len(row) == ndim and len(rows) <= 1:
        return [(axis,) for axis in row]
    # One row of several axes may be that of one dimension, too.
    if len(rows) == ndim and (ndim > 1 or (row and -1 not in row)):
        return rows
    if ndim == 0 and set(row) == {-1}:
        return []
    raise CorruptCheckpoint(
        f"tensor map {_map_text(strategy)} is not one for {ndim} dimensions; is this the strategy "
        "of these files?"
    )


def _shard_size(strategy: ParameterStrategy, replicas: int) -> int:
    """Into how many parts the optimizer's sharding cuts."""
    step, size = strategy.opt_weight_shard_step, strategy.opt_weight_shard_size
    size = replicas if size == -1 else size
    if size in (0, 1):
        return 1
    if not 1 <= step <= MAX_RANKS or size < 0 or replicas % size:
        raise CorruptCheckpoint(
            f"optimizer sharding with step {step} and size {strategy.opt_weight_shard_size} over "
            f"{replicas} replicas: expected a positive step, and a size that divides the number of "
            "replicas (or -1: all of them)"
        )
    return size


def _shard_of(block: np.ndarray, strategy: ParameterStrategy, size: int) -> np.ndarray:
    """Which part of its block each rank holds: its place among the block's ranks, modulo the size.

    MindSpore writes down how far apart they are, and its tools go by their order. Where these are
    two different things the strategy is refused; where they are not evenly apart, the order counts.
    """
    order = np.argsort(block, kind="stable")
    replicas = int(np.bincount(block)[0])
    part = np.empty_like(block)
    part[order] = np.arange(len(block)) % replicas % size
    apart = np.diff(order.reshape(-1, size))
    if (apart == apart[0, 0]).all() and apart[0, 0] != strategy.opt_weight_shard_step:
        raise CorruptCheckpoint(
            f"optimizer sharding with step {strategy.opt_weight_shard_step} and size {size}: the "
            f"ranks that hold a block's parts are {apart[0, 0]} apart; expected that as the step"
        )
    return part
