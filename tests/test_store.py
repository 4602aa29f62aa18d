"""What every store promises, tried on each kind of store; then what is each one's own."""

from __future__ import annotations

import errno
import io
import os
import stat
import time
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from store_contract import StoreTests, read, write

import distckpt
from distckpt import StoreError
from distckpt.store import FsspecStore, LocalStore, PrefixStore, open_store, partial_of, read_object
from distckpt.store.transfer import Retries
from distckpt.testing import FaultyStore, MemoryStore


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


@pytest.mark.parametrize(
    "path",
    [
        "a",
        "./a",
        "a/",
        "../b",
        "/x//y/",
        "a b/ü%20",
        "~",
        "~/runs",
        "a~",
        "a/./b",
        ".",
        "c:d",
        "a::b",
    ],
)
def test_a_mere_path_is_what_fsspec_takes_it_for(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, found = fsspec.core.url_to_fs(path)
    assert open_store(path).url == LocalStore(Path(found).absolute()).url


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


class ObjectsOnly(MemoryFileSystem):
    """Shows a file when it is closed, as object stores do."""

    protocol = "gs"
    store: ClassVar = {}
    pseudo_dirs: ClassVar = [""]

    def _open(self, path, mode="rb", **options):
        if mode != "wb":
            return super()._open(path, mode, **options)
        return ShownWhenClosed(self, path)


class ShownWhenClosed(io.BytesIO):
    def __init__(self, fs, path):
        super().__init__()
        self.fs, self.path = fs, path

    def close(self):
        if not self.closed:
            with MemoryFileSystem._open(self.fs, self.path, "wb") as file:
                file.write(self.getvalue())
        super().close()

    def discard(self):
        super().close()


class WithDirectories(MemoryFileSystem):
    """Shows a file as soon as it is begun, as sftp:// and the like do."""

    protocol = "directories"
    store: ClassVar = {}
    pseudo_dirs: ClassVar = [""]


_LARGE = 1 << 40  # what an object says decides, not what then comes


@pytest.mark.parametrize("kind", ["memory", ObjectsOnly, WithDirectories])
def test_a_large_object_is_not_there_before_its_commit(tmp_path, kind):
    fs = MemoryFileSystem() if kind == "memory" else kind()
    store = FsspecStore(fs, f"{tmp_path}/large", "any://large")
    sink = store.create("x", _LARGE)
    sink.write_at(0, b"abc")
    sink.write_at(3, b"def")
    assert [name for name in store.names() if partial_of(name) is None] == []
    with pytest.raises(FileNotFoundError):
        store.size("x")
    sink.commit()
    assert store.names() == ["x"]
    assert read_object(store, "x") == b"abcdef"


@pytest.mark.parametrize("kind", ["memory", ObjectsOnly, WithDirectories])
def test_a_large_object_that_is_aborted_leaves_nothing(tmp_path, kind):
    fs = MemoryFileSystem() if kind == "memory" else kind()
    store = FsspecStore(fs, f"{tmp_path}/aborted", "any://large")
    sink = store.create("x", _LARGE)
    sink.write_at(0, b"abc")
    sink.abort()
    assert store.names() == []


def test_an_adapter_that_does_not_create_exclusively_is_refused_for_that(tmp_path):
    obstore_fsspec = pytest.importorskip("obstore.fsspec")
    store = FsspecStore(obstore_fsspec.FsspecStore("memory"), "run", "memory://run")
    with pytest.raises(StoreError, match="does not create exclusively") as caught:
        store.put("x", b"1", replace=False)
    assert caught.value.refused


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


# ------------------------------------------------------------------------------------ a web server


@pytest.fixture(params=[True, False], ids=["with ranges", "without ranges"])
def served(request, tmp_path, web):
    """A folder, and a store that reads it from a web server."""
    folder = tmp_path / "served"
    folder.mkdir()
    return folder, open_store(web(folder, ranges=request.param) + "/")


def test_a_web_server_is_read(served):
    folder, store = served
    data = bytes(range(256)) * 9
    (folder / "x").write_bytes(data)
    (folder / "empty").write_bytes(b"")
    (folder / "sub").mkdir()
    (folder / "sub" / "y@0:1,2:3 ü#%").write_bytes(b"0123")
    assert read_object(store, "x") == data
    assert read_object(store, "empty") == b""
    assert store.size("x") == len(data)
    assert abs(store.modified("x") - time.time()) < 60
    for start, stop in ((0, 1), (7, 300), (len(data) - 1, len(data)), (5, 5)):
        assert read(store, "x", start, stop) == data[start:stop]
    for start, stop in ((0, len(data) + 1), (len(data), len(data) + 1), (9000, 9001)):
        with pytest.raises(EOFError):
            read(store, "x", start, stop)
    assert store.names() == ["empty", "sub", "x"]
    assert store.names("sub/") == ["y@0:1,2:3 ü#%"]
    assert read_object(store, "sub/y@0:1,2:3 ü#%") == b"0123"


def test_absence_on_a_web_server_is_told_as_absence(served):
    _, store = served
    for look in (store.size, store.modified, lambda name: read(store, name, 0, 1)):
        with pytest.raises(FileNotFoundError) as caught:
            look("x")
        assert not isinstance(caught.value, StoreError)
    assert store.names("x/") == []


def test_a_web_server_is_not_written_to(served):
    folder, store = served
    (folder / "x").write_bytes(b"1")
    for operation in ("put", "create", "delete"):
        with pytest.raises(StoreError, match="only read from") as caught:
            _OPERATIONS[operation](store)
        assert caught.value.refused
    store.delete([])
    assert (folder / "x").read_bytes() == b"1"


def test_a_large_object_comes_from_a_web_server_in_ranges(tmp_path, web):
    data = np.random.default_rng(0).bytes(20_000_000)
    (tmp_path / "x").write_bytes(data)
    assert read_object(open_store(web(tmp_path, ranges=True)), "x") == data


def test_a_large_object_is_not_taken_from_a_web_server_that_ignores_ranges(tmp_path, web):
    with (tmp_path / "x").open("wb") as file:
        file.truncate(20_000_000)
    store = open_store(web(tmp_path, ranges=False))
    with pytest.raises(StoreError, match=r"this server ignores ranges.*, 20000000"):
        read(store, "x", 5, 10)


def test_a_web_server_that_is_not_there_is_told():
    store = open_store("http://127.0.0.1:9/run")
    store._retries = Retries(2, first_pause_s=0.01)
    with pytest.raises(StoreError, match="Connect"):
        store.size("x")


def test_a_checkpoint_is_loaded_from_a_web_server(tmp_path, web):
    state = {"w": np.arange(3_000_000.0), "step": 3}
    distckpt.save(tmp_path / "run", state)
    url = f"{web(tmp_path, ranges=True)}/run"
    assert (distckpt.load(url)["w"] == state["w"]).all()
    assert (distckpt.open(url)["w"][5:9] == state["w"][5:9]).all()
    distckpt.open(url).verify()
    with pytest.raises(distckpt.CheckpointNotFound):
        distckpt.open(f"{url}/nothing")


# ------------------------------------------------------------------------------------- directories


def test_a_directory_of_the_users_stays_when_it_becomes_empty(tmp_path):
    (tmp_path / "run").mkdir()
    store = open_store(tmp_path / "run")
    store.put("manifest", b"1", replace=False)
    store.delete(["manifest"])
    assert (tmp_path / "run").is_dir()


def test_a_directory_that_the_store_made_goes_when_it_becomes_empty(tmp_path):
    store = open_store(tmp_path / "run")
    store.put("manifest", b"1", replace=False)
    store.delete(["manifest"])
    assert not (tmp_path / "run").exists()


def test_another_stores_directory_stays_when_it_becomes_empty(tmp_path):
    open_store(tmp_path / "run").put("manifest", b"1", replace=False)
    open_store(tmp_path / "run").delete(["manifest"])
    assert (tmp_path / "run").is_dir()


# --------------------------------------------------------------------------------- temporary names


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        (
            "shard-00000-of-00004.3f9c2a71d04be816.safetensors.partial",
            "shard-00000-of-00004.3f9c2a71d04be816.safetensors",
        ),
        ("manifest.binpb.3f9c2a71d04be816.partial", "manifest.binpb"),
        ("manifest.binpb", None),
        ("shard-00000-of-00004.3f9c2a71d04be816.safetensors", None),
        ("x.partially", None),
        ("x.3F9C2A71D04BE816.partial", "x.3F9C2A71D04BE816"),
    ],
)
def test_a_temporary_name_tells_what_it_is_of(name, whole):
    assert partial_of(name) == whole


def test_what_a_dead_process_left_is_listed_under_names_that_are_recognised(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    store.create("shard", 4).write_at(0, b"0123")
    monkeypatch.setattr(Path, "unlink", lambda *args, **options: None)  # it died before
    store.put("manifest", b"1", replace=False)
    left = store.names()
    assert len(left) == 3
    assert sorted(filter(None, map(partial_of, left))) == ["manifest", "shard"]
    assert all(time.time() - store.modified(name) < 60 for name in left)


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
        if not Path(path).is_relative_to(tmp_path):
            return None
        relative = Path(path).relative_to(tmp_path)
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
        if opened[descriptor] is not None:  # what lies above is synced, too
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
        ("fsync", "."),
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
        ("fsync", "."),
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
        ("fsync", "."),
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


@pytest.mark.parametrize("kind", ["sink", "put"])
def test_a_directory_that_another_process_has_made_is_synced_in_its_parent_once(
    tmp_path, calls, kind
):
    """It may have died before it could."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    calls.clear()
    store = open_store(tmp_path / "a" / "b")
    for name in ("x", "y"):
        if kind == "sink":
            write(store, name, b"1")
        else:
            store.put(name, b"1", replace=False)
    synced = [path for what, path, *_ in calls if what == "fsync"]
    assert synced.count("a") == 1
    assert synced.count(".") == 1
    assert synced.index("a") < synced.index("a/b")


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


@pytest.mark.parametrize(
    ("call", "number", "refused"),
    [
        ("open", errno.EMFILE, True),
        ("pwrite", errno.ENOSPC, True),
        ("fsync", errno.EIO, True),
        ("link", errno.EACCES, True),
        ("link", errno.EIO, False),  # a network file system that doesn't know
        ("link", errno.ETIMEDOUT, False),
    ],
)
def test_a_put_that_fails_leaves_nothing_behind_and_says_whether_it_may_yet_come(
    tmp_path, monkeypatch, call, number, refused
):
    store = open_store(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, call, failing(number))
        with pytest.raises(StoreError, match=os.strerror(number)) as caught:
            store.put("manifest", b"1", replace=False)
    assert caught.value.refused is refused
    assert not caught.value.undurable
    assert store.names() == []


@pytest.mark.parametrize("replace", [False, True])
def test_a_name_that_may_not_survive_a_power_loss_is_told(tmp_path, monkeypatch, replace):
    store = open_store(tmp_path)
    store.put("first", b"1", replace=True)
    real = os.fsync
    synced = []

    def fsync(descriptor):
        synced.append(descriptor)
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StoreError, match="may not survive a power loss") as caught:
        store.put("manifest", b"1", replace=replace)
    assert len(synced) == 2
    assert caught.value.undurable
    assert not caught.value.refused
    assert store.names() == ["first", "manifest"]


def test_a_link_that_a_network_file_system_sent_twice_is_our_own(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    real = os.link

    def link(source, target):
        real(source, target)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    monkeypatch.setattr(os, "link", link)
    store.put("manifest", b"1", replace=False)
    assert store.names() == ["manifest"]


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
