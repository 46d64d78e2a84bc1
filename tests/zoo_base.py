"""What every entry of the zoo is made of: sizes, a case, and inputs without gaps."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from networks import params_of, randomise
from torch import Tensor, nn

from symgeo import Symmetry
from symgeo.nullity import count

LENGTH = 7
#: numbers of output for each parameter; more than one, because the logits of one token are not independent
ABUNDANCE = 2.2
#: numbers of output in one batch, about
BATCH = 80


@dataclass(frozen=True)
class Sizes:
    """`eps` is that of all norms: large, so that scales are far from flat; None leaves the default of the family.

    `seed` draws the parameters.
    """

    width: int = 8
    heads: int = 2
    hidden: int = 6
    layers: int = 1
    vocab: int = 11
    eps: float | None = 1e-2
    seed: int = 0


@dataclass(frozen=True)
class Case:
    """A model, and its outputs on generic inputs as a function of how it is called.

    `calls` are small batches of arguments; `read` takes what the model returns.
    """

    model: nn.Module
    calls: Sequence[dict[str, Any]]
    read: Callable[[Any], Tensor]

    def outputs(self, call: Callable[..., Any]) -> Tensor:
        """All outputs, one after the other."""
        return torch.cat([x.reshape(-1) for x in self.batches(call)])

    def batches(self, call: Callable[..., Any]) -> tuple[Tensor, ...]:
        """The outputs of each batch."""
        return tuple(self.read(call(**batch)) for batch in self.calls)

    def function(self) -> Callable[[dict[str, Tensor]], tuple[Tensor, ...]]:
        """The outputs of each batch as a function of parameters; those that are left out keep their values."""
        return lambda params: self.batches(lambda **call: torch.func.functional_call(self.model, params, (), call))


def maker(build: Callable[..., Case], layers: int = 1, vocab: int = 11, **options: Any) -> Callable[..., Case]:
    """`make(width=..., heads=..., ...)` from a function of `Sizes` and options of its own, with these sizes unless
    others are given."""
    return lambda **sizes: build(Sizes(**{"layers": layers, "vocab": vocab} | sizes), **options)


def finish(model: nn.Module, s: Sizes) -> nn.Module:
    """Float64, evaluation mode, all parameters random, all norms with this eps."""
    if s.eps is not None:
        for module in model.modules():
            for name in ("eps", "variance_epsilon"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, s.eps)
    return randomise(model, s.seed, size=0.3)


def repeats(model: nn.Module, per_sample: int) -> int:
    """How many samples it takes."""
    return int(ABUNDANCE * sum(p.numel() for p in model.parameters() if p.requires_grad) / per_sample) + 1


def logits(s: Sizes, length: int = LENGTH) -> int:
    """How many independent numbers there are among the logits of a sequence, about."""
    return length * min(s.vocab, s.width + 2)


def batches(per_sample: int, axis: int = 0, **inputs: Tensor) -> list[dict[str, Tensor]]:
    """Inputs cut along an axis, so that the outputs of a batch are few."""
    size = max(1, BATCH // per_sample)
    parts = {name: x.split(size, axis) for name, x in inputs.items()}
    return [dict(zip(parts, values)) for values in zip(*parts.values())]


def tokens(samples: int, length: int, vocab: int, seed: int = 3) -> Tensor:
    """Random sequences (samples, length), the first of which have every token at every position."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (max(samples, vocab), length), generator=generator)
    ids[:vocab] = (torch.arange(vocab).unsqueeze(1) + torch.arange(length)) % vocab
    return ids


def normal(*shape: int, seed: int = 3) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def on_tokens(
    model: nn.Module, s: Sizes, outputs: int, field: str = "logits", **more: Callable[[int], Tensor]
) -> Case:
    """A model of tokens with `outputs` numbers for each sequence; more inputs as functions of their number."""
    model = finish(model, s)
    ids = tokens(repeats(model, outputs), LENGTH, s.vocab)
    calls = batches(outputs, input_ids=ids, **{name: make(len(ids)) for name, make in more.items()})
    return Case(model, calls, attrgetter(field))


def balanced(case: Case, units: str) -> Case:
    """With maps of this name such that each unit is positive on about half of the inputs.

    A ReLU that is always on, or never, has more flat directions than others.
    """
    for name, module in case.model.named_modules():
        if name.rpartition(".")[2] != units or not isinstance(module, nn.Linear):
            continue
        seen: list[Tensor] = []
        hook = module.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append(inputs[0].flatten(0, -2)))
        with torch.no_grad():
            case.outputs(case.model)
            hook.remove()
            x = torch.cat(seen)
            if module.bias is not None:
                module.bias -= module(x).median(0).values
            else:
                mean = x.mean(0)
                module.weight -= torch.outer(module(mean), mean / mean.square().sum())
    return case


def nullity_of(case: Case) -> int:
    """The nullity of the Jacobian of a case's outputs with respect to all its trainable parameters.

    A `ValueError` tells that it cannot be read off.
    """
    frozen = {name for name, p in case.model.named_parameters() if not p.requires_grad}
    report = count(Symmetry({}, {}, frozen=frozen), case.function(), params_of(case.model))
    if not report.reliable:
        raise ValueError(f"the singular values have no clear gap:\n{report}")
    return report.measured
