"""One real vLLM deployment for a test: started, spoken to, ended with all its processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.pace import stretched
from tests.vllm import environment

VERSION = os.environ.get("VLLM") or environment.DEFAULT_VERSION
READY_S = 600.0
REQUEST_S = 120.0
PROMPTS = [
    "def make(folder)", "import torch and", "The tokenizer of", "a b c d e f", "0 1 2 3 4 5", "model.save(", "Hello",
    "END",
]  # fmt: skip


class Server:
    """A deployment that answers. `log`: its output so far."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self.log = log

    def complete(self, prompt: str, tokens: int = 16, **headers: str) -> str:
        """The greedy text after a prompt. Raises OSError where the server does not answer with one."""
        body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        return str(self.post("/v1/completions", body, **headers)["choices"][0]["text"])

    def post(self, path: str, body: dict[str, Any], **headers: str) -> dict[str, Any]:
        known = {"Content-Type": "application/json"} | {name.replace("_", "-"): text for name, text in headers.items()}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), known)
        with urllib.request.urlopen(request, timeout=REQUEST_S) as answer:
            read: dict[str, Any] = json.loads(answer.read())
            return read

    def get(self, path: str, port: int | None = None) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port or self.port}{path}", timeout=stretched(10)) as answer:
            return str(answer.read().decode())

    def requests_by_rank(self) -> Counter[str]:
        """How many requests each rank has finished, as vLLM's own metrics say."""
        counts: Counter[str] = Counter()
        for line in self.get("/metrics").splitlines():
            found = re.match(r'vllm:request_success_total\{.*engine="(\d+)".*\} ([\d.e+]+)', line)
            if found:
                counts[found[1]] += int(float(found[2]))
        return counts

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def coordinator_pids(self) -> list[int]:
        """Our coordinator's process, under its keeper; none while it is being started again."""
        return self.pids("python -m paceline")

    def pids(self, command: str) -> list[int]:
        found = subprocess.run(["pgrep", "-g", str(self.process.pid), "-f", command], capture_output=True, check=False)
        return [int(pid) for pid in found.stdout.split()]


@contextlib.contextmanager
def vllm(
    model: str, folder: Path, *, paceline: bool, api_servers: int = 2, flags: Sequence[str] = (), **variables: str
) -> Iterator[Server]:
    """Two ranks of `dense` or `moe` on this machine, behind `api_servers`; its log lies in `folder`."""
    port = free_port()
    binaries = environment.environment_of(VERSION) / "bin"
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1",
        # 0.20 would give each rank a NUMA node of its own where nothing is said.
        "VLLM_LOGGING_LEVEL": "INFO", "VLLM_CPU_OMP_THREADS_BIND": "auto" if VERSION == "0.32.0" else "0|1",
        "PACELINE_VLLM": "1" if paceline else "", **variables,
    }  # fmt: skip
    command = [
        binaries / "python", binaries / "vllm", "serve", environment.models_of(VERSION) / model,
        "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", port,
        "--data-parallel-size", 2, "--api-server-count", api_servers,
        "--enforce-eager", "--max-model-len", 256, "--max-num-seqs", 16, "--dtype", "bfloat16", *flags,
    ]  # fmt: skip
    log = folder / f"{model}-{api_servers}-{'paceline' if paceline else 'stock'}-{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(map(str, command)), env=os.environ | settings, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    server = Server(process, port, log)
    try:
        _wait_ready(server)
        yield server
    finally:
        _end(process)


def burst(server: Server, prompts: list[str], tokens: int = 16) -> list[str]:
    """All at once; their texts in order."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda prompt: server.complete(prompt, tokens), prompts))


def waves(server: Server) -> list[int]:
    """The waves that have ended, by rank 0's own words."""
    return [int(number) for number in re.findall(r"Wave (\d+) finished", server.text())]


def rest(seconds: float) -> None:
    threading.Event().wait(seconds)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_ready(server: Server) -> None:
    end = time.monotonic() + stretched(READY_S)
    while time.monotonic() < end:
        assert server.process.poll() is None, f"vLLM ended:\n{server.text()[-4000:]}"
        with contextlib.suppress(OSError):
            server.get("/health")
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(0.25)
    raise AssertionError(f"vLLM was not ready within {READY_S:g} s:\n{server.text()[-4000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Its whole process group: vLLM's ranks and servers are children of children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(stretched(20))
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
