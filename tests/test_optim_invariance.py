"""Whole trajectories of the optimizer move along with the symmetry; AdamW's do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from symgeo import Symmetry
from symgeo.functional import functional_loss
from symgeo.groups import Cyclic, GeneralLinear, Orthogonal, Permutation, PositiveScaling, SignFlip
from symgeo.models.tiny_lm import TinyLM
from symgeo.optim import SymO, presets

TOLERANCE = 1e-8
Params = dict[str, Tensor]
Make = Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


SHAPES = {"up": (7, 3), "bias": (7,), "down": (5, 7), "mix": (7, 7)}
TENSORS = {"up": "h _", "bias": "h", "down": "_ h", "mix": "h h"}
CASES = {
    "permutation": Symmetry(TENSORS, {"h": Permutation()}),
    "signs": Symmetry(TENSORS, {"h": SignFlip()}),
    "orthogonal": Symmetry(TENSORS, {"h": Orthogonal()}),
    "signed permutation": Symmetry(
        {name: pattern.replace("h", "(h s)") for name, pattern in TENSORS.items()},
        {"h": Permutation(), "s": SignFlip(per="h")}, {"s": 1}),
    "cyclic": Symmetry(TENSORS, {"h": Cyclic()}),
}


def follow(make: Make, start: Params, gradients: list[Params]) -> Params:
    params = [(name, nn.Parameter(x.clone())) for name, x in start.items()]
    optimizer = make(params)
    for gradient in gradients:
        for name, p in params:
            p.grad = gradient[name].clone()
        optimizer.step()
    return {name: p.detach() for name, p in params}


def equivariance(make: Make, move: Callable[[Params], Params]) -> float:
    """How far the moved end is from the end of the moved run, relative to the way."""
    start = {name: draw(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
    gradients = [{name: draw(*shape, seed=10 * t + i) for i, (name, shape) in enumerate(SHAPES.items())}
                 for t in range(1, 6)]  # fmt: skip
    end = follow(make, start, gradients)
    there = follow(make, move(start), [move(g) for g in gradients])
    expected = move(end)
    way = max(float((end[name] - start[name]).abs().max()) for name in SHAPES)
    assert way > 1e-3
    return max(float((there[name] - expected[name]).abs().max()) for name in SHAPES) / way


@pytest.mark.parametrize("trivial", ["diagonal", "dense"])
@pytest.mark.parametrize("estimator", ["gradient", "riccati", "secant"])
@pytest.mark.parametrize("name", CASES)
def test_every_estimator_steps_equivariantly(name: str, estimator: str, trivial: str) -> None:
    symmetry = CASES[name]
    start = {key: draw(*shape, seed=1) for key, shape in SHAPES.items()}
    action = symmetry.bind(start)
    element = action.random(generator(7))

    def make(params: list[tuple[str, nn.Parameter]]) -> SymO:
        return SymO(params, symmetry, lr=0.03, betas=(0.8, 0.9), estimator=estimator, trivial=trivial, damping=1e-3,
                    weight_decay=0.1, update_every=2)  # fmt: skip

    assert equivariance(make, lambda params: action.act(element, params)) < TOLERANCE
    outside = Symmetry(TENSORS, {"h": Orthogonal()}).bind(start)
    stranger = outside.random(generator(8))
    control = make if name != "orthogonal" else lambda params: torch.optim.AdamW([p for _, p in params], lr=0.03)
    assert equivariance(control, lambda params: outside.act(stranger, params)) > 1e-3


RANK, STEPS = 3, 20


def lora_run(make: Make, start: Params) -> Params:
    """Twenty steps of a regression on B A."""
    x, y = draw(17, 7, seed=1), draw(17, 5, seed=2)
    base = draw(5, 7, seed=3)
    params = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    optimizer = make(list(params.items()))
    for t in range(STEPS):
        optimizer.zero_grad()
        rows = slice(0, 17) if t % 2 else slice(3, 14)
        out = x[rows] @ (base + params["lora_B"] @ params["lora_A"]).T
        (torch.tanh(out) - y[rows]).square().mean().backward()
        optimizer.step()
    return {name: p.detach() for name, p in params.items()}


def product(params: Params) -> Tensor:
    return params["lora_B"] @ params["lora_A"]


def lora_spread(make: Make, start: Params) -> float:
    m = draw(RANK, RANK, seed=9) + 0.5 * torch.eye(RANK).double()
    moved = {"lora_B": start["lora_B"] @ m, "lora_A": torch.linalg.solve(m, start["lora_A"])}
    ends = [product(lora_run(make, point)) for point in (start, moved)]
    way = (ends[0] - product(start)).norm()
    assert way > 1e-3
    return float((ends[1] - ends[0]).norm() / way)


def lora_symmetry() -> Symmetry:
    net = nn.ParameterDict({"lora_A": torch.zeros(RANK, 7), "lora_B": torch.zeros(5, RANK)})
    return presets.lora(net)


LORA_STARTS = {
    "generic": {"lora_B": draw(5, RANK, seed=4), "lora_A": draw(RANK, 7, seed=5)},
    "B = 0": {"lora_B": torch.zeros(5, RANK).double(), "lora_A": draw(RANK, 7, seed=5)},
    "A = 0": {"lora_B": draw(5, RANK, seed=4), "lora_A": torch.zeros(RANK, 7).double()},
    "B of rank one": {"lora_B": draw(5, 1, seed=4) @ draw(1, RANK, seed=6), "lora_A": draw(RANK, 7, seed=5)},
}


@pytest.mark.parametrize("options", [
    {}, {"betas": (0.9, 0.9), "weight_decay": 0.1, "nesterov": True}, {"update_every": 3, "graft": "sgd"},
    {"estimator": "riccati", "damping": 1e-2},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("start", LORA_STARTS)
def test_lora_trajectories_do_not_depend_on_the_factors(start: str, options: dict[str, Any]) -> None:
    def make(params: list[tuple[str, nn.Parameter]]) -> SymO:
        return SymO(params, lora_symmetry(), lr=0.02, compact=True, **options)

    assert lora_spread(make, LORA_STARTS[start]) < TOLERANCE
    assert lora_spread(lambda params: torch.optim.AdamW([p for _, p in params], lr=0.02), LORA_STARTS[start]) > 1e-3


def test_rows_of_factors_under_one_orthogonal_group() -> None:
    """GL(r) alone: full matrices on the long axes."""
    symmetry = Symmetry({"lora_B": "_ r", "lora_A": "r* _"}, {"r": GeneralLinear()})
    start = LORA_STARTS["generic"]
    assert lora_spread(lambda params: SymO(params, symmetry, lr=0.02, compact=True), start) < TOLERANCE


def language_model(seed: int = 0) -> TinyLM:
    lm = TinyLM(vocabulary=11, context=5, width=6, depth=2, heads=2, mlp_width=7).double()
    for i, p in enumerate(lm.parameters()):
        p.data += 0.3 * draw(*p.shape, seed=seed + i)
    return lm


def train(lm: TinyLM, start: Params, make: Make, steps: int = 10) -> Params:
    lm.load_state_dict(start)
    optimizer = make(list(lm.named_parameters()))
    for t in range(steps):
        symbols = torch.randint(0, 11, (3, 6), generator=generator(t))
        optimizer.zero_grad()
        nn.functional.cross_entropy(lm(symbols[:, :-1]).flatten(0, 1), symbols[:, 1:].flatten()).backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in lm.named_parameters()}


def model_spread(symmetry: Symmetry, make: Make) -> float:
    lm = language_model()
    start = {name: p.detach().clone() for name, p in lm.named_parameters()}
    symmetry = Symmetry(symmetry.tensors, symmetry.groups, symmetry.sizes)
    action = symmetry.bind(start)
    element = action.random(generator(3))
    moved = action.act(element, start)
    assert max(float((moved[name] - x).abs().max()) for name, x in start.items()) > 0.1
    end, there = train(lm, start, make), train(lm, moved, make)
    expected = action.act(element, end)
    way = max(float((end[name] - start[name]).abs().max()) for name in start)
    return max(float((there[name] - expected[name]).abs().max()) for name in start) / way


def test_attention_trajectories_do_not_depend_on_the_bases_of_heads() -> None:
    symmetry = presets.attention(language_model())

    def make(params: list[tuple[str, nn.Parameter]]) -> SymO:
        return SymO(params, symmetry, lr=0.01, compact=True)

    assert model_spread(symmetry, make) < TOLERANCE
    assert model_spread(symmetry, lambda params: torch.optim.AdamW([p for _, p in params], lr=0.01)) > 1e-3


@pytest.mark.parametrize("scaled", [False, True])
def test_mlp_trajectories_move_with_hidden_units(scaled: bool) -> None:
    """relu: permutations and, in the balanced gauge, positive scalings of the units."""
    net = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    symmetry = presets.mlp(net, scaled=scaled)
    start = {name: draw(*p.shape, seed=i) for i, (name, p) in enumerate(net.named_parameters())}
    loss = functional_loss(net, nn.functional.mse_loss)
    batch = draw(13, 3, seed=50), draw(13, 2, seed=51)
    action = symmetry.bind(start)
    moved = action.act(action.random(generator(4)), start)
    assert abs(loss(moved, batch) - loss(start, batch)) < 1e-10

    def run(point: Params, make: Make) -> list[float]:
        params = {name: nn.Parameter(x.clone()) for name, x in point.items()}
        optimizer, values = make(list(params.items())), []
        for _ in range(10):
            optimizer.zero_grad()
            value = loss(params, batch)
            value.backward()
            values.append(value.item())
            optimizer.step()
        return values

    def spread(make: Make) -> float:
        a, b = run(start, make), run(moved, make)
        assert abs(a[-1] - a[0]) > 1e-2
        return max(abs(x - y) for x, y in zip(a, b)) / max(a)

    assert spread(lambda params: SymO(params, symmetry, lr=0.01, compact=scaled)) < TOLERANCE
    if scaled:
        assert spread(lambda params: torch.optim.AdamW([p for _, p in params], lr=0.01)) > 1e-3


def test_scaling_is_refused_without_compact() -> None:
    w = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="compact=True"):
        SymO([("w", w)], Symmetry({"w": "h"}, {"h": PositiveScaling()}), lr=0.1)
