"""Which backend runs, what none of them accepts, and what follows a tensor through them: derivatives and batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_kernels import BACKENDS, DEVICE, each, error, gram_definition, normal, run
from torch import Tensor, nn
from torch.autograd import forward_ad

from symgeo import Symmetry, kernels
from symgeo.groups import Cyclic
from symgeo.kernels import batched, dispatch
from symgeo.kernels.inputs import tracked
from symgeo.optim import SymO, presets

INTERPRETER = pytest.mark.skipif(
    not kernels.available("triton") or torch.cuda.is_available(), reason="runs in the interpreter's process"
)


def test_automatic_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.choose(True, torch.eye(2)) == "batched"
    monkeypatch.setattr(dispatch, "available", lambda backend: True)
    monkeypatch.setattr(dispatch, "tracked", lambda *tensors: any(x.requires_grad for x in tensors))
    on_gpu = {"is_cuda": True, "device": "cuda:0", "dtype": torch.bfloat16, "requires_grad": False}
    first, double = SimpleNamespace(**on_gpu), SimpleNamespace(**on_gpu | {"dtype": torch.float64})
    assert kernels.choose(True, first) == "triton"
    assert kernels.choose(False, first) == "batched"
    assert kernels.choose(True, double, double=True) == "triton"  # what is computed in double precision anyway
    for change in ({"dtype": torch.float64}, {"requires_grad": True}, {"is_cuda": False}, {"device": "cuda:1"}):
        other = SimpleNamespace(**{**on_gpu, **change})
        assert kernels.choose(True, first, other) == "batched"


def on_a_gpu(worthwhile: bool, *tensors: Tensor, double: bool = False) -> str:
    """The rule of `choose` where there is a GPU."""
    fits = all(double or x.dtype != torch.float64 for x in tensors)
    return "triton" if worthwhile and fits and not tracked(*tensors) else "batched"


def test_roots_and_polar_factors_go_to_triton_where_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(kernels, "choose", on_a_gpu)
    monkeypatch.setattr(kernels, "get", lambda name, backend: lambda *x, **options: (asked.append(backend), x[0])[1])
    t = torch.eye(64, dtype=torch.float64)
    for wanted, call in (
        ("triton", lambda: kernels.power(t, -0.5, 1e-4)),
        ("triton", lambda: kernels.power(t, -0.5, least=1e-4)),
        ("triton", lambda: kernels.power(t, -0.5, method="newton")),
        ("triton", lambda: kernels.power(t.float(), -0.5)),
        ("batched", lambda: kernels.power(t, -0.5)),  # eigenvalues below 1e-8 count
        ("batched", lambda: kernels.power(t, -0.5, 1e-4, method="eigh")),
        ("batched", lambda: kernels.power(t, -0.75, 1e-4)),
        ("batched", lambda: kernels.power(torch.eye(65), -0.5, 1e-4)),
        ("triton", lambda: kernels.polar(t)),
        ("triton", lambda: kernels.polar(t, method="newton")),
        ("batched", lambda: kernels.polar(t, method="svd")),
        ("batched", lambda: kernels.polar(torch.ones(2, 65))),
        ("batched", lambda: kernels.affine(t.float(), 1.0, 1.0, torch.ones((), requires_grad=True), 1.0)),
        ("batched", lambda: kernels.combination([t[0].float()], torch.ones(1, requires_grad=True))),
    ):
        call()
        assert asked.pop() == wanted


PRESETS = {
    "muon": lambda net: (presets.muon(net), {"betas": (0.9, 0.0), "damping": 0.0}),
    "shampoo": lambda net: (presets.shampoo(net), {"damping": 1e-4}),
    "cyclic": lambda net: (
        Symmetry({"0.weight": "h _", "2.weight": "_ h"}, {"h": Cyclic()}), {"damping": 1e-4, "power": 0.5}
    ),  # of complex matrices, which become real ones of twice the size
}


def follow(name: str) -> tuple[dict[str, Tensor], SymO]:
    net = nn.Sequential(nn.Linear(5, 3, bias=False), nn.Tanh(), nn.Linear(3, 4, bias=False))
    generator = torch.Generator().manual_seed(1)
    symmetry, options = PRESETS[name](net)
    for p in net.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator))
    optimizer = SymO(net.named_parameters(), symmetry, lr=0.1, roots="newton", **options)
    for _ in range(2):
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return {name: p.detach() for name, p in net.named_parameters()}, optimizer


@pytest.mark.parametrize("name", PRESETS)
def test_a_step_asks_for_the_backend_that_a_gpu_has(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every root and every Gram matrix of a step is asked for by name; small roots go to Triton."""
    wanted, _ = follow(name)
    asked: dict[str, set[str]] = {}

    def get(name: str, backend: str) -> Callable[..., Tensor]:
        asked.setdefault(name, set()).add(backend)
        newton = {"method": "newton"} if backend == "triton" else {}
        return lambda *x, **options: getattr(batched, name)(*x, **{**options, **newton})

    monkeypatch.setattr(kernels, "choose", on_a_gpu)
    monkeypatch.setattr(kernels, "get", get)
    found, _ = follow(name)
    root = "polar" if name == "muon" else "power"
    assert asked[root] == {"triton"} and asked.get("ema_gram", {"batched"}) == {"batched"}
    assert ("ema_gram" in asked) == (name == "shampoo")
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@INTERPRETER
@pytest.mark.parametrize("name", ["muon", "shampoo"])
def test_steps_with_triton(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, _ = follow(name)
    monkeypatch.setattr(kernels, "choose", on_a_gpu)
    found, _ = follow(name)
    gaps = [error(found[key], wanted[key]) for key in wanted]
    assert max(gaps) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [3, 67, 131])
def test_packed_products_and_averages(size: int, backend: str | None) -> None:
    if backend == "triton" and size > 100:
        return
    x = normal(2, size, 3).mT.contiguous().mT
    rows, columns = torch.triu_indices(size, size)
    wanted = each(gram_definition, x)[..., rows, columns]
    found = kernels.gram(x, True, packed=True, backend=backend)
    assert found.shape == wanted.shape and error(found, wanted) <= 1e-6
    t = kernels.gram(normal(2, size, 4, seed=1), packed=True, backend="reference")
    wanted = 0.75 * t.double().cpu() + 0.25 * 0.5 * wanted
    assert kernels.ema_gram(t, x, 0.75, 0.5, center=True, backend=backend) is t
    assert error(t, wanted) <= 1e-6


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")  # NumPy's, in Triton's interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_average_hides_nothing(backend: str | None) -> None:
    """Times zero, what is not finite stays so."""
    for beta, bad in ((0.0, math.nan), (0.0, math.inf), (0.5, math.nan)):
        t = torch.eye(2, device=DEVICE)
        t[0, 1] = t[1, 0] = bad
        kernels.ema_gram(t, torch.ones(2, 3, device=DEVICE), beta, backend=backend)
        assert torch.equal(torch.isfinite(t), torch.eye(2, dtype=torch.bool, device=DEVICE))


@pytest.mark.parametrize("backend", ["batched", "triton"] if kernels.available("triton") else ["batched"])
def test_a_known_bound_of_the_spectrum_spares_the_search_for_a_null_space(backend: str) -> None:
    x = normal(2, 5, 7, dtype=torch.float64)
    t = x @ x.mT
    values = torch.linalg.eigvalsh(t)
    least = float((values[:, 0] / values[:, -1]).min())
    method = {"method": "newton"} if backend == "batched" else {}
    for bound in (least, 0.5 * least):
        assert error(kernels.power(t, -0.5, least=bound, backend=backend, **method),
                     kernels.power(t, -0.5, backend="reference")) <= 1e-8  # fmt: skip
    singular = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64, device=DEVICE))
    lifted = kernels.power(singular, -0.5, least=0.1, backend=backend, **method)
    assert float(lifted[1, 1]) > 1.0  # the bound was taken for granted


# kernel -> a map of one tensor that keeps clear of what is not smooth
MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "gram": lambda x: kernels.gram(x, True),
    "packed": lambda x: kernels.gram(x, packed=True),
    "polar": kernels.polar,
    "pair_sums": lambda x: kernels.pair_sums(x[..., :3]),
    "affine": lambda x: kernels.affine(x, 1.0, x[..., 0, 0], 3.0, 4.0),
    "ema_gram": lambda x: kernels.ema_gram(0.0 * x[..., :3] + 1.0, x, 0.5),
    "apply_update": lambda x: kernels.apply_update(x.clone(), x[..., :3], x, 0.5),
    "inner_products": lambda x: kernels.inner_products([x.flatten(), x.flatten().cos()]),
    "combination": lambda x: kernels.combination([torch.ones_like(x[0]), x[1]], x[2, :2]),
    "exponential_map": lambda x: kernels.exponential_map(torch.ones(5, dtype=x.dtype), x[0]) * x[1],
    "exponential_map of w": lambda x: kernels.exponential_map(x[0], torch.ones(5, dtype=x.dtype)),
}


@pytest.mark.parametrize("name", MAPS)
def test_derivatives_forward_and_under_transforms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In forward mode by hand and by torch.func, and row by row under vmap, where float32 would go to Triton."""
    x, v = (normal(3, 5, seed=seed, dtype=torch.float64).cpu() for seed in (0, 1))
    function, step = MAPS[name], 1e-5
    wanted = (function(x + step * v) - function(x - step * v)) / (2 * step)
    assert float(wanted.norm()) > 1e-2
    x, v = x.float(), v.float()
    pair, apart = torch.stack([x, v]), torch.stack([function(x), function(v)])
    monkeypatch.setattr(kernels, "choose", on_a_gpu)
    with forward_ad.dual_level():
        by_hand = forward_ad.unpack_dual(function(forward_ad.make_dual(x, v))).tangent
    assert by_hand is not None and error(by_hand, wanted) <= 1e-5
    assert error(torch.func.jvp(function, (x,), (v,))[1], wanted) <= 1e-5
    if name != "polar":  # of which the reference asks whether its entries are finite
        assert error(torch.func.vmap(function)(pair), apart) <= 1e-6


def test_what_follows_a_tensor() -> None:
    x = torch.ones(2)
    assert not tracked(x, x.clone()) and not tracked()
    assert tracked(x, x.clone().requires_grad_())
    with torch.no_grad():
        assert not tracked(x.clone().requires_grad_())
    with forward_ad.dual_level():
        assert tracked(forward_ad.make_dual(x, x))
    seen: list[bool] = []
    torch.func.vmap(lambda y: (seen.append(tracked(y)), y)[1])(x)
    torch.func.jvp(lambda y: (seen.append(tracked(y)), y)[1], (x,), (x,))
    assert seen == [True, True]


@INTERPRETER
@pytest.mark.parametrize("name", ["gram", "exponential_map"])
def test_triton_refuses_what_is_followed(name: str) -> None:
    x = normal(3, 5)
    with forward_ad.dual_level(), pytest.raises(ValueError, match="no derivative, of either mode, and does not run"):
        dual = forward_ad.make_dual(x, x)
        kernels.get(name, "triton")(*([dual] if name == "gram" else [x, dual]))
    with pytest.raises(ValueError, match="does not run under torch.func"):
        torch.func.vmap(lambda y: kernels.get("affine", "triton")(y, 1.0, 0.0, 0.0, 0.0))(x[None])


@pytest.mark.parametrize("backend", BACKENDS)
def test_coefficients_that_fit_no_matrix_are_refused(backend: str | None) -> None:
    y = normal(2, 3, 3, 5)
    for shape in ((), (1,), (3,), (2, 1), (2, 3)):
        a = torch.ones(shape, device=DEVICE)
        assert error(kernels.affine(y, a, 0.0, 0.0, 0.0, backend=backend), y) <= 1e-6
    for matrix, shape in ((y[0, 0], (4,)), (y[0, 0], (1,)), (y, (2,)), (y, (4, 2, 3))):
        with pytest.raises(ValueError, match=rf"b: needed a number, or a tensor .* found shape \({shape[0]},"):
            kernels.affine(matrix, 1.0, torch.ones(shape, device=DEVICE), 0.0, 0.0, backend=backend)


def test_places_in_memory_of_what_is_written() -> None:
    x, memory = torch.ones(3, 2), torch.zeros(99)
    for size, stride in (((3, 3), (3, 1)), ((3, 3), (1, 3)), ((3, 3), (10, 2)), ((3, 3), (2, 7)), ((3, 3), (4, 3))):
        t = memory.as_strided(size, stride)
        distinct = len({i * stride[0] + j * stride[1] for i in range(3) for j in range(3)}) == 9
        assert distinct
        kernels.ema_gram(t, x, 0.5)
    for stride in ((2, 1), (1, 1), (0, 1), (1, 2), (6, 3)):
        with pytest.raises(ValueError, match="t: needed one place in memory for each entry"):
            kernels.ema_gram(memory.as_strided((3, 3), stride), x, 0.5)


def test_devices_that_differ_are_refused() -> None:
    x, there = torch.ones(2, 3), torch.ones(2, 3, device="meta")
    for call, message in (
        (lambda: kernels.ema_gram(torch.eye(2), there, 0.5), "x: needed on cpu as t, found on meta"),
        (lambda: kernels.apply_update(x, torch.eye(2), there, 0.5), "x: needed on cpu as w, found on meta"),
        (lambda: kernels.apply_update(x, torch.eye(2, device="meta"), x, 0.5), "p: needed on cpu as w, found on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", [1.5, -0.1, math.nan])
def test_weights_out_of_range_are_refused(beta: float, backend: str | None) -> None:
    with pytest.raises(ValueError, match=f"beta: needed a number from 0 to 1, found {beta}"):
        kernels.ema_gram(torch.eye(2, device=DEVICE), torch.ones(2, 3, device=DEVICE), beta, backend=backend)


def test_a_backend_is_a_name_or_none() -> None:
    x, t, u = torch.ones(2, 3), torch.eye(2), torch.ones(3)
    calls: list[Callable[..., Any]] = [
        lambda **b: kernels.gram(x, **b), lambda **b: kernels.power(t, 0.5, **b), lambda **b: kernels.polar(x, **b),
        lambda **b: kernels.pair_sums(t, **b), lambda **b: kernels.affine(x, 1, 1, 1, 1, **b),
        lambda **b: kernels.ema_gram(t, x, 0.5, **b), lambda **b: kernels.apply_update(x, t, x, 0.5, **b),
        lambda **b: kernels.inner_products([u], **b), lambda **b: kernels.combination([u], u[:1], **b),
        lambda **b: kernels.exponential_map(u, u, **b),
    ]  # fmt: skip
    assert len(calls) == sum(len(kernels.names(family)) for family in dispatch.FAMILIES)
    for call in calls:
        with pytest.raises(ValueError, match="backend: needed one of reference, batched, triton, found ''"):
            call(backend="")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "x", "message"),
    [
        ("gram", torch.zeros(3), r"x: needed matrices \(..., m, n\), found shape \(3,\)"),
        ("power", torch.zeros(3, 2), r"t: needed square matrices \(..., n, n\), found shape \(3, 2\)"),
        ("pair_sums", torch.zeros(1, 3, 2), r"y: needed square matrices \(..., n, n\), found shape \(1, 3, 2\)"),
        ("polar", torch.zeros(3, 2, dtype=torch.int64), "x: needed a real floating tensor, found torch.int64"),
        ("affine", torch.zeros(3, 2, dtype=torch.complex64), "y: needed a real floating tensor, found torch.complex64"),
    ],
)
def test_wrong_input_is_refused(name: str, x: Tensor, message: str, backend: str | None) -> None:
    with pytest.raises(ValueError, match=message):
        run(name, backend, x.to(DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_powers_are_refused(backend: str | None) -> None:
    power = kernels.get("power", backend)
    with pytest.raises(ValueError, match=r"damping: needed a finite number >= 0, found -0\.1"):
        power(torch.eye(2, device=DEVICE), -0.5, -0.1)
    with pytest.raises(ValueError, match="p: needed a finite exponent, found nan"):
        power(torch.eye(2, device=DEVICE), math.nan)
    with pytest.raises(ValueError, match="least: needed a fraction from 0 to 1, found 2.0"):
        kernels.power(torch.eye(2, device=DEVICE), 0.5, least=2.0, backend=None if backend == "reference" else backend)


def test_unknown_names_and_methods_are_refused() -> None:
    bad = torch.tensor([[1.0, math.nan], [0.0, math.inf]])
    for call, message in (
        (lambda: kernels.get("grams"), "name: needed one of gram, .*, found 'grams'"),
        (lambda: kernels.names("grams"), "family: needed one of matrices, updates, vectors, found 'grams'"),
        (lambda: kernels.get("gram", "cuda"), "backend: needed one of reference, batched, triton, found 'cuda'"),
        (lambda: kernels.gram(bad, backend="cuda"), "found 'cuda'"),
        (lambda: batched.power(torch.eye(2), 0.5, method="qr"), "method: needed 'eigh', 'newton' or None, found 'qr'"),
        (lambda: batched.power(torch.eye(2), 2.0, method="newton"), "p: method 'newton' needs one of .*, found 2.0"),
        (lambda: batched.polar(torch.eye(2), method="qr"), "method: needed 'svd', 'newton' or None, found 'qr'"),
        (lambda: kernels.polar(bad, method="qr"), "method: needed 'svd', 'newton' or None, found 'qr'"),
        (lambda: kernels.polar(bad, method="newton", backend="reference"), "method: polar of .* is 'svd' only, found"),
        (lambda: kernels.power(torch.eye(2), 0.5, method="newton", backend="reference"), "'eigh' only, found 'newton'"),
        (lambda: kernels.get("power", "reference")(bad, 0.5), "t: needed finite entries, found 2 that are not"),
        (lambda: kernels.get("polar", "reference")(bad), "x: needed finite entries, found 2 that are not"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.skipif(kernels.available("triton"), reason="Triton can run here")
def test_where_triton_cannot_run_it_says_why() -> None:
    with pytest.raises(ValueError, match="'triton' (needs a GPU, or TRITON_INTERPRET=1|cannot be imported)"):
        kernels.get("gram", "triton")
