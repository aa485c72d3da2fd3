"""Routing policies by name: ours, those that packages announce in the entry point group `paceline.routing`, and
`module:Class`.

`policy.py` says what a policy is, and each `routing_*.py` holds some of ours.
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import entry_points
from inspect import isabstract

from paceline.protocol.candidates import Candidate, Candidates
from paceline.protocol.policy import REQUEST_TOKENS, Policy, Query
from paceline.protocol.routing_blind import PowerOfTwo, RoundRobin
from paceline.protocol.routing_least import LeastLoad, LeastRequests
from paceline.protocol.routing_lockstep import Lockstep
from paceline.protocol.routing_prefix import Prefix
from paceline.protocol.routing_session import Session

__all__ = [
    "GROUP", "POLICIES", "REQUEST_TOKENS", "Candidate", "Candidates", "LeastLoad", "LeastRequests", "Lockstep",
    "Policy", "PolicyError", "PowerOfTwo", "Prefix", "Query", "RoundRobin", "Session", "find_policy", "policy_names",
]  # fmt: skip

GROUP = "paceline.routing"

POLICIES: dict[str, type[Policy]] = {
    "least-load": LeastLoad,
    "least-requests": LeastRequests,
    "power-of-two": PowerOfTwo,
    "round-robin": RoundRobin,
    "prefix": Prefix,
    "session": Session,
    "lockstep": Lockstep,
}
"""`--routing` name to class, of ours."""


class PolicyError(ValueError):
    """There is no such policy. The text is one line for the user."""


def policy_names() -> list[str]:
    """The names that `--routing` takes, besides `module:Class`: ours, then those of packages."""
    return [*POLICIES, *sorted({point.name for point in entry_points(group=GROUP)} - POLICIES.keys())]


def find_policy(name: str) -> type[Policy]:
    """The class for `--routing NAME`. Raises PolicyError."""
    if name in POLICIES:
        return POLICIES[name]
    target = name
    if ":" not in name:
        values = [point.value for point in entry_points(group=GROUP) if point.name == name]
        if not values:
            raise PolicyError(f"must be one of {', '.join(policy_names())}, or module:Class, not {name!r}")
        target = values[0]
    module_name, _, class_name = target.partition(":")
    # `--routing examples.mine:Mine` means a module of the folder where the user stands, as with python -m.
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise PolicyError(f"{name}: cannot import {target}: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise PolicyError(f"{name}: {target} is not a subclass of paceline.protocol.policy.Policy")
    if isabstract(found):
        raise PolicyError(f"{name}: {target} does not say how to choose")
    return found
