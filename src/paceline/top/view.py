"""What the page shows, as text for a terminal, from the same state (`server/dashboard.py`)."""

from __future__ import annotations

from collections import Counter, deque
from datetime import datetime
from typing import Any

from rich.text import Text

from paceline.core.frontend.history import DIGITS, DOING, KEPT, SAMPLE_S

State = dict[str, Any]
RANK, NOW, RUN, WAIT, SLOTS, _, KV, HIT, RATE, STEP, HANGS = range(11)
"""Where things stand in a rank's list."""
QUEUED, WAVE, RUNNING, DID, FULL = range(1, 6)
"""And in a sample's."""
COLORS = {
    "p": "yellow", "d": "green", "y": "cyan", "i": "bright_black", "x": "magenta", "l": "blue", "h": "bold red",
    "m": "red",
}  # fmt: skip
BLOCKS = " ▁▂▃▄▅▆▇█"
BAD = "hm"
LEAST_BAND = 8
HEADINGS = ("rank", "does now", "run+wait", "KV", "hits", "tok/s", "step ms")
WIDTHS = (4, 10, 9, 4, 4, 7, 7)
FIXED = sum(WIDTHS) + len(WIDTHS)


class Past:
    """The last 15 minutes, from what each server says when it is asked first and what it has pushed since."""

    def __init__(self) -> None:
        self.samples: deque[list[Any]] = deque(maxlen=KEPT)

    def before(self, said: State) -> None:
        self.samples = deque(said["samples"], maxlen=KEPT)

    def push(self, said: State) -> None:
        """Keep this state, where the next sample is due."""
        if self.samples and said["at"] - self.samples[-1][0] < SAMPLE_S:
            return
        ranks = said["ranks"]
        did, full = "".join(one[NOW] for one in ranks), "".join(DIGITS[_full(one)] for one in ranks)
        self.samples.append([said["at"], said["queued"], said["wave"], said["running"], did, full])

    def columns(self, width: int) -> list[list[list[Any]]]:
        """The samples of each column of a band, the newest on the right; empty where there are none yet."""
        each = max(1, -(-KEPT // width))
        samples = list(self.samples)
        found = [samples[max(0, end - each) : end] for end in range(len(samples), 0, -each)][:width]
        return [[] for _ in range(width - len(found))] + found[::-1]


def _full(one: list[Any]) -> int:
    share = (one[RUN] + one[WAIT]) / one[SLOTS] if one[SLOTS] else float(one[RUN] > 0)
    return min(len(DIGITS) - 1, round(share * (len(DIGITS) - 1)))


def _named(ranks: list[int]) -> str:
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    return f"rank {', '.join(map(str, ranks[:4]))}{more}"


def status(said: State) -> tuple[str, bool]:
    """The one line that matters, and whether it is bad."""
    of = {letter: [one[RANK] for one in said["ranks"] if one[NOW] == letter] for letter in DOING}
    scaling, pause = said["scaling"], said["pause"]
    if len(of["m"]) == len(said["ranks"]):
        return "no rank is there", True
    if of["m"]:
        return f"{_named(of['m'])} gone", True
    if of["h"]:
        return f"{_named(of['h'])} hung", True
    if said["stalls"]:
        return str(said["stalls"][0]), True
    if scaling and scaling["status"] != "settled":
        return f"{scaling['status']}: to {scaling['target']} ranks", False
    if pause["number"] % 2:
        return f"pausing: waits for {_named(pause['waiting_for'])}" if pause["waiting_for"] else "paused", False
    return (f"{_named(of['l'])} loading" if of["l"] else "all ranks serve"), False


def head(said: State, lost: str = "") -> Text:
    """`lost`: why nothing is heard of it any more."""
    ranks, coordinator = said["ranks"], said["coordinator"]
    there = sum(one[NOW] not in "ml" for one in ranks)
    text, bad = (lost, True) if lost else status(said)
    line = Text.assemble((said["model"], "bold"), "  ", (text, "bold red" if bad else "green"), "\n")
    lives = coordinator["lives"]
    since = f" since {clock(coordinator['since'])}" if coordinator["since"] else ""
    parts = [
        f"{said['queued']:,} in the queue", f"{sum(one[RUN] for one in ranks):,} run",
        f"{sum(one[WAIT] for one in ranks):,} wait at ranks", f"{sum(one[RATE] for one in ranks):,.0f} tok/s",
        f"{there} of {len(ranks)} ranks",
        *([f"wave {said['wave']} {'runs' if said['running'] else 'idle'}"] if said["lockstep"] else []),
        f"coordinator: {lives} {'life' if lives == 1 else 'lives'}{since}", f"{said['moved']:,} moved",
    ]  # fmt: skip
    return line.append(" · ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts))


def columns(width: int) -> Text:
    band = max(LEAST_BAND, width - FIXED)
    cells = list(zip(HEADINGS, WIDTHS, strict=True))
    titles = [*(f"{name:<{size}}" for name, size in cells[:2]), *(f"{name:>{size}}" for name, size in cells[2:])]
    return Text(" ".join([*titles[:2], f"{'15 minutes':<{band}}", *titles[2:]]), style="bold", no_wrap=True)


def bands(said: State, past: Past, width: int) -> Text:
    """The queue and, in lockstep, the waves, over the lanes' bands."""
    band = max(LEAST_BAND, width - FIXED)
    groups, left = past.columns(band), WIDTHS[0] + WIDTHS[1] + 1
    most = max([1, *(one[QUEUED] for one in past.samples)])
    line = Text(f"{'queue':<{left}} ", no_wrap=True)
    for group in groups:
        queued = max((one[QUEUED] for one in group), default=0)
        line.append(BLOCKS[-(-queued * (len(BLOCKS) - 1) // most)], "yellow")
    line.append(f" at most {most:,}" if most > 1 else "")
    if said["lockstep"]:
        line.append(f"\n{'wave':<{left}} ")
        for group in groups:
            runs = [one for one in group if one[RUNNING]]
            color = "white" if not runs else "cyan" if runs[-1][WAVE] % 2 else "blue"
            line.append("█" if runs else "·" if group else " ", color)
    return line


def lanes(said: State, past: Past, width: int) -> Text:
    """A line a rank."""
    band = max(LEAST_BAND, width - FIXED)
    groups = past.columns(band)
    text = Text(no_wrap=True)
    for at, one in enumerate(said["ranks"]):
        there = one[NOW] not in "ml"
        wait = f"+{one[WAIT]}" if one[WAIT] else ""
        slots = f"/{one[SLOTS]}" if one[SLOTS] else ""
        cells = [
            f"{one[RUN]}{slots}{wait}" if there else "", f"{one[KV]:.0%}" if there else "",
            "" if one[HIT] is None else f"{one[HIT]:.0%}", f"{one[RATE]:,.0f}" if there else "",
            f"{one[STEP]:.1f}" if there and one[STEP] else "",
        ]  # fmt: skip
        doing = DOING[one[NOW]] + (f" {one[HANGS]:.0f}s" if one[HANGS] else "")
        text.append(f"{one[RANK]:>{WIDTHS[0]}} ")
        text.append(f"{doing[: WIDTHS[1]]:<{WIDTHS[1]}} ", COLORS[one[NOW]])
        for group in groups:
            text.append(*_block(group, at))
        text.append("".join(f" {cell:>{size}}" for cell, size in zip(cells, WIDTHS[2:], strict=True)) + "\n")
    text.right_crop(1)
    return text


def _block(group: list[list[Any]], at: int) -> tuple[str, str]:
    """A rank's band in one column: as high as it was full, of the colour of what it did most; or what was bad."""
    did = [(one[DID][at], int(one[FULL][at], 36)) for one in group if at < len(one[DID])]
    if not did:
        return " ", ""
    bad = [letter for letter, _ in did if letter in BAD]
    if bad:
        return "█", COLORS[bad[-1]]
    full = max(share for _, share in did)
    letter = Counter(letter for letter, _ in did).most_common(1)[0][0]
    return BLOCKS[max(1, -(-full * (len(BLOCKS) - 1) // (len(DIGITS) - 1)))], COLORS[letter]


def front_ends(said: State) -> Text:
    each = [
        f"{one['index']}: {one['in_flight']:,} requests, {one['rate']:,.0f} tok/s, loop {one['lag_ms']:.1f} ms late"
        for one in said["front_ends"]
    ]
    return Text("front-end " + " · ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in each))


def lately(said: State, count: int) -> Text:
    """What went wrong, in words, the newest first."""
    lines = [
        Text.assemble((clock(one["at"]), "bright_black"), " ", (one["text"], "red" if one["urgent"] else ""))
        for one in said["words"][:count]
    ]
    return Text("\n").join(lines)


def clock(at: float) -> str:
    return datetime.fromtimestamp(at).strftime("%H:%M:%S")


def what_happens(action: str, said: State) -> str:
    """What this does, before it is done."""
    run = sum(one[RUN] for one in said["ranks"])
    wait = sum(one[WAIT] for one in said["ranks"]) + said["queued"]
    runs, waits = f"{run:,} request{'s' if run != 1 else ''} that run", f"{wait:,} that wait"
    return {
        "keep": f"All ranks stop after the step they are in. {runs} stay as they are and go on when it is resumed; "
        f"{waits}, and new ones, wait.",
        "wait": f"{runs} are finished first, which lasts as long as the longest answer; {waits}, and new ones, wait. "
        "Then all ranks stop.",
        "abort": f"All ranks stop. {runs} and {waits} are ended now, with what they have; new ones are refused with "
        "503 until it is resumed.",
        "resume": f"All ranks go on at once: {runs} go on where they were, {waits} are started as there is room.",
    }[action]
