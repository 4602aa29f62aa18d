"""`make bench-scale`: what planning costs from 64 to 16,384 ranks; see docs/scale.md.

Writes ``benchmarks/results/scale.json``, ``scale.md`` and ``scale-*.png``. The limits that a change
must keep are checked at the end; the exit status says whether they hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks.scale import simulator
from benchmarks.scale.layouts import Layout, layout_for, least_busiest, megatron
from benchmarks.scale.models import MODELS, Model
from benchmarks.scale.report import write_report
from distckpt.load_plan import LoadOptions, plan_load
from distckpt.manifest import Manifest
from distckpt.plan import describe, fragments_from_plain, holdings_to_plain
from distckpt.state import flatten

# What a change must keep.
MOST_FSDP_S, MOST_FSDP_BYTES, MOST_DOUBLING, MOST_UNEVEN = 0.3, 4e5, 2.2, 1.01
RESULTS = Path(__file__).parent.parent / "results"

HEADLINES = [("llama3-405b", "megatron", 8960), ("llama3-405b", "fsdp", 8960)]
DOUBLINGS = [
    ("llama3-405b", kind, ranks)
    for kind in ("megatron", "fsdp", "fsdp-tp")
    for ranks in (1024, 2048, 4096, 8192, 16_384)
]
EXPERTS = [("deepseek-v3", "experts", ranks) for ranks in (1024, 4096, 16_384)]
OTHERS = [
    (name, kind, ranks)
    for name in ("gpt2-small", "llama3-8b", "llama3-70b")
    for kind in ("megatron", "fsdp", "fsdp-tp")
    for ranks in (64, 1024, 16_384)
]


def reduced(model: Model) -> Model:
    """Return a model of one parameter of each kind, in order."""
    kinds = {}
    for parameter in model.parameters:
        inner = 0 <= parameter.layer < model.layers
        kinds.setdefault((parameter.shape, parameter.tp_dim, inner or parameter.name), parameter)
    return dataclasses.replace(model, parameters=list(kinds.values()))


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


def job_of(model: Model, kind: str, layout: Layout) -> simulator.Job:
    """Make the job of a layout."""
    small = layout_for(reduced(model), kind, layout.ranks) if kind.startswith("fsdp") else None
    return simulator.Job(layout, small, layout.key)


def run_one(
    name: str, model: Model, kind: str, ranks: int, *, memory: bool = False
) -> tuple[simulator.Result, Manifest] | None:
    """Measure one layout."""
    layout = layout_for(model, kind, ranks)
    if layout is None:
        return None
    result = simulator.Result(name, layout.name, kind, ranks)
    network, storage = simulator.Network(), simulator.Storage()
    manifest, _ = simulator.measure(
        job_of(model, kind, layout), result, network, storage, memory=memory
    )
    result.best_bytes = least_busiest(model, kind, layout)
    return result, manifest


def load_plan_of_one(manifest: Manifest, layout: Layout, rank: int) -> tuple[float, int, int]:
    """Plan one rank's load in another layout: processor seconds, bytes wanted, files."""
    tensors = flatten(layout.state(rank)).tensors
    call = {
        "tensors": holdings_to_plain(describe(tensors)),
        "values": [],
        "per_rank": [],
        "resolves": False,
    }
    _ = manifest.file_table_start  # known since the manifest was decoded
    with simulator.Timed() as planning:
        (answer,) = plan_load(manifest, [call], LoadOptions(strict=True))
    fragments = fragments_from_plain(answer["second"])
    return planning.cpu_s, len(fragments.block), len(np.unique(fragments.file))


def read_balance(model: Model, kind: str, ranks: int) -> dict[str, float]:
    """Plan a load of the same layout on all ranks, by the real coordinator's code."""
    layout = layout_for(model, kind, ranks)
    if layout is None:
        return {}
    job = job_of(model, kind, layout)
    result = simulator.Result(model.name, layout.name, kind, ranks)
    manifest, _ = simulator.measure(
        job, result, simulator.Network(), simulator.Storage(), memory=False
    )
    calls = [
        {
            "tensors": holdings_to_plain(describe(flatten(layout.state(rank)).tensors)),
            "values": [],
            "per_rank": [],
            "resolves": False,
        }
        for rank in range(ranks)
    ]
    with simulator.Timed() as planning:
        answers = plan_load(manifest, calls, LoadOptions(strict=True))
    files, blocks = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
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
        files[rank], blocks[rank] = len(used), len(pairs)
        readers[used] += 1
    return {
        "plan (s)": planning.cpu_s,
        "blocks read by two ranks": twice,
        "files a rank, mean": float(files.mean()),
        "files a rank, most": int(files.max()),
        "ranks a file, most": int(readers.max()),
        "busiest reader ÷ mean": float(blocks.max() / blocks.mean()),
    }


def limits(
    found: dict[str, dict[str, object]], results: Sequence[simulator.Result]
) -> Iterator[str]:
    """Yield what exceeds a limit."""
    by_key = {(one.model, one.kind, one.ranks): one for one in results}
    large = by_key["llama3-405b", "megatron", 8960]
    for what, value, limit in (
        ("405B ZeRO-1: plan and manifest (s)", large.plan_s + large.encode_s, 1.5),
        ("405B ZeRO-1: peak memory (MB)", large.peak_bytes / 1e6, 256),
        ("405B ZeRO-1: manifest (MB)", large.manifest_bytes / 1e6, 1),
        ("405B ZeRO-1: sent (bytes an item)", large.item_bytes_sent, 36),
        ("405B ZeRO-1: steady planning (ms)", large.steady_s * 1e3, 5),
        ("405B ZeRO-1: load plan of one rank (ms)", large.load_plan_s * 1e3, 50),
    ):
        if value > limit:
            yield f"{what}: {value:.3g}, limit {limit}"
    flat = by_key["llama3-405b", "fsdp", 8960]
    if flat.plan_s + flat.encode_s > MOST_FSDP_S:
        yield f"405B FSDP: plan and manifest {flat.plan_s + flat.encode_s:.3g} s, limit 0.3"
    if flat.manifest_bytes > MOST_FSDP_BYTES:
        yield f"405B FSDP: manifest {flat.manifest_bytes} bytes, limit 400000"
    for one in results:
        if one.busiest_bytes > MOST_UNEVEN * one.best_bytes:
            ratio = one.busiest_bytes / one.best_bytes
            yield f"{one.model}, {one.layout}: busiest rank writes {ratio:.3f} × the least possible"
    for kind, rows in found["doublings"].items():
        for ratio in rows[-2:]:  # type: ignore[index]
            if ratio > MOST_DOUBLING:
                yield f"{kind}: a doubling costs {ratio:.2f} ×, limit 2.2"


def doublings(results: Sequence[simulator.Result]) -> dict[str, list[float]]:
    """Return how much each doubling of the ranks costs, by layout."""
    found = {}
    for kind in ("megatron", "fsdp", "fsdp-tp"):
        rows = [
            one
            for one in results
            if one.model == "llama3-405b" and one.kind == kind and one.ranks & (one.ranks - 1) == 0
        ]
        costs = [one.plan_s + one.encode_s for one in sorted(rows, key=lambda one: one.ranks)]
        found[f"405B, {kind}, ranks"] = [b / a for a, b in pairwise(costs)]
    return found


def main() -> int:
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the 405 B model only")
    arguments = parser.parse_args()
    models = {name: make() for name, make in MODELS.items()}
    results: list[simulator.Result] = []
    wanted = [*HEADLINES, *DOUBLINGS, *([] if arguments.quick else [*EXPERTS, *OTHERS])]
    for name, kind, ranks in wanted:
        is_headline = (name, kind, ranks) in HEADLINES
        found = run_one(name, models[name], kind, ranks, memory=is_headline)
        if found is None:
            continue
        result, manifest = found
        if is_headline:
            other = megatron(models[name], tp=4, pp=8, dp=280)
            result.load_plan_s = min(
                load_plan_of_one(manifest, other, rank)[0] for rank in (0, 4000, 4000)
            )
        results.append(result)
        del manifest, found
        print(f"{result.model} {result.layout}: plan {result.plan_s:.3f} s", flush=True)
    extra: dict[str, dict[str, object]] = {"doublings": dict(doublings(results))}
    tensors: list[float] = []
    for times in (1, 2, 4, 8):
        found = run_one("llama3-8b", repeated(models["llama3-8b"], times), "megatron", 1024)
        if found is not None:
            tensors.append(found[0].plan_s + found[0].encode_s)
    extra["doublings"]["8B × 1, 2, 4, 8, megatron, tensors"] = [b / a for a, b in pairwise(tensors)]
    extra["read balance"] = {
        f"{models['llama3-8b'].name}, {kind}, {ranks} ranks": read_balance(
            models["llama3-8b"], kind, ranks
        )
        for kind, ranks in (("megatron", 64), ("fsdp", 64), ("fsdp-tp", 64))
    }
    exceeded = list(limits(extra, results))
    RESULTS.mkdir(exist_ok=True)
    machine = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
    }
    content = {
        "machine": machine,
        "results": [dataclasses.asdict(one) for one in results],
        **extra,
        "exceeded": exceeded,
    }
    (RESULTS / "scale.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    write_report(RESULTS, results, extra)
    for line in exceeded:
        print(f"exceeds its limit: {line}", file=sys.stderr)
    return 1 if exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
