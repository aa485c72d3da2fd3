"""The plain manifests, from the Helm chart: python tools/render_chart.py (`make manifests`).

Of Helm's templates it knows what the chart is held to: values, `quote`, `if` with a value or `eq`, and `add`. So the
chart is tried where there is no helm, and those who have none deploy the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
CHART = DEPLOY / "chart"
MANIFESTS = {"statefulset.yaml": "StatefulSet", "leaderworkerset.yaml": "LeaderWorkerSet"}
TAG = re.compile(r"(\s*)\{\{(-?) *(.*?) *(-?)\}\}", re.DOTALL)


class UnknownTag(ValueError):
    """The chart uses more of Helm's templates than is known here."""


def values(**given: Any) -> dict[str, Any]:
    """The chart's, and what is given in their place. Raises KeyError for what is none of them."""
    own = dict(yaml.safe_load((CHART / "values.yaml").read_text()))
    if unknown := given.keys() - own.keys():
        raise KeyError(f"no such value: {', '.join(sorted(unknown))}")
    return own | given


def render(text: str, given: Mapping[str, Any], release: str = "paceline") -> str:
    """A template's text with these values. Raises UnknownTag."""
    parts: list[str] = []
    at, shown = 0, [True]
    for found in TAG.finditer(text):
        before, tag = text[at : found.start()] + ("" if found[2] else found[1]), found[3]
        at = found.end()
        if all(shown):
            parts.append(before)
        if tag.startswith("if "):
            shown.append(bool(_value(tag.removeprefix("if "), given, release)))
        elif tag == "end":
            shown.pop()
        elif all(shown):
            parts.append(str(_value(tag, given, release)))
    parts.append(text[at:])
    return "".join(parts).lstrip("\n")


def _value(tag: str, given: Mapping[str, Any], release: str) -> Any:
    name, pipe, function = tag.partition(" | ")
    match name.split():
        case [".Release.Name"]:
            value: Any = release
        case [path] if path.startswith(".Values."):
            value = given[path.removeprefix(".Values.")]
        case ["eq", path, word]:
            return _value(path, given, release) == word.strip('"')
        case ["add", path, number]:
            return _value(path, given, release) + int(number)
        case _:
            raise UnknownTag(tag)
    if pipe and function != "quote":
        raise UnknownTag(tag)
    return f'"{value}"' if pipe else value


def manifests(given: Mapping[str, Any]) -> str:
    """All of the chart's manifests."""
    rendered = [render(path.read_text(), given).strip() for path in sorted((CHART / "templates").iterdir())]
    return "\n---\n".join(text for text in rendered if text) + "\n"


if __name__ == "__main__":
    for file, kind in MANIFESTS.items():
        head = f"# Made from deploy/chart with its own values and kind: {kind} (`make manifests`).\n"
        (DEPLOY / "kubernetes" / file).write_text(head + manifests(values(kind=kind)))
