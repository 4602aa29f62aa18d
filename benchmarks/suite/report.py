"""What came out, as JSON and as a Markdown table; `plots` draws it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.suite.rows import PEERS, ROWS, Measured

_PEER_ROWS = [key for key in ROWS if key.startswith("peer-")]
_HEAD = """# What saves and loads cost here

{machine}

Ratios, where no unit is given: the median [quartiles] of pairs that took turns in one run. ✓: the
limit is met; **✗**: it is not. [docs/performance.md](../../docs/performance.md) says what each is
divided by, and why. {verdict}, in {seconds:.0f} s{quick}.
"""


def number(row: Measured) -> str:
    """Write a row's median and quartiles; a dash if there are none."""
    spread, unit = row.spread, ROWS[row.row].unit
    if spread is None:
        return "—"
    size = abs(spread.median)
    digits = 3 if size < 0.0995 else 2 if size < 9.95 else 1 if size < 99.5 else 0  # noqa: PLR2004
    middle, low, high = (
        f"{value:.{digits}f}" for value in (spread.median, spread.low, spread.high)
    )
    told = middle if unit == "×" else f"{middle} {unit}"
    return told if len(row.values) == 1 else f"{told} [{low}, {high}]"


def limit(row: Measured) -> str:
    """Write a row's limit; nothing if it has none here."""
    if row.limit is None:
        return ""
    spec = ROWS[row.row]
    unit = "" if spec.unit == "×" else f" {spec.unit}"
    return f"{'≤' if spec.sense == 'at most' else '≥'} {row.limit:g}{unit}"


def mark(row: Measured) -> str:
    """Write whether a row's limit is met; nothing if it has none, or no number."""
    return "" if row.is_met is None else " ✓" if row.is_met else " **✗**"


def line(row: Measured) -> str:
    """Say a row in one line."""
    spec = ROWS[row.row]
    who = f"{PEERS[row.peer]}{f' ({row.setting})' if row.setting else ''}: " if row.peer else ""
    against = f" ÷ {spec.against}" if spec.against else ""
    why = f" ({row.missing})" if row.missing else ""
    bound = f"  {limit(row)}{mark(row)}" if row.spread and row.limit is not None else ""
    return f"{who}{spec.title}{against}: {number(row)}{why}{bound}"


def verdict(rows: Iterable[Measured]) -> str:
    """Count the limits that are met."""
    judged = [row.is_met for row in rows if row.is_met is not None]
    return f"{sum(judged)} of {len(judged)} limits met"


def write(folder: Path, about: Mapping[str, Any], rows: Sequence[Measured]) -> None:
    """Write ``latest.json`` and ``latest.md``.

    Args:
        folder: Where to.
        about: The machine, and what is to be known of this run.
        rows: What was measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {"machine": about, "rows": [row.to_json() for row in rows]}
    text = json.dumps(found, indent=1, ensure_ascii=False)
    (folder / "latest.json").write_text(text + "\n", encoding="utf-8")
    (folder / "latest.md").write_text(markdown(about, rows), encoding="utf-8")


def read(path: Path) -> tuple[Mapping[str, Any], list[Measured]]:
    """Read ``latest.json`` back."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["machine"], [Measured.from_json(row) for row in found["rows"]]


def markdown(about: Mapping[str, Any], rows: Sequence[Measured]) -> str:
    """Make the page."""
    head = _HEAD.format(
        machine=_machine(about),
        verdict=verdict(rows),
        seconds=about.get("seconds", 0),
        quick=" (`QUICK=1`: less data, fewer pairs)" if about.get("quick") else "",
    )
    ours = [row for row in rows if not row.peer]
    parts = [head, *_against_floors(ours), *_elsewhere(ours), *_against_peers(rows), *_notes(rows)]
    return "\n".join(parts)


def _machine(about: Mapping[str, Any]) -> str:
    places = ", ".join(f"{name}: {kind}" for name, kind in about.get("places", {}).items())
    hardware = ", ".join(
        str(about[key]) for key in ("processor", "memory", "system") if key in about
    )
    known = {"processor", "memory", "system", "cores", "places", "quick", "seconds"}
    software = ", ".join(f"{name} {value}" for name, value in about.items() if name not in known)
    return f"{about.get('cores', '?')} cores of {hardware}; {places}. {software}."


def _table(header: Sequence[str], body: Iterable[Sequence[str]]) -> Iterator[str]:
    for cells in (header, ["---"] * len(header), *body):
        yield f"| {' | '.join(cells)} |"
    yield ""


def _against_floors(rows: Sequence[Measured]) -> Iterator[str]:
    """Yield a table a section: what has a limit where it has it, and the rest of the same state."""
    main = [row for row in rows if row.limit is not None or _is_main(row)]
    places = sorted({row.place for row in main})
    for section in dict.fromkeys(spec.section for spec in ROWS.values()):
        body = []
        for key, spec in ROWS.items():
            some = [row for row in main if row.row == key]
            if spec.section != section or not some:
                continue
            against = f"{spec.title} ÷ {spec.against}" if spec.against else spec.title
            for who in dict.fromkeys(map(_who, some)):
                same = [row for row in some if _who(row) == who]
                bounds = list(dict.fromkeys(limit(row) for row in same if limit(row)))
                cells = {row.place: f"{number(row)}{mark(row)}" for row in same}
                body.append(
                    [against, who, " / ".join(bounds), *(cells.get(place, "") for place in places)]
                )
        if body:
            yield f"## {section}\n"
            yield from _table(["what ÷ against what", "state · ranks", "limit", *places], body)


def _who(row: Measured) -> str:
    state = row.state.partition(",")[0]
    return f"{state} · {row.ranks}{' · OpenMPI' if row.mpi == 'openmpi' else ''}"


def _is_main(row: Measured) -> bool:
    wanted, numbers = ROWS[row.row].limit_at
    return row.state.startswith(wanted or "transformer") and row.ranks in numbers


def _elsewhere(rows: Sequence[Measured]) -> Iterator[str]:
    """Yield the table of what has no limit: other states, other numbers of ranks."""
    rest = [row for row in rows if row.limit is None and not _is_main(row) and row.spread]
    columns = list(dict.fromkeys((row.state, row.ranks) for row in rest))
    if not columns:
        return
    body = []
    for key, spec in ROWS.items():
        for place in sorted({row.place for row in rest}):
            cells = {
                (row.state, row.ranks): number(row)
                for row in rest
                if (row.row, row.place) == (key, place)
            }
            if cells:
                against = f"{spec.title} ÷ {spec.against}" if spec.against else spec.title
                body.append([against, place, *(cells.get(column, "") for column in columns)])
    yield "## Other states, other numbers of ranks\n"
    names = [f"{state}, {ranks} rank{'s' * (ranks > 1)}" for state, ranks in columns]
    yield from _table(["what ÷ against what", "where", *names], body)


def _against_peers(rows: Sequence[Measured]) -> Iterator[str]:
    """Yield the tables of how many times as long as distckpt others take."""
    some = [row for row in rows if row.peer]
    if not some:
        return
    yield "## Peers: how many times as long as distckpt, in the same run\n"
    yield (
        "At the peer's default, and at the fastest of its settings that were tried, for each "
        "column by itself. A limit holds for the fastest: for PyTorch DCP as the columns say, for "
        "the others ≥ 1.\n"
    )
    for place in sorted({row.place for row in some}):
        here = [row for row in some if row.place == place]
        bounds = {row.row: f" {limit(row)}" for row in here if row.peer == "dcp" and limit(row)}
        body = []
        for peer, ranks in dict.fromkeys((row.peer, row.ranks) for row in here):
            for kind in ("default", "fastest"):
                found = [row for row in here if row.peer == peer and _is_kind(row, kind)]
                cells = {row.row: f"{number(row)}{mark(row)}" for row in found}
                if cells:
                    name = f"{PEERS[peer]}, {ranks} rank{'s' * (ranks > 1)}"
                    body.append([name, kind, *(cells.get(key, "") for key in _PEER_ROWS)])
        titles = [f"{ROWS[key].title}{bounds.get(key, '')}" for key in _PEER_ROWS]
        yield from _table([place, "setting", *titles], body)
    yield "The fastest settings:\n"
    chosen: dict[tuple[str, str], list[str]] = {}
    for row in some:
        if row.is_best and row.setting:
            what = f"{ROWS[row.row].title} on {row.place}"
            chosen.setdefault((row.peer, row.setting), []).append(what)
    for (peer, setting), where in chosen.items():
        yield f"- {PEERS[peer]}, {setting}: {'; '.join(where)}"
    yield ""


def _is_kind(row: Measured, kind: str) -> bool:
    return row.setting in {"", "default"} if kind == "default" else row.is_best


def _notes(rows: Sequence[Measured]) -> Iterator[str]:
    """Yield why numbers are missing."""
    why: dict[str, list[str]] = {}
    for row in rows:
        if row.missing:
            who = f"{PEERS[row.peer]}: " if row.peer else ""
            what = f"{who}{ROWS[row.row].title} ({row.place}, {row.ranks} ranks)"
            why.setdefault(row.missing, []).append(what)
    if why:
        yield "## What is missing, and why\n"
        yield from (f"- {reason}: {'; '.join(dict.fromkeys(what))}" for reason, what in why.items())
        yield ""
