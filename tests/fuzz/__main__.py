from __future__ import annotations

import sys

from tests.fuzz.blind import fuzz
from tests.fuzz.targets import TARGETS

names = sys.argv[2:] or list(TARGETS)
for name in names:
    row = fuzz(TARGETS[name], int(sys.argv[1]), 1, stop_at=int(__import__("os").environ.get("STOP", "1")))
    print(
        row.name,
        row.inputs,
        f"{row.seconds:.1f}s",
        row.errors,
        row.largest,
        f"{row.rss_before_mb:.0f} {row.rss_after_mb:.0f}",
        row.first_error[:300],
        flush=True,
    )
