"""JAX's arrays and pytrees, Flax' and optax' states: saved and loaded, and the door itself."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.core import FrozenDict
from flax.training.train_state import TrainState

import distckpt
from distckpt.frameworks import jax as door


def leaves(tree):
    """The leaves as numpy, keys as their data."""
    return [
        np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
        for leaf in jax.tree_util.tree_leaves(tree)
    ]


def is_key(leaf):
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def assert_same(found, expected):
    structures = [jax.tree_util.tree_structure(tree) for tree in (found, expected)]
    assert structures[0] == structures[1]
    for one, other in zip(leaves(found), leaves(expected), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.tobytes() == other.tobytes()


# --- arrays ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int4", "float8_e4m3fn", "bool"])
def test_an_array_is_its_numpy_array(dtype):
    array = jnp.asarray([1, 0, 1], dtype)
    assert door.is_array(array)
    assert door.as_array(array).dtype == np.dtype(array.dtype)
    assert door.as_array(array).tolist() == [1, 0, 1]


def test_random_keys_are_their_data():
    keys = jax.random.split(jax.random.key(3), 4)
    assert door.is_array(keys)
    assert np.array_equal(door.as_array(keys), jax.random.key_data(keys))


@pytest.mark.parametrize("other", [np.ones(1), 3, None, "a", [jnp.ones(1)], jax.Array])
def test_nothing_else_is_an_array(other):
    assert not door.is_array(other)


def test_a_donated_array_is_refused():
    array = jnp.ones(3)
    array.delete()
    with pytest.raises(TypeError, match="deleted, or donated"):
        door.as_array(array)


def test_an_array_that_other_processes_hold_parts_of_is_refused_with_the_way_out():
    class Spread:
        """As a jax.Array of a job of several processes answers."""

        is_fully_addressable = is_fully_replicated = False
        shape, sharding = (8,), "NamedSharding(...)"

    with pytest.raises(TypeError, match=r"pass this process's piece as distckpt\.Shard"):
        door.as_array(Spread())


def test_a_new_array_has_the_old_ones_dtype_and_sharding():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), "x")
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    old = jax.device_put(jnp.zeros(4, jnp.bfloat16), spread)
    new = door.like(old, np.arange(4, dtype=old.dtype))
    assert new.tolist() == [0, 1, 2, 3]
    assert (new.dtype, new.sharding, new.committed) == (old.dtype, spread, True)


def test_an_array_that_was_free_to_be_placed_stays_so():
    assert not door.like(jnp.zeros(2), np.ones(2, np.float32)).committed


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg"])
def test_new_random_keys_are_of_the_old_ones_kind(kind):
    old, saved = jax.random.key(0, impl=kind), jax.random.key(7, impl=kind)
    new = door.like(old, door.as_array(saved))
    assert new.dtype == old.dtype
    assert jax.random.uniform(new) == jax.random.uniform(saved)


# --- pytrees --------------------------------------------------------------------------------------


@jax.tree_util.register_pytree_with_keys_class
class Pair:
    """A class that a user registers."""

    def __init__(self, left, right, label):
        self.left, self.right, self.label = left, right, label

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        return [(key("left"), self.left), (key("right"), self.right)], self.label

    @classmethod
    def tree_unflatten(cls, label, children):
        return cls(*children, label)


@dataclass
class Plain:
    weight: object


@functools.cache
def train_state():
    """A state after one step, so that nothing in it is zero."""
    model = linen.Dense(3, param_dtype=jnp.bfloat16)
    parameters = model.init(jax.random.key(0), jnp.ones((1, 2)))["params"]
    state = TrainState.create(apply_fn=model.apply, params=parameters, tx=optax.adam(1e-3))
    gradients = jax.tree_util.tree_map(lambda leaf: jnp.full_like(leaf, 1), parameters)
    return state.apply_gradients(grads=gradients)


def test_nodes_of_their_own_classes_are_told_from_what_python_has():
    nodes = [FrozenDict({"a": 1}), Pair(1, 2, "x"), train_state(), nnx.Param(jnp.ones(1))]
    assert all(door.is_node(node) for node in nodes)
    others = [{}, [], (), None, 3, "a", np.ones(1), jnp.ones(1), Plain(1), Pair, optax.EmptyState()]
    assert not any(door.is_node(other) for other in others)


def test_children_have_jaxs_names_one_level_deep():
    frozen = FrozenDict({"b": {"c": 1}, "a": 2})
    assert door.children(frozen) == [("b", FrozenDict({"c": 1})), ("a", 2)]
    assert door.children(Pair([1], None, "x")) == [("left", [1]), ("right", None)]
    assert [name for name, _ in door.children(train_state())] == ["step", "params", "opt_state"]


def test_a_rebuilt_node_has_new_children_and_all_else_of_the_old_one():
    new = door.rebuild(Pair(1, {"a": 2}, "x"), [3, {"b": None}])
    assert (type(new), new.left, new.right, new.label) == (Pair, 3, {"b": None}, "x")
    inner = FrozenDict({"b": 5})
    assert_same(door.rebuild(FrozenDict({"a": {"b": 1}}), [inner]), FrozenDict({"a": {"b": 5}}))
    state = train_state()
    assert door.rebuild(state, [9, {}, ()]).apply_fn is state.apply_fn


# --- flax.nnx -------------------------------------------------------------------------------------


class Block(nnx.Module):
    """Parameters, statistics, random streams and a list of layers."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs, param_dtype=jnp.bfloat16)])
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.width = 3


NAMES = {
    "layers.0.kernel",
    "layers.0.bias",
    "norm.scale",
    "norm.bias",
    "norm.mean",
    "norm.var",
    "dropout.rngs.key",
    "dropout.rngs.count",
}


def test_a_modules_tensors_are_its_variables_by_dotted_path():
    block = Block(nnx.Rngs(0))
    assert door.is_module(block)
    tensors = door.as_net(block).tensors()
    assert tensors.keys() == NAMES
    assert tensors["norm.scale"] is block.norm.scale.get_value()


def test_what_is_assigned_stands_in_the_module():
    block = Block(nnx.Rngs(0))
    net = door.as_net(block)
    old = net.tensors()
    net.assign("layers.0.kernel", np.full((2, 3), 7, old["layers.0.kernel"].dtype))
    net.assign("dropout.rngs.key", np.array([3, 4], np.uint32))
    assert block.layers[0].kernel.get_value().dtype == jnp.bfloat16
    assert (block.layers[0].kernel.get_value() == 7).all()
    key = block.dropout.rngs.key.get_value()
    assert key.dtype == old["dropout.rngs.key"].dtype
    assert jax.random.key_data(key).tolist() == [3, 4]


def test_an_optimizer_and_a_state_are_nets_too_and_classes_are_not():
    block = Block(nnx.Rngs(0))
    optimizer = nnx.Optimizer(block, optax.adam(1e-3), wrt=nnx.Param)
    assert door.is_module(optimizer)
    assert {"step", "opt_state.0.mu.norm.scale"} <= door.as_net(optimizer).tensors().keys()
    state = nnx.state(block)
    assert door.is_module(state)
    assert door.as_net(state).tensors().keys() == NAMES
    assert not door.is_module(Block)
    assert not door.is_module({})


# --- end to end -----------------------------------------------------------------------------------


def moved(tree):
    """The same tree with other values."""
    return jax.tree_util.tree_map(
        lambda leaf: jax.random.split(leaf, leaf.size + 1)[-1] if is_key(leaf) else leaf + 1, tree
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"w": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3), "key": jax.random.key(1)},
        lambda: FrozenDict({"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}),
        lambda: optax.adamw(1e-3).init({"w": jnp.ones((2, 3)), "b": [jnp.ones(1)]}),
        lambda: Pair(jnp.ones(2), {"deep": Pair(jnp.zeros(1), jnp.ones(1), "y")}, "x"),
        lambda: {"state": train_state()},
        train_state,
    ],
    ids=["dict", "FrozenDict", "optax", "registered", "TrainState in a dict", "TrainState"],
)
def test_a_tree_is_saved_and_a_new_one_comes_back(tmp_path, make):
    saved = make()
    distckpt.save(tmp_path / "a", saved)
    net = moved(saved)
    report = distckpt.load_into(tmp_path / "a", net, strict=True)
    assert_same(report.net, saved)


def test_a_train_states_names_are_those_of_its_fields(tmp_path):
    checkpoint = distckpt.save(tmp_path / "a", train_state())
    assert "params.kernel" in checkpoint
    assert "opt_state.0.mu.kernel" in checkpoint
    assert not [name for name in [*checkpoint, *checkpoint.values] if name.startswith("apply_fn")]


def test_an_nnx_module_is_loaded_into_in_place(tmp_path):
    saved, block = Block(nnx.Rngs(0)), Block(nnx.Rngs(1))
    checkpoint = distckpt.save(tmp_path / "a", saved)
    assert set(checkpoint) == NAMES
    distckpt.load_into(tmp_path / "a", block, strict=True)
    assert_same(nnx.state(block), nnx.state(saved))


def test_an_nnx_state_is_loaded_into_by_the_modules_names(tmp_path):
    saved, block = Block(nnx.Rngs(0)), Block(nnx.Rngs(1))
    distckpt.save(tmp_path / "a", {"model": saved})
    state = {"model": nnx.state(block)}
    report = distckpt.load_into(tmp_path / "a", state, strict=True)
    assert_same(report.net["model"], nnx.state(saved))


def test_a_tree_is_loaded_from_what_numpy_saved(tmp_path):
    distckpt.save(tmp_path / "a", {"dense": {"kernel": np.full((2, 3), 5, np.float32)}})
    net = FrozenDict({"dense": {"kernel": jnp.zeros((2, 3))}})
    report = distckpt.load_into(tmp_path / "a", net, strict=True)
    assert not net["dense"]["kernel"].any()
    assert isinstance(report.net["dense"]["kernel"], jax.Array)
    assert (report.net["dense"]["kernel"] == 5).all()


def test_a_dataclass_that_is_no_pytree_is_changed_in_place(tmp_path):
    distckpt.save(tmp_path / "a", Plain(jnp.ones(3)))
    net = Plain(jnp.zeros(3))
    distckpt.load_into(tmp_path / "a", net, strict=True)
    assert (net.weight == 1).all()
    assert dataclasses.asdict(net)["weight"].dtype == jnp.float32


def test_jax_is_not_imported_where_nobody_uses_it():
    program = (
        "import sys, numpy as np, distckpt; from distckpt.frameworks import jax as door\n"
        "assert not any(map(door.is_array, [3, np.ones(1)])) and not door.is_node({})\n"
        "assert not door.is_module(object()) and 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
