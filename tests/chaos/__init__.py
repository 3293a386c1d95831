"""A job that trains while its replicas are killed, frozen and cut off, mostly in the middle of a heal.

``python -m tests.chaos`` (``make chaos``) runs it; ``docs/chaos.md`` says what it checks.
"""
