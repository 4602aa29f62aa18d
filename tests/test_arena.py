"""Memory for copies: aligned, kept from save to save, one buffer of it."""

from __future__ import annotations

import threading
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt.arena import ALIGNMENT, Arena, allocate


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, (2 << 20) - 1, (2 << 20) + 1, 5 << 20])
def test_memory_is_aligned_writable_and_long_enough(size):
    buffer = allocate(size)
    assert len(buffer) >= size
    assert len(buffer) % ALIGNMENT == 0
    assert buffer.ctypes.data % ALIGNMENT == 0
    assert not buffer[:: max(1, len(buffer) // 100)].any()
    buffer[:] = 1


def test_a_buffer_that_was_given_back_goes_out_again():
    arena = Arena()
    first = arena.take(10_000)
    arena.give_back(first)
    assert arena.take(9_000) is first


def test_two_saves_in_flight_have_two_buffers_and_the_larger_is_kept():
    arena = Arena()
    small, large = arena.take(10_000), arena.take(50_000)
    assert not np.shares_memory(small, large)
    assert arena.out_bytes == len(small) + len(large)
    arena.give_back(large)
    arena.give_back(small)
    assert arena.out_bytes == 0
    assert arena.take(100) is large
    assert arena.take(100) is not small


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 60_000)), max_size=20))
def test_no_two_that_are_out_share_memory(steps):
    arena, out = Arena(), []
    for takes, size in steps:
        if takes or not out:
            out.append(arena.take(size))
            assert len(out[-1]) >= size
        else:
            arena.give_back(out.pop(size % len(out)))
        assert arena.out_bytes == sum(map(len, out))
        starts = sorted((buffer.ctypes.data, len(buffer)) for buffer in out)
        assert all(a + n <= b for (a, n), (b, _) in pairwise(starts))


def test_what_was_prepared_is_what_is_taken():
    arena = Arena()
    arena.prepare(3 << 20)
    first = arena.take(3 << 20)  # waits for it
    arena.give_back(first)
    arena.prepare(1 << 20)  # there is enough
    assert arena.take(2 << 20) is first


def test_within_a_limit_it_gives_what_is_left():
    arena = Arena()
    held = arena.take(60_000)
    limit = len(held) + 3 * ALIGNMENT
    part = arena.take_within(100_000, limit, ALIGNMENT)
    assert len(part) == 3 * ALIGNMENT
    arena.give_back(part)
    arena.give_back(held)


def test_within_a_limit_it_waits_for_what_another_save_gives_back():
    arena = Arena()
    held = arena.take(60_000)
    taken = []
    waiting = threading.Thread(
        target=lambda: taken.append(arena.take_within(8192, len(held), 4096))
    )
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    arena.give_back(held)
    waiting.join(10)
    assert len(taken) == 1
