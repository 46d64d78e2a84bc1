"""The figures of the README are those of the records, row by row; those of optimizers beside their costs too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
LINES = (ROOT / "README.md").read_text().splitlines()


def record(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())


def cells(start: str) -> list[str]:
    """The cells behind the first one of the only row of a table that begins so."""
    [line] = [line for line in LINES if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


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
    "model a quarter the size": ("scaling", lambda r: r["growth"]["time"]["optimizer step"]),
}


@pytest.mark.parametrize("row", RATIOS)
def test_ratio_is_the_recorded_one(row: str) -> None:
    name, value = RATIOS[row]
    [line] = [line for line in LINES if line.startswith("|") and row in line]
    shown = line.split("|")[-2].strip()
    digits = len(shown.partition(".")[2])
    assert shown == f"{value(record(name)):.{digits}f}"


METHODS = {
    "grafted Shampoo": "shampoo_tuned", "`SymO`, `shampoo`": "symo_shampoo", "SOAP": "soap",
    "`SymO`, `muon`, betas .95": "symo_muon", "torch Muon": "muon", "`SymO`, `muon`, betas .9,": "symo_one_sided",
    "AdamW": "adamw",
}


@pytest.mark.parametrize("start", METHODS)
def test_an_optimizer_has_its_own_figures(start: str) -> None:
    found, name = record("optimizers"), METHODS[start]
    row, cost = found["summary"][name], found["timing"]["step / step of default AdamW"][name]
    loss, steps, shown = cells(start)
    assert loss == f"{row['final loss']:.3f} ± {row['standard error']:.3f}".replace("± 0.", "± .")
    assert steps == str(row["steps to target"]) and shown.split()[0] == f"{cost:.1f}"


def test_the_orbit_of_the_transformer_is_the_recorded_one() -> None:
    """What `examples/sharpness_of_a_transformer.py` wrote in its full size."""
    points = json.loads((ROOT / "docs" / "records" / "sharpness_of_a_transformer.json").read_text())
    assert [point["point"] for point in points] == ["trained", "orbit 1", "orbit 2", "orbit 3"]
    for point in points:
        shown = [f"{point['loss']:.8f}", *(f"{point[kind]:.10f}" for kind in ("geodesic", "adaptive"))]
        assert cells(point["point"]) == shown
    spread = [max(point[kind] for point in points) / min(point[kind] for point in points) for kind in
              ("loss", "geodesic", "adaptive")]
    assert spread[0] - 1 < 1e-12 and spread[1] - 1 < 1e-10 and spread[2] > 100
