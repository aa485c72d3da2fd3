"""`paceline` and `python -m paceline`: one line for every error, never a traceback."""

from __future__ import annotations

import sys


def main() -> None:
    """The command line's entry point."""
    # `paceline coordinator` must be up in a fraction of a second; the full command line takes longer to import.
    if sys.argv[1:2] == ["coordinator"]:
        from paceline.coordinator_cli import run_command

        run_command(sys.argv[2:])
    elif sys.argv[1:2] == ["vllm"]:
        from paceline.vllm.plugin import run_command as run_vllm

        run_vllm(sys.argv[2:])
    else:
        from paceline.cli import run

        run()


if __name__ == "__main__":
    main()
