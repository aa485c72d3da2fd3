"""Nothing is decided by the wall clock, which jumps: whoever reads it is listed here, with what for."""

from __future__ import annotations

import ast

from tests.test_tidy import FILES, short, tree_of

READERS = {
    ("time", "time"), ("time", "time_ns"), ("time", "localtime"), ("time", "gmtime"), ("time", "ctime"),
    ("time", "strftime"), ("datetime", "now"), ("datetime", "utcnow"), ("datetime", "today"), ("date", "today"),
    ("time", "CLOCK_REALTIME"),
}  # fmt: skip

ALLOWED = {
    "src/paceline/engines/chat.py": 1,  # A model's template may show the date.
    "src/paceline/net/links.py": 1,  # A number that no process has had; never compared by size.
    "src/paceline/server/requests.py": 2,  # `created` in an answer.
    "src/paceline/server/process.py": 1,  # `created` of the model.
    "src/paceline/server/dashboard.py": 2,  # What people read on the page: when that was.
    "src/paceline/server/timelines.py": 1,  # The same, of a request.
    "src/paceline/server/tracing.py": 1,  # A span begins at a time of day.
}


def readings(tree: ast.Module) -> int:
    """How often the wall clock is named in a file."""
    found = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            found += (owner, node.attr) in READERS
        elif isinstance(node, ast.ImportFrom):
            found += sum((node.module, alias.name) in READERS for alias in node.names)
    return found


def test_a_reading_is_found_however_it_is_written() -> None:
    program = "import time, datetime\nfrom time import time_ns\ntime.time()\ndatetime.datetime.now()\ntime.monotonic()"
    assert readings(ast.parse(program)) == 3


def test_nobody_else_reads_the_wall_clock() -> None:
    found = {short(path): count for path in FILES if (count := readings(tree_of(path)))}
    assert found == ALLOWED
