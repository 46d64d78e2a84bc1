"""The preset of hidden units: permutations, signs and scalings along chains of linear maps."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from torch import nn

from symgeo.errors import SymmetryError
from symgeo.groups import Group, Permutation, PositiveScaling, SignFlip
from symgeo.models.recognise import recognise
from symgeo.models.structure import Linear, linear
from symgeo.optim.presets.selection import excluded
from symgeo.symmetry import Symmetry

#: modules that do not mix units
_ELEMENTWISE = (
    nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.Sigmoid, nn.ELU, nn.LeakyReLU, nn.Softplus, nn.Hardtanh, nn.ReLU6,
    nn.Identity, nn.Dropout,
)


def mlp(
    model: nn.Module, signed: bool = False, scaled: bool = False, exclude: Iterable[str | nn.Module] = ()
) -> Symmetry:
    r"""Permutations of the hidden units of every MLP; all maps that touch a hidden layer share its group.

    MLPs are those of the layers that `symgeo.find_symmetry` knows; nn.Linear maps in an nn.Sequential with nothing
    but activations, dropout or identities between them; and modules whose only parameters are those of nn.Linear
    children that fit together in the order of their registration.

    signed: with the sign of every unit (odd activations; for others it is coarser than a symmetry)
    scaled: with a positive factor for every unit (relu); SymO then needs compact=True, and its trajectory does not
        depend on the scales
    exclude: names or modules; an MLP of which a parameter is excluded is left out

    Raises SymmetryError where there is no MLP.

    >>> mlp(nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2))).tensors
    {'0.weight': 'h0[0] _', '0.bias': 'h0[0]', '2.weight': '_ h0[0]'}
    """
    params = dict(model.named_parameters())
    out = excluded(model, exclude)
    tensors: dict[str, str] = {}
    groups: dict[str, Group] = {}
    for chain in _chains(model):
        names = [name for maps in chain for m in maps for name in (m.weight, m.bias) if name]
        if any(name not in params or id(params[name]) in out or not params[name].requires_grad for name in names):
            continue
        _declare(chain, signed, scaled, tensors, groups)
    if not tensors:
        raise SymmetryError(
            f"mlp: found no MLP in {type(model).__name__} (layers of a known family, nn.Sequential of nn.Linear and"
            " activations, or modules made of nn.Linear maps); declare its symmetry with symgeo.Symmetry"
        )
    sizes = {name: 1 for name in groups if name[0] in "su"}
    return Symmetry(tensors, groups, sizes)


#: consecutive layers, each with the maps that write to it (two with a gate), then the map that reads the last one
Chain = list[list[Linear]]


def _declare(
    chain: Chain, signed: bool, scaled: bool, tensors: dict[str, str], groups: dict[str, Group]
) -> None:
    """Patterns of one chain: hidden layer i transforms by (h_i s_i u_i)."""
    before = "_"
    place = chain[0][0].weight.removesuffix(".weight")
    for i, maps in enumerate(chain):
        last = i == len(chain) - 1
        h, s, u = (f"{letter}{i}[{place}]" for letter in "hsu")
        parts = [h, *([s] if signed else []), *([u] if scaled else [])]
        axis = "_" if last else f"({' '.join(parts)})" if len(parts) > 1 else h
        if not last:
            groups[h] = Permutation()
            groups |= {s: SignFlip(per=h)} if signed else {}
            groups |= {u: PositiveScaling(per=h)} if scaled else {}
        for number, m in enumerate(maps):
            out = h if number and not last else axis  # of a gate only the map that is not activated is scaled
            tensors[m.weight] = f"{before} {out}" if m.transposed else f"{out} {before}"
            if m.bias and not last:
                tensors[m.bias] = out
        before = f"({' '.join([h, *(f'{name}*' for name in parts[1:])])})" if len(parts) > 1 else h


def _chains(model: nn.Module) -> list[Chain]:
    """All MLPs: of known layers, then of what lies outside of these."""
    found: list[Chain] = []
    prefixes = []
    for layer in recognise(model):
        prefixes.append(layer.prefix)
        m = layer.layer.mlp
        if m and not m.fused:
            maps = [[m.up, m.gate] if m.gate else [m.up], [m.down]]
            found.append([[x.renamed(lambda name, p=layer.prefix: p + name) for x in row] for row in maps])  # type: ignore[misc]
    for name, module in model.named_modules():
        path = f"{name}." if name else ""
        if any(path.startswith(prefix) for prefix in prefixes):
            continue
        for chain in _sequences(module):
            found.append([[linear(model, path + key)] for key in chain])
    return found


def _sequences(module: nn.Module) -> list[list[str]]:
    """The names of children that form MLPs: runs in an nn.Sequential, or all nn.Linear children of other modules."""
    if isinstance(module, nn.Sequential):
        runs: list[list[str]] = [[]]
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                runs[-1].append(name)
            elif not isinstance(child, _ELEMENTWISE):
                runs.append([])
        return [run for run in runs if len(run) > 1]
    children = {name: child for name, child in module.named_children() if any(True for _ in child.parameters())}
    own = any(True for _ in module.parameters(recurse=False))
    linears = [child for child in children.values() if isinstance(child, nn.Linear)]
    fits = all(a.out_features == b.in_features for a, b in pairwise(linears))
    if own or len(linears) < 2 or len(linears) != len(children) or not fits:
        return []
    return [list(children)]


