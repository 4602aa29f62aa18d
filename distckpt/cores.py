"""Which share of a machine's cores a rank may have."""

from __future__ import annotations

import os


def cores_for_each(neighbours: int) -> int:
    """Say how many cores each of so many ranks of this machine has, this one included; at least 1.

    Of those that this process may run on: launchers bind ranks to some.
    """
    bound = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if bound else os.cpu_count() or 1
    return max(1, cores // neighbours)
