"""A mesh names ranks, and cuts tensors over its axes."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt import LayoutError, Mesh, Region

_MANY = settings(max_examples=3 * settings.default.max_examples)


def boxes(spec, shape, *, uneven="balanced", **axes):
    """Return every rank's region."""
    ranks = math.prod(axes.values())
    return [Mesh(rank=rank, **axes).region(spec, shape, uneven=uneven) for rank in range(ranks)]


def rows(spec, shape, **options):
    return [region.shape[0] for region in boxes(spec, shape, **options)]


# -------------------------------------------------------------------------------------- coordinates


def test_ranks_are_row_major_and_the_last_axis_is_the_fastest():
    found = [tuple(Mesh(dp=2, tp=3, rank=rank).coordinates.values()) for rank in range(6)]
    assert found == list(itertools.product(range(2), range(3)))


def test_coordinates_stand_in_the_order_of_the_axes():
    assert list(Mesh(pp=2, dp=1, tp=2, rank=3).coordinates.items()) == [
        ("pp", 1),
        ("dp", 0),
        ("tp", 1),
    ]


def test_a_communicator_says_which_rank_this_is():
    mesh = Mesh(comm=SimpleNamespace(rank=3, size=4), dp=2, tp=2)
    assert (mesh.rank, mesh.size, mesh.coordinates) == (3, 4, {"dp": 1, "tp": 1})


def test_a_rank_given_beside_a_communicator_counts():
    assert Mesh(comm=SimpleNamespace(rank=3, size=4), rank=1, dp=4).rank == 1


def test_a_mesh_of_one_rank_needs_no_rank():
    assert Mesh(dp=1).rank == 0
    assert Mesh().region((), (3, 4)) == Region.whole((3, 4))


def test_a_mesh_prints_its_axes_and_rank():
    assert repr(Mesh(dp=2, tp=3, rank=5)) == "Mesh(dp=2, tp=3, rank=5)"


# --------------------------------------------------------------------------------------------- cuts


@pytest.mark.parametrize(
    ("extent", "parts", "uneven", "expected"),
    [
        (100, 3, "balanced", [34, 33, 33]),
        (100, 3, "chunk", [34, 34, 32]),
        (10, 4, "balanced", [3, 3, 2, 2]),
        (10, 4, "chunk", [3, 3, 3, 1]),
        (5, 4, "chunk", [2, 2, 1, 0]),
        (3, 5, "balanced", [1, 1, 1, 0, 0]),
        (3, 5, "chunk", [1, 1, 1, 0, 0]),
        (0, 3, "balanced", [0, 0, 0]),
        (0, 3, "chunk", [0, 0, 0]),
        (1, 1, "balanced", [1]),
    ],
)
def test_uneven_sizes_follow_the_rule(extent, parts, uneven, expected):
    assert rows(("tp",), (extent,), uneven=uneven, tp=parts) == expected


@given(st.integers(0, 60), st.integers(1, 9))
def test_balanced_cuts_are_numpys(extent, parts):
    expected = [len(piece) for piece in np.array_split(np.arange(extent), parts)]
    assert rows(("x",), (extent,), x=parts) == expected


@given(st.integers(0, 60), st.integers(1, 9))
def test_chunked_cuts_are_torchs(extent, parts):
    step = -(-extent // parts)
    expected = [len(range(extent)[index * step :][:step]) for index in range(parts)]
    assert rows(("x",), (extent,), uneven="chunk", x=parts) == expected


@_MANY
@given(st.data())
def test_the_regions_of_a_mesh_cover_a_tensor_once_for_each_copy(data):
    axes = data.draw(st.dictionaries(st.sampled_from("abcd"), st.integers(1, 3), max_size=4))
    shape = tuple(data.draw(st.lists(st.integers(0, 7), max_size=4)))
    free = list(data.draw(st.permutations(sorted(axes))))
    spec = []
    for _ in range(data.draw(st.integers(0, len(shape)))):
        count = data.draw(st.integers(0, len(free)))
        taken, free = tuple(free[:count]), free[count:]
        spec.append(data.draw(st.sampled_from([taken, taken[0]])) if count == 1 else taken or None)
    uneven = data.draw(st.sampled_from(["balanced", "chunk"]))
    used = {name for entry in spec for name in ([entry] if isinstance(entry, str) else entry or ())}
    held = np.zeros(shape, int)
    for region in boxes(spec, shape, uneven=uneven, **axes):
        held[region.slices] += 1
    copies = math.prod(size for name, size in axes.items() if name not in used)
    assert (held == copies).all()


def test_a_tuple_of_axes_cuts_one_dimension_with_its_first_axis_the_slowest():
    found = boxes((("dp", "tp"),), (8,), dp=2, tp=2)
    assert [region.start[0] for region in found] == [0, 2, 4, 6]
    swapped = boxes((("tp", "dp"),), (8,), dp=2, tp=2)
    assert [region.start[0] for region in swapped] == [0, 4, 2, 6]


def test_axes_that_the_spec_does_not_name_hold_copies():
    found = boxes((None, "tp"), (4, 6), dp=2, tp=2)
    assert found[0] == found[2] == Region((0, 0), (4, 3))
    assert found[1] == found[3] == Region((0, 3), (4, 6))


def test_dimensions_that_the_spec_leaves_out_are_not_cut():
    assert boxes(("tp",), (4, 6, 2), tp=2)[1] == Region((2, 0, 0), (4, 6, 2))


def test_more_ranks_than_rows_leave_ranks_without_any():
    found = boxes(("x",), (1, 5), x=4)
    assert found[0] == Region((0, 0), (1, 5))
    assert all(region.size == 0 for region in found[1:])


# ------------------------------------------------------------------------------------------- shards


def test_a_shard_wraps_the_local_array_without_a_copy():
    local = np.ones((33, 2))
    shard = Mesh(tp=3, rank=1).shard(local, ("tp",), (100, 2))
    assert shard.array is local
    assert shard.region == Region((34, 0), (67, 2))
    assert shard.global_shape == (100, 2)


def test_a_shard_of_the_chunk_rule_lies_where_torch_puts_it():
    shard = Mesh(tp=3, rank=2).shard(np.ones(32), ("tp",), (100,), uneven="chunk")
    assert shard.offset == (68,)


def test_a_local_array_of_another_shape_is_refused_with_both_shapes():
    with pytest.raises(LayoutError, match=r"\[34:67, 0:2\].*\(33, 2\).*\(34, 2\)"):
        Mesh(tp=3, rank=1).shard(np.ones((34, 2)), ("tp",), (100, 2))


def test_a_scalar_is_held_by_every_rank():
    shard = Mesh(tp=2, rank=1).shard(np.float32(3), (), ())
    assert shard.region == Region((), ())


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dp": 0}, "axis 'dp' .* size 0"),
        ({"dp": 2, "tp": -1}, "axis 'tp' .* size -1"),
        ({"dp": 2, "tp": 2}, "4 ranks: say which"),
        ({"dp": 2, "rank": 2}, "rank 2 is not in the mesh dp=2"),
        ({"dp": 2, "rank": -1}, "rank -1 is not in the mesh"),
        (
            {"dp": 2, "tp": 2, "comm": SimpleNamespace(rank=0, size=3)},
            "dp=2, tp=2 has 4 ranks, the communicator has 3",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(arguments, message):
    with pytest.raises(LayoutError, match=message):
        Mesh(**arguments)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (("pp",), "no axis 'pp' in the mesh dp=2, tp=2"),
        (("tp", "tp"), "axis 'tp' is used twice"),
        ((("tp", "dp"), "tp"), "axis 'tp' is used twice"),
        (("tp", None, None), "3 entries for the 2 dimensions"),
    ],
)
def test_a_spec_that_does_not_fit_is_refused(spec, message):
    with pytest.raises(LayoutError, match=message):
        Mesh(dp=2, tp=2, rank=0).region(spec, (4, 4))


def test_an_unknown_rule_is_refused_with_the_known_ones():
    with pytest.raises(LayoutError, match=r"'fair'.*'balanced', 'chunk'"):
        Mesh(tp=2, rank=0).region(("tp",), (4,), uneven="fair")
