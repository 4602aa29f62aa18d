"""The newest checkpoint is damaged: the run goes on from the one before, and nothing is touched."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest

import distckpt
from distckpt import (
    CheckpointNotFound,
    KeepLast,
    LoadFailed,
    Manager,
    MatchError,
    Shard,
    StoreError,
    commit,
    prepare,
    writer,
)
from distckpt.manifest import MANIFEST_NAME
from distckpt.store import open_store
from distckpt.store.base import translated
from distckpt.testing import (
    Call,
    Fault,
    FaultyStore,
    MemoryStore,
    Point,
    run_ranks,
)

_ROWS = 1000


def state(comm, step):
    mine = slice(_ROWS * comm.rank // comm.size, _ROWS * (comm.rank + 1) // comm.size)
    full = np.arange(_ROWS * 4.0).reshape(_ROWS, 4) + step
    return {"w": Shard(full[mine], (mine.start, 0), (_ROWS, 4)), "b": np.full(3, step)}


def zeros(comm):
    net = state(comm, 0)
    net["w"].array[...] = 0
    net["b"][...] = 0
    return net


def run_of(*steps, ranks=2):
    store = MemoryStore()

    def save(comm):
        with Manager(store, comm=comm) as manager:
            for step in steps:
                manager.save(step, state(comm, step), metrics={"loss": 1 / step})

    run_ranks(ranks, save)
    return store


def resume(store, ranks=3, **options):
    """Resume on so many ranks; return each one's step and net."""

    def load(comm):
        net = zeros(comm)
        step = Manager(store, comm=comm, on_event=options.get("on_event")).load_latest_into(
            net, default=options.get("default", -1)
        )
        return step, net

    found = run_ranks(ranks, load)
    w = np.vstack([net["w"].array for _, net in found])
    return [step for step, _ in found], w, found[0][1]["b"]


# ------------------------------------------------------------------------------- ways to be damaged


def shard_of(store, step, number=0):
    names = [name for name in store.objects if name.startswith(f"step-{step:08d}/shard-")]
    return sorted(names)[number]


def manifest_of(step):
    return f"step-{step:08d}/{MANIFEST_NAME}"


def flip(store, name, byte):
    data = bytearray(store.objects[name])
    data[byte] ^= 0x10
    store.objects[name] = bytes(data)


def flip_manifest(store, step):
    flip(store, manifest_of(step), len(store.objects[manifest_of(step)]) // 2)


def truncate_manifest(store, step):
    store.objects[manifest_of(step)] = store.objects[manifest_of(step)][:-7]


def empty_manifest(store, step):
    store.objects[manifest_of(step)] = b""


def lengthen_manifest(store, step):
    store.objects[manifest_of(step)] += b"more"


def manifest_of_another_program(store, step):
    store.objects[manifest_of(step)] = b"PK\x03\x04 something else"


def manifest_of_a_newer_version(store, step):
    data = bytearray(store.objects[manifest_of(step)])
    data[8] = 99  # the major version; the envelope's checksum is checked after it
    store.objects[manifest_of(step)] = bytes(data)


def manifest_of_another_step(store, step):
    """Whole in itself, but it names files that are not here."""
    store.objects[manifest_of(step)] = store.objects[manifest_of(step - 1)]


def flip_a_tensors_bytes(store, step):
    flip(store, shard_of(store, step), 4096 + 100)


def flip_the_last_ranks_bytes(store, step):
    flip(store, shard_of(store, step, -1), 4096 + 8000)


def flip_a_header(store, step):
    flip(store, shard_of(store, step), 20)


def flip_a_checksum_table(store, step):
    name = shard_of(store, step)
    flip(store, name, len(store.objects[name]) - 1)


def truncate_a_shard(store, step):
    name = shard_of(store, step)
    store.objects[name] = store.objects[name][:5000]


def empty_a_shard(store, step):
    store.objects[shard_of(store, step)] = b""


def lose_a_shard(store, step):
    del store.objects[shard_of(store, step, -1)]


def swap_two_shards(store, step):
    a, b = shard_of(store, step, 0), shard_of(store, step, 1)
    store.objects[a], store.objects[b] = store.objects[b], store.objects[a]


def a_shard_of_another_step(store, step):
    store.objects[shard_of(store, step)] = store.objects[shard_of(store, step - 1)]


WAYS = [
    flip_manifest,
    truncate_manifest,
    empty_manifest,
    lengthen_manifest,
    manifest_of_another_program,
    manifest_of_a_newer_version,
    manifest_of_another_step,
    flip_a_tensors_bytes,
    flip_the_last_ranks_bytes,
    flip_a_header,
    flip_a_checksum_table,
    truncate_a_shard,
    empty_a_shard,
    lose_a_shard,
    swap_two_shards,
    a_shard_of_another_step,
]


@pytest.mark.parametrize("damage", WAYS, ids=lambda way: way.__name__)
def test_the_run_goes_on_from_the_one_before_and_says_why(damage, caplog):
    store = run_of(1, 2, 3)
    damage(store, 3)
    evidence = {name: data for name, data in store.objects.items() if name.startswith("step-")}
    told = []
    steps, w, b = resume(store, on_event=told.append)
    assert steps == [2, 2, 2]
    assert np.array_equal(w, np.arange(_ROWS * 4.0).reshape(_ROWS, 4) + 2)
    assert b.tolist() == [2, 2, 2]
    skipped = [event for event in told if event.kind == "skipped"]
    assert [event.step for event in skipped] == [3]
    assert "step-00000003" in caplog.text
    assert str(skipped[0].values["error"]) in caplog.text
    assert {n: d for n, d in store.objects.items() if n.startswith("step-")} == evidence


@pytest.mark.parametrize("damage", WAYS, ids=lambda way: way.__name__)
def test_the_evidence_stays_whatever_is_deleted_later(damage):
    store = run_of(1, 2, 3)
    damage(store, 3)
    evidence = {name: data for name, data in store.objects.items() if "00000003/" in name}

    def go_on(comm):
        with Manager(store, comm=comm, keep=KeepLast(1)) as manager:
            assert manager.load_latest_into(zeros(comm)) == 2
            manager.save(4, state(comm, 4))
            manager.save(5, state(comm, 5))

    run_ranks(2, go_on)
    assert {name: data for name, data in store.objects.items() if "00000003/" in name} == evidence
    manager = Manager(store, comm=distckpt.Solo(), keep=KeepLast(1))
    assert manager.latest() == 5
    verdicts = {verdict.step: verdict for verdict in manager.explain()}
    assert sorted(verdicts) == [3, 5]
    assert verdicts[3].kept
    assert "damaged" in verdicts[3].why or "can't be read" in verdicts[3].why


def test_a_damaged_step_that_is_saved_again_is_an_ordinary_one():
    store = run_of(1, 2, 3)
    flip_a_tensors_bytes(store, 3)

    def go_on(comm):
        with Manager(store, comm=comm, keep=KeepLast(1)) as manager:
            assert manager.load_latest_into(zeros(comm)) == 2
            manager.save(3, state(comm, 3))
            manager.save(4, state(comm, 4))

    run_ranks(2, go_on)
    assert Manager(store, comm=distckpt.Solo()).steps() == [4]


def test_bytes_that_were_added_to_a_file_are_not_looked_at():
    """All that a net gets is verified, and there is nothing to go back for."""
    store = run_of(1, 2)
    store.objects[shard_of(store, 2)] += b"more"
    steps, w, _ = resume(store)
    assert steps == [2, 2, 2]
    assert w[0].tolist() == [2, 3, 4, 5]


def delete_the_manifest(folder):
    (folder / MANIFEST_NAME).unlink()


def empty_the_folder(folder):
    for path in folder.iterdir():
        path.unlink()


def a_directory_in_a_files_place(folder):
    path = next(folder.glob("shard-*"))
    path.rename(folder / "elsewhere")
    path.mkdir()


def nothing(folder):
    """See the faults."""


def denied(name):
    """What the operating system says where permissions don't allow reading; not to root, though."""

    def deny(operation):
        with translated(operation.name):
            raise PermissionError(13, "Permission denied")

    return Fault(Point("read", f"step-00000002/{name}"), Call(deny), times=None)


@pytest.mark.parametrize(
    ("damage", "faults", "why"),
    [
        (delete_the_manifest, [], "it has no manifest"),
        (empty_the_folder, [], "it has no manifest"),
        (a_directory_in_a_files_place, [], "Is a directory"),
        (nothing, [denied("shard-*")], "Permission denied"),
        (nothing, [denied(MANIFEST_NAME)], "Permission denied"),
    ],
    ids=["no manifest", "empty", "a directory", "no permission", "no permission for the manifest"],
)
def test_so_it_does_from_a_folder_in_which_something_cannot_be_read(
    tmp_path, damage, faults, why, caplog
):
    root = tmp_path / "run"
    with Manager(root, comm=distckpt.Solo()) as manager:
        for step in (1, 2):
            manager.save(step, state(distckpt.Solo(), step))
    damage(root / "step-00000002")
    before = sorted(root.glob("step-*/**"))
    net = zeros(distckpt.Solo())
    (root / ".distckpt" / "index.json").unlink()
    store = FaultyStore(open_store(root), faults=faults)
    assert Manager(store, comm=distckpt.Solo()).load_latest_into(net, default=0) == 1
    assert net["b"].tolist() == [1, 1, 1]
    assert why in caplog.text
    assert "step-00000002: passed over" in caplog.text
    assert sorted(root.glob("step-*/**")) == before


@pytest.mark.parametrize("ranks", [1, 2])
def test_where_nothing_may_be_read_the_run_does_not_start_anew(ranks):
    """Expired credentials look so."""
    store = run_of(1, 2)

    def refuse(kind, name, number):
        if kind == "read" and "shard" in name:
            raise StoreError("403", denied=True)

    def load(comm):
        manager = Manager(FaultyStore(store, on_operation=refuse), comm=comm)
        with pytest.raises(LoadFailed, match="none of 2 checkpoints can be loaded") as caught:
            manager.load_latest_into(zeros(comm), default=0)
        assert "403" in str(caught.value)

    run_ranks(ranks, load)


def test_two_damaged_ones_are_passed_over():
    store = run_of(1, 2, 3)
    flip_manifest(store, 3)
    lose_a_shard(store, 2)
    steps, w, _ = resume(store)
    assert steps == [1, 1, 1]
    assert w[0].tolist() == [1, 2, 3, 4]


def test_where_all_are_damaged_the_run_does_not_start_anew():
    store = run_of(1, 2)
    flip_manifest(store, 2)
    flip_a_tensors_bytes(store, 1)

    def load(comm):
        with pytest.raises(LoadFailed, match="none of 2 checkpoints can be loaded") as caught:
            Manager(store, comm=comm).load_latest_into(zeros(comm), default=0)
        return str(caught.value)

    texts = run_ranks(2, load)
    assert "step 2: " in texts[0]
    assert "step 1: " in texts[0]
    assert texts[0] == texts[1]


def test_a_net_that_does_not_fit_is_no_damage():
    store = run_of(1, 2)

    def load(comm):
        with pytest.raises(MatchError, match="gone"):
            Manager(store, comm=comm).load_latest_into({"gone": np.zeros(3)})

    run_ranks(2, load)
    assert not any("damaged" in name for name in store.objects)


def test_a_store_that_fails_is_no_damage():
    """Whoever goes back in time because of a network that is down loses work."""
    store = run_of(1, 2)

    def fail(kind, name, number):
        if kind == "read" and "shard" in name:
            raise StoreError("no route")

    def load(comm):
        faulty = FaultyStore(store, on_operation=fail)
        with pytest.raises(StoreError, match="no route"):
            Manager(faulty, comm=comm).load_latest_into(zeros(comm), default=0)

    run_ranks(2, load)
    assert not any("damaged" in name for name in store.objects)


def test_a_save_that_was_never_committed_is_not_damage():
    store = run_of(1, 2)
    del store.objects[manifest_of(2)]
    steps, _, _ = resume(store)
    assert steps == [1, 1, 1]
    assert not any("damaged" in name for name in store.objects)


def test_what_a_damaged_one_left_in_the_net_is_not_passed_off_as_loaded(monkeypatch):
    monkeypatch.setattr(commit, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(prepare, "Layouts", partial(writer.Layouts, block_bytes=4096))
    store = run_of(1, ranks=1)
    with Manager(store, comm=distckpt.Solo()) as manager:
        manager.save(2, state(distckpt.Solo(), 2) | {"extra": np.ones(2000)})
    shard = shard_of(store, 2)
    flip(store, shard, len(store.objects[shard]) - 200)  # in the end of "extra"
    net = zeros(distckpt.Solo()) | {"extra": np.zeros(2000)}
    with pytest.raises(LoadFailed, match="Make the net anew") as caught:
        Manager(store, comm=distckpt.Solo()).load_latest_into(net, strict=False)
    assert caught.value.touched == ["extra"]


def test_the_damage_is_noted_beside_the_run(tmp_path):
    manager = Manager(tmp_path, comm=distckpt.Solo())
    with manager:
        for step in (1, 2):
            manager.save(step, {"w": np.zeros(1000)})
    shard = next((tmp_path / "step-00000002").glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert Manager(tmp_path, comm=distckpt.Solo()).load_latest_into({"w": np.ones(1000)}) == 1
    (note,) = (tmp_path / ".distckpt").glob("damaged-00000002-*.json")
    assert "cut short" in json.loads(note.read_text())["reason"]


def test_a_root_that_can_only_be_read_is_resumed_from_all_the_same(caplog):
    store = run_of(1, 2)
    flip_a_tensors_bytes(store, 2)

    def refuse(kind, name, number):
        if kind in ("put", "create", "delete"):
            raise StoreError("read-only", refused=True)

    faulty = FaultyStore(store, on_operation=refuse)
    net = zeros(distckpt.Solo())
    assert Manager(faulty, comm=distckpt.Solo()).load_latest_into(net) == 1
    assert "could not be noted" in caplog.text


# ----------------------------------------------------------------------------------------- the best


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_best_is_loaded_and_if_it_is_damaged_the_next_best(ranks):
    store = run_of(1, 2, 3)  # the loss falls

    def load(comm):
        net = zeros(comm)
        best = Manager(store, comm=comm).load_best_into(net, "loss", lowest=False)
        return best, net["b"][0]

    assert run_ranks(ranks, load) == [(1, 1)] * ranks
    flip_a_tensors_bytes(store, 1)
    assert run_ranks(ranks, load) == [(2, 2)] * ranks
    assert Manager(store, comm=distckpt.Solo()).best("loss") == 3


def test_where_nothing_has_the_metric_there_is_no_best():
    store = run_of(1)
    manager = Manager(store, comm=distckpt.Solo())
    assert manager.best("accuracy") is None
    with pytest.raises(CheckpointNotFound, match="accuracy"):
        manager.load_best_into(zeros(distckpt.Solo()), "accuracy")
