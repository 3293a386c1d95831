"""Set-up that all tests share."""

from __future__ import annotations

from hypothesis import settings

# The same examples on every run, and no time limit for each: machines that run tests are busy.
settings.register_profile("repeatable", max_examples=60, deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")
