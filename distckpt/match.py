"""Which saved name goes into which wanted one: exact or by suffix, and never by guessing."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from distckpt.errors import MatchError

Prefixes = str | Sequence[str]
Rename = Mapping[str, str] | Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Matching:
    """The result of `match`.

    Attributes:
        pairs: Wanted name → saved name, in the order of the wanted names.
        missing: Wanted names without a saved one, in their order.
        unexpected: Saved names (after the filters) that nothing wants, in their order.
        by_suffix: The wanted names that were matched by suffix, in their order.
    """

    pairs: dict[str, str]
    missing: list[str]
    unexpected: list[str]
    by_suffix: list[str] = field(default_factory=list)


def match(
    saved: Iterable[str],
    wanted: Iterable[str],
    *,
    strict: bool = False,
    filter_prefix: Prefixes = (),
    only_prefix: Prefixes = (),
    select: Callable[[str], bool] | None = None,
    rename: Rename | None = None,
) -> Matching:
    """Bring saved and wanted names together.

    The saved names are filtered and renamed first. Then exact names match. Then, unless `strict`,
    two names are at distance k when one is the other plus k leading dotted components; for k = 1,
    2, … the pairs at distance k among the names still free are matched. A name in two pairs of the
    same distance is ambiguous and refused.

    Args:
        saved: Names in the checkpoint.
        wanted: Names in the net.
        strict: Exact names only, and everything wanted must be there.
        filter_prefix: A prefix or several: saved names that start with one are left out.
        only_prefix: A prefix or several: only saved names that start with one are kept.
        select: A predicate: only saved names that it accepts are kept.
        rename: Saved name → name to match under, as a mapping (names not in it stay) or a callable.

    Returns:
        The pairs, and what is left over on both sides.

    Raises:
        MatchError: Ambiguous names, all those of the smallest distance that has any; with `strict`,
            wanted names that are missing; a filter that leaves nothing; two saved names renamed to
            one.
        ValueError: An empty prefix.

    Examples:
        >>> found = match(["conv.weight", "opt.step"], ["net.conv.weight"])
        >>> found.pairs, found.unexpected
        ({'net.conv.weight': 'conv.weight'}, ['opt.step'])
    """
    wanted = list(dict.fromkeys(wanted))
    original = renamed(
        filter_names(saved, filter_prefix=filter_prefix, only_prefix=only_prefix, select=select),
        rename,
    )
    pairs = {name: name for name in wanted if name in original}
    free_wanted = [name for name in wanted if name not in pairs]
    free_saved = [name for name in original if name not in pairs]
    by_suffix: set[str] = set()
    if not strict:
        longest = max((name.count(".") for name in free_wanted + free_saved), default=0)
        for distance in range(1, longest + 1):
            found = _pairs_at(distance, free_saved, free_wanted)
            pairs |= found
            by_suffix |= set(found)
            taken = set(found.values())
            free_wanted = [name for name in free_wanted if name not in found]
            free_saved = [name for name in free_saved if name not in taken]
    unexpected = [original[name] for name in free_saved]
    if strict and free_wanted:
        raise MatchError(
            f"{len(free_wanted)} of the {len(wanted)} wanted names are not in the checkpoint "
            "(strict=True):\n"
            f"  missing: {_listed(free_wanted)}\n"
            f"  saved and unused: {_listed(unexpected)}\n"
            "Use strict=False to match suffixes, rename= to map names, or only_prefix= to load a "
            "part.",
            missing=free_wanted,
            unexpected=unexpected,
        )
    return Matching(
        {name: original[pairs[name]] for name in wanted if name in pairs},
        free_wanted,
        unexpected,
        [name for name in wanted if name in by_suffix],
    )


def filter_names(
    saved: Iterable[str],
    *,
    filter_prefix: Prefixes = (),
    only_prefix: Prefixes = (),
    select: Callable[[str], bool] | None = None,
) -> list[str]:
    """Keep the saved names that the filters of `match` let through, in order.

    Raises:
        MatchError: Filters were given and nothing is left.
        ValueError: An empty prefix.
    """
    saved = list(saved)
    dropped = _prefixes("filter_prefix", filter_prefix)
    kept = _prefixes("only_prefix", only_prefix)
    names = [
        name
        for name in saved
        if not (dropped and name.startswith(dropped))
        and (not kept or name.startswith(kept))
        and (select is None or select(name))
    ]
    if saved and not names:
        raise MatchError(
            f"none of the {len(saved)} saved names is left after filter_prefix={filter_prefix!r}, "
            f"only_prefix={only_prefix!r}{', select=…' if select else ''}; they are: "
            f"{_listed(saved)}",
            unexpected=saved,
        )
    return names


def _prefixes(argument: str, value: Prefixes) -> tuple[str, ...]:
    prefixes = (value,) if isinstance(value, str) else tuple(value)
    if "" in prefixes:
        raise ValueError(f"{argument}={value!r}: an empty prefix would match every name")
    return prefixes


def renamed(names: list[str], rename: Rename | None) -> dict[str, str]:
    """Map each name that a saved one gets to the saved one.

    Raises:
        MatchError: Two saved names get one name; a `rename` that is neither a mapping nor callable.
    """
    if rename is None:
        return {name: name for name in names}
    if isinstance(rename, (str, os.PathLike)):
        raise MatchError(
            f"rename={os.fspath(rename)!r}: expected a mapping or a callable; read a file with "
            "rename=distckpt.name_map(path)"
        )
    sources = defaultdict(list)
    for name in names:
        sources[rename(name) if callable(rename) else rename.get(name, name)].append(name)
    clashes = {name: found for name, found in sources.items() if len(found) > 1}
    if clashes:
        raise MatchError(
            "rename= gives several saved names one name:\n  "
            + "\n  ".join(f"{name!r} from {_listed(found)}" for name, found in clashes.items()),
            ambiguous=clashes,
        )
    return {name: found[0] for name, found in sources.items()}


def _stripped(name: str, count: int) -> str | None:
    """Return the name without *count* leading dotted components; None if nothing would be left."""
    parts = name.split(".", count)
    return parts[count] or None if len(parts) > count else None


def _pairs_at(distance: int, saved: list[str], wanted: list[str]) -> dict[str, str]:
    """Return wanted → saved at this distance.

    Raises:
        MatchError: A name on either side is in two pairs.
    """
    saved_set = set(saved)
    by_stripped = defaultdict(list)
    for name in saved:
        short = _stripped(name, distance)
        if short is not None:
            by_stripped[short].append(name)
    of_wanted: dict[str, list[str]] = {}
    of_saved = defaultdict(list)
    for name in wanted:
        candidates = list(by_stripped.get(name, ())) if name else []
        short = _stripped(name, distance)
        if short in saved_set:
            candidates.append(short)
        if candidates:
            of_wanted[name] = candidates
            for candidate in candidates:
                of_saved[candidate].append(name)
    ambiguous = {name: found for name, found in of_wanted.items() if len(found) > 1}
    ambiguous |= {name: found for name, found in of_saved.items() if len(found) > 1}
    if ambiguous:
        raise MatchError(_ambiguity(ambiguous, of_wanted, of_saved), ambiguous=ambiguous)
    return {name: found[0] for name, found in of_wanted.items()}


def _ambiguity(
    ambiguous: Mapping[str, Sequence[str]],
    of_wanted: Mapping[str, Sequence[str]],
    of_saved: Mapping[str, Sequence[str]],
) -> str:
    lines = []
    for name, candidates in ambiguous.items():
        if len(of_wanted.get(name, ())) > 1:
            prefixes = sorted({_before_common_end(other, name) for other in candidates[1:]})
            advice = (
                f"leave the others out with filter_prefix={prefixes!r}"
                if all(prefixes) and not any(candidates[0].startswith(p) for p in prefixes)
                else f"say which with rename={{{candidates[0]!r}: {name!r}}}"
            )
            lines.append(f"wanted {name!r} could be saved {_listed(candidates)}; {advice}")
        if len(of_saved.get(name, ())) > 1:
            takers = of_saved[name]
            lines.append(
                f"saved {name!r} could go into {_listed(takers)}; "
                f"say which with rename={{{name!r}: {takers[0]!r}}}"
            )
    return "names match in more than one way by suffix:\n  " + "\n  ".join(lines)


def _before_common_end(name: str, other: str) -> str:
    """Return what stands before the characters that two names end with."""
    common = os.path.commonprefix([name[::-1], other[::-1]])  # noqa: RUF071  of characters is meant
    return name[: len(name) - len(common)]


def _listed(names: Sequence[str], limit: int = 20) -> str:
    if not names:
        return "-"
    text = ", ".join(repr(name) for name in names[:limit])
    return text if len(names) <= limit else f"{text}, … ({len(names)} in all)"
