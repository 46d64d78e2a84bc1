"""The figures of the README are those of the benchmarks' records."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def record(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())


RATIOS = {
    "iteration on a straight line": (
        "sharpness", lambda r: r["ratios (median of rounds)"]["exact inv / straight line"]),
    "bare forward and backward pass": (
        "sharpness", lambda r: r["ratios (median of rounds)"]["exact inv / forward + backward"]),
    "public loop of adaptive sharpness": (
        "sharpness", lambda r: r["ratios (median of rounds)"]["exact inv / public loop"]),
    "product with the plain Hessian |": ("hessian", lambda r: r["ratios (median of rounds)"]["invariant inv / plain"]),
    "BERT-base, 109 M": ("hessian", lambda r: r["bert-base"]["ratios (median of rounds)"]["invariant inv / plain"]),
    "curvlinops 3.0.1": ("hessian", lambda r: r["bert-base"]["ratios (median of rounds)"]["plain / curvlinops"]),
    "`tsvd`, the same result": ("merge", lambda r: r["one layer"]["ratios (median of rounds)"]["PEFT svd / tsvd"]),
    "4 times the parameters": ("scaling", lambda r: r["growth"]["time"]["optimizer step"]),
}


@pytest.mark.parametrize("row", RATIOS)
def test_ratio_is_the_recorded_one(row: str) -> None:
    name, value = RATIOS[row]
    [line] = [line for line in TEXT.splitlines() if line.startswith("|") and row in line]
    shown = line.split("|")[-2].strip()
    digits = len(shown.partition(".")[2])
    assert shown == f"{value(record(name)):.{digits}f}"


def test_losses_are_the_recorded_ones() -> None:
    summary = record("optimizers")["summary"]
    found = re.findall(r"\| (\d\.\d{3}) ± \.(\d{3}) \| (\d+) \|", TEXT)
    assert len(found) == 7
    recorded = {(f"{row['final loss']:.3f}", f"{row['standard error']:.3f}"[2:], str(row["steps to target"]))
                for row in summary.values()}
    assert set(found) <= recorded
