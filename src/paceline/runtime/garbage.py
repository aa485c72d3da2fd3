"""What happens to garbage: it is counted, and the first of each kind is logged."""

from __future__ import annotations

import logging
from collections import Counter


class Garbage:
    """What arrived and was no message: counted by kind, the first of each kind logged."""

    def __init__(self, logger: logging.Logger, socket_name: str) -> None:
        self._logger = logger
        self._socket_name = socket_name
        self.counts: Counter[str] = Counter()

    def add(self, kind: str, detail: str) -> None:
        """One more of `kind`."""
        self.counts[kind] += 1
        if self.counts[kind] == 1:
            # What a stranger sent does not belong in a log unescaped, or whole.
            shown = detail[:200].encode("unicode_escape").decode()
            self._logger.warning("dropped a message on %s, %s: %s (further ones are only counted)",
                                 self._socket_name, kind, shown)  # fmt: skip
