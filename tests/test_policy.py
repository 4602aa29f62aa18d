"""When a Manager saves and what it keeps, decided from plain values alone."""

from __future__ import annotations

import math
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt import (
    AtMostOverhead,
    AtSteps,
    Best,
    EverySeconds,
    EverySteps,
    KeepAt,
    KeepBest,
    KeepEvery,
    KeepFor,
    KeepLast,
    OnPreemption,
    YoungDaly,
)
from distckpt.policy import Entry, Moment, metrics_of, number, reasons, uses_metrics

# ------------------------------------------------------------------------------------------ saving


def due_steps(policy, last=12, **given_):
    return [step for step in range(1, last + 1) if policy.due(Moment(step, **given_))]


def test_every_steps_is_due_at_multiples():
    assert due_steps(EverySteps(4)) == [4, 8, 12]


def test_at_steps_is_due_at_those():
    assert due_steps(AtSteps(3, 11)) == [3, 11]
    assert AtSteps(range(2, 6, 2)).steps == (2, 4)


def test_every_seconds_counts_from_the_begin_of_the_last_save():
    policy = EverySeconds(timedelta(seconds=10))
    assert not policy.due(Moment(1, now_s=109.0, last_save_s=100.0))
    assert policy.due(Moment(1, now_s=110.0, last_save_s=100.0))


def test_a_clock_that_goes_back_is_not_due_and_breaks_nothing():
    assert not EverySeconds(10).due(Moment(1, now_s=0.0, last_save_s=100.0))
    assert not AtMostOverhead(0.1).due(Moment(1, now_s=0.0, last_save_s=100.0, cost_s=1.0))


def test_on_preemption_is_due_when_asked_to_stop():
    assert not OnPreemption().due(Moment(1))
    assert OnPreemption().due(Moment(1, stop="SIGTERM on rank 3"))


@pytest.mark.parametrize(
    ("lowest", "value", "expected"),
    [(True, 0.4, True), (True, 0.5, False), (False, 0.6, True), (False, 0.5, False)],
)
def test_best_is_due_when_better_than_all_before(lowest, value, expected):
    best = Best("loss", lowest=lowest)
    moment = Moment(1, metrics={"loss": value}, saved=[{"loss": 0.5}, {"other": 0.0}])
    assert best.due(moment) is expected


@pytest.mark.parametrize("metrics", [None, {}, {"loss": math.nan}, {"other": 0.0}])
def test_a_metric_that_is_missing_or_nan_is_never_best(metrics):
    assert not Best("loss").due(Moment(1, metrics=metrics))


def test_a_nan_that_was_saved_stands_in_nobodys_way():
    assert Best("loss").due(Moment(1, metrics={"loss": 9.0}, saved=[{"loss": math.nan}]))


def test_best_can_ask_for_a_real_improvement():
    best = Best("loss", min_delta=0.1)
    saved = [{"loss": 0.5}]
    assert not best.due(Moment(1, metrics={"loss": 0.41}, saved=saved))
    assert best.due(Moment(1, metrics={"loss": 0.39}, saved=saved))


def test_overhead_waits_until_the_cost_is_a_small_part():
    policy = AtMostOverhead(0.01)
    assert policy.due(Moment(1))  # nothing is measured yet
    assert not policy.due(Moment(1, now_s=99.0, cost_s=1.0))
    assert policy.due(Moment(1, now_s=100.0, cost_s=1.0))


def test_young_and_daly_take_the_square_root():
    policy = YoungDaly(timedelta(hours=1))
    assert policy.interval_s(2.0) == 120.0
    assert policy.due(Moment(1))
    assert not policy.due(Moment(1, now_s=119.0, cost_s=2.0))
    assert policy.due(Moment(1, now_s=120.0, cost_s=2.0))


def test_policies_are_combined():
    assert due_steps(EverySteps(4) | EverySteps(6)) == [4, 6, 8, 12]
    assert due_steps(EverySteps(4) & EverySteps(6)) == [12]
    assert due_steps(EverySteps(2) & (AtSteps(2, 3, 4) | EverySteps(5))) == [2, 4, 10]
    assert len((EverySteps(1) | EverySteps(2) | EverySteps(3)).policies) == 3


def test_a_combination_looks_at_metrics_if_a_part_does():
    assert uses_metrics(EverySteps(3) | Best("loss"))
    assert uses_metrics(EverySteps(3) & (AtSteps(3) | Best("loss")))
    assert not uses_metrics(EverySteps(3) | EverySeconds(3))


def test_any_class_with_the_method_is_a_policy():
    class Odd:
        def due(self, moment):
            return moment.step % 2 == 1

    assert due_steps(EverySteps(4) | Odd(), last=5) == [1, 3, 4, 5]
    assert due_steps(EverySteps(3) & Odd()) == [3, 9]


@pytest.mark.parametrize(
    "make",
    [
        lambda: EverySteps(0),
        lambda: EverySeconds(0),
        lambda: EverySeconds(math.inf),
        lambda: EverySeconds(math.nan),
        lambda: EverySeconds(timedelta(seconds=-1)),
        AtSteps,
        lambda: AtSteps([]),
        lambda: AtSteps(-1),
        lambda: AtMostOverhead(0),
        lambda: AtMostOverhead(1.0),
        lambda: YoungDaly(0),
        lambda: Best("loss", min_delta=-1.0),
        lambda: EverySteps(3) & AtSteps(4, 5),
        lambda: AtSteps(4) & AtSteps(5),
        lambda: KeepLast(0),
        lambda: KeepEvery(0),
        KeepEvery,
        lambda: KeepEvery(3, seconds=4),
        lambda: KeepEvery(seconds=0),
        lambda: KeepBest("loss", 0),
        KeepAt,
        lambda: KeepFor(0),
        lambda: KeepAt(3) & KeepAt(4),
        lambda: KeepAt(3) & KeepEvery(2),
    ],
)
def test_what_could_never_fire_or_keep_nothing_is_refused_when_it_is_made(make):
    with pytest.raises(ValueError, match=r"expected|no step fits"):
        make()


@pytest.mark.parametrize("make", [lambda: EverySteps(1) | 3, lambda: KeepLast(1) & "all"])
def test_what_is_no_policy_is_not_combined(make):
    with pytest.raises(TypeError, match=r"is no (save|keep) policy"):
        make()


# ------------------------------------------------------------------------------------------ keeping


def entries(*steps, every_s=100.0, loss=None):
    return [
        Entry(step, every_s * n, {} if loss is None else {"loss": loss[n]})
        for n, step in enumerate(steps)
    ]


def test_keep_last_keeps_the_last():
    assert KeepLast(2).kept(entries(1, 5, 9)) == {5, 9}
    assert KeepLast(5).kept(entries(1, 5)) == {1, 5}
    assert KeepLast(1).kept([]) == set()


def test_keep_every_keeps_multiples_or_one_a_while():
    assert KeepEvery(100).kept(entries(50, 100, 150, 200)) == {100, 200}
    assert KeepEvery(seconds=250).kept(entries(1, 2, 3, 4, 5, 6, 7)) == {1, 4, 7}


def test_a_clock_that_was_set_back_does_not_stop_keeping():
    found = [Entry(1, 1e6), Entry(2, 0.0), Entry(3, 50.0), Entry(4, 100.0)]
    assert KeepEvery(seconds=100).kept(found) == {1, 2, 4}
    assert KeepFor(60).kept(found) == {1, 3, 4}


def test_keep_best_keeps_the_best_and_of_equals_the_newest():
    found = entries(1, 2, 3, 4, 5, loss=[0.3, 0.1, 0.1, math.nan, 0.2])
    assert KeepBest("loss").kept(found) == {3}
    assert KeepBest("loss", 2).kept(found) == {2, 3}
    assert KeepBest("loss", 1, lowest=False).kept(found) == {1}
    assert KeepBest("accuracy").kept(found) == set()


def test_keep_at_and_keep_for():
    assert KeepAt(2, 7).kept(entries(1, 2, 3)) == {2}
    assert KeepFor(timedelta(seconds=100)).kept(entries(1, 2, 3)) == {2, 3}


@given(steps=st.sets(st.integers(0, 60), max_size=20), data=st.data())
def test_combinations_are_unions_and_intersections(steps, data):
    found = entries(*sorted(steps), loss=[step % 7 for step in sorted(steps)])
    simple = st.sampled_from(
        [KeepLast(3), KeepEvery(5), KeepBest("loss", 2), KeepFor(350), KeepEvery(seconds=200)]
    )
    one, other = data.draw(simple), data.draw(simple)
    assert (one | other).kept(found) == one.kept(found) | other.kept(found)
    assert (one & other).kept(found) == one.kept(found) & other.kept(found)
    assert set(reasons(one | other, found)) == (one | other).kept(found)
    assert set(reasons(one & other, found)) == (one & other).kept(found)


def test_the_reasons_name_each_part_that_keeps():
    policy = KeepLast(1) | (KeepEvery(2) & KeepFor(1000))
    assert reasons(policy, entries(1, 2, 4)) == {
        2: f"{KeepEvery(2)!r} and {KeepFor(1000)!r}",
        4: f"{KeepLast(1)!r}, {KeepEvery(2)!r} and {KeepFor(1000)!r}",
    }


def test_a_combination_is_printed_as_it_is_written():
    assert repr(EverySteps(4) | OnPreemption()) == "(EverySteps(steps=4) | OnPreemption())"
    keep = KeepLast(1) | (KeepEvery(2) & KeepFor(9))
    assert repr(keep) == (
        "(KeepLast(count=1) | (KeepEvery(steps=2, seconds=None) & KeepFor(seconds=9.0)))"
    )


def test_the_metrics_that_a_policy_looks_at_are_those_of_its_parts():
    assert metrics_of(EverySteps(3) | (Best("loss") & Best("accuracy"))) == {"loss", "accuracy"}
    assert metrics_of(KeepBest("loss") | KeepLast(1)) == {"loss"}
    assert metrics_of(None) == set()


@pytest.mark.parametrize("value", [math.nan, None, "low", [1, 2]])
def test_what_is_no_number_is_no_metric(value):
    assert number({"loss": value}, "loss") is None
    assert not Best("loss").due(Moment(1, metrics={"loss": value}))


@pytest.mark.parametrize("policy", [AtMostOverhead(0.5), YoungDaly(100)])
def test_while_no_cost_is_known_only_the_first_save_is_due(policy):
    assert policy.due(Moment(1, now_s=0.0))
    assert not policy.due(Moment(2, now_s=1e9, saves=1))
