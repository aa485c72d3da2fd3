"""What vLLM's workers need to be a rank's: vLLM loads this by its entry point in every process of its own.

A worker ends when its rank does, also where the rank was killed: vLLM's own watch is a thread that asks the step to
end. And it lets a request begin with tokens that it has made already.

*Tokens made already.* vLLM's scheduler knows requests that had begun and were pre-empted, and computes their answers
anew as part of the prefill. A request that comes from a rank that has died is one, but for what its worker keeps of it:
the answer so far, which penalties and `min_tokens` look at, and the state of its random numbers. Both are made here
when a worker hears of the request first. (vLLM's second model runner is told the answer, and draws by position.)

*Random numbers.* A request with a seed has a generator of its own, from which each token takes one draw. What a draw
is differs by device and version, so the worker's own sampler makes as many as there are tokens. A sample made while a
prompt is not computed to its end is thrown away by vLLM, and the generator set back by the four numbers that a draw
takes on a GPU. A generator on a CPU cannot do that, and the engine ends: there it is put back to where it was.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import sys
from typing import Any

from paceline.log import set_up_log

RANK_PROCESS = "PACELINE_RANK_PROCESS"
"""In a rank's environment and that of its workers: the rank's process id, its name, and the log level."""
MADE = "paceline_made"
"""In a request's `extra_args`: the tokens made already."""

PR_SET_PDEATHSIG = 1
ROWS = 64
"""Draws made at once."""


def register() -> None:
    """vLLM calls this."""
    said = os.environ.get(RANK_PROCESS)
    if said is None:
        return
    process, name, level = said.split(",")
    if process != str(os.getpid()):
        _be_worker(int(process), name, level)
    _let_requests_begin_with_tokens()


def _be_worker(rank_process: int, name: str, level: str) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != rank_process:
        os._exit(1)
    set_up_log(level, name)


def _let_requests_begin_with_tokens() -> None:
    runner: Any = importlib.import_module("vllm.v1.worker.gpu_model_runner")
    if hasattr(runner, "begun_by_paceline"):
        return
    runner.begun_by_paceline = True
    Plain = runner.CachedRequestState
    update = runner.GPUModelRunner._update_states
    # One worker has one runner, and one thread that steps it.
    current: list[Any] = [None]
    Returning = _returning()

    def begin(runner: Any, state: Any) -> None:
        asked = state.sampling_params and state.sampling_params.extra_args
        if state.generator is not None and state.generator.device.type == "cpu":
            state.generator = Returning(state.generator)
        if made := asked and asked.get(MADE):
            state.output_token_ids = list(made)
            if state.generator is not None:
                _draw(runner, state.generator, len(made))

    class Begun(Plain):  # type: ignore[misc, valid-type]
        def __post_init__(self) -> None:
            super().__post_init__()
            begin(current[0], self)

    def update_states(self: Any, scheduler_output: Any) -> Any:
        current[0] = self
        done = update(self, scheduler_output)
        for generator in self.input_batch.generators.values():
            if isinstance(generator, Returning):
                generator.keep()
        return done

    runner.CachedRequestState = Begun
    runner.GPUModelRunner._update_states = update_states


def _returning() -> type[Any]:
    """A CPU's generator that can be put back to where it was before a step."""
    import torch

    class Returning(torch.Generator):  # type: ignore[misc]
        def __new__(cls, plain: Any) -> Any:
            return super().__new__(cls, device="cpu")

        def __init__(self, plain: Any) -> None:
            self.set_state(plain.get_state())
            self.keep()

        def keep(self) -> None:
            self._kept = self.get_state()

        def get_offset(self) -> int:
            return 4

        def set_offset(self, offset: int) -> None:
            self.set_state(self._kept)

    return Returning


def _draw(runner: Any, generator: Any, times: int) -> None:
    """Let a generator be where it is after so many tokens."""
    import torch

    sampler = runner.sampler.topk_topp_sampler
    for begin in range(0, times, ROWS):
        rows = min(ROWS, times - begin)
        logits = torch.zeros((rows, runner.model_config.get_vocab_size()), device=runner.device)
        sampler(logits, dict.fromkeys(range(rows), generator), None, None)
