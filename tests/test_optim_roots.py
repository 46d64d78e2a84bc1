"""Inverse powers by products, without roots, and fitted by the Kullback-Leibler divergence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from symgeo import Symmetry
from symgeo.curvature import DenseBlock
from symgeo.groups import Cyclic, Orthogonal, Permutation
from symgeo.optim import SymO, presets
from symgeo.optim.packed import unpack
from symgeo.optim.roots import group_update, inverse_power, matmul_powers

Params = dict[str, Tensor]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spd(n: int, seed: int) -> Tensor:
    x = draw(2, 3, n, 2 * n, seed=seed)
    return x @ x.mT / n


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("exponent", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("damping", [0.0, 1e-4])
def test_products_find_the_powers_of_eigenvalues(exponent: float, damping: float) -> None:
    """One s_max for all blocks, dense and diagonal, whatever their scales."""
    blocks = [DenseBlock(spd(5, 1)), DenseBlock(1e-3 * spd(7, 2))]
    expected = inverse_power(blocks, exponent, damping, 1e-16)
    for found, block in zip(matmul_powers(blocks, exponent, damping), expected):
        assert error(found.to_dense().matrix, block.to_dense().matrix) < 1e-4 * (damping > 0) + 1e-8


def test_complex_blocks_have_powers_too() -> None:
    x = torch.complex(draw(1, 2, 5, 11, seed=1), draw(1, 2, 5, 11, seed=2))
    [root] = matmul_powers([DenseBlock(x @ x.mH)], 0.5, 0.0)
    m = root.to_dense().matrix
    assert error((m @ (x @ x.mH) @ m).real, torch.eye(5).double().expand(1, 2, 5, 5)) < 1e-8


@pytest.mark.parametrize("kind", ["dense", "diagonal"])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_group_updates_converge_to_the_inverse(kind: str, damping: float) -> None:
    """K K^T = (T + damping)^-1 without a root, an inverse or an eigenvalue; quickly at rate 1, slowly below."""
    t = spd(5, 3)
    diagonal = kind == "diagonal"
    t = t.diagonal(dim1=-2, dim2=-1).contiguous() if diagonal else t
    for rate, steps in ((1.0, 60), (0.1, 900)):
        k = torch.zeros_like(t)
        for _ in range(steps):
            k = group_update(k, t, rate, torch.tensor(damping, dtype=torch.float64), diagonal)
        if diagonal:
            assert error(k.square() * (t + damping), torch.ones_like(t)) < 1e-8
        else:
            eye = torch.eye(5).double().expand_as(t)
            assert error(k @ k.mT @ (t + damping * eye), eye) < 1e-8


def test_group_updates_are_equivariant_under_all_matrices_without_damping() -> None:
    """T -> A T A^T, K -> A^-T K: the same update; with damping only orthogonal A keep it."""
    t, a = spd(5, 4), draw(5, 5, seed=5) + 2 * torch.eye(5).double()
    k, inverse = draw(2, 3, 5, 5, seed=6), torch.linalg.inv(a)
    for damping, bound in ((0.0, None), (0.3, 1e-3)):
        shift = torch.tensor(damping, dtype=torch.float64)
        moved = group_update(inverse.mT @ k, a @ t @ a.mT, 0.2, shift, False)
        gap = error(moved, inverse.mT @ group_update(k, t, 0.2, shift, False))
        assert gap < 1e-10 if bound is None else gap > bound


def follow(symmetry: Symmetry, start: Params, gradients: list[Params]) -> Params:
    params = {name: nn.Parameter(x.clone()) for name, x in start.items()}
    optimizer = SymO(params.items(), symmetry, lr=0.01, betas=(0.5, 0.8), roots="group", power=1.0)
    for gradient in gradients:
        for name, p in params.items():
            p.grad = gradient[name].clone()
        optimizer.step()
    return {name: p.detach() for name, p in params.items()}


@pytest.mark.parametrize("group", [Permutation(), Orthogonal(), Cyclic()], ids=lambda g: type(g).__name__)
def test_root_free_steps_are_equivariant(group: Permutation | Orthogonal | Cyclic) -> None:
    shapes = {"w": (7, 3), "v": (2, 7), "b": (7,)}
    symmetry = Symmetry({"w": "h _", "v": "_ h", "b": "h"}, {"h": group})
    start = {name: draw(*s, seed=i) for i, (name, s) in enumerate(shapes.items())}
    gradients = [{name: draw(*s, seed=10 * t + i) for i, (name, s) in enumerate(shapes.items())} for t in range(1, 6)]
    for actor, good in ((symmetry, True), (Symmetry(symmetry.tensors, {"h": Orthogonal()}), group == Orthogonal())):
        action = actor.bind(start)
        g = action.random(torch.Generator().manual_seed(3))
        end = action.act(g, follow(symmetry, start, gradients))
        there = follow(symmetry, action.act(g, start), [action.act(g, x) for x in gradients])
        gap = max(error(there[name], end[name]) for name in shapes)
        assert gap < 1e-8 if good else gap > 1e-3


def test_root_free_steps_approach_the_inverse_second_moment() -> None:
    w = nn.Parameter(torch.zeros(3, 7).double())
    g = draw(3, 7, seed=1)
    optimizer = SymO([("w", w)], Symmetry({"w": "_ n"}, {"n": Orthogonal()}), lr=1.0, betas=(0.0, 0.5), damping=0.0,
                     roots="group", power=1.0)  # fmt: skip
    for _ in range(80):
        w.grad = g.clone()
        before = w.detach().clone()
        optimizer.step()
    assert error(before - w.detach(), torch.linalg.solve(g @ g.T / 7, g)) < 1e-8


def kl_pair(m: int, n: int) -> nn.ParameterDict:
    return nn.ParameterDict({"w": nn.Parameter(torch.zeros(m, n).double())})


def test_kl_statistics_against_the_written_out_recursion() -> None:
    """A <- EMA(G B^-1 G^T / n), B <- EMA(G^T A^-1 G / m), each with the other's factor of before."""
    m, n, beta, damping = 3, 5, 0.8, 1e-2
    net = kl_pair(m, n)
    optimizer = SymO(net.named_parameters(), presets.shampoo(net), lr=0.1, betas=(0.0, beta), damping=damping,
                     power=1.0, divergence="kl")  # fmt: skip
    a, b = torch.zeros(m, m).double(), torch.zeros(n, n).double()
    a_inv, b_inv = torch.eye(m).double(), torch.eye(n).double()
    expected = torch.zeros(m, n).double()

    def inverse(s: Tensor, t: int) -> Tensor:
        s = s / (1 - beta**t)
        return torch.linalg.inv(s + damping * torch.linalg.eigvalsh(s)[-1] * torch.eye(len(s)).double())

    def root(s: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(s)
        return (vectors * values.sqrt()) @ vectors.T

    for t in range(1, 7):
        g = draw(m, n, seed=t)
        net["w"].grad = g.clone()
        optimizer.step()
        old = a_inv
        a = beta * a + (1 - beta) * g @ b_inv @ g.T / n
        a_inv = inverse(a, t)
        b = beta * b + (1 - beta) * g.T @ (a_inv if t == 1 else old) @ g / m
        b_inv = inverse(b, t)
        expected -= 0.1 * root(a_inv) @ g @ root(b_inv)
        assert error(net["w"].detach(), expected) < 1e-8


@pytest.mark.parametrize(("divergence", "bound"), [("kl", None), ("frobenius", 0.2)])
def test_kl_statistics_have_the_joint_fixed_point(divergence: str, bound: float | None) -> None:
    """A = E[G B^-1 G^T] / n and B = E[G^T A^-1 G] / m over gradients that come in turn, up to (c A, B / c).

    An average over some 100 steps of six gradients in turn ripples by several percent.
    """
    m, n = 3, 5
    net = kl_pair(m, n)
    optimizer = SymO(net.named_parameters(), presets.shampoo(net), lr=0.0, betas=(0.0, 0.99), damping=1e-8, power=1.0,
                     divergence=divergence)  # fmt: skip
    gradients = [draw(m, n, seed=i) * torch.linspace(1, 3, n) for i in range(6)]
    for t in range(600):
        net["w"].grad = gradients[t % 6].clone()
        optimizer.step()
    state = optimizer.state[net["w"]]
    a, b = unpack(state["gradient 0 n[w]:V"][0], 3), unpack(state["gradient 1 m[w]:V"][0], 5)
    left = sum((g @ torch.linalg.solve(b, g.T) for g in gradients), torch.zeros(m, m).double()) / 6 / n
    right = sum((g.T @ torch.linalg.solve(a, g) for g in gradients), torch.zeros(n, n).double()) / 6 / m
    gaps = [error(x / x.trace(), y / y.trace()) for x, y in ((a, left), (b, right))]
    assert max(gaps) < 0.1 if bound is None else max(gaps) > bound


def test_the_free_scale_of_kl_does_not_drift() -> None:
    net = kl_pair(3, 5)
    optimizer = SymO(net.named_parameters(), presets.shampoo(net), lr=0.0, betas=(0.0, 0.5), damping=0.1, power=1.0,
                     divergence="kl")  # fmt: skip
    for _ in range(200):
        net["w"].grad = draw(3, 5, seed=1)
        optimizer.step()
    state = optimizer.state[net["w"]]
    a, b = unpack(state["gradient 0 n[w]:V"][0], 3), unpack(state["gradient 1 m[w]:V"][0], 5)
    assert abs(a.trace() / 3 / (b.trace() / 5) - 1) < 1e-8
    assert 1e-3 < float(a.trace()) < 1e3


def test_kl_with_one_side_is_shampoo() -> None:
    ends = []
    for divergence in ("frobenius", "kl"):
        net = kl_pair(3, 5)
        optimizer = SymO(net.named_parameters(), presets.shampoo(net)[0], lr=0.1, divergence=divergence)
        for t in range(3):
            net["w"].grad = draw(3, 5, seed=t)
            optimizer.step()
        ends.append(net["w"].detach())
    assert torch.equal(*ends)
