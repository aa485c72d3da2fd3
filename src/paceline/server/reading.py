"""Long bodies are read in a process of their own, so that nobody's stream waits for them.

A thread is not enough. JSON of some megabytes is one call of a library in C, which holds up all threads of its process
as long as it lasts; so are a pattern looked for in a long text and a pass of the collector over millions of objects.
And what such a body is made of is for its writer to choose: to bound each field would leave out one. So the process
that answers decodes no long body at all. It hands the bytes to its reader and gets back what goes to the ranks, whose
size the model bounds; token ids come as arrays, which are copied and not made anew one by one.

The reader is started with the first long body, gives up those whose client has left, and ends when there was none for
some minutes. It is this process's child and ends with it, by the kernel's word, since one that is stopped hears no
other. Where it dies another reads what it had; a body that ends two readers gets an error. One that is stopped for long
is ended.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import multiprocessing
import os
import queue
import signal
import threading
from array import array
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from paceline.engines import grammars
from paceline.engines.base import EngineSettings
from paceline.engines.registry import find_engine
from paceline.errors import ConfigError
from paceline.process.spawn import ChildProcess, MallocTrim, spawn, stop
from paceline.process.supervisor import StoppedFor
from paceline.server.errors import ApiError
from paceline.server.prompts import Cancelled
from paceline.server.requests import FORMATS, Models, Part, Prepared, Preparer
from paceline.server.responses import DEFECT
from paceline.server.stored import ResponseStore
from paceline.server.tokenize import works
from paceline.server.tools import REASONING_PARSERS, TOOL_PARSERS, reasoning_language, tool_language
from paceline.settings import DeploymentConfig

logger = logging.getLogger("paceline.front-end")

NICE = 10
"""Others' tokens come first where cores are few."""
TOKENS_AT_ONCE = 100_000
"""To be copied without anybody's notice."""
IDLE_S = 300.0
"""After so long without a body the reader ends: it holds a vocabulary."""
TRIES = 2
"""So many readers may end over a body before it fails."""
LOOK_S = 1.0
STOPPED_S = 10.0
"""A reader that has been stopped for so long while somebody waits is ended."""
PR_SET_PDEATHSIG = 1
AT_ONCE = 2
"""Bodies that are read at the same time: tokenizing lets others on."""
DIED = ApiError(500, "the process that reads long bodies has ended", kind="server_error", code="internal_error")

Job = Callable[..., Any]


class Asked(Struct):
    """What a reader is to do, for whom, and how many have ended over it."""

    job: str
    given: tuple[Any, ...]
    answer: asyncio.Future[Any]
    ended: int = 0


# What bodies are read with ------------------------------------------------------------------------


def models_of(config: DeploymentConfig, settings: EngineSettings) -> Models:
    """What a front-end of this deployment serves. Raises EngineError, ConfigError."""
    server, engine = config.server, find_engine(config.engine.engine)
    tokenizer = engine.tokenizer(settings)
    template = getattr(tokenizer, "chat_template", None) or ""
    names = (config.engine.served_model_name or tokenizer.model_name).split(",")
    adapters = engine.adapters(settings)
    models = Models(
        [*names, *adapters],
        tokenizer,
        min(tokenizer.max_model_len, settings.kv_cache_tokens or tokenizer.max_model_len),
        engine.supports,
        {} if config.engine.generation_config == "vllm" else tokenizer.sampling_defaults,
        server.trust_request_chat_template,
        frozenset(adapters),
        tool_language(template, known("--tool-call-parser", server.tool_call_parser, TOOL_PARSERS)),
        reasoning_language(template, known("--reasoning-parser", server.reasoning_parser, REASONING_PARSERS)),
        getattr(tokenizer, "embedding_size", 0) if settings.task == "embed" else 0,
    )
    if "structured_outputs" in models.supports:
        # Imported now: it would hold up the loop with the first request of a form.
        grammars.library()
    return models


def known(flag: str, value: str, names: list[str]) -> str:
    """A flag's value that is one of `names`. Raises ConfigError."""
    if value not in names:
        raise ConfigError(f"{flag} {value}: must be one of {', '.join(names)}")
    return value


def store_of(config: DeploymentConfig, folder: str, index: int) -> ResponseStore | None:
    """What keeps a front-end's responses: its share of what the node's front-ends may keep."""
    share = config.server.response_store_bytes // config.parallel.api_server_count
    return ResponseStore(Path(folder, "responses"), index, share) if share else None


# The reader ---------------------------------------------------------------------------------------


def read_bodies(
    connection: Connection, config: DeploymentConfig, engine: EngineSettings, folder: str, index: int
) -> None:
    """Do what comes until the other side closes: (number, job, what it is given), or (number,) of what
    nobody waits for any more. Answers (number, whether it failed, what came of it), and before that (number, None,
    parts) with some of the parts that came of it.
    """
    os.nice(NICE)
    # The sender's thread has started this process, and lives as long as the front-end.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    models = models_of(config, engine)
    preparer = Preparer(
        models, store_of(config, folder, index), allow_unknown_fields=config.server.allow_unknown_fields
    )
    jobs: dict[str, Job] = {kind.__name__: preparer.job(kind) for kind in FORMATS} | works(models)
    waiting: queue.SimpleQueue[tuple[int, str, tuple[Any, ...]]] = queue.SimpleQueue()
    cancelled: dict[int, threading.Event] = {}

    def receive() -> None:
        while True:
            try:
                number, *asked = connection.recv()
            except (EOFError, OSError):
                os._exit(0)
            if asked:
                cancelled[number] = threading.Event()
                waiting.put((number, *asked))
            elif (event := cancelled.get(number)) is not None:
                event.set()

    trim, answering = MallocTrim(), threading.Lock()

    def work() -> None:
        while True:
            number, job, given = waiting.get()
            failed, made = _done(jobs[job], given, cancelled[number])
            del given, cancelled[number]
            with answering:
                if isinstance(made, Prepared):
                    for parts in packed(made.parts):
                        connection.send((number, None, parts))
                    made.parts = []
                connection.send((number, failed, made))
                del made
                trim.look(float("inf"))

    for _ in range(AT_ONCE):
        threading.Thread(target=work, name="read", daemon=True).start()
    receive()


def _done(job: Job, given: tuple[Any, ...], cancelled: threading.Event) -> tuple[bool, Any]:
    if cancelled.is_set():
        return True, Cancelled()
    try:
        return False, job(*given, cancelled)
    except (ApiError, Cancelled) as error:
        return True, error
    except Exception:
        logger.exception("internal error in what reads long bodies")
        return True, DEFECT


def packed(parts: list[Part]) -> Iterator[list[Part]]:
    """The same with token ids as arrays, so many of them at a time that nobody is held up who takes them; what choices
    share of one prompt stays shared.
    """
    made: list[Part] = []
    size, before, ids = 0, None, array("i")
    for part in parts:
        if part.prompt_token_ids is not before:
            if size > TOKENS_AT_ONCE:
                yield made
                made, size = [], 0
            before, ids = part.prompt_token_ids, array("i", part.prompt_token_ids)
            size += len(ids)
        made.append(msgspec.structs.replace(part, prompt_token_ids=ids))
    yield made


class ReadingProcess:
    """The reader of one front-end, whose settings these are."""

    def __init__(self, arguments: Mapping[str, Any], index: int, log_level: str, idle_s: float = IDLE_S) -> None:
        self._arguments = dict(arguments) | {"index": index}
        self._name = f"reader {index}"
        self._log_level = log_level
        self._idle_s = idle_s
        self._idle: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._process: ChildProcess | None = None
        self._connection: Connection | None = None
        self._waiting: dict[int, Asked] = {}
        self._look: asyncio.TimerHandle | None = None
        self._stopped = StoppedFor(STOPPED_S)
        self._next = 0
        self._closed = False
        self._trim = MallocTrim()
        # Who writes waits for the reader to read; one after the other, since a message is several writes.
        self._sender = ThreadPoolExecutor(1, "to-reader")

    async def ask(self, job: str, *given: Any) -> Any:
        """What the job makes of what it is given. Raises what that raises; given up when it is cancelled."""
        self._next += 1
        number, answer = self._next, self._loop.create_future()
        self._waiting[number] = Asked(job, given, answer)
        if self._idle is not None:
            self._idle.cancel()
        if self._look is None:
            self._look = self._loop.call_later(LOOK_S, self._look_after)
        try:
            await self._loop.run_in_executor(self._sender, self._send, number, job, given)
            return await answer
        finally:
            del self._waiting[number]
            if (answer.cancelled() or not answer.done()) and not self._closed:
                self._sender.submit(self._send, number)
            if not self._waiting and not self._closed:
                self._trim.look(float("inf"))
                self._idle = self._loop.call_later(self._idle_s, self._sender.submit, self._end)

    def close(self) -> None:
        """End the reader."""
        self._closed = True
        if self._idle is not None:
            self._idle.cancel()
        self._sender.shutdown(wait=False, cancel_futures=True)
        self._end()

    def _look_after(self) -> None:
        """While somebody waits: end a reader that is stopped, and will not go on by itself."""
        self._look = self._loop.call_later(LOOK_S, self._look_after) if self._waiting and not self._closed else None
        process = self._process
        if process is not None and self._stopped.too_long(process.pid, self._loop.time()):
            logger.warning("the process that reads long bodies has been stopped for %.0f s; ending it", STOPPED_S)
            process.kill()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            stop([process])

    def _send(self, *message: Any) -> None:
        """In the sender's thread."""
        if self._closed:
            return
        if self._process is None or not self._process.is_alive():
            if len(message) == 1:
                return
            self._start()
            if self._closed:
                # `close` has come between, and has not seen it.
                self._end()
                return
        assert self._connection is not None
        try:
            self._connection.send(message)
        except OSError:
            # It has just died: who waits is told so by the thread that reads.
            logger.debug("a body was not sent to the reader")

    def _start(self) -> None:
        here, there = multiprocessing.Pipe()
        # A child of a daemonic process, which may have none: it ends with this one (`spawn.py`), and `close` ends it.
        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
        self._process = spawn(self._name, read_bodies, {"connection": there, **self._arguments}, self._log_level)
        there.close()
        self._connection = here
        threading.Thread(target=self._receive, args=(self._process, here), name="from-reader", daemon=True).start()

    def _receive(self, process: ChildProcess, connection: Connection) -> None:
        """In a thread of its own, for one life of the reader."""
        parts: list[Part] = []
        while True:
            try:
                number, failed, made = connection.recv()
            except (EOFError, OSError):
                break
            if failed is None:
                parts += made
                continue
            if isinstance(made, Prepared):
                made.parts, parts = parts, []
            self._loop.call_soon_threadsafe(self._answered, number, failed, made)
        process.join()
        if self._process is process:
            self._loop.call_soon_threadsafe(self._died, process.exitcode)

    def _answered(self, number: int, failed: bool, made: Any) -> None:
        asked = self._waiting.get(number)
        if asked is None or (answer := asked.answer).done():
            return
        if failed:
            answer.set_exception(made)
        else:
            answer.set_result(made)

    def _died(self, status: int | None) -> None:
        logger.error("the process that reads long bodies has ended with status %s", status)
        for number, asked in self._waiting.items():
            asked.ended += 1
            if asked.answer.done():
                continue
            if asked.ended < TRIES and not self._closed:
                self._sender.submit(self._send, number, asked.job, asked.given)
            else:
                asked.answer.set_exception(DIED)
