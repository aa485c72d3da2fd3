"""A report in one file: no outside resource, in the page's colours, light or dark as the system has it."""

from __future__ import annotations

import html
import re
from importlib.resources import files
from pathlib import Path

from paceline import __version__
from paceline.errors import ConfigError

STYLE = """
* { box-sizing: border-box; }
body { margin: 0; padding: 16px 20px; background: var(--page); color: var(--ink); font: 13px/1.4 system-ui, sans-serif;
  font-variant-numeric: tabular-nums; }
h1 { font-size: 18px; margin: 0 0 2px; } h2 { font-size: 14px; margin: 0 0 8px; } .soft { color: var(--soft); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px;
  margin-top: 12px; }
table { border-collapse: collapse; } td, th { padding: 2px 12px 2px 0; text-align: right; font-weight: 400; }
td:first-child, th:first-child { text-align: left; } th { color: var(--soft); } .best { font-weight: 700; }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def colors() -> str:
    """What the page at /dashboard has for colours."""
    page = files("paceline.server").joinpath("dashboard.html").read_text(encoding="utf-8")
    found = re.search(r":root \{.*?\n\}\n@media.*?\n\}\n", page, re.DOTALL)
    assert found is not None
    return found[0]


def page(title: str, about: str, body: str, style: str = "") -> str:
    """The whole file. `body`: HTML; `title` and `about` are text."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}"><link rel="icon" href="data:,">
<title>{html.escape(title)}</title><style>
{colors()}{STYLE}{style}</style></head>
<body><h1>{html.escape(title)}</h1><div class="soft">{html.escape(about)} · paceline {__version__}</div>
{body}
</body></html>
"""


def check_writable(path: str | None) -> None:
    """Raises ConfigError where a report could not be written there, before the work is done."""
    if path is None:
        return
    try:
        with open(path, "a"):
            pass
    except OSError as error:
        raise ConfigError(f"--report: {path}: {error.strerror}") from None


def write(path: str, text: str) -> None:
    Path(path).write_text(text, encoding="utf-8")
