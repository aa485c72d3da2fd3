"""Why processes of this node were started again, counted by what they are and how they had ended.

The supervisor counts, in a file of the folder that the node's processes share; whichever front-end is asked for the
metrics reads it (`server/metrics.py`). The supervisor outlives them all, so the counts only grow.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections import Counter
from pathlib import Path

from paceline.net.links import REFUSED_FOLDER
from paceline.process.spawn import AGAIN, HUNG

FILE = "restarts"
CAUSES = {"rank": ("SIGKILL", "failed", "group", "hung"), "front-end": ("SIGKILL", "failed"),
          "coordinator": ("SIGKILL", "failed")}  # fmt: skip
"""What is counted from nought, since a rate sees only a counter that was there before it grew."""


def cause_of(exit_code: int | None) -> str:
    """A signal's name, or: `hung` in a step, its `group` has ended, it has `failed`."""
    if exit_code is not None and exit_code < 0:
        return signal.Signals(-exit_code).name
    return {AGAIN: "group", HUNG: "hung"}.get(exit_code or 0, "failed")


class Ends:
    """Of one supervisor's children."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, kind: str, exit_code: int | None) -> None:
        """One of this kind has ended so, and is to be started again."""
        self._counts[f"{kind} {cause_of(exit_code)}"] += 1
        if (folder := os.environ.get(REFUSED_FOLDER)) is not None:
            path = Path(folder, FILE)
            # Put there in one piece: somebody may be reading.
            with contextlib.suppress(OSError):
                path.with_suffix(".new").write_text(json.dumps(self._counts))
                path.with_suffix(".new").rename(path)


def restarts(folder: str) -> dict[tuple[str, str], int]:
    """How often processes were started again: by what they are, and the cause."""
    found = {(kind, cause): 0 for kind, causes in CAUSES.items() for cause in causes}
    with contextlib.suppress(OSError, ValueError):
        for name, count in json.loads(Path(folder, FILE).read_text()).items():
            kind, _, cause = name.partition(" ")
            found[kind, cause] = count
    return found
