"""How tensors are cut: grids, and the check that boxes cover a tensor exactly once."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import split

from distckpt import LayoutError, Region
from distckpt.layout import (
    BALANCED,
    CEILING,
    Grid,
    Layout,
    cover_faults,
    cut_points,
    describe_faults,
    wrong_covers,
)

_MANY = settings(max_examples=3 * settings.default.max_examples)


def count_holders(shape, boxes):
    """Count for each element the boxes that hold it; boxes may reach beyond the shape."""
    held = np.zeros(shape, int)
    for box in boxes:
        held[box.slices] += 1
    return held


def is_covered(shape, boxes):
    inside = all(b <= n for box in boxes for b, n in zip(box.stop, shape, strict=True))
    return inside and bool((count_holders(shape, boxes) == 1).all())


def columns(boxes, ndim):
    start = np.array([box.start for box in boxes], np.int64).reshape(len(boxes), ndim)
    stop = np.array([box.stop for box in boxes], np.int64).reshape(len(boxes), ndim)
    return start, stop


def covers(shape, boxes):
    """Ask the check about one tensor."""
    start, stop = columns(boxes, len(shape))
    tensor = np.zeros(len(boxes), np.int64)
    return not wrong_covers(tensor, start, stop, np.array([shape], np.int64)).size


@st.composite
def partitions(draw, max_ndim=8):
    ndim = draw(st.integers(1, max_ndim))
    extents = st.integers(1, 5 if ndim < 4 else 3 if ndim < 7 else 2)
    shape = tuple(draw(st.lists(extents, min_size=ndim, max_size=ndim)))
    return shape, split(draw, Region.whole(shape), draw(st.integers(1, 8)))


def damage(draw, shape, boxes):
    """Move, drop, double or stretch one box: mostly a fault."""
    boxes = list(boxes)
    index = draw(st.integers(0, len(boxes) - 1))
    box, dim = boxes[index], draw(st.integers(0, len(shape) - 1))
    kind = draw(st.sampled_from(["drop", "double", "stretch", "shrink", "move"]))
    if kind == "drop":
        del boxes[index]
    elif kind == "double":
        boxes.append(boxes[draw(st.integers(0, len(boxes) - 1))])
    else:
        start, stop = list(box.start), list(box.stop)
        if kind in {"stretch", "move"}:
            stop[dim] += 1
        if kind == "move" or (kind == "shrink" and stop[dim] - start[dim] > 1):
            start[dim] += 1
        boxes[index] = Region(tuple(start), tuple(stop))
    return boxes


# -------------------------------------------------------------------------------------- exact cover


@_MANY
@given(partitions())
def test_any_split_covers_exactly_once(case):
    assert covers(*case)


@_MANY
@given(partitions(), st.data())
def test_boxes_cover_exactly_once_if_and_only_if_every_element_is_in_one(case, data):
    shape, boxes = case
    for _ in range(data.draw(st.integers(1, 3))):
        boxes = damage(data.draw, shape, boxes) if boxes else boxes
    assert covers(shape, boxes) == is_covered(shape, boxes)


@_MANY
@given(st.integers(1, 3), st.data())
def test_boxes_thrown_in_anywhere_are_judged_as_by_counting(ndim, data):
    shape = (4,) * ndim
    bounds = st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(lambda b: b[0] != b[1])
    boxes = [
        Region(*map(tuple, zip(*map(sorted, bound), strict=True)))
        for bound in data.draw(st.lists(st.tuples(*[bounds] * ndim), min_size=1, max_size=4))
    ]
    assert covers(shape, boxes) == is_covered(shape, boxes)


@given(st.lists(partitions(max_ndim=3), min_size=1, max_size=6), st.data())
def test_of_several_tensors_exactly_the_faulty_ones_are_named(cases, data):
    width = 3
    faulty, tensor, start, stop, shapes = [], [], [], [], []
    for number, (shape, boxes) in enumerate(cases):
        if data.draw(st.booleans()):
            boxes = damage(data.draw, shape, boxes)  # noqa: PLW2901
        if not is_covered(shape, boxes):
            faulty.append(number)
        pad = width - len(shape)
        for box in boxes:
            tensor.append(number)
            start.append([0] * pad + list(box.start))
            stop.append([1] * pad + list(box.stop))
        shapes.append([1] * pad + list(shape))
    order = np.array(data.draw(st.permutations(range(len(tensor)))), np.int64)
    found = wrong_covers(
        np.array(tensor, np.int64)[order],
        np.array(start, np.int64).reshape(-1, width)[order],
        np.array(stop, np.int64).reshape(-1, width)[order],
        np.array(shapes, np.int64),
    )
    assert found.tolist() == faulty


def test_boxes_cut_in_twenty_dimensions_are_checked_at_once():
    boxes = peeled(20)
    assert covers((3,) * 20, boxes)
    assert not covers((3,) * 20, boxes[:-1])
    assert not covers((3,) * 20, [*boxes, boxes[4]])


def peeled(ndim):
    """Peel a slab off in each dimension; what is left is the last box."""
    boxes, start = [], [0] * ndim
    for dim in range(ndim):
        stop = [3] * ndim
        stop[dim] = 1
        boxes.append(Region(tuple(start), tuple(stop)))
        start[dim] = 1
    return [*boxes, Region(tuple(start), (3,) * ndim)]


def test_boxes_cut_in_nine_dimensions_may_neither_overlap_nor_leave_the_tensor():
    shape = (2,) * 9
    cells = [Region(at, tuple(n + 1 for n in at)) for at in itertools.product((0, 1), repeat=9)]
    assert covers(shape, cells)
    # As many elements as there should be, but not those.
    assert not covers(shape, [*cells[:-1], cells[5]])
    assert not covers(shape, [*cells[:-1], Region((2,) * 9, (3,) * 9)])


def test_too_many_boxes_cut_in_too_many_dimensions_are_refused_not_guessed():
    boxes = peeled(9) * 500
    with pytest.raises(LayoutError, match="5000 boxes in 9 dimensions"):
        covers((3,) * 9, boxes)


def test_no_boxes_leave_a_tensor_uncovered():
    assert not covers((2, 3), [])


def test_a_tensor_of_terabytes_is_checked_exactly():
    huge = 1 << 40
    assert covers(
        (huge, huge // 4), [Region((0, 0), (1, huge // 4)), Region((1, 0), (huge, huge // 4))]
    )
    assert not covers(
        (huge, huge // 4), [Region((0, 0), (1, huge // 4)), Region((1, 0), (huge, huge // 4 - 1))]
    )


# ------------------------------------------------------------------------------------ naming faults


def parse(text):
    """Read the region off the end of a fault."""
    bounds = [tuple(map(int, pair)) for pair in re.findall(r"(\d+):(\d+)", text)]
    return Region(tuple(a for a, _ in bounds), tuple(b for _, b in bounds))


@_MANY
@given(partitions(max_ndim=4), st.data())
def test_named_faults_are_true_and_every_kind_of_fault_is_named(case, data):
    shape, boxes = case
    for _ in range(data.draw(st.integers(1, 3))):
        boxes = damage(data.draw, shape, boxes) if boxes else boxes
    held = count_holders(shape, boxes)
    faults = cover_faults(shape, boxes)
    gaps = [text for text in faults if text.startswith("gap")]
    overlaps = [text for text in faults if text.startswith("overlap")]
    outside = [text for text in faults if text.startswith("out of range")]
    assert bool(gaps) == bool((held == 0).any())
    assert all((held[parse(text).slices] == 0).all() for text in gaps)
    assert bool(outside) == any(
        not b <= n for box in boxes for b, n in zip(box.stop, shape, strict=True)
    )
    pairs = itertools.combinations(range(len(boxes)), 2)
    common = {frozenset(pair): boxes[pair[0]] & boxes[pair[1]] for pair in pairs}
    assert bool(overlaps) == any(common.values())
    for text in overlaps:
        label, _, region = text.partition(" both hold ")
        assert common[frozenset(map(int, re.findall(r"{(\d+)}", label)))] == parse(region)


def test_a_fault_is_named_with_tensor_ranks_and_regions():
    boxes = [Region((0, 0), (3, 4)), Region((2, 0), (4, 2)), Region((0, 4), (1, 9))]
    text = describe_faults("w", (5, 8), boxes, [[0, 2], [1], [3, 4, 5, 6, 7]])
    assert text.startswith("'w' of shape (5, 8): ")
    assert "out of range: [0:1, 4:9] (ranks 3, 4, 5, 6, …) ends beyond the shape (5, 8)" in text
    assert "overlap: [0:3, 0:4] (ranks 0, 2) and [2:4, 0:2] (rank 1) both hold [2:3, 0:2]" in text
    assert "gap: no rank holds [" in text


def test_of_many_faults_the_first_three_of_each_kind_are_named():
    boxes = [Region((0, 2 * i), (2, 2 * i + 1)) for i in range(50)]
    assert len(cover_faults((1, 100), boxes)) == 6


def test_faults_among_thousands_of_boxes_are_named_whichever_dimension_is_cut():
    for dim in range(2):
        shape, boxes = [2, 2], []
        shape[dim] = 3000
        for row in [*range(1499), *range(1500, 3000), 7]:
            start, stop = [0, 0], [2, 2]
            start[dim], stop[dim] = row, row + 1
            boxes.append(Region(tuple(start), tuple(stop)))
        overlap, gap = cover_faults(tuple(shape), boxes)
        assert overlap.startswith("overlap: {7} and {2999} both hold")
        assert gap.startswith("gap: no rank holds")


# -------------------------------------------------------------------------------------------- grids


@given(st.integers(0, 40), st.integers(1, 9), st.sampled_from([BALANCED, CEILING]))
def test_cut_points_rise_from_nothing_to_all(extent, parts, rule):
    cuts = cut_points(extent, parts, rule)
    assert (cuts[0], cuts[-1], len(cuts)) == (0, extent, parts + 1)
    assert (np.diff(cuts) >= 0).all()


@st.composite
def grids(draw):
    shape = tuple(draw(st.lists(st.integers(1, 9), max_size=3)))
    parts = tuple(draw(st.integers(1, 5)) for _ in shape)
    rule = tuple(draw(st.sampled_from([BALANCED, CEILING])) for _ in shape)
    stride = tuple(draw(st.integers(0, 20)) if count > 1 else 0 for count in parts)
    return shape, Grid(parts, rule, draw(st.integers(0, 5)), stride)


@_MANY
@given(grids())
def test_a_grid_expands_to_boxes_that_cover_exactly_once_in_ascending_order(case):
    shape, grid = case
    layout = Layout.of_grid(shape, grid)
    assert is_covered(shape, layout.regions)
    assert layout.regions == sorted(layout.regions)


@_MANY
@given(grids())
def test_a_grids_box_lies_in_the_file_that_its_coordinates_give(case):
    shape, grid = case
    layout = Layout.of_grid(shape, grid)
    expected = []
    for cell in itertools.product(*map(range, grid.parts)):
        bounds = [
            cut_points(extent, parts, rule)[index : index + 2]
            for extent, parts, rule, index in zip(shape, grid.parts, grid.rule, cell, strict=True)
        ]
        if all(low < high for low, high in bounds):
            region = Region(tuple(int(a) for a, _ in bounds), tuple(int(b) for _, b in bounds))
            strides = zip(grid.file_stride, cell, strict=True)
            expected.append((region, grid.file_base + sum(step * index for step, index in strides)))
    assert list(zip(layout.regions, layout.file.tolist(), strict=True)) == expected


@_MANY
@given(grids())
def test_what_a_grid_made_is_recognised_as_one(case):
    shape, grid = case
    layout = Layout.of_grid(shape, grid)
    found = layout.grid()
    assert found is not None
    assert Layout.of_grid(shape, found) == layout


@_MANY
@given(partitions(max_ndim=3), st.data())
def test_a_layout_that_is_taken_for_a_grid_expands_to_itself(case, data):
    shape, boxes = case
    boxes = sorted(boxes)
    files = data.draw(st.lists(st.integers(0, 3), min_size=len(boxes), max_size=len(boxes)))
    layout = Layout(shape, *columns(boxes, len(shape)), np.array(files, np.int64))
    grid = layout.grid()
    assert grid is None or Layout.of_grid(shape, grid) == layout


@pytest.mark.parametrize("rule", [BALANCED, CEILING])
def test_a_cut_by_either_rule_is_recognised(rule):
    cuts = cut_points(100, 3, rule)
    start, stop = np.column_stack([cuts[:-1]]), np.column_stack([cuts[1:]])
    grid = Layout((100,), start, stop, np.arange(3)).grid()
    assert grid == Grid((3,), (rule,), 0, (1,))


def test_uneven_cuts_that_follow_no_rule_are_no_grid():
    layout = Layout((10,), np.array([[0], [2]]), np.array([[2], [10]]), np.arange(2))
    assert layout.grid() is None


def test_files_that_follow_no_stride_are_no_grid():
    layout = Layout((9,), np.array([[0], [3], [6]]), np.array([[3], [6], [9]]), np.array([0, 2, 1]))
    assert layout.grid() is None


def test_files_may_count_down():
    layout = Layout(
        (4, 6), np.array([[0, 0], [2, 0]]), np.array([[2, 6], [4, 6]]), np.array([5, 3])
    )
    assert layout.grid() == Grid((2, 1), (BALANCED, BALANCED), 5, (-2, 0))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 1)])
def test_a_tensor_in_one_box_is_a_grid_of_one(shape):
    one = np.zeros((1, len(shape)), np.int64)
    layout = Layout(shape, one, np.array([shape], np.int64).reshape(1, -1), np.array([2]))
    grid = layout.grid()
    assert grid == Grid((1,) * len(shape), (BALANCED,) * len(shape), 2, (0,) * len(shape))
    assert Layout.of_grid(shape, grid) == layout


def test_more_parts_than_rows_leave_out_the_empty_boxes():
    layout = Layout.of_grid((2, 3), Grid((4, 1), (BALANCED, BALANCED), 0, (1, 0)))
    assert layout.regions == [Region((0, 0), (1, 3)), Region((1, 0), (2, 3))]


def test_layouts_are_equal_when_shape_boxes_and_files_are():
    grid = Grid((2,), (BALANCED,), 0, (1,))
    layout = Layout.of_grid((4,), grid)
    assert layout == Layout.of_grid((4,), grid)
    assert hash(layout) == hash(Layout.of_grid((4,), grid))
    assert layout != Layout.of_grid((5,), grid)
    assert layout != Layout.of_grid((4,), Grid((2,), (BALANCED,), 1, (1,)))
    assert len(layout) == math.prod(grid.parts)
