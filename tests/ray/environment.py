"""Makes the virtual environment in which the tests run Ray: `python -m tests.ray.environment [VERSION]`.

It lies in `.ray/VERSION`, 400 MB, and is reused once its stamp is there. Paceline goes in as it stands here, editable.
The tests themselves run where all others do, and start what they test with this environment's Python.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.vllm.environment import install

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_VERSION = "2.60.0"


def environment_of(version: str) -> Path:
    return ROOT / ".ray" / version


def binaries() -> Path:
    """Where `python` and `ray` are, for the tests."""
    return environment_of(os.environ.get("RAY", DEFAULT_VERSION)) / "bin"


def make(version: str) -> Path:
    """The folder of the environment, made where it was not there. Raises CalledProcessError where pip fails."""
    folder = environment_of(version)
    stamp, project = folder / "ready", ROOT / "pyproject.toml"
    if not stamp.exists():
        print(f"setting up {folder.relative_to(ROOT)} (once, about a minute, 400 MB)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    if not stamp.exists() or project.stat().st_mtime > stamp.stat().st_mtime:
        install(folder, f"ray=={version}", "-e", f"{ROOT}[ray]")
        stamp.touch()
    return folder


if __name__ == "__main__":
    make(sys.argv[1] if len(sys.argv) > 1 else DEFAULT_VERSION)
