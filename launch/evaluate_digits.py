"""Evaluate the checkpoints of a run of ``train_digits.py`` while it trains.

Beside the run, on this machine or another that sees the same storage; one process is enough::

    python launch/evaluate_digits.py --checkpoints runs/digits --until-step 300

Each new checkpoint is held while it is evaluated: however few the run keeps (``--keep 1``), none is
deleted under this program. Only the model is read, a third of a checkpoint, and not the optimizer.
On how many ranks it was saved doesn't matter.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from train_digits import SHAPES, accuracy, forward, log_softmax, read_digits

import distckpt


def evaluate(options: argparse.Namespace) -> int:
    """Evaluate what comes, and return how many there were."""
    data = read_digits(options.seed)
    weights = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    net = {"model": weights}
    count = 0
    for checkpoint in distckpt.watch(
        options.checkpoints,
        start="all",
        every=options.every,
        poll_s=options.poll,
        timeout_s=options.timeout,
    ):
        began = time.perf_counter()
        checkpoint.load_into(net, strict=True)
        _, logits = forward(weights, data.test_x, lambda whole: whole)
        loss = -log_softmax(logits)[np.arange(len(data.test_y)), data.test_y].mean()
        report(
            options.log,
            step=checkpoint.step,
            accuracy=accuracy(logits, data.test_y),
            loss=float(loss),
            seconds=time.perf_counter() - began,
        )
        count += 1
        if options.until_step is not None and checkpoint.step >= options.until_step:
            break
    return count


def report(log: Path | None, *, step: int, **found: float) -> None:
    """Print what was found, and append it to the log as a line of JSON."""
    print(
        f"step {step:>5}  accuracy {found['accuracy']:.1%}  loss {found['loss']:.4f}  "
        f"{found['seconds'] * 1e3:.0f} ms",
        flush=True,
    )
    if log is not None:
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **found}) + "\n")


def parse_options(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="evaluate_digits.py", description=__doc__.partition("\n")[0]
    )
    add = parser.add_argument
    add("--checkpoints", required=True, metavar="URL", help="the run's; it need not be there yet")
    add("--every", action="store_true", help="each checkpoint, not only the newest each time")
    add("--seed", type=int, default=0, help="the run's, which splits the samples")
    add("--poll", type=float, default=1.0, metavar="S", help="look every S seconds (default 1)")
    add("--timeout", type=float, metavar="S", help="end when nothing has come for S seconds")
    add("--until-step", type=int, metavar="N", help="end with the checkpoint of step N or later")
    add("--log", type=Path, metavar="FILE", help="append one JSON line a checkpoint to this file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    evaluated = evaluate(parse_options(sys.argv[1:]))
    print(f"evaluated {evaluated} checkpoints", flush=True)
