"""Other libraries, each behind one adapter: a module here with ``make(state, ranks) -> Peer``.

All get the same bytes in the same layout, and are held to the same durability: where a library
doesn't fsync, its adapter does so afterwards, and that counts. Each is measured at its default, and
at the fastest of its documented settings that are named here.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.suite import floors
from benchmarks.suite.bench import InFlight
from benchmarks.suite.states import State
from benchmarks.suite.turns import Ranks

# Of this rank: name → what was loaded, contiguous or not, in any dtype of the right size.
Loaded = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Peer:
    """A library, ready to save one state. All functions are collective.

    Attributes:
        save: Setting → a durable save to a folder that is not there yet; the default first.
        start: Setting → an asynchronous one.
        load: Setting → a load of what `save` wrote with the setting of that name, or by default.
        missing: What it can't, of ``"save"``, ``"start"`` and ``"load"`` → why.
        state: The state that distckpt saves beside it, if that is not as it was: where a library
            need not copy its own arrays, since nobody can change them, we get these, too.
    """

    save: Mapping[str, Callable[[Path], object]] = field(default_factory=dict)
    start: Mapping[str, Callable[[Path], InFlight]] = field(default_factory=dict)
    load: Mapping[str, Callable[[Path], Loaded]] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    state: Mapping[str, object] | None = None


def make(module: str, state: State, ranks: Ranks) -> Peer:
    """Make a peer ready.

    Args:
        module: Name of a module here.
        state: What it will save.
        ranks: The ranks that hold it.

    Raises:
        ImportError: Its library is not installed.
    """
    adapter = importlib.import_module(f"{__name__}.{module}")
    found: Peer = adapter.make(state, ranks)
    return found


class InThread:
    """A save whose end a library only lets one wait for.

    Args:
        finish: Waits for it.
    """

    def __init__(self, finish: Callable[[], object]) -> None:
        self._finish = finish
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._finish()
        except BaseException as exc:  # noqa: BLE001  whoever waits raises it
            self._error = exc

    def done(self) -> bool:
        """See `InFlight`."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """See `InFlight`."""
        self._thread.join()
        if self._error is not None:
            raise self._error


def sync_share(path: Path, ranks: Ranks) -> None:
    """Make durable what a library has left to the kernel; ranks share the files out."""
    files = floors.files_under(path)
    folders = [path, *(one for one in path.rglob("*") if one.is_dir())]
    for one in [*files, *folders][ranks.rank :: ranks.size]:
        floors.sync(one)
