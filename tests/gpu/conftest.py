"""Tests that need an accelerator. ``make simulated`` lets them run on a simulated one."""

from __future__ import annotations

import os

if os.environ.get("FT_TRANSPORT_SIMULATED"):
    import simulator  # noqa: F401
