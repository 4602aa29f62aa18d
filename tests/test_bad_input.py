"""What can't be saved or loaded is refused on every rank alike, and nothing is left of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import distckpt
from distckpt import (
    CheckpointError,
    CheckpointExists,
    CheckpointNotFound,
    CorruptCheckpoint,
    FlatShard,
    IncompleteCheckpoint,
    LayoutError,
    LoadFailed,
    MatchError,
    PerRank,
    SaveFailed,
    Shard,
    StoreError,
    UnsupportedFormat,
)
from distckpt.manifest import MANIFEST_NAME
from distckpt.testing import MemoryStore, run_ranks

on_one_and_three_ranks = pytest.mark.parametrize("ranks", [1, 3])
in_both_ways = pytest.mark.parametrize("how", ["save", "save_async"])


def refused(ranks, call, **options):
    """Call as ranks; return the error, which must be the same on all of them."""

    def run(comm):
        try:
            call(comm)
        except CheckpointError as exc:
            return exc
        return None

    errors = run_ranks(ranks, run, timeout_s=30, **options)
    assert all(isinstance(error, CheckpointError) for error in errors), errors
    assert len({(type(error), str(error), repr(vars(error))) for error in errors}) == 1, errors
    return errors[0]


def save(url, state, comm, how="save", **options):
    if how == "save":
        return distckpt.save(url, state, comm=comm, **options)
    return distckpt.save_async(url, state, comm=comm, **options).wait()


def refuses_to_save(ranks, state_of, how="save", **options):
    """Try to save a rank's state to an empty store; return the error."""
    store = MemoryStore()
    error = refused(ranks, lambda comm: save(store, state_of(comm), comm, how, **options))
    assert store.objects == {}
    run_ranks(ranks, lambda comm: save(store, {"w": np.ones(3)}, comm, how))
    assert distckpt.load(store)["w"].tolist() == [1, 1, 1]
    return error


# ----------------------------------------------------------------------- ranks that do not agree


@in_both_ways
@pytest.mark.parametrize(
    ("leaves", "told"),
    [
        (
            [np.zeros(3), np.zeros(3, "f4"), np.zeros(3)],
            ["float64 (3,)", "rank 1 has float32 (3,)"],
        ),
        ([np.zeros(3), np.zeros(4), np.zeros(3)], ["rank 0 has float64 (3,)", "(4,)"]),
        ([np.zeros((1, 3)), np.zeros(3), np.zeros(3)], ["(1, 3)", "(3,)"]),
        (
            [Shard(np.zeros(2), (2 * rank,), (6 if rank < 2 else 7,)) for rank in range(3)],
            ["rank 2 has float64 (7,)"],
        ),
        ([1, 2, 1], ["'x': 1 on rank 0, 2 on rank 1", "PerRank"]),
        (["a", "a", None], ["'x': 'a' on rank 0, None on rank 2"]),
        ([np.zeros(3), np.zeros(3), 1], ["'x': a tensor and a plain value"]),
        ([PerRank(1), np.zeros(3), PerRank(1)], ["'x': a tensor and a per-rank value"]),
        ([PerRank(1), PerRank(1), 1], ["'x': a per-rank value and a plain value"]),
    ],
    ids=[
        "dtype",
        "shape",
        "dimensions",
        "global shape",
        "number",
        "text",
        "tensor or value",
        "tensor or per rank",
        "value or per rank",
    ],
)
def test_ranks_that_disagree_on_a_name_are_told(leaves, told, how):
    error = refuses_to_save(3, lambda comm: {"x": leaves[comm.rank], "good": np.ones(2)}, how)
    assert type(error) is LayoutError
    for text in told:
        assert text in str(error)
    assert "good" not in str(error)


def test_all_names_on_which_ranks_disagree_are_told():
    def state(comm):
        return {"a": np.zeros(comm.rank), "b": np.zeros(2, "if"[comm.rank % 2]), "c": np.zeros(1)}

    error = refuses_to_save(3, state)
    assert "ranks disagree on 2 tensors" in str(error)
    assert "'a'" in str(error)
    assert "'b'" in str(error)


# --------------------------------------------------------------------- pieces that do not fit


@pytest.mark.parametrize(
    "make",
    [
        lambda: Shard(np.zeros(3), (2,), (4,)),
        lambda: Shard(np.zeros(3), (-1,), (4,)),
        lambda: Shard(np.zeros((2, 2)), (0, 3), (4, 4)),
        lambda: Shard(np.zeros(3), (0, 0), (4, 4)),
        lambda: Shard(np.zeros(3), (0,), (3, 1)),
        lambda: Shard(np.zeros(3), (0.5,), (4,)),
        lambda: FlatShard(np.zeros(3), 2, (2, 2)),
        lambda: FlatShard(np.zeros(3), -1, (2, 2)),
        lambda: FlatShard(np.zeros((1, 3)), 0, (2, 2)),
        lambda: FlatShard(np.zeros(1), 0, (-1, -1)),
    ],
)
def test_a_piece_outside_its_tensor_is_refused_when_it_is_made(make):
    with pytest.raises(LayoutError):
        make()


@dataclass
class Cuts:
    """A net that makes its pieces when it is asked for them."""

    piece: object

    def tensors(self):
        return {"w": self.piece()}

    def assign(self, name, value):
        raise NotImplementedError


@on_one_and_three_ranks
def test_a_piece_outside_its_tensor_that_a_net_makes_fails_all_ranks(ranks):
    def state(comm):
        first = 4 if comm.rank == comm.size - 1 else 0
        return Cuts(lambda: Shard(np.zeros(2), (first,), (5,)))

    error = refuses_to_save(ranks, state)
    assert type(error) is LayoutError
    assert f"on rank {ranks - 1}" in str(error)
    assert "ends outside its global shape (5,)" in str(error)


@in_both_ways
def test_pieces_that_overlap_are_told(how):
    def state(comm):
        return {"w": Shard(np.zeros((3, 4)), (2 * comm.rank, 0), (7, 4))}

    error = refuses_to_save(3, state, how)
    assert type(error) is LayoutError
    assert "'w' of shape (7, 4)" in str(error)
    assert "overlap: [0:3, 0:4] (rank 0) and [2:5, 0:4] (rank 1) both hold [2:3, 0:4]" in str(error)


@in_both_ways
@on_one_and_three_ranks
def test_a_tensor_with_a_gap_is_told(ranks, how):
    error = refuses_to_save(
        ranks, lambda comm: {"w": Shard(np.zeros((1, 4)), (2 * comm.rank, 0), (6, 4))}, how
    )
    assert type(error) is LayoutError
    assert "'w' of shape (6, 4)" in str(error)
    assert "gap: no rank holds [1:2, 0:4]" in str(error) or ranks == 1
    assert "gap: no rank holds" in str(error)


@on_one_and_three_ranks
def test_runs_with_a_gap_are_told(ranks):
    error = refuses_to_save(
        ranks, lambda comm: {"w": FlatShard(np.zeros(3), 4 * comm.rank, (4, 3))}
    )
    assert type(error) is LayoutError
    assert "gap: no rank holds elements 3:" in str(error)


@on_one_and_three_ranks
def test_a_tensor_of_which_nobody_holds_anything_is_told(ranks):
    error = refuses_to_save(ranks, lambda comm: {"w": Shard(np.zeros(0), (2,), (5,))})
    assert "gap: no rank holds any of it" in str(error)


def test_replicas_that_differ_are_told():
    error = refuses_to_save(3, lambda comm: {"bn.mean": np.full(4, comm.rank), "w": np.ones(3)})
    assert type(error) is SaveFailed
    assert "1 tensors that claim to be the same on several ranks are not" in str(error)
    assert "'bn.mean' on ranks 1, 2 differs from the lowest rank's" in str(error)
    assert 'replicas={"<name or glob>": "rank0"}' in str(error)


# ------------------------------------------------------------------- leaves that can't be stored


class Odd:
    def __repr__(self):
        return "<odd>"


_LEAVES = {
    "objects": (np.array([1, "a", None], object), "dtype object can't be stored; supported are"),
    "texts": (np.array(["a", "bc"]), "dtype <U2 can't be stored"),
    "bytes": (np.array([b"a"]), "dtype |S1 can't be stored"),
    "times": (np.zeros(2, "datetime64[s]"), "dtype datetime64[s] can't be stored"),
    "records": (np.zeros(2, [("a", int)]), "can't be stored"),
    "void": (np.zeros(2, "V3"), "dtype |V3 can't be stored"),
    "long double": (np.zeros(2, np.longdouble), "can't be stored"),
    "text": (np.str_("x"), "dtype <U1 can't be stored"),
    "masked": (np.ma.masked_array([1, 2], [True, False]), "save its .data and .mask as two"),
    "complex": (1j, "complex can't be stored; a leaf is an array"),
    "set": ({1, 2}, "set can't be stored"),
    "function": (len, "can't be stored"),
    "class": (Odd, "can't be stored"),
    "object": (Odd(), "Odd can't be stored"),
    "dimensions": (np.zeros((1,) * 33), "33 dimensions; a tensor has at most 32"),
}


@pytest.mark.parametrize("leaf", _LEAVES)
@on_one_and_three_ranks
def test_a_leaf_that_cant_be_stored_is_refused(leaf, ranks):
    value, told = _LEAVES[leaf]

    def state(comm):
        return {"good": np.ones(2), "net": {"bad": value if comm.rank == comm.size - 1 else 0}}

    error = refuses_to_save(ranks, state)
    assert type(error) is LayoutError
    assert "'net.bad'" in str(error)
    assert told in str(error)
    assert f"on rank {ranks - 1}" in str(error)


@pytest.mark.parametrize("leaf", ["objects", "texts", "set", "object"])
@on_one_and_three_ranks
def test_a_leaf_that_cant_be_loaded_into_is_refused(leaf, ranks):
    store = MemoryStore()
    distckpt.save(store, {"bad": np.zeros(3)})
    net = {"bad": _LEAVES[leaf][0]}
    error = refused(ranks, lambda comm: distckpt.load_into(store, dict(net), comm=comm))
    assert type(error) is LayoutError


@on_one_and_three_ranks
def test_all_leaves_that_cant_be_stored_are_named_at_once(ranks):
    error = refuses_to_save(ranks, lambda comm: {name: leaf for name, (leaf, _) in _LEAVES.items()})
    assert f"{len(_LEAVES)} leaves of the state can't be stored" in str(error)
    assert all(f"'{name}'" in str(error) for name in _LEAVES)


@pytest.mark.parametrize(
    "state",
    [
        {"a.b": np.zeros(1), "a": {"b": np.zeros(1)}},
        {"a.b": 1, "a": {"b": np.zeros(1)}},
        {1: np.zeros(1), "1": np.zeros(1)},
        {"a": [1], "a.0": 2},
        [{"name": "a.b", "data": 1}, {"name": "a.b", "data": 1}],
    ],
    ids=["tensors", "a value and a tensor", "keys", "a list", "named items"],
)
@on_one_and_three_ranks
@in_both_ways
def test_two_leaves_of_one_name_are_refused(state, ranks, how):
    error = refuses_to_save(ranks, lambda comm: state, how)
    assert type(error) is LayoutError
    assert "two leaves of the state have this name; rename one" in str(error)


@pytest.mark.parametrize("name", ["a\0b", "lone \ud800 surrogate"])
@on_one_and_three_ranks
def test_a_name_that_is_no_text_is_refused(name, ranks):
    for leaf in (np.zeros(1), 1, PerRank(1)):
        error = refuses_to_save(ranks, lambda comm, leaf=leaf: {name: leaf})
        assert type(error) is LayoutError


@pytest.mark.parametrize("name", ["__metadata__", "__crc32c__"])
@on_one_and_three_ranks
def test_a_name_that_the_files_need_themselves_is_refused(name, ranks):
    error = refuses_to_save(ranks, lambda comm: {name: np.zeros(2)})
    assert type(error) is LayoutError
    assert f"'{name}': shard files need this name; rename the tensor" in str(error)


def test_a_name_that_reads_as_a_piece_of_another_in_the_same_file_is_refused():
    def state(comm):
        found = {"w": Shard(np.zeros(3), (3 * comm.rank,), (9,))}
        return found | ({"w@0:3": np.zeros(2)} if comm.rank == 0 else {})

    error = refuses_to_save(3, state)
    assert "'w@0:3': this key is needed twice in one shard file; rename the tensor" in str(error)


@on_one_and_three_ranks
def test_a_state_that_contains_itself_is_refused(ranks):
    def state(comm):
        found = {"w": np.ones(2), "list": []}
        found["list"].append(found)
        return found

    error = refuses_to_save(ranks, state)
    assert type(error) is LayoutError
    assert "'list.0': the state contains itself" in str(error)


@pytest.mark.parametrize("value", [Odd(), {1, 2}, np.array(["a"]), [[Odd()]], {"x": Odd}])
@on_one_and_three_ranks
def test_a_per_rank_value_that_is_not_plain_is_refused(value, ranks):
    def state(comm):
        return {"rng": PerRank(value if comm.rank == comm.size - 1 else 0)}

    error = refuses_to_save(ranks, state)
    assert type(error) is LayoutError
    assert f"on rank {ranks - 1}" in str(error)


@pytest.mark.parametrize("value", [{"x": Odd()}, {"x": np.zeros(2)}, {"x": {1}}, 5, "text"])
@on_one_and_three_ranks
@in_both_ways
def test_metadata_that_is_not_plain_is_refused(value, ranks, how):
    refuses_to_save(ranks, lambda comm: {"w": np.ones(2)}, how, metadata=value)


@pytest.mark.parametrize("nested", [70, 2000])
@on_one_and_three_ranks
def test_what_is_nested_too_deep_is_refused(nested, ranks):
    value = 1
    for _ in range(nested):
        value = [value]
    assert "nested deeper than" in str(refuses_to_save(ranks, lambda comm: {"x": PerRank(value)}))


# ------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "options",
    [
        {"replicas": "Check"},
        {"replicas": {"*": "none"}},
        {"replicas": None},
        {"replicas": {"*": None}},
        {"replicas": 3},
        {"max_shard_bytes": "1 GB"},
    ],
    ids=repr,
)
@on_one_and_three_ranks
@in_both_ways
def test_an_option_that_is_none_is_refused(options, ranks, how):
    refuses_to_save(ranks, lambda comm: {"w": np.ones(2)}, how, **options)


@pytest.mark.parametrize("option", ["filter_prefix", "only_prefix"])
@on_one_and_three_ranks
def test_an_empty_prefix_is_refused(option, ranks):
    store = MemoryStore()
    distckpt.save(store, {"w": np.ones(2)})

    def load(comm):
        distckpt.load_into(store, {"w": np.zeros(2)}, comm=comm, **{option: ""})

    assert "an empty prefix would match every name" in str(refused(ranks, load))


def test_a_communicator_that_is_none_is_refused():
    with pytest.raises(CheckpointError, match="expected an mpi4py communicator, a distckpt Coord"):
        distckpt.save(MemoryStore(), {}, comm="world")


def test_a_job_that_mpi_did_not_start_is_refused_without_a_communicator(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(CheckpointError, match="WORLD_SIZE=4: this looks like a job of 4 processes"):
        distckpt.save(MemoryStore(), {})
    distckpt.save(MemoryStore(), {}, comm=distckpt.Solo())
    monkeypatch.setenv("WORLD_SIZE", "1")
    distckpt.save(MemoryStore(), {})


# --------------------------------------------------------------------------------------- places


@pytest.mark.parametrize("overwrite", [False, True])
@on_one_and_three_ranks
@in_both_ways
def test_a_parent_that_cant_be_written_is_told(tmp_path, ranks, how, overwrite):
    (tmp_path / "file").write_bytes(b"in the way")
    places = [tmp_path / "file" / "run", Path("/proc/none/run")]
    for place in places:

        def go(comm, place=place):
            state = {"w": Shard(np.zeros(2), (2 * comm.rank,), (2 * comm.size,))}
            save(place, state, comm, how, overwrite=overwrite)

        error = refused(ranks, go)
        assert type(error) is SaveFailed
        assert error.committed is False
        assert str(place) in str(error)
        assert len(error.failures) == ranks
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"in the way"


@on_one_and_three_ranks
def test_an_unknown_scheme_is_told_by_every_call(ranks):
    url = "nosuch://bucket/run"
    calls = [
        lambda comm: distckpt.save(url, {"w": np.ones(2)}, comm=comm),
        lambda comm: distckpt.save_async(url, {"w": np.ones(2)}, comm=comm),
        lambda comm: distckpt.load_into(url, {"w": np.ones(2)}, comm=comm),
        lambda comm: distckpt.open(url),
        lambda comm: distckpt.load(url),
        lambda comm: distckpt.Manager(url, comm=comm),
    ]
    for call in calls:
        error = refused(ranks, call)
        assert type(error) is StoreError
        assert "nosuch://bucket/run: can't open this URL" in str(error)


@pytest.mark.parametrize("url", [None, 5, object()], ids=["None", "a number", "an object"])
@on_one_and_three_ranks
def test_what_is_no_url_is_told(url, ranks):
    for call in (
        lambda comm: distckpt.save(url, {"w": np.ones(2)}, comm=comm),
        lambda comm: distckpt.load_into(url, {"w": np.ones(2)}, comm=comm),
    ):
        assert "TypeError" in str(refused(ranks, call))


def test_a_place_that_only_one_rank_cant_open_is_told_by_all():
    class Picky(MemoryFileSystem):
        protocol = "picky"
        cachable = False

        def __init__(self, rank=0, **options):
            super().__init__(**options)
            if rank == 1:
                raise PermissionError("not on this node")

    fsspec.register_implementation("picky", Picky, clobber=True)

    def go(comm):
        options = {"rank": comm.rank}
        distckpt.save("picky://run", {"w": np.ones(2)}, comm=comm, storage_options=options)

    error = refused(3, go)
    assert type(error) is StoreError
    assert "on rank 1: picky://run: can't open this URL: not on this node" in str(error)


class PerNode(MemoryFileSystem):
    """What lies here depends on the node; /scratch is such a place."""

    protocol = "scratch"
    cachable = False
    nodes: dict = {}  # noqa: RUF012  each test empties it

    def __init__(self, node="", **options):
        super().__init__(**options)
        self.store, self.pseudo_dirs = self.nodes.setdefault(node, ({}, [""]))


@pytest.fixture
def scratch(monkeypatch):
    monkeypatch.setattr("distckpt.commit._LOOKUP_S", 0.05)
    fsspec.register_implementation("scratch", PerNode, clobber=True)
    PerNode.nodes.clear()
    return "scratch://run"


@pytest.mark.parametrize(
    ("nodes", "strange", "ranks"),
    [
        (["a", "b", "c"], ["b", "c"], [1, 2]),
        (["a", "a", "b", "b"], ["b"], [2, 3]),
        (["a", "b", "a"], ["b"], [1]),
    ],
    ids=["a rank a node", "two ranks a node", "round robin"],
)
@in_both_ways
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_each_node_is_not_taken_for_a_shared_one(
    scratch, *, nodes, strange, ranks, how, overwrite
):
    def go(comm):
        state = {"w": Shard(np.ones(2), (2 * comm.rank,), (2 * comm.size,))}
        options = {"node": comm.node}
        save(scratch, state, comm, how, storage_options=options, overwrite=overwrite)

    error = refused(len(nodes), go, nodes=nodes)
    assert type(error) is SaveFailed
    assert "the coordinator, on a, can't see what was written on: " in str(error)
    assert all(f"{node} (shard-" in str(error) for node in strange)
    assert "The URL must be one storage for all ranks: not a node's own folder" in str(error)
    assert sorted(error.failures) == ranks
    assert all(not store for store, _ in PerNode.nodes.values())


def test_a_folder_of_one_node_is_shared_by_its_ranks(scratch):
    def go(comm):
        state = {"w": Shard(np.ones(2), (2 * comm.rank,), (2 * comm.size,))}
        save(scratch, state, comm, storage_options={"node": comm.node})

    run_ranks(3, go, nodes=["a", "a", "a"])
    assert distckpt.load(scratch, storage_options={"node": "a"})["w"].tolist() == [1] * 6


def test_a_checkpoint_that_lies_on_one_node_only_fails_the_load_of_all(scratch):
    distckpt.save(scratch, {"w": np.ones(6)}, storage_options={"node": "a"})

    def go(comm):
        net = {"w": Shard(np.zeros(3), (3 * comm.rank,), (6,))}
        options = {"node": comm.node}
        distckpt.load_into(scratch, net, comm=comm, storage_options=options)
        return net["w"].array

    try:
        found = run_ranks(2, go, nodes=["a", "b"])
    except LoadFailed as exc:
        assert "it is not there" in str(exc)  # noqa: PT017  either may read the one block
    else:
        assert [array.tolist() for array in found] == [[1] * 3] * 2


# -------------------------------------------------------------------------- what is there already


@on_one_and_three_ranks
@in_both_ways
def test_an_existing_checkpoint_is_not_replaced_unless_asked(tmp_path, ranks, how):
    distckpt.save(tmp_path, {"w": np.zeros(3)})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    error = refused(ranks, lambda comm: save(tmp_path, {"w": np.ones(3)}, comm, how))
    assert type(error) is CheckpointExists
    assert isinstance(error, FileExistsError)
    assert f"{tmp_path}: there is a checkpoint already" in str(error)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def without(path):
    path.unlink()


def shorter(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[4096 if path.suffix == ".safetensors" else 40] ^= 4
    path.write_bytes(bytes(data))


def foreign(path):
    path.write_bytes(b"not ours")


@on_one_and_three_ranks
@pytest.mark.parametrize(
    ("part", "harm", "kind", "told"),
    [
        (MANIFEST_NAME, without, IncompleteCheckpoint, "1 files of a save, but no manifest.binpb"),
        (MANIFEST_NAME, shorter, CorruptCheckpoint, "the manifest is damaged"),
        (MANIFEST_NAME, flip, CorruptCheckpoint, "its SHA-256 differs"),
        (MANIFEST_NAME, foreign, UnsupportedFormat, "not a distckpt manifest"),
        ("*.safetensors", without, LoadFailed, "the manifest names this file, and it is not there"),
        ("*.safetensors", shorter, LoadFailed, "the file is cut short"),
        ("*.safetensors", flip, LoadFailed, "are damaged: their CRC32C is"),
        ("*", without, CheckpointNotFound, "found nothing"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_damaged_checkpoint_fails_the_load_of_all(tmp_path, ranks, part, harm, *, kind, told):
    distckpt.save(tmp_path / "run", {"w": np.ones(6), "epoch": 3})
    for path in (tmp_path / "run").glob(part):
        harm(path)
    nets = [{"w": np.zeros(6), "epoch": 0} for _ in range(ranks)]
    error = refused(
        ranks, lambda comm: distckpt.load_into(tmp_path / "run", nets[comm.rank], comm=comm)
    )
    assert type(error) is kind
    assert told in str(error)
    assert str(tmp_path / "run") in str(error)
    assert all(net["epoch"] == 0 and not net["w"].any() for net in nets) or ranks > 1
    assert all(not net["w"].any() for net in nets)


@on_one_and_three_ranks
def test_names_that_match_two_ways_are_refused(ranks):
    store = MemoryStore()
    distckpt.save(store, {"ema.w": np.ones(2), "model.w": np.zeros(2)})
    error = refused(ranks, lambda comm: distckpt.load_into(store, {"w": np.zeros(2)}, comm=comm))
    assert type(error) is MatchError
    assert error.ambiguous == {"w": ["ema.w", "model.w"]}
