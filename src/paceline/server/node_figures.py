"""Figures that several processes of a node make together, in files of the folder that they share.

Who waits is each front-end's own to say, and is added up over those that live (`Queued`). What all of them see, like
the end of a pause, is to be counted once, by whichever comes first (`Once`). What the supervisor counts is in
`process/ends.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections import Counter
from pathlib import Path

TENANTS_SHOWN = 30
OTHERS = "(others)"
"""Whoever waits beyond those: names may be made up, one for each request."""


class Once:
    """Of things that all see and that have numbers which only grow: whether this front-end is the first to tell."""

    def __init__(self, folder: str, kind: str) -> None:
        self._path = Path(folder, f"once-{kind}")

    def first(self, number: int) -> bool:
        """Whether nobody has told of this one, or of a later one. Raises OSError where the folder is gone."""
        with open(self._path, "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            if number <= int(file.read() or 0):
                return False
            file.truncate(0)
            file.write(str(number))
            return True


class Queued:
    """How many requests of each tenant wait, at this front-end and the others. `always`: tenants that are shown also
    where nobody of theirs waits.
    """

    def __init__(self, folder: str, always: set[str]) -> None:
        self._folder, self._always = Path(folder), always
        self._own = f"tenants-{os.getpid()}"
        self._said: dict[str, int] = {}

    def put(self, counts: dict[str, int]) -> None:
        """What waits here is this now."""
        if counts == self._said:
            return
        path = self._folder / self._own
        with contextlib.suppress(OSError):
            new = path.with_suffix(".new")
            new.write_text(json.dumps(counts))
            new.rename(path)
            self._said = counts

    def all(self, own: dict[str, int]) -> dict[str, int]:
        """By tenant. `own`: what waits here."""
        total = Counter(own)
        for path in self._folder.glob("tenants-*"):
            pid = path.name.partition("-")[2]
            with contextlib.suppress(OSError, ValueError):
                if path.name == self._own or not pid.isdecimal():
                    continue
                if os.path.exists(f"/proc/{pid}"):
                    total.update(json.loads(path.read_text()))
                else:
                    path.unlink()
        shown = dict.fromkeys(sorted(self._always), 0) | dict(total.most_common(TENANTS_SHOWN))
        rest = total.total() - sum(total[name] for name in shown)
        return shown | ({OTHERS: rest} if rest else {})
