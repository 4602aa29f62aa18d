"""Tensors and parameters: MindSpore's own where it is in use, light stand-ins where not."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np

from distckpt.errors import LayoutError
from distckpt.flat import as_array


def real() -> Any:
    """Return the ``mindspore`` module if the program has imported it, else None.

    Nothing is ever imported here behind the program's back.
    """
    module = sys.modules.get("mindspore")
    return module if hasattr(module, "Parameter") and hasattr(module, "nn") else None


class Tensor:
    """An array with the methods of ``mindspore.Tensor`` that checkpoints need.

    Args:
        input_data: An array, another tensor, a number, or nested lists of numbers. It is copied.
        dtype: A numpy dtype; by default an array's own. Python's floats become float32 and its
            ints int64, as MindSpore has it.

    Examples:
        >>> Tensor(10), Tensor(0.01).dtype
        (Tensor(shape=(), dtype=int64), dtype('float32'))
    """

    def __init__(self, input_data: object, dtype: object = None) -> None:
        array = to_array(input_data)
        self._array = np.array(array, dtype=np.dtype(dtype or array.dtype))  # type: ignore[call-overload]

    def asnumpy(self) -> np.ndarray:
        """Return the array itself, not a copy."""
        return self._array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self._array if dtype is None else self._array.astype(dtype)
        return array.copy() if copy else array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        return self._array.shape

    @property
    def dtype(self) -> np.dtype:
        """The numpy dtype."""
        return self._array.dtype

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self._array.ndim

    @property
    def size(self) -> int:
        """Number of elements."""
        return self._array.size

    def item(self) -> object:
        """Return the only element as a Python number."""
        return self._array.item()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype})"


class Parameter(Tensor):
    """A tensor that has a name, with the methods of ``mindspore.Parameter``.

    Args:
        default_input: As for `Tensor`.
        name: Its name.
        requires_grad: Whether training changes it. Not stored in files.
    """

    def __init__(
        self,
        default_input: object,
        name: str | None = None,
        requires_grad: bool = True,
    ) -> None:
        super().__init__(default_input)
        self.name = "Parameter" if name is None else name
        self.requires_grad = requires_grad

    @property
    def data(self) -> Parameter:
        """The parameter itself, as in MindSpore."""
        return self

    def set_data(self, data: object, slice_shape: bool = False) -> Parameter:
        """Take another value.

        Args:
            data: As for `Tensor`; of the same dtype.
            slice_shape: Whether it may have another shape.

        Raises:
            ValueError: Another shape.
            TypeError: Another dtype.
        """
        array = to_array(data)
        if array.shape != self.shape and not slice_shape:
            raise ValueError(f"{self.name!r} has shape {self.shape}; it can't take {array.shape}")
        if array.dtype != self.dtype:
            raise TypeError(f"{self.name!r} is {self.dtype}; it can't take {array.dtype}")
        self._array = array.copy()
        return self

    def __repr__(self) -> str:
        return f"Parameter(name={self.name!r}, shape={self.shape}, dtype={self.dtype})"


def is_parameter(value: object) -> bool:
    """Whether it is a parameter, a real one or a stand-in."""
    module = real()
    return isinstance(value, Parameter) or (
        module is not None and isinstance(value, module.Parameter)
    )


def to_array(value: object) -> np.ndarray:
    """View a tensor or an array as numpy; make an array of a number as MindSpore does.

    Raises:
        TypeError: It is neither, or a number that fits no such array.
    """
    if type(value).__name__ == "MapParameter":
        raise TypeError("a MapParameter is no array; export its keys and values as two tensors")
    if isinstance(value, (bool, int, float, list, tuple)) and not isinstance(value, np.generic):
        try:
            array = np.array(value)
        except ValueError as exc:
            raise TypeError(f"{value!r:.60} is no array: {exc}") from exc
        if array.dtype.kind not in "biuf":
            raise TypeError(f"{value!r:.60} is no array of numbers")
        return array.astype({"b": np.bool_, "f": np.float32}.get(array.dtype.kind, np.int64))
    found = as_array(value)
    if not isinstance(found, np.ndarray):
        raise TypeError(found if isinstance(found, str) else f"{value!r:.60} is not in memory")
    return found


def make_parameter(array: np.ndarray, name: str) -> Any:
    """Make a parameter of an array: a real one where MindSpore is in use."""
    module = real()
    if module is not None:
        try:
            return module.Parameter(module.Tensor(array), name=name)
        except (TypeError, ValueError, RuntimeError):
            pass  # MindSpore has no such dtype
    return Parameter(array, name)


def entries(state: Mapping[Any, object]) -> dict[str, np.ndarray | str]:
    """Take named values as arrays and texts.

    Raises:
        TypeError: Values that are neither, all of them.
    """
    found: dict[str, np.ndarray | str] = {}
    problems = []
    for name, value in state.items():
        if not isinstance(name, str):
            problems.append(f"{name!r} is no name: expected a str")
            continue
        try:
            found[name] = value if isinstance(value, str) else to_array(value)
        except (TypeError, OverflowError) as exc:
            problems.append(f"{name!r}: {exc}")
    if problems:
        raise TypeError(
            f"{len(problems)} values are no Parameter, Tensor, array, number or str:\n  "
            + "\n  ".join(problems)
        )
    return found


def named(items: list[Any]) -> dict[str, object]:
    """Read a list of parameters, or of ``{"name", "data"}`` dicts, as a dict.

    Raises:
        TypeError: It holds something else, or both kinds.
        LayoutError: Two of one name.
    """
    if all(map(is_parameter, items)):
        pairs = [(item.name, item) for item in items]
    elif all(isinstance(item, Mapping) and {"name", "data"} <= set(item) for item in items):
        pairs = [(item["name"], item["data"]) for item in items]
    else:
        kinds = sorted({type(item).__name__ for item in items})
        raise TypeError(
            'expected a list of Parameters, or a list of {"name": …, "data": …} dicts; found a '
            f"list of {', '.join(kinds)}"
        )
    counts = Counter(name for name, _ in pairs)
    twice = [str(name) for name, count in counts.items() if count > 1]
    if twice:
        raise LayoutError(
            f"{', '.join(map(repr, twice))}: several entries of the list have this name; only one "
            "of them would be in the file. Rename or remove the others"
        )
    return dict(pairs)


class Parameters(dict[str, Any]):
    """What `load_checkpoint` returns: name → Parameter or str, in the order of the file.

    It also takes what one does with a list of ``{"name", "data"}`` dicts, as MindSpore's tutorial
    has it: whole numbers are positions.

    Examples:
        >>> params = Parameters(a=Tensor(1), b=Tensor(2))
        >>> params.append({"name": "c", "data": Tensor(3)})
        >>> del params[0]
        >>> params[1]["data"] = Tensor(66)
        >>> params
        {'b': Tensor(shape=(), dtype=int64), 'c': Tensor(shape=(), dtype=int64)}
    """

    def __getitem__(self, key: str | int) -> Any:
        return Item(self, self._name(key)) if isinstance(key, int) else super().__getitem__(key)

    def __setitem__(self, key: str | int, value: Any) -> None:
        if isinstance(key, int):
            Item(self, self._name(key)).update(value)
        else:
            super().__setitem__(key, value)

    def __delitem__(self, key: str | int) -> None:
        super().__delitem__(self._name(key))

    def append(self, item: Mapping[str, Any]) -> None:
        """Add an entry at the end.

        Args:
            item: Its ``"name"`` and ``"data"``.

        Raises:
            LayoutError: There is one of this name already.
        """
        if item["name"] in self:
            raise LayoutError(f"{item['name']!r} is there already; set its data, or delete it")
        self[item["name"]] = item["data"]

    def _name(self, key: str | int) -> str:
        return list(self)[key] if isinstance(key, int) else key


class Item(MutableMapping[str, Any]):
    """One entry of `Parameters`, as a dict of ``"name"`` and ``"data"`` that writes through."""

    def __init__(self, owner: Parameters, name: str) -> None:
        self._owner = owner
        self._name = name

    def __getitem__(self, key: str) -> Any:
        return {"name": self._name, "data": self._owner[self._name]}[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "data":
            self._owner[self._name] = value
        elif key == "name" and (value == self._name or value not in self._owner):
            others = [(value if name == self._name else name, x) for name, x in self._owner.items()]
            self._owner.clear()
            self._owner.update(others)
            self._name = value
        else:
            raise KeyError(f"{key!r}: an entry has a name, that no other has, and data")

    def __delitem__(self, key: str) -> None:
        raise KeyError(f"{key!r}: an entry keeps its name and data; delete it as a whole")

    def __iter__(self) -> Any:
        return iter(("name", "data"))

    def __len__(self) -> int:
        return 2

    def __repr__(self) -> str:
        return repr(dict(self))
