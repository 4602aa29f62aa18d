"""A handle to a committed checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import overload

import numpy as np

from distckpt import codec
from distckpt.coordinator import Solo, launched_by_mpi
from distckpt.copies import Places, Work
from distckpt.crew import threads_for
from distckpt.errors import (
    CheckpointError,
    IncompleteCheckpoint,
    MatchError,
    UnsupportedFormat,
)
from distckpt.exchange import exchange
from distckpt.foreign import ForeignStore
from distckpt.formats import OURS
from distckpt.hold import Hold
from distckpt.layout import Layout
from distckpt.load_plan import LoadOptions, OnCorrupt, ResolvePerRank
from distckpt.loader import LoadReport
from distckpt.loader import load_into as load_net
from distckpt.manifest import Manifest, Pieces
from distckpt.marks import LEASE_S
from distckpt.match import Prefixes, Rename
from distckpt.plan import Wants, plan_read
from distckpt.reader import BlockReader, StoredFile, read_manifest, stored_files, why_gone
from distckpt.region import Region
from distckpt.state import LazyArray
from distckpt.stats import SaveStats
from distckpt.store import Store
from distckpt.team import Operation, Team, connect
from distckpt.verify import verify
from distckpt.waiting import drive

Url = str | os.PathLike[str] | Store
StorageOptions = Mapping[str, object] | None


class Checkpoint:
    """A committed checkpoint; its tensors are read when asked for.

    A mapping of tensor names to `StoredTensor`: ``len``, ``in``, iteration (in the order of the
    state) and indexing. Made by `distckpt.save`, `distckpt.open`, `PendingCheckpoint.wait` and
    `Manager.open`; the manifest is read when first needed. Not collective, but for `load_into`.
    Safe to use from several threads.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest | None = None,
        save_id: int | None = None,
        stats: SaveStats | None = None,
    ) -> None:
        self._store = store
        self._known = manifest
        self._save_id = save_id
        self._stats = stats

    @cached_property
    def manifest(self) -> Manifest:
        """The record of what is stored where.

        Raises:
            CheckpointError: It can't be read (see `distckpt.open`), or is another save's by now.
        """
        found = self._known or read_manifest(self._store)
        if self._save_id is not None and found.save_id != self._save_id:
            raise CheckpointError(
                f"{self.url}: another save has replaced this checkpoint; open it again"
            )
        return found

    @property
    def url(self) -> str:
        """Where it is."""
        return self._store.url

    @property
    def format(self) -> str:
        """Name of its format: ``"distckpt"``, or what `distckpt.formats` calls it."""
        return self._store.format if isinstance(self._store, ForeignStore) else OURS

    @property
    def metadata(self) -> Mapping[str, object]:
        """What the saver gave as metadata."""
        return dict(self.manifest.metadata or {})

    @property
    def metrics(self) -> Mapping[str, float]:
        """Numbers that the saver gave, such as the loss."""
        return dict(self.manifest.metrics or {})

    @property
    def step(self) -> int | None:
        """The training step; None if it was not saved by a Manager."""
        return self.manifest.step

    @property
    def created(self) -> datetime | None:
        """When it was committed, in UTC; None for another format's file, which doesn't say."""
        if self.format != OURS:
            return None
        return datetime.fromtimestamp(self.manifest.created_ns / 1e9, UTC)

    @property
    def ranks(self) -> int:
        """How many ranks saved it."""
        return self.manifest.ranks

    @property
    def stats(self) -> SaveStats | None:
        """What the save cost that made this object; None for a checkpoint that was opened."""
        return self._stats

    @property
    def values(self) -> Mapping[str, object]:
        """Plain values by name."""
        return dict(self.manifest.values)

    @property
    def per_rank(self) -> Mapping[str, PerRankValues]:
        """Per-rank values by name; ``checkpoint.per_rank["rng"][3]`` is rank 3's."""
        return {name: PerRankValues(self, name) for name in self.manifest.per_rank}

    def __len__(self) -> int:
        return len(self.manifest.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.manifest.names)

    def __contains__(self, name: object) -> bool:
        return name in self.manifest.index

    def __getitem__(self, name: str) -> StoredTensor:
        """Find a tensor; nothing is read.

        Raises:
            MatchError: No tensor of this name.
        """
        if name not in self.manifest.index:
            there = ", ".join(list(self)[:20])
            raise MatchError(
                f"{self.url}: no tensor {name!r}; there are {len(self)}: {there}", missing=[name]
            )
        return StoredTensor(self, name)

    def __repr__(self) -> str:
        return f"<Checkpoint {self.url!r}>"

    def load_into(
        self,
        net: object,
        *,
        comm: object = None,
        strict: bool = False,
        filter_prefix: Prefixes = (),
        only_prefix: Prefixes = (),
        select: Callable[[str], bool] | None = None,
        rename: Rename | None = None,
        cast: bool = True,
        verify: bool = True,
        per_rank: ResolvePerRank | None = None,
        on_corrupt: OnCorrupt = "raise",
        timeout_s: float = 600,
    ) -> LoadReport:
        """Collective if `comm` has several ranks. Load into a net; see `distckpt.load_into`.

        Args:
            net: As in `distckpt.load_into`, and so are the other arguments.
            comm: As in `distckpt.load_into`, but None always means this process alone.
            strict: As in `distckpt.load_into`.
            filter_prefix: As in `distckpt.load_into`.
            only_prefix: As in `distckpt.load_into`.
            select: As in `distckpt.load_into`.
            rename: As in `distckpt.load_into`.
            cast: As in `distckpt.load_into`.
            verify: As in `distckpt.load_into`.
            per_rank: As in `distckpt.load_into`.
            on_corrupt: As in `distckpt.load_into`.
            timeout_s: As in `distckpt.load_into`.

        Returns:
            What was loaded, the same on every rank.

        Raises:
            CheckpointError: As in `distckpt.load_into`.
        """
        team = Team(Solo()) if comm is None else connect(comm, timeout_s=timeout_s)
        options = LoadOptions(
            strict,
            filter_prefix,
            only_prefix,
            select,
            rename,
            cast,
            verify,
            per_rank,
            timeout_s,
            on_corrupt,
        )
        return load_net(team, self._store, net, options, manifest=lambda _: self.manifest)

    def verify(self, *, comm: object = None, timeout_s: float = 600) -> int:
        """Read every byte of every file, and compare it with its checksum.

        Collective if `comm` has several ranks, which share the work. Takes a few MiB of memory,
        whatever the checkpoint's size. Another format's file is read, too; only where it has
        checksums of its own are they checked.

        Args:
            comm: As in `distckpt.load_into`, but None always means this process alone.
            timeout_s: How long the first rank that is done waits for the last, in seconds.

        Returns:
            The number of bytes read, by all ranks.

        Raises:
            CorruptCheckpoint: All damage at once: which file and bytes, and the tensors and regions
                in them.
            IncompleteCheckpoint: Another save has replaced it meanwhile.
            StoreError: The store failed.
            LoadFailed: A rank failed, or was late.

        All are raised on every rank alike.
        """
        team = Team(Solo()) if comm is None else connect(comm, timeout_s=timeout_s)
        return verify(team, self._store, self.manifest, timeout_s=timeout_s)

    def hold(self, *, lease_s: float = LEASE_S) -> Hold:
        """Keep it from being deleted, by a Manager's `keep=` or by a save that replaces it.

        ::

            with checkpoint.hold():
                checkpoint.load_into(net)

        Not collective: a hold is of the checkpoint, not of the reader, and one rank's is enough for
        all. A small object beside the checkpoint says so. If this process dies, it ends a lease
        later.

        Args:
            lease_s: For how many seconds after it was last renewed it counts; it is renewed three
                times as often, in a thread. Above what this process, or its storage, may ever stand
                still.

        Returns:
            The hold, a context manager; it is in force already.

        Raises:
            IncompleteCheckpoint: It is deleted already, or just being so, or another save has
                replaced it.
            UnsupportedFormat: It is another format's file, which nobody deletes.
            StoreError: The store failed, or can't be written to.
            ValueError: No lease.
        """
        if self.format != OURS:
            raise UnsupportedFormat(
                f"{self.url}: a file of format {self.format!r} can't be held: only distckpt's own "
                "checkpoints are ever pruned"
            )
        return Hold(self._store, self.manifest.save_id, lease_s=lease_s)

    @cached_property
    def _files(self) -> dict[int, StoredFile]:
        return dict(enumerate(stored_files(self.manifest)))

    def _refuse_gone(self, failure: CheckpointError | None) -> None:
        """Say so, where a file is missing because this checkpoint was replaced or deleted."""
        if isinstance(failure, IncompleteCheckpoint):
            gone = why_gone(self._store, self.manifest.save_id)
            if gone is not None:
                raise IncompleteCheckpoint(f"{self.url}: {gone}") from failure

    def _read(
        self, pieces: Pieces, itemsize: np.ndarray, tensor: int, region: Region, out: np.ndarray
    ) -> None:
        """Read a box of a tensor into a C-contiguous array of its shape."""
        manifest = self.manifest
        width = pieces.start.shape[1]
        pad = width - len(region.start)
        wants = Wants(
            np.zeros(1, np.int64),
            np.zeros(1, np.int64),
            np.array([tensor]),
            np.array([(0,) * pad + region.start], np.int64),
            np.array([(1,) * pad + region.stop], np.int64),
        )
        fragments = plan_read(pieces, itemsize, wants, block_bytes=manifest.block_bytes, ranks=1)
        work = Work(fragments, manifest.block_bytes)
        blocks = BlockReader(self._store, self._files, manifest.block_bytes)

        operation = Operation(Solo(), 0, 0.0)
        # Of several ranks, each may be reading.
        threads = 1 if launched_by_mpi() else threads_for(1)
        into = _Whole(out, wants)
        failure = drive(exchange(operation, 2, work, blocks, into, threads=threads))
        if failure is not None:
            self._refuse_gone(failure)
            raise failure

    def _read_tensor(self, name: str, region: Region) -> np.ndarray:
        tensor = self.manifest.index[name]
        out = np.empty(region.shape, self.manifest.dtype_of(tensor).numpy)
        if out.size:
            pieces = self.manifest.pieces_of(np.array([tensor]))
            self._read(pieces, self.manifest.itemsize, tensor, region, out)
        return out

    def _read_blob(self, name: str, rank: int) -> object:
        file, offset, length = self.manifest.blob_place(name, rank)
        if not length:
            raise MatchError(
                f"{self.url}: rank {rank} saved no value under {name!r}", missing=[name]
            )
        out = np.empty(length, np.uint8)
        one = np.ones(1, np.int64)
        pieces = Pieces(
            0 * one, np.array([[0]]), np.array([[length]]), file * one, offset * one, length * one
        )
        self._read(pieces, one, 0, Region((0,), (length,)), out)
        found: object = codec.unpack(out.data)
        return found


class _Whole:
    """Takes one box, into an array of its shape.

    Args:
        out: C-contiguous, in the stored dtype.
        wants: The box, under the key 0.
    """

    def __init__(self, out: np.ndarray, wants: Wants) -> None:
        self._bytes = out.reshape(-1).view(np.uint8)
        self._dtype = out.dtype
        self._start = wants.start[0].tolist()
        self._box = out.reshape((wants.stop[0] - wants.start[0]).tolist())
        self.places: Places | None = Places(wants.start, wants.stop, np.zeros(1, np.int64))

    def dtype(self, key: int) -> np.dtype:
        """See `Landing`."""
        del key
        return self._dtype

    def memories(
        self, key: Sequence[int], start: Sequence[int], stop: Sequence[int]
    ) -> list[memoryview]:
        """See `Landing`."""
        del key
        return [self._bytes[first:last].data for first, last in zip(start, stop, strict=True)]

    def takes_any(self, key: np.ndarray) -> bool:
        """See `Landing`."""
        del key
        return True

    def put(self, key: int, start: tuple[int, ...], values: np.ndarray) -> None:
        """See `Landing`."""
        del key
        first = [a - o for a, o in zip(start, self._start, strict=True)]
        self._box[tuple(slice(a, a + n) for a, n in zip(first, values.shape, strict=True))] = values


@dataclass(frozen=True, slots=True)
class StoredTensor(LazyArray):
    """A tensor in a checkpoint; nothing is read before it is indexed.

    ``checkpoint["w"][...]`` is all of it; ``checkpoint["w"][10:20, ::2]`` reads only the blocks
    that rows 10 to 19 lie in. ``numpy.asarray(checkpoint["w"])`` works, too. Not collective.

    Attributes:
        checkpoint: Where it is.
        name: Its name there.
    """

    checkpoint: Checkpoint
    name: str

    @property
    def layout(self) -> Layout:
        """How it is cut and where it is stored."""
        manifest = self.checkpoint.manifest
        return manifest.layout_of(manifest.index[self.name])

    @property
    def shape(self) -> tuple[int, ...]:
        """Its whole shape."""
        return self.layout.shape

    @property
    def dtype(self) -> np.dtype:
        """Its dtype as saved, in little-endian byte order."""
        manifest = self.checkpoint.manifest
        return manifest.dtype_of(manifest.index[self.name]).numpy

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError(f"{self.name!r} is a scalar and has no len()")
        return self.shape[0]

    def read(self, region: Region | None = None) -> np.ndarray:
        """Read the tensor, or one region of it, whatever layout it was saved with.

        Args:
            region: Box in global coordinates; the whole tensor by default.

        Returns:
            A new C-contiguous array of the region's shape.

        Raises:
            CorruptCheckpoint: A file is short, or a checksum differs.
            IncompleteCheckpoint: A file is not there.
            IndexError: The region lies outside.
        """
        region = Region.whole(self.shape) if region is None else region
        if len(region.start) != self.ndim or any(
            b > n for b, n in zip(region.stop, self.shape, strict=False)
        ):
            raise IndexError(f"{region} is not in {self.name!r} of shape {self.shape}")
        return self.checkpoint._read_tensor(self.name, region)  # noqa: SLF001

    def __getitem__(self, index: object) -> np.ndarray:
        """Read what a numpy index of ints, slices and an Ellipsis selects.

        Only the box around it is read: a slice's step skips elements, but not their bytes.

        Raises:
            IndexError: It lies outside, or has too many entries.
            TypeError: Another kind of index.
            CheckpointError: As in `read`.
        """
        entries = list(index) if isinstance(index, tuple) else [index]
        # By identity: an entry may be an array, which compares by element.
        ellipses = [at for at, entry in enumerate(entries) if entry is Ellipsis]
        if len(entries) - len(ellipses) > self.ndim or len(ellipses) > 1:
            raise IndexError(
                f"{len(entries) - len(ellipses)} indices and {len(ellipses)} Ellipsis for "
                f"{self.name!r} of {self.ndim} dimensions"
            )
        at = ellipses[0] if ellipses else len(entries)
        rest: list[object] = [slice(None)] * (self.ndim - len(entries) + len(ellipses))
        entries[at : at + 1] = rest
        start, stop = [], []
        inner: list[slice | int] = []
        for dim, (entry, extent) in enumerate(zip(entries, self.shape, strict=True)):
            if isinstance(entry, slice):
                chosen = range(extent)[entry]
                # Of its ends: min() and max() would look at every index.
                ends = sorted((chosen[0], chosen[-1])) if chosen else (0, -1)
                low, high = ends[0], ends[1] + 1
                first = chosen.start - low
                last = first + len(chosen) * chosen.step
                inner.append(
                    slice(first, last if last >= 0 else None, chosen.step)
                    if chosen
                    else slice(0, 0)
                )
            elif isinstance(entry, (int, np.integer)) and not isinstance(entry, bool):
                low = int(entry) + (extent if entry < 0 else 0)
                if not 0 <= low < extent:
                    raise IndexError(
                        f"index {entry} is out of range for dimension {dim} of {self.name!r}, "
                        f"of extent {extent}"
                    )
                high = low + 1
                inner.append(0)
            else:
                raise TypeError(
                    f"{self.name!r} is indexed with ints, slices and an Ellipsis, not "
                    f"{type(entry).__name__}; read it first: tensor[...][index]"
                )
            start.append(low)
            stop.append(high)
        box = self.read(Region(tuple(start), tuple(stop)))
        # As numpy has it: with an Ellipsis, what has no dimension left is an array, too.
        found: np.ndarray = box[(*inner, ...)] if ellipses else box[tuple(inner)]
        return found

    def __array__(self, dtype: np.dtype | None = None, *, copy: bool | None = None) -> np.ndarray:
        """Read the whole tensor."""
        del copy
        return self.read() if dtype is None else self.read().astype(dtype)

    def __repr__(self) -> str:
        return f"<StoredTensor {self.name!r} {self.dtype.name} {self.shape}>"


@dataclass(frozen=True, slots=True)
class PerRankValues(Sequence[object]):
    """One per-rank value of every rank, by rank; each is read when asked for. Not collective.

    Attributes:
        checkpoint: Where it is.
        name: Its name there.
    """

    checkpoint: Checkpoint
    name: str

    def __len__(self) -> int:
        return self.checkpoint.ranks

    @overload
    def __getitem__(self, rank: int) -> object: ...
    @overload
    def __getitem__(self, rank: slice) -> list[object]: ...
    def __getitem__(self, rank: int | slice) -> object:
        """Read a rank's value, or those of a slice of ranks.

        Raises:
            MatchError: This rank saved none.
            IndexError: No such rank.
            CheckpointError: As in `StoredTensor.read`.
        """
        if isinstance(rank, slice):
            return [self[number] for number in range(len(self))[rank]]
        if not 0 <= rank < len(self):
            raise IndexError(f"rank {rank} of {self.name!r}, saved by ranks 0 to {len(self) - 1}")
        return self.checkpoint._read_blob(self.name, rank)  # noqa: SLF001
