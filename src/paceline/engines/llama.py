"""The `llama` engine: real models by llama.cpp, with continuous batching and chunked prefill.

One step is one `llama_decode` of one batch: a token of every request that is writing, and pieces of
prompts (`scheduler.py` says which). Logits are asked for where a token is to be chosen and nowhere
else. `decode` and the samplers release the GIL, so the rank's other threads go on.

A batch is filled in the order of slots. With one KV stream a slot, llama.cpp computes together what has
neighbouring sequence numbers in growing order, and in any other order one after the other, which costs
twice the time. A gap in the numbers costs a pass over the weights, a third more than the row that would
fill it, so gaps are left, and new requests take the lowest free slot.

No request is lost or gets wrong text: memory for the whole answer is reserved at the start, so that
`decode` finds room. Should it ever not, the request that came last is computed anew later, from its
prompt and the tokens it has already; its sampler is kept, so its text goes on as if nothing had happened.

llama.cpp's context, set so that a token's logits do not depend on who shares its batch.

What was measured, on an EPYC core with AVX-512 and Gemma 3 270M Q4_K_M: the logits of one position,
computed alone and in company, in chunks of 1 to 512 tokens, after 64 to 1,000 tokens
(the last line also with two threads).

| setting | greatest difference of a logit |
|---|---|
| llama.cpp's defaults (repacked weights, F16 K and V, one pool) | 0.8 to 1.3 |
| weights not repacked | 0.7 to 1.2 |
| … and no flash attention, streams | 0 for chunks of 2 rows or more, 0.6 to 1.2 for single rows |
| … and flash attention, streams, F16 K, BF16 V | 0, always |

The last is what we use. BF16 values keep flash attention in its one-row kernel, which treats every row alike
whatever stands beside it: the kernels for 64 rows and for long caches take F16 and F32 only. It also adds
BF16 values up in 32 bits, where it adds F16 ones up in 16. The cost is small:
prefill 173 against 190 tokens/s, decoding within the noise. Not repacking costs between nothing and a fifth in a
batch of 16 (the machine was shared); `--engine-option repack=1` takes that and gives up the equality.
"""

from __future__ import annotations

import os
import random
from typing import Any

from paceline.core.load import Load
from paceline.core.rank.events import StepOutput
from paceline.core.requests import FinishReason, PositionLogprobs, TokenLogprob
from paceline.engines.base import Engine, EngineError, EngineRequest, EngineSettings, Progress, StepResult
from paceline.engines.gguf import model_path, read_header
from paceline.engines.llama_text import (
    LlamaTokenizer,
    MemoryPlan,
    Sampler,
    Vocabulary,
    has_gpu,
    library,
    load_model,
    plan_memory,
    read_logprobs,
)
from paceline.engines.scheduler import Schedule, Sequence, why_never

F16 = 1
BF16 = 30
FLASH_ATTENTION = 1
CELLS_ALIGNMENT = 256
MICRO_BATCH_TOKENS = 128
"""Tokens llama.cpp computes at once. More is not faster on a CPU, and costs memory in sliding-window layers."""


def make_context(model: Any, settings: EngineSettings, plan: MemoryPlan) -> Any:
    """A context with room for the plan. Raises EngineError."""
    cpp = library()
    threads = compute_threads(settings)
    params = cpp.LlamaContextParams()
    streams = 1 if plan.shared else plan.slots
    params.n_ctx = streams * _aligned(plan.kv_tokens // streams)
    params.n_seq_max = plan.slots
    params.kv_unified = plan.shared
    params.n_batch = settings.max_num_batched_tokens
    params.n_ubatch = min(settings.max_num_batched_tokens, MICRO_BATCH_TOKENS)
    params.n_threads = threads
    params.n_threads_batch = threads
    params.no_perf = True
    # Sliding-window layers keep their window and no more; the default keeps everything, five times the memory here.
    params.swa_full = False
    # A GPU has kernels of its own, and none for mixed types: there llama.cpp's own choice is best.
    if not has_gpu():
        params.flash_attn_type = FLASH_ATTENTION
        params.type_k = F16
        params.type_v = BF16
    try:
        return cpp.LlamaContext(model, params)
    except (RuntimeError, ValueError, MemoryError, OverflowError):
        raise EngineError(
            f"no memory for {plan.kv_tokens} tokens of KV ({plan.slots} requests at once): "
            "lower --max-model-len, --max-num-seqs or --kv-cache-tokens"
        ) from None


def compute_threads(settings: EngineSettings) -> int:
    """This rank's share of the cores, unless the user said otherwise."""
    return settings.threads or max(1, len(os.sched_getaffinity(0)) // settings.dp_size)


def _aligned(tokens: int) -> int:
    return -(-tokens // CELLS_ALIGNMENT) * CELLS_ALIGNMENT


Chunks = list[tuple[Sequence, int]]
OPTIONS = ("repack",)


class LlamaEngine(Engine):
    """Llama.cpp behind the engine interface. `create` makes one."""

    resumes = True

    def __init__(self, model: Any, context: Any, settings: EngineSettings, plan: MemoryPlan) -> None:
        self._model = model
        self._context = context
        self._plan = plan
        self._vocabulary = Vocabulary(model)
        # llama.cpp lowers its limit to the KV memory's size, and ends the process for a larger batch.
        budget = min(settings.max_num_batched_tokens, context.n_batch)
        self._batch = library().LlamaBatch(n_tokens=budget, embd=0, n_seq_max=1)
        self._schedule = Schedule(plan.slots, plan.kv_tokens, budget)
        self._refused: list[StepOutput] = []
        # Seed 0 is the default and means none: answers without a seed then differ from run to run.
        self._random = random.Random(f"{settings.seed}.{settings.rank}") if settings.seed else random.Random()

    @classmethod
    def create(cls, settings: EngineSettings, progress: Progress) -> LlamaEngine:
        repack = read_options(settings)
        path = model_path(settings.model, progress)
        plan = plan_memory(settings, read_header(path))
        model = load_model(path, progress, repack=repack)
        return cls(model, make_context(model, settings, plan), settings, plan)

    @classmethod
    def tokenizer(cls, settings: EngineSettings) -> LlamaTokenizer:
        return LlamaTokenizer.load(settings)

    @classmethod
    def check(cls, settings: EngineSettings, progress: Progress) -> None:
        library()
        read_options(settings)
        plan_memory(settings, read_header(model_path(settings.model, progress)))

    def add(self, request: EngineRequest) -> None:
        # One bad token makes llama.cpp refuse the whole batch, everybody's.
        error = why_never(request, self._plan.max_model_len, self._vocabulary.size)
        if error is not None:
            self._refused.append(StepOutput(request.key, [], finish_reason="error", error=error))
            return
        room = min(request.params.max_tokens, self._plan.max_model_len - len(request.prompt_token_ids))
        sequence = Sequence(request, room)
        for token in request.made_token_ids:
            # What it shows has been shown.
            sequence.text.push(self._vocabulary.piece(token, special=not request.params.skip_special_tokens))
        self._schedule.add(sequence)

    def abort(self, key: int) -> None:
        self._refused = [output for output in self._refused if output.key != key]
        self._end(key)

    def has_work(self) -> bool:
        return bool(self._schedule.running or self._schedule.waiting or self._refused)

    def step(self) -> StepResult:
        outputs, self._refused = self._refused, []
        self._schedule.admit()
        chunks, rows = self._compute()
        prefilled = 0
        for sequence, count in chunks:
            prefilled += count if sequence.to_prefill else 0
            sequence.computed += count
        decoded = 0
        for sequence, _ in chunks:
            if sequence.computed == len(sequence.tokens):
                outputs.append(self._choose(sequence, rows[sequence.slot]))
                decoded += 1
        # What could not be computed at all.
        outputs += self._refused
        self._refused = []
        return StepResult(outputs, prefilled, decoded)

    def load(self) -> Load:
        return self._schedule.load()

    def close(self) -> None:
        self._batch.close()
        self._context.close()
        self._model.close()

    def _compute(self) -> tuple[Chunks, dict[int, int]]:
        """Compute the next batch; returns what was computed, and by slot the row that has its logits."""
        while True:
            chunks = self._schedule.chunks()
            if not chunks:
                return [], {}
            rows = self._fill(chunks)
            try:
                self._context.decode(self._batch)
                return chunks, rows
            except ValueError as error:
                if "KV slot" not in str(error):
                    raise EngineError(f"llama.cpp refused a batch: {error}") from None
                self._make_room(chunks)
            except RuntimeError as error:
                raise EngineError(f"llama.cpp failed to compute a batch: {error}") from None

    def _fill(self, chunks: Chunks) -> dict[int, int]:
        batch, rows = self._batch, {}
        batch.clear()
        for sequence, count in sorted(chunks, key=lambda chunk: chunk[0].slot):
            slots, begin = [sequence.slot], sequence.computed
            last = len(sequence.tokens) - 1
            for position in range(begin, begin + count):
                batch.add(sequence.tokens[position], position, slots, position == last)
            rows[sequence.slot] = batch.n_tokens - 1
        return rows

    def _make_room(self, chunks: Chunks) -> None:
        """Llama.cpp found no room for a batch, against all reckoning: let one wait, or end the only one."""
        last = max((sequence for sequence, _ in chunks), key=lambda sequence: sequence.order)
        if len(chunks) == 1:
            error = f"llama.cpp has no KV memory for this request's {len(last.tokens)} tokens"
            self._end(last.request.key)
            self._refused.append(StepOutput(last.request.key, [], finish_reason="error", error=error))
            return
        # Parts of the batch may have been computed. Whose memory is not as we know it starts anew as well.
        for sequence, _ in chunks:
            known = self._context.memory_seq_pos_max(sequence.slot) == sequence.computed - 1
            if sequence is last or not known:
                self._free(self._schedule.preempt(sequence))

    def _choose(self, sequence: Sequence, row: int) -> StepOutput:
        params = sequence.request.params
        if sequence.sampler is None:
            seed = self._random.getrandbits(32) if params.seed is None else params.seed
            request, window = sequence.request, self._plan.max_model_len
            sequence.sampler = Sampler(params, request.prompt_token_ids, self._vocabulary.size, window, seed)
            for made in request.made_token_ids:
                sequence.sampler.accept(made)
        token = sequence.sampler.sample(self._context, row)
        logprobs = None if params.logprobs is None else [self._logprobs(token, row, params.logprobs)]
        sequence.tokens.append(token)
        text, reason, stop = self._read(sequence, token)
        if reason is not None:
            self._end(sequence.request.key)
        return StepOutput(sequence.request.key, [token], text, reason, stop, logprobs)

    def _read(self, sequence: Sequence, token: int) -> tuple[str, FinishReason | None, str | int | None]:
        """What may be shown after this token; why it is the last, and which stop it was, if so."""
        params, text = sequence.request.params, sequence.text
        stop: str | int | None = token if token in params.stop_token_ids else None
        ended = stop is not None or (not params.ignore_eos and self._vocabulary.is_end(token))
        shown = ""
        if not ended or (stop is not None and params.include_stop_str_in_output):
            shown = text.push(self._vocabulary.piece(token, special=not params.skip_special_tokens))
        if text.stopped_by is not None:
            return shown, "stop", text.stopped_by
        if not ended and sequence.made < sequence.room:
            return shown, None, None
        shown += text.finish()
        if text.stopped_by is not None:
            return shown, "stop", text.stopped_by
        return shown, "stop" if ended else "length", stop

    def _logprobs(self, token: int, row: int, best: int) -> PositionLogprobs:
        chosen, top = read_logprobs(self._context.get_logits_ith(row), token, best)
        return PositionLogprobs(self._logprob(token, chosen), [self._logprob(other, value) for other, value in top])

    def _logprob(self, token: int, value: float) -> TokenLogprob:
        return TokenLogprob(token, self._vocabulary.piece(token, special=True), value)

    def _end(self, key: int) -> None:
        sequence = self._schedule.remove(key)
        if sequence is None:
            return
        if sequence.slot >= 0:
            self._free(sequence.slot)
        if sequence.sampler is not None:
            sequence.sampler.close()

    def _free(self, slot: int) -> None:
        self._context.memory_seq_rm(slot, -1, -1)


def read_options(settings: EngineSettings) -> bool:
    """Whether to repack weights. Raises EngineError naming an option that there is not."""
    for name, value in settings.options.items():
        if name not in OPTIONS:
            raise EngineError(f"--engine-option {name}: unknown; the llama engine has {', '.join(OPTIONS)}")
        if value not in ("0", "1"):
            raise EngineError(f"--engine-option {name}: {value!r} is neither 0 nor 1")
    return settings.options.get("repack") == "1"
