"""Front-ends of one node ask each other: all answer, and who is dead, hangs or talks nonsense is left out."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

from paceline.server.peers import Peers


def peer(folder: Path, index: int) -> Peers:
    return Peers(folder, index, {"who": lambda **fields: {"index": index} | fields})


async def asked(folder: Path) -> tuple[list[Any], list[Any]]:
    first, second = peer(folder, 0), peer(folder, 1)
    await first.open()
    await second.open()
    with socket.socket(socket.AF_UNIX) as dead, socket.socket(socket.AF_UNIX) as hangs:
        dead.bind(str(folder / "2"))
        hangs.bind(str(folder / "3"))
        hangs.listen()
        dead.close()
        with_others = await first.ask("who", name="a b")
    again = peer(folder, 1)
    second.close()
    await again.open()
    (folder / "2").unlink()
    (folder / "3").unlink()
    in_its_place = await first.ask("who")
    reader, writer = await asyncio.open_unix_connection(str(folder / "0"))
    writer.write(b"no JSON\n")
    assert await reader.read() == b""
    writer.close()
    for one in (first, again):
        one.close()
    return with_others, in_its_place


def test_all_that_are_there_answer_this_one_first(tmp_path: Path) -> None:
    with_others, in_its_place = asyncio.run(asked(tmp_path))
    assert with_others == [{"index": 0, "name": "a b"}, {"index": 1, "name": "a b"}]
    assert in_its_place == [{"index": 0}, {"index": 1}]


def test_a_folder_of_a_long_name_is_no_matter(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 150)
    folder.mkdir()

    async def both() -> list[Any]:
        first, second = peer(folder, 0), peer(folder, 1)
        await first.open()
        await second.open()
        found = await first.ask("who")
        first.close()
        second.close()
        return found

    assert asyncio.run(both()) == [{"index": 0}, {"index": 1}]


def test_one_that_cannot_listen_answers_for_itself(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    one = peer(tmp_path / "file" / "folder", 4)
    asyncio.run(one.open())
    assert asyncio.run(one.ask("who")) == [{"index": 4}]


def test_without_the_folder_one_answers_for_itself(tmp_path: Path) -> None:
    assert asyncio.run(peer(tmp_path / "gone", 4).ask("who")) == [{"index": 4}]
