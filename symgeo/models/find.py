"""Finds the symmetry of a model: read its structure, derive the groups, try them, and only then trust them."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass

import torch
from torch import nn

from symgeo.errors import SymmetryError
from symgeo.functional import Params
from symgeo.models.entry import Entries, embeddings, heads
from symgeo.models.families import FAMILIES
from symgeo.models.family import Family, qualified_names
from symgeo.models.generators import embedding_symmetry, entry_symmetry, head_symmetry, layer_symmetry
from symgeo.models.probe import evaluating, full_precision, inputs, output_function
from symgeo.models.structure import Layer
from symgeo.symmetry import CheckReport, Symmetry, check
from symgeo.symmetry.check import Function

# what a part with learned weights is usually called; such a part outside every table is named, not ignored
SUSPECT = re.compile(r"Attention|Attn|MLP|FeedForward|FFN|EncoderLayer|DecoderLayer|Expert|LSTM|GRU|RNN")

# what a symmetry up to the eps of a norm may change
APPROXIMATE = 1e-2


@dataclass(frozen=True)
class Found:
    """One recognised layer: where, by which table, its symmetry with full parameter names, and its structure.

    The ends of a stack, which are no layers, have none.
    """

    prefix: str
    family: Family
    symmetry: Symmetry
    layer: Layer | None = None


def find_symmetry(model: nn.Module, strict: bool = True, approximate: bool = False) -> Symmetry:
    """The symmetry of a model whose layers are in the family tables, verified on the model itself.

    Groups are derived from the structure that a table names (grouped queries, rotary positions, gates,
    activations, norms) and tried: a random element of every group must leave the outputs on random inputs
    unchanged.  Keys are the names of ``model.named_parameters()``.  Parameters whose ``requires_grad`` is False
    are constants: nothing moves them.  The same outputs means in evaluation mode, and from the model's main input
    (token ids, not ``inputs_embeds``, where embeddings are not frozen).  The model is not modified.

    ``approximate=True`` adds what holds only up to the eps of a norm (exact, and always included, where that is 0).

    Raises ``SymmetryError`` when no layer is known, when a part that looks like attention or an MLP is in no
    table (with ``strict=False`` a warning, and that part is left alone), or when a derived group does not leave
    the model unchanged.

    >>> from symgeo.models.tiny_vit import TinyViT
    >>> symmetry = find_symmetry(TinyViT())
    >>> symmetry.tensors["blocks.0.attention.query.bias"]
    '(H[blocks.0] e[blocks.0]*)'
    """
    found = recognise(model, approximate)
    unknown = unknown_parts(model, found)
    if not found:
        known = ", ".join(family.name for family in FAMILIES)
        parts = f"; it has {', '.join(unknown[:4])}" if unknown else ""
        raise SymmetryError(
            f"find_symmetry: {type(model).__name__} has no layer of a known family (known: {known}){parts}. "
            "Declare its symmetry with symgeo.Symmetry and verify it with symgeo.check"
        )
    if unknown:
        message = (f"find_symmetry: {type(model).__name__} has parts that no table describes: {', '.join(unknown[:8])}"
                   f"{f' and {len(unknown) - 8} more' if len(unknown) > 8 else ''}")
        if strict:
            raise SymmetryError(f"{message}. Pass strict=False to leave them out, or declare their symmetry")
        warnings.warn(f"{message}; they are left alone", stacklevel=2)
    ends = find_ends(model, found)
    frozen = frozenset(name for name, p in model.named_parameters() if not p.requires_grad)
    symmetry = _union(found + ends, frozen)
    verify(model, (recognise(model) if approximate else found) + ends, frozen)
    if approximate:
        verify(model, found + ends, frozen, APPROXIMATE)
    return symmetry


def recognise(model: nn.Module, approximate: bool = False) -> list[Found]:
    """The layers of known families, outermost first match."""
    entries = Entries()
    tables = {family.layer: family for family in FAMILIES}
    result: list[Found] = []

    def walk(module: nn.Module, prefix: str, above: list[nn.Module]) -> None:
        names = [name for name in qualified_names(module) if name in tables]
        if names:
            family = tables[names[0]]  # that of its own class before those it derives from
            # the list of layers lies between a layer and the module that holds the stack
            stack = next((m for m in reversed(above) if not isinstance(m, nn.ModuleList)), None)
            layer = family.read(module, stack)
            symmetry = layer_symmetry(layer, approximate)
            symmetry = symmetry.each(prefix.removesuffix(".")) if prefix else symmetry
            if before := entries.norm_before(layer, family, prefix, above):
                symmetry = symmetry | entry_symmetry(layer, before, prefix, approximate)
            result.append(Found(prefix, family, symmetry, layer))
            return
        for name, child in module.named_children():
            walk(child, f"{prefix}{name}.", [*above, module])

    walk(model, "", [])
    return result


def find_ends(model: nn.Module, found: list[Found]) -> list[Found]:
    """The embeddings, and the last norm with the head behind it, where the families of the layers know them."""
    layers = [(f.family, f.layer) for f in found if f.layer]
    ends = [(prefix, family, head_symmetry(final, head))
            for prefix, family, final, head in heads(model, dict(layers))]
    ends += [(prefix, family, embedding_symmetry(table, axes, centred))
             for prefix, family, table, axes, centred in embeddings(model, layers)]
    return [Found(prefix, family, symmetry.each(prefix.removesuffix(".")) if prefix else symmetry)
            for prefix, family, symmetry in ends]


def unknown_parts(model: nn.Module, found: list[Found]) -> list[str]:
    """Parts with parameters that look like attention or an MLP and that no table accounts for."""
    parts = []
    for name, module in model.named_modules():
        path = f"{name}." if name else ""
        home = next((f for f in found if path.startswith(f.prefix)), None)
        own = [parameter for parameter, _ in module.named_parameters(recurse=False)]
        if home is not None:
            inside = path.removeprefix(home.prefix)
            strange = [p for p in own if not _accounted(f"{inside}{p}", home.family)]
            parts += [f"{name or 'the model'} ({type(module).__name__})"] if strange else []
        elif SUSPECT.search(type(module).__name__) and any(True for _ in module.parameters()):
            contains = any(f.prefix.startswith(path) for f in found)
            parts += [] if contains else [f"{name or 'the model'} ({type(module).__name__})"]
    return _outermost(parts)


def _accounted(parameter: str, family: Family) -> bool:
    return any(re.match(rf"{re.escape(name)}([._]|$)", parameter) for name in family.owned())


def _outermost(parts: list[str]) -> list[str]:
    """Without the parts that lie inside another one of the list."""
    names = [part.split(" ")[0] for part in parts]
    return [part for part, name in zip(parts, names) if not any(name.startswith(f"{other}.") for other in names)]


def _union(found: list[Found], frozen: frozenset[str]) -> Symmetry:
    tensors, groups, sizes, shifts, flows = {}, {}, {}, {}, {}
    for f in found:
        tensors.update(f.symmetry.tensors)
        groups.update(f.symmetry.groups)
        sizes.update(f.symmetry.sizes)
        shifts.update(f.symmetry.shifts)
        flows.update(f.symmetry.flows)
    return Symmetry(tensors, groups, sizes, shifts, frozen=frozen, flows=flows)


def verify(
    model: nn.Module, found: list[Found], frozen: frozenset[str], tolerance: float | None = None
) -> list[CheckReport]:
    """Tries a random element on the outermost modules with known inputs that contain the layers.

    Raises ``SymmetryError`` naming the groups that change the output, and layers that could not be tried.
    """
    reports, waiting = [], list(found)
    for prefix, module in _probes(model, ""):
        inside = [f for f in waiting if f.prefix.startswith(prefix)]
        call = inputs(module, torch.Generator().manual_seed(0)) if inside else None
        if call is None:
            continue
        waiting = [f for f in waiting if f not in inside]
        symmetry = _relative(_union(inside, frozen), prefix)
        params = {name: full_precision(p.detach()) for name, p in module.named_parameters()}
        if any(p.is_meta for p in params.values()):
            raise SymmetryError(
                f"find_symmetry: {type(module).__name__} has parameters on the meta device, on which nothing can be "
                "tried; give the model with its weights"
            )
        with evaluating(module):
            report = _try(symmetry, output_function(module, call), params, tolerance, by_group=False)
            if not _holds(report):
                report = _try(symmetry, output_function(module, call), params, tolerance, by_group=True)
        _judge(report, module, inside[0].family)
        reports.append(report)
    if waiting:
        names = ", ".join(f"{f.prefix.removesuffix('.')} ({f.family.name})" for f in waiting[:4])
        raise SymmetryError(
            f"find_symmetry: {type(model).__name__} holds layers that cannot be tried alone: {names}. Pass the module "
            "that transformers built, or declare the symmetry with symgeo.Symmetry and verify it with symgeo.check"
        )
    return reports


def _try(
    symmetry: Symmetry, f: Function, params: Params, tolerance: float | None, by_group: bool
) -> CheckReport:
    generator = torch.Generator().manual_seed(1)
    return check(symmetry, f, params, samples=1, generator=generator, tolerance=tolerance, by_group=by_group)


def _probes(module: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    if inputs(module, torch.Generator().manual_seed(0)) is not None:
        return [(prefix, module)]
    return [probe for name, child in module.named_children() for probe in _probes(child, f"{prefix}{name}.")]


def _relative(symmetry: Symmetry, prefix: str) -> Symmetry:
    """The declaration with parameter names relative to ``prefix``."""
    cut = len(prefix)
    return Symmetry(
        {name[cut:]: pattern for name, pattern in symmetry.tensors.items()}, symmetry.groups, symmetry.sizes,
        {group: {name[cut:]: pattern for name, pattern in shift.items()} for group, shift in symmetry.shifts.items()},
        frozen=frozenset(name[cut:] for name in symmetry.frozen if name.startswith(prefix)),
        flows={name: flow.renamed(lambda key: key[cut:]) for name, flow in symmetry.flows.items()},
    )


def _holds(report: CheckReport) -> bool:
    """Whether the outputs stay; where all is frozen no parameter has to move."""
    return report.invariance <= report.tolerance  # False for NaN


def _judge(report: CheckReport, module: nn.Module, family: Family) -> None:
    if _holds(report):
        return
    bad = [row.name for row in report.groups if not row.invariance <= report.tolerance]
    raise SymmetryError(
        f"find_symmetry: {type(module).__name__} does not have the symmetry of the family {family.name}: a random "
        f"element changes its output by {report.invariance:.1e} (groups {', '.join(bad[:4]) or 'in combination'}). "
        "Declare what it has with symgeo.Symmetry"
    )
