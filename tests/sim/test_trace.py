"""Traces of both shapes, and what is said of a file that is neither."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench.routing import in_bursts

from paceline.errors import ConfigError
from paceline.sim.trace import Arrival, faster, read_trace

CSV = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9151690,396,109
2023-11-16 18:16:00,12,0
"""
JSON_LINES = """{"timestamp": 3000, "input_length": 20, "output_length": 5, "hash_ids": [0, 1]}
{"timestamp": 1000, "input_length": 10, "output_length": 4}
"""

ROW = '{"timestamp": 1, "input_length": 2, "output_length": 3, "hash_ids": [4]}'


def read(folder: Path, text: str, name: str = "trace") -> list[Arrival]:
    path = folder / name
    path.write_text(text)
    return read_trace(path)


def test_csv_is_read_to_the_tenth_of_a_microsecond(tmp_path: Path) -> None:
    first, second, third = read(tmp_path, CSV)
    assert first == Arrival(0.0, 374, 44)
    assert second.at == pytest.approx(4.234579, abs=1e-6)
    assert (second.prompt_tokens, second.answer_tokens) == (396, 109)
    assert (third.at, third.answer_tokens) == (pytest.approx(13.31941, abs=1e-6), 1)


def test_csv_columns_are_found_by_name(tmp_path: Path) -> None:
    text = "\ufeffmodel,GeneratedTokens,TIMESTAMP,ContextTokens\na,5,2023-11-16 18:15:46,7\n"
    assert read(tmp_path, text) == [Arrival(0.0, 7, 5)]


def test_json_lines_are_put_in_order(tmp_path: Path) -> None:
    assert read(tmp_path, JSON_LINES) == [Arrival(0.0, 10, 4), Arrival(2.0, 20, 5, (0, 1))]


def test_faster_and_in_bursts() -> None:
    arrivals = [Arrival(float(second), 1, 1) for second in range(5)]
    assert [one.at for one in faster(arrivals, 2.0)] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert [one.at for one in in_bursts(arrivals, 4.0, 0.25)] == [0.0, 0.25, 0.5, 0.75, 4.0]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("TIME,ContextTokens\n1,2\n", ", line 1: is no JSON object and has no column TIMESTAMP"),
        (CSV + "yesterday,1,2\n", ", line 5: Invalid isoformat string: 'yesterday'"),
        (CSV + "2023-11-16 18:16:00,many,2\n", ", line 5: Expected `int`, got `str` - at `$.ContextTokens`"),
        (CSV + "2023-11-16 18:16:00,1,-2\n", ", line 5: Expected `int` >= 0 - at `$.GeneratedTokens`"),
        (CSV + "2023-11-16 18:16:00,1\n", ", line 5: Expected `int`, got `null` - at `$.GeneratedTokens`"),
        (JSON_LINES + "[1, 2]\n", ", line 3: Expected `object`, got `array`"),
        (JSON_LINES + "{}\n", ", line 3: Object missing required field `timestamp`"),
        (ROW.replace("1", "-1", 1), ", line 1: Expected `float` >= 0.0 - at `$.timestamp`"),
        (ROW.replace("2", "[]", 1), ", line 1: Expected `int`, got `array` - at `$.input_length`"),
        (ROW.replace("[4]", "7", 1), ", line 1: Expected `array`, got `int` - at `$.hash_ids`"),
        ("{", ", line 1: Input data was truncated"),
        ("", ": holds no request"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", ": holds no request"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(f"--trace: {tmp_path / 'trace'}{why}")
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_trace(tmp_path / "nothing")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is no text"):
        read_trace(tmp_path / "binary")
