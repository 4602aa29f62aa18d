"""Every block of MindSpore's tutorial, on nets of plain arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch as real_torch
from mindspore_tutorial import BLOCKS, SHAPES, TutorialTests, numbered


class NumpyKit:
    """Nets as nested dicts and lists of arrays."""

    def net(self, prefix=""):
        return self._made(prefix, numbered)

    def zeros(self, prefix=""):
        return self._made(prefix, lambda name: np.zeros(SHAPES[name], np.float32))

    def _made(self, prefix, array):
        layers = {
            "conv": [{"weight": array("conv.0.weight"), "bias": array("conv.0.bias")}],
            "fc2": {"weight": array("fc2.weight"), "bias": array("fc2.bias")},
            "fc3": {"weight": array("fc3.weight"), "bias": array("fc3.bias")},
        }
        return {prefix[:-1]: layers} if prefix else layers

    def arrays(self, net):
        prefix, layers = ("net.", net["net"]) if "net" in net else ("", net)
        found = {}
        for name in SHAPES:
            layer, *number, key = name.split(".")
            at = layers[layer][int(number[0])] if number else layers[layer]
            found[prefix + name] = at[key]
        return found


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def kit():
    return NumpyKit()


@pytest.fixture
def torch(tmp_path):
    weights = {
        "features.0.weight": real_torch.from_numpy(numbered("conv.0.weight")),
        "fc3.bias": real_torch.from_numpy(numbered("fc3.bias")),
    }
    real_torch.save({"state_dict": weights}, tmp_path / "resnet.pth")
    return real_torch


class TestOnNumpyNets(TutorialTests):
    """See the base class."""


def test_there_are_seven_blocks():
    assert sorted(BLOCKS) == list(range(1, 8))
