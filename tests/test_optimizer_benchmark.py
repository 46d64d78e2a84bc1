"""The benchmark of optimizers: its baselines against dense formulas, its rules, and one run of its script."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def baselines(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return import_module("_baselines")


@pytest.fixture
def protocol(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return import_module("_protocol")


def gradients(count: int, m: int = 5, n: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(m, n, dtype=torch.float64, generator=generator) for _ in range(count)]


def updates(kind: type[torch.optim.Optimizer], given: list[Tensor], **options: object) -> list[Tensor]:
    """What each step subtracts, at learning rate 1."""
    p = torch.zeros_like(given[0]).requires_grad_()
    optimizer, moved = kind([p], lr=1.0, **options), []
    for g in given:
        before, p.grad = p.detach().clone(), g
        optimizer.step()
        moved.append(before - p.detach())
    return moved


def power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**exponent) @ vectors.T


def test_shampoo_of_one_gradient_is_its_polar_factor(baselines: ModuleType) -> None:
    g = gradients(1, 7, 7)[0]
    update = updates(baselines.GraftedShampoo, [g], exponent=0.25, damping=0.0)[0]
    u, _, v = torch.linalg.svd(g)
    torch.testing.assert_close(update / update.norm(), u @ v / 7**0.5, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(update.norm(), g.sign().norm(), rtol=1e-6, atol=0)  # Adam's first step


def test_shampoo_is_the_dense_formula(baselines: ModuleType) -> None:
    """The Kronecker product as a matrix on row-major vectors, every average written out as a sum."""
    given, b1, b2, damping = gradients(13), 0.8, 0.9, 1e-3
    update = updates(baselines.GraftedShampoo, given, betas=(b1, b2), damping=damping, every=4)[-1]

    def average(terms: list[Tensor], b: float) -> Tensor:
        weights = [b ** (len(terms) - 1 - i) for i in range(len(terms))]
        return sum(w * x for w, x in zip(weights, terms)) / sum(weights)

    left, right = average([g @ g.T for g in given], b2), average([g.T @ g for g in given], b2)  # renewed at step 13
    left, right = (s + damping * torch.linalg.eigvalsh(s)[-1] * torch.eye(len(s)) for s in (left, right))
    mean, square = average(given, b1), average([g * g for g in given], b2)
    dense = power(torch.kron(left, right), -0.5) @ mean.flatten()
    adam = mean / (square.sqrt() + 1e-8)
    expected = dense.reshape(mean.shape) * adam.norm() / dense.norm()
    torch.testing.assert_close(update, expected, rtol=1e-9, atol=1e-9)
    stale = updates(baselines.GraftedShampoo, given, betas=(b1, b2), damping=damping, every=5)[-1]
    assert (stale - expected).abs().max() > 1e-3


def test_soap_is_adam_in_the_published_order(baselines: ModuleType) -> None:
    """The momentum kept in the basis, carried back and forth at every step, as in the authors' code."""
    given, b1, b2 = gradients(29), 0.9, 0.8
    first, ours = given[0], updates(baselines.SOAP, given, betas=(b1, b2), every=5)
    factors = [(1 - b2) * first @ first.T, (1 - b2) * first.T @ first]
    bases = [torch.linalg.eigh(s)[1].flip(1) for s in factors]
    momentum, square = torch.zeros_like(first), torch.zeros_like(first)
    assert ours[0].abs().max() == 0
    for t, g in enumerate(given[1:], start=1):
        projected = bases[0].T @ g @ bases[1]
        momentum = b1 * momentum + (1 - b1) * projected
        square = b2 * square + (1 - b2) * projected**2
        adam = momentum / (square.sqrt() + 1e-8) * math.sqrt(1 - b2**t) / (1 - b1**t)
        torch.testing.assert_close(ours[t], bases[0] @ adam @ bases[1].T, rtol=1e-8, atol=1e-8)
        momentum = bases[0] @ momentum @ bases[1].T
        factors = [b2 * factors[0] + (1 - b2) * g @ g.T, b2 * factors[1] + (1 - b2) * g.T @ g]
        if t % 5 == 0:
            orders = [torch.argsort(torch.diag(q.T @ s @ q), descending=True) for q, s in zip(bases, factors)]
            square = square.index_select(0, orders[0]).index_select(1, orders[1])
            bases = [torch.linalg.qr(s @ q[:, o])[0] for q, s, o in zip(bases, factors, orders)]
        momentum = bases[0].T @ momentum @ bases[1]


def test_kl_shampoo_starts_from_its_constants_and_learns_the_covariance(baselines: ModuleType) -> None:
    """The second update has d = 0.1 on both sides; the averages then tend to the factors of the covariance."""
    given = gradients(2)
    update = updates(baselines.KLShampoo, given, betas=(0.9, 0.99))[1]
    torch.testing.assert_close(update, 0.1 * given[1] / 0.1, rtol=1e-9, atol=1e-9)
    a, b = torch.diag(torch.arange(1.0, 6).double()), torch.diag(torch.arange(1.0, 8).double() ** 2)
    given = [a.sqrt() @ g @ b.sqrt() for g in gradients(4001)]
    p = torch.zeros(5, 7, dtype=torch.float64).requires_grad_()
    optimizer = baselines.KLShampoo([p], lr=0.0, betas=(0.9, 0.999))
    for g in given:
        p.grad = g
        optimizer.step()
    found = torch.kron(optimizer.state[p]["left"], optimizer.state[p]["right"])
    expected = torch.kron(a, b)
    assert (found - expected).norm() / expected.norm() < 0.15
    assert (found - torch.eye(35) * found.trace() / 35).norm() / expected.norm() > 0.5


def test_only_matrices_are_taken_and_missing_gradients_skipped(baselines: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"params: needed matrices, found shape \(3,\)"):
        baselines.SOAP([torch.zeros(3, requires_grad=True)], lr=1.0)
    p = torch.ones(3, 2, requires_grad=True)
    baselines.GraftedShampoo([p], lr=1.0, weight_decay=0.5).step()
    assert (p == 1).all()


def test_schedule(protocol: ModuleType) -> None:
    factor = protocol.Setting().factor
    assert [factor(0), factor(39), factor(250)] == pytest.approx([1 / 40, 1, 1])
    assert [factor(499), factor(374)] == pytest.approx([0.1, 1 - 0.9 * 124 / 249])


def search(protocol: ModuleType, best: float, seeds: int = 3) -> dict[float, float]:
    """What the rules try where the loss is |log(lr / best)|; and that they then want every seed at the best."""
    method = protocol.Method(lambda *_: None, (1.0, 2.0, 4.0, 8.0, 16.0), "")
    runs = {}
    while keys := protocol.missing("x", method, runs, seeds):
        runs |= {key: [9.0, abs(math.log(key.lr / best)) + 0.01 * key.seed] for key in keys}
    tried = protocol.tuning("x", runs)
    chosen = protocol.best_rate(tried)
    assert {key.seed for key in runs if key.lr == chosen} == set(range(seeds)) == set(protocol.curves("x", runs))
    return tried


def test_the_grid_grows_until_the_best_is_inside(protocol: ModuleType) -> None:
    assert list(search(protocol, 4.1)) == [1, 2, 4, 8, 16]
    assert list(search(protocol, 30.0)) == [1, 2, 4, 8, 16, 32, 64]
    assert list(search(protocol, 0.5)) == [0.25, 0.5, 1, 2, 4, 8, 16]
    assert len(search(protocol, 1e-9)) == 9  # not for ever


def test_steps_errors_and_pairs(protocol: ModuleType) -> None:
    assert protocol.steps_to(2.0, [3.0, 2.5, 2.0, 2.2], every=20) == 60
    assert protocol.steps_to(1.0, [3.0, 2.5], every=20) == math.inf
    assert protocol.mean_and_error([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, math.sqrt(7 / 3 / 3)))
    assert protocol.mean_and_error([1.0, math.inf]) == (math.inf, math.inf)
    runs = {protocol.Key(name, 1.0, seed): [5.0, 3.0, last]
            for name, lasts in {"a": (2.0, 4.0), "b": (1.5, 3.5)}.items() for seed, last in enumerate(lasts)}
    rows = dict(protocol.summary(["a", "b"], runs, protocol.Setting(), "a"))
    assert rows["b"]["minus a, same seed"] == -0.5 and rows["b"]["standard error of minus a"] == 0
    assert rows["b"]["final loss"] == 2.5 and rows["b"]["steps to target"] == 40


def test_every_parameter_is_stepped_once(protocol: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from symgeo.data import python_source

    methods, text = import_module("_methods"), python_source()
    for method in methods.METHODS.values():
        trainer = protocol.Trainer(method, 1e-3, 0, protocol.SIZES["small"], text)
        held = [id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in trainer.model.parameters())
        assert len(trainer.optimizers[0].param_groups[0]["params"]) == 6


def run(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(FOLDER / "optimizers.py"), "--size", "small", "--seeds", "2", "--workers", "1",
         "--methods", "adamw,soap", "--json", str(path), *arguments],
        capture_output=True, text=True, timeout=300, check=False,
    )


def test_runs_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    first = run(path)
    assert first.returncode == 0, first.stderr[-2000:]
    assert "adamw lr 0.001 seed 0: 3." in first.stdout
    stored = json.loads(path.read_text())
    assert {r["method"] for r in stored["runs"]} == {"adamw", "soap"} == set(stored["summary"])
    dropped = stored["runs"].pop()
    stored["notes"]["adamw"] = "otherwise"
    path.write_text(json.dumps(stored))
    refused = run(path)
    assert refused.returncode == 2 and "--forget adamw" in refused.stderr
    stored["notes"]["adamw"] = "torch.optim.AdamW, fused, betas 0.9, 0.99"
    path.write_text(json.dumps(stored))
    again = run(path, "--windows", "1")
    assert again.stdout.count(" seed ") == 1  # the dropped one alone
    stored = json.loads(path.read_text())
    assert dropped in stored["runs"] and stored["timing"]["step / step of AdamW"]["adamw"] == 1
