"""What one process of a distributed test does; `tests/test_distributed.py` starts several and judges the record.

    torchrun --nproc_per_node=N tests/distributed_worker.py FOLDER
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import symgeo
from symgeo import Symmetry, groups, hessian
from symgeo.models.tiny_vit import TinyViT
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


def prescribed(kind: str, make: Make, steps: int = 4, **options: Any) -> dict[str, Tensor]:
    net, _ = net_of(kind)
    optimizer = make(net, **({"process_group": False} if kind == "alone" else {}), **options)
    for step in range(steps):
        give(net, step)
        optimizer.step()
    return whole(net)


def exact() -> None:
    """The same gradients on all processes: nothing but who computes what differs from one process."""
    four = dist.get_world_size() == 4
    kinds = ["ddp", "fsdp"] + ["hsdp"] * four
    for name, make in {name: MAKERS[name] for name in (FOUR if four else MAKERS)}.items():
        alone = prescribed("alone", make)
        RECORD[f"exact {name}"] = {kind: distance(prescribed(kind, make), alone) for kind in kinds}
    other = prescribed("ddp", maker(presets.muon, weight_decay=0.1, betas=(0.9, 0.98)))
    RECORD["exact control"] = distance(other, prescribed("alone", MAKERS["one side"]))


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


def training() -> None:
    for name in TRAINED[: 1 if dist.get_world_size() == 4 else 2]:
        for dtype in (torch.float32, torch.float64):
            alone = whole(trained("alone", MAKERS[name], dtype, process_group=False)[0])
            RECORD[f"training {name} {dtype}"] = {
                kind: distance(whole(trained(kind, MAKERS[name], dtype)[0]), alone) for kind in ("ddp", "fsdp")}
    control = whole(trained("ddp", MAKERS[name], torch.float64, steps=19)[0])
    RECORD["training control"] = distance(control, alone)


def same_everywhere(values: dict[str, Tensor]) -> bool:
    flat = torch.cat([x.double().reshape(-1) for x in values.values()])
    top, low = flat.clone(), flat.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX)
    dist.all_reduce(low, dist.ReduceOp.MIN)
    return torch.equal(top, low)


def without_gradients() -> None:
    """The last process has none, and takes part all the same."""
    alone = prescribed("alone", MAKERS["one side"], steps=2)
    found = {}
    for kind in ("ddp", "fsdp"):
        net, _ = net_of(kind)
        optimizer = MAKERS["one side"](net)
        for step in range(2):
            give(net, step)
            if kind == "ddp" and dist.get_rank() == dist.get_world_size() - 1:
                for p in net.parameters():
                    p.grad = None
            optimizer.step()
        found[kind] = distance(whole(net), alone)
    RECORD["without gradients"] = found
    net, _ = net_of("ddp")
    optimizer = MAKERS["one side"](net)
    give(net, 0)
    net.c.weight.grad = None  # nowhere: it stays
    before = net.c.weight.detach().clone()
    optimizer.step()
    RECORD["without any gradient"] = torch.equal(net.c.weight, before) and same_everywhere(whole(net))


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


def failures() -> None:
    net, _ = net_of("ddp")
    optimizer = MAKERS["one side"](net)
    give(net, 0)
    if dist.get_rank() == 1:
        net.a.weight.grad[0, 0] = float("nan")
    RECORD["a gradient that is not finite"] = said(optimizer.step)
    give(net, 0)
    optimizer.step()
    RECORD["after the failure"] = same_everywhere(whole(net))
    twin, _ = net_of("ddp")
    with torch.no_grad():
        twin.a.weight += dist.get_rank()
    other = MAKERS["one side"](twin)
    give(twin, 0)
    RECORD["replicas that differ"] = said(other.step)
    one = {f"w{dist.get_rank()}": nn.Parameter(torch.ones(2, 2))}
    RECORD["names that differ"] = said(lambda: SymO(one.items(), Symmetry({}, {}), lr=0.1))
    bare = nn.Linear(2, 2 + dist.get_rank())
    RECORD["parameters that differ"] = said(lambda: SymO(bare.named_parameters(), presets.muon(bare), lr=0.1))
    apart = SymO(bare.named_parameters(), presets.muon(bare), lr=0.1, process_group=False)
    bare(torch.ones(1, 2)).sum().backward()
    apart.step()


def states(model: nn.Module, optimizer: SymO) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def checkpoints(folder: Path) -> None:
    """Two processes save; four load and save again, which `test_distributed.py` loads in one."""
    for kind in ("ddp", "fsdp"):
        for name in ("pair", "permutations"):
            path = folder / f"{kind} {name}"
            if dist.get_world_size() == 2:
                net, optimizer = trained(kind, MAKERS[name], torch.float64, steps=4)
            else:
                net, _ = net_of(kind)
                optimizer = MAKERS[name](net)
                loaded = states(net, optimizer)
                dcp.load(loaded, checkpoint_id=path / "2")
                set_model_state_dict(net, loaded["model"])
                set_optimizer_state_dict(net, optimizer, loaded["optimizer"])
            dcp.save(states(net, optimizer), checkpoint_id=path / str(dist.get_world_size()))
            one = optimizer.consolidated_state_dict()
            if dist.get_rank() == 0:
                torch.save(one, path / f"{dist.get_world_size()}.pt")
            else:
                assert one is None
    again = MAKERS[name](net_of(kind)[0])
    one = torch.load(path / f"{dist.get_world_size()}.pt", weights_only=True)
    again.load_state_dict(one)  # that of one process, by all
    found = again.consolidated_state_dict()
    if found is not None:
        RECORD["one file for all"] = all(
            torch.equal(value, found["state"][i][key]) if isinstance(value, Tensor) else value == found["state"][i][key]
            for i, entry in one["state"].items() for key, value in entry.items())


def sharpness() -> None:
    torch.manual_seed(0)
    vit = TinyViT(width=12, depth=2, heads=2, mlp_width=16).eval().double()
    symmetry = symgeo.find_symmetry(vit)
    images, labels = torch.randn(8, 8, 8, dtype=torch.float64), torch.arange(8)
    criterion = nn.functional.cross_entropy
    everything, mine = [(images, labels)], [(share(images), share(labels))]
    before = {name: p.detach().clone() for name, p in vit.named_parameters()}

    def measure(model: nn.Module, batches: Any, symmetry: Symmetry | None = symmetry, **more: Any) -> float:
        return symgeo.in_place_sharpness(
            model, batches, 0.2, symmetry, criterion, steps=6, chunk_bytes=20000, **more).value

    alone = measure(vit, everything, process_group=False)
    values = {"replicas": measure(vit, mine), "ddp": measure(DistributedDataParallel(vit), mine)}
    RECORD["sharpness restored"] = all(torch.equal(p, before[name]) for name, p in vit.named_parameters())
    RECORD["sharpness control"] = abs(measure(vit, mine, None) / alone - 1)
    params = {name: p.detach() for name, p in vit.named_parameters()}
    manifold = symgeo.ParameterManifold(params, symmetry)
    loss = symgeo.functional_loss(vit, criterion)
    local = hessian.riemannian_hessian(loss, params, mine, manifold)
    v = torch.randn(local.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = hessian.riemannian_hessian(loss, params, everything, manifold) @ v
    RECORD["hessian"] = float((hessian.data_parallel(local) @ v - wanted).norm() / wanted.norm())
    RECORD["hessian control"] = float((local @ v - wanted).norm() / wanted.norm())
    for block in vit.blocks:
        fully_shard(block)
    fully_shard(vit)
    kept = {name: p.to_local().clone() for name, p in vit.named_parameters()}
    values["fsdp"] = measure(vit, mine)
    RECORD["sharpness"] = {kind: abs(value / alone - 1) for kind, value in values.items()}
    RECORD["shards restored"] = all(torch.equal(p.to_local(), kept[name]) for name, p in vit.named_parameters())
    sharded = dict(vit.named_parameters())
    RECORD["second order of shards"] = said(lambda: hessian.euclidean_hessian(loss, sharded, mine))
    RECORD["manifold of shards"] = said(lambda: symgeo.ParameterManifold(sharded))
    RECORD["symmetry of shards"] = said(lambda: symgeo.find_symmetry(vit))
    failing = nn.Linear(2, 1)

    def broken(output: Tensor, target: Tensor) -> Tensor:
        if dist.get_rank() == 1:
            raise ValueError("the labels of this process do not fit")
        return output.sum()

    RECORD["shards alone"] = [
        said(lambda: measure(vit, mine, process_group=False)),
        said(lambda: SymO(sharded.items(), presets.muon(vit, exclude=["position"]), lr=0.1, process_group=False)),
    ]
    RECORD["a loss that raises"] = said(lambda: symgeo.in_place_sharpness(
        failing, [(torch.ones(1, 2), labels)], 0.1, criterion=broken))


def crash() -> None:
    """One process ends in the middle; the others must not wait for it."""
    net, model = net_of("fsdp")
    optimizer = MAKERS["one side"](net)
    x, y = batch(0, torch.float64)
    for step in range(3):
        if step == 1 and dist.get_rank() == 1:
            raise RuntimeError("this process has had enough")
        (model(share(x)) - share(y)).square().mean().backward()
        optimizer.step()


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    if "crash" in sys.argv:
        crash()
        return
    for part in (exact, training, without_gradients, failures, sharpness, partial(checkpoints, folder)):
        start = time.perf_counter()
        part()
        seconds = RECORD.setdefault("seconds", {})
        seconds[getattr(part, "__name__", "checkpoints")] = round(time.perf_counter() - start, 1)
    if dist.get_rank() == 0:
        (folder / f"record {dist.get_world_size()}.json").write_text(json.dumps(RECORD))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
