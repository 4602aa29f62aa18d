"""The simulator of thousands of ranks: its shortcuts say what the real code says."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.scale.layouts import layout_for, least_busiest
from benchmarks.scale.models import Model, Parameter
from benchmarks.scale.simulator import Job, Result, job_of, measure
from distckpt import codec

# Extents that few numbers of ranks divide.
DENSE = Model(
    "dense",
    4,
    0,
    [
        Parameter("embed", (1003, 12), 0, -1),
        *(
            parameter
            for layer in range(4)
            for parameter in (
                Parameter(f"layers.{layer}.up", (200, 12), 0, layer),
                Parameter(f"layers.{layer}.bias", (200,), 0, layer),
                Parameter(f"layers.{layer}.down", (12, 200), 1, layer),
                Parameter(f"layers.{layer}.norm", (12,), None, layer),
            )
        ),
        Parameter("norm", (12,), None, 4),
    ],
)
EXPERTS = Model(
    "experts",
    4,
    64,
    [
        parameter
        for layer in range(4)
        for parameter in (
            Parameter(f"layers.{layer}.router", (64, 12), None, layer),
            *(Parameter(f"layers.{layer}.{n}.up", (30, 12), None, layer, n) for n in range(64)),
        )
    ],
)


@pytest.fixture(
    params=[
        (DENSE, "megatron", 64),
        (DENSE, "fsdp", 96),
        (DENSE, "fsdp-tp", 96),
        (EXPERTS, "experts", 64),
    ],
    ids=lambda param: f"{param[1]}-{param[2]}",
)
def case(request):
    model, kind, ranks = request.param
    return model, kind, layout_for(model, kind, ranks)


def test_what_the_shortcut_says_is_what_every_ranks_real_state_says(case):
    model, kind, layout = case
    job = job_of(model, kind, layout)
    job.check(job.summaries(), range(layout.ranks))


def test_a_shortcut_that_says_something_else_is_found(case):
    model, kind, layout = case
    job = job_of(model, kind, layout)
    templates, owns = job.summaries()
    with pytest.raises(AssertionError, match="rank 1 says something else"):
        Job.check(job, (templates, owns.take(np.roll(np.arange(layout.ranks), 1))), [1])


def test_all_is_planned_in_a_manifest_that_can_be_read_and_nearly_as_even_as_can_be(case):
    model, kind, layout = case
    result = Result(model.name, layout.name, kind, layout.ranks)
    manifest, plan, _ = measure(job_of(model, kind, layout), result)
    assert (
        codec.decode(codec.encode(manifest)).file_length.tolist() == manifest.file_length.tolist()
    )
    assert result.total_bytes == model.size * (2 + 3 * 4)
    assert plan.rank_bytes.sum() == result.total_bytes
    # Of so few bytes a rank, those of a row are a large part.
    assert result.busiest_bytes <= 1.05 * least_busiest(model, kind, layout)
