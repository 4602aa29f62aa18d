"""MindSpore's door: tensors as numpy arrays, cells as nets. Imports no MindSpore itself."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from distckpt.errors import LayoutError


def is_tensor(value: object) -> bool:
    """Whether it is a MindSpore tensor or parameter."""
    mindspore = sys.modules.get("mindspore")
    return hasattr(mindspore, "Tensor") and isinstance(value, mindspore.Tensor)  # type: ignore[union-attr]


def is_module(value: object) -> bool:
    """Whether it is a ``mindspore.nn.Cell``."""
    mindspore = sys.modules.get("mindspore")
    return hasattr(mindspore, "nn") and isinstance(value, mindspore.nn.Cell)  # type: ignore[union-attr]


def as_array(tensor: Any) -> np.ndarray:
    """View a tensor as numpy.

    Raises:
        TypeError, RuntimeError: MindSpore refuses.
    """
    array = np.asarray(tensor.asnumpy())
    # MindSpore has a bfloat16 of its own, which numpy takes for another type than ml_dtypes' one.
    return array.view(ml_dtypes.bfloat16) if array.dtype.name == "bfloat16" else array


def as_net(cell: Any) -> CellNet:
    """Make a net of a ``mindspore.nn.Cell``."""
    return CellNet(cell)


class CellNet:
    """A ``mindspore.nn.Cell`` as a net: all its parameters, moving statistics among them.

    A parameter that is tied counts once, as in MindSpore's own checkpoints; names are the
    parameters' own, which an optimizer's cell has prefixed.

    Args:
        cell: The cell.

    Raises:
        LayoutError: Two parameters of one name.
    """

    def __init__(self, cell: Any) -> None:
        self._parameters: dict[str, Any] = {}
        for parameter in cell.get_parameters():
            if self._parameters.setdefault(parameter.name, parameter) is not parameter:
                raise LayoutError(
                    f"{parameter.name!r}: two parameters of this {type(cell).__name__} have this "
                    "name; give each its own (Parameter(name=), Cell.update_parameters_name)"
                )

    def tensors(self) -> Mapping[str, object]:
        """Name → parameter."""
        return self._parameters

    def assign(self, name: str, value: object) -> None:
        """Set the parameter of this name to an array of its shape and dtype.

        Raises:
            KeyError: No such name.
        """
        self._parameters[name].set_data(
            sys.modules["mindspore"].Tensor(np.ascontiguousarray(value))
        )
