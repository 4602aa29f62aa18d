"""The `Manager` in the loops of others; a module a library, imported only when it is named."""

from __future__ import annotations
