"""MindSpore's functions: signatures, names of files, arguments, and what drives the callback."""

from __future__ import annotations

import copy
import doctest
import inspect
import itertools
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt import mindspore
from distckpt.errors import CorruptCheckpoint, LayoutError, UnsupportedFormat
from distckpt.mindspore import (
    CheckpointConfig,
    ModelCheckpoint,
    Parameter,
    Parameters,
    Tensor,
    load_checkpoint,
    load_param_into_net,
    save_checkpoint,
)
from distckpt.mindspore.progress import free_prefix
from distckpt.policy import Entry, Moment

KEY = bytes(range(16))


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def net(value=0.0):
    return {"a": np.full(2, value, np.float32), "b": np.full(3, value, np.float32)}


def listed(folder="."):
    return sorted(path.name for path in Path(folder).iterdir())


def files():
    return listed("ckpt")


# ----------------------------------------------------------------------------------- signatures

# MindSpore 2.10's.
SIGNATURES = {
    save_checkpoint: (
        "save_obj ckpt_file_name integrated_save=True async_save=False append_dict=None "
        "enc_key=None enc_mode='AES-GCM' choice_func=None crc_check=False format='ckpt' kwargs"
    ),
    load_checkpoint: (
        "ckpt_file_name net=None strict_load=False filter_prefix=None dec_key=None "
        "dec_mode='AES-GCM' specify_prefix=None choice_func=None crc_check=False "
        "remove_redundancy=False format='ckpt'"
    ),
    load_param_into_net: "net parameter_dict strict_load=False remove_redundancy=False",
    CheckpointConfig: (
        "save_checkpoint_steps=1 save_checkpoint_seconds=0 keep_checkpoint_max=5 "
        "keep_checkpoint_per_n_minutes=0 integrated_save=True async_save=False saved_network=None "
        "append_info=None enc_key=None enc_mode='AES-GCM' exception_save=False crc_check=False "
        "remove_redundancy=False format='ckpt' kwargs"
    ),
    ModelCheckpoint.__init__: "self prefix='CKP' directory=None config=None",
}


@pytest.mark.parametrize("function", SIGNATURES)
def test_signatures_are_mindspores(function):
    parameters = inspect.signature(function).parameters.values()
    found = [
        each.name if each.default is each.empty else f"{each.name}={each.default!r}"
        for each in parameters
        if each.kind is not each.KEYWORD_ONLY
    ]
    assert " ".join(found) == SIGNATURES[function]


def test_nothing_imports_mindspore():
    program = "import sys, distckpt.mindspore as m; m.Tensor(1); print('mindspore' in sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ended.stdout == "False\n"


@pytest.mark.parametrize("name", ["values", "config", "progress"])
def test_examples_in_docstrings_run(name):
    module = sys.modules[f"distckpt.mindspore.{name}"]
    assert doctest.testmod(module).attempted
    assert not doctest.testmod(module).failed


# ---------------------------------------------------------------------------- tensors, parameters


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (10, "int64"),
        (0.5, "float32"),
        (True, "bool"),
        ([1.5, 2], "float32"),
        (np.float64(1), "float64"),
    ],
)
def test_a_tensor_of_a_number_has_the_dtype_that_mindspore_gives(value, dtype):
    assert Tensor(value).dtype == dtype
    assert (Tensor(value).asnumpy() == value).all()


@pytest.mark.parametrize("value", ["text", None, {}, [[1], [2, 3]], ["a"], 1 << 70])
def test_what_is_no_array_of_numbers_makes_no_tensor(value):
    with pytest.raises((TypeError, OverflowError)):
        Tensor(value)


def test_a_parameter_is_a_named_array():
    parameter = Parameter(Tensor(np.arange(3)), name="w", requires_grad=False)
    assert (parameter.name, parameter.shape, parameter.requires_grad) == ("w", (3,), False)
    assert parameter.data.asnumpy().tolist() == [0, 1, 2]
    assert np.asarray(parameter).tolist() == [0, 1, 2]
    parameter.set_data(Tensor(np.array([4, 5, 6])))
    assert parameter.asnumpy().tolist() == [4, 5, 6]
    with pytest.raises(ValueError, match="has shape"):
        parameter.set_data(np.zeros(2, int))
    with pytest.raises(TypeError, match="int64; it can't take float64"):
        parameter.set_data(np.zeros(3))


def test_parameters_in_a_net_are_filled_where_they_are():
    parameter = Parameter(np.zeros(2, np.float32), "w")
    load_param_into_net({"w": parameter}, {"w": np.ones(2, np.float64)})
    assert parameter.asnumpy().tolist() == [1, 1]
    assert parameter.dtype == np.float32


def test_loaded_parameters_are_edited_by_name_or_by_position():
    params = Parameters(a=1, b=2, c=3)
    assert (params["a"], params[0]["name"], params[-1]["data"]) == (1, "a", 3)
    params[1] = {"name": "x", "data": 5}
    del params[0]
    del params["c"]
    params.append({"name": "d", "data": 4})
    assert params == {"x": 5, "d": 4}
    assert isinstance(params, dict)
    assert repr(params[0]) == "{'name': 'x', 'data': 5}"


def test_two_loaded_parameters_never_have_one_name():
    params = Parameters(a=1, b=2)
    with pytest.raises(LayoutError, match="there already"):
        params.append({"name": "b", "data": 3})
    with pytest.raises(KeyError, match="that no other has"):
        params[0]["name"] = "b"
    with pytest.raises(IndexError):
        del params[2]


# ---------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize(
    "state",
    [
        pytest.param([Parameter(np.ones(2), "a"), Parameter(np.ones(3), "b")], id="parameters"),
        pytest.param(
            [{"name": "a", "data": Tensor(np.ones(2)), "x": 1}, {"name": "b", "data": np.ones(3)}],
            id="list",
        ),
        pytest.param({"a": np.ones(2), "b": Parameter(np.ones(3), "another name")}, id="dict"),
    ],
)
def test_all_kinds_of_states_are_saved(state):
    save_checkpoint(state, "net.ckpt")
    found = load_checkpoint("net.ckpt")
    assert {name: each.shape for name, each in found.items()} == {"a": (2,), "b": (3,)}
    assert [each.name for each in found.values()] == ["a", "b"]


def test_a_dataclass_of_arrays_is_saved_and_loaded():
    @dataclass
    class Layer:
        weight: np.ndarray = field(default_factory=lambda: np.ones(2, ml_dtypes.bfloat16))
        steps: int = 3
        rate: float = 0.5

    save_checkpoint({"layer": Layer()}, "net.ckpt")
    target = Layer(np.zeros(2, ml_dtypes.bfloat16), 0, 0.0)
    assert load_param_into_net({"layer": target}, load_checkpoint("net.ckpt")) == ([], [])
    assert (target.weight.tolist(), target.steps, target.rate) == ([1, 1], 3, 0.5)


def test_immutable_nets_are_refused():
    with pytest.raises(RuntimeError, match="immutable container"):
        load_param_into_net({"t": (1, 2)}, {"t.0": np.int64(5)})


@pytest.mark.parametrize("state", [(np.ones(2),), None, "text", 5])
def test_what_is_no_state_is_a_type_error(state):
    with pytest.raises(TypeError, match="save_obj is a"):
        save_checkpoint(state, "net.ckpt")


@pytest.mark.parametrize(
    "state", [[Parameter(1, "a"), {"name": "b", "data": 1}], [1, 2], [np.ones(2)]]
)
def test_a_list_is_of_one_kind(state):
    with pytest.raises(TypeError, match="expected a list of Parameters"):
        save_checkpoint(state, "net.ckpt")


def test_append_dict_adds_numbers_and_texts():
    more = {"epoch": 3, "loss": 0.5, "done": True, "note": "ü", "t": Tensor([1.0])}
    save_checkpoint(net(), "net.ckpt", append_dict=more)
    found = load_checkpoint("net.ckpt")
    assert found["note"] == "ü"
    dtypes = {name: str(found[name].dtype) for name in ("epoch", "loss", "done", "t")}
    assert dtypes == {"epoch": "int64", "loss": "float32", "done": "bool", "t": "float32"}


@pytest.mark.parametrize("more", [[1], {"a2": None}, {1: 2}, {"big": 1 << 70}])
def test_append_dict_of_something_else_is_a_type_error(more):
    with pytest.raises(TypeError):
        save_checkpoint(net(), "net.ckpt", append_dict=more)
    assert not listed()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("net", "net.ckpt"),
        ("net.ckpt", "net.ckpt"),
        ("foockpt", "foockpt"),
        ("a.safetensors", "a.safetensors.ckpt"),
    ],
)
def test_the_format_is_appended_to_a_files_name(given, expected):
    save_checkpoint(net(), given)
    assert listed() == [expected]


def test_a_folder_that_is_missing_or_in_the_way_is_an_error():
    with pytest.raises(FileNotFoundError, match="its folder does not exist"):
        save_checkpoint(net(), "nowhere/net.ckpt")
    Path("net.ckpt").mkdir()
    with pytest.raises(IsADirectoryError):
        save_checkpoint(net(), "net.ckpt")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"async_save": "zz"}, ValueError),
        ({"async_save": 1}, TypeError),
        ({"integrated_save": 1}, TypeError),
        ({"crc_check": "yes"}, TypeError),
        ({"enc_key": "text"}, TypeError),
        ({"format": "pth"}, ValueError),
        ({"format": "safetensors", "enc_key": KEY}, ValueError),
        ({"remove_redundancy": True}, TypeError),
        ({"incremental": True}, TypeError),
        ({"unknown": 1}, TypeError),
    ],
)
def test_wrong_arguments_of_a_save_are_refused(arguments, error):
    with pytest.raises(error):
        save_checkpoint(net(), "net", **arguments)
    assert not listed()


@pytest.mark.parametrize("how", [True, "thread", "process"])
def test_asynchronous_saves_of_all_kinds_are_waited_for(how):
    first = save_checkpoint(net(1), "a.ckpt", async_save=how)
    second = save_checkpoint(net(2), "b.ckpt", async_save=how)
    assert first.done()  # one at a time
    assert Path(second.wait(timeout_s=60)).name == "b.ckpt"
    assert repr(second).endswith("b.ckpt' saved>")


def test_a_load_waits_for_the_save_in_flight():
    save_checkpoint(net(1), "a.ckpt", async_save=True)
    assert load_checkpoint("a.ckpt")["a"].asnumpy().tolist() == [1, 1]


@pytest.mark.parametrize("mode", ["AES-GCM", "AES-CBC", "SM4-CBC"])
def test_encrypted_files_come_back_with_their_key_only(mode):
    save_checkpoint(net(3), "net.ckpt", enc_key=KEY, enc_mode=mode)
    assert load_checkpoint("net.ckpt", dec_key=KEY, dec_mode=mode)["a"].asnumpy().tolist() == [3, 3]
    with pytest.raises(UnsupportedFormat, match="encrypted"):
        load_checkpoint("net.ckpt")
    with pytest.raises(CorruptCheckpoint):
        load_checkpoint("net.ckpt", dec_key=KEY[::-1], dec_mode=mode)


# --------------------------------------------------------------------------------------- loading


def test_a_net_is_loaded_into_at_once():
    save_checkpoint(net(3), "net.ckpt")
    target = net()
    found = load_checkpoint("net.ckpt", target)
    assert target["a"].tolist() == [3, 3]
    assert list(found) == ["a", "b"]


def test_what_is_missing_or_matched_by_suffix_is_logged(caplog):
    load_param_into_net({"net": net(), "z": np.zeros(1)}, net(1))
    assert "not loaded: z" in caplog.text
    assert "matched by suffix: net.a (from a), net.b (from b)" in caplog.text


def test_strict_loading_names_what_is_missing_and_converts_nothing():
    assert load_param_into_net(net(), {"x.a": np.ones(2)}, strict_load=True) == (
        ["a", "b"],
        ["x.a"],
    )
    with pytest.raises(RuntimeError, match="strict_load=True never converts"):
        load_param_into_net(net(), {"a": np.ones(2)}, strict_load=True)


def test_prefixes_choose_and_switch_choice_func_off():
    save_checkpoint({f"{x}.{y}": np.ones(1) for x in "pq" for y in "ab"}, "net.ckpt")

    def names(**how):
        return list(load_checkpoint("net.ckpt", **how))

    assert names(filter_prefix="p") == ["q.a", "q.b"]
    assert names(specify_prefix=["p", "q.a"]) == ["p.a", "p.b", "q.a"]
    assert names(specify_prefix="p", filter_prefix=("p.a",)) == ["p.b"]
    assert names(choice_func=lambda name: name.endswith("a")) == ["p.a", "q.a"]
    assert names(choice_func=lambda name: False, filter_prefix="p") == ["q.a", "q.b"]
    with pytest.raises(ValueError, match="choice_func accepts none"):
        names(choice_func=lambda name: False)
    with pytest.raises(ValueError, match="leave none of the 4 names"):
        names(specify_prefix="r")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"strict_load": 1}, TypeError),
        ({"crc_check": 1}, TypeError),
        ({"dec_key": "text"}, TypeError),
        ({"dec_mode": "zz"}, ValueError),
        ({"filter_prefix": [""]}, ValueError),
        ({"specify_prefix": 5}, TypeError),
        ({"remove_redundancy": True}, TypeError),
        ({"format": "safetensors"}, ValueError),
    ],
)
def test_wrong_arguments_of_a_load_are_refused(arguments, error):
    save_checkpoint(net(), "net.ckpt")
    with pytest.raises(error):
        load_checkpoint("net.ckpt", **arguments)


@pytest.mark.parametrize("params", [None, 5, {"a": None}, {"a": object()}])
def test_what_are_no_parameters_is_a_type_error(params):
    with pytest.raises(TypeError):
        load_param_into_net(net(), params)


def test_the_mark_of_a_cached_parameter_is_cut_off():
    save_checkpoint({"w.__param_key__3": np.ones(2)}, "net.ckpt")
    assert load_checkpoint("net.ckpt")["w"].name == "w"


def test_a_checksum_that_is_asked_for_and_missing_is_told(caplog):
    save_checkpoint(net(), "net.ckpt")
    load_checkpoint("net.ckpt", crc_check=True)
    assert "has no checksum" in caplog.text
    caplog.clear()
    save_checkpoint(net(), "net.ckpt", crc_check=True)
    load_checkpoint("net.ckpt", crc_check=True)
    assert not caplog.text


# --------------------------------------------------------------------------------- configuration


def test_steps_count_before_seconds_and_the_number_before_minutes():
    config = CheckpointConfig(10, 60, 3, 5)
    assert config.get_checkpoint_policy() == {
        "save_checkpoint_steps": 10,
        "save_checkpoint_seconds": None,
        "keep_checkpoint_max": 3,
        "keep_checkpoint_per_n_minutes": None,
        "saved_network": None,
    }
    assert CheckpointConfig(keep_checkpoint_max=0).keep_checkpoint_max == 1


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"save_checkpoint_steps": -1}, ValueError),
        ({"save_checkpoint_steps": 1.5}, TypeError),
        ({"keep_checkpoint_max": True}, TypeError),
        ({"save_checkpoint_steps": 0, "keep_checkpoint_max": None}, ValueError),
        ({"format": "safetensors", "enc_key": KEY}, ValueError),
        ({"format": "safetensors", "crc_check": True}, ValueError),
        ({"format": "safetensors", "exception_save": True}, ValueError),
        ({"format": "safetensors", "incremental": True}, TypeError),
        ({"async_save": "zz"}, ValueError),
        ({"append_info": "epoch_num"}, TypeError),
        ({"append_info": ["loss"]}, ValueError),
        ({"append_info": [{}, {}]}, TypeError),
        ({"append_info": [{1: 2}]}, TypeError),
        ({"append_info": [{"a": None}]}, TypeError),
        ({"append_info": [5]}, TypeError),
        ({"unknown": True}, TypeError),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(arguments, error):
    with pytest.raises(error):
        CheckpointConfig(**arguments)


def kept(times, config):
    """Which of the files, by number, the configuration's policy keeps."""
    return config.keep_policy().kept([Entry(*each) for each in enumerate(times)])


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30), st.integers(1, 9), st.integers(1, 99))
def test_a_number_of_the_newest_files_or_one_a_window_is_kept(times, count, minutes):
    times.sort()
    newest = kept(times, CheckpointConfig(keep_checkpoint_max=count))
    assert newest == set(range(max(0, len(times) - count), len(times)))
    windows = CheckpointConfig(keep_checkpoint_max=0, keep_checkpoint_per_n_minutes=minutes)
    found = sorted(kept(times, windows) - {len(times) - 1})
    assert all(times[b] - times[a] >= 60 * minutes for a, b in itertools.pairwise(found))


@given(st.lists(st.integers(0, 300), max_size=20))
def test_what_was_deleted_for_a_window_would_not_be_kept_later(gaps):
    times = np.cumsum(gaps).tolist()
    config = CheckpointConfig(keep_checkpoint_max=0, keep_checkpoint_per_n_minutes=2)
    on_disk = []
    for index, time_s in enumerate(times):  # as files are written one by one
        on_disk.append(Entry(index, time_s))
        keep = config.keep_policy().kept(on_disk) | {index}
        on_disk = [each for each in on_disk if each.step in keep]
    at_once = kept(times, config) | ({len(times) - 1} if times else set())
    assert {each.step for each in on_disk} == at_once


def test_steps_are_counted_from_the_last_save_and_seconds_only_where_steps_are_not():
    moment = Moment(9, now_s=9.0, last_step=0, last_save_s=0.0)
    assert not CheckpointConfig(10, 1).save_policy().due(moment)
    assert CheckpointConfig(9, 99).save_policy().due(moment)
    assert CheckpointConfig(0, 9).save_policy().due(moment)
    assert not CheckpointConfig(0, 10).save_policy().due(moment)
    assert CheckpointConfig(0, 0).save_policy() is None


# ---------------------------------------------------------------------------------- the callback


def test_a_loop_of_steps_and_epochs_names_files_by_both():
    config = CheckpointConfig(3, keep_checkpoint_max=100)
    with ModelCheckpoint("net", "ckpt", config) as callback:
        for _ in range(2):
            for _ in range(4):
                callback.step_end(net=net())
            callback.epoch_end()
        callback.end()
    assert files() == ["net-1_3.ckpt", "net-2_2.ckpt", "net-2_4.ckpt"]
    assert callback.latest_ckpt_file_name == str(Path("ckpt/net-2_4.ckpt").absolute())


def test_a_loop_of_epochs_only_counts_them_as_steps():
    callback = ModelCheckpoint("net", "ckpt", CheckpointConfig(2))
    for _ in range(5):
        callback.epoch_end(net=net())
    callback.end()
    assert files() == ["net-2_1.ckpt", "net-4_1.ckpt", "net-5_1.ckpt"]


def test_a_training_that_goes_on_gives_its_numbers():
    callback = ModelCheckpoint("net", "ckpt", CheckpointConfig(2))
    for step in range(101, 105):
        callback.step_end(net=net(), step=step, epoch=11 + (step - 101) // 2)
    assert files() == ["net-11_2.ckpt", "net-12_2.ckpt"]


def test_the_end_saves_nothing_twice():
    callback = ModelCheckpoint("net", "ckpt")
    callback.step_end(net=net(1))
    before = Path("ckpt/net-1_1.ckpt").stat().st_mtime_ns
    callback.end(net=net(2))
    assert Path("ckpt/net-1_1.ckpt").stat().st_mtime_ns == before


def test_a_callback_without_a_net_says_so():
    with pytest.raises(TypeError, match="pass net= to step_end"):
        ModelCheckpoint("net", "ckpt").step_end()


def test_an_earlier_runs_files_are_left_alone():
    for run in range(3):
        ModelCheckpoint("net", "ckpt", CheckpointConfig(keep_checkpoint_max=1)).step_end(
            net=net(run)
        )
    assert files() == ["net-1_1.ckpt", "net_1-1_1.ckpt", "net_2-1_1.ckpt"]


@pytest.mark.parametrize("prefix", ["a/b", 5, None])
def test_a_prefix_is_a_text_without_a_slash(prefix):
    with pytest.raises(ValueError, match="without '/'"):
        ModelCheckpoint(prefix)


def test_a_configuration_is_a_checkpoint_config():
    with pytest.raises(TypeError, match="expected a CheckpointConfig"):
        ModelCheckpoint("net", "ckpt", {"save_checkpoint_steps": 1})


def test_keywords_of_the_callback_do_not_change_the_configuration():
    config = CheckpointConfig()
    ModelCheckpoint("net", "ckpt", config, saved_network=net(), async_save=True)
    assert (config.saved_network, config.async_save) == (None, False)


def test_seconds_and_minutes_are_the_clocks():
    now = [0.0]
    config = CheckpointConfig(0, 30, 0, 1)
    callback = ModelCheckpoint("net", "ckpt", config, clock=lambda: now[0])
    for _ in range(20):
        now[0] += 10
        callback.step_end(net=net())
    assert files() == ["net-1_15.ckpt", "net-1_18.ckpt", "net-1_3.ckpt", "net-1_9.ckpt"]


def test_append_info_counts_epochs_and_steps():
    config = CheckpointConfig(append_info=["epoch_num", "step_num", {"step_num": 100, "who": "me"}])
    callback = ModelCheckpoint("net", "ckpt", config)
    callback.step_end(net=net())
    callback.step_end()
    found = load_checkpoint(callback.latest_ckpt_file_name)
    assert (found["epoch_num"].item(), found["step_num"].item(), found["who"]) == (1, 102, "me")


@pytest.mark.parametrize("options", [{"enc_key": KEY}, {"crc_check": True}, {"async_save": True}])
def test_the_configurations_options_reach_the_files(options):
    callback = ModelCheckpoint("net", "ckpt", CheckpointConfig(**options))
    for value in range(7):
        callback.step_end(net=net(value))
    callback.end()
    assert len(files()) == 5
    found = load_checkpoint(callback.latest_ckpt_file_name, dec_key=options.get("enc_key"))
    assert found["a"].asnumpy().tolist() == [6, 6]


def test_safetensors_and_urls_are_written_too():
    url = "memory://mindspore-callback"
    callback = ModelCheckpoint(
        "net", url, CheckpointConfig(format="safetensors", keep_checkpoint_max=1)
    )
    for _ in range(3):
        callback.step_end(net=net(4))
    assert callback.latest_ckpt_file_name == f"{url}/net-1_3.safetensors"
    found = load_checkpoint(f"{url}/net-1_3.safetensors", format="safetensors")
    assert found["a"].asnumpy().tolist() == [4, 4]
    with pytest.raises(FileNotFoundError):
        load_checkpoint(f"{url}/net-1_2.safetensors", format="safetensors")


def test_folders_may_depend_on_the_training():
    callback = ModelCheckpoint("net", lambda told: f"ckpt/epoch{told.cur_epoch_num}")
    for _ in range(2):
        callback.epoch_end(net=net())
    assert files() == ["epoch1", "epoch2"]
    assert listed("ckpt/epoch2") == ["net-2_1.ckpt"]


class RunContext:
    """What MindSpore hands a callback."""

    def __init__(self, **told):
        self._told = told

    def original_args(self):
        return self._told


def test_mindspores_context_drives_the_callback():
    callback = ModelCheckpoint("net", "ckpt", CheckpointConfig(2))
    callback.on_train_begin(RunContext(train_network=net()))
    for step in range(1, 6):
        told = RunContext(
            cur_step_num=step, cur_epoch_num=(step + 2) // 3, batch_num=3, train_network=net()
        )
        callback.on_train_step_end(told)
        callback.on_eval_step_end(told)
    callback.on_train_end(told)
    assert files() == ["net-1_2.ckpt", "net-2_1.ckpt", "net-2_2.ckpt"]


def test_a_second_training_with_one_callback_is_saved_from_its_first_step():
    callback = ModelCheckpoint("net", "ckpt", CheckpointConfig(2, keep_checkpoint_max=9))
    for epochs in (1, 2):
        callback.on_train_begin(RunContext(train_network=net()))
        for step in range(1, 3):
            told = RunContext(
                cur_step_num=step, cur_epoch_num=epochs, batch_num=2, train_network=net()
            )
            callback.on_train_step_end(told)
    assert files() == ["net-1_2.ckpt", "net-2_2.ckpt"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], "p"),
        (["p-1_1.ckpt"], "p_1"),
        (["p_1-1_1.safetensors", "p_10-1_1.ckpt"], "p_11"),
        (["p-1_1.txt", "pp-1_1.ckpt", "p-1.ckpt"], "p"),
    ],
)
def test_a_prefix_is_free_of_earlier_files(names, expected):
    assert free_prefix("p", names) == expected


def test_the_public_names_are_these():
    assert copy.copy(mindspore.__all__) == [
        "CheckpointConfig",
        "CheckpointFileNotFound",
        "ModelCheckpoint",
        "NetMismatch",
        "Parameter",
        "Parameters",
        "PendingSave",
        "Tensor",
        "build_searched_strategy",
        "load_checkpoint",
        "load_param_into_net",
        "merge_pipeline_strategys",
        "save_checkpoint",
        "transform_checkpoints",
    ]
    with pytest.raises(AttributeError, match="has no attribute"):
        mindspore.load  # noqa: B018
