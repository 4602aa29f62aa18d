"""Train a small network on handwritten digits, data- and tensor-parallel, with checkpoints.

Four ranks, two model replicas of two pieces each, a checkpoint every 50 steps::

    mpirun -n 4 python -m mpi4py launch/train_digits.py --mesh dp=2,tp=2 --steps 300 \
        --save-every 50 --checkpoints runs/digits --log runs/digits.jsonl

Stop it however you like and run it again, on the same mesh or another: it goes on after the last
committed checkpoint. SIGTERM, SIGUSR1, SIGUSR2, a file ``runs/digits/halt`` and the end of
``--max-seconds`` make it save and leave, all ranks after the same step. One process does without
mpirun::

    python launch/train_digits.py --checkpoints runs/digits

What checkpoints cost the author of a training loop is in `train`: a state, which is an ordinary
nested dict made once (`make_state`), a manager that knows when to save and what to keep, one line
that loads, and two lines a step: one that may save, and one that leaves when it is time to.

The split: the first layer by columns over ``tp``, the second by rows, so that one all-reduce a
forward pass is enough. The hidden layer has 100 units, which three ranks share as 34, 33 and 33.
The batch is split over ``dp``. Batches depend on (seed, step) only and first weights on the seed
only, so every mesh trains the same network on the same samples; in float64 the loss curves of two
meshes differ by rounding alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

import distckpt
from distckpt.errors import LayoutError

if TYPE_CHECKING:
    from mpi4py import MPI

PIXELS, HIDDEN, CLASSES = 64, 100, 10
TEST_SAMPLES = 360

# The whole tensors, and the mesh axis that each dimension is cut over (none: all have it whole).
SHAPES = {
    "fc1.weight": (PIXELS, HIDDEN),
    "fc1.bias": (HIDDEN,),
    "fc2.weight": (HIDDEN, CLASSES),
    "fc2.bias": (CLASSES,),
}
SPECS: dict[str, tuple[str | None, ...]] = {
    "fc1.weight": (None, "tp"),
    "fc1.bias": ("tp",),
    "fc2.weight": ("tp", None),
    "fc2.bias": (),
}

# What a seed is used for: generators with different purposes must not draw the same numbers.
SPLIT, WEIGHTS, BATCH, SPOT = range(4)

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
LR_DECAY = 0.998
SPOT_SAMPLES = 4

Arrays = dict[str, np.ndarray]
Sum = Callable[[np.ndarray], np.ndarray]


# ------------------------------------------------------------------------------------------ data


@dataclass(frozen=True, slots=True)
class Digits:
    """The data set: images as rows of 64 numbers in 0 … 1, labels as ints."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def read_digits(seed: int) -> Digits:
    """Read scikit-learn's digits (8 by 8 pixels, 1,797 samples), split by *seed*."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 (it takes a second)

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng([seed, SPLIT]).permutation(len(y))
    x, y = x[order].astype(np.float64) / 16.0, y[order].astype(np.int64)
    return Digits(x[TEST_SAMPLES:], y[TEST_SAMPLES:], x[:TEST_SAMPLES], y[:TEST_SAMPLES])


def batch_indices(seed: int, step: int, samples: int, batch: int) -> np.ndarray:
    """Choose the global batch of one step: the same on every rank of every mesh."""
    return np.random.default_rng([seed, BATCH, step]).choice(samples, batch, replace=False)


# --------------------------------------------------------------------------------------- network


def initial_weights(seed: int) -> Arrays:
    """Draw the whole network's weights, so that every mesh starts from the same."""
    rng = np.random.default_rng([seed, WEIGHTS])
    return {
        name: rng.normal(0.0, np.sqrt(2.0 / shape[0]), shape) if len(shape) > 1 else np.zeros(shape)
        for name, shape in SHAPES.items()
    }


def forward(weights: Arrays, x: np.ndarray, sum_over_tp: Sum) -> tuple[np.ndarray, np.ndarray]:
    """Return this rank's part of the hidden layer, and the whole logits."""
    hidden = np.maximum(x @ weights["fc1.weight"] + weights["fc1.bias"], 0.0)
    logits = sum_over_tp(hidden @ weights["fc2.weight"]) + weights["fc2.bias"]
    return hidden, logits


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities, row by row."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def loss_and_gradients(
    weights: Arrays, x: np.ndarray, y: np.ndarray, batch: int, sum_over_tp: Sum
) -> tuple[Arrays, np.ndarray]:
    """Return this rank's part of the loss and of its gradients, and the logits of its samples.

    The parts are of means over the *batch* samples of all ranks, so their sum over ``dp`` is the
    mean. The second layer is split by rows: each rank has all that its own gradients need.
    """
    hidden, logits = forward(weights, x, sum_over_tp)
    rows = np.arange(len(y))
    log_p = log_softmax(logits)
    d_logits = np.exp(log_p)
    d_logits[rows, y] -= 1.0
    d_logits /= batch
    d_hidden = (d_logits @ weights["fc2.weight"].T) * (hidden > 0.0)
    parts = {
        "loss": -log_p[rows, y].sum(keepdims=True) / batch,
        "fc1.weight": x.T @ d_hidden,
        "fc1.bias": d_hidden.sum(axis=0),
        "fc2.weight": hidden.T @ d_logits,
        "fc2.bias": d_logits.sum(axis=0),
    }
    return parts, logits


class Adam:
    """The optimizer: two moments of the gradient for each weight, cut as the weights are."""

    def __init__(self, weights: Arrays) -> None:
        self.m = {name: np.zeros_like(w) for name, w in weights.items()}
        self.v = {name: np.zeros_like(w) for name, w in weights.items()}

    def update(self, weights: Arrays, grads: Arrays, *, step: int, lr: float) -> None:
        """Update the weights and both moments in place; *step* counts from 1."""
        scale = lr * np.sqrt(1.0 - BETA2**step) / (1.0 - BETA1**step)
        for name, grad in grads.items():
            m, v = self.m[name], self.v[name]
            m *= BETA1
            m += (1.0 - BETA1) * grad
            v *= BETA2
            v += (1.0 - BETA2) * grad * grad
            weights[name] -= scale * m / (np.sqrt(v) + EPSILON)


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the fraction of samples whose largest logit is their label's."""
    return float((logits.argmax(axis=1) == labels).mean())


# ---------------------------------------------------------------------------------------- ranks


def summed_over(comm: MPI.Comm) -> Sum:
    """Make the all-reduce of one group of ranks; the result is a new array."""

    def total(part: np.ndarray) -> np.ndarray:
        whole = np.empty_like(part)
        comm.Allreduce(np.ascontiguousarray(part), whole)
        return whole

    return total


def sum_together(arrays: Arrays, total: Sum) -> Arrays:
    """Sum many small arrays over a group in one message."""
    flat = total(np.concatenate([array.ravel() for array in arrays.values()]))
    ends = np.cumsum([array.size for array in arrays.values()])[:-1]
    parts = np.split(flat, ends)
    return {
        name: part.reshape(array.shape)
        for (name, array), part in zip(arrays.items(), parts, strict=True)
    }


def cut(mesh: distckpt.Mesh, whole: Arrays) -> Arrays:
    """Copy this rank's piece of each tensor."""
    return {
        name: array[mesh.region(SPECS[name], SHAPES[name]).slices].copy()
        for name, array in whole.items()
    }


def pieces(mesh: distckpt.Mesh, local: Arrays) -> dict[str, dict[str, object]]:
    """Say what each local array is a piece of: ``{"fc1": {"weight": Shard, …}, …}``.

    A bare array means "the same on every rank". Nothing is copied, so this is made once and stays
    true while the optimizer updates the arrays in place.
    """
    nested: dict[str, dict[str, object]] = {}
    for name, array in local.items():
        layer, kind = name.split(".")
        spec = SPECS[name]
        leaf = mesh.shard(array, spec, SHAPES[name]) if any(spec) else array
        nested.setdefault(layer, {})[kind] = leaf
    return nested


def make_state(
    mesh: distckpt.Mesh, weights: Arrays, optimizer: Adam, lr: float, rng: np.random.Generator
) -> dict[str, Any]:
    """Everything that a resumed run needs; it is what is saved, and what is loaded into."""
    return {
        "model": pieces(mesh, weights),
        "adam": {"m": pieces(mesh, optimizer.m), "v": pieces(mesh, optimizer.v)},
        "step": 0,
        "lr": lr,
        "rng": distckpt.PerRank(rng.bit_generator.state),
    }


def new_generator_state(values: list[dict], rank: int, size: int) -> dict:
    """Give each of *size* ranks a fresh generator when a run goes on with another number of ranks.

    Which of the old ranks' generators a new rank should have has no right answer. A new stream,
    keyed by where an old one was, repeats none of them.
    """
    position = values[0]["state"]["state"]
    return np.random.default_rng([SPOT, position, size, rank]).bit_generator.state


# ------------------------------------------------------------------------------------- training


def train(options: argparse.Namespace, mesh: distckpt.Mesh, comm: MPI.Comm, log: Log) -> float:
    """Collective. Train up to step ``options.steps``, and return the accuracy on the test set."""
    data = read_digits(options.seed)
    sum_over_all = summed_over(comm)
    sum_over_tp = summed_over(comm.Split(mesh.coordinates["dp"], mesh.coordinates["tp"]))
    sum_over_dp = summed_over(comm.Split(mesh.coordinates["tp"], mesh.coordinates["dp"]))

    weights = cut(mesh, initial_weights(options.seed))
    optimizer = Adam(weights)
    # Each rank looks at some samples of its own choice: a generator whose state differs by rank.
    rng = np.random.default_rng([options.seed, SPOT, comm.rank])

    state = make_state(mesh, weights, optimizer, options.lr, rng)
    with distckpt.Manager(
        checkpoint_store(options, comm.rank),
        comm=comm,
        save=distckpt.EverySteps(options.save_every) | distckpt.AtSteps(options.steps),
        keep=distckpt.KeepLast(options.keep),
        max_seconds=options.max_seconds,
    ) as manager:
        start = manager.load_latest_into(state, default=0, per_rank=new_generator_state)
        rng.bit_generator.state = state["rng"].value
        log.started(start, mesh, seconds=time.perf_counter() - options.began)

        for step in range(start + 1, options.steps + 1):
            began = time.perf_counter()
            indices = batch_indices(options.seed, step, len(data.train_y), options.batch)
            mine = np.array_split(indices, mesh.axes["dp"])[mesh.coordinates["dp"]]
            x, y = data.train_x[mine], data.train_y[mine]

            parts, logits = loss_and_gradients(weights, x, y, options.batch, sum_over_tp)
            grads = sum_together(parts, sum_over_dp)
            loss = float(grads.pop("loss")[0])
            optimizer.update(weights, grads, step=step, lr=state["lr"])

            looked_at = rng.choice(len(y), min(SPOT_SAMPLES, len(y)), replace=False)
            spot = (
                sum_over_all(np.array([accuracy(logits[looked_at], y[looked_at])]))[0] / comm.size
            )

            state["step"] = step
            state["lr"] *= LR_DECAY
            state["rng"] = distckpt.PerRank(rng.bit_generator.state)

            before_save = time.perf_counter()
            pending = manager.step(step, state, metrics={"loss": loss})
            done = time.perf_counter()

            if pending is not None:
                log.saving(step, pending, held_up_s=done - before_save)
            log.step(step, loss, spot, seconds=done - began)
            if manager.should_stop():
                break

    log.finished(manager.stop_reason)
    _, logits = forward(weights, data.test_x, sum_over_tp)
    return accuracy(logits, data.test_y)


# ------------------------------------------------------------------------------------ the log


class Log:
    """One JSON line a step and an event, and a few words on the terminal; rank 0 only."""

    def __init__(self, path: Path | None, *, rank: int, steps: int) -> None:
        self._file: TextIO | None = None
        self._speaks = rank == 0
        self._every = max(1, steps // 10)
        self._steps = steps
        self._pending: dict[int, tuple[float, distckpt.PendingCheckpoint]] = {}
        if path is not None and self._speaks:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Line by line: what was written before a kill stays readable, whole lines only.
            self._file = path.open("a", buffering=1, encoding="utf-8")

    def started(self, step: int, mesh: distckpt.Mesh, *, seconds: float) -> None:
        """Note that training begins after *step*; 0 is a fresh start."""
        event = "resume" if step else "start"
        self._write(event=event, step=step, ranks=mesh.size, mesh=mesh.axes, seconds=seconds)
        axes = ",".join(f"{name}={size}" for name, size in mesh.axes.items())
        what = f"resumed after step {step}" if step else "fresh start"
        ranks = "1 rank" if mesh.size == 1 else f"{mesh.size} ranks"
        self._say(f"{what} on {ranks} ({axes}), {seconds:.1f} s after launch")

    def saving(self, step: int, pending: distckpt.PendingCheckpoint, *, held_up_s: float) -> None:
        """Note a save that has begun, and how long it kept training waiting."""
        self._pending[step] = time.perf_counter(), pending
        self._write(event="save", step=step, held_up_s=held_up_s)
        self._say(f"step {step:>5}  saving in the background; held up {held_up_s * 1e3:.1f} ms")

    def step(self, step: int, loss: float, spot: float, *, seconds: float) -> None:
        """Note one step, and the saves that have been committed meanwhile."""
        self._write(step=step, loss=loss, seconds=seconds, spot=spot)
        if step % self._every == 0 or step == self._steps:
            self._say(f"step {step:>5}  loss {loss:.5f}  {seconds * 1e3:.1f} ms")
        self._committed()

    def finished(self, stop_reason: str | None) -> None:
        """Note what was committed last, after the manager has waited for it, and why it stopped."""
        self._committed()
        if stop_reason is not None:
            self._write(event="stop", reason=stop_reason)
            self._say(f"saved and stopped: {stop_reason}")

    def _committed(self) -> None:
        for step, (began, pending) in list(self._pending.items()):
            if pending.done():
                del self._pending[step]
                self._write(event="committed", step=step, seconds=time.perf_counter() - began)

    def _write(self, **record: object) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")

    def _say(self, text: str) -> None:
        if self._speaks:
            print(text, flush=True)


# -------------------------------------------------------------------------------- the kill point


def checkpoint_store(options: argparse.Namespace, rank: int) -> object:
    """Return where the checkpoints go: the URL, or for the demo a store that stops in a write."""
    if options.die_in_write_of_step is None:
        return options.checkpoints

    from distckpt.store import open_store  # noqa: PLC0415
    from distckpt.testing import FaultyStore  # noqa: PLC0415

    shard = f"step-{options.die_in_write_of_step:08d}/shard-"
    marker = Path(f"{options.log}.rank-{rank}.in-write")

    def stop_in_the_middle(kind: str, name: str, number: int) -> None:  # noqa: ARG001
        """Say that this rank, and which process it is, is half-way through its file; stay there."""
        if kind == "write-half" and name.startswith(shard):
            marker.write_text(f"{os.getpid()}\n", encoding="utf-8")
            while True:
                time.sleep(3600.0)

    return FaultyStore(open_store(options.checkpoints), on_operation=stop_in_the_middle)


# ---------------------------------------------------------------------------------- command line


def parse_mesh(text: str) -> dict[str, int]:
    """Parse ``dp=2,tp=2``; an axis that isn't named has size 1."""
    axes = {"dp": 1, "tp": 1}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name not in axes or not size.isdecimal() or int(size) < 1:
            raise argparse.ArgumentTypeError(f"{part!r} in {text!r}: expected e.g. dp=2,tp=2")
        axes[name] = int(size)
    return axes


def parse_options(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="train_digits.py",
        description=__doc__.partition("\n")[0],
        epilog="Run it again with the same --checkpoints, on any number of ranks, to go on.",
    )
    add = parser.add_argument
    add("--mesh", type=parse_mesh, default="dp=1,tp=1", help="axes of the ranks, e.g. dp=2,tp=2")
    add("--steps", type=int, default=300, help="train up to this step (default %(default)s)")
    add("--batch", type=int, default=256, help="samples a step, all ranks (default %(default)s)")
    add("--lr", type=float, default=3e-3, help="Adam's first learning rate (default %(default)s)")
    add("--seed", type=int, default=0, help="of the weights, the split and the batches")
    add("--checkpoints", required=True, metavar="URL", help="a directory, or anything fsspec knows")
    add("--save-every", type=int, default=50, metavar="N", help="steps between saves")
    add("--keep", type=int, default=3, metavar="N", help="keep the last N (default %(default)s)")
    add("--max-seconds", type=float, metavar="S", help="save and stop before S seconds are over")
    add("--log", type=Path, metavar="FILE", help="append one JSON line a step to this file")
    add("--evaluate", action="store_true", help="report the accuracy on the test set at the end")
    add(
        "--die-in-write-of-step",
        type=int,
        metavar="N",
        help="for the demo: stop for good in the middle of writing this step's shard files, with "
        "the process id in <log>.rank-<k>.in-write; needs --log",
    )
    options = parser.parse_args(arguments)
    if options.die_in_write_of_step is not None and options.log is None:
        parser.error("--die-in-write-of-step needs --log: the marker files are named after it")
    return options


def main(arguments: list[str]) -> int:
    """Collective. Run the job; return the exit status."""
    began = time.perf_counter()
    options = parse_options(arguments)

    # The import starts MPI, which whoever only borrows a function of this file doesn't want.
    from mpi4py import MPI  # noqa: PLC0415

    comm = MPI.COMM_WORLD
    options.began = began
    try:
        mesh = distckpt.Mesh(**options.mesh, comm=comm)
    except LayoutError as exc:
        if comm.rank == 0:
            print(f"train_digits.py: {exc} (mpirun -n starts them)", file=sys.stderr, flush=True)
        # A rank that leaves with an error ends the job: not before rank 0 has said why.
        comm.Barrier()
        return 2

    log = Log(options.log, rank=comm.rank, steps=options.steps)
    score = train(options, mesh, comm, log)
    if options.evaluate and comm.rank == 0:
        print(f"accuracy on {TEST_SAMPLES} samples that it has not seen: {score:.1%}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
