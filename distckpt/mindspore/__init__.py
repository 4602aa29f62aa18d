"""MindSpore's checkpoint functions, for its users: change the import, and nothing else.

They take nets of plain arrays, and ``mindspore.nn.Cell``s where the program uses MindSpore. Files
are MindSpore's own ``.ckpt`` and ``.safetensors``, which it reads and which are read from it. Where
MindSpore loses or guesses something, these don't: ``docs/mindspore-differences.md`` lists it.

`Tensor` and `Parameter` are MindSpore's own if the program has imported ``mindspore`` before it
asks for them; otherwise they are stand-ins, small named arrays. Nothing imports MindSpore here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distckpt.mindspore import values
from distckpt.mindspore.background import PendingSave
from distckpt.mindspore.callback import ModelCheckpoint
from distckpt.mindspore.config import CheckpointConfig
from distckpt.mindspore.loading import CheckpointFileNotFound, load_checkpoint
from distckpt.mindspore.nets import NetMismatch, load_param_into_net
from distckpt.mindspore.saving import save_checkpoint
from distckpt.mindspore.transform import (
    build_searched_strategy,
    merge_pipeline_strategys,
    transform_checkpoints,
)
from distckpt.mindspore.values import Parameters

if TYPE_CHECKING:
    from distckpt.mindspore.values import Parameter, Tensor

__all__ = [
    "CheckpointConfig",
    "CheckpointFileNotFound",
    "ModelCheckpoint",
    "NetMismatch",
    "Parameter",
    "Parameters",
    "PendingSave",
    "Tensor",
    "build_searched_strategy",
    "load_checkpoint",
    "load_param_into_net",
    "merge_pipeline_strategys",
    "save_checkpoint",
    "transform_checkpoints",
]


def __getattr__(name: str) -> Any:
    if name in ("Tensor", "Parameter"):
        return getattr(values.real() or values, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
