"""The `moe` engine: a small mixture-of-experts transformer in NumPy, its experts sharded over the ranks.

The reference for engines in lockstep. Every layer of every step has two all-to-alls (`moe_model.py`), so that a
rank that is missing stops all others, as with a large model on GPUs. Its weights come from a seed, or from a file
(`moe_model.py`); it has learned nothing, and answers with letters that look like noise. But what it says depends on
the weights and the request alone: not on the number of ranks, on who else is in the batch, or on how the prompt was
cut into chunks (`moe_model.py` says how that is reached). Whoever gets another answer has found a mistake.

A step makes its plan, computes, and only then writes down what came of it: `EpochEnded` out of a collective
leaves the engine as it was, and the step is made anew in the next group.

What the `moe` engine can be told: the sizes of its model, where the weights come from, how long a step lasts.

No NumPy in here: a front-end reads the options too, for the tokenizer and its limits.

The `moe` engine's tokens: a token a byte, and two special ones, the beginning and the end of a text.

A conversation is lines of `User: …` and `Assistant: …` behind `<bos>`, as for a base model.

Choosing tokens for the `moe` engine, by the logits, the request's seed and the position, and nothing else.

So a step that is made anew chooses the same, and so does another rank. Plain Python: for 258 tokens that costs less
than the forward pass, and its order of additions is written down here.
"""

from __future__ import annotations

import math
import random
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence as Many
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from msgspec import Struct
from msgspec.structs import replace

from paceline.core.load import Load
from paceline.core.rank.events import StepOutput
from paceline.core.requests import FinishReason, PositionLogprobs, SamplingParams, TokenLogprob
from paceline.engines.base import Engine, EngineError, EngineRequest, EngineSettings, Progress, Source, StepResult
from paceline.engines.chat import ChatPrompts, Control, Conversation, Fragments
from paceline.engines.scheduler import Chunks, Schedule, TextSequence, counts, why_never
from paceline.engines.weights import Staged

DEFAULT_MAX_MODEL_LEN = 4096
MOST_TOKENS = 1 << 20
FLOAT_BYTES = 4


class MoeConfig(Struct, frozen=True):
    """The sizes of the model. The weights are float32; `parameters` says how many.

    `experts_per_token` of the `experts` of a layer see each token; each is two matrices, `d_model` x `expert_hidden`.
    """

    layers: int = 3
    d_model: int = 64
    heads: int = 4
    experts: int = 8
    experts_per_token: int = 2
    expert_hidden: int = 128

    @property
    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Every tensor's name and shape, in the order in which they lie in a weights file, without gaps."""
        width, hidden = self.d_model, self.expert_hidden
        shapes: list[tuple[str, tuple[int, ...]]] = [("embedding", (VOCABULARY, width))]
        for layer in range(self.layers):
            shapes += [(f"{layer}.{name}", (width, width)) for name in ("query", "key", "value", "output")]
            shapes.append((f"{layer}.router", (width, self.experts)))
            shapes.append((f"{layer}.up", (self.experts, width, hidden)))
            shapes.append((f"{layer}.down", (self.experts, hidden, width)))
        return [*shapes, ("head", (width, VOCABULARY)), ("bias", (VOCABULARY,))]

    @property
    def parameters(self) -> int:
        """How many numbers the weights are."""
        return sum(math.prod(shape) for _, shape in self.shapes)


class MoeOptions(Struct, frozen=True):
    """All options, read. `weights` None: they come from `weights_seed`. `step_ms`: what a step lasts at least."""

    config: MoeConfig
    weights: Path | None = None
    weights_seed: int = 0
    step_ms: float = 0.0


class Limits(Struct, frozen=True):
    """How many tokens one request may have, and all that run at once together."""

    max_model_len: int
    kv_tokens: int


LARGEST = MoeConfig(layers=64, d_model=1024, heads=64, experts=1024, experts_per_token=64, expert_hidden=4096)
NAMES = (*MoeConfig.__struct_fields__, "weights", "weights_seed", "step_ms")


def read_options(settings: EngineSettings) -> MoeOptions:
    """The options. Raises EngineError naming the option that cannot be."""
    if settings.model is not None:
        raise EngineError(f"--model {settings.model}: the moe engine has its own; give it --engine-option weights=FILE")
    given = dict(settings.options)
    for name in given:
        if name not in NAMES:
            raise EngineError(f"--engine-option {name}: unknown; the moe engine has {', '.join(NAMES)}")
    sizes = {
        name: _whole_number(name, given[name], 1, getattr(LARGEST, name))
        for name in MoeConfig.__struct_fields__
        if name in given
    }
    config = MoeConfig(**sizes)
    if config.d_model % (2 * config.heads):
        raise EngineError(f"--engine-option d_model: {config.d_model} is no multiple of twice the {config.heads} heads")
    if config.experts_per_token > config.experts:
        raise EngineError(
            f"--engine-option experts_per_token: {config.experts_per_token} of {config.experts} experts (experts)"
        )
    if "weights" in given and "weights_seed" in given:
        raise EngineError("--engine-option weights_seed: the weights come from a file (weights), not from a seed")
    weights = Path(given["weights"]) if "weights" in given else None
    if weights is not None:
        check_weights(weights, config)
    seed = _whole_number("weights_seed", given.get("weights_seed", "0"), 0, 2**32 - 1)
    return MoeOptions(config, weights, seed, _milliseconds("step_ms", given.get("step_ms", "0")))


def read_limits(settings: EngineSettings) -> Limits:
    """The same answer in ranks and front-ends. Raises EngineError naming the setting that cannot be."""
    slots, pool, asked = settings.max_num_seqs, settings.kv_cache_tokens, settings.max_model_len
    if slots < 1:
        raise EngineError(f"--max-num-seqs {slots}: must be at least 1")
    if settings.max_num_batched_tokens < slots:
        raise EngineError(
            f"--max-num-batched-tokens {settings.max_num_batched_tokens}: must be at least --max-num-seqs ({slots})"
        )
    if asked is not None and not 2 <= asked <= MOST_TOKENS:
        raise EngineError(f"--max-model-len {asked}: the moe engine takes 2 to {MOST_TOKENS}")
    if pool is not None and pool < (asked or 2):
        raise EngineError(f"--kv-cache-tokens {pool}: must be at least --max-model-len ({asked or 2})")
    length = asked or min(DEFAULT_MAX_MODEL_LEN, pool or DEFAULT_MAX_MODEL_LEN)
    return Limits(length, pool or slots * length)


def check_weights(path: Path, config: MoeConfig) -> None:
    """Raises EngineError where the file cannot hold the weights of such a model."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise EngineError(f"--engine-option weights: {path}: {error.strerror or error}") from None
    needed = config.parameters * FLOAT_BYTES
    if size != needed:
        raise EngineError(
            f"--engine-option weights: {path} has {size} bytes, a model of these sizes {needed}: "
            f"{config.parameters} numbers of {FLOAT_BYTES} bytes"
        )


def _whole_number(name: str, text: str, least: int, most: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise EngineError(f"--engine-option {name}: {text!r} is no whole number") from None
    if not least <= value <= most:
        raise EngineError(f"--engine-option {name}: {value} is not from {least} to {most}")
    return value


def _milliseconds(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise EngineError(f"--engine-option {name}: {text!r} is no number") from None
    if not 0 <= value < 1e6:
        raise EngineError(f"--engine-option {name}: {text} is not from 0 to 1e6")
    return value


BOS, EOS = 256, 257
VOCABULARY = 258
SPECIAL = {"<bos>": BOS, "<eos>": EOS}
SPECIAL_TEXT = {token: text.encode() for text, token in SPECIAL.items()}
MARKER = re.compile("|".join(map(re.escape, SPECIAL)))


class MoeTokenizer:
    """Text to bytes, and back."""

    def __init__(self, max_model_len: int) -> None:
        self.max_model_len = max_model_len
        self.vocabulary_size = VOCABULARY
        self.longest_piece = 1
        self.model_name = "paceline-moe"
        self.sampling_defaults: Mapping[str, float] = {}
        self.chat_template: str | None = None
        self._prompts = ChatPrompts(None, {text: Control(token) for text, token in SPECIAL.items()}, {}, "<bos>")

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        tokens = [BOS] if add_special else []
        begin = 0
        for marker in MARKER.finditer(text) if parse_special else ():
            tokens += text[begin : marker.start()].encode()
            tokens.append(SPECIAL[marker.group()])
            begin = marker.end()
        tokens += text[begin:].encode()
        return tokens

    def decode(self, token_ids: Many[int]) -> str:
        return b"".join(piece(token, special=False) for token in token_ids).decode(errors="replace")

    def chat(self, conversation: Conversation) -> Fragments:
        return self._prompts.fragments(conversation)


def piece(token: int, *, special: bool) -> bytes:
    """The bytes of a token; of a special one its name or, without `special`, nothing."""
    if token < BOS:
        return bytes((token,))
    return SPECIAL_TEXT[token] if special else b""


GREEDY_BELOW = 1e-5
"""Temperatures under this are 0, as in vLLM: dividing by them overflows."""


class Sampler:
    """One request's way to choose. Without state but for what it was made from."""

    def __init__(self, params: SamplingParams, prompt_length: int, seed: int) -> None:
        self._params = params
        self._prompt_length = prompt_length
        self._seed = seed

    def choose(self, logits: Many[float], tokens: Many[int]) -> int:
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

    def logprobs(self, logits: Many[float], chosen: int) -> PositionLogprobs:
        """The chosen token's log-probability and the best ones', by the logits as the model gave them."""
        best = max(logits)
        normaliser = best + math.log(math.fsum(math.exp(logit - best) for logit in logits))
        order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
        top = [_logprob(token, logits[token] - normaliser) for token in order[: self._params.logprobs or 0]]
        return PositionLogprobs(_logprob(chosen, logits[chosen] - normaliser), top)

    def _penalised(self, logits: Many[float], tokens: Many[int]) -> list[float]:
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


def _kept(weights: Many[float], top_p: float, min_p: float) -> int:
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


if TYPE_CHECKING:
    from paceline.engines.group import RankGroup
    from paceline.engines.moe_model import Floats, Piece


class MoeEngine(Engine):
    """One rank of the model. `create` makes one; with a `dp_size` of 1 it needs no group."""

    lockstep: ClassVar[bool] = True
    resumes: ClassVar[bool] = True

    def __init__(self, settings: EngineSettings, options: MoeOptions, limits: Limits) -> None:
        # Here and not at the top: a front-end imports this module for its tokenizer, and does without NumPy.
        from paceline.engines.moe_model import Alone, MoeModel

        def load(weights: Path) -> MoeModel:
            return MoeModel.load(replace(options, weights=weights), limits.max_model_len)

        self._model = MoeModel.load(options, limits.max_model_len)
        self._staged = Staged(load)
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
        sequence = TextSequence(request, room, Sampler(request.params, length, seed))
        for token in request.made_token_ids:
            # What it shows has been shown.
            sequence.text.push(piece(token, special=not request.params.skip_special_tokens))
        self._schedule.queue(sequence)

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

    def stage_weights(self, source: Source) -> list[StepOutput]:
        self._staged.stage(source)
        return []

    def update_weights(self, source: Source, keep_kv: bool) -> None:
        self._model = self._staged.take(source)
        if not keep_kv:
            self._schedule.preempt_all()
            self._kv.clear()

    def _forward(self, chunks: Chunks) -> Floats:
        """Compute with the others. Changes nothing but KV that nobody reads yet."""
        if self._group is None:
            raise EngineError("the moe engine steps among several ranks, and has not been given their group")
        pieces: list[Piece] = []
        for sequence, count in chunks:
            key = sequence.key
            if key not in self._kv:
                self._kv[key] = self._model.make_kv(sequence.reserved)
            tokens = sequence.tokens[sequence.computed : sequence.computed + count]
            pieces.append((tokens, sequence.computed, self._kv[key]))
        return self._model.forward(pieces, self._group)

    def _commit(self, chunks: Chunks, logits: Floats) -> StepResult:
        """Write down what a step has computed; no collective from here on."""
        outputs, self._refused = self._refused, []
        rows, figures = {sequence.key: row for (sequence, _), row in zip(chunks, logits, strict=True)}, counts(chunks)
        outputs += [self._choose(sequence, rows[sequence.key].tolist()) for sequence in self._schedule.done(chunks)]
        return StepResult(outputs, *figures)

    def _choose(self, sequence: TextSequence, logits: list[float]) -> StepOutput:
        params, sampler = sequence.request.params, sequence.sampler
        token = sampler.choose(logits, sequence.tokens)
        logprobs = None if params.logprobs is None else [sampler.logprobs(logits, token)]
        sequence.push(token)
        text, reason, stop = _read(sequence, token)
        if reason is not None:
            self._end(sequence.key)
        return StepOutput(sequence.key, [token], text, reason, stop, logprobs)

    def _end(self, key: int) -> None:
        self._schedule.remove(key)
        self._kv.pop(key, None)


def _read(sequence: TextSequence, token: int) -> tuple[str, FinishReason | None, str | int | None]:
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
