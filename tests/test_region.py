"""Boxes against brute force: every element of a small tensor is looked at."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt import Region
from distckpt.region import boxes_of_run, boxes_of_runs

_MANY = settings(max_examples=3 * settings.default.max_examples)

shapes = st.lists(st.integers(1, 4), min_size=1, max_size=6).map(tuple)


@st.composite
def regions(draw, shape):
    """Boxes in a shape; some are empty."""
    bounds = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    return Region(tuple(a for a, _ in bounds), tuple(b for _, b in bounds))


@st.composite
def shapes_with_regions(draw, count):
    shape = draw(st.lists(st.integers(0, 5), max_size=4).map(tuple))
    return shape, *(draw(regions(shape)) for _ in range(count))


def mask(region, shape):
    """Mark a region's elements."""
    marked = np.zeros(shape, bool)
    marked[region.slices] = True
    return marked


def elements(shape):
    """Number a tensor's elements in C order."""
    return np.arange(math.prod(shape)).reshape(shape)


# --------------------------------------------------------------------------------------- one region


@_MANY
@given(shapes_with_regions(2))
def test_the_common_part_of_two_regions_is_the_set_of_common_elements(case):
    shape, a, b = case
    common = a & b
    expected = mask(a, shape) & mask(b, shape)
    assert np.array_equal(
        expected, np.zeros(shape, bool) if common is None else mask(common, shape)
    )
    assert common is None or common.size > 0
    assert common == b & a


@given(shapes_with_regions(1))
def test_shape_and_size_are_those_of_the_selected_elements(case):
    shape, region = case
    selected = elements(shape)[region.slices]
    assert (selected.shape, selected.size) == (region.shape, region.size)


@given(shapes_with_regions(2))
def test_a_region_relative_to_one_that_holds_it_selects_the_same_elements(case):
    shape, a, b = case
    inner = a & b
    if inner is not None:
        piece = elements(shape)[a.slices]
        inside = piece[inner.relative_to(a.start).slices]
        assert np.array_equal(inside, elements(shape)[inner.slices])


def test_a_scalars_region_has_no_dimensions_and_one_element():
    scalar = Region.whole(())
    assert scalar == Region((), ())
    assert (scalar.shape, scalar.size, scalar.slices) == ((), 1, ())
    assert scalar & scalar == scalar


def test_the_whole_of_a_tensor_is_one_region():
    assert Region.whole((3, 0, 2)) == Region((0, 0, 0), (3, 0, 2))
    assert Region.whole((3, 0, 2)).size == 0


def test_regions_that_only_touch_have_nothing_in_common():
    assert Region((0, 0), (2, 4)) & Region((2, 0), (4, 4)) is None


def test_an_empty_region_has_nothing_in_common_with_anything():
    empty = Region((1, 0), (1, 4))
    assert empty & Region.whole((4, 4)) is None
    assert empty & empty is None


def test_a_region_prints_as_slices():
    assert str(Region((0, 2), (4, 6))) == "[0:4, 2:6]"
    assert str(Region((), ())) == "[]"


def test_regions_sort_by_start_then_stop():
    boxes = [Region((1,), (2,)), Region((0,), (3,)), Region((0,), (1,))]
    assert sorted(boxes) == [boxes[2], boxes[1], boxes[0]]


@pytest.mark.parametrize(
    ("start", "stop"),
    [((0,), (1, 1)), ((-1,), (1,)), ((2,), (1,)), ((0, 3), (1, 2))],
)
def test_what_is_no_box_is_refused(start, stop):
    with pytest.raises(ValueError, match="start"):
        Region(start, stop)


def test_regions_of_different_dimensions_have_no_common_part_to_ask_for():
    with pytest.raises(ValueError, match="dimensions"):
        Region((0,), (1,)) & Region((0, 0), (1, 1))


# --------------------------------------------------------------------------------------------- runs


@st.composite
def runs(draw):
    shape = draw(shapes)
    size = math.prod(shape)
    start, stop = sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size))))
    return shape, start, stop


@_MANY
@given(runs())
def test_the_boxes_of_a_run_hold_its_elements_in_order(run):
    shape, start, stop = run
    boxes = boxes_of_run(shape, start, stop)
    found = [elements(shape)[box.slices].reshape(-1) for box in boxes]
    assert np.array_equal(np.concatenate([*found, np.zeros(0, int)]), np.arange(start, stop))


@_MANY
@given(runs())
def test_a_run_has_at_most_two_boxes_a_dimension_less_one_and_none_is_empty(run):
    shape, start, stop = run
    boxes = boxes_of_run(shape, start, stop)
    assert len(boxes) <= 2 * len(shape) - 1
    assert all(box.size for box in boxes)


@given(st.integers(1, 4), st.data())
def test_many_runs_are_cut_as_each_alone(ndim, data):
    extents = st.lists(st.integers(1, 4), min_size=ndim, max_size=ndim).map(tuple)
    many = data.draw(st.lists(extents, max_size=8))
    bounds = [
        sorted(data.draw(st.tuples(*[st.integers(0, math.prod(shape))] * 2))) for shape in many
    ]
    of, start, stop = boxes_of_runs(
        np.array(many, np.int64).reshape(len(many), ndim),
        np.array([low for low, _ in bounds], np.int64),
        np.array([high for _, high in bounds], np.int64),
    )
    expected = [
        (index, box)
        for index, (shape, (low, high)) in enumerate(zip(many, bounds, strict=True))
        for box in boxes_of_run(shape, low, high)
    ]
    found = [
        (index, Region(tuple(a), tuple(b)))
        for index, a, b in zip(of.tolist(), start.tolist(), stop.tolist(), strict=True)
    ]
    assert found == expected
    assert (start.shape, stop.shape) == ((len(expected), ndim), (len(expected), ndim))


def test_a_run_over_all_elements_is_one_box():
    assert boxes_of_run((3, 4, 5), 0, 60) == [Region.whole((3, 4, 5))]


def test_a_run_of_whole_rows_is_one_box():
    assert boxes_of_run((5, 4), 4, 12) == [Region((1, 0), (3, 4))]


def test_an_empty_run_has_no_boxes():
    assert boxes_of_run((3, 4), 5, 5) == []
    assert boxes_of_run((0, 4), 0, 0) == []


def test_the_run_of_a_scalar_is_its_region():
    assert boxes_of_run((), 0, 1) == [Region((), ())]
    assert boxes_of_run((), 0, 0) == []


def test_runs_of_a_tensor_of_many_terabytes_are_cut_exactly():
    shape = (1 << 20, 3, 1 << 22)
    size = math.prod(shape)
    boxes = boxes_of_run(shape, 1, size - 1)
    assert len(boxes) == 5
    assert sum(box.size for box in boxes) == size - 2
