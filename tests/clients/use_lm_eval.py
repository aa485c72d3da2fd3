"""lm-eval: multiple choice (log-probabilities of a prompt's end) and generation, with the tokenizer of the server."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import lm_eval
from trying import MODEL, URL, tried

folder = Path(tempfile.mkdtemp())
ASKED = [
    {"question": "The capital of France is", "choices": [" Paris", " banana", " seventeen"], "answer": 0},
    {"question": "Two plus two is", "choices": [" purple", " four"], "answer": 1},
]
(folder / "asked.jsonl").write_text("".join(json.dumps(one) + "\n" for one in ASKED))
BASE = {
    "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "asked.jsonl")}},
    "test_split": "test", "doc_to_text": "{{question}}",
}  # fmt: skip
CHOOSE = {
    "task": "choose", "output_type": "multiple_choice", "doc_to_target": "{{answer}}", "doc_to_choice": "{{choices}}",
    "metric_list": [{"metric": "acc"}],
}  # fmt: skip
WRITE = {
    "task": "write", "output_type": "generate_until", "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}  # fmt: skip


def evaluate(model: str, endpoint: str, *tasks: dict[str, object], **more: object) -> dict[str, object]:
    return lm_eval.simple_evaluate(
        model, model_args={"model": MODEL, "base_url": f"{URL}/{endpoint}", "tokenizer_backend": "remote"},
        tasks=[BASE | task for task in tasks], log_samples=True, **more,
    )  # fmt: skip


made = evaluate("local-completions", "completions", CHOOSE, WRITE)
assert made["results"]["choose"]["acc,none"] == 1.0, made["results"]
tried("local-completions: multiple choice, both right")
assert all(sample["resps"][0][0].strip() for sample in made["samples"]["write"])
tried("local-completions: generation")
made = evaluate("local-chat-completions", "chat/completions", WRITE, apply_chat_template=True)
assert all(sample["resps"][0][0].strip() for sample in made["samples"]["write"])
tried("local-chat-completions: generation")
