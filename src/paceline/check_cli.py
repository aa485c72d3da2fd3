"""`paceline check`: walk every interleaving of a small deployment and say whether anything can go wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress as Bars, SpinnerColumn, TextColumn, TimeElapsedColumn

from paceline.core.requests import SuspendMode
from paceline.core.rules import BINDING_RULES, RULES, checked
from paceline.core.standing import MODES
from paceline.simulate.explore import Bound, Progress, Result, walk
from paceline.simulate.explore_answers import AnswersWorld
from paceline.simulate.explore_answers_place import Bounds
from paceline.simulate.explore_answers_scaling import ScaledAnswersWorld
from paceline.simulate.explore_binding import KeyedWorld
from paceline.simulate.explore_binding_world import Limits
from paceline.simulate.explore_search import Finding, World, search

FOUND, NOT_DECIDED = 1, 2
OF_BOTH = ("ranks", "front_ends", "requests", "losses", "crashes")
OF_WAVES = ("suspensions", "mode", "steps", "sync_interval", "backlog", "grouped", "notices", "max_memory_mb")
"""Flags that say nothing of brokered binding's walk, nor of the answers'."""
NOT_OF_BINDING = ("scales", "answers")
NOT_OF_ANSWERS = ("front_ends", "losses", "without")


def check(
    ranks: Annotated[int, typer.Option(min=1, help="Ranks.")] = 3,
    front_ends: Annotated[int, typer.Option(min=1, help="Front-ends; the walk covers any number.")] = 2,
    requests: Annotated[int, typer.Option(min=0, help="Requests, each at any time, to any rank.")] = 3,
    losses: Annotated[int, typer.Option(min=0, help="Broadcasts that one receiver misses.")] = 1,
    crashes: Annotated[int, typer.Option(min=0, help="Crashes: of the coordinator, or of a rank between waves.")] = 1,
    suspensions: Annotated[int, typer.Option(min=0, help="Suspensions, each resumed afterwards.")] = 0,
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
        bool, typer.Option("--binding", help="Walk brokered binding: by default with each fault by itself.")
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
    context: typer.Context = None,  # type: ignore[assignment]
) -> None:
    """Walk every interleaving of the machines. Exit status 1: a violation was found; 2: not decided."""
    if binding or answers:
        flag = "--binding" if binding else "--answers"
        for name in (*OF_WAVES, *(NOT_OF_BINDING if binding else NOT_OF_ANSWERS)):
            if _is_given(context, name):
                raise typer.BadParameter(f"not with {flag}", param_hint=f"--{name.replace('_', '-')}")
        given = {name: context.params[name] for name in (*OF_BOTH, "scales") if _is_given(context, name)}
        walks = _binding_walks(given, _rules(without or [], BINDING_RULES)) if binding else _answers_walks(given)
        _search(walks, as_json)
        return
    bound = Bound(
        ranks, front_ends, requests, losses, crashes, steps=steps, sync_interval=sync_interval,
        max_memory_mb=max_memory_mb, suspensions=suspensions, mode=_mode(mode), without=_rules(without or [], RULES),
        backlog=backlog, grouped=grouped, scales=scales, notices=notices,
    )  # fmt: skip
    with progress() as report:
        result = walk(bound, report)
    print(json.dumps(document(result)) if as_json else "\n".join(lines(result, bound)))
    if result.violations:
        raise typer.Exit(FOUND)
    if not result.decided:
        raise typer.Exit(NOT_DECIDED)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command(help="Walk every interleaving of the machines. Exit status 1: a violation was found; 2: not decided.")(
    check
)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _binding_walks(given: dict[str, int], without: frozenset[str]) -> list[World[Any]]:
    """`given`: the flags that bound the walk. Where none names a fault, one walk for each fault by itself."""
    faults: list[dict[str, int]] = [{"aborts": 1}, {"losses": 1}, {"crashes": 1}]
    none = {"aborts": 0, "losses": 0, "crashes": 0}
    named = any(name in given for name in none)
    return [KeyedWorld(Limits(**{**none, **fault, **given}, without=without)) for fault in ([{}] if named else faults)]


def _answers_walks(given: dict[str, int]) -> list[World[Any]]:
    """Likewise: a crash, or a connection that ends and comes up again. Where ranks come and go, neither too."""
    faults = [{"crashes": 1}, {"crashes": 0, "cuts": 1}]
    kind = AnswersWorld
    if given.get("scales"):
        faults, kind = [{"crashes": 0}, *({**fault, "tokens": 1} for fault in faults)], ScaledAnswersWorld
    return [kind(Bounds(**{**fault, **given})) for fault in ([{}] if "crashes" in given else faults)]


def _search(worlds: list[World[Any]], as_json: bool) -> None:
    """Walk one after the other until one of them finds something; print what came of it."""
    findings: list[Finding] = []
    for world in worlds:
        with progress() as report:
            findings.append(search(world, lambda *now, tell=report: tell(Progress(*now))))
        if findings[-1].violation:
            break
    last = findings[-1]
    found = {
        "states": sum(one.states for one in findings),
        "moves": sum(one.moves for one in findings),
        "depth": max(one.depth for one in findings),
        "violations": int(bool(last.violation)),
        "seconds": round(sum(one.seconds for one in findings), 3),
        "trace": [*last.story, last.violation] if last.violation else [],
        "decided": True,
    }
    if as_json:
        print(json.dumps(found))
    else:
        for line in [*last.story, *([last.violation, ""] if last.violation else [])]:
            print(line)
        print(f"{found['states']:,} states, {found['moves']:,} moves, depth {found['depth']}, {found['seconds']:.1f} s")
        print("A violation was found." if last.violation else "No violation.")
    if last.violation:
        raise typer.Exit(FOUND)


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


def document(result: Result) -> dict[str, object]:
    """The result as `--json` prints it."""
    return {
        "states": result.states,
        "moves": result.moves,
        "depth": result.depth,
        "violations": result.violations,
        "seconds": round(result.seconds, 3),
        "trace": result.trace,
        "decided": result.decided,
    }


def lines(result: Result, bound: Bound) -> Iterator[str]:
    """The result for a person."""
    yield from result.trace
    if result.trace:
        yield ""
    yield f"{result.states:,} states, {result.moves:,} moves, depth {result.depth}, {result.seconds:.1f} s"
    if result.violations:
        yield "A violation was found; the story above is a shortest one."
    elif result.decided:
        yield "No violation: every invariant holds in every state, and from every state all can still be finished."
    else:
        yield f"Not decided: this needs more than {bound.max_memory_mb} MB (--max-memory-mb); a smaller bound may do."


@contextmanager
def progress() -> Iterator[Callable[[Progress], None]]:
    """A line on a terminal's stderr that says how far the walk is; nothing anywhere else."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda _: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Bars(*columns, console=console, transient=True) as bars:
        task = bars.add_task("walking", total=None)
        begin = time.perf_counter()

        def report(now: Progress) -> None:
            rate = now.states / max(time.perf_counter() - begin, 0.001)
            text = f"{now.states:,} states, {now.frontier:,} to look at, depth {now.depth}, {rate:,.0f} states/s"
            bars.update(task, description=text)

        yield report
