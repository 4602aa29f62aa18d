"""Pictures of what came out: distckpt against the floors, and peers against distckpt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks.suite.rows import PEERS, Measured
from benchmarks.suite.turns import Spread

_MET, _NOT_MET, _FREE = "#2a7f79", "#d1603d", "#9fb3b8"
_LEAST = 0.01  # of the axis: below there is nothing to tell
_INK, _FAINT = "#22303a", "#d9dfe2"
_SHADES = {"disk": "#2a5d8f", "tmpfs": "#7fb0d6"}
# What the first picture shows, in short.
_SHORT = {
    "save": "durable save ÷ write + fsync",
    "save-best": "durable save ÷ the faster of\nbuffered and O_DIRECT writes",
    "committed": "async save, until committed ÷ write + fsync",
    "stall": "async save, steady stall ÷ memcpy",
    "stall-first": "async save, first stall ÷ steady stall",
    "lazy-stall": "lazy save, stall ÷ memcpy",
    "lazy-slowdown": "lazy save, loop slowed while copying ÷ memcpy",
    "slowdown": "training slowdown a checkpoint ÷ memcpy",
    "load": "load, verified ÷ preadv",
    "load-unverified": "load, verify=False ÷ preadv",
    "load-strided": "load into strided arrays ÷ preadv",
    "load-turned": "load, rows ↔ columns ÷ preadv",
    "load-cold": "load, cold ÷ preadv, cold",
}
_PEER_TITLES = {
    "peer-save": "durable save",
    "peer-stall": "async stall",
    "peer-committed": "until committed",
    "peer-load": "warm load",
    "peer-slowdown": "training slowdown",
}


def draw(folder: Path, about: dict[str, Any], rows: Sequence[Measured]) -> list[Path]:
    """Write the pictures that there are numbers for.

    Args:
        folder: Where to.
        about: The machine.
        rows: What was measured.

    Returns:
        The files.
    """
    style = {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.edgecolor": _FAINT,
        "svg.hashsalt": "distckpt",
    }
    found = []
    with mpl.rc_context(style):
        for name, make in (("floors", _floors), ("peers", _peers)):
            figure = make(about, rows)
            if figure is not None:
                found.append(folder / f"{name}.png")
                figure.savefig(found[-1], dpi=160, facecolor="white")
    return found


def _named(about: dict[str, Any], place: str) -> str:
    """Name a place, and its file system."""
    kind = about["places"][place]
    return place if kind == place else f"{place} ({kind})"


def _floors(about: dict[str, Any], rows: Sequence[Measured]) -> Figure | None:
    some = [
        row
        for row in rows
        if row.row in _SHORT
        and not row.peer
        and row.spread
        and row.ranks == 2  # noqa: PLR2004
        and row.state.startswith("transformer")
    ]
    if not some:
        return None
    keys = [key for key in _SHORT if any(row.row == key for row in some)]
    places = [place for place in _SHADES if any(row.place == place for row in some)]
    figure = Figure(figsize=(10.5, 1.7 + 0.36 * len(keys)), layout="constrained")
    axes = figure.subplots(1, len(places), sharey=True, squeeze=False)[0]
    for place, axis in zip(places, axes, strict=True):
        _frame(axis, f"on {_named(about, place)}", "median ratio, with quartiles")
        axis.set_xlim(_LEAST, 30)
        axis.axvline(1, color=_INK, linewidth=1)
        for at, key in enumerate(keys):
            here = [row for row in some if row.row == key and row.place == place]
            if not here or here[0].spread is None:
                axis.text(1.13, at, "—", va="center", color=_FREE)
                continue
            row, spread = here[0], here[0].spread
            color = {True: _MET, False: _NOT_MET, None: _FREE}[row.is_met]
            _bar(axis, at, spread, color, 0.62)
            if row.limit is not None:
                axis.plot([row.limit] * 2, [at - 0.42, at + 0.42], color=_INK, linewidth=2.2)
            edge = max(spread.high, row.limit or 0, 1)
            digits = 3 if abs(spread.median) < 0.0995 else 2  # noqa: PLR2004
            axis.text(edge * 1.13, at, f"{spread.median:.{digits}f}", va="center", fontsize=8.5)
        axis.set_yticks(range(len(keys)), [_SHORT[key] for key in keys])
        axis.set_ylim(len(keys) - 0.4, -0.6)
    size = some[0].nbytes / 1e6
    figure.suptitle(
        f"distckpt ÷ the hardware's floor: a transformer with Adam, {size:.0f} MB, 2 ranks",
        fontsize=11.5,
        fontweight="bold",
        x=0.01,
        ha="left",
    )
    figure.legend(
        handles=[
            Patch(color=_MET, label="limit met"),
            Patch(color=_NOT_MET, label="limit not met"),
            Patch(color=_FREE, label="no limit"),
            Line2D([], [], color=_INK, linewidth=2.2, label="the limit"),
            Line2D([], [], color=_INK, linewidth=1, label="1 = the floor"),
        ],
        loc="outside lower center",
        ncols=5,
        frameon=False,
    )
    return figure


def _peers(about: dict[str, Any], rows: Sequence[Measured]) -> Figure | None:
    some = [row for row in rows if row.peer and row.spread]
    if not some:
        return None
    keys = [key for key in _PEER_TITLES if any(row.row == key for row in some)]
    peers = [peer for peer in PEERS if any(row.peer == peer for row in some)]
    places = [place for place in _SHADES if any(row.place == place for row in some)]
    figure = Figure(figsize=(12.5, 1.9 + 0.62 * len(peers)), layout="constrained")
    axes = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    height = 0.72 / len(places)
    for key, axis in zip(keys, axes, strict=True):
        _frame(axis, _PEER_TITLES[key], "× distckpt's time")
        for at, peer in enumerate(peers):
            for index, place in enumerate(places):
                here = [row for row in some if (row.row, row.peer, row.place) == (key, peer, place)]
                y = at + (index - (len(places) - 1) / 2) * height
                if not here:
                    axis.text(1.05, y, "—", va="center", color=_FREE)
                    continue
                best = next(row for row in here if row.is_best)
                _peer_bar(axis, y, height, best=best, rows=here, color=_SHADES[place])
        axis.axvline(1, color=_INK, linewidth=1)
        axis.set_xlim(0.2, 60)
        ranks = {row.peer: row.ranks for row in some}
        axis.set_yticks(
            range(len(peers)),
            [f"{PEERS[peer]}\n{ranks[peer]} rank{'s' * (ranks[peer] > 1)}" for peer in peers],
        )
        axis.set_ylim(len(peers) - 0.45, -0.55)
    figure.suptitle(
        "How many times as long as distckpt, in the same run, at equal durability",
        fontsize=11.5,
        fontweight="bold",
        x=0.01,
        ha="left",
    )
    figure.legend(
        handles=[
            *(
                Patch(
                    color=_SHADES[place],
                    label=f"fastest setting, {_named(about, place)}",
                )
                for place in places
            ),
            Line2D(
                [],
                [],
                marker="o",
                linestyle="",
                markerfacecolor="white",
                color=_INK,
                label="its default",
            ),
            Line2D([], [], color=_INK, linewidth=1, label="1 = distckpt"),
        ],
        loc="outside lower center",
        ncols=5,
        frameon=False,
    )
    return figure


def _peer_bar(
    axis: Axes, y: float, height: float, *, best: Measured, rows: Sequence[Measured], color: str
) -> None:
    spread = best.spread
    if spread is None:
        return
    _bar(axis, y, spread, color, 0.9 * height)
    edge = max(spread.high, 1.0)
    for row in rows:
        if row.setting == "default" and not row.is_best and row.spread is not None:
            axis.plot(row.spread.median, y, "o", color=_INK, markerfacecolor="white", markersize=4)
            edge = max(edge, row.spread.median * 1.12)
    axis.text(
        edge * 1.12,
        y,
        f"{spread.median:.1f}" if spread.median >= 1 else f"{spread.median:.2f}",
        va="center",
        fontsize=7.5,
    )


def _bar(axis: Axes, y: float, spread: Spread, color: str, height: float) -> None:
    """Draw a median from 1, which is what it is compared with, and its quartiles."""
    low, median, high = (max(value, _LEAST) for value in (spread.low, spread.median, spread.high))
    axis.barh(y, median - 1, height, left=1, color=color, linewidth=0)
    axis.plot([low, high], [y, y], color=_INK, linewidth=1.2)


def _frame(axis: Axes, title: str, label: str) -> None:
    axis.set_xscale("log")
    axis.set_title(title, fontsize=9.5, loc="left")
    axis.set_xlabel(label, fontsize=8.5)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.grid(visible=True, axis="x", color=_FAINT, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
