"""Updates in place and passes over long vectors: every backend that can run here against NumPy in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_kernels import BACKENDS, DEVICE, TOLERANCE, error, normal, spread
from torch import Tensor

from symgeo import kernels
from symgeo.kernels import batched

HALF = (torch.float16, torch.bfloat16)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x.clone(),
    "transposed": lambda x: x.mT.contiguous().mT,
    "strided": spread,
    "batch in no order": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


def wide(x: Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()


def average_definition(t: Tensor, x: Tensor, beta: float, scale: float, center: bool) -> np.ndarray:
    rows = wide(x)
    rows = rows - rows.mean(-1, keepdims=True) if center else rows
    return beta * wide(t) + (1 - beta) * scale * np.einsum("...ik,...jk->...ij", rows, rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("center", [False, True])
def test_running_average_of_gram_matrices(center: bool, layout: str, backend: str | None) -> None:
    x = LAYOUTS[layout](normal(1, 2, 5, 41, seed=1))
    t = LAYOUTS[layout](kernels.gram(normal(1, 2, 5, 9)))
    before, wanted = x.clone(), average_definition(t, x, 0.9, 0.25, center)
    assert error(t, wanted) > 1e-2
    assert kernels.ema_gram(t, x, 0.9, 0.25, center, backend=backend) is t
    assert error(t, wanted) <= 1e-6 and torch.equal(t, t.mT) and torch.equal(x, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_applied_update(layout: str, backend: str | None) -> None:
    w, p, x = (LAYOUTS[layout](normal(1, 2, 5, n, seed=n + k)) for k, n in enumerate((7, 5, 7)))
    before, wanted = x.clone(), (1 - 0.5 * 0.1) * wide(w) - 0.5 * wide(p) @ wide(x)
    assert kernels.apply_update(w, p, x, lr=0.5, decay=0.1, backend=backend) is w
    assert error(w, wanted) <= 1e-6 and torch.equal(x, before)
    assert error(w, wanted + 0.5 * wide(p) @ wide(x) - 0.5 * np.swapaxes(wide(p), -1, -2) @ wide(x)) > 1e-1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, *HALF])
def test_updates_of_other_types(dtype: torch.dtype, backend: str | None) -> None:
    x, kept = normal(3, 17, dtype=dtype), torch.float64 if dtype == torch.float64 else torch.float32
    t = kernels.gram(normal(3, 4, dtype=kept))
    wanted = average_definition(t, x, 0.7, 1.0, False)
    assert error(kernels.ema_gram(t, x, 0.7, backend=backend), wanted) <= TOLERANCE[kept]
    w, p = normal(3, 17, seed=1, dtype=dtype), normal(3, 3, seed=2, dtype=dtype)
    wanted = wide(w) - 0.3 * wide(p) @ wide(x)
    assert kernels.apply_update(w, p, x, 0.3, backend=backend).dtype == dtype
    assert error(w, wanted) <= TOLERANCE[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
def test_updates_of_nothing_and_of_what_they_are_made_of(backend: str | None) -> None:
    t = torch.eye(3, device=DEVICE)
    assert torch.equal(kernels.ema_gram(t, t[:, :0], 0.5, backend=backend), 0.5 * torch.eye(3, device=DEVICE))
    none = torch.empty(0, 3, 3, device=DEVICE)
    assert kernels.ema_gram(none, none, 0.5, backend=backend) is none
    assert kernels.apply_update(none, none, none, 0.5, backend=backend) is none
    w, p = normal(5, 5), normal(5, 5, seed=1)
    wanted = wide(w) - 0.5 * wide(p) @ wide(w)
    assert error(kernels.apply_update(w, p, w, 0.5, backend=backend), wanted) <= 1e-6
    t = kernels.gram(normal(5, 9))
    wanted = average_definition(t, t, 0.5, 1.0, False)
    assert error(kernels.ema_gram(t, t, 0.5, backend=backend), wanted) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [0, 1, 2051])
def test_inner_products_of_all_pairs(n: int, backend: str | None) -> None:
    for k in (1, 2, 3, 4):
        vectors = [normal(n, seed=i) for i in range(k)]
        vectors[-1] = normal(2 * n, seed=k)[::2]
        found = kernels.inner_products(vectors, backend=backend)
        assert found.dtype == torch.float64 and found.shape == (k, k) and torch.equal(found, found.mT)
        rows = np.stack([wide(u) for u in vectors])
        assert error(found, rows @ rows.T) <= 1e-6
        assert torch.equal(found, kernels.inner_products(vectors, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_inner_products_of_long_vectors_lose_no_digits(backend: str | None) -> None:
    x = torch.full((50_021,), 0.1, device=DEVICE)
    wanted = len(x) * float(x[0]) ** 2
    assert abs(float(kernels.inner_products([x], backend=backend)) / wanted - 1) <= 1e-6
    assert abs(np.cumsum((x * x).cpu().numpy())[-1] / wanted - 1) > 1e-5  # one float32 for the sum


@pytest.mark.parametrize("method", ["product", "sum"])
def test_both_methods_of_batched_inner_products(method: str) -> None:
    rows = normal(3, 70_001)
    assert error(batched.inner_products(list(rows), method), wide(rows) @ wide(rows).T) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_combination_of_vectors(backend: str | None) -> None:
    for k in (1, 2, 3, 4):
        vectors, c = [normal(257, seed=i) for i in range(k)], normal(2 * k, seed=9, dtype=torch.float64)[::2]
        vectors[-1] = normal(514, seed=k)[::2]
        before = [u.clone() for u in vectors]
        found = kernels.combination(vectors, c, backend=backend)
        assert found.dtype == torch.float32
        wanted = sum(float(a) * wide(u) for a, u in zip(c, vectors))
        assert error(found, wanted) <= 1e-6
        assert k == 1 or error(found, sum(float(a) * wide(u) for a, u in zip(c.flip(0), vectors))) > 1e-2
        assert all(torch.equal(u, v) for u, v in zip(vectors, before))
    assert kernels.combination([u[:0] for u in vectors], c, backend=backend).shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, *HALF])
def test_vectors_of_other_types(dtype: torch.dtype, backend: str | None) -> None:
    u, v, c = normal(129, dtype=dtype), normal(129, seed=1, dtype=dtype), torch.tensor([0.5, -3.0], device=DEVICE)
    rows = np.stack([wide(u), wide(v)])
    tolerance = TOLERANCE[torch.float64 if dtype == torch.float64 else torch.float32]
    assert error(kernels.inner_products([u, v], backend=backend), rows @ rows.T) <= tolerance
    found = kernels.combination([u, v], c, backend=backend)
    assert found.dtype == dtype and error(found, 0.5 * rows[0] - 3.0 * rows[1]) <= TOLERANCE[dtype]
    mixed = kernels.combination([u, v.float()], c, backend=backend)
    assert mixed.dtype == torch.promote_types(dtype, torch.float32)
    found = kernels.exponential_map(u, v.float(), backend=backend)
    assert found.dtype == dtype and error(found, rows[0] * np.exp(wide(v.float()))) <= TOLERANCE[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_elementwise_exponential_map(backend: str | None) -> None:
    w, z = normal(3, 43), normal(3, 43, seed=1)
    wanted = wide(w) * np.exp(wide(z))
    for a, b in ((w, z), (w.mT.contiguous().mT, z), (spread(w), spread(z))):
        assert error(kernels.exponential_map(a, b, backend=backend), wanted) <= 1e-6
        into = spread(torch.empty_like(w))
        assert kernels.exponential_map(a, b, out=into, backend=backend) is into
        assert error(into, wanted) <= 1e-6
    for place in (0, 1):
        pair = [w.clone(), z.clone()]
        assert kernels.exponential_map(*pair, out=pair[place], backend=backend) is pair[place]
        assert error(pair[place], wanted) <= 1e-6 and torch.equal(pair[1 - place], (w, z)[1 - place])
    shifted = torch.cat([z.flatten(), z.new_zeros(1)])
    found = kernels.exponential_map(w.flatten(), shifted[:-1], out=shifted[1:], backend=backend)
    assert error(found, wanted.reshape(-1)) <= 1e-6
    assert kernels.exponential_map(w[:0], z[:0], backend=backend).shape == (0, 43)


def test_the_geodesics_of_the_elementwise_metric() -> None:
    from manifolds import Elementwise

    w, u = normal(31, dtype=torch.float64), normal(31, seed=1, dtype=torch.float64)
    assert error(kernels.exponential_map(w, u / w), Elementwise().expmap(w, u)) <= 1e-14


def test_passes_wait_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(x: Tensor) -> None:
        raise AssertionError("a number was read from the device")

    x, t = torch.ones(70_001), torch.eye(3)
    for name in ("item", "tolist", "__float__", "__int__", "__bool__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, read)
    kernels.combination([x, x], kernels.inner_products([x, x]).diagonal())
    kernels.exponential_map(x, x)
    kernels.ema_gram(t, kernels.apply_update(torch.ones(3, 5), t, torch.ones(3, 5), 0.1), 0.5)
    with pytest.raises(AssertionError, match="was read"):
        float(kernels.inner_products([x])[0, 0])


def test_vectors_have_derivatives() -> None:
    u, v, c = (normal(n, seed=n, dtype=torch.float64).requires_grad_() for n in (7, 7, 2))
    assert torch.autograd.gradcheck(lambda *x: kernels.inner_products(x), (u, v))
    assert torch.autograd.gradcheck(lambda a, b, k: kernels.combination([a, b], k), (u, v, c))
    assert torch.autograd.gradcheck(kernels.exponential_map, (u, v))


def test_misfits_are_refused() -> None:
    w, u, half = torch.ones(2, 3), torch.ones(5), torch.eye(2).half()
    for call, message in (
        (lambda: kernels.ema_gram(torch.eye(3), w, 0.9), r"t: x .* needs t of shape \(2, 2\), .* found \(3, 3\)"),
        (lambda: kernels.ema_gram(torch.ones(4), w, 0.9), r"t: x .* or upper triangles \(3,\), found \(4,\)"),
        (lambda: kernels.ema_gram(half, w, 0.9), "t: an average of Gram matrices needs float32 or float64, found"),
        (lambda: kernels.ema_gram(torch.ones(1, 1).expand(2, 2), w, 0.9), "t: needed one place in memory for each"),
        (lambda: kernels.apply_update(w, torch.eye(3), w, 0.1), r"p, x: .* needs p of shape \(2, 2\)"),
        (lambda: kernels.apply_update(w, torch.eye(2, dtype=torch.int64), w, 0.1), "p: needed a real floating tensor"),
        (lambda: kernels.apply_update(w[:1].expand(2, 3), torch.eye(2), w, 0.1), "w: needed one place in memory"),
        (lambda: kernels.inner_products([]), "vectors: needed 1 to 4 vectors, found 0"),
        (lambda: kernels.inner_products([u] * 5), "vectors: needed 1 to 4 vectors, found 5"),
        (lambda: kernels.inner_products([u, w]), r"vectors: needed real floating tensors \(n,\), found .* \(2, 3\)"),
        (lambda: kernels.inner_products([u, u[:3]]), "vectors: needed one length and one device, found 5 on cpu, 3"),
        (lambda: batched.inner_products([u], "dot"), "method: needed 'product', 'sum' or None, found 'dot'"),
        (lambda: kernels.combination([u], u), r"coefficients: needed a floating tensor \(1,\)"),
        (lambda: kernels.combination([u], torch.ones(1, device="meta")), "coefficients: needed on cpu .* found meta"),
        (lambda: kernels.exponential_map(u, w), r"z: needed shape \(5,\) on cpu, as w has, found \(2, 3\)"),
        (lambda: kernels.exponential_map(u, u, out=w), r"out: needed shape \(5,\) on cpu"),
        (lambda: kernels.exponential_map(u, u.long()), "z: needed a real floating tensor, found torch.int64"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_products_of_half_precision_go_to_triton_when_large(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, int]] = []
    monkeypatch.setattr(kernels, "choose", lambda worthwhile, *x: (asked.append((worthwhile, len(x))), "batched")[1])
    large, small = normal(128, 130).bfloat16(), normal(127, 130).bfloat16()
    for x in (large, small, large.float()):
        kernels.gram(x)
        kernels.ema_gram(torch.zeros(len(x), len(x), device=DEVICE), x, 0.5)
        kernels.apply_update(x.clone(), normal(len(x), len(x)).to(x.dtype), x, 0.5)
    kernels.apply_update(large.clone(), normal(128, 128), large, 0.5)
    assert asked == [(True, 1), (True, 2), (True, 3), *[(False, 1), (False, 2), (False, 3)] * 2, (False, 3)]


def test_the_benchmark_measures_what_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import kernels as benchmark

    sizes, device = benchmark.Sizes(2**13, (16,), (4,), 2), torch.device("cpu")
    cases = [
        *benchmark.bandwidth(sizes, torch.float32, device), *benchmark.products(sizes, torch.bfloat16, device),
        *benchmark.spectra(sizes, device),
    ]  # fmt: skip
    rows = [benchmark.measure(case, benchmark.Clock(device), rounds=1) for case in cases]
    assert len(rows) == 10 and all(row["right"] for row in rows)
    assert all(set(row["bars"]) <= set(row["ratio"]) and min(row["ratio"].values()) > 0 for row in rows)
