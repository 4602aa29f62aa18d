"""`load_param_into_net`: named values into a net, all of them or none."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from distckpt import dtypes
from distckpt.errors import MatchError
from distckpt.leaves import Leaf
from distckpt.match import match
from distckpt.mindspore.values import Tensor, entries, named
from distckpt.net import Destination, Wanted, collect
from distckpt.state import FlatShard, Shard

logger = logging.getLogger(__name__)

Prefixes = str | Sequence[str] | None

# MindSpore's buffers of accumulated gradients, which no checkpoint is expected to hold.
_NEVER_MISSED = "accu_grads"


class NetMismatch(MatchError, RuntimeError):
    """Shapes, dtypes or values don't fit the net. MindSpore raises a RuntimeError for it."""


def load_param_into_net(
    net: object,
    parameter_dict: Mapping[str, Any] | list[Any],
    strict_load: bool = False,
    remove_redundancy: bool = False,
    *,
    filter_prefix: Prefixes = None,
) -> tuple[list[str], list[str]]:
    """Load parameters into a net: all that match, or, where one doesn't fit, none.

    Names match as in `distckpt.match`: exactly, and unless `strict_load` by suffix in both
    directions. A shape with more trailing dimensions, all 1, is accepted, and the net's shape
    stays. Texts are no parameters, and left out. Not collective.

    Args:
        net: A ``mindspore.nn.Cell``, nested dicts, lists and dataclasses of arrays, or whatever
            else `distckpt.load_into` fills in place.
        parameter_dict: What `load_checkpoint` returned: name → Parameter, Tensor, array or str; or
            a list of Parameters or of ``{"name", "data"}`` dicts.
        strict_load: Exact names only, and nothing is converted. Missing names don't raise.
        remove_redundancy: Must be False; see `load_checkpoint`.
        filter_prefix: A prefix or several: parameters that start with one are left out.

    Returns:
        The net's names that nothing was loaded into, and the names that were not used.

    Raises:
        MatchError: Names match in more than one way; the net is unchanged.
        NetMismatch: Shapes, dtypes or values that don't fit, all of them; the net is unchanged.
        TypeError: An argument is of the wrong type.
        ValueError: An empty prefix.
    """
    check_flags(strict_load=strict_load)
    refuse_redundancy(remove_redundancy=remove_redundancy)
    state = named(parameter_dict) if isinstance(parameter_dict, list) else parameter_dict
    if not isinstance(state, Mapping):
        raise TypeError(
            f"parameter_dict is a {type(state).__name__}; expected what load_checkpoint returns"
        )
    kept = keep_names(state, filter_prefix=filter_prefix)
    saved = entries({name: state[name] for name in kept})
    arrays = {name: value for name, value in saved.items() if isinstance(value, np.ndarray)}
    wanted = collect(net)
    pairs, missing = _match(list(arrays), wanted.names, strict=strict_load)
    _assign(wanted, {name: arrays[source] for name, source in pairs.items()}, strict=strict_load)
    used = set(pairs.values())
    by_suffix = [f"{name} (from {found})" for name, found in pairs.items() if name != found]
    told = [f"not loaded: {', '.join(missing)}"] if missing else []
    told += [f"matched by suffix: {', '.join(by_suffix)}"] if by_suffix else []
    if told:
        logger.warning("load_param_into_net: of the net's parameters, %s", "; ".join(told))
    return missing, [name for name in saved if name not in used]


def _match(
    saved: list[str], wanted: list[str], *, strict: bool
) -> tuple[dict[str, str], list[str]]:
    """Return wanted → saved, and what is missing. Strict looks for exact names, and misses some."""
    if strict:
        wanted_and_saved = set(wanted) & set(saved)
        pairs = {name: name for name in wanted if name in wanted_and_saved}
    else:
        pairs = match(saved, wanted).pairs
    missing = [name for name in wanted if name not in pairs and not name.startswith(_NEVER_MISSED)]
    return pairs, missing


def _assign(wanted: Wanted, values: Mapping[str, np.ndarray], *, strict: bool) -> None:
    """Check all, then assign all."""
    targets = [each for each in wanted.destinations if each.tensor.name in values]
    plain = [leaf for name, leaf in wanted.values.items() if name in values]
    problems: dict[str, str] = {}
    for each in targets:
        name = each.tensor.name
        problem = _problem(each, values[name], strict=strict)
        if problem:
            problems[name] = problem
    for leaf in plain:
        if _as_plain(leaf.value, values[leaf.name]) is None:
            problems[leaf.name] = (
                f"wants a {type(leaf.value).__name__}, saved is "
                f"{values[leaf.name].dtype} of shape {values[leaf.name].shape}"
            )
    leaves = [each.tensor.leaf for each in targets if not each.in_place] + plain
    problems |= dict.fromkeys(_fixed(wanted, leaves), "lies in an immutable container")
    if problems:
        raise NetMismatch(
            f"{len(problems)} parameters do not fit the net; nothing was loaded:\n  "
            + "\n  ".join(f"{name!r}: {what}" for name, what in problems.items())
            + "\nLeave them out with filter_prefix=, or build the net that was saved.",
            mismatched=problems,
        )
    for each in targets:
        _put(each, values[each.tensor.name])
    for leaf in plain:
        leaf.replace(_as_plain(leaf.value, values[leaf.name]))


def _problem(target: Destination, array: np.ndarray, *, strict: bool) -> str | None:
    """Say why an array doesn't fit a tensor of the net; None if it does."""
    tensor = target.tensor
    if isinstance(tensor.leaf.value, (Shard, FlatShard)):
        return "is a piece of a tensor on this rank; use distckpt.load_into"
    rank = len(tensor.shape)
    if array.shape[:rank] != tensor.shape or any(extent != 1 for extent in array.shape[rank:]):
        return f"wants shape {tensor.shape}, saved is {array.shape}"
    saved = dtypes.find(array.dtype)
    if saved is None or (strict and saved != tensor.dtype):
        why = "strict_load=True never converts" if strict else "no dtype of a checkpoint"
        return f"wants {tensor.dtype.name}, saved is {array.dtype} ({why})"
    if saved == tensor.dtype:
        return None
    if not dtypes.can_convert(saved, tensor.dtype):
        return (
            f"wants {tensor.dtype.name}, saved is {saved.name}; only floats are converted to "
            "floats, and signed integers to signed integers"
        )
    lost = dtypes.count_lost(array, tensor.dtype) if dtypes.is_narrowing(saved, tensor.dtype) else 0
    return f"{lost} of {array.size} values do not fit {tensor.dtype.name}" if lost else None


def _put(target: Destination, array: np.ndarray) -> None:
    """Convert an array, and put it in place."""
    leaf, shape = target.tensor.leaf, target.tensor.shape
    if isinstance(leaf.value, Tensor):
        np.copyto(leaf.value.asnumpy(), array.reshape(shape), casting="unsafe")
    else:
        target.targets[0].put(target.targets[0].region.start, array.reshape(shape))


def _as_plain(old: object, array: np.ndarray) -> Any:
    """Take a single element as a plain value of the old one's type; None if it is of no such."""
    kinds = {bool: "b", int: "iu", float: "f"}
    if type(old) not in kinds or array.size != 1:
        return None
    fits = array.dtype.kind in kinds[type(old)] or (
        isinstance(old, float) and array.dtype.name == "bfloat16"
    )
    if not fits:
        return None
    kind: Any = type(old)
    return kind(array.item())


def _fixed(wanted: Wanted, leaves: Iterable[Leaf]) -> list[str]:
    """Name the leaves that can't be replaced where they are."""
    for leaf in leaves:
        if leaf.net is None and not isinstance(leaf.value, Tensor):
            leaf.replace(leaf.value)  # no change; in an immutable container it is only noted
    fixed = list(wanted.flat.changes)
    wanted.flat.changes.clear()
    return fixed


def keep_names(
    names: Iterable[str],
    *,
    filter_prefix: Prefixes = None,
    specify_prefix: Prefixes = None,
) -> list[str]:
    """Keep the names that begin with one of the one, and with none of the other.

    Raises:
        TypeError: A prefix is no str, nor a list or tuple of them.
        ValueError: An empty prefix, or none in a list; or nothing is left.
    """
    dropped = _prefixes("filter_prefix", filter_prefix)
    wanted = _prefixes("specify_prefix", specify_prefix)
    names = list(names)
    kept = [
        name
        for name in names
        if not (dropped and name.startswith(dropped)) and (not wanted or name.startswith(wanted))
    ]
    if names and not kept:
        raise ValueError(
            f"filter_prefix={filter_prefix!r}, specify_prefix={specify_prefix!r} leave none of the "
            f"{len(names)} names: {', '.join(map(repr, names[:20]))}"
        )
    return kept


def _prefixes(argument: str, value: Prefixes) -> tuple[str, ...]:
    if value is None:
        return ()
    prefixes = (value,) if isinstance(value, str) else value
    if not isinstance(prefixes, (tuple, list)) or any(not isinstance(p, str) for p in prefixes):
        raise TypeError(f"{argument}={value!r}: expected a str, or a list or tuple of str")
    if not prefixes or "" in prefixes:
        raise ValueError(f"{argument}={value!r}: an empty prefix, or no prefix in a list")
    return tuple(prefixes)


def check_flags(**flags: object) -> None:
    """Refuse what is no bool.

    Raises:
        TypeError: One isn't.
    """
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}={value!r}: expected True or False")


def refuse_redundancy(*, remove_redundancy: object) -> None:
    """Refuse MindSpore's removal of redundancy, which needs its own distributed training.

    Raises:
        TypeError: It is asked for, or is no bool.
    """
    check_flags(remove_redundancy=remove_redundancy)
    if remove_redundancy:
        raise TypeError(
            "remove_redundancy=True: this file is one rank's alone. distckpt.save stores what "
            "several ranks hold once; folders of de-duplicated files open with distckpt.open"
        )
