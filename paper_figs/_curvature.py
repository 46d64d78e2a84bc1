"""A tanh network on a toy regression, groups on its hidden units, and what its Hessian is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from symgeo import Symmetry
from symgeo.curvature import Decomposition, DenseBlock, InvariantOperator
from symgeo.groups import Group, Orthogonal, Permutation, SignFlip

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """Mean squared error of a tanh network (weights "w1", biases "b1", ...) on fixed inputs and targets, float64."""

    widths: tuple[int, ...]
    x: Tensor
    y: Tensor

    @classmethod
    def draw(cls, widths: Sequence[int], samples: int, generator: torch.Generator) -> Problem:
        """Normal inputs; targets are sines of random projections of them."""
        x = torch.randn(samples, widths[0], generator=generator, dtype=torch.float64)
        mixing = torch.randn(widths[0], widths[-1], generator=generator, dtype=torch.float64)
        return cls(tuple(widths), x, (x @ mixing).sin())

    def batch(self, rows: int, generator: torch.Generator) -> Problem:
        """The same on random rows of the data."""
        chosen = torch.randint(0, len(self.x), (rows,), generator=generator)
        return Problem(self.widths, self.x[chosen], self.y[chosen])

    def initial(self, generator: torch.Generator) -> Params:
        """Normal weights of variance 1 / fan-in, small biases."""
        params = {}
        for i, (fan_in, fan_out) in enumerate(pairwise(self.widths), start=1):
            draws = torch.randn(fan_out, fan_in + 1, generator=generator, dtype=torch.float64)
            params |= {f"w{i}": draws[:, :-1] / fan_in**0.5, f"b{i}": 0.1 * draws[:, -1]}
        return params

    def loss(self, params: Params) -> Tensor:
        """Mean squared error over 2."""
        z, last = self.x, len(self.widths) - 1
        for i in range(1, last + 1):
            z = z @ params[f"w{i}"].T + params[f"b{i}"]
            z = z.tanh() if i < last else z
        return 0.5 * (z - self.y).square().sum(-1).mean()

    def gradient(self, params: Params) -> Params:
        """Of the loss."""
        return torch.func.grad(self.loss)(params)

    def hessian_product(self, params: Params, direction: Params) -> Params:
        """H v"""
        return torch.func.jvp(self.gradient, (params,), (direction,))[1]

    def training(self, params: Params, lr: float, stops: Sequence[int]) -> Iterator[tuple[int, Params]]:
        """The points at the given steps of gradient descent on the whole batch."""
        for step in range(max(stops) + 1):
            if step in stops:
                yield step, params
            grads = self.gradient(params)
            params = {name: p - lr * grads[name] for name, p in params.items()}


def on_hidden(widths: Sequence[int], pattern: str, groups: dict[str, Group], sizes: dict[str, int] | None = None,
              joint: bool = True, every: int = 1) -> Symmetry:
    """One group on every ``every``-th hidden layer, whose axes have this pattern, with i in place of the layer.

    Joint: all tensors that touch a layer share its group.  Otherwise each tensor has its own, which leaves no
    block between tensors: the block-diagonal model.
    """
    last = len(widths) - 1
    tensors = {}
    for i in range(1, last + 1):
        axes = {f"w{i}": (i, i - 1), f"b{i}": (i,)}
        for name, layers in axes.items():
            tensors[name] = " ".join(_axis(pattern, layer, last, every, "" if joint else name) for layer in layers)
    words = " ".join(tensors.values()).replace("(", " ").replace(")", " ").split()
    letters = {name: name.split("[")[0] for name in dict.fromkeys(words) if name != "_"}
    scoped = {n: _scoped(groups[letter], n) for n, letter in letters.items() if letter in groups}
    return Symmetry(tensors, scoped, {n: sizes[letter] for n, letter in letters.items() if letter in (sizes or {})})


def _axis(pattern: str, layer: int, last: int, every: int, owner: str) -> str:
    if layer in (0, last) or (layer - 1) % every:
        return "_"
    words = pattern.replace("(", "( ").replace(")", " )").split()
    return " ".join(w if w in "()_" else f"{w}[{layer}{owner}]" for w in words).replace("( ", "(").replace(" )", ")")


def _scoped(group: Group, name: str) -> Group:
    return group if group.per is None else type(group)(per=f"{group.per}[{name.split('[')[1]}")


def families(widths: Sequence[int], every: int) -> dict[str, tuple[Symmetry, Symmetry]]:
    """The groups of the figures, each as it is and with a group of its own for each tensor."""
    signed: dict[str, Group] = {"h": Permutation(), "s": SignFlip(per="h")}
    chosen: dict[str, tuple[str, dict[str, Group], dict[str, int] | None]] = {
        "permutations": ("h", {"h": Permutation()}, None),
        "signed permutations": ("(h s)", signed, {"s": 1}),
    }
    found = {
        name: (on_hidden(widths, *args, every=every), on_hidden(widths, *args, joint=False, every=every))
        for name, args in chosen.items()
    }
    tensors = {}
    for i, (fan_in, fan_out) in enumerate(pairwise(widths), start=1):
        tensors |= {f"w{i}": f"n{i} _" if fan_out > fan_in else f"_ n{i}", f"b{i}": f"c{i}"}
    names = [name for text in tensors.values() for name in text.split() if name != "_"]
    alone = Symmetry(tensors, {name: Orthogonal() for name in names})
    return found | {"rotations, tensor by tensor": (alone, alone)}


def dense_hessian(problem: Problem, params: Params) -> Tensor:
    """H (N, N), parameters in the order of the dictionary."""
    flat = torch.cat([p.flatten() for p in params.values()])

    def loss(x: Tensor) -> Tensor:
        return problem.loss(unflatten(x, params))

    return torch.func.hessian(loss)(flat)


def unflatten(x: Tensor, like: Params) -> Params:
    """A vector as parameters."""
    pieces = x.split([p.numel() for p in like.values()])
    return {name: piece.reshape(p.shape) for (name, p), piece in zip(like.items(), pieces)}


def group_average(split: Decomposition, hessian: Tensor, like: Params) -> InvariantOperator:
    """The orthogonal projection of a symmetric matrix on the maps that commute with the group.

    The sum over eigenpairs of lambda R2(v, v), in blocks of all eigenvectors at once.
    """
    values, vectors = torch.linalg.eigh(hessian)
    encoded = torch.func.vmap(lambda v: tuple(split.encode(unflatten(v, like))))(vectors.T)
    blocks = []
    for bucket, x in zip(split.buckets, encoded):
        weighted = values.reshape(-1, 1, 1, 1, 1) * x
        blocks.append(DenseBlock((weighted @ x.mH).sum(0) / bucket.dimension))
    return InvariantOperator(split, blocks)


def flat(params: Params) -> Tensor:
    """Parameters as a vector."""
    return torch.cat([p.flatten() for p in params.values()])


def cosine(a: Params, b: Params) -> float:
    """Of the angle between two points; 0 where one vanishes."""
    x, y = flat(a), flat(b)
    size = float(x.norm() * y.norm())
    return float(x @ y) / size if size else 0.0


def combine(a: Params, b: Params, factor: float) -> Params:
    """a + factor b"""
    return {name: x + factor * b[name] for name, x in a.items()}


def direction(params: Params, generator: torch.Generator) -> Params:
    """A random unit vector."""
    x = torch.randn(sum(p.numel() for p in params.values()), generator=generator, dtype=torch.float64)
    return unflatten(x / x.norm(), params)
