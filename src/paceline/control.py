"""Pausing, resuming and scaling a running deployment from Python, and giving it new weights.

    from paceline.control import Control

    deployment = Control("http://127.0.0.1:8000")
    with deployment.paused("keep"):
        ...  # no rank computes anything here

It asks the HTTP server of any front-end; the answer holds for all ranks of the deployment.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping

from paceline import __version__
from paceline.errors import PacelineError

AS = os.path.basename(sys.argv[0] or "python")

HERE = ("localhost", "::1")
LONGEST_TIMEOUT_S = 86_400.0
SILENCE_S = 30.0
"""A stream that says nothing for so long has ended: where there is nothing new it says so."""
MARGIN_S = 10.0
"""What the HTTP call gets beyond the time that the deployment gets."""


class ControlError(PacelineError):
    """The deployment did not do what was asked. `status`: the HTTP status, or 0 where nobody answered."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status


class Control:
    """A deployment, by the address of one of its front-ends (`http://HOST:PORT`), or of its admin's port.

    `key`: the admin's, where the deployment has one; if left out what PACELINE_ADMIN_KEY says, or the first line of the
    file that PACELINE_ADMIN_KEY_FILE names. Proxies that the environment names are not asked for addresses on this
    machine. Raises ControlError where that file cannot be read.
    """

    def __init__(self, url: str = "http://127.0.0.1:8000", key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._key = _key_of_environment() if key is None else key
        host = urllib.parse.urlsplit(self.url).hostname or ""
        proxies = urllib.request.ProxyHandler({} if host in HERE or host.startswith("127.") else None)
        self._opener = urllib.request.build_opener(proxies)

    def pause(self, mode: str = "keep", timeout_s: float = 60.0) -> dict[str, object]:
        """Pause all ranks; returns once none computes. Pausing twice is pausing once.

        `mode`: `keep` requests as they are, `wait` until they are finished, `abort` them. Raises ControlError:
        status 504 after `timeout_s`, naming the ranks that have not stopped (it stays asked for, so calling again
        goes on waiting), 409 where somebody resumes meanwhile.
        """
        return self._post("pause", timeout_s, mode=mode)

    def resume(self, timeout_s: float = 60.0) -> dict[str, object]:
        """Let all ranks go on; returns once all do. Raises ControlError as `pause` does."""
        return self._post("resume", timeout_s)

    def is_paused(self) -> bool:
        """Whether all ranks are paused. Raises ControlError."""
        return bool(self._ask("is_paused", "GET", 10.0).get("is_paused"))

    def update_weights(
        self, source: Mapping[str, object], version: str | None = None, mode: str = "keep", kv: str = "recompute",
        timeout_s: float = 600.0,
    ) -> dict[str, object]:  # fmt: skip
        """Give all ranks new weights: pause, update, and resume where the deployment was not paused; returns once the
        next token is made with them, with `weight_version`.

        `source`: `{"path": …}`, `{"shared_memory": …}` or `{"address": "HOST:PORT"}` (`WeightServer`). `version`: the
        name that answers have them under. `mode`: as in `pause`; `kv`: of requests that are kept, `recompute` or
        `keep` what other weights have made. Raises ControlError: status 500 where a rank cannot have them, 504 where
        one is not ready in time (all keep what they had), 409 where another update is under way.
        """
        body = {"source": dict(source), "mode": mode, "kv": kv, "timeout": timeout_s}
        body |= {} if version is None else {"weight_version": version}
        return self._ask("update_weights", "POST", timeout_s + 2 * MARGIN_S, body=body)

    def weight_version(self) -> str:
        """The weights in force, by name; `default` for those that ranks start with. Raises ControlError."""
        return str(self._ask("weight_info", "GET", 10.0).get("weight_version"))

    def scale(self, size: int, drain_timeout_s: float = 120.0, startup_timeout_s: float = 300.0) -> dict[str, object]:
        """Let the deployment have `size` ranks; returns once it has, with `before` and what `scaling` says.

        Times as in `POST /scale_elastic_ep`. Raises ControlError: status 400 for what cannot be, 409 where it is being
        scaled already, 500 or 504 where new ranks did not come up and all is as it was.
        """
        fields = {
            "new_data_parallel_size": size, "drain_timeout": drain_timeout_s, "startup_timeout": startup_timeout_s,
        }  # fmt: skip
        # The server checks them, and answers soon where they are no times.
        longest_s = min(max(0.0, drain_timeout_s) + max(0.0, startup_timeout_s), 2 * LONGEST_TIMEOUT_S)
        found = self._ask("scale_elastic_ep", "POST", longest_s + 4 * MARGIN_S, body=fields)
        if not {"size", "before"} <= set(found):
            raise ControlError(f"{self.url} is no Paceline server")
        return found

    def revive(self, rank: int | None = None, timeout_s: float = 60.0) -> dict[str, object]:
        """Start a rank again that was given up, or all that are missing; returns once they serve: `revived`."""
        query = {"timeout": f"{timeout_s:g}"} | ({} if rank is None else {"rank": str(rank)})
        return self._ask(f"revive?{urllib.parse.urlencode(query)}", "POST", timeout_s + MARGIN_S)

    def scaling(self) -> dict[str, object]:
        """What `GET /is_scaling_elastic_ep` says: the `size`, the `target`, and which ranks are waited for."""
        return self._ask("is_scaling_elastic_ep", "GET", 10.0)

    def health(self) -> dict[str, object]:
        """What `GET /health` says: `status`, the wave, the ranks that are ready or missing, and `stalls`, a line for
        each rank that holds the others up. Raises ControlError where nobody answers.
        """
        return self._ask("health", "GET", 10.0, also=(503,))

    def loads(self) -> dict[str, object]:
        """What `GET /loads` says: under `ranks` an entry a rank, as a front-end believes it. Raises ControlError."""
        return self._ask("loads", "GET", 10.0)

    def watch_loads(self, interval_s: float = 1.0) -> Iterator[dict[str, object]]:
        """What `loads` returns, whenever it has changed, at most once each `interval_s`; pushed where the server can,
        else it is asked again. Raises ControlError, also where the server has gone.
        """
        query = urllib.parse.urlencode({"stream": "1", "interval": f"{interval_s:g}"})
        try:
            yield from self._pushed(f"loads?{query}")
        except ControlError as error:
            if not error.status:
                raise
            # One that knows no such question, under vLLM.
        while True:
            yield self.loads()
            time.sleep(interval_s)

    def watch_dashboard(self) -> Iterator[dict[str, object]]:
        """What the page at /dashboard is told, whenever it has changed. Raises ControlError, also where the server has
        gone.
        """
        return self._pushed("dashboard/events")

    def dashboard_before(self) -> dict[str, object]:
        """What the page is told of the 15 minutes before, a sample each 3 seconds. Raises ControlError."""
        return self._ask("dashboard/history", "GET", 10.0)

    def _pushed(self, path: str) -> Iterator[dict[str, object]]:
        """A stream's events. Raises ControlError: with an HTTP status where there is no such stream, else without."""
        try:
            with self._opener.open(self._request(path), timeout=SILENCE_S) as answer:
                if answer.headers.get_content_type() != "text/event-stream":
                    raise ControlError(f"{self.url} pushes nothing there", 404)
                for line in answer:
                    if line.startswith(b"data: "):
                        yield json.loads(line[6:])
        except urllib.error.HTTPError as error:
            raise ControlError(f"HTTP status {error.code}", error.code) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise self._no_answer(error) from None
        raise ControlError(f"{self.url} has ended the stream")

    def requests(self, name: str) -> list[dict[str, object]]:
        """The timelines of the requests that a client has called so, or that were answered under this id, the newest
        first. Raises ControlError: status 404 where none is known any more.
        """
        found = self._ask(f"requests/{urllib.parse.quote(name, safe='')}", "GET", 10.0).get("requests")
        if not isinstance(found, list):
            raise ControlError(f"{self.url} is no Paceline server")
        return found

    @contextlib.contextmanager
    def paused(self, mode: str = "keep", timeout_s: float = 60.0) -> Iterator[None]:
        """Pause, and resume at the end, also after an error."""
        try:
            # What times out stays asked for, so that is undone too.
            self.pause(mode, timeout_s)
            yield
        finally:
            self.resume(timeout_s)

    def _post(self, path: str, timeout_s: float, **query: str) -> dict[str, object]:
        if not 0 < timeout_s <= LONGEST_TIMEOUT_S:
            raise ControlError(f"timeout: must be more than 0 and at most {LONGEST_TIMEOUT_S:g} seconds")
        text = urllib.parse.urlencode(query | {"timeout": f"{timeout_s:g}"})
        found = self._ask(f"{path}?{text}", "POST", timeout_s + MARGIN_S)
        if not {"status", "suspension"} <= set(found):
            raise ControlError(f"{self.url} is no Paceline server")
        return found

    def _ask(
        self, path: str, method: str, timeout_s: float, also: tuple[int, ...] = (), body: object = None
    ) -> dict[str, object]:
        """The answer as JSON; `also`: statuses that are answers too, besides 200. `body`: sent as JSON."""
        try:
            status, answer = self._exchange(self._request(path, method, body), timeout_s)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise self._no_answer(error) from None
        try:
            found = json.loads(answer)
        except ValueError:
            found = None
        if status != 200 and status not in also:
            raise ControlError(_message(found) or f"HTTP status {status}", status)
        if not isinstance(found, dict):
            raise ControlError(f"{self.url} is no Paceline server")
        return found

    def _request(self, path: str, method: str = "GET", body: object = None) -> urllib.request.Request:
        """Raises ValueError where the address is none."""
        sent = None if body is None else json.dumps(body).encode()
        # The deployment's log says who has asked.
        headers = {"User-Agent": f"paceline/{__version__} ({AS}, process {os.getpid()})"}
        headers |= {} if sent is None else {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        return urllib.request.Request(f"{self.url}/{path}", sent, headers, method=method)

    def _no_answer(self, error: Exception) -> ControlError:
        reason = str(getattr(error, "reason", error)).strip() or type(error).__name__
        return ControlError(f"no answer from {self.url}: {reason}")

    def _exchange(self, request: urllib.request.Request, timeout_s: float) -> tuple[int, bytes]:
        """The status and the body. Raises OSError, ValueError or HTTPException where there is none."""
        try:
            with self._opener.open(request, timeout=timeout_s) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()


class WeightServer:
    """Sends bytes to each rank that connects, as the source `{"address": server.address}`: to be kept until other
    weights have taken their place, since a rank that has died asks again. Use it as a context manager.
    """

    def __init__(self, data: bytes, host: str = "127.0.0.1") -> None:
        self._data = data
        self._door = socket.create_server((host, 0))
        self.address = f"{host}:{self._door.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._send, args=self._door.accept()[:1], daemon=True).start()

    def _send(self, link: socket.socket) -> None:
        with link, contextlib.suppress(OSError):
            link.sendall(self._data)

    def __enter__(self) -> WeightServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()


def _key_of_environment() -> str | None:
    key, file = os.environ.get("PACELINE_ADMIN_KEY"), os.environ.get("PACELINE_ADMIN_KEY_FILE")
    if key is not None or file is None:
        return key
    try:
        with open(file) as lines:
            return next((line.strip() for line in lines if line.strip() and not line.startswith("#")), None)
    except OSError as error:
        raise ControlError(f"PACELINE_ADMIN_KEY_FILE: {file}: {error.strerror}") from None


def _message(found: object) -> str | None:
    error = found.get("error") if isinstance(found, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return message if isinstance(message, str) else None
