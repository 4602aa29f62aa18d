"""A run, looked after by two Managers in turn, in any order of what can happen; against a model.

Jobs begin, save, are killed, and begin again while the one before still lives; the storage fails;
checkpoints are pinned, held, damaged, and cleaned up after. At any time the model says which
checkpoints there are, and which one a run resumes from. Of a job that crashed, the store is asked
what became of its last save; the rest must be as the model says.

``--hypothesis-profile=nightly`` tries 5,000 such runs; ``make torture`` does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import distckpt
from distckpt import (
    CheckpointError,
    CheckpointNotFound,
    EverySteps,
    KeepBest,
    KeepEvery,
    KeepLast,
    LoadFailed,
    Manager,
    SaveFailed,
    Shard,
    clean,
)
from distckpt.errors import text
from distckpt.manifest import MANIFEST_NAME
from distckpt.store import PrefixStore
from distckpt.testing import Fail, Fault, FaultyStore, MemoryStore, Point, run_ranks

_ROWS = 5
FOREIGN = {
    "notes.txt": b"mine",
    "step-12/model.pt": b"not of ours: its number is too short",
    "step-00000001x/manifest.binpb": b"not of ours either",
    "step-00000099/readme": b"a step without a checkpoint",
    "best/manifest.binpb": b"somebody else's",
    ".distckpt/notes": b"mine, too",
}


@dataclass
class Saved:
    """A committed checkpoint. The salt tells saves of one step apart."""

    salt: int
    save_id: int
    loss: float
    bad_bytes: bool = False  # of a tensor
    bad_manifest: bool = False


@dataclass
class Job:
    """A job that is running, for all that its Manager knows."""

    manager: Manager
    keep: Keep
    step: int
    epoch: int


@dataclass(frozen=True)
class Keep:
    """What to keep; zeros say that a policy isn't part of it. None at all: everything."""

    last: int = 0
    every: int = 0
    best: int = 0

    def policy(self):
        found = None
        for count, kind in [
            (self.last, KeepLast),
            (self.every, KeepEvery),
            (self.best, lambda count: KeepBest("loss", count)),
        ]:
            if count:
                found = kind(count) if found is None else found | kind(count)
        return found

    def kept(self, losses):
        """Which steps, of those that have these losses."""
        steps = sorted(losses)
        by_loss = sorted(steps, key=lambda step: (losses[step], -step))
        kept = {*steps[len(steps) - self.last :], *by_loss[: self.best]}
        return kept | {step for step in steps if self.every and step % self.every == 0}


def rows(comm):
    return slice(_ROWS * comm.rank // comm.size, _ROWS * (comm.rank + 1) // comm.size)


def whole(step, salt):
    return np.arange(_ROWS * 2.0).reshape(_ROWS, 2) + step + salt / 16


def state(comm, step, salt):
    mine = rows(comm)
    return {"w": Shard(whole(step, salt)[mine], (mine.start, 0), (_ROWS, 2)), "salt": salt}


def empty(comm):
    return state(comm, 0, 0) | {"salt": -1}


def loss_of(step, salt):
    return (5 * step + salt) % 7 / 7


keeps = st.builds(Keep, st.integers(0, 2), st.sampled_from([0, 0, 4]), st.sampled_from([0, 0, 1]))
gains = st.integers(1, 3)
slots = st.sampled_from("ab")


class Run(RuleBasedStateMachine):
    """See the module."""

    @initialize()
    def begin_with_what_others_left(self):
        self.store = MemoryStore()
        for name, data in FOREIGN.items():
            self.store.put(name, data, replace=False)
        self.model = {}
        self.pinned = set()
        self.holds = []  # (step, its salt, the checkpoint, the hold)
        self.jobs = {}
        self.salt = 0
        self.looked_at = {}  # step → its objects, when they were last found to be whole

    def teardown(self):
        for *_, hold in getattr(self, "holds", []):
            hold.release()

    # ------------------------------------------------------------------------------------ the model

    def place(self, step):
        return PrefixStore(self.store, f"step-{step:08d}")

    def reader(self):
        return Manager(self.store, comm=distckpt.Solo())

    def names(self, pattern):
        """What the Managers have noted: the first number in the names."""
        found = (re.fullmatch(rf"\.distckpt/{pattern}", name) for name in self.store.objects)
        return {int(match[1]): match[0] for match in found if match}

    def epoch(self):
        return max(self.names(r"epoch-(\d{8})"), default=0)

    def is_marked(self, step):
        """Whether a load has found it damaged, and noted it."""
        note = f".distckpt/damaged-{step:08d}-{self.model[step].save_id:016x}.json"
        return note in self.store.objects

    def is_held(self, step):
        salt = self.model[step].salt
        return any((step, salt) == held[:2] for held in self.holds)

    def can_be_held(self, step):
        """A deleter that died leaves a mark, which readers respect for ten minutes."""
        mark = f"deletion-{self.model[step].save_id:016x}-"
        return not any(name.startswith(mark) for name in self.place(step).names())

    def listed(self):
        return {step: saved for step, saved in self.model.items() if not saved.bad_manifest}

    def newest_good(self):
        good = (step for step, saved in self.listed().items() if not saved.bad_bytes)
        return max(good, default=None)

    def to_go(self, upto, keep):
        """What goes after the commit of a step."""
        if keep.policy() is None:
            return set()
        good = {step: one.loss for step, one in self.listed().items() if not self.is_marked(step)}
        old = {step: loss for step, loss in good.items() if step <= upto}
        stays = {*keep.kept(old), max(good), max(old), *self.pinned}
        return {step for step in set(old) - stays if not self.is_held(step)}

    def note_saved(self, step, salt):
        save_id = distckpt.open(self.place(step)).manifest.save_id
        self.model[step] = Saved(salt, save_id, loss_of(step, salt))

    def evidence(self):
        """All objects of checkpoints that have been found damaged."""
        steps = [s for s, saved in self.model.items() if saved.bad_manifest or self.is_marked(s)]
        prefixes = tuple(f"step-{step:08d}/" for step in steps)
        return {n: d for n, d in self.store.objects.items() if prefixes and n.startswith(prefixes)}

    # ----------------------------------------------------------------------------- jobs come and go

    def manager(self, comm, store, keep):
        policy = keep.policy()
        return Manager(store, comm=comm, save=EverySteps(1), keep=policy, stop_signals=())

    def check_loaded(self, step, net, mine=slice(None)):
        if step == 0:
            assert net["salt"] == -1
            return
        salt = self.model[step].salt
        assert net["salt"] == salt
        assert np.array_equal(net["w"].array, whole(step, salt)[mine])

    @rule(slot=slots, keep=keeps)
    def begin(self, slot, keep):
        """A job begins, and resumes. The one in this slot is dead; the other knows nothing."""
        comm = distckpt.Solo()
        manager = self.manager(comm, self.store, keep)
        self.jobs.pop(slot, None)
        before, expected, evidence = self.epoch(), self.newest_good(), self.evidence()
        net = empty(comm)
        if expected is None and self.model:
            with pytest.raises(LoadFailed, match="can be loaded"):
                manager.load_latest_into(net, default=0)
        else:
            step = manager.load_latest_into(net, default=0)
            assert step == (expected or 0)
            self.check_loaded(step, net)
            self.jobs[slot] = Job(manager, keep, step, before + 1)
        assert self.epoch() == before + 1
        for step, saved in self.listed().items():
            if step > (expected or 0):
                assert saved.bad_bytes
                assert self.is_marked(step)
        assert evidence.items() <= self.store.objects.items()

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), gain=gains)
    def save(self, data, gain):
        """A job saves; if another has begun since, that is refused, and changes nothing."""
        job = self.jobs[data.draw(st.sampled_from(sorted(self.jobs)))]
        self.salt += 1
        step, salt = job.step + gain, self.salt
        values = state(distckpt.Solo(), step, salt)
        job.step = step
        if self.epoch() > job.epoch:
            before = dict(self.store.objects)
            with pytest.raises(SaveFailed, match=r"another Manager, begun .* has taken over"):
                job.manager.save(step, values, metrics={"loss": loss_of(step, salt)}).wait()
            with pytest.raises(SaveFailed):
                job.manager.wait()
            assert self.store.objects == before
            return
        job.manager.save(step, values, metrics={"loss": loss_of(step, salt)})
        job.manager.wait()
        self.note_saved(step, salt)
        for gone in self.to_go(step, job.keep):
            del self.model[gone]

    @rule(ranks=st.integers(2, 3), keep=keeps, count=st.integers(1, 3))
    def do_a_whole_job(self, ranks, keep, count):
        """A job of several ranks resumes, trains a few steps, and ends."""
        expected = self.newest_good()
        if expected is None and self.model:
            return
        self.salt += 1
        salt = self.salt

        def work(comm):
            net = empty(comm)
            with self.manager(comm, self.store, keep) as manager:
                start = manager.load_latest_into(net, default=0)
                self.check_loaded(start, net, rows(comm))
                for step in range(start + 1, start + count + 1):
                    loss = {"loss": loss_of(step, salt)}
                    assert manager.step(step, state(comm, step, salt), metrics=loss) is not None
                return start

        starts = run_ranks(ranks, work, timeout_s=60)
        assert starts == [expected or 0] * ranks
        for step in range(starts[0] + 1, starts[0] + count + 1):
            self.model[step] = Saved(salt, -1, loss_of(step, salt))  # which is seen below
            for gone in self.to_go(step, keep):
                del self.model[gone]
        for step, saved in self.model.items():
            if saved.salt == salt:
                self.note_saved(step, salt)

    @rule(keep=keeps, gain=gains, at=st.integers(0, 70))
    def crash(self, keep, gain, at):
        """A job begins, resumes and saves; from one operation on nothing is done any more."""
        self.begin_and_save(FaultyStore(self.store, fail_at=at), keep, gain)

    @rule(
        keep=keeps,
        gain=gains,
        kind=st.sampled_from(
            ["create", "write", "commit", "put", "size", "read", "names", "delete"]
        ),
        at=st.integers(0, 8),
        after=st.booleans(),
    )
    def fail_once(self, keep, gain, kind, at, after):
        """One operation of the storage fails, or is done and its answer lost; the job ends."""
        fault = Fault(Point(kind, after=after), Fail(), at=at)
        self.begin_and_save(FaultyStore(self.store, faults=[fault]), keep, gain)

    def begin_and_save(self, store, keep, gain):
        self.salt += 1
        salt, step, error = self.salt, None, None
        expected, evidence = self.newest_good(), self.evidence()
        comm = distckpt.Solo()
        manager = self.manager(comm, store, keep)
        try:
            start = manager.load_latest_into(empty(comm), default=0)
            # Whatever the storage does, nobody goes back in time without damage.
            assert start == (expected or 0)
            step = start + gain
            manager.save(step, state(comm, step, salt), metrics={"loss": loss_of(step, salt)})
            manager.wait()
        except CheckpointError as exc:
            error = exc
        found = None if step is None else self.salt_of(step)
        if error is None:
            assert found == salt
        elif getattr(error, "committed", False) is False:
            assert found != salt, f"it is there, but the job was told: {text(error)}"
        if found == salt:
            self.note_saved(step, salt)
            # Of what was to go, some may have stayed.
            for gone in self.to_go(step, keep):
                if self.salt_of(gone) is None:
                    del self.model[gone]
        if found != salt:
            assert evidence.items() <= self.store.objects.items()

    def salt_of(self, step):
        try:
            return distckpt.open(self.place(step)).values["salt"]
        except CheckpointError:
            return None

    # ------------------------------------------------------------------------ what others do to it

    @precondition(lambda self: self.listed())
    @rule(data=st.data())
    def pin(self, data):
        step = data.draw(st.sampled_from(sorted(self.listed())))
        if self.can_be_held(step):
            self.reader().pin(step, "for the paper")
            self.pinned.add(step)

    @rule(step=st.integers(50, 60))
    def pin_what_is_not_there(self, step):
        with pytest.raises(CheckpointNotFound):
            self.reader().pin(step, "for the paper")

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data):
        step = data.draw(st.sampled_from(sorted(self.pinned)))
        self.reader().unpin(step)
        self.pinned.discard(step)

    @precondition(lambda self: self.listed())
    @rule(data=st.data())
    def hold(self, data):
        step = data.draw(st.sampled_from(sorted(self.listed())))
        if self.can_be_held(step) and not self.model[step].bad_bytes:
            checkpoint = self.reader().open(step)
            self.holds.append((step, self.model[step].salt, checkpoint, checkpoint.hold()))

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def release(self, data):
        *_, hold = self.holds.pop(data.draw(st.integers(0, len(self.holds) - 1)))
        hold.release()

    @precondition(lambda self: self.listed())
    @rule(data=st.data(), in_manifest=st.booleans())
    def damage(self, data, in_manifest):
        """Mostly the newest."""
        steps = sorted(self.listed())
        step = data.draw(st.sampled_from([*steps, *[steps[-1]] * 3]))
        if self.model[step].bad_bytes or self.is_held(step):
            return
        manifest = distckpt.open(self.place(step)).manifest
        if in_manifest:
            name, byte = MANIFEST_NAME, 40
            self.model[step].bad_manifest = True
        else:
            name, byte = manifest.file_names[0], int(manifest.file_data_start[0])
            self.model[step].bad_bytes = True
        place = f"step-{step:08d}/{name}"
        changed = bytearray(self.store.objects[place])
        changed[byte] ^= 0x04
        self.store.put(place, bytes(changed), replace=True)

    @rule()
    def clean(self):
        """Nobody is saving: all that no manifest names is left over."""
        clean(self.store, grace_s=0.0, dry_run=False)
        for step in self.listed():
            names = [name for name in self.place(step).names() if name.startswith("shard-")]
            is_read = any(held[0] == step for held in self.holds)
            assert is_read or names == sorted(distckpt.open(self.place(step)).manifest.file_names)

    @rule(ranks=st.integers(1, 3))
    def resume_elsewhere(self, ranks):
        """A job that only reads takes nothing over."""
        expected, epoch = self.newest_good(), self.epoch()

        def work(comm):
            net = empty(comm)
            try:
                return Manager(self.store, comm=comm).load_latest_into(net, default=0), net
            except LoadFailed:
                return None, net

        for rank, (step, net) in enumerate(run_ranks(ranks, work, timeout_s=60)):
            if expected is None and self.model:
                assert step is None
                continue
            assert step == (expected or 0)
            mine = slice(_ROWS * rank // ranks, _ROWS * (rank + 1) // ranks)
            self.check_loaded(step, net, mine)
        assert self.epoch() == epoch

    @rule(keep=keeps)
    def explain(self, keep):
        """It says what would go, and touches nothing."""
        before = dict(self.store.objects)
        manager = Manager(self.store, comm=distckpt.Solo(), keep=keep.policy())
        verdicts = {verdict.step: verdict for verdict in manager.explain()}
        assert sorted(verdicts) == sorted(self.model)
        upto = max(self.model, default=0)
        goes = {step for step, verdict in verdicts.items() if not verdict.kept}
        held = {step for step in self.model if self.is_held(step)}
        good = [step for step in self.listed() if not self.is_marked(step)]
        assert goes - held == (self.to_go(upto, keep) if good else set())
        assert all(verdict.why for verdict in verdicts.values())
        assert self.store.objects == before

    # ------------------------------------------------------------------------------ at any time

    @invariant()
    def the_steps_are_the_models(self):
        manager = self.reader()
        listed = self.listed()
        assert manager.steps() == sorted(listed)
        assert manager.latest() == max(listed, default=None)
        best = min(listed, key=lambda step: (listed[step].loss, -step), default=None)
        assert manager.best("loss") == best

    @invariant()
    def every_checkpoint_is_whole(self):
        for step, saved in self.listed().items():
            prefix = f"step-{step:08d}/"
            objects = {n: d for n, d in self.store.objects.items() if n.startswith(prefix)}
            if self.looked_at.get(step) == (saved, objects):
                continue
            checkpoint = distckpt.open(self.place(step))
            assert (checkpoint.step, checkpoint.values["salt"]) == (step, saved.salt)
            if not saved.bad_bytes:
                assert np.array_equal(checkpoint["w"][...], whole(step, saved.salt))
            self.looked_at[step] = (replace(saved), objects)

    @invariant()
    def what_is_held_can_be_read(self):
        for step, salt, checkpoint, hold in self.holds:
            assert hold.lost is None
            assert np.array_equal(checkpoint["w"][...], whole(step, salt))

    @invariant()
    def what_is_not_ours_is_left_alone(self):
        assert {name: self.store.objects.get(name) for name in FOREIGN} == FOREIGN


# 5,000 runs take about half an hour.
TestRun = pytest.mark.timeout(4 * 3600)(Run.TestCase)
# A part of the tests tries a few; whoever asks for many means this.
_ASKED = settings.default.max_examples
TestRun.settings = settings(
    max_examples=20 if _ASKED <= 100 else _ASKED, stateful_step_count=15, print_blob=True
)
