"""Train on four ranks, kill them all in the middle of a write, go on with three, and compare.

``make demo`` runs it. It needs no cluster and takes well under a minute. What happens is real: the
training job is ``launch/train_digits.py``, the kill is SIGKILL while every rank has half of its
file on the disk, and the loss curve is compared, step by step, with that of a run that nothing
happened to. Exits non-zero when a promise isn't kept. The checkpoints stay, to be looked at.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import distckpt
from distckpt.store import Store, open_store

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import train_digits  # noqa: E402 (beside this file, wherever that is)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEPS = 300
SAVE_EVERY = 30
KILLED_IN = 150  # the step whose files are half written when the ranks are killed
COMMITTED = KILLED_IN - SAVE_EVERY
MEANWHILE = 12  # steps that training does beside the half-done write, before the kill
SEED = 0
RANKS, MESH = 4, "dp=2,tp=2"
FEWER, OTHER_MESH = 3, "tp=3"

RTOL = 1e-4  # what is promised of the loss curve on another mesh
ACCURACY = 0.9
PATIENCE_S = 120.0  # past which a job is taken to hang

DEMO = Path("demo")
LOG = DEMO / "run.jsonl"
UNTOUCHED_LOG = DEMO / "uninterrupted.jsonl"
UNTOUCHED = str(DEMO / "uninterrupted")
CHECKPOINTS = str(DEMO / "checkpoints")
PICTURE = DEMO / "loss.png"
MADE = DEMO / "made-by-the-demo.json"


class DemoError(Exception):
    """The demo can't go on; the message is for the reader."""


def main(arguments: Sequence[str]) -> int:
    """Read the command line, and do it; return the exit status."""
    parser = argparse.ArgumentParser(prog="demo.py", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--checkpoints",
        default=os.environ.get("CHECKPOINTS") or CHECKPOINTS,
        metavar="URL",
        help=f"where to save; default $CHECKPOINTS, then {CHECKPOINTS}",
    )
    parser.add_argument(
        "--look",
        action="store_true",
        help="look at the checkpoints at the end, where they won't be there for long",
    )
    given = parser.parse_args(arguments)
    url = given.checkpoints.rstrip("/")
    try:
        clear(url)
        try:
            return demonstrate(url, look=given.look)
        finally:
            note_what_was_made(url)
    except (DemoError, distckpt.CheckpointError) as exc:
        print(f"\nThe demo stopped: {exc}", file=sys.stderr)
        return 1


def demonstrate(url: str, *, look: bool = False) -> int:
    """Do all of it, and tell what happened; return the exit status."""
    began = time.perf_counter()
    promises = Promises()

    scene(f"1. Train on {RANKS} ranks ({MESH}), a checkpoint every {SAVE_EVERY} steps")
    train_until_killed(url)
    killed = runs_in(LOG)[0]
    tell(costs(killed))

    scene(f"2. SIGKILL to all of them, each half-way through its file of step {KILLED_IN}")
    tell(f"Training had gone on beside the write, to step {killed.last_step}. What lies there now:")
    show_store(url)
    promises.check(
        "manifest.binpb" not in open_store(step_url(url, KILLED_IN)).names(),
        f"step {KILLED_IN}, which was being written, is not taken for a checkpoint",
    )
    promises.check(
        last_committed(url) == COMMITTED,
        f"step {COMMITTED} is the last one committed, and all of its bytes are good",
    )

    scene(f"3. Go on with {FEWER} ranks ({OTHER_MESH}): the same command, another --mesh")
    finish(job(FEWER, OTHER_MESH, url, LOG), "resumed")
    resumed = runs_in(LOG)[-1]
    tell(
        f"It went on after step {resumed.start} and did {killed.last_step - resumed.start} steps"
        f" again; training began {resumed.startup_s:.1f} s after the launch. The 100 hidden units"
        " had been saved as 50 + 50, and were loaded as 34 + 33 + 33."
    )
    promises.check(resumed.start == COMMITTED, f"the {FEWER} ranks went on after step {COMMITTED}")
    promises.check(resumed.last_step == STEPS, f"they reached step {STEPS}")

    scene("4. Load the result in one process, without MPI")
    score, seconds = evaluate(step_url(url, STEPS))
    tell(
        f"{score:.1%} of {train_digits.TEST_SAMPLES} digits that it has never seen are right;"
        f" opening and loading took {seconds * 1e3:.0f} ms."
    )
    promises.check(score >= ACCURACY, f"at least {ACCURACY:.0%} of the unseen digits are right")

    scene(f"5. The same training on {RANKS} ranks, with nothing happening to it")
    finish(job(RANKS, MESH, UNTOUCHED, UNTOUCHED_LOG), "uninterrupted")
    curves = Curves.of(killed, resumed, runs_in(UNTOUCHED_LOG)[0])
    weights = largest_difference(step_url(url, STEPS), step_url(UNTOUCHED, STEPS))
    before, after = curves.largest_before, curves.largest_after
    same = "bit for bit the same" if before == 0.0 else f"the same within {before:.1e}"
    tell(
        f"Of {STEPS} losses, the first {COMMITTED} are {same}, and the {STEPS - COMMITTED} of the"
        f" {FEWER} ranks are the same within {after:.1e} (relative). The final weights agree"
        f" within {weights:.1e} (absolute)."
    )
    promises.check(
        max(before, after) <= RTOL, f"the loss curve is the uninterrupted one's within {RTOL:g}"
    )

    draw(curves, PICTURE)
    scene(f"What was promised ({time.perf_counter() - began:.0f} s in all)")
    promises.show()
    scene(f"{PICTURE} shows both curves. The checkpoints are still there:")
    for command in (("ls", url), ("ls", step_url(url, STEPS)), ("verify", step_url(url, STEPS))):
        suggest(*command)
        if look:
            show_output(*command)
    return 0 if promises.kept else 1


# ---------------------------------------------------------------------------------- the scenes


def train_until_killed(url: str) -> None:
    """Start the job; once every rank is in the middle of a write, and training goes on, kill it."""
    markers = [Path(f"{LOG}.rank-{rank}.in-write") for rank in range(RANKS)]
    command = [*job(RANKS, MESH, url, LOG), "--die-in-write-of-step", str(KILLED_IN)]
    with started(command, "killed") as process:
        deadline = time.monotonic() + PATIENCE_S
        while not (all(map(process_id, markers)) and steps_done() >= KILLED_IN + MEANWHILE):
            if process.poll() is not None:
                raise DemoError(f"the job ended by itself\n{output_of('killed')}")
            if time.monotonic() > deadline:
                raise DemoError(f"it didn't come to the kill point\n{output_of('killed')}")
            time.sleep(0.005)
        ranks = [process_id(marker) for marker in markers]
        # The ranks first: mpirun, given the time, would end them in a gentler way.
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        while any(map(is_alive, ranks)):
            if time.monotonic() > deadline:
                raise DemoError(f"processes {ranks} survived SIGKILL")
            time.sleep(0.005)


def evaluate(url: str) -> tuple[float, float]:
    """Load what tensor-parallel ranks saved into whole arrays; return accuracy and seconds."""
    began = time.perf_counter()
    weights = {name: np.zeros(shape) for name, shape in train_digits.SHAPES.items()}
    distckpt.load_into(
        url,
        weights,
        strict=True,
        only_prefix="model.",
        rename=lambda name: name.removeprefix("model."),
    )
    seconds = time.perf_counter() - began
    data = train_digits.read_digits(SEED)
    _, logits = train_digits.forward(weights, data.test_x, lambda alone: alone)
    return train_digits.accuracy(logits, data.test_y), seconds


def largest_difference(url: str, other_url: str) -> float:
    """Compare all weights of two checkpoints."""
    ours = distckpt.load(url, only_prefix="model.")
    others = distckpt.load(other_url, only_prefix="model.")
    return max(float(np.abs(ours[name] - others[name]).max()) for name in others)


# ------------------------------------------------------------------------------------ the jobs


def job(ranks: int, mesh: str, url: str, log: Path) -> list[str]:
    """Make the command line of one training job."""
    return [
        *(mpirun(), "-n", str(ranks), sys.executable, "-m", "mpi4py"),
        *(str(HERE / "train_digits.py"), "--mesh", mesh, "--seed", str(SEED)),
        *("--steps", str(STEPS), "--save-every", str(SAVE_EVERY), "--keep", "3"),
        *("--checkpoints", url, "--log", str(log)),
    ]


def mpirun() -> str:
    """Find the mpirun of this environment, else of the system."""
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise DemoError("there is no mpirun; pip install 'distckpt[demo]' brings one")
    return found


def environment() -> dict[str, str]:
    """Make the ranks' environment."""
    return os.environ | {
        # One thread a rank: four ranks on a small machine are enough.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        # OpenMPI refuses more ranks than cores, and root, unless told otherwise.
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }


@contextmanager
def started(command: Sequence[str], name: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a job in a process group of its own; none of it is left afterwards, whatever happens."""
    with Path(DEMO / f"{name}.out").open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def finish(command: Sequence[str], name: str) -> None:
    """Run a job to its end."""
    with started(command, name) as process:
        try:
            status = process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise DemoError(f"the {name} job hangs\n{output_of(name)}") from None
        if status:
            raise DemoError(f"the {name} job exited with status {status}\n{output_of(name)}")


def output_of(name: str) -> str:
    """Return the end of what a job printed."""
    lines = (DEMO / f"{name}.out").read_text(errors="replace").splitlines()
    return "\n".join(f"   | {line}" for line in lines[-30:])


def process_id(marker: Path) -> int:
    """Return the process id that a rank left at the kill point; 0 while it isn't there."""
    with suppress(OSError, ValueError):
        return int(marker.read_text())
    return 0


def is_alive(process: int) -> bool:
    """Tell whether a process still runs; one that only waits to be reaped does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


# ------------------------------------------------------------------------------------ the logs


@dataclass
class Run:
    """What one job wrote to its log."""

    start: int
    startup_s: float
    losses: dict[int, float] = field(default_factory=dict)
    step_s: list[float] = field(default_factory=list)
    held_up_s: list[float] = field(default_factory=list)
    committed_s: dict[int, float] = field(default_factory=dict)

    @property
    def last_step(self) -> int:
        """The last step that was done."""
        return max(self.losses)


def runs_in(log: Path) -> list[Run]:
    """Read a log: one or more runs, each beginning with its start or resume."""
    runs: list[Run] = []
    for record in map(json.loads, log.read_text().splitlines()):
        event = record.get("event")
        if event in {"start", "resume"}:
            runs.append(Run(record["step"], record["seconds"]))
        elif event == "save":
            runs[-1].held_up_s.append(record["held_up_s"])
        elif event == "committed":
            runs[-1].committed_s[record["step"]] = record["seconds"]
        elif event is None:
            runs[-1].losses[record["step"]] = record["loss"]
            runs[-1].step_s.append(record["seconds"])
    return runs


def steps_done() -> int:
    """Return the last step in the log, which may be being written."""
    try:
        lines = LOG.read_text().rpartition("\n")[0].splitlines()
        return max((json.loads(line).get("step", 0) for line in lines[-3:]), default=0)
    except OSError:
        return 0


def costs(run: Run) -> str:
    """Say what saving cost a run."""
    steps = ", ".join(map(str, run.committed_s))
    step_ms, held_up_ms, commit_ms = (
        statistics.median(seconds) * 1e3
        for seconds in (run.step_s, run.held_up_s, run.committed_s.values())
    )
    return (
        f"Committed: steps {steps}. A step takes {step_ms:.1f} ms; a save keeps training waiting"
        f" for {held_up_ms:.1f} ms, and is committed {commit_ms:.0f} ms later, in the background"
        " (medians)."
    )


@dataclass(frozen=True)
class Curves:
    """The losses of the interrupted run, and of the other at the same steps."""

    killed: Run
    resumed: Run
    untouched: Run
    steps: np.ndarray
    difference: np.ndarray  # relative, one a step

    @classmethod
    def of(cls, killed: Run, resumed: Run, untouched: Run) -> Curves:
        """Join what was kept of the killed run and what the resumed one did, and compare."""
        kept = {s: loss for s, loss in killed.losses.items() if s <= resumed.start}
        joined = kept | resumed.losses
        if sorted(joined) != sorted(untouched.losses):
            raise DemoError("the two curves don't have the same steps")
        steps = np.array(sorted(joined))
        ours = np.array([joined[s] for s in steps])
        theirs = np.array([untouched.losses[s] for s in steps])
        return cls(killed, resumed, untouched, steps, np.abs(ours - theirs) / np.abs(theirs))

    @property
    def largest_before(self) -> float:
        """Largest difference up to the checkpoint that was resumed from: the same mesh."""
        return float(self.difference[self.steps <= self.resumed.start].max())

    @property
    def largest_after(self) -> float:
        """Largest difference after it: another mesh."""
        return float(self.difference[self.steps > self.resumed.start].max())


# ------------------------------------------------------------------------------- the checkpoints


def step_url(url: str, step: int) -> str:
    """Return the URL of one step's checkpoint."""
    return f"{url}/step-{step:08d}"


def last_committed(url: str) -> int | None:
    """Find the newest committed checkpoint, and verify every byte of it."""
    manager = distckpt.Manager(url)
    step = manager.latest()
    if step is not None:
        manager.open(step).verify()
    return step


def show_store(url: str) -> None:
    """List what a kill left, directory by directory."""
    store = open_store(url)
    killed_in = f"step-{KILLED_IN:08d}"
    whole: dict[str, int] = {}
    for directory in steps_in(store):
        sizes = {name: store.size(f"{directory}/{name}") for name in store.names(f"{directory}/")}
        if not sizes:
            continue  # some servers of objects have directories, and let go of them later
        shards = {name: size for name, size in sizes.items() if name.startswith("shard-")}
        if len(shards) < len(sizes):
            total = sum(sizes.values())
            print(f"     {directory}  {len(shards)} shard files and a manifest, {total:,} bytes")
            whole = {shard_number(name): size for name, size in shards.items()}
            continue
        print(f"     {directory}  no manifest, so it is no checkpoint:")
        for name, size in shards.items():
            of = f" of {whole[shard_number(name)]:,}" if shard_number(name) in whole else ""
            print(f"        {name}  {size:,}{of} bytes")
    if killed_in not in steps_in(store):
        print(f"     {killed_in}  is not there: this store shows an object when it is whole")


def shard_number(name: str) -> str:
    """Return what names a shard whatever save it is of: ``shard-00000-of-00004``."""
    return name.partition(".")[0]


def steps_in(store: Store) -> list[str]:
    """List the step directories, committed or not, oldest first."""
    return [name for name in store.names() if name.startswith("step-")]


def clear(url: str) -> None:
    """Remove what the last demo made, and nothing else.

    Raises:
        DemoError: There is something at *url* that it didn't make.
    """
    made = json.loads(MADE.read_text()) if MADE.exists() else {}
    store = open_store(url)
    found = objects_in(store)
    foreign = sorted(set(found) - set(made.get(url, ())))
    if foreign and url != CHECKPOINTS:
        raise DemoError(
            f"in {url} there is {', '.join(foreign[:3])}{', …' if foreign[3:] else ''}, which the"
            " last demo did not make; remove it, or give another place with CHECKPOINTS="
        )
    store.delete(found)
    for path in (CHECKPOINTS, UNTOUCHED):
        shutil.rmtree(path, ignore_errors=True)
    logs = (LOG, UNTOUCHED_LOG, *DEMO.glob("*.out"), *DEMO.glob(f"{LOG.name}.rank-*"))
    for file in (*logs, PICTURE, MADE):
        file.unlink(missing_ok=True)
    DEMO.mkdir(exist_ok=True)


def note_what_was_made(url: str) -> None:
    """List what is left at *url*, so that the next demo may remove that and no more."""
    MADE.write_text(json.dumps({url: objects_in(open_store(url))}, indent=1))


def objects_in(store: Store) -> list[str]:
    """List the objects in a store: those of step directories, and what else lies beside them."""
    found = []
    for name in store.names():
        inside = store.names(f"{name}/") if name.startswith("step-") else []
        found += [f"{name}/{below}" for below in inside] or [name]
    return found


# ---------------------------------------------------------------------------------- the telling


class Promises:
    """What was promised, and whether it was kept."""

    def __init__(self) -> None:
        self._checked: list[tuple[bool, str]] = []

    def check(self, kept: bool, promise: str) -> None:  # noqa: FBT001
        """Note one; the story goes on, so that all that is wrong is seen at once."""
        self._checked.append((kept, promise))

    @property
    def kept(self) -> bool:
        """Whether all were."""
        return all(kept for kept, _ in self._checked)

    def show(self) -> None:
        """Print the list."""
        for kept, promise in self._checked:
            print(f"   [{'kept' if kept else 'BROKEN'}] {promise}")


def scene(title: str) -> None:
    """Print a title at once, so that the reader knows what is being waited for."""
    print(f"\n{title}", flush=True)


def tell(text: str) -> None:
    """Print a paragraph."""
    print(textwrap.fill(text, 96, initial_indent="   ", subsequent_indent="   "), flush=True)


def suggest(*arguments: str) -> None:
    """Print a command that looks at what the demo leaves."""
    print(f"   {os.path.relpath(sys.executable)} -m distckpt {' '.join(arguments)}", flush=True)


def show_output(*arguments: str) -> None:
    """Run such a command, and print what it prints.

    Raises:
        DemoError: It fails.
    """
    command = [sys.executable, "-m", "distckpt", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    print(textwrap.indent(ended.stdout, " " * 5), flush=True)
    if ended.returncode:
        raise DemoError(f"{' '.join(arguments)} failed\n{ended.stderr}")


# ---------------------------------------------------------------------------------- the picture

INK, PALE, BLUE, ORANGE, RED = "#222222", "#cdd3da", "#2f6db3", "#d9791f", "#b3262d"


def draw(curves: Curves, path: Path) -> None:
    """Draw both curves, the kill and the resume; below, how much they differ."""
    import matplotlib as mpl  # noqa: PLC0415 (slow to import, and needed last)

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    style = {
        "font.size": 10,
        "axes.edgecolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with mpl.rc_context(style):
        fig, (losses, differences) = plt.subplots(
            2, 1, sharex=True, figsize=(9.5, 6.6), height_ratios=(3, 1.2), layout="constrained"
        )
        draw_losses(losses, curves)
        draw_differences(differences, curves)
        fig.suptitle(
            f"Killed on {RANKS} ranks in the middle of a write, resumed on {FEWER}: the same curve",
            fontsize=13,
            fontweight="bold",
            color=INK,
            x=0.01,
            ha="left",
        )
        fig.savefig(path, dpi=160)
        plt.close(fig)


def draw_losses(axes: Axes, curves: Curves) -> None:
    """Draw the losses on a log scale, and mark what happened."""
    killed, resumed = curves.killed, curves.resumed
    lost = {step: loss for step, loss in killed.losses.items() if step >= resumed.start}
    kept = {step: loss for step, loss in killed.losses.items() if step <= resumed.start}

    # The wide one below and the narrow ones on it: that they coincide is the point.
    axes.plot(*curve(curves.untouched.losses), color=PALE, lw=7, solid_capstyle="round")
    axes.plot(*curve(kept), color=BLUE, lw=1.5)
    axes.plot(*curve(resumed.losses), color=ORANGE, lw=1.5)
    axes.plot(*curve(lost), color=BLUE, lw=1.5, ls=(0, (2, 2)))

    low, high = 0.025, 4.0
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.set_xlim(0, STEPS + 2)
    axes.set_ylabel("loss of the batch (log scale)")
    axes.set_yticks([0.05, 0.1, 0.2, 0.5, 1, 2], ["0.05", "0.1", "0.2", "0.5", "1", "2"])
    axes.minorticks_off()
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)

    axes.axvspan(resumed.start, killed.last_step, color=RED, alpha=0.06, lw=0)
    for step, color in ((resumed.start, ORANGE), (killed.last_step, RED)):
        axes.axvline(step, color=color, lw=1.2)
    axes.plot(killed.last_step, killed.losses[killed.last_step], "X", color=RED, ms=9, zorder=5)
    axes.plot(resumed.start, killed.losses[resumed.start], "o", color=ORANGE, ms=7, zorder=5)
    axes.annotate(
        "",
        xy=(resumed.start, 1.45),
        xytext=(killed.last_step, 1.45),
        arrowprops={
            "arrowstyle": "-|>",
            "color": ORANGE,
            "lw": 1.5,
            "connectionstyle": "arc3,rad=0.35",
        },
    )
    axes.text(
        killed.last_step + 4,
        high * 0.93,
        f"SIGKILL to all {RANKS} ranks after step {killed.last_step},\n"
        f"each half-way through its file of step {KILLED_IN}",
        color=RED,
        va="top",
    )
    axes.text(
        killed.last_step + 4,
        1.3,
        f"resumed on {FEWER} ranks from step {resumed.start}, the last\n"
        f"committed; {len(lost) - 1} steps are done again",
        color=ORANGE,
        va="top",
    )

    tick = low * 1.14
    axes.plot(list(killed.committed_s), [tick] * len(killed.committed_s), "^", color=BLUE, ms=6)
    axes.plot(list(resumed.committed_s), [tick] * len(resumed.committed_s), "^", color=ORANGE, ms=6)
    axes.text(2, tick * 1.12, "checkpoints committed", color=INK, fontsize=8.5, va="bottom")
    handles = [
        *axes.plot([], [], color=PALE, lw=7, label=f"{RANKS} ranks, uninterrupted"),
        *axes.plot([], [], color=BLUE, lw=1.5, label=f"{RANKS} ranks, killed"),
        *axes.plot([], [], color=BLUE, lw=1.5, ls=(0, (2, 2)), label="their steps that were lost"),
        *axes.plot([], [], color=ORANGE, lw=1.5, label=f"{FEWER} ranks, resumed"),
    ]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.0, 0.1), frameon=False)


def draw_differences(axes: Axes, curves: Curves) -> None:
    """Draw the relative difference of the two curves, step by step; zero is at the bottom."""
    before = curves.steps <= curves.resumed.start
    for which, color in ((before, BLUE), (~before, ORANGE)):
        axes.plot(
            curves.steps[which], curves.difference[which], ".", color=color, ms=4, clip_on=False
        )
    axes.axhline(RTOL, color=RED, lw=1.2, ls="--")
    axes.axvline(curves.resumed.start, color=ORANGE, lw=1.2)
    axes.axvline(curves.killed.last_step, color=RED, lw=1.2)
    axes.set_yscale("symlog", linthresh=1e-17, linscale=0.6)
    axes.set_ylim(0, 1e-2)
    axes.set_yticks([0, 1e-16, 1e-12, 1e-8, 1e-4])
    axes.minorticks_off()
    axes.set_ylabel("relative difference")
    axes.set_xlabel("step")
    axes.text(STEPS, RTOL * 0.4, f"promised: at most {RTOL:g}", color=RED, ha="right", va="top")
    exact = (
        "exactly equal" if curves.largest_before == 0 else f"at most {curves.largest_before:.0e}"
    )
    middle = (curves.resumed.start + curves.steps[0]) / 2
    axes.text(middle, 1e-16, f"same mesh: {exact}", color=BLUE, ha="center", va="bottom")
    middle = (curves.killed.last_step + STEPS) / 2
    text = f"another mesh: at most {curves.largest_after:.1e}"
    axes.text(middle, 1e-14, text, color=ORANGE, ha="center", va="bottom")


def curve(losses: dict[int, float]) -> tuple[list[int], list[float]]:
    """Return the steps and their losses, in order."""
    steps = sorted(losses)
    return steps, [losses[step] for step in steps]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
