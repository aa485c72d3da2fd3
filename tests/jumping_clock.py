"""A wall clock that jumps, for the processes that a test starts: in Python, or in the C library under it."""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

NAME = "PACELINE_TEST_CLOCK"

IN_PYTHON = f"""
import mmap, os, struct, time
with open(os.environ["{NAME}"], "rb") as file:
    shared = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)
def jumped(real, scale):
    return lambda: real() + struct.unpack("q", shared[:8])[0] * scale
time.time, time.time_ns = jumped(time.time, 1), jumped(time.time_ns, 10**9)
"""

IN_C = f"""
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static int64_t jump(void) {{
    static volatile int64_t *shared;
    if (!shared) {{
        int file = open(getenv("{NAME}"), O_RDONLY);
        shared = mmap(0, 8, PROT_READ, MAP_SHARED, file, 0);
        close(file);
    }}
    return *shared;
}}
int clock_gettime(clockid_t clock, struct timespec *now) {{
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += jump();
    return failed;
}}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {{
    int failed = syscall(SYS_gettimeofday, now, zone);
    if (!failed) now->tv_sec += jump();
    return failed;
}}
time_t time(time_t *to) {{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (to) *to = now.tv_sec;
    return now.tv_sec;
}}
"""


class JumpingClock:
    """Processes that are started from now on have this clock. `below`: also what in them is no Python.

    Skips the test where there is no C compiler for that.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, below: bool) -> None:
        path = folder / "clock"
        path.write_bytes(bytes(8))
        with open(path, "r+b") as file:
            self._shared = mmap.mmap(file.fileno(), 8)
        monkeypatch.setenv(NAME, str(path))
        if below:
            monkeypatch.setenv("LD_PRELOAD", str(_library(folder)))
            return
        (folder / "sitecustomize.py").write_text(IN_PYTHON)
        paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))

    def jump(self, seconds: int) -> None:
        """From here on the clock is so far from the right time."""
        self._shared[:8] = struct.pack("q", seconds)


def _library(folder: Path) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, library = folder / "clock.c", folder / "clock.so"
    source.write_text(IN_C)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return library
