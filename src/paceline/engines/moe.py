"""The `moe` engine: a small mixture-of-experts transformer in NumPy, its experts sharded over the ranks.

The reference for engines in lockstep. Every layer of every step has two all-to-alls (`moe_experts.py`), so that a
rank that is missing stops all others, as with a large model on GPUs. Its weights come from a seed, or from a file
(`moe_weights.py`); it has learned nothing, and answers with letters that look like noise. But what it says depends on
the weights and the request alone: not on the number of ranks, on who else is in the batch, or on how the prompt was
cut into chunks (`moe_arithmetic.py` says how that is reached). Whoever gets another answer has found a mistake.

A step makes its plan, computes, and only then writes down what came of it: `EpochEnded` out of a collective
leaves the engine as it was, and the step is made anew in the next group.

Choosing tokens for the `moe` engine, by the logits, the request's seed and the position, and nothing else.

So a step that is made anew chooses the same, and so does another rank. Plain Python: for 258 tokens that costs less
than the forward pass, and its order of additions is written down here.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from hashlib import blake2b
from itertools import accumulate
from typing import ClassVar

from paceline.core.load import Load
from paceline.core.rank.events import StepOutput
from paceline.core.requests import FinishReason, PositionLogprobs, SamplingParams, TokenLogprob
from paceline.engines.base import Engine, EngineError, EngineRequest, EngineSettings, Progress, StepResult
from paceline.engines.group import RankGroup
from paceline.engines.moe_model import (
    EOS,
    VOCABULARY,
    Floats,
    Limits,
    MoeOptions,
    MoeTokenizer,
    Piece,
    piece,
    read_limits,
    read_options,
)
from paceline.engines.scheduler import Schedule, Sequence, why_never

GREEDY_BELOW = 1e-5
"""Temperatures under this are 0, as in vLLM: dividing by them overflows."""


class Sampler:
    """One request's way to choose. Without state but for what it was made from."""

    def __init__(self, params: SamplingParams, prompt_length: int, seed: int) -> None:
        self._params = params
        self._prompt_length = prompt_length
        self._seed = seed

    def choose(self, logits: list[float], tokens: list[int]) -> int:
        """The next token behind `tokens`, the prompt's and the answer's so far."""
        params = self._params
        scores = self._penalised(logits, tokens)
        # The most likely first; of equals the lower number.
        if params.temperature < GREEDY_BELOW:
            return scores.index(max(scores))
        order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))[: params.top_k or None]
        best = scores[order[0]]
        weights = [math.exp((scores[token] - best) / params.temperature) for token in order]
        # Before the temperature, as top_p is in llama.cpp's chain: it then keeps the same tokens at any.
        kept = _kept([math.exp(scores[token] - best) for token in order], params.top_p, params.min_p)
        sums = list(accumulate(weights[:kept]))
        threshold = sums[-1] * _uniform(self._seed, len(tokens) - self._prompt_length)
        return next((token for token, end in zip(order, sums, strict=False) if end > threshold), order[0])

    def logprobs(self, logits: list[float], chosen: int) -> PositionLogprobs:
        """The chosen token's log-probability and the best ones', by the logits as the model gave them."""
        best = max(logits)
        normaliser = best + math.log(math.fsum(math.exp(logit - best) for logit in logits))
        order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
        top = [_logprob(token, logits[token] - normaliser) for token in order[: self._params.logprobs or 0]]
        return PositionLogprobs(_logprob(chosen, logits[chosen] - normaliser), top)

    def _penalised(self, logits: list[float], tokens: list[int]) -> list[float]:
        params, scores = self._params, list(logits)
        for token, bias in params.logit_bias.items():
            scores[token] += bias
        if params.repetition_penalty != 1.0:
            for token in set(tokens):
                penalty = params.repetition_penalty
                scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        if params.frequency_penalty or params.presence_penalty:
            for token, count in Counter(tokens[self._prompt_length :]).items():
                scores[token] -= params.frequency_penalty * count + params.presence_penalty
        return scores


def _kept(weights: list[float], top_p: float, min_p: float) -> int:
    """How many of `weights`, largest first and that one 1, are still to be chosen from."""
    kept = sum(weight >= min_p for weight in weights) or 1
    if top_p < 1.0:
        enough = top_p * sum(weights)
        reached = next((index for index, total in enumerate(accumulate(weights)) if total >= enough), len(weights) - 1)
        kept = min(kept, reached + 1)
    return kept


def _uniform(seed: int, position: int) -> float:
    """A number from 0 to 1, 1 excluded, for one position of one request."""
    digest = blake2b(f"{seed}.{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def _logprob(token: int, value: float) -> TokenLogprob:
    return TokenLogprob(token, piece(token, special=True), value)


Chunks = list[tuple[Sequence, int]]


class MoeEngine(Engine):
    """One rank of the model. `create` makes one; with a `dp_size` of 1 it needs no group."""

    lockstep: ClassVar[bool] = True
    resumes: ClassVar[bool] = True

    def __init__(self, settings: EngineSettings, options: MoeOptions, limits: Limits) -> None:
        # Here and not at the top: a front-end imports this module for its tokenizer, and does without NumPy.
        from paceline.engines.moe_model import Alone, MoeModel

        self._model = MoeModel.load(options, limits.max_model_len)
        self._group: RankGroup | None = Alone() if settings.dp_size == 1 else None
        self._limits = limits
        self._step_s = options.step_ms / 1000
        self._schedule = Schedule(settings.max_num_seqs, limits.kv_tokens, settings.max_num_batched_tokens)
        self._prefill_limit: int | None = None
        self._kv: dict[int, Floats] = {}
        self._refused: list[StepOutput] = []
        # Seed 0 is the default and means none: answers without a seed then differ from run to run.
        self._random = random.Random(f"{settings.seed}.{settings.rank}") if settings.seed else random.Random()

    @classmethod
    def create(cls, settings: EngineSettings, progress: Progress) -> MoeEngine:
        options, limits = read_options(settings), read_limits(settings)
        progress("making weights", 0.0)
        made = cls(settings, options, limits)
        progress("making weights", 1.0)
        return made

    @classmethod
    def tokenizer(cls, settings: EngineSettings) -> MoeTokenizer:
        return MoeTokenizer(read_limits(settings).max_model_len)

    @classmethod
    def check(cls, settings: EngineSettings, progress: Progress) -> None:
        read_options(settings)
        read_limits(settings)

    def add(self, request: EngineRequest) -> None:
        length = len(request.prompt_token_ids)
        error = why_never(request, self._limits.max_model_len, VOCABULARY)
        if error is not None:
            self._refused.append(StepOutput(request.key, [], finish_reason="error", error=error))
            return
        # Drawn here: a step that is made anew must not draw again.
        seed = self._random.getrandbits(32) if request.params.seed is None else request.params.seed
        room = min(request.params.max_tokens, self._limits.max_model_len - length)
        sequence = Sequence(request, room, Sampler(request.params, length, seed))
        for token in request.made_token_ids:
            # What it shows has been shown.
            sequence.text.push(piece(token, special=not request.params.skip_special_tokens))
        self._schedule.add(sequence)

    def abort(self, key: int) -> None:
        self._refused = [output for output in self._refused if output.key != key]
        self._end(key)

    def has_work(self) -> bool:
        return bool(self._schedule.running or self._schedule.waiting or self._refused)

    def join(self, group: RankGroup) -> None:
        self._group = group

    def limit_prefill(self, tokens: int | None) -> None:
        self._prefill_limit = tokens

    def step(self) -> StepResult:
        begin = time.monotonic()
        self._schedule.admit()
        chunks = self._schedule.chunks(self._prefill_limit)
        logits = self._forward(chunks)
        left_s = self._step_s - (time.monotonic() - begin)
        if left_s > 0:
            time.sleep(left_s)
        return self._commit(chunks, logits)

    def dummy_step(self) -> None:
        self._forward([])

    def load(self) -> Load:
        return self._schedule.load()

    def _forward(self, chunks: Chunks) -> Floats:
        """Compute with the others. Changes nothing but KV that nobody reads yet."""
        if self._group is None:
            raise EngineError("the moe engine steps among several ranks, and has not been given their group")
        pieces: list[Piece] = []
        for sequence, count in chunks:
            key = sequence.request.key
            if key not in self._kv:
                self._kv[key] = self._model.make_kv(sequence.reserved)
            tokens = sequence.tokens[sequence.computed : sequence.computed + count]
            pieces.append((tokens, sequence.computed, self._kv[key]))
        return self._model.forward(pieces, self._group)

    def _commit(self, chunks: Chunks, logits: Floats) -> StepResult:
        """Write down what a step has computed; no collective from here on."""
        outputs, self._refused = self._refused, []
        prefilled = decoded = 0
        for (sequence, count), row in zip(chunks, logits, strict=True):
            prefilled += count if sequence.to_prefill else 0
            sequence.computed += count
            if sequence.computed == len(sequence.tokens):
                outputs.append(self._choose(sequence, row.tolist()))
                decoded += 1
        return StepResult(outputs, prefilled, decoded)

    def _choose(self, sequence: Sequence, logits: list[float]) -> StepOutput:
        params, sampler = sequence.request.params, sequence.sampler
        token = sampler.choose(logits, sequence.tokens)
        logprobs = None if params.logprobs is None else [sampler.logprobs(logits, token)]
        sequence.tokens.append(token)
        text, reason, stop = _read(sequence, token)
        if reason is not None:
            self._end(sequence.request.key)
        return StepOutput(sequence.request.key, [token], text, reason, stop, logprobs)

    def _end(self, key: int) -> None:
        self._schedule.remove(key)
        self._kv.pop(key, None)


def _read(sequence: Sequence, token: int) -> tuple[str, FinishReason | None, str | int | None]:
    """What may be shown after this token; why it is the last, and which stop it was, if so."""
    params, text = sequence.request.params, sequence.text
    stop: str | int | None = token if token in params.stop_token_ids else None
    ended = stop is not None or (token == EOS and not params.ignore_eos)
    shown = ""
    if not ended or (stop is not None and params.include_stop_str_in_output):
        shown = text.push(piece(token, special=not params.skip_special_tokens))
    if text.stopped_by is None and (ended or sequence.made >= sequence.room):
        shown += text.finish()
        if text.stopped_by is None:
            return shown, "stop" if ended else "length", stop
    return shown, None if text.stopped_by is None else "stop", text.stopped_by
