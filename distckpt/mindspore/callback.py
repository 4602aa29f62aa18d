"""`ModelCheckpoint`: saves while a net is trained, and keeps what the configuration says."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from distckpt.errors import text
from distckpt.events import OnEvent
from distckpt.mindspore.background import PendingSave
from distckpt.mindspore.config import CheckpointConfig
from distckpt.mindspore.files import Files
from distckpt.mindspore.managed import Managed
from distckpt.mindspore.options import Hooks
from distckpt.mindspore.progress import Progress, free_prefix
from distckpt.mindspore.values import real
from distckpt.pending import PendingCheckpoint
from distckpt.store import open_store

Pending = PendingSave | PendingCheckpoint


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
        clock: Seconds, for the policies that count time; files only.
        on_event: Called with each `distckpt.events.Event`, as by `distckpt.Manager`.
        stop_signals: Signals after which the next step is saved and `should_stop` is true.
        max_seconds: How long the training may take, as for `distckpt.Manager`.

    With ``CheckpointConfig(format="distckpt")`` all ranks save together, in
    ``<directory>/<prefix>/step-<step>``, by a `distckpt.Manager`; then every rank must make the
    same calls, and `load_latest_into` resumes.

    Raises:
        TypeError: `config` is no `CheckpointConfig`; a callable for a Manager's folder.
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
        on_event: OnEvent | Iterable[OnEvent] | None = None,
        stop_signals: Iterable[int] = (),
        max_seconds: float | None = None,
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
        of_files = not self._config.managed
        if of_files and isinstance(self._prefix, str) and isinstance(self._directory, str):
            self._prefix = free_prefix(self._prefix, open_store(self._directory).names())
        self._progress = Progress()
        self._epoch_is_over = False
        self._context: Any = None  # MindSpore's own, while it drives
        hooks = Hooks(on_event, stop_signals, max_seconds)
        self._saver: Files | Managed
        if self._config.managed:
            self._saver = Managed(self._config, self._root(), hooks)
        else:
            folder = None if callable(self._directory) else self._directory
            self._saver = Files(
                self._config, self._path, directory=folder, clock=clock, hooks=hooks
            )

    @property
    def latest_ckpt_file_name(self) -> str:
        """Path of the newest file, or checkpoint, that is durable; empty before the first."""
        return self._saver.latest

    @property
    def stop_reason(self) -> str | None:
        """Why the training should stop, or None."""
        return self._saver.stop_reason

    def should_stop(self) -> bool:
        """Whether a signal, a halt file or the time says that the training should stop.

        ``Model.train`` is stopped by itself.
        """
        return self._saver.stop_reason is not None

    def load_latest_into(
        self, net: object, *, default: int | None = None, strict: bool = True
    ) -> int:
        """Collective. Load the newest checkpoint of format ``"distckpt"``, and count on from it.

        Args:
            net: As in `distckpt.load_into`.
            default: What to return where there is none.
            strict: As in `distckpt.load_into`.

        Returns:
            Its step.

        Raises:
            TypeError: Another format, whose files `load_checkpoint` reads.
            CheckpointError: As in `distckpt.Manager.load_latest_into`.
        """
        if not isinstance(self._saver, Managed):
            raise TypeError(
                f"format={self._config.format!r}: load the file with load_checkpoint; only "
                "CheckpointConfig(format='distckpt') has load_latest_into"
            )
        self._progress = self._saver.load_latest_into(net, default=default, strict=strict)
        return self._progress.cur_step_num

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
        try:
            self._save_what_broke(error)
        finally:
            self._saver.close(error)

    def _save_what_broke(self, error: BaseException | None) -> None:
        if error is None or not self._config.exception_save:
            return
        # What ended the training is what the user must see: whatever fails now is only noted.
        try:
            self._saver.wait()
        except Exception as exc:  # noqa: BLE001
            error.add_note(f"an asynchronous save before failed: {text(exc)}")
        try:
            if self._context is not None:
                self._progress = Progress.of(self._context)
            if self._saved_net is not None and isinstance(self._saver, Files):
                self._saver.save(self._progress, self._net(), ending="_breakpoint")
        except Exception as exc:  # noqa: BLE001
            error.add_note(f"exception_save=True: the save failed, too: {text(exc)}")

    def begin(self, run_context: Any) -> None:
        """Note what MindSpore trains; it counts steps from 1 each time."""
        self._context = run_context
        self._saver.begin(0)

    def step_end(
        self,
        run_context: Any = None,
        *,
        net: object = None,
        step: int | None = None,
        epoch: int | None = None,
    ) -> Pending | None:
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
        pending = self._saver.step(self._progress, self._net())
        if run_context is not None and self.should_stop():
            run_context.request_stop()
        return pending

    def epoch_end(
        self,
        run_context: Any = None,
        *,
        net: object = None,
        epoch: int | None = None,
    ) -> Pending | None:
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
        if not self._saver.is_saved(self._progress.cur_step_num):
            self._saver.save(self._progress, self._net())
        self._saver.wait()

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
            self._saver.begin(number - 1)  # a training that goes on has saved what it began with
        if epoch is None:
            epoch = progress.cur_epoch_num + self._epoch_is_over
        if epoch != progress.cur_epoch_num or self._epoch_is_over or progress.cur_step_num == 0:
            progress.cur_epoch_num, progress.first_step = epoch, number - 1
        self._epoch_is_over = False
        progress.cur_step_num = number
        if net is not None:
            progress.train_network = net

    def _net(self) -> object:
        found = self._saved_net
        if found is None:
            raise TypeError("which net? pass net= to step_end, or saved_network= to the config")
        return found

    def _path(self, progress: Progress) -> str:
        """Return where a file of this step lies, without its ending."""
        told = progress if self._context is None else self._context.original_args()
        directory = self._directory
        if callable(directory):
            directory = _made(directory(told))
        if callable(self._prefix):
            name = _checked(self._prefix(told))
        else:
            name = f"{self._prefix}-{progress.cur_epoch_num}_{progress.step_in_epoch}"
        return f"{directory.rstrip('/')}/{name}"

    def _root(self) -> str:
        """Return the Manager's folder."""
        if callable(self._prefix) or callable(self._directory):
            raise TypeError(
                "format='distckpt': prefix and directory are texts, since a run has one folder"
            )
        return f"{self._directory.rstrip('/')}/{self._prefix}"


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
