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

import math
import os
import random
from array import array
from operator import add
from pathlib import Path
from typing import Any

from msgspec import Struct

from paceline.core.load import Load
from paceline.core.rank.events import KvChange, StepOutput
from paceline.core.requests import FinishReason, PositionLogprobs, StructuredOutput, TokenLogprob
from paceline.engines.base import Engine, EngineError, EngineRequest, EngineSettings, Progress, Source, StepResult
from paceline.engines.gguf import GGUFHeader, read_header
from paceline.engines.grammars import Form, Grammars
from paceline.engines.kept import KeptSchedule
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
from paceline.engines.models import model_path
from paceline.engines.scheduler import Chunks, TextSequence, counts, why_never
from paceline.engines.weights import Staged

F16 = 1
BF16 = 30
FLASH_ATTENTION = 1
CELLS_ALIGNMENT = 256
MICRO_BATCH_TOKENS = 128
"""Tokens llama.cpp computes at once. More is not faster on a CPU, and costs memory in sliding-window layers."""


def make_context(model: Any, settings: EngineSettings, plan: MemoryPlan, pooling: Pooling | None = None) -> Any:
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
    if pooling is not None:
        params.embeddings, params.pooling_type = True, POOL_NOTHING
        if pooling.whole:
            params.n_batch = params.n_ubatch = max(settings.max_num_batched_tokens, plan.max_model_len)
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


# Embeddings ---------------------------------------------------------------------------------------

POOL_NOTHING = 0
"""Llama.cpp's number for an embedding a token: what becomes of them is done here, over prompts computed in pieces."""
KINDS = {1: "mean", 2: "cls", 3: "last"}
ENCODERS = ("bert", "gemma-embedding", "t5encoder")


class Pooling(Struct, frozen=True):
    """How the embeddings of tokens become their prompt's: their mean, the first's or the last's. `whole`: whether
    each token looks at all others, so that a prompt is computed in one piece.
    """

    kind: str
    whole: bool


def pooling_of(header: GGUFHeader) -> Pooling:
    """What the file says; the last token's of a model that was made to generate. Raises EngineError."""
    asked, architecture = header.own("pooling_type"), header.text("general.architecture") or ""
    whole = header.own("attention.causal") is False or architecture.endswith(ENCODERS)
    kind = asked if isinstance(asked, int) and asked else (1 if whole else 3)
    if kind not in KINDS:
        raise EngineError(f"--task embed: the model ranks and does not embed (its pooling type is {kind})")
    return Pooling(KINDS[kind], whole)


class LlamaEngine(Engine):
    """Llama.cpp behind the engine interface. `create` makes one."""

    resumes = True
    supports = frozenset({
        "min_tokens", "bad_words", "allowed_token_ids", "prompt_logprobs", "structured_outputs", "embeddings",
    })  # fmt: skip

    def __init__(
        self, model: Any, context: Any, settings: EngineSettings, plan: MemoryPlan, pooling: Pooling | None = None
    ) -> None:
        self._pooling = pooling
        """None where it generates."""
        self._pooled: dict[int, list[float]] = {}
        """By request, what its embedding will be made from, as far as it is computed."""
        self._model = model
        self._context = context
        self._settings = settings
        self._plan = plan
        self._staged = Staged(self._other_model)
        self._vocabulary = Vocabulary(model)
        self._grammars = Grammars(self._vocabulary)
        # llama.cpp lowers its limit to the KV memory's size, and ends the process for a larger batch.
        most = plan.max_model_len if pooling is not None and pooling.whole else 0
        budget = min(max(settings.max_num_batched_tokens, most), context.n_batch)
        self._batch = library().LlamaBatch(n_tokens=budget, embd=0, n_seq_max=1)
        aside = read_options(settings).kept_tokens
        self._schedule = KeptSchedule(
            plan.slots,
            plan.kv_tokens,
            budget,
            self,
            pooled=plan.shared,
            aside=plan.kv_tokens if aside is None else aside,
        )
        self._refused: list[StepOutput] = []
        self._prompt_logprobs: dict[int, dict[int, PositionLogprobs]] = {}
        """By request and position, where they are asked for and the first output has not gone out."""
        self._forms: dict[int, Form] = {}
        """By request, until its first token is chosen."""
        # Seed 0 is the default and means none: answers without a seed then differ from run to run.
        self._random = random.Random(f"{settings.seed}.{settings.rank}") if settings.seed else random.Random()

    @classmethod
    def create(cls, settings: EngineSettings, progress: Progress) -> LlamaEngine:
        repack = read_options(settings).repack
        path = model_path(settings.model, progress)
        header = read_header(path)
        plan, pooling = plan_memory(settings, header), pooling_of(header) if settings.task == "embed" else None
        model = load_model(path, progress, repack=repack)
        made = cls(model, make_context(model, settings, plan, pooling), settings, plan, pooling)
        if pooling is None:
            # Reads the vocabulary, now and not with the first request of a form.
            made._grammars.begin(StructuredOutput("json", "{}"))
        return made

    @classmethod
    def tokenizer(cls, settings: EngineSettings) -> LlamaTokenizer:
        return LlamaTokenizer.load(settings)

    @classmethod
    def check(cls, settings: EngineSettings, progress: Progress) -> None:
        library()
        read_options(settings)
        plan_memory(settings, read_header(model_path(settings.model, progress)))

    @classmethod
    def keeps_prefixes(cls, settings: EngineSettings) -> bool:
        return True

    def add(self, request: EngineRequest) -> None:
        # One bad token makes llama.cpp refuse the whole batch, everybody's.
        # What is embedded may have all the length there is.
        length = self._plan.max_model_len + (self._pooling is not None)
        error = why_never(request, length, self._vocabulary.size)
        if error is not None:
            self._refused.append(StepOutput(request.key, [], finish_reason="error", error=error))
            return
        if request.params.structured_outputs is not None:
            try:
                self._forms[request.key] = self._grammars.begin(request.params.structured_outputs)
            except ValueError as wrong:
                said = StepOutput(request.key, [], finish_reason="error", stop_reason="bad_request",
                                  error=f"structured_outputs: no answer can have this form: {wrong}")  # fmt: skip
                self._refused.append(said)
                return
        made = 0 if self._pooling is not None else request.params.max_tokens
        room = min(made, self._plan.max_model_len - len(request.prompt_token_ids))
        sequence = TextSequence(request, room)
        if self._pooling is not None:
            # All tokens are looked at, or only the last.
            sequence.reuses = self._pooling.kind == "last" and not self._pooling.whole
        for token in request.made_token_ids:
            # What it shows has been shown.
            sequence.text.push(self._vocabulary.piece(token, special=not request.params.skip_special_tokens))
        if request.params.prompt_logprobs is not None and not request.made_token_ids:
            self._prompt_logprobs[request.key] = {}
        self._schedule.queue(sequence)

    def abort(self, key: int) -> None:
        self._refused = [output for output in self._refused if output.key != key]
        self._end(key)

    def has_work(self) -> bool:
        return bool(self._schedule.running or self._schedule.waiting or self._refused)

    def step(self) -> StepResult:
        outputs, self._refused = self._refused, []
        chunks, rows = self._compute()
        read = self._read_prompt if self._pooling is None else self._pool
        answer = self._choose if self._pooling is None else self._embed
        for sequence, count in chunks:
            read(sequence, count, rows[sequence.slot])
        figures = counts(chunks)
        outputs += [answer(sequence, rows[sequence.slot]) for sequence in self._schedule.done(chunks)]
        # What could not be computed at all.
        outputs += self._refused
        self._refused = []
        return StepResult(outputs, *figures)

    def load(self) -> Load:
        return self._schedule.load()

    def kv_events(self) -> KvChange | None:
        return self._schedule.kv_events()

    def stage_weights(self, source: Source) -> list[StepOutput]:
        self._staged.stage(source)
        return []

    def update_weights(self, source: Source, keep_kv: bool) -> None:
        """Swap the model for the one beside it. KV lies in a context of the model's own, and cannot be kept."""
        model = self._staged.take(source)
        self._schedule.preempt_all()
        self._schedule.forget_all()
        self._context.close()
        before, self._model = self._model, model
        self._vocabulary.move(model)
        before.close()
        self._context = make_context(model, self._settings, self._plan, self._pooling)

    def _other_model(self, path: Path) -> Any:
        """One that can take the place of this one. Raises EngineError."""
        if plan_memory(self._settings, read_header(path)) != self._plan:
            raise EngineError(f"{path}: needs other memory than the model that is served")
        model = load_model(path, lambda what, share: None, repack=read_options(self._settings).repack)
        if not self._vocabulary.same_as(Vocabulary(model)):
            model.close()
            raise EngineError(f"{path}: has other tokens than the model that is served")
        return model

    def close(self) -> None:
        self._batch.close()
        self._context.close()
        self._model.close()

    def _compute(self) -> tuple[Chunks, dict[int, int]]:
        """Compute the next batch; returns what was computed, and by slot the row that has its logits."""
        while True:
            chunks = self._schedule.chunks()
            if self._pooling is not None and self._pooling.whole:
                # The first fits in any case; who does not is the first of a later step.
                chunks = [(sequence, count) for sequence, count in chunks if count == sequence.to_prefill]
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
            pooled = self._pooling.kind if self._pooling is not None else "last"
            every = pooled == "mean" or self._prompt_logprobs.get(sequence.request.key) is not None
            one = 0 if pooled == "cls" else last
            for position in range(begin, begin + count):
                batch.add(sequence.tokens[position], position, slots, position in (one, last) or every)
            rows[sequence.slot] = batch.n_tokens - 1
        return rows

    def _read_prompt(self, sequence: TextSequence, count: int, row: int) -> None:
        """Keep the log-probabilities of the prompt's tokens behind the next `count` computed, which end at `row`."""
        found = self._prompt_logprobs.get(sequence.request.key)
        best = sequence.request.params.prompt_logprobs
        if found is None or best is None:
            return
        begin = sequence.computed
        for position in range(begin, min(begin + count, len(sequence.request.prompt_token_ids) - 1)):
            token = sequence.tokens[position + 1]
            found[position + 1] = self._logprobs(token, row - count + 1 + position - begin, best)

    def _pool(self, sequence: TextSequence, count: int, row: int) -> None:
        """Add what `count` tokens that were computed, up to `row`, bring to their prompt's embedding."""
        assert self._pooling is not None
        first, complete = sequence.computed == 0, sequence.computed + count == sequence.length
        rows = range(row - count + 1, row + 1)
        if first:
            # It may have been computed before, and been set back.
            self._pooled.pop(sequence.key, None)
        match self._pooling.kind:
            case "last":
                rows = rows[-1:] if complete else rows[:0]
            case "cls":
                rows = rows[:1] if first else rows[:0]
        for one in rows:
            values, kept = self._context.get_embeddings_ith(one), self._pooled.get(sequence.key)
            self._pooled[sequence.key] = values if kept is None else list(map(add, kept, values))

    def _embed(self, sequence: TextSequence, row: int) -> StepOutput:
        values = self._pooled[sequence.key]
        length = math.sqrt(sum(value * value for value in values)) or 1.0
        self._end(sequence.key)
        embedding = array("f", (value / length for value in values)).tobytes()
        return StepOutput(sequence.key, [], finish_reason="stop", embedding=embedding)

    def _make_room(self, chunks: Chunks) -> None:
        """Llama.cpp found no room for a batch, against all reckoning: keep nothing of those that have ended; else let
        one wait, or end the only one.
        """
        last = max((sequence for sequence, _ in chunks), key=lambda sequence: sequence.order)
        kept = self._schedule.forget_slots()
        if len(chunks) == 1 and not kept:
            error = f"llama.cpp has no KV memory for this request's {len(last.tokens)} tokens"
            self._end(last.key)
            self._refused.append(StepOutput(last.key, [], finish_reason="error", error=error))
            return
        # Parts of the batch may have been computed. Whose memory is not as we know it starts anew as well.
        for sequence, _ in chunks:
            known = self._context.memory_seq_pos_max(sequence.slot) == sequence.computed - 1
            if (sequence is last and not kept) or not known:
                self._schedule.forget(self._schedule.preempt(sequence))

    def _choose(self, sequence: TextSequence, row: int) -> StepOutput:
        params = sequence.request.params
        if sequence.sampler is None:
            seed = self._random.getrandbits(32) if params.seed is None else params.seed
            request, window = sequence.request, self._plan.max_model_len
            vocabulary, prompt = self._vocabulary, request.prompt_token_ids
            form = self._forms.pop(sequence.key, None)
            sequence.sampler = Sampler(params, prompt, vocabulary.size, window, seed, lambda: vocabulary.ends, form)
            for made in request.made_token_ids:
                sequence.sampler.accept(made)
        token = sequence.sampler.sample(self._context, row)
        logprobs = None if params.logprobs is None else [self._logprobs(token, row, params.logprobs)]
        sequence.push(token)
        text, reason, stop = self._read(sequence, token, sequence.sampler.ended)
        of_prompt = self._of_prompt(sequence)
        if reason is not None:
            self._end(sequence.key)
        cached, sequence.cached = sequence.cached, 0
        return StepOutput(
            sequence.key, [token], text, reason, stop, logprobs, prompt_logprobs=of_prompt, cached_tokens=cached
        )

    def _of_prompt(self, sequence: TextSequence) -> list[PositionLogprobs] | None:
        """What the first output brings, where it was asked for."""
        found = self._prompt_logprobs.pop(sequence.key, None)
        if found is None:
            return None
        found[0] = PositionLogprobs(self._logprob(sequence.tokens[0], 0.0))
        return [found[position] for position in range(len(sequence.request.prompt_token_ids))]

    def _read(
        self, sequence: TextSequence, token: int, complete: bool
    ) -> tuple[str, FinishReason | None, str | int | None]:
        """What may be shown after this token; why it is the last, and which stop it was, if so. `complete`: its form
        lets nothing follow.
        """
        params, text = sequence.request.params, sequence.text
        stop: str | int | None = token if token in params.stop_token_ids else None
        ended = stop is not None or (not params.ignore_eos and self._vocabulary.is_end(token))
        shown = ""
        if not ended or (stop is not None and params.include_stop_str_in_output):
            shown = text.push(self._vocabulary.piece(token, special=not params.skip_special_tokens))
        if text.stopped_by is not None:
            return shown, "stop", text.stopped_by
        if not (ended or complete) and sequence.made < sequence.room:
            return shown, None, None
        shown += text.finish()
        if text.stopped_by is not None:
            return shown, "stop", text.stopped_by
        return shown, "stop" if ended or complete else "length", stop

    def _logprobs(self, token: int, row: int, best: int) -> PositionLogprobs:
        chosen, top = read_logprobs(self._context.get_logits_ith(row), token, best)
        return PositionLogprobs(self._logprob(token, chosen), [self._logprob(other, value) for other, value in top])

    def _logprob(self, token: int, value: float) -> TokenLogprob:
        return TokenLogprob(token, self._vocabulary.piece(token, special=True), value)

    def _end(self, key: int) -> None:
        self._prompt_logprobs.pop(key, None)
        self._forms.pop(key, None)
        self._pooled.pop(key, None)
        sequence = self._schedule.remove(key)
        if sequence is None:
            return
        if sequence.sampler is not None:
            sequence.sampler.close()

    # What slots have, for the schedule.

    def keep(self, slot: int, count: int) -> bool:
        context = self._context
        length = context.memory_seq_pos_max(slot) + 1
        # A sliding window has let go of what lies before it: there one can go on at the end alone.
        if 0 < count == length:
            return True
        if 0 < count < length and context.memory_seq_pos_min(slot) == 0 and context.memory_seq_rm(slot, count, -1):
            return True
        context.memory_seq_rm(slot, -1, -1)
        return False

    def copy(self, source: int, slot: int, count: int) -> bool:
        context = self._context
        if context.memory_seq_pos_min(source) != 0:
            return False
        context.memory_seq_cp(source, slot, -1, -1)
        return True

    def hand_out(self, slot: int) -> bytes:
        state: bytes = self._context.get_state_seq_data(slot)
        return state

    def take_back(self, slot: int, state: bytes) -> bool:
        try:
            self._context.set_state_seq_data(state, slot)
        except ValueError:
            # A pool in which there is no room for it in one piece.
            return False
        return True


class Options(Struct, frozen=True):
    """`--engine-option` of this engine. `repack`: weights, for speed. `kept_tokens`: how many of ended requests are
    kept beside those in slots, None for as many as the KV memory holds.
    """

    repack: bool = False
    kept_tokens: int | None = None


def read_options(settings: EngineSettings) -> Options:
    """Raises EngineError naming an option that there is not, or a value that cannot be."""
    for name, value in settings.options.items():
        if name not in Options.__struct_fields__:
            known = ", ".join(Options.__struct_fields__)
            raise EngineError(f"--engine-option {name}: unknown; the llama engine has {known}")
        if name == "repack" and value not in ("0", "1"):
            raise EngineError(f"--engine-option {name}: {value!r} is neither 0 nor 1")
        if name == "kept_tokens" and not (value.isdecimal() and len(value) < 16):
            raise EngineError(f"--engine-option {name}: {value!r} is no number of tokens")
    kept = settings.options.get("kept_tokens")
    return Options(settings.options.get("repack") == "1", None if kept is None else int(kept))
