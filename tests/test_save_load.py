"""What is saved is what is loaded: any state, cut in any way, by any ranks, into any other cut.

Ranks are threads and stores are in memory, so that many cases can be tried; tests/mpi tries some of
them on processes.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import distckpt
from distckpt import (
    CheckpointError,
    FlatShard,
    LoadFailed,
    MatchError,
    Mesh,
    PerRank,
    Region,
    Shard,
    commit,
    dtypes,
    prepare,
    writer,
)
from distckpt.manifest import BLOCK_BYTES, MANIFEST_NAME
from distckpt.testing import MemoryStore, run_ranks

_MOST_RANKS = 5
_SMALL_BLOCK = 4096
_MORE = settings(max_examples=3 * settings.default.max_examples)


# ------------------------------------------------------------------------------------ any tensor


@st.composite
def shapes(draw):
    """Mostly small; now and then with no elements, with many dimensions, or of several blocks."""
    kind = draw(st.sampled_from(["any"] * 6 + ["many", "large"]))
    if kind == "many":
        return draw(st.lists(st.integers(1, 2), min_size=5, max_size=8).map(tuple))
    if kind == "large":
        return draw(st.lists(st.integers(9, 30), min_size=2, max_size=3).map(tuple))
    return draw(st.lists(st.integers(0, 6), max_size=4).map(tuple))


def codes(dtype):
    """All values of a small dtype, as an array."""
    name = dtype.name
    bits = next((n for n in (2, 4, 6) if name.startswith((f"float{n}", f"int{n}", f"uint{n}"))), 8)
    if name in ("int8", "uint8") or not name.startswith(("int", "uint")):
        return np.arange(2**bits, dtype=np.uint8).view(dtype)
    low = 0 if name.startswith("u") else -(2 ** (bits - 1))
    return np.arange(low, low + 2**bits).astype(dtype)


def some_array(shape, dtype, seed):
    """An array of any bits that the dtype has, NaNs of all kinds among them."""
    rng = np.random.default_rng(seed)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(bool)
    if dtype.itemsize == 1:
        return rng.choice(codes(dtype), shape)
    raw = rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    return raw.reshape(-1).view(dtype).reshape(shape)


def equal_bits(found, expected):
    """Whether two arrays have the same dtype but for the byte order, shape, and bits."""
    found, expected = np.asarray(found), np.asarray(expected)
    return (
        found.shape == expected.shape
        and found.dtype.newbyteorder("=") == expected.dtype.newbyteorder("=")
        and in_order(found).tobytes() == in_order(expected).tobytes()
    )


def in_order(array):
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<"))


_MEMORY = ["C", "F", "strided", "reversed", "big-endian", "read-only"]


def in_memory_as(array, how):
    """The same array, lying in memory in another way."""
    if how == "F":
        return np.array(array, order="F")
    if how == "strided":
        wide = np.zeros(tuple(2 * n for n in array.shape), array.dtype)
        every_second = wide[(*(slice(None, None, 2),) * array.ndim, ...)]
        every_second[...] = array
        return every_second
    if how == "reversed":
        backwards = (slice(None, None, -1),) * array.ndim
        return np.array(array[backwards], order="C")[(*backwards, ...)]
    if how == "big-endian" and array.dtype.isbuiltin == 1:
        return array.astype(array.dtype.newbyteorder(">"))
    copy = array.copy()
    copy.flags.writeable = how != "read-only"
    return copy


# ------------------------------------------------------------------------------------ any layout
# A holding is what one rank has of a tensor: None, "whole", a Region, or a (start, stop) run.


@st.composite
def boxes(draw, shape, count):
    """Cut a shape into at most so many boxes, by straight cuts through one of them at a time."""
    found = [Region.whole(shape)]
    for _ in range(count - 1):
        index = draw(st.integers(0, len(found) - 1))
        box = found[index]
        if not shape:
            break
        dim = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(box.start[dim], box.stop[dim]))
        stop = (*box.stop[:dim], at, *box.stop[dim + 1 :])
        start = (*box.start[:dim], at, *box.start[dim + 1 :])
        found[index : index + 1] = [Region(box.start, stop), Region(start, box.stop)]
    return found


@st.composite
def runs(draw, size, count):
    """Cut a line into so many runs; some are made longer, so that they overlap."""
    cuts = sorted(draw(st.lists(st.integers(0, size), min_size=count - 1, max_size=count - 1)))
    found = []
    for start, stop in zip([0, *cuts], [*cuts, size], strict=True):
        low, high = start, stop
        if draw(st.booleans()):
            low, high = draw(st.integers(0, start)), draw(st.integers(stop, size))
        found.append((low, high))
    return found


@st.composite
def rows(draw, shape, count):
    """Cut a shape into boxes of whole rows; some are held as runs."""
    cuts = sorted(draw(st.lists(st.integers(0, shape[0]), min_size=count - 1, max_size=count - 1)))
    row = math.prod(shape[1:])
    found = []
    for start, stop in zip([0, *cuts], [*cuts, shape[0]], strict=True):
        box = Region((start,) + (0,) * (len(shape) - 1), (stop, *shape[1:]))
        found.append((start * row, stop * row) if draw(st.booleans()) else box)
    return found


@st.composite
def covers(draw, shape, ranks):
    """What each rank holds of a tensor, so that it is covered; some of it by several ranks."""
    kind = draw(st.sampled_from(["whole", "boxes", "runs", "rows", "mesh"]))
    size = math.prod(shape)
    if kind == "whole" or not shape:
        found = ["whole" if shape or draw(st.booleans()) else (0, 1)]
    elif kind == "boxes":
        found = draw(boxes(shape, draw(st.integers(1, ranks))))
    elif kind == "runs":
        found = draw(runs(size, draw(st.integers(1, ranks))))
    elif kind == "rows":
        found = draw(rows(shape, draw(st.integers(1, ranks))))
    else:
        return draw(meshes(shape, ranks))
    spare = [*found, None]
    if kind not in {"boxes", "rows"}:
        spare.append("whole")
    found += [draw(st.sampled_from(spare)) for _ in range(ranks - len(found))]
    return draw(st.permutations(found))


@st.composite
def meshes(draw, shape, ranks):
    """Cut as a mesh of two axes does, evenly or not."""
    dp = draw(st.sampled_from([n for n in range(1, ranks + 1) if ranks % n == 0]))
    spec = [None] * len(shape)
    for axes in draw(st.permutations([("dp", "tp"), "dp", "tp"]))[:1]:
        spec[draw(st.integers(0, len(shape) - 1))] = axes
    uneven = draw(st.sampled_from(["balanced", "chunk"]))
    return [
        Mesh(dp=dp, tp=ranks // dp, rank=rank).region(spec, shape, uneven=uneven)
        for rank in range(ranks)
    ]


@st.composite
def wishes(draw, shape, ranks):
    """What each rank wants of a tensor: anything at all."""

    def one():
        kind = draw(st.sampled_from(["none", "whole", "box", "run"]))
        if kind == "box":
            ends = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
            return Region(tuple(a for a, _ in ends), tuple(b for _, b in ends))
        if kind == "run":
            size = math.prod(shape)
            return tuple(sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size)))))
        return None if kind == "none" else "whole"

    return [one() for _ in range(ranks)]


def part(array, holding):
    """The elements of a holding: what numpy slicing gives."""
    if isinstance(holding, Region):
        return array[holding.slices]
    return array if holding == "whole" else array.reshape(-1)[slice(*holding)]


def leaf(piece, holding, shape):
    """What a rank puts into its state for a holding."""
    if isinstance(holding, Region):
        return Shard(piece, holding.start, shape)
    return piece if holding == "whole" else FlatShard(piece, holding[0], shape)


def content(value):
    """The array of a leaf."""
    return value.array if isinstance(value, Shard | FlatShard) else value


@dataclass(repr=False)
class Tensor:
    array: np.ndarray
    held: list
    memory: str

    def __repr__(self):
        return f"<{self.array.dtype} {self.array.shape} {self.memory}, held as {self.held}>"

    def of(self, rank):
        piece = in_memory_as(part(self.array, self.held[rank]), self.memory)
        return leaf(piece, self.held[rank], self.array.shape)


@dataclass
class Case:
    """A state over all ranks."""

    ranks: int
    tensors: dict
    values: dict = field(default_factory=dict)
    max_shard_bytes: int = 1 << 30
    block_bytes: int = BLOCK_BYTES
    per_rank: list | None = None

    def state(self, rank):
        held = {
            name: tensor.of(rank)
            for name, tensor in self.tensors.items()
            if tensor.held[rank] is not None
        }
        mine = {} if self.per_rank is None else {"rng": PerRank(self.per_rank[rank])}
        return held | mine | self.values

    def save(self, store):
        states = [self.state(rank) for rank in range(self.ranks)]

        def save(comm):
            distckpt.save(store, states[comm.rank], comm=comm, max_shard_bytes=self.max_shard_bytes)

        with pytest.MonkeyPatch.context() as patch:
            use_blocks(patch, self.block_bytes)
            run_ranks(self.ranks, save)

    def net(self, rank, wanted, memory):
        """An empty net of what a rank wants."""
        found = {}
        for name, holdings in wanted.items():
            if holdings[rank] is not None:
                shape = self.tensors[name].array.shape
                empty = np.zeros_like(part(self.tensors[name].array, holdings[rank]))
                found[name] = leaf(in_memory_as(empty, memory), holdings[rank], shape)
        mine = {} if self.per_rank is None else {"rng": PerRank(None)}
        return found | mine | dict.fromkeys(self.values)

    def load(self, store, ranks, wanted, memory="C"):
        """Load what is wanted (name → holding by rank), and compare it with numpy's slicing."""
        nets = [self.net(rank, wanted, memory) for rank in range(ranks)]

        def load(comm):
            report = distckpt.load_into(
                store, nets[comm.rank], comm=comm, strict=True, per_rank=lambda *all_: all_
            )
            return nets[comm.rank], report

        for rank, (found, report) in enumerate(run_ranks(ranks, load)):
            for name, holdings in wanted.items():
                if holdings[rank] is not None:
                    expected = part(self.tensors[name].array, holdings[rank])
                    assert equal_bits(content(found[name]), expected), (name, rank)
            assert same_values({name: found[name] for name in self.values}, self.values)
            if self.per_rank is not None:
                again = ranks == self.ranks
                expected = self.per_rank[rank] if again else (self.per_rank, rank, ranks)
                assert repr(found["rng"].value) == repr(expected)
            assert not report.missing


def same_values(found, expected):
    """Whether plain values are equal and of the same type; NaN is equal to itself."""
    return repr(found) == repr(expected)


_NAMES = ["w", "b", "layer.0.weight", "ünï.cödé", "v@0:1", "with space", "", "a/b", 'q"uote', "é\n"]
plain = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=8)
)


@st.composite
def cases(draw, max_tensors=3):
    ranks = draw(st.integers(1, _MOST_RANKS))
    tensors = {}
    for name in draw(st.lists(st.sampled_from(_NAMES), max_size=max_tensors, unique=True)):
        shape = draw(shapes())
        dtype = draw(st.sampled_from(dtypes.TABLE)).numpy
        array = some_array(shape, dtype, draw(st.integers(0, 2**32)))
        memory = draw(st.sampled_from(_MEMORY))
        tensors[name] = Tensor(array, draw(covers(shape, ranks)), memory)
    names = st.sampled_from(["epoch", "lr", "tokenizer.name", "x"])
    values = draw(st.dictionaries(names, plain, max_size=2))
    max_shard_bytes = draw(st.sampled_from([1 << 30, 100, 1]))
    block_bytes = draw(st.sampled_from([BLOCK_BYTES, _SMALL_BLOCK]))
    per_rank = draw(st.none() | st.lists(plain | st.lists(plain), min_size=ranks, max_size=ranks))
    return Case(ranks, tensors, values, max_shard_bytes, block_bytes, per_rank)


def use_blocks(patch, size):
    """Save with blocks of another size: of the smallest, small tensors have several."""
    patch.setattr(commit, "BLOCK_BYTES", size)
    patch.setattr(prepare, "Layouts", partial(writer.Layouts, block_bytes=size))


@_MORE
@given(cases(), st.data())
def test_what_any_ranks_saved_any_other_ranks_read(case, data):
    store = MemoryStore()
    case.save(store)
    for _ in range(2):
        ranks = data.draw(st.integers(1, _MOST_RANKS), label="ranks")
        wanted = {
            name: data.draw(wishes(tensor.array.shape, ranks), label=f"wanted of {name!r}")
            for name, tensor in case.tensors.items()
        }
        case.load(store, ranks, wanted, data.draw(st.sampled_from(_MEMORY), label="memory"))


@given(cases())
def test_one_process_loads_all_of_it_whole(case):
    store = MemoryStore()
    case.save(store)
    found = distckpt.load(store) if case.tensors else {}
    assert list(found) == list(distckpt.open(store))
    assert found.keys() == case.tensors.keys()
    for name, tensor in case.tensors.items():
        assert equal_bits(found[name], tensor.array)
    assert same_values(
        dict(sorted(distckpt.open(store).values.items())), dict(sorted(case.values.items()))
    )


@given(cases(max_tensors=1), st.data())
def test_an_index_of_a_stored_tensor_is_numpys(case, data):
    store = MemoryStore()
    case.save(store)
    checkpoint = distckpt.open(store)
    for name, tensor in case.tensors.items():
        stored = checkpoint[name]
        assert (stored.shape, stored.ndim) == (tensor.array.shape, tensor.array.ndim)
        assert stored.dtype == tensor.array.dtype
        assert stored.nbytes == tensor.array.nbytes
        for _ in range(5):
            index = data.draw(npst.basic_indices(tensor.array.shape, allow_newaxis=False))
            found, expected = stored[index], tensor.array[index]
            assert type(found) is type(expected)
            assert equal_bits(found, expected)


@given(cases(max_tensors=1), st.data())
def test_a_region_of_a_stored_tensor_is_numpys_slice(case, data):
    store = MemoryStore()
    case.save(store)
    for name, tensor in case.tensors.items():
        wanted = data.draw(wishes(tensor.array.shape, 1))[0]
        if isinstance(wanted, Region):
            found = distckpt.open(store)[name].read(wanted)
            assert equal_bits(found, tensor.array[wanted.slices])
            assert found.flags.c_contiguous


@given(cases())
def test_a_checkpoint_verifies(case):
    store = MemoryStore()
    case.save(store)
    checkpoint = distckpt.open(store)
    assert checkpoint.verify() == sum(
        len(data) for name, data in store.objects.items() if name != MANIFEST_NAME
    )


@given(cases())
def test_an_asynchronous_save_holds_what_the_arrays_held_when_it_was_called(case):
    store = MemoryStore()

    def save(comm):
        state = case.state(comm.rank)
        pending = distckpt.save_async(store, state, comm=comm)
        for value in state.values():
            array = content(value)
            if isinstance(array, np.ndarray) and array.flags.writeable:
                array[...] = np.zeros((), array.dtype)
        pending.wait()

    run_ranks(case.ranks, save)
    whole = {name: ["whole"] for name in case.tensors}
    case.load(store, 1, whole)


@pytest.mark.parametrize("dtype", dtypes.TABLE, ids=lambda entry: entry.name)
def test_every_dtype_comes_back_in_every_kind_of_piece(dtype):
    array = some_array((5, 7), dtype.numpy, 1)
    cut = [Region((0, 0), (2, 7)), Region((2, 0), (5, 4)), Region((2, 4), (5, 7))]
    run = [(0, 11), (11, 30), (30, 35)]
    case = Case(3, {"boxes": Tensor(array, cut, "F"), "runs": Tensor(array, run, "C")})
    store = MemoryStore()
    case.save(store)
    case.load(store, 3, {"boxes": run, "runs": cut})
    assert distckpt.open(store)["runs"].dtype == dtype.numpy


def test_a_mesh_saved_on_four_ranks_loads_on_three():
    weight = np.random.default_rng(0).normal(size=(100, 31))
    store = MemoryStore()

    def save(comm):
        mesh = Mesh(dp=2, tp=2, comm=comm)
        local = weight[mesh.region(("tp", "dp"), weight.shape).slices]
        distckpt.save(store, {"w": mesh.shard(local, ("tp", "dp"), weight.shape)}, comm=comm)

    def load(comm):
        mesh = Mesh(tp=3, comm=comm)
        region = mesh.region(("tp",), weight.shape)
        net = {"w": mesh.shard(np.zeros(region.shape), ("tp",), weight.shape)}
        distckpt.load_into(store, net, comm=comm)
        assert np.array_equal(net["w"].array, weight[region.slices])

    run_ranks(4, save)
    run_ranks(3, load)


def test_tensors_of_several_real_blocks_come_back(tmp_path):
    """4 MiB blocks, on a file system, and pieces that begin and end within blocks."""
    array = np.random.default_rng(0).integers(0, 1 << 60, (1500, 1111))
    other = array[:700].astype(np.float32)
    cut = [
        Region((0, 0), (600, 1111)),
        Region((600, 0), (1500, 500)),
        Region((600, 500), (1500, 1111)),
    ]
    run = [(0, 100_001), (100_001, 1_000_000), (1_000_000, array.size)]
    case = Case(
        3,
        {"a": Tensor(array, cut, "F"), "b": Tensor(other, ["whole"] * 3, "C")},
    )
    case.save(tmp_path)
    case.load(tmp_path, 3, {"a": run, "b": ["whole", None, Region((10, 20), (690, 1000))]})
    checkpoint = distckpt.open(tmp_path)
    assert np.array_equal(checkpoint["a"][::-7, 3:900:11], array[::-7, 3:900:11])


def test_more_ranks_than_rows_save_and_load():
    array = np.arange(6.0).reshape(3, 2)
    store = MemoryStore()

    def region(comm):
        return Mesh(dp=7, comm=comm).region(("dp",), array.shape)

    def save(comm):
        piece = array[region(comm).slices]
        distckpt.save(store, {"w": Shard(piece, region(comm).start, (3, 2))}, comm=comm)

    def load(comm):
        net = {"w": Shard(np.zeros(region(comm).shape), region(comm).start, (3, 2))}
        distckpt.load_into(store, net, comm=comm)
        return net["w"].array

    run_ranks(7, save)
    assert np.array_equal(np.concatenate(run_ranks(7, load)), array)


def test_a_state_without_leaves_is_a_checkpoint_too():
    store = MemoryStore()
    run_ranks(2, lambda comm: distckpt.save(store, {}, comm=comm, metadata={"note": "empty"}))
    checkpoint = distckpt.open(store)
    assert (len(checkpoint), checkpoint.metadata, checkpoint.verify()) == (0, {"note": "empty"}, 0)


def test_a_bare_array_is_a_state():
    store = MemoryStore()
    distckpt.save(store, np.arange(3))
    assert np.array_equal(distckpt.load(store)[""], np.arange(3))
    mine = np.zeros(3, np.int64)
    distckpt.load_into(store, mine)
    assert np.array_equal(mine, np.arange(3))


# ------------------------------------------------------------------------------- the checkpoint


def test_a_checkpoint_tells_what_it_holds():
    store = MemoryStore()
    state = {"b": np.ones(2), "a": np.zeros((3, 1), np.int8), "epoch": 3, "rng": PerRank(5)}
    found = distckpt.save(store, state, metadata={"git": "c0ffee"})
    assert found.metadata == {"git": "c0ffee"}
    assert list(found) == ["b", "a"]
    assert len(found) == 2
    assert "a" in found
    assert "epoch" not in found
    assert found.values == {"epoch": 3}
    assert list(found.per_rank["rng"]) == [5]
    assert found.ranks == 1
    assert found.step is None
    assert found.created.tzinfo is not None
    assert repr(found) == "<Checkpoint 'memory-store'>"
    with pytest.raises(MatchError, match="no tensor 'c'; there are 2: b, a"):
        found["c"]


def test_every_rank_gets_the_checkpoint():
    store = MemoryStore()

    def save(comm):
        checkpoint = distckpt.save(store, {"w": np.arange(3)}, comm=comm)
        return checkpoint["w"][...].tolist()

    assert run_ranks(3, save) == [[0, 1, 2]] * 3


def test_a_handle_to_a_replaced_checkpoint_says_so():
    store = MemoryStore()

    def save(comm):
        first = distckpt.save(store, {"w": np.arange(3)}, comm=comm)
        distckpt.save(store, {"w": np.arange(3)}, comm=comm, overwrite=True)
        if comm.rank:  # the coordinator knows its manifest
            with pytest.raises(CheckpointError, match="another save has replaced this checkpoint"):
                first.manifest  # noqa: B018

    run_ranks(2, save)


@pytest.mark.parametrize(
    ("index", "error"),
    [
        (3, IndexError),
        (-4, IndexError),
        ((0, 0, 0), IndexError),
        ((0, 0, ..., 0), IndexError),
        ((..., ...), IndexError),
        ("0", TypeError),
        (1.0, TypeError),
        (True, TypeError),
        (None, TypeError),
        ([0, 1], TypeError),
        (np.array([0, 1]), TypeError),
    ],
)
def test_an_index_that_is_no_box_is_refused(index, error):
    store = MemoryStore()
    stored = distckpt.save(store, {"w": np.zeros((3, 2))})["w"]
    with pytest.raises(error):
        stored[index]


def test_a_region_outside_is_refused():
    stored = distckpt.save(MemoryStore(), {"w": np.zeros((3, 2))})["w"]
    for region in (Region((0, 0), (4, 2)), Region((0,), (1,)), Region((), ())):
        with pytest.raises(IndexError, match=r"is not in 'w' of shape \(3, 2\)"):
            stored.read(region)


def test_a_stored_tensor_is_an_array_to_numpy():
    array = np.arange(6.0).reshape(3, 2)
    stored = distckpt.save(MemoryStore(), {"w": array})["w"]
    assert np.array_equal(np.asarray(stored), array)
    assert np.asarray(stored, np.float32).dtype == np.float32
    assert len(stored) == 3
    assert repr(stored) == "<StoredTensor 'w' float64 (3, 2)>"
    assert np.array_equal(np.stack(list(stored)), array)


# --------------------------------------------------------------------------------- what is read


class CountingStore(MemoryStore):
    """Notes every read, as (name, first byte, last byte + 1)."""

    def __init__(self):
        super().__init__()
        self.reads = []

    def read_into(self, name, start_byte, buffer):
        if name != MANIFEST_NAME:
            self.reads.append((name, start_byte, start_byte + len(buffer)))
        super().read_into(name, start_byte, buffer)

    def blocks(self):
        """The blocks that were read, as (name, number), in order; checksum tables are none."""
        found = []
        for name, start, stop in self.reads:
            if stop < len(self.objects[name]):
                found.append((name, start // _SMALL_BLOCK))
            assert start % _SMALL_BLOCK == 0 or stop == len(self.objects[name])
        return found


@pytest.fixture
def counting(monkeypatch):
    use_blocks(monkeypatch, _SMALL_BLOCK)
    return CountingStore()


def test_opening_reads_no_shard_file(counting):
    distckpt.save(counting, {"w": np.zeros(5000)})
    assert distckpt.open(counting)["w"].shape == (5000,)
    assert counting.reads == []


@pytest.mark.parametrize(
    "holdings", [["whole"] * 4, [(0, 5000), "whole", None, Region((9,), (9000,))]]
)
def test_ranks_that_load_together_read_each_block_once(counting, holdings):
    arrays = {"a": np.arange(9001), "b": np.arange(7000, dtype=np.float32)}
    case = Case(
        3,
        {
            "a": Tensor(arrays["a"], [(0, 3000), (3000, 4000), (4000, 9001)], "C"),
            "b": Tensor(arrays["b"], ["whole", "whole", None], "C"),
        },
    )
    case.save(counting)
    counting.reads.clear()
    case.load(counting, 4, {"a": holdings, "b": ["whole", None, "whole", "whole"]})
    found = counting.blocks()
    assert len(found) == len(set(found))


def test_ranks_that_load_together_share_the_reading(counting):
    array = np.arange(40_000)

    def load(comm):
        net = {"w": np.zeros_like(array)}
        report = distckpt.load_into(counting, net, comm=comm)
        assert np.array_equal(net["w"], array)
        return report

    distckpt.save(counting, {"w": array})
    counting.reads.clear()
    reports = run_ranks(4, load)
    blocks = -(-array.nbytes // _SMALL_BLOCK)
    assert blocks <= len(counting.blocks()) <= blocks + 1
    total = sum(stop - start for _, start, stop in counting.reads)
    assert [report.bytes_read for report in reports] == [total] * 4


@given(st.data())
def test_an_index_reads_only_the_blocks_that_its_box_touches(data):
    with pytest.MonkeyPatch.context() as patch:
        use_blocks(patch, _SMALL_BLOCK)
        shape = data.draw(st.sampled_from([(100, 60), (7, 11, 90), (6000,)]))
        store = CountingStore()
        array = np.arange(math.prod(shape)).reshape(shape)
        distckpt.save(store, {"w": array})
        stored = distckpt.open(store)["w"]
        index = data.draw(npst.basic_indices(shape, allow_newaxis=False))
        assert np.array_equal(stored[index], array[index])
        chosen = array[index]
        start = distckpt.open(store).manifest.file_data_start[0]
        if chosen.size:
            places = np.stack(np.unravel_index(np.ravel(chosen), shape))
            box = tuple(slice(a, b + 1) for a, b in zip(places.min(1), places.max(1), strict=True))
            touched = {(start + 8 * element) // _SMALL_BLOCK for element in array[box].flat}
        else:
            touched = set()
        assert {block for _, block in store.blocks()} == touched
        assert len(store.blocks()) == len(touched)


def test_a_filtered_load_reads_only_what_is_left(counting):
    distckpt.save(counting, {"model": {"w": np.arange(5000)}, "adam": {"m": np.arange(50_000)}})
    counting.reads.clear()
    found = distckpt.load(counting, only_prefix="model.")
    assert list(found) == ["model.w"]
    assert len(counting.blocks()) <= 5000 * 8 // _SMALL_BLOCK + 2


# ----------------------------------------------------------------------------- load_into's nets


@pytest.fixture
def saved():
    """A checkpoint of a few things, in memory."""
    store = MemoryStore()
    state = {
        "w": np.arange(12.0).reshape(3, 4),
        "b": np.arange(3, dtype=np.int32),
        "n": np.float32(2.5),
        "epoch": 7,
        "name": "digits",
    }
    distckpt.save(store, state)
    return store


def test_arrays_are_filled_where_they_are(saved):
    w, b = np.zeros((3, 4)), np.zeros(3, np.int32)
    net = {"w": w, "b": b}
    distckpt.load_into(saved, net)
    assert net["w"] is w
    assert np.array_equal(w, np.arange(12.0).reshape(3, 4))
    assert np.array_equal(b, [0, 1, 2])


@pytest.mark.parametrize("how", ["F", "strided", "reversed", "big-endian"])
def test_arrays_of_any_strides_and_byte_order_are_filled_where_they_are(saved, how):
    w = in_memory_as(np.zeros((3, 4)), how)
    distckpt.load_into(saved, {"w": w})
    assert np.array_equal(w, np.arange(12.0).reshape(3, 4))


def test_plain_values_are_replaced_in_dicts_and_lists(saved):
    net = {"epoch": None, "name": "?"}
    distckpt.load_into(saved, net)
    assert net == {"epoch": 7, "name": "digits"}
    store = MemoryStore()
    distckpt.save(store, {"list": [1, [2.5, "x"]], "big": 10**30})
    net = {"list": [0, [0, 0]], "big": 0}
    distckpt.load_into(store, net)
    assert net == {"list": [1, [2.5, "x"]], "big": 10**30}


def test_shards_get_their_region_and_stay_the_same_objects(saved):
    shard = Shard(np.zeros((2, 2)), (1, 2), (3, 4))
    flat = FlatShard(np.zeros(2, np.int32), 1, (3,))
    net = {"w": shard, "b": flat}
    distckpt.load_into(saved, net)
    assert net["w"] is shard
    assert net["b"] is flat
    assert np.array_equal(shard.array, [[6, 7], [10, 11]])
    assert np.array_equal(flat.array, [1, 2])


def test_named_items_of_a_list_are_filled(saved):
    b = np.zeros(3, np.int32)
    net = [{"name": "w", "data": np.zeros((3, 4)), "frozen": True}, {"name": "b", "data": b}]
    report = distckpt.load_into(saved, net, strict=True)
    assert report.loaded == {"w": "w", "b": "b"}
    assert np.array_equal(net[0]["data"], np.arange(12.0).reshape(3, 4))
    assert np.array_equal(b, [0, 1, 2])


def test_a_list_of_named_items_is_a_state():
    store = MemoryStore()
    distckpt.save(store, [{"name": "a.b", "data": np.arange(2)}, {"name": "c", "data": 5}])
    assert np.array_equal(distckpt.load(store)["a.b"], [0, 1])
    assert distckpt.open(store).values == {"c": 5}


@dataclass
class Model:
    w: np.ndarray
    epoch: int
    inner: dict


@dataclasses.dataclass(frozen=True)
class Frozen:
    w: np.ndarray
    epoch: int = 0


def test_dataclasses_are_filled(saved):
    model = Model(np.zeros((3, 4)), 0, {"b": np.zeros(3, np.int32)})
    distckpt.load_into(saved, model)
    assert np.array_equal(model.w, np.arange(12.0).reshape(3, 4))
    assert model.epoch == 7
    assert np.array_equal(model.inner["b"], [0, 1, 2])


def test_arrays_in_tuples_and_frozen_dataclasses_are_filled(saved):
    w, b = np.zeros((3, 4)), np.zeros(3, np.int32)
    store = MemoryStore()
    distckpt.save(store, (np.arange(3, dtype=np.int32), {"x": np.ones(2)}))
    x = np.zeros(2)
    distckpt.load_into(store, (b, {"x": x}), strict=True)
    assert np.array_equal(b, [0, 1, 2])
    assert np.array_equal(x, [1, 1])
    distckpt.save(store, Frozen(np.ones((3, 4))), overwrite=True)
    distckpt.load_into(store, {"w": w})
    assert np.array_equal(w, np.ones((3, 4)))


def test_what_cant_be_put_in_place_is_in_a_new_net(saved):
    read_only = in_memory_as(np.zeros((3, 4)), "read-only")
    net = (Frozen(read_only), np.float32(1), {"epoch": 0})
    rename = {"w": "0.w", "n": "1", "epoch": "2.epoch"}
    report = distckpt.load_into(saved, net, rename=rename)
    frozen, number, mutable = report.net
    assert not net[0].w.any()
    assert np.array_equal(frozen.w, np.arange(12.0).reshape(3, 4))
    assert (type(number), number) == (np.float32, 2.5)
    assert mutable is net[2]


def test_a_net_that_was_filled_in_place_is_the_one_of_the_report(saved):
    net = {"w": np.zeros((3, 4))}
    assert distckpt.load_into(saved, net).net is net
    pair = (np.zeros((3, 4)),)
    assert distckpt.load_into(saved, pair, rename={"w": "0"}).net is pair


def test_read_only_arrays_are_replaced(saved):
    old = in_memory_as(np.zeros((3, 4)), "read-only")
    shard = Shard(in_memory_as(np.zeros(1, np.int32), "read-only"), (1,), (3,))
    net = {"w": old, "b": shard}
    distckpt.load_into(saved, net)
    assert not old.any()
    assert np.array_equal(net["w"], np.arange(12.0).reshape(3, 4))
    assert net["w"].flags.writeable
    assert (net["b"].offset, net["b"].global_shape) == ((1,), (3,))
    assert net["b"].array.tolist() == [1]


def test_numpy_scalars_are_replaced_by_numpy_scalars(saved):
    net = {"n": np.float32(0)}
    distckpt.load_into(saved, net)
    assert type(net["n"]) is np.float32
    assert net["n"] == 2.5


class Net:
    """What a user's model may be: it says what it has, and takes what it is given."""

    def __init__(self, **tensors):
        self.held = tensors
        self.given = []

    def tensors(self):
        return dict(self.held)

    def assign(self, name, value):
        self.given.append(name)
        self.held[name] = value


def test_a_net_of_ones_own_is_given_new_values_once_each(saved):
    w = np.zeros((3, 4))
    net = Net(w=w, b=FlatShard(np.zeros(2, np.int32), 1, (3,)), epoch=None, n=np.float32(0))
    report = distckpt.load_into(saved, net, strict=True)
    assert sorted(net.given) == ["b", "epoch", "n", "w"]
    assert not w.any()
    assert np.array_equal(net.held["w"], np.arange(12.0).reshape(3, 4))
    assert isinstance(net.held["b"], FlatShard)
    assert net.held["b"].array.tolist() == [1, 2]
    assert net.held["epoch"] == 7
    assert list(report.loaded) == ["w", "b", "n", "epoch"]


def test_a_net_of_ones_own_is_a_state_too(saved):
    store = MemoryStore()
    distckpt.save(store, {"model": Net(w=np.arange(3)), "step": 4})
    assert np.array_equal(distckpt.load(store)["model.w"], [0, 1, 2])
    model = Net(w=np.zeros(3, np.int64))
    distckpt.load_into(store, {"model": model, "step": 0})
    assert np.array_equal(model.held["w"], [0, 1, 2])


def test_tensors_without_elements_are_put_in_place_too():
    store = MemoryStore()
    state = {"none": np.zeros((0, 3)), "w": np.ones(2)}
    distckpt.save(store, state)
    net = Net(none=np.zeros((0, 3)), w=np.zeros(2))
    distckpt.load_into(store, net)
    assert sorted(net.given) == ["none", "w"]


def test_ranks_may_have_nets_of_different_kinds(saved):
    def load(comm):
        if comm.rank == 0:
            net = {"w": np.zeros((3, 4))}
        elif comm.rank == 1:
            net = Net(w=Shard(np.zeros((1, 4)), (2, 0), (3, 4)), epoch=0)
        else:
            net = {}
        report = distckpt.load_into(saved, net, comm=comm, strict=True)
        return net, (report.loaded, report.unexpected, report.bytes_read)

    (first, one), (second, two), (_, three) = run_ranks(3, load)
    assert np.array_equal(first["w"], np.arange(12.0).reshape(3, 4))
    assert np.array_equal(second.held["w"].array, [[8, 9, 10, 11]])
    assert second.held["epoch"] == 7
    assert one == two == three


# ---------------------------------------------------------------------------------- the report


def test_the_report_says_what_was_loaded_and_what_was_not(saved, caplog):
    net = {"net": {"w": np.zeros((3, 4), np.float32)}, "new": np.zeros(2), "epoch": 0}
    report = distckpt.load_into(saved, net)
    assert report.loaded == {"net.w": "w", "epoch": "epoch"}
    assert report.missing == ["new"]
    assert report.unexpected == ["b", "n", "name"]
    assert report.by_suffix == ["net.w"]
    assert report.cast == {"net.w": "float64 → float32"}
    assert report.bytes_read > 4096
    assert report.seconds > 0
    assert "loaded 2 of 3 names" in str(report)
    for line in ("net.w ← w", "net.w (float64 → float32)", "missing (kept as they were): new"):
        assert line in str(report)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "not all names were matched exactly" in record.message


def test_an_exact_load_warns_of_nothing(saved, caplog):
    distckpt.load_into(saved, {"w": np.zeros((3, 4))})
    assert caplog.records == []


def test_what_is_missing_keeps_what_it_held(saved):
    net = {"w": np.zeros((3, 4)), "new": np.full(2, 9.0), "fresh": "kept"}
    distckpt.load_into(saved, net)
    assert net["new"].tolist() == [9, 9]
    assert net["fresh"] == "kept"


def test_strict_wants_everything(saved):
    net = {"w": np.zeros((3, 4)), "new": np.zeros(2)}
    with pytest.raises(MatchError, match="1 of the 2 wanted names are not in the checkpoint") as e:
        distckpt.load_into(saved, net, strict=True)
    assert e.value.missing == ["new"]
    assert not net["w"].any()


def test_renaming_and_filters_reach_the_matching(saved):
    net = {"weight": np.zeros((3, 4))}
    report = distckpt.load_into(
        saved, net, strict=True, rename={"w": "weight"}, select=lambda name: name != "b"
    )
    assert report.loaded == {"weight": "w"}
    assert report.unexpected == ["n", "epoch", "name"]
    report = distckpt.load_into(saved, net, rename=lambda name: name.replace("w", "weight"))
    assert report.loaded == {"weight": "w"}
    assert distckpt.load(saved, filter_prefix=("w", "b")).keys() == {"n"}


def test_a_filter_that_leaves_nothing_is_refused(saved):
    with pytest.raises(MatchError, match="is left after"):
        distckpt.load(saved, only_prefix="no")
    with pytest.raises(MatchError, match="is left after"):
        distckpt.load_into(saved, {"w": np.zeros((3, 4))}, only_prefix="no")


@pytest.mark.parametrize("rank_of_the_wish", [0, 2])
def test_names_are_matched_over_all_ranks(rank_of_the_wish):
    """A name that one rank alone wants is matched as if every rank wanted it."""
    store = MemoryStore()
    distckpt.save(store, {"a.w": np.ones(2), "b.w": np.zeros(2)})

    def load(comm):
        name = "w" if comm.rank == rank_of_the_wish else "a.w"
        with pytest.raises(MatchError) as caught:
            distckpt.load_into(store, {"x": {name: np.zeros(2)}, "w": np.zeros(2)}, comm=comm)
        return str(caught.value)

    assert len(set(run_ranks(3, load))) == 1


# ------------------------------------------------------------------------------------- casting

_FLOATS = ["float16", "float32", "float64", "bfloat16"]
_INTEGERS = ["int8", "int16", "int32", "int64"]


@pytest.mark.parametrize(
    ("saved_as", "wanted"),
    [(a, b) for kinds in (_FLOATS, _INTEGERS) for a in kinds for b in kinds if a != b],
)
def test_floats_and_signed_integers_are_converted_as_numpy_does(saved_as, wanted):
    values = np.array([0, 1, -1, 100, -7, 3.14159], np.float64)
    array = values.astype(dtypes.BY_NAME[saved_as].numpy).reshape(2, 3)
    store = MemoryStore()
    run_ranks(2, lambda comm: distckpt.save(store, {"w": array}, comm=comm))

    def load(comm):
        net = {"w": np.zeros((2, 3), dtypes.BY_NAME[wanted].numpy)}
        report = distckpt.load_into(store, net, comm=comm)
        assert report.cast == {"w": f"{saved_as} → {wanted}"}
        return net["w"]

    for found in run_ranks(2, load):
        assert equal_bits(found, array.astype(found.dtype))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_may_be_converted(value):
    store = MemoryStore()
    distckpt.save(store, {"w": np.array([value, 1.0])})
    net = {"w": np.zeros(2, np.float16)}
    distckpt.load_into(store, net)
    assert np.array_equal(net["w"], np.array([value, 1.0], np.float16), equal_nan=True)


_LOSSES = [
    ("float64", "float32", 1e39),
    ("float64", "float16", 65520.0),
    ("float32", "float16", -1e5),
    ("float32", "bfloat16", 3.4e38),
    ("bfloat16", "float16", 1e5),
    ("int64", "int32", 2**31),
    ("int64", "int8", -129),
    ("int16", "int8", 128),
]


@pytest.mark.parametrize(("saved_as", "wanted", "value"), _LOSSES)
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_conversion_that_would_lose_a_value_is_refused_and_nothing_changes(
    saved_as, wanted, value, ranks
):
    big = np.ones(40, dtypes.BY_NAME[saved_as].numpy)
    big[37] = value
    store = MemoryStore()
    distckpt.save(store, {"other": np.ones(3), "big": big, "epoch": 1})

    def load(comm):
        run = (40 * comm.rank // ranks, 40 * (comm.rank + 1) // ranks)
        net = {
            "other": np.zeros(3),
            "big": FlatShard(
                np.zeros(run[1] - run[0], dtypes.BY_NAME[wanted].numpy), run[0], (40,)
            ),
            "epoch": 0,
        }
        with pytest.raises(MatchError, match=f"'big': 1 values do not fit into {wanted}") as caught:
            distckpt.load_into(store, net, comm=comm)
        assert caught.value.mismatched.keys() == {"big"}
        assert not net["other"].any()
        assert not net["big"].array.astype(float).any()
        assert net["epoch"] == 0
        return str(caught.value)

    assert len(set(run_ranks(ranks, load))) == 1


def test_all_lost_values_of_all_ranks_are_named():
    store = MemoryStore()
    distckpt.save(store, {"a": np.full(2, 1e300), "b": np.full(2, 1e300), "c": np.ones(2)})

    def load(comm):
        with pytest.raises(MatchError) as caught:
            distckpt.load_into(store, {"ab"[comm.rank]: np.zeros(2, np.float32)}, comm=comm)
        return sorted(caught.value.mismatched)

    assert run_ranks(2, load) == [["a", "b"]] * 2


_REFUSED = [
    ("float32", "int32"),
    ("int32", "float32"),
    ("uint8", "int16"),
    ("int8", "uint8"),
    ("bool", "int8"),
    ("float8_e5m2", "float16"),
    ("complex64", "complex128"),
    ("float32", "complex64"),
]


@pytest.mark.parametrize(("saved_as", "wanted"), _REFUSED)
def test_other_conversions_are_refused(saved_as, wanted):
    store = MemoryStore()
    distckpt.save(store, {"w": np.zeros(2, dtypes.BY_NAME[saved_as].numpy)})
    with pytest.raises(MatchError, match=f"'w': wants {wanted}, saved is {saved_as}") as caught:
        distckpt.load_into(store, {"w": np.zeros(2, dtypes.BY_NAME[wanted].numpy)})
    assert caught.value.mismatched.keys() == {"w"}


@pytest.mark.parametrize(
    ("options", "why"), [({"strict": True}, "strict=True never"), ({"cast": False}, "cast=False")]
)
def test_nothing_is_converted_unless_it_may_be(saved, options, why):
    with pytest.raises(MatchError, match=f"wants float32, saved is float64 .{why}"):
        distckpt.load_into(saved, {"w": np.zeros((3, 4), np.float32)}, **options)


# ------------------------------------------------------------- nothing changes unless all fits


_MISFITS = {
    "a shape": {"w": np.zeros((4, 3))},
    "a dimension": {"w": np.zeros(12)},
    "a dtype": {"w": np.zeros((3, 4), np.int64)},
    "a shard of another shape": {"w": Shard(np.zeros((1, 4)), (0, 0), (1, 4))},
    "a run of another shape": {"w": FlatShard(np.zeros(2), 0, (12,))},
    "a value for a tensor": {"w": 3},
    "a tensor for a value": {"epoch": np.zeros(2)},
    "a per-rank value for a tensor": {"w": PerRank(0)},
    "a per-rank value for a value": {"epoch": PerRank(0)},
    "a conversion": {"b": np.zeros(3)},
}


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("misfit", _MISFITS)
def test_what_does_not_fit_on_one_rank_changes_no_byte_on_any(saved, misfit, ranks):
    def load(comm):
        good = {"n": np.float32(0), "name": "?", "x": {"b": np.full(3, 77, np.int32)}}
        wrong = _MISFITS[misfit] if comm.rank == ranks - 1 else {"w": np.full((3, 4), 77.0)}
        net = good | wrong
        with pytest.raises(MatchError) as caught:
            distckpt.load_into(saved, net, comm=comm)
        assert caught.value.mismatched
        assert net["n"] == 0
        assert net["name"] == "?"
        assert (net["x"]["b"] == 77).all()
        if comm.rank < ranks - 1:
            assert (net["w"] == 77).all()
        return type(caught.value), str(caught.value), caught.value.mismatched

    found = run_ranks(ranks, load)
    assert found == [found[0]] * ranks


def test_all_misfits_of_all_ranks_are_named_at_once(saved):
    def load(comm):
        net = [{"w": np.zeros((4, 3))}, {"b": np.zeros(3)}, {"epoch": np.zeros(1)}][comm.rank]
        with pytest.raises(MatchError) as caught:
            distckpt.load_into(saved, net, comm=comm)
        return sorted(caught.value.mismatched)

    assert run_ranks(3, load) == [["b", "epoch", "w"]] * 3


def test_damage_found_while_reading_names_what_may_be_changed(saved):
    shard = next(name for name in saved.objects if name != MANIFEST_NAME)
    data = bytearray(saved.objects[shard])
    data[4096] ^= 1
    saved.objects[shard] = bytes(data)
    net = {"w": np.zeros((3, 4)), "epoch": 0}
    with pytest.raises(LoadFailed, match="are damaged: their CRC32C is") as caught:
        distckpt.load_into(saved, net)
    assert caught.value.touched == []  # the block is looked at before it is used
    assert not net["w"].any()
    assert net["epoch"] == 0


def test_an_assign_that_fails_names_what_was_touched(saved):
    class Stubborn(Net):
        def assign(self, name, value):
            super().assign(name, value)
            if name == "epoch":
                raise RuntimeError("not today")

    net = Stubborn(w=np.zeros((3, 4)), name="", epoch=0)
    with pytest.raises(LoadFailed, match="RuntimeError: not today") as caught:
        distckpt.load_into(saved, net)
    assert set(net.given) <= set(caught.value.touched)


# ------------------------------------------------------------------------------------- PerRank

per_rank_values = st.recursive(
    plain
    | npst.arrays(st.sampled_from([np.int64, np.float32, bool]), npst.array_shapes(max_side=4)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.lists(per_rank_values, min_size=1, max_size=4))
def test_each_rank_gets_its_own_value_back(values):
    store = MemoryStore()
    size = len(values)

    def save(comm):
        state = {"rng": PerRank(values[comm.rank]), "w": np.arange(3)}
        distckpt.save(store, state, comm=comm)
        net = {"rng": PerRank(None), "w": np.zeros(3, np.int64)}
        distckpt.load_into(store, net, comm=comm, strict=True)
        return net["rng"].value

    assert repr(run_ranks(size, save)) == repr(values)
    held = distckpt.open(store).per_rank["rng"]
    assert len(held) == size
    assert repr([held[rank] for rank in range(size)]) == repr(values)
    assert repr(held[:]) == repr(values)


def test_the_state_of_a_random_generator_comes_back():
    store = MemoryStore()

    def go(comm):
        rng = np.random.default_rng(comm.rank)
        rng.normal(size=comm.rank)
        distckpt.save(store, {"rng": PerRank(rng.bit_generator.state)}, comm=comm)
        expected = rng.integers(0, 1 << 60, 5)
        net = {"rng": PerRank(None)}
        distckpt.load_into(store, net, comm=comm)
        again = np.random.default_rng()
        again.bit_generator.state = net["rng"].value
        assert np.array_equal(again.integers(0, 1 << 60, 5), expected)

    run_ranks(3, go)


@pytest.fixture
def of_three():
    store = MemoryStore()
    run_ranks(
        3,
        lambda comm: distckpt.save(
            store, {"rng": PerRank({"seed": comm.rank}), "w": np.ones(2)}, comm=comm
        ),
    )
    return store


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_on_another_number_of_ranks_a_per_rank_value_is_refused(of_three, ranks):
    def load(comm):
        net = {"rng": PerRank(None), "w": np.zeros(2)}
        with pytest.raises(MatchError, match=f"saved by 3 ranks is wanted on {ranks}; pass per_"):
            distckpt.load_into(of_three, net, comm=comm)
        assert not net["w"].any()

    run_ranks(ranks, load)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_on_another_number_of_ranks_a_callable_decides(of_three, ranks):
    def decide(values, rank, size):
        assert [value["seed"] for value in values] == [0, 1, 2]
        return ("new", rank, size)

    def load(comm):
        net = {"rng": PerRank(None), "w": np.zeros(2)}
        distckpt.load_into(of_three, net, comm=comm, per_rank=decide, strict=True)
        assert (net["w"] == 1).all()
        return net["rng"].value

    assert run_ranks(ranks, load) == [("new", rank, ranks) for rank in range(ranks)]


def test_on_the_same_number_of_ranks_nobody_is_asked(of_three):
    def load(comm):
        net = {"rng": PerRank(None)}
        distckpt.load_into(of_three, net, comm=comm, per_rank=lambda *_: pytest.fail("asked"))
        return net["rng"].value["seed"]

    assert run_ranks(3, load) == [0, 1, 2]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_net_that_wants_no_per_rank_value_never_minds(of_three, ranks):
    def load(comm):
        net = {"w": np.zeros(2)}
        report = distckpt.load_into(of_three, net, comm=comm)
        assert report.unexpected == ["rng"]
        assert (net["w"] == 1).all()

    run_ranks(ranks, load)


def test_only_some_ranks_may_have_a_per_rank_value():
    store = MemoryStore()

    def save(comm):
        state = {"w": np.ones(2)} | ({"loader": PerRank(comm.rank)} if comm.rank != 1 else {})
        distckpt.save(store, state, comm=comm)

    run_ranks(3, save)
    held = distckpt.open(store).per_rank["loader"]
    assert (held[0], held[2]) == (0, 2)
    with pytest.raises(MatchError, match="rank 1 saved no value under 'loader'"):
        held[1]
    with pytest.raises(IndexError):
        held[3]

    def load(comm):
        net = {"loader": PerRank(None)} if comm.rank != 1 else {}
        distckpt.load_into(store, net, comm=comm)
        return net["loader"].value if net else None

    assert run_ranks(3, load) == [0, None, 2]
    with pytest.raises(MatchError, match="rank 1 saved no value under 'loader'"):
        run_ranks(3, lambda comm: distckpt.load_into(store, {"loader": PerRank(None)}, comm=comm))


def test_large_per_rank_values_come_back(counting):
    """Of several blocks, beside tensors in the same file."""

    def go(comm):
        value = {"x": np.arange(3000) + comm.rank, "y": "text" * 1000}
        distckpt.save(counting, {"v": PerRank(value), "w": np.arange(500)}, comm=comm)
        net = {"v": PerRank(None), "w": np.zeros(500, np.int64)}
        distckpt.load_into(counting, net, comm=comm)
        assert np.array_equal(net["v"].value["x"], value["x"])
        assert net["v"].value["y"] == value["y"]
        assert np.array_equal(net["w"], np.arange(500))

    run_ranks(2, go)


# ---------------------------------------------------------------------------------- dry runs


@given(cases())
def test_a_plan_says_what_a_save_then_writes(case):
    found = run_ranks(
        case.ranks,
        lambda comm: distckpt.plan(
            case.state(comm.rank), comm=comm, max_shard_bytes=case.max_shard_bytes
        ),
    )
    assert found == [found[0]] * case.ranks
    store = MemoryStore()
    case.save(store)
    manifest = distckpt.open(store).manifest
    assert found[0].tensors == len(case.tensors)
    assert found[0].bytes == manifest.tensor_bytes == sum(found[0].rank_bytes)
    assert sum(found[0].rank_files) == len(manifest.file_names) == len(store.objects) - 1
    assert str(found[0]).count("\n") == case.ranks


def test_replicated_tensors_are_written_by_all_ranks_alike():
    state = {f"layer{index}": np.zeros((256, 257)) for index in range(5)}
    found = run_ranks(4, lambda comm: distckpt.plan(state, comm=comm))[0]
    assert found.bytes == sum(array.nbytes for array in state.values())
    assert max(found.rank_bytes) <= 1.01 * found.bytes / 4
