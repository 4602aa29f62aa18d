"""What MindSpore's checkpoint functions do wrong, and distckpt's don't: a test a fault."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from google.protobuf import descriptor_pool

from distckpt.errors import CheckpointError, CorruptCheckpoint, MatchError, StoreError
from distckpt.mindspore import (
    CheckpointConfig,
    ModelCheckpoint,
    NetMismatch,
    Parameter,
    Tensor,
    load_checkpoint,
    load_param_into_net,
    save_checkpoint,
)
from distckpt.state import LazyArray

_GOLDEN = Path(__file__).parent / "data" / "golden"


class Breaking(LazyArray):
    """An array whose reading fails when it is told to."""

    shape = (2,)
    dtype = np.dtype("<f4")
    breaks = True

    def read(self, region=None):
        if self.breaks:
            raise OSError("the device is gone")
        return np.ones(2, np.float32)


class FullDisk(MemoryFileSystem):
    """A file system that takes nothing."""

    protocol = "fulldisk"
    store = {}  # noqa: RUF012  fsspec's own way
    pseudo_dirs = [""]  # noqa: RUF012

    def _open(self, path, mode="rb", **kwargs):
        if mode == "rb":
            return super()._open(path, mode, **kwargs)
        raise OSError(28, "No space left on device")

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        raise OSError(28, "No space left on device")


fsspec.register_implementation("fulldisk", FullDisk, clobber=True)


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def listed(folder="."):
    return sorted(path.name for path in Path(folder).iterdir())


def net(value=0.0):
    return {"a": np.full(2, value, np.float32), "b": np.full(3, value, np.float32)}


def values(file="net.ckpt"):
    return {name: parameter.asnumpy().tolist() for name, parameter in load_checkpoint(file).items()}


def arrays(found):
    return {name: array.tolist() for name, array in found.items()}


# --------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_a_save_that_fails_leaves_the_old_file(form):
    save_checkpoint(net(1), "net", format=form)
    before = Path(f"net.{form}").read_bytes()
    with pytest.raises(OSError, match="the device is gone"):
        save_checkpoint({"a": np.zeros(2, np.float32), "z": Breaking()}, "net", format=form)
    assert listed() == [f"net.{form}"]
    assert Path(f"net.{form}").read_bytes() == before


def test_the_new_file_is_synced_before_it_replaces_the_old_one(monkeypatch):
    save_checkpoint(net(1), "net.ckpt")
    events = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(Path, "replace", lambda *a: (events.append("replace"), replace(*a))[1])
    save_checkpoint(net(2), "net.ckpt")
    assert events.count("replace") == 1
    assert "fsync" in events[: events.index("replace")]
    assert events[-1] == "fsync"  # of the folder


def test_a_users_own_tmp_file_is_not_touched():
    Path("net.ckpt.tmp").write_text("mine")
    Path("net.tmp").write_text("mine, too")
    save_checkpoint(net(), "net.ckpt")
    save_checkpoint(net(), "net.ckpt")
    assert listed() == ["net.ckpt", "net.ckpt.tmp", "net.tmp"]
    assert Path("net.tmp").read_text() == "mine, too"


def test_a_replaced_file_keeps_its_mode():
    save_checkpoint(net(), "net.ckpt")
    Path("net.ckpt").chmod(0o640)
    save_checkpoint(net(1), "net.ckpt")
    assert stat.S_IMODE(Path("net.ckpt").stat().st_mode) == 0o640


def test_a_new_file_can_be_written_by_its_owner():
    save_checkpoint(net(), "net.ckpt")
    assert Path("net.ckpt").stat().st_mode & stat.S_IWUSR


def test_a_link_stays_and_its_target_is_replaced():
    save_checkpoint(net(), "net.ckpt")
    Path("link.ckpt").symlink_to("net.ckpt")
    save_checkpoint(net(5), "link.ckpt")
    assert Path("link.ckpt").is_symlink()
    assert values()["a"] == [5, 5]


def test_an_asynchronous_failure_is_raised_by_wait():
    pending = save_checkpoint(net(), "fulldisk://x/net.ckpt", async_save=True)
    with pytest.raises(StoreError, match="No space left"):
        pending.wait()
    assert pending.done()
    save_checkpoint(net(), "net.ckpt")  # it was told of


def test_an_asynchronous_failure_is_raised_by_the_next_save():
    save_checkpoint(net(), "fulldisk://x/net.ckpt", async_save=True)
    with pytest.raises(StoreError, match="No space left"):
        save_checkpoint(net(), "net.ckpt")
    save_checkpoint(net(), "net.ckpt")  # once


def test_an_asynchronous_failure_is_told_at_the_end_of_the_program():
    program = (
        "import numpy as np\n"
        "from test_mindspore_faults import net\n"
        "from distckpt.mindspore import save_checkpoint\n"
        "save_checkpoint(net(), 'fulldisk://x/net.ckpt', async_save=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "the save failed" in ended.stderr
    assert "Exception ignored in atexit callback" in ended.stderr
    assert ended.stderr.count("No space left on device") >= 2


def test_an_asynchronous_save_is_of_the_values_at_the_call():
    state = net(1)
    pending = save_checkpoint(state, "net.ckpt", async_save=True)
    state["a"][:] = 7
    assert Path(pending.wait()).name == "net.ckpt"
    assert values()["a"] == [1, 1]


def test_encryption_with_a_checksum_is_refused_before_files_are_touched():
    save_checkpoint(net(1), "net.ckpt")
    with pytest.raises(ValueError, match="crc_check=True with a key"):
        save_checkpoint(net(2), "net.ckpt", enc_key=b"0" * 16, crc_check=True)
    with pytest.raises(ValueError, match="crc_check=True with a key"):
        CheckpointConfig(enc_key=b"0" * 16, crc_check=True)
    assert listed() == ["net.ckpt"]
    assert values()["a"] == [1, 1]


@pytest.mark.parametrize(
    "options", [{"enc_key": b"short"}, {"enc_key": b"0" * 16, "enc_mode": "ROT13"}]
)
def test_a_bad_key_or_mode_is_refused_before_files_are_touched(options):
    save_checkpoint(net(1), "net.ckpt")
    with pytest.raises(ValueError, match=r"key|mode"):
        save_checkpoint(net(2), "net.ckpt", **options)
    assert listed() == ["net.ckpt"]
    assert values()["a"] == [1, 1]


def test_a_tensor_in_a_dict_is_saved_under_its_name():
    save_checkpoint({"first": Tensor(1), "second": Parameter(Tensor(2), "x")}, "net.ckpt")
    assert values() == {"first": 1, "second": 2}


def test_two_entries_of_one_name_are_refused():
    item = {"name": "a", "data": Tensor(1)}
    with pytest.raises(ValueError, match="several entries of the list have this name"):
        save_checkpoint([item, dict(item)], "net.ckpt")
    with pytest.raises(ValueError, match="append_dict has names of save_obj"):
        save_checkpoint(net(), "net.ckpt", append_dict={"a": 1})
    assert listed() == []


def test_nothing_to_save_makes_no_file_that_cannot_be_loaded():
    with pytest.raises(ValueError, match="nothing to save"):
        save_checkpoint(net(), "net.ckpt", choice_func=lambda name: False)
    assert listed() == []


@pytest.mark.parametrize("background", [False, True])
def test_tensors_without_elements_are_kept(background):
    pending = save_checkpoint(
        {"e": np.zeros((0, 3), np.float32)}, "net.ckpt", async_save=background
    )
    if pending is not None:
        pending.wait()
    assert load_checkpoint("net.ckpt")["e"].shape == (0, 3)


def test_a_vector_without_elements_is_no_number():
    save_checkpoint({"v": np.zeros(0, np.float32), "s": np.float32(4)}, "net.ckpt")
    found = load_checkpoint("net.ckpt")
    assert (found["v"].shape, found["s"].shape) == ((0,), ())


def test_texts_are_kept_in_safetensors():
    save_checkpoint(net(), "net", format="safetensors", append_dict={"note": "naïve"})
    found = load_checkpoint("net.safetensors", format="safetensors")
    assert found["note"] == "naïve"
    assert found["a"].name == "a"


def test_prefixes_count_for_safetensors():
    save_checkpoint(net(), "net", format="safetensors")
    found = load_checkpoint("net.safetensors", format="safetensors", filter_prefix="a")
    assert list(found) == ["b"]


@pytest.mark.parametrize("name", ["stage-0.w", "-", "a-b-c.weight"])
def test_names_with_a_minus_are_names_like_others(name):
    save_checkpoint({name: np.ones(2, np.float32)}, "net.ckpt")
    target = {name: np.zeros(2, np.float32)}
    assert load_param_into_net(target, load_checkpoint("net.ckpt"), strict_load=True) == ([], [])
    assert target[name].all()


@pytest.mark.parametrize("make", [Path, str, lambda name: f"memory://faults/{name}"])
def test_paths_and_urls_are_taken(make):
    save_checkpoint(net(3), make("net.ckpt"))
    assert values(make("net.ckpt"))["b"] == [3, 3, 3]


# -------------------------------------------------------------------------------------- loading


def test_a_parameter_that_does_not_fit_leaves_the_net_unchanged_and_all_are_named():
    target = {"a": np.zeros(2, np.float32), "b": np.zeros(3, np.float32), "c": np.zeros(1, np.int8)}
    saved = {"a": np.ones(2), "b": np.ones(4), "c": np.ones(1)}
    with pytest.raises(NetMismatch, match="nothing was loaded") as caught:
        load_param_into_net(target, saved)
    assert list(caught.value.mismatched) == ["b", "c"]
    assert isinstance(caught.value, RuntimeError)  # which MindSpore raises
    assert arrays(target) == {"a": [0, 0], "b": [0, 0, 0], "c": [0]}


def test_names_that_match_in_two_ways_are_refused():
    target = {"w": np.zeros(2)}
    with pytest.raises(MatchError) as caught:
        load_param_into_net(target, {"a.w": np.ones(2), "b.w": np.ones(2)})
    assert caught.value.ambiguous == {"w": ["a.w", "b.w"]}
    assert not target["w"].any()


def test_a_suffix_begins_at_a_dot():
    target = {"weight": np.zeros(2)}
    assert load_param_into_net(target, {"preweight": np.ones(2)}) == (["weight"], ["preweight"])


@pytest.mark.parametrize(("saved", "wanted"), [("w", "net.w"), ("net.w", "w")])
def test_a_suffix_matches_in_both_directions(saved, wanted):
    target = {wanted: np.zeros(2)}
    assert load_param_into_net(target, {saved: np.ones(2)}) == ([], [])
    assert target[wanted].all()


def test_a_saved_parameter_goes_into_one_place_only():
    target = {"conv.weight": np.zeros(2), "weight": np.zeros(2)}
    assert load_param_into_net(target, {"conv.weight": np.ones(2)}) == (["weight"], [])
    assert not target["weight"].any()


def test_what_was_loaded_by_suffix_is_not_reported_as_unused():
    assert load_param_into_net({"w": np.zeros(2)}, {"net.w": np.ones(2), "x.y": np.ones(2)}) == (
        [],
        ["x.y"],
    )


def test_trailing_ones_need_equal_leading_dimensions_and_the_net_keeps_its_shape():
    target = {"w": np.zeros((2, 3))}
    with pytest.raises(NetMismatch, match=r"wants shape \(2, 3\), saved is \(3, 2, 1\)"):
        load_param_into_net(target, {"w": np.ones((3, 2, 1))})
    load_param_into_net(target, {"w": np.ones((2, 3, 1, 1))}, strict_load=True)
    assert target["w"].shape == (2, 3)
    assert target["w"].all()


@pytest.mark.parametrize(
    ("saved", "wanted"), [(np.float32(65520), np.float16), (np.int64(300), np.int8)]
)
def test_a_value_that_does_not_fit_is_refused(saved, wanted):
    target = {"w": np.zeros((), wanted)}
    with pytest.raises(NetMismatch, match="1 of 1 values do not fit"):
        load_param_into_net(target, {"w": saved})
    assert target["w"] == 0


def test_a_text_under_a_parameters_name_is_reported_as_not_loaded():
    target = {"w": np.zeros(2), "v": np.zeros(2)}
    found = load_param_into_net(target, {"w": "a text", "v": np.ones(2)})
    assert found == (["w"], ["w"])


@pytest.mark.parametrize("name", ["hand_short", "hand_long", "hand_neg_dim"])
def test_content_that_is_not_as_long_as_the_shape_says_is_refused(name):
    with pytest.raises(CorruptCheckpoint, match=name):
        load_checkpoint(_GOLDEN / f"{name}.ckpt")


def test_a_checksum_is_checked_without_being_asked_for():
    with pytest.raises(CheckpointError, match="CRC"):
        load_checkpoint(_GOLDEN / "crc_corrupt.ckpt")


def test_data_that_ends_like_a_checksum_is_loaded():
    data = np.frombuffer(b"crc_num" + bytes(10) + b"crc_num" + bytes(10), np.uint8)
    save_checkpoint({"w": data}, "net.ckpt")
    assert load_checkpoint("net.ckpt")["w"].asnumpy().tobytes() == data.tobytes()


def test_a_missing_file_is_called_missing():
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt: there is no such file") as caught:
        load_checkpoint("none.ckpt")
    assert isinstance(caught.value, ValueError)  # which MindSpore raises


def test_an_empty_file_is_called_damaged():
    Path("net.ckpt").write_bytes(b"")
    with pytest.raises(CorruptCheckpoint, match=r"net\.ckpt"):
        load_checkpoint("net.ckpt")


# ------------------------------------------------------------------------------------- training


def steps(callback, count, state):
    for _ in range(count):
        callback.step_end(net=state)


def train_until_a_fault(callback, state):
    steps(callback, 3, state)
    raise KeyError("a fault in the training")


def test_the_old_checkpoint_is_deleted_after_the_new_one_is_saved():
    tensor = Breaking()
    tensor.breaks = False
    callback = ModelCheckpoint("net", "ckpt", CheckpointConfig(keep_checkpoint_max=1))
    steps(callback, 2, {"w": tensor})
    tensor.breaks = True
    with pytest.raises(OSError, match="the device is gone"):
        callback.step_end()
    assert listed("ckpt") == ["net-1_2.ckpt"]


def test_files_of_others_are_not_deleted():
    Path("ckpt").mkdir()
    for name in ("lenet-2019.ckpt", "lenet-1_1_best.ckpt", "lenet-x.ckpt"):
        Path("ckpt", name).touch()
    callback = ModelCheckpoint("lenet", "ckpt", CheckpointConfig(keep_checkpoint_max=1))
    steps(callback, 3, net())
    assert listed("ckpt") == [
        "lenet-1_1_best.ckpt",
        "lenet-1_3.ckpt",
        "lenet-2019.ckpt",
        "lenet-x.ckpt",
    ]


def test_old_files_are_deleted_also_with_a_callable_prefix():
    config = CheckpointConfig(keep_checkpoint_max=2)
    callback = ModelCheckpoint(lambda told: f"at{told.cur_step_num}", "ckpt", config)
    steps(callback, 4, net())
    assert listed("ckpt") == ["at3.ckpt", "at4.ckpt"]


def test_an_exception_saves_the_saved_network_with_the_configurations_checksum():
    config = CheckpointConfig(100, exception_save=True, saved_network=net(1), crc_check=True)
    training = {"net": net(2), "moments": np.zeros(9)}
    with pytest.raises(KeyError), ModelCheckpoint("net", "ckpt", config) as callback:
        train_until_a_fault(callback, training)
    assert listed("ckpt") == ["net-1_3_breakpoint.ckpt"]
    assert values("ckpt/net-1_3_breakpoint.ckpt")["a"] == [1, 1]
    assert Path("ckpt/net-1_3_breakpoint.ckpt").read_bytes()[-17:-10] == b"crc_num"


def test_an_exception_whose_save_fails_is_still_the_one_raised():
    config = CheckpointConfig(100, exception_save=True)
    with pytest.raises(KeyError) as caught, ModelCheckpoint("net", "ckpt", config) as callback:
        train_until_a_fault(callback, {"w": Breaking()})
    assert "the device is gone" in caught.value.__notes__[0]


def test_protobuf_messages_do_not_clash_with_mindspores():
    with pytest.raises(KeyError):
        descriptor_pool.Default().FindMessageTypeByName("Checkpoint")
