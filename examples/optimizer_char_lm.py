"""
One optimizer, many methods
===========================

The group decides. A small language model reads the source of Python's standard library, character by character. It is
trained with AdamW, with torch's Muon, and with SymO under several groups: rotations of one axis of every matrix
(one-sided Shampoo; without memory Muon), of both (Shampoo), signs (Adam), and the symmetries that the model really
has: bases and order of its attention heads, order of its hidden units. Every method tries the same number of learning
rates; embeddings, head, gains and biases that a group does not name are stepped by AdamW at one rate, the same for
all. One seed, and times as they happen to be: benchmarks/optimizers.py is the careful comparison.

::

    python examples/optimizer_char_lm.py [--size small|medium|full] [--out DIR]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import torch
from _run import options, save
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from symgeo.data import Text, python_source
from symgeo.models.tiny_lm import TinyLM
from symgeo.optim import SymO, presets
from symgeo.preconditioner import describe

REST_LR, BETAS = 3e-3, (0.9, 0.99)
OUTSIDE = ("position", "embed", "head")  # no preset takes these here, so that all methods see the same rest
Build = Callable[[TinyLM, float], list[Optimizer]]


@dataclass(frozen=True)
class Setting:
    """Sizes of the model and of the run, and the factors on the learning rates that are tried."""

    width: int
    depth: int
    heads: int
    mlp_width: int
    context: int
    batch: int
    steps: int
    every: int
    validation: int
    factors: tuple[float, ...]


SETTINGS = {
    "full": Setting(64, 2, 4, 256, 64, 8, 400, 20, 64, (0.5, 1.0, 2.0)),
    "medium": Setting(32, 2, 2, 128, 32, 8, 150, 10, 32, (1.0,)),
    "small": Setting(16, 1, 2, 32, 16, 4, 12, 3, 8, (1.0,)),
}

# %%
# Optimizers
# ----------
# A function that builds the optimizers of a run: one for the matrices, and where it is another one, one for the rest.


def matrices(model: TinyLM) -> list[nn.Parameter]:
    """The weights of the blocks."""
    return [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]


def rest(model: TinyLM, taken: list[nn.Parameter]) -> Optimizer:
    """AdamW for all others."""
    ids = {id(p) for p in taken}
    others = [p for p in model.parameters() if id(p) not in ids]
    return torch.optim.AdamW(others, lr=REST_LR, betas=BETAS, weight_decay=0.0)


def adamw(model: TinyLM, lr: float) -> list[Optimizer]:
    """AdamW, at a rate of its own for the matrices."""
    chosen = matrices(model)
    return [torch.optim.AdamW(chosen, lr=lr, betas=BETAS, weight_decay=0.0), rest(model, chosen)]


def muon(model: TinyLM, lr: float) -> list[Optimizer]:
    """Muon of torch."""
    chosen = matrices(model)
    return [torch.optim.Muon(chosen, lr=lr, weight_decay=0.0), rest(model, chosen)]


def symo(choose: Callable[[TinyLM], Any], betas: tuple[float, float] = BETAS, **options: Any) -> Build:
    """SymO with the symmetry, or the pair, that a function chooses for the model.

    What the groups name is a group of parameters with its own betas: those of the rest are AdamW's, for which
    betas[1] = 0 would be no good.
    """

    def build(model: TinyLM, lr: float) -> list[Optimizer]:
        symmetry = choose(model)
        named = (symmetry[0] if isinstance(symmetry, tuple) else symmetry).tensors
        inside = [(name, p) for name, p in model.named_parameters() if name in named]
        outside = [(name, p) for name, p in model.named_parameters() if name not in named]
        groups = [{"params": inside, "betas": betas}, {"params": outside}]
        return [SymO(groups, symmetry, lr=lr, betas=BETAS, rest_lr=REST_LR, **options)]

    return build


def heads_and_units(model: TinyLM) -> Any:
    """What the loss really does not see: bases and order of heads, order of hidden units."""
    return presets.attention(model) | presets.mlp(model)


# %%
# Groups
# ------

# the optimizer, its middle learning rate, and for SymO what chooses the groups
METHODS: dict[str, tuple[Build, float, Callable[[TinyLM], Any] | None]] = {}


def add(name: str, lr: float, choose: Callable[[TinyLM], Any], **options: Any) -> None:
    """A method of SymO."""
    METHODS[name] = symo(choose, **options), lr, choose


METHODS["AdamW"] = adamw, 2e-3, None
METHODS["Muon of torch"] = muon, 1e-2, None
add("SymO, rotations, betas[1] = 0 (Muon)", 2e-3, lambda m: presets.muon(m, exclude=OUTSIDE),
    betas=(0.95, 0.0), damping=1e-9, nesterov=True)
add("SymO, rotations of one axis", 1e-3, lambda m: presets.muon(m, exclude=OUTSIDE), update_every=10)
add("SymO, rotations of both (Shampoo)", 2e-3, lambda m: presets.shampoo(m, exclude=OUTSIDE), update_every=10)
add("SymO, both, power 1", 2e-3, lambda m: presets.shampoo(m, exclude=OUTSIDE), update_every=10, power=1.0,
    graft="adam")
add("SymO, signs (Adam)", 5e-4, lambda m: presets.adam(m, exclude=OUTSIDE))
add("SymO, heads and hidden units", 1e-3, heads_and_units, update_every=10, compact=True)


# %%
# Training
# --------


def loss(model: TinyLM, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean cross entropy in nats per character."""
    return cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def network(setting: Setting) -> TinyLM:
    """With initial values that are the same for all methods."""
    return TinyLM(context=setting.context, width=setting.width, depth=setting.depth, heads=setting.heads,
                  mlp_width=setting.mlp_width, generator=torch.Generator().manual_seed(0))


def train(build: Build, lr: float, setting: Setting, text: Text) -> dict[str, list[float]]:
    """Validation losses and seconds of training, every so many steps; rates rise, stay and fall linearly."""
    model = network(setting)
    optimizers = build(model, lr)
    warmup = max(1, setting.steps // 12)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup, max(0.1, 2 * (1 - step / setting.steps)))

    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    examples = text.examples(setting.validation, setting.context)
    record: dict[str, list[float]] = {"losses": [], "seconds": []}
    spent = 0.0
    for step, batch in enumerate(text.batches(0, setting.steps, setting.batch, setting.context), start=1):
        start = time.perf_counter()
        model.zero_grad()
        loss(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers):
            optimizer.step()
            scheduler.step()
        spent += time.perf_counter() - start
        if step % setting.every == 0:
            with torch.no_grad():
                record["losses"].append(float(loss(model, examples)))
            record["seconds"].append(spent)
    return record


def best(name: str, setting: Setting, text: Text) -> dict[str, Any]:
    """The run with the lowest final loss over the learning rates, and what the method keeps."""
    build, middle, choose = METHODS[name]
    runs = {middle * factor: train(build, middle * factor, setting, text) for factor in setting.factors}
    lr = min(runs, key=lambda lr: runs[lr]["losses"][-1])
    tried = {f"{rate:g}": run["losses"][-1] for rate, run in runs.items()}
    row = {"method": name, "lr": lr, "tried": tried, **runs[lr]}
    if choose is not None:
        model = network(setting)
        row["statistics per parameter"] = describe(choose(model), dict(model.named_parameters())).state / sum(
            p.numel() for p in model.parameters())
    return row


def picture(rows: list[dict[str, Any]], setting: Setting) -> Figure:
    """Validation loss against steps and against time."""
    figure, (steps, seconds) = plt.subplots(1, 2, figsize=(9.6, 4.4), sharey=True, layout="constrained")
    for k, row in enumerate(rows):
        style = {"color": f"C{k}", "linewidth": 1.3, "label": row["method"]}
        steps.plot(range(setting.every, setting.steps + 1, setting.every), row["losses"], **style)
        seconds.plot(row["seconds"], row["losses"], **style)
    steps.set(xlabel="steps", ylabel="validation loss, nats per character")
    seconds.set(xlabel="seconds of training, one thread", xscale="log")
    seconds.xaxis.set_minor_formatter(NullFormatter())
    figure.legend(*steps.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def main() -> None:
    """Trains, prints and plots."""
    chosen = options(__doc__, tuple(SETTINGS))
    setting, text = SETTINGS[chosen.size], python_source()
    print(f"{sum(p.numel() for p in network(setting).parameters())} parameters, {setting.steps} steps, one seed")
    print(f"{'':38}{'rate':>9}{'loss':>9}{'ms/step':>9}", flush=True)
    rows = []
    for name in METHODS:
        row = best(name, setting, text)
        rows.append(row)
        pace = 1e3 * row["seconds"][-1] / setting.steps
        print(f"{name:38}{row['lr']:9.2g}{row['losses'][-1]:9.4f}{pace:9.1f}", flush=True)
    record = {"size": chosen.size, "steps": setting.steps, "every": setting.every, "runs": rows}
    save(chosen.out, "optimizer_char_lm", record, picture(rows, setting))


if __name__ == "__main__":
    main()
