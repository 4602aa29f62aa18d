"""`ModelCheckpoint`: saves while a net is trained, and keeps what the configuration says."""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from distckpt.errors import CheckpointError, text
from distckpt.formats.base import Place
from distckpt.mindspore.background import PendingSave
from distckpt.mindspore.config import CheckpointConfig, is_due, kept
from distckpt.mindspore.options import is_async, place_to_write
from distckpt.mindspore.progress import Progress, free_prefix
from distckpt.mindspore.saving import save_file
from distckpt.mindspore.values import real
from distckpt.store import open_store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Written:
    """A file that a callback has written.

    Attributes:
        place: Where.
        time_s: When, by the callback's clock.
    """

    place: Place
    time_s: float


class ModelCheckpoint:
    """Saves a net while it is trained, under MindSpore's ``Model.train`` or in a plain loop.

    Files are called ``<prefix>-<epoch>_<step in the epoch>.ckpt``. Where there are such files
    already, the prefix becomes ``<prefix>_1``, ``<prefix>_2``, …: an earlier run's are left alone,
    and so is everything that this object has not written itself. Old files are deleted when a newer
    one is durable.

    In a plain loop, count as follows, or give the numbers. Use it as a context manager if
    ``exception_save`` is wanted::

        with ModelCheckpoint(prefix="lenet", directory="ckpt", config=config) as callback:
            for epoch in range(epochs):
                for batch in batches:
                    train(net, batch)
                    callback.step_end(net=net)
                callback.epoch_end(net=net)
            callback.end(net=net)

    Where the program has imported MindSpore, an object of this class is a
    ``mindspore.train.Callback``, too.

    Args:
        prefix: Begins the files' names, without ``/``; or a callable, called with the training's
            state (``cur_epoch_num``, ``cur_step_num``, ``train_network``) before each save, that
            returns the whole name without its ending.
        directory: A folder, any URL that fsspec knows, or a callable that returns one; the current
            folder by default.
        config: When to save, and what to keep.
        saved_network: In place of the configuration's.
        async_save: In place of the configuration's.
        clock: Seconds, for the policies that count time.

    Raises:
        TypeError: `config` is no `CheckpointConfig`.
        ValueError: A prefix with ``/``.
    """

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        """Make it a callback of MindSpore's where the program uses MindSpore."""
        del args, kwargs
        module = real()
        if module is None or not hasattr(module, "train"):
            return super().__new__(cls)
        callback = module.train.Callback
        kind: Any = cls if issubclass(cls, callback) else _derived(cast("Any", cls), callback)
        return cast("Self", super().__new__(kind))

    def __init__(
        self,
        prefix: str | Callable[[Any], str] = "CKP",
        directory: str | os.PathLike[str] | Callable[[Any], str] | None = None,
        config: CheckpointConfig | None = None,
        *,
        saved_network: object = None,
        async_save: bool | str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if config is not None and not isinstance(config, CheckpointConfig):
            raise TypeError(f"config is a {type(config).__name__}; expected a CheckpointConfig")
        self._config = copy.copy(config) if config is not None else CheckpointConfig()
        if saved_network is not None:
            self._config.saved_network = saved_network
        if async_save is not None:
            self._config.async_save = async_save
        self._prefix = prefix if callable(prefix) else _checked(prefix)
        self._directory = directory if callable(directory) else _made(directory or Path.cwd())
        if isinstance(self._prefix, str) and isinstance(self._directory, str):
            self._prefix = free_prefix(self._prefix, open_store(self._directory).names())
        self._clock = clock
        self._last_time_s = clock()
        self._saved_step = 0
        self._progress = Progress()
        self._epoch_is_over = False
        self._context: Any = None  # MindSpore's own, while it drives
        self._written: list[Written] = []
        self._latest = ""
        self._pending: PendingSave | None = None

    @property
    def latest_ckpt_file_name(self) -> str:
        """Path of the newest file that is durable; empty before the first."""
        return self._latest

    # ----------------------------------------------------------------------------- what drives it

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        del kind, traceback
        if error is None or not self._config.exception_save:
            return
        # What ended the training is what the user must see: whatever fails now is only noted.
        try:
            self._wait()
        except Exception as exc:  # noqa: BLE001
            error.add_note(f"an asynchronous save before failed: {text(exc)}")
        try:
            if self._context is not None:
                self._progress = Progress.of(self._context)
            if self._saved_net is not None:
                self._save(ending="_breakpoint")
        except Exception as exc:  # noqa: BLE001
            error.add_note(f"exception_save=True: the save failed, too: {text(exc)}")

    def begin(self, run_context: Any) -> None:
        """Note what MindSpore trains; it counts steps from 1 each time."""
        self._context = run_context
        self._saved_step = 0

    def step_end(
        self,
        run_context: Any = None,
        *,
        net: object = None,
        step: int | None = None,
        epoch: int | None = None,
    ) -> PendingSave | None:
        """Count a step, and save if it is time.

        Args:
            run_context: MindSpore's; then nothing else is needed.
            net: The net; the last one given by default.
            step: Number of the step since the training began, from 1; the next by default.
            epoch: Number of the epoch, from 1; by default one more than `epoch_end` was called.

        Returns:
            The save in flight if one was begun that is asynchronous, else None.

        Raises:
            CheckpointError: It can't be saved, or the asynchronous save before failed.
        """
        self._advance(run_context, net, step=step, epoch=epoch)
        progress = self._progress
        due = is_due(
            steps=self._config.save_checkpoint_steps,
            seconds=self._config.save_checkpoint_seconds,
            steps_since=progress.cur_step_num - self._saved_step,
            seconds_since=self._clock() - self._last_time_s,
        )
        return self._save() if due and progress.cur_step_num != self._saved_step else None

    def epoch_end(
        self,
        run_context: Any = None,
        *,
        net: object = None,
        epoch: int | None = None,
    ) -> PendingSave | None:
        """Note that an epoch is over: what follows belongs to the next one.

        In a loop that doesn't call `step_end`, each epoch counts as one step, which is saved if it
        is time.

        Args:
            run_context: MindSpore's: nothing is done.
            net: As in `step_end`.
            epoch: Number of the epoch that is over.

        Returns:
            As `step_end`.

        Raises:
            CheckpointError: As in `step_end`.
        """
        if run_context is not None:
            return None
        progress, pending = self._progress, None
        if self._epoch_is_over or progress.step_in_epoch == 0:
            pending = self.step_end(net=net, epoch=epoch)
        elif epoch is not None:
            progress.cur_epoch_num = epoch
        self._epoch_is_over = True
        return pending

    def end(self, run_context: Any = None, *, net: object = None) -> None:
        """Save the last step if it isn't, and wait until all is durable.

        Args:
            run_context: MindSpore's.
            net: As in `step_end`.

        Raises:
            CheckpointError: It can't be saved, or an asynchronous save failed.
        """
        if run_context is not None:
            self._progress = Progress.of(run_context)
        elif net is not None:
            self._progress.train_network = net
        if self._progress.cur_step_num != self._saved_step:
            self._save()
        self._wait()

    # MindSpore calls these; its base class would call the ones above in an evaluation, too.

    def on_train_begin(self, run_context: Any) -> None:
        """See `begin`."""
        self.begin(run_context)

    def on_train_step_end(self, run_context: Any) -> None:
        """See `step_end`."""
        self.step_end(run_context)

    def on_train_end(self, run_context: Any) -> None:
        """See `end`."""
        self.end(run_context)

    def on_eval_begin(self, run_context: Any) -> None:
        """Do nothing."""

    def on_eval_step_end(self, run_context: Any) -> None:
        """Do nothing."""

    def on_eval_end(self, run_context: Any) -> None:
        """Do nothing."""

    # ------------------------------------------------------------------------------------- inside

    @property
    def _saved_net(self) -> object:
        found = self._config.saved_network
        return self._progress.train_network if found is None else found

    def _advance(
        self,
        run_context: Any,
        net: object,
        *,
        step: int | None,
        epoch: int | None,
    ) -> None:
        """Go on by one step."""
        if run_context is not None:
            self._context = run_context
            self._progress = Progress.of(run_context)
            return
        progress = self._progress
        number = progress.cur_step_num + 1 if step is None else step
        if progress.cur_step_num == 0:
            self._saved_step = number - 1  # a training that goes on has saved what it began with
        if epoch is None:
            epoch = progress.cur_epoch_num + self._epoch_is_over
        if epoch != progress.cur_epoch_num or self._epoch_is_over or progress.cur_step_num == 0:
            progress.cur_epoch_num, progress.first_step = epoch, number - 1
        self._epoch_is_over = False
        progress.cur_step_num = number
        if net is not None:
            progress.train_network = net

    def _save(self, ending: str = "") -> PendingSave | None:
        config, progress, net = self._config, self._progress, self._saved_net
        if net is None:
            raise TypeError("which net? pass net= to step_end, or saved_network= to the config")
        place = place_to_write(self._path(ending), config.format)
        pending = save_file(
            place,
            net,
            config.options,
            append_dict=config.entries(epoch=progress.cur_epoch_num, step=progress.cur_step_num),
            background=is_async(config.async_save) and not ending,
            then=partial(self._note, place, managed=not ending),
        )
        if not ending:
            self._pending = pending
            self._saved_step = progress.cur_step_num
            self._last_time_s = self._clock()
        return pending

    def _path(self, ending: str) -> str:
        told = self._progress if self._context is None else self._context.original_args()
        directory = self._directory
        if callable(directory):
            directory = _made(directory(told))
        if callable(self._prefix):
            name = _checked(self._prefix(told))
        else:
            progress = self._progress
            name = f"{self._prefix}-{progress.cur_epoch_num}_{progress.step_in_epoch}"
        return f"{directory.rstrip('/')}/{name}{ending}.{self._config.format}"

    def _note(self, place: Place, *, managed: bool) -> None:
        """Note a file that is durable now, and delete what it supersedes; maybe in a thread."""
        self._latest = place.url
        if not managed:
            return
        others = [each for each in self._written if each.place.url != place.url]
        files = [*others, Written(place, self._clock())]
        keep = kept(
            [each.time_s for each in files],
            count=self._config.keep_checkpoint_max,
            minutes=self._config.keep_checkpoint_per_n_minutes,
        )
        self._written = [each for index, each in enumerate(files) if index in keep]
        for index, each in enumerate(files):
            if index not in keep:
                try:
                    each.place.parent.delete([each.place.name])
                except CheckpointError:
                    logger.warning("%s: can't be deleted", each.place.url, exc_info=True)

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.wait()


@cache
def _derived(cls: Any, callback: Any) -> Any:
    """Derive a class that MindSpore takes for a callback of its own."""
    return type(cls.__name__, (cls, callback), {"__module__": cls.__module__})


def _checked(prefix: object) -> str:
    if not isinstance(prefix, str) or "/" in prefix:
        raise ValueError(f"prefix={prefix!r}: expected a str without '/', or a callable")
    return prefix


def _made(directory: str | os.PathLike[str]) -> str:
    """Make a local folder if it isn't there."""
    found = os.fspath(directory)
    if "://" in found:
        return found
    path = Path(found).absolute()
    path.mkdir(parents=True, exist_ok=True)
    return str(path)
