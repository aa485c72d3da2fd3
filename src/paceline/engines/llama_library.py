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
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from pathlib import Path
from typing import Any

from paceline.engines.base import EngineError, Progress

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
