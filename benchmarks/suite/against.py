"""The measurements against peers: one library and distckpt take turns in one process group."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import distckpt
from benchmarks.suite import peers, states
from benchmarks.suite.bench import Bench, InFlight, Unavailable
from benchmarks.suite.peers import Peer
from benchmarks.suite.rows import Measured
from benchmarks.suite.turns import Contender, ratios, take_turns

_OURS = "distckpt"
_Way = Callable[[Path], Any]
_LOOP_S = 0.8
_SLOWDOWN_PAIRS = 4  # they take seconds each, and differ by factors


def make(module: str, bench: Bench) -> Peer:
    """Make a peer ready for a bench's state.

    Raises:
        Unavailable: Its library is not installed.
    """
    try:
        peer = peers.make(module, bench.state, bench.ranks)
    except ImportError as exc:
        raise Unavailable(f"not installed: {exc}") from exc
    bench.peer = module
    bench.saved = bench.state if peer.state is None else dict(peer.state)
    return peer


def save(bench: Bench, peer: Peer) -> list[Measured]:
    """Blocking, durable saves."""
    ways = _known(peer, "save", peer.save)
    return _compare(
        bench,
        {"peer-save": ""},
        {_OURS: partial(_save, bench), **ways},
        bench.saving,
    )


def async_save(bench: Bench, peer: Peer) -> list[Measured]:
    """Asynchronous saves in steady state: the stall, and until committed."""
    ways = _known(peer, "start", peer.start)
    return _compare(
        bench,
        {"peer-stall": ": stall", "peer-committed": ": committed"},
        {_OURS: partial(_start, bench), **ways},
        bench.starting,
    )


def slowdown(bench: Bench, peer: Peer) -> list[Measured]:
    """What an asynchronous save costs a loop that computes on every rank."""
    ways = _known(peer, "start", peer.start)
    return _compare(
        bench,
        {"peer-slowdown": ""},
        {_OURS: partial(_start, bench), **ways},
        lambda name, way: bench.slowing(name, way, _LOOP_S),
        pairs=min(bench.pairs, _SLOWDOWN_PAIRS),
        warm_up=0,  # `async_save` has
    )


def load(bench: Bench, peer: Peer) -> list[Measured]:
    """Loads from the page cache."""
    ways = _known(peer, "load", peer.load)
    net = states.empty(bench.state)
    paths = {name: bench.fresh() for name in (_OURS, *ways)}
    for name, path in paths.items():
        write = partial(_save, bench) if name == _OURS else peer.save.get(name, _default(peer))
        write(path)
        bench.ranks.meet()
    for name, way in ways.items():
        _check(bench, name, way(paths[name]))
    try:
        return _compare(
            bench,
            {"peer-load": ""},
            {_OURS: partial(distckpt.load_into, net=net, comm=bench.comm, strict=True), **ways},
            lambda name, way: bench.loading(name, way, paths[name]),
        )
    finally:
        for path in paths.values():
            bench.remove(path)


MEASURES: dict[str, Callable[[Bench, Peer], list[Measured]]] = {
    "save": save,
    "async_save": async_save,
    "load": load,
    "slowdown": slowdown,
}


def _compare(
    bench: Bench,
    rows: Mapping[str, str],
    ways: Mapping[str, _Way],
    measure: Callable[[str, _Way], Contender],
    *,
    pairs: int | None = None,
    warm_up: int = 1,
) -> list[Measured]:
    """Let distckpt and a peer's default and fastest settings take turns.

    Args:
        bench: The bench.
        rows: Row → the suffix with which a contender names its number.
        ways: Name → what is measured; distckpt's first, then the peer's default.
        measure: Makes a contender of a name and its way.
        pairs: How many count.
        warm_up: How many before don't.
    """
    suffixes = list(rows.values())
    first = {name: measure(name, way) for name, way in ways.items()}
    (ours, default), others = list(first)[:2], list(first)[2:]
    chosen = [ours, default]
    if others:
        # A look at each; what wins is measured in full.
        seen = take_turns([first[name] for name in [default, *others]], 1, warm_up=warm_up)
        cost = {name: seen[name + suffixes[0]][0] for name in [default, *others]}
        best = min(cost, key=lambda name: cost[name])
        chosen += [best] if best != default else []
    found = take_turns([first[name] for name in chosen], pairs or bench.pairs, warm_up=warm_up)
    results: list[Measured] = []
    for row, suffix in rows.items():
        medians = {name: statistics.median(found[name + suffix]) for name in chosen[1:]}
        best = min(medians, key=lambda name: medians[name])
        results += [
            bench.row(
                row,
                ratios(found[name + suffix], found[ours + suffix]),
                {ours: found[ours + suffix], bench.peer: found[name + suffix]},
                peer=bench.peer,
                setting=name,
                is_best=name == best,
            )
            for name in chosen[1:]
        ]
    return results


def _known(peer: Peer, what: str, ways: Mapping[str, _Way]) -> Mapping[str, _Way]:
    if not ways:
        raise Unavailable(peer.missing.get(what, "no such function"))
    return ways


def _default(peer: Peer) -> _Way:
    return next(iter(peer.save.values()))


def _save(bench: Bench, path: Path) -> None:
    distckpt.save(path, bench.saved, comm=bench.comm)


def _start(bench: Bench, path: Path) -> InFlight:
    return distckpt.save_async(path, bench.saved, comm=bench.comm)


def _check(bench: Bench, setting: str, loaded: peers.Loaded) -> None:
    """See that a peer has loaded what it has saved."""
    for name, leaf in bench.state.items():
        found = np.ascontiguousarray(loaded[name])
        if not np.array_equal(states.flat_bytes(found), states.flat_bytes(states.array_of(leaf))):
            raise ValueError(f"{bench.peer} ({setting}) loads other bytes for {name}")
