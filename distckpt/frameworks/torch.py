"""PyTorch's door: tensors as numpy arrays, modules and optimizers as nets. Imports no torch itself.

Whatever is asked here about a value that isn't torch's is answered without torch: a value can be
torch's only where somebody has imported it already.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from distckpt import dtypes
from distckpt.errors import LayoutError

# Integers of the same width, through which the dtypes go that torch and numpy don't exchange.
_BITS: dict[int, np.dtype] = {1: np.dtype("u1"), 2: np.dtype("<i2")}
_PLAIN = (int, float, str, bytes, type(None))


def is_tensor(value: object) -> bool:
    """Whether it is a torch tensor, also of a derived class."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_module(value: object) -> bool:
    """Whether `as_net` takes it: a ``torch.nn.Module`` or a ``torch.optim.Optimizer``."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, (torch.nn.Module, torch.optim.Optimizer))


# ------------------------------------------------------------------------------------------ tensors


def as_array(tensor: Any) -> np.ndarray:
    """View a tensor as numpy, also of a dtype that torch's own conversion refuses.

    Args:
        tensor: Any strided tensor. Gradients are left out.

    Returns:
        It shares the tensor's memory where `in_place` says so; else it is a copy.

    Raises:
        TypeError: It has no such array: a sparse, quantized, nested or distributed one, one
            without memory, or one of a dtype that numpy and ml_dtypes lack.
        RuntimeError: torch couldn't copy it to the CPU.
    """
    problem = _problem(tensor)
    if problem:
        raise TypeError(problem)
    plain = tensor.detach().cpu().resolve_conj().resolve_neg()
    entry = _numpy_lacks(plain.dtype)
    if entry is None:
        return np.asarray(plain.numpy())
    torch = sys.modules["torch"]
    bits = {1: torch.uint8, 2: torch.int16}[entry.itemsize]
    return np.asarray(plain.view(bits).numpy()).view(dtype=entry.numpy)


def from_array(array: np.ndarray) -> Any:
    """View an array as a tensor on the CPU; copies only what torch can't view.

    Raises:
        TypeError: torch has no such dtype.
    """
    torch = sys.modules["torch"]
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if not array.flags.writeable or min(array.strides, default=0) < 0:
        array = array.copy()
    entry = dtypes.find(array.dtype)
    if entry is None or not hasattr(ml_dtypes, entry.name):
        return torch.from_numpy(array)
    if not hasattr(torch, entry.name):
        raise TypeError(f"torch has no dtype {entry.name}")
    return torch.from_numpy(array.view(_BITS[entry.itemsize])).view(getattr(torch, entry.name))


def in_place(tensor: Any) -> bool:
    """Whether what is written to `as_array`'s result arrives in the tensor."""
    return (
        _problem(tensor) is None
        and tensor.device.type == "cpu"
        and not tensor.is_conj()
        and not tensor.is_neg()
        # An expanded tensor has several elements in one place.
        and all(
            step or extent in {0, 1}
            for step, extent in zip(tensor.stride(), tensor.shape, strict=True)
        )
    )


def put(tensor: Any, array: np.ndarray) -> None:
    """Copy an array into a tensor where it is, on any device; gradients know nothing of it.

    Raises:
        ValueError: The shapes differ.
        TypeError, RuntimeError: torch refuses.
    """
    if tuple(tensor.shape) != array.shape:
        raise ValueError(f"an array of shape {array.shape} for a tensor of {tuple(tensor.shape)}")
    with sys.modules["torch"].no_grad():
        tensor.copy_(from_array(array))


def _problem(tensor: Any) -> str | None:
    """Say why a tensor has no array; None if it may have one."""
    torch = sys.modules["torch"]
    if torch.nn.parameter.is_lazy(tensor):
        return "a lazy parameter has no shape yet; run the module once before"
    if hasattr(tensor, "__tensor_flatten__"):
        kind = type(tensor).__name__
        return f"a {kind} is made of other tensors; hand in those, each rank's as a Shard"
    if tensor.is_nested or tensor.layout is not torch.strided:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        return f"a {kind} tensor is no array; hand in its parts, or to_dense()"
    if tensor.is_quantized:
        return "a quantized tensor is no array; hand in its int_repr(), scale and zero point"
    if tensor.is_meta:
        return "a tensor on the meta device has no memory; use to_empty(device=...) before"
    return None


def _numpy_lacks(dtype: object) -> dtypes.Dtype | None:
    """Find the entry of a dtype that ml_dtypes has and numpy has not."""
    name = str(dtype).removeprefix("torch.")
    if not name.startswith(("bfloat", "float8")) or not hasattr(ml_dtypes, name):
        return None
    return dtypes.BY_NAME.get(name)


# --------------------------------------------------------------------------------------------- nets


def as_net(owner: Any) -> ModuleNet | OptimizerNet:
    """Make a net of a ``torch.nn.Module`` or a ``torch.optim.Optimizer``."""
    torch = sys.modules["torch"]
    return OptimizerNet(owner) if isinstance(owner, torch.optim.Optimizer) else ModuleNet(owner)


class ModuleNet:
    """A ``torch.nn.Module`` as a net.

    It has the names of ``module.state_dict()``: parameters, persistent buffers, and the extra state
    of modules that have one. The module is walked here and no hook of it runs. What is tied has
    all its names, as in a state_dict: so it loads wherever one of them is wanted.

    Args:
        module: The module; its tensors are looked up at each call.
    """

    shares_memory = True

    def __init__(self, module: Any) -> None:
        self._module = module

    def tensors(self) -> Mapping[str, object]:
        """Name → detached tensor that shares the module's memory, or plain value.

        Raises:
            LayoutError: A module's extra state is neither.
        """
        return {name: get() for name, get, _ in self._entries()}

    def assign(self, name: str, value: object) -> None:
        """Copy an array into the parameter or buffer of this name, or set an extra state.

        Raises:
            KeyError: No such name.
            ValueError: Another shape.
        """
        put_in_place = {entry: put_there for entry, _, put_there in self._entries()}
        put_in_place[name](value)

    def _entries(self) -> Iterator[tuple[str, Callable[[], object], Callable[[Any], None]]]:
        """Yield (name, how to get it, how to put another in place) in the order of a state_dict."""
        torch = sys.modules["torch"]
        for prefix, module in self._module.named_modules(remove_duplicate=False):
            dot = f"{prefix}." if prefix else ""
            hidden = module._non_persistent_buffers_set  # noqa: SLF001  state_dict's own rule
            buffers = {key: at for key, at in module._buffers.items() if key not in hidden}  # noqa: SLF001
            for key, tensor in {**module._parameters, **buffers}.items():  # noqa: SLF001
                if tensor is not None:
                    yield dot + key, partial(_detached, tensor), partial(put, tensor)
            if type(module).get_extra_state is not torch.nn.Module.get_extra_state:
                name = f"{dot}_extra_state"
                yield name, partial(_extra_state, module, name), module.set_extra_state


class OptimizerNet:
    """A ``torch.optim.Optimizer`` as a net, with the names of its state_dict.

    These are ``state.<number of the parameter>.<key>`` and ``param_groups.<number>.<key>``; a tuple
    such as Adam's ``betas`` has a name an entry. An optimizer that has made no step has no state
    yet, and nothing would be loaded into it: see `make_state`.

    Args:
        optimizer: The optimizer.
    """

    shares_memory = True

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def tensors(self) -> Mapping[str, object]:
        """Name → detached tensor that shares the optimizer's memory, or plain value."""
        return {
            ".".join(map(str, path)): _detached(value) if is_tensor(value) else value
            for path, value in self._leaves()
        }

    def assign(self, name: str, value: object) -> None:
        """Copy an array into the tensor of this name, or set the plain value.

        Raises:
            KeyError: No such name.
            ValueError: Another shape.
        """
        paths = {".".join(map(str, path)): (path, found) for path, found in self._leaves()}
        path, found = paths[name]
        if is_tensor(found):
            put(found, np.asarray(value))
            return
        kind, number, key, *index = path
        owner = self._groups()[number] if kind == "param_groups" else self._states()[number]
        if index:
            items = [*owner[key]]
            items[index[0]] = value
            owner[key] = type(owner[key])(items)
        else:
            owner[key] = value

    def _groups(self) -> list[dict[str, Any]]:
        return list(self._optimizer.param_groups)

    def _states(self) -> dict[int, dict[str, Any]]:
        parameters = [parameter for group in self._groups() for parameter in group["params"]]
        state = self._optimizer.state
        return {n: state[each] for n, each in enumerate(parameters) if each in state}

    def _leaves(self) -> Iterator[tuple[tuple[Any, ...], Any]]:
        for number, state in self._states().items():
            yield from _below(("state", number), state)
        for number, group in enumerate(self._groups()):
            rest = {key: value for key, value in group.items() if key != "params"}
            yield from _below(("param_groups", number), rest)


def make_state(optimizer: Any) -> None:
    """Make the state that an optimizer's first step makes, so that it can be loaded into.

    The step is made with gradients of zero and a learning rate of zero; parameters, gradients and
    learning rates are as before afterwards.

    Args:
        optimizer: A new ``torch.optim.Optimizer``; one that has a state already is left as it is.
    """
    if optimizer.state:
        return
    torch = sys.modules["torch"]
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    kept = [each.detach().clone() for each in parameters]
    gradients = [each.grad for each in parameters]
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        for each in parameters:
            if each.requires_grad:
                each.grad = torch.zeros_like(each)
        for group in optimizer.param_groups:
            group["lr"] = torch.zeros_like(rate) if is_tensor(rate := group["lr"]) else 0.0
        optimizer.step()
    finally:
        with torch.no_grad():
            for each, gradient, before in zip(parameters, gradients, kept, strict=True):
                each.copy_(before)
                each.grad = gradient
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def _below(
    path: tuple[Any, ...], entries: Mapping[str, Any]
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    for key, value in entries.items():
        if isinstance(value, (tuple, list)):
            yield from (((*path, key, index), item) for index, item in enumerate(value))
        else:
            yield (*path, key), value


def _detached(tensor: Any) -> Any:
    # What is lazy or spread out isn't touched; `as_array` refuses it.
    return tensor if _problem(tensor) else tensor.detach()


def _extra_state(module: Any, name: str) -> object:
    state = module.get_extra_state()
    if not isinstance(state, _PLAIN) and not is_tensor(state):
        raise LayoutError(
            f"{name!r}: the extra state of a {type(module).__name__} is a {type(state).__name__}; "
            "only a tensor or a plain value (int, float, bool, str, bytes, None) can be stored"
        )
    return state
