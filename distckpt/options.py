"""What a save was asked for, besides where and what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from distckpt.manifest import BLOCK_BYTES
from distckpt.plan import DEFAULT_SHARD_BYTES, Replicas

OnFailure = Literal["raise", "warn"]
Lazy = bool | str | Sequence[str]


def check_staging(lazy: Lazy, staging_bytes: int | None) -> None:
    """Refuse what is no choice of lazy tensors, and what is too little memory for copies.

    Raises:
        ValueError: One of them.
    """
    prefixes = [] if isinstance(lazy, bool) else [lazy] if isinstance(lazy, str) else list(lazy)
    if not all(prefixes):
        raise ValueError(f"lazy={lazy!r}: expected True, False, or prefixes of names")
    if staging_bytes is not None and staging_bytes < 2 * BLOCK_BYTES:
        raise ValueError(
            f"staging_bytes={staging_bytes}: expected None, or at least {2 * BLOCK_BYTES}"
        )


def check_on_failure(on_failure: OnFailure) -> None:
    """Refuse what is none.

    Raises:
        ValueError: It is none.
    """
    if on_failure not in get_args(OnFailure):
        raise ValueError(f"on_failure={on_failure!r}: expected 'raise' or 'warn'")


@dataclass(frozen=True, slots=True)
class Options:
    """What a save was asked for, besides where and what; see `distckpt.save`.

    `lazy` names the tensors that may change only after `wait_staged`: all, or by prefixes;
    `check_lazy` detects if they did before; `staging_bytes` bounds the memory for copies. Ranks may
    differ in these. `guard` is called at the coordinator immediately before the manifest is
    written: what it raises fails the save on all ranks.

    As text, what differs from the defaults and must be the same on all ranks:

    Examples:
        >>> str(Options(overwrite=True)), str(Options())
        (' (overwrite=True)', '')
    """

    overwrite: bool = False
    replicas: Replicas = "check"
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    lazy: Lazy = False
    check_lazy: bool = False
    staging_bytes: int | None = None
    metadata: Mapping[str, object] | None = None
    metrics: Mapping[str, float] | None = None
    step: int | None = None
    timeout_s: float = 600.0
    on_failure: OnFailure = "raise"
    guard: Callable[[], None] | None = None

    def planning(self) -> str:
        """The options that a plan depends on, as text."""
        # The order of the rules counts: the first that fits does.
        rules = dict(self.replicas) if isinstance(self.replicas, Mapping) else self.replicas
        return f"replicas={rules!r}, max_shard_bytes={self.max_shard_bytes}"

    def __str__(self) -> str:
        default = Options()
        listed = ", ".join(
            f"{name}={getattr(self, name)!r}"
            for name in ("overwrite", "step", "replicas", "max_shard_bytes")
            if getattr(self, name) != getattr(default, name)
        )
        return f" ({listed})" if listed else ""
