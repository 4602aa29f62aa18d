"""The error tree, and how errors travel between ranks."""

from __future__ import annotations

import copy
import pickle
import re

import pytest

import distckpt
from distckpt import codec, errors
from distckpt.errors import (
    CheckpointError,
    CheckpointExists,
    CorruptCheckpoint,
    LayoutError,
    LoadFailed,
    MatchError,
    SaveFailed,
    StoreError,
    from_plain,
    raise_together,
    ranks_text,
    to_plain,
)

TREE = {
    "CheckpointNotFound": FileNotFoundError,
    "CheckpointExists": FileExistsError,
    "IncompleteCheckpoint": None,
    "CorruptCheckpoint": ValueError,
    "UnsupportedFormat": ValueError,
    "LayoutError": ValueError,
    "MatchError": LookupError,
    "StoreError": OSError,
    "SaveFailed": None,
    "LoadFailed": None,
}

EXAMPLES = [
    CheckpointError("plain"),
    CheckpointExists("there"),
    CorruptCheckpoint("bad block", path="shard-0", offset_bytes=4096),
    LayoutError("gap"),
    MatchError(
        "names",
        missing=["a"],
        unexpected=["b", "c"],
        ambiguous={"w": ["a.w", "b.w"]},
        mismatched={"x": "shape"},
    ),
    StoreError("disk full", url="/somewhere"),
    SaveFailed("lost", failures={1: "OSError: gone", 30: "late"}, committed=None),
    LoadFailed("bad", failures={0: "x"}, touched=["w", "b"]),
]

by_type = pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)


def test_all_errors_are_one_tree_and_public():
    found = {
        kind.__name__
        for kind in CheckpointError.__subclasses__()
        if kind.__module__ == "distckpt.errors"
    }
    assert found == set(TREE)
    for name, builtin in TREE.items():
        kind = getattr(distckpt, name)
        assert issubclass(kind, CheckpointError)
        assert builtin is None or issubclass(kind, builtin)


def test_the_tree_that_the_module_draws_is_the_tree():
    drawn = re.findall(r"^    [├└]── (\w+) +(?:\((\w+)\))?", errors.__doc__, re.MULTILINE)
    assert {name: base or None for name, base in drawn} == {
        name: base and base.__name__ for name, base in TREE.items()
    }


def test_attributes_say_nothing_by_default():
    assert vars(CorruptCheckpoint("m")) == {"path": None, "offset_bytes": None}
    assert vars(MatchError("m")) == {
        "missing": [],
        "unexpected": [],
        "ambiguous": {},
        "mismatched": {},
    }
    assert vars(StoreError("m")) == {
        "url": "",
        "refused": False,
        "undurable": False,
        "denied": False,
    }
    assert vars(SaveFailed("m")) == {"failures": {}, "committed": False}
    assert vars(LoadFailed("m")) == {"failures": {}, "touched": [], "damaged": False, "gone": False}


@by_type
def test_an_error_travels_to_another_rank_whole(error):
    there = from_plain(codec.unpack(codec.pack(to_plain(error))))
    assert type(there) is type(error)
    assert str(there) == str(error)
    assert vars(there) == vars(error)


@by_type
def test_an_error_can_be_copied_and_pickled_as_test_runners_do(error):
    for there in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (type(there), str(there), vars(there)) == (type(error), str(error), vars(error))


def test_a_foreign_error_travels_as_text_with_its_type():
    there = from_plain(to_plain(ZeroDivisionError("by zero")))
    assert type(there) is CheckpointError
    assert str(there) == "ZeroDivisionError: by zero"


def test_an_error_derived_from_ours_travels_as_the_nearest_of_ours():
    class QuotaExceeded(StoreError):
        pass

    there = from_plain(to_plain(QuotaExceeded("no room", url="s3://b")))
    assert type(there) is StoreError
    assert (str(there), there.url) == ("no room", "s3://b")


def test_a_report_of_an_error_names_its_type():
    assert errors.text(KeyError("w")) == "KeyError: 'w'"


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([3], "rank 3"),
        ([0, 2], "ranks 0, 2"),
        (list(range(9)), "ranks 0, 1, 2, 3, 4, 5, 6, 7, …"),
    ],
)
def test_ranks_are_named_in_a_sentence(ranks, text):
    assert ranks_text(ranks) == text


# ----------------------------------------------------------------------------- what all ranks raise


def plain(**by_rank):
    return {int(rank[1:]): to_plain(error) for rank, error in by_rank.items()}


def test_nothing_is_raised_where_no_rank_reports_anything():
    raise_together({}, "url", SaveFailed, "save")


def test_a_failure_on_the_way_names_every_rank_with_its_cause():
    found = plain(r1=StoreError("disk full", url="/x"), r4=OSError("gone"))
    with pytest.raises(SaveFailed) as caught:
        raise_together(found, "/run", SaveFailed, "save", committed=None)
    assert caught.value.failures == {
        1: "StoreError: disk full",
        4: "CheckpointError: OSError: gone",
    }
    assert caught.value.committed is None
    assert str(caught.value).startswith("/run: the save failed on ranks 1, 4:")
    assert "rank 1: StoreError: disk full" in str(caught.value)


def test_what_every_failing_rank_was_given_wrong_keeps_its_own_class():
    found = plain(r0=LayoutError("gap in 'w'"), r2=LayoutError("gap in 'w'"))
    with pytest.raises(LayoutError, match="/run: on ranks 0, 2: gap in 'w'"):
        raise_together(found, "/run", SaveFailed, "save", own_kind=True)


def test_different_messages_of_one_kind_are_all_told():
    found = plain(r0=LayoutError("a"), r1=LayoutError("b"))
    with pytest.raises(LayoutError, match=r"on rank 0: a\n.*on rank 1: b"):
        raise_together(found, "/run", SaveFailed, "save", own_kind=True)


def test_attributes_of_one_kind_are_united():
    found = plain(
        r0=MatchError("a", missing=["x", "y"], mismatched={"p": "shape"}),
        r1=MatchError("b", missing=["y", "z"], mismatched={"q": "dtype"}),
    )
    with pytest.raises(MatchError) as caught:
        raise_together(found, "/run", LoadFailed, "load", own_kind=True)
    assert caught.value.missing == ["x", "y", "z"]
    assert caught.value.mismatched == {"p": "shape", "q": "dtype"}


def test_errors_of_different_kinds_are_a_failure_of_the_whole():
    found = plain(r0=LayoutError("a"), r1=MatchError("b"))
    with pytest.raises(LoadFailed):
        raise_together(found, "/run", LoadFailed, "load", own_kind=True)


def test_what_went_wrong_on_the_way_is_never_taken_for_a_wrong_call():
    found = plain(r0=CorruptCheckpoint("bits", path="p"))
    with pytest.raises(LoadFailed, match="CorruptCheckpoint: bits"):
        raise_together(found, "/run", LoadFailed, "load", own_kind=True)
