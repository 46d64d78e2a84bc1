"""The distribution: what is in it, and that its installed wheel works far from the checkout."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from contextlib import chdir
from email.parser import Parser
from pathlib import Path

import matplotlib
import pytest
import yaml
from hatchling.build import build_sdist, build_wheel

import symgeo

ROOT = Path(__file__).parent.parent
PACKAGES = ("manifolds", "symgeo")
SOURCES = {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
TYPED = {f"{package}/py.typed" for package in PACKAGES}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    with chdir(ROOT):
        return folder / build_wheel(str(folder)), folder / build_sdist(str(folder))


def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_holds_the_two_packages(built: tuple[Path, Path]) -> None:
    wheel, _ = built
    info = f"symgeo-{symgeo.__version__}.dist-info"
    assert wheel.name == f"symgeo-{symgeo.__version__}-py3-none-any.whl"
    assert names(wheel) >= SOURCES | TYPED | {f"{info}/METADATA", f"{info}/licenses/LICENSE"}
    assert {name.partition("/")[0] for name in names(wheel)} == {*PACKAGES, info}
    assert not [name for name in names(wheel) if "__pycache__" in name or name.endswith(".pyc")]


def test_the_wheel_says_what_it_is(built: tuple[Path, Path]) -> None:
    info = f"symgeo-{symgeo.__version__}.dist-info"
    with zipfile.ZipFile(built[0]) as archive:
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        assert "symgeo = symgeo.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert metadata["Version"] == symgeo.__version__ and metadata["License-Expression"] == "Apache-2.0"
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    needed = metadata.get_all("Requires-Dist", [])
    assert any(re.match(r"torch>=", line) for line in needed)
    assert any(re.match(r"scikit-learn.*extra == 'demo'", line) for line in needed)
    assert metadata.get_payload().startswith("# symgeo")


def test_the_source_distribution_holds_what_its_tests_need(built: tuple[Path, Path], tmp_path: Path) -> None:
    wheel, sdist = built
    root = f"symgeo-{symgeo.__version__}"
    with tarfile.open(sdist) as archive:
        found = {name.removeprefix(f"{root}/") for name in archive.getnames()}
        archive.extractall(tmp_path, filter="data")
    tests = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob("*.py")}
    examples = {path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").glob("*.py")}
    assert found >= SOURCES | TYPED | tests | examples
    assert found >= {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "Makefile", "constraints.txt"}
    assert not [name for name in found if name.startswith((".ci", ".venv", ".git/", "dist", "examples/out"))]
    with chdir(tmp_path / root):
        again = tmp_path / build_wheel(str(tmp_path))
    assert names(again) == names(wheel)


@pytest.fixture(scope="module")
def environment(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with the wheel; all else comes from this one's folders of packages.

    Those are named in a .pth file, which does not read the .pth files in them, such as that of an editable install.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    install = ["install", "-q", "--no-deps", "--no-index", "--disable-pip-version-check", str(built[0])]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True, timeout=120)
    (site,) = folder.glob("lib/python*/site-packages")
    shared = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "shared.pth").write_text("\n".join(shared) + "\n")
    return folder


def call(environment: Path, folder: Path, *command: str) -> str:
    """What a command of the environment prints, started in a folder with no variables that lead back here."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "SYMGEO"))}
    clean = kept | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache"), "HOME": str(folder)}
    clean["MPLCONFIGDIR"] = matplotlib.get_cachedir()  # where its list of fonts is, which takes seconds to make
    program = str(environment / "bin" / command[0])
    result = subprocess.run(
        [program, *command[1:]], cwd=folder, env=clean, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
def test_the_installed_wheel_is_what_is_imported(environment: Path, tmp_path: Path) -> None:
    code = "import symgeo, manifolds, symgeo.cli; print(symgeo.__file__, manifolds.__file__, symgeo.cli.__file__)"
    files = call(environment, tmp_path, "python", "-c", code).split()
    assert len(files) == 3 and all(Path(file).is_relative_to(environment) for file in files)
    assert call(environment, tmp_path, "symgeo", "--version") == f"symgeo {symgeo.__version__}\n"


@pytest.mark.slow
def test_the_installed_wheel_runs_the_demo(environment: Path, tmp_path: Path) -> None:
    printed = call(environment, tmp_path, "symgeo", "demo", "--quick")
    assert "symgeo-demo/report.html" in printed
    report = json.loads((tmp_path / "symgeo-demo" / "report.json").read_text())
    assert report["command"] == "demo" and len(report["result"]["models"]) == 6
    assert (tmp_path / "symgeo-demo" / "report.html").stat().st_size > 10000


def test_one_version_everywhere() -> None:
    assert re.fullmatch(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)((a|b|rc)\d+)?", symgeo.__version__)
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == symgeo.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == symgeo.__version__


def test_hooks_run_what_make_lint_runs() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    entries = [hook["entry"] for repository in config["repos"] for hook in repository["hooks"]]
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert recipe and entries == [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines()]
    assert {repository["repo"] for repository in config["repos"]} == {"local"}
