"""docs/PROTOCOL.md says what the code does: its tables, its dumps, its bytes and its worked example."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import protocol_reference as reference
import pytest

from paceline import coordinator_cli
from paceline.core import codec, messages, retry
from paceline.core.coordinator import load_table as board
from paceline.core.frontend.events import CoordinatorSaid, Event, Submit
from paceline.core.frontend.machine import Frontend
from paceline.core.load import Load
from paceline.core.messages import LoadView, Member, Members, RankView
from paceline.core.rank import machine as rank
from paceline.core.requests import Message, SamplingParams
from paceline.core.routing import LeastLoad
from paceline.net import node as rendezvous, sockets
from paceline.settings import ParallelConfig

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "PROTOCOL.md"

ALL_CLASSES = [message for union in codec.UNIONS.values() for message in reference.classes_of(union)]
ALL_CLASSES += reference.parts()


@pytest.fixture(scope="module")
def document() -> str:
    return DOCUMENT.read_text(encoding="utf-8")


def subclasses(base: type[Message]) -> Iterator[type[Message]]:
    for child in base.__subclasses__():
        if child.__module__.startswith("paceline."):
            yield child
        yield from subclasses(child)


def section(document: str, message: type[Message]) -> str:
    _, after = re.split(rf"\n#### {message.__name__}\b", document)
    return after.split("\n#### ")[0]


def flowed(document: str) -> str:
    """The document as if it were one line."""
    return " ".join(document.split())


# The generator ------------------------------------------------------------------------------------


def test_document_is_current() -> None:
    assert reference.main([str(DOCUMENT), "--check"]) == 0, "run `make docs`"


def test_check_changes_nothing_and_rewriting_mends(tmp_path: Path, document: str) -> None:
    stale = tmp_path / "stale.md"
    text = document.replace("| 1 | `version` |", "| 1 | `age` |", 1)
    stale.write_text(text, encoding="utf-8")
    assert reference.main([str(stale), "--check"]) == 1
    assert stale.read_text(encoding="utf-8") == text
    assert reference.main([str(stale)]) == 0
    assert stale.read_text(encoding="utf-8") == document


@pytest.mark.parametrize(
    "text",
    [
        "",
        reference.BEGIN,
        f"{reference.END}\n{reference.BEGIN}\n",
        f"{reference.BEGIN}\n{reference.END}\n{reference.BEGIN}\n{reference.END}\n",
    ],
)
def test_markers_that_are_no_pair_are_named(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file.md"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        reference.main([str(file)])
    assert ended.value.code == 2
    assert str(file) in capsys.readouterr().err
    assert file.read_text(encoding="utf-8") == text


def test_every_message_class_is_in_the_document(document: str) -> None:
    assert set(ALL_CLASSES) == set(subclasses(Message))
    for message in ALL_CLASSES:
        tag = codec.tag_of(message)
        heading = f"#### {message.__name__}" + (f": `{tag}`" if tag else "")
        assert document.count(f"\n{heading}\n") == 1, heading


def test_every_field_has_its_row_at_its_place(document: str) -> None:
    for message in ALL_CLASSES:
        rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", section(document, message), re.MULTILINE)
        first = 0 if codec.tag_of(message) is None else 1
        assert rows == [(str(place), name) for place, name in enumerate(message.__struct_fields__, first)]


def test_every_word_of_a_docstring_is_in_the_document(document: str) -> None:
    for message in ALL_CLASSES:
        words = set(re.findall(r"\w+", message.__doc__ or ""))
        assert words <= set(re.findall(r"\w+", section(document, message))), message.__name__


def test_field_sentences() -> None:
    class Example(Message, frozen=True):
        """What it is. `a`, `b`: two of a kind. `c` is told above.

        `d`: more: than this. And this. `nobody`: not a field.
        """

        a: int
        b: int
        c: int
        d: int = 4

    prose, meanings = reference.split_docstring(Example)
    assert prose == ["What it is. `c` is told above.", "`nobody`: not a field."]
    assert meanings == {"a": "two of a kind", "b": "two of a kind", "d": "more: than this. And this."}


# Bytes --------------------------------------------------------------------------------------------


def dumps(document: str) -> list[list[tuple[bytes, str, str]]]:
    """The hex dumps: lines of (bytes, value, field), in columns of 40 and 22 characters and the rest."""
    blocks = re.findall(r"```text\n(.*?)\n```", document, re.DOTALL)
    return [
        [(bytes.fromhex(line[:40]), line[40:62].strip(), line[62:]) for line in block.split("\n")] for block in blocks
    ]


def test_dumps_decode_to_what_is_said(document: str) -> None:
    decoders = {"rank-hello": codec.from_rank(), "rank-report": codec.from_rank(), "add": codec.request()}
    frames = dumps(document)
    assert [msgspec.json.decode(lines[1][1]) for lines in frames] == list(decoders)
    for lines, decoder, example in zip(frames, decoders.values(), reference.EXAMPLES.values(), strict=True):
        frame = b"".join(encoded for encoded, _, _ in lines)
        assert decoder.decode(frame) == example
        assert codec.encode(example) == frame


def test_dump_lines_say_their_bytes(document: str) -> None:
    for lines in dumps(document):
        for encoded, value, _ in lines:
            if " of " in value:
                kind, _, length = value.partition(" of ")
                items = range(int(length))
                filled = encoded + bytes(items if kind == "array" else [byte for item in items for byte in (item, 0)])
                opened = msgspec.msgpack.decode(filled)
                assert opened == (list(items) if kind == "array" else dict.fromkeys(items, 0))
            else:
                assert msgspec.msgpack.decode(encoded) == msgspec.json.decode(value)


def test_dump_fields_are_in_wire_order(document: str) -> None:
    for lines, example in zip(dumps(document), reference.EXAMPLES.values(), strict=True):
        fields = [field.partition(".")[0].partition(":")[0] for _, _, field in lines[2:]]
        assert tuple(dict.fromkeys(fields)) == example.__struct_fields__


def test_presence_topics_and_routing_id(document: str) -> None:
    frontend, number, incarnation = 1700000000123456789, 3, 1700000000000000001
    assert f"front-end {frontend}: `{codec.frontend_topic(frontend).hex(' ')}`" in document
    topic = codec.rank_topic(number, incarnation).hex(" ")
    assert f"rank {number}, incarnation {incarnation}: `{topic}`" in document
    routing_id = frontend.to_bytes(8, "little").hex(" ")
    assert f"Front-end {frontend} has the routing id `{routing_id}`" in flowed(document)


def test_limits(document: str) -> None:
    document = flowed(document)
    assert f"4 MiB ({codec.MAX_CONTROL_BYTES:,} bytes)" in document
    assert f"64 MiB ({codec.MAX_REQUEST_BYTES:,} bytes)" in document
    assert f"at most {rendezvous.MAX_BYTES:,} bytes" in document
    assert f"every {rendezvous.ASK_AGAIN_MS} ms" in document
    assert f"queue of {sockets.SEND_QUEUE_MESSAGES:,} messages" in document
    assert f"This is version {messages.PROTOCOL_VERSION}." in document


def test_times(document: str) -> None:
    document = flowed(document)
    assert f"Repeat it every {rank.HELLO_REPEAT_S * 1000:.0f} ms until an Admit" in document
    interval = inspect.signature(rank.Rank).parameters["sync_interval"].default
    assert f"on every {interval}th after that" in document
    assert f"after {retry.FIRST_S * 1000:.0f} ms, and then at intervals that double" in document
    assert f"double up to {retry.LONGEST_S:g} s" in document
    assert f"waits up to {board.STEP_WAIT_S * 1000:g} ms" in document
    assert f"Without any change a LoadView is sent every {board.HEARTBEAT_S:g} s" in document


def test_addresses(document: str) -> None:
    options = coordinator_cli.parser()
    for name in ("front-publish", "back-output", "back-publish"):
        assert f"\n    {name:14}{options.get_default(name.replace('-', '_') + '_address')}\n" in document
    assert f"every {options.get_default('min_stats_update_interval_ms')} ms (`--min-stats" in flowed(document)
    assert f"({ParallelConfig().data_parallel_rpc_port})" in document


def test_rendezvous_frames() -> None:
    question = msgspec.msgpack.encode(rendezvous.WhereIs(1, {"--engine": "llama"}))
    assert msgspec.msgpack.decode(question) == ["where-is", 1, {"--engine": "llama"}]
    answer = msgspec.msgpack.encode(rendezvous.Here("front", "output", "publish", "no"))
    assert msgspec.msgpack.decode(answer) == ["here", "front", "output", "publish", "no"]


# The rules for readers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frame",
    [
        ["start-wave", 0, 7, 1, "appended later", [2]],
        ["rank-hello", 1, 0, 7, "ipc:///a", False],
        ["rank-report", 0, 7, 1, 0, False, [0, 0, 1, 0, 0, 0, 5, 2]],
    ],
)
def test_accepted_frames(frame: list[object]) -> None:
    assert codec.from_rank().decode(msgspec.msgpack.encode(frame))


@pytest.mark.parametrize(
    ("frame", "kind"),
    [
        (["start-wave", 0, 7], "malformed"),
        (["start-wave", 0, 7, 1.0], "malformed"),
        (["start-wave", True, 7, 1], "malformed"),
        (["start-wave", None, 7, 1], "malformed"),
        (["no-such-tag", 0, 7, 1], "malformed"),
        (["rank-hello", 1, 0, 7, b"ipc:///a", False], "malformed"),
        (["rank-hello", 2, 0, 7, "ipc:///a", False], "version"),
        (["rank-report", 0, 7, 1, 0, False, [0, 0, 1, 0, 0, 0, float("inf")]], "value"),
        ({"start-wave": 0}, "malformed"),
    ],
)
def test_refused_frames(frame: object, kind: str) -> None:
    with pytest.raises(codec.BadMessage) as bad:
        codec.from_rank().decode(msgspec.msgpack.encode(frame))
    assert bad.value.kind == kind


# The worked example -------------------------------------------------------------------------------


def test_worked_example_of_the_accounting(document: str) -> None:
    me, life, slots = 4711, 8, 16
    frontend = Frontend(me, LeastLoad())
    request = iter(range(1, 10))
    view = iter(range(1, 10))

    def send(tokens: int) -> Submit:
        return Submit(next(request), [0] * tokens, SamplingParams(max_tokens=8))

    def loads(step: int, taken: int, load: Load, coordinator: int = 1) -> CoordinatorSaid:
        entry = RankView(0, life, step, load, {me: taken} if taken else {})
        return CoordinatorSaid(LoadView(coordinator, next(view), 0, False, [entry]))

    frontend.handle(CoordinatorSaid(Members(1, 1, 0, False, [Member(0, life, "ipc:///r")])), 0.0)
    rows: list[tuple[str, Event]] = [
        ("send 1, of 100 tokens", send(100)),
        ("send 2, of 50 tokens", send(50)),
        ("view of step 7: 0 waiting, 1 running, 40 to prefill, taken 1", loads(7, 1, Load(0, 1, slots, 40))),
        ("send 3, of 200 tokens", send(200)),
        ("view of a new coordinator without a report yet: step 0, all 0, taken 0", loads(0, 0, Load(), coordinator=2)),
        (
            "view of step 8: 1 waiting, 1 running, 50 to prefill, taken 2",
            loads(8, 2, Load(1, 1, slots, 50), coordinator=2),
        ),
        (
            "view of step 9: 0 waiting, 3 running, 120 to prefill, taken 3",
            loads(9, 3, Load(0, 3, slots, 120), coordinator=2),
        ),
    ]
    shown = []
    for said, event in rows:
        frontend.handle(event, 0.0)
        load = frontend.believed(0)
        shown.append(f"| {said} | {load.waiting} | {load.running} | {load.prefill_tokens} |")
    assert "\n".join(shown) in document
