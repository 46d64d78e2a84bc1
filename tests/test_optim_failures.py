"""A step that fails leaves everything as it was, and says truthfully why it failed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_optim_guards import draw
from torch import Tensor, nn

from symgeo import Symmetry
from symgeo.groups import GeneralLinear, Orthogonal
from symgeo.optim import SymO, presets

Make = Callable[[nn.Module], SymO]

LOW_RANK = Symmetry({"a.weight": "r _", "c.weight": "_ r*"}, {"r": GeneralLinear()})


class Net(nn.Module):
    """Two layers that the symmetries name, and one parameter for AdamW."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.a, self.c = (nn.Linear(*shape, bias=False, dtype=dtype) for shape in ((7, 5), (5, 3)))
        self.scale = nn.Parameter(torch.ones(2, dtype=dtype))
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(draw(*p.shape, seed=i))


def give(net: nn.Module, t: int, scale: float = 1.0) -> None:
    for i, p in enumerate(net.parameters()):
        p.grad = scale * draw(*p.shape, seed=10 * t + i).to(p.dtype)


def maker(symmetry: Any, **options: Any) -> Make:
    return lambda net: SymO(
        net.named_parameters(), symmetry(net) if callable(symmetry) else symmetry, lr=0.02, weight_decay=0.1, **options)


MAKERS: dict[str, Make] = {
    "one side": maker(presets.muon),
    "pair": maker(presets.shampoo, graft="adam", update_every=2, nesterov=True),
    "pair, kl": maker(presets.shampoo, power=1.0, divergence="kl"),
    "pair, corrected": maker(presets.shampoo, corrected=True, update_every=2),
    "riccati": maker(presets.muon, estimator="riccati", damping=1e-2),
    "compact": maker(LOW_RANK, compact=True),
}


def everything(net: nn.Module, optimizer: SymO) -> list[Any]:
    parts = [[p.detach().clone() for p in net.parameters()]]
    return [*parts, copy.deepcopy(optimizer.state_dict()["state"])]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list) else bool(a == b)


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("name", MAKERS)
def test_matrices_without_eigenvalues_undo_the_step(name: str, before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the last renewal of the step everything else has been done; then the same step goes as if nothing was."""
    ends = []
    for failing in (False, True):
        net = Net()
        optimizer = MAKERS[name](net)
        for t in range(before):
            give(net, t)
            optimizer.step()
        give(net, before)
        if failing:
            found = everything(net, optimizer)
            calls = _decompositions(monkeypatch, optimizer, net)
            with monkeypatch.context() as patch:
                _let_fail(patch, calls)
                with pytest.raises(ValueError, match="no eigenvalues today"):
                    optimizer.step()
            assert same(everything(net, optimizer), found)
        for t in range(before, before + 3):
            give(net, t)
            optimizer.step()
        ends.append(everything(net, optimizer))
    assert same(*ends)


DECOMPOSITIONS = ("eigh", "svd")


def _decompositions(monkeypatch: pytest.MonkeyPatch, optimizer: SymO, net: nn.Module) -> int:
    """How many decompositions the next step makes."""
    twin_net, twin = copy.deepcopy((net, optimizer))
    for p, q in zip(net.parameters(), twin_net.parameters()):
        q.grad = p.grad
    counted: list[int] = []
    with monkeypatch.context() as patch:
        for key in DECOMPOSITIONS:
            real = getattr(torch.linalg, key)
            patch.setattr(torch.linalg, key, lambda *a, real=real, **k: counted.append(1) or real(*a, **k))
        twin.step()
    assert counted
    return len(counted)


def _let_fail(patch: pytest.MonkeyPatch, last: int) -> None:
    counted: list[int] = []

    def failing(real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            counted.append(1)
            if len(counted) == last:
                raise ValueError("no eigenvalues today")
            return real(*args, **options)
        return call

    for key in DECOMPOSITIONS:
        patch.setattr(torch.linalg, key, failing(getattr(torch.linalg, key)))


def test_a_closure_that_raises_moves_nothing() -> None:
    net = Net()
    optimizer = MAKERS["one side"](net)
    give(net, 0)
    optimizer.step()
    found = everything(net, optimizer)

    def closure() -> float:
        raise ValueError("the labels do not fit")

    with pytest.raises(ValueError, match="labels do not fit"):
        optimizer.step(closure)
    assert same(everything(net, optimizer), found)


@pytest.mark.parametrize("roots", ["eigh", "newton"])
@pytest.mark.parametrize("where", ["a.weight", "scale"])
@pytest.mark.parametrize("every", [1, 3])
def test_gradients_whose_squares_overflow_are_refused_as_what_they_are(every: int, where: str, roots: str) -> None:
    """Finite ones of 1e20 in single precision; double precision holds their squares."""
    net = Net()
    optimizer = maker(presets.muon, roots=roots, update_every=every)(net)
    for t in range(2):
        give(net, t)
        optimizer.step()
    found = everything(net, optimizer)
    give(net, 2)
    dict(net.named_parameters())[where].grad.fill_(1e20)
    with pytest.raises(ValueError, match=rf"gradient of '{where}' has the norm [0-9.]+e\+20, and .*float32 hold"):
        optimizer.step()
    assert same(everything(net, optimizer), found)
    dict(net.named_parameters())[where].grad.fill_(torch.inf)
    with pytest.raises(ValueError, match=f"gradient of '{where}' is not finite"):
        optimizer.step()
    assert same(everything(net, optimizer), found)


LARGE: dict[str, Any] = {
    "one side": {}, "newton": {"roots": "newton"}, "group": {"roots": "group", "power": 1.0, "damping": 1e-2},
    "grafted": {"graft": "adam"},
}


def travelled(options: dict[str, Any], dtype: torch.dtype, scale: float) -> list[Tensor]:
    """Three steps from zero, so that small ones do not drown in large weights."""
    net = Net(dtype)
    for p in net.parameters():
        nn.init.zeros_(p)
    optimizer = SymO(net.named_parameters(), presets.muon(net), lr=1.0, **options)
    for t in range(3):
        give(net, t, scale)
        optimizer.step()
    return [p.detach().double() for p in net.parameters()]


def gap(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max(float((x - y).norm() / y.norm()) for x, y in zip(found, wanted))


@pytest.mark.parametrize("name", LARGE)
def test_large_gradients_that_fit_give_the_step_of_double_precision(name: str) -> None:
    wanted = travelled(LARGE[name], torch.float64, 1e17)
    assert gap(travelled(LARGE[name], torch.float32, 1e17), wanted) < 1e-3
    assert gap(wanted, travelled(LARGE[name], torch.float64, 1.0)) < 1e-3 or name == "group"  # whose steps are 1 / g


@pytest.mark.parametrize("name", ["one side", "newton", "grafted"])
def test_gradients_in_half_precision_may_have_any_norm(name: str) -> None:
    """Beyond its largest number, 65504."""
    assert gap(travelled(LARGE[name], torch.float16, 2e4), travelled(LARGE[name], torch.float64, 2e4)) < 1e-2


def test_betas_that_no_longer_fit_undo_the_step() -> None:
    """A shared statistic of two groups, one of which gets another betas[1] later."""
    params = {name: nn.Parameter(draw(5, 7, seed=i)) for i, name in enumerate(("v", "w", "x"))}
    symmetry = Symmetry({"v": "_ k", "w": "h _", "x": "h _"}, {"h": Orthogonal(), "k": Orthogonal()})
    net = nn.ParameterDict(params)
    groups = [{"params": [(name, net[name])]} for name in params]
    optimizer = SymO(groups, symmetry, lr=0.1)
    give(net, 0)
    optimizer.step()
    found = everything(net, optimizer)
    optimizer.param_groups[2]["betas"] = (0.9, 0.5)
    with pytest.raises(ValueError, match="'w' and 'x' share statistics"):
        optimizer.step()
    assert same(everything(net, optimizer), found)
