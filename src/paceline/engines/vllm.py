"""vLLM's engine in a rank: `paceline serve MODEL --engine vllm`. All calls into vLLM are here (its flags and its
workers have files of their own).

The rank drives vLLM's `EngineCore`, scheduler and executor in its own process: no sockets, no API server, no
coordinator of vLLM's. vLLM's input processor checks a request and fills in what the model wants (stop tokens of
`generation_config.json`, a grammar's back end); its incremental detokenizer makes the text and finds stop strings, so
that an answer is what `vllm serve` would say.

*An answer that another rank has begun.* The made tokens enter as output tokens, as those of a request that was
pre-empted: the scheduler computes them with the prompt, and they count against `max_tokens`. The detokenizer is shown
them first; what it says of them is with the client already. A grammar takes them when it has been compiled. What a
worker keeps of a request is made in `vllm_worker.py`.

*In lockstep*, with a model whose experts the ranks share, the waves are ours and the collectives inside a step vLLM's.
A step in which vLLM's scheduler found nothing to compute is a dummy step, or the others would wait for it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec
from msgspec.structs import replace

from paceline.core.load import Load
from paceline.core.rank.events import StepOutput
from paceline.core.requests import FinishReason, PositionLogprobs, SamplingParams, TokenLogprob
from paceline.engines.base import (
    Engine,
    EngineError,
    EngineRequest,
    EngineSettings,
    Progress,
    Source,
    StepResult,
    Tokenizer,
)  # fmt: skip
from paceline.engines.group import EpochEnded, RankGroup
from paceline.engines.hf import HfTokenizer
from paceline.engines.scheduler import why_never
from paceline.engines.text import AnswerLengths
from paceline.engines.vllm_flags import ask, engine_arguments, flags_help
from paceline.engines.vllm_process import (
    BIND,
    about_of,
    environment,
    meeting_place,
    quieten,
    remove_when_ended,
    shared_memory,
    track_own_memory,
)  # fmt: skip
from paceline.engines.vllm_tokenizer import RemoteTokenizer, tokenizer_process
from paceline.engines.vllm_worker import MADE
from paceline.engines.weights import Folder, Staged, kind_of
from paceline.log import defect

logger = logging.getLogger("paceline.rank")

FINISHED: dict[str, FinishReason] = {
    "stop": "stop", "length": "length", "abort": "abort", "error": "error", "repetition": "stop",
}  # fmt: skip


class VllmEngine(Engine):
    """One rank's vLLM."""

    resumes: ClassVar[bool] = True
    joins_once: ClassVar[bool] = True
    step_timeout_s: ClassVar[float] = 300.0
    supports: ClassVar[frozenset[str]] = frozenset({
        "min_tokens", "bad_words", "allowed_token_ids", "prompt_logprobs", "structured_outputs",
    })  # fmt: skip
    takes_arguments: ClassVar[bool] = True

    @classmethod
    def prepare(cls, settings: EngineSettings, progress: Progress) -> EngineSettings:
        progress("asking vLLM about the model", 0.0)
        if settings.kv_cache_tokens is not None:
            raise EngineError("--kv-cache-tokens: vLLM has --num-gpu-blocks-override and --kv-cache-memory-bytes")
        arguments = [*([settings.model] if settings.model else []), *settings.arguments, f"--seed={settings.seed}"]
        if settings.max_model_len is not None:
            arguments.append(f"--max-model-len={settings.max_model_len}")
        about = ask(arguments)
        if not Path(about.tokenizer, "tokenizer.json").is_file():
            path = tokenizer_process(about.tokenizer, about.tokenizer_options)
            about = replace(about, tokenizer_socket=path)
        progress("asking vLLM about the model", 1.0)
        return replace(
            settings, model=about.model, max_model_len=about.max_model_len, max_num_seqs=about.max_num_seqs,
            max_num_batched_tokens=about.max_num_batched_tokens, arguments=arguments,
            learned=msgspec.to_builtins(about),
        )  # fmt: skip

    @classmethod
    def adapters(cls, settings: EngineSettings) -> Sequence[str]:
        return list(about_of(settings).adapters)

    @classmethod
    def keeps_prefixes(cls, settings: EngineSettings) -> bool:
        return "--no-enable-prefix-caching" not in settings.arguments

    @classmethod
    def devices(cls, settings: EngineSettings) -> int:
        about = about_of(settings)
        return 0 if about.device_kind == "cpu" else about.devices

    @classmethod
    def arguments_help(cls) -> str:
        return flags_help()

    @classmethod
    def steps_together(cls, settings: EngineSettings) -> bool:
        return settings.dp_size > 1 and about_of(settings).experts

    @classmethod
    def tokenizer(cls, settings: EngineSettings) -> Tokenizer:
        about = about_of(settings)
        name = Path(about.model).name if Path(about.model).is_dir() else about.model
        known = about.max_model_len, about.vocabulary_size, name, about.chat_template, about.defaults
        if about.tokenizer_socket:
            return RemoteTokenizer(about.tokenizer_socket, *known)
        return HfTokenizer(Path(about.tokenizer), *known)

    @classmethod
    def create(cls, settings: EngineSettings, progress: Progress) -> VllmEngine:
        bound_by_user = BIND in os.environ
        os.environ.update(environment(settings, about_of(settings), cls.steps_together(settings)))
        if BIND in os.environ and not bound_by_user and about_of(settings).devices == 1:
            # vLLM binds workers' threads. Where it computes in this process, they are whoever this thread starts.
            own = os.environ[BIND].split("|")[settings.place if cls.steps_together(settings) else 0]
            os.sched_setaffinity(0, [int(core) for core in own.split(",")])
        # vLLM's executor starts workers, which a daemonic process may not; they end with this one (`vllm_worker.py`).
        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
        track_own_memory()
        made = cls(settings, progress)
        if not cls.steps_together(settings):
            made.load_model()
        return made

    def __init__(self, settings: EngineSettings, progress: Progress) -> None:
        self._settings = settings
        self._progress = progress
        self._lockstep = self.steps_together(settings)
        self._requests: dict[str, Running] = {}
        self._refused: list[StepOutput] = []
        self._lengths = AnswerLengths()
        self._budget = settings.max_num_batched_tokens
        # What a step computes is known to vLLM's scheduler alone.
        self._scheduled: dict[str, int] = {}
        self._kv_total = 0
        self._core: Any = None
        self._scheduler: Any = None
        self._inputs: Inputs
        self._staged = Staged(self._checked_weights)

    def load_model(self) -> None:
        """Import vLLM and load. Raises EngineError, and `EpochEnded` where another member of the group has died."""
        self._progress("importing vLLM", 0.0)
        quieten()
        try:
            from vllm.v1.engine.core import EngineCore
            from vllm.v1.executor import Executor
        except ImportError as error:
            raise EngineError(f"the vllm engine needs vLLM: pip install 'paceline[vllm]' ({error})") from None
        self._progress("loading the model", 0.3)
        arguments, _ = engine_arguments(self._settings.arguments)
        arguments.use_tqdm_on_load = False
        if not any("scheduling" in flag for flag in self._settings.arguments):
            # A request's own priority means something here.
            arguments.scheduling_policy = "priority"
        if about_of(self._settings).devices == 1 and arguments.distributed_executor_backend is None:
            # Also in a group: a worker of its own would import and hold all a second time.
            arguments.distributed_executor_backend = "uni"
        try:
            config = arguments.create_engine_config()
            self._core = EngineCore(config, Executor.get_class(config), log_stats=False)
        except Exception as error:
            text = f"vLLM: {' '.join(str(error).split())[:500] or type(error).__name__}"
            if self._lockstep and of_the_group(error):
                raise EpochEnded(text) from None
            defect(logger, "vLLM cannot be started", error)
            raise EngineError(text) from None
        remove_when_ended(shared_memory())
        try:
            self._inputs = Inputs(config, self._core, about_of(self._settings).adapters)
        except (ImportError, AttributeError) as error:
            raise EngineError(f"this version of vLLM is not known; 0.32 is ({error})") from None
        cache = config.cache_config
        self._kv_total = (cache.num_gpu_blocks or 0) * cache.block_size
        self._scheduler = self._core.scheduler
        schedule = self._scheduler.schedule

        @functools.wraps(schedule)
        def scheduled(*given: Any, **named: Any) -> Any:
            made = schedule(*given, **named)
            self._scheduled = made.num_scheduled_tokens
            return made

        self._scheduler.schedule = scheduled

    def join(self, group: RankGroup) -> None:
        """vLLM forms a group of its own as it loads, by a port at the first member."""
        place = group.members.index(group.rank)
        host, port = meeting_place(group, self._settings.host)
        os.environ.update({
            "VLLM_DP_RANK": str(place), "VLLM_DP_RANK_LOCAL": str(self._settings.place),
            "VLLM_DP_SIZE": str(len(group.members)), "VLLM_DP_MASTER_IP": host,
            "VLLM_DP_MASTER_PORT": str(port),
        })  # fmt: skip
        self.load_model()

    # Requests -----------------------------------------------------------------------------------

    def add(self, request: EngineRequest) -> None:
        key = str(request.key)
        try:
            made = self._inputs.request(key, request)
        except Exception as error:
            # Which of its own vLLM raises for a request that is wrong differs by version; none may end a rank.
            text = " ".join(str(error).split())[:500]
            said = StepOutput(request.key, [], finish_reason="error", stop_reason="bad_request", error=text)
            self._refused.append(said)
            return
        self._requests[key] = made
        self._core.add_request(made.request, 0)

    def abort(self, key: int) -> None:
        self._refused = [output for output in self._refused if output.key != key]
        self._end([str(key)])

    def _end(self, keys: Iterable[str]) -> None:
        known = [key for key in keys if key in self._requests]
        for key in known:
            self._forget(key)
        if known:
            self._core.abort_requests(known)

    def _forget(self, key: str) -> None:
        running = self._requests.pop(key)
        self._lengths.ended(running.params, running.made, running.params.max_tokens)

    # Steps --------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        if self._scheduler is None:
            return False
        return bool(self._refused or self._scheduler.has_requests() or self._core.batch_queue)

    def step(self) -> StepResult:
        outputs, self._refused = self._refused, []
        self._scheduled = {}
        with self._in_group():
            made, executed = self._core.step_fn()
            self._core.post_step(model_executed=executed)
            if self._lockstep and not executed:
                self._core.execute_dummy_batch()
        prefilled = 0
        for key, tokens in self._scheduled.items():
            running = self._requests.get(key)
            prefilled += tokens if running is not None and running.prefills else 0
        outputs += self._said(made)
        return StepResult(outputs, prefilled, sum(len(output.token_ids) for output in outputs))

    def _said(self, made: Any) -> list[StepOutput]:
        """What a step has made, by vLLM's outputs of it."""
        said_all: list[StepOutput] = []
        stopped: list[str] = []
        for output in () if not made or 0 not in made else made[0].outputs:
            running = self._requests.get(output.request_id)
            if running is None:
                continue
            said = running.read(output, self._inputs)
            said_all.append(said)
            if said.finish_reason is not None:
                stopped.append(output.request_id)
        # Of those that a stop string ended vLLM's core does not know yet.
        self._end(stopped)
        return said_all

    def dummy_step(self) -> None:
        with self._in_group():
            self._core.execute_dummy_batch()

    @contextlib.contextmanager
    def _in_group(self) -> Iterator[None]:
        """In lockstep a step that fails is the end of the epoch, whoever's fault it was: vLLM cannot go on there."""
        try:
            yield
        except Exception as error:
            if not self._lockstep:
                raise
            raise EpochEnded(f"vLLM's step failed: {' '.join(str(error).split())[:300]}") from error

    def limit_prefill(self, tokens: int | None) -> None:
        if tokens is not None:
            decoding = sum(not running.prefills for running in self._requests.values())
            tokens = min(self._budget, decoding + tokens)
        if self._scheduler is not None:
            self._scheduler.max_num_scheduled_tokens = self._budget if tokens is None else tokens

    def load(self) -> Load:
        if self._scheduler is None:
            return Load()
        waiting = len(self._scheduler.waiting) + len(getattr(self._scheduler, "skipped_waiting", ()))
        running = len(self._scheduler.running)
        to_prefill = started = kv_waiting = 0
        whole = 0.0
        for one in self._requests.values():
            left = one.params.max_tokens - one.made
            whole += one.made + self._lengths.left(one.params, left)
            if one.prefills:
                lacking = one.request.num_tokens - one.request.num_computed_tokens
                to_prefill += max(0, lacking)
                started += one.request.num_computed_tokens > 0
                kv_waiting += one.request.num_tokens + left if not one.request.num_computed_tokens else 0
        decoding = sum(not one.prefills for one in self._requests.values())
        return Load(
            waiting=waiting, running=running, slots=self._settings.max_num_seqs, prefill_tokens=to_prefill,
            kv_used=int(self._scheduler.kv_cache_manager.usage * self._kv_total), kv_total=self._kv_total,
            step_tokens=self._budget, decoding=min(decoding, running), kv_waiting=kv_waiting,
            answer_tokens=round(whole / len(self._requests)) if self._requests else 0,
            startable_tokens=to_prefill if running < self._settings.max_num_seqs else None,
        )  # fmt: skip

    def stage_weights(self, source: Source) -> list[StepOutput]:
        if kind_of(source) == "transfer":
            self._core.collective_rpc("start_weight_update")
        else:
            self._staged.stage(source)
        made: list[StepOutput] = []
        while self._core.batch_queue:
            future, scheduled = self._core.batch_queue.pop()[:2]
            made += self._said(self._scheduler.update_from_output(scheduled, future.result()))
        return made

    def update_weights(self, source: Source, keep_kv: bool) -> None:
        if kind_of(source) == "transfer":
            self._core.collective_rpc("finish_weight_update")
        else:
            folder = self._staged.take(source)
            self._core.collective_rpc("reload_weights", kwargs={"weights_path": str(folder.path)})
        # With `keep_kv` the blocks of what runs stay as they are, and so do those that others share with it.
        self._core.reset_prefix_cache(not keep_kv)

    def _checked_weights(self, path: Path) -> Folder:
        return Folder(path, Path(about_of(self._settings).model))

    def call(self, method: str, arguments: Mapping[str, Any]) -> Any:
        match method:
            case "init_weight_transfer_engine" | "update_weights":
                self._core.collective_rpc(method, kwargs=dict(arguments))
            case "collective_rpc":
                given = tuple(arguments.get("args") or ()), dict(arguments.get("kwargs") or {})
                return self._core.collective_rpc(str(arguments["method"]), arguments.get("timeout"), *given)
            case "reset_prefix_cache":
                return bool(self._core.reset_prefix_cache(bool(arguments.get("reset_running_requests"))))
            case "sleep":
                # What runs loses its KV with the memory, and is computed anew when all is awake.
                self._core.reset_prefix_cache(True)
                self._core.model_executor.sleep(int(arguments.get("level", 1)))
            case "wake_up":
                self._core.model_executor.wake_up(arguments.get("tags"))
            case "is_sleeping":
                return bool(self._core.model_executor.is_sleeping)
            case _:
                return super().call(method, arguments)
        return True

    def close(self) -> None:
        if self._core is not None:
            self._core.shutdown()


class Running:
    """A request that vLLM has. `request`: as its scheduler knows it; `prefills`: no token of it has come yet."""

    __slots__ = ("detokenizer", "key", "made", "params", "prefills", "request")

    def __init__(self, key: int, params: SamplingParams, request: Any, detokenizer: Any, made: int) -> None:
        self.key = key
        self.params = params
        self.request = request
        self.detokenizer = detokenizer
        self.made = made
        self.prefills = True

    def read(self, output: Any, inputs: Inputs) -> StepOutput:
        """What a step of vLLM's made for it, with its text."""
        tokens, reason, stop = output.new_token_ids, output.finish_reason, output.stop_reason
        finished = None if reason is None else FINISHED[str(reason)]
        error = "vLLM could not go on with this request" if finished == "error" else None
        before = self.detokenizer.num_output_tokens()
        found = self.detokenizer.update(tokens, finished == "stop")
        if found is not None:
            finished, stop = "stop", found
            tokens = tokens[: self.detokenizer.num_output_tokens() - before]
        if tokens:
            self.prefills = False
            self.made += len(tokens)
        text = self.detokenizer.get_next_output_text(finished is not None, True)
        logprobs = of_prompt = None
        if self.params.logprobs is not None and output.new_logprobs is not None:
            logprobs = inputs.logprobs(output.new_logprobs, self.params.logprobs)[: len(tokens)]
        if self.params.prompt_logprobs is not None and output.new_prompt_logprobs_tensors is not None:
            of_prompt = inputs.logprobs(output.new_prompt_logprobs_tensors, self.params.prompt_logprobs)
            of_prompt.insert(0, PositionLogprobs(inputs.logprob(self.request.prompt_token_ids[0], 0.0)))
        stats = getattr(output, "prefill_stats", None)
        cached = 0 if stats is None else stats.num_cached_tokens
        return StepOutput(self.key, tokens, text, finished, stop, logprobs, error, of_prompt, cached)


class Inputs:
    """vLLM's way of taking a request in. `adapters`: their folders, by name."""

    def __init__(self, config: Any, core: Any, adapters: Mapping[str, str]) -> None:
        from vllm.inputs import tokens_input
        from vllm.lora.request import LoRARequest
        from vllm.renderers import renderer_from_config
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
        from vllm.v1.engine.detokenizer import IncrementalDetokenizer
        from vllm.v1.engine.input_processor import InputProcessor

        from vllm import SamplingParams as VllmParams

        self._core = core
        self._adapters, self._lora_request = adapters, LoRARequest
        self._sizes = config.model_config.max_model_len, config.model_config.get_vocab_size()
        self._renderer = renderer_from_config(config)
        self._processor = InputProcessor(config, self._renderer)
        self._tasks = core.get_supported_tasks()
        self._tokenizer = self._renderer.tokenizer
        self._params: Callable[..., Any] = functools.partial(VllmParams, output_kind=RequestOutputKind.DELTA)
        self._structured_params: Callable[..., Any] = StructuredOutputsParams
        self._prompt = tokens_input
        self._detokenizer = IncrementalDetokenizer.from_new_request
        self._pieces: dict[int, bytes] = {}
        manager = core.structured_output_manager
        compile_grammar = manager._create_grammar

        @functools.wraps(compile_grammar)
        def begun(request: Any) -> Any:
            grammar = compile_grammar(request)
            if made := list(request.output_token_ids):
                grammar.accept_tokens(request.request_id, made)
            return grammar

        manager._create_grammar = begun

    def request(self, key: str, asked: EngineRequest) -> Running:
        """The request as vLLM's scheduler takes it. Raises ValueError or TypeError with what is wrong."""
        params, made = asked.params, list(asked.made_token_ids)
        if (why := why_never(asked, *self._sizes)) is not None:
            raise ValueError(why)
        checked = self._processor.process_inputs(
            key, self._prompt(list(asked.prompt_token_ids)), self._vllm_params(params, made), self._tasks,
            priority=asked.priority, lora_request=self._adapter(params.adapter),
        )  # fmt: skip
        if params.bad_words:
            # vLLM's own are texts, which it turns into these.
            checked.sampling_params._bad_words_token_ids = [list(words) for words in params.bad_words]
        detokenizer = self._detokenizer(self._tokenizer, checked)
        if made:
            detokenizer.update(made, False)
            detokenizer.get_next_output_text(False, True)
        request, _ = self._prepared(checked, made)
        return Running(asked.key, params, request, detokenizer, len(made))

    def _prepared(self, checked: Any, made: list[int]) -> Any:
        """With what is made already in it before a thread compiles its grammar."""
        from vllm.v1.request import Request

        if not made:
            return self._core.preprocess_add_request(checked)
        begin = Request.from_engine_core_request.__func__

        def begun(kind: Any, *given: Any) -> Any:
            request = begin(kind, *given)
            request.append_output_token_ids(list(made))
            return request

        plain = Request.from_engine_core_request
        Request.from_engine_core_request = classmethod(begun)
        try:
            return self._core.preprocess_add_request(checked)
        finally:
            Request.from_engine_core_request = plain

    def _adapter(self, name: str) -> Any:
        if not name:
            return None
        if name not in self._adapters:
            raise ValueError(f"there is no adapter {name!r}")
        return self._lora_request(name, 1 + list(self._adapters).index(name), self._adapters[name])

    def _structured(self, params: SamplingParams) -> Any:
        form = params.structured_outputs
        if form is None:
            return None
        return self._structured_params(**{form.kind: json.loads(form.text) if form.kind == "choice" else form.text})

    def _vllm_params(self, params: SamplingParams, made: list[int]) -> Any:
        return self._params(
            max_tokens=params.max_tokens, temperature=params.temperature, top_p=params.top_p, top_k=params.top_k,
            min_p=params.min_p, seed=params.seed, frequency_penalty=params.frequency_penalty,
            presence_penalty=params.presence_penalty, repetition_penalty=params.repetition_penalty,
            logit_bias=dict(params.logit_bias) or None, stop=list(params.stop) or None,
            stop_token_ids=list(params.stop_token_ids) or None, ignore_eos=params.ignore_eos,
            include_stop_str_in_output=params.include_stop_str_in_output, logprobs=params.logprobs,
            skip_special_tokens=params.skip_special_tokens, extra_args={MADE: made} if made else None,
            structured_outputs=self._structured(params), min_tokens=params.min_tokens,
            allowed_token_ids=params.allowed_token_ids,
            # Its client has them with the tokens made already.
            prompt_logprobs=None if made else params.prompt_logprobs,
        )  # fmt: skip

    def logprobs(self, lists: Any, count: int) -> list[PositionLogprobs]:
        """Of each token the chosen one's, and the `count` best; vLLM's rows begin with the chosen one."""
        positions = []
        for tokens, values in zip(lists.logprob_token_ids.tolist(), lists.logprobs.tolist(), strict=True):
            row = [self.logprob(token, value) for token, value in zip(tokens, values, strict=True)]
            positions.append(PositionLogprobs(row[0], row[1 : count + 1]))
        return positions

    def logprob(self, token: int, value: float) -> TokenLogprob:
        """A token's, with its bytes: a byte-level vocabulary says them, others its text."""
        piece = self._pieces.get(token)
        if piece is None:
            alphabet = byte_alphabet()
            name = self._tokenizer.convert_ids_to_tokens(token) or ""
            text = self._tokenizer.decode([token])
            whole = "\ufffd" in text and all(letter in alphabet for letter in name)
            piece = bytes(alphabet[letter] for letter in name) if whole else text.encode()
            self._pieces[token] = piece
        return TokenLogprob(token, piece, value)


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes, which byte-level vocabularies are written in."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


def of_the_group(error: Exception) -> bool:
    """Whether vLLM could not load because of another member: what torch and its back ends say then."""
    text = f"{type(error).__module__} {error}".lower()
    return any(word in text for word in ("torch.distributed", "gloo", "nccl", "tcpstore", "connection", "socket"))
