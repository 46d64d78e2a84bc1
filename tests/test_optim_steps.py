"""Step laws of the optimizer: closed forms, and its recursion against dense float64 matrices."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from symgeo import Symmetry, curvature
from symgeo.groups import Orthogonal, Permutation
from symgeo.optim import SymO, presets

TOLERANCE = 1e-8
Params = dict[str, Tensor]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 11)).double()
    for i, p in enumerate(net.parameters()):
        p.data = draw(*p.shape, seed=i)
    return net


def one_step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 100) -> Params:
    """The steps w - w' at learning rate 1, for fresh gradients."""
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for i, p in enumerate(net.parameters()):
        p.grad = draw(*p.shape, seed=seed + i)
    optimizer.step()
    return {name: before[name] - p.detach() for name, p in net.named_parameters()}


def error(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and bool(torch.isfinite(a).all())
    return float((a - b).abs().max() / b.abs().max())


def polar(g: Tensor) -> Tensor:
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    return u @ v


def matrices(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, p) for name, p in net.named_parameters() if p.dim() == 2)


RAW: dict[str, Any] = {"lr": 1.0, "betas": (0.0, 0.0), "damping": 0.0}


@pytest.mark.parametrize("roots", ["eigh", "newton"])
def test_muon_steps_along_the_polar_factor(roots: str) -> None:
    net = network()
    steps = one_step(net, SymO(net.named_parameters(), presets.muon(net), roots=roots, **RAW))
    for name, p in matrices(net):
        assert p.grad is not None
        assert error(steps[name], max(p.shape) ** 0.5 * polar(p.grad)) < TOLERANCE


def test_adam_steps_along_signs() -> None:
    net = network()
    steps = one_step(net, SymO(net.named_parameters(), presets.adam(net), **RAW))
    for name, p in net.named_parameters():
        assert p.grad is not None
        assert error(steps[name], p.grad.sign()) < TOLERANCE


def test_irreducible_axes_normalise_the_gradient() -> None:
    w = nn.Parameter(draw(5, 7, seed=1))
    w.grad = draw(5, 7, seed=2)
    before = w.detach().clone()
    SymO([("w", w)], Symmetry({"w": "a b"}, {"a": Orthogonal(), "b": Orthogonal()}), **RAW).step()
    assert error(before - w.detach(), 35**0.5 * w.grad / w.grad.norm()) < TOLERANCE


def inverse_root(s: Tensor, p: float, shift: float | Tensor = 0.0) -> Tensor:
    values, vectors = torch.linalg.eigh(s)
    return (vectors * (values.clamp_min(0) + shift) ** -p) @ vectors.T


@pytest.mark.parametrize(("power", "exponent"), [(0.5, 0.25), (1.0, 0.5)])
def test_shampoo_over_several_steps(power: float, exponent: float) -> None:
    """(m n)^power/2 L^-power/2 G R^-power/2, with L and R written out."""
    m, n, beta = 5, 7, 0.8
    w = nn.Parameter(draw(m, n, seed=3))
    net = nn.ParameterDict({"w": w})
    optimizer = SymO(net.named_parameters(), presets.shampoo(net), lr=0.1, betas=(0.0, beta), damping=0.0, power=power)
    left, right, expected = torch.zeros(m, m).double(), torch.zeros(n, n).double(), w.detach().clone()
    for t in range(1, 6):
        w.grad = draw(m, n, seed=10 + t)
        optimizer.step()
        left = beta * left + (1 - beta) * w.grad @ w.grad.T
        right = beta * right + (1 - beta) * w.grad.T @ w.grad
        debias = 1 - beta**t
        roots = (inverse_root(left / debias, exponent), pseudo_root(right / debias, exponent))
        expected -= 0.1 * (m * n) ** exponent * roots[0] @ w.grad @ roots[1]
        assert error(w.detach(), expected) < TOLERANCE


def pseudo_root(s: Tensor, p: float) -> Tensor:
    values, vectors = torch.linalg.eigh(s)
    powers = torch.where(values > 1e-12 * values[-1], values.clamp_min(1e-300) ** -p, 0.0)
    return (vectors * powers) @ vectors.T


UNITS = 3
SHAPES = {"w": (UNITS, 2), "b": (UNITS,), "v": (2,)}
UNIT_SYMMETRY = Symmetry({"w": "h _", "b": "h", "v": "_"}, {"h": Permutation()})


def flat(params: Params) -> Tensor:
    return torch.cat([params[name].reshape(-1) for name in SHAPES])


def unflat(x: Tensor) -> Params:
    pieces = x.split([torch.Size(shape).numel() for shape in SHAPES.values()])
    return {name: piece.reshape(shape) for (name, shape), piece in zip(SHAPES.items(), pieces)}


def orbit_moment(x: Tensor) -> Tensor:
    """The mean of (A x)(A x)^T over all permutations of the units."""
    params, result = unflat(x), torch.zeros(len(x), len(x), dtype=x.dtype)
    orders = list(itertools.permutations(range(UNITS)))
    for order in orders:
        moved = flat({"w": params["w"][list(order)], "b": params["b"][list(order)], "v": params["v"]})
        result += torch.outer(moved, moved) / len(orders)
    return result


@pytest.mark.parametrize("options", [
    {}, {"nesterov": True}, {"weight_decay": 0.3}, {"update_every": 3}, {"power": 1.0}, {"betas": (0.0, 0.0)},
    {"betas": (0.7, 0.0), "nesterov": True}, {"damping": 0.0, "betas": (0.5, 0.9)},
], ids=str)  # fmt: skip
def test_the_recursion_against_dense_matrices(options: dict[str, Any]) -> None:
    settings = {"lr": 0.05, "betas": (0.6, 0.8), "damping": 1e-3, "trivial": "dense"} | options
    params = {name: nn.Parameter(draw(*shape, seed=i)) for i, (name, shape) in enumerate(SHAPES.items())}
    optimizer = SymO(params.items(), UNIT_SYMMETRY, **settings)
    (b1, b2), lr, every = settings["betas"], settings["lr"], settings.get("update_every", 1)
    w, m = flat({name: p.detach() for name, p in params.items()}), torch.zeros(11).double()
    total, root = torch.zeros(11, 11).double(), torch.zeros(11, 11).double()
    for t in range(1, 8):
        g = draw(11, seed=50 + t)
        for name, piece in unflat(g).items():
            params[name].grad = piece.clone()
        optimizer.step()
        m = b1 * m + (1 - b1) * g
        mh = m / (1 - b1**t)
        if settings.get("nesterov"):
            mh = (b1 * m + (1 - b1) * g) / (1 - b1 ** (t + 1))
        total = b2 * total + (1 - b2) * orbit_moment(mh)
        if (t - 1) % every == 0:
            moment = total / (1 - b2**t)
            shift = settings["damping"] * torch.linalg.eigvalsh(moment)[-1]
            power = settings.get("power", 0.5)
            root = inverse_root(moment, power, shift) if settings["damping"] else pseudo_root(moment, power)
        w = (1 - lr * settings.get("weight_decay", 0.0)) * w - lr * root @ mh
        assert error(flat({name: p.detach() for name, p in params.items()}), w) < TOLERANCE


def test_trivial_diagonal_is_adam_for_free_axes() -> None:
    """A tensor with no group on it: diagonal second moments of the averaged gradient."""
    w = nn.Parameter(draw(5, seed=1))
    optimizer = SymO([("w", w)], Symmetry({"w": "_"}, {}), lr=0.1, betas=(0.5, 0.75), damping=0.0)
    expected, m, v = w.detach().clone(), torch.zeros(5).double(), torch.zeros(5).double()
    for t in range(1, 5):
        w.grad = draw(5, seed=t)
        optimizer.step()
        m, mh = 0.5 * m + 0.5 * w.grad, (0.5 * m + 0.5 * w.grad) / (1 - 0.5**t)
        v = 0.75 * v + 0.25 * mh**2
        expected -= 0.1 * mh / (v / (1 - 0.75**t)).sqrt()
        assert error(w.detach(), expected) < TOLERANCE


@pytest.mark.parametrize("roots", ["eigh", "newton"])
def test_torch_muon_up_to_its_learning_rates(roots: str) -> None:
    """Newton-Schulz with five steps in bfloat16 leaves singular values between about 0.65 and 1.2."""
    shape = (13, 17)
    start = draw(*shape, seed=5).float()
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    net = nn.ParameterDict({"w": ours})
    lr = 0.01
    optimizer = SymO(net.named_parameters(), presets.muon(net), lr=lr / max(shape) ** 0.5, betas=(0.95, 0.0),
                     damping=0.0, nesterov=True, roots=roots)  # fmt: skip
    muon = torch.optim.Muon([theirs], lr=lr, weight_decay=0.0)
    for t in range(6):
        before = ours.detach().clone(), theirs.detach().clone()
        ours.grad = draw(*shape, seed=70 + t).float()
        theirs.grad = ours.grad.clone()
        optimizer.step()
        muon.step()
        a, b = (p.detach() - old for p, old in zip((ours, theirs), before))
        assert float((a * b).sum() / a.norm() / b.norm()) > 0.97
        s = torch.linalg.svdvals(polar(a).T @ b) / lr
        assert 0.6 < float(s[0].min()) and float(s.max()) < 1.3
        assert abs(torch.linalg.svdvals(a) / lr - 1).max() < 1e-4


@pytest.mark.parametrize("damping", [1e-4, 1e-2])
@pytest.mark.parametrize("estimator", ["gradient", "riccati", "secant"])
@pytest.mark.parametrize("compact", [False, True])
def test_one_step_is_the_preconditioned_gradient(estimator: str, damping: float, compact: bool) -> None:
    """Without memory: what `symgeo.curvature.precondition` computes from one gradient."""
    net = network()
    symmetry = presets.mlp(net, signed=True, scaled=compact)
    options = {"estimator": estimator, "damping": damping, "compact": compact}
    start = {name: p.detach().clone() for name, p in net.named_parameters() if name in symmetry.tensors}
    steps = one_step(net, SymO(net.named_parameters(), symmetry, lr=1.0, betas=(0.0, 0.0), **options))
    grads = {name: p.grad for name, p in net.named_parameters() if name in start and p.grad is not None}
    for name, step in curvature.precondition(start, grads, symmetry, **options).items():
        assert error(steps[name], step) < TOLERANCE


def test_graft_gives_the_length_of_the_other_step() -> None:
    net = network()
    steps = one_step(net, SymO(net.named_parameters(), presets.muon(net), graft="sgd", **RAW))
    for name, p in matrices(net):
        assert p.grad is not None
        assert error(steps[name], polar(p.grad) * p.grad.norm() / min(p.shape) ** 0.5) < TOLERANCE
    net = network()
    steps = one_step(net, SymO(net.named_parameters(), presets.muon(net), graft="adam", **RAW))
    for name, p in matrices(net):
        assert abs(float(steps[name].norm()) - p.numel() ** 0.5) < 1e-5  # Adam's first step is a sign


def test_the_rest_is_adamw() -> None:
    ours, theirs = network(), network()
    optimizer = SymO(ours.named_parameters(), presets.muon(ours), lr=0.02, rest_lr=0.01, betas=(0.8, 0.9),
                     weight_decay=0.1)  # fmt: skip
    vectors = [p for p in theirs.parameters() if p.dim() == 1]
    adamw = torch.optim.AdamW(vectors, lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in (optimizer, adamw)]
    for t in range(6):
        for i, (p, q) in enumerate(zip(ours.parameters(), theirs.parameters())):
            p.grad = None if i == 3 and t == 2 else draw(*p.shape, seed=10 * t + i)
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        adamw.step()
        for scheduler in schedulers:
            scheduler.step()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        if p.dim() == 1:
            assert error(p.detach(), q.detach()) < 1e-12
