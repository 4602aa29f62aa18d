"""Whole checkpoints on S3: saved, loaded, converted, managed, by threads, ranks and programs."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
from servers import BUCKET
from store_contract import at_once

import distckpt
from distckpt import CheckpointExists, CheckpointNotFound, SaveFailed, StoreError, failures
from distckpt.store import open_store
from distckpt.store.transfer import PART_BYTES, Retries
from distckpt.testing import run_ranks

JOBS = Path(__file__).parent / "mpi" / "jobs.py"
STATUSES = JOBS.with_name("statuses.py")
WHOLE = np.arange(50.0 * 7).reshape(50, 7)  # as in JOBS
LARGE = np.random.default_rng(0).standard_normal((300, 100))


@pytest.fixture
def url():
    """A place that no other test uses."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}/run"


@pytest.fixture(params=["moto", "seaweedfs"])
def server(request):
    """Each server of S3."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["s3fs", "obstore"])
def options(request, server):
    """Storage options for each server, by each library."""
    return server.options(client=request.param)


def rows(comm, values=WHOLE):
    mesh = distckpt.Mesh(tp=comm.size, comm=comm)
    return mesh.shard(
        values[mesh.region(("tp",), values.shape).slices].copy(), ("tp",), values.shape
    )


def test_what_three_ranks_save_two_load_and_one_opens(url, options):
    run_ranks(
        3,
        lambda comm: distckpt.save(
            url, {"w": rows(comm), "large": rows(comm, LARGE), "step": 3},
            comm=comm, storage_options=options,
        ),
    )  # fmt: skip

    def load(comm):
        mesh = distckpt.Mesh(tp=comm.size, comm=comm)
        found = np.zeros(mesh.region((None, "tp"), WHOLE.shape).shape)
        net = {"w": mesh.shard(found, (None, "tp"), WHOLE.shape), "large": np.zeros_like(LARGE)}
        distckpt.load_into(url, net, comm=comm, storage_options=options)
        assert (net["large"] == LARGE).all()
        return found

    assert (np.hstack(run_ranks(2, load)) == WHOLE).all()
    checkpoint = distckpt.open(url, storage_options=options)
    assert checkpoint.values["step"] == 3
    assert (checkpoint["large"][100:110, 3] == LARGE[100:110, 3]).all()
    checkpoint.verify()
    assert len(open_store(url, storage_options=options).names()) == 4


def test_a_manager_saves_removes_and_resumes(url, options):
    def job(comm, last):
        with distckpt.Manager(
            url, comm=comm, save=distckpt.EverySteps(1), keep=distckpt.KeepLast(2),
            storage_options=options,
        ) as manager:  # fmt: skip
            net = {"w": rows(comm, WHOLE * 0)}
            start = manager.load_latest_into(net, default=0)
            before = net["w"].array.copy()
            for step in range(start + 1, last + 1):
                manager.step(step, {"w": rows(comm, WHOLE * step)})
        return start, before

    run_ranks(2, lambda comm: job(comm, 3))
    store = open_store(url, storage_options=options)
    committed = [name for name in store.names() if "manifest.binpb" in store.names(f"{name}/")]
    assert committed == ["step-00000002", "step-00000003"]
    found = run_ranks(3, lambda comm: job(comm, 3))
    assert {start for start, _ in found} == {3}
    assert (np.vstack([before for _, before in found]) == 3 * WHOLE).all()


def test_files_are_converted_to_s3_and_back(url, options, tmp_path):
    distckpt.save(tmp_path / "run", {"w": WHOLE, "large": LARGE})
    distckpt.convert(tmp_path / "run", url, storage_options=options)
    distckpt.convert(url, f"{url}.safetensors", storage_options=options)
    found = distckpt.load(f"{url}.safetensors", storage_options=options)
    assert (found["w"] == WHOLE).all()
    assert (found["large"] == LARGE).all()


def test_of_two_saves_to_one_place_one_is_told(url, options):
    results = at_once(
        [
            lambda value=value: distckpt.save(url, {"w": WHOLE * value}, storage_options=options)
            for value in (1, 2)
        ]
    )
    failed = [isinstance(result, CheckpointExists) for result in results]
    assert sorted(failed) == [False, True]
    winner = failed.index(False) + 1
    assert (distckpt.load(url, storage_options=options)["w"] == WHOLE * winner).all()
    assert len(open_store(url, storage_options=options).names()) == 2


def test_overwriting_replaces_all(url, options):
    distckpt.save(url, {"w": WHOLE}, storage_options=options)
    distckpt.save(url, {"w": WHOLE * 2}, overwrite=True, storage_options=options)
    assert (distckpt.load(url, storage_options=options)["w"] == WHOLE * 2).all()
    assert len(open_store(url, storage_options=options).names()) == 2


def test_nothing_there_and_no_bucket_are_told_apart(moto, url):
    with pytest.raises(CheckpointNotFound):
        distckpt.open(url, storage_options=moto.options())
    with pytest.raises(StoreError, match="There is no bucket 'typing-error'"):
        distckpt.open("s3://typing-error/run", storage_options=moto.options())
    with pytest.raises((StoreError, SaveFailed), match="There is no bucket 'typing-error'"):
        distckpt.save("s3://typing-error/run", {"w": WHOLE}, storage_options=moto.options())


# ----------------------------------------------------------------------- answers that do not come


@pytest.fixture(params=["s3fs", "obstore"])
def faulty(request, faulty_s3, url):
    """A proxy whose faults a test chooses, and a store behind it that tries again quickly."""
    store = open_store(url, storage_options=faulty_s3.options(client=request.param))
    store._retries = Retries(5, first_pause_s=0.01)
    store.part_bytes = 50_000
    return faulty_s3, store


@pytest.mark.parametrize(("overwrite", "times"), [(False, 2), (True, 1)])
def test_a_manifest_whose_answer_is_lost_is_committed(faulty, overwrite, times):
    proxy, store = faulty
    proxy.fault("lose", "PUT", "manifest.binpb", times=times)
    distckpt.save(store, {"w": WHOLE}, overwrite=overwrite)
    assert proxy.count("PUT", "manifest.binpb") > times
    assert (distckpt.load(store)["w"] == WHOLE).all()


def test_a_manifest_whose_every_answer_is_lost_is_committed(faulty):
    proxy, store = faulty
    proxy.fault("lose", "PUT", "manifest.binpb", times=1000)
    distckpt.save(store, {"w": WHOLE})
    assert (distckpt.load(store)["w"] == WHOLE).all()


def test_a_save_that_is_refused_leaves_nothing(faulty):
    proxy, store = faulty
    proxy.fault("refuse", "PUT", "manifest.binpb", times=1000, status=403, code="AccessDenied")
    with pytest.raises(SaveFailed, match="access denied") as caught:
        distckpt.save(store, {"w": WHOLE, "large": LARGE})
    assert caught.value.committed is False
    assert store.names() == []


def test_a_save_whose_manifest_may_yet_arrive_deletes_nothing(faulty):
    proxy, store = faulty
    proxy.fault("refuse", "PUT", "manifest.binpb", times=1000, status=500, code="InternalError")
    with pytest.raises(SaveFailed) as caught:
        distckpt.save(store, {"w": WHOLE})
    assert caught.value.committed is None
    assert len(store.names()) == 1


def test_a_busy_server_delays_a_save_and_a_load(faulty):
    proxy, store = faulty
    for method in ("PUT", "POST", "GET", "HEAD"):
        proxy.fault("refuse", method, times=2)
    distckpt.save(store, {"w": WHOLE, "large": LARGE})
    proxy.fault("refuse", "GET", times=2)
    assert (distckpt.load(store)["large"] == LARGE).all()


# ----------------------------------------------------------------------------------------- programs


@pytest.fixture
def by_name(moto):
    """Variables for moto under a name, which an executor looks up; that closes at exit."""
    endpoint = moto.environment["AWS_ENDPOINT_URL"].replace("127.0.0.1", "localhost")
    return moto.environment | {"AWS_ENDPOINT_URL": endpoint}


def test_what_ranks_of_mpirun_leave_in_flight_is_committed_before_they_end_and_others_load_it(
    by_name, url, mpirun, monkeypatch
):
    for name, value in by_name.items():
        monkeypatch.setenv(name, value)
    ended = mpirun(4, JOBS, "end_without_waiting", url)
    assert ended.status == 0, ended.output
    for number in range(2):
        distckpt.open(f"{url}/{number}").verify()
        assert (distckpt.load(f"{url}/{number}")["w"] == WHOLE).all()
    ended = mpirun(3, JOBS, "load_columns_from", f"{url}/0")
    assert ended.status == 0, ended.output


def test_when_the_server_goes_every_rank_ends_with_a_status_that_says_that_nothing_was_saved(
    faulty_s3, url, mpirun, monkeypatch, tmp_path
):
    environment = faulty_s3.server.environment | {"AWS_ENDPOINT_URL": faulty_s3.endpoint}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    faulty_s3.fault("reset", "PUT", times=1000)

    def go(job):
        while not faulty_s3.count("PUT"):
            assert job.poll() is None
            time.sleep(0.01)
        faulty_s3.go()

    began = time.monotonic()
    ended = mpirun(4, STATUSES, tmp_path, 4, JOBS, "end_while_the_server_goes", url, meanwhile=go)
    statuses = [int(path.read_text()) for path in tmp_path.glob("status-*")]
    assert statuses == [failures.EXIT_STATUS] * 4, ended.output
    assert ended.output.count("the program has ended") == 4
    assert ended.output.count("1 earlier asynchronous save failed") == 4
    assert time.monotonic() - began < 120


def test_a_save_that_nobody_waits_for_is_committed_before_the_program_ends(moto, by_name, url):
    program = f"""
        import numpy as np, distckpt
        distckpt.save_async({url!r}, {{"w": np.ones((3, {PART_BYTES // 8}))}},
                            storage_options={{"client": "s3fs"}})
    """
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
        env=os.environ | by_name,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    distckpt.open(url, storage_options=moto.options()).verify()


def test_a_forked_process_has_connections_of_its_own(moto, url):
    """Also where the parent has obstore's threads, which the child has not."""
    program = f"""
        import os, numpy as np, distckpt
        options = {{"client": "obstore"}}
        distckpt.save({url!r}, {{"w": np.ones(10)}}, storage_options=options)
        checkpoint = distckpt.open({url!r}, storage_options=options)
        assert (checkpoint["w"][:] == 1).all()
        child = os.fork()
        if not child:
            assert (checkpoint["w"][:] == 1).all()
            assert (distckpt.load({url!r}, storage_options=options)["w"] == 1).all()
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | moto.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
