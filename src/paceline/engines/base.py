"""The interface between a rank and an engine: add, abort, step, dummy step, load, and for lockstep a group.

An engine is driven by one thread and knows nothing of sockets, front-ends or waves. The rank process
calls `add` and `abort` between steps and `step` while there is work. Everything an engine needs for
itself (KV memory, batching, sampling, turning tokens into text) is inside it.

`create` is called in the rank process and may take minutes; `tokenizer` is called in every front-end
process and must be light.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from msgspec import Struct

from paceline.core.load import Load
from paceline.core.rank.events import KvChange, StepOutput
from paceline.core.requests import SamplingParams

if TYPE_CHECKING:
    from paceline.engines.chat import Conversation
    from paceline.engines.group import RankGroup  # imports numpy, which a front-end does without

Source = Mapping[str, Any]
"""Where weights come from (`engines/weights.py`)."""

Progress = Callable[[str, float], None]
"""Called with what is being done ("loading model") and the share done, 0.0 to 1.0."""


__all__ = [
    "Engine",
    "EngineError",
    "EngineRequest",
    "EngineSettings",
    "Progress",
    "StepOutput",
    "StepResult",
    "Tokenizer",
]


class EngineSettings(Struct, frozen=True):
    """What an engine is made from.

    `model`: a path or a name, None for the engine's default. `max_model_len`: tokens of prompt and
    answer together, None for the engine's choice (the model's own, or less where memory for it is large).
    `max_num_seqs`: requests that run at once. `max_num_batched_tokens`: tokens computed in a step, at least
    `max_num_seqs`. `kv_cache_tokens`: tokens of KV memory, None
    for `max_num_seqs` requests of moderate length. `threads`: compute threads, None for this
    rank's share of the cores. `options`: `--engine-option KEY=VALUE`, for the engine to parse. `place`: which of its
    node's `places` the rank has, from 0: for devices and cores. `arguments`: flags of the engine's own, as they were
    typed (`Engine.takes_arguments`). `learned`: what `Engine.prepare` found out, for ranks and front-ends to read.
    `host`: this node's address for other ranks, a number, for groups of the engine's own. `task`: `generate`, or
    `embed` where its `supports` has `embeddings`: then a request's one output is the embedding of its prompt, of as
    many numbers as its tokenizer says in `embedding_size`.
    """

    model: str | None = None
    rank: int = 0
    dp_size: int = 1
    max_model_len: int | None = None
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 512
    kv_cache_tokens: int | None = None
    threads: int | None = None
    seed: int = 0
    options: Mapping[str, str] = {}
    place: int = 0
    places: int = 1
    arguments: Sequence[str] = ()
    learned: Mapping[str, Any] = {}
    host: str = "127.0.0.1"
    task: str = "generate"


class EngineError(Exception):
    """The engine cannot be made or go on. Its text is one line for the user, naming what is wrong."""


class EngineRequest(Struct, frozen=True, gc=False):
    """One request as an engine sees it. `key`: the rank's own id for it, unique in its life.

    `made_token_ids`: the answer's first tokens, already with its client (`Engine.resumes`).
    """

    key: int
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    priority: int = 0
    made_token_ids: Sequence[int] = ()


class StepResult(Struct, frozen=True, gc=False):
    """One step's outputs, and what it computed: prompt tokens and answer tokens."""

    outputs: list[StepOutput]
    prefilled_tokens: int = 0
    decoded_tokens: int = 0


class Tokenizer(Protocol):
    """Text to tokens, in a front-end."""

    max_model_len: int
    """Tokens of prompt and answer together that one request may have."""

    @property
    def longest_piece(self) -> int:
        """Bytes of UTF-8 that one token stands for at most: so a long text is known not to fit before it is read."""

    vocabulary_size: int
    model_name: str
    """What `/v1/models` shows where `--served-model-name` is not set."""

    sampling_defaults: Mapping[str, float]
    """What the model's makers recommend for a request that says nothing: `temperature` and so on."""

    chat_template: str | None
    """The source of its chat template, which says how it writes calls of tools."""

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """The tokens of `text`; with `add_special`, those the model wants around it (BOS)."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`, special tokens left out."""

    def chat(self, conversation: Conversation) -> Sequence[str | int]:
        """One prompt from a conversation: text and control tokens in order; raises ValueError where it is none.

        Nothing of the text is a control token: encode it with `add_special=False`.
        """


class Engine(ABC):
    """One rank's engine. Not thread-safe: one thread makes it and drives it.

    `lockstep`: whether its steps contain collectives, so that all ranks must step together, in waves.
    `resumes`: whether it goes on with an answer that a rank which has died had begun: a request with `made_token_ids`
    samples its next token as the rank that made those would have, they count against `max_tokens`, and no text is
    shown twice. Without it such a request ends with an error, unless its client has nothing of it yet.
    `joins_once`: whether its collectives cannot be formed anew: then it loads in its one `join`, and where a member has
    died all ranks start again.
    `takes_arguments`: whether flags of `paceline serve` that Paceline does not know are the engine's.
    `step_timeout_s`: after so long without an end of a step its rank is ended and started again, where
    `--step-timeout` does not say; 0 for never. `progress`: an engine whose steps may last longer counts this up in
    them, and does not hang as long as it changes.
    `supports`: the sampling that not all engines have, by its field in `SamplingParams`; a request that asks for
    another is refused by name.
    """

    lockstep: ClassVar[bool] = False
    resumes: ClassVar[bool] = False
    joins_once: ClassVar[bool] = False
    takes_arguments: ClassVar[bool] = False
    supports: ClassVar[frozenset[str]] = frozenset()
    step_timeout_s: ClassVar[float] = 0.0
    progress: int = 0

    @classmethod
    @abstractmethod
    def create(cls, settings: EngineSettings, progress: Progress) -> Engine:
        """Load the model and make the engine. Raises EngineError with one line for the user."""

    @classmethod
    @abstractmethod
    def tokenizer(cls, settings: EngineSettings) -> Tokenizer:
        """The tokenizer for the same settings. Raises EngineError."""

    @classmethod
    def check(cls, settings: EngineSettings, progress: Progress) -> None:
        """Called once before any process starts: fail early, put the model file together.

        Raises EngineError where the settings cannot work (a missing package or file).
        """
        return

    @classmethod
    def prepare(cls, settings: EngineSettings, progress: Progress) -> EngineSettings:
        """The settings that ranks and front-ends of this node are made from: checked, and with what is to be known
        before any of them starts. Raises EngineError, and ConfigError for a flag of the engine's own.
        """
        cls.check(settings, progress)
        return settings

    @classmethod
    def steps_together(cls, settings: EngineSettings) -> bool:
        """Whether ranks made from these prepared settings run in lockstep: for some engines the model decides."""
        return cls.lockstep

    @classmethod
    def devices(cls, settings: EngineSettings) -> int:
        """How many accelerators a rank made from these prepared settings computes on."""
        return 0

    @classmethod
    def keeps_prefixes(cls, settings: EngineSettings) -> bool:
        """Whether a prompt that begins as an earlier one did is computed from where they differ: then it is worth
        waiting for the rank that has had that one.
        """
        return False

    @classmethod
    def adapters(cls, settings: EngineSettings) -> Sequence[str]:
        """The names of what clients may ask for beside the model itself: its adapters (LoRA)."""
        return ()

    @classmethod
    def arguments_help(cls) -> str:
        """What `--engine-help` prints."""
        return "this engine has no flags of its own; --engine-option KEY=VALUE sets its options"

    @abstractmethod
    def add(self, request: EngineRequest) -> None:
        """Queue a request. It waits until it fits and is never dropped.

        A request that can never fit ends with a StepOutput whose finish_reason is "error" in the next
        step.
        """

    @abstractmethod
    def abort(self, key: int) -> None:
        """Forget a request and free its memory at once. Gives no output; unknown keys are ignored."""

    @abstractmethod
    def has_work(self) -> bool:
        """Whether `step` would do something."""

    @abstractmethod
    def step(self) -> StepResult:
        """Compute one batch. Only called while `has_work`."""

    def join(self, group: RankGroup) -> None:
        """The ranks that the next steps run their collectives among. Lockstep engines only.

        Called before the first step, and again between steps whenever the group has changed. A step that raises
        `EpochEnded` is as if it had not been begun: it is made anew in the next group. Where ranks join once, this is
        called once in a life, and may raise it, too.
        """
        return

    def limit_prefill(self, tokens: int | None) -> None:
        """Compute at most so many prompt tokens in the next step; None: as many as it can. Lockstep engines only.

        Called before each step, so that no rank holds the others up with a long prompt. With 0 a step only decodes,
        or does no more than take part in the others'. An engine that says what it could compute
        (`Load.startable_tokens`) and what it decodes (`Load.decoding`) gets a limit that follows them.
        """
        return

    def dummy_step(self) -> None:
        """Take part in the others' collectives with nothing of one's own. Lockstep engines only."""
        return

    @abstractmethod
    def load(self) -> Load:
        """What is queued now. The rates and `finished` may be left 0: the rank fills them in.

        `slots` is how many requests may be here at once, 0 for any number: where it is left at 1, the next request
        comes when the one before has ended.
        """

    def kv_events(self) -> KvChange | None:
        """What it holds the KV of that it did not when it was last asked, and what no more: names of blocks of prompts
        (`core/blocks.py`). None where it does not say: then what was sent to it is believed to be there.
        """
        return None

    def stage_weights(self, source: Source) -> list[StepOutput]:
        """Make other weights ready beside those that are served, while nothing is stepped: read, checked, loaded, as
        far as memory allows. Returns what steps that were still under way have made. Raises EngineError where they
        cannot be used; then all is as it was.
        """
        raise EngineError("this engine cannot be given other weights")

    def update_weights(self, source: Source, keep_kv: bool) -> None:
        """Compute with these weights from here on: the ones made ready, or where none were, from the source. What was
        computed for prompts that have ended goes, and of requests under way, too, where not `keep_kv`. Raises
        EngineError; then the rank ends, and starts again.
        """
        raise EngineError("this engine cannot be given other weights")

    def call(self, method: str, arguments: Mapping[str, Any]) -> Any:
        """Do something beside serving, between two steps; returns what JSON can say. Raises EngineError, and whatever
        goes wrong.
        """
        raise EngineError(f"this engine has no {method!r}")

    def close(self) -> None:
        """Free what the engine holds. Called once, last."""
        return
