"""The operator: algebra, spectra, stochastic estimates with honest errors, compression and blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hessian_cases import attention, dense_hessian, error, flat, mlp, normal, unflat
from networks import params_of
from torch import Tensor, nn

from symgeo import functional_loss
from symgeo.hessian import (
    HessianOperator,
    block,
    euclidean_hessian,
    ggn,
    low_rank_plus_diagonal,
    model_loss,
    module_blocks,
)
from symgeo.hessian.lanczos import lanczos
from symgeo.hessian.space import FlatSpace


def operator_of(matrix: Tensor) -> HessianOperator:
    """A given matrix as an operator."""
    space = FlatSpace({"w": torch.zeros(len(matrix), dtype=matrix.dtype)})
    return HessianOperator(lambda v: matrix @ v, space, "matrix")


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    basis = torch.linalg.qr(normal(len(values), len(values), seed=seed)).Q
    matrix = basis @ values.diag() @ basis.T
    return 0.5 * (matrix + matrix.T)


def real() -> tuple[HessianOperator, Tensor]:
    """The Hessian of a small attention, and the dense oracle."""
    model, data = attention()
    loss, params = functional_loss(model, nn.functional.mse_loss), params_of(model)
    return euclidean_hessian(loss, params, data), dense_hessian(loss, params, data)


DECAYING = with_spectrum(torch.linspace(1, 5, 97, dtype=torch.float64).neg().exp2() * 50)


def test_the_algebra_is_that_of_matrices() -> None:
    model = mlp()
    loss, params = model_loss(model, "mse"), params_of(model)
    data = [(normal(7, 3), normal(7, 2))]
    a, b = euclidean_hessian(loss, params, data), ggn(loss, params, data)
    x, y = a.dense(), b.dense()
    v = normal(32, 5)
    for found, expected in (((a + b) @ v, (x + y) @ v), ((a - 2 * b) @ v, (x - 2 * y) @ v), ((-a / 4) @ v, -x / 4 @ v),
                            ((b * 3.0) @ v, 3 * y @ v), ((0.1 * a + b).dense() @ v, (0.1 * x + y) @ v)):
        assert error(found, expected) <= 1e-12
    assert a.shape == (32, 32) and a.dtype == torch.float64
    assert repr(a) == "HessianOperator(Hessian, 32 x 32, torch.float64)"
    with pytest.raises(ValueError, match="different spaces"):
        _ = a + operator_of(torch.eye(3))
    with pytest.raises(TypeError):
        _ = a @ 3


def test_to_scipy() -> None:
    operator, dense = real()
    linear = operator.to_scipy()
    x = np.random.default_rng(0).standard_normal((len(dense), 3))
    assert np.allclose(linear @ x, dense.numpy() @ x, atol=1e-12)
    assert np.allclose(linear @ x[:, 0], dense.numpy() @ x[:, 0], atol=1e-12)
    assert linear.dtype == np.float64 and linear.shape == operator.shape
    assert np.allclose(linear.T @ x, dense.numpy() @ x, atol=1e-12)


@pytest.mark.parametrize("method", ["krylov", "eigsh", "lobpcg"])
@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
def test_the_ends_of_the_spectrum(which: str, method: str) -> None:
    """Against the dense eigenvalues, 1e-6; ascending, with orthonormal eigenvectors as Params."""
    if method == "lobpcg" and which in ("LM", "BE"):
        with pytest.raises(ValueError, match="finds the ends 'LA' and 'SA'; got"):
            real()[0].eigvalsh(2, which, method=method)
        return
    operator, dense = real()
    values = torch.linalg.eigvalsh(dense)
    low = {"LA": 0, "SA": 3, "BE": 1, "LM": None}[which]
    if low is None:
        expected = values[values.abs().argsort(descending=True)[:3]].sort().values
    else:
        expected = torch.cat([values[:low], values[len(values) - (3 - low):]])
    pairs = operator.eigh(3, which, method=method)
    assert error(pairs.values, expected) <= 1e-6
    vectors = torch.stack([flat(v) for v in pairs.vectors], dim=1)
    assert error(vectors.T @ vectors, torch.eye(3, dtype=torch.float64)) <= 1e-8
    assert error(dense @ vectors, vectors * pairs.values) <= 1e-5
    assert torch.equal(operator.eigvalsh(3, which, method=method), pairs.values)  # the seed decides
    assert error(operator.eigvalsh(len(dense) - 2, which), operator_of(dense).eigvalsh(len(dense) - 2, which)) <= 1e-8


def test_all_eigenvalues() -> None:
    operator, dense = real()
    assert error(operator.eigvalsh(), torch.linalg.eigvalsh(dense)) <= 1e-10
    assert len(operator.eigh().vectors) == len(dense) == len(operator.eigvalsh(len(dense)))


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_traces_within_four_standard_errors(method: str) -> None:
    """Twenty seeds each on a decaying and on a real spectrum; the seed decides; and the error is not all there is."""
    for matrix, samples in ((DECAYING, 60), (real()[1], 30)):
        operator, exact = operator_of(matrix), float(matrix.trace())
        for seed in range(20):
            estimate = operator.trace(samples=samples, seed=seed, method=method)
            assert 0 < abs(estimate.value - exact) <= 4 * estimate.stderr and estimate.products == samples
            assert estimate == operator.trace(samples=samples, seed=seed, method=method)
    assert operator.trace(30, 1, method) != operator.trace(30, 2, method)
    assert operator.trace(60, 1, method) == operator.trace(60, 2, method) and operator.trace(60).products == 50
    assert operator.trace().value == pytest.approx(exact, rel=1e-12) and operator.trace().stderr == 0
    low = with_spectrum(torch.cat([torch.tensor([5.0, -3.0, 2.0]), torch.zeros(50)]).double())
    if method != "hutchinson":  # exact on low rank
        assert operator_of(low).trace(30, 0, method).value == pytest.approx(4, rel=1e-10)


def test_sketches_beat_hutchinson_on_decaying_spectra() -> None:
    matrix = with_spectrum(torch.arange(97, dtype=torch.float64).mul(-0.3).exp() * 100)
    exact = float(matrix.trace())
    gaps = {method: np.sqrt(np.mean([(operator_of(matrix).trace(48, seed, method).value - exact) ** 2
                                     for seed in range(20)])) for method in ("hutchinson", "hutch++", "xtrace")}
    assert gaps["xtrace"] < 0.1 * gaps["hutchinson"] and gaps["hutch++"] < 0.1 * gaps["hutchinson"]


def test_the_diagonal() -> None:
    operator, dense = real()
    exact = operator.diagonal()
    assert error(exact.value, dense.diagonal()) <= 1e-12 and not exact.stderr.any()
    for seed in range(20):
        estimate = operator.diagonal(samples=48, seed=seed)
        z = ((estimate.value - dense.diagonal()) / estimate.stderr)[estimate.stderr > 0]
        assert float(z.square().mean()) < 2 and float(z.abs().max()) < 6


def test_log_determinants() -> None:
    operator = operator_of(DECAYING)
    exact = float(torch.linalg.slogdet(DECAYING).logabsdet)
    assert operator.logdet().value == pytest.approx(exact, rel=1e-12)
    shifted = DECAYING + 0.5 * torch.eye(97, dtype=torch.float64)
    assert operator.logdet(0.5).value == pytest.approx(float(torch.logdet(shifted)), rel=1e-12)
    for seed in range(20):
        estimate = operator.logdet(samples=10, seed=seed, steps=40)
        assert abs(estimate.value - exact) <= 4 * estimate.stderr < 0.5 * abs(exact)
    assert estimate == operator.logdet(samples=10, seed=19, steps=40)
    assert operator_of(-DECAYING).logdet().value == pytest.approx(exact, rel=1e-12)
    assert operator_of(torch.zeros(3, 3, dtype=torch.float64)).logdet() == -torch.inf
    with pytest.raises(ValueError, match="damping must be >= 0; got -1"):
        operator.logdet(-1)


def test_lanczos_quadrature_is_exact_for_polynomials() -> None:
    """And an exhausted Krylov space ends it early, exactly; no spurious copies appear."""
    start = normal(97, 3)
    quadrature = lanczos(operator_of(DECAYING), start, 10)
    unit = start / start.norm(dim=0)
    power = unit
    for degree in range(1, 20):
        power = DECAYING @ power
        moments = (quadrature.weights * quadrature.nodes**degree).sum(-1)
        assert error(moments, (unit * power).sum(0)) <= 1e-10
    few = with_spectrum(torch.tensor([2.0, 2, 2, 2, -1, -1, 0], dtype=torch.float64))
    short = lanczos(operator_of(few), normal(7, 2), 7)
    assert (short.weights > 1e-12).sum(-1).tolist() == [3, 3]
    full = lanczos(operator_of(DECAYING), start[:, :1], 97)
    assert error(full.nodes[0], torch.linalg.eigvalsh(DECAYING)) <= 1e-10


def test_the_spectral_density_counts_eigenvalues() -> None:
    values = torch.cat([torch.full((30,), -1.0), torch.full((67,), 3.0)]).double()
    density = operator_of(with_spectrum(values)).spectral_density(samples=40, steps=10, width=0.1)
    step = float(density.grid[1] - density.grid[0])
    assert float(density.density.sum()) * step == pytest.approx(1, rel=1e-3)
    below = float(density.density[density.grid < 1].sum()) * step
    assert below == pytest.approx(30 / 97, abs=0.05)
    smooth = (-((density.grid[:, None] - values) / 0.1) ** 2 / 2).exp().mean(1) / (0.1 * (2 * torch.pi) ** 0.5)
    assert bool(((density.density - smooth).abs() <= 4 * density.stderr + 1e-6).all())


def test_compression_to_low_rank_plus_diagonal() -> None:
    """Exact where the matrix has the form, also indefinite and with the rank over-estimated; else a good fit."""
    factor, diagonal = normal(97, 5), normal(97, seed=1).exp()
    matrix = factor @ torch.tensor([3.0, 2, 1, -1, -2], dtype=torch.float64).diag() @ factor.T + diagonal.diag()
    for rank in (5, 8):
        fit = low_rank_plus_diagonal(operator_of(matrix), rank, sketch=40)
        assert fit.residual <= 1e-8 and fit.iterations <= 200
        assert error(fit.operator().dense(), matrix) <= 1e-8
    once = low_rank_plus_diagonal(operator_of(matrix), 5, sketch=40, iterations=1)
    assert once.residual > 1e-3 and not once.converged
    decaying = with_spectrum(torch.arange(97, dtype=torch.float64).mul(-0.1).exp())
    fits = [low_rank_plus_diagonal(operator_of(decaying), 15, sketch=40, iterations=n) for n in (1, 200)]
    assert fits[1].residual < fits[0].residual
    for matrix in (decaying, with_spectrum(torch.linspace(-1, 1, 97, dtype=torch.float64))):  # of another form
        fit = low_rank_plus_diagonal(operator_of(matrix), 3)
        missed = float((fit.operator().dense() - matrix).norm() / matrix.norm())
        assert not fit.converged and fit.residual == pytest.approx(missed, rel=0.3) and fit.products == 20 + 12
        assert fit.sketched < 0.9 * fit.residual  # the sketch fits itself better


def test_blocks_are_those_of_the_matrix() -> None:
    model = mlp()
    loss, params = model_loss(model, "mse"), params_of(model)
    operator = euclidean_hessian(loss, params, [(normal(7, 3), normal(7, 2))])
    dense, owner = operator.dense(), torch.cat([torch.full((p.numel(),), i) for i, p in enumerate(params.values())])
    for patterns, kept in ((("0.*",), (0, 1)), (("*.bias",), (1, 3)), (("2.weight", "0.bias"), (1, 2))):
        rows = torch.isin(owner, torch.tensor(kept)).nonzero()[:, 0]
        part = block(operator, *patterns)
        assert error(part.dense(), dense[rows][:, rows]) <= 1e-12
        names = [name for i, name in enumerate(params) if i in kept]
        u = {name: params[name] for name in names}
        assert list(part @ u) == names
    modules = module_blocks(operator)
    assert {name: op.shape[0] for name, op in modules.items()} == {"0": 20, "2": 12}
    assert sum(op.trace() for op in modules.values()) == pytest.approx(operator.trace().value, rel=1e-12)
    with pytest.raises(ValueError, match="no parameter is called '1.*'; there are 0.weight"):
        block(operator, "1.*")


BAD: dict[str, Callable[[HessianOperator], Any]] = {
    "k must be between 1 and the dimension, 97; got 98": lambda op: op.eigvalsh(98),
    "k must be between 1 and the dimension, 97; got 0": lambda op: op.eigh(0),
    "which must be one of LA, SA, LM, BE; got 'SM'": lambda op: op.eigvalsh(1, "SM"),
    "method must be one of krylov, eigsh, lobpcg; got 'qr'": lambda op: op.eigvalsh(1, method="qr"),
    "eigsh did not find 1 eigenvalues": lambda op: op.eigvalsh(1, "SA", method="eigsh", maxiter=1),
    "krylov did not find 3 eigenvalues: after 10 products": lambda op: op.eigvalsh(3, "SA", maxiter=2),
    "maxiter must be a positive integer; got 0": lambda op: op.eigvalsh(3, "SA", maxiter=0),
    "k must be between 1 and the dimension, 97; got nan": lambda op: op.eigvalsh(float("nan")),
    "k must be between 1 and the dimension, 97; got '2'": lambda op: op.eigvalsh("2"),
    "samples must be a positive integer; got 0": lambda op: op.logdet(samples=0),
    "tol must be a positive number; got 0": lambda op: op.trace(tol=0),
    "tol must be a positive number; got nan": lambda op: op.logdet(tol=float("nan"), samples=4),
    "threshold must be between 0 and 1; got 1": lambda op: op.near_zero(1),
    "@ needs real tensors; got torch.complex128": lambda op: op @ torch.ones(97, dtype=torch.complex128),
    "lobpcg did not find 3 eigenvalues": lambda op: op.eigvalsh(3, "SA", method="lobpcg", maxiter=2),
    "method must be one of hutchinson, hutch": lambda op: op.trace(5, method="exact"),
    "needs samples >= 7; got 5": lambda op: op.trace(5, method="hutch++"),
    "needed rank <= sketch <= 97; got rank 5 and sketch 3": lambda op: low_rank_plus_diagonal(op, 5, 3),
    "rank must be a positive integer; got 0": lambda op: low_rank_plus_diagonal(op, 0),
    "steps must be a positive integer; got 0": lambda op: op.logdet(samples=3, steps=0),
    "width must be positive; got -1": lambda op: op.spectral_density(width=-1),
    r"@ needs a tensor \(97,\) or \(97, k\), or Params; got \(2, 97\)": lambda op: op @ torch.ones(2, 97),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_clear_error(message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        BAD[message](operator_of(DECAYING))
    assert "\n" not in str(caught.value)


def test_params_and_flat_vectors_are_the_same_numbers() -> None:
    operator = operator_of(DECAYING)
    v = normal(97)
    assert torch.equal((operator @ {"w": v})["w"], operator @ v)
    assert torch.equal(flat(operator @ unflat(v, {"w": v})), operator @ v)
