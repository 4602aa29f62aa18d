"""Tensors, modules and optimizers of torch: saved, and loaded into where they are."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

import distckpt
from distckpt import dtypes
from distckpt.errors import LayoutError
from distckpt.frameworks import torch as door

_DTYPES = [
    "bool",
    "uint8",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
    "complex64",
    "complex128",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
]


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def net():
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2, bias=False)
    )


def trained(model, steps=2, make=torch.optim.AdamW):
    optimizer = make(model.parameters(), lr=0.01)
    for _ in range(steps):
        model(torch.ones(5, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def run(owner):
    model, optimizer = owner
    losses = []
    for _ in range(3):
        loss = (model(torch.arange(15.0).reshape(5, 3)) - 1).square().sum()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


# ------------------------------------------------------------------------------------------ tensors


@pytest.mark.parametrize("name", _DTYPES)
def test_every_dtype_goes_to_numpy_and_back_bit_for_bit(name):
    tensor = torch.arange(6).to(getattr(torch, name)).reshape(2, 3)
    array = door.as_array(tensor)
    assert array.dtype == dtypes.BY_NAME[name].numpy
    assert array.tobytes() == bits(tensor)
    kept = torch.zeros_like(tensor)
    door.put(kept, array)
    assert bits(kept) == bits(tensor)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float8_e5m2"])
def test_the_array_shares_the_tensors_memory(name):
    tensor = torch.nn.Parameter(torch.zeros(2, 3, dtype=getattr(torch, name)), requires_grad=False)
    assert door.in_place(tensor)
    door.as_array(tensor.T)[2, 1] = 1.5
    assert tensor[1, 2] == 1.5


def test_conjugated_and_negated_views_are_resolved():
    tensor = torch.tensor([1 + 2j, 3 - 4j])
    assert door.as_array(tensor.conj()).tolist() == [1 - 2j, 3 + 4j]
    assert door.as_array(tensor.conj().imag).tolist() == [-2, 4]
    assert not door.in_place(tensor.conj())
    assert not door.in_place(tensor.conj().imag)


def test_an_expanded_tensor_is_not_filled_in_place():
    assert not door.in_place(torch.zeros(1).expand(4))
    assert door.in_place(torch.zeros(1, 4).expand(1, 4))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: torch.zeros(3).to_sparse(), "sparse_coo"),
        (lambda: torch.zeros(3, device="meta"), "meta"),
        (torch.nn.parameter.UninitializedParameter, "lazy"),
    ],
    ids=["sparse", "meta", "lazy"],
)
def test_what_is_no_array_is_refused_by_its_kind(make, said):
    tensor = make()
    with pytest.raises(TypeError, match=said):
        door.as_array(tensor)
    assert not door.in_place(tensor)
    with pytest.raises(LayoutError, match=f"'w'.*{said}"):
        distckpt.plan({"w": tensor})


def test_an_array_of_any_order_is_put():
    tensor = torch.zeros(3, 2)
    frozen = np.arange(6, dtype=">f4").reshape(2, 3).T[::-1]
    frozen.flags.writeable = False
    door.put(tensor, frozen)
    assert tensor.tolist() == frozen.tolist()
    door.put(tensor, np.asfortranarray(frozen.astype("<f4")))
    assert tensor.tolist() == frozen.tolist()
    with pytest.raises(ValueError, match="shape"):
        door.put(tensor, np.zeros(2, "f4"))


def test_a_parameter_that_wants_gradients_is_put_without_them():
    parameter = torch.nn.Parameter(torch.zeros(2))
    door.put(parameter, np.ones(2, "f4"))
    assert parameter.requires_grad
    assert parameter.is_leaf
    assert parameter.tolist() == [1, 1]


def test_nothing_is_torchs_where_torch_is_not_imported():
    program = (
        "import sys; from distckpt.frameworks import torch as door;"
        "assert not door.is_tensor(1) and not door.is_module(1) and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# ------------------------------------------------------------------------------------------ modules


def test_a_module_has_the_names_and_the_order_of_its_state_dict():
    model = net()
    model.register_buffer("hidden", torch.zeros(1), persistent=False)
    model.register_parameter("absent", None)
    assert [*door.as_net(model).tensors()] == [*model.state_dict()]


def test_a_module_is_saved_and_loaded_where_it_is(tmp_path):
    model, other = net(), net()
    trained(model)
    distckpt.save(tmp_path / "c", model)
    places = {name: tensor.data_ptr() for name, tensor in other.state_dict().items()}
    distckpt.load_into(tmp_path / "c", other, strict=True)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
        assert tensor.data_ptr() == places[name]


def test_hooks_do_not_run():
    model = net()
    model.register_state_dict_pre_hook(lambda *_: pytest.fail("a hook ran"))
    model._register_state_dict_hook(lambda *_: pytest.fail("a hook ran"))
    assert len(door.as_net(model).tensors()) == 8


def test_tied_parameters_have_all_their_names(tmp_path):
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    assert [*door.as_net(model).tensors()] == ["a.weight", "a.bias", "b.weight", "b.bias"]
    distckpt.save(tmp_path / "c", model)
    saved = model["a"].weight.detach().clone()
    with torch.no_grad():
        model["a"].weight.zero_()
    distckpt.load_into(tmp_path / "c", model, strict=True)
    assert torch.equal(model["b"].weight, saved)


class Counting(torch.nn.Module):
    """A module with an extra state."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def get_extra_state(self):
        return self.count

    def set_extra_state(self, state):
        self.count = state


def test_extra_state_that_is_plain_is_saved_and_loaded(tmp_path):
    distckpt.save(tmp_path / "c", {"net": torch.nn.Sequential(Counting(7))})
    other = torch.nn.Sequential(Counting(0))
    distckpt.load_into(tmp_path / "c", {"net": other}, strict=True)
    assert other[0].count == 7


def test_extra_state_that_is_an_object_is_refused_by_name():
    with pytest.raises(LayoutError, match=r"'0\._extra_state'.*Counting is a dict"):
        distckpt.plan(torch.nn.Sequential(Counting({"a": 1})))


# --------------------------------------------------------------------------------------- optimizers


def test_an_optimizer_has_the_names_of_its_state_dict():
    names = [*door.as_net(trained(net())).tensors()]
    assert names[:3] == ["state.0.step", "state.0.exp_avg", "state.0.exp_avg_sq"]
    assert {"param_groups.0.lr", "param_groups.0.betas.0", "param_groups.0.betas.1"} <= {*names}
    assert not any(".params" in name for name in names)


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.AdamW,
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
    ],
    ids=["adamw", "rmsprop", "adagrad", "sgd"],
)
def test_training_goes_on_as_if_it_had_not_stopped(make, tmp_path):
    model = net()
    optimizer = trained(model, make=make)
    optimizer.param_groups[0]["lr"] = 0.003
    distckpt.save(tmp_path / "c", {"model": model, "optimizer": optimizer, "epoch": 2})
    expected = run((model, optimizer))

    model = net()
    optimizer = make(model.parameters(), lr=0.01)
    door.make_state(optimizer)
    state = {"model": model, "optimizer": optimizer, "epoch": 0}
    distckpt.load_into(tmp_path / "c", state, strict=True)
    assert state["epoch"] == 2
    assert optimizer.param_groups[0]["lr"] == 0.003
    assert run((model, optimizer)) == expected


def test_making_an_optimizers_state_changes_nothing_else():
    model = net()
    model[0].bias.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    door.make_state(optimizer)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert len(optimizer.state) == 4
    step = optimizer.state[model[0].weight]["step"]
    step += 41
    door.make_state(optimizer)
    assert step == 42


def test_a_state_dict_of_an_optimizer_is_a_state_too(tmp_path):
    optimizer = trained(net())
    distckpt.save(tmp_path / "c", {"optimizer": optimizer.state_dict()})
    saved = distckpt.open(tmp_path / "c")
    assert "optimizer.state.0.exp_avg" in saved
    assert saved.values["optimizer.param_groups.0.lr"] == 0.01
