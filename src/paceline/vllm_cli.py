"""`paceline vllm ...`: the `vllm` command with Paceline's coordinator, the same as with PACELINE_VLLM=1 set."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path


def run_command(arguments: Sequence[str]) -> None:
    """Become the `vllm` command: the one beside this interpreter, or on the path."""
    beside = Path(sys.executable).with_name("vllm")
    command = str(beside) if beside.exists() else shutil.which("vllm")
    if command is None:
        print("paceline: error: vllm: no such command here; install vLLM beside Paceline", file=sys.stderr)
        sys.exit(1)
    os.environ["PACELINE_VLLM"] = "1"
    os.execv(command, [command, *arguments])
