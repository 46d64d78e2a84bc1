"""What one process of a distributed test does; `tests/test_distributed.py` starts several and judges the record.

    torchrun --nproc_per_node=N tests/distributed_worker.py FOLDER
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_failures import closures, decomposition_fails, failures, reductions
from distributed_nets import (
    FOUR,
    MAKERS,
    RECORD,
    TRAINED,
    Make,
    batch,
    distance,
    gathered,
    give,
    maker,
    net_of,
    prescribed,
    said,
    same_everywhere,
    share,
    states,
    trained,
    walk,
    whole,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import symgeo
from symgeo import Symmetry, hessian
from symgeo.models.tiny_vit import TinyViT
from symgeo.optim import SymO, presets


def exact() -> None:
    """The same gradients on all processes: nothing but who computes what differs from one process."""
    four = dist.get_world_size() == 4
    kinds = ["ddp", "fsdp"] + ["hsdp"] * four
    for name, make in {name: MAKERS[name] for name in (FOUR if four else MAKERS)}.items():
        alone = prescribed("alone", make)
        RECORD[f"exact {name}"] = {kind: distance(prescribed(kind, make), alone) for kind in kinds}
    other = prescribed("ddp", maker(presets.muon, weight_decay=0.1, betas=(0.9, 0.98)))
    RECORD["exact control"] = distance(other, prescribed("alone", MAKERS["one side"]))


def training() -> None:
    for name in TRAINED[: 1 if dist.get_world_size() == 4 else 2]:
        for dtype in (torch.float32, torch.float64):
            alone = whole(trained("alone", MAKERS[name], dtype, process_group=False)[0])
            RECORD[f"training {name} {dtype}"] = {
                kind: distance(whole(trained(kind, MAKERS[name], dtype)[0]), alone) for kind in ("ddp", "fsdp")}
    control = whole(trained("ddp", MAKERS[name], torch.float64, steps=19)[0])
    RECORD["training control"] = distance(control, alone)


def without_gradients() -> None:
    """The last process has none, and takes part all the same."""
    alone = prescribed("alone", MAKERS["one side"], steps=2)
    found = {}
    for kind in ("ddp", "fsdp"):
        net, _ = net_of(kind)
        optimizer = MAKERS["one side"](net)
        for step in range(2):
            give(net, step)
            for p in net.parameters() if kind == "ddp" else ():
                last = dist.get_rank() == dist.get_world_size() - 1
                p.grad = None if last else p.grad.mT.contiguous().mT if p.dim() == 2 else p.grad  # columns first
            optimizer.step()
        found[kind] = max(gathered(distance(whole(net), alone)))
    RECORD["without gradients"] = found
    net, _ = net_of("ddp")
    optimizer = MAKERS["one side"](net)
    give(net, 0)
    net.c.weight.grad = None  # nowhere: it stays
    before = net.c.weight.detach().clone()
    optimizer.step()
    RECORD["without any gradient"] = torch.equal(net.c.weight, before) and same_everywhere(whole(net))


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


def continued(path: Path) -> None:
    """Every kind of optimizer goes on from a checkpoint of shards as if nothing had been."""
    if dist.get_world_size() == 4:
        return
    kept, others = ({name: _started(make) for name, make in MAKERS.items()} for _ in range(2))
    for net, optimizer in kept.values():
        walk(net, optimizer, range(4))
    dcp.save({name: states(*pair) for name, pair in kept.items()}, checkpoint_id=path)
    loaded = {name: states(*pair) for name, pair in others.items()}
    dcp.load(loaded, checkpoint_id=path)
    others["control"] = _started(MAKERS["one side"])
    for name, (net, optimizer) in others.items():
        known = name if name in loaded else "one side"
        set_model_state_dict(net, loaded[known]["model"])
        if name in loaded:
            set_optimizer_state_dict(net, optimizer, loaded[name]["optimizer"])
    ends = {name: walk(net, optimizer, range(4, 6)) for name, (net, optimizer) in kept.items()}
    for name, (net, optimizer) in others.items():
        wanted = ends.get(name, ends["one side"])
        RECORD[f"continued {name}"] = distance(walk(net, optimizer, range(4, 6)), wanted)


def _started(make: Make) -> tuple[nn.Module, SymO]:
    net, _ = net_of("fsdp")
    return net, make(net)


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
    parts = (exact, training, without_gradients, failures, decomposition_fails, closures, reductions, sharpness,
             partial(checkpoints, folder), partial(continued, folder / "all"))
    for part in parts:
        start = time.perf_counter()
        part()
        function = part.func if isinstance(part, partial) else part
        RECORD.setdefault("seconds", {})[function.__name__] = round(time.perf_counter() - start, 1)
    if dist.get_rank() == 0:
        (folder / f"record {dist.get_world_size()}.json").write_text(json.dumps(RECORD))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
