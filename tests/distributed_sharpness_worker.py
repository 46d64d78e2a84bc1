"""What one process measures of sharpness; `tests/test_distributed_sharpness.py` starts several and judges the record.

    torchrun --nproc_per_node=N tests/distributed_sharpness_worker.py FILE [PART...]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import symgeo
from symgeo import Symmetry, groups, in_place_sharpness
from symgeo.distributed import exchange, processes
from symgeo.models.tiny_vit import TinyViT

RECORD: dict[str, Any] = {}
CROSS_ENTROPY = nn.functional.cross_entropy
LORA = Symmetry({"A": "r* _", "B": "_ r"}, {"r": groups.GeneralLinear()})


def everybodys(message: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, message)
    return found


def raised(action: Callable[[], Any]) -> list[str]:
    """What an action raises in every process."""
    try:
        action()
    except Exception as error:
        return everybodys(f"{type(error).__name__}: {error}")
    return everybodys("")


def meshes() -> dict[str, Any]:
    """Replicas of everything, each in the hands of one process; two replicas, each in those of half the processes."""
    size = dist.get_world_size()
    shapes = {"replicas": (size, 1), "hsdp": (2, size // 2)}
    return {kind: init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards"))
            for kind, shape in shapes.items()}


def sharded(model: nn.Module, mesh: Any = None) -> nn.Module:
    for part in [*getattr(model, "blocks", ()), model]:
        fully_shard(part, mesh=mesh)
    return model


def vit() -> TinyViT:
    torch.manual_seed(0)
    return TinyViT(width=12, depth=2, heads=2, mlp_width=16).eval().double()


def pictures() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.arange(8)


def mine(data: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.chunk(dist.get_world_size())[dist.get_rank()] for x in data)


class Bowl(nn.Module):
    """A quadratic at its minimum, steeper for some parameters unless it is round; notes where it was evaluated."""

    def __init__(self, round: bool) -> None:
        super().__init__()
        self.v, self.w = (nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in ((1,), (5, 3)))
        self.round, self.seen = round, list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        steep = torch.ones(5, 1) if self.round else torch.linspace(1, 3, 5)[:, None]
        self.seen.append(torch.cat([self.v, self.w.reshape(-1)]).detach().clone())
        return (steep * self.w.square()).sum() + self.v.square().sum() + 0 * x.sum()


def value_of(output: Tensor, target: Tensor) -> Tensor:
    return output


def meshes_of_replicas() -> None:
    data = pictures()
    symmetry = symgeo.find_symmetry(vit())
    for what, group in (("symmetry", symmetry), ("none", None)):
        alone = in_place_sharpness(vit(), [data], 0.2, group, CROSS_ENTROPY, steps=5, process_group=False)
        for kind, mesh in meshes().items():
            found = in_place_sharpness(sharded(vit(), mesh), [mine(data)], 0.2, group, CROSS_ENTROPY, steps=5,
                                       chunk_bytes=20000)
            RECORD[f"{what} {kind}"] = [abs(found.value / alone.value - 1), found.pairs == alone.pairs]
    ones = (torch.ones(4, 1, dtype=torch.float64),) * 2
    for kind, mesh in meshes().items():
        for round in (True, False):
            bowl = Bowl(round)
            found = in_place_sharpness(sharded(bowl, mesh), [mine(ones)], 0.1, None, value_of, rest="euclidean",
                                       steps=8)
            points = everybodys([point.tolist() for point in bowl.seen])
            RECORD[f"bowl {round} {kind}"] = [found.value, all(other == points[0] for other in points),
                                              float(bowl.seen[3].norm())]


class Adapted(nn.Module):
    """A frozen map with a pair of factors: of several processes one owns all coordinates."""

    def __init__(self, bent: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(7, 5).requires_grad_(False)
        self.A, self.B, self.bent = nn.Parameter(torch.randn(2, 7)), nn.Parameter(torch.randn(5, 2)), bent
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        gauge = self.bent * (self.A.square().sum() - self.B.square().sum())  # not the same in every gauge
        return self.base(x) + x @ self.A.T @ self.B.T + gauge


def adapters() -> None:
    generator = torch.Generator().manual_seed(2)
    data = torch.randn(8, 7, generator=generator).double(), torch.randn(8, 5, generator=generator).double()

    def measure(model: nn.Module, rho: float, batch: Any, **more: Any) -> float:
        return in_place_sharpness(model, [batch], rho, LORA, nn.functional.mse_loss, steps=5, **more).value

    for rho in (1e-9, 0.2):
        alone = measure(Adapted(), rho, data, process_group=False)
        RECORD[f"adapters {rho}"] = [measure(sharded(Adapted()), rho, mine(data)), alone]
    RECORD["adapters bent"] = raised(lambda: measure(sharded(Adapted(3e-3)), 0.2, mine(data)))


def gradients() -> None:
    data, model = pictures(), sharded(vit())
    symmetry = symgeo.find_symmetry(vit())

    def measure(model: nn.Module) -> float:
        return in_place_sharpness(model, [mine(data)], 0.2, symmetry, CROSS_ENTROPY, steps=5).value

    wanted = measure(model)
    model.set_requires_gradient_sync(False)
    RECORD["without synchronisation"] = measure(model) / wanted - 1

    def backward() -> bool:
        images, labels = mine(data)
        CROSS_ENTROPY(model(images), labels).backward()
        return all(p.grad is None for p in model.parameters())

    RECORD["given back"] = backward()  # still not synchronised
    RECORD["waiting"] = raised(lambda: measure(model))
    model.set_requires_gradient_sync(True)
    RECORD["after the accumulation"] = not backward()
    RECORD["and measured again"] = measure(model) / wanted - 1
    plain = vit()
    for p in plain.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    RECORD["cleared"] = raised(lambda: measure(plain))


def disagreements() -> None:
    data = pictures()
    rank = dist.get_rank()

    def measure(model: nn.Module, batches: int = 1, rho: Any = 0.2, **more: Any) -> float:
        return in_place_sharpness(model, [mine(data)] * batches, rho, None, CROSS_ENTROPY, **{"steps": 3} | more).value

    model = sharded(vit())
    wanted = measure(model)
    RECORD["batches"] = raised(lambda: measure(model, 1 + rank))
    RECORD["rho"] = raised(lambda: measure(vit(), rho=0.2 if rank else 0.3))
    RECORD["steps"] = raised(lambda: measure(model, steps=3 + rank))
    RECORD["symmetry"] = raised(lambda: in_place_sharpness(
        vit(), [mine(data)], 0.2, symgeo.find_symmetry(vit()) if rank else None, CROSS_ENTROPY))
    RECORD["one bad argument"] = raised(lambda: measure(model, rho=-1 if rank == 1 else 0.2))
    calls = [0]

    def broken(output: Tensor, target: Tensor) -> Tensor:
        calls[0] += 1
        if rank == 1 and calls[0] == 3:
            raise ValueError("the labels of this process do not fit")
        return CROSS_ENTROPY(output, target)

    kept = everybodys([p.to_local().tolist() for p in model.parameters()])
    RECORD["a loss that raises"] = raised(lambda: in_place_sharpness(model, [mine(data)], 0.2, None, broken, steps=3))
    RECORD["restored"] = kept == everybodys([p.to_local().tolist() for p in model.parameters()])
    RECORD["and then"] = measure(model) == wanted


def messages() -> None:
    """What owners give to all of replicas, in messages of several lengths."""
    team = processes()
    assert team is not None
    params = {f"w{i}": torch.empty(shape) for i, shape in enumerate(((5, 7), (0,), (3,), (11, 2), (1,), (13,)))}
    owner = {name: i % team.size for i, name in enumerate(params)}
    generator = torch.Generator().manual_seed(3)
    values = {name: torch.randn(p.shape[::-1], generator=generator).permute(*range(p.dim() - 1, -1, -1))
              for name, p in params.items()}
    between = exchange.Exchange(team, params, owner)
    owned = {name: values[name] for name in between.owned}
    length, gather, counts = exchange.MESSAGE_BYTES, exchange.all_gather, []
    sent = [0]

    def counted(*args: Any) -> None:
        sent[0] += 1
        gather(*args)

    exchange.all_gather = counted
    try:
        for size in (1, 4 * 4 * team.size, length):
            exchange.MESSAGE_BYTES, sent[0] = size, 0
            found = between.spread(owned, params, torch.float32)
            counts.append([sent[0], all(torch.equal(found[name], x) for name, x in values.items())])
    finally:
        exchange.MESSAGE_BYTES, exchange.all_gather = length, gather
    RECORD["messages"] = counts


PARTS = {part.__name__: part for part in (meshes_of_replicas, adapters, gradients, disagreements, messages)}


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for name in sys.argv[2:] or PARTS:
        PARTS[name]()
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(RECORD))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
