"""Who may ask what: keys, the admin's door, and web pages of strangers.

Three kinds of path. *Probes* are open to everybody. *The model* (`/v1/*`, tokenizing) asks for an API key where there
are any. *The deployment* (all that shows or changes it) has a key of its own, or a port of its own, and with neither is
open to this machine alone: a request that has come through a proxy is not from here, whoever the proxy is.

A web page may post to any address that its reader's browser reaches, a deployment on loopback included, and needs no
answer to do harm. So a POST that names an `Origin` must name one that is allowed, or the one it is sent to: by an
address or as localhost, since any name can be made to point here. And what changes the deployment takes JSON alone,
which no page can send without being asked first.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import ssl
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from msgspec import Struct
from starlette.datastructures import Headers
from starlette.types import Scope

from paceline.errors import ConfigError
from paceline.server.errors import ApiError
from paceline.settings import ServerConfig

PROBES = frozenset({"/health", "/livez", "/readyz", "/startupz", "/ping", "/version", "/openapi.json"})
OF_THE_MODEL = frozenset({"/tokenize", "/detokenize", "/tokenizer_info", "/load"})
PAGE = "/dashboard"
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
FORWARDED = (b"forwarded", b"x-forwarded-for", b"x-real-ip")
LEAST_KEY = 8
"""Characters of a key; a shorter one is a mistake."""


class Key(Struct, frozen=True):
    """`name`: of its tenant, where the file says one."""

    digest: bytes
    name: str = ""


def keys_of(flag: str, keys: str | None, file: str | None) -> list[Key]:
    """Keys from a flag (with commas between them) and from a file (one a line, behind a blank its tenant's name).

    Raises ConfigError naming the flag.
    """
    found = [] if keys is None else [(key, "") for key in keys.split(",")]
    if file is not None:
        try:
            lines = Path(file).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{flag}-file: {file}: {getattr(error, 'strerror', None) or error}") from None
        parts = [line.split(maxsplit=1) for line in lines if line.strip() and not line.startswith("#")]
        found += [(part[0], part[1].strip() if len(part) > 1 else "") for part in parts]
        if not found:
            raise ConfigError(f"{flag}-file: {file}: holds no key")
    for key, _ in found:
        if len(key) < LEAST_KEY or not (key.isascii() and key.isprintable()) or " " in key:
            raise ConfigError(f"{flag}: a key has at least {LEAST_KEY} printable ASCII characters and no blank")
    return [Key(_digest(key.encode()), name) for key, name in found]


def check_doors(config: ServerConfig) -> None:
    """Refuse keys and certificates that cannot be used. Raises ConfigError naming the flag."""
    Guard(config)
    if (config.ssl_certfile is None) != (config.ssl_keyfile is None):
        raise ConfigError("--ssl-certfile: needs --ssl-keyfile, and the other way round")
    if config.ssl_certfile is not None:
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
        except OSError as error:
            raise ConfigError(f"--ssl-certfile: {config.ssl_certfile}: {error.strerror or error}") from None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Guard:
    """Refuses what may not be asked. Raises ConfigError where a key's file cannot be read."""

    def __init__(self, config: ServerConfig) -> None:
        self.api_keys = keys_of("--api-key", config.api_key, config.api_key_file)
        self._admin_keys = keys_of("--admin-key", config.admin_key, config.admin_key_file)
        self._admin_port = config.admin_port
        self._open_metrics = config.open_metrics
        self.origins = frozenset(filter(None, (config.allowed_origins or "").split(",")))

    def refusal(self, scope: Scope) -> ApiError | None:
        """Why this request is not answered, or None."""
        headers = dict(scope["headers"])
        given = Headers(scope=scope)
        path, method = scope["path"], scope["method"]
        origin = headers.get(b"origin")
        if origin is not None and method not in SAFE and not self._allows(origin, headers.get(b"host", b"")):
            text = f"the origin {origin.decode('latin-1')[:100]!r} may not ask this (--allowed-origins)"
            return ApiError(403, text, kind="permission_error", code="origin_not_allowed")
        if method == "OPTIONS" or path in PROBES or (path == "/metrics" and self._open_metrics):
            return None
        if path.startswith("/v1/") or path in OF_THE_MODEL:
            return None if not self.api_keys or _has_key(given, self.api_keys) else _unauthorised("an API key")
        return self._admin_refusal(scope, headers, method)

    def _allows(self, origin: bytes, host: bytes) -> bool:
        said = origin.decode("latin-1")
        if said in self.origins or "*" in self.origins:
            return True
        target = host.decode("latin-1")
        return urlsplit(said).netloc == target and _is_address(urlsplit(f"//{target}").hostname or "")

    def _admin_refusal(self, scope: Scope, headers: Mapping[bytes, bytes], method: str) -> ApiError | None:
        server = scope.get("server")
        if self._admin_port is not None and (server is None or server[1] != self._admin_port):
            return ApiError(403, f"{scope['path']} is asked on the admin's port", kind="permission_error", code="admin")
        if self._admin_keys and scope["path"] == PAGE and method in SAFE:
            # It says nothing of the deployment: it asks its reader for the key.
            return None
        if self._admin_keys:
            if not _has_key(Headers(scope=scope), self._admin_keys):
                return _unauthorised("the admin's key")
        elif not _from_here(scope, headers):
            text = "the deployment is shown and changed from its own machine alone, or with an --admin-key"
            return ApiError(403, text, kind="permission_error", code="admin")
        kind = headers.get(b"content-type", b"application/json").partition(b";")[0].strip().lower()
        if method not in SAFE and kind != b"application/json":
            return ApiError(415, "content-type: must be application/json", param="content-type", code="not_json")
        return None


def key_of(headers: Headers) -> bytes:
    """The digest of the key that a request brings."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    key = given if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    return _digest(key.strip().encode("latin-1"))


def _has_key(headers: Headers, keys: list[Key]) -> bool:
    digest = key_of(headers)
    # All are compared, so that the time says nothing of which.
    return sum(hmac.compare_digest(digest, one.digest) for one in keys) > 0


def _unauthorised(what: str) -> ApiError:
    text = f"this needs {what}, as 'Authorization: Bearer KEY'"
    return ApiError(401, text, kind="authentication_error", code="invalid_api_key")


def _from_here(scope: Scope, headers: Mapping[bytes, bytes]) -> bool:
    client = scope.get("client")
    if any(name in headers for name in FORWARDED):
        return False
    return client is None or _is_loopback(client[0])


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _is_address(host: str) -> bool:
    """Whether a name is none that somebody could point elsewhere."""
    if host == "localhost":
        return True
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True
