"""What figures compute themselves: merges against closed forms, the relaxation in print, sharpness taken apart."""

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from symgeo import ParameterManifold, Symmetry, adaptive_sharpness, geodesic_sharpness
from symgeo.functional import Params
from symgeo.groups import GeneralLinear
from symgeo.study import Candidate

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
    rows = {row["method"]: row for row in toy.means(0, 3)}
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


@pytest.fixture
def pair() -> Candidate:
    """A pair of factors with a bias beside them, badly balanced, not at a minimum."""
    generator = torch.Generator().manual_seed(3)
    b, a, bias, x, y = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((7, 3), (3, 5), (7,), (5, 11), (7, 11))
    )
    params = {"B": 3 * b, "A": a, "bias": bias}

    def loss(at: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (at["B"] @ at["A"] @ batch[0] + at["bias"][:, None] - batch[1]).square().mean()

    symmetry = Symmetry({"B": "_ r", "A": "r* _"}, {"r": GeneralLinear()})
    return Candidate("pair", loss, params, [(x, y)], {}, symmetry)


def straight(candidate: Candidate, eps: float) -> float:
    manifold = ParameterManifold(candidate.params, candidate.symmetry, eps=eps)
    given = candidate.loss, candidate.params, candidate.batches
    return geodesic_sharpness(*given, manifold, 0.2, 12, geodesic="linear").value


def test_relaxation_in_print_is_ours_in_the_balanced_gauge(monkeypatch: pytest.MonkeyPatch, pair: Candidate) -> None:
    monkeypatch.syspath_prepend(FIGURES)
    plain = importlib.import_module("_plain_relaxation").plain_sharpness
    manifold = ParameterManifold(pair.params, pair.symmetry)
    chart = manifold.chart(pair.params)
    balanced = replace(pair, params=chart.point(chart.origin(), "linear"))
    assert plain(pair, manifold, 0.0, 0.2, 12) == pytest.approx(straight(pair, 0.0), rel=1e-9)
    assert plain(balanced, manifold, 0.7, 0.2, 12) == pytest.approx(straight(balanced, 0.7), rel=1e-9)
    assert straight(balanced, 0.7) == pytest.approx(straight(pair, 0.7), rel=1e-9)
    assert abs(plain(pair, manifold, 0.7, 0.2, 12) / straight(pair, 0.7) - 1) > 1e-3  # which is no accident


def test_horizontal_space_of_the_relaxation_in_print(monkeypatch: pytest.MonkeyPatch, pair: Candidate) -> None:
    monkeypatch.syspath_prepend(FIGURES)
    module = importlib.import_module("_plain_relaxation")
    manifold, eps = ParameterManifold(pair.params, pair.symmetry), 0.7
    chart = module.PlainChart(pair.params, manifold, eps)
    z = chart.project(torch.randn(7 * 3 + 3 * 5 + 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(chart.project(z), z, atol=1e-12)
    end = chart.point(z)
    b, a = pair.params["B"], pair.params["A"]
    step_b, step_a = end["B"] - b, end["A"] - a
    generator, eye = torch.Generator().manual_seed(1), torch.eye(3, dtype=torch.float64)
    algebra = torch.randn(3, 3, dtype=torch.float64, generator=generator)
    product = torch.trace(torch.linalg.solve(b.mT @ b + eps * eye, step_b.mT @ (b @ algebra)))
    product -= torch.trace(torch.linalg.solve(a @ a.mT + eps * eye, step_a @ (algebra @ a).mT))
    assert abs(float(product)) < 1e-10
    length = torch.trace(torch.linalg.solve(b.mT @ b + eps * eye, step_b.mT @ step_b))
    length += torch.trace(torch.linalg.solve(a @ a.mT + eps * eye, step_a @ step_a.mT))
    length += ((end["bias"] - pair.params["bias"]) / pair.params["bias"]).square().sum()
    assert float(length) == pytest.approx(float(z.square().sum()), rel=1e-12)


def test_order_of_the_geodesic_in_the_elementwise_ball(monkeypatch: pytest.MonkeyPatch, pair: Candidate) -> None:
    monkeypatch.syspath_prepend(FIGURES)
    module = importlib.import_module("geodesic_order")
    gaps = []
    for rho in (0.02, 0.01):
        plain = module.measure(pair, "neither", rho, 20, 0)
        assert plain == adaptive_sharpness(pair.loss, pair.params, pair.batches, rho, 20).value
        gaps.append(module.measure(pair, "inv: correction only", rho, 20, 0) - plain)
    assert gaps[0] / gaps[1] == pytest.approx(4, abs=0.3)  # the correction is of second order
