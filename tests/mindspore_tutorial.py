"""The blocks of MindSpore's tutorial, and what each must do: run on each kind of net."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from distckpt import mindspore

_TEXT = (Path(__file__).parent / "data" / "golden" / "tutorial.md").read_text(encoding="utf-8")
# What follows "# 3 a checkpoint edited and saved again", by its number.
BLOCKS = {
    int(number): code.strip()
    for fence in re.findall(r"```python\n(.*?)```", _TEXT, re.DOTALL)
    for number, code in re.findall(r"^# (\d+) .*\n((?:(?!# \d+ ).*\n?)*)", fence, re.MULTILINE)
}

SHAPES = {
    "conv.0.weight": (6, 1, 5, 5),
    "conv.0.bias": (6,),
    "fc2.weight": (84, 120),
    "fc2.bias": (84,),
    "fc3.weight": (10, 84),
    "fc3.bias": (10,),
}


def numbered(name: str) -> np.ndarray:
    """Make an array that no other name has."""
    shape, first = SHAPES[name], 1000 * list(SHAPES).index(name)
    return np.arange(first, first + np.prod(shape), dtype=np.float32).reshape(shape)


class TutorialTests:
    """Each block runs as it stands. A kit makes nets of `SHAPES`, and reads them.

    A kit has `net(prefix="")`, whose arrays are `numbered`; `zeros(prefix="")`; and
    `arrays(net)`: name → array. With a prefix, names begin with it.
    """

    def run(self, number, kit, **more):
        names = {name: getattr(mindspore, name) for name in mindspore.__all__}
        space = {**names, "np": np, "net": kit.net(), **more}
        exec(compile(BLOCKS[number], f"tutorial block {number}", "exec"), space)
        return SimpleNamespace(**space)

    def start(self, kit):
        mindspore.save_checkpoint(kit.net(), "start.ckpt")

    def test_block_1_saves_a_net(self, kit):
        self.run(1, kit)
        saved = mindspore.load_checkpoint("start.ckpt")
        assert list(saved) == list(SHAPES)
        for name in SHAPES:
            np.testing.assert_array_equal(saved[name].asnumpy(), numbered(name))

    def test_block_2_saves_the_saved_network_only_in_the_background(self, kit):
        done = self.run(2, kit)
        training = {"net": done.net, "moments": np.zeros(3, np.float32)}
        with done.callback as callback:
            for _ in range(45):
                callback.step_end(net=training)
            callback.end()
        files = sorted(path.name for path in Path("ckpt").iterdir())
        assert files == ["lenet-1_30.ckpt", "lenet-1_40.ckpt", "lenet-1_45.ckpt"]
        assert list(mindspore.load_checkpoint("ckpt/lenet-1_45.ckpt")) == list(SHAPES)

    def test_block_3_edits_a_dict_and_a_list(self, kit):
        self.start(kit)
        edited = self.run(3, kit)
        # What the second half has left in the file.
        saved = mindspore.load_checkpoint("edited.ckpt")
        assert list(saved) == [*list(SHAPES)[:2], *list(SHAPES)[3:], "epoch_size"]
        assert saved["fc3.weight"].asnumpy() == 66
        assert saved["epoch_size"].asnumpy() == 10
        assert list(edited.params) == list(saved)
        # And what the first half has.
        first = BLOCKS[3].split("\n\n")[0]
        names = {name: getattr(mindspore, name) for name in mindspore.__all__}
        exec(first, {**names, "np": np})
        saved = mindspore.load_checkpoint("edited.ckpt")
        assert list(saved) == [*list(SHAPES)[:5], "epoch_size"]
        assert (saved["fc3.weight"].asnumpy() == np.full((10, 84), 66)).all()
        assert saved["epoch_size"].asnumpy() == 10

    def test_block_4_saves_hyperparameters(self, kit):
        self.run(4, kit)
        saved = mindspore.load_checkpoint("hyperparameters.ckpt")
        assert saved["epoch_size"].asnumpy() == np.int64(10)
        assert saved["epoch_size"].asnumpy().dtype == np.int64
        assert saved["learning_rate"].asnumpy() == np.float32(0.01)
        assert saved["learning_rate"].asnumpy().dtype == np.float32

    def test_block_5_loads_strictly_and_by_suffix_in_both_directions(self, kit):
        self.start(kit)
        mindspore.save_checkpoint(kit.net("net."), "wrapped.ckpt")
        wrapped, net = kit.zeros("net."), kit.zeros()
        done = self.run(5, kit, net=net, wrapped=wrapped)
        assert (done.not_loaded, done.unused) == ([], [])
        for name in SHAPES:
            np.testing.assert_array_equal(kit.arrays(net)[name], numbered(name))
            np.testing.assert_array_equal(kit.arrays(wrapped)[f"net.{name}"], numbered(name))
        # The third line alone: the first had filled the net already.
        net = kit.zeros()
        mindspore.load_param_into_net(net, mindspore.load_checkpoint("wrapped.ckpt"))
        for name in SHAPES:
            np.testing.assert_array_equal(kit.arrays(net)[name], numbered(name))

    def test_block_6_leaves_out_what_has_a_prefix(self, kit):
        items = [{"name": name, "data": mindspore.Tensor(numbered(name))} for name in SHAPES]
        moments = mindspore.Tensor(np.ones(3, np.float32))
        mindspore.save_checkpoint([*items, {"name": "opt.m", "data": moments}], "train.ckpt")
        first, second = BLOCKS[6].splitlines()
        names = {name: getattr(mindspore, name) for name in mindspore.__all__}
        net = kit.zeros()
        assert eval(first, {**names, "net": net}) == ([], [])
        for name in SHAPES:
            np.testing.assert_array_equal(kit.arrays(net)[name], numbered(name))
        net = kit.zeros()
        missing, unused = eval(second.partition("#")[0], {**names, "net": net})
        assert missing == ["conv.0.weight", "conv.0.bias"]
        assert unused == ["opt.m"]
        assert not kit.arrays(net)["conv.0.weight"].any()
        np.testing.assert_array_equal(kit.arrays(net)["fc3.bias"], numbered("fc3.bias"))

    def test_block_7_saves_another_frameworks_weights(self, kit, torch):
        names = {"features.0.weight": "conv.0.weight"}
        self.run(7, kit, torch=torch, names=names)
        net = kit.zeros()
        missing, unused = mindspore.load_param_into_net(
            net, mindspore.load_checkpoint("resnet.ckpt")
        )
        assert missing == list(SHAPES)[1:5]
        assert unused == []
        for name in ("conv.0.weight", "fc3.bias"):
            np.testing.assert_array_equal(kit.arrays(net)[name], numbered(name))
