"""Every error that distckpt raises, in one tree.

::

    CheckpointError
    ├── CheckpointNotFound   (FileNotFoundError)  nothing at this URL
    ├── CheckpointExists     (FileExistsError)    a committed checkpoint is in the way
    ├── IncompleteCheckpoint                      files of a save, but no (whole) set of them
    ├── CorruptCheckpoint    (ValueError)         bytes differ from their checksum
    ├── UnsupportedFormat    (ValueError)         not ours, or from a newer major version
    ├── LayoutError          (ValueError)         a state whose pieces do not fit together
    ├── MatchError           (LookupError)        a net and a checkpoint do not fit together
    ├── StoreError           (OSError)            the storage refused
    ├── SaveFailed                                a save failed; equal on every rank
    └── LoadFailed                                a load failed; equal on every rank

What was wrong with the call keeps its own class on every rank (`LayoutError`, `MatchError`,
`CheckpointExists`, …); what went wrong on the way is a `SaveFailed` or a `LoadFailed` with each
rank's cause.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# With limits, so that no name that a message repeats takes long.
_USER = re.compile(r"(?<=://)[^/\s'\"@]{1,500}+@")
_QUERY = re.compile(r"(://[^\s'\"?%]{0,500}+(?:\?|%3F))[^\s'\"]*?(?=[:;,.)]{0,5}(?:[\s'\"]|$))")


def without_secrets(text: str) -> str:
    """Leave out of the URLs in a text what may be a secret: users, passwords, and queries.

    Examples:
        >>> without_secrets("https://me:pw@host/x.npz?sig=abc: cut short")
        'https://…@host/x.npz?…: cut short'
    """
    return _QUERY.sub(r"\1…", _USER.sub("…@", text))


def tellable(cause: Exception) -> Exception | None:
    """Return an error to raise another one from; None if its text would tell a secret."""
    return cause if without_secrets(str(cause)) == str(cause) else None


def _told(failures: Mapping[int, str] | None) -> dict[int, str]:
    return {rank: without_secrets(said) for rank, said in (failures or {}).items()}


class CheckpointError(Exception):
    """Root of all errors that distckpt raises on purpose. No secret in a URL gets into one."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(
            *(without_secrets(one) if isinstance(one, str) else one for one in arguments)
        )


class CheckpointNotFound(CheckpointError, FileNotFoundError):
    """There is no checkpoint at the URL."""


class CheckpointExists(CheckpointError, FileExistsError):
    """A committed checkpoint is already at the URL and ``overwrite`` was not asked for."""


class IncompleteCheckpoint(CheckpointError):
    """Files of a save are there, but not all that a checkpoint needs."""


class CorruptCheckpoint(CheckpointError, ValueError):
    """Stored bytes differ from what was committed.

    Attributes:
        path: The damaged object, or None.
        offset_bytes: First byte of the damaged block, or None.
    """

    def __init__(
        self, message: str, *, path: str | None = None, offset_bytes: int | None = None
    ) -> None:
        super().__init__(message)
        self.path = None if path is None else without_secrets(path)
        self.offset_bytes = offset_bytes


class UnsupportedFormat(CheckpointError, ValueError):
    """The file is not distckpt's, or it needs a newer reader."""


class LayoutError(CheckpointError, ValueError):
    """The pieces of a state do not make whole tensors, or can't be stored."""


class MatchError(CheckpointError, LookupError):
    """What a net wants and what a checkpoint holds can't be brought together.

    Attributes:
        missing: Wanted names with no saved one.
        unexpected: Saved names that nothing wants.
        ambiguous: Name → the candidates that tie.
        mismatched: Wanted name → what differs (shape, dtype, kind), as text.
    """

    def __init__(
        self,
        message: str,
        *,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        ambiguous: Mapping[str, Sequence[str]] | None = None,
        mismatched: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.missing = list(missing)
        self.unexpected = list(unexpected)
        self.ambiguous = {name: list(found) for name, found in (ambiguous or {}).items()}
        self.mismatched = dict(mismatched or {})


class StoreError(CheckpointError, OSError):
    """The storage refused or failed.

    Attributes:
        url: Where.
        refused: True only if the store certainly did not carry the operation out, and will not:
            a request without an answer can still arrive.
        undurable: It was carried out and can be seen, but may not survive a power loss.
        denied: This object can't be read, by its permissions, or since it is a directory: that says
            nothing of others.
    """

    def __init__(
        self,
        message: str,
        *,
        url: str = "",
        refused: bool = False,
        undurable: bool = False,
        denied: bool = False,
    ) -> None:
        super().__init__(message)
        self.url = without_secrets(url)
        self.refused = refused
        self.undurable = undurable
        self.denied = denied


class SaveFailed(CheckpointError):
    """A save failed; the same on every rank.

    Attributes:
        failures: Rank → what happened there. A rank that did not answer in time is here too.
        committed: False, or None where the store's answer to the manifest was lost and it
            can't be read back: the checkpoint may exist, and nothing was deleted.
    """

    def __init__(
        self,
        message: str,
        *,
        failures: Mapping[int, str] | None = None,
        committed: bool | None = False,
    ) -> None:
        super().__init__(message)
        self.failures = _told(failures)
        self.committed = committed


class LoadFailed(CheckpointError):
    """A load failed; the same on every rank.

    Attributes:
        failures: Rank → what happened there.
        touched: Names in the net that may be partly overwritten (empty when nothing changed).
        damaged: Whether bytes of the checkpoint are damaged or missing: then no later attempt will
            do better.
        gone: Whether the checkpoint was deleted or replaced meanwhile: then another is there.
    """

    def __init__(
        self,
        message: str,
        *,
        failures: Mapping[int, str] | None = None,
        touched: Sequence[str] = (),
        damaged: bool = False,
        gone: bool = False,
    ) -> None:
        super().__init__(message)
        self.failures = _told(failures)
        self.touched = list(touched)
        self.damaged = damaged
        self.gone = gone


_ATTRIBUTES = (
    "path",
    "offset_bytes",
    "missing",
    "unexpected",
    "ambiguous",
    "mismatched",
    "url",
    "denied",
    "failures",
    "committed",
    "touched",
    "damaged",
    "gone",
)
_CLASSES: dict[str, type[CheckpointError]] = {
    kind.__name__: kind
    for kind in (
        CheckpointError,
        CheckpointNotFound,
        CheckpointExists,
        IncompleteCheckpoint,
        CorruptCheckpoint,
        UnsupportedFormat,
        LayoutError,
        MatchError,
        StoreError,
        SaveFailed,
        LoadFailed,
    )
}


def to_plain(error: BaseException) -> dict[str, object]:
    """Take an error apart into plain values, to be sent to other ranks.

    A foreign exception becomes a `CheckpointError` whose text begins with its type; a subclass that
    the tree doesn't know becomes what it is derived from.
    """
    if isinstance(error, CheckpointError):
        kind = next(base.__name__ for base in type(error).__mro__ if base.__name__ in _CLASSES)
        attributes = {name: getattr(error, name) for name in _ATTRIBUTES if hasattr(error, name)}
        return {"kind": kind, "message": str(error), "attributes": attributes}
    message = f"{type(error).__name__}: {error}"
    return {"kind": "CheckpointError", "message": message, "attributes": {}}


def from_plain(plain: Mapping[str, object]) -> CheckpointError:
    """Make the error that `to_plain` took apart."""
    kind = _CLASSES[str(plain["kind"])]
    attributes = plain["attributes"]
    if not isinstance(attributes, Mapping):
        raise TypeError("attributes of an error are a mapping")
    return kind(str(plain["message"]), **attributes)


def text(error: BaseException) -> str:
    """One line for a report: the error's type and what it says."""
    return f"{type(error).__name__}: {error}"


# Errors of what a rank was given: they keep their class when all ranks that failed report the same.
_OF_THE_CALL = frozenset(
    {
        "LayoutError",
        "MatchError",
        "CheckpointExists",
        "StoreError",
        "UnsupportedFormat",
    }
)


def raise_together(
    errors: Mapping[int, Mapping[str, Any]],
    url: str,
    kind: Callable[..., SaveFailed | LoadFailed],
    verb: str,
    *,
    own_kind: bool = False,
    **attributes: object,
) -> None:
    """Raise what ranks report, if any does: a *kind* with every rank's cause.

    Args:
        errors: Rank → its error (`to_plain`).
        url: Of the checkpoint.
        kind: `SaveFailed` or `LoadFailed`.
        verb: What failed, ``"save"`` or ``"load"``.
        own_kind: Nothing was done yet: where all who failed were given something wrong of the same
            kind, the error is of that kind.
        **attributes: Of the error.

    Raises:
        CheckpointError: See above; none if *errors* is empty.
    """
    if not errors:
        return
    first = next(iter(errors.values()))
    same = all(error["kind"] == first["kind"] for error in errors.values())
    if own_kind and same and first["kind"] in _OF_THE_CALL:
        messages: dict[str, list[int]] = {}
        for rank, error in errors.items():
            messages.setdefault(error["message"], []).append(rank)
        lines = [f"{url}: on {ranks_text(found)}: {message}" for message, found in messages.items()]
        attributes = _united([error["attributes"] for error in errors.values()])
        raise from_plain({**first, "message": "\n".join(lines), "attributes": attributes})
    texts = {rank: f"{error['kind']}: {error['message']}" for rank, error in errors.items()}
    listed = "\n  ".join(f"rank {rank}: {found}" for rank, found in texts.items())
    raise kind(
        f"{url}: the {verb} failed on {ranks_text(list(errors))}:\n  {listed}",
        failures=texts,
        **attributes,
    )


def _united(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Unite the attributes of errors of one kind: all names that any rank reports; all agreeing."""
    united = dict(found[0])
    for attributes in found[1:]:
        for name, value in attributes.items():
            if isinstance(value, dict):
                united[name] = united[name] | value
            elif isinstance(value, list):
                united[name] = list(dict.fromkeys([*united[name], *value]))
            elif isinstance(value, bool):
                united[name] = united[name] and value
    return united


def ranks_text(ranks: Sequence[int], limit: int = 8) -> str:
    """Name ranks in a sentence."""
    listed = ", ".join(map(str, ranks[:limit])) + (", …" if len(ranks) > limit else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}"


def size_text(size_bytes: int) -> str:
    """Write a size for people, in powers of 1000.

    Examples:
        >>> size_text(999), size_text(1234567)
        ('999 B', '1.2 MB')
    """
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    power = min((len(str(size_bytes)) - 1) // 3, len(units) - 1)
    return f"{size_bytes / 1000**power:.{1 if power else 0}f} {units[power]}"


def some_names(names: Sequence[str], limit: int = 20) -> str:
    """List names in a sentence; of many, the first and how many there are.

    Examples:
        >>> some_names(["a", "b", "c"], limit=2)
        'a, b, … (3 in all)'
    """
    return ", ".join(names[:limit]) + (f", … ({len(names)} in all)" if len(names) > limit else "")
