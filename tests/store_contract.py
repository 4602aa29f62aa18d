"""What every store promises: a subclass of `StoreTests` a kind of store."""

from __future__ import annotations

import itertools
import sys
import threading
import time

import numpy as np
import pytest

from distckpt import StoreError
from distckpt.store import Store, open_store, read_object

_THREADS = 6


def write(store, name, data, *, pieces=1):
    """Write an object through a sink, in so many pieces."""
    sink = store.create(name, len(data))
    edges = np.linspace(0, len(data), pieces + 1).astype(int).tolist()
    for start, stop in itertools.pairwise(edges):
        sink.write_at(start, memoryview(data)[start:stop])
    sink.commit()


def read(store, name, start, stop):
    buffer = bytearray(stop - start)
    store.read_into(name, start, memoryview(buffer))
    return bytes(buffer)


def at_once(functions):
    """Call functions at once, in a thread each; return what each returned or raised."""
    results = [None] * len(functions)
    barrier = threading.Barrier(len(functions))

    def run(index):
        barrier.wait()
        try:
            results[index] = functions[index]()
        except Exception as exc:  # noqa: BLE001  looked at by the test
            results[index] = exc

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# ------------------------------------------------------------------------------------ the contract


class StoreTests:
    """What a Store must do; a subclass has a fixture `store`, an empty one."""

    # How often what could go wrong by chance is tried; a request to a server takes milliseconds.
    races, replacements, longest = 40, 20, 40

    @pytest.fixture
    def restless_threads(self):
        """Let threads take turns as often as they can, so that races are lost that can be."""
        previous = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            yield
        finally:
            sys.setswitchinterval(previous)

    def test_it_is_a_store(self, store):
        assert isinstance(store, Store)
        assert open_store(store) is store
        assert isinstance(store.url, str)

    @pytest.mark.parametrize("pieces", [1, 2, 7])
    def test_a_committed_object_holds_what_was_written(self, store, pieces):
        data = bytes(range(256)) * 9
        write(store, "x", data, pieces=pieces)
        assert read_object(store, "x") == data
        assert store.size("x") == len(data)

    def test_a_sink_takes_buffers_of_any_element_type(self, store):
        values = np.arange(100, dtype=np.float32)
        sink = store.create("x", values.nbytes + 3)
        sink.write_at(0, values.data)
        sink.write_at(values.nbytes, b"end")
        sink.commit()
        assert read_object(store, "x") == values.tobytes() + b"end"

    def test_an_empty_object_can_be_stored(self, store):
        write(store, "sink", b"")
        store.put("put", b"", replace=False)
        assert (store.size("sink"), store.size("put")) == (0, 0)
        assert read_object(store, "sink") == read_object(store, "put") == b""

    def test_a_new_object_is_not_there_before_its_commit(self, store):
        sink = store.create("x", 4)
        sink.write_at(0, b"abcd")
        with pytest.raises(FileNotFoundError):
            store.size("x")
        with pytest.raises(FileNotFoundError):
            read(store, "x", 0, 4)
        sink.commit()
        assert read_object(store, "x") == b"abcd"

    def test_an_aborted_object_leaves_nothing(self, store):
        sink = store.create("x", 4)
        sink.write_at(0, b"ab")
        sink.abort()
        assert store.names() == []
        write(store, "x", b"again")
        assert read_object(store, "x") == b"again"

    def test_put_creates_an_object(self, store):
        store.put("x", b"one", replace=False)
        assert read_object(store, "x") == b"one"
        assert store.names() == ["x"]

    def test_put_refuses_an_object_that_is_there(self, store):
        store.put("x", b"one", replace=False)
        with pytest.raises(FileExistsError):
            store.put("x", b"two", replace=False)
        assert read_object(store, "x") == b"one"
        assert store.names() == ["x"]

    def test_put_replaces_when_asked_to(self, store):
        store.put("x", b"longer than two", replace=True)
        store.put("x", b"two", replace=True)
        assert read_object(store, "x") == b"two"
        assert store.size("x") == 3
        assert store.names() == ["x"]

    @pytest.mark.usefixtures("restless_threads")
    def test_of_exclusive_puts_that_race_exactly_one_wins(self, store):
        for number in range(self.races):
            name = f"x{number}"
            puts = [
                lambda name=name, index=index: store.put(name, bytes([index]) * 99, replace=False)
                for index in range(_THREADS)
            ]
            results = at_once(puts)
            winners = [index for index, result in enumerate(results) if result is None]
            assert len(winners) == 1
            losers = [result for result in results if result is not None]
            assert all(isinstance(loser, FileExistsError) for loser in losers), losers
            assert read_object(store, name) == bytes(winners) * 99

    @pytest.mark.usefixtures("restless_threads")
    def test_a_reader_never_sees_half_of_a_replaced_object(self, store):
        versions = [bytes([index]) * 2000 for index in range(_THREADS)]
        store.put("x", versions[0], replace=True)

        def replace(index):
            for _ in range(self.replacements):
                store.put("x", versions[index], replace=True)

        def look():
            return {read(store, "x", 0, 2000) for _ in range(3 * self.replacements)}

        results = at_once([look, look, *(lambda i=i: replace(i) for i in range(1, _THREADS))])
        assert results[2:] == [None] * (_THREADS - 1)
        assert results[0] | results[1] <= set(versions)

    def test_any_range_can_be_read(self, store):
        data = np.random.default_rng(0).bytes(self.longest)
        write(store, "x", data)
        for start in range(self.longest + 1):
            for stop in range(start, self.longest + 1):
                assert read(store, "x", start, stop) == data[start:stop]

    def test_a_range_fills_exactly_the_buffer(self, store):
        write(store, "x", b"0123456789")
        buffer = bytearray(b"-" * 8)
        store.read_into("x", 3, memoryview(buffer)[2:5])
        assert buffer == b"--345---"

    @pytest.mark.parametrize(("start", "stop"), [(0, 11), (9, 11), (10, 11), (25, 30)])
    def test_a_range_beyond_the_end_is_told_from_absence(self, store, start, stop):
        write(store, "x", b"0123456789")
        with pytest.raises(EOFError):
            read(store, "x", start, stop)

    def test_absence_is_told_as_absence(self, store):
        for look in (lambda: store.size("x"), lambda: read(store, "x", 0, 1)):
            with pytest.raises(FileNotFoundError) as caught:
                look()
            assert not isinstance(caught.value, StoreError)
        with pytest.raises(FileNotFoundError):
            read_object(store, "x")

    def test_what_would_lie_below_an_object_is_absent(self, store):
        store.put("x", b"an object", replace=False)
        with pytest.raises(FileNotFoundError):
            store.size("x/y")
        with pytest.raises(FileNotFoundError):
            read(store, "x/y", 0, 1)
        assert store.names("x/y/") == []
        store.delete(["x/y"])
        assert read_object(store, "x") == b"an object"

    def test_the_time_of_writing_is_told_or_not_known(self, store):
        before = time.time()
        store.put("x", b"1", replace=False)
        write(store, "y", b"1")
        for name in ("x", "y"):
            when = store.modified(name)
            # A server may have a clock of its own, and may tell whole seconds.
            assert when is None or abs(when - before) < 60
        with pytest.raises(FileNotFoundError):
            store.modified("z")

    def test_names_lists_what_lies_directly_under_a_prefix(self, store):
        for name in ("b", "a", "step-1/x", "step-1/deeper/y", "step-10/z"):
            store.put(name, b"", replace=False)
        assert store.names() == ["a", "b", "step-1", "step-10"]
        assert store.names("step-1/") == ["deeper", "x"]
        assert store.names("step-1/deeper/") == ["y"]
        assert store.names("step-2/") == []

    def test_names_of_an_empty_store_are_none(self, store):
        assert store.names() == []

    def test_names_hold_any_character_of_a_file_name(self, store):
        for name in ("with space", "ünï", "50%", "a#b", "q?", "x@0:1,2:3", "dots.in.it"):
            store.put(name, name.encode(), replace=False)
            assert read_object(store, name) == name.encode()
        assert len(store.names()) == 7

    def test_delete_removes_what_it_is_given_and_nothing_else(self, store):
        for name in ("a", "b", "c", "sub/a"):
            store.put(name, b"", replace=False)
        store.delete(["a", "c"])
        assert store.names() == ["b", "sub"]
        assert store.names("sub/") == ["a"]

    def test_deleting_what_is_gone_is_fine(self, store):
        store.put("a", b"", replace=False)
        store.delete(["gone", "a", "no/such"])
        store.delete(["a"])
        store.delete([])
        assert store.names() == []

    def test_a_group_whose_objects_are_deleted_is_gone(self, store):
        write(store, "step/a", b"1")
        write(store, "step/b", b"2")
        store.delete(["step/a", "step/b"])
        assert store.names() == []

    def test_many_threads_may_begin_a_group_at_once(self, store):
        results = at_once(
            [lambda i=i: write(store, f"new/group/{i}", bytes([i])) for i in range(_THREADS)]
        )
        assert results == [None] * _THREADS
        assert store.names("new/group/") == [str(index) for index in range(_THREADS)]
