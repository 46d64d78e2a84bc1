"""Estimates: errors that match the spread over seeds and cover the quadrature, tolerances, and hard spectra."""

from __future__ import annotations

import pytest
import torch
from hessian_cases import error, normal
from test_hessian_operator import operator_of, with_spectrum
from torch import Tensor

from symgeo.hessian import Estimate, HessianOperator, lanczos, laplace_evidence

FLAT = with_spectrum(torch.linspace(1, 2, 97, dtype=torch.float64))


def logspace(decades: float, count: int, zeros: int = 0) -> Tensor:
    return torch.cat([torch.zeros(zeros), torch.logspace(-decades, 0, count - zeros)]).double()


def turned(values: Tensor) -> HessianOperator:
    return operator_of(with_spectrum(values))


@pytest.mark.parametrize(("method", "samples"), [("hutchinson", 3), ("hutch++", 7), ("xtrace", 10), ("xtrace", 30)])
def test_standard_errors_match_the_spread_over_seeds(method: str, samples: int) -> None:
    """Also of few draws: at most 3 % of 60 seeds beyond four, and not because the errors are made huge."""
    operator, exact = operator_of(FLAT), float(FLAT.trace())
    found = [operator.trace(samples, seed, method) for seed in range(60)]
    z = torch.tensor([abs(e.value - exact) / e.stderr for e in found])
    assert float((z > 4).double().mean()) <= 0.03 and float((z > 2).double().mean()) <= 0.1
    assert 0.2 < float(z.median()) < 1 and all(e.products == samples and e.converged is None for e in found)


def test_xtrace_on_few_coordinates_claims_nothing() -> None:
    """Random signs coincide there; and the vectors of the sphere reach what independent draws do on a flat spectrum."""
    matrix = torch.linspace(1, 2, 7, dtype=torch.float64).diag()
    for seed in range(60):
        found = operator_of(matrix).trace(6, seed, "xtrace")
        assert found.stderr > 0 and abs(found.value - 10.5) <= 12 * found.stderr
    errors = torch.tensor([operator_of(FLAT).trace(60, seed, "xtrace").value for seed in range(20)]) - FLAT.trace()
    assert float(errors.square().mean().sqrt()) < 1.2  # 2.7 without the normalisation, 0.5 by Hutchinson


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_traces_stop_at_a_tolerance(method: str) -> None:
    matrix = with_spectrum(torch.arange(97, dtype=torch.float64).mul(-0.3).exp() + 0.01)
    operator, exact = operator_of(matrix), float(matrix.trace())
    loose = operator.trace(method=method, tol=0.2)
    assert loose.converged and loose.products < 97 and loose.stderr <= 0.2 * exact and abs(loose - exact) < 0.8 * exact
    tight = operator.trace(method=method, tol=1e-9)
    assert tight.converged and tight.stderr == 0 and tight.value == pytest.approx(exact, rel=1e-12)
    assert operator.trace(40, method=method, tol=1e-9).converged is False
    diagonal = operator.diagonal(tol=0.1)
    assert diagonal.converged and error(diagonal.value, matrix.diagonal()) < 0.4


@pytest.mark.parametrize("decades", [6, 10])
def test_log_determinants_of_ill_conditioned_matrices_cover_the_quadrature(decades: float) -> None:
    """64 steps do not resolve them: the error says so, and converged is False; the evidence likewise."""
    values = logspace(decades, 400)
    operator, exact = turned(values), float(values.log().sum())
    for seed in range(2):
        found = operator.logdet(samples=8, seed=seed, steps=64)
        evidence = laplace_evidence(0.3, operator, samples=8, seed=seed, steps=64)
        assert abs(found - exact) <= 2 * found.stderr and found.converged is False and found.bounds is not None
        assert found.bounds[0] <= exact <= found.bounds[1]
        assert abs(evidence - (-0.3 - exact / 2)) <= 2 * evidence.stderr and evidence.converged is False


def test_log_determinants_go_as_deep_as_they_must() -> None:
    """More steps until the quadrature is resolved; then the error is that of the probes; indefinite ones too."""
    for values in (logspace(4, 200), torch.cat([logspace(2, 100), -logspace(2, 60)])):
        operator, exact = turned(values), float(values.abs().log().sum())
        found = operator.logdet(samples=8, seed=1)
        assert abs(found - exact) <= 4 * found.stderr < 0.15 * abs(exact) and found.converged is None
        assert 8 * 32 < found.products <= 8 * 200
        close = operator.logdet(tol=0.03, samples=64)
        assert close.converged and close.stderr <= 0.03 * abs(close) and abs(close - exact) <= 4 * close.stderr
    positive = turned(logspace(2, 100))
    evidence = laplace_evidence(0.3, positive, tol=0.05, samples=64)
    assert evidence.converged and abs(evidence - laplace_evidence(0.3, positive)) <= 4 * evidence.stderr
    assert operator.logdet(tol=1e-9, samples=2).converged is False


def test_singular_matrices_have_no_logarithm() -> None:
    singular = turned(torch.cat([torch.zeros(150), torch.linspace(1, 3, 50)]).double())
    assert singular.logdet() == singular.logdet(samples=3) == -torch.inf
    assert singular.logdet(1e-3).value == pytest.approx(150 * torch.tensor(1e-3).log().item() + 34, rel=0.1)
    for samples in (None, 3):
        with pytest.raises(ValueError, match="needed a positive definite"):
            laplace_evidence(0.0, singular, samples=samples)


def test_densities_count_their_quadrature() -> None:
    """On a continuous spectrum, coarse or deep: the error covers what the exact density differs by."""
    values = torch.linspace(-1, 2, 200, dtype=torch.float64)
    operator = turned(values)
    for options in ({"steps": 12}, {}, {"tol": 0.15, "samples": 64}):
        found = operator.spectral_density(points=100, **options)
        smooth = ((found.grid[:, None] - values) / found.width).square().mul(-0.5).exp().mean(1)
        smooth = smooth / (found.width * (2 * torch.pi) ** 0.5)
        beyond = (found.density - smooth).abs() > 4 * found.stderr + 0.02
        assert float(beyond.double().mean()) < 0.05
        assert found.converged is {12: False}.get(options.get("steps", 0), True if "tol" in options else None)
    assert float(found.stderr.sum()) * float(found.grid[1] - found.grid[0]) <= 0.15


def test_counts_of_near_zero_eigenvalues_are_bounded() -> None:
    for values, resolved in ((logspace(1, 300, 50), True), (logspace(7, 300, 50), False), (-logspace(1, 300), True),
                             (torch.linspace(-1, 1.1, 300, dtype=torch.float64), False)):
        operator, exact = turned(values), int((values.abs() <= 1e-6).sum())
        assert operator.near_zero() == exact
        found = operator.near_zero(samples=8, steps=100)
        assert found.bounds is not None and found.bounds[0] <= exact <= found.bounds[1]
        assert (found.converged is not False) == resolved
        assert abs(found - exact) <= 4 * found.stderr
    assert operator_of(torch.zeros(30, 30).double()).near_zero(samples=2) == 30


def test_a_basis_is_kept_while_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """One vector for each step and probe; without a basis the rules serve as well."""
    operator, start = turned(logspace(2, 97)), normal(97, 3)
    run = lanczos.Recurrence(operator, start)
    for steps in (5, 20):
        run.extend(steps)
    assert run.basis is not None and run.basis.shape == (3, 20, 97)
    whole = lanczos.lanczos(operator, start, 60)
    monkeypatch.setattr(lanczos, "_BASIS", 97)
    run.extend(60)
    assert run.basis is None
    logs = [(rule.weights * rule.nodes.log()).sum(-1) for rule in (whole, run.jacobi.gauss())]
    assert error(logs[1], logs[0]) < 1e-8


@pytest.mark.parametrize("method", ["krylov", "eigsh", "lobpcg"])
def test_ends_at_zero_and_of_any_scale(method: str) -> None:
    """Tolerances are relative to the largest magnitude: not to eigenvalues that vanish, and not to 1."""
    many = turned(torch.cat([torch.zeros(150), torch.linspace(1, 3, 50)]).double())
    pairs = many.eigh(3, "SA", method=method)
    assert float(pairs.values.abs().max()) <= 1e-7 and float(pairs.residuals.max()) <= 1e-6
    zero = operator_of(torch.zeros(100, 100).double()).eigh(3, "SA", method=method)
    vectors = torch.stack([v["w"] for v in zero.vectors], 1)
    assert not zero.values.any() and error(vectors.T @ vectors, torch.eye(3).double()) < 1e-10
    matrix = normal(200, 200, seed=0)
    small = (matrix + matrix.T) * 1e-9
    expected = torch.linalg.eigvalsh(small)[:2]
    found = operator_of(small).eigvalsh(2.0, "SA", method=method)
    assert float((found - expected).abs().max()) <= 1e-7 * float(expected.abs().max())


def test_copies_of_multiple_eigenvalues_are_found() -> None:
    """Of rank two, in magnitude; and a cluster that no iteration separates is left to the matrix itself."""
    low = turned(torch.cat([torch.tensor([2.0, -1.0]), torch.zeros(98)]).double())
    assert error(low.eigvalsh(5, "LM"), torch.tensor([-1.0, 0, 0, 0, 2]).double()) <= 1e-9
    crowded = turned(logspace(6, 150, 100))
    assert float(crowded.eigvalsh(3, "SA").abs().max()) <= 1e-12
    values, vectors = low.eigh(2)  # two parts, as they were
    assert len(values) == len(vectors) == 2


def test_estimates_are_numbers() -> None:
    moved = Estimate(2.0, 0.5, 7, 70, False, (1.0, 4.0)).affine(-0.5, 1.0)
    assert (moved.value, moved.stderr, moved.bounds, moved.converged) == (0.0, 0.25, (-1.0, 0.5), False)
    assert Estimate(2.0).converged is True
