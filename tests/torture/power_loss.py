"""Power is lost after every call that a save makes to the operating system, in many ways."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from versions import latest_version, state, version_of

import distckpt
from distckpt import KeepLast, Manager
from distckpt.errors import text
from distckpt.testing import PowerLossDisk, run_ranks

RANKS = 2
SCENARIOS = ("fresh", "overwriting", "async", "manager")


@dataclass
class Recorded:
    """What was done to a folder.

    Attributes:
        scenario: Which.
        disk: The calls.
        begun: By version: after how many calls its save was begun.
        returned: By version: after how many it had returned, and so is durable.
    """

    scenario: str
    disk: PowerLossDisk
    begun: dict
    returned: dict

    def possible(self, after):
        """The versions that may be there when power is lost after so many calls."""
        durable = [version for version, calls in self.returned.items() if calls <= after]
        newest = max(durable, default=None)
        begun = {version for version, calls in self.begun.items() if calls <= after}
        return {newest} | {version for version in begun if newest is None or version > newest}


def record(folder, scenario):
    """Save three versions, and note what is done to the folder."""
    disk = PowerLossDisk(folder)
    begun, returned = {}, {}
    versions = [1] if scenario == "fresh" else [1, 2, 3]
    managers = {}

    def save(comm, version):
        values = state(version, comm.rank, comm.size)
        if scenario == "manager":
            managers[comm.rank] = Manager(folder / "run", comm=comm, keep=KeepLast(1))
            with managers[comm.rank] as manager:
                manager.save(version, values).wait()
        elif scenario == "async":
            distckpt.save_async(folder / "run", values, comm=comm, overwrite=True).wait()
        else:
            distckpt.save(folder / "run", values, comm=comm, overwrite=scenario != "fresh")

    with disk:
        for version in versions:
            begun[version] = disk.calls
            run_ranks(RANKS, lambda comm, version=version: save(comm, version))
            returned[version] = disk.calls
    return Recorded(scenario, disk, begun, returned)


def look(recorded, after, seed):
    """Lose power; return what is wrong then, or None."""
    with tempfile.TemporaryDirectory(prefix="distckpt-power-") as name:
        folder = Path(name)
        try:
            recorded.disk.lose_power(after=after, seed=seed, into=folder)
            read = latest_version if recorded.scenario == "manager" else version_of
            found = read(folder / "run")
            possible = recorded.possible(after)
            assert found in possible, f"version {found}; possible {possible}"
        except Exception as exc:  # the finding
            return f"{recorded.scenario}: power lost after call {after}, seed {seed}: {text(exc)}"
    return None


def lose_power_everywhere(scenario, *, seeds):
    """Lose power after every call of a scenario, in so many ways each.

    Returns:
        How many times, and what is wrong.
    """
    with tempfile.TemporaryDirectory(prefix="distckpt-power-") as name:
        recorded = record(Path(name), scenario)
        cases = [(after, seed) for after in range(recorded.disk.calls + 1) for seed in range(seeds)]
        wrong = [found for after, seed in cases if (found := look(recorded, after, seed))]
    return len(cases), wrong
