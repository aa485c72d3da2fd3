"""What people deploy with: the container file, the manifests and the chart that they come from, the unit."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from paceline import cli
from paceline.settings import DeploymentConfig
from tests.pace import stretched

yaml = pytest.importorskip("yaml", reason="make test-deploy installs what these need")
import render_chart  # noqa: E402

DEPLOY = render_chart.DEPLOY
KUBERNETES = "1.30"


def documents(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(text) if document]


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The pods that a manifest makes, as templates."""
    spec = document["spec"]
    if document["kind"] == "StatefulSet":
        return [spec["template"]]
    if document["kind"] == "LeaderWorkerSet":
        return [spec["leaderWorkerTemplate"][name] for name in ("leaderTemplate", "workerTemplate")]
    return []


@pytest.mark.parametrize("file", sorted(render_chart.MANIFESTS))
def test_the_plain_manifests_are_the_charts(file: str) -> None:
    rendered = render_chart.manifests(render_chart.values(kind=render_chart.MANIFESTS[file]))
    assert (DEPLOY / "kubernetes" / file).read_text().partition("\n")[2] == rendered


LARGER = {"gpus": 8, "model": "a/b", "extraArguments": "--bind arrival", "workers": 3, "ranks": 8}
VARIED = [{}, {"kind": "LeaderWorkerSet"}, LARGER, LARGER | {"kind": "LeaderWorkerSet"}]


@pytest.mark.parametrize("given", VARIED)
def test_what_the_chart_makes_is_valid(given: dict[str, Any]) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    made = documents(render_chart.manifests(render_chart.values(**given)))
    assert {one["kind"] for one in made} > {"Service", "PodDisruptionBudget"}
    for document in made:
        if document["kind"] == "LeaderWorkerSet":
            # Its schema is its controller's; what it holds are pods.
            assert set(document["spec"]["leaderWorkerTemplate"]) == {
                "size", "restartPolicy", "leaderTemplate", "workerTemplate"
            }  # fmt: skip
            for pod in pods(document):
                whole = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "a"}, "template": pod}
                validate(whole, KUBERNETES, strict=True)
        else:
            validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize("given", VARIED)
def test_every_pod_has_what_it_needs(given: dict[str, Any]) -> None:
    made = documents(render_chart.manifests(render_chart.values(**given)))
    templates = {pod["metadata"]["labels"]["role"]: pod for one in made for pod in pods(one)}
    assert templates.keys() == {"head", "worker"}
    for pod in templates.values():
        (container,) = pod["spec"]["containers"]
        assert pod["spec"]["terminationGracePeriodSeconds"] > 60 + 5, "drained within"
        assert {mount["name"] for mount in container["volumeMounts"]} == {one["name"] for one in pod["spec"]["volumes"]}
    head = templates["head"]["spec"]["containers"][0]
    probes = {name: head[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert probes == {"startup": "/startupz", "readiness": "/readyz", "liveness": "/livez"}
    assert head["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "5"]


@pytest.mark.parametrize("given", VARIED)
def test_the_command_line_is_one_of_ours(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pod's, as a shell makes it, is read by `paceline serve`; and the ranks of all pods are all ranks."""
    read: list[DeploymentConfig] = []
    monkeypatch.setattr(cli, "_serve", read.append)
    config = render_chart.values(**given)
    made = documents(render_chart.manifests(config))
    ranks: set[int] = set()
    for pod in (pod for one in made for pod in pods(one)):
        (container,) = pod["spec"]["containers"]
        (script,) = container["args"]
        assert script.startswith("exec paceline serve ")
        worker = pod["metadata"]["labels"]["role"] == "worker"
        for index in range(config["workers"] if worker else 1):
            variables = {"POD_IP": "10.1.2.3", "POD_INDEX": str(index), "LWS_WORKER_INDEX": str(index + 1),
                         "LWS_LEADER_ADDRESS": "leader"}  # fmt: skip
            said = subprocess.run(
                ["sh", "-c", script.replace("exec paceline", 'printf "%s\\n"')], env=variables, capture_output=True,
                text=True, check=True, timeout=stretched(30),
            ).stdout.split("\n")[:-1]  # fmt: skip
            assert CliRunner().invoke(cli.app, said).exit_code == 0
            parallel = read[-1].parallel
            ranks |= set(parallel.local_ranks)
            assert parallel.headless == worker
    assert ranks == set(range(config["ranksPerNode"] * (1 + config["workers"])))


def test_the_container_file_passes_its_linter() -> None:
    program = Path(sys.executable).with_name("hadolint")
    if not program.exists():
        pytest.skip("no hadolint here: make test-deploy installs it")
    done = subprocess.run([program, DEPLOY / "Dockerfile"], capture_output=True, text=True, timeout=stretched(60))
    assert (done.stdout, done.returncode) == ("", 0)


def test_the_container_file_copies_what_is_there_and_ends_with_the_command() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    root = DEPLOY.parent
    sources = re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE)
    assert all((root / source).exists() for line in sources for source in line.split())
    kept = {line[1:] for line in (root / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert kept == {source for line in sources for source in line.split()}
    assert 'ENTRYPOINT ["paceline"]' in text
    assert re.search(r"^USER 10001$", text, re.MULTILINE)


def test_the_unit_is_one(tmp_path: Path) -> None:
    unit = DEPLOY / "paceline.service"
    assert "KillMode=mixed" in unit.read_text()
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("no systemd here")
    here = tmp_path / unit.name
    here.write_text(unit.read_text().replace("/opt/paceline/bin/paceline", sys.executable))
    done = subprocess.run([program, "verify", "--man=no", here], capture_output=True, text=True, timeout=stretched(60))
    assert [line for line in done.stderr.splitlines() if "paceline.service" in line] == []
