"""Parameters spread over processes: what needs them whole says so, and what to do, instead of failing inside torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from symgeo import ParameterManifold, Symmetry, count, geodesic_sharpness
from symgeo.curvature import estimate, orbit_average, orbit_mean, precondition
from symgeo.functional import Params
from symgeo.groups import GeneralLinear, Permutation
from symgeo.hessian import euclidean_hessian, geodesic_jet, invariant_hessian, riemannian_hessian
from symgeo.merge import align
from symgeo.symmetry import check

LORA = Symmetry({"B": "_ r", "A": "r* _"}, {"r": GeneralLinear()})
PERMUTATIONS = Symmetry({"B": "_ r", "A": "r _"}, {"r": Permutation()})


def loss(params: Params, batch: Any) -> Tensor:
    return (params["B"] @ params["A"]).square().sum()


@pytest.fixture(scope="module")
def plain() -> Params:
    generator = torch.Generator().manual_seed(0)
    return {"B": torch.randn(4, 2, generator=generator), "A": torch.randn(2, 3, generator=generator)}


@pytest.fixture(scope="module")
def sharded(plain: Params) -> Iterator[Params]:
    """The same, as the only process of a group holds them."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield {name: distribute_tensor(p, mesh, [Shard(0)]) for name, p in plain.items()}
    dist.destroy_process_group()


ENTRIES: dict[str, Callable[[Params, Params], Any]] = {
    "manifold": lambda p, x: ParameterManifold(x, LORA),
    "vector at a point": lambda p, x: ParameterManifold(p, LORA).horizontal(x, p),
    "vector": lambda p, x: ParameterManifold(p, LORA).inner(p, x, p),
    "chart": lambda p, x: ParameterManifold(p, LORA).chart(x),
    "sharpness": lambda p, x: geodesic_sharpness(loss, x, [None], ParameterManifold(p, LORA), 0.1, steps=2),
    "Hessian": lambda p, x: euclidean_hessian(loss, x, [None]),
    "covariant Hessian": lambda p, x: riemannian_hessian(loss, x, [None], ParameterManifold(p, LORA)),
    "Hessian in a metric": lambda p, x: invariant_hessian(loss, x, [None], ParameterManifold(p, LORA)),
    "jet": lambda p, x: geodesic_jet(loss, p, [None], ParameterManifold(p, LORA), x),
    "action": lambda p, x: (a := LORA.bind(p)).act(a.random(), x),
    "vertical vector": lambda p, x: (a := LORA.bind(p)).vertical(a.random_algebra(), x),
    "check": lambda p, x: check(LORA, lambda q: loss(q, None), x),
    "count": lambda p, x: count(LORA, lambda q: tuple(q["B"] @ q["A"] * c for c in (1.0, 2.0)), x),
    "estimate": lambda p, x: estimate(p, x, PERMUTATIONS),
    "precondition": lambda p, x: precondition(p, x, PERMUTATIONS),
    "average": lambda p, x: orbit_average(PERMUTATIONS, x),
    "mean": lambda p, x: orbit_mean(PERMUTATIONS, x),
    "align": lambda p, x: align(PERMUTATIONS, p, x),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_it_says_which_parameter_and_what_to_do(entry: str, plain: Params, sharded: Params) -> None:
    ENTRIES[entry](plain, plain)  # the control: whole tensors are taken
    with pytest.raises(ValueError, match=r"'[BA]' is sharded over processes, and needed whole; .*(gather|full_tensor)"):
        ENTRIES[entry](plain, sharded)
