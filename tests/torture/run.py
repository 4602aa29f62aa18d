"""``make torture``: everything that is tried at large, and the report in docs/reliability.md.

Each part runs in a process of its own, under a time-out, as many at once as there are cores.
``python run.py [--scale quick] [--only PART]``; if anything was found, the status is 1. What came
of each part is kept in ``build/torture``, so that one can be run again by itself: the report is
made of the newest of each, once all have been run in full, and says of when they are.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import crashes
import damage
import machine
import mpi_crashes
import power_loss
import races

sys.path.insert(0, str(Path(__file__).parents[1]))

import test_manager_model

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "docs" / "reliability.md"
RESULTS = ROOT / "build" / "torture"
_BEGIN, _END = "<!-- written by make torture -->\n", "<!-- end -->\n"


@dataclass
class Result:
    """What came of a part.

    Attributes:
        cases: How many were tried.
        text: What they are made of.
        wrong: What is wrong, a text each.
    """

    cases: int
    text: str
    wrong: list


@dataclass
class Ended:
    """A part that was run.

    Attributes:
        name: Its name.
        result: What came of it.
        seconds: How long it took.
        date: When.
    """

    name: str
    result: Result
    seconds: float
    date: str


@dataclass(frozen=True)
class Part:
    """Something to try at large.

    Attributes:
        name: Its name.
        sizes: How much there is to do, by scale.
        run: Called with one of these.
        minutes: How long it may take; a third of that unless it is done in full.
    """

    name: str
    sizes: dict
    run: Callable[[int], Result]
    minutes: float


def _sizes(full, quick, test):
    """Of a part in full, of a quick run, and within the tests."""
    return {"full": full, "quick": quick, "test": test}


def _crashes(count):
    cases = list(crashes.every_case())
    every = len(cases)
    cases = crashes.covering(cases, count)
    killed, wrong = crashes.run_cases(cases, workers=8, timeout_s=4.0)
    return Result(killed, f"{len(cases)} of {every} moments", [f"{c}: {w}" for c, w in wrong])


def _mpi_crashes(count):
    cases = list(mpi_crashes.every_case())
    every = len(cases)
    cases = mpi_crashes.covering(cases, count)
    killed, wrong = mpi_crashes.run_cases(cases, workers=3, timeout_s=4.0)
    text = f"{len(cases)} of {every} cases; not every point is passed in each"
    return Result(killed, text, [f"{c}: {w}" for c, w in wrong])


def _power_loss(seeds):
    cases, wrong = 0, []
    for scenario in power_loss.SCENARIOS:
        tried, found = power_loss.lose_power_everywhere(scenario, seeds=seeds)
        cases += tried
        wrong += found
    return Result(cases, "after every call, in several ways each", wrong)


def _damage(count, seed=0):
    _, _, wrong = damage.damage(count, seed=seed)
    return Result(count, "three quarters a flipped byte, one a file cut short", wrong)


def _races(rounds):
    wrong = races.race(rounds, overwrite=False) + races.race(rounds, overwrite=True)
    return Result(2 * rounds, "half of them overwriting, with a reader", wrong)


def _machine(count, seed=0, kind=machine.Checkpoints):
    try:
        machine.run(count, kind=kind, seed_number=seed, database=None)
    except Exception as exc:  # the finding, with the steps that lead to it
        notes = "\n".join(getattr(exc, "__notes__", []))
        return Result(count, "", [f"{type(exc).__name__}: {exc}\n{notes}"])
    return Result(count, "of up to 12 steps each", [])


def _fuzz(seconds):
    """The reader of manifests for so long, then each for a tenth of it."""
    wrong = []
    for options in (
        [f"SECONDS={seconds}", "READERS=manifest"],
        [f"SECONDS={max(seconds // 10, 1)}"],
    ):
        done = subprocess.run(
            ["make", "--no-print-directory", "fuzz", *options],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            wrong.append(done.stdout[-4000:])
    return Result(seconds, "seconds for manifests, a tenth for each other reader", wrong)


PARTS = [
    Part("fuzzing of readers", _sizes(600, 10, 1), _fuzz, 45),
    Part("crashes under mpirun", _sizes(10_000, 24, 10), _mpi_crashes, 30),
    Part("crashes of forked ranks", _sizes(10_000, 120, 24), _crashes, 30),
    *(
        Part(f"state machine, seed {n}", _sizes(2_500, 50, 20), partial(_machine, seed=n), 30)
        for n in range(4)
    ),
    *(
        Part(
            f"state machine of the Manager, seed {n}",
            _sizes(1_250, 25, 5),
            partial(_machine, seed=n, kind=test_manager_model.Run),
            60,
        )
        for n in range(4)
    ),
    *(
        Part(f"damaged bytes, seed {n}", _sizes(50_000, 2_000, 500), partial(_damage, seed=n), 20)
        for n in range(2)
    ),
    Part("power losses", _sizes(25, 4, 1), _power_loss, 20),
    Part("races of two jobs", _sizes(300, 20, 10), _races, 15),
]


def main():
    """Run one part, or all, and report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scale", choices=_sizes(0, 0, 0), default="full")
    parser.add_argument("--part", help="run this one, here, and print its result as JSON")
    parser.add_argument("--only", help="run the parts whose names begin so")
    chosen = parser.parse_args()
    if chosen.part is not None:
        logging.disable()  # saves that are made to fail say so
        (part,) = [part for part in PARTS if part.name == chosen.part]
        print(json.dumps(asdict(part.run(part.sizes[chosen.scale]))))
        return 0
    parts = [part for part in PARTS if part.name.startswith(chosen.only or "")]
    with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
        ended = list(pool.map(partial(_run, scale=chosen.scale), parts))
    print(_table(ended))
    wrong = [f"{one.name}: {text}" for one in ended for text in one.result.wrong]
    for text in wrong:
        print(text, file=sys.stderr)
    # A little of it is no report.
    if chosen.scale == "full":
        RESULTS.mkdir(parents=True, exist_ok=True)
        for one in ended:
            _kept(one.name).write_text(json.dumps(asdict(one)))
        if all(_kept(part.name).is_file() for part in PARTS):
            _write(_table([_read(_kept(part.name)) for part in PARTS]))
    return bool(wrong)


def _kept(name):
    return RESULTS / f"{name}.json"


def _read(path):
    found = json.loads(path.read_text())
    return Ended(**{**found, "result": Result(**found["result"])})


def _run(part, *, scale):
    """Run a part in a process of its own. Returns it, its result, and the seconds it took."""
    command = [sys.executable, __file__, "--part", part.name, "--scale", scale]
    begun = time.monotonic()
    print(f"== {part.name} ...", flush=True)
    limit_s = part.minutes * 60 / (1 if scale == "full" else 3)
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=limit_s,
            cwd=ROOT,
        )
        if done.returncode:
            result = Result(0, "", [f"status {done.returncode}: {done.stderr[-4000:]}"])
        else:
            result = Result(**json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        result = Result(0, "", [f"hung: it did not end within {limit_s:.0f} s"])
    seconds = time.monotonic() - begun
    print(
        f"== {part.name}: {result.cases} in {seconds:.0f} s, {len(result.wrong)} wrong", flush=True
    )
    return Ended(part.name, result, seconds, time.strftime("%Y-%m-%d"))


def _table(ended):
    """The report, as Markdown."""
    # Parts that differ in their seed alone are one line.
    lines = {}
    for one in ended:
        name = one.name.partition(", seed")[0]
        before = lines.setdefault(name, [0, one.result.text, 0, 0.0])
        before[0] += one.result.cases
        before[2] += len(one.result.wrong)
        before[3] += one.seconds
    rows = [
        f"| {name} | {cases:,} | {text} | {wrong or 'nothing'} | {took / 60:.1f} |"
        for name, (cases, text, wrong, took) in lines.items()
    ]
    dates = sorted({one.date for one in ended})
    where = (
        f"`make torture` on {' and '.join(dates)}, {os.cpu_count()} cores, Linux "
        f"{'.'.join(platform.release().split('.')[:2])}, Python {platform.python_version()}. "
        "Two parts run at once."
    )
    return "\n".join(
        [
            where,
            "",
            "| what | how many | | lost, hung or wrong | minutes |",
            "| --- | ---: | --- | --- | ---: |",
            *rows,
            "",
        ]
    )


def _write(table):
    before, _, rest = REPORT.read_text(encoding="utf-8").partition(_BEGIN)
    _, _, after = rest.partition(_END)
    REPORT.write_text(f"{before}{_BEGIN}\n{table}\n{_END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
