"""Every file under examples/ and paper_figs/ runs, in its small size, and leaves its picture and its numbers."""

from __future__ import annotations

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
    for record in tmp_path.rglob("*.json"):
        json.loads(record.read_text(), parse_constant=lambda name: pytest.fail(f"a record holds {name}"))
    assert result.stdout.strip()


def test_there_are_scripts() -> None:
    names = {path.name for path in SCRIPTS}
    assert {"sharpness_of_a_transformer.py", "level_sets.py", "diagonal_nets.py", "orbit.py"} <= names
