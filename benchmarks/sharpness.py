"""What one iteration of geodesic sharpness costs, side by side in one process on one thread.

A BERT of about 10 M parameters with a small vocabulary (6 layers, width 384, 12 heads), random tokens, float32:

  forward + backward   of the loss, gradients of all parameters
  straight line        one Auto-PGD iteration of this package along straight lines (same metric, same projection)
  exact inv            one Auto-PGD iteration along exact geodesics
  taylor2, mix         the second-order curve; the exact curve of the other metric
  public loop          the iteration of the public adaptive-sharpness scripts: perturb the module in place,
                       forward, backward, ascend in the elementwise metric, project, forward again

Rounds interleave all of them, so that a noisy machine disturbs them alike; the figures are medians over rounds of
the ratio within a round.

    python benchmarks/sharpness.py [--rounds 9] [--tokens 1024] [--out benchmarks/sharpness.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import Tensor, nn

from symgeo import ParameterManifold, find_symmetry, functional_loss
from symgeo.sharpness.ascent import auto_pgd
from symgeo.sharpness.worst_case import _objective

RHO = 0.3


def bert(seed: int) -> nn.Module:
    """About 10.7 M parameters in the layers, 0.2 M in the embeddings."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(vocab_size=512, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
                        intermediate_size=1536, max_position_embeddings=64, num_labels=3)
    return BertForSequenceClassification(config).eval()


def batch(tokens: int, seed: int) -> dict[str, Tensor]:
    """Random tokens, 64 to a sequence, with random labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 512, (tokens // 64, 64), generator=generator)
    return {"input_ids": ids, "labels": torch.randint(0, 3, (len(ids),), generator=generator)}


def iteration(loss: Callable[..., Tensor], params: dict[str, Tensor], data: dict[str, Tensor], metric: str,
              geodesic: str, manifold: ParameterManifold) -> Callable[[], float]:
    """Seconds of one iteration: the time between the starts of consecutive evaluations."""
    chart = manifold.chart(params)
    objective = _objective(loss, chart, data, geodesic, RHO)

    def run() -> float:
        starts: list[float] = []

        def timed(z: Tensor) -> tuple[float, Tensor]:
            starts.append(time.perf_counter())
            return objective(z)

        auto_pgd(timed, chart.origin(), RHO, 2, chart.random)
        return starts[2] - starts[1]

    return run


def forward_backward(
    loss: Callable[..., Tensor], params: dict[str, Tensor], data: dict[str, Tensor]
) -> Callable[[], float]:
    """Seconds of the loss and its gradient with respect to every parameter."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}

    def run() -> float:
        start = time.perf_counter()
        torch.autograd.grad(loss(leaves, data), list(leaves.values()))
        return time.perf_counter() - start

    return run


def public_loop(model: nn.Module, data: dict[str, Tensor]) -> Callable[[], float]:
    """Seconds of one iteration of the in-place loop: two forwards, one backward, per-parameter updates."""
    weights = [p.detach().clone() for p in model.parameters()]
    scales = [w.abs() for w in weights]
    deltas = [torch.zeros_like(w) for w in weights]

    def run() -> float:
        start = time.perf_counter()
        model.zero_grad()
        model(**data).loss.backward()
        with torch.no_grad():
            gradients = [p.grad * s for p, s in zip(model.parameters(), scales) if p.grad is not None]
            length = torch.stack([g.norm() for g in gradients]).norm()
            for delta, g, s in zip(deltas, gradients, scales):
                delta.add_(g * s, alpha=float(2 * RHO / length))
            size = torch.stack([(d / s.clamp_min(1e-12)).norm() for d, s in zip(deltas, scales)]).norm()
            for p, w, delta in zip(model.parameters(), weights, deltas):
                delta.mul_(min(1.0, float(RHO / size)))
                p.copy_(w + delta)
            model(**data)
        return time.perf_counter() - start

    return run


def measure(rounds: int, tokens: int) -> dict[str, object]:
    """Medians of seconds and of ratios within rounds."""
    model, data = bert(0), batch(tokens, 1)
    loss = functional_loss(model)
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    symmetry = find_symmetry(model)
    inv, mix = (ParameterManifold(params, symmetry, metric) for metric in ("inv", "mix"))
    runs = {
        "forward + backward": forward_backward(loss, params, data),
        "straight line": iteration(loss, params, data, "inv", "linear", inv),
        "exact inv": iteration(loss, params, data, "inv", "exact", inv),
        "taylor2 inv": iteration(loss, params, data, "inv", "taylor2", inv),
        "exact mix": iteration(loss, params, data, "mix", "exact", mix),
        "public loop": public_loop(model, data),
    }
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(run())

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(seconds[a], seconds[b]))

    return {
        "model": {"parameters": sum(p.numel() for p in params.values()), "pairs": inv.layout.pairs, "tokens": tokens},
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "rounds": rounds,
        "seconds (median)": {name: statistics.median(values) for name, values in seconds.items()},
        "ratios (median of rounds)": {
            "exact inv / straight line": ratio("exact inv", "straight line"),
            "exact inv / forward + backward": ratio("exact inv", "forward + backward"),
            "exact inv / public loop": ratio("exact inv", "public loop"),
            "straight line / forward + backward": ratio("straight line", "forward + backward"),
            "taylor2 inv / straight line": ratio("taylor2 inv", "straight line"),
            "exact mix / straight line": ratio("exact mix", "straight line"),
        },
    }


def main() -> None:
    """Runs the benchmark, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(arguments.rounds, arguments.tokens)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
