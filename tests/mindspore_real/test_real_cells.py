"""Real cells and real trainings; our files in MindSpore, and its in distckpt."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest

ms = pytest.importorskip("mindspore")

import mindspore.dataset  # noqa: E402

import distckpt  # noqa: E402
from distckpt import mindspore as ours  # noqa: E402

nn = ms.nn
KEY = bytes(range(16))


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Net(nn.Cell):
    """A cell with moving statistics and a parameter that two layers share."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.first = nn.Dense(4, 4, has_bias=False)
        self.second = nn.Dense(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Dense(4, 3)

    def construct(self, x):
        return self.head(self.second(self.first(self.norm(x))))


class Wrapped(nn.Cell):
    """Puts ``net.`` before all names."""

    def __init__(self):
        super().__init__()
        self.net = Net()


NAMES = [
    "norm.moving_mean",
    "norm.moving_variance",
    "norm.gamma",
    "norm.beta",
    "first.weight",
    "second.bias",
    "head.weight",
    "head.bias",
]


def listed(folder="."):
    return sorted(path.name for path in Path(folder).iterdir())


def numbered(cell):
    for number, parameter in enumerate(cell.get_parameters()):
        array = np.arange(parameter.size, dtype=np.float32).reshape(parameter.shape)
        parameter.set_data(ms.Tensor(array + 100 * number))
    return cell


def arrays(found):
    items = found.items() if isinstance(found, dict) else found.parameters_dict().items()
    return {
        name: value if isinstance(value, str) else np.array(value.asnumpy())
        for name, value in items
    }


def assert_equal(found, expected):
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
        assert np.asarray(found[name]).shape == np.asarray(array).shape


def trained(callbacks, *, epochs=2, net=None, fit=False):
    """Train 8 steps an epoch."""
    net = net or Net()
    samples = {
        "x": np.random.default_rng(0).random((32, 4), np.float32),
        "y": np.arange(32, dtype=np.int32) % 3,
    }
    dataset = mindspore.dataset.NumpySlicesDataset(samples, shuffle=False).batch(4)
    loss = nn.SoftmaxCrossEntropyWithLogits(sparse=True, reduction="mean")
    optimizer = nn.Momentum(net.trainable_params(), 0.01, 0.9)
    model = ms.train.Model(net, loss, optimizer, metrics={"accuracy"})
    if fit:
        model.fit(epochs, dataset, dataset, callbacks=callbacks, dataset_sink_mode=False)
    else:
        model.train(epochs, dataset, callbacks=callbacks, dataset_sink_mode=False)
    return net


@pytest.mark.parametrize("name", ["save_checkpoint", "load_checkpoint", "load_param_into_net"])
def test_functions_have_the_real_signatures(name):
    real, own = (inspect.signature(getattr(each, name)).parameters for each in (ms, ours))
    assert [(p.name, p.default) for p in own.values() if p.kind is not p.KEYWORD_ONLY] == [
        (p.name, p.default) for p in real.values()
    ]


@pytest.mark.parametrize("name", ["CheckpointConfig", "ModelCheckpoint"])
def test_classes_have_the_real_signatures(name):
    real, own = (
        inspect.signature(each.__init__).parameters
        for each in (getattr(ms.train, name), getattr(ours, name))
    )
    assert [(p.name, p.default) for p in own.values() if p.kind is not p.KEYWORD_ONLY] == [
        (p.name, p.default) for p in real.values()
    ]


def test_tensors_and_parameters_are_the_real_ones():
    assert ours.Tensor is ms.Tensor
    assert ours.Parameter is ms.Parameter
    ours.save_checkpoint(Net(), "net.ckpt")
    found = ours.load_checkpoint("net.ckpt")
    assert all(isinstance(each, ms.Parameter) for each in found.values())


# ------------------------------------------------------------------------------------ whole cells


def test_a_cell_is_saved_whole_and_loaded_strictly():
    net = numbered(Net())
    ours.save_checkpoint(net, "net.ckpt")
    found = ours.load_checkpoint("net.ckpt")
    assert list(found) == [each.name for each in net.get_parameters()]
    assert sorted(found) == sorted(NAMES)
    target = Net()
    assert ours.load_param_into_net(target, found, strict_load=True) == ([], [])
    assert_equal(arrays(target), arrays(net))


def test_a_cell_is_loaded_by_suffix_in_both_directions():
    net, wrapped = numbered(Net()), numbered(Wrapped())
    ours.save_checkpoint(net, "net.ckpt")
    ours.save_checkpoint(wrapped, "wrapped.ckpt")
    into_wrapped, into_net = Wrapped(), Net()
    assert ours.load_param_into_net(into_wrapped, ours.load_checkpoint("net.ckpt")) == ([], [])
    assert ours.load_param_into_net(into_net, ours.load_checkpoint("wrapped.ckpt")) == ([], [])
    assert_equal(arrays(into_wrapped), arrays(wrapped))
    assert_equal(arrays(into_net), arrays(net))


def test_a_strict_load_by_other_names_leaves_the_cell_and_names_all():
    ours.save_checkpoint(numbered(Net()), "net.ckpt")
    target = Wrapped()
    before = arrays(target)
    missing, unused = ours.load_param_into_net(target, ours.load_checkpoint("net.ckpt"), True)
    assert missing == [f"net.{name}" for name in unused]
    assert_equal(arrays(target), before)


def test_a_parameter_that_does_not_fit_leaves_the_cell_unchanged():
    found = ours.load_checkpoint(_saved(numbered(Net())))
    found["head.bias"] = ms.Tensor(np.ones(5, np.float32))
    target = Net()
    before = arrays(target)
    with pytest.raises(RuntimeError, match=r"'head\.bias': wants shape \(3,\), saved is \(5,\)"):
        ours.load_param_into_net(target, found)
    assert_equal(arrays(target), before)


def test_a_cell_of_another_float_takes_what_fits():
    found = ours.load_checkpoint(_saved(numbered(Net())))
    target = Net()
    for each in target.get_parameters():
        each.set_dtype(ms.bfloat16)
    assert ours.load_param_into_net(target, found) == ([], [])
    for each in target.get_parameters():
        assert each.dtype == ms.bfloat16
        expected = found[each.name].astype(ms.bfloat16).float().asnumpy()
        np.testing.assert_array_equal(each.float().asnumpy(), expected)


def _saved(net):
    ours.save_checkpoint(net, "net.ckpt")
    return "net.ckpt"


# ------------------------------------------------------------------------------ files, both ways

FILES = [
    pytest.param({}, {}, id="plain"),
    pytest.param({"crc_check": True}, {"crc_check": True}, id="crc"),
    pytest.param({"async_save": True}, {}, id="async"),
    pytest.param({"enc_key": KEY}, {"dec_key": KEY}, id="AES-GCM"),
    pytest.param(
        {"enc_key": KEY, "enc_mode": "AES-CBC"},
        {"dec_key": KEY, "dec_mode": "AES-CBC"},
        id="AES-CBC",
    ),
    pytest.param(
        {"enc_key": KEY, "enc_mode": "SM4-CBC"},
        {"dec_key": KEY, "dec_mode": "SM4-CBC"},
        id="SM4-CBC",
    ),
    pytest.param({"format": "safetensors"}, {"format": "safetensors"}, id="safetensors"),
]


@pytest.mark.parametrize(("save", "load"), FILES)
def test_our_files_load_in_mindspore(save, load):
    net = numbered(Net())
    pending = ours.save_checkpoint(net, "net", **save)
    if pending is not None:
        pending.wait()
    (name,) = listed()
    assert_equal(arrays(ms.load_checkpoint(name, **load)), arrays(net))
    target = Net()
    assert ms.load_param_into_net(target, ms.load_checkpoint(name, **load), True) == ([], [])


@pytest.mark.parametrize(("save", "load"), FILES)
def test_mindspores_files_load_in_ours(save, load):
    net = numbered(Net())
    ms.save_checkpoint(net, "net", **{**save, "async_save": False})
    (name,) = listed()
    assert_equal(arrays(ours.load_checkpoint(name, **load)), arrays(net))


@pytest.mark.parametrize("way", ["ours in MindSpore", "MindSpore's in ours"])
def test_all_dtypes_numbers_and_texts_cross(way):
    save, load = (ours, ms) if way == "ours in MindSpore" else (ms, ours)
    plain = ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
    items = {
        name: np.array([[0, 1, 1]], name) for name in [*plain, "float16", "float32", "float64"]
    }
    items["scalar"] = np.array(3, np.int32)
    state = [{"name": name, "data": ms.Tensor(array)} for name, array in items.items()]
    state.append({"name": "bf16", "data": ms.Tensor([1.5, -2]).astype(ms.bfloat16)})
    more = {"epoch": 3, "loss": 0.25, "done": True, "note": "naïve", "empty": ""}
    save.save_checkpoint(state, "net.ckpt", append_dict=more)
    found = load.load_checkpoint("net.ckpt")
    for name, array in items.items():
        assert found[name].asnumpy().dtype == array.dtype
        assert found[name].shape == array.shape
        np.testing.assert_array_equal(found[name].asnumpy(), array)
    assert found["bf16"].dtype == ms.bfloat16
    assert found["bf16"].float().asnumpy().tolist() == [1.5, -2]
    assert (found["note"], found["empty"]) == ("naïve", "")
    assert (found["epoch"].dtype, found["loss"].dtype) == (ms.int64, ms.float32)
    assert found["done"].dtype == ms.bool_


def test_what_we_loaded_goes_into_a_cell_by_mindspores_own_function():
    net, target = numbered(Net()), Net()
    found = ours.load_checkpoint(_saved(net))
    assert ms.load_param_into_net(target, found, strict_load=True) == ([], [])
    assert_equal(arrays(target), arrays(net))


# --------------------------------------------------------------------------------------- training


def test_a_training_saves_the_optimizer_too():
    config = ours.CheckpointConfig(5, keep_checkpoint_max=2, append_info=["epoch_num", "step_num"])
    callback = ours.ModelCheckpoint("net", "ckpt", config)
    assert isinstance(callback, ms.train.Callback)
    assert isinstance(callback, ours.ModelCheckpoint)
    net = trained(callback)
    # Of steps 5, 10, 15, and the last.
    assert listed("ckpt") == ["net-2_7.ckpt", "net-2_8.ckpt"]
    found = ours.load_checkpoint(callback.latest_ckpt_file_name)
    assert {"moments.head.bias", "learning_rate", "global_step"} <= set(found)
    assert (found["epoch_num"].asnumpy(), found["step_num"].asnumpy()) == (2, 16)
    assert_equal({name: each for name, each in arrays(found).items() if name in NAMES}, arrays(net))


def test_a_training_saves_the_saved_network_only():
    net = Net()
    config = ours.CheckpointConfig(saved_network=net, async_save=True, keep_checkpoint_max=3)
    callback = ours.ModelCheckpoint(prefix="net", directory="ckpt", config=config)
    trained([callback], net=net)
    assert listed("ckpt") == ["net-2_6.ckpt", "net-2_7.ckpt", "net-2_8.ckpt"]
    assert_equal(arrays(ms.load_checkpoint("ckpt/net-2_8.ckpt")), arrays(net))


def test_an_evaluation_saves_nothing():
    callback = ours.ModelCheckpoint("net", "ckpt", ours.CheckpointConfig(4, keep_checkpoint_max=99))
    trained([callback], fit=True)
    assert listed("ckpt") == [
        "net-1_4.ckpt",
        "net-1_8.ckpt",
        "net-2_4.ckpt",
        "net-2_8.ckpt",
    ]


class Breaks(ms.train.Callback):
    """Ends a training at its third step."""

    def on_train_step_end(self, run_context):
        if run_context.original_args().cur_step_num == 3:
            raise ArithmeticError("a fault in the training")


def test_a_training_that_breaks_is_saved_and_goes_on_from_there():
    net = Net()
    config = ours.CheckpointConfig(100, exception_save=True, saved_network=net)
    callback = ours.ModelCheckpoint("net", "ckpt", config)
    with pytest.raises(ArithmeticError):
        trained([Breaks(), callback], net=net)
    assert listed("ckpt") == ["net-1_3_breakpoint.ckpt"]
    target = Net()
    found = ours.load_checkpoint("ckpt/net-1_3_breakpoint.ckpt")
    assert ours.load_param_into_net(target, found, strict_load=True) == ([], [])
    assert_equal(arrays(target), arrays(net))


def test_the_real_callback_and_ours_name_files_alike():
    config = {"save_checkpoint_steps": 3, "keep_checkpoint_max": 4}
    trained(
        [
            ours.ModelCheckpoint("net", "ours", ours.CheckpointConfig(**config)),
            ms.train.ModelCheckpoint("net", "real", ms.train.CheckpointConfig(**config)),
        ]
    )
    real = [name for name in listed("real") if name.endswith(".ckpt")]
    assert listed("ours") == sorted(real)
    for name in real:
        assert_equal(
            arrays(ours.load_checkpoint(f"ours/{name}")), arrays(ms.load_checkpoint(f"real/{name}"))
        )


def test_two_parameters_of_one_name_are_refused():
    class Twice(nn.Cell):
        def __init__(self):
            super().__init__()
            self.a = ms.Parameter(ms.Tensor(np.ones(2, np.float32)), name="a")
            self.b = ms.Parameter(ms.Tensor(np.ones(2, np.float32)), name="b")

    cell = Twice()
    cell.b.name = "a"
    with pytest.raises(distckpt.LayoutError, match="two parameters of this Twice have this name"):
        distckpt.plan(cell)


def test_a_cell_is_a_net_of_distckpt_itself():
    net = Net()
    for number, parameter in enumerate(net.get_parameters()):
        parameter.set_data(ms.Tensor(np.full(parameter.shape, number + 1, np.float32)))
    distckpt.save("run", {"net": net, "epoch": 3})
    other = {"net": Net(), "epoch": 0}
    report = distckpt.load_into("run", other, strict=True)
    assert report.net is other
    assert other["epoch"] == 3
    for before, after in zip(net.get_parameters(), other["net"].get_parameters(), strict=True):
        assert np.array_equal(before.asnumpy(), after.asnumpy())
    wrapped = Wrapped()
    distckpt.save("plain", net)
    report = distckpt.load_into("plain", wrapped)
    assert report.loaded["net.head.bias"] == "head.bias"
    assert np.array_equal(wrapped.net.head.bias.asnumpy(), net.head.bias.asnumpy())


def test_a_bfloat16_parameter_is_saved_and_loaded_bit_for_bit():
    class Half(nn.Cell):
        def __init__(self, value):
            super().__init__()
            self.w = ms.Parameter(ms.Tensor(np.array(value), ms.bfloat16), name="w")

    distckpt.save("half", Half([1.5, -3.0]))
    cell = Half([0.0, 0.0])
    distckpt.load_into("half", cell, strict=True)
    assert cell.w.dtype == ms.bfloat16
    assert cell.w.asnumpy().astype(np.float32).tolist() == [1.5, -3.0]
