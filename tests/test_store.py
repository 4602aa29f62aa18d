"""What every store promises, tried on each kind of store; then what is each one's own."""

from __future__ import annotations

import errno
import itertools
import os
import sys
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from distckpt import StoreError
from distckpt.store import FsspecStore, LocalStore, PrefixStore, Store, open_store, read_object
from distckpt.testing import FaultyStore, MemoryStore

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


@pytest.fixture
def restless_threads():
    """Let threads take turns as often as they can, so that races are lost that can be."""
    previous = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(previous)


# ------------------------------------------------------------------------------------ the contract


class StoreTests:
    """What a Store must do; a subclass has a fixture `store`, an empty one."""

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
        for number in range(40):
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
            for _ in range(20):
                store.put("x", versions[index], replace=True)

        def look():
            return {read(store, "x", 0, 2000) for _ in range(60)}

        results = at_once([look, look, *(lambda i=i: replace(i) for i in range(1, _THREADS))])
        assert results[2:] == [None] * (_THREADS - 1)
        assert results[0] | results[1] <= set(versions)

    def test_any_range_can_be_read(self, store):
        data = np.random.default_rng(0).bytes(40)
        write(store, "x", data)
        for start in range(41):
            for stop in range(start, 41):
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


class TestLocalDirectory(StoreTests):
    @pytest.fixture
    def store(self, tmp_path):
        return open_store(tmp_path / "a" / "checkpoint")


class TestFileUrl(StoreTests):
    @pytest.fixture
    def store(self, tmp_path):
        store = open_store(f"file://{tmp_path}/checkpoint")
        assert type(store) is LocalStore
        return store


class TestMemoryUrl(StoreTests):
    @pytest.fixture
    def store(self, tmp_path):
        yield open_store(f"memory://{tmp_path}/checkpoint")
        file_system = fsspec.filesystem("memory")
        if file_system.exists(str(tmp_path)):
            file_system.rm(str(tmp_path), recursive=True)


class TestMemoryStore(StoreTests):
    @pytest.fixture
    def store(self):
        return MemoryStore()


class TestPrefixOfMemory(StoreTests):
    @pytest.fixture
    def store(self):
        return PrefixStore(MemoryStore(), "step-00000001")


class TestPrefixOfLocalDirectory(StoreTests):
    @pytest.fixture
    def store(self, tmp_path):
        return PrefixStore(open_store(tmp_path), "step-00000001")


class TestFaultyStoreWithoutFault(StoreTests):
    @pytest.fixture
    def store(self):
        return FaultyStore(MemoryStore())


# ---------------------------------------------------------------------------------------- opening


def test_a_relative_path_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = open_store("run/checkpoint")
    assert store.url == str(tmp_path / "run" / "checkpoint")


def test_opening_makes_nothing(tmp_path):
    open_store(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["with space", "ünï", "50%25", "a#b", "q?x", "[1]*"])
def test_a_directory_may_have_any_name(tmp_path, name):
    for url in (tmp_path / name, str(tmp_path / name)):
        open_store(url).put("x", b"here", replace=True)
        assert (tmp_path / name / "x").read_bytes() == b"here"


def test_an_unknown_scheme_is_a_store_error():
    with pytest.raises(StoreError, match="nosuch://bucket/run: can't open this URL") as caught:
        open_store("nosuch://bucket/run")
    assert caught.value.url == "nosuch://bucket/run"
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_scheme_whose_library_is_missing_is_a_store_error():
    fsspec.register_implementation(
        "missinglib", "no_such_module.FileSystem", errtxt="install no_such_module", clobber=True
    )
    with pytest.raises(StoreError, match="install no_such_module") as caught:
        open_store("missinglib://bucket/run")
    assert isinstance(caught.value.__cause__, ImportError)


class BrokenFileSystem(MemoryFileSystem):
    """Raises what its option `error` says, in every operation."""

    protocol = "broken"
    cachable = False

    def __init__(self, error=None, **options):
        super().__init__(**options)
        self.error = error

    def _fail(self, *args, **options):
        raise self.error

    makedirs = pipe_file = cat_file = info = ls = rm_file = _open = _fail


_OPERATIONS = {
    "put": lambda store: store.put("x", b"", replace=True),
    "create": lambda store: store.create("x", 1 << 40),
    "read_into": lambda store: read(store, "x", 0, 1),
    "size": lambda store: store.size("x"),
    "names": lambda store: store.names(),
    "delete": lambda store: store.delete(["x"]),
}


@pytest.fixture
def broken():
    fsspec.register_implementation("broken", BrokenFileSystem, clobber=True)
    return lambda error: open_store("broken://host/run", storage_options={"error": error})


def test_storage_options_reach_the_file_system(broken):
    error = OSError("mine")
    assert broken(error)._fs.error is error


@pytest.mark.parametrize("operation", _OPERATIONS)
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "disk on fire"),
        PermissionError(errno.EACCES, "not yours"),
        TimeoutError("too slow"),
        ValueError("bad answer"),
        RuntimeError("no loop"),
        NotImplementedError("can't"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_a_file_system_raises_is_a_store_error_with_its_cause(broken, operation, error):
    with pytest.raises(StoreError) as caught:
        _OPERATIONS[operation](broken(error))
    assert caught.value.__cause__ is error
    assert str(error) in str(caught.value)
    assert "broken://host/run" in caught.value.url


def test_a_server_that_ignores_ranges_is_told(tmp_path):
    class Whole(MemoryFileSystem):
        protocol = "whole"

        def cat_file(self, path, start=None, end=None, **options):
            return super().cat_file(path)

    store = FsspecStore(Whole(), f"{tmp_path}/whole", "whole://run")
    store.put("x", b"0123456789", replace=True)
    with pytest.raises(StoreError, match="ignores ranges"):
        read(store, "x", 2, 4)


def test_a_large_object_goes_in_parts_and_is_whole_in_the_end(tmp_path):
    store = open_store(f"memory://{tmp_path}/parts")
    sink = store.create("x", 1 << 40)  # what it says decides, not what then comes
    sink.write_at(0, b"abc")
    sink.write_at(3, b"def")
    sink.commit()
    assert read_object(store, "x") == b"abcdef"


@pytest.mark.parametrize(
    "operation", ["put", "create"], ids=["a whole object", "an object in pieces"]
)
def test_below_a_file_nothing_can_be_written(tmp_path, operation):
    (tmp_path / "file").write_bytes(b"in the way")
    store = open_store(tmp_path / "file" / "run")
    with pytest.raises(StoreError) as caught:
        _OPERATIONS[operation](store)
    assert isinstance(caught.value.__cause__, OSError)
    assert str(tmp_path / "file") in str(caught.value)


def test_reading_a_directory_is_a_store_error(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(StoreError) as caught:
        read(open_store(tmp_path), "x", 0, 1)
    assert caught.value.__cause__.errno == errno.EISDIR


def test_an_object_larger_than_the_limit_is_not_read(store):
    store.put("x", b"0123456789", replace=False)
    assert read_object(store, "x", limit_bytes=10) == b"0123456789"
    with pytest.raises(StoreError, match="10 bytes are more than"):
        read_object(store, "x", limit_bytes=9)


# ------------------------------------------------------------------------------------------ prefix


def test_a_prefix_leaves_everything_else_alone():
    whole = MemoryStore()
    for name in ("x", "run", "run2/x", "other/x"):
        whole.put(name, b"foreign", replace=False)
    part = PrefixStore(whole, "run2/part")
    part.put("x", b"own", replace=False)
    assert part.names() == ["x"]
    part.delete(["x", "y"])
    assert set(whole.objects) == {"x", "run", "run2/x", "other/x"}


def test_a_prefix_says_where_it_is(tmp_path):
    assert PrefixStore(open_store(tmp_path), "step-1").url == f"{tmp_path}/step-1"
    assert PrefixStore(open_store("memory://runs/"), "step-1").url == "memory://runs/step-1"


# ------------------------------------------------------------------------------------- durability


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """The calls that change the file system or make a change durable, in their order.

    Each is (what, paths relative to tmp_path); the random part of temporary names is left out.
    """
    recorded = []
    opened = {}

    def short(path):
        relative = Path(path).relative_to(tmp_path) if Path(path).is_absolute() else Path(path)
        parts = relative.name.split(".")
        # A put's temporary name has a random part, a sink's has none.
        name = f"{parts[0]}.partial" if parts[-1] == "partial" else relative.name
        return str(relative.with_name(name)) if relative.name else "."

    def record(name, function, paths):
        def call(*args, **options):
            result = function(*args, **options)
            recorded.append((name, *(short(path) for path in args[:paths])))
            return result

        monkeypatch.setattr(os, name, call)

    real_open, real_fsync, real_pwrite = os.open, os.fsync, os.pwrite

    def open_(path, flags, *args, **options):
        descriptor = real_open(path, flags, *args, **options)
        opened[descriptor] = short(path)
        if flags & os.O_CREAT:
            assert flags & os.O_EXCL
            recorded.append(("create", short(path)))
        return descriptor

    def fsync(descriptor):
        real_fsync(descriptor)
        recorded.append(("fsync", opened[descriptor]))

    def pwrite(descriptor, data, offset):
        recorded.append(("write", opened[descriptor]))
        return real_pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "pwrite", pwrite)
    for name, paths in (("link", 2), ("rename", 2), ("replace", 2), ("mkdir", 1), ("unlink", 1)):
        record(name, getattr(os, name), paths)
    return recorded


def test_a_sinks_bytes_are_durable_before_their_name_and_the_name_before_commit_returns(
    tmp_path, calls
):
    (tmp_path / "run").mkdir()
    calls.clear()
    write(open_store(tmp_path / "run"), "shard", b"12", pieces=2)
    assert calls == [
        ("create", "run/shard.partial"),
        ("write", "run/shard.partial"),
        ("write", "run/shard.partial"),
        ("fsync", "run/shard.partial"),
        ("rename", "run/shard.partial", "run/shard"),
        ("fsync", "run"),
    ]


def test_an_exclusive_put_is_written_synced_linked_and_its_directory_synced(tmp_path, calls):
    (tmp_path / "run").mkdir()
    calls.clear()
    open_store(tmp_path / "run").put("manifest", b"1", replace=False)
    assert calls == [
        ("create", "run/manifest.partial"),
        ("write", "run/manifest.partial"),
        ("fsync", "run/manifest.partial"),
        ("link", "run/manifest.partial", "run/manifest"),
        ("fsync", "run"),
        ("unlink", "run/manifest.partial"),
    ]


def test_a_replacing_put_is_written_synced_renamed_and_its_directory_synced(tmp_path, calls):
    (tmp_path / "run").mkdir()
    calls.clear()
    open_store(tmp_path / "run").put("manifest", b"1", replace=True)
    assert calls == [
        ("create", "run/manifest.partial"),
        ("write", "run/manifest.partial"),
        ("fsync", "run/manifest.partial"),
        ("replace", "run/manifest.partial", "run/manifest"),
        ("fsync", "run"),
    ]


@pytest.mark.parametrize("kind", ["sink", "put"])
def test_every_newly_made_ancestor_is_synced_in_its_parent_before_anything_lies_in_it(
    tmp_path, calls, kind
):
    store = open_store(tmp_path / "a" / "b")
    if kind == "sink":
        write(store, "c/x", b"1")
    else:
        store.put("c/x", b"1", replace=False)
    assert calls[:7] == [
        ("mkdir", "a"),
        ("fsync", "."),
        ("mkdir", "a/b"),
        ("fsync", "a"),
        ("mkdir", "a/b/c"),
        ("fsync", "a/b"),
        ("create", "a/b/c/x.partial"),
    ]


def test_a_deletion_is_durable_when_it_returns(tmp_path, calls):
    store = open_store(tmp_path / "run")
    for name in ("a", "b", "c"):
        store.put(name, b"1", replace=True)
    calls.clear()
    store.delete(["a", "b"])
    assert calls == [("unlink", "run/a"), ("unlink", "run/b"), ("fsync", "run")]


def failing(number):
    def call(*args, **options):
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links_is_told_and_nothing_is_left(
    tmp_path, monkeypatch, number
):
    store = open_store(tmp_path)
    monkeypatch.setattr(os, "link", failing(number))
    with pytest.raises(StoreError, match="no hard links"):
        store.put("manifest", b"1", replace=False)
    assert store.names() == []
    store.put("manifest", b"1", replace=True)
    assert store.names() == ["manifest"]


@pytest.mark.parametrize("call", ["fsync", "pwrite", "link"])
def test_a_put_that_fails_leaves_nothing_behind(tmp_path, monkeypatch, call):
    store = open_store(tmp_path)
    monkeypatch.setattr(os, call, failing(errno.EIO))
    with pytest.raises(StoreError, match="Input/output error"):
        store.put("manifest", b"1", replace=False)
    assert store.names() == []


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_commit_that_fails_leaves_nothing_behind_once_aborted(tmp_path, monkeypatch, call):
    store = open_store(tmp_path)
    sink = store.create("shard", 1)
    sink.write_at(0, b"1")
    monkeypatch.setattr(os, call, failing(errno.EIO))
    with pytest.raises(StoreError, match="Input/output error"):
        sink.commit()
    sink.abort()
    assert store.names() == []


def test_a_short_write_is_continued(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:3], offset))
    store = open_store(tmp_path)
    write(store, "x", b"0123456789")
    assert read_object(store, "x") == b"0123456789"


def test_a_short_read_is_continued(tmp_path, monkeypatch):
    real = os.preadv
    store = open_store(tmp_path)
    write(store, "x", b"0123456789")
    monkeypatch.setattr(
        os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:3]], offset)
    )
    assert read(store, "x", 1, 9) == b"12345678"


def test_no_descriptor_stays_open(tmp_path):
    store = open_store(tmp_path / "run")
    before = set(Path("/proc/self/fd").iterdir())
    write(store, "x", b"1")
    store.put("y", b"1", replace=False)
    with pytest.raises(FileExistsError):
        store.put("y", b"1", replace=False)
    with pytest.raises(EOFError):
        read(store, "x", 0, 2)
    store.create("z", 1).abort()
    store.delete(["x"])
    assert set(Path("/proc/self/fd").iterdir()) == before
