"""The figures of merging: their numbers against closed forms, and the orders in the spread."""

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

FIGURES = Path(__file__).parent.parent / "paper_figs"


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A figure as a script finds its neighbours in its own folder."""
    monkeypatch.syspath_prepend(FIGURES)
    return importlib.import_module("toy_merge")


@pytest.fixture
def spread(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FIGURES)
    return importlib.import_module("merge_spread")


def test_quotient_means_of_the_toy_net(toy: ModuleType) -> None:
    rows = {row["method"]: row for row in toy.means(0)}
    expected = {"geodesic-mix": 4.0, "bures": 2 + np.sqrt(3), "geodesic-inv": np.sqrt(12)}
    assert {name: row["closed_form"] for name, row in rows.items()} == pytest.approx(expected, abs=1e-12)
    assert max(row["difference"] for row in rows.values()) < 1e-9
    assert max(row.get("difference_on_manifold", 0.0) for row in rows.values()) < 1e-9


def test_copies_of_one_predictor(toy: ModuleType) -> None:
    rows = {(row["method"], row["gauge"]): row for row in toy.collapse()}
    assert max(row["difference"] for row in rows.values()) < 1e-9
    values = [rows[method, g]["value"] for method in ("euclidean", "fisher") for g in (3.0, 10.0, -1.0)]
    assert values == pytest.approx([8.0, 18.15, 0.0, 2.88, 0.71169493, 0.0], abs=1e-8)  # and the predictor is 6


def test_diagonal_fisher_is_that_of_autograd(toy: ModuleType) -> None:
    points = torch.tensor([[2.0, 3.0], [-0.7, 5.0], [1.1, 0.3]], dtype=torch.float64)
    jacobians = torch.stack([torch.func.grad(lambda t: t[0] * t[1])(point) for point in points])
    weights = jacobians.square()
    expected = (weights * points).sum(0) / weights.sum(0)
    assert toy.fisher(points.numpy()) == pytest.approx(expected.numpy(), rel=1e-14)


def test_orders_in_the_spread(spread: ModuleType) -> None:
    slopes = spread.by_spread((0.01, 0.02, 0.04), 1, 1)["slope"]
    third = slopes.pop("tsvd - embedded")
    assert third == pytest.approx(3.0, abs=0.25)
    assert list(slopes.values()) == pytest.approx([2.0] * 6, abs=0.15)


def test_common_part_is_found_better_than_by_averaging(spread: ModuleType) -> None:
    cosines = spread.by_amplitude((1.0,), 3, 0)["cosine"]
    common = {name: columns["common"][0]["mean"] for name, columns in cosines.items()}
    assert common["average"] + 1e-2 < common["tsvd"] < common["bures"]
