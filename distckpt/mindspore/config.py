"""When `ModelCheckpoint` saves, and which files it keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distckpt.mindspore.nets import check_flags, refuse_redundancy
from distckpt.mindspore.options import FileOptions, is_async
from distckpt.mindspore.values import to_array

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
        format: ``"ckpt"`` or ``"safetensors"``.
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
        self.options = FileOptions(format, enc_key, enc_mode, crc_check)

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
        """``"ckpt"`` or ``"safetensors"``."""
        return self.options.format

    def get_checkpoint_policy(self) -> dict[str, object]:
        """Return when it saves, what it keeps, and the net that it saves."""
        return {
            "save_checkpoint_steps": self.save_checkpoint_steps,
            "save_checkpoint_seconds": self.save_checkpoint_seconds,
            "keep_checkpoint_max": self.keep_checkpoint_max,
            "keep_checkpoint_per_n_minutes": self.keep_checkpoint_per_n_minutes,
            "saved_network": self.saved_network,
        }

    def entries(self, *, epoch: int, step: int) -> dict[str, Any]:
        """Return what is appended to a file of this epoch and step."""
        counters = {"epoch_num": epoch, "step_num": step}
        return {
            name: counters[name] + value if name in counters else value
            for name, value in (self.append_dict or {}).items()
        }


def is_due(
    *, steps: int | None, seconds: float | None, steps_since: int, seconds_since: float
) -> bool:
    """Whether to save, so many steps and seconds after the last save; steps count before seconds.

    Examples:
        >>> is_due(steps=10, seconds=None, steps_since=10, seconds_since=0)
        True
        >>> is_due(steps=None, seconds=60, steps_since=10, seconds_since=59)
        False
    """
    return steps_since >= steps if steps else bool(seconds) and seconds_since >= (seconds or 0)


def kept(times_s: Sequence[float], *, count: int | None, minutes: float | None) -> set[int]:
    """Return which files to keep, by index; the newest always.

    Args:
        times_s: When each was saved, in seconds, ascending.
        count: Keep so many of the newest; counts before the minutes.
        minutes: Keep the oldest file; then each that is at least so long after the one kept before.

    Examples:
        >>> sorted(kept([0, 30, 60, 90, 130], count=2, minutes=None))
        [3, 4]
        >>> sorted(kept([0, 30, 60, 90, 130], count=None, minutes=1))
        [0, 2, 4]
    """
    newest = len(times_s) - 1
    if count:
        return set(range(max(0, newest + 1 - count), newest + 1))
    found = {newest} if times_s else set()
    last: float | None = None
    for index, time_s in enumerate(times_s):
        if last is None or time_s - last >= 60 * (minutes or 0):
            found.add(index)
            last = time_s
    return found


def _check_number(name: str, number: object) -> None:
    if number is None:
        return
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{name}={number!r}: expected an int or None")
    if number < 0:
        raise ValueError(f"{name}={number}: expected 0 or more")


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
