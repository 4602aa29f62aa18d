"""TensorFlow's V2 checkpoints: what TensorFlow wrote is read, through its own reader."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from distckpt import CorruptCheckpoint, UnsupportedFormat
from distckpt.formats.base import Place, Wanted
from distckpt.formats.tensorflow import FORMAT

# TensorFlow takes seconds to import, brings libraries that others have too, and warns: it runs in a
# process of its own, which writes bundles, and reads them and damaged copies of them with distckpt.
_PROGRAM = """
import json, shutil, sys
from pathlib import Path

import distckpt  # with its protobuf code, before TensorFlow comes with its own
import numpy as np
import tensorflow as tf

KERNEL = np.arange(12, dtype=np.float32).reshape(3, 4)

class Model(tf.Module):
    def __init__(self):
        self.kernel = tf.Variable(KERNEL)
        self.bias = tf.Variable(tf.cast([1.5, -2.0], tf.bfloat16))
        self.blocks = [tf.Variable(7), tf.Variable([[True, False]])]
        self.text = tf.Variable("h\u00e9llo")
        self.words = tf.Variable(["a", "b"])
        self.phase = tf.Variable(tf.constant([1 + 2j], tf.complex64))
        self.empty = tf.Variable(tf.zeros((0, 3)))
        setattr(self, "with.dot", tf.Variable(1.0))

def write(root):
    checkpoint = tf.train.Checkpoint(model=Model())
    checkpoint.write(str(root / "one" / "model"))
    for _ in range(2):
        checkpoint.save(str(root / "run" / "ckpt"))
    (root / "sliced").mkdir()
    tf.raw_ops.SaveV2(prefix=str(root / "sliced" / "old"), tensor_names=["layer/w", "layer/w"],
        shape_and_slices=["4 2 0,2:-", "4 2 2,2:-"],
        tensors=[tf.constant([[0, 1], [2, 3]]), tf.constant([[4, 5], [6, 7]])])

def changed(root, source, name, file, change):
    path = shutil.copytree(root / source, root / name) / file
    before = path.read_bytes()
    path.write_bytes(change(before))
    assert path.read_bytes() != before

def read(url):
    checkpoint = distckpt.open(url, format="tensorflow")
    tensors = {}
    for name in checkpoint:
        array = checkpoint[name].read()
        tensors[name] = [array.dtype.name, list(array.shape), array.tobytes().hex()]
    values = {name: repr(value) for name, value in checkpoint.values.items()}
    return {"tensors": tensors, "values": values, "metadata": dict(checkpoint.metadata)}

def answer(url):
    try:
        return read(url)
    except distckpt.CheckpointError as exc:
        return {"error": [type(exc).__name__, str(exc)]}

root = Path(sys.argv[1])
write(root)
data, kernel = "model.data-00000-of-00001", KERNEL.tobytes()
changed(root, "one", "short", data, lambda found: found[:20])
changed(root, "one", "flipped", data, lambda found: found.replace(kernel, kernel[:-1] + b"?"))
changed(root, "one", "index", "model.index", lambda found: bytes(40) + found[40:])
changed(root, "run", "moved", "checkpoint", lambda found: found.replace(b': "', b': "/gone/'))
answers = {url: answer(root / url) for url in sys.argv[2:]}
part = distckpt.open(root / "one", format="tensorflow")["model.kernel"][1:3, 2:]
json.dump(answers | {"part": part.tolist()}, sys.stdout)
"""

URLS = (
    "one/model", "one/model.index", "one", "run", "run/ckpt-1", "moved", "sliced",
    "short", "flipped", "index",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of all bundles, and what was read at each of URLS."""
    root = tmp_path_factory.mktemp("tensorflow")
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, root, *URLS],
        capture_output=True,
        text=True,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return root, json.loads(done.stdout)


@pytest.fixture
def root(made):
    return made[0]


@pytest.fixture
def answers(made):
    return made[1]


EXPECTED = {
    "model.kernel": np.arange(12, dtype=np.float32).reshape(3, 4),
    "model.bias": np.array([1.5, -2.0], ml_dtypes.bfloat16),
    "model.blocks.0": np.asarray(7, np.int32),
    "model.blocks.1": np.array([[True, False]]),
    "model.phase": np.array([1 + 2j], np.complex64),
    "model.empty": np.zeros((0, 3), np.float32),
    "model.with.dot": np.asarray(1, np.float32),
}


def as_read(arrays):
    return {
        name: [array.dtype.name, list(array.shape), array.tobytes().hex()]
        for name, array in arrays.items()
    }


@pytest.mark.parametrize("url", ["one/model", "one/model.index", "one"])
def test_a_bundle_is_read_bit_for_bit_by_dotted_names(answers, url):
    assert "error" not in answers[url], answers[url]
    assert answers[url]["tensors"] == as_read(EXPECTED)


def test_a_single_text_is_a_value_and_an_array_of_texts_is_reported_as_left_out(answers):
    assert answers["one"]["values"] == {"model.text": repr("héllo".encode())}
    assert answers["one"]["metadata"] == {"left_out": {"model.words": "string of shape [2]"}}


def test_a_slice_is_what_numpy_gives(answers):
    assert answers["part"] == EXPECTED["model.kernel"][1:3, 2:].tolist()


def test_a_folder_of_several_bundles_is_its_latest(answers):
    counter = as_read({"save_counter": np.asarray(2, np.int64)})["save_counter"]
    assert answers["run"]["tensors"]["save_counter"] == counter
    assert answers["moved"] == answers["run"]
    assert answers["run/ckpt-1"]["tensors"]["save_counter"] != counter


def test_a_variable_stored_in_slices_is_read_whole(answers):
    expected = {"layer.w": np.arange(8, dtype=np.int32).reshape(4, 2)}
    assert answers["sliced"]["tensors"] == as_read(expected)


def test_data_files_that_are_too_short_are_refused_before_reading(answers):
    kind, text = answers["short"]["error"]
    assert kind == "CorruptCheckpoint"
    assert "the data files have 20 bytes" in text


def test_a_flipped_bit_is_found_by_tensorflows_checksums(answers):
    kind, text = answers["flipped"]["error"]
    assert kind == "CorruptCheckpoint"
    assert "model/kernel" in text


def test_a_damaged_index_is_refused(answers):
    assert answers["index"]["error"][0] == "CorruptCheckpoint"


# --- without TensorFlow ---------------------------------------------------------------------------


def test_bundles_are_recognised_without_tensorflow(root, tmp_path):
    for url in URLS:
        assert FORMAT.sniff(Place.at(root / url)), url
    assert not FORMAT.sniff(Place.at(root))
    assert not FORMAT.sniff(Place.at(root / "one" / "model.data-00000-of-00001"))
    assert not FORMAT.sniff(Place.at(tmp_path / "none"))
    (tmp_path / "a.index").write_bytes(b"other")
    assert not FORMAT.sniff(Place.at(tmp_path / "a.index"))


def test_several_bundles_without_a_state_file_are_refused_by_name(root, tmp_path):
    shutil.copytree(root / "run", tmp_path / "run")
    (tmp_path / "run" / "checkpoint").unlink()
    with pytest.raises(UnsupportedFormat, match="open one of them: ckpt-1, ckpt-2"):
        FORMAT.open(Place.at(tmp_path / "run"))


def test_a_state_file_never_leads_out_of_the_folder(root, tmp_path):
    shutil.copytree(root / "run", tmp_path / "run")
    state = f'model_checkpoint_path: "{root}/one/model"\n'
    (tmp_path / "run" / "checkpoint").write_text(state)
    with pytest.raises(UnsupportedFormat, match="open one of them"):
        FORMAT.open(Place.at(tmp_path / "run"))


def test_data_files_that_are_missing_are_named(root, tmp_path):
    shutil.copy(root / "one" / "model.index", tmp_path)
    with pytest.raises(CorruptCheckpoint, match="data files, all of 0 are missing"):
        FORMAT.open(Place.at(tmp_path / "model"))
    (tmp_path / "model.data-00001-of-00003").write_bytes(b"")
    with pytest.raises(CorruptCheckpoint, match=r"\[0, 2\] of 3 are missing"):
        FORMAT.open(Place.at(tmp_path / "model"))


def test_writing_is_refused_with_the_way_to_do_it(tmp_path):
    with pytest.raises(UnsupportedFormat, match="assign those of"):
        FORMAT.write(Place.at(tmp_path / "a"), Wanted([]))
