"""S3: the contract on two servers by two libraries, large objects, faults, and clear errors."""

from __future__ import annotations

import itertools
import os
import socket
import sys
import tracemalloc
import uuid

import numpy as np
import pytest
import with_s3
from servers import BUCKET
from store_contract import StoreTests, read, write

from distckpt import StoreError
from distckpt.store import open_store, partial_of, read_object
from distckpt.store.transfer import PART_BYTES, Retries

CLIENTS = ("s3fs", "obstore")
PART = 100_000  # what tests on moto send as a part; SeaweedFS gets what is sent otherwise


def new_url():
    """Return a URL that no other test uses."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}/run"


def opened(server, client, url=None, *, part_bytes=PART, **more):
    store = open_store(url or new_url(), storage_options=server.options(client=client, **more))
    store.part_bytes = part_bytes
    return store


def large(store):
    """Return how long an object is that goes in three parts."""
    return 2 * store.part_bytes + 12_345


def patient(store, attempts=4):
    """Let a store try again quickly."""
    store._retries = retries = Retries(attempts, first_pause_s=0.01, longest_pause_s=0.02)
    if store._bulk is not None:
        store._bulk._retries = retries
    return store


def random_bytes(count, seed=0):
    return np.random.default_rng(seed).bytes(count)


# ------------------------------------------------------------------------------------ the contract


class S3Tests(StoreTests):
    races, replacements, longest = 4, 3, 7


class TestMotoByS3fs(S3Tests):
    @pytest.fixture
    def store(self, moto):
        return opened(moto, "s3fs")


class TestMotoByObstore(S3Tests):
    @pytest.fixture
    def store(self, moto):
        return opened(moto, "obstore")


class SeaweedfsTests(S3Tests):
    def test_a_group_whose_objects_are_deleted_is_gone(self, store):
        """In the end: this server has directories, and removes empty ones when it has time."""
        write(store, "step/a", b"1")
        store.delete(["step/a"])
        assert store.names("step/") == []


class TestSeaweedfsByS3fs(SeaweedfsTests):
    @pytest.fixture
    def store(self, seaweedfs):
        return opened(seaweedfs, "s3fs")


class TestSeaweedfsByObstore(SeaweedfsTests):
    @pytest.fixture
    def store(self, seaweedfs):
        return opened(seaweedfs, "obstore")


@pytest.fixture(params=itertools.product(("moto", "seaweedfs"), CLIENTS), ids="-".join)
def store(request):
    """An empty store, on each server, by each library."""
    name, client = request.param
    part_bytes = PART if name == "moto" else PART_BYTES
    return opened(request.getfixturevalue(name), client, part_bytes=part_bytes)


@pytest.fixture(params=CLIENTS)
def faulty(request, faulty_s3):
    """An empty store, by way of a proxy whose faults a test chooses: (proxy, store)."""
    return faulty_s3, patient(opened(faulty_s3, request.param))


# ----------------------------------------------------------------------------------- large objects


def test_a_large_object_goes_in_parts_and_comes_in_ranges(store):
    data = random_bytes(large(store))
    sink = store.create("group/x", len(data))
    step = store.part_bytes * 2 // 3 + 1
    for start in range(0, len(data), step):
        sink.write_at(start, memoryview(data)[start : start + step])
    assert store.names() in ([], ["group"])
    assert not [name for name in store.names("group/") if partial_of(name) is None]
    with pytest.raises(FileNotFoundError):
        store.size("group/x")
    sink.commit()
    assert store.names("group/") == ["x"]
    assert read_object(store, "group/x") == data
    # Cut where a part ends, too.
    assert (
        read(store, "group/x", store.part_bytes - 3, 2 * store.part_bytes + 5)
        == (data[store.part_bytes - 3 : 2 * store.part_bytes + 5])
    )
    with pytest.raises(EOFError):
        read(store, "group/x", 1, large(store) + 1)


def test_an_object_that_outgrows_what_it_said_is_whole(store):
    data = random_bytes(large(store))
    sink = store.create("x", 10)
    step = store.part_bytes // 2
    for start in range(0, len(data), step):
        sink.write_at(start, memoryview(data)[start : start + step])
    sink.commit()
    assert read_object(store, "x") == data


def test_a_buffer_may_change_once_it_was_written(store):
    data = np.frombuffer(random_bytes(large(store)), np.uint8)
    buffer = np.empty(store.part_bytes, np.uint8)
    sink = store.create("x", len(data))
    for start in range(0, len(data), store.part_bytes):
        part = data[start : start + store.part_bytes]
        buffer[: len(part)] = part
        sink.write_at(start, buffer[: len(part)].data)
        buffer[:] = 0
    sink.commit()
    assert read_object(store, "x") == data.tobytes()


def test_an_aborted_upload_leaves_no_parts(store):
    sink = store.create("x", large(store))
    sink.write_at(0, bytes(large(store)))
    sink.abort()
    assert store.names() == []


def test_an_upload_that_nobody_ended_is_listed_measured_and_deleted_by_its_temporary_name(store):
    sink = store.create("group/x", large(store))
    sink.write_at(0, bytes(large(store)))
    looks = itertools.count()
    while _size_or_0(store, "group/x.partial") < store.part_bytes:  # parts are on their way
        assert next(looks) < 10_000
    assert store.names() == ["group"]
    assert store.names("group/") == ["x.partial"]
    assert store.modified("group/x.partial") > 0
    while store.names("group/"):  # a part that comes after its upload is deleted is lost, too
        store.delete(["group/x.partial"])
        assert next(looks) < 10_000
    with pytest.raises(StoreError):
        sink.commit()
    sink.abort()
    assert store.names() == []


def _size_or_0(store, name):
    try:
        return store.size(name)
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("client", CLIENTS)
def test_an_upload_keeps_few_parts_in_memory(moto, client, monkeypatch):
    monkeypatch.setattr("distckpt.store.multipart.PARTS_AT_ONCE", 2)
    monkeypatch.setattr("distckpt.store.bulk.PARTS_AT_ONCE", 2)
    part_bytes = 2_000_000
    data = np.zeros(14 * part_bytes, np.uint8)
    sink = opened(moto, client, part_bytes=part_bytes).create("x", data.nbytes)
    tracemalloc.start()
    try:
        sink.write_at(0, data.data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        sink.abort()
    # Each part once, and once more in the connection's buffer.
    assert peak < 2 * (2 + 1) * part_bytes + 1_000_000


def test_parts_are_as_long_as_ten_thousand_of_them_must_be():
    store = open_store("s3://bucket/run")
    assert store.create("x", 200 << 30)._part_bytes * 10_000 >= 200 << 30
    assert store.create("x", 10 << 30)._part_bytes == PART_BYTES


# ------------------------------------------------------------------------------------------ faults


def test_a_busy_server_is_asked_again(faulty):
    proxy, store = faulty
    for method in ("PUT", "GET", "HEAD"):
        proxy.fault("refuse", method, times=2)
    store.put("x", b"0123", replace=False)
    assert store.size("x") == 4
    assert read(store, "x", 1, 3) == b"12"
    assert [proxy.count(method) for method in ("PUT", "GET", "HEAD")] == [3, 3, 3]


@pytest.mark.parametrize(
    ("status", "code"),
    [(429, "TooManyRequests"), (500, "InternalError"), (502, "BadGateway"), (504, "Timeout")],
)
def test_what_a_server_may_mend_is_asked_again(faulty, status, code):
    proxy, store = faulty
    for method in ("PUT", "GET"):
        proxy.fault("refuse", method, times=2, status=status, code=code)
    store.put("x", b"0123", replace=True)
    assert read(store, "x", 1, 3) == b"12"


def test_two_creations_that_got_in_each_others_way_are_tried_again(faulty):
    proxy, store = faulty
    proxy.fault("refuse", "PUT", times=2, status=409, code="ConditionalRequestConflict")
    store.put("x", b"0123", replace=False)
    assert read_object(store, "x") == b"0123"


def test_a_connection_that_breaks_is_made_again(faulty):
    proxy, store = faulty
    proxy.fault("reset", "PUT", times=2)
    proxy.fault("reset", "GET")
    proxy.fault("truncate", "GET")
    store.put("x", b"0123", replace=False)
    assert read(store, "x", 0, 4) == b"0123"


def test_asking_again_ends(faulty):
    proxy, store = faulty
    proxy.fault("refuse", "PUT", times=1000)
    with pytest.raises(StoreError, match="SlowDown") as caught:
        store.put("x", b"0123", replace=False)
    assert proxy.count("PUT") == 4
    assert not caught.value.refused


def test_a_failure_that_may_yet_arrive_is_not_called_refused(faulty):
    proxy, store = faulty
    proxy.fault("lose", "PUT")
    proxy.fault("refuse", "PUT", times=1000)
    with pytest.raises(StoreError) as caught:
        store.put("x", b"0123", replace=True)
    assert not caught.value.refused
    assert read_object(store, "x") == b"0123"


def test_a_failure_inside_the_server_is_not_called_refused(faulty):
    proxy, store = faulty
    proxy.fault("refuse", "PUT", times=1000, status=500, code="InternalError")
    with pytest.raises(StoreError) as caught:
        store.put("x", b"0123", replace=True)
    assert not caught.value.refused


def test_a_shard_whose_first_answer_was_lost_is_our_own(faulty):
    proxy, store = faulty
    proxy.fault("lose", "PUT")
    write(store, "x", b"0123")
    assert proxy.count("PUT") == 2
    assert read_object(store, "x") == b"0123"


def test_a_name_that_another_has_taken_is_not_written_over(faulty):
    _, store = faulty
    store.put("x", b"another's", replace=False)
    with pytest.raises(StoreError, match="exists already") as caught:
        write(store, "x", b"0123")
    assert caught.value.refused
    assert read_object(store, "x") == b"another's"


def test_a_large_name_that_another_has_taken_is_not_written_over(moto):
    store = opened(moto, "s3fs")
    store.put("x", b"another's", replace=False)
    sink = store.create("x", large(store))
    sink.write_at(0, bytes(large(store)))
    with pytest.raises(StoreError, match="exists already"):
        sink.commit()
    sink.abort()
    assert read_object(store, "x") == b"another's"
    assert store.names() == ["x"]


@pytest.mark.parametrize("text", ["uploads", "partNumber=2", "uploadId"])
@pytest.mark.parametrize("kind", ["refuse", "reset", "lose"])
def test_an_upload_goes_on_after_faults(faulty, text, kind):
    proxy, store = faulty
    method = "PUT" if text == "partNumber=2" else "POST"
    proxy.fault(kind, method, text, status=500, code="InternalError")
    data = random_bytes(large(store))
    write(store, "x", data)
    assert read_object(store, "x") == data
    # An upload that was begun twice, since the first answer was lost, is left for clean-up.
    assert store.names() == ["x"] if (text, kind) != ("uploads", "lose") else ["x", "x.partial"]


@pytest.mark.parametrize(
    ("method", "text"), [("POST", "uploads"), ("PUT", "partNumber=3"), ("POST", "uploadId")]
)
def test_an_upload_that_fails_leaves_no_parts(faulty, method, text):
    proxy, store = faulty
    proxy.fault("refuse", method, text, times=1000, status=500, code="InternalError")
    sinks = []

    def upload():
        sinks.append(store.create("x", large(store)))
        sinks[0].write_at(0, bytes(large(store)))
        sinks[0].commit()

    with pytest.raises(StoreError):
        upload()
    sinks[0].abort()
    assert store.names() == []


def test_parts_that_can_not_be_aborted_are_told(faulty, caplog):
    proxy, store = faulty
    proxy.fault("refuse", "DELETE", times=1000, status=403, code="AccessDenied")
    sink = store.create("x", large(store))
    sink.write_at(0, bytes(large(store)))
    sink.abort()
    assert "lifecycle rule" in caplog.text
    proxy.faults.clear()
    store.delete(["x.partial"])
    assert store.names() == []


@pytest.mark.parametrize("kind", ["whole", "elsewhere"])
def test_a_server_that_does_not_honour_ranges_is_told(faulty, kind):
    proxy, store = faulty
    store.put("x", random_bytes(100), replace=False)
    proxy.fault(kind, "GET", times=1000)
    with pytest.raises(StoreError, match="ignores ranges"):
        read(store, "x", 5, 50)
    assert proxy.count("GET") == 1


def test_a_body_that_is_too_short_is_read_again(faulty):
    proxy, store = faulty
    store.put("x", random_bytes(100), replace=False)
    proxy.fault("short", "GET")
    assert read(store, "x", 5, 50) == random_bytes(100)[5:50]
    proxy.fault("short", "GET", times=1000)
    with pytest.raises(StoreError):
        read(store, "x", 5, 50)


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("operation", ["put", "size", "read", "names", "large"])
def test_a_missing_bucket_is_told_with_what_to_do(moto, client, operation):
    store = opened(moto, client, "s3://no-such-bucket/run")
    operations = {
        "put": lambda: store.put("x", b"", replace=False),
        "size": lambda: store.size("x"),
        "read": lambda: read(store, "x", 0, 1),
        "names": store.names,
        "large": lambda: write(store, "x", bytes(large(store))),
    }
    with pytest.raises(StoreError, match=r"There is no bucket .no-such-bucket.*Make it first"):
        operations[operation]()


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("operation", ["put", "size", "read", "names", "large"])
def test_wrong_credentials_are_told(seaweedfs, client, operation):
    store = opened(seaweedfs, client, secret="wrong")
    operations = {
        "put": lambda: store.put("x", b"", replace=False),
        "size": lambda: store.size("x"),
        "read": lambda: read(store, "x", 0, 1),
        "names": store.names,
        "large": lambda: write(store, "x", bytes(large(store))),
    }
    with pytest.raises(StoreError, match=r"access denied.*Are the credentials right") as caught:
        operations[operation]()
    assert caught.value.refused


@pytest.mark.parametrize("client", CLIENTS)
def test_missing_credentials_are_told(moto, client, monkeypatch):
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    store = open_store(new_url(), storage_options={"endpoint_url": moto.endpoint, "client": client})
    for operation in (lambda: store.size("x"), lambda: read(store, "x", 0, 1)):
        with pytest.raises(StoreError, match="AWS_ACCESS_KEY_ID") as caught:
            operation()
        assert caught.value.refused


@pytest.mark.parametrize("client", CLIENTS)
def test_a_wrong_endpoint_is_told(moto, client):
    store = patient(opened(moto, client, endpoint_url="http://127.0.0.1:9"), attempts=2)
    with pytest.raises(StoreError, match="Is the endpoint right"):
        store.put("x", b"", replace=False)


def test_a_server_that_can_not_create_exclusively_is_told(faulty):
    proxy, store = faulty
    proxy.fault("refuse", "PUT", status=501, code="NotImplemented", times=4)
    with pytest.raises(StoreError, match="overwrite=True") as caught:
        store.put("x", b"", replace=False)
    assert caught.value.refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"client": "curl"}, "'obstore' or 's3fs'"),
        ({"client": "obstore", "requester_pays": True}, "requester_pays"),
        ({"client": "obstore", "client_kwargs": {"verify": False}}, "verify"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, said):
    with pytest.raises(StoreError, match=said):
        open_store("s3://bucket/run", storage_options=options)


def test_a_url_without_a_bucket_is_refused():
    with pytest.raises(StoreError, match="names no bucket"):
        open_store("s3://")


def test_obstore_is_used_where_it_knows_all_options():
    assert open_store("s3://bucket/run")._bulk is not None
    assert open_store("s3://bucket/run", storage_options={"client": "s3fs"})._bulk is None
    assert open_store("s3://bucket/run", storage_options={"requester_pays": True})._bulk is None


def test_without_s3fs_the_error_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("distckpt.store.s3")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "distckpt.store.bucket", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(StoreError, match=r"pip install 'distckpt\[s3\]'"):
        open_store("s3://bucket/run")


def test_a_server_that_takes_no_objects_is_not_waited_for_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(with_s3, "_PATIENCE_S", 1.0)
    log = tmp_path / "server.log"
    log.write_text("no space left")
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen(100)
        server = with_s3.S3Server(f"http://127.0.0.1:{mute.getsockname()[1]}")
        with pytest.raises(RuntimeError, match="takes no objects:\nno space left"):
            with_s3._with_bucket(server, log)
