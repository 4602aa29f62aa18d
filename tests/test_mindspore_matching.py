"""Matching and conversion, case by case beside what MindSpore 2.10 did.

The golden cases hold what MindSpore did. Where distckpt does something else, the case is in the
table of ``docs/mindspore-differences.md``. ``python tests/test_mindspore_matching.py`` prints the
table; who changes it must be able to say why.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from distckpt.errors import MatchError
from distckpt.mindspore import NetMismatch, load_checkpoint, load_param_into_net, save_checkpoint

_HERE = Path(__file__).parent
_GOLDEN = _HERE / "data" / "golden"
CASES = {
    case["id"]: case
    for case in json.loads((_GOLDEN / "matching_cases.json").read_text(encoding="utf-8"))["cases"]
}
DTYPES = json.loads((_GOLDEN / "dtype_cases.json").read_text(encoding="utf-8"))
DOCS = _HERE.parent / "docs" / "mindspore-differences.md"


def full(entry):
    if "shape" not in entry:
        return "a text"
    return np.full(entry["shape"], entry["fill"], entry["dtype"])


def ours(case, folder):
    """Run a case: what was loaded, or the error, as text."""
    file = Path(folder) / "case.ckpt"
    save_checkpoint([{"name": e["name"], "data": full(e)} for e in case["ckpt"]], file)
    sources = {e["fill"]: e["name"] for e in case["ckpt"] if "shape" in e}
    net = {
        name: np.zeros(entry["shape"], entry["dtype"])
        for name, entry in zip(case["net_names_seen"], case["net"], strict=True)
    }
    prefixes = {key: case[key] for key in ("filter_prefix", "specify_prefix") if key in case}
    try:
        params = load_checkpoint(file, **prefixes)
        missing, unused = load_param_into_net(net, params, case["strict_load"])
    except (MatchError, ValueError, TypeError) as exc:
        assert not any(array.any() for array in net.values()), "an error leaves the net as it was"
        return "refused: " + (
            "names match in two ways"
            if getattr(exc, "ambiguous", None)
            else "shapes differ"
            if isinstance(exc, NetMismatch)
            else "the prefix"
        )
    loaded = {name: sources[array.flat[0]] for name, array in net.items() if array.any()}
    return outcome(loaded, missing, unused)


def theirs(case):
    """Say what MindSpore did, as text."""
    after = case.get("after", [])
    loaded = {entry["name"]: entry["from"] for entry in after if entry["from"] is not None}
    shapes = {
        name: entry["shape"]
        for name, entry in zip(case["net_names_seen"], case["net"], strict=True)
    }
    changed = {e["name"]: tuple(e["shape"]) for e in after if e["shape"] != shapes[e["name"]]}
    if "error" in case:
        stage = case["error"]["stage"]
        text = "refused: " + ("shapes differ" if stage == "load_param_into_net" else "the prefix")
        return text + (f", after loading {_listed(loaded)}" if loaded else "")
    text = outcome(loaded, case["param_not_load"], case["ckpt_not_load"])
    return text + "".join(f"; {name!r} takes the shape {shape}" for name, shape in changed.items())


def outcome(loaded, missing, unused):
    parts = []
    if loaded:
        pairs = [f"`{a}`" if a == b else f"`{a}` from `{b}`" for a, b in loaded.items()]
        parts.append("loads " + ", ".join(pairs))
    if missing:
        parts.append("missing " + _listed(missing))
    if unused:
        parts.append("unused " + _listed(unused))
    return "; ".join(parts) or "nothing"


def _listed(names):
    return ", ".join(f"`{name}`" for name in names)


def table(folder):
    """Make the table of the cases in which the two differ."""
    rows = ["| case | net | saved | MindSpore 2.10 | distckpt |", "| --- | --- | --- | --- | --- |"]
    for case in CASES.values():
        mine, their = ours(case, folder), theirs(case)
        if mine != their:
            strict = " (strict)" if case["strict_load"] else ""
            shapes = len({str(e.get("shape")) for e in (*case["net"], *case["ckpt"])}) > 1
            cells = [", ".join(_entry(e, shapes) for e in case[kind]) for kind in ("net", "ckpt")]
            rows.append(f"| {case['id']}{strict} | {cells[0]} | {cells[1]} | {their} | {mine} |")
    return "\n".join(rows)


def _entry(entry, shapes):
    shape = "text" if "shape" not in entry else str(tuple(entry["shape"]))
    return f"`{entry['name']}`" + (f" {shape}" if shapes else "")


@pytest.mark.parametrize("name", CASES)
def test_a_case_gives_what_mindspore_gave_or_is_in_the_table_of_differences(name, tmp_path):
    case = CASES[name]
    mine, their = ours(case, tmp_path), theirs(case)
    row = re.search(
        rf"^\| {name}( \(strict\))? \|.*$", DOCS.read_text(encoding="utf-8"), re.MULTILINE
    )
    if mine == their:
        assert row is None
    else:
        assert row is not None
        assert row[0].endswith(f"| {their} | {mine} |")


def test_the_table_of_differences_is_up_to_date(tmp_path):
    assert table(tmp_path) in DOCS.read_text(encoding="utf-8")


def dtype_of(name):
    return np.dtype(getattr(ml_dtypes, name, name))


# What a tensor holds that was loaded without conversion: what was saved.
SAVED = {
    entry["ckpt"]: np.array(entry["strict"]["values"]).astype(dtype_of(entry["ckpt"]))
    for entry in DTYPES["matrix"]
    if entry["ckpt"] == entry["net"]
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("saved", SAVED)
def test_dtypes_are_converted_as_mindspore_does(saved, strict):
    for entry in DTYPES["matrix"]:
        if entry["ckpt"] != saved:
            continue
        expected = entry["strict" if strict else "loose"]
        net = {"w": np.zeros(len(SAVED[saved]), dtype_of(entry["net"]))}
        if expected["ok"]:
            load_param_into_net(net, {"w": SAVED[saved]}, strict)
            assert net["w"].astype(float).tolist() == [float(v) for v in expected["values"]]
        else:
            with pytest.raises(NetMismatch, match=f"wants {dtype_of(entry['net'])}, saved"):
                load_param_into_net(net, {"w": SAVED[saved]}, strict)
            assert not net["w"].any()


@pytest.mark.parametrize("pair", DTYPES["values"])
def test_a_value_converts_as_in_mindspore_or_does_not_fit_and_is_refused(pair):
    saved, wanted = map(dtype_of, pair.split("->"))
    for value, expected in zip(*DTYPES["values"][pair], strict=True):
        net = {"w": np.zeros(1, wanted)}
        source = np.array([value], saved)
        lost = (
            int(source[0]) != expected
            if saved.kind == "i"
            else np.isfinite(source[0]) and not math.isfinite(expected)
        )
        if lost:
            with pytest.raises(NetMismatch, match=f"1 of 1 values do not fit {wanted}"):
                load_param_into_net(net, {"w": source})
            assert not net["w"].any()
        else:
            load_param_into_net(net, {"w": source})
            np.testing.assert_array_equal(net["w"].astype(float), [float(expected)])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        print(table(made))  # noqa: T201
