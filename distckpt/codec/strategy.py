"""MindSpore's strategy files, protobuf and JSON, to plain values and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import DecodeError

from distckpt._pb import strategy_pb2 as pb
from distckpt.errors import CorruptCheckpoint


@dataclass(frozen=True, slots=True)
class ParameterStrategy:
    """How a strategy file says that one parameter is cut; nothing in it is checked yet.

    Attributes:
        dev_matrix: The devices of a pipeline stage as an array; empty for one device.
        tensor_map: One row: for each dimension the axis that cuts it. Several rows: one a
            dimension, the axes that cut it. Axes count from the last, -1 is none.
        param_split_shape: Sizes of a cut by hand; empty for none.
        indices_offset: Where the parts of a cut by hand begin; empty for none.
        field: Field size of an embedding that is cut by fields; 0 for none.
        opt_weight_shard_step: Ranks from one part of the optimizer's sharding to the next.
        opt_weight_shard_size: Parts of the optimizer's sharding; 0 for none, -1 for all replicas.
    """

    dev_matrix: tuple[int, ...]
    tensor_map: tuple[tuple[int, ...], ...]
    param_split_shape: tuple[int, ...] = ()
    indices_offset: tuple[int, ...] = ()
    field: int = 0
    opt_weight_shard_step: int = 0
    opt_weight_shard_size: int = 0


@dataclass(frozen=True, slots=True)
class OperatorStrategy:
    """How an operator is cut.

    Attributes:
        stage: Its pipeline stage.
        cuts: For each input, the parts along each dimension.
    """

    stage: int
    cuts: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class StrategyFile:
    """What a strategy file says.

    Attributes:
        parameters: How each parameter is cut, by the name that the file gives it.
        operators: How each operator is cut.
        current_stage: MindSpore's counter.
    """

    parameters: Mapping[str, ParameterStrategy]
    operators: Mapping[str, OperatorStrategy] = field(default_factory=dict)
    current_stage: int = 1


def decode_strategy(data: bytes, *, path: str = "") -> StrategyFile:
    """Decode a strategy file in protobuf.

    Raises:
        CorruptCheckpoint: It is none, or gives a parameter two layouts.
    """
    message = pb.ParallelStrategyMap()
    try:
        message.ParseFromString(data)
    except DecodeError as exc:
        raise CorruptCheckpoint(
            f"{path}: not a strategy file of MindSpore in protobuf ({exc}); one in JSON needs a "
            "name that ends with .json",
            path=path,
        ) from exc
    names = [item.param_name for item in message.parallel_layout_item]
    names += [item.node_name for item in message.parallel_strategy_item]
    if not all(isinstance(name, str) for name in names):  # protobuf hands out what isn't as bytes
        raise CorruptCheckpoint(f"{path}: a name that isn't UTF-8", path=path)
    parameters: dict[str, ParameterStrategy] = {}
    for item in message.parallel_layout_item:
        found = item.parallel_layouts
        for name, rows in (
            ("dev_matrix", found.dev_matrix),
            ("param_split_shape", found.param_split_shape),
            ("indices_offset", found.indices_offset),
        ):
            if len(rows) > 1:
                raise CorruptCheckpoint(
                    f"{path}: parameter {item.param_name!r} has {len(rows)} entries of {name}; "
                    "expected one",
                    path=path,
                )
        layout = ParameterStrategy(
            dev_matrix=_only_row(found.dev_matrix),
            tensor_map=tuple(tuple(row.dim) for row in found.tensor_map if row.dim),
            param_split_shape=_only_row(found.param_split_shape),
            indices_offset=_only_row(found.indices_offset),
            field=found.field,
            opt_weight_shard_step=found.opt_weight_shard_step,
            opt_weight_shard_size=found.opt_weight_shard_size,
        )
        if parameters.setdefault(item.param_name, layout) != layout:
            raise CorruptCheckpoint(
                f"{path}: parameter {item.param_name!r} has two layouts", path=path
            )
    operators = {
        item.node_name: OperatorStrategy(
            item.parallel_strategys.stage,
            tuple(tuple(cut.dim) for cut in item.parallel_strategys.parallel_strategy),
        )
        for item in message.parallel_strategy_item
    }
    return StrategyFile(parameters, operators, message.current_stage)


def _only_row(rows: Sequence[Any]) -> tuple[int, ...]:
    return tuple(rows[0].dim) if rows else ()


def encode_strategy(strategy: StrategyFile) -> bytes:
    """Encode a strategy file in protobuf."""
    message = pb.ParallelStrategyMap(current_stage=strategy.current_stage)
    for name, operator in strategy.operators.items():
        item = message.parallel_strategy_item.add(node_name=name)
        item.parallel_strategys.stage = operator.stage
        for cut in operator.cuts:
            item.parallel_strategys.parallel_strategy.add(dim=cut)
    for name, layout in strategy.parameters.items():
        into = message.parallel_layout_item.add(param_name=name).parallel_layouts
        into.dev_matrix.add(dim=layout.dev_matrix)
        # One row, even if it is empty: MindSpore asks for the first.
        for row in layout.tensor_map or ((),):
            into.tensor_map.add(dim=row)
        into.param_split_shape.add(dim=layout.param_split_shape)
        into.indices_offset.add(dim=layout.indices_offset)
        into.field = layout.field
        into.opt_weight_shard_step = layout.opt_weight_shard_step
        into.opt_weight_shard_size = layout.opt_weight_shard_size
    return message.SerializeToString(deterministic=True)


def decode_json_strategy(data: bytes, *, path: str = "") -> StrategyFile:
    """Decode a strategy file in JSON.

    Raises:
        CorruptCheckpoint: It is none.
    """
    try:
        content = json.loads(data.decode())
    except (ValueError, RecursionError) as exc:
        raise CorruptCheckpoint(f"{path}: not JSON: {exc}", path=path) from exc
    reader = _JsonReader(path)
    top = reader.mapping(content, "the file")
    parameters = {
        name: reader.parameter(item, f"parallel_layout_item.{name}")
        for name, item in reader.mapping(
            top.get("parallel_layout_item", {}), "parallel_layout_item"
        ).items()
    }
    operators = {
        name: reader.operator(item, f"parallel_strategy_item.{name}")
        for name, item in reader.mapping(
            top.get("parallel_strategy_item", {}), "parallel_strategy_item"
        ).items()
    }
    return StrategyFile(
        parameters, operators, reader.number(top.get("current_stage", 1), "current_stage")
    )


def encode_json_strategy(strategy: StrategyFile) -> bytes:
    """Encode a strategy file in JSON."""
    content = {
        "current_stage": strategy.current_stage,
        "parallel_strategy_item": {
            name: {"stage": operator.stage, "parallel_strategy": operator.cuts}
            for name, operator in strategy.operators.items()
        },
        "parallel_layout_item": {
            name: {
                "dev_matrix": layout.dev_matrix,
                "tensor_map": layout.tensor_map
                if len(layout.tensor_map) > 1
                else [axis for row in layout.tensor_map for axis in row],
                "param_split_shape": layout.param_split_shape,
                "indices_offset": layout.indices_offset,
                "field": layout.field,
                "opt_weight_shard_step": layout.opt_weight_shard_step,
                "opt_weight_shard_size": layout.opt_weight_shard_size,
            }
            for name, layout in strategy.parameters.items()
        },
    }
    return json.dumps(content, ensure_ascii=False).encode()


@dataclass(frozen=True, slots=True)
class _JsonReader:
    """Takes values out of a strategy file and names the place of what isn't as expected."""

    path: str

    def parameter(self, value: object, where: str) -> ParameterStrategy:
        item = self.mapping(value, where)

        def number(key: str) -> int:
            return self.number(item.get(key, 0), f"{where}.{key}")

        def row(key: str) -> tuple[int, ...]:
            return self.row(item.get(key, []), f"{where}.{key}")

        for key in ("dev_matrix", "tensor_map"):
            if key not in item:
                raise self.wrong(f"{where}.{key}", "a list of integers", "nothing")
        return ParameterStrategy(
            dev_matrix=row("dev_matrix"),
            tensor_map=self.tensor_map(item["tensor_map"], f"{where}.tensor_map"),
            param_split_shape=row("param_split_shape"),
            indices_offset=row("indices_offset"),
            field=number("field"),
            opt_weight_shard_step=number("opt_weight_shard_step"),
            opt_weight_shard_size=number("opt_weight_shard_size"),
        )

    def operator(self, value: object, where: str) -> OperatorStrategy:
        item = self.mapping(value, where)
        cuts = item.get("parallel_strategy", [])
        if not isinstance(cuts, list):
            raise self.wrong(f"{where}.parallel_strategy", "a list", repr(cuts))
        return OperatorStrategy(
            self.number(item.get("stage", 0), f"{where}.stage"),
            tuple(self.row(cut, f"{where}.parallel_strategy") for cut in cuts),
        )

    def tensor_map(self, value: object, where: str) -> tuple[tuple[int, ...], ...]:
        if isinstance(value, list) and any(isinstance(row, list) for row in value):
            return tuple(self.row(row if isinstance(row, list) else [row], where) for row in value)
        row = self.row(value, where)
        return (row,) if row else ()

    def mapping(self, value: object, where: str) -> Mapping[str, object]:
        if not isinstance(value, dict):
            raise self.wrong(where, "an object", repr(value))
        return value

    def row(self, value: object, where: str) -> tuple[int, ...]:
        if not isinstance(value, list):
            raise self.wrong(where, "a list of integers", repr(value))
        return tuple(self.number(item, where) for item in value)

    def number(self, value: object, where: str) -> int:
        # Beyond these bounds it is no size, and some numbers can't even be printed.
        if type(value) is not int or not -(1 << 63) <= value < 1 << 63:
            raise self.wrong(where, "an integer of 64 bits", repr(value))
        return value

    def wrong(self, where: str, expected: str, found: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(
            f"{self.path}: {where}: expected {expected}, found {found[:80]}; expected a strategy "
            "file of MindSpore in JSON",
            path=self.path,
        )
