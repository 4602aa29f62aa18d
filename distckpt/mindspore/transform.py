"""MindSpore's functions on distributed checkpoints and their strategy files."""

from __future__ import annotations

import os
from dataclasses import replace

from distckpt.codec.strategy import (
    ParameterStrategy,
    StrategyFile,
    encode_json_strategy,
    encode_strategy,
)
from distckpt.convert import ConvertReport, convert
from distckpt.formats.base import Place
from distckpt.formats.mindspore_layout import Strategy, by_stage, read_strategy, strategy_files
from distckpt.formats.mindspore_ranks import NAME

Path = str | os.PathLike[str]


def transform_checkpoints(
    src_checkpoints_dir: Path,
    dst_checkpoints_dir: Path,
    ckpt_prefix: str,
    src_strategy_file: Strategy | None = None,
    dst_strategy_file: Strategy | None = None,
    process_num: int = 1,
    output_format: str = "ckpt",
    *,
    comm: object = None,
    dst_ranks: int | None = None,
    overwrite: bool = False,
) -> ConvertReport:
    """Collective. Cut a distributed checkpoint anew, for another strategy.

    Args:
        src_checkpoints_dir: Folder with ``rank_0/``, ``rank_1/``, …; of several saves there, the
            newest that all ranks have is taken. Files may be of both formats.
        dst_checkpoints_dir: Where to write ``rank_0/<prefix>0.ckpt``, ….
        ckpt_prefix: Beginning of the names of the new files.
        src_strategy_file: How the source is cut; None where all its ranks have the same.
        dst_strategy_file: How to cut; None for one rank that has all.
        process_num: Taken for MindSpore's sake. The ranks of `comm` share the work.
        output_format: ``"ckpt"`` or ``"safetensors"``, whatever the source is.
        comm: As in `distckpt.save`.
        dst_ranks: In place of a strategy: a number of ranks, over which each parameter is cut along
            its first dimension, as evenly as it goes.
        overwrite: Whether files of this prefix may be replaced.

    Returns:
        What was done.

    Raises:
        IncompleteCheckpoint: A part of a parameter that no rank has.
        LayoutError: Files and strategy do not fit together.
        UnsupportedFormat: A shape that the strategy does not cut into equal parts.
        CheckpointExists: There are files, and they may not be replaced.
    """
    del process_num
    return convert(
        src_checkpoints_dir,
        dst_checkpoints_dir,
        comm=comm,
        format=NAME,
        source_format=NAME,
        overwrite=overwrite,
        source_options={"strategy": src_strategy_file},
        options={
            "strategy": dst_strategy_file,
            "ranks": dst_ranks,
            "prefix": ckpt_prefix,
            "file_format": output_format,
        },
    )


def build_searched_strategy(strategy_filename: Path) -> dict[str, ParameterStrategy]:
    """Read a strategy file: parameter → how it is cut."""
    return dict(read_strategy(strategy_filename).parameters)


def merge_pipeline_strategys(src_strategy_dirs: Strategy, dst_strategy_file: Path) -> None:
    """Join the strategy files of all pipeline stages: ``w`` of stage 2 is called ``2-w`` then.

    Args:
        src_strategy_dirs: The folder that they are in.
        dst_strategy_file: The file to write, or to replace; JSON if its name ends with ``.json``.

    Raises:
        CheckpointNotFound: There are none.
        LayoutError: Different strategies of one stage, or a file that doesn't say its stage.
    """
    merged = StrategyFile({})
    for stage, found in by_stage(strategy_files(src_strategy_dirs)).items():
        named = {f"{stage}-{name}": layout for name, layout in found.parameters.items()}
        merged = replace(
            merged,
            parameters={**merged.parameters, **named},
            operators={**merged.operators, **found.operators},
        )
    place = Place.at(dst_strategy_file)
    encode = encode_json_strategy if place.name.endswith(".json") else encode_strategy
    place.put(encode(merged), replace=True)
