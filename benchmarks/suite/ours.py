"""The measurements of distckpt. Each returns the rows that it is named with; all are collective."""

from __future__ import annotations

import inspect
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import distckpt
from benchmarks.suite import floors, states
from benchmarks.suite.bench import Bench, Unavailable
from benchmarks.suite.memory import peak_extra_bytes
from benchmarks.suite.rows import Measured
from benchmarks.suite.training import spin
from benchmarks.suite.turns import fastest, ratios, take_turns
from distckpt import pending as pending_module
from distckpt.manifest import BLOCK_BYTES

Measure = Callable[[Bench], list[Measured]]
_MIB = 1 << 20
# Long enough for a save of ours beside a busy loop; where it isn't, the loop goes on.
_LOOP_S = 0.5
_COMMITS = 20


# ------------------------------------------------------------------------------------------ saving


def durable_save(bench: Bench) -> list[Measured]:
    """A blocking save, against writing as many bytes, buffered and past the page cache."""

    def from_arrays(path: Path, data: object, *, checked: bool = False) -> None:
        del data
        floors.write_arrays(path, bench.sources, checked=checked)

    found = take_turns(
        [
            bench.writing("write + fsync", floors.write_buffered),
            bench.saving(
                "distckpt", lambda path: distckpt.save(path, bench.state, comm=bench.comm)
            ),
            bench.writing("O_DIRECT write + fsync", floors.write_direct),
            bench.writing("from the arrays", from_arrays),
            bench.writing("from the arrays, checked", partial(from_arrays, checked=True)),
        ],
        bench.pairs,
    )
    ours, buffered = found["distckpt"], found["write + fsync"]
    best = fastest(buffered, found["O_DIRECT write + fsync"])
    return [
        bench.row("save", ratios(ours, buffered), found),
        bench.row("save-best", ratios(ours, best), found),
        bench.row("bound-write", ratios(found["from the arrays"], buffered), found),
        bench.row(
            "bound-write-checked", ratios(found["from the arrays, checked"], buffered), found
        ),
    ]


def async_save(bench: Bench) -> list[Measured]:
    """An asynchronous save in steady state: what it costs to call it, and how long until done."""
    found = take_turns(
        [
            bench.copying("memcpy"),
            bench.copying_one("memcpy of one array"),
            bench.writing("write + fsync", floors.write_buffered),
            bench.starting("distckpt", partial(_start, bench)),
        ],
        bench.pairs,
    )
    return [
        bench.row("stall", ratios(found["distckpt: stall"], found["memcpy"]), found),
        bench.row(
            "stall-one", ratios(found["distckpt: stall"], found["memcpy of one array"]), found
        ),
        bench.row("committed", ratios(found["distckpt: committed"], found["write + fsync"]), found),
    ]


def first_stall(bench: Bench) -> list[Measured]:
    """The first save of a Manager that was made a second before, against its later ones."""

    def run() -> Mapping[str, float]:
        path = bench.fresh()
        # Given the state, it plans, and makes memory ready for the copies.
        with (
            bench.new_comm() as comm,
            distckpt.Manager(path, comm=comm, state=bench.state) as manager,
        ):
            time.sleep(1)
            stalls = []
            for step in range(3):
                stalls.append(bench.ranks.timed(lambda: manager.save(step, bench.state)))  # noqa: B023
                manager.wait()
        bench.remove(path)
        return {"first stall": stalls[0], "steady stall": statistics.mean(stalls[1:])}

    found = take_turns([run], max(3, bench.pairs // 3))
    values = ratios(found["first stall"], found["steady stall"])
    return [bench.row("stall-first", values, found)]


def lazy_save(bench: Bench) -> list[Measured]:
    """A lazy save: what it costs to call it, and to wait for its fence at once."""

    def run() -> Mapping[str, float]:
        path = bench.fresh()
        pending: list[distckpt.PendingCheckpoint] = []
        stall = bench.ranks.timed(lambda: pending.append(_start(bench, path, lazy=True)))
        fence = bench.ranks.timed(pending[0].wait_staged)
        pending[0].wait()
        bench.remove(path)
        return {"lazy stall": stall, "stall and fence": stall + fence}

    found = take_turns([bench.copying("memcpy"), run], bench.pairs)
    return [
        bench.row("lazy-stall", ratios(found["lazy stall"], found["memcpy"]), found),
        bench.row("lazy-fence", ratios(found["stall and fence"], found["memcpy"]), found),
    ]


def lazy_slowdown(bench: Bench) -> list[Measured]:
    """By how much a numpy loop is slowed down until the fence of a lazy save is open."""
    chunk = max(1, int(2e-3 / bench.loop.step_s))

    def run() -> Mapping[str, float]:
        alone = 50 * chunk
        bench.ranks.meet()
        began = time.perf_counter()
        bench.loop.run(alone)
        step_s = (time.perf_counter() - began) / alone
        path = bench.fresh()
        bench.ranks.meet()
        began, steps = time.perf_counter(), 0
        pending = _start(bench, path, lazy=True)
        fence = threading.Thread(target=pending.wait_staged)
        fence.start()
        while fence.is_alive():
            bench.loop.run(chunk)
            steps += chunk
        slowed = time.perf_counter() - began - steps * step_s
        slowest = bench.ranks.most(slowed)
        pending.wait()
        bench.remove(path)
        return {"lazy slowdown": slowest}

    found = take_turns([bench.copying("memcpy"), run], bench.pairs)
    values = ratios(found["lazy slowdown"], found["memcpy"])
    return [bench.row("lazy-slowdown", values, found)]


def slowdown(bench: Bench) -> list[Measured]:
    """What a checkpoint costs a training loop on every rank, from the call to the commit."""
    writes = {"buffered": floors.write_buffered}
    if bench.place != "tmpfs":  # where O_DIRECT is taken, but copies all the same
        writes["direct"] = floors.write_direct

    def processor_time(name: str, write: Callable[..., None]) -> Mapping[str, float]:
        path = bench.fresh()
        path.mkdir(exist_ok=True)
        bench.ranks.meet()
        began = time.process_time()
        bench.warm[:] = bench.mine
        write(path / str(bench.ranks.rank), bench.mine)
        seconds = bench.ranks.most(time.process_time() - began)
        bench.remove(path)
        return {name: seconds}

    found = take_turns(
        [
            bench.copying("memcpy"),
            *(partial(processor_time, name, write) for name, write in writes.items()),
            bench.slowing("slowdown", partial(_start, bench), _LOOP_S),
        ],
        bench.pairs,
    )
    floor = fastest(*(found[name] for name in writes))
    return [
        bench.row("slowdown", ratios(found["slowdown"], found["memcpy"]), found),
        bench.row("slowdown-cpu", ratios(found["slowdown"], floor), found),
        bench.row("bound-processor", ratios(floor, found["memcpy"]), found),
    ]


# ----------------------------------------------------------------------------------------- loading


def warm_load(bench: Bench) -> list[Measured]:
    """Loads from the page cache, against reading as many bytes into the same arrays."""
    same = states.empty(bench.state)
    wide = states.strided(bench.state)
    turned = states.turned(bench.state, bench.ranks.rank, bench.ranks.size)
    reports: list[distckpt.LoadReport] = []

    def load(net: states.State, path: Path, **options: Any) -> None:  # noqa: ANN401
        reports.append(distckpt.load_into(path, net, comm=bench.comm, strict=True, **options))

    with bench.checkpoint() as path:
        load(same, path)
        load(wide, path)
        differing = [*states.differing(bench.state, same), *states.differing(bench.state, wide)]
        if differing:
            raise ValueError(f"loaded wrongly: {', '.join(differing[:5])}")
        found = take_turns(
            [
                bench.loading("preadv", partial(_read, bench, same), path),
                bench.loading("load", partial(load, same), path),
                bench.loading("load, verify=False", partial(load, same, verify=False), path),
                bench.loading("load, strided", partial(load, wide), path),
                bench.loading("load, rows ↔ columns", partial(load, turned), path),
                bench.loading("preadv, checked", partial(_read, bench, same, checked=True), path),
                bench.loading("preadv, strided", partial(_read_strided, bench, wide), path),
            ],
            bench.pairs,
        )
    floor = found["preadv"]
    rows = [
        bench.row("load", ratios(found["load"], floor), found),
        bench.row("load-unverified", ratios(found["load, verify=False"], floor), found),
        bench.row("load-strided", ratios(found["load, strided"], floor), found),
        bench.row("load-turned", ratios(found["load, rows ↔ columns"], floor), found),
        bench.row("bound-read-checked", ratios(found["preadv, checked"], floor), found),
        bench.row("bound-strided", ratios(found["preadv, strided"], floor), found),
    ]
    most = max(report.bytes_read for report in reports) / bench.plan.bytes
    return [*rows, bench.row("read-amplification", [most])]


def cold_load(bench: Bench) -> list[Measured]:
    """A load of what the page cache has forgotten."""
    if bench.place == "tmpfs":
        raise Unavailable("a tmpfs is the page cache")
    net = states.empty(bench.state)

    def forget(paths: list[Path]) -> None:
        left = floors.drop_cache(paths)
        bench.ranks.meet()
        if bench.ranks.most(left) > 0.01:  # noqa: PLR2004  a hundredth
            raise Unavailable(f"the page cache keeps {left:.0%} of the files")

    with bench.checkpoint() as path:

        def floor() -> Mapping[str, float]:
            forget(floors.files_under(path) if bench.ranks.rank == 0 else [])
            return bench.loading("preadv, cold", partial(_read, bench, net), path)()

        def ours() -> Mapping[str, float]:
            forget(floors.files_under(path) if bench.ranks.rank == 0 else [])
            load = partial(distckpt.load_into, net=net, comm=bench.comm, strict=True)
            return bench.loading("load, cold", load, path)()

        found = take_turns([floor, ours], bench.pairs)
    return [bench.row("load-cold", ratios(found["load, cold"], found["preadv, cold"]), found)]


def partial_load(bench: Bench) -> list[Measured]:
    """A load of each hundredth tensor."""
    net = states.empty(bench.state)
    names = sorted({name for names in bench.ranks.gather(list(net)) for name in names})[::100]
    few = {name: net[name] for name in names if name in net}
    with bench.checkpoint() as path:
        whole = distckpt.open(path)
        wanted = sum(_nbytes(whole, name) for name in names)
        reports: list[distckpt.LoadReport] = []
        found = take_turns(
            [
                bench.loading(
                    "load",
                    partial(distckpt.load_into, net=net, comm=bench.comm, strict=True),
                    path,
                ),
                bench.loading(
                    "load of 1 %",
                    lambda url: reports.append(
                        distckpt.load_into(url, few, comm=bench.comm, strict=True)
                    ),
                    path,
                ),
            ],
            bench.pairs,
        )
    surplus = (reports[-1].bytes_read - wanted) / BLOCK_BYTES / len(names)
    note = f"{len(names)} tensors, {wanted / 1e6:.1f} MB"
    return [
        bench.row("partial", ratios(found["load of 1 %"], found["load"]), found, note=note),
        bench.row("partial-blocks", [surplus], note=note),
    ]


def reshard(bench: Bench) -> list[Measured]:
    """Loads by three ranks, and by one, of what four have saved."""
    if bench.ranks.size != 4:  # noqa: PLR2004
        raise Unavailable("needs 4 ranks")
    rank = bench.ranks.rank
    three = bench.comm.Split(0 if rank < 3 else 1)  # noqa: PLR2004
    same = states.empty(bench.state)
    make = states.STATES[bench.state_name]
    less = states.empty(make(rank, 3)) if rank < 3 else {}  # noqa: PLR2004
    whole = states.empty(make(0, 1)) if rank == 0 else {}

    def load(net: states.State, comm: object, path: Path) -> None:
        if net:
            distckpt.load_into(path, net, comm=comm, strict=True)

    myself = bench.comm.Split(rank)
    with bench.checkpoint() as path:
        found = take_turns(
            [
                bench.loading("load by 4", partial(load, same, bench.comm), path),
                bench.loading("load by 3", partial(load, less, three), path),
                bench.loading("load by 1", partial(load, whole, myself), path),
                bench.loading("preadv", partial(_read, bench, whole), path),
                bench.loading("preadv by 4", partial(_read, bench, same), path),
                bench.loading("preadv by 3", partial(_read, bench, less), path),
            ],
            bench.pairs,
        )
    return [
        bench.row("reshard", ratios(found["load by 3"], found["load by 4"]), found),
        bench.row("single", ratios(found["load by 1"], found["preadv"]), found),
        bench.row("bound-three", ratios(found["preadv by 3"], found["preadv by 4"]), found),
    ]


# ------------------------------------------------------------------------------ many small tensors


def small(bench: Bench) -> list[Measured]:
    """10,000 tensors of 4 KB, against as many bytes in 8."""
    few = states.STATES["few"](bench.ranks.rank, bench.ranks.size)

    def first(name: str, state: states.State) -> Mapping[str, float]:
        with bench.new_comm() as comm:
            return bench.saving(name, lambda path: distckpt.save(path, state, comm=comm))()

    kinds = {"10,000": bench.state, "8": few}
    found = take_turns(
        [
            *(
                bench.saving(
                    f"save of {name}",
                    lambda path, state=state: distckpt.save(path, state, comm=bench.comm),
                )
                for name, state in kinds.items()
            ),
            *(partial(first, f"first save of {name}", state) for name, state in kinds.items()),
        ],
        bench.pairs,
    )
    paths = {name: bench.fresh() for name in kinds}
    for name, state in kinds.items():
        distckpt.save(paths[name], state, comm=bench.comm)
    found |= take_turns(
        [
            bench.loading(
                f"load of {name}",
                partial(distckpt.load_into, net=states.empty(state), comm=bench.comm, strict=True),
                paths[name],
            )
            for name, state in kinds.items()
        ],
        bench.pairs,
    )
    for path in paths.values():
        bench.remove(path)

    def row(key: str, what: str) -> Measured:
        return bench.row(key, ratios(found[f"{what} of 10,000"], found[f"{what} of 8"]), found)

    return [row("small-save", "save"), row("small-first", "first save"), row("small-load", "load")]


# ---------------------------------------------------------------------------------- beside training


def spinner(bench: Bench) -> list[Measured]:
    """A background write beside a thread that runs Python; one rank, so there is a free core."""

    def quiet() -> Mapping[str, float]:
        path = bench.fresh()
        pending = _start(bench, path)
        began = time.perf_counter()
        pending.wait()
        seconds = time.perf_counter() - began
        bench.remove(path)
        return {"write": seconds}

    def beside() -> Mapping[str, float]:
        path = bench.fresh()
        pending = _start(bench, path)
        began = time.perf_counter()
        speed = spin(pending.done)
        seconds = time.perf_counter() - began
        bench.remove(path)
        return {"write beside a spinner": seconds, "spinner beside a write": speed}

    def alone() -> Mapping[str, float]:
        until = time.perf_counter() + 0.4
        return {"spinner alone": spin(lambda: time.perf_counter() > until)}

    found = take_turns([quiet, alone, beside], bench.pairs)
    seconds = {name: values for name, values in found.items() if name.startswith("write")}
    return [
        bench.row("spinner-save", ratios(found["write beside a spinner"], found["write"]), seconds),
        bench.row("spinner-speed", ratios(found["spinner beside a write"], found["spinner alone"])),
    ]


def commit(bench: Bench) -> list[Measured]:
    """What comes after the slowest rank has written its last byte."""
    latencies = []
    with _processor_time_of_commits() as cpu_s:
        for _ in range(_COMMITS):
            path = bench.fresh()
            pending = _start(bench, path)
            pending.wait()
            bench.ranks.meet()
            phases = pending.stats.ranks
            done_s = max(rank.written_s for rank in phases.values())
            committed_s = [
                one.stop_s for one in phases[bench.ranks.rank].phases if one.name == "commit"
            ]
            # All ranks' phases are known to the coordinator.
            latencies.append(bench.ranks.gather(1e3 * (committed_s[-1] - done_s))[0])
            bench.remove(path)
    each = bench.ranks.gather(cpu_s)
    busiest = [1e3 * max(values) for values in zip(*each, strict=True)]
    rows = [bench.row("commit-latency", latencies[1:])]
    if busiest:
        rows.append(bench.row("commit-cpu", busiest[1:]))
    return rows


@contextmanager
def _processor_time_of_commits() -> Iterator[list[float]]:
    """Take the processor time of each commit: the process does nothing else meanwhile."""
    found: list[float] = []
    original = pending_module.commit

    def timed(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401  as the original
        began = time.process_time()
        result = yield from original(*arguments, **options)
        found.append(time.process_time() - began)
        return result

    pending_module.commit = timed
    try:
        yield found
    finally:
        pending_module.commit = original


# ------------------------------------------------------------------------------------------ memory


def memory(bench: Bench) -> list[Measured]:
    """How much larger the process gets at most, beyond what is allowed for."""
    net = states.empty(bench.state)
    writes = bench.mine.nbytes
    bound = max(8 * _MIB, writes // 4)

    def started(comm: object, path: Path, **options: Any) -> None:  # noqa: ANN401
        _start(bench, path, comm=comm, **options).wait()

    def peak(action: Callable[[Any, Path], object], allowed: int) -> float:
        path = bench.fresh()
        with bench.new_comm() as comm:
            extra = peak_extra_bytes(lambda: action(comm, path))
        bench.remove(path)
        return bench.ranks.most((extra - allowed) / _MIB)

    def times(action: Callable[[Any, Path], object], allowed: int = 0) -> list[float]:
        return [peak(action, allowed) for _ in range(3)]

    saves = times(lambda comm, path: distckpt.save(path, bench.state, comm=comm))
    with bench.checkpoint() as there:
        loads = times(lambda comm, _: distckpt.load_into(there, net, comm=comm, strict=True))
    asyncs = times(started, writes)
    rows = [
        bench.row("memory-save", saves),
        bench.row("memory-load", loads),
        bench.row("memory-async", asyncs),
    ]
    bounded = partial(started, staging_bytes=bound)
    return [*rows, bench.row("memory-bounded", times(bounded, bound))]


# ------------------------------------------------------------------------------------------ parts


def _start(
    bench: Bench,
    path: Path,
    *,
    comm: object = None,
    **options: Any,  # noqa: ANN401
) -> distckpt.PendingCheckpoint:
    """Start an asynchronous save; options that this version refuses make a row unavailable."""
    known = inspect.signature(distckpt.save_async).parameters
    for name in options:
        if name not in known:
            raise Unavailable(f"save_async has no {name}=")
    comm = bench.comm if comm is None else comm
    try:
        return distckpt.save_async(path, bench.state, comm=comm, **options)
    except distckpt.LayoutError as exc:
        raise Unavailable(str(exc)) from exc


def _read(bench: Bench, net: states.State, path: Path, *, checked: bool = False) -> None:
    """Read a checkpoint's own files into these arrays, a rank's own first: the floor of a load."""
    arrays = [states.flat_bytes(states.array_of(leaf)) for leaf in net.values()]
    floors.read_into(_files(bench, path), arrays, checked=checked)


def _read_strided(bench: Bench, net: states.State, path: Path) -> None:
    """Read as many bytes into arrays that aren't contiguous."""
    floors.read_strided(_files(bench, path)[0], map(states.array_of, net.values()))


def _files(bench: Bench, path: Path) -> list[Path]:
    """List a checkpoint's files, a rank's own first."""
    files = sorted(path.glob("shard-*"))
    first = bench.ranks.rank % len(files)
    return [*files[first:], *files[:first]]


def _nbytes(checkpoint: distckpt.Checkpoint, name: str) -> int:
    tensor = checkpoint[name]
    size = tensor.dtype.itemsize
    for extent in tensor.shape:
        size *= extent
    return size


# Which rows a measurement gives.
MEASURES: dict[str, tuple[Measure, tuple[str, ...]]] = {
    "durable_save": (durable_save, ("save", "save-best", "bound-write", "bound-write-checked")),
    "async_save": (async_save, ("stall", "stall-one", "committed")),
    "first_stall": (first_stall, ("stall-first",)),
    "lazy_save": (lazy_save, ("lazy-stall", "lazy-fence")),
    "lazy_slowdown": (lazy_slowdown, ("lazy-slowdown",)),
    "slowdown": (slowdown, ("slowdown", "slowdown-cpu", "bound-processor")),
    "warm_load": (
        warm_load,
        (
            "load",
            "load-unverified",
            "load-strided",
            "load-turned",
            "bound-read-checked",
            "bound-strided",
            "read-amplification",
        ),
    ),
    "cold_load": (cold_load, ("load-cold",)),
    "partial_load": (partial_load, ("partial", "partial-blocks")),
    "reshard": (reshard, ("reshard", "single", "bound-three")),
    "small": (small, ("small-save", "small-first", "small-load")),
    "spinner": (spinner, ("spinner-save", "spinner-speed")),
    "commit": (commit, ("commit-latency", "commit-cpu")),
    "memory": (memory, ("memory-save", "memory-load", "memory-async", "memory-bounded")),
}
