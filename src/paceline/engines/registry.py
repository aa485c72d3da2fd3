"""Engines by name: those that packages announce in the entry point group `paceline.engines`, and `module:Class`."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import entry_points

from paceline.engines.base import Engine, EngineError

GROUP = "paceline.engines"


def engine_names() -> list[str]:
    """The names that `--engine` takes, besides `module:Class`."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def find_engine(name: str) -> type[Engine]:
    """The engine class for `--engine NAME`. Raises EngineError with one line for the user."""
    if ":" in name:
        target = name
    else:
        points = [point for point in entry_points(group=GROUP) if point.name == name]
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
