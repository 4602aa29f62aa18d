"""What all test files share: hypothesis profiles, stores to test on, and the door to tests/mpi."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from servers import faulty_s3, moto, seaweedfs, web  # noqa: F401  fixtures for all test files

from distckpt import failures
from distckpt.store import open_store
from distckpt.testing import MemoryStore

# A shell that starts the tests in the background has them ignore Ctrl-C, and what they start, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest.register_assert_rewrite("store_contract")
_MPI = Path(__file__).parent / "mpi"

# Which one: HYPOTHESIS_PROFILE, else ci where the CI variable is set, else dev. No deadlines: the
# machine may be busy with anything. Tests that want more examples multiply the profile's number.
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("dev", deadline=None, suppress_health_check=_SLOW)
settings.register_profile("ci", parent=settings.get_profile("dev"), derandomize=True, database=None)
settings.register_profile("nightly", parent=settings.get_profile("dev"), max_examples=5_000)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev")
)


def pytest_ignore_collect(collection_path, config):
    """Leave tests/mpi to its launcher, which starts pytest under mpirun with --with-mpi."""
    if _MPI in (collection_path, *collection_path.parents):
        return None if config.getoption("--with-mpi", default=False) else True
    return None


@pytest.fixture(autouse=True)
def _no_failed_save_ends_the_tests():
    """A test may leave a failed save that nobody waits for; the tests shall not end with 74."""
    unseen, add = [], failures.Unseen.add

    def note(self, save_id, message):
        unseen.append((self, save_id))
        add(self, save_id, message)

    # Not the fixture: it would be set up, and so end, in another order for the tests that use it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(failures.Unseen, "add", note)
        yield
    for each, save_id in unseen:
        each.see([save_id])


@pytest.fixture(params=["memory", "local"])
def store(request, tmp_path):
    """An empty store, of each kind that needs no service."""
    return MemoryStore() if request.param == "memory" else open_store(tmp_path / "checkpoint")


@dataclass(frozen=True)
class Ended:
    """A job that has ended: mpirun's exit status, and all that its ranks have printed."""

    status: int
    output: str


@pytest.fixture(scope="session")
def mpirun(tmp_path_factory):
    """Run a job: `mpirun(ranks, program, *arguments)` waits for its end, and kills what hangs.

    ``rc=`` sets mpi4py's options, such as ``thread_level=serialized``; ``meanwhile=`` is called
    with the process, and may do something to it. Ranks run as ``python -m mpi4py``, so that one
    that fails ends the job. The mpirun is the one beside this interpreter.
    """
    found = Path(sys.executable).with_name("mpirun")
    if not found.exists():
        pytest.fail("no mpirun beside this interpreter: pip install '.[mpi]' brings one")

    def run(ranks, *program, rc=None, timeout_s=150.0, meanwhile=lambda _: None):
        options = () if rc is None else ("-rc", rc)
        command = [str(found), "-n", str(ranks), sys.executable, "-m", "mpi4py", *options, *program]
        log = tmp_path_factory.mktemp("job") / "output"
        with log.open("wb") as output:
            job = subprocess.Popen(
                list(map(str, command)),
                env=os.environ | _RANKS,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            meanwhile(job)
            status = job.wait(timeout_s)
        except BaseException as exc:
            # What it has printed, stacks included, is what tells why it hangs.
            job.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(10)
            exc.add_note(log.read_text(errors="replace"))
            raise
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
            job.wait()
        return Ended(status, log.read_text(errors="replace"))

    return run


_RANKS = {
    # So many processes need not each compile what they import.
    "PYTHONDONTWRITEBYTECODE": "",
    # One thread a rank: there are more ranks than cores.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # OpenMPI refuses that, and root, unless told otherwise; without ofi it starts faster.
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_btl": "^ofi",
    "OMPI_MCA_mtl": "^ofi",
}
