"""A nested state is taken apart into leaves with dotted names."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt import FlatShard, LayoutError, Net, PerRank, Region, Shard, register_net
from distckpt.alike import Flattened, flatten_dicts
from distckpt.flat import flatten
from distckpt.plan import Holdings, Seen, describe
from distckpt.region import boxes_of_run
from distckpt.state import LazyArray

one = np.ones(3, np.float32)
two = np.full(3, 2, np.float32)


def tensor_names(state):
    return [tensor.name for tensor in flatten(state).tensors]


def refused(state):
    """Return what the refusal of a state says."""
    with pytest.raises(LayoutError) as caught:
        flatten(state)
    return str(caught.value)


# --------------------------------------------------------------------------------------- containers


@dataclass
class Moments:
    mean: np.ndarray
    scale: float


@dataclass(frozen=True)
class Frozen:
    weight: np.ndarray


Pair = namedtuple("Pair", ["left", "right"])  # noqa: PYI024  untyped on purpose: both kinds exist


class Model:
    """A net of the user's own, that puts values in place itself."""

    def __init__(self, **tensors):
        self.held = tensors

    def tensors(self):
        return dict(self.held)

    def assign(self, name, value):
        self.held[name] = value


@pytest.mark.parametrize(
    ("state", "names"),
    [
        ({"a": one, "b": one}, ["a", "b"]),
        (OrderedDict(b=one, a=one), ["b", "a"]),
        ({"a": {"b": {"c": one}}, "d": one}, ["a.b.c", "d"]),
        ({"a": [one, one]}, ["a.0", "a.1"]),
        ({"a": (one, {"b": one})}, ["a.0", "a.1.b"]),
        ([one, [one]], ["0", "1.0"]),
        ({"a": Pair(one, one)}, ["a.left", "a.right"]),
        ({"a": Moments(one, 1.0)}, ["a.mean"]),
        (Frozen(one), ["weight"]),
        ({1: one, 2: {3: one}}, ["1", "2.3"]),
        ({"a": {}, "b": [], "c": one}, ["c"]),
        ({}, []),
        ([], []),
        (one, [""]),
        ({"": one}, [""]),
        ({"a": {"": one}}, ["a."]),
        ({"a.b": one, "a": {"c": one}}, ["a.b", "a.c"]),
        (MappingProxyType({"a": one}), ["a"]),
        (Model(weight=one, bias=one), ["weight", "bias"]),
        ({"net": Model(weight=one), "more": [Model(weight=one)]}, ["net.weight", "more.0.weight"]),
        ({"net": Model(inner={"weight": one})}, ["net.inner.weight"]),
        ([{"name": "w", "data": one}, {"name": "a.b", "data": one}], ["w", "a.b"]),
        ({"net": [{"name": "w", "data": one}]}, ["net.w"]),
        ([{"name": "w", "data": one}, {"other": one}], ["0.data", "1.other"]),
    ],
)
def test_names_are_the_path_joined_with_dots_in_the_order_of_the_state(state, names):
    assert tensor_names(state) == names


def test_a_net_is_recognised_by_its_two_methods():
    assert isinstance(Model(), Net)
    assert not isinstance({}, Net)


def test_leaves_are_sorted_into_tensors_values_and_per_rank_values():
    flat = flatten({"w": one, "step": 3, "rng": PerRank([1, 2]), "name": "run", "none": None})
    assert [tensor.name for tensor in flat.tensors] == ["w"]
    assert {name: leaf.value for name, leaf in flat.values.items()} == {
        "step": 3,
        "name": "run",
        "none": None,
    }
    assert flat.per_rank["rng"].value.value == [1, 2]


@pytest.mark.parametrize(
    "value", [0, -1, 1 << 200, 1.5, float("nan"), True, False, "", "text", b"\0raw", None]
)
def test_plain_values_are_values(value):
    assert flatten({"v": value}).values["v"].value is value


@pytest.mark.parametrize(
    "scalar", [np.float64(1.5), np.float32(1), np.int64(3), np.bool_(True), np.complex64(1j)]
)
def test_a_numpy_scalar_is_a_tensor_of_no_dimensions(scalar):
    (tensor,) = flatten({"s": scalar}).tensors
    assert (tensor.shape, tensor.dtype.numpy) == ((), scalar.dtype)
    assert tensor.array[()] == scalar


def test_a_leaf_in_a_mutable_container_can_be_replaced():
    class Holder:
        pass

    @dataclass
    class Mutable:
        weight: object

    mutable = Mutable(one)
    named = {"name": "n", "data": one}
    model = Model(m=one)
    state = {"d": one, "l": [one], "c": mutable, "x": [named], "net": model}
    for tensor in flatten(state).tensors:
        tensor.leaf.replace("new")
    assert (
        state["d"] == state["l"][0] == mutable.weight == named["data"] == model.held["m"] == "new"
    )


@pytest.mark.parametrize(
    "state", [(one,), Pair(one, one), Frozen(one), MappingProxyType({"a": one}), one]
)
def test_a_leaf_in_an_immutable_container_is_replaced_in_a_new_one(state):
    flat = flatten(state)
    assert flat.rebuilt() is state
    flat.tensors[-1].leaf.replace(two)
    new = flat.rebuilt()
    assert type(new) is type(state)
    assert [leaf.array.tolist() for leaf in flatten(new).tensors] == [
        one.tolist() for _ in flat.tensors[1:]
    ] + [two.tolist()]
    assert all(leaf.array is one for leaf in flatten(state).tensors)


def test_what_holds_a_new_container_is_made_anew_only_if_it_must():
    inner = {"mutable": [one, (one, 5)], "left": (one,)}
    state = (inner, 3)
    flat = flatten(state)
    flat.values["0.mutable.1.1"].replace(6)
    assert flat.rebuilt() is state
    assert inner["mutable"][1] == (one, 6)
    assert inner["left"][0] is one


def test_a_nets_leaves_are_filled_only_where_it_says_that_they_share_its_memory():
    class Shares(Model):
        shares_memory = True

    flat = flatten({"net": Model(a=one), "shares": Shares(a=one), "b": one})
    assert {tensor.name: tensor.leaf.filled for tensor in flat.tensors} == {
        "net.a": False,
        "shares.a": True,
        "b": True,
    }


def test_an_object_of_a_registered_class_is_seen_as_what_its_adapter_makes_of_it():
    class Table:
        def __init__(self, rows):
            self.rows = rows

    class Derived(Table):
        pass

    register_net(Table, lambda table: {"rows": table.rows})
    assert tensor_names({"t": Derived(one), "u": Table([one, one])}) == [
        "t.rows",
        "u.rows.0",
        "u.rows.1",
    ]
    register_net(Derived, lambda table: Model(only=table.rows))
    assert tensor_names([Derived(one), Table(one)]) == ["0.only", "1.rows"]


def test_a_lazy_array_is_a_leaf_that_is_not_read():
    class Unread(LazyArray):
        shape, dtype = (1 << 20, 1 << 20), np.dtype("f4")

        def read(self, region=None):
            raise AssertionError

    (tensor,) = flatten({"w": Unread()}).tensors
    assert (tensor.shape, tensor.dtype.name) == ((1 << 20, 1 << 20), "float32")


def test_one_array_under_two_names_is_two_tensors():
    assert tensor_names({"a": one, "b": one, "c": [one]}) == ["a", "b", "c.0"]


def test_one_container_in_two_places_is_no_cycle():
    shared = {"w": one}
    assert tensor_names({"a": shared, "b": shared}) == ["a.w", "b.w"]


# ------------------------------------------------------------------------------------------- arrays


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12.0).reshape(3, 4).T,
        np.asfortranarray(np.arange(12).reshape(3, 4)),
        np.arange(20)[::-2],
        np.arange(4, dtype=">f8"),
        np.zeros((3, 0, 2), np.int8),
        np.array(5),
        np.ones(2, ml_dtypes.bfloat16),
        np.ones((1,) * 32, np.uint8),
        np.broadcast_to(np.float32(1), (4, 5)),
    ],
)
def test_an_array_is_taken_as_it_stands(array):
    (tensor,) = flatten({"w": array}).tensors
    assert tensor.array is array
    assert (tensor.shape, tensor.region) == (array.shape, Region.whole(array.shape))
    assert tensor.dtype.numpy == array.dtype.newbyteorder("<")


def test_a_matrix_becomes_a_plain_array_of_the_same_memory():
    with pytest.warns(PendingDeprecationWarning):
        matrix = np.matrix([[1.0, 2.0], [3.0, 4.0]])
    (tensor,) = flatten({"w": matrix}).tensors
    assert type(tensor.array) is np.ndarray
    assert np.shares_memory(tensor.array, matrix)
    assert tensor.array.reshape(-1).shape == (4,)


class ArrayLike:
    """Speaks `__array__` only."""

    def __init__(self, array):
        self.held = array

    def __array__(self, dtype=None, *, copy=None):
        return self.held


class TorchLike(ArrayLike):
    """Converts only once it is detached, as a torch parameter does."""

    def __init__(self, array, *, requires_grad=True):
        super().__init__(array)
        self.requires_grad = requires_grad

    @property
    def shape(self):
        return self.held.shape

    def detach(self):
        return TorchLike(self.held, requires_grad=False)

    def __array__(self, dtype=None, *, copy=None):
        if self.requires_grad:
            raise RuntimeError("Can't call numpy() on a tensor that requires grad.")
        return self.held


class OnDevice:
    """Lives where numpy can't reach it."""

    shape = (2,)

    def __array__(self, dtype=None, *, copy=None):
        raise TypeError("can't convert a device tensor to numpy; copy it to host memory first")


class DlpackOnly:
    """Speaks `__dlpack__` only."""

    def __init__(self, array):
        self.held = array

    def __dlpack__(self, **options):
        return self.held.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.held.__dlpack_device__()


@pytest.mark.parametrize("kind", [ArrayLike, TorchLike, DlpackOnly])
def test_an_array_of_another_library_shares_its_memory(kind):
    array = np.arange(6.0).reshape(2, 3)
    (tensor,) = flatten({"w": kind(array)}).tensors
    assert np.shares_memory(tensor.array, array)
    assert np.array_equal(tensor.array, array)


@pytest.mark.parametrize("kind", [np.asarray, ArrayLike, TorchLike])
def test_a_shard_wraps_any_kind_of_array(kind):
    (tensor,) = flatten({"w": Shard(kind(np.ones((2, 3))), (1, 0), (4, 3))}).tensors
    assert (tensor.shape, tensor.region, tensor.start) == ((4, 3), Region((1, 0), (3, 3)), None)
    (run,) = flatten({"w": FlatShard(kind(np.ones(5)), 2, (4, 3))}).tensors
    assert (run.shape, run.region, run.start) == ((4, 3), None, 2)


def test_an_array_that_numpy_can_not_reach_is_refused_with_its_own_words():
    assert "copy it to host memory first" in refused({"w": OnDevice()})


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (np.array([{}, None], object), "dtype object"),
        (np.array(["a", "b"]), "dtype <U1"),
        (np.array([b"a"]), r"dtype |S1"),
        (np.str_("a"), "dtype <U1"),
        (np.zeros(2, "M8[s]"), r"dtype datetime64[s]"),
        (np.zeros(2, [("x", "f4")]), "dtype [('x', '<f4')]"),
        (np.zeros(2, np.longdouble), "dtype float128"),
        (np.ma.masked_array([1, 2]), "masked array"),
        (np.ones((1,) * 33), "33 dimensions; a tensor has at most 32"),
        ({1, 2}, "set can't be stored"),
        (1j, "complex can't be stored"),
        (object(), "object can't be stored"),
        (range(3), "range can't be stored"),
        (Model, "can't be stored"),
        (Shard([1.0], (0,), (1,)), "list can't be stored"),
    ],
)
def test_what_can_not_be_stored_is_refused_by_name(leaf, message):
    text = refused({"deep": [leaf]})
    assert text.startswith("1 leaves of the state can't be stored:")
    assert "'deep.0': " in text
    assert message in text


def test_a_refused_dtype_is_told_what_is_supported():
    assert "supported are bool, int8" in refused({"w": np.array([None])})


def test_everything_that_is_wrong_is_reported_at_once():
    text = refused({"a": object(), "b": np.array([None]), "c": one, "d\0": one, "\ud800": one})
    assert text.startswith("4 leaves")
    for name in ("'a'", "'b'", r"'d\x00': a name can't hold a NUL", r"'\ud800': not valid Unicode"):
        assert name in text


@pytest.mark.parametrize(
    "state",
    [
        {"a.b": one, "a": {"b": one}},
        {"a": {"b": one}, "a.b": 3},
        {1: one, "1": one},
        [{"name": "w", "data": one}, {"name": "w", "data": 1}],
        {"a": PerRank(1), "b": one, "c": {}} | {"d.e": 1, "d": {"e": one}},
    ],
)
def test_two_leaves_of_one_name_are_refused(state):
    assert "two leaves of the state have this name; rename one" in refused(state)


def test_a_state_that_contains_itself_is_refused():
    state = {"a": {"w": one}}
    state["a"]["back"] = state
    assert "'a.back': the state contains itself" in refused(state)
    endless = [one]
    endless.append(endless)
    assert "'1': the state contains itself" in refused(endless)


# ------------------------------------------------------------------------------------------- shards


def test_a_shard_knows_its_region():
    assert Shard(np.ones((2, 3)), (4, 0), (6, 3)).region == Region((4, 0), (6, 3))
    assert Shard(np.ones((0, 3)), (6, 0), (6, 3)).region.size == 0
    assert Shard(np.float32(1), (), ()).region == Region((), ())


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple), st.data())
def test_a_flat_shard_knows_its_regions(shape, data):
    size = int(np.prod(shape))
    start = data.draw(st.integers(0, size))
    length = data.draw(st.integers(0, size - start))
    shard = FlatShard(np.zeros(length), start, shape)
    assert shard.regions == boxes_of_run(shape, start, start + length)


def test_offsets_and_shapes_may_be_numpys_numbers_and_lists():
    shard = Shard(np.ones(2), [np.int64(1)], np.array([4]))
    assert (shard.offset, shard.global_shape) == ((1,), (4,))
    assert all(type(number) is int for number in (*shard.offset, *shard.global_shape))
    assert FlatShard(np.ones(2), np.int64(1), [2, 2]).start == 1


@pytest.mark.parametrize(
    ("shape", "offset", "global_shape", "message"),
    [
        ((2, 3), (0,), (4, 3), "same number of dimensions"),
        ((2, 3), (0, 0), (4,), "same number of dimensions"),
        ((2, 3), (3, 0), (4, 3), r"shape \(2, 3\) at offset \(3, 0\) ends outside .*\(4, 3\)"),
        ((2, 3), (-1, 0), (4, 3), "ends outside"),
        ((0,), (0,), (-1,), "ends outside"),
        ((2,), (1.5,), (4,), "whole numbers"),
        ((2,), (1,), (4.0,), "whole numbers"),
    ],
)
def test_a_shard_that_does_not_lie_in_its_tensor_is_refused(shape, offset, global_shape, message):
    with pytest.raises(LayoutError, match=message):
        Shard(np.zeros(shape), offset, global_shape)


@pytest.mark.parametrize(
    ("shape", "start", "global_shape", "message"),
    [
        ((2, 2), 0, (4,), r"one-dimensional array, not one of shape \(2, 2\)"),
        ((), 0, (4,), "one-dimensional"),
        ((3,), 2, (2, 2), r"elements 2:5 ends outside .* \(4 elements\)"),
        ((1,), -1, (4,), "ends outside"),
        ((2,), 0, (-1, -2), "ends outside"),
        ((2,), 0.5, (4,), "whole numbers"),
    ],
)
def test_a_flat_shard_that_does_not_lie_in_its_tensor_is_refused(
    shape, start, global_shape, message
):
    with pytest.raises(LayoutError, match=message):
        FlatShard(np.zeros(shape), start, global_shape)


# --------------------------------------------------------------------------------- the next state


def changed(state):
    """A state that is like another, of other arrays and values."""
    if isinstance(state, dict):
        return {key: changed(value) for key, value in state.items()}
    if isinstance(state, np.ndarray):
        new = (state + 1).astype(state.dtype)
        new.flags.writeable = state.flags.writeable
        return new
    return state + 1


@st.composite
def arrays(draw):
    array = np.zeros(draw(st.integers(0, 3)), draw(st.sampled_from(["f4", "f8", ">i4"])))
    array.flags.writeable = draw(st.booleans())
    return array


trees = st.recursive(
    st.integers(0, 9) | st.floats(0, 9) | arrays(),
    lambda inner: st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, max_size=4),
    max_leaves=12,
).filter(lambda tree: isinstance(tree, dict))


def described(flat):
    """Names, and what a save and a load look at."""
    return (
        [(t.name, id(t.array), t.dtype, t.shape, t.region, t.start) for t in flat.tensors],
        {name: leaf.value for name, leaf in flat.values.items()},
    )


@given(trees, st.booleans())
def test_a_state_like_the_last_is_taken_apart_alike(state, replaces):
    try:
        flat = flatten(state)
    except LayoutError:
        return  # such as two leaves of one name
    new = changed(state)
    again = Flattened(flat).again(new, replaces=replaces)
    assert described(again) == described(flatten(new))
    if not replaces:
        return
    for leaf in again.values.values():
        leaf.replace(17)
    for tensor in again.tensors:
        if not tensor.array.flags.writeable:
            tensor.leaf.replace(np.full(2, 5))
    after = flatten(new)
    assert {leaf.value for leaf in after.values.values()} <= {17}
    for old, tensor in zip(again.tensors, after.tensors, strict=True):
        if old.array.flags.writeable:
            assert tensor.array is old.array
        else:
            assert tensor.array.tolist() == [5, 5]


@given(trees, st.booleans())
def test_dicts_are_taken_apart_at_once_as_they_are_leaf_by_leaf(state, replaces):
    found = flatten_dicts(state, replaces=replaces)
    try:
        expected = flatten(state)
    except LayoutError:
        assert found is None
        return
    if found is None:
        assert not all(tensor.array.size for tensor in expected.tensors)
        return
    assert described(found) == described(expected)
    assert found.takes_bytes() == expected.takes_bytes()
    for name in (field.name for field in dataclasses.fields(Holdings)):
        one, other = (
            getattr(describe(tensors), name) for tensors in (found.tensors, expected.tensors)
        )
        assert np.array_equal(one, other)
    if replaces and found.values:
        for number, leaf in enumerate(found.values.values()):
            leaf.replace(number + 100)
        after = flatten(state)
        assert [leaf.value for leaf in after.values.values()] == [
            number + 100 for number in range(len(found.values))
        ]


@pytest.mark.parametrize(
    "state",
    [
        [np.zeros(2)],
        {"a": Shard(np.zeros(2), (0,), (4,))},
        {"a": np.float32(1)},
        {"a": np.ma.masked_array([1])},
        {"a": np.zeros(2), "b": {"c": PerRank(1)}},
        {"a": np.zeros(2, "U3")},
        {"a": {"b": np.zeros(2)}, "a.b": np.zeros(2)},
        {"é": np.zeros(2)},
        {"a\0b": 3},
        {"a": np.zeros((0, 2))},
    ],
)
def test_what_is_more_than_dicts_of_arrays_is_left_to_be_looked_at(state):
    assert flatten_dicts(state) is None


def test_what_is_registered_counts_before_what_is_known_of_dicts(monkeypatch):
    state = {"a": one}
    seen = Seen()
    assert seen.take_apart(state)[1].names == ("a",)
    monkeypatch.setattr("distckpt.flat._adapters", [])
    register_net(dict, lambda found: Wrapped({f"my {key}": found[key] for key in found}))
    for _ in range(2):
        assert seen.take_apart(state)[1].names == ("my a",)


class Wrapped:
    """A net of some arrays."""

    def __init__(self, arrays):
        self._arrays = arrays

    def tensors(self):
        return self._arrays

    def assign(self, name, value):
        self._arrays[name] = value


@given(trees, trees)
def test_a_state_that_is_not_like_the_last_is_noticed(state, other):
    try:
        flat, expected = flatten(state), flatten(other)
    except LayoutError:
        return
    again = Flattened(flat).again(other)
    assert again is None or described(again) == described(expected)
