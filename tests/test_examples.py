"""Every file under examples/ and paper_figs/ runs, in its small size, and leaves its picture and its numbers."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path for folder in ("examples", "paper_figs") for path in (ROOT / folder).glob("[!_]*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_script_runs(script: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, str(script), "--size", "small", "--out", str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    pictures = list(tmp_path.rglob("*.png"))
    assert pictures and all(picture.stat().st_size > 5000 for picture in pictures)
    if script.parent.name == "paper_figs":
        assert (tmp_path / f"{script.stem}.json").exists()
        assert (tmp_path / f"{script.stem}.pdf").read_bytes().startswith(b"%PDF-")
    for record in tmp_path.rglob("*.json"):
        json.loads(record.read_text(), parse_constant=lambda name: pytest.fail(f"a record holds {name}"))
    assert result.stdout.strip()


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
