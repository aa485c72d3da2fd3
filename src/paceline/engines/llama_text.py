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

The draw at each position has random numbers of its own, made from the request's seed and the position and nothing else:
so another rank that goes on with a half-written answer draws what this one would have drawn. llama.cpp keeps one
generator a chain, which nothing can move on but drawing; so each draw gets a copy of the chain with a generator of its
own, in 10 us.

Cost, over 262,144 tokens on one thread: greedy 0.5 ms, top_k 0.5, min_p 0.7, all of them 1.0; plain
temperature 3.5 and top_p 4.5, as every token's probability must be computed. A row of a decoding batch
costs 14 ms, so nothing is gained by greedy sampling of our own.

Logits come out of cyllama as a list of floats, 5 ms, and 6 more as an array; the rest of the work on
log-probabilities is 1 ms. So they are read for requests that ask, and for no others.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

from msgspec import Struct

from paceline.core.requests import SamplingParams
from paceline.engines.base import EngineError, EngineSettings, Progress
from paceline.engines.chat import ChatTemplate, render_fallback
from paceline.engines.gguf import GGUFHeader, model_path, read_header

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

    def special_text(self, token: int) -> str:
        """How a special token is written, "" where there is none."""
        return "" if token < 0 else self.piece(token, special=True).decode("utf-8", "replace")

    def knows(self, marker: str) -> bool:
        """Whether `marker` is one token of this vocabulary."""
        tokens = self._vocabulary.tokenize(marker, False, True)
        return len(tokens) == 1 and self.special_text(tokens[0]) == marker

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
        self.model_name = slug(header.text("general.name") or "") or path.stem
        self._vocabulary = vocabulary
        self._adds_space = header.text("tokenizer.ggml.model") == SENTENCE_PIECE and bool(
            header.metadata.get("tokenizer.ggml.add_space_prefix", True)
        )
        self._bos = vocabulary.special_text(vocabulary.bos)
        source = header.text("tokenizer.chat_template")
        eos = vocabulary.special_text(vocabulary.eos)
        self._template = None if source is None else ChatTemplate(source, self._bos, eos)

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

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, object]], *, add_generation_prompt: bool = True
    ) -> str:
        bos = self._bos if self._vocabulary.adds_bos else ""
        if self._template is None:
            return render_fallback(messages, self._vocabulary.knows, bos, add_generation_prompt=add_generation_prompt)
        prompt = self._template.render(messages, add_generation_prompt=add_generation_prompt)
        # Some templates leave BOS to the tokenizer. The result is encoded without special tokens, so it goes here.
        return prompt if prompt.startswith(bos) else bos + prompt


def slug(name: str) -> str:
    """A name as it stands in URLs and requests: "Gemma 3 270m" is "gemma-3-270m"."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


GREEDY_BELOW = 1e-5
"""Temperatures under this are 0, as in vLLM: dividing by them overflows."""
RANDOM_SEED = 0xFFFFFFFF
"""What llama.cpp takes for "a random seed", so that no draw's seed must be it."""
SEED_INSTEAD = 0x9E3779B9
ROW = 512


class Sampler:
    """One request's sampler. Keeps its counts of tokens over the request's life.

    `window`: how many tokens back penalties look; as many as a request may have.
    """

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], vocabulary_size: int, window: int, seed: int
    ) -> None:
        chain = library().LlamaSampler()
        if params.logit_bias:
            chain.add_logit_bias(vocabulary_size, list(params.logit_bias.items()))
        if params.repetition_penalty != 1.0:
            chain.add_penalties(window, params.repetition_penalty, 0.0, 0.0)
            for token in prompt:
                chain.accept(token)
        if params.frequency_penalty or params.presence_penalty:
            chain.add_penalties(window, 1.0, params.frequency_penalty, params.presence_penalty)
        self._greedy = params.temperature < GREEDY_BELOW
        if self._greedy:
            chain.add_greedy()
        else:
            _narrow(chain, params)
        self._chain = chain
        self._seed = seed
        self._position = 0

    def accept(self, token: int) -> None:
        """Count a token of the answer that was chosen elsewhere."""
        self._chain.accept(token)
        self._position += 1

    def sample(self, context: Any, row: int) -> int:
        """Choose a token by the logits of the batch's token at `row`, and count it."""
        if self._greedy:
            return int(self._chain.sample(context, row))
        draw = self._chain.clone()
        draw.add_dist(_seed_at(self._seed, self._position))
        token = int(draw.sample(context, row))
        draw.close()
        self.accept(token)
        return token

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


def _seed_at(seed: int, position: int) -> int:
    """The seed of the draw at one position of one request."""
    digest = blake2b(f"{seed}.{position}".encode(), digest_size=4).digest()
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
