"""Pausing, resuming and scaling a running deployment from Python.

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
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator

from paceline.errors import PacelineError

LONGEST_TIMEOUT_S = 86_400.0
MARGIN_S = 10.0
"""What the HTTP call gets beyond the time that the deployment gets."""


class ControlError(PacelineError):
    """The deployment did not do what was asked. `status`: the HTTP status, or 0 where nobody answered."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status


class Control:
    """A deployment, by the address of one of its front-ends (`http://HOST:PORT`)."""

    def __init__(self, url: str = "http://127.0.0.1:8000") -> None:
        self.url = url.rstrip("/")

    def pause(self, mode: str = "abort", timeout_s: float = 60.0) -> dict[str, object]:
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
        sent = None if body is None else json.dumps(body).encode()
        try:
            status, answer = _exchange(urllib.request.Request(f"{self.url}/{path}", sent, method=method), timeout_s)
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error)).strip() or type(error).__name__
            raise ControlError(f"no answer from {self.url}: {reason}") from None
        try:
            found = json.loads(answer)
        except ValueError:
            found = None
        if status != 200 and status not in also:
            raise ControlError(_message(found) or f"HTTP status {status}", status)
        if not isinstance(found, dict):
            raise ControlError(f"{self.url} is no Paceline server")
        return found


def _exchange(request: urllib.request.Request, timeout_s: float) -> tuple[int, bytes]:
    """The status and the body. Raises OSError, ValueError or HTTPException where there is none."""
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def _message(found: object) -> str | None:
    error = found.get("error") if isinstance(found, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return message if isinstance(message, str) else None
