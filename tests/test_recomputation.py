"""Activation checkpoints compute parts of a model again in the backward pass: with the right parameters, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hessian_cases import error, flat, normal
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from symgeo import ParameterManifold, functional_loss, geodesic_sharpness, in_place_sharpness
from symgeo.functional import Params, recomputable
from symgeo.hessian import euclidean_hessian, ggn, model_loss, riemannian_hessian


class Checkpointed(nn.Module):
    """Two layers, of which one is computed again; it says so as modules of transformers do, unless told not to."""

    def __init__(self, again: bool, says: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
        self.again, self.gradient_checkpointing = again, again and says
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))

    def forward(self, x: Tensor) -> Tensor:
        inner = lambda x: self.first(x).tanh() ** 2  # noqa: E731
        hidden = checkpoint(inner, x, use_reentrant=False) if self.again else inner(x)
        return self.second(hidden)


BATCH = (normal(5, 3), normal(5, 2, seed=1))


def point() -> Params:
    """Not what the modules themselves hold."""
    return {name: 1.5 * p.detach() for name, p in Checkpointed(False).named_parameters()}


def loss_of(model: nn.Module) -> Any:
    return functional_loss(model, nn.functional.mse_loss)


def gradient(model: nn.Module) -> Tensor:
    leaves = {name: p.requires_grad_() for name, p in point().items()}
    return flat(dict(zip(leaves, torch.autograd.grad(loss_of(model)(leaves, BATCH), list(leaves.values())))))


def test_gradients_are_right_in_a_block_and_refused_outside() -> None:
    expected = gradient(Checkpointed(False))
    with pytest.raises(ValueError, match="module 'Checkpointed' has activation checkpoints"):
        gradient(Checkpointed(True))
    unsaid = Checkpointed(True, says=False)
    assert error(gradient(unsaid), expected) > 0.1  # torch itself: the control
    for model in (Checkpointed(True), unsaid):
        own = [p.clone() for p in model.parameters()]
        with recomputable():
            assert error(gradient(model), expected) < 1e-14
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), own))
        assert all(isinstance(p, nn.Parameter) for p in model.parameters())
    with torch.no_grad():  # without a backward pass nothing is computed again
        assert loss_of(Checkpointed(True))(point(), BATCH) == loss_of(Checkpointed(False))(point(), BATCH)


def test_a_tied_weight_is_held_in_all_its_places() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Tanh(), nn.Linear(2, 2, bias=False)).double()
    model[2].weight = model[0].weight
    new = {"0.weight": normal(2, 2, seed=5)}
    batch = (normal(4, 2), normal(4, 2, seed=1))
    with torch.no_grad(), recomputable():
        assert loss_of(model)(new, batch) == ((batch[0] @ new["0.weight"].T).tanh() @ new["0.weight"].T
                                              - batch[1]).square().mean()
    assert model[2].weight is model[0].weight and model[0].weight is dict(model.named_parameters())["0.weight"]
    with pytest.raises(ValueError, match="Sequential has no parameter 'nowhere'"), recomputable():
        loss_of(model)({"nowhere": new["0.weight"]}, batch)


@pytest.mark.parametrize("says", [True, False])
def test_curvature_and_sharpness_are_those_without_checkpoints(says: bool) -> None:
    plain, again, params = Checkpointed(False), Checkpointed(True, says), point()
    manifold = ParameterManifold(params)
    for maker in (lambda loss: euclidean_hessian(loss, params, [BATCH]),
                  lambda loss: riemannian_hessian(loss, params, [BATCH], manifold)):
        expected, found = (maker(loss_of(model)) for model in (plain, again))
        assert error(found.dense(), expected.dense()) < 1e-12
    values = [geodesic_sharpness(loss_of(model), params, [BATCH], manifold, 0.1, 5).value for model in (plain, again)]
    assert values[1] == pytest.approx(values[0], rel=1e-12)
    own = [in_place_sharpness(model, [BATCH], 0.1, criterion=nn.functional.mse_loss, steps=5).value
           for model in (plain, again)]
    assert own[1] == pytest.approx(own[0], rel=1e-12) and abs(own[0] / values[0] - 1) > 0.01


class Silent(torch.autograd.Function):
    """x^3 with a backward pass that autograd does not see, as those of fused kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        with torch.no_grad():
            return slope * 3 * ctx.saved_tensors[0] ** 2


def test_second_derivatives_that_get_lost_are_noticed() -> None:
    def loss(params: Params, batch: Any) -> Tensor:
        return checkpoint(lambda w: Silent.apply(w).sum() + w.pow(4).sum(), params["w"], use_reentrant=False)

    with pytest.raises(ValueError, match="not seen by autograd"):
        euclidean_hessian(loss, {"w": normal(3)}, [None])


def test_gauss_newton_says_what_to_switch_off() -> None:
    with pytest.raises(ValueError, match="activation checkpoints.*switch them off"):
        ggn(model_loss(Checkpointed(True), "mse"), point(), [BATCH])
