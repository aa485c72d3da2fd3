"""`paceline` and `python -m paceline`: one line for every error, never a traceback.

Also for Ctrl-C while modules are still being imported: until there is something that can be drained, it ends the
process as it ends a program in C.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

_INTERRUPT = signal.getsignal(signal.SIGINT)
if _INTERRUPT is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> None:
    """The command line's entry point."""
    # `paceline coordinator` must be up in a fraction of a second; the full command line takes longer to import.
    if sys.argv[1:2] == ["coordinator"]:
        from paceline.coordinator_cli import run_command

        _run(run_command, sys.argv[2:])
    elif sys.argv[1:2] == ["vllm"]:
        from paceline.vllm.plugin import run_command as run_vllm

        _run(run_vllm, sys.argv[2:])
    else:
        from paceline.cli import run

        _run(run)


def _run(command: Callable[..., object], *arguments: list[str]) -> None:
    signal.signal(signal.SIGINT, _INTERRUPT)
    command(*arguments)


if __name__ == "__main__":
    main()
