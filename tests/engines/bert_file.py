"""A small encoder as a GGUF file, its weights from a seed, and the same in NumPy: BERT as llama.cpp knows it."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

SIZE, HEADS, INNER, LAYERS, CONTEXT, EPSILON = 32, 2, 64, 2, 32, 1e-12
_KNOWN = ("the", "a", "cat", "dog", "sits", "runs", "on", "mat")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"\u2581{word}" for word in _KNOWN)]
KINDS: dict[type, tuple[int, str]] = {int: (4, "<I"), float: (6, "<f"), bool: (7, "<?")}
Weights = dict[str, Any]


def weights_of(seed: int) -> Weights:
    """By llama.cpp's names."""
    draw = np.random.default_rng(seed)

    def linear(name: str, rows: int, columns: int) -> Weights:
        return {f"{name}.weight": draw.normal(0, 0.3, (rows, columns)), f"{name}.bias": draw.normal(0, 0.3, rows)}

    def norm(name: str) -> Weights:
        return {f"{name}.weight": draw.normal(1, 0.1, SIZE), f"{name}.bias": draw.normal(0, 0.1, SIZE)}

    shapes = {"token_embd": len(WORDS), "token_types": 2, "position_embd": CONTEXT}
    made: Weights = {f"{name}.weight": draw.normal(0, 1, (rows, SIZE)) for name, rows in shapes.items()}
    made |= norm("token_embd_norm")
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            made |= linear(block + name, SIZE, SIZE)
        made |= norm(block + "attn_output_norm") | norm(block + "layer_output_norm")
        made |= linear(block + "ffn_up", INNER, SIZE) | linear(block + "ffn_down", SIZE, INNER)
    return {name: value.astype(np.float32) for name, value in made.items()}


def tokens_of(weights: Weights, ids: list[int]) -> Any:
    """What the encoder makes of each token, one a row."""

    def norm(name: str, rows: Any) -> Any:
        spread = np.sqrt(rows.var(-1, keepdims=True) + EPSILON)
        return (rows - rows.mean(-1, keepdims=True)) / spread * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(name: str, rows: Any) -> Any:
        return rows @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    rows = weights["token_embd.weight"][ids] + weights["token_types.weight"][0]
    rows = norm("token_embd_norm", rows + weights["position_embd.weight"][: len(ids)])
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        parts = [linear(f"{block}attn_{name}", rows).reshape(len(ids), HEADS, -1) for name in ("q", "k", "v")]
        parts = [part.transpose(1, 0, 2) for part in parts]
        scores = parts[0] @ parts[1].transpose(0, 2, 1) / np.sqrt(SIZE / HEADS)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = ((shares / shares.sum(-1, keepdims=True)) @ parts[2]).transpose(1, 0, 2).reshape(len(ids), -1)
        rows = norm(block + "attn_output_norm", rows + linear(block + "attn_output", mixed))
        inner = linear(block + "ffn_up", rows)
        inner = 0.5 * inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
        rows = norm(block + "layer_output_norm", rows + linear(block + "ffn_down", inner))
    return rows


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _entry(key: str, value: Any) -> bytes:
    if isinstance(value, str):
        return _text(key) + struct.pack("<I", 8) + _text(value)
    if isinstance(value, list):
        items = [_text(one) if isinstance(one, str) else struct.pack("<i", one) for one in value]
        kind = 8 if isinstance(value[0], str) else 5
        return _text(key) + struct.pack("<IIQ", 9, kind, len(value)) + b"".join(items)
    kind, code = KINDS[type(value)]
    return _text(key) + struct.pack("<I", kind) + struct.pack(code, value)


def write_bert(path: Path, weights: Weights, pooling: int) -> None:
    metadata: Mapping[str, Any] = {
        "general.architecture": "bert", "bert.block_count": LAYERS, "bert.context_length": CONTEXT,
        "bert.embedding_length": SIZE, "bert.feed_forward_length": INNER, "bert.attention.head_count": HEADS,
        "bert.attention.layer_norm_epsilon": EPSILON, "bert.attention.causal": False, "bert.pooling_type": pooling,
        "tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": WORDS, "tokenizer.ggml.token_type_count": 2,
        "tokenizer.ggml.token_type": [3, 2, 3, 3] + [1] * (len(WORDS) - 4), "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.cls_token_id": 2, "tokenizer.ggml.seperator_token_id": 3, "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.mask_token_id": 1,
    }  # fmt: skip
    entries = b"".join(_entry(key, value) for key, value in metadata.items())
    head, data = b"GGUF" + struct.pack("<IQQ", 3, len(weights), len(metadata)) + entries, b""
    for name, value in weights.items():
        shape = value.shape[::-1]
        head += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, len(data))
        data += value.tobytes() + bytes(-value.nbytes % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
