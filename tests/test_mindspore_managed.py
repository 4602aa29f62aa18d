"""`ModelCheckpoint` and the Manager: events, stop signals, and checkpoints of all ranks."""

from __future__ import annotations

import signal
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.spec import AbstractFileSystem

import distckpt
from distckpt.errors import CheckpointNotFound, StoreError
from distckpt.mindspore import CheckpointConfig, ModelCheckpoint


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def net(value=0.0):
    return {"a": np.full(2, value, np.float32), "b": np.full(3, value, np.float32)}


def managed(**options):
    return CheckpointConfig(format="distckpt", **options)


def listed(folder="ckpt"):
    return sorted(path.name for path in Path(folder).iterdir() if not path.name.startswith("."))


class RunContext:
    """What MindSpore hands a callback."""

    stopped = False

    def __init__(self, **told):
        self._told = told

    def original_args(self):
        return self._told

    def request_stop(self):
        self.stopped = True


both = pytest.mark.parametrize("form", ["ckpt", "distckpt"])


# ----------------------------------------------------------------------------------- both formats


@both
def test_a_save_is_told_from_its_begin_to_what_it_supersedes(form):
    told = []
    config = CheckpointConfig(2, keep_checkpoint_max=1, format=form)
    with ModelCheckpoint("net", "ckpt", config, on_event=told.append) as callback:
        for value in range(5):
            callback.step_end(net=net(value))
        callback.end()
    assert [(each.kind, each.step) for each in told if each.kind != "pruned"] == [
        (kind, step) for step in (2, 4, 5) for kind in ("save_begun", "save_committed")
    ]
    assert [each.kind for each in told].count("pruned") == 2
    committed = [each for each in told if each.kind == "save_committed"]
    assert committed[-1].url == callback.latest_ckpt_file_name
    assert all(each.values["stats"].nbytes >= 20 for each in committed)
    assert all(each.values["stats"].seconds > 0 for each in committed)


@both
def test_a_signal_saves_the_next_step_and_asks_the_training_to_stop(form):
    before = signal.getsignal(signal.SIGUSR1)
    config = CheckpointConfig(100, format=form)
    with ModelCheckpoint("net", "ckpt", config, stop_signals=[signal.SIGUSR1]) as callback:
        callback.step_end(net=net(1))
        assert not callback.should_stop()
        signal.raise_signal(signal.SIGUSR1)
        callback.step_end(net=net(2))
        assert callback.should_stop()
        assert callback.stop_reason == "SIGUSR1 on rank 0"
        callback.step_end(net=net(3))
        callback.end(net=net(3))
    assert signal.getsignal(signal.SIGUSR1) == before
    expected = {
        "ckpt": ["net-1_2.ckpt", "net-1_3.ckpt"],
        "distckpt": ["step-00000002", "step-00000003"],
    }
    assert listed("ckpt" if form == "ckpt" else "ckpt/net")[-2:] == expected[form]


@both
def test_mindspores_own_loop_is_stopped(form):
    config = CheckpointConfig(100, format=form)
    callback = ModelCheckpoint("net", "ckpt", config, stop_signals=[signal.SIGUSR1])
    told = RunContext(cur_step_num=1, cur_epoch_num=1, batch_num=3, train_network=net())
    with callback:
        callback.on_train_begin(told)
        signal.raise_signal(signal.SIGUSR1)
        callback.on_train_step_end(told)
        assert told.stopped
        callback.on_train_end(told)


@both
def test_the_end_of_the_time_stops_the_training(form):
    config = CheckpointConfig(100, format=form)
    with ModelCheckpoint("net", "ckpt", config, max_seconds=1e-9) as callback:
        callback.step_end(net=net(1))
        assert callback.should_stop()
        callback.end()
    assert callback.latest_ckpt_file_name


# ------------------------------------------------------------------------------------------ files


class Full(AbstractFileSystem):
    """A disk on which nothing has room."""

    protocol = "fulldisk-managed"

    def ls(self, path, detail=True, **kwargs):
        return []

    def _open(self, path, mode="rb", **kwargs):
        raise OSError("no space left on device")

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        raise OSError("no space left on device")


@pytest.mark.parametrize("background", [False, True])
def test_a_file_that_fails_is_told_and_raised(background):
    fsspec.register_implementation(Full.protocol, Full, clobber=True)
    told = []
    config = CheckpointConfig(async_save=background)
    callback = ModelCheckpoint("net", f"{Full.protocol}://x", config, on_event=told.append)
    with pytest.raises(StoreError, match="no space left"):  # noqa: PT012  whoever waits raises it
        callback.step_end(net=net())
        callback.end()
    assert [each.kind for each in told] == ["save_begun", "save_failed"]
    assert "no space left" in told[1].values["error"]
    assert callback.latest_ckpt_file_name == ""


def test_files_have_no_load_latest_into():
    with pytest.raises(TypeError, match="load_checkpoint"):
        ModelCheckpoint("net", "ckpt").load_latest_into(net())


# ------------------------------------------------------------------- checkpoints, by a Manager


def test_a_managers_checkpoints_are_made_kept_and_resumed():
    config = managed(save_checkpoint_steps=2, keep_checkpoint_max=2, append_info=["epoch_num"])
    with ModelCheckpoint("net", "ckpt", config) as callback:
        assert callback.load_latest_into(net(), default=0) == 0
        for value in range(1, 8):
            callback.step_end(net=net(value), epoch=(value + 2) // 3)
    assert listed("ckpt/net") == ["step-00000004", "step-00000006"]
    assert distckpt.open("ckpt/net/step-00000006").metadata["epoch_num"] == 2

    found = net()
    with ModelCheckpoint("net", "ckpt", config) as callback:
        assert callback.load_latest_into(found) == 6
        assert found["a"].tolist() == [6, 6]
        callback.epoch_end()
        callback.step_end(net=net(7))
        callback.step_end(net=net(8))
        callback.end()
    assert listed("ckpt/net") == ["step-00000006", "step-00000008"]
    told = distckpt.open("ckpt/net/step-00000008").metadata
    assert (told["cur_epoch_num"], told["step_in_epoch"]) == (3, 2)


def test_without_a_checkpoint_the_default_counts_or_it_is_an_error():
    callback = ModelCheckpoint("net", "ckpt", managed())
    with pytest.raises(CheckpointNotFound):
        callback.load_latest_into(net())
    assert callback.load_latest_into(net(), default=40) == 40
    callback.step_end(net=net())
    callback.end()
    assert listed("ckpt/net") == ["step-00000041"]


def test_the_newest_damaged_checkpoint_is_passed_over():
    with ModelCheckpoint("net", "ckpt", managed()) as callback:
        for value in (1, 2):
            callback.step_end(net=net(value))
    for path in Path("ckpt/net/step-00000002").glob("shard-*"):
        content = bytearray(path.read_bytes())
        content[5000 % len(content)] ^= 1
        path.write_bytes(content)
    found = net()
    assert ModelCheckpoint("net", "ckpt", managed()).load_latest_into(found) == 1
    assert found["b"].tolist() == [1, 1, 1]


def test_four_ranks_save_together_and_two_go_on(mpirun, tmp_path):
    job = [Path(__file__).parent / "mpi" / "jobs.py", "train_with_mindspores_callback", tmp_path]
    for ranks, begin, steps in ((4, 0, 4), (2, 4, 3), (1, 7, 1)):
        ended = mpirun(ranks, *job, begin, steps)
        assert ended.status == 0, ended.output
    assert listed(tmp_path / "net") == ["step-00000007", "step-00000008"]
    saved = distckpt.open(tmp_path / "net" / "step-00000008")
    assert (saved["w"][:] == 8 * np.arange(50.0 * 7).reshape(50, 7)).all()
    assert distckpt.open(tmp_path / "net" / "step-00000007").ranks == 2


@pytest.mark.parametrize("background", [True, False])
def test_a_save_that_is_not_asynchronous_is_durable_on_return(background):
    callback = ModelCheckpoint("net", "ckpt", managed(async_save=background))
    pending = callback.step_end(net=net())
    assert background or pending.done()
    callback.end()
    assert callback.latest_ckpt_file_name.endswith("ckpt/net/step-00000001")


def test_a_list_of_parameters_and_a_saved_network_are_saved_by_name():
    saved = [{"name": "x", "data": np.ones(2)}]
    callback = ModelCheckpoint("net", "ckpt", managed(saved_network=saved))
    callback.step_end(net=net())
    callback.end()
    assert distckpt.load("ckpt/net/step-00000001")["x"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "options",
    [
        {"enc_key": bytes(16)},
        {"crc_check": True},
        {"exception_save": True},
        {"append_info": [{"table": np.ones(3)}]},
    ],
)
def test_what_only_files_have_is_refused(options):
    with pytest.raises(ValueError, match="format='distckpt' does not go with"):
        managed(**options)


@pytest.mark.parametrize("place", [("net", lambda _: "ckpt"), (lambda _: "net", "ckpt")])
def test_a_run_has_one_folder(place):
    with pytest.raises(TypeError, match="a run has one folder"):
        ModelCheckpoint(*place, managed())
