"""The task on which optimizers are compared, and the rules of the comparison.

A small language model reads the source of Python's standard library, character by character.  The optimizer under
test has the matrices of the blocks; everything it does not take (embeddings, head, gains and biases) is stepped by
one AdamW, the same for all.  Learning rates rise over the warm-up, stay, and fall linearly to a tenth over the second
half; the norm of the gradient is clipped for all alike.  A seed decides initial values and the order of the data, so
that methods are paired by seed.

Each method has a grid of five learning rates, a factor of about 2 apart, tried with seed 0; where the best is the
first or the last, the grid grows until it is inside.  The best then runs with all seeds.

The learning rate of the rest is the best for AdamW, tuned together with its own (mean final loss of seeds 0 and 1,
rows: that of the rest, columns: that of the matrices):

            5e-4    1e-3    2e-3    4e-3
    3e-3           2.060   2.114   2.278
    6e-3   2.049   2.042   2.111   2.293
  1.2e-2   2.032   2.037
  2.4e-2   2.045   2.018
  4.8e-2           2.041
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from symgeo.data import Text
from symgeo.models.tiny_lm import TinyLM

Build = Callable[[TinyLM, dict[str, nn.Parameter], float], torch.optim.Optimizer]


@dataclass(frozen=True)
class Method:
    """An optimizer under test.

    build : (model, its block matrices by name, learning rate) -> optimizer of these and of whatever else it wants;
    grid : two or more learning rates to begin with, ascending;
    note : all that is fixed, in words; kept runs with another note are refused.
    """

    build: Build
    grid: tuple[float, ...]
    note: str


@dataclass(frozen=True)
class Setting:
    """Sizes of the model and of the run; the learning rate and betas of what the optimizer under test leaves out."""

    width: int = 128
    depth: int = 2
    heads: int = 4
    mlp_width: int = 512
    steps: int = 500
    warmup: int = 40
    batch: int = 8
    context: int = 64
    validation: int = 128
    evaluate_every: int = 20
    clip: float = 1.0
    rest_lr: float = 2.4e-2
    rest_betas: tuple[float, float] = (0.9, 0.99)

    def factor(self, step: int) -> float:
        """What multiplies every learning rate at step 0, 1, ..."""
        half = self.steps // 2
        fallen = max(0, step - half) / max(1, self.steps - 1 - half)
        return min(1.0, (step + 1) / self.warmup) * (1 - 0.9 * fallen)


SIZES = {
    "full": Setting(),
    "small": Setting(width=16, depth=1, heads=2, mlp_width=32, steps=12, warmup=3, batch=4, context=16, validation=8,
                     evaluate_every=4),
}


@dataclass(frozen=True)
class Key:
    """What decides a run."""

    method: str
    lr: float
    seed: int


Runs = Mapping[Key, Sequence[float]]  # the validation losses of every run, in order of steps; infinite once diverged


class Trainer:
    """A model, the optimizer under test, the AdamW of the rest, and its batches; one call is one step."""

    def __init__(self, method: Method, lr: float, seed: int, setting: Setting, text: Text) -> None:
        self.setting = setting
        self.model = TinyLM(context=setting.context, width=setting.width, depth=setting.depth, heads=setting.heads,
                            mlp_width=setting.mlp_width, generator=torch.Generator().manual_seed(seed))
        named = self.model.named_parameters()
        matrices = {name: p for name, p in named if name.startswith("blocks.") and p.ndim == 2}
        tested = method.build(self.model, matrices, lr)
        taken = {id(p) for group in tested.param_groups for p in group["params"]}
        rest = [p for p in self.model.parameters() if id(p) not in taken]
        self.optimizers = [tested]
        if rest:
            self.optimizers.append(
                torch.optim.AdamW(rest, lr=setting.rest_lr, betas=setting.rest_betas, weight_decay=0.0, fused=True))
        self._rates = [(group, group["lr"]) for optimizer in self.optimizers for group in optimizer.param_groups]
        self._batches = text.batches(seed, setting.steps, setting.batch, setting.context)
        self._steps = 0

    def backward(self) -> None:
        """The gradients of the next batch, clipped."""
        symbols, following = next(self._batches)
        self.model.zero_grad()
        loss(self.model, symbols, following).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.setting.clip)

    def step(self) -> None:
        """The step of all optimizers, at the learning rates of the schedule."""
        for group, lr in self._rates:
            group["lr"] = lr * self.setting.factor(self._steps)
        for optimizer in self.optimizers:
            optimizer.step()
        self._steps += 1


def loss(model: nn.Module, symbols: Tensor, following: Tensor) -> Tensor:
    """Mean cross entropy, in nats per symbol."""
    return cross_entropy(model(symbols).flatten(0, -2), following.flatten())


def train(method: Method, lr: float, seed: int, setting: Setting, text: Text) -> list[float]:
    """Validation losses, one every ``evaluate_every`` steps; infinite from where it is not finite any more."""
    trainer = Trainer(method, lr, seed, setting, text)
    examples = text.examples(setting.validation, setting.context)
    losses: list[float] = []
    for step in range(1, setting.steps + 1):
        trainer.backward()
        trainer.step()
        if step % setting.evaluate_every:
            continue
        with torch.no_grad():
            losses.append(float(loss(trainer.model, *examples)))
        if not math.isfinite(losses[-1]):
            count = setting.steps // setting.evaluate_every
            return losses[:-1] + [math.inf] * (count - len(losses) + 1)
    return losses


def missing(name: str, method: Method, runs: Runs, seeds: int, extensions: int = 4) -> list[Key]:
    """The runs to make next: those of the grid, then one more while the best is at an end, then the seeds at the best.

    Empty when the method is done.  At most ``extensions`` learning rates are added.
    """
    tried = tuning(name, runs)
    todo = [lr for lr in method.grid if lr not in tried]
    if not todo:
        best, ratio = best_rate(tried), method.grid[1] / method.grid[0]
        ends = {min(tried): best / ratio, max(tried): best * ratio}
        if best in ends and len(tried) < len(method.grid) + extensions:
            todo = [float(f"{ends[best]:.3g}")]
    if todo:
        return [Key(name, lr, 0) for lr in todo]
    return [key for key in (Key(name, best, seed) for seed in range(seeds)) if key not in runs]


def tuning(name: str, runs: Runs) -> dict[float, float]:
    """The final loss with seed 0, by learning rate, ascending."""
    return {key.lr: runs[key][-1] for key in sorted(runs, key=lambda k: k.lr) if key.method == name and key.seed == 0}


def best_rate(tried: Mapping[float, float]) -> float:
    """The learning rate with the lowest loss; the smallest one where all diverged."""
    return min(tried, key=lambda lr: (tried[lr], lr))


def curves(name: str, runs: Runs) -> dict[int, Sequence[float]]:
    """The losses at the best learning rate, by seed."""
    best = best_rate(tuning(name, runs))
    return {key.seed: runs[key] for key in sorted(runs, key=lambda k: k.seed) if (key.method, key.lr) == (name, best)}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the mean; infinite where a value is, and the error of a single value."""
    if not all(map(math.isfinite, values)):
        return math.inf, math.inf
    mean = statistics.fmean(values)
    return mean, statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def steps_to(target: float, losses: Sequence[float], every: int) -> float:
    """The first evaluated step whose loss is at most ``target``; infinite if there is none."""
    return next((every * count for count, value in enumerate(losses, start=1) if value <= target), math.inf)


def summary(
    names: Sequence[str], runs: Runs, setting: Setting, reference: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Per method: its learning rate, final loss, difference to the reference by seed, and steps to the target.

    The target is the mean final loss of the reference; steps are the median over seeds.
    """
    base = curves(reference, runs)
    target, _ = mean_and_error([losses[-1] for losses in base.values()])
    for name in names:
        tried, seeds = tuning(name, runs), curves(name, runs)
        mean, error = mean_and_error([losses[-1] for losses in seeds.values()])
        gaps = [losses[-1] - base[seed][-1] for seed, losses in seeds.items() if seed in base]
        gap, gap_error = mean_and_error(gaps)
        steps = [steps_to(target, losses, setting.evaluate_every) for losses in seeds.values()]
        yield name, {
            "lr": best_rate(tried),
            "interior": min(tried) < best_rate(tried) < max(tried),
            "seeds": len(seeds),
            "final loss": mean,
            "standard error": error,
            f"minus {reference}, same seed": gap,
            f"standard error of minus {reference}": gap_error,
            "steps to target": statistics.median(steps),
            "steps to target by seed": steps,
            "tuning (seed 0)": {f"{lr:g}": value for lr, value in tried.items()},
        }
