"""One secret for all nodes of a deployment: whoever has it not hears nothing and is not heard.

Every tcp socket of ZeroMQ speaks CURVE, with keys that all nodes derive from the secret: one pair for who binds and one
for who connects. To connect one must know the binder's public key, which never crosses a wire in the clear; so it is as
secret as the file that it comes from. What stays on the machine lies in folders that only its user may enter.

Peers of a lockstep group speak plain streams, since ZeroMQ would hide the end of a connection, which ends the epoch.
There both sides prove that they have the secret, with fresh random numbers, and each message bears a code (keyed
BLAKE2b) under a key of this connection and direction alone. That is authenticated, not encrypted: the standard library
has no cipher, and one of our own making would be worse than none.

The path of the file travels to the node's processes in the environment: each reads the file itself, and nothing that
shows a process's arguments or settings shows the secret.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple, Self

import zmq
from zmq.utils import z85

from paceline.errors import ConfigError, StartupError
from paceline.net.sockets import SECRET

LEAST_BYTES = 32


class Keys(NamedTuple):
    """In ZeroMQ's text form, of 40 characters each."""

    binder_public: bytes
    binder_secret: bytes
    public: bytes
    secret: bytes
    peers: bytes
    """That of lockstep peers, as bytes."""


def make(path: Path) -> None:
    """Write a new secret, for this user alone. Raises ConfigError where the file is there, or cannot be."""
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(LEAST_BYTES) + "\n")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None


def use(path: str) -> None:
    """From here on this process and its children speak CURVE. Raises ConfigError where the file is none to trust."""
    _read(path)
    os.environ[SECRET] = str(Path(path).resolve())


@cache
def keys_of(path: str) -> Keys:
    """The keys that come of a secret. Raises StartupError."""
    try:
        secret = _read(path)
    except ConfigError as error:
        raise StartupError(str(error)) from None
    pairs: list[bytes] = []
    for role in (b"binds", b"connects"):
        private = z85.encode(_derived(secret, role))
        pairs += [zmq.curve_public(private), private]
    return Keys(pairs[0], pairs[1], pairs[2], pairs[3], _derived(secret, b"peers"))


def _derived(secret: bytes, role: bytes) -> bytes:
    return hashlib.blake2b(secret, digest_size=32, person=b"paceline", salt=role).digest()


NONCE_BYTES, PROOF_BYTES, TAG_BYTES = 16, 32, 16


def peer_key(address: str) -> bytes | None:
    """What the peers of a lockstep group prove to have; None where they need not, on one machine or with no secret.
    Raises StartupError."""
    path = os.environ.get(SECRET)
    return keys_of(path).peers if path is not None and address.startswith("tcp://") else None


def proof(key: bytes, role: bytes, said: bytes) -> bytes:
    """That somebody with the key, in this role, knows of all that was said."""
    return hashlib.blake2b(said, key=key, person=role, digest_size=PROOF_BYTES).digest()


def proves(key: bytes, role: bytes, said: bytes, given: bytes) -> bool:
    return hmac.compare_digest(proof(key, role, said), given)


class Seal(NamedTuple):
    """The keys of one connection between peers, a direction each."""

    outgoing: bytes
    incoming: bytes

    @classmethod
    def of(cls, key: bytes, said: bytes, *, connects: bool) -> Self:
        """`said`: all that both have said in their handshake."""
        keys = proof(key, b"connects", said), proof(key, b"accepts", said)
        return cls(*(keys if connects else keys[::-1]))


def tag(key: bytes, parts: Iterable[bytes | bytearray | memoryview]) -> bytes:
    """The code of a message. Its header has a number that comes once a connection and direction."""
    code = hashlib.blake2b(key=key, digest_size=TAG_BYTES)
    for part in parts:
        code.update(part)
    return code.digest()


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            status, secret = os.fstat(file.fileno()), file.read(4096).strip()
    except OSError as error:
        raise ConfigError(f"--secret-file: {path}: {error.strerror or error}") from None
    mode = stat.S_IMODE(status.st_mode)
    # So Kubernetes and systemd hand out a secret: it is root's, and a group's that this process's user was put into.
    handed_out = status.st_uid != os.geteuid()
    if mode & (0o037 if handed_out else 0o077):
        raise ConfigError(f"--secret-file: {path}: others may read or write it (mode {mode:o}): chmod 600")
    if len(secret) < LEAST_BYTES:
        raise ConfigError(f"--secret-file: {path}: too short; make one with `paceline secret new`")
    return secret
