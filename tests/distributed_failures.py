"""What processes do when one of them fails; see `tests/distributed_worker.py`."""

from __future__ import annotations

import copy
import sys
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from distributed_nets import (
    MAKERS,
    RECORD,
    batch,
    distance,
    gathered,
    give,
    net_of,
    prescribed,
    said,
    same_everywhere,
    share,
    walk,
    whole,
)
from torch import Tensor, nn

import symgeo
from symgeo import Symmetry
from symgeo.optim import SymO, presets


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


def decomposition_fails() -> None:
    """In the owner of one matrix only, after the others have done theirs: nobody has taken a step."""
    net, _ = net_of("ddp")
    optimizer = MAKERS["pair"](net)
    walk(net, optimizer, range(3))  # the next one renews
    give(net, 3)
    before, kept = whole(net), copy.deepcopy(optimizer.state_dict()["state"])
    real = torch.linalg.eigh

    def failing(*args: Any, **options: Any) -> Any:
        if dist.get_rank() == 1:
            raise torch.linalg.LinAlgError("no eigenvalues today")
        return real(*args, **options)

    torch.linalg.eigh = failing
    RECORD["a decomposition that fails"] = said(optimizer.step)
    torch.linalg.eigh = real
    mine = [same_state(kept, optimizer.state_dict()["state"]), distance(whole(net), before) == 0]
    end = walk(net, optimizer, range(3, 6))
    RECORD["undone"] = [gathered(mine), distance(end, prescribed("alone", MAKERS["pair"], 6))]


def same_state(a: dict[int, Any], b: dict[int, Any]) -> bool:
    return a.keys() == b.keys() and all(
        a[i].keys() == b[i].keys() and all(
            torch.equal(x, b[i][key]) if isinstance(x, Tensor) else x == b[i][key] for key, x in a[i].items())
        for i in a)


def closures() -> None:
    """One that raises in one process, before it has computed anything and after the gradients of all are there."""
    net, model = net_of("ddp")
    optimizer = MAKERS["one side"](net)
    x, y = batch(0, torch.float64)

    def closure(where: str) -> Tensor:
        if where == "before" and dist.get_rank() == 1:
            raise ValueError("this process has no data")
        called = net if where == "before" else model  # whose backward pass all processes take together
        loss = (called(share(x)) - share(y)).square().mean()
        loss.backward()
        if where == "after" and dist.get_rank() == 1:
            raise ValueError("this process has no loss")
        return loss

    before = whole(net)
    texts = {where: said(lambda where=where: optimizer.step(partial(closure, where))) for where in ("before", "after")}
    still = gathered(distance(whole(net), before) == 0 and optimizer.state_dict()["state"] == {})
    optimizer.zero_grad()
    optimizer.step(partial(closure, ""))
    RECORD["closures"] = [texts, still, same_everywhere(whole(net)), distance(whole(net), before)]


def reductions() -> None:
    """As on a GPU, where a reduction is enqueued and not waited for: a process that has failed catches up."""
    team = symgeo.distributed.Processes(dist.group.WORLD)
    team.host = dist.new_group(backend="gloo")
    module, real, works = sys.modules["symgeo.distributed.processes"], dist.all_reduce, []

    def enqueue(x: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        if group is team.host:
            real(x, op, group=group)
        else:
            works.append(real(x, op, group=group, async_op=True))

    def step() -> None:
        with team.together(torch.device("cpu")):
            for i in range(3):
                if i == dist.get_rank():  # process 0 fails before the first, 1 after the first one
                    raise ValueError(f"process {i}")
                team.maximum(torch.tensor(1.0, dtype=torch.float64))

    waits, module._waits, dist.all_reduce = module._waits, lambda device: False, enqueue
    try:
        texts = said(step)
        largest = team.maximum(torch.tensor(float(dist.get_rank()), dtype=torch.float64))
    finally:
        module._waits, dist.all_reduce = waits, real
    for work in works:
        work.wait(timedelta(seconds=20))
    RECORD["reductions"] = [texts, gathered([len(works), float(largest)])]
