"""``python -m distckpt``."""

from __future__ import annotations

import sys

from distckpt.cli import main

if __name__ == "__main__":
    sys.exit(main())
