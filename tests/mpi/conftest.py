"""What the tests on several ranks share. tests/test_mpi.py starts them under mpirun."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest


@pytest.fixture
def comm():
    """All ranks."""
    from mpi4py import MPI

    return MPI.COMM_WORLD


@pytest.fixture
def folder(request):
    """A place of this test's own that all ranks see; nothing is there yet."""
    name = re.sub(r"[^\w-]+", "-", request.node.name)
    return Path(os.environ["DISTCKPT_TEST_FOLDER"]) / request.node.path.stem / name
