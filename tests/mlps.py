"""Small MLPs with the symmetry that their activation gives them, for alignment and merging."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from symgeo import Symmetry
from symgeo.functional import Params
from symgeo.groups import Permutation, PositiveScaling, SignFlip

ACTIVATIONS = {"gelu": nn.GELU, "tanh": nn.Tanh, "relu": nn.ReLU}
INSIDE = {"gelu": None, "tanh": SignFlip, "relu": PositiveScaling}


def mlp(kind: str, widths: tuple[int, ...]) -> nn.Sequential:
    """Linear layers of these widths with activations between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), ACTIVATIONS[kind]()]
    return nn.Sequential(*layers[:-1]).double()


def mlp_symmetry(kind: str, hidden: int) -> Symmetry:
    """Permutations of every hidden layer, with signs for tanh and positive scalings for ReLU."""
    tensors, groups, column = {}, {}, "_"
    for i in range(hidden + 1):
        unit = f"h{i} s{i}" if INSIDE[kind] else f"h{i}"
        row = "_" if i == hidden else f"({unit})"
        tensors[f"{2 * i}.weight"] = f"{row} {column}"
        if i < hidden:
            tensors[f"{2 * i}.bias"] = row
            groups[f"h{i}"] = Permutation()
            if INSIDE[kind]:
                groups[f"s{i}"] = INSIDE[kind](per=f"h{i}")
        column = f"({' '.join(name + '*' for name in unit.split())})"
    return Symmetry(tensors, groups)


def normal_params(model: nn.Module, seed: int) -> Params:
    """Independent normal parameters; weights scaled by the root of the number of inputs."""
    generator = torch.Generator().manual_seed(seed)
    params = {}
    for name, p in model.named_parameters():
        inputs = p.shape[-1] if p.ndim > 1 else 1
        params[name] = torch.randn(p.shape, generator=generator, dtype=p.dtype) / inputs**0.5
    return params


def gap(a: Params, b: Params) -> float:
    """The largest difference of two sets of parameters, relative to ``1 + |b|``."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max() / (1 + b[name].abs().max())) for name in b)


def output(model: nn.Module, params: Params, seed: int = 0) -> Tensor:
    """The outputs of an MLP on a few random inputs."""
    first = next(m for m in model if isinstance(m, nn.Linear))
    x = torch.randn(23, first.in_features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.func.functional_call(model, params, (x,))
