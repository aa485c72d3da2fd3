"""Suspending a deployment from Python and from the command line: what is asked, and errors that are one clear line.

The server here is a real one that says what the test wants said; a real deployment is in `server/test_suspend.py`.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from typer.testing import CliRunner, Result

from paceline.cli import app
from paceline.control import Control, ControlError
from paceline.errors import PacelineError

PAUSED = {"status": "paused", "suspension": 1, "mode": "keep", "waiting_for": []}


class Server:
    """Answers each connection with the next of the given bytes, and keeps the first lines of what was asked."""

    def __init__(self, *answers: bytes) -> None:
        self.asked: list[str] = []
        self._answers = answers
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        for answer in self._answers:
            with contextlib.suppress(OSError):
                connection, _ = self._socket.accept()
                with connection:
                    received = b""
                    while b"\r\n\r\n" not in received and (more := connection.recv(65536)):
                        received += more
                    self.asked.append(received.split(b"\r\n")[0].decode())
                    connection.sendall(answer)

    def close(self) -> None:
        self._socket.close()


def answer(status: int, body: object, length: int | None = None) -> bytes:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"HTTP/1.1 {status} X\r\ncontent-length: {len(text) if length is None else length}\r\n"
    return f"{head}connection: close\r\n\r\n".encode() + text


def refusal(status: int, message: str) -> bytes:
    return answer(status, {"error": {"message": message, "type": "server_error", "param": None, "code": None}})


@contextlib.contextmanager
def serving(*answers: bytes) -> Iterator[Server]:
    server = Server(*answers)
    try:
        yield server
    finally:
        server.close()


def free_url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def paceline(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


# From Python ----------------------------------------------------------------------------------


def test_what_is_asked_and_what_comes_back() -> None:
    with serving(answer(200, PAUSED), answer(200, PAUSED), answer(200, {"is_paused": True})) as server:
        control = Control(server.url + "/")
        assert control.pause("wait", timeout_s=2.5) == PAUSED
        control.resume(timeout_s=3)
        assert control.is_paused() is True
        assert server.asked == [
            "POST /pause?mode=wait&timeout=2.5 HTTP/1.1",
            "POST /resume?timeout=3 HTTP/1.1",
            "GET /is_paused HTTP/1.1",
        ]


@pytest.mark.parametrize(("status", "message"), [(409, "a later call asked to resume"), (504, "waiting for rank 1")])
def test_a_refusal_keeps_its_words_and_its_status(status: int, message: str) -> None:
    with serving(refusal(status, message)) as server, pytest.raises(ControlError) as caught:
        Control(server.url).pause()
    assert (str(caught.value), caught.value.status) == (message, status)
    assert isinstance(caught.value, PacelineError)


@pytest.mark.parametrize("body", [b"", b"<html>no</html>", b"[]", b'{"error": "text"}', b'{"error": {"message": 3}}'])
def test_a_refusal_in_other_words_has_its_status(body: bytes) -> None:
    with serving(answer(404, body)) as server, pytest.raises(ControlError, match="404") as caught:
        Control(server.url).resume()
    assert caught.value.status == 404


@pytest.mark.parametrize(
    "said",
    [b"", b"SSH-2.0-OpenSSH_9.6\r\n", answer(200, b"{"), answer(200, b"\xff"), answer(200, [1]), answer(200, b"{}", 50),
     answer(503, b"{}", 50), answer(302, b"")],
    ids=["nothing", "another protocol", "half of it", "no text", "a list", "cut off", "an error cut off", "elsewhere"],
)  # fmt: skip
@pytest.mark.parametrize("call", [Control.pause, Control.resume, Control.is_paused])
def test_whatever_answers_it_is_a_control_error(said: bytes, call: Callable[[Control], object]) -> None:
    with serving(said) as server, pytest.raises(ControlError, match=r"127\.0\.0\.1|HTTP status"):
        call(Control(server.url))


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "http://", "http://127.0.0.1:port", "ftp://x", "http://a b/"])
def test_an_address_that_is_none_is_a_control_error(url: str) -> None:
    with pytest.raises(ControlError):
        Control(url).pause()


def test_nobody_there() -> None:
    url = free_url()
    with pytest.raises(ControlError, match=f"no answer from {url}") as caught:
        Control(url).pause()
    assert caught.value.status == 0


@pytest.mark.parametrize("timeout_s", [float("nan"), float("inf"), -1e9, 1e300])
def test_a_timeout_that_is_none_is_a_control_error(timeout_s: float) -> None:
    with serving(refusal(400, "timeout: must be")) as server, pytest.raises(ControlError):
        Control(server.url).pause("keep", timeout_s)


def test_paused_resumes_at_the_end_also_after_an_error() -> None:
    with serving(answer(200, PAUSED), answer(200, PAUSED)) as server:
        with pytest.raises(KeyError), Control(server.url).paused("keep"):
            raise KeyError
        assert [line.split("?")[0] for line in server.asked] == ["POST /pause", "POST /resume"]


def test_a_pause_that_timed_out_is_taken_back_and_the_block_does_not_run() -> None:
    entered = False
    with serving(refusal(504, "waiting for rank 1"), answer(200, PAUSED)) as server:
        with pytest.raises(ControlError, match="rank 1"), Control(server.url).paused():
            entered = True
        assert not entered
        assert [line.split("?")[0] for line in server.asked] == ["POST /pause", "POST /resume"]


# On the command line --------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["pause", "resume"])
def test_a_command_says_what_is_so_now(command: str) -> None:
    with serving(answer(200, PAUSED)) as server:
        done = paceline(command, "--url", server.url)
        assert done.exit_code == 0, done.output
        assert done.stdout.startswith("paused after 0.")
        assert done.stdout.endswith("(suspension 1)\n")
        assert server.asked[0].split("?")[0] == f"POST /{command}"


@pytest.mark.parametrize("command", ["pause", "resume"])
@pytest.mark.parametrize(
    ("said", "text"),
    [
        (refusal(504, "pause is not done after 1 s; waiting for rank 1"), "waiting for rank 1"),
        (refusal(409, "a later call asked to resume"), "a later call asked to resume"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "no answer from http://"),
        (answer(200, {"status": "paused"}), "Paceline"),
    ],
    ids=["504", "409", "another protocol", "another server"],
)
def test_what_goes_wrong_is_one_line_and_status_1(command: str, said: bytes, text: str) -> None:
    with serving(said) as server:
        done = paceline(command, "--url", server.url, "--timeout", "1")
    assert done.exit_code == 1
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    assert done.stderr.startswith("paceline: error: ")
    assert text in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_timeout_that_is_no_number_is_wrong_usage() -> None:
    assert paceline("pause", "--timeout", "soon").exit_code == 2


@pytest.mark.parametrize("arguments", [["--timeout", "inf"], ["--url", "http://127.0.0.1:port"], ["--url", ""]])
def test_arguments_that_cannot_be_are_one_line_too(arguments: list[str]) -> None:
    done = paceline("pause", "--url", free_url(), *arguments)
    assert done.exit_code == 1, repr(done.exception)
    assert len(done.stderr.splitlines()) == 1
