"""The tests of tests/mpi under mpirun, and whole jobs: how they end, and what they leave."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import distckpt

INNER = Path(__file__).parent / "mpi"


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_the_tests_for_several_ranks_pass_on(ranks, run_inner_tests):
    run_inner_tests(ranks)


@pytest.fixture
def run_inner_tests(mpirun, tmp_path, monkeypatch):
    """Run tests/mpi on so many ranks, and see that they have passed on each."""

    def run(ranks, **keywords):
        monkeypatch.setenv("DISTCKPT_TEST_FOLDER", str(tmp_path / "shared"))
        options = ["--with-mpi", "-x", "-q", "-p", "no:cacheprovider", "--color=no"]
        for option in ("faulthandler_timeout=60", "faulthandler_exit_on_timeout=true"):
            options += ["-o", option]
        ended = mpirun(ranks, "-m", "pytest", *options, INNER, **keywords)
        if ended.status or ended.output.count(" passed") != ranks:
            pytest.fail(f"exit status {ended.status}:\n{ended.output}", pytrace=False)

    return run
