"""`make bench-scale`: what planning costs from 64 to 16,384 ranks; see docs/scale.md.

Writes ``benchmarks/results/scale.json``, ``scale.md`` and ``scale-*.png``; with ``--quick``, into
``build/bench-scale``. The limits that a change must keep are checked at the end; the exit status
says whether they hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks.scale import simulator
from benchmarks.scale.layouts import Layout, fsdp, layout_for, least_busiest, reshaped
from benchmarks.scale.models import MODELS, Model
from benchmarks.scale.report import write_report
from distckpt.flat import flatten
from distckpt.load_plan import LoadOptions, plan_load
from distckpt.manifest import Manifest
from distckpt.plan import describe, fragments_from_plain, holdings_to_plain

RESULTS = Path(__file__).parent.parent / "results"
# What is published stays as it is.
QUICK_RESULTS = Path("build/bench-scale")
KINDS = ("megatron", "fsdp", "fsdp-tp", "experts")
HEADLINES = (("llama3-405b", "megatron", 8960), ("llama3-405b", "fsdp", 8960))
FEW = (64, 256, 1024, 4096, 16_384)
MANY = (64, 256, 1024, 2048, 4096, 8192, 16_384)
DOUBLED = "llama3-405b"  # of this one, the doublings of ranks are looked at
REPEATED = (1, 2, 4, 8)  # times the layers of a model
OWN_PARAMETERS = 750  # four tensors each

# What a change must keep.
MOST_DOUBLING, MOST_UNEVEN = 2.2, 1.01
LIMITS = {
    HEADLINES[0]: {
        "plan and manifest (s)": (lambda one: one.plan_s + one.encode_s, 1.5),
        "peak memory (MB)": (lambda one: one.peak_bytes / 1e6, 256),
        "manifest (MB)": (lambda one: one.manifest_bytes / 1e6, 1),
        "sent (bytes an item)": (lambda one: one.item_bytes_sent, 36),
        "next plan at the coordinator (ms)": (lambda one: one.steady_s * 1e3, 5),
        "load plan of one rank (ms)": (lambda one: one.load_plan_s * 1e3, 50),
    },
    HEADLINES[1]: {
        "plan and manifest (s)": (lambda one: one.plan_s + one.encode_s, 0.3),
        "manifest (MB)": (lambda one: one.manifest_bytes / 1e6, 0.4),
    },
}
OWN_LIMITS_MS = {"first": 50, "next": 5}

Key = tuple[str, str, int]


def wanted(*, quick: bool) -> list[Key]:
    """List the layouts to measure: model, kind, ranks."""
    if quick:
        last = [(DOUBLED, kind, ranks) for kind in KINDS for ranks in MANY[-3:]]
        return [*HEADLINES, *last]
    return [
        *HEADLINES,
        *(
            (name, kind, ranks)
            for name in MODELS
            for kind in KINDS
            for ranks in (MANY if name == DOUBLED else FEW)
        ),
    ]


def repeated(model: Model, times: int) -> Model:
    """Return a model with so many times the layers."""
    layers = model.layers
    parameters = [
        dataclasses.replace(
            parameter,
            name=parameter.name.replace(
                f"layers.{parameter.layer}.", f"layers.{parameter.layer + layers * time}."
            ),
            layer=parameter.layer + layers * time,
        )
        for time in range(times)
        for parameter in model.parameters
        if 0 <= parameter.layer < layers
    ]
    return dataclasses.replace(
        model, name=f"{model.name} ×{times}", layers=layers * times, parameters=parameters
    )


def run_one(model: Model, kind: str, ranks: int) -> tuple[simulator.Result, Manifest] | None:
    """Measure one layout; None where a model has none of this kind."""
    layout = layout_for(model, kind, ranks)
    if layout is None:
        return None
    result = simulator.Result(model.name, layout.name, kind, ranks)
    manifest, _, _ = simulator.measure(simulator.job_of(model, kind, layout), result)
    result.best_bytes = least_busiest(model, kind, layout)
    other = reshaped(model, kind, layout)
    result.load_layout = other.name
    result.load_plan_s, result.load_rows = max(
        min(load_plan_of_one(manifest, other, rank) for _ in range(2))
        for rank in (0, other.ranks // 2)
    )
    simulator.simulate(result, simulator.Network(), simulator.Storage())
    return result, manifest


def _call(layout: Layout, rank: int) -> dict[str, object]:
    """What a rank says that it wants: all that it would save."""
    return {
        "tensors": holdings_to_plain(describe(flatten(layout.state(rank)).tensors)),
        "values": [],
        "per_rank": [],
        "resolves": False,
    }


def load_plan_of_one(manifest: Manifest, layout: Layout, rank: int) -> tuple[float, int]:
    """Plan one rank's load in another layout: processor seconds, and rows of the plan."""
    call = _call(layout, rank)
    _ = manifest.file_table_start  # known since the manifest was decoded
    with simulator.Timed() as planning:
        (answer,) = plan_load(manifest, [call], LoadOptions(strict=True))
    return planning.cpu_s, len(answer["second"]["block"])


def own_part(model: Model) -> dict[str, float]:
    """Measure what a rank itself does for 3,000 tensors cut by FSDP on 8,960 ranks, in ms."""
    some = dataclasses.replace(model, parameters=model.parameters[:OWN_PARAMETERS])
    layout = fsdp(some, ranks=8960)
    result = simulator.Result(model.name, layout.name, "fsdp", layout.ranks)
    _, _, parts = simulator.measure(simulator.job_of(some, "fsdp", layout), result)
    rank = layout.ranks // 2
    told = [column[rank] for column in parts]
    cost = simulator.rank_cost(layout.state(rank), rank, layout.ranks, told, times=9)
    return {"tensors": result.tensors} | {
        name: seconds * 1e3
        for name, seconds in (
            ("flatten", cost.flatten_s),
            ("describe", cost.describe_s),
            ("decode", cost.decode_s),
            ("first", cost.first_s),
            ("next", cost.again_s),
        )
    }


def read_balance(model: Model, kind: str, ranks: int) -> dict[str, object]:
    """Plan a load of the same layout on all ranks, by the real coordinator's code."""
    layout = layout_for(model, kind, ranks)
    if layout is None:
        raise ValueError(f"{model.name} has no layout of kind {kind}")
    result = simulator.Result(model.name, layout.name, kind, ranks)
    manifest, _, _ = simulator.measure(simulator.job_of(model, kind, layout), result)
    calls = [_call(layout, rank) for rank in range(ranks)]
    with simulator.Timed() as planning:
        answers = plan_load(manifest, calls, LoadOptions(strict=True))
    files, blocks, rows = (np.zeros(ranks, np.int64) for _ in range(3))
    readers = np.zeros(len(manifest.file_length), np.int64)
    seen: set[tuple[int, int]] = set()
    twice = 0
    for rank, answer in enumerate(answers):
        found = fragments_from_plain(answer["second"])
        mine = found.take(np.flatnonzero(found.reader == rank))
        used = np.unique(mine.file)
        pairs = set(zip(mine.file.tolist(), mine.block.tolist(), strict=True))
        twice += len(seen & pairs)
        seen |= pairs
        files[rank], blocks[rank], rows[rank] = len(used), len(pairs), len(found.block)
        readers[used] += 1
    stored = -(-manifest.file_table_start // manifest.block_bytes)
    return {
        "model": model.name,
        "layout": layout.name,
        "ranks": ranks,
        "plan_s": planning.cpu_s,
        "rows": int(rows.sum()),
        "blocks": int(stored.sum()),
        "blocks_read": len(seen),
        "blocks_read_twice": twice,
        "files_a_rank_mean": float(files.mean()),
        "files_a_rank_most": int(files.max()),
        "ranks_a_file_most": int(readers.max()),
        "busiest_reader": float(blocks.max() / blocks.mean()),
    }


def doublings(results: Sequence[simulator.Result]) -> dict[str, list[float]]:
    """Return how much each doubling of the ranks costs at the coordinator, by layout."""
    found = {}
    for kind in KINDS:
        rows = [one for one in results if one.kind == kind and one.ranks in MANY]
        for name in dict.fromkeys(one.model for one in rows):
            mine = sorted((one for one in rows if one.model == name), key=lambda one: one.ranks)
            costs = [
                (b.plan_s + b.encode_s) / (a.plan_s + a.encode_s)
                for a, b in pairwise(mine)
                if b.ranks == 2 * a.ranks
            ]
            if costs:
                found[f"{name}, {kind}: ranks to {mine[-1].ranks:,}"] = costs
    return found


def tensor_doublings(model: Model, ranks: int) -> dict[str, list[float]]:
    """Return how much each doubling of the tensors costs at the coordinator, by layout."""
    found = {}
    for kind in ("megatron", "fsdp", "fsdp-tp"):
        costs = []
        for times in REPEATED:
            measured = run_one(repeated(model, times), kind, ranks)
            if measured is not None:
                costs.append(measured[0].plan_s + measured[0].encode_s)
                tensors = measured[0].tensors
        found[f"{model.name}, {kind} on {ranks:,}: tensors to {tensors:,}"] = [
            b / a for a, b in pairwise(costs)
        ]
    return found


def limits(
    results: Sequence[simulator.Result], ratios: dict[str, list[float]], own: dict[str, float]
) -> Iterator[tuple[str, float, float]]:
    """Yield what a change must keep: what it is, its value, and its limit."""
    by_key = {(one.model, one.kind, one.ranks): one for one in results}
    for (name, kind, ranks), rules in LIMITS.items():
        one = by_key[MODELS[name]().name, kind, ranks]
        for what, (value, limit) in rules.items():
            yield f"{one.model}, {one.layout}: {what}", value(one), limit
    for what, limit_ms in OWN_LIMITS_MS.items():
        yield f"a rank's own part for {own['tensors']:,} tensors, {what} (ms)", own[what], limit_ms
    for name, found in ratios.items():
        for ratio in found[-2:]:
            yield f"a doubling, {name}", ratio, MOST_DOUBLING
    worst = max(results, key=lambda one: one.busiest_bytes / one.best_bytes)
    yield (
        f"busiest rank ÷ the best possible, at most ({worst.model}, {worst.layout})",
        worst.busiest_bytes / worst.best_bytes,
        MOST_UNEVEN,
    )


def main() -> int:
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the largest of the 405 B model only")
    arguments = parser.parse_args()
    began = time.perf_counter()
    models = {name: make() for name, make in MODELS.items()}
    results: list[simulator.Result] = []
    for name, kind, ranks in wanted(quick=arguments.quick):
        found = run_one(models[name], kind, ranks)
        if found is not None:
            one = found[0]
            results.append(one)
            print(f"{one.model} {one.layout}: {one.plan_s + one.encode_s:.3f} s", flush=True)
    small = models["llama3-8b"]
    ratios = doublings(results) | tensor_doublings(small, 1024)
    own = own_part(models["llama3-405b"])
    balances = [
        read_balance(small, kind, ranks)
        for ranks in ((64,) if arguments.quick else (64, 512))
        for kind in ("megatron", "fsdp", "fsdp-tp")
    ]
    kept = list(limits(results, ratios, own))
    content = {
        "machine": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "machine": platform.machine(),
            "load": os.getloadavg()[1],
            "seconds": time.perf_counter() - began,
        },
        "results": [dataclasses.asdict(one) for one in results],
        "doublings": ratios,
        "own part": own,
        "read balance": balances,
        "limits": kept,
    }
    folder = QUICK_RESULTS if arguments.quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scale.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    write_report(folder, results, ratios, own, balances, kept)
    exceeded = [(what, value, limit) for what, value, limit in kept if value > limit]
    for what, value, limit in exceeded:
        print(f"exceeds its limit: {what}: {value:.4g}, limit {limit:g}", file=sys.stderr)
    return 1 if exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
