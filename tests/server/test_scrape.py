"""Adding up the front-ends' files says what prometheus-client's own collector says of them."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.utils import floatToGoString

from paceline.server.scrape import Scrape

Samples = dict[tuple[str, str, tuple[tuple[str, str], ...]], float]

MODEL = 'a "model"\\of\nmine'
LABELS = ("model_name", "engine")
BOUNDS = (0.1, 1.0, 2560.0, 1e7, float("inf"))


def write(folder: Path, process: int, ranks: range, chance: random.Random) -> None:
    """What a front-end's process leaves there; or more of it."""
    counters = MmapedDict(str(folder / f"counter_{process}.db"))
    histograms = MmapedDict(str(folder / f"histogram_{process}.db"))
    for rank in ranks:
        labels = (MODEL, str(rank))
        counters.write_value(mmap_key("a:tokens", "a:tokens_total", LABELS, labels, "Made\nhere."), chance.random(), 0)
        for bound in BOUNDS:
            key = mmap_key("a:seconds", "a:seconds_bucket", (*LABELS, "le"), (*labels, floatToGoString(bound)), "Took.")
            histograms.write_value(key, chance.randrange(9), 0)
        histograms.write_value(mmap_key("a:seconds", "a:seconds_sum", LABELS, labels, "Took."), chance.random(), 0)
    counters.write_value(mmap_key("b", "b_total", (), (), "Without a label."), chance.randrange(10**9), 0)
    counters.close()
    histograms.close()


def samples(text: str) -> Samples:
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = (family.type, sample.name, tuple(sorted(sample.labels.items())))
            assert name not in found, "nothing is said twice"
            found[name] = sample.value
    return found


def theirs(folder: Path) -> Samples:
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(folder))
    return samples(generate_latest(registry).decode())


def test_it_says_what_the_library_says_also_of_what_is_new_and_what_has_changed(tmp_path: Path) -> None:
    chance = random.Random(5)
    scrape = Scrape(str(tmp_path))
    assert scrape.text() == b""
    for process, ranks in ((100, range(3)), (101, range(1, 4)), (100, range(2)), (102, range(3, 12)), (101, range(4))):
        write(tmp_path, process, ranks, chance)
        text = scrape.text().decode()
        assert samples(text) == theirs(tmp_path)
        heads = [line for line in text.splitlines() if line.startswith("# TYPE")]
        assert len(heads) == len(set(heads)) == 3, "a family is in one piece"


def test_where_a_cleaner_takes_the_folder_it_goes_on(tmp_path: Path) -> None:
    chance, folder = random.Random(6), tmp_path / "metrics"
    scrape = Scrape(str(folder))
    folder.mkdir()
    write(folder, 100, range(3), chance)
    scrape.text()
    shutil.rmtree(folder)
    assert set(samples(scrape.text().decode()).values()) == {0.0}
    folder.mkdir()
    write(folder, 101, range(4), chance)
    assert samples(scrape.text().decode()) == theirs(folder)
