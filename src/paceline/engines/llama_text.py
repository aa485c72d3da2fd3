"""The package cyllama, opened once: silent, its back ends loaded, its errors in one line.

What 0.2.18 does that one has to know:

- `get_logits_ith` reads `model.n_vocab`, which its LlamaModel does not have, so every call fails. A
  subclass that has the attribute mends it. (0.4 reads the right thing itself.)
- `vocab_only` ends the process: the constructor asks for the number of heads, which is not read then.
  `no_alloc` without mmap does what one wanted: vocabulary and metadata, no weights.
- `no_alloc` with mmap ends the process, too.

Compute threads meet at a barrier some 600 times a token. OpenMP's threads spin there for about a
millisecond before they sleep, which is right on a machine of one's own. Where anything else wants a
core, as a front-end does, the one that spins takes the time that the one it waits for needs. On two
cores and two threads, tokens/s alone and for 16 together:

| | free cores | one core busy |
|---|---|---|
| as it is | 63 and 149 | 1.8 and 9 |
| a spin of 1000 | 52 and 108 | 16 and 34 |
| none (OMP_WAIT_POLICY=PASSIVE) | 26 to 37 and 75 to 106 | 18 and 32 |

So they spin briefly, unless the user's environment says otherwise.

How much a request may hold, and how KV memory is laid out: one stream a slot, or one shared pool.

llama.cpp can give each sequence a stretch of KV of its own (a stream), or let all of them share one pool
of cells. We use streams wherever they fit, for two reasons.

*The same text, whoever else is served.* A quantised model rounds its activations to 8 bits before every
matrix product, so the least difference, in the last bit of one sum, grows within a few layers to a few
tenths in the logits: enough to turn a near tie and with it the rest of the text. Text that does not
depend on the batch therefore needs products that agree in every bit, and three things spoil that. We set
them so that they do not (`llama.py`): repacked weights compute four rows differently from one;
flash attention has one kernel for one row, one for 64 rows or more and one for a long cache; and
attention sums in the order of the cells. In a stream that order is the order of the text. In a shared
pool it depends on who left which cell free.

*Speed.* In a shared pool, each token's attention passes over everybody's cells to skip them.

The price is that a stream has the length of the longest request allowed. So the default for that is
moderate, and where `kv_cache_tokens` is too little for a stream a slot, all share one pool of that size.
There a request starts when the pool has room for its prompt and its whole answer (`scheduler.py`).

A model's vocabulary: text to tokens, and tokens to bytes.

Bytes and not text, because a token may hold half a character. cyllama decodes every piece and so turns
such halves into U+FFFD; where one appears, the bytes are taken from the vocabulary entry itself: `<0xE2>`
in SentencePiece vocabularies, GPT-2's printable stand-ins for bytes in BPE ones.

The tokenizer of a GGUF model, for front-ends: its vocabulary and its chat format, without its weights.

It takes 0.7 s and 78 MB for Gemma's 262,144 tokens, all of it llama.cpp's vocabulary. (Loading the model by
mmap takes as long and maps another 250 MB.)

Choosing tokens: one chain of llama.cpp's samplers a request, and log-probabilities where asked for.

The order is llama.cpp's: logit_bias, penalties, top_k, top_p, min_p, temperature, then the draw.

Penalties. OpenAI's and vLLM's frequency and presence penalties count generated tokens only; the repetition
penalty counts the prompt as well. llama.cpp's one sampler has one window for all three, so two are
used, and the prompt is shown to the chain while only the first is in it. The window must be given in
tokens: -1, documented as the context's size, is none at all.

A token that may not come (an end before `min_tokens`, the last one of a bad word, what is not of the answer's form) is
drawn again from what is left, by a chain that is built anew for it: that is seldom, and the chances are those of
leaving it out from the beginning. Where a form leaves one token, nothing is drawn.

The draw at each position has random numbers of its own, made from the request's seed and the position and nothing else:
so another rank that goes on with a half-written answer draws what this one would have drawn. llama.cpp keeps one
generator a chain, which nothing can move on but drawing; so each draw gets a copy of the chain with a generator of its
own, in 10 us. A copy of a penalty forgets what it has counted (llama.cpp copies the tokens and not their counts), so a
chain with one is built anew for each draw, in some tenths of a millisecond.

Cost, over 262,144 tokens on one thread: greedy 0.5 ms, top_k 0.5, min_p 0.7, all of them 1.0; plain
temperature 3.5 and top_p 4.5, as every token's probability must be computed. A row of a decoding batch
costs 14 ms, so nothing is gained by greedy sampling of our own.

Logits come out of cyllama as a list of floats, 5 ms, and 6 more as an array; the rest of the work on
log-probabilities is 1 ms. So they are read for requests that ask, and for no others.
"""

from __future__ import annotations

import importlib
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from msgspec import Struct

from paceline.core.requests import SamplingParams
from paceline.engines.base import EngineError, EngineSettings, Progress
from paceline.engines.chat import ChatPrompts, Control, Conversation, Fragments
from paceline.engines.gguf import GGUFHeader, read_header
from paceline.engines.grammars import Form
from paceline.engines.models import RECOMMENDED, SMOLLM2, SMOLLM2_FILE, model_path

LOG_VARIABLE = "PACELINE_LLAMA_LOG"
SPIN_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
SPIN_COUNT = "1000"


@cache
def library() -> Any:
    """The module `cyllama.llama.llama_cpp`. Raises EngineError where it is missing."""
    if not any(name in os.environ for name in SPIN_VARIABLES):
        # Read once, when the library below brings libgomp in.
        os.environ[SPIN_VARIABLES[0]] = SPIN_COUNT
    try:
        cpp = importlib.import_module("cyllama.llama.llama_cpp")
    except ImportError as error:
        raise EngineError(f"the llama engine needs cyllama: pip install 'paceline[llama]' ({error})") from None
    if os.environ.get(LOG_VARIABLE) != "1":
        cpp.disable_logging()
    cpp.ggml_backend_load_all()
    return cpp


def has_gpu() -> bool:
    """Whether this build of llama.cpp computes on something other than the CPU."""
    return any(device["type"] in ("GPU", "iGPU") for device in library().ggml_backend_dev_info())


def load_model(path: Path, progress: Progress, *, repack: bool) -> Any:
    """The whole model. Raises EngineError naming the file."""
    params = library().LlamaModelParams()
    params.use_extra_bufts = repack

    def on_progress(share: float) -> bool:
        progress("loading model", share)
        return True

    params.progress_callback = on_progress
    return _open(path, params)


def load_vocabulary(path: Path) -> Any:
    """The model without its weights: a third of the memory, for front-ends. Raises EngineError."""
    params = library().LlamaModelParams()
    params.no_alloc = True
    params.use_mmap = False
    return _open(path, params)


@cache
def _model_class() -> Any:
    return type("Model", (library().LlamaModel,), {"n_vocab": 0})


def _open(path: Path, params: Any) -> Any:
    try:
        model = _model_class()(str(path), params)
    except (OSError, ValueError, RuntimeError, MemoryError):
        raise EngineError(f"{path}: llama.cpp cannot load this model ({LOG_VARIABLE}=1 shows its own words)") from None
    model.n_vocab = model.get_vocab().n_vocab
    return model


MODERATE_TOKENS = 4096
MOST_SEQUENCES = 256
"""LLAMA_MAX_SEQ of llama.cpp."""


class MemoryPlan(Struct, frozen=True):
    """What one request may have, what all may have, and whether all share one pool."""

    max_model_len: int
    slots: int
    kv_tokens: int
    shared: bool


def plan_memory(settings: EngineSettings, header: GGUFHeader) -> MemoryPlan:
    """The same answer in ranks and front-ends. Raises EngineError naming the setting that cannot be."""
    slots = settings.max_num_seqs
    if not 0 < slots <= MOST_SEQUENCES:
        raise EngineError(f"--max-num-seqs {slots}: llama.cpp takes 1 to {MOST_SEQUENCES}")
    if settings.max_num_batched_tokens < slots:
        raise EngineError(
            f"--max-num-batched-tokens {settings.max_num_batched_tokens}: must be at least --max-num-seqs ({slots})"
        )
    own = header.train_context_tokens or MODERATE_TOKENS
    asked, pool = settings.max_model_len, settings.kv_cache_tokens
    if asked is not None and not 0 < asked <= own:
        raise EngineError(f"--max-model-len {asked}: this model takes 1 to {own}")
    if pool is None:
        length = asked or min(own, MODERATE_TOKENS)
        return MemoryPlan(length, slots, slots * length, shared=False)
    if pool < 1 or (asked is not None and asked > pool):
        raise EngineError(f"--kv-cache-tokens {pool}: must be at least --max-model-len ({asked or 1})")
    length = asked or min(own, pool)
    if slots * length <= pool:
        return MemoryPlan(length, slots, slots * length, shared=False)
    return MemoryPlan(length, slots, pool, shared=True)


UNKNOWN, CONTROL, EATS_LEFT, EATS_RIGHT = 1 << 0, 1 << 3, 1 << 7, 1 << 8
"""Of llama.cpp's attributes of tokens."""
BYTE_PAIR = 2
"""Llama.cpp's number for BPE vocabularies."""
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
REPLACEMENT = "\ufffd"


class Vocabulary:
    """The vocabulary of a model; keep the model alive as long as this."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._vocabulary = model.get_vocab()
        self.size: int = self._vocabulary.n_vocab
        self.adds_bos: bool = self._vocabulary.get_add_bos()
        self.bos: int = self._vocabulary.token_bos()
        self.eos: int = self._vocabulary.token_eos()
        self._pieces: dict[tuple[int, bool], bytes] = {}

    def move(self, model: Any) -> None:
        """Read it from another model, which has the same (`same_as`): the one before is about to be freed."""
        self._model, self._vocabulary = model, model.get_vocab()

    def same_as(self, other: Vocabulary) -> bool:
        """Whether each token stands for the same."""
        mine, theirs = (self.size, self.bos, self.eos), (other.size, other.bos, other.eos)
        return mine == theirs and all(
            self.piece(token, special=True) == other.piece(token, special=True) for token in range(self.size)
        )

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """The tokens of `text`. A BOS that the text brings along is not doubled."""
        # A lone surrogate (JSON allows "\ud83d") is no character and has no UTF-8 form.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        tokens: list[int] = self._vocabulary.tokenize(text, add_special, parse_special)
        if add_special and self.bos >= 0 and tokens[:2] == [self.bos, self.bos]:
            del tokens[0]
        return tokens

    def piece(self, token: int, *, special: bool) -> bytes:
        """The bytes of one token; those of a control token only with `special`."""
        piece = self._pieces.get((token, special))
        if piece is None:
            piece = self._pieces[token, special] = self._read_piece(token, special)
        return piece

    def text(self, tokens: Iterable[int], *, special: bool) -> str:
        """The text of tokens; what is no UTF-8 becomes U+FFFD."""
        return b"".join(self.piece(token, special=special) for token in tokens).decode("utf-8", "replace")

    def is_end(self, token: int) -> bool:
        """Whether the token ends an answer (EOS, end of turn, …)."""
        return bool(self._vocabulary.is_eog(token))

    @cached_property
    def ends(self) -> frozenset[int]:
        """All tokens that end an answer."""
        return frozenset(token for token in range(self.size) if self.is_end(token))

    def special_text(self, token: int) -> str:
        """How a special token is written, "" where there is none."""
        return "" if token < 0 else self.piece(token, special=True).decode("utf-8", "replace")

    def controls(self) -> dict[str, Control]:
        """The control tokens by their text."""
        attributes = ((token, self._vocabulary.get_attr(token)) for token in range(self.size))
        return {
            self.special_text(token): Control(token, bool(has & EATS_LEFT), bool(has & EATS_RIGHT))
            for token, has in attributes
            if has & (CONTROL | UNKNOWN)
        }

    def control_ids(self) -> set[int]:
        """The control tokens."""
        return {control.token_id for control in self.controls().values()}

    def longest_piece(self) -> int:
        """Bytes of the longest token."""
        return max(len(self._read_piece(token, False)) for token in range(self.size))

    def _read_piece(self, token: int, special: bool) -> bytes:
        if not 0 <= token < self.size:
            return b""
        shown: str = self._vocabulary.token_to_piece(token, 0, special)
        if REPLACEMENT not in shown:
            return shown.encode()
        try:
            entry: str = self._vocabulary.get_text(token)
        except UnicodeDecodeError:
            return shown.encode()
        byte = BYTE_TOKEN.match(entry)
        if byte is not None:
            return bytes([int(byte[1], 16)])
        if self._vocabulary.vocab_type == BYTE_PAIR:
            stand_ins = _stand_ins()
            if all(character in stand_ins for character in entry):
                return bytes(stand_ins[character] for character in entry)
        return shown.encode()


@cache
def _stand_ins() -> dict[str, int]:
    """GPT-2's printable character for each byte, the other way round.

    Source: `bytes_to_unicode` of https://github.com/openai/gpt-2/blob/master/src/encoder.py
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table


SENTENCE_PIECE = "llama"
"""What GGUF files call SentencePiece vocabularies; these may put a space before the text."""


class LlamaTokenizer:
    """Text to tokens and conversations to prompts, by the model's file."""

    def __init__(self, vocabulary: Vocabulary, header: GGUFHeader, path: Path, max_model_len: int) -> None:
        self.max_model_len = max_model_len
        self.vocabulary_size = vocabulary.size
        own = {SMOLLM2_FILE: SMOLLM2}.get(path.name)
        self.model_name = own or slug(header.text("general.name") or "") or path.stem
        self._vocabulary = vocabulary
        self._adds_space = header.text("tokenizer.ggml.model") == SENTENCE_PIECE and bool(
            header.metadata.get("tokenizer.ggml.add_space_prefix", True)
        )
        bos, eos = vocabulary.special_text(vocabulary.bos), vocabulary.special_text(vocabulary.eos)
        self.sampling_defaults = _recommended(header, path)
        self.special_tokens = {"bos_token": bos, "eos_token": eos}
        self.chat_template = header.text("tokenizer.chat_template")
        self.embedding_size = int(header.own("embedding_length") or 0)
        # Some templates leave BOS to the tokenizer.
        self._begins = bos if vocabulary.adds_bos else ""

    # Both look at every token, for tenths of a second.

    @cached_property
    def longest_piece(self) -> int:
        return self._vocabulary.longest_piece()

    @cached_property
    def _prompts(self) -> ChatPrompts:
        return ChatPrompts(self.chat_template, self._vocabulary.controls(), self.special_tokens, self._begins)

    @classmethod
    def load(cls, settings: EngineSettings) -> LlamaTokenizer:
        """The tokenizer for the settings. Raises EngineError."""
        path = model_path(settings.model, lambda what, share: None)
        header = read_header(path)
        plan = plan_memory(settings, header)
        return cls(Vocabulary(load_vocabulary(path)), header, path, plan.max_model_len)

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        return self._vocabulary.encode(text, add_special=add_special, parse_special=parse_special)

    def decode(self, token_ids: Sequence[int]) -> str:
        text = self._vocabulary.text(token_ids, special=False)
        return text.removeprefix(" ") if self._adds_space else text

    def chat(self, conversation: Conversation) -> Fragments:
        return self._prompts.fragments(conversation)


SAMPLING_KEYS = {
    "temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "penalty_repeat": "repetition_penalty",
}  # fmt: skip
"""GGUF's `general.sampling.…`, by our names."""


def _recommended(header: GGUFHeader, path: Path) -> Mapping[str, float]:
    """The sampling that the model's makers recommend."""
    found = {ours: header.metadata.get(f"general.sampling.{theirs}") for theirs, ours in SAMPLING_KEYS.items()}
    said = {name: float(value) for name, value in found.items() if isinstance(value, int | float)}
    return said or RECOMMENDED.get(path.name, {})


def slug(name: str) -> str:
    """A name as it stands in URLs and requests: "Gemma 3 270m" is "gemma-3-270m"."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


GREEDY_BELOW = 1e-5
"""Temperatures under this are 0, as in vLLM: dividing by them overflows."""
LIFTED = 1000.0
"""By how much the allowed tokens are moved above all others, which leaves their chances among each other."""
OF_FORM = 2 * LIFTED
"""The same of what the answer's form allows, where that is less than what it forbids: the form comes first."""
RANDOM_SEED = 0xFFFFFFFF
"""What llama.cpp takes for "a random seed", so that no draw's seed must be it."""
SEED_INSTEAD = 0x9E3779B9
ROW = 512


class Sampler:
    """One request's sampler. Keeps its counts of tokens over the request's life.

    `window`: how many tokens back penalties look; as many as a request may have. `ends`: the tokens that end an answer.
    `form`: what the answer must be.
    """

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], vocabulary_size: int, window: int, seed: int,
        ends: Callable[[], frozenset[int]] = frozenset, form: Form | None = None,
    ) -> None:  # fmt: skip
        self._params = params
        self._form = form
        self._seen = dict.fromkeys(prompt)
        self._vocabulary_size = vocabulary_size
        self._window = window
        self._seed = seed
        self._ends = ends
        self._made: list[int] = []
        self._greedy = params.temperature < GREEDY_BELOW
        self._guarded = bool(params.min_tokens or params.bad_words or form)
        self._penalised = params.repetition_penalty != 1.0 or params.frequency_penalty or params.presence_penalty
        self._chain = self._build({})

    def _build(self, biases: Mapping[int, float]) -> Any:
        """The chain as it stands after the tokens so far, with these biases behind the penalties."""
        params, chain = self._params, library().LlamaSampler()
        if params.logit_bias:
            chain.add_logit_bias(self._vocabulary_size, list(params.logit_bias.items()))
        if params.repetition_penalty != 1.0:
            chain.add_penalties(self._window, params.repetition_penalty, 0.0, 0.0)
            # How often a token was seen is all the same to it.
            for token in self._seen:
                chain.accept(token)
        if params.frequency_penalty or params.presence_penalty:
            chain.add_penalties(self._window, 1.0, params.frequency_penalty, params.presence_penalty)
        for token in self._made:
            chain.accept(token)
        if params.allowed_token_ids is not None:
            chain.add_logit_bias(self._vocabulary_size, [(token, LIFTED) for token in params.allowed_token_ids])
        if biases:
            chain.add_logit_bias(self._vocabulary_size, list(biases.items()))
        if self._greedy:
            chain.add_greedy()
        else:
            _narrow(chain, params)
        return chain

    @property
    def ended(self) -> bool:
        """Whether the answer's form is complete, so that nothing can follow."""
        return self._form is not None and self._form.ended

    def accept(self, token: int) -> None:
        """Count a token of the answer that was chosen elsewhere."""
        if self._form is not None:
            self._form.take(token)
        self._keep(token)

    def _keep(self, token: int) -> None:
        self._chain.accept(token)
        self._count(token)

    def _count(self, token: int) -> None:
        self._made.append(token)
        self._seen[token] = None

    def sample(self, context: Any, row: int) -> int:
        """Choose a token by the logits of the batch's token at `row`, and count it."""
        if self._greedy and not self._guarded:
            token = int(self._chain.sample(context, row))
            self._count(token)
            return token
        place = str(len(self._made))
        chain = self._build({}) if self._penalised else self._chain.clone()
        token = self._draw(chain, context, row, place)
        if self._guarded:
            forbidden = self._forbidden()
            if token in forbidden or not (self._form is None or self._form.take(token)):
                # A draw of its own: what is left has the chances that it would have had alone.
                token = self._draw_again(forbidden, context, row, place + " again")
        self._keep(token)
        return token

    def _draw_again(self, forbidden: set[int], context: Any, row: int, place: str) -> int:
        form, biases = self._form, dict.fromkeys(forbidden, -math.inf)
        if form is None:
            return self._draw(self._build(biases), context, row, place)
        allowed: Any = form.allowed()
        count = int(allowed.sum())
        if count < len(allowed) / 2:
            ids = allowed.nonzero()[0].tolist()
            # The form comes first: what else is forbidden may be all that it leaves.
            biases = dict.fromkeys([token for token in ids if token not in forbidden] or ids, OF_FORM)
        else:
            biases |= dict.fromkeys((~allowed).nonzero()[0].tolist(), -math.inf)
        token = next(iter(biases)) if count == 1 else self._draw(self._build(biases), context, row, place)
        form.take(token)
        return token

    def _draw(self, chain: Any, context: Any, row: int, place: str) -> int:
        if not self._greedy:
            chain.add_dist(_seed_at(self._seed, place))
        token = int(chain.sample(context, row))
        chain.close()
        return token

    def _forbidden(self) -> set[int]:
        """What may not come next: an end before `min_tokens`, or the last token of a bad word."""
        made, params = self._made, self._params
        found = {
            run[-1]
            for run in params.bad_words
            if run[:-1] == made[len(made) - len(run) + 1 :] and len(run) <= len(made) + 1
        }
        if len(made) < params.min_tokens:
            found.update(self._ends(), params.stop_token_ids)
        return found

    def close(self) -> None:
        """Free the chain."""
        self._chain.close()


def read_logprobs(logits: Sequence[float], chosen: int, best: int) -> tuple[float, list[tuple[int, float]]]:
    """The chosen token's natural-log probability, and the `best` most likely tokens with theirs, best first.

    `logits` as the model gave them, before any sampler.
    """
    # Here and not at the top: front-ends import this package's engines, and need no numpy.
    numpy: Any = importlib.import_module("numpy")
    values = numpy.fromiter(logits, numpy.float32, len(logits))
    greatest = values.max()
    normaliser = float(greatest) + float(numpy.log(numpy.exp(values - greatest).sum(dtype=numpy.float64)))
    tokens = _best_tokens(numpy, values, best) if best else []
    return float(values[chosen]) - normaliser, [(token, float(values[token]) - normaliser) for token in tokens]


def _best_tokens(numpy: Any, values: Any, best: int) -> list[int]:
    """The tokens of the greatest values, greatest first, lower numbers first among equals.

    The k best lie within the k rows whose maxima are greatest: a tenth of a partition's time.
    """
    best = min(best, len(values))
    padded = numpy.full(-(-len(values) // ROW) * ROW, -numpy.inf, numpy.float32)
    padded[: len(values)] = values
    maxima = padded.reshape(-1, ROW).max(axis=1)
    rows = numpy.argsort(-maxima, kind="stable")[:best]
    rows.sort()
    candidates = (rows[:, None] * ROW + numpy.arange(ROW)).ravel()
    order = numpy.argsort(-padded[candidates], kind="stable")[:best]
    return [int(token) for token in candidates[order]]


def _seed_at(seed: int, place: str) -> int:
    """The seed of the draw at one place of one request."""
    digest = blake2b(f"{seed}.{place}".encode(), digest_size=4).digest()
    made = int.from_bytes(digest, "little")
    return SEED_INSTEAD if made == RANDOM_SEED else made


def _narrow(chain: Any, params: SamplingParams) -> None:
    if params.top_k:
        chain.add_top_k(params.top_k)
    if params.top_p < 1.0:
        chain.add_top_p(params.top_p, 1)
    if params.min_p > 0.0:
        chain.add_min_p(params.min_p, 1)
    chain.add_temp(params.temperature)
