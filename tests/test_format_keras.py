"""Keras' weights in HDF5: read, written, and refused."""

from __future__ import annotations

import h5py
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import distckpt
from distckpt import CheckpointExists, CorruptCheckpoint, UnsupportedFormat
from distckpt.formats.base import Place, Wanted
from distckpt.formats.keras import FORMAT


def opened(path):
    return distckpt.open(path, format="keras")


def loaded(path):
    checkpoint = opened(path)
    return {name: checkpoint[name].read() for name in checkpoint}


class Given:
    """A tensor to write, which notes how much was read at once."""

    def __init__(self, name, array):
        self.name, self.array, self.largest = name, np.asarray(array), 0
        self.shape, self.dtype = self.array.shape, self.array.dtype

    def read(self, region=None):
        found = self.array if region is None else self.array[(*region.slices, ...)]
        self.largest = max(self.largest, found.nbytes)
        return np.ascontiguousarray(found).reshape(found.shape)


def write(path, arrays, **keywords):
    tensors = [Given(name, array) for name, array in arrays.items()]
    writing = FORMAT.write(Place.at(path), Wanted(tensors, **keywords))
    for part in writing.parts:
        part()
    writing.commit()
    return tensors


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


ARRAYS = {
    "layers.dense.vars.0": np.arange(12, dtype=np.float32).reshape(3, 4),
    "layers.dense.vars.1": np.linspace(0, 1, 5).astype(ml_dtypes.bfloat16),
    "optimizer.vars.0": np.asarray(7, np.int64),
    "empty": np.zeros((0, 3), np.float16),
    "flags": np.array([True, False]),
    "complex": np.array([1 + 2j], np.complex64),
}


def test_what_is_written_is_read_bit_for_bit(tmp_path):
    write(tmp_path / "a.weights.h5", ARRAYS)
    same(loaded(tmp_path / "a.weights.h5"), ARRAYS)
    assert [path.name for path in tmp_path.iterdir()] == ["a.weights.h5"]


def test_a_written_file_has_the_datasets_that_keras_wants(tmp_path):
    write(tmp_path / "a.h5", ARRAYS)
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["layers/dense/vars/0"][1].tolist() == [4, 5, 6, 7]
        assert file["layers/dense/vars/1"].attrs["dtype"] == "bfloat16"


@given(
    shape=st.lists(st.integers(0, 9), max_size=4).map(tuple),
    chunked=st.booleans(),
    big=st.booleans(),
    data=st.data(),
)
def test_any_slice_of_any_dataset_is_what_numpy_gives(tmp_path_factory, shape, chunked, big, data):
    path = tmp_path_factory.mktemp("h5") / "a.h5"
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(">i4" if big else "<i4")
    options = {}
    if chunked and shape and 0 not in shape:
        chunks = tuple(data.draw(st.integers(1, extent)) for extent in shape)
        options = {"chunks": chunks, "compression": "gzip", "shuffle": True}
    with h5py.File(path, "w") as file:
        file.create_dataset("w", data=array, **options)
    index = tuple(slice(*sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2)))) for n in shape)
    assert np.array_equal(opened(path)["w"][index], array[index])


def test_runs_of_bytes_that_begin_anywhere_are_right(tmp_path):
    array = np.arange(5 * 7 * 3, dtype=np.int16).reshape(5, 7, 3)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["w"] = array
    source = FORMAT.open(Place.at(tmp_path / "a.h5"))
    for start in range(0, array.nbytes, 14):
        buffer = bytearray(min(26, array.nbytes - start))
        source.read_into(0, 0, start, memoryview(buffer))
        assert buffer == array.tobytes()[start : start + len(buffer)]


def test_large_chunked_datasets_are_read_by_pieces_along_their_chunks(tmp_path):
    array = np.arange(3 << 20, dtype=np.float32).reshape(3, 1 << 20)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("w", data=array, chunks=(1, 1 << 20), compression="lzf")
    tensor = FORMAT.open(Place.at(tmp_path / "a.h5")).contents.tensors[0]
    assert [str(box) for box in tensor.boxes] == [f"[{i}:{i + 1}, 0:1048576]" for i in range(3)]
    assert np.array_equal(loaded(tmp_path / "a.h5")["w"], array)


def test_large_tensors_are_written_a_few_mib_at_a_time(tmp_path):
    array = np.arange(6 << 20, dtype=np.float64)
    (tensor,) = write(tmp_path / "a.h5", {"w": array})
    assert tensor.largest == 16 << 20
    assert np.array_equal(loaded(tmp_path / "a.h5")["w"], array)


def test_hdf5_is_recognised_by_its_first_bytes(tmp_path):
    write(tmp_path / "a.h5", ARRAYS)
    (tmp_path / "b.h5").write_bytes(b"PK")
    assert FORMAT.sniff(Place.at(tmp_path / "a.h5"))
    assert not FORMAT.sniff(Place.at(tmp_path / "b.h5"))
    assert not FORMAT.sniff(Place.at(tmp_path))
    assert not FORMAT.sniff(Place.at(tmp_path / "none"))


# --- Keras itself ---------------------------------------------------------------------------------


# Keras converts its own variables in a way that numpy 2 warns of.
of_keras = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def keras():
    """Keras on JAX; it is set by the environment, and only when it is imported."""
    patch = pytest.MonkeyPatch()
    patch.setenv("KERAS_BACKEND", "jax")
    try:
        yield pytest.importorskip("keras")
    finally:
        patch.undo()


def model(keras, dtype="float32", seed=0):
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Input((8,)),
            layers.Dense(4, dtype=dtype),
            layers.BatchNormalization(),
            layers.Dense(2),
        ]
    )


@of_keras
def test_a_file_that_keras_wrote_is_read_and_written_and_loaded_by_keras(tmp_path, keras):
    before, after = model(keras), model(keras, seed=1)
    before.save_weights(tmp_path / "a.weights.h5")
    arrays = loaded(tmp_path / "a.weights.h5")
    assert "layers.dense_1.vars.1" in arrays
    assert np.array_equal(arrays["layers.dense.vars.0"], np.asarray(before.layers[0].kernel))
    write(tmp_path / "b.weights.h5", arrays)
    after.load_weights(tmp_path / "b.weights.h5")
    for one, other in zip(before.weights, after.weights, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))


@of_keras
def test_bfloat16_that_keras_wrote_is_bfloat16(tmp_path, keras):
    net = model(keras, "bfloat16")
    net.save_weights(tmp_path / "a.weights.h5")
    kernel = loaded(tmp_path / "a.weights.h5")["layers.dense.vars.0"]
    assert kernel.dtype == ml_dtypes.bfloat16
    assert kernel.tobytes() == np.asarray(net.layers[0].kernel.value).tobytes()


@of_keras
def test_a_legacy_file_of_keras_is_read_by_its_paths(tmp_path, keras):
    net = model(keras)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        from keras.src.legacy.saving import legacy_h5_format

        legacy_h5_format.save_weights_to_hdf5_group(file, net)
    arrays = loaded(tmp_path / "a.h5")
    layer = net.layers[0]
    (name,) = [name for name in arrays if name.endswith(f"{layer.name}.kernel")]
    assert np.array_equal(arrays[name], np.asarray(layer.kernel))


# --- what is refused ------------------------------------------------------------------------------


def test_something_that_is_there_stays_unless_it_may_be_replaced(tmp_path):
    path = tmp_path / "a.h5"
    path.write_bytes(b"precious")
    with pytest.raises(CheckpointExists, match="something is there"):
        write(path, ARRAYS)
    assert path.read_bytes() == b"precious"
    write(path, ARRAYS, replace=True)
    same(loaded(path), ARRAYS)


def test_until_the_commit_nothing_is_visible_and_an_abort_leaves_nothing(tmp_path):
    path = tmp_path / "new" / "a.h5"
    writing = FORMAT.write(Place.at(path), Wanted([Given("w", np.ones(3))]))
    writing.parts[0]()
    assert not path.exists()
    writing.abort()
    assert not list(tmp_path.iterdir())


def test_all_that_hdf5_has_no_place_for_is_named_before_writing(tmp_path):
    arrays = {"a": np.ones(1), "a.b": np.ones(1), "c/d": np.ones(1), "e..f": np.ones(1)}
    arrays["i"] = np.ones(1, ml_dtypes.int4)
    with pytest.raises(UnsupportedFormat) as refused:
        write(tmp_path / "a.h5", arrays, values={"epoch": 3})
    assert all(repr(name) in str(refused.value) for name in ("a.b", "c/d", "e..f", "i", "epoch"))
    assert not list(tmp_path.iterdir())


def corrupted(path, make):
    with h5py.File(path, "w") as file:
        make(file)
    return path


def external_data(file):
    file.create_dataset("w", (4,), "f4", external=[("/etc/passwd", 0, 16)])


def virtual(file):
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("/etc/other.h5", "w", (4,))
    file.create_virtual_dataset("w", layout)


def external_link(file):
    file["w"] = h5py.ExternalLink("/etc/other.h5", "/w")


def soft_link(file):
    file["w"] = h5py.SoftLink("/nowhere")


def cycle(file):
    file.create_group("a")["w"] = file["/"]


def texts(file):
    file["w"] = ["a", "b"]


def references(file):
    file.create_dataset("w", (1,), h5py.ref_dtype)


def compound(file):
    file.create_dataset("w", (1,), np.dtype([("a", "f4"), ("b", "f4")]))


def opaque(file):
    file["w"] = np.zeros(2, "V2")


def without_shape(file):
    file["w"] = h5py.Empty("f4")


def never_written(file):
    file.create_dataset("w", (1 << 40,), "f4")


def sparse_bomb(file):
    file.create_dataset("w", (1 << 40,), "f4", chunks=(1 << 20,), compression="gzip")[0] = 1


def same_name(file):
    file["w"] = np.ones(1)
    file["a/b"] = np.ones(1)
    file["a.b"] = np.ones(1)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (external_data, "another file, '/etc/passwd'"),
        (virtual, "virtual dataset"),
        (external_link, "'w': a link to /etc/other.h5:/w"),
        (soft_link, "'w': a link to /nowhere"),
        (cycle, "'a/w': a group that is elsewhere"),
        (texts, "'w': dtype object"),
        (references, "'w': dtype object"),
        (compound, "'w': dtype"),
        (opaque, "'w': dtype"),
        (without_shape, "without a shape"),
        (never_written, "4398046511104 bytes, 0 are stored"),
        (sparse_bomb, "needs 4398046511104 bytes"),
        (same_name, "'a.b': another dataset has the same name"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_is_no_weight_or_not_in_the_file_is_refused_at_once(tmp_path, make, why):
    with pytest.raises(UnsupportedFormat) as refused:
        opened(corrupted(tmp_path / "a.h5", make))
    assert why in str(refused.value)


def test_a_file_cut_anywhere_is_refused_and_nothing_else_is_raised(tmp_path):
    write(tmp_path / "a.h5", ARRAYS)
    data = (tmp_path / "a.h5").read_bytes()
    for cut in range(0, len(data) - 1, 97):
        (tmp_path / "b.h5").write_bytes(data[:cut])
        with pytest.raises(CorruptCheckpoint):
            opened(tmp_path / "b.h5")
