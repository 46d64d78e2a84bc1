"""One set of laws for every backend that can run here; the oracles are loops and NumPy in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from symgeo import kernels
from symgeo.kernels import batched
from symgeo.kernels.polynomials import schedule

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [None, *(name for name in ("reference", "batched", "triton") if kernels.available(name))]
# "newton" is the method of the batched backend that a GPU runs; on a CPU "batched" is the reference for these two
NEWTON = ("power", "polar")
ROOTS = [*BACKENDS, "newton"]
CASES = [(name, backend) for name in kernels.names() for backend in (ROOTS if name in NEWTON else BACKENDS)]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6, torch.float16: 2e-2, torch.bfloat16: 2e-2}
POWERS = (-1.0, -0.5, -0.25, 0.25, 0.5)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def semidefinite(n: int, cond: float, batch: tuple[int, ...] = (), seed: int = 0) -> Tensor:
    """Eigenvalues from 1 down to ``1 / cond`` in a random frame, float64."""
    frame = torch.linalg.qr(normal(*batch, n, n, seed=seed, dtype=torch.float64)).Q
    return (frame * torch.logspace(0, -math.log10(cond), n, dtype=torch.float64, device=DEVICE)) @ frame.mT


def error(found: Tensor, wanted: Tensor | np.ndarray) -> float:
    wide = torch.as_tensor(wanted, dtype=torch.float64)
    return float((found.double().cpu() - wide.cpu()).norm() / wide.norm().clamp_min(1e-300))


def each(definition: Callable[[np.ndarray], np.ndarray], x: Tensor) -> Tensor:
    """A definition for one matrix, applied to every matrix of a batch."""
    wide = x.detach().double().cpu().numpy()
    results = [definition(matrix) for matrix in wide.reshape(-1, *wide.shape[-2:])]
    return torch.as_tensor(np.stack(results).reshape(*wide.shape[:-2], *results[0].shape))


def gram_definition(x: np.ndarray) -> np.ndarray:
    rows = [row - row.mean() for row in x]
    return np.array([[float((u * v).sum()) for v in rows] for u in rows])


def power_definition(p: float, damping: float, zero: float = 1e-6) -> Callable[[np.ndarray], np.ndarray]:
    def definition(t: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(t)
        damped = values + damping * values.max()
        terms = [v**p * np.outer(u, u) for v, u in zip(damped, vectors.T) if v > zero * values.max()]
        return sum(terms, np.zeros_like(t))

    return definition


def polar_definition(x: np.ndarray) -> np.ndarray:
    u, s, vh = np.linalg.svd(x, full_matrices=False)
    return sum((np.outer(u[:, k], vh[k]) for k in range(len(s)) if s[k] > 1e-6 * s[0]), np.zeros_like(x))


def pair_sums_definition(y: np.ndarray) -> np.ndarray:
    indices = ("ii->", "ij->", "ij,ij->", "ij,ji->", "ii,ii->", "ij,ik->", "ji,ki->", "ij,ki->", "ii,ij->", "ii,ji->")
    return np.array([np.einsum(spec, *[y] * (1 + spec.count(","))) for spec in indices])


def affine_definition(y: np.ndarray, b: float = 3.0, c: float = -5.0) -> np.ndarray:
    m, n = y.shape
    return np.array([[
        2 * y[i, j] + b * y[i].sum() / n + c * y[:, j].sum() / m + 7 * y.sum() / (m * n) for j in range(n)
    ] for i in range(m)])  # fmt: skip


# name -> arguments after the matrices, definition, whether the matrices are square, semidefinite
LAWS = {
    "gram": ((True,), gram_definition, (5, 19)),
    "power": ((-0.5, 0.1), power_definition(-0.5, 0.1), None),
    "polar": ((), polar_definition, (7, 3)),
    "pair_sums": ((), pair_sums_definition, (37, 37)),
    "affine": ((2.0, 3.0, -5.0, 7.0), affine_definition, (37, 5)),
}


def spread(x: Tensor) -> Tensor:
    """The same matrices, every third row and second column of larger ones."""
    *batch, m, n = x.shape
    wide = torch.full((*batch, 3 * m, 2 * n), math.nan, dtype=x.dtype, device=x.device)
    wide[..., ::3, ::2] = x
    return wide[..., ::3, ::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "one": lambda x: x[0, 0],
    "batch": lambda x: x,
    "batch of one": lambda x: x[:1, 0],
    "transposed": lambda x: x.mT.contiguous().mT,
    "batch last": lambda x: x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
    "strided": spread,
    "broadcast": lambda x: x[:1, :1].expand(2, 2, *x.shape[-2:]),
}
# the interpreter is slow, and all programs find their matrices in the same way
INTERPRETED = {"power": ("batch last",), "polar": ("strided",), "pair_sums": ("transposed", "strided", "broadcast")}
AGREEMENT = [
    (name, layout, backend) for name, backend in CASES for layout in LAYOUTS
    if backend != "triton" or layout in INTERPRETED.get(name, LAYOUTS)
]  # fmt: skip


def matrices(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = LAWS[name][2]
    return semidefinite(7, 30.0, batch=(2, 2)).to(dtype) if shape is None else normal(2, 2, *shape, dtype=dtype)


def kernel(name: str, backend: str | None) -> Callable[..., Tensor]:
    return partial(getattr(batched, name), method="newton") if backend == "newton" else kernels.get(name, backend)


def run(name: str, backend: str | None, x: Tensor) -> Tensor:
    return kernel(name, backend)(x, *LAWS[name][0])


@pytest.mark.parametrize(("name", "layout", "backend"), AGREEMENT)
def test_agrees_with_the_definition_for_any_strides(name: str, layout: str, backend: str | None) -> None:
    x = LAYOUTS[layout](matrices(name))
    before, strides = x.clone(), x.stride()
    found = run(name, backend, x)
    assert torch.equal(x, before) and x.stride() == strides
    assert found.dtype == x.dtype and found.device == x.device
    wanted = each(LAWS[name][1], x)
    assert tuple(found.shape) == wanted.shape
    assert error(found, wanted) <= TOLERANCE[x.dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "backend"), CASES)
def test_keeps_the_dtype(name: str, dtype: torch.dtype, backend: str | None) -> None:
    x = matrices(name, dtype)[0, :1]
    found = run(name, backend, x)
    assert found.dtype == dtype
    assert error(found, each(LAWS[name][1], x)) <= TOLERANCE[dtype]


def drawn(name: str, batch: tuple[int, ...], m: int, n: int, seed: int) -> Tensor:
    """Matrices for a law; for polar factors with singular values from 1 to 3, for powers semidefinite."""
    x = normal(*batch, m, m if LAWS[name][2] is None or name == "pair_sums" else n, seed=seed, dtype=torch.float64)
    if name == "polar" and x.numel():
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        x = (u * torch.linspace(1, 3, s.shape[-1], dtype=x.dtype, device=DEVICE)) @ vh
    return (x @ x.mT / m if name == "power" else x).float()


@pytest.mark.parametrize(("name", "backend"), CASES)
@settings(derandomize=True, database=None, deadline=None, max_examples=4 if kernels.available("triton") else 10)
@given(
    batch=st.sampled_from([(2, 3), (), (1,), (3, 1), (2, 0)]), m=st.integers(1, 71), n=st.integers(1, 71),
    layout=st.sampled_from(["strided", "transposed", "batch last", "expanded"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_agrees_on_drawn_shapes(
    name: str, backend: str | None, batch: tuple[int, ...], m: int, n: int, layout: str, seed: int
) -> None:
    """The same shapes in every run, those that hypothesis draws from the name of the test."""
    if name in NEWTON:
        m, n = min(m, 13), min(n, 13)
    x = drawn(name, batch, m, n, seed)
    if layout == "expanded":
        x = x.expand(2, *x.shape)
    elif layout == "batch last":
        x = x.movedim((-2, -1), (0, 1)).contiguous().movedim((0, 1), (-2, -1))
    else:
        x = LAYOUTS[layout](x)
    found = run(name, backend, x)
    assert error(found, kernels.get(name, "reference")(x.double(), *LAWS[name][0])) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("f", "n"), [(3, 2053), (89, 2)])
def test_gram_of_skinny_and_wide_matrices(f: int, n: int, backend: str | None) -> None:
    x = normal(f, n)
    for center in (False, True):
        found = kernels.gram(x, center, backend=backend)
        wanted = each(gram_definition, x) if center else each(lambda z: z @ z.T, x)
        assert error(found, wanted) <= 1e-6 and torch.equal(found, found.mT)


def test_a_wrong_definition_is_far_off() -> None:
    y = matrices("affine")
    assert error(run("affine", None, y), each(lambda z: affine_definition(z, b=-5.0, c=3.0), y)) > 1e-1
    assert error(run("gram", None, matrices("gram") + 1), each(lambda z: z @ z.T, matrices("gram") + 1)) > 1e-1
    assert error(run("pair_sums", None, y := matrices("pair_sums")), each(pair_sums_definition, y.mT)) > 1e-3


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_takes_empty_batches(name: str, backend: str | None) -> None:
    x = matrices(name)
    assert run(name, backend, x[:, :0]).shape == (2, 0, *run(name, backend, x[0, 0]).shape)


@pytest.mark.parametrize("backend", ROOTS)
def test_takes_matrices_without_entries(backend: str | None) -> None:
    tall, square = torch.empty(2, 5, 0, device=DEVICE), torch.empty(2, 0, 0, device=DEVICE)
    assert run("power", backend, square).shape == (2, 0, 0)
    assert run("polar", backend, tall).shape == (2, 5, 0)
    if backend == "newton":
        return
    assert torch.equal(run("gram", backend, tall), torch.zeros(2, 5, 5, device=DEVICE))
    assert run("gram", backend, tall.mT).shape == (2, 0, 0)
    assert run("affine", backend, tall).shape == (2, 5, 0)
    assert torch.equal(run("pair_sums", backend, square), torch.zeros(2, 10, device=DEVICE))


@pytest.mark.parametrize("backend", ROOTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_symmetric_results_are_symmetric_to_the_last_bit(backend: str | None, dtype: torch.dtype) -> None:
    for f in () if backend == "newton" else (3, 67, 391):  # the last one in three slabs
        x = normal(f, 31 if f < 100 else 3, dtype=dtype)
        if backend != "triton" or f < 100:
            t = kernels.gram(x, backend=backend)
            assert torch.equal(t, t.mT) and error(t, each(lambda z: z @ z.T, x)) <= TOLERANCE[dtype]
    root = kernel("power", backend)(semidefinite(11, 10.0).to(dtype), -0.5, 1e-3)
    assert torch.equal(root, root.mT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_centring_loses_no_digits_to_a_large_mean(backend: str | None) -> None:
    x = normal(3, 211, seed=1) + 1e3
    wanted = each(gram_definition, x)
    assert error(kernels.get("gram", backend)(x, True), wanted) <= 1e-5
    mean = x.mean(-1, keepdim=True)
    assert error(x @ x.mT - x.shape[-1] * mean @ mean.mT, wanted) > 1e-3  # the one-pass formula does


@pytest.mark.parametrize("backend", ROOTS)
def test_the_polar_factor_does_not_depend_on_the_scale(backend: str | None) -> None:
    x = normal(5, 3)
    polar = kernel("polar", backend)
    for scale in (1e-12, 1e-30, 1e12):
        assert error(polar(scale * x), each(polar_definition, x)) <= 1e-6


def test_with_an_absolute_epsilon_it_does() -> None:
    def five_steps(x: Tensor) -> Tensor:
        y = x / (x.norm() + 1e-7)
        for _ in range(5):
            y = 3.4445 * y - 4.775 * y @ y.mT @ y + 2.0315 * y @ y.mT @ y @ y.mT @ y
        return y

    assert error(five_steps(1e-12 * normal(5, 3)), five_steps(normal(5, 3))) > 1e-1


@pytest.mark.parametrize("backend", ROOTS)
def test_the_polar_factor_of_a_deficient_matrix_is_a_partial_isometry(backend: str | None) -> None:
    polar = kernel("polar", backend)
    x = normal(7, 2) @ normal(2, 5, seed=1)
    found = polar(x)
    assert error(found, each(polar_definition, x)) <= 2e-6
    assert error(torch.linalg.svdvals(found.double()), torch.tensor([1.0, 1, 0, 0, 0])) <= 1e-6
    assert not polar(torch.zeros(3, 5, device=DEVICE)).any()


@pytest.mark.parametrize("method", ["svd", "newton"])
@pytest.mark.parametrize("shape", [(13, 13), (41, 17), (17, 41)])
def test_the_polar_factor_of_ill_conditioned_matrices(shape: tuple[int, int], method: str) -> None:
    k = min(shape)
    u, v = (torch.linalg.qr(normal(size, k, seed=seed, dtype=torch.float64)).Q for seed, size in enumerate(shape))
    for dtype, cond, tolerance in ((torch.float64, 1e6, 1e-9), (torch.float32, 1e3, 1e-5), (torch.float32, 1e0, 5e-6)):
        x = ((u * torch.logspace(0, -math.log10(cond), k, dtype=torch.float64, device=DEVICE)) @ v.mT).to(dtype)
        found = batched.polar(x, method=method)
        assert error(found, each(polar_definition, x)) <= tolerance
        tall = found if shape[0] >= shape[1] else found.mT
        assert error(tall.mT.double() @ tall.double(), np.eye(k)) <= (1e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("backend", ROOTS)
@pytest.mark.parametrize("p", POWERS)
def test_powers(p: float, backend: str | None) -> None:
    power = kernel("power", backend)
    for damping in (1e-3,) if backend == "triton" and p != -0.5 else (0.0, 1e-3):
        t = semidefinite(7, 1e2, seed=3).float()
        assert error(power(t, p, damping), each(power_definition(p, damping), t)) <= 1e-5


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("n", [2, 23, 71])
def test_products_give_the_powers_that_eigenvectors_give(n: int, p: float) -> None:
    for damping, cond in ((1e-4, 1e9), (0.0, 1e4), (0.3, 1.0)):
        t = semidefinite(n, cond, seed=n)
        assert error(batched.power(t, p, damping, method="newton"), batched.power(t, p, damping, method="eigh")) <= 1e-7


@pytest.mark.parametrize("backend", ROOTS)
def test_a_negative_power_of_a_singular_matrix_is_a_pseudo_inverse(backend: str | None) -> None:
    power = kernel("power", backend)
    x = normal(7, 3)
    t = x @ x.mT
    assert float(torch.linalg.eigvalsh(t.double()).amin()) != 0.0  # rounding, of either sign
    for p in (-1.0, -0.5) if backend != "triton" else (-1.0,):
        assert error(power(t, p), each(power_definition(p, 0.0), t)) <= 1e-5
    assert not power(torch.zeros(3, 3, device=DEVICE), -0.5, 1e-2).any()
    scales = torch.tensor([1e-20, 1e20], device=DEVICE)[:, None, None]
    assert error(power(scales * t, -0.5, 1e-2) * scales.sqrt(), power(t, -0.5, 1e-2).expand(2, 7, 7)) <= 1e-5


def test_products_never_hide_entries_that_are_not_finite() -> None:
    for bad in (math.nan, math.inf):
        t = torch.eye(3, device=DEVICE)
        t[0, 0] = bad
        for found in (batched.power(t, -0.5, 0.1, method="newton"), batched.polar(t, method="newton")):
            assert not torch.isfinite(found).any()


def test_eigenvectors_give_any_power() -> None:
    t = semidefinite(5, 10.0)
    assert error(kernels.power(t, 1.0), t) <= 1e-14
    assert error(kernels.power(t, 3.0), t @ t @ t) <= 1e-13
    assert error(kernels.power(t, 0.0), torch.eye(5)) <= 1e-14


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_matrix_may_have_its_own_coefficients(backend: str | None) -> None:
    y, a = normal(2, 3, 5, 7), normal(3, seed=1, dtype=torch.float64)
    found = kernels.get("affine", backend)(y, a, 3.0, torch.tensor(-5.0, device=DEVICE), 7.0)
    wanted = each(affine_definition, y) + (a.cpu()[:, None, None] - 2) * y.cpu().double()
    assert error(found, wanted) <= 1e-6


def test_the_default_backend_has_derivatives() -> None:
    x = normal(3, 5, dtype=torch.float64).requires_grad_()
    for function in (lambda y: kernels.gram(y, True), kernels.polar, lambda y: kernels.affine(y, 1.0, 2.0, 3.0, 4.0)):
        assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradcheck(lambda y: kernels.pair_sums(y[:, :3]), x)
    assert torch.autograd.gradcheck(lambda y: kernels.power(y @ y.mT, -0.5, 0.1), x)


@pytest.mark.parametrize("lower", [1.0, 0.3, 1e-2, 1e-4, 1e-7, 1e-11])
def test_schedules_take_the_interval_to_one_and_cut_what_is_below(lower: float) -> None:
    for cut in (False, True):
        x = torch.logspace(math.log10(lower), 0, 1009, dtype=torch.float64) * (1 + 1e-4)
        small = torch.linspace(-0.2, 0.2, 11, dtype=torch.float64) * lower
        for a, b, c in schedule(lower, cut):
            x, small = (y * (a + b * y**2 + c * y**4) for y in (x, small))
        assert float((x - 1).abs().max()) <= 1e-14
        assert float(small.abs().max()) <= 1e-6 or not cut or lower > 0.1
    with pytest.raises(ValueError, match="lower: needed 0 < lower <= 1, found 0"):
        schedule(0.0)


@pytest.mark.parametrize("n", [1, 13, 97])
def test_bounds_of_the_spectrum(n: int) -> None:
    t = semidefinite(n, 1.01, batch=(3,), seed=n)  # close eigenvalues are the hard case
    ratio = batched.largest_eigenvalue(t).flatten() / torch.linalg.eigvalsh(t)[:, -1]
    assert bool(((ratio <= 1 + 1e-12) & (ratio >= 1 - math.log(n) / 2**16 - 1e-12)).all())
    x = normal(3, n + 4, n, seed=n, dtype=torch.float64)
    ratio = batched.largest_singular_bound(x).flatten() / torch.linalg.svdvals(x)[:, 0]
    assert bool(((ratio >= 1 - 1e-12) & (ratio <= n ** (1 / 2**7) + 1e-12)).all())
