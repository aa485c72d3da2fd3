"""Where new weights come from: a source is an object, as a client sends it, and every rank reads it for itself.

    {"path": "/models/step-7"}            a file or folder that each rank can read
    {"shared_memory": "step-7"}           a file in this machine's shared memory (/dev/shm)
    {"address": "10.0.0.5:4000"}          bytes that whoever listens there sends to each that connects, then closes
    {"transfer": true}                    vLLM's own weight-transfer engine, which a trainer feeds

What the file is, the engine says: safetensors for vllm, a GGUF for llama, the numbers for moe. A rank that comes back
reads it again, so it is to be there until the next update; of what was sent over a socket a rank keeps a copy of its
own until then, and one that comes back asks for it anew.
"""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from paceline.engines.base import EngineError, Source

SHARED_MEMORY = Path("/dev/shm")
KINDS = ("path", "shared_memory", "address", "transfer")
CONNECT_S = 10.0
READ_S = 60.0
"""Without a byte."""


def kind_of(source: Source) -> str:
    """Which kind it is. Raises EngineError where it is none."""
    kinds = [kind for kind in KINDS if kind in source]
    if len(kinds) != 1 or len(source) != 1:
        raise EngineError(f"source: must have one of {', '.join(KINDS)}")
    value = source[kinds[0]]
    if (kinds[0] == "transfer" and value is not True) or (kinds[0] != "transfer" and not isinstance(value, str)):
        raise EngineError(f"source.{kinds[0]}: must be {'true' if kinds[0] == 'transfer' else 'a text'}")
    return kinds[0]


T = TypeVar("T")


class Staged(Generic[T]):
    """What an engine has made of other weights, beside those it computes with. `make`: from their file."""

    def __init__(self, make: Callable[[Path], T]) -> None:
        self._make = make
        self._ready: tuple[Source, Fetched, T] | None = None
        self._kept: Fetched | None = None

    def stage(self, source: Source) -> T:
        """Make it ready. Raises EngineError."""
        self._ready = None
        fetched = Fetched(source)
        try:
            made = self._make(fetched.path)
        except Exception:
            fetched.close()
            raise
        self._ready = source, fetched, made
        return made

    def take(self, source: Source) -> T:
        """What is ready, or is made now; its file stays until the next. Raises EngineError."""
        if self._ready is None or self._ready[0] != source:
            self.stage(source)
        assert self._ready is not None
        (_, fetched, made), self._ready = self._ready, None
        before, self._kept = self._kept, fetched
        if before is not None:
            before.close()
        return made


class Fetched:
    """The file or folder of a source, as long as this is kept. Raises EngineError where it is not there."""

    def __init__(self, source: Source) -> None:
        self._copy: IO[bytes] | None = None
        kind, value = kind_of(source), source
        match kind:
            case "path":
                self.path = Path(value[kind])
            case "shared_memory":
                self.path = SHARED_MEMORY / Path(value[kind]).name
            case "address":
                self._copy = _received(value[kind])
                self.path = Path(self._copy.name)
            case _:
                raise EngineError("source.transfer: this engine has no weight-transfer engine")
        if not self.path.exists():
            raise EngineError(f"source.{kind}: {value[kind]} is not there")

    def close(self) -> None:
        if self._copy is not None:
            self._copy.close()


def _received(address: str) -> IO[bytes]:
    host, _, port = address.rpartition(":")
    copy: Any = tempfile.NamedTemporaryFile(prefix="paceline-weights-", suffix=".safetensors")  # noqa: SIM115
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_S) as link:
            link.settimeout(READ_S)
            while data := link.recv(1 << 20):
                copy.write(data)
    except (OSError, ValueError, OverflowError) as error:
        copy.close()
        raise EngineError(f"source.address: {address}: {error}") from None
    copy.flush()
    return copy  # type: ignore[no-any-return]


# Safetensors ---------------------------------------------------------------------------------------

LONGEST_HEADER = 100 << 20
READ_BYTES = 16 << 20


class Folder:
    """A folder of safetensors with the tensors that the `served` model's has, read once, so that they lie in memory; a
    file is given one. Raises EngineError naming a tensor that is missing or of another shape.
    """

    def __init__(self, path: Path, served: Path) -> None:
        self.path = path
        self._made: tempfile.TemporaryDirectory[str] | None = None
        if path.is_file():
            self._made = tempfile.TemporaryDirectory(prefix="paceline-weights-")
            self.path = Path(self._made.name)
            (self.path / "model.safetensors").symlink_to(path.resolve())
        found = _shapes(self.path)
        if not found:
            raise EngineError(f"{path}: has no safetensors")
        expected = _shapes(served) if served.is_dir() else found
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                has, wants = found.get(name, "missing"), expected.get(name, "not in the served model")
                raise EngineError(f"{path}: {name} is {has}, expected {wants}")
        for file in self.path.glob("*.safetensors"):
            with file.open("rb") as read:
                while read.read(READ_BYTES):
                    pass


def _shapes(folder: Path) -> dict[str, list[int]]:
    """Of each tensor its shape."""
    found: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with file.open("rb") as read:
                length = int.from_bytes(read.read(8), "little")
                header: Any = json.loads(read.read(min(length, LONGEST_HEADER)))
            tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
            end = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
            found |= {name: list(tensor["shape"]) for name, tensor in tensors.items()}
        except (OSError, ValueError, TypeError, LookupError, AttributeError):
            raise EngineError(f"{file}: is no safetensors file") from None
        if file.stat().st_size != end:
            raise EngineError(f"{file}: has {file.stat().st_size} bytes, its header says {end}")
    return found
