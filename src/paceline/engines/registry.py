"""What `--engine` and `--routing` name: ours; what packages announce in the entry point groups `paceline.engines` and
`paceline.routing`; and `module:Class`. Code is loaded here.

Every process of a deployment looks a name up. One of ours costs no look at what is installed: `importlib.metadata`
takes as long to import as all that a rank decides with.
"""

from __future__ import annotations

import importlib
import sys
from inspect import isabstract

from paceline.core.routing import POLICIES
from paceline.core.routing.policy import Policy
from paceline.engines.base import Engine, EngineError

OURS = {
    "llama": "paceline.engines.llama:LlamaEngine",
    "moe": "paceline.engines.moe:MoeEngine",
    "vllm": "paceline.engines.vllm:VllmEngine",
    "timed": "paceline.engines.timed:TimedEngine",
    "timed-lockstep": "paceline.engines.timed:TimedLockstepEngine",
}


def _announced(group: str) -> dict[str, str]:
    """Name to `module:Class`, of all packages."""
    from importlib.metadata import entry_points

    return {point.name: point.value for point in entry_points(group=group)}


def find_engine(name: str) -> type[Engine]:
    """The engine class for `--engine NAME`. Raises EngineError with one line for the user."""
    target = name if ":" in name else OURS.get(name)
    if target is None:
        others = _announced("paceline.engines")
        if name not in others:
            names = ", ".join(sorted(OURS.keys() | others.keys()))
            raise EngineError(f"--engine {name}: unknown; there are {names}, or module:Class")
        target = others[name]
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


class PolicyError(ValueError):
    """There is no such policy. The text is one line for the user."""


def policy_names() -> list[str]:
    """The names that `--routing` takes, besides `module:Class`: ours, then those of packages."""
    return [*POLICIES, *sorted(_announced("paceline.routing").keys() - POLICIES.keys())]


def find_policy(name: str) -> type[Policy]:
    """The class for `--routing NAME`. Raises PolicyError."""
    if name in POLICIES:
        return POLICIES[name]
    target = name
    if ":" not in name:
        others = _announced("paceline.routing")
        if name not in others:
            raise PolicyError(f"must be one of {', '.join(policy_names())}, or module:Class, not {name!r}")
        target = others[name]
    try:
        found = load(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise PolicyError(f"{name}: cannot import {target}: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise PolicyError(f"{name}: {target} is not a subclass of paceline.core.routing.policy.Policy")
    if isabstract(found):
        raise PolicyError(f"{name}: {target} does not say how to choose")
    return found
