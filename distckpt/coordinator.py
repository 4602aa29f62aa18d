"""What ranks need of one another: messages with tags. MPI's only door.

A `Coordinator` moves tagged bytes between ranks and never waits; `team` makes the rest of it.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

from distckpt.errors import CheckpointError
from distckpt.waiting import Backlog, Waiting

if TYPE_CHECKING:
    from mpi4py import MPI

# A text, so that who names this type does not import mpi4py.
MpiComm: TypeAlias = "MPI.Comm"

# Tags below this belong to the calling thread's operations, those above to saves in the background.
BACKGROUND_TAG = 1 << 14
# Whether a message has left costs as much to ask as the message. Small ones are asked about when so
# many are held, or twice as many as could not be let go of the last time; large ones always.
_REAP_AT = 16
_LARGE_BYTES = 1 << 14


@runtime_checkable
class Coordinator(Protocol):
    """Tagged point-to-point messages between the ranks of one job. Nothing here blocks.

    Messages are bytes and have any length. Where `concurrent`, several threads use it at once.

    One that sends any memory, and receives into any, has a method more, which others need not have:
    see `poll_into`.
    """

    @property
    def rank(self) -> int:
        """This rank, from 0."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    @property
    def node(self) -> str:
        """Name of the machine that this rank runs on."""

    @property
    def concurrent(self) -> bool:
        """Whether another thread may send and receive while the main thread does."""

    def post(self, dest: int, tag: int, payload: bytes) -> None:
        """Send a message; return at once, whether or not the other rank is there.

        Args:
            dest: The rank that receives it.
            tag: 0 to 32,767.
            payload: Its content; may not change any more.
        """

    def poll(self, tag: int, source: int | None = None) -> tuple[int, bytes | bytearray] | None:
        """Receive a message, if one has come.

        Args:
            tag: Its tag.
            source: The rank that it is from; any, if None.

        Returns:
            Its source and its content, or None. Messages of one source and tag come in the order in
            which they were sent.
        """


def fills_memory(coordinator: Coordinator) -> bool:
    """Whether a coordinator has a method ``poll_into``; then its `post` takes any memory, too."""
    return callable(getattr(coordinator, "poll_into", None))


def poll_into(coordinator: Coordinator, tag: int, source: int, memory: memoryview) -> bool:
    """Receive a message into memory, if one has come; without a copy where `fills_memory`.

    Args:
        coordinator: What receives it.
        tag: Its tag.
        source: The rank that it is from.
        memory: Writable bytes, as many as the message has.

    Returns:
        Whether one has come.

    Raises:
        CheckpointError: It has another length.
    """
    if fills_memory(coordinator):
        return bool(coordinator.poll_into(tag, source, memory))  # type: ignore[attr-defined]
    found = coordinator.poll(tag, source)
    if found is None:
        return False
    _check_length(source, len(found[1]), len(memory))
    memory[:] = found[1]
    return True


def _check_length(source: int, found: int, expected: int) -> None:
    if found != expected:
        raise CheckpointError(
            f"rank {source} sent {found} bytes where {expected} were expected: do all ranks run "
            "the same version?"
        )


class Solo:
    """The coordinator of a single process: as `comm=`, it saves and loads alone.

    Examples:
        >>> Solo().rank, Solo().size
        (0, 1)
    """

    rank = 0
    size = 1
    concurrent = True

    @property
    def node(self) -> str:
        """Name of this machine."""
        return socket.gethostname()

    def post(self, dest: int, tag: int, payload: bytes) -> None:
        """There is no one to send to.

        Raises:
            CheckpointError: Always.
        """
        raise CheckpointError(
            f"a single process has no rank {dest} (tag {tag}, {len(payload)} bytes)"
        )

    def poll(self, tag: int, source: int | None = None) -> tuple[int, bytes] | None:
        """Nothing ever comes."""
        del tag, source
        return None


class MpiCoordinator:
    """Messages over two duplicates of an mpi4py communicator.

    Args:
        calls: For what the calling thread does.
        background: For saves in the background.
    """

    def __init__(self, calls: MPI.Comm, background: MPI.Comm) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        self._comms = (calls, background)
        self._sending: deque[tuple[MPI.Request, bytes | memoryview]] = deque()
        self._reap_at = _REAP_AT
        self._holds_large = False
        self._lock = threading.Lock()
        self.rank = calls.Get_rank()
        self.size = calls.Get_size()
        self.node = MPI.Get_processor_name()
        self.concurrent = MPI.Query_thread() == MPI.THREAD_MULTIPLE

    def post(self, dest: int, tag: int, payload: bytes) -> None:
        """See `Coordinator`."""
        request = self._comms[tag >= BACKGROUND_TAG].Isend([payload, self._mpi.BYTE], dest, tag)
        # The buffer must live until the message has left.
        self._sending.append((request, payload))
        if len(payload) > _LARGE_BYTES:
            self._holds_large = True
        if self._holds_large or len(self._sending) >= self._reap_at:
            with self._lock:
                self._reap()
                self._reap_at = max(_REAP_AT, 2 * len(self._sending))

    def poll(self, tag: int, source: int | None = None) -> tuple[int, bytearray] | None:
        """See `Coordinator`."""
        origin = self._mpi.ANY_SOURCE if source is None else source
        found = self._take(self._comms[tag >= BACKGROUND_TAG], origin, tag)
        if found is None and self._holds_large:
            with self._lock:
                self._reap()
        return found

    def poll_into(self, tag: int, source: int, memory: memoryview) -> bool:
        """See the function of this name."""
        comm = self._comms[tag >= BACKGROUND_TAG]
        status = self._mpi.Status()
        message = comm.Improbe(source, tag, status)
        if message is None:
            if self._holds_large:
                with self._lock:
                    self._reap()
            return False
        length = status.Get_count(self._mpi.BYTE)
        if length != len(memory):
            message.Recv([bytearray(length), self._mpi.BYTE])
        _check_length(source, length, len(memory))
        message.Recv([memory, self._mpi.BYTE])
        return True

    def _take(self, comm: MPI.Comm, source: int, tag: int) -> tuple[int, bytearray] | None:
        status = self._mpi.Status()
        message = comm.Improbe(source, tag, status)
        if message is None:
            return None
        buffer = bytearray(status.Get_count(self._mpi.BYTE))
        message.Recv([buffer, self._mpi.BYTE])
        return status.Get_source(), buffer

    def free(self) -> bool:
        """Free the duplicates; not while a message has not left. Returns whether they are free."""
        with self._lock:
            self._reap()
            if self._sending:
                return False
        for comm in self._comms:
            if comm == self._mpi.COMM_NULL:
                continue
            # What was said to a rank that had given up, or was through: MPICH frees no communicator
            # with messages that nobody has received.
            while self._take(comm, self._mpi.ANY_SOURCE, self._mpi.ANY_TAG) is not None:
                pass
            try:
                comm.Free()
            except self._mpi.Exception:  # one has come just now
                return False
        return True

    def _reap(self) -> None:
        self._holds_large = False  # unless one is kept below, or sent meanwhile
        for _ in range(len(self._sending)):
            request, payload = self._sending.popleft()
            if not request.Test():
                self._sending.append((request, payload))
                if len(payload) > _LARGE_BYTES:
                    self._holds_large = True


def launched_by_mpi() -> bool:
    """Whether mpirun started this process with more than one rank.

    Slurm's variables don't count: it sets them for a single process of a job, too.
    """
    for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) > 1:
            return True
    return False


def world() -> MPI.Comm:
    """Return the communicator of all ranks; this starts MPI."""
    from mpi4py import MPI

    return MPI.COMM_WORLD


def as_mpi(comm: object) -> MPI.Comm | None:
    """Return an mpi4py communicator as such, None if it is something else; imports no MPI."""
    if "mpi4py" not in sys.modules:
        return None
    from mpi4py import MPI

    return comm if isinstance(comm, MPI.Comm) else None


def duplicate(comm: MPI.Comm, *, timeout_s: float = 600.0) -> MpiCoordinator:
    """Collective. Make a coordinator out of two duplicates of a communicator.

    Raises:
        CheckpointError: Not all ranks came in time.
    """
    _free_abandoned()
    return MpiCoordinator(*backlog().drive(_duplicates(comm, timeout_s)))


def _duplicates(comm: MPI.Comm, timeout_s: float) -> Waiting[tuple[MPI.Comm, MPI.Comm]]:
    deadline = time.monotonic() + timeout_s
    made = []
    for _ in range(2):
        # Idup and not Dup, so that a rank that never comes is noticed.
        duplicate, request = comm.Idup()
        while not request.Test():
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"not all {comm.Get_size()} ranks of the communicator came to their first "
                    f"distckpt call within {timeout_s:.3g} s. Every rank must make the same calls"
                )
            yield
        made.append(duplicate)
    return made[0], made[1]


def kept(comm: MPI.Comm) -> object:
    """Return what `keep` has left with a communicator; None if nothing."""
    found = comm.Get_attr(_marks().keyval)
    return found[0] if isinstance(found, tuple) else None


def keep(comm: MPI.Comm, user: object, coordinator: MpiCoordinator) -> None:
    """Leave the only user of a coordinator with the communicator that it was duplicated from.

    It is an attribute, and goes when the communicator is freed. The duplicates are freed some time
    after that, when nothing, such as a save in flight, refers to the user any more.
    """
    comm.Set_attr(_marks().keyval, (user, coordinator))


class _Marks:
    """What we leave with the mpi4py module itself, since it is as old as MPI in this process.

    Attributes:
        keyval: The key of our attribute.
        backlog: What the main thread drives, over whatever communicator.
        abandoned: Users and coordinators whose communicator is gone.
    """

    def __init__(self) -> None:
        from mpi4py import MPI

        self.keyval = MPI.Comm.Create_keyval(delete_fn=self._abandon)
        self.backlog = Backlog()
        self.abandoned: list[tuple[weakref.ref[object], MpiCoordinator]] = []

    def _abandon(self, comm: MPI.Comm, keyval: int, kept: tuple[object, MpiCoordinator]) -> None:
        """MPI is freeing a communicator, maybe all of them: not the time to call it."""
        del comm, keyval
        user, coordinator = kept
        self.abandoned.append((weakref.ref(user), coordinator))


def _marks() -> _Marks:
    from mpi4py import MPI

    marks: _Marks | None = getattr(MPI, "_distckpt", None)
    if marks is None:
        marks = _Marks()
        MPI._distckpt = marks  # type: ignore[attr-defined]
    return marks


def backlog() -> Backlog:
    """Return what the main thread of this process has to drive where MPI allows no other to."""
    return _marks().backlog


def _free_abandoned() -> None:
    """Free the duplicates that nobody will use again: MPI libraries stop at some 2,000."""
    marks = _marks()
    marks.abandoned = [
        (user, coordinator)
        for user, coordinator in marks.abandoned
        if user() is not None or not coordinator.free()
    ]
