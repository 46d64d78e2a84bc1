"""Steps that never ask the device: on meta tensors, which have no values that could be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_optim_guards import deep, draw
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from manifolds.linalg import balance
from symgeo import Symmetry
from symgeo.groups import Cyclic
from symgeo.models.tiny_lm import TinyLM
from symgeo.optim import SymO, presets

FUNCTIONS = ("tensor", "as_tensor", "from_numpy")


class Traffic(TorchDispatchMode):
    """Records what goes from the host's memory to the device, and what comes back; on a GPU either may wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = ([x for x in tree_leaves(y) if isinstance(x, Tensor)] for y in ((args, kwargs), out))
        sent = any(x.is_meta for x in (*given, *made)) and any(not x.is_meta and x.dim() for x in given)
        back = any(x.is_meta for x in given) and any(not x.is_meta for x in made)
        if sent or back or "_local_scalar_dense" in str(func):
            self.seen.append(str(func))
        return out


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Also tensors that are made of lists, which are copied to the device they are made on."""
    with monkeypatch.context() as patch, Traffic() as traffic:
        for name in FUNCTIONS:
            real = getattr(torch, name)
            patch.setattr(torch, name, lambda *a, real=real, name=name, **k: traffic.seen.append(name) or real(*a, **k))
        yield traffic.seen


def networks(make: Callable[[], nn.Module]) -> nn.ModuleList:
    """Two of them, in groups of their own, whose kinds share buckets."""
    with torch.device("meta"):
        return nn.ModuleList([make(), make()])


def adapters() -> nn.Module:
    return nn.ParameterDict({"lora_A": torch.ones(3, 11), "lora_B": torch.ones(7, 3)})


def lm() -> nn.Module:
    return TinyLM(depth=1)


def waves(net: nn.Module) -> Symmetry:
    return Symmetry({name: "h _" for name, p in net.named_parameters() if p.dim() == 2}, {"h": Cyclic()})


NEWTON: dict[str, Any] = {"roots": "newton"}
CASES: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any]]] = {
    "muon": (lambda: deep(2), presets.muon, NEWTON),
    "muon, every 2": (lambda: deep(2), presets.muon, NEWTON | {"update_every": 2, "nesterov": True}),
    "muon without memory": (lambda: deep(2), presets.muon, NEWTON | {"betas": (0.9, 0.0), "damping": 0.0}),
    "muon, no roots": (lambda: deep(2), presets.muon, {"roots": "group", "power": 1.0}),
    "muon, grafted": (lambda: deep(2), presets.muon, NEWTON | {"graft": "sgd", "lr": torch.tensor(0.1)}),
    "adam": (lambda: deep(2), presets.adam, NEWTON),
    "mlp": (lambda: deep(2), presets.mlp, NEWTON),
    "mlp, signed": (lambda: deep(2), lambda net: presets.mlp(net, signed=True), NEWTON),
    "mlp, dense": (lambda: deep(2), presets.mlp, NEWTON | {"trivial": "dense"}),
    "attention": (lm, presets.attention, NEWTON | {"compact": True}),
    "lora": (adapters, presets.lora, NEWTON | {"compact": True}),
    "shampoo": (lambda: deep(2), presets.shampoo, NEWTON | {"graft": "adam", "update_every": 2}),
    "shampoo, kl": (lambda: deep(2), presets.shampoo, NEWTON | {"power": 1.0, "divergence": "kl"}),
    "waves": (lambda: deep(2), waves, NEWTON),
}

#: all parameters share statistics, or have none
ALIKE = ("mlp, dense", "waves", "muon without memory")


def optimizer_of(net: nn.ModuleList, make: Any, options: dict[str, Any], apart: bool) -> SymO:
    groups = [{"params": [(name, p) for name, p in net.named_parameters() if name.startswith(f"{i}.")]}
              for i in range(2)]
    for group, beta in zip(groups, (0.99, 0.95)):
        if apart:
            group["betas"] = (0.9, beta)  # type: ignore[assignment]
    return SymO(groups, make(net), **({"lr": 0.01} | options))


@pytest.mark.parametrize(("name", "apart"), [
    *((name, True) for name in CASES if name not in ALIKE),
    *((name, False) for name in (*ALIKE, "muon", "shampoo, kl")),
])  # fmt: skip
def test_steps_read_nothing_and_send_nothing(name: str, apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first step, which lays out the state; also where two groups have betas of their own."""
    make, symmetry, options = CASES[name]
    net = networks(make)
    optimizer = optimizer_of(net, symmetry, options, apart)
    for t in range(2 + options.get("update_every", 1)):
        for p in net.parameters():
            p.grad = torch.empty_like(p)
        with watched(monkeypatch) as seen:
            optimizer.step()
        assert t < 1 or seen == []


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("options", [
    {"corrected": True}, {"corrected": True, "divergence": "kl"}, {"roots": "eigh"},
], ids=str)  # fmt: skip
def test_between_renewals_nothing_is_made_of_lists_either(
    options: dict[str, Any], apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings that need eigenvalues at the first step, and so have no meta tensors; one parameter comes later."""
    net = nn.ModuleList([deep(2), deep(2)])
    optimizer = optimizer_of(net, presets.shampoo, options | {"update_every": 6}, apart)
    for t in range(4):
        for i, p in enumerate(net.parameters()):
            p.grad = draw(*p.shape, seed=10 * t + i)
        with watched(monkeypatch) as seen:
            optimizer.step()
        assert (seen == []) == (t > 0)


def test_the_watch_sees_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(3, device="meta")
    for traffic in (lambda: x.copy_(torch.ones(3)), lambda: torch.ones(3).to("meta"),
                    lambda: torch.tensor([1.0, 2.0], device="meta"), lambda: float(torch.ones(()))):
        with watched(monkeypatch) as seen:
            traffic()
        assert seen
    with watched(monkeypatch), pytest.raises(RuntimeError, match="meta"):
        float(x.sum())
    with watched(monkeypatch) as seen:
        (2.0 * x).sum()
    assert seen == []


def test_balancing_is_the_same_whether_it_asks_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device is not asked whether a pair is deficient: what it would then need is computed, and not taken."""
    g, h = (torch.randn(4, n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (7, 5))
    whole = balance(g, h)
    g[2, :, 1] = 0.0
    mixed = balance(g, h)  # here the rows for deficient pairs are computed for all
    assert mixed.deficient.tolist() == [False, False, True, False]
    kept = torch.tensor([0, 1, 3])
    assert all(torch.equal(a[kept], b[kept]) for a, b in zip(mixed, whole))
    assert balance(g.to("meta"), h.to("meta")).gauge.shape == (4, 3, 3)
