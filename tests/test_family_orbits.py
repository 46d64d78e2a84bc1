"""Geodesic sharpness, the covariant Hessian and merging take the symmetry of every family; the first two do not change
along the orbits of the groups that the manifold quotients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import params_of
from torch import Tensor
from zoo import ZOO, Case

from symgeo import (
    ParameterManifold,
    Symmetry,
    adaptive_sharpness,
    euclidean_sharpness,
    find_symmetry,
    geodesic_sharpness,
)
from symgeo.functional import Params
from symgeo.groups import GeneralLinear, Rotary
from symgeo.hessian import riemannian_hessian
from symgeo.merge import merge_models
from symgeo.models.precision import full_double

FAMILIES = ("BERT classifier", "GPT-2", "GPT-NeoX", "Phi", "LLaMA", "Mixtral", "Qwen3", "Gemma 2", "OLMo 2", "OPT",
            "BLOOM", "T5 encoder", "ViT classifier", "CLIP text")
MERGED = ("GPT-2", "LLaMA", "Gemma 2", "Mixtral", "T5 encoder", "ViT classifier", "OPT", "BLOOM")
#: their activation has no second derivative in torch
ONCE = ("BLOOM",)


def loss_of(case: Case) -> tuple[Any, Any]:
    """The squared distance of the outputs from random ones, on the first batch."""
    call = case.calls[0]
    target = case.read(case.model(**call)).detach() + 0.3

    def loss(params: Params, batch: dict[str, Any]) -> Tensor:
        return (case.read(torch.func.functional_call(case.model, params, (), batch)) - target).square().mean()

    return loss, [call]


def pair_orbit(symmetry: Symmetry, params: Params, seed: int = 1) -> Params:
    """The product of five random elements of the groups of factor pairs."""
    action = symmetry.bind(params)
    pairs = [name for name, group in action.groups.items() if isinstance(group, GeneralLinear | Rotary)]
    generator, moved = torch.Generator().manual_seed(seed), params
    for _ in range(5):
        moved = action.act(action.random(generator, only=pairs), moved)
    length = sum(float(p.square().sum()) for p in params.values()) ** 0.5
    assert sum(float((moved[k] - p).square().sum()) for k, p in params.items()) ** 0.5 > 0.05 * length
    return moved


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_sharpness_and_curvature_along_the_orbit(name: str) -> None:
    case = ZOO[name]()
    with full_double():
        symmetry, params = find_symmetry(case.model), params_of(case.model)
        (loss, batches), moved = loss_of(case), pair_orbit(symmetry, params)
        assert float(loss(moved, batches[0])) == pytest.approx(float(loss(params, batches[0])), rel=1e-9)
        values, controls, tops = [], [], []
        for point in (params, moved):
            manifold = ParameterManifold(point, symmetry)
            values.append(geodesic_sharpness(loss, point, batches, manifold, 0.2, steps=3).value)
            controls.append([measure(loss, point, batches, 0.2, steps=3).value
                             for measure in (euclidean_sharpness, adaptive_sharpness)])
            if name not in ONCE:
                tops.append(float(riemannian_hessian(loss, point, batches, manifold).eigvalsh(1, tol=1e-8)))
    assert values[0] > 0 and values[1] == pytest.approx(values[0], rel=1e-6)
    assert len(tops) == 0 or tops[1] == pytest.approx(tops[0], rel=1e-6)
    assert max(abs(after / before - 1) for before, after in zip(*controls)) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", MERGED)
def test_merging_a_model_with_its_own_orbit(name: str) -> None:
    """The mean on the quotient of a network and of the same one in other gauges computes what it computes."""
    case = ZOO[name]()
    with full_double():
        symmetry, params = find_symmetry(case.model), params_of(case.model)
        moved = pair_orbit(symmetry, params)
        merged = merge_models([params, moved], symmetry=symmetry)
        f = case.function()
        reference, found, mean = (torch.cat([x.reshape(-1) for x in f(p)]) for p in (
            params, merged, {key: 0.5 * (p + moved[key]) for key, p in params.items()}))
    assert (found - reference).abs().max() < 1e-7 * reference.abs().max()
    assert (mean - reference).abs().max() > 1e-2 * reference.abs().max()
