"""Policy gradient on a model that is being served: reinforcement learning with the deployment as the sampler.

    python examples/train.py MODEL [--updates 50] [--ranks 2] [--streams 16]

Runs where torch, transformers and vLLM are. `paceline serve --engine vllm` serves the model; streams ask it without a
pause; the trainer takes their answers, with the tokens' own log-probabilities, makes a step (REINFORCE with a baseline,
weighted by how much likelier a token is now than when it was sampled, at most twice), and gives all ranks the new
weights, while the streams run. The reward is the share of tokens with an even id: a random model gets a half.

Exit status 1 where the reward does not rise, a request fails, or an answer says weights that nobody has sent.
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from paceline.control import Control

TOKENS, BATCH, MOST_WEIGHT = 24, 48, 2.0
FLAGS = ("--enforce-eager", "--max-model-len", "256", "--dtype", "bfloat16")


class Server:
    """A deployment in a process of its own, and clients that ask it without a pause until `stop`."""

    def __init__(self, model: Path, ranks: int, streams: int) -> None:
        command = [sys.executable, "-m", "paceline", "serve", str(model), "--engine", "vllm", "-dp", str(ranks)]
        self._process = subprocess.Popen([*command, "--port", "0", *FLAGS], stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if "serves on " in line:
                self.url = line.split("serves on ")[1].split("/v1")[0]
                break
        else:
            raise SystemExit("the deployment did not start")
        threading.Thread(target=self._process.stderr.read, daemon=True).start()
        self.answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.failures: list[str] = []
        self._stopping = threading.Event()
        self._streams = [threading.Thread(target=self._ask_on, args=[number]) for number in range(streams)]
        for stream in self._streams:
            stream.start()

    def _ask_on(self, number: int) -> None:
        while not self._stopping.is_set():
            try:
                self.answers.put(self._ask([5 + number, 9, 40 + number]))
            except Exception as error:
                self.failures.append(f"{type(error).__name__}: {error}")
                return

    def _ask(self, prompt: list[int]) -> dict[str, Any]:
        """An answer at temperature 1, with its tokens, their log-probabilities and the weights that chose them."""
        body = {
            "prompt": prompt, "max_tokens": TOKENS, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "ignore_eos": True,
            "logprobs": 0, "return_token_ids": True, "return_weight_versions": True,
        }  # fmt: skip
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=300) as read:
            choice: dict[str, Any] = json.load(read)["choices"][0]
        if len(choice["token_ids"]) != TOKENS:
            raise RuntimeError(f"{len(choice['token_ids'])} tokens of {TOKENS}")
        return choice | {"prompt": prompt}

    def stop(self) -> None:
        """Let each client finish what it has begun."""
        self._stopping.set()
        for stream in self._streams:
            stream.join()

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(120)


def reward_of(answer: dict[str, Any]) -> float:
    return sum(token % 2 == 0 for token in answer["token_ids"]) / TOKENS


def learn(model: Any, optimizer: torch.optim.Optimizer, answers: list[dict[str, Any]]) -> float:
    """One step by these answers; returns how far the log-probabilities of the server and of the trainer lie apart."""
    tokens = torch.tensor([answer["prompt"] + answer["token_ids"] for answer in answers])
    prompt = tokens.shape[1] - TOKENS
    logits = model(tokens[:, :-1]).logits[:, prompt - 1 :].float()
    chosen = torch.log_softmax(logits, -1).gather(-1, tokens[:, prompt:, None])[..., 0]
    sampled = torch.tensor([answer["logprobs"]["token_logprobs"] for answer in answers])
    good = (tokens[:, prompt:] % 2 == 0).float()
    # Of a token count it and what follows: it is not to blame for what stands before.
    returns = good.flip(1).cumsum(1).flip(1) / torch.arange(TOKENS, 0, -1)
    advantages = returns - returns.mean(0)
    weights = (chosen.detach() - sampled).exp().clamp(max=MOST_WEIGHT)
    optimizer.zero_grad()
    (-(weights * advantages * chosen).mean()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float((chosen.detach() - sampled).abs().mean())


def train(server: Server, folder: Path, model: Any, updates: int) -> tuple[list[float], int, list[float]]:
    """Returns the mean reward of each batch, how many answers named unknown weights, and each update's seconds."""
    control, known = Control(server.url), {"default"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    rewards, unknown, took = [], 0, []
    for update in range(1, updates + 1):
        answers = [server.answers.get(timeout=300) for _ in range(BATCH)]
        unknown += sum(not {span["weight_version"] for span in one["weight_versions"]} <= known for one in answers)
        rewards.append(statistics.mean(map(reward_of, answers)))
        apart = learn(model, optimizer, answers)
        tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, folder / f"{update}.safetensors")
        known.add(str(update))
        begin = time.monotonic()
        control.update_weights({"path": str(folder / f"{update}.safetensors")}, str(update))
        took.append(time.monotonic() - begin)
        # A rank that comes back reads the newest; those before are of no use.
        folder.joinpath(f"{update - 1}.safetensors").unlink(missing_ok=True)
        if update % 10 == 0:
            print(f"update {update}: reward {rewards[-1]:.2f}, log-probabilities {apart:.3f} apart", flush=True)
    return rewards, unknown, took


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a model by what a running deployment samples from it.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--updates", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--streams", type=int, default=16)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        server = Server(options.model, options.ranks, options.streams)
        try:
            rewards, unknown, took = train(server, Path(folder), model, options.updates)
        finally:
            server.stop()
            server.close()
    first, last = statistics.mean(rewards[:5]), statistics.mean(rewards[-5:])
    print(f"{options.updates} updates under {options.streams} streams: reward {first:.2f} to {last:.2f}; "
          f"{len(server.failures)} lost, {unknown} answers of unknown weights; "
          f"an update takes {statistics.median(took):.2f} s")  # fmt: skip
    for failure in server.failures[:3]:
        print(failure)
    return 1 if last < first + 0.1 or unknown or server.failures else 0


if __name__ == "__main__":
    sys.exit(main())
