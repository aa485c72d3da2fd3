"""Runs of moe engines: one alone, several as ranks in threads of this process, stepping together, or real ranks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.core.rank.events import StepOutput
from paceline.core.requests import SamplingParams
from paceline.engines.base import EngineRequest, EngineSettings, StepResult
from paceline.engines.group import EpochEnded, RankGroup, Reduction
from paceline.engines.moe import MoeEngine
from paceline.net.collective import SocketGroup
from paceline.net.group import GroupListener, form_group
from tests.net.groups import group_path
from tests.pace import stretched
from tests.serving import Command

if TYPE_CHECKING:
    from paceline.engines.group import Array

Answers = dict[int, list[int]]
"""Tokens by request."""


def make_engine(*, options: dict[str, str] | None = None, **settings: Any) -> MoeEngine:
    """An engine of small sizes, unless told otherwise."""
    sizes = {"layers": "2", "d_model": "32", "heads": "2", "expert_hidden": "32"}
    return MoeEngine.create(EngineSettings(options={**sizes, **(options or {})}, **settings), lambda what, share: None)


def request(key: int, prompt: str | Sequence[int] = "Hello", tokens: int = 8, **params: Any) -> EngineRequest:
    """A greedy request that goes on to its full length, unless told otherwise."""
    ids = [256, *prompt.encode()] if isinstance(prompt, str) else prompt
    return EngineRequest(
        key, ids, SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **params}, max_tokens=tokens)
    )


def many_requests(count: int) -> list[EngineRequest]:
    """Requests of all sizes, with prompts longer than a step's budget among them."""
    chance = random.Random(7)
    return [
        request(key, [256, *chance.choices(range(97, 123), k=chance.choice((2, 9, 30, 80)))], chance.randint(1, 14))
        for key in range(count)
    ]


def run_alone(engine: MoeEngine) -> list[StepOutput]:
    outputs: list[StepOutput] = []
    while engine.has_work():
        outputs += engine.step().outputs
    return outputs


def text_of(outputs: Iterable[StepOutput], key: int) -> str:
    return "".join(output.text for output in outputs if output.key == key)


def said_alone(settings: EngineSettings, prompts: Sequence[str], tokens: int) -> list[str]:
    """What one engine says to these, greedily."""
    engine, encode = MoeEngine.create(settings, lambda what, share: None), MoeEngine.tokenizer(settings).encode
    for key, prompt in enumerate(prompts):
        engine.add(request(key, encode(prompt), tokens))
    outputs = run_alone(engine)
    return [text_of(outputs, key) for key in range(len(prompts))]


def asked_together(running: Command, prompts: Sequence[str], tokens: int) -> list[str]:
    """What real ranks say to the same, asked all at a time."""

    def ask(prompt: str) -> str:
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        answer = running.http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(ask, prompts))


class Deployment:
    """Ranks in threads. `arrivals[rank]`: requests by the step before which they come; `quota`: by step."""

    def __init__(self, folder: Path, dp_size: int, **settings: Any) -> None:
        self.engines = [make_engine(rank=rank, dp_size=dp_size, **settings) for rank in range(dp_size)]
        self.arrivals: list[dict[int, list[EngineRequest]]] = [{} for _ in range(dp_size)]
        self.answers: Answers = {}
        self.steps = [0] * dp_size
        self.quota: Callable[[int], int | None] = lambda step: None
        self.groups: dict[int, SocketGroup] = {}
        self._listeners = [GroupListener(group_path(folder, rank)) for rank in range(dp_size)]
        self._pool = ThreadPoolExecutor(dp_size)

    def form(self, epoch: int, members: Sequence[int]) -> None:
        """Form a generation of these, and have their engines join it."""
        self._close_groups()
        addresses = {rank: self._listeners[rank].address for rank in members}

        def form(rank: int) -> SocketGroup:
            return form_group(self._listeners[rank], epoch, rank, addresses, timeout_s=stretched(20.0))

        futures = [self._pool.submit(form, rank) for rank in members]
        self.groups = dict(zip(members, [future.result(stretched(30)) for future in futures], strict=True))
        for rank, group in self.groups.items():
            self.engines[rank].join(group)

    def start(self, turn: Callable[[int], Any]) -> dict[int, Future[Any]]:
        return {rank: self._pool.submit(turn, rank) for rank in self.groups}

    def run(self, until_step: int | None = None) -> None:
        """Step all members together until nobody has work, or a step is reached, or the generation ends."""
        for future in self.start(lambda rank: self.drive(rank, until_step)).values():
            future.result(stretched(60))

    def drive(self, rank: int, until_step: int | None = None) -> None:
        """One member's loop: a step, or a dummy step, then the agreement whether to go on."""
        engine, group = self.engines[rank], self.groups[rank]
        try:
            while self.steps[rank] != until_step:
                for arrived in self.arrivals[rank].pop(self.steps[rank], []):
                    engine.add(arrived)
                engine.limit_prefill(self.quota(self.steps[rank]))
                if engine.has_work():
                    self.take(engine.step())
                else:
                    engine.dummy_step()
                self.steps[rank] += 1
                if not any(group.all_reduce([engine.has_work() or bool(self.arrivals[rank])], "max")):
                    return
        except EpochEnded:
            return

    def take(self, result: StepResult) -> None:
        for output in result.outputs:
            self.answers.setdefault(output.key, []).extend(output.token_ids)

    def close(self) -> None:
        self._close_groups()
        self._pool.shutdown()
        for listener in self._listeners:
            listener.close()

    def _close_groups(self) -> None:
        for group in self.groups.values():
            group.leave()
        for group in self.groups.values():
            group.close()
        self.groups = {}


class Leaving(RankGroup):
    """A member that leaves at its `at`-th all-to-all, counted from 0."""

    def __init__(self, group: RankGroup, at: int) -> None:
        super().__init__(group.epoch, group.rank, group.members)
        self._group = group
        self._left = at

    def all_reduce(self, values: Sequence[int], reduction: Reduction | Sequence[Reduction]) -> list[int]:
        return self._group.all_reduce(values, reduction)

    def all_to_all(self, arrays: Sequence[Array]) -> list[Array]:
        if self._left == 0:
            self._group.leave()
        self._left -= 1
        return self._group.all_to_all(arrays)

    def leave(self) -> None:
        self._group.leave()
