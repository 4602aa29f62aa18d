"""``python -m distckpt info|ls|verify|clean|convert|halt URL``. rich's only door."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from distckpt.api import open as open_checkpoint
from distckpt.checkpoint import Checkpoint
from distckpt.clean import GRACE_S, clean
from distckpt.convert import convert
from distckpt.coordinator import Solo
from distckpt.errors import CheckpointError, CheckpointNotFound, size_text
from distckpt.formats import OURS
from distckpt.manager import Manager
from distckpt.manager.halt import HALT_NAME, write_halt
from distckpt.store import open_store
from distckpt.team import COORDINATOR, connect


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Not collective.

    Args:
        arguments: Words of the command line, without the program's name; the process's by default.

    Returns:
        The exit status: 0, or 1 when it can't be done, as with a checkpoint that is missing or
        damaged (2 for wrong arguments).
    """
    parser = argparse.ArgumentParser(
        prog="distckpt", description="Look at checkpoints, convert them, and halt runs."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function, text in (
        ("info", _info, "what a checkpoint is: when, by how many ranks, how large"),
        ("ls", _list, "the tensors of a checkpoint, or the checkpoints of a run"),
        (
            "verify",
            _verify,
            "read every byte and compare the checksums (mpirun: all ranks share the work)",
        ),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("url", help="a path, or any URL that fsspec knows")
        command.set_defaults(run=function)
    text = "find what saves that died have left, and remove it with --yes"
    command = commands.add_parser("clean", help=text, description=text)
    command.add_argument("url", help="a checkpoint's folder, or the root of a run")
    command.add_argument("--yes", action="store_true", help="remove it; without, only look")
    command.add_argument(
        "--grace",
        type=float,
        default=GRACE_S / 3600,
        metavar="HOURS",
        help="what is younger may be of a save that still runs (default: %(default)g)",
    )
    command.set_defaults(run=_clean)
    text = "read any format and write any other"
    command = commands.add_parser("convert", help=text, description=text)
    command.add_argument("url", help="what to read")
    command.add_argument("target", help="where to write; its ending says which format")
    command.add_argument("--format", help="the format to write, in place of the ending's")
    command.add_argument("--dtype", help="convert floats, or signed integers, to this dtype")
    command.add_argument("--rename", metavar="FILE", help="old and new names: JSON or two columns")
    command.add_argument("--overwrite", action="store_true", help="replace what is there")
    command.set_defaults(run=_convert)
    text = "ask a run to save and stop, now or later"
    command = commands.add_parser("halt", help=text, description=text)
    command.add_argument("url", help="the run's folder")
    when = command.add_mutually_exclusive_group()
    when.add_argument("--at", metavar="TIME", help="at this time, such as 2030-01-31T18:00+01:00")
    when.add_argument("--after", metavar="N", type=int, help="after N more saves")
    when.add_argument("--cancel", action="store_true", help="take back what was asked")
    command.set_defaults(run=_halt)
    chosen = parser.parse_args(arguments)
    try:
        chosen.run(chosen)
    except CheckpointError as exc:
        sys.stderr.write(f"{type(exc).__name__}: {exc}\n")
        return 1
    return 0


def _info(chosen: argparse.Namespace) -> None:
    checkpoint = open_checkpoint(chosen.url)
    manifest = checkpoint.manifest
    rows = [
        ("url", checkpoint.url),
        ("format", checkpoint.format),
        ("tensors", f"{len(checkpoint)}, {size_text(manifest.tensor_bytes)}"),
    ]
    if checkpoint.format == OURS:  # other formats' files don't say
        rows[2:2] = [
            ("created", f"{_time(checkpoint)} UTC"),
            ("step", "-" if checkpoint.step is None else str(checkpoint.step)),
            ("saved by", f"{checkpoint.ranks} rank{'s' if checkpoint.ranks > 1 else ''}"),
            ("save id", f"{manifest.save_id:016x}"),
        ]
        size = size_text(int(manifest.file_length.sum()))
        rows.append(("files", f"{len(manifest.file_names)}, {size}"))
    rows += [(f"metric {name}", _metric(value)) for name, value in checkpoint.metrics.items()]
    rows += [(f"value {name}", _short(value)) for name, value in checkpoint.values.items()]
    rows += [(f"per rank {name}", "one a rank") for name in checkpoint.per_rank]
    rows += [(f"metadata {name}", _short(value)) for name, value in checkpoint.metadata.items()]
    _table(("", ""), rows)


def _list(chosen: argparse.Namespace) -> None:
    try:
        checkpoint = open_checkpoint(chosen.url)
    except CheckpointNotFound:
        runs = Manager(chosen.url, comm=Solo())
        steps = runs.steps()
        if not steps:
            raise
        header = ("step", "created", "ranks", "size", "metrics")
        _table(header, [_step_row(runs.open(step)) for step in steps])
        return
    manifest = checkpoint.manifest
    rows = []
    for name in checkpoint:
        tensor = checkpoint[name]
        pieces = len(tensor.layout)
        files = len(set(tensor.layout.file.tolist()))
        shape = " × ".join(map(str, tensor.shape)) or "scalar"
        rows.append(
            (name, tensor.dtype.name, shape, size_text(tensor.nbytes), f"{pieces} in {files}")
        )
    _table(("tensor", "dtype", "shape", "size", "pieces in files"), rows)
    others = len(manifest.values) + len(manifest.per_rank)
    if others:
        sys.stdout.write(f"and {others} values: see `info`\n")


def _step_row(checkpoint: Checkpoint) -> tuple[str, ...]:
    return (
        str(checkpoint.step),
        _time(checkpoint),
        str(checkpoint.ranks),
        size_text(checkpoint.manifest.tensor_bytes),
        ", ".join(f"{name} {_metric(value, 4)}" for name, value in checkpoint.metrics.items()),
    )


def _convert(chosen: argparse.Namespace) -> None:
    report = convert(
        chosen.url,
        chosen.target,
        format=chosen.format,
        dtype=chosen.dtype,
        rename=chosen.rename,
        overwrite=chosen.overwrite,
    )
    sys.stdout.write(f"{report}\n")


def _halt(chosen: argparse.Namespace) -> None:
    store = open_store(chosen.url)
    where = f"{store.url.rstrip('/')}/{HALT_NAME}"
    if chosen.cancel:
        store.delete([HALT_NAME])
        sys.stdout.write(f"{where}: removed\n")
        return
    text = "now"
    if chosen.at is not None:
        text = f"at {chosen.at}"
    elif chosen.after is not None:
        text = f"after {chosen.after} saves"
    try:
        write_halt(store, text)
    except ValueError as exc:
        raise CheckpointError(f"can't halt {exc}") from exc
    sys.stdout.write(f"{where}: the run will save and stop {text}\n")


def _time(checkpoint: Checkpoint) -> str:
    return f"{checkpoint.created:%Y-%m-%d %H:%M:%S}" if checkpoint.created else "-"


def _clean(chosen: argparse.Namespace) -> None:
    report = clean(chosen.url, grace_s=3600 * chosen.grace, dry_run=not chosen.yes)
    sys.stdout.write(f"{report}\n")


def _verify(chosen: argparse.Namespace) -> None:
    team = connect()
    checkpoint = open_checkpoint(chosen.url)
    size = size_text(checkpoint.verify(comm=team))
    if team.rank != COORDINATOR:
        return
    if checkpoint.format == OURS:
        found = f"good: {size} in {len(checkpoint.manifest.file_names)} files"
    else:
        found = f"readable: {size} in {len(checkpoint)} tensors ({checkpoint.format})"
    sys.stdout.write(f"{checkpoint.url}: {found}\n")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; plainly where rich is not installed, or nobody is looking."""
    rows = [[_printable(cell) for cell in row] for row in rows]
    if sys.stdout.isatty() and find_spec("rich") is not None:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=any(header), header_style="bold", pad_edge=False)
        for title in header:
            table.add_column(title, overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))  # a str could hold markup
        Console().print(table)
        return
    lines = [header, *rows] if any(header) else list(rows)
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        sys.stdout.write("  ".join(cells).rstrip() + "\n")


def _metric(value: object, digits: int = 6) -> str:
    # A number, unless a stranger says otherwise.
    return f"{value:.{digits}g}" if isinstance(value, float) else _short(value)


def _short(value: object) -> str:
    """Show the beginning of a value, even of one that Python refuses to print."""
    try:
        return f"{value!r:.60}"
    except ValueError:  # a number of more digits than sys.get_int_max_str_digits()
        return f"{type(value).__name__} of too many digits to print"


def _printable(cell: str) -> str:
    """Escape what is no printable character: a stranger's names must not drive the terminal."""
    return cell if cell.isprintable() else repr(cell)[1:-1]
