"""A pytest plugin: every Manager that is given no transport gets the one that ``FT_TRANSPORT_UPSTREAM`` names.

torchft's Manager makes an HTTPTransport then. Ours get a template that holds every key that is registered with the
Manager, also those that come later (DiLoCo's fragments).
"""

from __future__ import annotations

import functools
import os
import threading
from datetime import timedelta
from typing import Any

import pytest
import torch
from torchft.manager import Manager

from ft_transport import LaneTransport, PGTransport
from ft_transport._telemetry.events import Event

__all__ = ["TRANSPORTS"]

# By the name that the environment gives; HTTP is what torchft takes itself.
TRANSPORTS = ("http", "pg", "lanes")

# Read once: a test of torchft's clears the environment.
_transport = os.environ.get("FT_TRANSPORT_UPSTREAM", "http")
_events: list[Event] = []
_lock = threading.Lock()
_original = Manager.__init__


def _note(event: Event) -> None:
    with _lock:
        _events.append(event)


def _make(manager: Any, pg: Any, timeout: timedelta) -> Any:
    def template() -> object:
        return {key: state_dict() for key, state_dict in manager._user_state_dicts.items()}

    cpu = torch.device("cpu")
    if _transport == "pg":
        return PGTransport(pg, timeout, cpu, template, on_event=_note)
    return LaneTransport(timeout, cpu, template, host="127.0.0.1", on_event=_note)


@functools.wraps(_original)
def _with_ours(manager: Any, pg: Any, *args: Any, checkpoint_transport: Any = None, **options: Any) -> None:
    if checkpoint_transport is None:
        checkpoint_transport = _make(manager, pg, options.get("timeout", timedelta(seconds=60)))
    _original(manager, pg, *args, checkpoint_transport=checkpoint_transport, **options)


def pytest_configure() -> None:
    if _transport != "http":
        Manager.__init__ = _with_ours


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    ends = [(event["role"], event["outcome"]) for event in _events]
    for end in sorted(set(ends)):
        terminalreporter.write_line(f"transfers: {' '.join(end)} {ends.count(end)}")
    shares = [event["in_place_share"] for event in _events if event["role"] == "destination"]
    if shares:
        terminalreporter.write_line(f"in place: {min(shares):.0%} to {max(shares):.0%}")
