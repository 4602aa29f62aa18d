"""A save is all there or not at all, wherever it is cut, whatever is lost, and whoever races it."""

from __future__ import annotations

import shutil
import threading

import numpy as np
import pytest

import distckpt
from distckpt import (
    CheckpointError,
    CheckpointExists,
    CheckpointNotFound,
    IncompleteCheckpoint,
    LoadFailed,
    PerRank,
    SaveFailed,
    Shard,
    StoreError,
)
from distckpt.manifest import MANIFEST_NAME
from distckpt.store import open_store
from distckpt.testing import FaultyStore, MemoryStore, run_ranks

pytestmark = pytest.mark.filterwarnings("error")

_FOREIGN = {
    "notes.txt": b"my own",
    "shard-00000-of-00001.00000000000000aa.safetensors": b"of another attempt",
    "manifest.binpb.bak": b"a copy",
    "sub/manifest.binpb": b"another checkpoint's",
}


def state(version, comm):
    """Something of each kind: cut over the ranks, the same on all, a value, and one a rank."""
    rows = np.arange(30.0).reshape(6, 5) + version
    mine = slice(6 * comm.rank // comm.size, 6 * (comm.rank + 1) // comm.size)
    return {
        "cut": Shard(rows[mine], (mine.start, 0), (6, 5)),
        "same": np.full(7, version, np.int32),
        "version": version,
        "rng": PerRank([version, comm.rank]),
    }


def version_of(store, ranks):
    """Which version a store holds, all of it read; None if there is none."""
    try:
        checkpoint = distckpt.open(store)
    except (CheckpointNotFound, IncompleteCheckpoint):
        return None
    version = checkpoint.values["version"]
    found = distckpt.load(store)
    assert np.array_equal(found["cut"], np.arange(30.0).reshape(6, 5) + version)
    assert np.array_equal(found["same"], np.full(7, version, np.int32))
    assert checkpoint.per_rank["rng"][:] == [[version, rank] for rank in range(ranks)]
    checkpoint.verify()
    return version


def named(store):
    """The files of the checkpoint in a store, its manifest included."""
    return {MANIFEST_NAME, *distckpt.open(store).manifest.file_names}


def save(store, ranks, version, *, how="save", **options):
    """Save a version; return what each rank returned or raised."""

    def run(comm):
        try:
            if how == "save":
                return distckpt.save(store, state(version, comm), comm=comm, **options)
            return distckpt.save_async(store, state(version, comm), comm=comm, **options).wait()
        except CheckpointError as exc:
            return exc

    return run_ranks(ranks, run)


def error_of(outcomes):
    """The error that all ranks raised alike; None if all saved."""
    errors = [outcome for outcome in outcomes if isinstance(outcome, CheckpointError)]
    if not errors:
        return None
    assert len(errors) == len(outcomes)
    assert len({(type(error), str(error)) for error in errors}) == 1
    assert len({getattr(error, "committed", False) for error in errors}) == 1
    return errors[0]


def operations(ranks, *, overwrite):
    """How many operations a save takes."""
    store = MemoryStore()
    if overwrite:
        assert error_of(save(store, ranks, 1)) is None
    faulty = FaultyStore(store)
    assert error_of(save(faulty, ranks, 2, overwrite=overwrite)) is None
    return len(faulty.operations)


every_kind = [
    pytest.mark.parametrize("ranks", [1, 3]),
    pytest.mark.parametrize("how", ["save", "save_async"]),
    pytest.mark.parametrize("overwrite", [False, True], ids=["fresh", "overwriting"]),
]


def of_every_kind(test):
    for mark in every_kind:
        test = mark(test)
    return test


# ------------------------------------------------------------------------------- cut at any point


@of_every_kind
def test_a_save_cut_at_any_operation_leaves_the_old_checkpoint_or_the_new_one(
    ranks, how, overwrite
):
    seen = set()
    for number in range(operations(ranks, overwrite=overwrite)):
        store = MemoryStore()
        if overwrite:
            save(store, ranks, 1)
        old = 1 if overwrite else None
        faulty = FaultyStore(store, fail_at=number)
        error = error_of(save(faulty, ranks, 2, how=how, overwrite=overwrite))
        found = version_of(store, ranks)
        if error is None:
            assert found == 2
        else:
            assert isinstance(error, SaveFailed | StoreError)
            assert found == old
        seen.add((error is None, found))
        # What was left can be saved over.
        assert error_of(save(store, ranks, 3, overwrite=overwrite or found is not None)) is None
        assert version_of(store, ranks) == 3
    # After its commit a save looks whether its files are there; one that replaces deletes others.
    assert seen == {(False, 1 if overwrite else None), (True, 2)}


@pytest.mark.parametrize("overwrite", [False, True], ids=["fresh", "overwriting"])
def test_a_save_to_files_cut_at_any_operation_leaves_the_old_one_or_the_new_one(
    tmp_path, overwrite
):
    for number in range(operations(2, overwrite=overwrite)):
        store = open_store(tmp_path / str(number))
        if overwrite:
            save(store, 2, 1)
        faulty = FaultyStore(store, fail_at=number)
        error = error_of(save(faulty, 2, 2, overwrite=overwrite))
        old = 1 if overwrite else None
        assert version_of(store, 2) == (2 if error is None else old)
        assert error_of(save(store, 2, 3, overwrite=True)) is None
        assert version_of(store, 2) == 3


@of_every_kind
def test_an_operation_that_fails_once_fails_the_save_and_what_it_wrote_is_gone(
    ranks, how, overwrite
):
    for number in range(operations(ranks, overwrite=overwrite)):
        store = MemoryStore()
        if overwrite:
            save(store, ranks, 1)
        before = dict(store.objects)

        def fail(kind, name, at, number=number):
            if at == number:
                raise StoreError(f"{name}: {kind} failed, this once", refused=True)

        faulty = FaultyStore(store, on_operation=fail)
        error = error_of(save(faulty, ranks, 2, how=how, overwrite=overwrite))
        if error is not None:
            assert store.objects == before
            assert "this once" in str(error)
            assert getattr(error, "committed", False) is False
        else:
            assert version_of(store, ranks) == 2
            if not overwrite:  # of the replaced files some may stay
                assert set(store.objects) == named(store)
        put = next((at for at, found in enumerate(faulty.operations) if found[0] == "put"), number)
        assert (error is None) == (number > put)


class LosesAnswers(MemoryStore):
    """Does what it is asked to, and the answer to one request is lost.

    Args:
        loses: Told (kind, name) of each change, says whether its answer is lost.
    """

    def __init__(self, loses):
        super().__init__()
        self.loses = loses

    def put(self, name, data, *, replace):
        super().put(name, data, replace=replace)
        self.answer("put", name)

    def delete(self, names):
        super().delete(names)
        for name in names:
            self.answer("delete", name)

    def answer(self, kind, name):
        if self.loses(kind, name):
            raise StoreError(f"{name}: the answer to this {kind} was lost")


@of_every_kind
def test_an_answer_lost_once_leaves_no_file_that_nothing_names(ranks, how, overwrite):
    """Every change takes place, and one after another of them is not confirmed."""
    for number in range(100):
        counted = []

        def loses(kind, name, counted=counted, number=number):
            counted.append((kind, name))
            return len(counted) - 1 == number

        store = LosesAnswers(lambda kind, name: False)
        if overwrite:
            save(store, ranks, 1)
        store.loses = loses
        error = error_of(save(store, ranks, 2, how=how, overwrite=overwrite))
        if len(counted) <= number:
            break
        kind, name = counted[number]
        if kind == "put" and name != MANIFEST_NAME:
            assert isinstance(error, SaveFailed)
            assert version_of(store, ranks) == (1 if overwrite else None)
            if not overwrite:
                assert store.objects == {}
        else:
            assert error is None, counted[number]
            assert version_of(store, ranks) == 2
        if overwrite or error is None:
            assert set(store.objects) == named(store)
    else:
        pytest.fail("a save takes fewer operations than that")


# --------------------------------------------------------------------------- the manifest's answer


@of_every_kind
def test_a_manifest_that_is_stored_is_a_commit_whatever_its_answer_said(
    ranks, how, overwrite, caplog
):
    caplog.set_level("INFO", "distckpt")
    store = LosesAnswers(lambda kind, name: name == MANIFEST_NAME and kind == "put")
    if overwrite:
        store.loses = lambda kind, name: False
        save(store, ranks, 1)
        store.loses = lambda kind, name: name == MANIFEST_NAME and kind == "put"
    assert error_of(save(store, ranks, 2, how=how, overwrite=overwrite)) is None
    assert version_of(store, ranks) == 2
    assert set(store.objects) == named(store)
    assert "the manifest was stored although its writing reported" in caplog.text


class Unreadable(FaultyStore):
    """Once a manifest is put, nothing of it is heard any more."""

    def __init__(self, store, *, stored):
        super().__init__(store)
        self.stored = stored
        self.deaf = False

    def put(self, name, data, *, replace):
        if self.stored:
            super().put(name, data, replace=replace)
        self.deaf = True
        raise StoreError("the line went dead")

    def size(self, name):
        if self.deaf:
            raise StoreError("still dead")
        return super().size(name)


@of_every_kind
@pytest.mark.parametrize("stored", [False, True])
def test_where_the_manifest_cant_be_read_back_it_is_unknown_and_nothing_is_deleted(
    ranks, how, overwrite, stored
):
    inner = MemoryStore()
    if overwrite:
        save(inner, ranks, 1)
    before = set(inner.objects)
    store = Unreadable(inner, stored=stored)
    error = error_of(save(store, ranks, 2, how=how, overwrite=overwrite))
    assert isinstance(error, SaveFailed)
    assert error.committed is None
    assert "may or may not be committed; nothing was deleted" in str(error)
    assert "the line went dead" in str(error)
    assert "still dead" in str(error)
    old = 1 if overwrite else None
    assert version_of(inner, ranks) == (2 if stored else old)
    assert before < set(inner.objects)
    assert not any(kind == "delete" for kind, _ in store.operations)


def test_a_manifest_that_is_read_back_damaged_is_unknown(monkeypatch):
    class Garbles(MemoryStore):
        def put(self, name, data, *, replace):
            super().put(name, data[:-1] if name == MANIFEST_NAME else data, replace=replace)
            if name == MANIFEST_NAME:
                raise StoreError("broken off")

    store = Garbles()
    error = error_of(save(store, 2, 1))
    assert isinstance(error, SaveFailed)
    assert error.committed is None
    assert len(store.objects) == 3


# --------------------------------------------------------------------------------------- existing


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("how", ["save", "save_async"])
def test_without_overwrite_a_checkpoint_is_not_replaced(ranks, how):
    store = MemoryStore()
    save(store, ranks, 1)
    before = dict(store.objects)
    faulty = FaultyStore(store)
    error = error_of(save(faulty, ranks, 2, how=how))
    assert isinstance(error, CheckpointExists)
    assert "there is a checkpoint already. Save to another URL, or pass overwrite=True" in str(
        error
    )
    assert store.objects == before
    assert not any(kind == "create" for kind, _ in faulty.operations)


def test_overwriting_nothing_is_a_first_save():
    store = MemoryStore()
    assert error_of(save(store, 2, 1, overwrite=True)) is None
    assert version_of(store, 2) == 1


def test_an_overwritten_checkpoint_is_readable_until_the_new_one_stands():
    store = MemoryStore()
    save(store, 2, 1)
    seen = []

    def look(kind, name, number):
        # Until the put itself has taken place; afterwards the old files are deleted.
        seen.append((kind, name, version_of(store, 2)))

    assert error_of(save(FaultyStore(store, on_operation=look), 2, 2, overwrite=True)) is None
    put = next(index for index, found in enumerate(seen) if found[0] == "put")
    assert {version for _, _, version in seen[: put + 1]} == {1}
    assert {version for _, _, version in seen[put + 1 :]} == {2}
    # It looks whether its files are there, and whether a reader holds those of the old one.
    assert {kind for kind, _, _ in seen[put + 1 :]} == {"size", "names", "delete"}


@pytest.mark.parametrize("overwrite", [False, True], ids=["fresh", "overwriting"])
def test_what_else_lies_there_is_left_alone(overwrite):
    store = MemoryStore()
    if overwrite:
        save(store, 2, 1)
    for name, data in _FOREIGN.items():
        store.put(name, data, replace=False)
    assert error_of(save(store, 2, 2, overwrite=overwrite)) is None
    assert {name: store.objects[name] for name in _FOREIGN} == _FOREIGN
    assert set(store.objects) == named(store) | set(_FOREIGN)


def test_what_else_lies_there_is_left_alone_by_a_failed_save():
    store = MemoryStore()
    for name, data in _FOREIGN.items():
        store.put(name, data, replace=False)

    def fail(kind, name, number):
        if kind == "put":
            raise StoreError("full", refused=True)

    assert isinstance(error_of(save(FaultyStore(store, on_operation=fail), 3, 1)), SaveFailed)
    assert store.objects == _FOREIGN


def test_overwriting_deletes_what_the_replaced_manifest_named_and_nothing_else():
    store = MemoryStore()
    save(store, 3, 1)
    old = named(store) - {MANIFEST_NAME}
    faulty = FaultyStore(store)
    save(faulty, 3, 2, overwrite=True)
    assert {name for kind, name in faulty.operations if kind == "delete"} == old


def test_a_damaged_manifest_can_be_replaced_and_its_files_stay(caplog):
    store = MemoryStore()
    save(store, 2, 1)
    files = set(store.objects) - {MANIFEST_NAME}
    store.objects[MANIFEST_NAME] = store.objects[MANIFEST_NAME][:-1]
    assert isinstance(error_of(save(store, 2, 2)), CheckpointExists)
    assert error_of(save(store, 2, 2, overwrite=True)) is None
    assert version_of(store, 2) == 2
    assert set(store.objects) == named(store) | files
    assert "replacing a manifest that can't be read, whose files are left" in caplog.text


def test_a_checkpoint_that_a_rank_deletes_before_it_joins_is_not_in_the_way():
    """The coordinator looks while it waits for the others."""
    store = MemoryStore()
    assert error_of(save(store, 2, 1)) is None
    looked = threading.Event()

    def note(kind, name, number):
        if name == MANIFEST_NAME:
            looked.set()

    faulty = FaultyStore(store, on_operation=note)

    def run(comm):
        if comm.rank == 1:
            assert looked.wait(20)
            store.delete(list(store.objects))
        return distckpt.save(faulty, state(2, comm), comm=comm)

    run_ranks(2, run)
    assert version_of(store, 2) == 2


def test_shard_files_lie_beside_those_of_an_attempt_that_died():
    store = MemoryStore()
    faulty = FaultyStore(store, fail_at=operations(2, overwrite=False) - 2)  # the manifest's put
    assert error_of(save(faulty, 2, 1)) is not None
    left = set(store.objects)
    assert left
    with pytest.raises(IncompleteCheckpoint, match="2 files of a save, but no manifest"):
        distckpt.open(store)
    assert error_of(save(store, 2, 2)) is None
    assert left.isdisjoint(named(store))
    assert version_of(store, 2) == 2


# -------------------------------------------------------------------------------------------- races


def race(store, kind, **options):
    """Have two jobs of two ranks save versions 1 and 2 to one store; at *kind* they meet."""
    meeting = threading.Barrier(2)
    outcomes = {}

    def meet(found, name, number):
        if found == kind and name == MANIFEST_NAME:
            meeting.wait(20)

    def job(version):
        faulty = FaultyStore(store, on_operation=meet)
        outcomes[version] = save(faulty, 2, version, **options)

    jobs = [threading.Thread(target=job, args=(version,)) for version in (1, 2)]
    for thread in jobs:
        thread.start()
    for thread in jobs:
        thread.join()
    return {version: error_of(found) for version, found in outcomes.items()}


@pytest.mark.parametrize("kind", ["memory", "files", "memory://"])
@pytest.mark.parametrize("how", ["save", "save_async"])
def test_of_two_saves_that_race_exactly_one_wins(tmp_path, kind, how):
    stores = {"memory": MemoryStore(), "files": open_store(tmp_path)}
    store = stores.get(kind) or open_store(f"memory://{tmp_path}")
    for _ in range(5):
        errors = race(store, "put", how=how)
        (winner,) = [version for version, error in errors.items() if error is None]
        assert isinstance(errors[3 - winner], CheckpointExists)
        assert "another save committed here first" in str(errors[3 - winner])
        assert version_of(store, 2) == winner
        assert set(store.names()) == named(store)  # the loser has cleaned up
        store.delete(named(store))


@pytest.mark.parametrize("meet_at", ["put", "size"])
@pytest.mark.parametrize("existing", [False, True])
def test_of_two_overwriting_saves_that_race_the_one_that_is_named_is_whole(meet_at, existing):
    for _ in range(5):
        store = MemoryStore()
        if existing:
            save(store, 2, 0)
        errors = race(store, meet_at, overwrite=True)
        assert errors == {1: None, 2: None}
        assert version_of(store, 2) in (1, 2)
        assert named(store) <= set(store.objects)


# ----------------------------------------------------------------------------------------- readers


class Replaces(FaultyStore):
    """When a shard file is first read, another job replaces the checkpoint."""

    def __init__(self, store):
        self.replaced = False
        self.lock = threading.Lock()

        def replace(kind, name, number):
            with self.lock:
                if kind == "read" and name.startswith("shard-") and not self.replaced:
                    self.replaced = True
                    assert error_of(save(store, 1, 2, overwrite=True)) is None

        super().__init__(store, on_operation=replace)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_load_during_which_the_checkpoint_is_replaced_says_so(ranks):
    inner = MemoryStore()
    save(inner, 3, 1)
    store = Replaces(inner)

    def load(comm):
        net = {"cut": np.zeros((6, 5)), "same": np.zeros(7, np.int32)}
        with pytest.raises(LoadFailed) as caught:
            distckpt.load_into(store, net, comm=comm)
        return str(caught.value)

    messages = set(run_ranks(ranks, load))
    assert len(messages) == 1
    assert "the checkpoint was replaced while it was being read: open it again" in messages.pop()
    assert version_of(inner, 1) == 2


@pytest.mark.parametrize(
    "read",
    [
        lambda checkpoint: checkpoint["cut"][...],
        lambda checkpoint: checkpoint.per_rank["rng"][0],
        lambda checkpoint: checkpoint.verify(),
    ],
    ids=["a tensor", "a per-rank value", "verify"],
)
def test_a_read_from_a_replaced_checkpoint_says_so(read):
    store = MemoryStore()
    save(store, 3, 1)
    checkpoint = distckpt.open(store)
    checkpoint["cut"]
    save(store, 3, 2, overwrite=True)
    with pytest.raises(IncompleteCheckpoint, match="replaced while it was being read"):
        read(checkpoint)


def test_a_missing_file_of_a_checkpoint_that_was_not_replaced_is_named():
    store = MemoryStore()
    save(store, 3, 1)
    checkpoint = distckpt.open(store)
    gone = checkpoint.manifest.file_names[1]
    store.delete([gone])
    with pytest.raises(IncompleteCheckpoint, match=gone):
        checkpoint["cut"][...]
    with pytest.raises(LoadFailed, match=gone) as caught:
        distckpt.load(store)
    assert "replaced while" not in str(caught.value)


def test_a_manifest_that_a_reader_would_refuse_is_never_committed(monkeypatch):
    store = MemoryStore()
    before = distckpt.save(store, {"w": np.arange(6.0)})
    with monkeypatch.context() as patched:
        patched.setattr("distckpt.codec.manifest.MAX_DIMENSIONS", 1)
        with pytest.raises(SaveFailed, match="more than 1 dimensions") as caught:
            distckpt.save(store, {"w": np.zeros((2, 3))}, overwrite=True)
    assert caught.value.committed is False
    assert distckpt.open(store).manifest.save_id == before.manifest.save_id
    np.testing.assert_array_equal(distckpt.load(store)["w"], np.arange(6.0))


def test_a_store_that_fails_while_a_checkpoint_is_verified_is_not_taken_for_damage():
    store = MemoryStore()
    distckpt.save(store, {"w": np.arange(6.0)})
    faulty = FaultyStore(store)
    checkpoint = distckpt.open(faulty)
    faulty.fail_from_now_on()
    with pytest.raises(StoreError, match="injected failure"):
        checkpoint.verify()


def test_a_checkpoint_replaced_while_it_is_verified_is_not_called_damaged():
    store = MemoryStore()
    distckpt.save(store, {"w": np.arange(6.0)})
    reads = []

    def replace_at_the_first_block(kind, name, _):
        # The manifest and the table have been read; then the file goes.
        if kind == "read" and name.startswith("shard-"):
            reads.append(name)
            if len(reads) == 2:
                distckpt.save(store, {"w": np.zeros(6)}, overwrite=True)

    checkpoint = distckpt.open(FaultyStore(store, on_operation=replace_at_the_first_block))
    with pytest.raises(IncompleteCheckpoint, match="replaced while"):
        checkpoint.verify()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_folder_that_is_removed_when_the_manifest_is_put_is_no_checkpoint(tmp_path, ranks):
    """The put makes the folder anew, with nothing in it."""
    folder = tmp_path / "run"

    def remove(kind, name, number):
        if kind == "put":
            shutil.rmtree(folder)

    faulty = FaultyStore(open_store(folder), on_operation=remove)
    error = error_of(save(faulty, ranks, 1))
    assert isinstance(error, SaveFailed)
    assert "the folder was removed while it was saved to" in str(error)
    assert version_of(open_store(folder), 2) is None
