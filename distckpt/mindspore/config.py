"""When `ModelCheckpoint` saves, and which files it keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distckpt.mindspore.nets import check_flags, refuse_redundancy
from distckpt.mindspore.options import MANAGED, FileOptions, is_async
from distckpt.mindspore.values import to_array
from distckpt.policy import EverySeconds, KeepEvery, KeepLast, KeepPolicy, Moment, SavePolicy

_COUNTERS = ("epoch_num", "step_num")


class CheckpointConfig:
    """What MindSpore's class of this name holds: when to save, what, and how much to keep.

    Args:
        save_checkpoint_steps: Save every so many steps; counts before the seconds.
        save_checkpoint_seconds: Save when so many seconds have passed since the last save.
        keep_checkpoint_max: How many files to keep; counts before the minutes.
        keep_checkpoint_per_n_minutes: Keep one file for each so many minutes, and the newest.
        integrated_save: Accepted; arrays are whole here.
        async_save: Whether to write in the background; see `save_checkpoint`.
        saved_network: What to save in place of the net that is trained (the net without its
            optimizer, say): anything that `save_checkpoint` takes.
        append_info: ``"epoch_num"``, ``"step_num"``, and at most one dict of further entries.
        enc_key: Encrypts the files.
        enc_mode: How.
        exception_save: Whether to save when the training ends with an exception.
        crc_check: Whether to write checksums.
        remove_redundancy: Must be False.
        format: ``"ckpt"`` or ``"safetensors"``; or ``"distckpt"``: checkpoints of all ranks
            together, by a `distckpt.Manager`, without `append_info`'s tensors, `exception_save` and
            what is a file's.
        **kwargs: MindSpore's ``incremental`` and ``enable_redundance``, which must be False.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A negative number; nothing that says when to save or what to keep; options that
            exclude each other.
    """

    def __init__(
        self,
        save_checkpoint_steps: int | None = 1,
        save_checkpoint_seconds: int | None = 0,
        keep_checkpoint_max: int | None = 5,
        keep_checkpoint_per_n_minutes: int | None = 0,
        integrated_save: bool = True,
        async_save: bool | str = False,
        saved_network: object = None,
        append_info: Sequence[str | Mapping[str, Any]] | None = None,
        enc_key: bytes | None = None,
        enc_mode: str = "AES-GCM",
        exception_save: bool = False,
        crc_check: bool = False,
        remove_redundancy: bool = False,
        format: str = "ckpt",
        **kwargs: bool,
    ) -> None:
        numbers = {
            "save_checkpoint_steps": save_checkpoint_steps,
            "save_checkpoint_seconds": save_checkpoint_seconds,
            "keep_checkpoint_max": keep_checkpoint_max,
            "keep_checkpoint_per_n_minutes": keep_checkpoint_per_n_minutes,
        }
        for name, number in numbers.items():
            _check_number(name, number)
        if not any(numbers.values()):
            raise ValueError(f"{', '.join(numbers)} are all None or 0; one must say something")
        check_flags(integrated_save=integrated_save, exception_save=exception_save, **kwargs)
        refuse_redundancy(remove_redundancy=remove_redundancy)
        if set(kwargs) - {"incremental", "enable_redundance"} or any(kwargs.values()):
            raise TypeError(f"CheckpointConfig can't do {kwargs}")
        if format == "safetensors" and (exception_save or enc_mode != "AES-GCM"):
            raise ValueError("format='safetensors' goes with neither exception_save nor enc_mode")
        is_async(async_save)
        self.save_checkpoint_steps = save_checkpoint_steps
        self.save_checkpoint_seconds = None if save_checkpoint_steps else save_checkpoint_seconds
        self.keep_checkpoint_max = keep_checkpoint_max
        self.keep_checkpoint_per_n_minutes = (
            None if keep_checkpoint_max else keep_checkpoint_per_n_minutes
        )
        if not keep_checkpoint_max and not keep_checkpoint_per_n_minutes:
            self.keep_checkpoint_max = 1
        self.integrated_save = integrated_save
        self.async_save = async_save
        self.saved_network = saved_network
        self.append_dict = _append_dict(append_info)
        self.exception_save = exception_save
        self.managed = format == MANAGED
        if self.managed:
            _check_managed(
                self.append_dict,
                enc_key=enc_key,
                crc_check=crc_check,
                exception_save=exception_save,
            )
        self.options = FileOptions("ckpt" if self.managed else format, enc_key, enc_mode, crc_check)

    @property
    def enc_key(self) -> bytes | None:
        """The key, or None."""
        return self.options.key

    @property
    def enc_mode(self) -> str:
        """How files are encrypted."""
        return self.options.mode

    @property
    def crc_check(self) -> bool:
        """Whether checksums are written."""
        return self.options.crc

    @property
    def format(self) -> str:
        """``"ckpt"``, ``"safetensors"`` or ``"distckpt"``."""
        return MANAGED if self.managed else self.options.format

    def get_checkpoint_policy(self) -> dict[str, object]:
        """Return when it saves, what it keeps, and the net that it saves."""
        return {
            "save_checkpoint_steps": self.save_checkpoint_steps,
            "save_checkpoint_seconds": self.save_checkpoint_seconds,
            "keep_checkpoint_max": self.keep_checkpoint_max,
            "keep_checkpoint_per_n_minutes": self.keep_checkpoint_per_n_minutes,
            "saved_network": self.saved_network,
        }

    def save_policy(self) -> SavePolicy | None:
        """Return when to save, as a policy of the Manager's; never but at the end, if None."""
        if self.save_checkpoint_steps:
            return StepsSince(self.save_checkpoint_steps)
        seconds = self.save_checkpoint_seconds
        return EverySeconds(seconds) if seconds else None

    def keep_policy(self) -> KeepPolicy:
        """Return what to keep, as a policy of the Manager's."""
        if self.keep_checkpoint_max:
            return KeepLast(self.keep_checkpoint_max)
        return KeepEvery(seconds=60 * (self.keep_checkpoint_per_n_minutes or 0))

    def entries(self, *, epoch: int, step: int) -> dict[str, Any]:
        """Return what is appended to a file of this epoch and step."""
        counters = {"epoch_num": epoch, "step_num": step}
        return {
            name: counters[name] + value if name in counters else value
            for name, value in (self.append_dict or {}).items()
        }


@dataclass(frozen=True, slots=True)
class StepsSince:
    """A policy: save so many steps after the last save, whatever their numbers.

    Attributes:
        steps: How many.

    Examples:
        >>> StepsSince(10).due(Moment(25, 0.0, last_step=14)), StepsSince(10).due(Moment(9, 0.0))
        (True, False)
    """

    steps: int

    def due(self, moment: Moment) -> bool:
        """See `distckpt.policy.SavePolicy`."""
        return moment.step - (moment.last_step or 0) >= self.steps


def _check_number(name: str, number: object) -> None:
    if number is None:
        return
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{name}={number!r}: expected an int or None")
    if number < 0:
        raise ValueError(f"{name}={number}: expected 0 or more")


def _check_managed(append_dict: Mapping[str, Any] | None, **options: object) -> None:
    """Refuse what a checkpoint of all ranks does not have.

    Raises:
        ValueError: Any of it is asked for.
    """
    asked = [name for name, value in options.items() if value]
    asked += [
        f"append_info's {name!r}, which is no number or text"
        for name, value in (append_dict or {}).items()
        if not isinstance(value, (int, float, str))
    ]
    if asked:
        raise ValueError(f"format={MANAGED!r} does not go with {', '.join(asked)}")


def _append_dict(
    append_info: Sequence[str | Mapping[str, Any]] | None,
) -> dict[str, Any] | None:
    if not append_info:
        return None
    if not isinstance(append_info, list):
        raise TypeError(f"append_info is a {type(append_info).__name__}; expected a list")
    found: dict[str, Any] = {name: 0 for name in _COUNTERS if name in append_info}
    dicts = [element for element in append_info if isinstance(element, Mapping)]
    if len(dicts) > 1:
        raise TypeError(f"append_info holds {len(dicts)} dicts; expected at most one")
    for element in append_info:
        if isinstance(element, str) and element not in _COUNTERS:
            raise ValueError(f"append_info: {element!r} is none of {', '.join(_COUNTERS)}")
        if not isinstance(element, (str, Mapping)):
            raise TypeError(f"append_info: {element!r} is neither a str nor a dict")
    for name, value in (dicts[0] if dicts else {}).items():
        if not isinstance(name, str):
            raise TypeError(f"append_info: the key {name!r} is no str")
        if not isinstance(value, str):
            to_array(value)
        found[name] = value
    return found
