"""Brute force for orbit averages: every element of a finite group, dense matrices in float64, nothing shared with the
package but the action of a symmetry.

Averages over O(2) and U(1) are exact on finite subgroups, because only moments of low degree occur: those of degree
up to 4 on a dihedral group of order 10, those of degree 2 on three phases or a dihedral group of order 6.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from symgeo import Symmetry
from symgeo.groups import Cyclic, GeneralLinear, Group, Orthogonal, Permutation, Rotary, SignFlip

Params = dict[str, Tensor]


def flat(params: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in params.values()])


def normal(shapes: Mapping[str, Sequence[int]], seed: int, dtype: torch.dtype = torch.float64) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for k, s in shapes.items()}


def error(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the size of b (at least 1)."""
    assert a.shape == b.shape and bool(torch.isfinite(a).all())
    return float((a - b).abs().max() / max(1.0, float(b.abs().max()))) if a.numel() else 0.0


def permutations(n: int) -> list[Tensor]:
    return [torch.tensor(p) for p in itertools.permutations(range(n))]


def signs(n: int) -> list[Tensor]:
    return [torch.tensor(s, dtype=torch.float64) for s in itertools.product([1.0, -1.0], repeat=n)]


def dihedral(m: int) -> list[Tensor]:
    """All 2 m rotations and reflections of a regular m-gon."""
    mirror = torch.tensor([[1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    turns = [2 * math.pi * k / m for k in range(m)]
    entries = [(math.cos(t), math.sin(t)) for t in turns]
    rotations = [torch.tensor([[c, -s], [s, c]], dtype=torch.float64) for c, s in entries]
    return [r @ s for r in rotations for s in (torch.eye(2, dtype=torch.float64), mirror)]


def phases(planes: int, m: int = 3) -> list[Tensor]:
    roots = [complex(math.cos(2 * math.pi * k / m), math.sin(2 * math.pi * k / m)) for k in range(m)]
    return [torch.tensor(z, dtype=torch.complex128) for z in itertools.product(roots, repeat=planes)]


def copies(elements: Sequence[Tensor], count: int) -> list[Tensor]:
    """All families of `count` elements."""
    return [torch.stack(family) for family in itertools.product(elements, repeat=count)]


@dataclass(frozen=True)
class Case:
    """A declaration, shapes, and all elements of every group (of a finite group with the same moments)."""

    name: str
    shapes: dict[str, tuple[int, ...]]
    tensors: dict[str, str]
    groups: dict[str, Group]
    elements: dict[str, list[Tensor]]
    sizes: dict[str, int] | None = None
    compact: bool = False

    @property
    def symmetry(self) -> Symmetry:
        return Symmetry(self.tensors, self.groups, self.sizes)

    def params(self, seed: int = 0) -> Params:
        return normal(self.shapes, seed)

    def orbit(self, *vectors: Params) -> Iterator[tuple[Tensor, ...]]:
        """The images of vectors under every element."""
        action = self.symmetry.bind(vectors[0])
        for choice in itertools.product(*self.elements.values()):
            g = action.element(dict(zip(self.elements, choice)))
            yield tuple(flat(action.act(g, v)) for v in vectors)

    def average(self, u: Params, v: Params) -> tuple[Tensor, Tensor]:
        """The mean of u and of u v^T over the orbit."""
        left, right = (torch.stack(side) for side in zip(*self.orbit(u, v)))
        return left.mean(0), left.mT @ right / len(left)

    def __str__(self) -> str:
        return self.name


def permuted(n: int) -> Case:
    shapes = {"w": (n, n), "b": (n,), "m": (2, n), "free": (2,)}
    tensors = {"w": "h h*", "b": "h", "m": "_ h"}
    return Case(f"S{n}", shapes, tensors, {"h": Permutation()}, {"h": permutations(n)})


def signed(n: int) -> Case:
    """Signed permutations on one and two axes, with unsigned companions, on mixed axes in both orders."""
    shapes = {"w": (n, n), "b": (n,), "gain": (n,), "x": (n, n), "y": (n, n), "z": (n, n), "free": (2,)}
    tensors = {"w": "(h s) (h s)", "b": "(h s)", "gain": "h", "x": "(h s) h", "y": "h (h s)", "z": "h h"}
    groups = {"h": Permutation(), "s": SignFlip(per="h")}
    return Case(f"B{n}", shapes, tensors, groups, {"h": permutations(n), "s": [s[:, None] for s in signs(n)]})


def flipped(n: int) -> Case:
    shapes, tensors = {"w": (n, n), "b": (n, 2)}, {"w": "h h", "b": "h _"}
    return Case(f"signs{n}", shapes, tensors, {"h": SignFlip()}, {"h": signs(n)})


def cyclic(n: int) -> Case:
    shapes, tensors = {"w": (n, n), "b": (n, 2)}, {"w": "h h", "b": "h _"}
    return Case(f"C{n}", shapes, tensors, {"h": Cyclic()}, {"h": [torch.tensor(k) for k in range(n)]})


def heads(count: int, m: int, two: bool) -> Case:
    """O(2) in every head, and the heads permuted; `two` on both axes of a tensor."""
    shapes: dict[str, tuple[int, ...]] = {"q": (3, 2 * count), "b": (2 * count,), "g": (count,)}
    tensors = {"q": "_ (H e)", "b": "(H e)", "g": "H"}
    if two:
        shapes |= {"w": (2 * count, 2 * count), "x": (2 * count, count), "y": (count, 2 * count)}
        tensors |= {"w": "(H e) (H e)", "x": "(H e) H", "y": "H (H e)"}
    elements = {"H": permutations(count), "e": copies(dihedral(m), count)}
    groups = {"H": Permutation(), "e": Orthogonal(per="H")}
    return Case(f"heads{count}{'x2' * two}", shapes, tensors, groups, elements, {"H": count})


REFLECTIONS = [torch.ones(1, 1, dtype=torch.float64), -torch.ones(1, 1, dtype=torch.float64)]  # O(1)

CASES = [
    *(permuted(n) for n in range(1, 6)),
    *(signed(n) for n in range(1, 4)),
    *(flipped(n) for n in range(1, 4)),
    *(cyclic(n) for n in range(1, 7)),
    heads(2, 5, True),
    heads(3, 3, False),
    Case("mlp", {"w1": (3, 2), "b1": (3,), "w2": (4, 3), "b2": (4,), "w3": (2, 4), "b3": (2,)},
         {"w1": "h _", "b1": "h", "w2": "k h*", "b2": "k", "w3": "_ k*"}, {"h": Permutation(), "k": Permutation()},
         {"h": permutations(3), "k": permutations(4)}),
    Case("rnn", {"b": (2, 4), "w": (4, 4), "c": (4, 3), "bias": (4,), "out": (3,)},
         {"b": "_ h", "w": "h h", "c": "h _", "bias": "h"}, {"h": Permutation()}, {"h": permutations(4)}),
    Case("signed rnn with gain", {"b": (2, 3), "w": (3, 3), "gain": (3,)},
         {"b": "_ (h s)", "w": "(h s) (h s)", "gain": "h"}, {"h": Permutation(), "s": SignFlip(per="h")},
         {"h": permutations(3), "s": [s[:, None] for s in signs(3)]}),
    Case("free axes between", {"w": (2, 3, 2, 3), "v": (3,)}, {"w": "_ h _ h", "v": "h"}, {"h": Permutation()},
         {"h": permutations(3)}),
    Case("copies", {"w": (6, 2), "v": (2, 3, 3)}, {"w": "(c h) _", "v": "c h h"}, {"h": Permutation(per="c")},
         {"h": copies(permutations(3), 2)}, {"c": 2}),
    Case("O(2)", {"w": (2, 2), "b": (2, 3)}, {"w": "e e", "b": "e _"}, {"e": Orthogonal()}, {"e": dihedral(5)}),
    Case("O(2) per copy", {"w": (6, 2), "v": (3, 2, 2)}, {"w": "(c e) _", "v": "c e e"}, {"e": Orthogonal(per="c")},
         {"e": copies(dihedral(5), 3)}, {"c": 3}),
    Case("two groups in a head", {"q": (4, 2), "p": (2, 4), "x": (2, 1, 2), "b": (4,)},
         {"q": "(H e) (H f)", "p": "(H f) (H e)", "x": "H f e", "b": "(H e)"},
         {"H": Permutation(), "e": Orthogonal(per="H"), "f": Orthogonal(per="H")},
         {"H": permutations(2), "e": copies(dihedral(3), 2), "f": copies(REFLECTIONS, 2)}, {"H": 2}),
    Case("cells", {"x": (2, 2, 2), "b": (2, 2)}, {"x": "H e e", "b": "H e"},
         {"H": Permutation(), "e": Orthogonal(per="H")}, {"H": permutations(2), "e": copies(dihedral(5), 2)}),
    Case("signs of a free factor", {"w": (3, 3), "b": (3, 2), "v": (3,)},
         {"w": "(h s) (h s)", "b": "(h s) _", "v": "(h s)"}, {"s": SignFlip(per="h")},
         {"s": [s[:, None] for s in signs(3)]}),
    Case("vectors of signs", {"w": (4, 3), "v": (4,)}, {"w": "(h e) _", "v": "(h e)"},
         {"h": SignFlip(), "e": Permutation(per="h")}, {"h": signs(2), "e": copies(permutations(2), 2)}, {"h": 2}),
    Case("grouped heads", {"q": (8, 3), "k": (4, 3), "v": (2, 3), "o": (2, 4)},
         {"q": "(K G e) _", "k": "(K e) _", "v": "(K f) _", "o": "_ (K G f)"},
         {"K": Permutation(), "G": Permutation(per="K"), "e": Rotary(per="K"), "f": GeneralLinear(per="K")},
         {"K": permutations(2), "G": copies(permutations(2), 2), "e": copies(phases(1), 2),
          "f": copies(REFLECTIONS, 2)},
         {"K": 2, "G": 2}, compact=True),
    Case("planes", {"q": (3, 4), "b": (4,), "w": (4, 2)}, {"q": "_ a", "b": "a", "w": "a b"},
         {"a": Rotary(), "b": Rotary(pairing="interleaved")}, {"a": phases(2), "b": phases(1)}, compact=True),
    Case("planes and shifts", {"q": (4, 4), "b": (4,), "c": (4, 2)}, {"q": "a c", "b": "a", "c": "c _"},
         {"a": Rotary(), "c": Cyclic()}, {"a": phases(2), "c": [torch.tensor(k) for k in range(4)]}, compact=True),
    Case("two shifts", {"w": (3, 4), "x": (4, 3, 4), "b": (3,), "c": (4,)},
         {"w": "a b", "x": "b a b", "b": "a", "c": "b"}, {"a": Cyclic(), "b": Cyclic()},
         {"a": [torch.tensor(k) for k in range(3)], "b": [torch.tensor(k) for k in range(4)]}),
    Case("permuted shifts", {"w": (6, 2), "b": (2,)}, {"w": "(h c) _", "b": "h"},
         {"h": Permutation(), "c": Cyclic(per="h")},
         {"h": permutations(2), "c": copies([torch.tensor(k) for k in range(3)], 2)}, {"h": 2}),
]


def dense_power(s: Tensor, p: float, damping: float = 0.0, cutoff: float = 1e-11) -> Tensor:
    """U diag((|s| + damping s_max)^p) U^T of a dense symmetric matrix, 0 for what is zero."""
    values, vectors = torch.linalg.eigh(0.5 * (s + s.mT))
    largest = values.abs().max()
    moved = values.abs() + damping * largest
    keep = moved > cutoff * largest
    return vectors @ torch.diag(torch.where(keep, torch.where(keep, moved, 1.0) ** p, 0.0)) @ vectors.mT
