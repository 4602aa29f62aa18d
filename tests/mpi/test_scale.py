"""What ranks under MPI send one another is what the simulator of thousands of ranks says."""

from __future__ import annotations

import pytest

import distckpt
from benchmarks.scale.layouts import fsdp_tp, megatron
from benchmarks.scale.models import Model, Parameter
from benchmarks.scale.simulator import commit_messages, planning_messages
from distckpt.coordinator import BACKGROUND_TAG
from distckpt.team import Team, connect

TINY = Model(
    "tiny",
    4,
    0,
    [
        parameter
        for layer in range(4)
        for parameter in (
            Parameter(f"layers.{layer}.up", (12, 10), 0, layer),
            Parameter(f"layers.{layer}.down", (10, 12), 1, layer),
            Parameter(f"layers.{layer}.norm", (10,), None, layer),
        )
    ],
)


class Counting:
    """A Coordinator that counts what it sends, apart in the background: messages and bytes."""

    def __init__(self, coordinator):
        self.coordinator = coordinator
        self.rank, self.size = coordinator.rank, coordinator.size
        self.node, self.concurrent = coordinator.node, coordinator.concurrent
        self.spent()

    def post(self, dest, tag, payload):
        sent = self.sent[tag >= BACKGROUND_TAG]
        sent[0] += 1
        sent[1] += len(payload)
        self.coordinator.post(dest, tag, payload)

    def poll(self, tag, source=None):
        return self.coordinator.poll(tag, source)

    def spent(self):
        found = tuple(map(tuple, getattr(self, "sent", ())))
        self.sent = [[0, 0], [0, 0]]
        return found


def zero1(ranks):
    tp, pp = (2, 2) if ranks % 4 == 0 else (1, 1)
    return megatron(TINY, tp=tp, pp=pp, dp=ranks // (tp * pp))


def cut_twice(ranks):
    tp = 1 if ranks % 2 else 2
    return fsdp_tp(TINY, fsdp=ranks // tp, tp=tp)


@pytest.mark.parametrize("layout_of", [zero1, cut_twice])
def test_messages_of_saves_and_bytes_of_planning_are_those_that_the_simulator_counts(
    comm, folder, monkeypatch, layout_of
):
    # As a number it may be encoded in one byte more or less.
    monkeypatch.setattr("distckpt.agreement.secrets.randbits", lambda _: 1 << 62)
    layout = layout_of(comm.size)
    counting = Counting(connect(comm).coordinator)
    team = Team(counting)
    spent = []
    for _ in range(2):
        distckpt.save(folder, layout.state(comm.rank), comm=team, overwrite=True)
        spent.append(counting.spent())
    found = comm.gather(spent)
    if comm.rank == 0:
        states = [layout.state(rank) for rank in range(comm.size)]
        committing = commit_messages(comm.size).tolist()
        for save, counted in enumerate(planning_messages(str(folder), states, saves=2)):
            expected = list(zip(counted.sent.tolist(), counted.sent_bytes.tolist(), strict=True))
            assert [one[save][0] for one in found] == expected
            assert [one[save][1][0] for one in found] == committing
