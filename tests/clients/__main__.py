"""Popular clients, unmodified, against real deployments: `python -m tests.clients [NAME ...]`, or `make test-clients`.

Each client has an environment of its own, `.clients/NAME`, made once; npm's have one together. A script of this folder
uses it as its users do, and prints a line for each thing that worked; the first that does not ends it. What came of all
is the table in `docs/clients.md`, which a run of all clients writes. The default model is too weak to choose tools and
to keep to forms, so that grammars force it, and what is looked at is the shape.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from tests.serving import deployment

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FOLDER, PAGE = ROOT / ".clients", ROOT / "docs" / "clients.md"
MODEL = "smollm2-135m-instruct"
DEADLINE_S = 600


class Client(Struct, frozen=True):
    """`name`: its package; `also`: others that it needs. `script`: with its arguments."""

    name: str
    script: Sequence[str]
    also: Sequence[str] = ()
    npm: bool = False


CLIENTS = [
    Client("openai", ["use_openai.mjs"], ["zod"], npm=True),
    Client("ai", ["use_ai.mjs"], ["@ai-sdk/openai", "@ai-sdk/openai-compatible", "zod"], npm=True),
    Client("langchain-openai", ["use_langchain_openai.py"]),
    Client("litellm", ["use_litellm.py"]),
    Client("pydantic-ai-slim", ["use_pydantic_ai.py"], ["pydantic-ai-slim[openai]"]),
    Client("instructor", ["use_instructor.py"]),
    Client("llama-index-llms-openai-like", ["use_llama_index.py"]),
    Client("llm", ["use_llm.py"]),
    Client("lm-eval", ["use_lm_eval.py"], ["lm-eval[api]", "pydantic"]),
    Client("guidellm", ["use_load_generators.py", "guidellm"]),
    Client("aiperf", ["use_load_generators.py", "aiperf"]),
]
IN_CI = {
    "openai": "completions, chats, streams, logprobs, errors, tools, `parse`, Responses, embeddings",
    "anthropic": "messages, streams, tools, counting, errors",
}


ABOUT = """# Clients

Popular clients, unmodified, against `paceline serve` with the default model (two ranks; for embeddings one with
`--task embed`). Written by `make test-clients`, which makes each client an environment of its own and uses it as its
users do. The model is small: where it would not choose a tool or keep to a form, a grammar makes it, and what is looked
at is the shape.
"""


class Result(Struct, frozen=True):
    client: str
    version: str
    tried: Sequence[str]
    outcome: str


# Environments -------------------------------------------------------------------------------------


def run(*command: str | Path, **how: object) -> None:
    subprocess.run([str(part) for part in command], check=True, **how)  # type: ignore[call-overload]


def uv() -> Path:
    """Installs large trees where pip takes many minutes over their versions."""
    program = FOLDER / "uv" / "bin" / "uv"
    if not program.exists():
        run(sys.executable, "-m", "venv", FOLDER / "uv")
        run(FOLDER / "uv" / "bin" / "pip", "install", "--quiet", "uv")
    return program


def make(client: Client) -> Path:
    """Its environment, made where it was not there; the program that runs its script. Raises CalledProcessError."""
    wanted = [client.name, *client.also]
    if client.npm:
        folder = FOLDER / "npm"
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "package.json").exists():
            (folder / "package.json").write_text('{"private": true, "type": "module"}\n')
        if not all((folder / "node_modules" / name).exists() for name in wanted):
            run("npm", "install", "--silent", "--no-fund", "--no-audit", *wanted, cwd=folder)
        return Path(shutil.which("node") or "node")
    folder = FOLDER / client.name
    if not (folder / "ready").exists():
        environment = os.environ | {"UV_CACHE_DIR": str(FOLDER / "uv-cache"), "UV_HTTP_TIMEOUT": "180"}
        run(uv(), "venv", "--quiet", "--clear", "--python", sys.executable, folder, env=environment)
        python = folder / "bin" / "python"
        run(uv(), "pip", "install", "--quiet", "--python", python, *wanted, env=environment)
        (folder / "ready").touch()
    return folder / "bin" / "python"


def version_of(client: Client) -> str:
    if client.npm:
        about = json.loads((FOLDER / "npm" / "node_modules" / client.name / "package.json").read_text())
        return str(about["version"])
    name = client.name.replace("-", "_")
    (found,) = (FOLDER / client.name / "lib").glob(f"python3*/site-packages/{name}-*.dist-info")
    return found.name.removeprefix(f"{name}-").removesuffix(".dist-info")


# Runs ---------------------------------------------------------------------------------------------


def use(client: Client, variables: dict[str, str]) -> Result:
    try:
        program = make(client)
    except (OSError, subprocess.CalledProcessError) as error:
        return Result(client.name, "", [], f"cannot be installed here: {error}")
    script = HERE / client.script[0]
    if client.npm:
        # Node looks for packages where the script lies.
        script = Path(shutil.copy(script, FOLDER / "npm"))
    # Nothing is fetched while it runs, and nobody's proxy is asked.
    closed = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "no_proxy": "*", "PYTHONPATH": ""}
    closed |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} if client.name == "lm-eval" else {}
    log = FOLDER / f"{client.name}.log"
    with log.open("w") as file:
        command = [str(program), str(script), *client.script[1:]]
        done = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | closed | variables, timeout=DEADLINE_S,
            check=False, cwd=FOLDER,
        )  # fmt: skip
    lines = log.read_text(errors="replace").splitlines()
    tried = [line.removeprefix("tried: ") for line in lines if line.startswith("tried: ")]
    if done.returncode == 0:
        return Result(client.name, version_of(client), tried, "works")
    print("\n".join(lines[-30:]))
    last = next((line for line in reversed(lines) if line.strip()), "")
    return Result(client.name, version_of(client), tried, f"fails: {last[:200]}")


def page(results: Sequence[Result]) -> str:
    rows = [
        f"| {one.client} | {one.version} | {'; '.join(one.tried).replace('|', '/')} | {one.outcome} |"
        for one in results
    ]
    ci = [
        f"| `{name}` (Python) | {importlib.metadata.version(name)} | {what} | works |" for name, what in IN_CI.items()
    ]
    head = "| client | version | what was tried | result |\n|---|---|---|---|"
    return "\n".join([ABOUT, head, *rows, "", "With every change, in `make test`:", "", head, *ci, ""])


def main(names: Sequence[str]) -> int:
    chosen = [client for client in CLIENTS if not names or client.name in names]
    results = []
    with deployment() as server, deployment("--task", "embed", "-dp", "1") as embedding:
        variables = {
            "CLIENTS_URL": f"{server.url}/v1", "CLIENTS_EMBED_URL": f"{embedding.url}/v1", "CLIENTS_MODEL": MODEL
        }  # fmt: skip
        for client in chosen:
            results.append(use(client, variables))
            print(
                f"{client.name} {results[-1].version}: {len(results[-1].tried)} tried; {results[-1].outcome}",
                flush=True,
            )
    if not names:
        PAGE.write_text(page(results))
    return sum(one.outcome != "works" for one in results)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
