"""What the engine calls in vLLM is there, takes what it is given, in the versions that are known.

The default version runs in `test_engine.py`; of the newest there is no build for CPUs, and its sources are read. What
is called is in `engines/vllm.py` alone, but for flags (`vllm_flags.py`) and what a worker is told (`vllm_worker.py`).
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.vllm import environment

ROOT = Path(__file__).resolve().parents[2]
CALLS = [
    # file, class or nothing, function, arguments by position (without self), arguments by name
    ("engine/arg_utils.py", "EngineArgs", "create_engine_config", 0, ()),
    ("engine/arg_utils.py", "EngineArgs", "from_cli_args", 1, ()),
    ("engine/arg_utils.py", "EngineArgs", "add_cli_args", 1, ()),
    ("v1/engine/core.py", "EngineCore", "__init__", 2, ("log_stats",)),
    ("v1/engine/core.py", "EngineCore", "preprocess_add_request", 1, ()),
    ("v1/engine/core.py", "EngineCore", "add_request", 2, ()),
    ("v1/engine/core.py", "EngineCore", "abort_requests", 1, ()),
    ("v1/engine/core.py", "EngineCore", "post_step", 0, ("model_executed",)),
    ("v1/engine/core.py", "EngineCore", "execute_dummy_batch", 0, ()),
    ("v1/engine/core.py", "EngineCore", "get_supported_tasks", 0, ()),
    ("v1/engine/core.py", "EngineCore", "reset_prefix_cache", 1, ()),
    ("v1/engine/core.py", "EngineCore", "collective_rpc", 3, ("kwargs",)),
    ("v1/engine/core.py", "EngineCore", "shutdown", 0, ()),
    ("v1/core/sched/scheduler.py", "Scheduler", "schedule", 0, ()),
    ("v1/core/sched/scheduler.py", "Scheduler", "update_from_output", 2, ()),
    ("v1/core/sched/scheduler.py", "Scheduler", "reset_prefix_cache", 1, ()),
    ("v1/engine/input_processor.py", "InputProcessor", "__init__", 2, ()),
    ("v1/engine/input_processor.py", "InputProcessor", "process_inputs", 4, ("priority", "lora_request")),
    ("v1/engine/detokenizer.py", "IncrementalDetokenizer", "from_new_request", 2, ()),
    ("v1/engine/detokenizer.py", "IncrementalDetokenizer", "update", 2, ()),
    ("v1/engine/detokenizer.py", "IncrementalDetokenizer", "num_output_tokens", 0, ()),
    ("v1/engine/detokenizer.py", "IncrementalDetokenizer", "get_next_output_text", 2, ()),
    ("v1/request.py", "Request", "from_engine_core_request", 2, ()),
    ("v1/request.py", "Request", "append_output_token_ids", 1, ()),
    ("v1/structured_output/__init__.py", "StructuredOutputManager", "_create_grammar", 1, ()),
    ("v1/worker/gpu_worker.py", "Worker", "reload_weights", 0, ("weights_path",)),
    ("v1/worker/gpu_worker.py", "Worker", "init_weight_transfer_engine", 0, ("init_info",)),
    ("v1/worker/gpu_worker.py", "Worker", "start_weight_update", 0, ()),
    ("v1/worker/gpu_worker.py", "Worker", "update_weights", 0, ("update_info",)),
    ("v1/worker/gpu_worker.py", "Worker", "finish_weight_update", 0, ()),
    ("v1/worker/gpu_model_runner.py", "GPUModelRunner", "_update_states", 1, ()),
    ("v1/worker/gpu_model_runner.py", "GPUModelRunner", "reload_weights", 0, ("weights_path",)),
    ("renderers/registry.py", "", "renderer_from_config", 1, ()),
]
SAID = {
    "v1/engine/core.py": (
        "self.step_fn = ", "self.batch_queue", "self.structured_output_manager", "self.model_executor",
    ),
    "v1/core/sched/scheduler.py": (
        "self.max_num_scheduled_tokens", "self.kv_cache_manager", "self.waiting", "self.running",
    ),
    "v1/worker/gpu_model_runner.py": ("CachedRequestState(",),
    "v1/engine/__init__.py": ("new_token_ids", "new_logprobs", "new_prompt_logprobs_tensors", "prefill_stats"),
}  # fmt: skip


def sources(version: str) -> Path:
    if version == environment.NEWEST:
        return environment.sources_of_newest()
    return environment.packages_of(environment.environment_of(version)) / "vllm"


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def functions(root: Path, file: str, owner: str, name: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """By this name in the class, or in those that it derives from in the same file; of a class's own alone."""
    body = tree(root / file).body
    if owner:
        classes = {one.name: one for one in body if isinstance(one, ast.ClassDef)}
        lines = [classes[owner]]
        lines += [classes[base.id] for base in lines[0].bases if isinstance(base, ast.Name) and base.id in classes]
        body = [node for line in lines for node in line.body]
    return [one for one in body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef) and one.name == name]


@pytest.mark.parametrize("version", [environment.DEFAULT_VERSION, environment.NEWEST])
@pytest.mark.parametrize(
    ("file", "owner", "name", "count", "named"), CALLS, ids=[f"{one[1]}.{one[2]}" for one in CALLS]
)
def test_what_is_called_takes_what_it_is_given(
    version: str, file: str, owner: str, name: str, count: int, named: tuple[str, ...]
) -> None:
    found = functions(sources(version), file, owner, name)
    assert found, f"{owner}.{name} is not in {file} of {version}"
    given = found[0].args
    static = any(isinstance(one, ast.Name) and one.id == "staticmethod" for one in found[0].decorator_list)
    positional = [one.arg for one in (*given.posonlyargs, *given.args)][bool(owner) and not static :]
    assert given.vararg or len(positional) >= count
    assert given.kwarg or set(named) <= {*positional, *(one.arg for one in given.kwonlyargs)}
    required = positional[: len(positional) - len(given.defaults)][count:]
    assert set(required) <= set(named)


@pytest.mark.parametrize("version", [environment.DEFAULT_VERSION, environment.NEWEST])
@pytest.mark.parametrize("file", SAID)
def test_what_is_read_is_there(version: str, file: str) -> None:
    text = (sources(version) / file).read_text(encoding="utf-8")
    assert [what for what in SAID[file] if what not in text] == []


def test_nothing_else_of_the_engine_imports_vllm() -> None:
    found = set()
    for path in (ROOT / "src" / "paceline").rglob("*.py"):
        for node in ast.walk(tree(path)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [one.name for one in node.names] if isinstance(node, ast.Import) else []
            if any(name.split(".")[0] == "vllm" for name in names):
                found.add(path.name)
    assert found == {"vllm.py", "vllm_flags.py", "vllm_tokenizer.py"}
