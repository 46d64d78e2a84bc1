"""The networks and optimizers of the distributed tests, and what their processes say to each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from symgeo import Symmetry, groups
from symgeo.optim import SymO, presets

Make = Callable[..., SymO]
RECORD: dict[str, Any] = {}


class Net(nn.Module):
    """Layers of uneven widths, one of fewer rows than processes, and parameters that no preset names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.a, self.b, self.c = nn.Linear(6, 9), nn.Linear(9, 5), nn.Linear(5, 3, bias=False)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.relu(self.a(self.embedding(tokens)))))) * self.scale


UNITS = Symmetry(
    {"a.weight": "h _", "a.bias": "h", "b.weight": "k h*", "b.bias": "k", "c.weight": "_ k*"},
    {"h": groups.Permutation(), "k": groups.Permutation()},
)
PAIR = Symmetry(
    {"b.weight": "k _", "b.bias": "k", "c.weight": "_ k*", "a.weight": "h _"},
    {"k": groups.GeneralLinear(), "h": groups.Permutation()},
)


def maker(preset: Any, **options: Any) -> Make:
    def make(net: nn.Module, **more: Any) -> SymO:
        symmetry = preset if isinstance(preset, Symmetry) else preset(net)
        return SymO(net.named_parameters(), symmetry, lr=0.02, **options, **more)

    return make


MAKERS: dict[str, Make] = {
    "one side": maker(presets.muon, weight_decay=0.1),
    "one gradient": maker(presets.muon, betas=(0.95, 0.0), damping=0.0),
    "signs": maker(presets.adam),
    "pair": maker(presets.shampoo, graft="adam", update_every=3),
    "pair, kl": maker(presets.shampoo, power=1.0, divergence="kl"),
    "pair, corrected": maker(presets.shampoo, corrected=True, update_every=3),
    "permutations": maker(UNITS, nesterov=True),
    "permutations, dense": maker(UNITS, trivial="dense"),
    "permutations, corrected": maker(UNITS, corrected=True),
    "riccati": maker(presets.muon, estimator="riccati", damping=1e-2),
    "secant": maker(presets.muon, estimator="secant", damping=0.1),
    "root-free": maker(presets.muon, power=1.0, roots="group", damping=1e-2),
    "newton": maker(presets.muon, roots="newton"),
    "compact": maker(PAIR, compact=True),
}


#: those that four processes try: one, two and no owner for a matrix, and all ways to share a scale
FOUR = ("one side", "pair, kl", "pair, corrected", "permutations", "compact")


TRAINED = ("one side", "permutations")


def net_of(kind: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """The network and what its forward pass is called on: "alone", "ddp", "fsdp" or, on a mesh of two axes, "hsdp"."""
    torch.manual_seed(0)
    net = Net().to(dtype)
    if kind == "ddp":
        return net, DistributedDataParallel(net)
    if kind in ("fsdp", "hsdp"):
        mesh = None
        if kind == "hsdp":
            mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicas", "shards"))
        fully_shard(net.a, mesh=mesh)
        fully_shard(net, mesh=mesh)
    return net, net


def whole(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.full_tensor() if isinstance(p, DTensor) else p.detach().clone()
            for name, p in net.named_parameters()}


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    return max(float((found[name] - x).abs().max() / x.abs().max()) for name, x in wanted.items())


def give(net: nn.Module, step: int) -> None:
    """The same prescribed gradients to whole and to sharded parameters."""
    generator = torch.Generator().manual_seed(step)
    for p in net.parameters():
        g = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.grad = distribute_tensor(g, p.device_mesh, p.placements, src_data_rank=None) if isinstance(p, DTensor) else g


def walk(net: nn.Module, optimizer: SymO, steps: range) -> dict[str, Tensor]:
    """Steps with prescribed gradients."""
    for step in steps:
        give(net, step)
        optimizer.step()
    return whole(net)


def prescribed(kind: str, make: Make, steps: int = 4, **options: Any) -> dict[str, Tensor]:
    net, _ = net_of(kind)
    optimizer = make(net, **({"process_group": False} if kind == "alone" else {}), **options)
    return walk(net, optimizer, range(steps))


def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 11, (8,), generator=generator)
    return tokens, torch.randn(8, 3, generator=generator, dtype=torch.float64).to(dtype)


def share(x: Tensor) -> Tensor:
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def trained(kind: str, make: Make, dtype: torch.dtype, steps: int = 20, **options: Any) -> tuple[nn.Module, SymO]:
    net, model = net_of(kind, dtype)
    optimizer = make(net, **options)
    for step in range(steps):
        x, y = batch(step, dtype)
        if options.get("process_group") is not False or kind != "alone":
            x, y = share(x), share(y)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return net, optimizer


def same_everywhere(values: dict[str, Tensor]) -> bool:
    flat = torch.cat([x.double().reshape(-1) for x in values.values()])
    top, low = flat.clone(), flat.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX)
    dist.all_reduce(low, dist.ReduceOp.MIN)
    return torch.equal(top, low)


def said(action: Callable[[], Any]) -> list[str]:
    """What an action raises in every process."""
    text = ""
    try:
        action()
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    found: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(found, text)
    return found


def gathered(mine: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def states(model: nn.Module, optimizer: SymO) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
