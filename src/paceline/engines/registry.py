"""The policy for `--routing`: ours, those that packages announce in the entry point group `paceline.routing`, and
`module:Class`. Not in `protocol/`, since code is loaded here.

Engines by name: those that packages announce in the entry point group `paceline.engines`, and `module:Class`.
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import entry_points
from inspect import isabstract

from paceline.core.routing import POLICIES
from paceline.core.routing.policy import Policy
from paceline.engines.base import Engine, EngineError

ENGINES = "paceline.engines"


def engine_names() -> list[str]:
    """The names that `--engine` takes, besides `module:Class`."""
    return sorted({point.name for point in entry_points(group=ENGINES)})


def find_engine(name: str) -> type[Engine]:
    """The engine class for `--engine NAME`. Raises EngineError with one line for the user."""
    if ":" in name:
        target = name
    else:
        points = [point for point in entry_points(group=ENGINES) if point.name == name]
        if not points:
            raise EngineError(f"--engine {name}: unknown; there are {', '.join(engine_names())}, or module:Class")
        target = points[0].value
    try:
        found = load(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise EngineError(f"--engine {name}: cannot import {target}: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Engine)):
        raise EngineError(f"--engine {name}: {target} is not a subclass of paceline.engines.base.Engine")
    return found


def load(target: str) -> object:
    """What `module:Name` names. Raises ImportError, AttributeError or ValueError."""
    module_name, _, name = target.partition(":")
    # `examples.echo:Echo` means a module of the folder where the user stands, as with python -m.
    if "" not in sys.path:
        sys.path.insert(0, "")
    return getattr(importlib.import_module(module_name), name)


POLICIES_OF_OTHERS = "paceline.routing"


class PolicyError(ValueError):
    """There is no such policy. The text is one line for the user."""


def policy_names() -> list[str]:
    """The names that `--routing` takes, besides `module:Class`: ours, then those of packages."""
    return [*POLICIES, *sorted({point.name for point in entry_points(group=POLICIES_OF_OTHERS)} - POLICIES.keys())]


def find_policy(name: str) -> type[Policy]:
    """The class for `--routing NAME`. Raises PolicyError."""
    if name in POLICIES:
        return POLICIES[name]
    target = name
    if ":" not in name:
        values = [point.value for point in entry_points(group=POLICIES_OF_OTHERS) if point.name == name]
        if not values:
            raise PolicyError(f"must be one of {', '.join(policy_names())}, or module:Class, not {name!r}")
        target = values[0]
    try:
        found = load(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise PolicyError(f"{name}: cannot import {target}: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise PolicyError(f"{name}: {target} is not a subclass of paceline.core.routing.policy.Policy")
    if isabstract(found):
        raise PolicyError(f"{name}: {target} does not say how to choose")
    return found
