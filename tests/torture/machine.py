"""Saves, overwrites, crashes and cleaning, in any order, on a store that lags; against a model.

The model: at each place the version that was committed last. What must hold at any time: a
committed checkpoint is readable and equal, and what a run resumes from never goes back.
"""

from __future__ import annotations

import random

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from versions import state, version_of

import distckpt
from distckpt import CheckpointError, CheckpointExists, Manager, SaveFailed, StoreError
from distckpt.clean import clean
from distckpt.manifest import MANIFEST_NAME
from distckpt.store import PrefixStore
from distckpt.testing import Fail, Fault, FaultyStore, LaggingStore, MemoryStore, Point, run_ranks

PLACES = ["a", "b"]
_UNKNOWN = object()


class Checkpoints(RuleBasedStateMachine):
    """See the module."""

    @initialize(chance=st.integers(0, 1000))
    def begin(self, chance):
        self.now = 1_000_000.0
        self.inner = MemoryStore(clock=lambda: self.now)
        # Not hypothesis' own: saves draw from it in the background.
        lag = random.Random(chance)
        self.store = LaggingStore(self.inner, lambda most: lag.randint(0, most))
        # What the runs below resume from is found by listing.
        self.store.misses_new = False
        self.version = 0
        self.committed = dict.fromkeys(PLACES)
        self.latest = None
        self.step = 0

    # ------------------------------------------------------------------------------------ saving

    @rule(place=st.sampled_from(PLACES), overwrite=st.booleans(), ranks=st.sampled_from([1, 1, 2]))
    def save(self, place, overwrite, ranks):
        self.attempt(place, overwrite, ranks, lambda store: store)

    @rule(
        place=st.sampled_from(PLACES),
        overwrite=st.booleans(),
        at=st.integers(0, 20),
        asynchronous=st.booleans(),
    )
    def crash(self, place, overwrite, at, asynchronous):
        """From one operation on nothing is done any more, not even cleaning up."""
        self.attempt(
            place,
            overwrite,
            1,
            lambda store: FaultyStore(store, fail_at=at),
            asynchronous=asynchronous,
        )

    @rule(
        place=st.sampled_from(PLACES),
        overwrite=st.booleans(),
        kind=st.sampled_from(["create", "write", "commit", "put", "size", "read", "delete"]),
        at=st.integers(0, 2),
        after=st.booleans(),
    )
    def fail_once(self, place, overwrite, kind, at, after):
        """One operation fails, or is done and its answer lost."""
        fault = Fault(Point(kind, after=after), Fail(), at=at)
        self.attempt(place, overwrite, 1, lambda store: FaultyStore(store, faults=[fault]))

    def attempt(self, place, overwrite, ranks, faulty, *, asynchronous=False):
        self.version += 1
        version, old = self.version, self.committed[place]
        store = PrefixStore(faulty(self.store), place)
        save = distckpt.save_async if asynchronous else distckpt.save

        def one(comm):
            try:
                made = save(
                    store, state(version, comm.rank, comm.size), comm=comm, overwrite=overwrite
                )
                if asynchronous:
                    made.wait()
            except CheckpointError as exc:
                return exc
            return None

        errors = [one(distckpt.Solo())] if ranks == 1 else run_ranks(ranks, one)
        assert len({(type(error), str(error)) for error in errors}) == 1, errors
        error = errors[0]
        if error is None:
            assert overwrite or old is None, "it replaced a checkpoint without being told to"
            self.committed[place] = version
        elif isinstance(error, SaveFailed) and error.committed is None:
            found = version_of(PrefixStore(self.inner, place))
            assert found in (old, version), f"{place}: {found}, expected {old} or {version}"
            self.committed[place] = found
        else:
            assert isinstance(error, SaveFailed | CheckpointExists | StoreError)
            assert not isinstance(error, CheckpointExists) or (old is not None and not overwrite)

    # ---------------------------------------------------------------------------------- cleaning

    @rule(place=st.sampled_from(PLACES), age=st.sampled_from([0.0, 10.0, 1000.0]))
    def clean(self, place, age):
        """However old the listing is, only what no manifest names goes."""
        self.now += age
        self.store.misses_new = True
        clean(PrefixStore(self.store, place), grace_s=100.0, dry_run=False, now=lambda: self.now)
        self.store.misses_new = False

    @rule(place=st.sampled_from(PLACES))
    def delete(self, place):
        """The manifest first, as the Manager does."""
        if self.committed[place] is not None:
            store = PrefixStore(self.store, place)
            names = distckpt.open(store).manifest.file_names
            store.delete([MANIFEST_NAME])
            store.delete(names)
            self.committed[place] = None

    # --------------------------------------------------------------------------------- a run's own

    @rule(at=st.none() | st.integers(0, 25))
    def save_a_step(self, at):
        """A run saves its next step; it may crash there."""
        self.step += 1
        store = PrefixStore(
            self.store if at is None else FaultyStore(self.store, fail_at=at), "run"
        )
        manager = Manager(store, comm=distckpt.Solo(), keep=distckpt.KeepLast(2))
        try:
            with manager:
                manager.save(self.step, state(self.step, 0, 1)).wait()
        except (SaveFailed, StoreError) as exc:
            if getattr(exc, "committed", False) is None:
                self.latest = _UNKNOWN
        else:
            self.latest = self.step

    @invariant()
    def what_was_committed_is_readable_and_equal(self):
        for place, version in self.committed.items():
            found = version_of(PrefixStore(self.store, place), verify=False)
            assert found == version, f"{place}: {found}, expected {version}"

    @invariant()
    def what_a_run_resumes_from_never_goes_back(self):
        manager = Manager(PrefixStore(self.store, "run"), comm=distckpt.Solo())
        found = manager.latest()
        if self.latest is not _UNKNOWN:
            assert found == self.latest, f"the run is at {found}, expected {self.latest}"
        self.latest = found
        if found is not None:
            place = PrefixStore(self.store, f"run/step-{found:08d}")
            assert version_of(place, verify=False) == found


def run(examples, *, kind=Checkpoints, seed_number=None, **keywords):
    """Run so many examples; raises what is wrong, as few steps as lead to it.

    Args:
        examples: How many.
        kind: The machine.
        seed_number: Which ones; by chance if None.
        keywords: More of hypothesis' settings.
    """
    machine = kind if seed_number is None else seed(seed_number)(kind)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=12,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
            report_multiple_bugs=False,
            **keywords,
        ),
    )
