"""Orbax directories: what Orbax wrote is read, through tensorstore."""

from __future__ import annotations

import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distckpt
from distckpt import CorruptCheckpoint, IncompleteCheckpoint, UnsupportedFormat
from distckpt.formats.base import Place, Wanted
from distckpt.formats.orbax import FORMAT

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Orbax's own
    import orbax.checkpoint as ocp

HANDLERS = {
    "ocdbt-zarr2": {"use_ocdbt": True, "use_zarr3": False},
    "ocdbt-zarr3": {"use_ocdbt": True, "use_zarr3": True},
    "plain-zarr2": {"use_ocdbt": False, "use_zarr3": False},
    "plain-zarr3": {"use_ocdbt": False, "use_zarr3": True},
}


def tree():
    """Arrays of all kinds that Orbax takes, and plain values."""
    some = np.random.default_rng(0)
    return {
        "params": {
            "dense": {
                "kernel": jnp.asarray(some.normal(size=(6, 10)), jnp.float32),
                "bias": jnp.asarray(some.normal(size=10), jnp.bfloat16),
            }
        },
        "layers": [jnp.arange(3), {"a": np.arange(6, dtype=np.int16).reshape(2, 3)}],
        "quantized": jnp.asarray([1, -2, 3], jnp.int4),
        "fp8": jnp.asarray([1, 2.5], jnp.float8_e4m3fn),
        "mask": jnp.asarray([True, False]),
        "zero_d": jnp.float32(2.5),
        "step": 3,
        "rate": 0.5,
        "on": True,
        "nothing": None,
        "empty": {},
    }


def arrays():
    saved = tree()
    return {
        "params.dense.kernel": saved["params"]["dense"]["kernel"],
        "params.dense.bias": saved["params"]["dense"]["bias"],
        "layers.0": saved["layers"][0],
        "layers.1.a": saved["layers"][1]["a"],
        **{name: saved[name] for name in ("quantized", "fp8", "mask", "zero_d")},
    }


VALUES = {"step": 3, "rate": 0.5, "on": True, "nothing": None}


def save(path, state, **handler):
    with (
        warnings.catch_warnings(),
        ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**handler)) as checkpointer,
    ):
        warnings.simplefilter("ignore")
        checkpointer.save(path, state)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """One directory a kind, written by Orbax; tests change copies only."""
    root = tmp_path_factory.mktemp("orbax")
    for kind, handler in HANDLERS.items():
        save(root / kind, tree() | {"name": "résumé"}, **handler)
    return root


@pytest.fixture
def copied(written, tmp_path):
    def copy(kind):
        return shutil.copytree(written / kind, tmp_path / kind)

    return copy


def opened(path):
    return distckpt.open(path, format="orbax")


def same(checkpoint, expected):
    assert set(checkpoint) == expected.keys()
    for name, array in expected.items():
        found, wanted = checkpoint[name].read(), np.asarray(array)
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), name
        assert found.tobytes() == wanted.tobytes(), name


@pytest.mark.parametrize("kind", HANDLERS)
def test_what_orbax_wrote_is_read_bit_for_bit(written, kind):
    checkpoint = opened(written / kind)
    same(checkpoint, arrays())
    assert dict(checkpoint.values) == VALUES | {"name": "résumé"}


def test_what_the_standard_checkpointer_wrote_is_read(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "a", tree())
    same(opened(tmp_path / "a"), arrays())


def test_one_step_of_a_checkpoint_manager_is_read(tmp_path):
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(7, args=ocp.args.StandardSave({"w": jnp.arange(4)}))
    same(opened(tmp_path / "run" / "7"), {"w": jnp.arange(4)})
    same(opened(tmp_path / "run" / "7" / "default"), {"w": jnp.arange(4)})


def test_of_several_trees_in_a_step_one_must_be_named(tmp_path):
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        trees = {name: ocp.args.StandardSave({"w": jnp.arange(4)}) for name in ("ema", "model")}
        configuration = ocp.args.JsonSave({"a": 1})
        manager.save(7, args=ocp.args.Composite(**trees, configuration=configuration))
    with pytest.raises(UnsupportedFormat, match=r"2 trees in one step.*7/ema, .*7/model$"):
        opened(tmp_path / "run" / "7")
    same(opened(tmp_path / "run" / "7" / "model"), {"w": jnp.arange(4)})


@pytest.mark.parametrize("kind", HANDLERS)
def test_slices_of_chunked_arrays_are_what_numpy_gives(tmp_path, kind):
    array = np.arange(1 << 22, dtype=np.int32).reshape(1 << 11, 1 << 11)
    with (
        warnings.catch_warnings(),
        ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**HANDLERS[kind])) as checkpointer,
    ):
        warnings.simplefilter("ignore")
        arguments = ocp.type_handlers.SaveArgs(chunk_byte_size=1 << 22)
        checkpointer.save(tmp_path / "a", {"w": array}, save_args={"w": arguments})
    checkpoint = opened(tmp_path / "a")
    assert len(FORMAT.open(Place.at(tmp_path / "a")).contents.tensors[0].boxes) > 1
    assert np.array_equal(checkpoint["w"][1000:1100, 1020:1030], array[1000:1100, 1020:1030])
    assert np.array_equal(checkpoint["w"].read(), array)


def test_a_tree_saved_sharded_is_read_whole(tmp_path):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), "x")
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    array = jax.device_put(jnp.arange(8 * len(jax.devices())), spread)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "a", {"w": array})
    same(opened(tmp_path / "a"), {"w": array})


def test_orbax_directories_are_recognised(written, tmp_path):
    assert all(FORMAT.sniff(Place.at(written / kind)) for kind in HANDLERS)
    assert not FORMAT.sniff(Place.at(written))
    assert not FORMAT.sniff(Place.at(tmp_path / "none"))


def test_writing_is_refused_with_the_way_to_do_it(tmp_path):
    with pytest.raises(UnsupportedFormat, match="StandardCheckpointer"):
        FORMAT.write(Place.at(tmp_path / "a"), Wanted([]))


# --- what is refused ------------------------------------------------------------------------------


def leaf_of(key):
    return {"key_metadata": [{"key": key}], "value_metadata": {"value_type": "jax.Array"}}


def edit(path, change):
    """Change the JSON of a directory."""
    file = path / "_METADATA"
    head = json.loads(file.read_text())
    file.write_text(json.dumps(change(head)))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no JSON"),
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "expected 'tree_metadata'"),
        ('{"tree_metadata": {"a": 3}}', "'a' breaks the format"),
        (json.dumps({"tree_metadata": {"a": leaf_of(3)}}), "no text"),
    ],
    ids=range(7),
)
def test_metadata_that_breaks_the_format_is_refused(copied, text, why):
    path = copied("plain-zarr2")
    (path / "_METADATA").write_text(text)
    with pytest.raises(CorruptCheckpoint, match=why):
        opened(path)


@pytest.mark.parametrize("key", ["../plain-zarr2/mask", "/etc", "a/../mask", "", ".", "a\0b"])
def test_a_name_never_leads_out_of_the_directory(copied, key):
    path = copied("plain-zarr2")
    edit(path, lambda head: head | {"tree_metadata": {"x": leaf_of(key)}})
    with pytest.raises(CorruptCheckpoint, match="no name of a directory"):
        opened(path)


def test_two_leaves_of_one_name_are_refused(copied):
    path = copied("plain-zarr2")
    edit(path, lambda head: head | {"tree_metadata": dict.fromkeys("ab", leaf_of("mask"))})
    with pytest.raises(CorruptCheckpoint, match="'mask': two leaves"):
        opened(path)


@pytest.mark.parametrize("kind", HANDLERS)
def test_an_array_that_is_missing_is_named(copied, kind):
    path = copied(kind)
    edit(path, lambda head: head | {"tree_metadata": {"x": leaf_of("gone")}})
    with pytest.raises(CorruptCheckpoint, match="'gone': tensorstore can't read it: NOT_FOUND"):
        opened(path)


def test_a_chunk_that_is_missing_is_no_zeros(copied):
    path = copied("plain-zarr2")
    (path / "params.dense.kernel" / "0.0").unlink()
    checkpoint = opened(path)
    with pytest.raises(CorruptCheckpoint, match=r"'params\.dense\.kernel': some of its chunks"):
        checkpoint["params.dense.kernel"].read()


def test_a_damaged_chunk_is_refused(copied):
    path = copied("plain-zarr2")
    (path / "params.dense.kernel" / "0.0").write_bytes(b"garbage")
    with pytest.raises(CorruptCheckpoint, match=r"'params\.dense\.kernel': tensorstore"):
        opened(path)["params.dense.kernel"].read()


def test_absurd_shapes_are_refused_before_memory_is_taken(copied):
    path = copied("plain-zarr2")
    array = path / "mask" / ".zarray"
    head = json.loads(array.read_text())
    array.write_text(json.dumps(head | {"chunks": [1 << 40]}))
    with pytest.raises(CorruptCheckpoint, match="'mask': chunks of shape"):
        opened(path)
    array.write_text(json.dumps(head | {"shape": [1 << 40], "chunks": [1 << 20]}))
    with pytest.raises(CorruptCheckpoint, match="'mask': some of its chunks are missing"):
        opened(path)["mask"][-1:]
    array.write_text(json.dumps(head | {"shape": [1 << 31, 1 << 31, 4], "chunks": [1, 1, 1]}))
    with pytest.raises(CorruptCheckpoint, match="'mask'"):
        opened(path)


def test_a_directory_that_orbax_has_not_finished_is_refused(copied, tmp_path):
    path = copied("plain-zarr2").rename(tmp_path / "7.orbax-checkpoint-tmp")
    with pytest.raises(IncompleteCheckpoint, match="not finished"):
        opened(path)


def test_a_folder_of_steps_is_refused_with_what_is_there(tmp_path):
    (tmp_path / "7").mkdir()
    with pytest.raises(CorruptCheckpoint, match=r"found 7\. Of a CheckpointManager, open one step"):
        opened(tmp_path)
