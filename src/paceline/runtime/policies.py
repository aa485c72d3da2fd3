"""The policy for `--routing`: ours, those that packages announce in the entry point group `paceline.routing`, and
`module:Class`. Not in `protocol/`, since code is loaded here.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from inspect import isabstract

from paceline.engines.registry import load
from paceline.protocol.routing import POLICIES
from paceline.protocol.routing.policy import Policy

GROUP = "paceline.routing"


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
    try:
        found = load(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise PolicyError(f"{name}: cannot import {target}: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise PolicyError(f"{name}: {target} is not a subclass of paceline.protocol.routing.policy.Policy")
    if isabstract(found):
        raise PolicyError(f"{name}: {target} does not say how to choose")
    return found
