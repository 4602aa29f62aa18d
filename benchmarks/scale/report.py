"""The results as Markdown tables and as log-log plots with fitted exponents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.scale.simulator import Result

# The last so many points are fitted.
FITTED = 3
_ROWS = {
    "tensors": lambda one: f"{one.tensors:,}",
    "items of all ranks": lambda one: _short(one.items),
    "boxes": lambda one: _short(one.boxes),
    "templates": lambda one: f"{one.templates:,}",
    "sent, B an item": lambda one: f"{one.item_bytes_sent:.1f}",
    "received by the coordinator": lambda one: _bytes(one.gather_bytes),
    "plan": lambda one: _time(one.plan_s),
    "manifest, encoded": lambda one: _time(one.encode_s),
    "peak memory": lambda one: _bytes(one.peak_bytes),
    "manifest": lambda one: _bytes(one.manifest_bytes),
    "decoded": lambda one: _time(one.decode_s),
    "told a rank": lambda one: f"{_bytes(one.part_bytes_mean)} ({_bytes(one.part_bytes_max)})",
    "rank's part, first": lambda one: _time(one.rank_first_s),
    "next": lambda one: _time(one.rank_next_s),
    "coordinator's next": lambda one: _time(one.steady_s),
    "busiest ÷ best": lambda one: f"{one.busiest_bytes / one.best_bytes:.4f}",
    "load plan": lambda one: f"{_time(one.load_plan_s)} ({one.load_layout})",
}
_PLOTS: dict[str, tuple[str, Callable[[Result], float]]] = {
    "time": (
        "plan and manifest at the coordinator, seconds",
        lambda one: one.plan_s + one.encode_s,
    ),
    "memory": ("peak memory of the coordinator, bytes", lambda one: one.peak_bytes),
    "manifest": ("manifest, bytes", lambda one: one.manifest_bytes),
    "received": ("received by the coordinator, bytes", lambda one: one.gather_bytes),
}
_KINDS = {
    "megatron": "TP × PP × DP, ZeRO-1",
    "fsdp": "FSDP",
    "fsdp-tp": "FSDP × TP",
    "experts": "PP × EP × DP, ZeRO-1",
}
_MARKS = {"megatron": "o", "fsdp": "s", "fsdp-tp": "^", "experts": "D"}


def _short(count: float) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,.0f}"  # noqa: PLR2004  a million


def _bytes(size: float) -> str:
    for unit, power in (("MB", 1e6), ("kB", 1e3)):
        if size >= power:
            return f"{size / power:.{0 if size >= 100 * power else 1}f} {unit}"
    return f"{size:.0f} B"


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    digits = 0 if seconds >= 0.1 else 1 if seconds >= 1e-3 else 2  # noqa: PLR2004  3 digits in all
    return f"{seconds * 1e3:.{digits}f} ms"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Fit y ~ x^exponent."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def write_report(  # noqa: PLR0917  all of it is one page
    folder: Path,
    results: Sequence[Result],
    ratios: Mapping[str, Sequence[float]],
    own: Mapping[str, float],
    balances: Sequence[Mapping[str, object]],
    kept: Sequence[tuple[str, float, float]],
) -> None:
    """Write the tables and the plots."""
    lines = ["# Planning from 64 to 16,384 ranks", ""]
    lines += ["What the numbers mean is in docs/scale.md. Times are of the processor, on one core."]
    lines += ["", "## Limits", ""]
    lines += _table(
        ("", "measured", "limit"),
        [(what, f"{value:.4g}", f"{limit:g}") for what, value, limit in kept],
    )
    for name in dict.fromkeys(one.model for one in results):
        lines += ["", f"## {name}", ""]
        lines += _table(
            ("layout", *_ROWS),
            [
                (one.layout, *(show(one) for show in _ROWS.values()))
                for one in results
                if one.model == name
            ],
        )
    lines += ["", "## What a doubling costs at the coordinator", ""]
    lines += _table(
        ("", "plan and manifest"),
        [(name, ", ".join(f"{ratio:.2f} ×" for ratio in row)) for name, row in ratios.items()],
    )
    lines += ["", f"## A rank's own part, for {own['tensors']:,.0f} tensors", ""]
    lines += _table(
        tuple(name for name in own if name != "tensors"),
        [tuple(f"{value:.1f} ms" for name, value in own.items() if name != "tensors")],
    )
    lines += ["", "## A load on all ranks, in the layout of the save", ""]
    lines += _table(
        (
            "model",
            "layout",
            "plan",
            "rows",
            "blocks",
            "read twice",
            "files a rank",
            "ranks a file",
            "busiest reader ÷ mean",
        ),
        [
            (
                str(row["model"]),
                str(row["layout"]),
                _time(float(str(row["plan_s"]))),
                f"{row['rows']:,}",
                f"{row['blocks_read']:,} of {row['blocks']:,}",
                str(row["blocks_read_twice"]),
                f"{row['files_a_rank_mean']:.2f} (at most {row['files_a_rank_most']})",
                f"at most {row['ranks_a_file_most']}",
                f"{row['busiest_reader']:.3f}",
            )
            for row in balances
        ],
    )
    lines += ["", "## Simulated: seconds of a whole save and load", ""]
    lines += _table(
        ("model", "layout", *(name for name in results[0].simulated)),
        [
            (one.model, one.layout, *(f"{value:.3f}" for value in one.simulated.values()))
            for one in results
        ],
    )
    (folder / "scale.md").write_text("\n".join(lines) + "\n")
    mpl.use("Agg")
    for name, (label, value) in _PLOTS.items():
        _plot(folder / f"scale-{name}.png", results, label, value)


def _plot(
    path: Path, results: Sequence[Result], label: str, value: Callable[[Result], float]
) -> None:
    """Plot one quantity over the ranks: a panel a kind of layout, a line a model."""
    models = list(dict.fromkeys(one.model for one in results))
    colours = dict(zip(models, plt.get_cmap("tab10").colors, strict=False))
    kinds = [kind for kind in _KINDS if any(one.kind == kind for one in results)]
    figure, panels = plt.subplots(
        1, len(kinds), figsize=(3.6 * len(kinds), 3.8), sharey=True, squeeze=False
    )
    for axes, kind in zip(panels[0], kinds, strict=True):
        for model in models:
            rows = sorted(
                (
                    one
                    for one in results
                    # Others have tensors that divide better, or worse: no point of a line.
                    if (one.model, one.kind) == (model, kind) and not one.ranks & (one.ranks - 1)
                ),
                key=lambda one: one.ranks,
            )
            if not rows:
                continue
            ranks, values = [one.ranks for one in rows], [value(one) for one in rows]
            name = model
            if len(rows) >= FITTED:
                name += f": ∝ ranks$^{{{exponent(ranks[-FITTED:], values[-FITTED:]):.2f}}}$"
            axes.loglog(
                ranks, values, _MARKS[kind] + "-", color=colours[model], label=name, ms=4, lw=1.3
            )
        axes.set_title(_KINDS[kind], fontsize=10)
        axes.set_xlabel("ranks")
        shown = sorted({one.ranks for one in results if one.ranks & (one.ranks - 1) == 0})
        axes.xaxis.set_major_locator(FixedLocator(shown[:: 1 if len(shown) < 6 else 2]))  # noqa: PLR2004
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axes.tick_params(labelsize=8)
        axes.grid(which="major", alpha=0.3)
        axes.legend(fontsize=7, loc="upper left", framealpha=0.8)
    low, high = panels[0][0].get_ylim()
    panels[0][0].set_ylim(low, high * 6)  # room for the legends
    panels[0][0].set_ylabel(label)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
