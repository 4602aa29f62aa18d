"""The results as a Markdown table and as log-log plots with fitted exponents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt

from benchmarks.scale.simulator import Result

# The last so many points are fitted: the last two doublings.
FITTED = 3

_COLUMNS = {
    "model": lambda one: one.model,
    "layout": lambda one: one.layout,
    "ranks": lambda one: f"{one.ranks:,}",
    "tensors": lambda one: f"{one.tensors:,}",
    "boxes": lambda one: f"{one.boxes:,}",
    "items": lambda one: f"{one.items:,}",
    "sent, B an item": lambda one: f"{one.item_bytes_sent:.2f}",
    "received by the coordinator, kB": lambda one: f"{one.gather_bytes / 1e3:,.0f}",
    "plan, ms": lambda one: f"{one.plan_s * 1e3:,.0f}",
    "manifest, ms": lambda one: f"{one.encode_s * 1e3:,.0f}",
    "decoded, ms": lambda one: f"{one.decode_s * 1e3:,.0f}",
    "peak memory, MB": lambda one: f"{one.peak_bytes / 1e6:,.0f}" if one.peak_bytes else "",
    "manifest, kB": lambda one: f"{one.manifest_bytes / 1e3:,.0f}",
    "told a rank, B (most)": lambda one: f"{one.part_bytes_mean:,.0f} ({one.part_bytes_max:,})",
    "a rank's first save, ms": lambda one: f"{one.rank_first_s * 1e3:.1f}",
    "its next, ms": lambda one: f"{one.rank_next_s * 1e3:.1f}",
    "coordinator's next, ms": lambda one: f"{one.steady_s * 1e3:.1f}",
    "busiest ÷ least possible": lambda one: f"{one.busiest_bytes / one.best_bytes:.4f}",
    "write, simulated, s": lambda one: f"{one.simulated['write (s)']:.1f}",
}


def table(results: Sequence[Result]) -> str:
    """Return the results as a Markdown table."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|" + " --- |" * len(_COLUMNS)]
    lines += [f"| {' | '.join(show(one) for show in _COLUMNS.values())} |" for one in results]
    return "\n".join(lines)


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Fit y ~ x^exponent."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def write_report(
    folder: Path, results: Sequence[Result], extra: Mapping[str, Mapping[str, object]]
) -> None:
    """Write the table and the plots."""
    lines = ["# Planning, measured", "", table(results), "", "## What a doubling costs", ""]
    for name, ratios in extra["doublings"].items():
        lines.append(f"- {name}: " + ", ".join(f"{ratio:.2f} ×" for ratio in ratios))  # type: ignore[attr-defined]
    lines += ["", "## A load of the same layout", ""]
    for name, found in extra["read balance"].items():
        shown = ", ".join(f"{key} {value:.3g}" for key, value in found.items())  # type: ignore[attr-defined]
        lines.append(f"- {name}: {shown}")
    (folder / "scale.md").write_text("\n".join(lines) + "\n")
    _plot(folder, results)


def _plot(folder: Path, results: Sequence[Result]) -> None:
    mpl.use("Agg")
    for value, label, name in (
        (lambda one: one.plan_s + one.encode_s, "plan and manifest at the coordinator (s)", "time"),
        (lambda one: one.manifest_bytes, "manifest (bytes)", "manifest"),
        (lambda one: one.gather_bytes, "received by the coordinator (bytes)", "received"),
    ):
        figure, axes = plt.subplots(figsize=(6, 4))
        lines: dict[tuple[str, str], list[Result]] = {}
        for one in results:
            lines.setdefault((one.model, one.kind), []).append(one)
        for (model, kind), rows in lines.items():
            rows.sort(key=lambda one: one.ranks)
            if len(rows) >= FITTED:
                ranks, values = [one.ranks for one in rows], [value(one) for one in rows]
                fitted = exponent(ranks[-FITTED:], values[-FITTED:])
                axes.loglog(ranks, values, "o-", label=f"{model}, {kind}: ranks^{fitted:.2f}")
        axes.set_xlabel("ranks")
        axes.set_ylabel(label)
        if axes.lines:
            axes.legend(fontsize=6)
        figure.tight_layout()
        figure.savefig(folder / f"scale-{name}.png", dpi=120)
        plt.close(figure)
