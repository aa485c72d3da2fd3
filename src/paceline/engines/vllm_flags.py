"""vLLM's flags, and what it says of a model, asked in a process of its own.

Which flags there are, and what a model has (its length, its vocabulary, whether it has experts), only the installed
vLLM knows, and to import it takes seconds and half a gigabyte. The supervisor and the front-ends must stay light. So a
child that runs this file is asked once for a node, before its ranks start, and ends:

    python -m paceline.engines.vllm_flags help
    python -m paceline.engines.vllm_flags about    # arguments on stdin, `About` or an error on stdout, as JSON

A rank reads the same arguments with the same parser (`engine_arguments`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from paceline.engines.base import EngineError
from paceline.errors import ConfigError

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens")


class About(Struct, frozen=True):
    """A model under its flags. `tokenizer`: the folder of its tokenizer's files. `experts`: whether its ranks share
    experts, and so step together. `devices`: that one rank computes on; `device_variable`: the environment variable
    that names those a process sees, and `visible`: what there is to name. `defaults`: the sampling that the model's own
    `generation_config.json` recommends. `adapters`: LoRA, the folders by the names that clients call them.
    """

    model: str
    tokenizer: str
    max_model_len: int
    vocabulary_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    experts: bool
    device_kind: str
    device_variable: str = ""
    visible: list[str] = []
    devices: int = 1
    chat_template: str | None = None
    defaults: dict[str, float] = {}
    adapters: dict[str, str] = {}
    tokenizer_options: dict[str, Any] = {}
    tokenizer_socket: str = ""


class Refusal(Struct, frozen=True):
    """Why there is no answer. `usage`: a flag is wrong, not the model."""

    error: str
    usage: bool = False


# In the node's process ----------------------------------------------------------------------------


def ask(arguments: Sequence[str]) -> About:
    """What vLLM says of the model and flags. Raises ConfigError for a flag, EngineError for anything else."""
    done = _child("about", json.dumps(list(arguments)))
    try:
        answer = msgspec.json.decode(done.stdout.splitlines()[-1], type=dict[str, Any])
    except (msgspec.DecodeError, IndexError):
        raise EngineError(f"vLLM could not be asked about the model: {_last_line(done.stderr)}") from None
    if "error" in answer:
        refusal = msgspec.convert(answer, Refusal)
        raise ConfigError(refusal.error) if refusal.usage else EngineError(refusal.error)
    return msgspec.convert(answer, About)


def flags_help() -> str:
    """vLLM's engine flags, as it prints them. Raises EngineError."""
    done = _child("help", "")
    if done.returncode:
        raise EngineError(f"vLLM's flags cannot be read: {_last_line(done.stderr)}")
    return done.stdout


def _child(what: str, given: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "paceline.engines.vllm_flags", what]
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    return subprocess.run(command, input=given, capture_output=True, text=True, env=quiet | dict(os.environ))


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "it ended without a word")


# Where vLLM is imported ---------------------------------------------------------------------------


def flag_parser() -> Any:
    """vLLM's own parser of its engine's flags, and those few of its server's that say what the model is."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    try:
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError:  # before 0.12
        from vllm.utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> None:
            raise ConfigError(message.removesuffix("."))

    usage = "paceline serve MODEL --engine vllm [FLAG ...]"
    parser = Parser(prog="paceline serve", usage=usage, add_help=False, allow_abbrev=False)
    parser.add_argument("model_tag", nargs="?", help="the model's folder, or its name on a hub")
    parser.add_argument("--lora-modules", nargs="+", default=[], metavar="NAME=PATH", help="LoRA adapters to serve")
    parser.add_argument("--chat-template", help="a file with the template, or the template")
    return AsyncEngineArgs.add_cli_args(parser)


def engine_arguments(arguments: Sequence[str]) -> tuple[Any, Any]:
    """vLLM's EngineArgs, and all that was parsed. Raises ConfigError naming the flag."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    parsed = flag_parser().parse_args(list(arguments))
    if parsed.model_tag:
        parsed.model = parsed.model_tag
    return AsyncEngineArgs.from_cli_args(parsed), parsed


def about(arguments: Sequence[str]) -> About:
    """Ask vLLM. Raises ConfigError, and whatever vLLM does."""
    from vllm.platforms import current_platform

    made, parsed = engine_arguments(arguments)
    config = made.create_engine_config()
    model, scheduler = config.model_config, config.scheduler_config
    variable = getattr(current_platform, "device_control_env_var", "")
    return About(
        model=model.model,
        tokenizer=_local_folder(model.tokenizer, model.tokenizer_revision),
        max_model_len=model.max_model_len,
        vocabulary_size=model.get_vocab_size(),
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        experts=bool(getattr(model, "is_moe", False)),
        device_kind=current_platform.device_type,
        device_variable=variable if variable.isupper() else "",
        visible=_visible_devices(current_platform, variable),
        devices=config.parallel_config.world_size,
        chat_template=_text_of(parsed.chat_template),
        tokenizer_options={"trust_remote_code": model.trust_remote_code, "tokenizer_mode": model.tokenizer_mode},
        adapters=dict(_adapter(text) for text in parsed.lora_modules),
        defaults={name: value for name, value in model.get_diff_sampling_param().items() if name in SAMPLING},
    )


def _visible_devices(platform: Any, variable: str) -> list[str]:
    if platform.device_type == "cpu":
        return []
    if named := os.environ.get(variable):
        return named.split(",")
    import torch

    return [str(number) for number in range(torch.accelerator.device_count())]


def _local_folder(name: str, revision: str | None) -> str:
    """Where the files of a tokenizer are on this machine."""
    if Path(name).is_dir():
        return str(Path(name).resolve())
    from huggingface_hub import snapshot_download

    return str(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.jinja", "*.model", "*.txt"]))


def _adapter(text: str) -> tuple[str, str]:
    """`NAME=PATH`, or vLLM's JSON form of it. Raises ConfigError."""
    try:
        given = (
            json.loads(text) if text.startswith("{") else dict(zip(("name", "path"), text.split("=", 1), strict=True))
        )
        return str(given["name"]), str(given["path"])
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"--lora-modules: {text!r} is not NAME=PATH") from None


def _text_of(template: str | None) -> str | None:
    return Path(template).read_text(encoding="utf-8") if template and Path(template).is_file() else template


def main(what: str) -> None:
    """Answer on what was stdout: whatever vLLM prints there goes to stderr."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if what == "help":
        # vLLM's own way prints its groups alone.
        answer.write(argparse.ArgumentParser.format_help(flag_parser()))
        answer.close()
        return
    said: About | Refusal
    try:
        said = about(json.loads(sys.stdin.read()))
    except ConfigError as error:
        said = Refusal(str(error), usage=True)
    except ImportError as error:
        said = Refusal(f"the vllm engine needs vLLM: pip install 'paceline[vllm]' ({error})")
    except Exception as error:
        # Of what vLLM's checks say, the first lines say what is wrong.
        said = Refusal(" ".join(str(error).split())[:500] or type(error).__name__)
    answer.write(msgspec.json.encode(said).decode() + "\n")
    answer.close()


if __name__ == "__main__":
    main(sys.argv[1])
