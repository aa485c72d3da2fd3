"""The command `paceline top`. Textual is imported when it runs: nothing else needs it."""

from __future__ import annotations

import importlib.util
import sys

import typer

from paceline.control import Control
from paceline.errors import PacelineError
from paceline.operate import HERE, UrlFlag

INSTALL = "pip install 'textual>=8,<9'"

top_app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


@top_app.command()
def top(url: UrlFlag = HERE) -> None:
    """Show in the terminal what a running deployment does, as its page does: every rank, the queue, what went wrong."""
    if importlib.util.find_spec("textual") is None:
        _fail(f"`paceline top` needs Textual: {INSTALL}")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        _fail("`paceline top` needs a terminal; `paceline loads --watch` does not")
    from paceline.top.terminal import Top

    try:
        control = Control(url)
        # A wrong address or key is said at once, not tried again for ever.
        control.dashboard_before()
    except PacelineError as error:
        _fail(str(error))
    Top(control).run()


def _fail(text: str) -> None:
    print(f"paceline: error: {text}", file=sys.stderr)
    sys.exit(1)
