"""Policies and engines by name: ours, a package's, `module:Class`, and one clear line for all else."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from paceline.core.routing import POLICIES
from paceline.core.routing.candidates import Candidate, Candidates
from paceline.core.routing.policy import Query
from paceline.engines.base import EngineError
from paceline.engines.registry import PolicyError, find_engine, find_policy, policy_names
from paceline.errors import ConfigError
from paceline.settings import ServerConfig

MINE = """
from paceline.core.routing.policy import Policy


class Last(Policy):
    def choose(self, candidates, query):
        return candidates.ranks[-1]


class Nothing:
    pass
"""
ENGINES = "[paceline.engines]\necho = examples.echo_engine:EchoEngine\ntimed = examples.echo_engine:EchoEngine\n"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed package that announces policies: its module, and its metadata as pip leaves it."""
    (tmp_path / "routing_of_mine.py").write_text(MINE)
    metadata = tmp_path / "routing_of_mine-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: routing-of-mine\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[paceline.routing]\nlast = routing_of_mine:Last\nleast-load = routing_of_mine:Last\n" + ENGINES
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("routing_of_mine", None)


@pytest.mark.parametrize("name", POLICIES)
def test_ours(name: str) -> None:
    assert find_policy(name) is POLICIES[name]
    assert ServerConfig(routing=name).routing == name


@pytest.mark.usefixtures("package")
def test_engines_of_a_package_and_ours() -> None:
    assert find_engine("echo").__name__ == "EchoEngine"
    assert find_engine("timed").__name__ == "TimedEngine"
    with pytest.raises(EngineError, match="there are echo, llama, moe, timed, timed-lockstep, vllm, or"):
        find_engine("nope")
    with pytest.raises(EngineError, match=r"os:path is not a subclass of paceline.engines.base.Engine"):
        find_engine("os:path")


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("name", ["last", "routing_of_mine:Last"])
def test_one_of_a_package(name: str) -> None:
    policy = find_policy(name)(0, 2)
    assert policy.choose(Candidates(Candidate(rank, 0, 0, 0, 0, 0, 0) for rank in (3, 9, 4)), Query(1)) == 9
    assert ServerConfig(routing=name).routing == name


@pytest.mark.usefixtures("package")
def test_a_package_does_not_replace_ours() -> None:
    assert find_policy("least-load") is POLICIES["least-load"]
    assert policy_names() == [*POLICIES, "last"]


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("magic", "must be one of sticky, least-load, .*, lockstep, last, or module:Class, not 'magic'"),
        ("", "must be one of"),
        ("routing_of_mine:", "cannot import"),
        ("routing_of_mine:None", "cannot import"),
        (":Last", "cannot import"),
        ("no_such_module_here:Last", "No module named 'no_such_module_here'"),
        ("routing_of_mine:Nothing", "is not a subclass of paceline.core.routing.policy.Policy"),
        ("routing_of_mine:__name__", "is not a subclass of paceline.core.routing.policy.Policy"),
    ],
)
def test_what_is_none_is_one_line(name: str, text: str) -> None:
    with pytest.raises(PolicyError, match=text):
        find_policy(name)
    with pytest.raises(ConfigError, match=r"^--routing: ") as raised:
        ServerConfig(routing=name)
    assert "\n" not in str(raised.value)


def test_the_interface_itself_is_no_policy_to_serve_with() -> None:
    with pytest.raises(PolicyError, match="does not say how to choose"):
        find_policy("paceline.core.routing.policy:Policy")


def test_the_example_chooses_by_length() -> None:
    policy = find_policy("examples.split_policy:SplitByLength")()
    candidates = Candidates(Candidate(rank, 9 - rank, 0, 0, 0, 0, 0) for rank in range(8))
    assert policy.choose(candidates, Query(10)) == 5
    assert policy.reason() == "a short prompt"
    assert policy.choose(candidates, Query(5000)) == 7
    assert policy.choose(Candidates([candidates[0]]), Query(10)) == 0
