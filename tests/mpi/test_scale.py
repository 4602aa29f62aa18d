"""What ranks under MPI send one another is what the simulator of thousands of ranks says."""

from __future__ import annotations

import distckpt
from benchmarks.scale.layouts import megatron
from benchmarks.scale.models import Model, Parameter
from benchmarks.scale.simulator import planning_messages
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
    """A Coordinator that counts what it sends in the calling thread's operations."""

    def __init__(self, coordinator):
        self.coordinator = coordinator
        self.rank, self.size = coordinator.rank, coordinator.size
        self.node, self.concurrent = coordinator.node, coordinator.concurrent
        self.sent = [0, 0]

    def post(self, dest, tag, payload):
        if tag < BACKGROUND_TAG:
            self.sent[0] += 1
            self.sent[1] += len(payload)
        self.coordinator.post(dest, tag, payload)

    def poll(self, tag, source=None):
        return self.coordinator.poll(tag, source)

    def spent(self):
        found, self.sent = tuple(self.sent), [0, 0]
        return found


def test_messages_and_bytes_of_planning_are_those_that_the_simulator_counts(
    comm, folder, monkeypatch
):
    # As a number it may be encoded in one byte more or less.
    monkeypatch.setattr("distckpt.prepare.secrets.randbits", lambda _: 1 << 62)
    tp, pp = (2, 2) if comm.size % 4 == 0 else (1, 1)
    layout = megatron(TINY, tp=tp, pp=pp, dp=comm.size // (tp * pp))
    counting = Counting(connect(comm).coordinator)
    team = Team(counting)
    spent = []
    for _ in range(2):
        distckpt.save(folder, layout.state(comm.rank), comm=team, overwrite=True)
        spent.append(counting.spent())
    found = comm.gather(spent)
    if comm.rank == 0:
        states = [layout.state(rank) for rank in range(comm.size)]
        for save, counted in enumerate(planning_messages(str(folder), states, saves=2)):
            expected = list(zip(counted.sent.tolist(), counted.sent_bytes.tolist(), strict=True))
            assert [one[save] for one in found] == expected
