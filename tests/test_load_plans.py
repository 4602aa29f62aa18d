"""A load remembers its plan: the next one gives what a load that remembers nothing would give."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import distckpt
from distckpt import CheckpointError, PerRank, Shard, load_plan, prepare_load
from distckpt.errors import text
from distckpt.testing import MemoryStore, run_ranks


@pytest.fixture
def planned(monkeypatch):
    """How many names each plan that was made is for."""
    made = []

    def plan(manifest, calls, options):
        made.append(len(manifest.names))
        return load_plan.plan_load(manifest, calls, options)

    monkeypatch.setattr(prepare_load, "plan_load", plan)
    return made


def saved(factor, *, rows=6, ranks=2, epoch=1, text=None):
    """A checkpoint of a matrix that is cut by rows, one that is on all ranks, and a value."""
    store = MemoryStore()

    def save(comm):
        part = rows // ranks
        whole = factor * np.arange(rows * 3.0).reshape(rows, 3)
        mine = whole[comm.rank * part : (comm.rank + 1) * part].copy()
        state = {
            "w": Shard(mine, (comm.rank * part, 0), (rows, 3)),
            "b": {"x": np.full(5, factor, np.float32)},
            "epoch": epoch,
        }
        if text is not None:
            state["note"] = PerRank(text)
        distckpt.save(store, state, comm=comm)

    run_ranks(ranks, save)
    return store


def net_of(kind, rank, ranks, rows=6):
    """What a rank wants."""
    if kind == "whole":
        return {"w": np.zeros((rows, 3)), "b": {"x": np.zeros(5, np.float32)}, "epoch": 0}
    if kind == "rows":
        part = rows // ranks
        piece = Shard(np.zeros((part, 3)), (rank * part, 0), (rows, 3))
        return {"w": piece, "b": {"x": np.zeros(5, np.float32)}, "epoch": 0}
    if kind == "strided":
        return {"w": np.zeros((rows, 6))[:, ::2], "b": {"x": np.zeros(10, np.float32)[::2]}}
    if kind == "cast":
        return {"w": np.zeros((rows, 3), np.float32), "epoch": 0}
    if kind == "read-only":
        array = np.zeros((rows, 3))
        array.flags.writeable = False
        return {"w": array, "b": {"x": np.zeros(5, np.float32)}, "epoch": 0}
    if kind == "note":
        return {"note": PerRank(None), "w": np.zeros((rows, 3))}
    if kind == "longer names":
        return {"net": {"w": np.zeros((rows, 3)), "b": {"x": np.zeros(5, np.float32)}}}
    assert kind == "misfit"
    return {"w": np.zeros((rows, 4))}


_NETS = ("whole", "rows", "strided", "cast", "read-only", "note", "longer names", "misfit")
_OPTIONS = (
    {},
    {"strict": True},
    {"cast": False},
    {"only_prefix": "w"},
    {"filter_prefix": ["b", "e"]},
    {"rename": {"w": "w", "b.x": "b.y"}},
    {"select": lambda name: name != "epoch"},
    {"verify": False},
    {"on_corrupt": "skip"},
    {"per_rank": lambda values, rank, size: (values, rank, size)},
)
_CHECKPOINTS = {
    "one": {"factor": 1},
    "two": {"factor": 2, "epoch": 2},
    "three ranks": {"factor": 3, "ranks": 3},
    "more rows": {"factor": 4, "rows": 12},
    "noted": {"factor": 5, "text": "short"},
    "noted again": {"factor": 6, "text": "other"},
    "noted at length": {"factor": 7, "text": "rather long"},
}


@pytest.fixture(scope="module")
def checkpoints():
    return {name: saved(**options) for name, options in _CHECKPOINTS.items()}


def plain(net):
    """What a net holds, to be compared."""
    found = {}
    for name, value in net.items():
        inner = value.array if isinstance(value, Shard) else value
        inner = inner.value if isinstance(inner, PerRank) else inner
        found[name] = plain(inner) if isinstance(inner, dict) else repr(inner)
    return found


def load(comm, store, kind, options):
    """Load; return what came of it, as text."""
    net = net_of(kind, comm.rank, comm.size)
    try:
        report = distckpt.load_into(store, net, comm=comm, **options)
    except CheckpointError as exc:
        return text(exc), plain(net)
    assert report.net is net
    return (report.loaded, report.missing, report.unexpected, report.by_suffix, report.cast), (
        plain(net)
    )


steps = st.tuples(
    st.sampled_from(list(_CHECKPOINTS)),
    # Mostly the same on all ranks.
    st.sampled_from(_NETS).map(lambda kind: [kind] * 3)
    | st.lists(st.sampled_from(_NETS), min_size=3, max_size=3),
    st.sampled_from(range(len(_OPTIONS))),
)


@given(st.integers(1, 3), st.lists(steps, min_size=2, max_size=6), st.data())
def test_any_loads_one_after_another_give_what_each_gives_alone(checkpoints, ranks, found, data):
    # So that plans are found again.
    order = data.draw(st.lists(st.sampled_from(range(len(found))), min_size=2, max_size=8))

    def one_by_one(comm):
        return [
            load(comm, checkpoints[name], kinds[comm.rank], _OPTIONS[option])
            for name, kinds, option in (found[index] for index in order)
        ]

    def alone(index):
        name, kinds, option = found[index]
        return run_ranks(
            ranks, lambda comm: load(comm, checkpoints[name], kinds[comm.rank], _OPTIONS[option])
        )

    expected = {index: alone(index) for index in set(order)}
    together = run_ranks(ranks, one_by_one)
    for rank in range(ranks):
        for place, index in enumerate(order):
            assert together[rank][place] == expected[index][rank]


# ------------------------------------------------------------------------------------ when it plans


def test_nets_and_checkpoints_that_are_alike_are_planned_once(planned, checkpoints):
    def go(comm):
        nets = []
        for name in ("one", "two", "one"):
            nets.append(net_of("rows", comm.rank, comm.size))
            distckpt.load_into(checkpoints[name], nets[-1], comm=comm)
        return [(net["w"].array[0, 1], net["b"]["x"][0], net["epoch"]) for net in nets]

    (first, _) = run_ranks(2, go)
    assert first == [(1, 1, 1), (2, 2, 2), (1, 1, 1)]
    assert len(planned) == 1


def test_two_nets_in_turns_are_planned_once_each(planned, checkpoints):
    def go(comm):
        for kind in ("whole", "cast") * 3:
            distckpt.load_into(checkpoints["one"], net_of(kind, comm.rank, 2), comm=comm)

    run_ranks(2, go)
    assert len(planned) == 2


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("three ranks", {}),
        ("noted", {}),
        ("one", {"strict": True}),
        ("one", {"cast": False}),
        ("one", {"filter_prefix": "x"}),
        ("one", {"rename": {"x": "y"}}),
    ],
)
def test_what_a_plan_depends_on_makes_a_new_one(planned, checkpoints, name, options):
    def go(comm):
        distckpt.load_into(checkpoints["one"], net_of("whole", 0, 2), comm=comm)
        distckpt.load_into(checkpoints[name], net_of("whole", 0, 2), comm=comm, **options)

    run_ranks(2, go)
    assert len(planned) == 2


def test_a_callable_is_asked_each_time(planned, checkpoints):
    """It may answer otherwise."""
    asked = []

    def go(comm):
        for _ in range(3):
            distckpt.load_into(
                checkpoints["one"], net_of("whole", 0, 2), comm=comm, select=asked.append
            )

    def refuse_nothing(name):
        asked.append(name)
        return True

    with pytest.raises(CheckpointError, match="none of the 3 saved names is left"):
        run_ranks(2, go)
    asked.clear()
    run_ranks(
        2,
        lambda comm: [
            distckpt.load_into(
                checkpoints["one"], net_of("whole", 0, 2), comm=comm, select=refuse_nothing
            )
            for _ in range(3)
        ],
    )
    assert asked == ["w", "b.x", "epoch"] * 3
    assert len(planned) == 4


def test_a_rank_that_wants_something_new_makes_all_say_what_they_want(planned, checkpoints):
    def go(comm):
        for kind in ("whole", "rows" if comm.rank else "whole", "whole"):
            net = net_of(kind, comm.rank, comm.size)
            distckpt.load_into(checkpoints["two"], net, comm=comm, strict=False)
            array = net["w"].array if kind == "rows" else net["w"]
            assert array[-1, -1] == 34

    run_ranks(2, go)
    assert len(planned) == 2


def test_nothing_of_a_net_is_kept(checkpoints):
    def go(comm):
        net = net_of("whole", 0, 1)
        gone = weakref.ref(net["w"])
        report = distckpt.load_into(checkpoints["one"], net, comm=comm)
        report.loaded.clear()  # the user's own
        del net, report
        gc.collect()
        assert gone() is None
        again = distckpt.load_into(checkpoints["one"], net_of("whole", 0, 1), comm=comm)
        assert len(again.loaded) == 3

    run_ranks(1, go)
