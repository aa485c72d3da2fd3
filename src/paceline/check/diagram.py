"""A story that `paceline check` has found, as a sequence diagram: a column each party, an arrow each message.

It is drawn from the story's own sentences, which are made of few words (`story.py` and the models): who sends, says,
reads or hears what of whom. What is said goes on its way (a broken line), what is read has arrived (a whole one); what
is no message is a mark at those it is about. The sentence itself stands above what is drawn of it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

from msgspec import Struct

from paceline.report import page

PARTY = r"(?:(?:the|a|an) )?(operator|client|front-end(?: \d+)?|coordinator|node|rank \d+)"
COORDINATOR, FRONT_END = "coordinator", "front-end"
RULES: tuple[tuple[str, str, str], ...] = (
    (rf"{PARTY} reads {PARTY}'s (.+)", "2", "1"),
    (rf"{PARTY} hears (?P<what>.+?) (?:of|from) {PARTY}", "3", "1"),
    (rf"{PARTY} (?:reads|hears) {PARTY}$", "2", "1"),
    (rf"{PARTY} (?:reads|hears) (.+)", COORDINATOR, "1"),
    (rf"{PARTY} sends {PARTY} (.+)", "1", "2"),
    (rf"{PARTY}[^:]*? sends {PARTY} (a request)", "1", "2"),
    (rf"(the request) stamped \S+ arrives at {PARTY}", FRONT_END, "2"),
    (rf"{PARTY}'s (.+) reaches {PARTY}", "1", "3"),
    (rf"(the call \(.+\)) reaches {PARTY}", FRONT_END, "2"),
    (rf"{PARTY} says (.+)", "1", COORDINATOR),
    (rf"{PARTY} (reports)", "1", COORDINATOR),
    (rf"{PARTY} (asks.*)", "1", FRONT_END),
    (r"the front-ends (?:hear of) (.+)", COORDINATOR, FRONT_END),
    (r"the front-ends tell the coordinator of (.+)", FRONT_END, COORDINATOR),
)
"""A sentence, and whose the message is and who gets it: a party, or the group that names it."""
LATER = re.compile(r" says |which is on its way|^the coordinator sends ", re.IGNORECASE)
"""Not read yet."""
ALSO = re.compile(r"and the coordinator (a notice), which (is on its way|it reads)")
WIDE, HIGH, TEXT = 190, 30, 42
ORDER = ("operator", "client", FRONT_END, COORDINATOR, "node", "rank")
STYLE = f"""
#story {{ position: relative; }}
#story .life {{ position: absolute; top: 26px; bottom: 0; border-left: 1px solid var(--line); }}
#heads {{ display: flex; }} #heads b {{ width: {WIDE}px; text-align: center; }}
.step {{ position: relative; margin: 10px 0 0; }} .step p {{ margin: 0; max-width: 900px; }}
.step p span, .wrong {{ background: var(--card); padding: 0 4px; }} svg {{ display: block; }}
svg text {{ fill: var(--ink); font-size: 11px; text-anchor: middle; paint-order: stroke; stroke: var(--card);
  stroke-width: 4px; }}
.wrong {{ position: relative; color: var(--bad); font-weight: 700; margin-top: 12px; padding: 6px;
  border: 1px solid var(--bad); }}
"""


class Arrow(Struct, frozen=True):
    """A message. `later`: it is on its way."""

    sender: str
    receiver: str
    what: str
    later: bool = False


class Mark(Struct, frozen=True):
    """Something that happens to these, and is no message."""

    parties: list[str]
    what: str


def drawn_of(line: str) -> list[Arrow | Mark]:
    """What is drawn of one sentence, without its number."""
    found: list[Arrow | Mark] = []
    before: list[str] = []
    for clause in re.split(r"; |(?<!asks for): ", line.rstrip(".")):
        arrow = _arrow(clause)
        if arrow is None:
            before = _parties(clause) or before
            found.append(Mark(before, clause))
            continue
        found.append(arrow)
        if (notice := ALSO.search(clause)) is not None:
            found.append(Arrow(arrow.sender, COORDINATOR, notice[1], notice[2] != "it reads"))
    return found


def _arrow(clause: str) -> Arrow | None:
    for sentence, sender, receiver in RULES:
        match = re.match(sentence, clause, re.IGNORECASE)
        if match is None:
            continue
        groups = match.groups()
        ends = [groups[int(one) - 1].lower() if one.isdigit() else one for one in (sender, receiver)]
        what = [group for group in groups if group.lower() not in ends]
        first = clause.split(", and the coordinator a notice")[0]
        later = LATER.search(first) is not None
        if ends[0] != ends[1]:
            return Arrow(ends[0], ends[1], what[-1] if what else "", later)
    return None


def _parties(clause: str) -> list[str]:
    found = [match.lower() for match in re.findall(PARTY, clause, re.IGNORECASE)]
    return list(dict.fromkeys(found)) or (["rank"] if re.search("all ranks|a member", clause.lower()) else [])


def _place(party: str) -> tuple[int, str]:
    kind = next(kind for kind in ORDER if party.startswith(kind))
    return ORDER.index(kind), party.zfill(20)


def diagram(story: list[str], violation: str, rules: Iterable[str]) -> str:
    """The whole page. `rules`: those that were left out."""
    steps = [(line, drawn_of(re.sub(r"^\d+\. ", "", line))) for line in story]
    named = {COORDINATOR}
    for _, drawn in steps:
        for one in drawn:
            named |= {one.sender, one.receiver} if isinstance(one, Arrow) else set(one.parties) - {"rank"}
    parties = sorted(named, key=_place)
    lives = "".join(f'<div class="life" style="left: {at * WIDE + WIDE // 2}px"></div>' for at in range(len(parties)))
    heads = "".join(f"<b>{html.escape(party)}</b>" for party in parties)
    rows = "".join(
        f'<div class="step"><p><span>{html.escape(line)}</span></p>{_picture(drawn, parties)}</div>'
        for line, drawn in steps
    )
    body = (
        f'<section><div id="story">{lives}<div id="heads">{heads}</div>{rows}'
        f'<div class="wrong">{html.escape(violation)}</div></div></section>'
    )
    left_out = ", ".join(sorted(rules))
    about = "A shortest way to it. A whole line: it is read; a broken one: it is on its way."
    return page(f"paceline check: without {left_out}" if left_out else "paceline check", about, body, STYLE)


def _picture(drawn: list[Arrow | Mark], parties: list[str]) -> str:
    lines = []
    for row, one in enumerate(drawn):
        down = row * HIGH + 20
        if isinstance(one, Arrow):
            lines.append(_line(one, parties, down))
            continue
        about = [
            party for party in parties if party in one.parties or ("rank" in one.parties and party.startswith("rank"))
        ]
        lines += [f'<circle cx="{_across(party, parties)}" cy="{down}" r="4" fill="var(--p)"/>' for party in about]
        if about and row:
            middle = sum(_across(party, parties) for party in about) / len(about)
            lines.append(_text(middle, down - 7, one.what))
    size = f'width="{len(parties) * WIDE}" height="{len(drawn) * HIGH + 4}"'
    return f"<svg {size}>{''.join(lines)}</svg>"


def _line(arrow: Arrow, parties: list[str], down: int) -> str:
    begin, end = _across(arrow.sender, parties), _across(arrow.receiver, parties)
    back = -7 if end > begin else 7
    dash = ' stroke-dasharray="5 4"' if arrow.later else ""
    return (
        f'<path d="M{begin},{down}H{end}m{back},-4L{end},{down}l{back},4" fill="none" stroke="var(--x)" '
        f'stroke-width="1.5"{dash}/>{_text((begin + end) / 2, down - 6, arrow.what)}'
    )


def _text(across: float, down: int, what: str) -> str:
    shown = what if len(what) <= TEXT else what[: TEXT - 1] + "…"
    return f'<text x="{across:.0f}" y="{down}"><title>{html.escape(what)}</title>{html.escape(shown)}</text>'


def _across(party: str, parties: list[str]) -> int:
    return parties.index(party) * WIDE + WIDE // 2
