"""``python -m benchmarks.suite``."""

from __future__ import annotations

import signal
import sys

from benchmarks.suite.run import main


def _leave(number: int, _: object) -> None:
    """Leave as after Ctrl-C, so that ranks are ended and folders removed."""
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _leave)
    sys.exit(main())
