"""Whose report a frame is, read without decoding it."""

from __future__ import annotations

import itertools

import pytest

from paceline.core import codec
from paceline.core.load import Load
from paceline.core.messages import FromRank, RankHello, RankLeaving, RankReport, WaveComplete
from tests.net.peers import GARBAGE

RANKS = [0, 1, 127, 128, 255, 256, 65535]
LIVES = [0, 1, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**63 - 1]


def frame(rank: int, incarnation: int, step: int = 0) -> bytes:
    return codec.encode(RankReport(rank, incarnation, step, step % 3, False, Load(step), {7: step}))


def test_all_reports_of_a_life_begin_alike_and_no_others_do() -> None:
    found: set[bytes] = set()
    for rank, incarnation in itertools.product(RANKS, LIVES):
        whose = {codec.whose_report(frame(rank, incarnation, step)) for step in (0, 1, 200, 70_000, 2**40)}
        (only,) = whose
        assert only is not None
        assert only not in found
        found.add(only)


@pytest.mark.parametrize("message", [RankHello(1, 0, 7, "ipc:///rank", True), WaveComplete(0, 7, 3), RankLeaving(0, 7)])
def test_nothing_else_is_a_report(message: FromRank) -> None:
    assert codec.whose_report(codec.encode(message)) is None


def test_what_is_cut_short_or_garbage_is_nobodys_or_garbage() -> None:
    whole = frame(300, 2**40, 5)
    for end in range(len(whole)):
        whose = codec.whose_report(whole[:end])
        assert whose is None or whole.startswith(whose)
    for garbage in GARBAGE:
        codec.whose_report(garbage)
