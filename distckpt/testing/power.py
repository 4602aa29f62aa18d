"""Power loss: what a folder may hold after it, from the calls that were made before it."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from distckpt.testing.files import FileCall, WatchedFiles, contents

# What a disk writes whole or not at all.
_SECTOR_BYTES = 512
_ROOT = 0


@dataclass(frozen=True, slots=True)
class _Write:
    """Bytes of a file."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class _Resize:
    """A file's new length."""

    length: int
    grows_only: bool = False


@dataclass(frozen=True, slots=True)
class _Entry:
    """A change of a directory: names that go, and one that comes. All of it, or nothing."""

    gone: str | None
    name: str | None = None
    inode: int = -1


_Change = _Write | _Resize | _Entry


@dataclass(slots=True)
class _Inode:
    """A file or a directory: what surely is on the disk, and what only may be."""

    directory: bool
    data: bytearray = field(default_factory=bytearray)
    entries: dict[str, int] = field(default_factory=dict)
    pending: list[_Change] = field(default_factory=list)

    def apply(self, change: _Change) -> None:
        if isinstance(change, _Entry):
            if change.gone is not None:
                self.entries.pop(change.gone, None)
            if change.name is not None:
                self.entries[change.name] = change.inode
        elif isinstance(change, _Resize):
            if len(self.data) < change.length:
                self.data.extend(bytes(change.length - len(self.data)))
            elif not change.grows_only:
                del self.data[change.length :]
        else:
            stop = change.offset + len(change.data)
            self.apply(_Resize(stop, grows_only=True))
            self.data[change.offset : stop] = change.data

    def settle(self) -> None:
        for change in self.pending:
            self.apply(change)
        self.pending = []


class PowerLossDisk(WatchedFiles):
    """A context that notes what is done to a folder, to say what a power loss may leave of it.

    What is modelled: only an `fsync` of a file makes its bytes durable, and only one of a directory
    its entries. Of what came after the last one, any subset may be there: each 512 bytes by
    themselves, lengths without their bytes, and each creation, rename, link and removal, in
    whatever combination; a rename alone is atomic. That is more than file systems with a journal
    lose. What is there on entering counts as durable, also the folder itself; that a disk itself
    lies about an fsync isn't modelled (`Lose` at ``os.fsync`` is that).

    Args:
        folder: The folder; must exist.

    Examples:
        >>> import tempfile, distckpt
        >>> folder = tempfile.mkdtemp()
        >>> with PowerLossDisk(folder) as disk:
        ...     checkpoint = distckpt.save(folder + "/run", {"x": [1.0, 2.0]})
        >>> afterwards = tempfile.mkdtemp()
        >>> disk.lose_power(after=disk.calls, seed=7, into=afterwards)
        >>> distckpt.open(afterwards + "/run").values["x.1"]
        2.0
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__(folder)
        # Each call changes one inode, or makes what is pending in it durable.
        self._log: list[tuple[int, _Change | None]] = []
        self._now: dict[str, int] = {".": _ROOT}
        self._start: dict[int, _Inode] = {_ROOT: _Inode(directory=True)}
        self._kinds: dict[int, bool] = {}
        self._positions: dict[int, int] = {}
        self._files: dict[int, int] = {}
        self._lock = threading.RLock()
        for name, data in contents(folder).items():
            number = self._new(name, directory=data is None)
            self._start[number] = _Inode(data is None, bytearray(data or b""))
            parent = self._start[self._now[_parent(name)]]
            parent.entries[PurePosixPath(name).name] = number

    @property
    def calls(self) -> int:
        """How many calls have changed something, or made it durable."""
        return len(self._log)

    def perform(self, call: FileCall, do: Callable[[], None]) -> None:
        """See `WatchedFiles`. One call at a time, so that they have an order."""
        with self._lock:
            do()
            self._note(call)

    def forget(self, descriptor: int) -> None:
        """See `WatchedFiles`."""
        self._files.pop(descriptor, None)

    def lose_power(self, *, after: int, seed: int, into: str | os.PathLike[str]) -> None:
        """Make in an empty folder what may be there when power is lost after so many calls.

        Args:
            after: The number of calls, up to `calls`.
            seed: Which of the many ways. 0: nothing that wasn't durable is there; 1: all is; 2:
                all names are, and no bytes; 3: all bytes are, and no names; others by chance.
            into: The folder; must exist.
        """
        inodes = self._replay(after)
        chance = random.Random(f"{after} {seed}")  # noqa: S311  not for secrets
        for inode in inodes.values():
            _lose(inode, seed, chance)
        _make(inodes, _ROOT, Path(into))

    def _replay(self, after: int) -> dict[int, _Inode]:
        inodes = {
            number: _Inode(found.directory, bytearray(found.data), dict(found.entries))
            for number, found in self._start.items()
        }
        inodes |= {
            number: _Inode(kind) for number, kind in self._kinds.items() if number not in inodes
        }
        for number, change in self._log[:after]:
            if change is None:
                inodes[number].settle()
            else:
                inodes[number].pending.append(change)
        return inodes

    def _new(self, name: str, *, directory: bool) -> int:
        number = len(self._kinds) + 1
        self._kinds[number] = directory
        self._now[name] = number
        return number

    def _note(self, call: FileCall) -> None:
        if call.kind == "os.open":
            self._note_open(call)
        elif call.kind in {"os.write", "os.truncate", "os.allocate"}:
            self._note_bytes(call)
        elif call.kind == "os.fsync":
            self._log.append((self._inode(call), None))
        elif call.kind == "os.mkdir":
            number = self._new(call.name, directory=True)
            self._enter(call.name, number, gone=None)
        elif call.kind == "os.link":
            number = self._now[call.name] = self._now[call.source or ""]
            self._enter(call.name, number, gone=None)
        elif call.kind == "os.rename":
            self._note_rename(call)
        else:  # os.unlink, os.rmdir
            del self._now[call.name]
            self._enter(None, -1, gone=call.name)

    def _inode(self, call: FileCall) -> int:
        # A file that was opened keeps its inode, whatever it is called by now.
        return self._files.get(call.descriptor, self._now.get(call.name, -1))

    def _note_open(self, call: FileCall) -> None:
        if call.name not in self._now:
            number = self._new(call.name, directory=False)
            self._enter(call.name, number, gone=None)
        self._files[call.descriptor] = self._now[call.name]
        self._positions[call.descriptor] = 0

    def _note_bytes(self, call: FileCall) -> None:
        number = self._inode(call)
        if call.kind != "os.write":
            grows = call.kind == "os.allocate"
            self._log.append((number, _Resize(call.offset_bytes or 0, grows_only=grows)))
            return
        written = int(str(call.result))
        start = call.offset_bytes
        if start is None:
            start = self._positions[call.descriptor]
            self._positions[call.descriptor] += written
        data = bytes(memoryview(call.data or b"").cast("B")[:written])
        self._log.append((number, _Write(start, data)))

    def _note_rename(self, call: FileCall) -> None:
        source = call.source or ""
        number = self._now.pop(source)
        if self._kinds[number] or _parent(source) != _parent(call.name):
            raise NotImplementedError(
                f"{source} -> {call.name}: only files within one directory are modelled"
            )
        self._now[call.name] = number
        self._enter(call.name, number, gone=source)

    def _enter(self, name: str | None, inode: int, *, gone: str | None) -> None:
        where = self._now[_parent(name or gone or "")]
        leaf = None if name is None else PurePosixPath(name).name
        old = None if gone is None else PurePosixPath(gone).name
        self._log.append((where, _Entry(old, leaf, inode)))


def _parent(name: str) -> str:
    return str(PurePosixPath(name).parent)


def _lose(inode: _Inode, seed: int, chance: random.Random) -> None:
    """Settle what a power loss leaves of what was not durable."""
    for change in inode.pending:
        if isinstance(change, _Entry):
            if seed in {1, 2} or (seed > 3 and chance.random() < 0.5):  # noqa: PLR2004
                inode.apply(change)
        elif isinstance(change, _Resize):
            if seed in {1, 3} or (seed > 3 and chance.random() < 0.5):  # noqa: PLR2004
                inode.apply(change)
        elif seed in {1, 3}:
            inode.apply(change)
        elif seed > 3:  # noqa: PLR2004
            _tear(inode, change, chance)
    inode.pending = []


def _tear(inode: _Inode, write: _Write, chance: random.Random) -> None:
    """Keep some sectors of a write; the file may have its new length or not."""
    if chance.random() < 0.5:  # noqa: PLR2004
        inode.apply(_Resize(write.offset + len(write.data), grows_only=True))
    share = chance.choice((0.0, 0.1, 0.5, 0.9, 1.0))
    for at in range(0, len(write.data), _SECTOR_BYTES):
        if chance.random() < share:
            inode.apply(_Write(write.offset + at, write.data[at : at + _SECTOR_BYTES]))


def _make(inodes: dict[int, _Inode], number: int, path: Path) -> None:
    inode = inodes[number]
    if not inode.directory:
        path.write_bytes(inode.data)
        return
    path.mkdir(exist_ok=True)
    for name, entry in inode.entries.items():
        _make(inodes, entry, path / name)
