"""GuideLLM and AIPerf, as `use_load_generators.py guidellm` and `… aiperf`: a short run each, and what it counted."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from trying import MODEL, URL, tried

REQUESTS, TOKENS = 6, 8
folder, server = Path(tempfile.mkdtemp()), URL.removesuffix("/v1")


def run(program: str, *arguments: str) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name(program)), *arguments], capture_output=True, text=True, check=False,
        timeout=150, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]


def guidellm() -> None:
    lines = [{"prompt": "Name a colour.", "output_tokens_count": TOKENS}] * REQUESTS
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for endpoint in ("/v1/chat/completions", "/v1/completions"):
        run("guidellm", "run", "--backend", f"kind=openai_http,target={server},model={MODEL},request_format={endpoint}",
            "--profile", "kind=concurrent,streams=2", "--constraint", f"kind=max_requests,count={REQUESTS}",
            "--data", f"kind=json_file,path={folder}/data.jsonl", "--output", f"kind=json,path={folder}/out.json",
            "--disable-progress")  # fmt: skip
        (benchmark,) = json.loads((folder / "out.json").read_text())["benchmarks"]
        totals = benchmark["metrics"]["request_totals"]
        assert (totals["successful"], totals["errored"]) == (REQUESTS, 0), totals
        made = benchmark["metrics"]["output_token_count"]["successful"]["mean"]
        assert made == TOKENS, made
        assert benchmark["metrics"]["time_to_first_token_ms"]["successful"]["mean"] > 0
        tried(f"{REQUESTS} requests to {endpoint}, streamed: none failed, {TOKENS} tokens each")


def aiperf() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    # It wants a tokenizer to count prompts with: bytes will do.
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "prompts.jsonl").write_text('{"text": "Name a colour."}\n{"text": "Name a fruit."}\n')
    for endpoint in ("chat", "completions"):
        out = folder / endpoint
        run("aiperf", "profile", "-m", MODEL, "--url", server, "--endpoint-type", endpoint, "--streaming",
            "--tokenizer", str(folder), "--use-server-token-count", "--input-file", str(folder / "prompts.jsonl"),
            "--custom-dataset-type", "single_turn", "--request-count", str(REQUESTS), "--concurrency", "2",
            "--extra-inputs", f"max_tokens:{TOKENS}", "--extra-inputs", "ignore_eos:true",
            "--output-artifact-dir", str(out), "--ui", "none")  # fmt: skip
        (found,) = out.rglob("profile_export_aiperf.json")
        figures = json.loads(found.read_text())
        assert figures["request_count"]["avg"] == REQUESTS, figures["request_count"]
        assert not figures.get("error_request_count", {}).get("avg"), figures["error_request_count"]
        assert figures["output_sequence_length"]["avg"] == TOKENS, figures["output_sequence_length"]
        assert 0 < figures["time_to_first_token"]["avg"] < figures["request_latency"]["avg"]
        tried(f"{REQUESTS} requests to {endpoint}, streamed: none failed, {TOKENS} tokens each")


{"guidellm": guidellm, "aiperf": aiperf}[sys.argv[1]]()
