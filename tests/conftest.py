"""What all test files share: hypothesis profiles, stores to test on, and the door to tests/mpi."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from distckpt.store import open_store
from distckpt.testing import MemoryStore

_MPI = Path(__file__).parent / "mpi"

# Which one: HYPOTHESIS_PROFILE, else ci where the CI variable is set, else dev. No deadlines: the
# machine may be busy with anything. A test with its own max_examples scales it with `examples`.
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("dev", deadline=None, suppress_health_check=_SLOW)
settings.register_profile("ci", parent=settings.get_profile("dev"), derandomize=True, database=None)
settings.register_profile("nightly", parent=settings.get_profile("dev"), max_examples=5_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


def pytest_ignore_collect(collection_path, config):
    """Leave tests/mpi to its launcher, which starts pytest under mpirun with --with-mpi."""
    if _MPI in (collection_path, *collection_path.parents):
        return None if config.getoption("--with-mpi", default=False) else True
    return None


@pytest.fixture(params=["memory", "local"])
def store(request, tmp_path):
    """An empty store, of each kind that needs no service."""
    return MemoryStore() if request.param == "memory" else open_store(tmp_path / "checkpoint")
