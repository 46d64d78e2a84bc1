"""SymO as a torch.optim.Optimizer: state, groups, schedulers, gradients of every kind."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from symgeo import Symmetry
from symgeo.groups import Cyclic, Orthogonal, Permutation, SignFlip
from symgeo.optim import SymO, presets


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 5)).to(dtype)
    for i, p in enumerate(net.parameters()):
        p.data = draw(*p.shape, seed=i).to(dtype)
    return net


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(net: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for t in range(first, last):
        for i, p in enumerate(net.parameters()):
            p.grad = draw(*p.shape, seed=100 * t + i).to(p.dtype)
        optimizer.step()


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b))


def cyclic(net: nn.Module) -> Symmetry:
    return Symmetry({"0.weight": "c _", "0.bias": "c", "2.weight": "_ c"}, {"c": Cyclic()})


MAKERS: dict[str, Callable[[nn.Module], SymO]] = {
    "muon": lambda net: SymO(net.named_parameters(), presets.muon(net), lr=0.02, update_every=3),
    "muon without memory": lambda net: SymO(net.named_parameters(), presets.muon(net), lr=0.02, betas=(0.9, 0.0)),
    "adam": lambda net: SymO(net.named_parameters(), presets.adam(net), lr=0.02, nesterov=True),
    "shampoo": lambda net: SymO(net.named_parameters(), presets.shampoo(net), lr=0.02, update_every=2, graft="adam"),
    "kl": lambda net: SymO(net.named_parameters(), presets.shampoo(net), lr=0.02, power=1.0, divergence="kl"),
    "mlp": lambda net: SymO(net.named_parameters(), presets.mlp(net), lr=0.02, rest_lr=0.01, weight_decay=0.1),
    "dense": lambda net: SymO(net.named_parameters(), presets.mlp(net), lr=0.02, trivial="dense", update_every=2),
    "secant": lambda net: SymO(net.named_parameters(), presets.mlp(net), lr=0.02, estimator="secant", update_every=2),
    "riccati": lambda net: SymO(net.named_parameters(), presets.mlp(net), lr=0.02, estimator="riccati"),
    "group": lambda net: SymO(net.named_parameters(), presets.muon(net), lr=0.02, roots="group", power=1.0),
    "newton": lambda net: SymO(net.named_parameters(), presets.muon(net), lr=0.02, roots="newton", update_every=2),
    "cyclic": lambda net: SymO(net.named_parameters(), cyclic(net), lr=0.02, update_every=2),
}


@pytest.mark.parametrize("name", MAKERS)
def test_resume_is_the_uninterrupted_run_to_the_last_bit(name: str) -> None:
    net = network()
    optimizer = MAKERS[name](net)
    run(net, optimizer, 0, 4)
    file = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    run(net, optimizer, 4, 9)

    other = network()
    other.load_state_dict(saved["model"])
    resumed = MAKERS[name](other)
    resumed.load_state_dict(state_dict=saved["optimizer"])
    for before, after in zip(saved["optimizer"]["state"].values(), resumed.state_dict()["state"].values()):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) if isinstance(before[k], Tensor) else before[k] == after[k]
                   for k in before)  # fmt: skip
    run(other, resumed, 4, 9)
    assert same(weights(net), weights(other))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("name", ["muon", "shampoo", "cyclic"])
def test_copies_go_on_alike_and_alone(name: str, copied: Callable[[Any], Any]) -> None:
    net = network()
    optimizer = MAKERS[name](net)
    run(net, optimizer, 0, 4)
    twin, other = copied((net, optimizer))
    assert all(a is b for a, b in zip(twin.parameters(), (p for g in other.param_groups for p in g["params"])))
    run(twin, other, 4, 7)
    assert not same(weights(net), weights(twin))
    run(net, optimizer, 4, 7)
    assert same(weights(net), weights(twin))


def test_a_loaded_state_is_a_copy() -> None:
    net, other = network(), network()
    one, two = MAKERS["muon"](net), MAKERS["muon"](other)
    run(net, one, 0, 2)
    two.load_state_dict(one.state_dict())
    kept = copy.deepcopy(one.state_dict()["state"])
    run(other, two, 2, 5)
    for entry, old in zip(one.state_dict()["state"].values(), kept.values()):
        assert all(torch.equal(entry[k], old[k]) for k in old if isinstance(old[k], Tensor))


def test_state_is_under_the_parameters_with_their_shapes() -> None:
    net = network()
    optimizer = MAKERS["shampoo"](net)
    run(net, optimizer, 0, 1)
    for p in net.parameters():
        assert optimizer.state[p]["exp_avg"].shape == p.shape == optimizer.state[p]["exp_avg_sq"].shape
    assert {type(v) for state in optimizer.state.values() for v in state.values()} <= {Tensor, int}


def test_groups_override_rates_betas_and_decay() -> None:
    """Each of two groups moves as in an optimizer of its own (damping 0: the blocks do not know of each other)."""
    options = {"lr": 0.05, "betas": (0.3, 0.9), "weight_decay": 0.2}

    def groups(net: nn.Module) -> tuple[list[Any], list[Any]]:
        named = list(net.named_parameters())
        return named[:2], named[2:]

    whole, part, rest = network(torch.float64), network(torch.float64), network(torch.float64)
    first, second = groups(whole)
    joint = SymO([{"params": first, **options}, {"params": second}], presets.muon(whole), lr=0.01, damping=0.0)
    exclude = [name for name, _ in groups(part)[1]]
    alone = SymO(groups(part)[0], presets.muon(part, exclude=exclude), damping=0.0, **options)
    other = SymO(groups(rest)[1], presets.muon(rest, exclude=["0"]), lr=0.01, damping=0.0)
    for net, optimizer in ((whole, joint), (part, alone), (rest, other)):
        run(net, optimizer, 0, 5)
    expected = weights(part)[:2] + weights(rest)[2:]
    assert all(torch.allclose(a, b, rtol=0, atol=1e-10) for a, b in zip(weights(whole), expected))


def test_statistics_that_are_shared_need_one_beta() -> None:
    net = network()
    named = list(net.named_parameters())
    optimizer = SymO([{"params": named[:2], "betas": (0.9, 0.5)}, {"params": named[2:]}], presets.mlp(net), lr=0.01)
    with pytest.raises(ValueError, match=r"betas\[1\]: parameters '0.weight' and '2.weight' share"):
        run(net, optimizer, 0, 1)


def test_scheduler_keeps_the_ratio_of_the_rest() -> None:
    net = network()
    optimizer = SymO(net.named_parameters(), presets.muon(net), lr=0.02, rest_lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.0 if t == 0 else 0.5)
    before = weights(net)
    run(net, optimizer, 0, 1)
    assert same(weights(net), before)  # warm-up from nothing
    scheduler.step()
    run(net, optimizer, 1, 2)
    bias = weights(net)[1] - before[1]
    assert 0.002 < float(bias.abs().mean()) < 0.008  # Adam's steps are about 0.5 * 0.01
    assert optimizer.param_groups[0]["rest_lr"] == 0.01


def test_add_param_group_keeps_what_it_knew() -> None:
    net, other = network(torch.float64), network(torch.float64)
    late, symmetry = nn.Parameter(draw(3, 5, seed=1).double()), presets.muon(net)
    optimizer, control = (SymO(n.named_parameters(), symmetry, lr=0.02) for n in (net, other))
    run(net, optimizer, 0, 3)
    run(other, control, 0, 3)
    optimizer.add_param_group({"params": [("late", late)], "lr": 0.5})
    late.grad = torch.ones_like(late)
    start = late.detach().clone()
    run(net, optimizer, 3, 6)
    run(other, control, 3, 6)
    assert same(weights(net), weights(other))
    assert torch.allclose(late.detach(), start - 1.5, atol=1e-6)  # AdamW under a constant gradient
    with pytest.raises(ValueError, match="with/without names"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(ValueError, match="'late' is given more than once"):
        optimizer.add_param_group({"params": [("late", nn.Parameter(torch.ones(2)))]})
    assert len(optimizer.param_groups) == 2


def test_a_new_copy_of_a_kind_starts_its_statistics_anew() -> None:
    symmetry = Symmetry({"w": "_ h"}, {"h": Orthogonal()}).each("layers.*", shared=["h"])
    params = [nn.Parameter(draw(2, 5, seed=i).double()) for i in range(2)]
    optimizer = SymO([("layers.0.w", params[0])], symmetry, lr=0.1, betas=(0.0, 0.9), damping=0.0)
    for t in range(3):
        params[0].grad = draw(2, 5, seed=t).double()
        optimizer.step()
    optimizer.add_param_group({"params": [("layers.1.w", params[1])]})
    before = params[1].detach().clone()
    grads = [draw(2, 5, seed=40 + i).double() for i in range(2)]
    for p, g in zip(params, grads):
        p.grad = g
    optimizer.step()
    u, _, v = torch.linalg.svd(torch.cat(grads), full_matrices=False)  # both layers share h: 4 copies, one gradient
    assert torch.allclose(before - params[1].detach(), 0.1 * 5**0.5 * (u @ v)[2:], atol=1e-10)


def test_closure_and_gradients_of_none() -> None:
    net = network()
    optimizer = SymO(net.named_parameters(), presets.muon(net), lr=0.02, weight_decay=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = net(draw(4, 3, seed=3)).square().mean()
        value.backward()
        return value

    losses = [optimizer.step(closure) for _ in range(20)]
    values = [loss.detach() for loss in losses if isinstance(loss, Tensor)]
    assert values[-1] < values[0]
    still = net[2].weight.detach().clone()
    averages = optimizer.state[net[2].weight]["exp_avg"].clone()
    net[2].weight.grad = None
    optimizer.step()
    assert torch.equal(net[2].weight.detach(), still)
    assert torch.allclose(optimizer.state[net[2].weight]["exp_avg"], 0.9 * averages)


@pytest.mark.parametrize("name", MAKERS)
def test_zero_gradients_move_nothing(name: str) -> None:
    net = network()
    optimizer = MAKERS[name](net)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    before = weights(net)
    for _ in range(3):
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert same(weights(net), before)
    run(net, optimizer, 0, 2)
    assert all(bool(torch.isfinite(p).all()) for p in net.parameters())


@pytest.mark.parametrize("name", MAKERS)
def test_half_precision_parameters_have_full_precision_state(name: str) -> None:
    net = network(torch.bfloat16)
    before = weights(net)
    optimizer = MAKERS[name](net)
    run(net, optimizer, 0, 3)
    assert all(p.dtype == torch.bfloat16 and bool(torch.isfinite(p).all()) for p in net.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, weights(net)))
    kept = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    needed = {torch.float32, torch.float64} if name in ("secant", "riccati") else {torch.float32}
    assert kept and {v.dtype for v in kept} == needed
    other = network(torch.bfloat16)
    resumed = MAKERS[name](other)
    resumed.load_state_dict(optimizer.state_dict())
    again = [v for state in resumed.state.values() for v in state.values() if isinstance(v, Tensor)]
    assert {v.dtype for v in again} == needed


def test_learning_rates_as_tensors_and_zero() -> None:
    nets = [network() for _ in range(3)]
    rates: list[float | Tensor] = [0.02, torch.tensor(0.02), 0.0]
    for net, lr in zip(nets, rates):
        run(net, SymO(net.named_parameters(), presets.muon(net), lr=lr, weight_decay=0.1), 0, 3)
    for a, b in zip(weights(nets[0]), weights(nets[1])):
        assert torch.allclose(a, b, atol=1e-6)
    assert same(weights(nets[2]), weights(network()))


def test_frozen_parameters_stay() -> None:
    net = network()
    net[0].weight.requires_grad_(False)
    symmetry = Symmetry(presets.mlp(network()).tensors, presets.mlp(network()).groups, frozen=["0.weight"])
    optimizer = SymO(net.named_parameters(), symmetry, lr=0.02)
    before = weights(net)
    for t in range(2):
        for i, p in enumerate(net.parameters()):
            p.grad = draw(*p.shape, seed=t + i) if p.requires_grad else None
        optimizer.step()
    assert torch.equal(before[0], net[0].weight)
    assert not torch.equal(before[2], net[2].weight)


def test_names_come_from_the_optimizer_not_from_the_checkpoint() -> None:
    net, other = network(), nn.ModuleDict({"module": network()})
    optimizer = SymO(other.named_parameters(), presets.muon(other), lr=0.02)
    run(other, optimizer, 0, 2)
    resumed = SymO(net.named_parameters(), presets.muon(net), lr=0.02)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.param_groups[0]["param_names"] == [name for name, _ in net.named_parameters()]


def test_signs_of_one_unit_are_one_number() -> None:
    """(h s): momentum and one second moment for each unit's row."""
    net = network()
    symmetry = presets.mlp(net, signed=True)
    assert symmetry.groups["s0[0]"] == SignFlip(per="h0[0]")
    assert symmetry.groups["h0[0]"] == Permutation()
    optimizer = SymO(net.named_parameters(), symmetry, lr=0.02)
    run(net, optimizer, 0, 2)
