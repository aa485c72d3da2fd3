"""Nodes of a deployment on one machine: a network namespace each, on a bridge that this process has a leg on."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

_numbers = itertools.count()


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


class Host:
    """A namespace with one address. `prefix`: what runs a command there."""

    def __init__(self, network: str, index: int, bridge: str) -> None:
        self.name = f"{bridge}h{index}"
        self.address = f"{network}.{index + 2}"
        self._names = Path("/etc/netns") / self.name / "hosts"
        self.prefix = ("ip", "netns", "exec", self.name)
        self.link = f"{bridge}v{index}"
        _ip("netns", "add", self.name)
        _ip("link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        _ip("link", "set", self.link, "master", bridge, "up")
        for arguments in (["addr", "add", f"{self.address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"],
                          ["link", "set", "lo", "up"]):  # fmt: skip
            _ip("-n", self.name, *arguments)

    def knows(self, name: str, address: str) -> None:
        """What it finds under a name; commands that run already find it, too."""
        self._names.parent.mkdir(parents=True, exist_ok=True)
        self._names.write_text(f"127.0.0.1 localhost\n{address} {name}\n")

    def move(self) -> None:
        """Have another address, as a pod that is made anew."""
        network, _, number = self.address.rpartition(".")
        _ip("-n", self.name, "addr", "del", f"{self.address}/24", "dev", "eth0")
        self.address = f"{network}.{int(number) + 100}"
        _ip("-n", self.name, "addr", "add", f"{self.address}/24", "dev", "eth0")

    def forget(self) -> None:
        shutil.rmtree(self._names.parent, ignore_errors=True)

    def cut(self, cut: bool = True) -> None:
        """Cut its link, or mend it."""
        _ip("link", "set", self.link, "down" if cut else "up")


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """So many; skips the test where this machine does not let us make them."""
    number = (os.getpid() * 8 + next(_numbers)) % 65536
    bridge, network = f"pl{number:x}", f"10.{number // 256}.{number % 256}"
    made: list[Host] = []
    try:
        try:
            _ip("link", "add", bridge, "type", "bridge")
            _ip("addr", "add", f"{network}.1/24", "dev", bridge)
            _ip("link", "set", bridge, "up")
            made += [Host(network, index, bridge) for index in range(count)]
        except OSError as error:
            pytest.skip(f"no network namespaces here: {error}")
        yield made
    finally:
        for host in made:
            host.forget()
        for arguments in (*(["netns", "del", f"{bridge}h{index}"] for index in range(count)), ["link", "del", bridge]):
            with contextlib.suppress(OSError):
                _ip(*arguments)
