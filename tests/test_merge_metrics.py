"""The Fisher diagonal that Adam leaves behind, as a metric for merging."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from symgeo.merge.metrics import DiagonalMetric


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def change(x: Tensor, y: Tensor) -> float:
    assert x.shape == y.shape and bool(torch.isfinite(x).all() and torch.isfinite(y).all())
    return float((x - y).norm() / y.norm())


def logistic(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, a weight, and labels drawn from the model itself, so that the Fisher diagonal is known."""
    generator = torch.Generator().manual_seed(seed)
    inputs, weight = draw(generator, count, 5), 0.5 * draw(generator, 5)
    labels = torch.bernoulli(torch.sigmoid(inputs @ weight), generator=generator)
    return inputs, weight, labels


def test_the_fisher_diagonal_of_a_logistic_regression():
    count, batch_size, generator = 4000, 16, torch.Generator().manual_seed(0)
    inputs, weight, labels = logistic(count, 1)
    parameter = weight.clone().requires_grad_()
    optimizer = torch.optim.Adam([("weight", parameter)], lr=0.0, betas=(0.9, 0.9999))
    for _ in range(3000):
        rows = torch.randint(count, (batch_size,), generator=generator)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(inputs[rows] @ parameter, labels[rows])
        (parameter.grad,) = torch.autograd.grad(loss, parameter)
        optimizer.step()
    found = DiagonalMetric.from_adam(optimizer, batch_size=batch_size)["weight"]
    chance = torch.sigmoid(inputs @ weight)
    fisher = (inputs.square() * (chance * (1 - chance)).unsqueeze(1)).mean(0)
    assert torch.equal(parameter.detach(), weight)
    assert float((found / fisher - 1).abs().max()) <= 0.1
    raw = batch_size * optimizer.state[parameter]["exp_avg_sq"]
    assert float((raw / fisher - 1).abs().max()) > 0.5  # without the correction of the bias


def trained(seed: int, **options) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Linear(5, 3).double()
    for p in model.parameters():
        p.data = draw(generator, *p.shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), **options)
    for _ in range(7):
        optimizer.zero_grad()
        (model(draw(generator, 11, 5)) - draw(generator, 11, 3)).square().mean().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"foreach": True}])
def test_the_state_is_debiased(options):
    model, optimizer = trained(0, **options)
    found = DiagonalMetric.from_adam(optimizer, model.named_parameters(), batch_size=11)
    assert list(found) == ["weight", "bias"]
    for name, p in model.named_parameters():
        expected = 11 * optimizer.state[p]["exp_avg_sq"] / (1 - 0.95**7)
        assert change(found[name], expected) <= 1e-12
    unit = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    assert abs(float(found.inner(unit, unit)) - sum(float(f.sum()) for f in found.values())) <= 1e-12


def test_numbers_and_tensors_as_step_and_betas():
    model, optimizer = trained(0)
    expected = DiagonalMetric.from_adam(optimizer, dict(model.named_parameters()), batch_size=1)
    for p in model.parameters():
        optimizer.state[p]["step"] = 7
    optimizer.param_groups[0]["betas"] = tuple(torch.tensor(b, dtype=torch.float64) for b in (0.9, 0.95))
    found = DiagonalMetric.from_adam(optimizer, dict(model.named_parameters()), batch_size=1)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_common_factor_does_not_change_a_fisher_merge():
    runs = [trained(seed) for seed in range(3)]

    def merge(sizes: list[int]) -> Tensor:
        fishers = [DiagonalMetric.from_adam(o, m.named_parameters(), batch_size=s) for (m, o), s in zip(runs, sizes)]
        target = sum(f["weight"] * m.weight.detach() for f, (m, _) in zip(fishers, runs))
        return target / sum(f["weight"] for f in fishers)

    assert change(merge([7, 7, 7]), merge([1, 1, 1])) <= 1e-12
    assert change(merge([7, 1, 1]), merge([1, 1, 1])) > 1e-3


def test_what_is_missing_is_named():
    model, optimizer = trained(0)
    with pytest.raises(ValueError, match="does not know the names of its parameters"):
        DiagonalMetric.from_adam(optimizer, batch_size=1)
    with pytest.raises(ValueError, match="the optimizer does not hold 'other'"):
        DiagonalMetric.from_adam(optimizer, {"other": torch.zeros(2)}, batch_size=1)
    with pytest.raises(ValueError, match="needed at least one parameter"):
        DiagonalMetric.from_adam(optimizer, {}, batch_size=1)
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match="batch_size must be an integer >= 1"):
            DiagonalMetric.from_adam(optimizer, model.named_parameters(), batch_size=wrong)
    optimizer.state[model.bias]["step"] = torch.tensor(0.0)
    with pytest.raises(ValueError, match="'bias': needed at least one step"):
        DiagonalMetric.from_adam(optimizer, model.named_parameters(), batch_size=1)
    del optimizer.state[model.bias]["exp_avg_sq"]
    with pytest.raises(ValueError, match="'bias': needed the state and betas of Adam; exp_avg_sq missing"):
        DiagonalMetric.from_adam(optimizer, model.named_parameters(), batch_size=1)
    del optimizer.state[model.weight]
    with pytest.raises(ValueError, match="'weight' has no optimizer state"):
        DiagonalMetric.from_adam(optimizer, model.named_parameters(), batch_size=1)


def test_other_optimizers_are_refused():
    model = torch.nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(5)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="exp_avg_sq, step, betas missing, found momentum_buffer"):
        DiagonalMetric.from_adam(optimizer, model.named_parameters(), batch_size=1)


def test_a_diverged_state_is_refused():
    model, optimizer = trained(0)
    optimizer.state[model.weight]["exp_avg_sq"][0, 0] = math.nan
    with pytest.raises(ValueError, match="'weight': exp_avg_sq has entries that are not finite"):
        DiagonalMetric.from_adam(optimizer, model.named_parameters(), batch_size=1)
