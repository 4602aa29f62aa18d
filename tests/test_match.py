"""Which saved name goes into which wanted one: a table, and the rule spelled out a second time."""

from __future__ import annotations

import ast
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt import MatchError, Matching, match

_MANY = settings(max_examples=3 * settings.default.max_examples)

# Saved, wanted, options; then the pairs (wanted → saved), what is missing, what is unexpected.
TABLE = [
    # Exact names match, and leave.
    ("w b", "w b", {}, {"w": "w", "b": "b"}, "", ""),
    ("w b", "b", {}, {"b": "b"}, "", "w"),
    ("w", "w b", {}, {"w": "w"}, "b", ""),
    ("w", "w", {"strict": True}, {"w": "w"}, "", ""),
    ("w extra", "w", {"strict": True}, {"w": "w"}, "", "extra"),
    ("w a.w", "w", {}, {"w": "w"}, "", "a.w"),
    ("w a.w", "w a.w", {}, {"w": "w", "a.w": "a.w"}, "", ""),
    ("w a.w", "a.w b.w", {}, {"a.w": "a.w", "b.w": "w"}, "", ""),
    # Two names are at distance k when one is the other plus k leading dotted components.
    ("conv.0.weight", "net.conv.0.weight", {}, {"net.conv.0.weight": "conv.0.weight"}, "", ""),
    ("net.conv.0.weight", "conv.0.weight", {}, {"conv.0.weight": "net.conv.0.weight"}, "", ""),
    ("a.b.w", "w", {}, {"w": "a.b.w"}, "", ""),
    ("w", "a.b.c.w", {}, {"a.b.c.w": "w"}, "", ""),
    ("preweight", "weight", {}, {}, "weight", "preweight"),
    ("weight", "preweight", {}, {}, "preweight", "weight"),
    ("a.x.w", "b.x.w", {}, {}, "b.x.w", "a.x.w"),
    ("w.a", "w", {}, {}, "w", "w.a"),
    ("W", "a.w", {}, {}, "a.w", "W"),
    # An empty name matches only exactly.
    ("|", "|", {}, {"": ""}, "", ""),
    ("|", "a.", {}, {}, "a.", "|"),
    ("a.", "|", {}, {}, "|", "a."),
    ("a", "|", {}, {}, "|", "a"),
    # An empty component is one, too.
    (".w", "w", {}, {"w": ".w"}, "", ""),
    ("a..w", "w", {}, {"w": "a..w"}, "", ""),
    ("a..w", ".w", {}, {".w": "a..w"}, "", ""),
    # Nearer pairs go first, and both names leave.
    ("a.w b.a.w", "w c.b.a.w", {}, {"w": "a.w", "c.b.a.w": "b.a.w"}, "", ""),
    ("a.w b.a.w", "w", {}, {"w": "a.w"}, "", "b.a.w"),
    ("x.y.w x.b", "w b", {}, {"w": "x.y.w", "b": "x.b"}, "", ""),
    ("w", "a.w", {"strict": False}, {"a.w": "w"}, "", ""),
    # The saved names are filtered first, by plain startswith.
    ("a.w b.w", "w", {"filter_prefix": "b."}, {"w": "a.w"}, "", ""),
    ("a.w b.w c.w", "w", {"filter_prefix": ("b.", "c")}, {"w": "a.w"}, "", ""),
    ("a.w b.w", "w", {"only_prefix": "a."}, {"w": "a.w"}, "", ""),
    ("a.w b.x c.y", "w x y", {"only_prefix": ["a", "b"]}, {"w": "a.w", "x": "b.x"}, "y", ""),
    (
        "model.w modelling.x",
        "w x",
        {"only_prefix": "model"},
        {"w": "model.w", "x": "modelling.x"},
        "",
        "",
    ),
    ("a.w a.b.w", "w", {"only_prefix": "a.", "filter_prefix": "a.b."}, {"w": "a.w"}, "", ""),
    ("a.w b.w", "w", {"select": lambda name: name[0] == "b"}, {"w": "b.w"}, "", ""),
    ("w b", "w b", {"filter_prefix": ()}, {"w": "w", "b": "b"}, "", ""),
    ("w b", "w b", {"only_prefix": []}, {"w": "w", "b": "b"}, "", ""),
    ("w b", "w b", {"filter_prefix": "z"}, {"w": "w", "b": "b"}, "", ""),
    ("w b", "w b", {"filter_prefix": "b"}, {"w": "w"}, "b", ""),
    # rename: a mapping or a callable, saved name → name. Results name what was saved.
    ("old", "new", {"rename": {"old": "new"}}, {"new": "old"}, "", ""),
    (
        "old other",
        "new other",
        {"rename": {"old": "new"}},
        {"new": "old", "other": "other"},
        "",
        "",
    ),
    (
        "a/w a/b",
        "a.w a.b",
        {"rename": lambda name: name.replace("/", ".")},
        {"a.w": "a/w", "a.b": "a/b"},
        "",
        "",
    ),
    ("old", "net.new", {"rename": {"old": "new"}}, {"net.new": "old"}, "", ""),
    ("old", "w", {"rename": {"old": "new"}}, {}, "w", "old"),
    ("a b", "a b", {"rename": {"a": "b", "b": "a"}}, {"a": "b", "b": "a"}, "", ""),
    ("x.old y", "new", {"rename": {"x.old": "new"}, "only_prefix": "x."}, {"new": "x.old"}, "", ""),
    ("old", "new", {"rename": {"old": "new"}, "strict": True}, {"new": "old"}, "", ""),
    # Nothing saved, or nothing wanted.
    ("", "w", {}, {}, "w", ""),
    ("w", "", {}, {}, "", "w"),
    ("w", "", {"strict": True}, {}, "", "w"),
    ("", "", {"strict": True}, {}, "", ""),
]


def names(text):
    """Split a list of names; "|" stands for the empty name."""
    return ["" if name == "|" else name for name in text.split()]


@pytest.mark.parametrize("case", TABLE, ids=lambda case: f"{case[0]} for {case[1]}")
def test_names_match_as_the_table_says(case):
    saved, wanted, options, pairs, missing, unexpected = case
    found = match(names(saved), names(wanted), **options)
    assert found.pairs == pairs
    assert found.missing == names(missing)
    assert found.unexpected == names(unexpected)


@pytest.mark.parametrize(
    ("saved", "wanted", "ambiguous"),
    [
        ("a.w b.w", "w", {"w": ["a.w", "b.w"]}),
        ("w", "a.w b.w", {"w": ["a.w", "b.w"]}),
        ("a.b.w c.d.w", "w", {"w": ["a.b.w", "c.d.w"]}),
        # A name that is wanted at one end and saved at the other, each one component away.
        ("a.w z.y.a.w y.b", "y.a.w b", {"y.a.w": ["a.w", "z.y.a.w"]}),
        # Exact pairs have left, so they don't count.
        ("a.w b.w c.w", "a.w w", {"w": ["b.w", "c.w"]}),
        # Two ambiguities of one distance are both told; one of a larger distance isn't yet.
        ("a.w b.w a.v b.v", "w v", {"w": ["a.w", "b.w"], "v": ["a.v", "b.v"]}),
        ("a.w b.w a.a.v b.b.v", "w v", {"w": ["a.w", "b.w"]}),
        # The same saved name for two, one of which could have another.
        ("w x.a.w", "a.w b.w", {"a.w": ["w", "x.a.w"], "w": ["a.w", "b.w"]}),
    ],
)
def test_a_name_in_two_pairs_of_one_distance_is_refused_with_the_candidates(
    saved, wanted, ambiguous
):
    with pytest.raises(MatchError) as caught:
        match(names(saved), names(wanted))
    found = {name: sorted(candidates) for name, candidates in caught.value.ambiguous.items()}
    assert found == ambiguous
    for name, candidates in ambiguous.items():
        assert repr(name) in str(caught.value)
        assert all(repr(candidate) in str(caught.value) for candidate in candidates)


def test_what_is_ambiguous_by_suffix_is_no_matter_to_strict():
    found = match(["a.w", "b.w", "w"], ["w"], strict=True)
    assert (found.pairs, found.unexpected) == ({"w": "w"}, ["a.w", "b.w"])


def test_strict_never_matches_by_suffix_and_reports_all_that_is_missing():
    with pytest.raises(MatchError, match=r"2 of the 3 wanted names .*strict=True") as caught:
        match(["w", "net.b", "c"], ["w", "b", "x"], strict=True)
    assert caught.value.missing == ["b", "x"]
    assert caught.value.unexpected == ["net.b", "c"]
    assert "missing: 'b', 'x'" in str(caught.value)
    assert "rename=" in str(caught.value)


@pytest.mark.parametrize("option", ["filter_prefix", "only_prefix"])
@pytest.mark.parametrize("value", ["", ["a", ""], ("",)])
def test_an_empty_prefix_is_refused(option, value):
    with pytest.raises(ValueError, match=f"{option}=.* empty prefix would match every name"):
        match(["a.w"], ["w"], **{option: value})


@pytest.mark.parametrize(
    "options",
    [
        {"filter_prefix": "net"},
        {"only_prefix": "other"},
        {"only_prefix": "net.a", "filter_prefix": "net.a"},
        {"select": lambda name: False},
    ],
)
def test_filters_that_leave_nothing_are_refused_with_the_names_there_were(options):
    with pytest.raises(MatchError, match="none of the 2 saved names is left") as caught:
        match(["net.a", "net.b"], ["a"], **options)
    assert caught.value.unexpected == ["net.a", "net.b"]
    assert "'net.a', 'net.b'" in str(caught.value)


@pytest.mark.parametrize("rename", [{"a": "w", "b": "w"}, {"a": "b"}, lambda name: "w"])
def test_two_saved_names_renamed_to_one_are_refused(rename):
    with pytest.raises(MatchError, match="gives several saved names one name") as caught:
        match(["a", "b"], ["w"], rename=rename)
    assert list(caught.value.ambiguous.values()) == [["a", "b"]]


def test_results_stand_in_the_order_of_what_was_given():
    saved = ["c", "x.b", "a", "q", "p"]
    found = match(saved, ["b", "z", "a", "y", "c"])
    assert list(found.pairs) == ["b", "a", "c"]
    assert found.missing == ["z", "y"]
    assert found.unexpected == ["q", "p"]
    assert found.by_suffix == ["b"]


def test_a_name_wanted_twice_counts_once():
    assert match(["w"], ["a.w", "a.w"]) == Matching({"a.w": "w"}, [], [], ["a.w"])


def test_names_may_come_from_any_iterable():
    assert match(iter(["w"]), (name for name in ["w"])).pairs == {"w": "w"}


# ---------------------------------------------------------------------- the rule, spelled out again


def distance(a, b):
    """Return k if one name is the other plus k leading dotted components, else None."""
    longer, shorter = (a, b) if len(a) > len(b) else (b, a)
    if not shorter or not longer.endswith(f".{shorter}"):
        return None
    return longer.removesuffix(f".{shorter}").count(".") + 1


def matched_by_hand(saved, wanted):
    """Return wanted → saved, or the set of ambiguous names."""
    pairs = {name: name for name in wanted if name in saved}
    for k in range(1, 20):
        here = [
            (want, save)
            for want in wanted
            for save in saved
            if want not in pairs and save not in pairs.values() and distance(want, save) == k
        ]
        often = [*Counter(want for want, _ in here).items()]
        often += Counter(save for _, save in here).items()
        twice = {name for name, count in often if count > 1}
        if twice:
            return twice
        pairs |= dict(here)
    return pairs


some_names = st.lists(
    st.lists(st.sampled_from(["a", "b", ""]), min_size=1, max_size=4).map(".".join),
    max_size=6,
    unique=True,
)


@_MANY
@given(some_names, some_names)
def test_names_match_by_the_rule_as_spelled_out_in_words(saved, wanted):
    expected = matched_by_hand(saved, wanted)
    if isinstance(expected, set):
        with pytest.raises(MatchError) as caught:
            match(saved, wanted)
        assert set(caught.value.ambiguous) == expected
    else:
        found = match(saved, wanted)
        assert found.pairs == expected
        assert list(found.pairs) == [name for name in wanted if name in expected]
        assert found.missing == [name for name in wanted if name not in expected]
        assert found.unexpected == [name for name in saved if name not in expected.values()]
        assert found.by_suffix == [name for name in found.pairs if found.pairs[name] != name]


@_MANY
@given(some_names, some_names, st.randoms(use_true_random=False))
def test_the_result_does_not_depend_on_the_order_of_the_names(saved, wanted, random):
    def result(saved, wanted):
        try:
            found = match(saved, wanted)
        except MatchError as exc:
            return {name: sorted(candidates) for name, candidates in exc.ambiguous.items()}
        return found.pairs, sorted(found.missing), sorted(found.unexpected)

    expected = result(saved, wanted)
    random.shuffle(saved)
    random.shuffle(wanted)
    assert result(saved, wanted) == expected


@_MANY
@given(some_names, some_names)
def test_the_advice_about_an_ambiguous_name_settles_it(saved, wanted):
    try:
        match(saved, wanted)
    except MatchError as exc:
        ambiguous, lines = exc.ambiguous, str(exc).splitlines()[1:]
    else:
        return
    assert len(lines) >= len(ambiguous)
    for line in lines:
        option, advice = re.search(r"(filter_prefix|rename)=(.*)$", line).groups()
        advice = ast.literal_eval(advice)
        name = re.match(r"  (?:wanted|saved) ('[^']*')", line).group(1)
        try:
            found = match(saved, wanted, **{option: advice})
        except MatchError as again:
            still = again.ambiguous.get(ast.literal_eval(name), ())
            assert set(still) != set(ambiguous[ast.literal_eval(name)])
        else:
            assert found.pairs
