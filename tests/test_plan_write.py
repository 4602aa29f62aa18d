"""Who writes what: any state on any number of ranks, checked element by element."""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from fnmatch import fnmatchcase

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import split

from distckpt import FlatShard, LayoutError, Mesh, PerRank, Shard, codec
from distckpt.bundle import Distinct
from distckpt.flat import flatten
from distckpt.manifest import DATA_ALIGNMENT, TABLE_DIGEST_BYTES, Manifest, table_bytes
from distckpt.plan import columns, describe, part_from_bytes, plan_write, summarise
from distckpt.plan.balance import balance
from distckpt.region import Region
from distckpt.shardfile import Piece, ShardLayout, piece_key

_MANY = settings(max_examples=5 * settings.default.max_examples)
_SOME = settings(max_examples=2 * settings.default.max_examples)

DTYPES = ["u1", "<f2", ">i4", "<f8", "<c16"]


def plan_of(states, **options):
    """Plan a save of what each rank has, sent to the coordinator and back as it is in a save."""
    helds = [_held(state) for state in states]
    summaries = [summarise(held, rank=rank, ranks=len(states)) for rank, held in enumerate(helds)]
    plan = plan_write(
        Distinct.of([summary.template for summary in summaries]),
        Distinct.of([summary.own for summary in summaries]),
        **options,
    )
    columns = plan.parts()
    parts = [
        part_from_bytes([column[rank] for column in columns], held, summaries[rank])
        for rank, held in enumerate(helds)
    ]
    return Planned(plan, parts)


class Planned:
    """A plan, and what each rank makes of what it is told."""

    def __init__(self, plan, parts):
        self._plan, self.parts = plan, parts

    def __getattr__(self, name):
        return getattr(self._plan, name)


def _held(state):
    flat = flatten(state)
    return describe(flat.tensors, list(flat.per_rank))


def blank(dtype, shape):
    """An array that takes no memory, however large."""
    return np.broadcast_to(np.zeros((), dtype), shape)


# ------------------------------------------------------------------------------- any state there is


@st.composite
def shapes(draw, max_elements=300):
    ndim = draw(st.integers(0, 8))
    extents = st.integers(0, 2) if ndim > 5 else st.integers(0, 9 if ndim < 3 else 4)
    shape = draw(st.lists(extents, min_size=ndim, max_size=ndim).map(tuple))
    if ndim == 2 and draw(st.booleans()):
        shape = (1, shape[1])
    return shape if math.prod(shape) <= max_elements else shape[:3]


def some_of(draw, ranks, least=1):
    return sorted(draw(st.sets(st.sampled_from(range(ranks)), min_size=least)))


def bare(draw, dtype, shape, ranks):
    """The whole tensor on some ranks."""
    return dict.fromkeys(some_of(draw, ranks), blank(dtype, shape))


def meshed(draw, dtype, shape, ranks):
    """A cut over a mesh of all ranks; an axis that isn't used holds replicas."""
    sizes = draw(st.sampled_from(factors(ranks)))
    axes = {f"axis{index}": size for index, size in enumerate(sizes)}
    free = list(draw(st.permutations(sorted(axes))))
    spec = []
    for _ in range(draw(st.integers(0, len(shape)))):
        count = draw(st.integers(0, len(free)))
        spec.append(tuple(free[:count]) or None)
        free = free[count:]
    uneven = draw(st.sampled_from(["balanced", "chunk"]))
    found = {}
    for rank in range(ranks):
        mesh = Mesh(rank=rank, **axes)
        region = mesh.region(spec, shape, uneven=uneven)
        found[rank] = mesh.shard(blank(dtype, region.shape), spec, shape, uneven=uneven)
    return found


def nested(draw, dtype, shape, ranks):
    """A dimension cut in parts, and each part cut again; other dimensions may be cut, too."""
    found, dim = {}, draw(st.integers(0, max(len(shape) - 1, 0)))
    outer, inner, rest = draw(st.sampled_from(factors(ranks)))
    uneven = [draw(st.sampled_from(["balanced", "chunk"])) for _ in range(2)]
    if not shape:
        return bare(draw, dtype, shape, ranks)
    for rank in range(ranks):
        mesh = Mesh(rank=rank, inner=inner, outer=outer, rest=rest)
        spec = [None] * len(shape)
        spec[dim] = "outer"
        box = mesh.region(spec, shape, uneven=uneven[0])
        spec[dim] = "inner"
        part = mesh.region(spec, box.shape, uneven=uneven[1]).shifted(box.start)
        found[rank] = Shard(blank(dtype, part.shape), part.start, shape)
    return found


def factors(number):
    """All ways to write a number as a product of up to three."""
    ways = itertools.product(range(1, number + 1), repeat=3)
    return [way for way in ways if math.prod(way) == number]


def boxed(draw, dtype, shape, ranks, whole=None):
    """Boxes cut anywhere, each on one rank or more."""
    boxes = split(draw, whole or Region.whole(shape), draw(st.integers(1, ranks)))
    holders = list(draw(st.permutations(range(ranks))))
    found = {}
    for index, rank in enumerate(holders):
        if index >= len(boxes) and draw(st.booleans()):
            continue
        box = boxes[index] if index < len(boxes) else draw(st.sampled_from(boxes))
        found[rank] = Shard(blank(dtype, box.shape), box.start, shape)
    return found


def flat(draw, dtype, shape, ranks, first=0):
    """Runs that cover the rest of a tensor; replicas are cut anywhere else, or are whole."""
    size = math.prod(shape)
    places = list(draw(st.permutations(range(ranks))))
    count = draw(st.integers(1, ranks))
    cuts = sorted(draw(st.lists(st.integers(first, size), min_size=count - 1, max_size=count - 1)))
    runs = list(itertools.pairwise([first, *cuts, size]))
    found = {}
    for index, rank in enumerate(places):
        if index < count:
            start, stop = runs[index]
        else:
            kind = draw(st.sampled_from(["none", "run", "whole"]))
            if kind == "none":
                continue
            if kind == "whole" and not first:
                found[rank] = blank(dtype, shape)
                continue
            start, stop = sorted(draw(st.tuples(*[st.integers(first, size)] * 2)))
        found[rank] = FlatShard(blank(dtype, (stop - start,)), start, shape)
    return found


def mixed(draw, dtype, shape, ranks):
    """Boxes of the first rows, a flattened rest: cut once, so that equal boxes are equal."""
    if not shape or 0 in shape or shape[0] < 2 or ranks < 2:
        return flat(draw, dtype, shape, ranks)
    at = draw(st.integers(1, shape[0] - 1))
    top = Region((0,) * len(shape), (at, *shape[1:]))
    holders = draw(st.integers(1, ranks - 1))
    found = boxed(draw, dtype, shape, holders, top)
    first, size = at * math.prod(shape[1:]), math.prod(shape)
    count = draw(st.integers(1, ranks - holders))
    cuts = sorted(draw(st.lists(st.integers(first, size), min_size=count - 1, max_size=count - 1)))
    runs = list(itertools.pairwise([first, *cuts, size]))
    for index, rank in enumerate(range(holders, ranks)):
        start, stop = runs[index % count]
        found[rank] = FlatShard(blank(dtype, (stop - start,)), start, shape)
    return found


def flat_in_boxes(draw, dtype, shape, ranks):
    """Boxes, each flattened and cut among some ranks; a rank that is left over has a replica."""
    boxes = split(draw, Region.whole(shape), draw(st.integers(1, ranks))) if shape else []
    if 0 in shape or not boxes:
        return flat(draw, dtype, shape, ranks)
    found = {}
    places = list(draw(st.permutations(range(ranks))))
    for index, box in enumerate(boxes):
        mine = places[index :: len(boxes)]
        count = draw(st.integers(1, len(mine)))
        cuts = st.lists(st.integers(0, box.size), min_size=count - 1, max_size=count - 1)
        runs = list(itertools.pairwise([0, *sorted(draw(cuts)), box.size]))
        for _ in mine[count:]:
            runs.append(draw(st.sampled_from([(0, box.size), *runs])))
        for rank, (start, stop) in zip(mine, runs, strict=True):
            if (start, stop) == (0, box.size) and draw(st.booleans()):
                found[rank] = Shard(blank(dtype, box.shape), box.start, shape)
            else:
                found[rank] = FlatShard(blank(dtype, (stop - start,)), start, shape, box)
    return found


@st.composite
def worlds(draw, kinds=(bare, meshed, nested, boxed, flat, mixed, flat_in_boxes)):
    """Return what each rank holds: a list of states."""
    ranks = draw(st.integers(1, 8))
    states = [{} for _ in range(ranks)]
    for index in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(kinds))
        dtype = np.dtype(draw(st.sampled_from(DTYPES)))
        for rank, leaf in kind(draw, dtype, draw(shapes()), ranks).items():
            states[rank][f"t{index}"] = leaf
    for state in states:
        if draw(st.integers(0, 3)) == 0:
            state["rng"] = PerRank(1)
    return states


# ------------------------------------------------------------------------------ what a plan must be

# Regular tensors in more boxes than this are planned without listing their boxes.
LISTED = st.sampled_from([0, 3, 64])


class Checked:
    """A plan beside what the ranks hold, with every element numbered."""

    def __init__(self, states, **options):
        self.flats = [flatten(state) for state in states]
        self.states = states
        self.plan = plan_of(states, **options)
        self.tensors = {}
        for rank_state in self.flats:
            for leaf in rank_state.tensors:
                self.tensors.setdefault(leaf.name, leaf)

    def elements_of_item(self, rank, item):
        """The numbers of the elements that a rank's item holds, in its C order."""
        leaf = self.flats[rank].tensors[item]
        numbers = np.arange(math.prod(leaf.shape))
        if leaf.region is None:
            if leaf.parent is not None:
                numbers = numbers.reshape(leaf.shape)[leaf.parent.slices].reshape(-1)
            return numbers[leaf.start :][: leaf.array.size]
        return numbers.reshape(leaf.shape)[leaf.region.slices].reshape(-1)

    def rows(self):
        """Yield (rank, item, source, region, file, name) of every box that is written."""
        for rank, part in enumerate(self.plan.parts):
            for item, source, start, stop, file in zip(
                *(column.tolist() for column in (part.item, part.source, part.start, part.stop)),
                part.file.tolist(),
                strict=True,
            ):
                leaf = self.flats[rank].tensors[item]
                pad = len(start) - len(leaf.shape)
                assert start[:pad] == [0] * pad
                assert stop[:pad] == [1] * pad
                region = Region(tuple(start[pad:]), tuple(stop[pad:]))
                yield rank, item, source, region, file, leaf.name

    def manifest(self):
        """The plan's manifest, as if every header took the least room."""
        plan = self.plan
        manifest = Manifest(
            save_id=1,
            created_ns=0,
            ranks=len(plan.parts),
            block_bytes=1 << 22,
            step=None,
            names=plan.names,
            dtype=plan.dtype.astype(np.int64),
            layout=plan.layout,
            layouts=plan.layouts,
            file_length=np.zeros(plan.files, np.int64),
            file_data_start=np.full(plan.files, DATA_ALIGNMENT),
            file_digest=[bytes(TABLE_DIGEST_BYTES)] * plan.files,
        )
        for file, start in enumerate(manifest.file_table_start.tolist()):
            manifest.file_length[file] = start + table_bytes(start, manifest.block_bytes)
        return manifest


@_MANY
@given(worlds(), LISTED)
def test_every_element_is_written_once_by_a_rank_that_holds_it_where_it_says(states, listed):
    checked = Checked(states, listed_cells=listed)
    written = {name: np.zeros(leaf.shape, int) for name, leaf in checked.tensors.items()}
    boxes = defaultdict(int)
    for rank, item, source, region, _, name in checked.rows():
        written[name][region.slices] += 1
        boxes[name] += 1
        numbers = np.arange(written[name].size).reshape(written[name].shape)[region.slices]
        held = checked.elements_of_item(rank, item)[source : source + region.size]
        assert np.array_equal(held, numbers.reshape(-1))
        assert region.size or region == Region.whole(written[name].shape)
    assert all((counts == 1).all() for counts in written.values())
    assert all(boxes[name] == 1 for name, counts in written.items() if not counts.size)
    assert set(checked.plan.names) == set(checked.tensors)


@_MANY
@given(worlds(), LISTED)
def test_the_manifest_knows_every_box_in_its_file_without_hole_or_overlap(states, listed):
    checked = Checked(states, listed_cells=listed)
    manifest = checked.manifest()
    pieces = manifest.pieces
    stored = {}
    for number, tensor in enumerate(pieces.tensor.tolist()):
        name = manifest.names[tensor]
        pad = pieces.start.shape[1] - len(checked.tensors[name].shape)
        start = tuple(pieces.start[number, pad:].tolist())
        stored[name, start] = (
            int(pieces.file[number]),
            int(pieces.offset_bytes[number]),
            int(pieces.size_bytes[number]),
        )
        assert pieces.offset_bytes[number] % manifest.itemsize[tensor] == 0
    # In the order of a rank's table, its files are filled from the first data byte on.
    at = dict.fromkeys(range(checked.plan.files), DATA_ALIGNMENT)
    for rank, _, _, region, file, name in checked.rows():
        size_bytes = region.size * checked.tensors[name].dtype.itemsize
        assert stored.pop((name, region.start)) == (file, at[file], size_bytes)
        assert checked.plan.file_rank[file] == rank
        at[file] += size_bytes
    assert not stored
    assert at == dict(enumerate(manifest.file_table_start.tolist()))


@_SOME
@given(worlds(), st.data())
def test_boxes_listed_for_some_tensors_lie_where_they_do_among_all(states, data):
    manifest = Checked(states).manifest()
    count = len(manifest.names)
    some = np.array(
        sorted(data.draw(st.sets(st.integers(0, count - 1)))) if count else [], np.int64
    )
    pieces, taken = manifest.pieces, manifest.pieces_of(some)
    placed = manifest._placed(*manifest._all_boxes(some))
    rows = np.isin(pieces.tensor, some)
    for name in ("tensor", "start", "stop", "file", "offset_bytes", "size_bytes"):
        assert np.array_equal(getattr(pieces, name)[rows], getattr(placed, name))
        assert np.array_equal(getattr(pieces, name)[rows], getattr(taken, name))


@_SOME
@given(worlds(), st.data())
def test_boxes_listed_for_some_wants_are_those_that_have_their_elements(states, data):
    checked = Checked(states)
    manifest = checked.manifest()
    wants = []
    for tensor, name in enumerate(manifest.names):
        shape = checked.tensors[name].shape
        for _ in range(data.draw(st.integers(0, 2))):
            ends = [sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2))) for n in shape]
            pad = manifest.width - len(shape)
            wants.append(
                (tensor, [0] * pad + [a for a, _ in ends], [1] * pad + [b for _, b in ends])
            )
    tensor = np.array([want[0] for want in wants], np.int64)
    start, stop = (
        np.array([want[end] for want in wants], np.int64).reshape(len(wants), manifest.width)
        for end in (1, 2)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distckpt.manifest._MOST_LISTED", 0)  # as if there were millions
        found = manifest.pieces_for(tensor, start, stop)
    pieces = manifest.pieces
    common = np.maximum(pieces.start, start[:, None]) < np.minimum(pieces.stop, stop[:, None])
    touched = (common.all(axis=2) & (pieces.tensor == tensor[:, None])).any(axis=0)
    for name in ("tensor", "start", "stop", "file", "offset_bytes", "size_bytes"):
        assert np.array_equal(getattr(pieces, name)[touched], getattr(found, name))


@_SOME
@given(worlds(), LISTED)
def test_a_plans_manifest_is_one_that_a_reader_accepts(states, listed):
    checked = Checked(states, listed_cells=listed)
    manifest = checked.manifest()
    read = codec.decode(codec.encode(manifest))
    assert list(read.names) == list(checked.plan.names)
    for name in read.names:
        assert read.layout_of(read.index[name]) == manifest.layout_of(manifest.index[name])
        assert read.layout_of(read.index[name]).shape == checked.tensors[name].shape
        assert read.dtype_of(read.index[name]) is checked.tensors[name].dtype


@_SOME
@given(worlds(), LISTED)
def test_files_and_bytes_are_counted_by_rank(states, listed):
    checked = Checked(states, listed_cells=listed)
    plan = checked.plan
    size = [0] * len(states)
    files = defaultdict(set)
    for rank, _, _, region, file, name in checked.rows():
        size[rank] += region.size * checked.tensors[name].dtype.itemsize
        files[rank].add(file)
    assert plan.rank_bytes.tolist() == size
    assert plan.file_rank.tolist() == sorted(plan.file_rank.tolist())
    for rank, (part, found) in enumerate(zip(plan.parts, checked.flats, strict=True)):
        mine = set(np.flatnonzero(plan.file_rank == rank).tolist())
        if found.per_rank:
            assert part.blob_file in mine
            files[rank].add(part.blob_file)
        else:
            assert part.blob_file == -1
        assert files[rank] == mine
    assert plan.files == len(plan.file_rank)
    expected = ("rng",) if any(found.per_rank for found in checked.flats) else ()
    assert plan.per_rank == expected


@_SOME
@given(worlds(), LISTED)
def test_what_several_ranks_hold_is_compared_by_all_of_them_once(states, listed):
    checked = Checked(states, listed_cells=listed)
    holders = defaultdict(set)
    for rank, found in enumerate(checked.flats):
        for item, leaf in enumerate(found.tensors):
            for number in checked.elements_of_item(rank, item).tolist():
                holders[leaf.name, number].add(rank)
    runs = defaultdict(dict)  # comparison → rank → elements
    for rank, part in enumerate(checked.plan.parts):
        for item, source, size, check in zip(
            part.check_item.tolist(),
            part.check_source.tolist(),
            part.check_size.tolist(),
            part.check.tolist(),
            strict=True,
        ):
            name = checked.flats[rank].tensors[item].name
            assert name == checked.plan.tensor_of_check(check)
            assert rank not in runs[check]
            held = checked.elements_of_item(rank, item)[source : source + size].tolist()
            assert len(held) == size > 0
            runs[check][rank] = (name, held)
    compared = {}
    for by_rank in runs.values():
        ((name, elements),) = {(name, tuple(held)) for name, held in by_rank.values()}
        for number in elements:
            assert (name, number) not in compared
            compared[name, number] = set(by_rank)
    assert compared == {key: ranks for key, ranks in holders.items() if len(ranks) > 1}


@_SOME
@given(worlds(), st.integers(1, 400))
def test_files_are_split_before_they_exceed_the_size_but_for_a_box_that_is_larger(states, limit):
    checked = Checked(states, max_shard_bytes=limit)
    size, boxes = defaultdict(int), defaultdict(int)
    for _, _, _, region, file, name in checked.rows():
        size[file] += region.size * checked.tensors[name].dtype.itemsize
        boxes[file] += region.size > 0
    assert all(size[file] <= limit or boxes[file] == 1 for file in size)
    # No file of a rank could have taken the first box of the next one, too.
    first = {}
    for _, _, _, region, file, name in checked.rows():
        first.setdefault(file, region.size * checked.tensors[name].dtype.itemsize)
    for rank in range(len(states)):
        mine = sorted(file for file in first if checked.plan.file_rank[file] == rank)
        assert all(size[a] + first[b] > limit for a, b in itertools.pairwise(mine))


@given(worlds())
def test_a_plan_depends_on_nothing_but_what_is_held(states):
    first, second = plan_of(states), plan_of(states)
    assert first.layouts == second.layouts
    for one, other in zip(first.parts, second.parts, strict=True):
        for name in one.__dataclass_fields__:
            assert np.array_equal(getattr(one, name), getattr(other, name))


# -------------------------------------------------------------------------------------- the balance


def least_busiest(amounts, ranks):
    """Return the least that the busiest rank can have: the best of all ways to share out.

    What only the ranks of a set can take must be taken there: the densest set decides.

    Args:
        amounts: Set of ranks → what its members share.
        ranks: Number of ranks.
    """
    best = 0.0
    for mask in range(1, 1 << ranks):
        inside = {rank for rank in range(ranks) if mask >> rank & 1}
        total = sum(amount for holders, amount in amounts.items() if holders <= inside)
        best = max(best, total / len(inside))
    return best


@st.composite
def burdens(draw):
    ranks = draw(st.integers(1, 6))
    group = st.frozensets(st.integers(0, ranks - 1), min_size=2) if ranks > 1 else st.nothing()
    amounts = st.integers(0, 10**9) | st.integers(0, 20)
    return (
        draw(st.lists(amounts, min_size=ranks, max_size=ranks)),
        draw(st.dictionaries(group, amounts, max_size=8 if ranks > 1 else 0)),
    )


@_SOME
@given(burdens())
def test_shares_add_up_and_the_busiest_rank_has_as_little_as_it_can(burden):
    load, groups = burden
    shares = balance(
        np.array(load), [(np.array(sorted(group)), amount) for group, amount in groups.items()]
    )
    total = list(load)
    for (group, amount), share in zip(groups.items(), shares, strict=True):
        assert share.sum() == amount
        assert (share >= 0).all()
        assert share.dtype.kind == "i"
        for rank, part in zip(sorted(group), share.tolist(), strict=True):
            total[rank] += part
    amounts = {frozenset([rank]): amount for rank, amount in enumerate(load)} | groups
    assert max(total) <= least_busiest(amounts, len(load)) * 1.01 + len(groups)


def test_groups_within_groups_are_shared_out_best_at_once():
    # A mesh of 2 × 2: what pairs hold, and what all hold.
    load = np.array([0, 100, 0, 0])
    groups = [(np.arange(4), 100), (np.array([0, 1]), 60), (np.array([2, 3]), 10)]
    shares = balance(load, groups, rounds=1)
    total = load.copy()
    for (group, _), share in zip(groups, shares, strict=True):
        total[group] += share
    assert total.tolist() == [60, 100, 55, 55]


def test_no_groups_are_shared_out():
    assert balance(np.array([3, 4]), []) == []


WIDE = 1 << 12  # elements of a row: large against what cuts are rounded to


@st.composite
def wide_worlds(draw):
    """Large tensors cut only at whole rows: so rows can be counted by the set of their holders."""
    ranks = draw(st.integers(1, 6))
    kinds = draw(st.lists(st.sampled_from([bare, meshed, boxed, flat]), min_size=1, max_size=4))
    states, amounts = [{} for _ in range(ranks)], defaultdict(int)
    for index, kind in enumerate(kinds):
        dtype = np.dtype(draw(st.sampled_from(["u1", "<f4", "<f8"])))
        rows = draw(st.integers(20, 400))
        found = kind(draw, dtype, (rows,), ranks)
        holders = [set() for _ in range(rows)]
        for rank, leaf in found.items():
            states[rank][f"t{index}"] = widened(leaf, dtype)
            start, size = place(leaf)
            for row in range(start, start + size):
                holders[row].add(rank)
        for group in holders:
            amounts[frozenset(group)] += WIDE * dtype.itemsize
    return states, dict(amounts)


def place(leaf):
    if isinstance(leaf, Shard):
        return leaf.offset[0], len(leaf.array)
    return (leaf.start, len(leaf.array)) if isinstance(leaf, FlatShard) else (0, len(leaf))


def widened(leaf, dtype):
    """The same of a tensor whose rows are WIDE elements."""
    start, rows = place(leaf)
    if isinstance(leaf, Shard):
        return Shard(blank(dtype, (rows, WIDE)), (start, 0), (*leaf.global_shape, WIDE))
    if isinstance(leaf, FlatShard):
        array = blank(dtype, (rows * WIDE,))
        return FlatShard(array, start * WIDE, (*leaf.global_shape, WIDE))
    return blank(dtype, (rows, WIDE))


@_SOME
@given(wide_worlds())
def test_the_busiest_ranks_bytes_are_within_one_per_cent_of_the_least_possible(world):
    states, amounts = world
    plan = plan_of(states)
    assert plan.rank_bytes.sum() == sum(amounts.values())
    best = least_busiest(amounts, len(states))
    assert plan.rank_bytes.max() <= best * 1.01 + 8


def test_one_replicated_tensor_is_shared_out_among_all_ranks():
    plan = plan_of([{"w": blank("f4", (1000, 1000))}] * 7)
    assert plan.rank_bytes.max() - plan.rank_bytes.min() <= 0.01 * plan.rank_bytes.mean()


@pytest.mark.parametrize("percent", [0.1, 0.4, 0.6, 0.9, 1.5, 3, 4.9, 8, 20])
@pytest.mark.parametrize("size", [1 << 12, 1 << 18, 1 << 24])
def test_a_cut_that_is_moved_to_a_tensors_end_costs_no_more_than_one_per_cent(size, percent):
    more = int(size * percent / 100)
    for larger in (0, 1):
        sizes = (size + more, size - more) if larger else (size - more, size + more)
        state = {f"t{index}": blank("f4", (found,)) for index, found in enumerate(sizes)}
        assert plan_of([state] * 2).rank_bytes.max() <= 4 * size * 1.01 + 4


def test_a_tensor_too_small_to_share_is_written_by_one_rank():
    plan = plan_of([{"b": blank("f4", (3,)), "w": blank("f4", (1 << 20,))}] * 3)
    tensor = plan.names.index("b")
    assert len(plan.layouts[plan.layout[tensor]]) == 1


def test_no_tiny_fragments_are_made_of_many_tensors():
    state = {f"t{index}": blank("f4", (1 << 18,)) for index in range(50)}
    plan = plan_of([state] * 7)
    boxes = sum(len(plan.layouts[index]) for index in plan.layout.tolist())
    assert boxes <= 50 + 6


def test_ranks_that_have_their_own_leave_what_is_shared_to_the_others():
    own = Shard(blank("f4", (1 << 20,)), (0,), (1 << 20,))
    shared = blank("f4", (1 << 20,))
    plan = plan_of([{"own": own, "shared": shared}, {"shared": shared}, {"shared": shared}])
    assert plan.rank_bytes.tolist() == [4 << 20, 2 << 20, 2 << 20]


# ------------------------------------------------------------------------------------ replica rules


def compared_names(plan):
    return {plan.names[tensor] for tensor in plan.check_tensor.tolist()}


def writers(plan, states, name):
    names = [[leaf.name for leaf in flatten(state).tensors] for state in states]
    return {
        rank
        for rank, part in enumerate(plan.parts)
        for item in part.item.tolist()
        if names[rank][item] == name
    }


BIG = blank("f4", (1 << 20,))
BOTH = [{"bn.mean": BIG, "w": BIG}] * 3


def test_replicas_are_compared_and_shared_by_default():
    plan = plan_of(BOTH)
    assert compared_names(plan) == {"bn.mean", "w"}
    assert writers(plan, BOTH, "w") | writers(plan, BOTH, "bn.mean") == {0, 1, 2}


def test_trusted_replicas_are_shared_and_not_compared():
    plan = plan_of(BOTH, replicas="trust")
    assert compared_names(plan) == set()
    assert plan.rank_bytes.max() <= 1.01 * plan.rank_bytes.mean()


def test_the_first_ranks_is_stored_whole_under_rank0_and_nothing_is_compared():
    states = [{}, *BOTH]
    plan = plan_of(states, replicas="rank0")
    assert compared_names(plan) == set()
    assert plan.rank_bytes.tolist() == [0, 8 << 20, 0, 0]


def test_a_mapping_of_globs_rules_by_name_and_the_first_that_fits_counts():
    rules = {"bn.*": "rank0", "*": "trust", "w": "check"}
    plan = plan_of(BOTH, replicas=rules)
    assert compared_names(plan) == set()
    assert writers(plan, BOTH, "bn.mean") == {0}
    assert len(writers(plan, BOTH, "w")) > 1


def test_a_name_that_no_glob_fits_is_compared():
    plan = plan_of(BOTH, replicas={"bn.*": "trust"})
    assert compared_names(plan) == {"w"}


@pytest.mark.parametrize("replicas", ["first", "", {"*": "rank 0"}])
def test_an_unknown_rule_is_refused_with_the_known_ones(replicas):
    with pytest.raises(LayoutError, match="expected one of 'check', 'rank0', 'trust'"):
        plan_of(BOTH, replicas=replicas)


@_SOME
@given(worlds(), st.lists(st.sampled_from(["check", "rank0", "trust"]), min_size=2, max_size=2))
def test_whatever_the_rules_every_element_is_written_once_from_where_it_is_held(states, rules):
    given_rules = {"t[02]": rules[0], "*": rules[1]}
    checked = Checked(states, replicas=given_rules)
    written = {name: np.zeros(leaf.shape, int) for name, leaf in checked.tensors.items()}
    first = defaultdict(dict)
    for rank, found in reversed(list(enumerate(checked.flats))):
        for item, leaf in enumerate(found.tensors):
            first[leaf.name] |= dict.fromkeys(checked.elements_of_item(rank, item).tolist(), rank)
    for rank, item, source, region, _, name in checked.rows():
        written[name][region.slices] += 1
        held = checked.elements_of_item(rank, item)[source : source + region.size].tolist()
        rule = next(rule for glob, rule in given_rules.items() if fnmatchcase(name, glob))
        if rule == "rank0":
            assert all(first[name][number] == rank for number in held)
    assert all((counts == 1).all() for counts in written.values())
    ruled = {name for name in checked.tensors if rules[not fnmatchcase(name, "t[02]")] == "check"}
    assert compared_names(checked.plan) <= ruled


# --------------------------------------------------------------------------------------- the limits


def test_a_header_is_kept_well_below_what_safetensors_accepts():
    # Six bytes a character in JSON, and the longest names that there may be.
    states = [{"\x01" * 65_000 + f"{index:05}": blank("u1", (1,)) for index in range(300)}]
    checked = Checked(states)
    assert checked.plan.files > 1
    pieces = defaultdict(list)
    for _, _, _, region, file, name in checked.rows():
        leaf = checked.tensors[name]
        pieces[file].append(Piece(piece_key(name, leaf.shape, region), leaf.dtype, region.shape))
    headers = [len(ShardLayout(found, 1 << 22).header) for found in pieces.values()]
    assert max(headers) < 50_000_000
    assert max(headers) > 40_000_000  # so files are not split in vain


def test_a_box_larger_than_the_size_of_a_file_has_one_of_its_own():
    state = {"large": blank("f8", (100,)), "small": blank("f8", (1,)), "last": blank("f8", (1,))}
    plan = plan_of([state], max_shard_bytes=16)
    assert plan.files == 2


def test_no_tensors_make_no_files():
    plan = plan_of([{}, {"step": 3}])
    assert (plan.files, plan.names, plan.layouts) == (0, (), [])
    assert plan.rank_bytes.tolist() == [0, 0]


def test_per_rank_values_have_a_file_on_each_rank_that_has_any():
    states = [{"w": blank("f4", (1 << 20,))}, {"rng": PerRank(1)}, {}]
    plan = plan_of(states)
    assert plan.file_rank.tolist() == [0, 1]
    assert [part.blob_file for part in plan.parts] == [-1, 1, -1]


def test_many_ranks_of_one_layout_are_one_grid():
    ranks = 500
    states = [
        {
            name: Mesh(fsdp=ranks, rank=rank).shard(blank("f4", (2, 8)), ("fsdp",), (2 * ranks, 8))
            for name in ("a", "b", "c")
        }
        for rank in range(ranks)
    ]
    plan = plan_of(states)
    assert len(plan.layouts) == 1
    assert plan.layouts[0].grid() is not None


def fsdp_of_tp(shape, cut, *, tp, fsdp):
    """What each rank has of a tensor cut by TP along a dimension, and then by FSDP along rows."""
    for rank in range(tp * fsdp):
        mesh = Mesh(rank=rank, fsdp=fsdp, tp=tp)
        box = mesh.region(["tp" if dim == cut else None for dim in range(len(shape))], shape)
        part = mesh.region(["fsdp"], box.shape, uneven="chunk").shifted(box.start)
        yield Shard(blank("f4", part.shape), part.start, shape)


def test_rows_that_do_not_divide_in_a_cut_of_a_cut_are_said_by_rule_and_listed_once():
    tp, fsdp = 8, 16
    shapes = {"up": ((8 * 25, 4), 0), "down": ((40, 16), 1), "norm": ((40,), None)}
    leaves = {
        f"{layer}.{name}": list(fsdp_of_tp(*shapes[name], tp=tp, fsdp=fsdp))
        for layer in range(30)
        for name in shapes
    }
    states = [{name: of[rank] for name, of in leaves.items()} for rank in range(tp * fsdp)]
    summaries = [
        summarise(_held(state), rank=rank, ranks=len(states)) for rank, state in enumerate(states)
    ]
    assert not any(len(summary.odd) for summary in summaries)
    assert {len(summary.coordinates) for summary in summaries} == {2}
    assert len({summary.template for summary in summaries}) < tp
    plan = plan_of(states)
    up = plan.layouts[plan.layout[plan.names.index("0.up")]]
    assert len(up) == 8 * 13
    assert up.grid() is None
    assert plan.layout[plan.names.index("7.up")] == plan.layout[plan.names.index("0.up")]


@given(st.lists(st.integers(0, 2**63 - 1), max_size=5))
def test_a_column_is_narrowed_to_the_smallest_type_that_holds_it(values):
    column = columns.narrow(np.array(values, np.int64))
    assert column.tolist() == values
    assert column.dtype == np.min_scalar_type(max(values, default=0))


# --------------------------------------------------------------------------------------- the faults


def refusal(states, **options):
    with pytest.raises(LayoutError) as caught:
        plan_of(states, **options)
    return str(caught.value)


def piece(start, stop, shape, dtype="f4"):
    extents = tuple(b - a for a, b in zip(start, stop, strict=True))
    return Shard(blank(dtype, extents), start, shape)


def run(start, stop, shape):
    return FlatShard(blank("f4", (stop - start,)), start, shape)


@pytest.mark.parametrize(
    ("leaves", "expected"),
    [
        (
            [piece((0,), (3,), (6,)), piece((2,), (6,), (6,))],
            "overlap: [0:3] (rank 0) and [2:6] (rank 1) both hold [2:3]",
        ),
        ([piece((0,), (3,), (6,)), piece((4,), (6,), (6,))], "gap: no rank holds [3:4]"),
        (
            [piece((0, 0), (2, 2), (2, 4)), piece((0, 0), (2, 4), (2, 4))],
            "overlap: [0:2, 0:2] (rank 0) and [0:2, 0:4] (rank 1) both hold [0:2, 0:2]",
        ),
        (
            [piece((0, 0), (2, 2), (2, 4)), blank("f4", (2, 4))],
            "overlap: [0:2, 0:2] (rank 0) and [0:2, 0:4] (rank 1) both hold [0:2, 0:2]",
        ),
        (
            [run(0, 3, (2, 4)), run(5, 8, (2, 4))],
            "gap: no rank holds elements 3:5",
        ),
        ([run(2, 8, (2, 4)), None], "gap: no rank holds elements 0:2"),
        (
            [run(0, 6, (2, 4)), piece((1, 0), (2, 4), (2, 4))],
            "overlap: [1:2, 0:2] (rank 0) and [1:2, 0:4] (rank 1) both hold [1:2, 0:2]",
        ),
        ([piece((1,), (1,), (6,)), run(3, 3, (6,))], "gap: no rank holds any of it"),
    ],
)
def test_pieces_that_do_not_cover_are_named_with_tensor_ranks_and_regions(leaves, expected):
    states = [{"ok": blank("f4", (2,))} | ({} if x is None else {"net.w": x}) for x in leaves]
    text = refusal(states)
    assert text.startswith("1 tensors are not covered exactly once by what the ranks hold:")
    assert f"'net.w' of shape {next(x for x in leaves if x is not None).global_shape}: " in text
    assert expected in text


def test_all_faulty_tensors_are_named_at_once():
    states = [
        {"a": piece((0,), (3,), (6,)), "b": run(0, 3, (4,)), "c": piece((0,), (0,), (4,))},
        {"a": piece((2,), (6,), (6,))},
    ]
    text = refusal(states)
    assert text.startswith("3 tensors")
    assert "'a' of shape (6,): overlap" in text
    assert "'b' of shape (4,): gap: no rank holds elements 3:4" in text
    assert "'c' of shape (4,): gap: no rank holds any of it" in text


def test_equal_boxes_are_replicas_but_a_run_of_other_boxes_is_an_overlap():
    shape = (4, 4)
    fits = [piece((0, 0), (2, 4), shape), piece((0, 0), (2, 4), shape), run(8, 16, shape)]
    assert plan_of([{"w": leaf} for leaf in fits]).rank_bytes.sum() == 64
    text = refusal([{"w": leaf} for leaf in [*fits, run(4, 8, shape)]])
    assert "(ranks 0, 1) and [1:2, 0:4] (rank 3) both hold [1:2, 0:4]" in text


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (blank("f8", (2, 3)), "rank 0 has float32 (2, 3), rank 1 has float64 (2, 3)"),
        (blank("f4", (3, 2)), "rank 0 has float32 (2, 3), rank 1 has float32 (3, 2)"),
        (blank("f4", (6,)), "rank 0 has float32 (2, 3), rank 1 has float32 (6,)"),
        (blank("f4", (1, 2, 3)), "rank 0 has float32 (2, 3), rank 1 has float32 (1, 2, 3)"),
        (piece((0, 0), (2, 3), (4, 3)), "rank 0 has float32 (2, 3), rank 1 has float32 (4, 3)"),
        (run(0, 0, (3, 3)), "rank 0 has float32 (2, 3), rank 1 has float32 (3, 3)"),
    ],
)
def test_ranks_that_disagree_on_dtype_or_shape_are_named(other, expected):
    text = refusal([{"ok": BIG, "w": blank("f4", (2, 3))}, {"ok": BIG, "w": other}])
    assert text.startswith("ranks disagree on 1 tensors:")
    assert f"'w': {expected}" in text


def test_byte_order_is_no_disagreement():
    states = [{"w": blank(">f4", (2, 3))}, {"w": blank("<f4", (2, 3))}]
    assert plan_of(states).rank_bytes.sum() == 24


def test_a_fault_among_many_ranks_is_named_in_short():
    states = [{"w": piece((0,), (4,), (8,))} for _ in range(100)]
    text = refusal(states)
    assert "gap: no rank holds [4:8]" in text
    assert len(text) < 300


def test_a_wrong_name_in_json_is_no_matter_to_the_plan():
    name = 'quote " backslash \\ newline \n é 語'
    checked = Checked([{name: blank("f4", (2,))}])
    (key,) = (piece_key(name, (2,), region) for _, _, _, region, _, _ in checked.rows())
    assert json.loads(json.dumps(key)) == name
