"""What the `moe` engine can be told: the sizes of its model, where the weights come from, how long a step lasts.

No NumPy in here: a front-end reads the options too, for the tokenizer and its limits.
"""

from __future__ import annotations

import math
from pathlib import Path

from msgspec import Struct

from paceline.engines.base import EngineError, EngineSettings
from paceline.engines.moe_tokenizer import VOCABULARY

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
