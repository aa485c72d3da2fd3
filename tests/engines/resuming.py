"""Cutting an answer at every place and letting another engine go on with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from msgspec.structs import replace

from paceline.core.rank.events import StepOutput
from paceline.engines.base import Engine, EngineRequest

MOST_STEPS = 2000


def outputs_of(engine: Engine, request: EngineRequest) -> list[StepOutput]:
    engine.add(request)
    outputs: list[StepOutput] = []
    for _ in range(MOST_STEPS):
        if not engine.has_work():
            break
        outputs += engine.step().outputs
    assert outputs[-1].finish_reason is not None
    assert not (request.made_token_ids and outputs[0].cached_tokens), "what is there of the prompt has been said"
    # An engine that is used again has more of it.
    return [replace(output, cached_tokens=0) for output in outputs]


def check_resumes(make: Callable[[], Engine], request: EngineRequest, cuts: Iterable[int] | None = None) -> None:
    """Wherever the answer is cut, what an engine makes behind it is what the first one made: tokens, text and all."""
    whole = outputs_of(make(), request)
    assert len(whole) > 1, "an answer of one token cannot be cut"
    for cut in range(len(whole)) if cuts is None else cuts:
        made = [token for output in whole[:cut] for token in output.token_ids]
        rest = outputs_of(make(), replace(request, made_token_ids=made))
        assert rest == whole[cut:], f"cut after {cut} of {len(whole)} tokens"
