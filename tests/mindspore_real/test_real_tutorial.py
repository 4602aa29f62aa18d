"""Every block of MindSpore's tutorial, on real cells."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

ms = pytest.importorskip("mindspore")

from mindspore_tutorial import SHAPES, TutorialTests, numbered  # noqa: E402


class LeNet(ms.nn.Cell):
    """The layers that the tutorial names."""

    def __init__(self):
        super().__init__()
        self.conv = ms.nn.SequentialCell([ms.nn.Conv2d(1, 6, 5, pad_mode="valid", has_bias=True)])
        self.fc2 = ms.nn.Dense(120, 84)
        self.fc3 = ms.nn.Dense(84, 10)


class Wrapped(ms.nn.Cell):
    """A cell whose parameters' names begin with ``net.``."""

    def __init__(self):
        super().__init__()
        self.net = LeNet()


class CellKit:
    """Nets as cells."""

    def net(self, prefix=""):
        return self._made(prefix, numbered)

    def zeros(self, prefix=""):
        return self._made(prefix, lambda name: np.zeros(SHAPES[name], np.float32))

    def _made(self, prefix, array):
        cell = Wrapped() if prefix else LeNet()
        for parameter in cell.get_parameters():
            parameter.set_data(ms.Tensor(array(parameter.name.removeprefix(prefix))))
        return cell

    def arrays(self, net):
        return {each.name: each.asnumpy().copy() for each in net.get_parameters()}


class TorchWeight:
    """What the block asks of a torch tensor; torch itself is not in this environment."""

    def __init__(self, array):
        self._array = array

    def numpy(self):
        return self._array


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def kit():
    return CellKit()


@pytest.fixture
def torch():
    weights = {
        "features.0.weight": TorchWeight(numbered("conv.0.weight")),
        "fc3.bias": TorchWeight(numbered("fc3.bias")),
    }
    return SimpleNamespace(load=lambda path: {"state_dict": weights})


class TestOnCells(TutorialTests):
    """See the base class."""
