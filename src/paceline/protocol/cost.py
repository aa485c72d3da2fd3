"""The cost model: how long a request that is sent to a rank now waits for its first token.

A rank works off prompts in order of arrival, at most `step_tokens` a step, and in every step gives each request that is
past its prompt one token. The wait is therefore the time for the prompt tokens ahead and the request's own, plus what
the answers cost that are written meanwhile. Where no slot or no KV memory is left there is a barrier before that: the
request begins when enough others have ended.

All is reckoned from what the rank itself says of its steps and of its requests (`Load`). Priorities are left out, and
of requests that come later only what they add to the step in which the prompt ends.
"""

from __future__ import annotations

import math

from paceline.protocol.messages import Load
from paceline.protocol.quota import PATIENCE, PATIENCE_SHARE

ANY_NUMBER = 1 << 50


def predicted_wait(load: Load, prompt_tokens: int, age_s: float | None = None) -> float:
    """Seconds until the first token of a request of `prompt_tokens` sent to a rank now.

    `load`: the rank's, what is on the wire included (`believed`). `age_s`: how old its report is; work is done
    meanwhile. None where that is not known: then half a step counts as done. Infinite until the rank has
    measured a step.
    """
    if not (load.step_s or load.prompt_token_s or load.answer_token_s):
        return math.inf
    starting = min(load.waiting, max(0, load.slots - load.running))
    busy = min(load.slots, load.running + load.waiting)
    # Requests ahead become writers one by one as their prompts are done.
    writers = (load.decoding + busy) / 2
    room, every = _room_for_prompts(load)

    def steps_of(tokens: int) -> int:
        # Where most steps have none, the first that has some is half of `every` away.
        return -(-tokens // room) * every - (every // 2 if tokens else 0)

    def seconds(steps: float, tokens: float, writing: float) -> float:
        return steps * (load.step_s + load.answer_token_s * writing) + load.prompt_token_s * tokens

    own = max(1, prompt_tokens)
    own_s = seconds(steps_of(own), own, busy) + load.answer_token_s
    if not busy:
        return own_s
    # The step that runs now was put together before: the request cannot join it.
    now = min(load.prefill_tokens, room) if every == 1 else 0
    now_s = seconds(1, now, load.decoding)
    later = load.prefill_tokens - now
    ahead_s = now_s + seconds(steps_of(later), later, writers)
    barrier = _steps_until_ended(load, starting, _ends_needed(load, own))
    # Steps that only write, for want of a prompt that may begin.
    idle_steps = max(0.0, barrier - 1 - steps_of(later))
    idle_s = seconds(idle_steps, 0, busy)
    done_s = now_s / 2 if age_s is None else age_s
    if done_s >= ahead_s + idle_s:
        # Older than all that it tells of: what runs now is a step that only writes.
        return seconds(0.5, 0, busy) + own_s
    steps = steps_of(later + own)
    # A rank with a queue gets as much as it works off: the step that ends this prompt is filled up by whoever comes,
    # as long as there are slots.
    followers = min(-(-(later + own) // room) * room - later - own, later) if load.step_tokens and not barrier else 0
    all_s = now_s + seconds(steps + idle_steps, later + own + followers, writers if later else busy)
    all_s += load.answer_token_s
    return all_s - done_s


def _room_for_prompts(load: Load) -> tuple[int, int]:
    """So many prompt tokens at most in one of so many steps. The prefill quota is taken to stay as it is."""
    budget = load.step_tokens or ANY_NUMBER
    room = max(1, budget - load.decoding)
    if load.prefill_quota is None:
        return room, 1
    if load.prefill_quota:
        return min(room, load.prefill_quota), 1
    return max(1, min(room, budget // PATIENCE_SHARE)), PATIENCE + 1


def _ends_needed(load: Load, own: int) -> int:
    """How many requests must end before the next one may begin, 0 where it may at once."""
    for_slot = load.waiting + 1 - max(0, load.slots - load.running)
    for_memory = 0
    if load.running and load.kv_reserved and load.kv_total:
        each = load.kv_reserved / load.running
        missing = load.kv_reserved + load.waiting * each + own + load.answer_tokens - load.kv_total
        for_memory = math.ceil(missing / each)
    return max(0, for_slot, for_memory)


def _steps_until_ended(load: Load, starting: int, ends: int) -> float:
    """Steps until so many of the requests that run, or start now, have ended.

    Their ends are taken to be evenly spaced, from the first one such that the mean is right.
    """
    places = load.running + starting
    if not ends or not places:
        return 0.0
    mean = (load.answers_left + starting * load.answer_tokens) / places
    first = min(mean, load.first_end if load.running else load.answer_tokens)
    rounds, place = divmod(ends - 1, places)
    within = 2 * (mean - first) * place / (places - 1) if places > 1 else 0.0
    return first + within + rounds * max(1, load.answer_tokens)
