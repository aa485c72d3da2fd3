"""Fixtures of the simulator's tests."""

from __future__ import annotations

import pytest


@pytest.fixture
def without() -> frozenset[str]:
    """The rules (`protocol/rules.py`) that a scenario's machines lack: none, unless it is called with some."""
    return frozenset()
