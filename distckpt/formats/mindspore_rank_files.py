"""Which file of each rank's folder: of several saves, the newest that all ranks have."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distckpt.errors import (
    CheckpointNotFound,
    CorruptCheckpoint,
    IncompleteCheckpoint,
    ranks_text,
)
from distckpt.formats.base import Place

# Ending → the format that reads such a file.
FORMATS = {".ckpt": "mindspore", ".safetensors": "safetensors"}
_FOLDER = re.compile(r"rank_(0|[1-9][0-9]{0,8})")
_NUMBER = re.compile(r"[0-9]{1,18}")
_MOST_LISTED = 8


@dataclass(frozen=True, slots=True)
class RankFiles:
    """The files of one save.

    Attributes:
        places: Rank → its file.
        numbers: What their names tell of the save: epoch and step, or what else the last two
            numbers are; empty where they tell nothing.
        incomplete: Numbers of newer saves, which some rank lacks.
    """

    places: Mapping[int, Place]
    numbers: tuple[int, ...]
    incomplete: tuple[tuple[int, ...], ...]


def rank_folders(place: Place) -> dict[int, Place]:
    """Return the ranks' folders, in the order of the ranks."""
    matches = [match for match in map(_FOLDER.fullmatch, place.entries()) if match]
    found = {int(match[1]): place.entry(match[0]) for match in matches}
    return dict(sorted(found.items()))


def names_in(folder: Place, pattern: str = "*") -> list[str]:
    """Return the names of the checkpoint files in a rank's folder."""
    return [
        name
        for name in folder.entries()
        if name.endswith(tuple(FORMATS)) and fnmatch.fnmatchcase(name, pattern)
    ]


def choose(place: Place, pattern: str = "*") -> RankFiles:
    """Choose one file of each rank.

    Names of several saves in a folder differ in their last two numbers, such as ``net-1_10.ckpt``
    (epoch 1, step 10). Numbers are compared as numbers, and a save counts if all ranks have it.

    Args:
        place: The folder that the ranks' folders lie in.
        pattern: What the names of files must match.

    Raises:
        CheckpointNotFound: No rank has a file.
        IncompleteCheckpoint: No save is there on all ranks that have files.
        CorruptCheckpoint: Names that do not say which file is newer: all of them.
    """
    names = {rank: names_in(folder, pattern) for rank, folder in rank_folders(place).items()}
    names = {rank: found for rank, found in names.items() if found}
    if not names:
        raise CheckpointNotFound(
            f"{place.url}: expected rank_0/, rank_1/, … with files {pattern!r} of "
            f"{' or '.join(FORMATS)}; there are none"
        )
    saves = _saves(names)
    complete = [numbers for numbers, found in saves.items() if found.keys() == names.keys()]
    if not complete:
        listed = "\n  ".join(
            f"{'_'.join(map(str, numbers)) or 'no number'}: {ranks_text(list(found))}"
            for numbers, found in sorted(saves.items())[-_MOST_LISTED:]
        )
        raise IncompleteCheckpoint(
            f"{place.url}: none of {len(saves)} saves is there on all {len(names)} ranks that have "
            f"files:\n  {listed}\nDelete what is left of saves that broke off, or choose with "
            "files=, a pattern of file names"
        )
    newest = max(complete)
    _check_order(place, names, saves[newest])
    return RankFiles(
        {rank: place.entry(f"rank_{rank}/{saves[newest][rank][0].file}") for rank in names},
        newest,
        tuple(sorted(numbers for numbers in saves if numbers > newest)),
    )


@dataclass(frozen=True, slots=True)
class _Name:
    """A file's name, taken apart.

    Attributes:
        file: The name.
        head: What stands before the numbers.
        numbers: The last two, or what there is.
    """

    file: str
    head: str
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, file: str, rank_position: int | None) -> _Name:
        """Take a name apart; the number at *rank_position* from the last tells nothing."""
        found = _numbers(file)
        if rank_position is not None:
            del found[len(found) - 1 - rank_position]
        found = found[-2:]
        head = file[: found[0].start()] if found else file.rpartition(".")[0]
        return cls(file, head, tuple(int(match[0]) for match in found))


def _numbers(file: str) -> list[re.Match[str]]:
    return list(_NUMBER.finditer(file.rpartition(".")[0]))


def _saves(names: Mapping[int, Sequence[str]]) -> dict[tuple[int, ...], dict[int, list[_Name]]]:
    """Sort files by the save that they belong to: its numbers → rank → names."""
    position = _rank_position(names)
    saves: dict[tuple[int, ...], dict[int, list[_Name]]] = {}
    for rank, files in names.items():
        for name in (_Name.of(file, position) for file in files):
            saves.setdefault(name.numbers, {}).setdefault(rank, []).append(name)
    return saves


def _rank_position(names: Mapping[int, Sequence[str]]) -> int | None:
    """Find the number, counted from the last, that is the rank in all names; None if none is."""
    if len(names) == 1:
        return None  # any number may be the rank by chance
    found = [(rank, _numbers(file)) for rank, files in names.items() for file in files]
    for position in range(min(len(numbers) for _, numbers in found)):
        if all(numbers[-1 - position][0] == str(rank) for rank, numbers in found):
            return position
    return None


def _check_order(
    place: Place, names: Mapping[int, Sequence[str]], newest: Mapping[int, Sequence[_Name]]
) -> None:
    """Refuse names that do not say which file is newer."""
    position = _rank_position(names)
    unclear = {}
    for rank, files in names.items():
        heads = {_Name.of(file, position).head: file for file in files}
        if len(heads) > 1:
            unclear[rank] = list(heads.values())
        elif len(newest[rank]) > 1:
            unclear[rank] = [name.file for name in newest[rank]]
    if unclear:
        rank, examples = next(iter(unclear.items()))
        raise CorruptCheckpoint(
            f"{place.url}: {ranks_text(list(unclear))} have files whose names don't say which is "
            f"newer, such as {', '.join(map(repr, examples[:_MOST_LISTED]))} of rank {rank}. "
            "Choose with files=, a pattern of file names such as 'net-*.ckpt'",
            path=place.url,
        )
