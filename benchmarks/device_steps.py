"""Whole steps on a GPU against their bars; kernels one by one are in `kernels.py`.

    python benchmarks/device_steps.py [--rounds 11] [--out benchmarks/device_steps.json]
    python benchmarks/device_steps.py --cpu        # small sizes, no file: that it runs

  batched step    SymO on all matrices of a language model (12 blocks, width 768) against the same SymO for each
                  matrix by itself                                                                   (bar: >= 3)
  geodesic step   an iteration of exact `inv` sharpness on BERT-base (transformers, random weights), 16 sequences of
                  128 tokens, against its forward and backward pass                                  (bar: <= 1.15)
  optimizer step  SymO against fused AdamW plus the products that its moments (four slabs of a symmetric product, 5/8
                  of the whole one), roots (as many as it takes itself) and updates need, run by themselves
                                                                                                     (bar: <= 1.2)

Medians over rounds in which all alternatives follow each other, by events of the device; the JSON names it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _cost_model import newton_products
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from symgeo import ParameterManifold, find_symmetry, functional_loss
from symgeo.models.tiny_lm import TinyLM
from symgeo.optim import SymO, presets
from symgeo.sharpness.ascent import auto_pgd
from symgeo.sharpness.worst_case import evaluate

BARS = {"loop / batched": (3.0, "at least"), "geodesic step / passes": (1.15, "at most"),
        "optimizer step / (AdamW + products)": (1.2, "at most")}
Work = Callable[[], object]


def model(small: bool, device: str) -> TinyLM:
    width, depth = (64, 2) if small else (768, 12)
    made = TinyLM(vocabulary=512, context=128, width=width, depth=depth, heads=width // 32 if small else 12,
                  mlp_width=4 * width)
    return made.eval().to(device)


def batch(small: bool, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    symbols = torch.randint(0, 512, (2 if small else 16, 129), generator=generator).to(device)
    return symbols[:, :-1], symbols[:, 1:]


def criterion(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), target.flatten())


def with_gradients(net: nn.Module, data: tuple[Tensor, Tensor]) -> nn.Module:
    criterion(net(data[0]), data[1]).backward()
    return net


def optimizer_works(small: bool, device: str) -> dict[str, Work]:
    """The batched step, the loop over matrices, fused AdamW on the same model, and the bare products."""
    data = batch(small, device)
    whole, apart, plain = (with_gradients(model(small, device), data) for _ in range(3))
    batched = SymO(whole.named_parameters(), presets.muon(whole), lr=1e-4, roots="newton")
    symmetry = presets.muon(apart)
    named = dict(apart.named_parameters())
    alone = [SymO([(name, named[name])], symmetry.without(named.keys() - {name}), lr=1e-4, roots="newton")
             for name in symmetry.tensors]
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-4, fused=True)
    shapes = [tuple(p.shape) for name, p in named.items() if name in symmetry.tensors]
    return {
        "batched": batched.step, "loop": lambda: [optimizer.step() for optimizer in alone],
        "AdamW": adamw.step, "products": products(shapes, device),
    }


def products(shapes: list[tuple[int, ...]], device: str) -> Work:
    """Moments, roots and applications of all matrices as batched products, in the precision of each, and no more."""
    groups: dict[tuple[int, int], int] = {}
    for m, n in shapes:
        key = min(m, n), max(m, n)
        groups[key] = groups.get(key, 0) + 1
    x = {key: torch.randn(count, *key, device=device) for key, count in groups.items()}
    roots: dict[int, int] = {}
    for (short, _), count in groups.items():
        roots[short] = roots.get(short, 0) + count
    t = {size: torch.randn(count, size, size, dtype=torch.float64, device=device) for size, count in roots.items()}
    repeats = newton_products(1e-4)

    def run() -> None:
        for y in x.values():
            short = y.shape[1]
            square = torch.empty(len(y), short, short, device=device)
            for start in range(0, short, max(short // 4, 64)):
                stop = min(start + max(short // 4, 64), short)
                square[:, start:stop, start:] = torch.bmm(y[:, start:stop], y[:, start:].mT)
            torch.bmm(square, y)
        for y in t.values():
            out = torch.empty_like(y)
            for _ in range(repeats):
                torch.bmm(y, y, out=out)

    return run


def bert(small: bool, device: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """BERT-base for classification, or one with two layers of width 64, and a batch."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    torch.manual_seed(0)
    net = BertForSequenceClassification(BertConfig(**(sizes if small else {})))
    symbols = torch.randint(0, 30522, (2 if small else 16, 128), generator=torch.Generator().manual_seed(0))
    return net.eval().to(device), {"input_ids": symbols.to(device), "labels": symbols[:, 0].to(device) % 2}


def geodesic_works(small: bool, device: str) -> dict[str, Work]:
    """One iteration of the search, and its passes alone."""
    net, data = bert(small, device)
    params = {name: p.detach().clone() for name, p in net.named_parameters()}
    loss = functional_loss(net)
    chart = ParameterManifold(params, find_symmetry(net), metric="inv").chart(params)
    generator = torch.Generator(device=device).manual_seed(0)
    start = 1e-3 * chart.random(generator) / math.sqrt(chart.size)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}

    def objective(z: Tensor) -> tuple[float, Tensor]:
        z = z.detach().requires_grad_()
        value = evaluate(loss, chart.point(z, "exact", bound=0.1), data)
        (slope,) = torch.autograd.grad(value, z)
        return float(value.detach()), chart.project(slope)

    def passes() -> None:
        value = loss(leaves, data)
        torch.autograd.grad(value, list(leaves.values()))
        float(value.detach())

    # auto_pgd evaluates the start too: with 2 steps there are 3 evaluations and 2 moves
    return {"geodesic": lambda: auto_pgd(objective, start, 0.1, 2, lambda: start), "passes": lambda: [
        passes() for _ in range(3)]}


def seconds(work: Work, device: str) -> float:
    if device == "cpu":
        begin = time.process_time()
        work()
        return time.process_time() - begin
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    work()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000


def measure(works: dict[str, Work], rounds: int, device: str) -> dict[str, list[float]]:
    for work in works.values():
        for _ in range(2):
            work()
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            found[name].append(seconds(work, device))
    return found


def ratio(above: list[float], *below: list[float]) -> float:
    return statistics.median(a / sum(b) for a, *b in zip(above, *below))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--cpu", action="store_true", help="small sizes on the CPU, nothing written")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    if not options.cpu and not torch.cuda.is_available():
        print("no GPU here: nothing is measured (--cpu runs small sizes)")
        return
    device, rounds = ("cpu", 2) if options.cpu else ("cuda", options.rounds)
    torch.backends.cuda.matmul.allow_tf32 = False
    steps = measure(optimizer_works(options.cpu, device), rounds, device)
    search = measure(geodesic_works(options.cpu, device), rounds, device)
    ratios = {
        "loop / batched": ratio(steps["loop"], steps["batched"]),
        "geodesic step / passes": ratio(search["geodesic"], search["passes"]),
        "optimizer step / (AdamW + products)": ratio(steps["batched"], steps["AdamW"], steps["products"]),
    }
    record: dict[str, Any] = {
        "device": "cpu, small sizes" if options.cpu else torch.cuda.get_device_name(), "torch": torch.__version__,
        "rounds": rounds, "ratios": ratios, "bars": BARS,
        "milliseconds": {name: 1000 * statistics.median(values) for name, values in {**steps, **search}.items()},
        "met": {name: ratios[name] >= bar if way == "at least" else ratios[name] <= bar
                for name, (bar, way) in BARS.items()},
    }
    print(json.dumps(record, indent=2))
    if not options.cpu:
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
