"""`paceline check`: walk every interleaving of a small deployment and say whether anything can go wrong."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from functools import partial
from itertools import product
from typing import Annotated, Any

import typer
from msgspec.structs import replace

from paceline.check.diagram import diagram
from paceline.check.dispatch import Dispatch, Limits
from paceline.check.epochs import Epochs, Scaled
from paceline.check.lockstep import Lockstep
from paceline.check.parties import Bound
from paceline.check.search import Finding, Model, search
from paceline.check.serving import Bounds, Serving
from paceline.console import status_line
from paceline.core.requests import SuspendMode
from paceline.core.rules import BINDING_RULES, OF_GENERATIONS, OF_SCALING, RULES, checked
from paceline.core.transaction import MODES
from paceline.errors import ConfigError
from paceline.report import check_writable, write

FOUND, NOT_DECIDED = 1, 2
OF_BOTH = ("ranks", "frontends", "requests", "losses", "crashes")
OF_WAVES = ("suspensions", "mode", "steps", "sync_interval", "backlog", "grouped", "notices", "max_memory_mb")
"""Flags that say nothing of the queue's search, nor of the answers'."""
NOT_OF_BINDING = ("scales", "answers")
NOT_OF_ANSWERS = ("frontends", "losses", "without")
SETS: dict[str, list[dict[str, int]]] = {
    "waves": [
        {"requests": 2, "losses": 1, "crashes": 1, "suspensions": 0},
        {"requests": 1, "losses": 1, "crashes": 0, "suspensions": 1},
        {"requests": 0, "losses": 1, "crashes": 1, "suspensions": 1},
    ],
    "grouped": [{"requests": 2, "losses": 1, "crashes": 0}, {"requests": 0, "losses": 1, "crashes": 1}],
    "scales": [
        {"ranks": 1, "requests": 1, "losses": 0, "crashes": 0},
        {"ranks": 1, "requests": 0, "losses": 1, "crashes": 0},
        {"ranks": 2, "requests": 0, "losses": 0, "crashes": 0},
    ],
}
"""What is walked where no flag bounds it: together faults make more states than there is time for."""
LARGEST = {"ranks": 2, "requests": 3, "losses": 1, "crashes": 1}
"""What is walked at most for a rule that is left out, where no flag bounds it."""


def _writable(path: str | None) -> str | None:
    try:
        check_writable(path)
    except ConfigError as error:
        raise typer.BadParameter(str(error).removeprefix("--report: ")) from None
    return path


ReportFlag = Annotated[
    str | None,
    typer.Option(metavar="FILE.html", help="Draw what was found as a sequence diagram.", callback=_writable),
]


def check(
    context: typer.Context,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks.")] = 2,
    frontends: Annotated[int, typer.Option("--front-ends", min=1, help="Front-ends; the walk covers any number.")] = 2,
    requests: Annotated[int, typer.Option(min=0, help="Requests, each at any time, to any rank.")] = 2,
    losses: Annotated[int, typer.Option(min=0, help="Broadcasts that one receiver misses.")] = 1,
    crashes: Annotated[int, typer.Option(min=0, help="Crashes: of the coordinator, or of a rank between waves.")] = 1,
    suspensions: Annotated[
        int,
        typer.Option(
            min=0,
            help="Suspensions, each resumed afterwards. Where no bound is given, one with a request and a loss, and one"
            " with a loss and a crash, are walked beside the rest.",
        ),
    ] = 0,
    mode: Annotated[str, typer.Option(help="Of the suspensions: keep, wait or abort.")] = "keep",
    without: Annotated[list[str] | None, typer.Option(help="A rule to leave out; may be repeated.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Engine steps of a request.")] = 1,
    sync_interval: Annotated[int, typer.Option(min=1, help="Steps between the ranks' agreements.")] = 1,
    backlog: Annotated[int, typer.Option(min=2, help="Messages of a rank unread while the ranks step on.")] = 3,
    grouped: Annotated[bool, typer.Option(help="Ranks form generations, and one may die in a wave.")] = False,
    scales: Annotated[
        int,
        typer.Option(
            min=0, help="Changes of how many ranks there are, by one; without --answers ranks form generations then."
        ),
    ] = 0,
    notices: Annotated[
        bool | None, typer.Option(help="Whether front-ends' notices come through; without --grouped they do.")
    ] = None,
    binding: Annotated[
        bool, typer.Option("--binding", help="Walk late binding: by default with each fault by itself.")
    ] = False,
    answers: Annotated[
        bool,
        typer.Option(
            "--answers",
            help="Walk what clients are given while ranks, connections and the coordinator die; with --scales, while"
            " ranks come and go too, by itself and with each fault meanwhile.",
        ),
    ] = False,
    max_memory_mb: Annotated[int, typer.Option(min=64, help="Give up above this much memory.")] = 4096,
    as_json: Annotated[bool, typer.Option("--json", help="Print states, violations, seconds and trace.")] = False,
    report: ReportFlag = None,
) -> None:
    """Walk every interleaving of the machines. Exit status 1: a violation was found; 2: not decided."""
    given = _given(context)
    finish = partial(_print, as_json=as_json, most_mb=max_memory_mb, report=report, rules=without or [])
    if binding or answers:
        bounds = {name: context.params[name] for name in (*OF_BOTH, "scales") if name in given}
        _check_flags(given, binding)
        models = _queues(bounds, _rules(without or [], BINDING_RULES)) if binding else _answers(bounds)
        finish(_walk(models, max_memory_mb))
        return
    bound = Bound(
        ranks, requests, losses, crashes, suspensions, _mode(mode), steps, sync_interval, _rules(without or [], RULES),
        grouped or bool(scales), scales, backlog, not (grouped or scales) if notices is None else notices,
    )  # fmt: skip
    models = _lockstep(bound, bounded=bool({"ranks", "requests", "losses", "crashes", "suspensions"} & given))
    finish(_walk(models, max_memory_mb))


def _check_flags(given: set[str], binding: bool) -> None:
    for name in (*OF_WAVES, *(NOT_OF_BINDING if binding else NOT_OF_ANSWERS)):
        if name in given:
            raise typer.BadParameter(f"not with --{'binding' if binding else 'answers'}", param_hint=_flag(name))


names = {"help_option_names": ["-h", "--help"]}
check_app = app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings=names)
app.command()(check)


def _lockstep(bound: Bound, *, bounded: bool) -> list[Model[Any]]:
    if bound.without:
        return [model_of(smaller) for smaller in smaller_bounds(bound if bounded else replace(bound, **LARGEST))]
    sets = SETS["scales" if bound.scales else "grouped" if bound.grouped else "waves"]
    return [model_of(bound if bounded else replace(bound, **one)) for one in ([{}] if bounded else sets)]


def model_of(bound: Bound) -> Model[Any]:
    """The model that walks it."""
    return (Scaled if bound.scales else Epochs if bound.grouped else Lockstep)(bound)


def smaller_bounds(bound: Bound) -> Iterator[Bound]:
    """Bounds within `bound`, of two ranks, fewer requests and the fewest faults first; `bound` comes last.

    What goes wrong within one of them goes wrong within all that are larger, and its story is shorter. What a rule is
    about that is left out occurs in all.
    """
    scaled = bool(bound.without & OF_SCALING)
    grouped = bound.grouped or scaled or bool(bound.without & OF_GENERATIONS)
    suspensions = max(bound.suspensions, int("suspension-number" in bound.without))
    notices = bound.notices and not (grouped and not bound.grouped)
    bound = replace(bound, grouped=grouped, scales=max(bound.scales, int(scaled)), notices=notices)
    faults = product(range(bound.losses + 1), range(bound.crashes + 1), range(suspensions + 1))
    by_requests = product(sorted(faults, key=lambda fault: (sum(fault), fault)), range(not scaled, bound.requests + 1))
    # A second rank is needed where one is to leave. Where the size changes, a crash makes more states than a loss.
    ranks = min(bound.ranks, 1 if "scaling-repeated" in bound.without else 2)
    for (losses, crashes, suspended), requests in sorted(
        by_requests, key=lambda one: (sum(one[0]) + one[1], scaled * one[0][1])
    ):
        yield replace(
            bound, ranks=ranks, requests=requests, losses=losses, crashes=crashes, suspensions=suspended
        )  # fmt: skip
    yield replace(bound, suspensions=suspensions)


def without_rule(rule: str) -> Finding:
    """What comes of leaving out one rule of waves, in the smallest deployment in which that is seen."""
    return _walk(_lockstep(Bound(without=frozenset({rule})), bounded=False), 4096)[-1]


def _queues(given: dict[str, int], without: frozenset[str]) -> list[Model[Any]]:
    """Where no flag names a fault, one search for each fault by itself."""
    faults: list[dict[str, int]] = [{"aborts": 1}, {"losses": 1}, {"crashes": 1}]
    none = {"aborts": 0, "losses": 0, "crashes": 0}
    named = any(name in given for name in none)
    return [Dispatch(Limits(**{**none, **fault, **given}, without=without)) for fault in ([{}] if named else faults)]


def _answers(given: dict[str, int]) -> list[Model[Any]]:
    """A crash, or a connection that ends and comes up again. Where ranks come and go, neither too."""
    faults = [{"crashes": 1}, {"crashes": 0, "cuts": 1}]
    if given.get("scales"):
        faults = [{"crashes": 0}, *({**fault, "tokens": 1} for fault in faults)]
    return [Serving(Bounds(**{**fault, **given})) for fault in ([{}] if "crashes" in given else faults)]


def _walk(models: list[Model[Any]], most_mb: int) -> list[Finding]:
    """Search one after the other until one of them finds something."""
    findings: list[Finding] = []
    with status_line() as say:
        for model in models:
            which = f"walk {len(findings) + 1} of {len(models)}: " if len(models) > 1 else ""

            def report(states: int, ahead: int, depth: int, which: str = which) -> None:
                # Nobody knows how many there will be: more than are known.
                text = f"{which}{states:,} states, {ahead:,} to look at, depth {depth}"
                say(text, (states - ahead) / states, growing=True)

            findings.append(search(model, report, most_mb))
            if findings[-1].violation or not findings[-1].decided:
                break
    return findings


def _print(findings: list[Finding], as_json: bool, most_mb: int, report: str | None, rules: list[str]) -> None:
    last = findings[-1]
    trace = [*last.story, last.violation] if last.violation else []
    if report is not None:
        write(report, diagram(last.story, last.violation or "Nothing was found that goes wrong.", rules))
    found = {
        "states": sum(one.states for one in findings),
        "moves": sum(one.moves for one in findings),
        "depth": max(one.depth for one in findings),
        "violations": int(bool(last.violation)),
        "seconds": round(sum(one.seconds for one in findings), 3),
        "trace": trace,
        "decided": last.decided,
    }
    if as_json:
        print(json.dumps(found))
    else:
        for line in [*trace, *([""] if trace else [])]:
            print(line)
        print(f"{found['states']:,} states, {found['moves']:,} moves, depth {found['depth']}, {found['seconds']:.1f} s")
        if trace:
            print("A violation was found; the story above is a shortest one.")
        elif last.decided:
            print("No violation: every invariant holds in every state, and from every state all can still be finished.")
        else:
            print(f"Not decided: this needs more than {most_mb} MB (--max-memory-mb); a smaller bound may do.")
    if trace or not last.decided:
        raise typer.Exit(FOUND if trace else NOT_DECIDED)


def _flag(name: str) -> str:
    return "--front-ends" if name == "frontends" else f"--{name.replace('_', '-')}"


def _given(context: typer.Context) -> set[str]:
    """The flags that are on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def _mode(name: str) -> SuspendMode:
    for mode in MODES:
        if mode == name:
            return mode
    raise typer.BadParameter(f"{name} is not one of {', '.join(MODES)}", param_hint="--mode")


def _rules(names: list[str], walked: Collection[str]) -> frozenset[str]:
    """`walked`: the rules of what is walked. Another one, left out, would break nothing there."""
    try:
        rules = checked(frozenset(names))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--without") from error
    for name in sorted(rules.difference(walked)):
        when = "only with --binding" if name in BINDING_RULES else "not with --binding"
        raise typer.BadParameter(f"{name}: {when}", param_hint="--without")
    return rules
