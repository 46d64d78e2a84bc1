"""Every file under examples/ and paper_figs/ runs, in its small size, and leaves its picture and its numbers."""

from __future__ import annotations

import ast
import importlib
import json
import multiprocessing
import os
import runpy
import sys
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path for folder in ("examples", "paper_figs") for path in (ROOT / folder).glob("[!_]*.py"))


def run_script(script: str, folder: str) -> None:
    """What ``python SCRIPT --size small --out FOLDER`` does, in a process of its own; prints into files."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), number)
    os.chdir(ROOT)
    sys.argv = [script, "--size", "small", "--out", folder]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
    sys.stdout.flush()


@pytest.fixture(scope="module")
def processes() -> Iterator[BaseContext]:
    """Processes that begin with what every script imports first: a third of the time would go into that."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}.items():
            patch.setenv(name, value)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "matplotlib.pyplot", "transformers", "peft", "geoopt", "symgeo.merge"])
        yield context


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_script_runs(script: Path, tmp_path: Path, processes: BaseContext) -> None:
    process = processes.Process(target=run_script, args=(str(script), str(tmp_path)))
    process.start()
    process.join(600)
    alive = process.is_alive()
    process.kill()
    assert not alive and process.exitcode == 0, (tmp_path / "stderr").read_text()[-2000:]
    pictures = list(tmp_path.rglob("*.png"))
    assert pictures and all(picture.stat().st_size > 5000 for picture in pictures)
    if script.parent.name == "paper_figs":
        assert (tmp_path / f"{script.stem}.json").exists()
        assert (tmp_path / f"{script.stem}.pdf").read_bytes().startswith(b"%PDF-")
    for record in tmp_path.rglob("*.json"):
        json.loads(record.read_text(), parse_constant=lambda name: pytest.fail(f"a record holds {name}"))
    assert (tmp_path / "stdout").read_text().strip()


def test_there_are_scripts() -> None:
    names = {path.name for path in SCRIPTS}
    assert {"sharpness_of_a_transformer.py", "level_sets.py", "diagonal_nets.py", "orbit.py"} <= names


def test_every_figure_has_a_row_in_the_table() -> None:
    rows = [line for line in (ROOT / "paper_figs" / "README.md").read_text().splitlines() if line.startswith("| `")]
    named = {row.split("`")[1] for row in rows}
    assert {path.name for path in SCRIPTS if path.parent.name == "paper_figs"} <= named


def test_every_example_has_a_title_and_a_row_in_the_table() -> None:
    examples = [path for path in SCRIPTS if path.parent.name == "examples"]
    for path in examples:
        title, line, blank, *_ = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()
        assert line == "=" * len(title) and not blank, path.name
        assert path.read_text().count("\n# %%\n") >= 2, path.name
    rows = {line.split("`")[1] for line in (ROOT / "examples" / "README.md").read_text().splitlines() if "| `" in line}
    assert rows == {path.name for path in examples}


def test_a_variable_chooses_the_size_of_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    run = importlib.import_module("_run")
    monkeypatch.setattr(sys, "argv", ["example.py", "--out", str(tmp_path / "new")])
    for value, size in {"small": "small", "full": "full"}.items():
        monkeypatch.setenv(run.VARIABLE, value)
        assert run.options("").size == size and (tmp_path / "new").is_dir()
    monkeypatch.delenv(run.VARIABLE)
    assert run.options("").size == "full"
    monkeypatch.setenv(run.VARIABLE, "large")
    with pytest.raises(SystemExit):
        run.options("")
    assert "SYMGEO_EXAMPLE_SIZE must be one of small, full; found 'large'" in capsys.readouterr().err
