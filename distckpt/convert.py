"""From any format to any other: tensor by tensor, in bounded memory, shared out among ranks."""

from __future__ import annotations

import fnmatch
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from distckpt import dtypes, formats
from distckpt.api import open as open_checkpoint
from distckpt.api import save
from distckpt.checkpoint import Checkpoint, StorageOptions, StoredTensor, Url
from distckpt.errors import (
    CheckpointError,
    CheckpointNotFound,
    LayoutError,
    MatchError,
    SaveFailed,
    from_plain,
    raise_together,
    size_text,
    some_names,
    to_plain,
)
from distckpt.formats.base import Place, Wanted, Writing
from distckpt.match import Prefixes, Rename, filter_names, renamed
from distckpt.region import Region
from distckpt.state import LazyArray
from distckpt.team import Late, Team, connect
from distckpt.waiting import Waiting

# What a file's writer asks for in small boxes is read in pieces of so many bytes: few, and small
# enough for the allocator to reuse their memory.
_WINDOW_BYTES = 16 << 20

Cast = str | np.dtype | Mapping[str, str | np.dtype]


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What a conversion did.

    Attributes:
        source: Format of the source.
        format: Format that was written.
        tensors: Number of tensors written.
        bytes: Of these tensors.
        renamed: Source's name → name written, where they differ.
        unmapped: Names that a given name map does not have; they kept their names.
        unused: Names of the map that the source does not have.
        cast: Written name → the conversion, such as ``"float32 → float16"``.
        left_out: Names of values that differ by rank, which only a save by ranks keeps.
        seconds: From the call to its end.
    """

    source: str
    format: str
    tensors: int
    bytes: int
    renamed: Mapping[str, str] = field(default_factory=dict)
    unmapped: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    cast: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    seconds: float = 0.0

    def __str__(self) -> str:
        lines = [
            (
                f"{self.source} → {self.format}: {self.tensors} tensors, {size_text(self.bytes)}, "
                f"in {self.seconds:.2f} s"
            )
        ]
        for what, names in (
            ("renamed", [f"{old} → {new}" for old, new in self.renamed.items()]),
            ("converted", [f"{name} ({how})" for name, how in self.cast.items()]),
            ("not in the name map (kept their names)", self.unmapped),
            ("in the name map, but not in the source", self.unused),
            ("left out (a value of each rank)", self.left_out),
        ):
            if names:
                lines.append(f"  {what}: {some_names(names)}")
        return "\n".join(lines)


def name_map(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read a name map from a file: for `convert`, or for ``rename=`` of `load_into`.

    Args:
        path: A JSON object of saved name → new name; or text with two columns, separated by white
            space or one comma, where empty lines and lines that begin with ``#`` don't count.

    Returns:
        Saved name → new name.

    Raises:
        MatchError: A name that stands twice on either side, or a line that isn't two columns: all
            of them.
        CheckpointNotFound: There is no such file.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as exc:
        raise CheckpointNotFound(f"{os.fspath(path)}: there is no such name map") from exc
    problems = []
    pairs: list[tuple[str, object]] = []
    if text.lstrip().startswith("{"):
        try:
            pairs = json.loads(text, object_pairs_hook=list)
        except ValueError as exc:
            raise MatchError(f"{os.fspath(path)}: not valid JSON: {exc}") from exc
    else:
        for number, line in enumerate(text.splitlines(), 1):
            words = line.replace(",", " ", 1).split() if "," in line else line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) == 2:  # noqa: PLR2004  two columns
                pairs.append((words[0], words[1]))
            else:
                problems.append(f"line {number} has {len(words)} columns, expected 2: {line!r:.80}")
    found: dict[str, str] = {}
    sources: dict[str, str] = {}
    for old, new in pairs:
        if not isinstance(new, str):
            problems.append(f"{old!r}: expected a name, found {new!r:.60}")
        elif old in found:
            problems.append(f"{old!r} stands twice on the left")
        elif new in sources:
            problems.append(f"{new!r} stands twice on the right: for {sources[new]!r} and {old!r}")
        else:
            found[old] = new
            sources[new] = old
    if problems:
        raise MatchError(
            f"{os.fspath(path)}: {len(problems)} faults in the name map:\n  "
            + "\n  ".join(problems)
        )
    return found


@dataclass(slots=True)
class _Window:
    """The piece that was read last: one for all tensors of a conversion.

    Attributes:
        owner: The tensor that it is of.
        box: Where it lies there.
        values: What it holds.
    """

    owner: _Converted | None = None
    box: Region = field(default_factory=lambda: Region((), ()))
    values: np.ndarray = field(default_factory=lambda: np.empty(0))


class _Converted(LazyArray):
    """A tensor of the source, as it is to be written."""

    def __init__(
        self, source: StoredTensor, name: str, dtype: np.dtype, window: _Window | None = None
    ) -> None:
        self._source = source
        self._dtype = dtype
        self._window = window or _Window()
        self.name = name

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self._source.shape

    @property
    def dtype(self) -> np.dtype:
        """The dtype to write."""
        return self._dtype

    def read(self, region: Region | None = None) -> np.ndarray:
        """Read it or a box of it; small boxes one after another are read in larger pieces."""
        whole = Region.whole(self.shape)
        region = whole if region is None else region
        if region == whole or not region.size:
            return self._cast(self._source.read(region))
        window = self._window
        if window.owner is not self or region & window.box != region:
            box = self._around(region.start)
            if region & box != region:
                return self._cast(self._source.read(region))
            window.owner, window.values = None, np.empty(0)  # first, to keep one at a time
            window.values = self._cast(self._source.read(box))
            window.owner, window.box = self, box
        return window.values[region.relative_to(window.box.start).slices]

    def _around(self, start: tuple[int, ...]) -> Region:
        """Return a contiguous box of a piece's size that begins in the row of an element."""
        left = _WINDOW_BYTES // self._dtype.itemsize
        low, high = list(start), [first + 1 for first in start]
        for dim in reversed(range(len(start))):
            extent = self.shape[dim]
            if extent > left:
                high[dim] = min(start[dim] + max(left, 1), extent)
                break
            low[dim], high[dim] = 0, extent
            left //= extent
        return Region(tuple(low), tuple(high))

    def _cast(self, values: np.ndarray) -> np.ndarray:
        if values.dtype == self.dtype:
            return values
        wanted = dtypes.find(self.dtype)
        lost = dtypes.count_lost(values, wanted) if wanted else values.size
        if lost:
            raise MatchError(
                f"{self.name!r}: {lost} values do not fit into {self.dtype.name}; nothing was "
                "written. Choose a wider dtype=",
                mismatched={self.name: f"{lost} values do not fit into {self.dtype.name}"},
            )
        with np.errstate(over="ignore", invalid="ignore"):
            return values.astype(self.dtype)


def convert(
    src: Url,
    dst: str | os.PathLike[str],
    *,
    comm: object = None,
    format: str | None = None,
    rename: Rename | str | os.PathLike[str] | None = None,
    dtype: Cast | None = None,
    filter_prefix: Prefixes = (),
    only_prefix: Prefixes = (),
    select: Callable[[str], bool] | None = None,
    overwrite: bool = False,
    source_format: str | None = None,
    source_options: Mapping[str, object] | None = None,
    options: Mapping[str, object] | None = None,
    storage_options: StorageOptions = None,
    timeout_s: float = 3600,
) -> ConvertReport:
    """Collective. Convert a checkpoint, or a file of another format, to any format.

    It is read, converted and written piece by piece; memory does not grow with the file. Nothing is
    visible at `dst` before all of it is written, and what is there stays until then.

    Args:
        src: What to read: anything that `distckpt.open` opens.
        dst: Where to write.
        comm: As in `save`. The ranks share the work: each reads and writes a part of a checkpoint,
            or some of the files where a format has several; a single file is one rank's work.
        format: Format to write. By default the one that the ending of `dst` stands for
            (``.safetensors``, ``.ckpt``, ``.pt``, ``.pth``, ``.npz``, …), and for any other ending
            a distckpt checkpoint.
        rename: Saved name → name to write: a mapping, a callable, or a file with a mapping (see
            `name_map`). Names that a mapping does not have stay, and are reported.
        dtype: The dtype to convert to; or a mapping of glob → dtype, of which the first that fits a
            name counts. A float dtype is for floats, a signed integer's for signed integers: all
            else stays as it is. A value that does not fit is refused.
        filter_prefix: A prefix or several: saved names that start with one are left out.
        only_prefix: A prefix or several: only saved names that start with one are kept.
        select: A predicate: only saved names that it accepts are kept.
        overwrite: Whether what is at `dst` may be replaced.
        source_format: As `format` in `distckpt.open`.
        source_options: As `options` in `distckpt.open`.
        options: What the written format can be told; see its module in `distckpt.formats`.
        storage_options: Passed to the fsspec file systems.
        timeout_s: How long to wait for other ranks, in seconds: for as long as the slowest may
            write.

    Returns:
        What was done, the same on every rank but for the seconds.

    Raises:
        MatchError: The filters leave nothing; two names would become one; values that don't fit.
        UnsupportedFormat: The format can't hold some of it (all are named), or a library is
            missing: the message names it.
        CheckpointExists: There is something at `dst`, and `overwrite` is False.
        SaveFailed: A rank failed or was late.
        CheckpointError: As in `distckpt.open` and `save`.

    All are raised on every rank alike, and nothing has changed at `dst`.
    """
    started = time.monotonic()
    team = connect(comm, timeout_s=timeout_s)
    target = os.fspath(dst)
    job: _Job | None = None
    failure: Exception | None = None
    try:
        source = open_checkpoint(
            src, storage_options=storage_options, format=source_format, options=source_options
        )
        chosen = format or formats.for_writing(target)
        job = _Job.plan(
            source,
            chosen,
            rename=rename,
            dtype=dtype,
            names=filter_names(
                source.manifest.all_names,
                filter_prefix=filter_prefix,
                only_prefix=only_prefix,
                select=select,
            ),
        )
    except Exception as exc:  # noqa: BLE001  a rank that fails still takes part
        failure = exc
    call = f"convert to {target!r} (format={format!r}, overwrite={overwrite})"
    token = _agree(team, target, call, failure, timeout_s)
    if job is None:
        raise SaveFailed(f"{target}: this rank has nothing to convert")
    if job.report.format == formats.OURS:
        formats.checked_options(formats.OURS, None, options)
        save(
            dst,
            {**{tensor.name: tensor for tensor in job.tensors}, **job.values},
            comm=comm,
            metadata=job.metadata,
            overwrite=overwrite,
            # All ranks read them from one place.
            replicas="trust",
            timeout_s=timeout_s,
            storage_options=storage_options,
        )
    else:
        wanted = Wanted(job.tensors, job.values, job.metadata, token, overwrite)

        def begin() -> Writing:
            place = Place.at(target, storage_options)
            form = formats.find(job.report.format)
            return form.write(
                place, wanted, **formats.checked_options(form.name, form.write, options)
            )

        _write(team, target, begin, timeout_s)
    return replace(job.report, seconds=time.monotonic() - started)


@dataclass(frozen=True, slots=True)
class _Job:
    """What is to be converted, under which names."""

    tensors: list[_Converted]
    values: dict[str, object]
    metadata: dict[str, object]
    report: ConvertReport

    @classmethod
    def plan(
        cls,
        source: Checkpoint,
        format: str,
        *,
        names: list[str],
        rename: Rename | str | os.PathLike[str] | None,
        dtype: Cast | None,
    ) -> _Job:
        if format != formats.OURS:
            formats.find(format)
        if isinstance(rename, (str, os.PathLike)):
            rename = name_map(rename)
        new = {old: name for name, old in renamed(names, rename).items()}
        tensors, cast, window = [], {}, _Window()
        for name in names:
            if name not in source:
                continue
            found = source[name]
            kind = _cast_of(name, found.dtype, dtype)
            if kind != found.dtype:
                cast[new[name]] = f"{found.dtype.name} → {kind.name}"
            tensors.append(_Converted(found, new[name], kind, window))
        mapping = rename if isinstance(rename, Mapping) else {}
        return cls(
            tensors,
            {new[name]: value for name, value in source.values.items() if name in new},
            dict(source.metadata),
            ConvertReport(
                source.format,
                format,
                len(tensors),
                sum(tensor.size * tensor.dtype.itemsize for tensor in tensors),
                {old: found for old, found in new.items() if old != found},
                tuple(name for name in names if name not in mapping) if mapping else (),
                tuple(name for name in mapping if name not in new),
                cast,
                tuple(new[name] for name in source.per_rank if name in new),
            ),
        )


def _cast_of(name: str, saved: np.dtype, wanted: Cast | None) -> np.dtype:
    """Return the dtype that a tensor is written with."""
    if isinstance(wanted, Mapping):
        found = (kind for glob, kind in wanted.items() if fnmatch.fnmatchcase(name, glob))
        wanted = next(found, None)
    if wanted is None:
        return saved
    text = wanted.name if isinstance(wanted, np.dtype) else getattr(wanted, "__name__", str(wanted))
    # torch.float16 and jax.numpy.float16 mean the same.
    entry, old = dtypes.BY_NAME.get(text.removeprefix("torch.")), dtypes.find(saved)
    if entry is None:
        raise LayoutError(
            f"dtype={wanted!r}: expected one of {', '.join(each.name for each in dtypes.TABLE)}"
        )
    return entry.numpy if old is not None and dtypes.can_convert(old, entry) else saved


def _agree(team: Team, target: str, call: str, failure: Exception | None, timeout_s: float) -> str:
    """Collective. Go on if no rank has failed.

    Args:
        team: The ranks.
        target: Where to write, for messages.
        call: What is done; the same on all ranks.
        failure: What went wrong on this rank.
        timeout_s: How long to wait.

    Returns:
        A random text, the same on all ranks.

    Raises:
        CheckpointError: What went wrong, on all ranks alike.
    """

    def decide(calls: list[Any]) -> list[Any]:
        errors = {rank: call["error"] for rank, call in enumerate(calls) if call["error"]}
        if len(errors) == len(calls) and all(error == errors[0] for error in errors.values()):
            raise from_plain(errors[0])  # all say the same, of what all were given
        raise_together(errors, target, SaveFailed, "convert", own_kind=True)
        return [secrets.token_hex(8)] * len(calls)

    mine = {"call": call, "error": None if failure is None else to_plain(failure)}
    operation = team.operation(timeout_s)
    try:
        return str(team.drive(operation.agree(mine, decide, f"join the conversion to {target}")))
    except Late as late:
        raise SaveFailed(str(late), failures=dict.fromkeys(late.ranks, str(late))) from late
    except CheckpointError as exc:
        raise exc from failure


def _write(team: Team, target: str, begin: Callable[[], Writing], timeout_s: float) -> None:
    """Collective. Write another format's file or files: the parts by all ranks, then the commit."""
    writing: Writing | None = None
    failure: Exception | None = None
    try:
        writing = begin()
    except Exception as exc:  # noqa: BLE001  the others wait for this rank
        failure = exc
    # No rank may write before all have seen what was there.
    _agree(team, target, "begin to write", failure, timeout_s)
    try:
        if writing is not None:
            for index in _mine(writing.part_bytes, team.rank, team.size):
                writing.parts[index]()
    except Exception as exc:  # noqa: BLE001  the others wait for this rank
        failure = exc
    operation = team.operation(timeout_s)

    def finish() -> Waiting[None]:
        error = None if failure is None else to_plain(failure)
        outcome: dict[str, Any] = {"error": None}
        try:
            errors = yield from operation.gather(0, error, f"write its part of {target}")
            if errors is not None:
                failed = {rank: found for rank, found in enumerate(errors) if found}
                raise_together(failed, target, SaveFailed, "convert", own_kind=True)
                if writing is not None:
                    writing.commit()
        except Exception as exc:  # noqa: BLE001  the others wait for the outcome
            if isinstance(exc, Late):
                exc = SaveFailed(str(exc), failures=dict.fromkeys(exc.ranks, str(exc)))
            outcome["error"] = to_plain(exc)
        told = yield from operation.broadcast(1, outcome, "finish the conversion")
        if told["error"] is not None:
            if writing is not None:
                writing.abort()
            raise from_plain(told["error"]) from failure

    team.drive(finish())


def _mine(part_bytes: Sequence[int], rank: int, size: int) -> list[int]:
    """Share the parts out by bytes, the largest first; return this rank's."""
    load = [0] * size
    mine = []
    for index in sorted(range(len(part_bytes)), key=lambda part: -part_bytes[part]):
        least = load.index(min(load))
        load[least] += max(part_bytes[index], 1)
        if least == rank:
            mine.append(index)
    return sorted(mine)
