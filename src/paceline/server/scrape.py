"""The figures in the front-ends' files, added up and written as Prometheus reads them.

prometheus-client writes these files and has a collector for them, which reads every name and label anew at each scrape:
with 64 ranks, 6,000 figures, that holds a front-end's event loop for a tenth of a second, and all its streams with it.
Names do not change from scrape to scrape, and here they are read once: what is left to do each time is adding and
writing numbers. There are counters and histograms in the files, and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Scrape:
    """`folder`: where the files are."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._keys: dict[str, None] = {}
        """All that have been seen, in their order."""
        self._kinds: dict[str, str] = {}
        """Of the keys that are new since the lines were laid out."""
        self._families: dict[str, Family] = {}

    def text(self) -> bytes:
        totals: dict[str, float] = dict.fromkeys(self._keys, 0.0)
        known = len(totals)
        for file in sorted(self._folder.glob("*.db")):
            kind = file.name.split("_")[0]
            # One that a cleaner takes away meanwhile says nothing any more.
            with contextlib.suppress(FileNotFoundError):
                for key, value in _values(file):
                    if key in totals:
                        totals[key] += value
                    else:
                        totals[key] = value
                        self._kinds[key] = kind
        if len(totals) > known:
            self._learn()
        lines: list[str] = []
        for family in self._families.values():
            family.write(totals, lines)
        return "".join(lines).encode()

    def _learn(self) -> None:
        for key, kind in self._kinds.items():
            self._keys[key] = None
            family, name, labels, text = json.loads(key)
            if family not in self._families:
                self._families[family] = Family(family, kind, text)
            self._families[family].add(key, name, labels)
        self._kinds.clear()


class Family:
    """The series of one name. `kind`: counter or histogram."""

    def __init__(self, name: str, kind: str, text: str) -> None:
        self._name, self._histogram = name, kind == "histogram"
        shown = name if self._histogram else f"{name}_total"
        self._head = f"# HELP {shown} {_escaped(text, quote=False)}\n# TYPE {shown} {kind}\n"
        self._plain: list[tuple[str, str]] = []
        """Key, and the line up to its value."""
        self._buckets: dict[str, list[tuple[float, str, str]]] = {}
        """By the other labels: bound, key, and the line up to its value; by bound."""

    def add(self, key: str, name: str, labels: dict[str, Any]) -> None:
        bound = labels.pop("le", None)
        others = ",".join(f'{label}="{_escaped(str(value))}"' for label, value in sorted(labels.items()))
        if bound is None:
            self._plain.append((key, f"{name}{{{others}}} " if others else f"{name} "))
            return
        found = self._buckets.setdefault(others, [])
        found.append((float(bound), key, f'{name}{{{others}{"," if others else ""}le="{bound}"}} '))
        found.sort()

    def write(self, totals: dict[str, float], lines: list[str]) -> None:
        lines.append(self._head)
        for key, line in self._plain:
            lines.append(f"{line}{totals[key]!r}\n")
        for others, buckets in self._buckets.items():
            sum_up_to = 0.0
            for _, key, line in buckets:
                sum_up_to += totals[key]
                lines.append(f"{line}{sum_up_to!r}\n")
            labels = f"{{{others}}}" if others else ""
            lines.append(f"{self._name}_count{labels} {sum_up_to!r}\n")


def _values(file: Path) -> Iterator[tuple[str, float]]:
    from prometheus_client.mmap_dict import MmapedDict

    library: Any = MmapedDict
    for key, value, _, _ in library.read_all_values_from_file(os.fspath(file)):
        yield key, value


def _escaped(text: str, quote: bool = True) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quote else text
