"""Run the ranks of a job, and write down how each has ended, of which mpirun tells one only.

``mpirun -n N python statuses.py <folder> <N> <program> <argument>...``
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    folder, ranks, *program = sys.argv[1:]
    # The rank talks to mpirun by what it inherits from here.
    rank = subprocess.Popen([sys.executable, "-m", "mpi4py", *program], close_fds=False)
    status = rank.wait()
    Path(folder, f"status-{rank.pid}").write_text(str(status))
    # mpirun learns of no end before all have come to theirs.
    deadline = time.monotonic() + 60
    while len(list(Path(folder).glob("status-*"))) < int(ranks) and time.monotonic() < deadline:
        time.sleep(0.01)
