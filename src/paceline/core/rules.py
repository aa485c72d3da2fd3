"""The rules without which lockstep ranks hang, or step where they must not; each can be left out to show it.

Production machines are made with all of them. The explorer makes machines without one (`paceline check
--without RULE`) and must find what breaks: a rule that nothing breaks without is no rule.
"""

from __future__ import annotations

from collections.abc import Set

RULES: dict[str, str] = {
    "acknowledged-wakes": "A wake is repeated until every ready rank has said that it runs in that wave or later.",
    "own-report": "A paused rank that takes a request says that it started; what it says of itself wakes the others.",
    "stale-notice-leaves-nobody-out": "A notice of an older wave than the current one leaves no rank out of the wake.",
    "finished-waves-ignored": "A rank ignores a wake for a wave that it has finished.",
    "suspension-number": "An acknowledgement counts for the suspension whose number it carries and for no other.",
    "new-coordinator-asks": "A new coordinator asks all ranks who they are and what they do.",
    "joiner-told-the-wave": "A rank that joins is told the wave before it is ready.",
    "behind-at-rest-told": "A rank that rests a wave behind the others, as they finished one while it joined, is told.",
    "leaver-drained": "A rank that is to leave goes when front-ends send it nothing more and it has nothing left.",
    "scaling-repeated": "A change of the size is repeated until each node has said that it knows.",
}
"""Name to the rule."""

OF_GENERATIONS = frozenset({"behind-at-rest-told"})
"""Rules that only ranks which form epochs need."""
OF_SCALING = frozenset({"leaver-drained", "scaling-repeated"})
"""Rules that are about more ranks, and fewer."""

BINDING_RULES: dict[str, str] = {
    "grants-repeated": "A grant is repeated until its front-end has said what became of the request.",
    "grants-count": "What was granted counts against the rank's room until the rank's own figures hold it.",
    "unsent-asked-again": "A front-end asks again for all that it holds, where a coordinator is new or has missed it.",
}
"""Of late binding (`queue.py`): the walk of `paceline check --binding` finds what breaks."""


def checked(without: Set[str]) -> frozenset[str]:
    """The names, as given. Raises ValueError naming one that is not a rule."""
    for name in without:
        if name not in RULES and name not in BINDING_RULES:
            raise ValueError(f"{name} is not a rule; rules: {', '.join([*RULES, *BINDING_RULES])}")
    return frozenset(without)
