"""Writes two tiny models with random weights, as a hub would have them: `python tests/vllm/make_models.py FOLDER`.

`dense`: a Qwen2. `moe`: a Qwen3MoE with four experts. Both have a byte-level BPE tokenizer of 512 entries, trained on
this file. Runs in vLLM's environment (transformers, tokenizers, torch); with the same seed the weights are the same.
"""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCABULARY = 512
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    # Large enough that one token is clearly the likeliest: the greedy text must not hang on rounding.
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator([Path(__file__).read_text()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<end>", eos_token="<end>")


def make(folder: Path) -> None:
    torch.manual_seed(0)
    dense = Qwen2ForCausalLM(Qwen2Config(intermediate_size=128, **SHAPE))
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32}
    moe = Qwen3MoeForCausalLM(Qwen3MoeConfig(intermediate_size=128, **experts, **SHAPE))
    for name, model in (("dense", dense), ("moe", moe)):
        model.to(torch.bfloat16).save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
