"""Messages of many ranks in one: united up a tree, taken apart down it."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from distckpt.bundle import FANOUT, Bundle, Collector, Distinct, children, is_leaf, parent, subtree


@given(st.lists(st.binary(max_size=3), min_size=1, max_size=40), st.integers(0, 2**64 - 1))
def test_a_bundle_survives_as_a_message_with_each_distinct_content_once(payloads, number):
    column = Distinct.of(payloads)
    assert len(column.payloads) == len(set(payloads))
    bundle = Bundle(np.arange(len(payloads)), [column, column])
    found_number, found = Bundle.decode(bundle.encode(number))
    assert found_number == number
    assert found.ranks.tolist() == list(range(len(payloads)))
    for read in found.columns:
        assert [read[row] for row in range(len(payloads))] == payloads


@given(st.lists(st.binary(max_size=2), min_size=1, max_size=30), st.data())
def test_bundles_of_some_ranks_unite_to_one_of_all_whatever_the_order(payloads, data):
    whole = Bundle(np.arange(len(payloads)), [Distinct.of(payloads)])
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(payloads) - 1)), max_size=4)))
    parts = [part for part in np.split(np.arange(len(payloads)), cuts) if len(part)]
    collector = Collector(1)
    for part in data.draw(st.permutations(parts)):
        collector.add(whole.take(part))
    united = collector.bundle()
    assert united.ranks.tolist() == list(range(len(payloads)))
    assert [united.columns[0][row] for row in range(len(payloads))] == payloads
    assert len(united.columns[0].payloads) == len(set(payloads))


@given(st.integers(1, 5 * FANOUT**2))
def test_every_rank_but_the_first_has_one_parent_and_lies_in_its_subtree(size):
    for rank in range(1, size):
        above = parent(rank)
        assert above < rank
        assert rank in children(above, size)
        first, last = subtree(above, size)
        assert first <= rank < last
    assert sum(len(children(rank, size)) for rank in range(size)) == size - 1


@given(st.integers(1, 5 * FANOUT**2))
def test_a_subtree_is_its_root_and_its_childrens_subtrees(size):
    for rank in {0, size // 2, size - 1, size // FANOUT * FANOUT % size}:
        inside = [rank]
        for child in children(rank, size):
            inside += range(*subtree(child, size))
        assert sorted(inside) == list(range(*subtree(rank, size)))
        assert is_leaf(rank, size) == (len(inside) == 1)


def test_up_to_the_fan_out_all_ranks_talk_to_the_coordinator_itself():
    assert children(0, FANOUT) == list(range(1, FANOUT))


def test_at_sixteen_thousand_ranks_none_has_more_than_a_few_dozen_messages_to_receive():
    size = 16_384
    assert max(len(children(rank, size)) for rank in range(0, size, FANOUT)) <= 4 * FANOUT
