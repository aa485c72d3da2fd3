"""The `moe` engine's weights: made from a seed, or mapped from a file that may change under the running engine.

Every rank has all the weights within reach and computes with its own experts only: after a change of the group any
rank can be any expert's owner at once, and nothing is moved.

A file is mapped read-only and shared. Whoever rewrites it in place, `write_weights` or a trainer, changes the
weights of all ranks of the machine at once, without a word to them; between steps, or the step under way computes
with a mixture.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from paceline.engines.moe_options import FLOAT_BYTES, MoeConfig, MoeOptions, check_weights
from paceline.engines.moe_tokenizer import EOS, VOCABULARY

Floats = NDArray[np.float32]
Weights = dict[str, Floats]

SHARPNESS = {"embedding": 0.5, "query": 2.0, "key": 2.0, "output": 2.0, "head": 2.0}
"""What is larger or smaller than that: attention counts for more, so that all of the context shows in the text, and
a temperature of 1 prefers what greedy sampling takes."""
UNREADABLE_BIAS = -30.0
END_BIAS = -1.0
READABLE = b"abcdefghijklmnopqrstuvwxyz ,."


def load_weights(options: MoeOptions) -> Weights:
    """The tensors by name, as `MoeConfig.shapes` has them. Raises EngineError where the file cannot be used."""
    if options.weights is None:
        return _by_name(options.config, make_weights(options.config, options.weights_seed))
    check_weights(options.weights, options.config)
    mapped = np.memmap(options.weights, np.float32, "r")
    # A plain array over the same memory: every slice of a memmap costs a call into Python.
    return _by_name(options.config, np.asarray(mapped))


def make_weights(config: MoeConfig, seed: int) -> Floats:
    """All weights as one array, in the order of a weights file. The same on every machine.

    Uniform and scaled so that every sum over inputs has variance 1: exact operations only, where a normal
    distribution would bring in logarithms that differ between machines in the last bit.
    """
    flat = np.random.Generator(np.random.PCG64(seed)).random(config.parameters, np.float32)
    flat -= np.float32(0.5)
    flat *= np.float32(2.0)
    for name, tensor in _by_name(config, flat).items():
        inputs = 1 if tensor.ndim == 1 or name == "embedding" else tensor.shape[-2]
        tensor *= np.float32(SHARPNESS.get(name.rpartition(".")[2], 1.0) * math.sqrt(3.0 / inputs))
        if name == "bias":
            # Answers that people can read: letters and spaces, and the end now and then.
            tensor[:] = UNREADABLE_BIAS
            tensor[list(READABLE)] = 0.0
            tensor[EOS] = END_BIAS
    return flat


def write_weights(path: str | os.PathLike[str], config: MoeConfig, seed: int) -> None:
    """Write the weights of a seed into a file, in place: whoever has it mapped has the new weights from now on.

    The file is made where there is none; one that exists keeps its inode, and is never emptied in between.
    """
    weights = make_weights(config, seed)
    descriptor = os.open(Path(path), os.O_RDWR | os.O_CREAT, 0o644)
    with open(descriptor, "r+b") as file:
        os.ftruncate(descriptor, config.parameters * FLOAT_BYTES)
        file.write(weights.data)


def _by_name(config: MoeConfig, flat: Floats) -> Weights:
    tensors: Weights = {}
    begin = 0
    for name, shape in config.shapes:
        end = begin + math.prod(shape)
        tensors[name] = flat[begin:end].reshape(shape)
        begin = end
    assert tensors["bias"].size == VOCABULARY
    return tensors
