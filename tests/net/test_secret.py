"""The secret of a deployment: its file, and what a socket with it, without it, or with another one hears."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from paceline.core.limits import MAX_CONTROL_BYTES
from paceline.engines.group import EpochEnded
from paceline.errors import ConfigError
from paceline.net import collective, secret
from paceline.net.group import GroupListener, Handshakes, answer_bytes, host_and_port, packed
from paceline.net.links import Doors, refusals
from paceline.net.sockets import SECRET, bound_address, open_socket
from tests.net.groups import Threads
from tests.net.peers import context
from tests.pace import Deadline, stretched


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET, "")
    monkeypatch.delenv(SECRET)


def a_secret(folder: Path, name: str = "one") -> str:
    path = folder / name
    secret.make(path)
    return str(path)


def test_it_is_made_once_and_for_its_user_alone(tmp_path: Path) -> None:
    path = Path(a_secret(tmp_path))
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="File exists"):
        secret.make(path)
    assert Path(a_secret(tmp_path, "two")).read_text() != path.read_text()


@pytest.mark.usefixtures("unset")
def test_a_file_that_is_none_to_trust_is_refused(tmp_path: Path) -> None:
    path = Path(a_secret(tmp_path))
    path.chmod(0o640)
    with pytest.raises(ConfigError, match=r"others may read or write it \(mode 640\)"):
        secret.use(str(path))
    path.chmod(0o600)
    path.write_text("short")
    with pytest.raises(ConfigError, match="too short"):
        secret.use(str(path))
    with pytest.raises(ConfigError, match="No such file"):
        secret.use(str(tmp_path / "none"))
    assert SECRET not in os.environ


@pytest.mark.usefixtures("unset")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_what_root_hands_to_a_group_of_this_user_is_one_to_trust(tmp_path: Path) -> None:
    """As a Secret of Kubernetes is mounted where pods have an fsGroup."""
    path = a_secret(tmp_path)
    os.chown(path, 10001, os.getegid())
    os.chmod(path, 0o440)
    secret.use(path)
    os.chmod(path, 0o444)
    with pytest.raises(ConfigError, match="mode 444"):
        secret.use(path)
    os.chown(path, os.geteuid(), os.getegid())
    os.chmod(path, 0o440)
    with pytest.raises(ConfigError, match="mode 440"):
        secret.use(path)


def heard(pull: Any) -> bytes | None:
    return bytes(pull.recv()) if pull.poll(int(stretched(0.5) * 1000)) else None


@pytest.mark.usefixtures("unset")
def test_only_who_has_the_same_secret_is_heard(tmp_path: Path) -> None:
    limit = MAX_CONTROL_BYTES
    with context() as zmq_context:
        secret.use(a_secret(tmp_path))
        pull = open_socket(zmq_context, zmq.PULL, bind="tcp://127.0.0.1:0", max_bytes=limit)
        address = bound_address(pull)
        strangers = [plain := zmq_context.socket(zmq.PUSH)]
        plain.linger = 0
        plain.connect(address)
        plain.send(b"without")
        public, private = zmq.curve_keypair()
        for guess in (public, secret.keys_of(os.environ[SECRET]).public):
            # One who knows how it is done, and guesses at keys: even the public ones come of the secret.
            strangers.append(guessing := zmq_context.socket(zmq.PUSH))
            guessing.linger, guessing.curve_serverkey = 0, guess
            guessing.curve_publickey, guessing.curve_secretkey = public, private
            guessing.connect(address)
            guessing.send(b"guessed")
        secret.use(a_secret(tmp_path, "another"))
        other = open_socket(zmq_context, zmq.PUSH, connect=address, max_bytes=limit)
        strangers.append(other)
        other.send(b"another")
        assert heard(pull) is None
        secret.use(str(tmp_path / "one"))
        same = open_socket(zmq_context, zmq.PUSH, connect=address, max_bytes=limit)
        same.send(b"the same")
        assert pull.poll(int(stretched(10) * 1000))
        assert pull.recv() == b"the same"
        for stranger in strangers:
            stranger.close()


# Peers of a lockstep group ------------------------------------------------------------------------


@pytest.fixture
def sealed(unset: None, tmp_path: Path) -> Iterator[Threads]:
    secret.use(a_secret(tmp_path))
    made = Threads(["tcp://127.0.0.1:0"] * 3)
    yield made
    made.close()


def summed(made: Threads) -> list[Any]:
    return made.each(lambda rank: made.groups[rank].all_reduce([rank + 1], "sum"))


def large(made: Threads) -> list[Any]:
    arrays = [np.full(5000, rank, np.float32) for rank in range(3)]
    return made.each(lambda rank: [part[0] for part in made.groups[rank].all_to_all([arrays[rank]] * 3)])


def test_peers_with_the_secret_are_a_group(sealed: Threads) -> None:
    assert all(listener.key is not None for listener in sealed.listeners)
    assert summed(sealed) == [[6]] * 3
    assert large(sealed) == [[0, 1, 2]] * 3


def test_a_byte_changed_on_the_way_ends_the_epoch(sealed: Threads, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, key = collective.tag, sealed.groups[1]._seals[0].outgoing  # type: ignore[attr-defined]
    sent: list[bytes] = []

    def changed(by: bytes, parts: Any) -> bytes:
        code = plain(by, parts)
        if by != key or sent:
            return code
        sent.append(code)
        return code[:-1] + bytes([code[-1] ^ 1])

    monkeypatch.setattr(collective, "tag", changed)
    futures = sealed.start(lambda rank: sealed.groups[rank].all_reduce([1], "sum"))
    with pytest.raises(EpochEnded, match="rank 1: what it sent is not what came"):
        futures[0].result(stretched(20))
    for future in futures[1:]:
        with pytest.raises(EpochEnded):
            future.result(stretched(20))


@pytest.mark.usefixtures("unset")
def test_who_has_no_secret_or_another_is_no_peer_and_is_counted(tmp_path: Path) -> None:
    """It has all that was ever said on a connection, and says it again."""
    path = a_secret(tmp_path)
    secret.use(path)
    key = secret.keys_of(path).peers
    listener = GroupListener("tcp://127.0.0.1:0")
    handshakes = Handshakes(listener.socket, 1, 0, {1}, key)
    target = host_and_port(listener.address)
    before = refusals.count

    def tries(first: bytes, second: Callable[[bytes], bytes]) -> tuple[bytes, dict[int, Any]]:
        with socket.create_connection(target, timeout=stretched(10)) as link:
            link.sendall(first)
            answer = b""
            while len(answer) < answer_bytes(key):
                assert not handshakes.wait(0.05)
                link.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    answer += link.recv(4096)
                link.setblocking(True)
            link.sendall(second(answer))
            deadline, come = Deadline(2), {}
            while not come and refusals.count == count and not deadline.over():
                come = handshakes.wait(0.05)
            return answer, come

    greeting, fresh = packed((1, 1, 0)), os.urandom(secret.NONCE_BYTES)
    proven: list[bytes] = []

    def honest(answer: bytes) -> bytes:
        said = greeting + fresh + answer[: -secret.PROOF_BYTES]
        proven.append(greeting + secret.proof(key, b"greets", said))
        return proven[0]

    count = refusals.count
    answer, come = tries(greeting + fresh, honest)
    assert come[1].seal == secret.Seal.of(key, greeting + fresh + answer[: -secret.PROOF_BYTES], connects=False)
    come[1].socket.close()
    # The same words again, and what follows of a guess.
    guess = hashlib.blake2b(b"guess").digest()[:32]
    for second in (
        lambda _: proven[0],
        lambda answer: greeting + secret.proof(guess, b"greets", greeting + fresh + answer[: -secret.PROOF_BYTES]),
    ):
        count = refusals.count
        assert tries(greeting + fresh, second)[1] == {}
    assert refusals.count == before + 2
    handshakes.close()
    listener.close()


@pytest.mark.usefixtures("unset")
def test_who_gives_up_is_not_taken_for_one_without_the_secret(tmp_path: Path) -> None:
    """As a front-end whose rank was stopped for a while, and which had asked it again and again."""
    secret.use(a_secret(tmp_path))
    with context() as ours:
        bound = open_socket(ours, zmq.ROUTER, max_bytes=MAX_CONTROL_BYTES, bind="tcp://127.0.0.1:0")
        doors, before = Doors((bound,)), refusals.count
        target = host_and_port(bound_address(bound))
        curve = b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE" + bytes(15) + b"\0" + bytes(31)
        plain = curve.replace(b"CURVE", b"NULL\0")

        def counted(greeting: bytes) -> int:
            with socket.create_connection(target, timeout=stretched(10)) as link:
                link.sendall(greeting)
                heard = 0
                while heard < 12 and (piece := link.recv(64)):
                    heard += len(piece)
            deadline = Deadline(1)
            while refusals.count == before and not deadline.over():
                bound.poll(50)
                doors.count()
            return refusals.count - before

        assert counted(curve) == 0
        assert counted(plain) == 1
        doors.close()
