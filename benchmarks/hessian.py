"""What a product with the covariant Hessian on the quotient costs, beside plain ones in one process on one thread.

A BERT of about 10 M parameters with a small vocabulary (6 layers, width 384, 12 heads), random tokens, float32, one
random vector:

  forward + backward   the gradient of the loss, for scale
  plain                a product of `symgeo.hessian.euclidean_hessian`
  invariant inv, mix   a product of `symgeo.hessian.riemannian_hessian`, on the quotient by all 144 factor pairs
  double backward      `torch.autograd.grad` of `<gradient, v>`, its graph built anew each time
  curvlinops           `HessianLinearOperator @ v`, where curvlinops is installed

Rounds interleave all of them, so that a noisy machine disturbs them alike; the figures are medians over rounds of
the ratio of processor times within a round.  Memory is what the resident set of a fresh process grows by in one
product, at its peak; also for models of three widths on a single sequence, where next to nothing but tensors of the
size of the parameters is held.

    python benchmarks/hessian.py [--base] [--rounds 9] [--tokens 1024] [--out benchmarks/hessian.json]

`--base` takes the size of BERT-base (110 M parameters) instead, and writes to the key "bert-base" of the same file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from _memory import growth, in_child
from torch import Tensor, nn

from symgeo import ParameterManifold, find_symmetry, functional_loss
from symgeo.hessian import HessianOperator, euclidean_hessian, riemannian_hessian

BAR = 1.3  # invariant / plain
LENGTH = 64
WIDTHS = {"narrow": 192, "small": 384, "wide": 768}
MEMORY = ("plain", "invariant inv", "invariant mix", "curvlinops")  # whose memory is measured at all widths
Work = Callable[[], object]


def bert(size: str) -> nn.Module:
    """One of the widths, or "base", the usual sizes; eager attention, which has all derivatives."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_labels": 3}
    if size != "base":
        width = WIDTHS[size]
        sizes |= {"vocab_size": 512, "hidden_size": width, "num_hidden_layers": 6, "num_attention_heads": 12,
                  "intermediate_size": 4 * width, "max_position_embeddings": LENGTH}
    return BertForSequenceClassification(BertConfig(attn_implementation="eager", **sizes)).eval()


def batch(tokens: int) -> dict[str, Tensor]:
    """Random tokens, 64 to a sequence, with random labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 512, (max(1, tokens // LENGTH), LENGTH), generator=generator)
    return {"input_ids": ids, "labels": torch.randint(0, 3, (len(ids),), generator=generator)}


class Setup:
    """The model, its data, and every way to multiply."""

    def __init__(self, size: str, tokens: int):
        self.model, self.data = bert(size), batch(tokens)
        self.loss = functional_loss(self.model)
        self.params = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.symmetry = find_symmetry(self.model)

    def ways(self) -> dict[str, Callable[[], Work]]:
        """By name, what prepares a product and returns it."""
        found = {
            "forward + backward": self.gradient,
            "plain": lambda: product(euclidean_hessian(self.loss, self.params, [self.data], check=False)),
            "invariant inv": lambda: self.invariant("inv"),
            "invariant mix": lambda: self.invariant("mix"),
            "double backward": self.double_backward,
        }
        return found | ({"curvlinops": self.curvlinops} if find_spec("curvlinops") else {})

    def invariant(self, metric: str) -> Work:
        """A product with the covariant Hessian."""
        manifold = ParameterManifold(self.params, self.symmetry, metric)
        return product(riemannian_hessian(self.loss, self.params, [self.data], manifold, check=False))

    def leaves(self) -> dict[str, Tensor]:
        """The parameters as leaves of a graph."""
        return {name: p.clone().requires_grad_() for name, p in self.params.items()}

    def gradient(self) -> Work:
        """The gradient of all parameters."""
        leaves = self.leaves()
        return lambda: torch.autograd.grad(self.loss(leaves, self.data), list(leaves.values()))

    def double_backward(self) -> Work:
        """Reverse over reverse with classic autograd."""
        leaves, generator = self.leaves(), torch.Generator().manual_seed(2)
        inputs = list(leaves.values())
        v = [torch.randn(p.shape, generator=generator) for p in inputs]

        def run() -> object:
            slopes = torch.autograd.grad(self.loss(leaves, self.data), inputs, create_graph=True)
            return torch.autograd.grad(slopes, inputs, v, materialize_grads=True)

        return run

    def curvlinops(self) -> Work:
        """The operator of curvlinops 3, on the logits."""
        from curvlinops import HessianLinearOperator

        def model(inputs: Tensor) -> Tensor:
            return self.model(inputs).logits

        wrapped = nn.Module()
        wrapped.inner, wrapped.forward = self.model, model
        inputs = [p for p in self.model.parameters() if p.requires_grad]
        data = [(self.data["input_ids"], self.data["labels"])]
        operator = HessianLinearOperator(wrapped, nn.CrossEntropyLoss(), inputs, data, check_deterministic=False)
        v = torch.randn(operator.shape[1], generator=torch.Generator().manual_seed(2))
        return lambda: operator @ v


def product(operator: HessianOperator) -> Work:
    """One product with a fixed random vector."""
    v = torch.randn(operator.shape[0], generator=torch.Generator().manual_seed(2))
    return lambda: operator @ v


def seconds(work: Work) -> float:
    """Processor time, which what else runs on the machine disturbs less than it does the clock."""
    start = time.process_time()
    work()
    return time.process_time() - start


def peak(name: str, size: str, tokens: int) -> float:
    """MiB that the resident set of this process grows by in its first product."""
    setup = Setup(size, tokens)
    return growth(setup.ways()[name]())


def child(name: str, size: str, tokens: int) -> float:
    """:func:`peak` in a fresh process."""
    return in_child(__file__, "--peak", name, "--size", size, "--tokens", str(tokens))


def memory_by_size() -> dict[str, object]:
    """Peaks on one sequence for every width, in MiB and in units of the parameters: constant where it is linear."""
    rows = []
    for size in WIDTHS:
        count = sum(p.numel() for p in bert(size).parameters())
        unit = count * 4 / 2**20
        peaks = {name: child(name, size, LENGTH) for name in MEMORY if name != "curvlinops" or find_spec(name)}
        rows.append({"parameters": count, "parameters, MiB": unit, "peak, MiB": peaks,
                     "peak / parameters": {name: value / unit for name, value in peaks.items()}})
    return {"tokens": LENGTH, "sizes": rows}


def measure(size: str, rounds: int, tokens: int) -> dict[str, object]:
    """Medians of seconds and of ratios within rounds, and peaks of memory."""
    setup = Setup(size, tokens)
    works = {name: prepare() for name, prepare in setup.ways().items()}
    for work in works.values():
        work()
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            taken[name].append(seconds(work))

    def ratio(a: str, b: str) -> float | str:
        if a not in taken or b not in taken:
            return "not installed"
        return statistics.median(x / y for x, y in zip(taken[a], taken[b]))

    pairs = ParameterManifold(setup.params, setup.symmetry).layout.pairs
    return {
        "model": {"parameters": sum(p.numel() for p in setup.params.values()), "pairs": pairs,
                  "tokens": setup.data["input_ids"].numel()},
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "rounds": rounds,
        "processor seconds (median)": {name: statistics.median(values) for name, values in taken.items()},
        "ratios (median of rounds)": {
            "invariant inv / plain": ratio("invariant inv", "plain"),
            "invariant mix / plain": ratio("invariant mix", "plain"),
            "plain / double backward": ratio("plain", "double backward"),
            "plain / curvlinops": ratio("plain", "curvlinops"),
            "plain / forward + backward": ratio("plain", "forward + backward"),
        },
        "wanted": {"invariant / plain": BAR, "plain / curvlinops": 1.0},
        "peak memory of one product, MiB": {name: child(name, size, tokens) for name in works},
    }


def main() -> None:
    """Runs the benchmark, prints the result and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--size", default="small", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        print(peak(options.peak, options.size, options.tokens))
        return
    old = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.base:
        result = old | {"bert-base": measure("base", options.rounds, options.tokens)}
    else:
        result = measure("small", options.rounds, options.tokens) | {"peak memory by size": memory_by_size()}
        result |= {key: value for key, value in old.items() if key == "bert-base"}
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
