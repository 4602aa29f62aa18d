"""Who reads what, and sends it to whom: any wants against any pieces, element by element."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import split

from distckpt.manifest import Pieces
from distckpt.plan import Fragments, Wants, plan_read
from distckpt.region import Region

_MANY = settings(max_examples=5 * settings.default.max_examples)
_SOME = settings(max_examples=2 * settings.default.max_examples)


@dataclass(frozen=True)
class Case:
    """What is stored and what is wanted, with every element's place in the files."""

    pieces: Pieces
    itemsize: np.ndarray
    shapes: list
    wants: Wants
    ranks: int
    block_bytes: int

    def plan(self, **options):
        return plan_read(
            self.pieces,
            self.itemsize,
            self.wants,
            block_bytes=self.block_bytes,
            ranks=self.ranks,
            **options,
        )

    def region_of_want(self, row):
        return Region(tuple(self.wants.start[row].tolist()), tuple(self.wants.stop[row].tolist()))

    def places(self, tensor):
        """Return each element's file and first byte, as two arrays of the tensor's shape."""
        file = np.full(self.shapes[tensor], -1)
        byte = np.full(self.shapes[tensor], -1)
        for row in np.flatnonzero(self.pieces.tensor == tensor).tolist():
            start, stop = self.pieces.start[row].tolist(), self.pieces.stop[row].tolist()
            box = Region(tuple(start), tuple(stop))
            file[box.slices] = self.pieces.file[row]
            numbers = np.arange(box.size).reshape(box.shape)
            byte[box.slices] = self.pieces.offset_bytes[row] + numbers * self.itemsize[tensor]
        return file, byte

    def blocks_by_want(self):
        """Return (rank, key) → (file, block) → the set of wanted elements there."""
        found = {}
        for row in range(len(self.wants.rank)):
            tensor = int(self.wants.tensor[row])
            file, byte = (place[self.region_of_want(row).slices] for place in self.places(tensor))
            numbers = np.arange(math.prod(self.shapes[tensor])).reshape(self.shapes[tensor])
            numbers = numbers[self.region_of_want(row).slices]
            blocks = defaultdict(set)
            for place in zip(
                file.reshape(-1).tolist(),
                (byte // self.block_bytes).reshape(-1).tolist(),
                numbers.reshape(-1).tolist(),
                strict=True,
            ):
                blocks[place[:2]].add(place[2])
            found[int(self.wants.rank[row]), int(self.wants.key[row])] = dict(blocks)
        return found


@st.composite
def cases(draw):
    width, files = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    block_bytes = draw(st.sampled_from([16, 32, 64, 256]))
    rows, shapes = [], []
    # What lies before a file's first piece, in the place of a header.
    ends = [16 * draw(st.integers(1, 6)) for _ in range(files)]
    itemsize = sorted(draw(st.lists(st.sampled_from([1, 2, 4, 8, 16]), max_size=4)), reverse=True)
    for tensor, size in enumerate(itemsize):
        extents = st.integers(0 if draw(st.integers(0, 9)) == 0 else 1, 12 if width < 3 else 5)
        shape = tuple(draw(st.lists(extents, min_size=width, max_size=width)))
        shapes.append(shape)
        whole = Region.whole(shape)
        boxes = split(draw, whole, draw(st.integers(1, 8))) if whole.size else [whole]
        for box in sorted(boxes):
            file = draw(st.integers(0, files - 1))
            rows.append((tensor, box.start, box.stop, file, ends[file], box.size * size))
            ends[file] += box.size * size
    tensor, start, stop, file, offset, size_bytes = zip(*rows, strict=True) if rows else [()] * 6
    pieces = Pieces(
        np.array(tensor, np.int64),
        np.array(start, np.int64).reshape(-1, width),
        np.array(stop, np.int64).reshape(-1, width),
        np.array(file, np.int64),
        np.array(offset, np.int64),
        np.array(size_bytes, np.int64),
    )
    ranks = draw(st.integers(1, 5))
    wanted = []
    for rank in range(ranks):
        for key in range(draw(st.integers(0, 5)) if shapes else 0):
            index = draw(st.integers(0, len(shapes) - 1))
            bounds = [sorted(draw(st.tuples(*[st.integers(0, n)] * 2))) for n in shapes[index]]
            if draw(st.integers(0, 3)) == 0:
                bounds = [(0, n) for n in shapes[index]]
            wanted.append((rank, key, index, *zip(*bounds, strict=True)))
    order = draw(st.permutations(range(len(wanted))))
    rank, key, index, start, stop = (
        zip(*(wanted[row] for row in order), strict=True) if wanted else [()] * 5
    )
    wants = Wants(
        np.array(rank, np.int64),
        np.array(key, np.int64),
        np.array(index, np.int64),
        np.array(start, np.int64).reshape(-1, width),
        np.array(stop, np.int64).reshape(-1, width),
    )
    return Case(pieces, np.array(itemsize, np.int64), shapes, wants, ranks, block_bytes)


def rows_of(fragments):
    """Yield fragments as dicts."""
    names = list(Fragments.__dataclass_fields__)
    for row in zip(*(getattr(fragments, name).tolist() for name in names), strict=True):
        yield dict(zip(names, row, strict=True))


@_MANY
@given(cases())
def test_the_fragments_of_a_want_are_its_elements_each_once(case):
    found = defaultdict(list)
    tensor_of = {
        (int(rank), int(key)): int(tensor)
        for rank, key, tensor in zip(
            case.wants.rank, case.wants.key, case.wants.tensor, strict=True
        )
    }
    for row in rows_of(case.plan()):
        # What a fragment copies: the wanted part of the piece, as far as it lies in the block.
        tensor = tensor_of[row["consumer"], row["key"]]
        box = Region(tuple(row["start"]), tuple(row["stop"]))
        piece = Region(tuple(row["piece_start"]), tuple(row["piece_stop"]))
        assert row["itemsize"] == case.itemsize[tensor]
        assert box & piece == box
        file, byte = (place[box.slices] for place in case.places(tensor))
        numbers = np.arange(math.prod(case.shapes[tensor])).reshape(case.shapes[tensor])[box.slices]
        inside = byte // case.block_bytes == row["block"]
        assert (file == row["file"]).all()
        assert inside.any()  # no block is read in vain
        found[row["consumer"], row["key"]] += numbers[inside].tolist()
    expected = {
        want: sorted(number for numbers in blocks.values() for number in numbers)
        for want, blocks in case.blocks_by_want().items()
    }
    assert {want: sorted(numbers) for want, numbers in found.items()} == {
        want: numbers for want, numbers in expected.items() if numbers
    }


@_MANY
@given(cases())
def test_each_block_that_anyone_wants_is_read_once_by_one_who_wants_it(case):
    consumers = defaultdict(set)
    for (rank, _), blocks in case.blocks_by_want().items():
        for block in blocks:
            consumers[block].add(rank)
    readers, rounds = defaultdict(set), defaultdict(set)
    received = defaultdict(set)
    for row in rows_of(case.plan()):
        block = row["file"], row["block"]
        readers[block].add(row["reader"])
        rounds[block].add(row["round"])
        received[block].add(row["consumer"])
    assert received == consumers
    for block, ranks in consumers.items():
        assert len(readers[block]) == len(rounds[block]) == 1
        assert readers[block] <= ranks


@_SOME
@given(cases(), st.integers(1, 600))
def test_a_rank_reads_at_most_so_many_bytes_a_round_and_no_round_is_left_out(case, round_bytes):
    blocks = defaultdict(set)
    for row in rows_of(case.plan(round_bytes=round_bytes)):
        blocks[row["reader"], row["round"]].add((row["file"], row["block"]))
    limit = max(1, round_bytes // case.block_bytes)
    by_reader = defaultdict(dict)
    for (reader, number), found in blocks.items():
        assert len(found) <= limit
        by_reader[reader][number] = found
    for rounds in by_reader.values():
        assert sorted(rounds) == list(range(len(rounds)))
        assert all(len(rounds[number]) == limit for number in range(len(rounds) - 1))
        # Files are read from the front to the back.
        assert all(max(rounds[n]) < min(rounds[n + 1]) for n in range(len(rounds) - 1))


@_SOME
@given(cases())
def test_copies_stand_in_one_order_for_the_reader_and_for_the_consumer(case):
    plan = case.plan()
    keys = [
        (row["round"], row["file"], row["block"], row["consumer"], row["key"])
        for row in rows_of(plan)
    ]
    assert keys == sorted(keys)
    for rank in range(case.ranks):
        mine = [row for row in rows_of(plan) if rank in {row["reader"], row["consumer"]}]
        assert list(rows_of(plan.of_rank(rank))) == mine


@_SOME
@given(cases())
def test_blocks_that_several_want_are_shared_out_evenly(case):
    groups = defaultdict(set)
    load = defaultdict(int)
    blocks = {}
    for row in rows_of(case.plan()):
        blocks[row["file"], row["block"]] = row["reader"]
        groups[row["file"], row["block"]].add(row["consumer"])
    for reader in blocks.values():
        load[reader] += 1
    # The best there is: what only a set of ranks wants must be read by its members.
    amounts = defaultdict(int)
    for group in groups.values():
        amounts[frozenset(group)] += 1
    best = 0.0
    for count in range(1, case.ranks + 1):
        for inside in itertools.combinations(range(case.ranks), count):
            total = sum(n for group, n in amounts.items() if group <= set(inside))
            best = max(best, total / count)
    shared = sum(len(group) > 1 for group in amounts)
    assert max(load.values(), default=0) <= math.ceil(best * 1.01) + shared


@_SOME
@given(cases(), st.integers(0, 2))
def test_a_plan_is_the_same_when_all_is_padded_to_more_dimensions(case, more):
    def padded(columns, fill):
        return np.concatenate([np.full((len(columns), more), fill), columns], axis=1)

    wide = Case(
        Pieces(
            case.pieces.tensor,
            padded(case.pieces.start, 0),
            padded(case.pieces.stop, 1),
            case.pieces.file,
            case.pieces.offset_bytes,
            case.pieces.size_bytes,
        ),
        case.itemsize,
        case.shapes,
        Wants(
            case.wants.rank,
            case.wants.key,
            case.wants.tensor,
            padded(case.wants.start, 0),
            padded(case.wants.stop, 1),
        ),
        case.ranks,
        case.block_bytes,
    )
    plan, other = case.plan(), wide.plan()
    for name in ("round", "reader", "consumer", "key", "file", "block", "offset_bytes"):
        assert np.array_equal(getattr(plan, name), getattr(other, name))
    assert np.array_equal(plan.start, other.start[:, more:])


# ---------------------------------------------------------------------------------- chosen examples


def stored(*boxes, itemsize=1, offset=64):
    """Pieces of one tensor, one after another in file 0."""
    start = np.array([box.start for box in boxes])
    stop = np.array([box.stop for box in boxes])
    size_bytes = (stop - start).prod(axis=1) * itemsize
    ends = np.cumsum(size_bytes) + offset
    zero = np.zeros(len(boxes), np.int64)
    return Pieces(zero, start, stop, zero, ends - size_bytes, size_bytes), np.array([itemsize])


def wanted(*boxes):
    """A want of tensor 0 for each rank in turn."""
    ranks = np.arange(len(boxes))
    start, stop = np.array([b.start for b in boxes]), np.array([b.stop for b in boxes])
    return Wants(ranks, np.zeros_like(ranks), np.zeros_like(ranks), start, stop)


def test_only_the_blocks_between_the_first_and_last_wanted_byte_are_read():
    pieces, itemsize = stored(Region((0,), (1000,)), offset=0)
    plan = plan_read(pieces, itemsize, wanted(Region((250,), (270,))), block_bytes=64, ranks=1)
    assert plan.block.tolist() == [3, 4]


def test_a_block_between_two_wanted_rows_is_not_read():
    pieces, itemsize = stored(Region((0, 0), (4, 256)), offset=0)
    plan = plan_read(pieces, itemsize, wanted(Region((0, 0), (4, 10))), block_bytes=64, ranks=1)
    assert plan.block.tolist() == [0, 4, 8, 12]


def test_what_all_ranks_want_is_read_in_equal_parts():
    pieces, itemsize = stored(Region((0,), (64 * 12,)), offset=0)
    whole = Region((0,), (64 * 12,))
    plan = plan_read(pieces, itemsize, wanted(whole, whole, whole), block_bytes=64, ranks=3)
    blocks = dict(zip(plan.block.tolist(), plan.reader.tolist(), strict=True))
    assert sorted(blocks.values()) == [0] * 4 + [1] * 4 + [2] * 4


def test_a_rank_that_reads_its_own_leaves_what_is_shared_to_the_others():
    pieces, itemsize = stored(Region((0,), (640,)), offset=0)
    plan = plan_read(
        pieces,
        itemsize,
        wanted(Region((0,), (640,)), Region((320,), (640,))),
        block_bytes=64,
        ranks=2,
    )
    readers = dict(zip(plan.block.tolist(), plan.reader.tolist(), strict=True))
    assert [readers[block] for block in range(10)] == [0] * 5 + [1] * 5


def test_no_wants_need_no_reads():
    pieces, itemsize = stored(Region((0,), (8,)))
    nothing = Wants(*[np.zeros(0, np.int64)] * 3, *[np.zeros((0, 1), np.int64)] * 2)
    plan = plan_read(pieces, itemsize, nothing, block_bytes=64, ranks=3)
    assert len(plan.block) == 0
    assert len(plan.of_rank(2).block) == 0


def test_an_empty_box_and_an_empty_tensor_need_no_reads():
    pieces, itemsize = stored(Region((0, 0), (0, 4)))
    empty = Region((0, 0), (0, 4))
    assert not plan_read(pieces, itemsize, wanted(empty), block_bytes=64, ranks=1).block.size
    pieces, itemsize = stored(Region((0, 0), (3, 4)))
    empty = Region((1, 2), (1, 4))
    assert not plan_read(pieces, itemsize, wanted(empty), block_bytes=64, ranks=1).block.size


def test_a_large_tensor_is_planned_by_blocks_not_by_elements():
    rows = 1 << 30
    pieces, itemsize = stored(
        *(Region((rows * part, 0), (rows * (part + 1), 4)) for part in range(4)), itemsize=4
    )
    want = Region((rows - 5, 1), (rows + 7, 3))
    plan = plan_read(pieces, itemsize, wanted(want), block_bytes=4 << 20, ranks=1)
    assert len(plan.block) <= 4
