"""Incremental text: whatever the cuts, the same text."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given, strategies as st

from paceline.engines.text import IncrementalText

letters = st.text(alphabet="abé🎉日", max_size=24)
stops = st.lists(st.text(alphabet="abé🎉日", min_size=1, max_size=4), max_size=4)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[begin:end] for begin, end in pairwise(edges)]


def read(pieces: list[bytes], stop: list[str], *, include_stop: bool = False) -> tuple[list[str], str | None]:
    """What is shown piece by piece, and the stop string that ended it."""
    text = IncrementalText(stop, include_stop=include_stop)
    shown: list[str] = []
    for piece in pieces:
        shown.append(text.push(piece))
        if text.stopped_by is not None:
            return shown, text.stopped_by
    shown.append(text.finish())
    return shown, text.stopped_by


def expected(text: str, stop: list[str], *, include_stop: bool) -> tuple[str, str | None]:
    """One character at a time, with all of the text in view: the definition, written as plainly as can be."""
    for end in range(len(text) + 1):
        ended = [word for word in stop if text[:end].endswith(word)]
        if ended:
            longest = max(ended, key=len)
            return text[: end if include_stop else end - len(longest)], longest
    return text, None


@given(text=letters, stop=stops, places=st.lists(st.integers(0, 200), max_size=12), include_stop=st.booleans())
@example(text="aab", stop=["ab", "b"], places=[1, 2], include_stop=False)
@example(text="abab", stop=["abb", "bab"], places=[3], include_stop=True)
def test_the_text_does_not_depend_on_the_cuts(
    text: str, stop: list[str], places: list[int], include_stop: bool
) -> None:
    shown, stopped_by = read(cut(text.encode(), places), stop, include_stop=include_stop)
    assert ("".join(shown), stopped_by) == expected(text, stop, include_stop=include_stop)


@given(data=st.binary(max_size=24), places=st.lists(st.integers(0, 200), max_size=12))
def test_invalid_bytes_become_replacement_characters(data: bytes, places: list[int]) -> None:
    shown, _ = read(cut(data, places), [])
    assert "".join(shown) == data.decode("utf-8", "replace")


@given(text=letters, stop=stops, places=st.lists(st.integers(0, 200), max_size=12))
def test_only_what_may_become_a_stop_string_is_held_back(text: str, stop: list[str], places: list[int]) -> None:
    seen, shown = b"", ""
    reader = IncrementalText(stop)
    for piece in cut(text.encode(), places):
        seen += piece
        shown += reader.push(piece)
        if reader.stopped_by is not None:
            return
        whole = seen.decode("utf-8", "ignore")
        held = whole[len(shown) :]
        assert shown + held == whole
        assert not held or any(len(word) > len(held) and word.startswith(held) for word in stop)


@pytest.mark.parametrize(("include_stop", "visible"), [(False, "one "), (True, "one two")])
def test_a_stop_string_may_span_pieces(include_stop: bool, visible: str) -> None:
    shown, stopped_by = read([b"one t", b"w", b"o three"], ["two"], include_stop=include_stop)
    assert ("".join(shown), stopped_by) == (visible, "two")


def test_a_beginning_of_a_stop_string_is_shown_when_it_comes_to_nothing() -> None:
    assert read([b"one t", b"ree"], ["two"]) == (["one ", "tree", ""], None)
    assert read([b"one t"], ["two"]) == (["one ", "t"], None)


def test_no_piece_ends_inside_a_character() -> None:
    pieces = [bytes([byte]) for byte in "é🎉".encode()]
    assert read(pieces, []) == (["", "é", "", "", "", "🎉", ""], None)


def test_an_unfinished_character_can_be_a_stop_string() -> None:
    assert read([b"a\xf0"], ["\ufffd"]) == (["a", ""], "\ufffd")
