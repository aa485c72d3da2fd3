"""Who may ask what, without a server; and one deployment with keys, an admin's port and TLS."""

from __future__ import annotations

import json
import ssl
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from paceline.control import Control, ControlError
from paceline.errors import ConfigError
from paceline.server.guard import Guard, check_doors
from paceline.settings import ServerConfig
from tests.pace import stretched
from tests.serving import deployment
from tests.test_modes import free_port

KEY, ADMIN = "a-key-of-clients", "the-admins-own-key"
PATHS = {"probe": "/health", "model": "/v1/chat/completions", "deployment": "/pause"}


def status(guard: Guard, path: str, method: str = "POST", client: str | None = "127.0.0.1", port: int = 8000,
           **headers: str) -> int | None:  # fmt: skip
    """What a request is refused with, None where it is not."""
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "path": path, "method": method, "headers": raw, "server": ("127.0.0.1", port),
             "client": None if client is None else (client, 9)}  # fmt: skip
    refused = guard.refusal(scope)
    return None if refused is None else refused.status


def guard(**settings: Any) -> Guard:
    return Guard(ServerConfig(**settings))


@pytest.mark.parametrize(
    ("client", "headers", "expected"),
    [
        ("127.0.0.1", {}, None),
        ("::1", {}, None),
        ("::ffff:127.0.0.1", {}, None),
        (None, {}, None),
        ("10.0.0.7", {}, 403),
        ("127.0.0.1", {"x_forwarded_for": "10.0.0.7"}, 403),
        ("127.0.0.1", {"forwarded": "for=10.0.0.7"}, 403),
    ],
)
def test_without_a_key_the_deployment_is_this_machine_s(
    client: str | None, headers: dict[str, str], expected: int | None
) -> None:
    plain = guard()
    for path in ("/pause", "/resume", "/scale_elastic_ep", "/loads", "/is_paused", "/server_info", "/whatever"):
        assert status(plain, path, client=client, **headers) == expected
    for path in ("/health", "/v1/models", "/v1/completions", "/tokenize", "/livez", "/readyz"):
        assert status(plain, path, "GET", client=client, **headers) is None


def test_each_kind_of_path_has_its_key() -> None:
    locked = guard(api_key=KEY, admin_key=ADMIN)
    for name, value in (("authorization", "Bearer {}"), ("authorization", "bearer  {} "), ("x_api_key", "{}")):
        client, admin = {name: value.format(KEY)}, {name: value.format(ADMIN)}
        assert [status(locked, path, client="10.0.0.7", **client) for path in PATHS.values()] == [None, None, 401]
        assert [status(locked, path, client="10.0.0.7", **admin) for path in PATHS.values()] == [None, 401, None]
    for wrong in ({}, {"authorization": "Bearer "}, {"authorization": f"Basic {KEY}"}, {"authorization": KEY[:-1]}):
        assert [status(locked, path, **wrong) for path in PATHS.values()] == [None, 401, 401]


def test_several_keys_and_keys_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the week\nkey-number-three\n\nkey-number-four\n")
    several = guard(api_key="key-number-one,key-number-two", api_key_file=str(file))
    for word in ("one", "two", "three", "four"):
        assert status(several, "/v1/models", authorization=f"Bearer key-number-{word}") is None
    assert status(several, "/v1/models", authorization="Bearer key-number-five") == 401


def test_the_admin_s_port_is_the_only_one() -> None:
    apart = guard(admin_port=9000)
    assert status(apart, "/pause") == 403
    assert status(apart, "/pause", port=9000) is None
    assert status(apart, "/health", "GET") is None


@pytest.mark.parametrize(
    ("origin", "host", "settings", "expected"),
    [
        ("http://evil.example", "127.0.0.1:8000", {}, 403),
        ("null", "127.0.0.1:8000", {}, 403),
        ("http://127.0.0.1:8000", "127.0.0.1:8000", {}, None),
        ("http://localhost:8000", "localhost:8000", {}, None),
        ("http://[::1]:8000", "[::1]:8000", {}, None),
        ("http://127.0.0.1:9999", "127.0.0.1:8000", {}, 403),
        ("http://evil.example:8000", "evil.example:8000", {}, 403),
        ("https://app.example", "127.0.0.1:8000", {"allowed_origins": "https://app.example"}, None),
        ("https://app.example", "127.0.0.1:8000", {"allowed_origins": "*"}, None),
    ],
)
def test_a_page_of_a_stranger_posts_nothing(
    origin: str, host: str, settings: dict[str, str], expected: int | None
) -> None:
    for path in PATHS.values():
        assert status(guard(**settings), path, origin=origin, host=host) == expected
    assert status(guard(**settings), "/v1/models", "GET", origin=origin, host=host) is None


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("application/json", None), ("application/json; charset=utf-8", None), ("text/plain", 415),
     ("application/x-www-form-urlencoded", 415), ("multipart/form-data; boundary=x", 415)],
)  # fmt: skip
def test_what_changes_the_deployment_takes_json_alone(kind: str, expected: int | None) -> None:
    assert status(guard(), "/scale_elastic_ep", content_type=kind) == expected
    assert status(guard(), "/v1/completions", content_type=kind) is None, "curl -d goes on working"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"api_key": "short"}, "--api-key: a key has at least 8"),
        ({"admin_key": "with a blank"}, "--admin-key: a key has"),
        ({"api_key_file": "/nowhere/keys"}, "--api-key-file: /nowhere/keys: No such file"),
        ({"ssl_certfile": "/nowhere/cert"}, "--ssl-certfile: needs --ssl-keyfile"),
        ({"ssl_certfile": "/nowhere/cert", "ssl_keyfile": "/nowhere/key"}, "--ssl-certfile: /nowhere/cert: No such"),
    ],
)
def test_what_cannot_be_used_is_one_line(settings: dict[str, str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check_doors(ServerConfig(**settings))


def certificate(folder: Path) -> tuple[str, str]:
    """One for 127.0.0.1, signed by itself."""
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    made = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=127.0.0.1"
    named = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert]
    subprocess.run(["openssl", *made.split(), *named], check=True, capture_output=True)
    return cert, key


@pytest.mark.slow
def test_a_deployment_with_keys_an_admin_s_port_and_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = certificate(tmp_path)
    (tmp_path / "admin").write_text(ADMIN + "\n")
    port = int(free_port())
    flags = ("--engine", "timed", "-dp", "1", "--api-key", KEY, "--admin-key-file", str(tmp_path / "admin"),
             "--admin-port", str(port), "--ssl-certfile", cert, "--ssl-keyfile", key)  # fmt: skip
    trusted = urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=cert))
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), trusted)

    def ask(path: str, body: object = None, **headers: str) -> int:
        sent = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(running.url + path, sent, headers)
        try:
            with opener.open(request, timeout=stretched(30)) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    with deployment(*flags) as running:
        assert running.url.startswith("https://")
        said = {"prompt": "a", "max_tokens": 1}
        assert ask("/v1/completions", said) == 401
        assert ask("/v1/completions", said, Authorization=f"Bearer {KEY}") == 200
        assert ask("/health") == 200
        assert ask("/loads", Authorization=f"Bearer {ADMIN}") == 403, "that is the other port's"
        monkeypatch.setenv("SSL_CERT_FILE", cert)
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
        admin = f"https://127.0.0.1:{port}"
        with pytest.raises(ControlError, match="the admin's key"):
            Control(admin).pause()
        monkeypatch.setenv("PACELINE_ADMIN_KEY_FILE", str(tmp_path / "admin"))
        with Control(admin).paused():
            assert Control(admin).is_paused()
            assert ask("/readyz") == 503
        assert ask("/readyz") == 200
