"""What judges a change of structure: python tools/judge [seeds] [rules] [mutants] [wire] [help] [--write].

A refactoring must leave all of this as it was, or its change must be explained. What was recorded stands beside this
file; `--write` records anew.

- `seeds`: what 301 simulated runs came to, without the names of events, which a renaming may change.
- `rules`: which rules the explorer finds when they are left out, and how long each counterexample is.
- `mutants`: seeded faults of the wave, the group's epochs, pausing, the queue and the accounting; each must be found by
  the unit tests of the machines, the simulator or the explorer. A mutant is a text that occurs once in `src`.
- `wire`: every message's tag, fields, types, bounds and defaults.
- `help`: what each command prints for --help.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BEHAVIOUR = (
    "events", "virtual_s", "requests", "finished", "aborted", "moved", "refused", "waves", "wakes", "wakes_repeated",
    "faults", "longest_wait_s", "verdict",
)  # fmt: skip
COMMANDS = ("", "serve", "simulate", "check", "loads", "scale", "coordinator", "pause", "resume")


def paceline(*arguments: str, source: Path = ROOT / "src", timeout: float = 900) -> subprocess.CompletedProcess[str]:
    """Run a command of the package that lies in `source`."""
    environment = {**os.environ, "PYTHONPATH": str(source), "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "paceline", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=timeout, cwd=source.parent, check=False
    )


def seeds() -> list[str]:
    """A line a run: seed, kind, and a digest of its figures."""
    lines = []
    runs = {
        "drawn": ("--seeds", "0..300"),
        "independent": ("--seeds", "0..100", "--independent"),
        "steady": ("--seeds", "0..20", "--faults-per-second", "4", "--duration", "10"),
    }
    for kind, flags in runs.items():
        for line in paceline("simulate", *flags, "--json").stdout.splitlines():
            run = json.loads(line)
            figures = json.dumps([run[name] for name in BEHAVIOUR], sort_keys=True)
            digest = hashlib.blake2b(figures.encode(), digest_size=8).hexdigest()
            lines.append(f"{kind} {run['options']['seed']} {run['events']} {run['verdict']} {digest}")
    return lines


def rules() -> list[str]:
    """A line a rule: its name, whether it is found, and the moves of the shortest counterexample."""
    lines = []
    for rule, flags in json.loads((HERE / "bounds.json").read_text(encoding="utf-8")).items():
        done = paceline("check", *flags, "--without", rule, "--json")
        found = json.loads(done.stdout)
        lines.append(f"{rule} {'found' if found['violations'] else 'missed'} {len(found['trace']) - 1}")
    return lines


def mutants() -> list[str]:
    """A line a mutant: its name and what found it."""
    lines = []
    for mutant in json.loads((HERE / "mutants.json").read_text(encoding="utf-8")):
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder)
            for part in ("src", "tests", "bench", "tools", "docs", "examples"):
                if (ROOT / part).exists():
                    shutil.copytree(
                        ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
                    )
            for name in ("pyproject.toml", "README.md", "Makefile"):
                shutil.copy(ROOT / name, tree / name)
            seed(mutant, tree / "src")
            lines.append(f"{mutant['name']}: {found_by(mutant, tree)}")
            print(lines[-1], file=sys.stderr)
    return lines


def seed(mutant: dict[str, str], source: Path) -> None:
    """Put the fault in. Raises ValueError where its text does not occur once."""
    places = [path for path in sorted(source.rglob("*.py")) if mutant["old"] in path.read_text(encoding="utf-8")]
    if len(places) != 1 or places[0].read_text(encoding="utf-8").count(mutant["old"]) != 1:
        raise ValueError(f"{mutant['name']}: its text must occur once, not at {[path.name for path in places]}")
    text = places[0].read_text(encoding="utf-8")
    places[0].write_text(text.replace(mutant["old"], mutant["new"]), encoding="utf-8")


def found_by(mutant: dict[str, str], tree: Path) -> str:
    """Which of the three notices the fault first."""
    try:
        if any(json.loads(line)["verdict"] != "ok" for line in simulated(tree)):
            return "simulator"
    except subprocess.TimeoutExpired:
        return "simulator: it does not end"
    environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
    folder = next(one for one in ("tests/core", "tests/protocol") if (tree / one).exists())
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", folder]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode == 1:
        return "unit tests"
    if "check" in mutant:
        found = paceline("check", *mutant["check"].split(), "--json", source=tree / "src")
        if found.returncode == 1:
            return "explorer"
    return "NOTHING"


def simulated(tree: Path) -> list[str]:
    done = paceline("simulate", "--seeds", "0..30", "--json", source=tree / "src", timeout=120)
    return done.stdout.splitlines()


def wire() -> list[str]:
    """A line a message or part of one: tag, then each field with its type, bounds and default."""
    sys.path.insert(0, str(ROOT / "tools"))
    import protocol_reference as reference

    lines = []
    for direction, union in reference.codec.UNIONS.items():
        for message in reference.classes_of(union):
            lines.append(f"{direction}: {fields(reference, message)}")
    return [*lines, *(f"part: {fields(reference, part)}" for part in reference.parts())]


def fields(reference: ModuleType, message: type) -> str:
    """One line: a field's name, type and default after the other."""
    rows = [row.split(" | ") for row in reference.describe(message)[-1].splitlines()[2:]]
    return f"{message.__name__}: " + "; ".join(" ".join(cell.strip(" |") for cell in row[1:4]) for row in rows)


def helps() -> list[str]:
    """All --help texts, one after the other."""
    lines: list[str] = []
    for command in COMMANDS:
        done = paceline(*command.split(), "--help")
        lines += [f"$ paceline {command} --help".replace("  ", " "), *(done.stdout.rstrip().splitlines()), ""]
    return lines


PARTS: dict[str, Callable[[], list[str]]] = {
    "seeds": seeds, "rules": rules, "mutants": mutants, "wire": wire, "help": helps,
}  # fmt: skip


def main() -> int:
    """Compare or record; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python tools/judge", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all where none is named")
    parser.add_argument("--write", action="store_true", help="record what is found")
    options = parser.parse_args()
    wrong = 0
    for name in options.parts or PARTS:
        found, file = PARTS[name](), HERE / f"{name}.txt"
        if options.write:
            file.write_text("\n".join(found) + "\n", encoding="utf-8")
            print(f"{name}: {len(found)} lines recorded")
            continue
        before = file.read_text(encoding="utf-8").splitlines()
        differing = [f"  - {old}\n  + {new}" for old, new in zip(before, found, strict=False) if old != new]
        wrong += bool(differing) or len(before) != len(found)
        print(f"{name}: {'as recorded' if before == found else 'CHANGED'} ({len(before)} lines, now {len(found)})")
        print("\n".join(differing[:20]) if differing else "", end="\n" if differing else "")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
