"""The log of a process: lines on stderr."""

from __future__ import annotations

import logging
import sys

from paceline.runtime.lossy_stderr import make_stderr_lossy


def set_up_log(level: str, name: str = "%(processName)s") -> None:
    """Log lines of this process, `name`, to stderr: `level` and above."""
    make_stderr_lossy()
    form = f"%(asctime)s %(levelname)-7s {name}: %(message)s"
    logging.basicConfig(level=level.upper(), format=form, datefmt="%H:%M:%S", stream=sys.stderr, force=True)
