"""Finds the symmetry of a model: read its structure, derive the groups, try them, and only then trust them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from symgeo.errors import SymmetryError
from symgeo.functional import Params
from symgeo.models.families import FAMILIES
from symgeo.models.probe import evaluating, full_precision, inputs, output_function
from symgeo.models.recognise import recognise, symmetry_of, unknown_parts
from symgeo.models.stack import Found
from symgeo.symmetry import CheckReport, Symmetry, check
from symgeo.symmetry.check import Function

# what a symmetry up to the eps of a norm may change
APPROXIMATE = 1e-2


def find_symmetry(model: nn.Module, strict: bool = True, approximate: bool = False) -> Symmetry:
    """The symmetry of a model whose layers are in the family tables, verified on the model itself.

    Groups are derived from the structure that a table names (grouped queries, rotary positions, gates,
    activations, norms) and tried: a random element of every group must leave the outputs on random inputs
    unchanged.  Keys are the names of ``model.named_parameters()``.  Parameters whose ``requires_grad`` is False
    are constants: nothing moves them.  The same outputs means in evaluation mode, and from the model's main input
    (token ids, not ``inputs_embeds``, where embeddings are not frozen): logits where the model has them, and hidden
    states of the last layer otherwise.  The model is not modified.

    ``approximate=True`` adds what holds only up to the eps of a norm (exact, and always included, where that is 0).

    A model on the meta device has no weights to try anything with: a warning says so.

    Raises ``SymmetryError`` when no layer is known, when a part that looks like attention or an MLP is in no
    table (with ``strict=False`` a warning, and that part is left alone), or when a derived group does not leave
    the model unchanged.

    >>> from symgeo.models.tiny_vit import TinyViT
    >>> symmetry = find_symmetry(TinyViT())
    >>> symmetry.tensors["blocks.0.attention.query.bias"]
    '(H[blocks.0] e[blocks.0]*)'
    """
    found = recognise(model)
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
    frozen = frozenset(name for name, p in model.named_parameters() if not p.requires_grad)
    symmetry = _with_frozen(symmetry_of(model, found), frozen)
    if any(p.is_meta for p in model.parameters()):
        warnings.warn(f"find_symmetry: {type(model).__name__} is on the meta device, without weights: what follows from "
                      "its structure is returned, and was not tried", stacklevel=2)
        return _with_frozen(symmetry_of(model, found, True), frozen) if approximate else symmetry
    verify(model, found, symmetry)
    if approximate:
        symmetry = _with_frozen(symmetry_of(model, found, True), frozen)
        verify(model, found, symmetry, APPROXIMATE)
    return symmetry


def _with_frozen(symmetry: Symmetry, frozen: frozenset[str]) -> Symmetry:
    return Symmetry(symmetry.tensors, symmetry.groups, symmetry.sizes, symmetry.shifts, frozen=frozen,
                    flows=symmetry.flows)


def verify(
    model: nn.Module, found: Sequence[Found], symmetry: Symmetry, tolerance: float | None = None
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
        own = _relative(symmetry, prefix)
        params = {name: full_precision(p.detach()) for name, p in module.named_parameters()}
        with evaluating(module):
            report = _try(own, output_function(module, call), params, tolerance, by_group=False)
            if not _holds(report):
                report = _try(own, output_function(module, call), params, tolerance, by_group=True)
        _judge(report, module, inside)
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
    """What the declaration says of parameters under ``prefix``, with names relative to it."""
    if not prefix:
        return symmetry
    tensors = {name: text for name, text in symmetry.tensors.items() if name.startswith(prefix)}
    outside = [name for name in symmetry.tensors if name not in tensors]
    outside += [name for targets in symmetry.shifts.values() for name in targets if not name.startswith(prefix)]
    outside += [name for flow in symmetry.flows.values() for name in (*flow.moves, *flow.reads)
                if not name.startswith(prefix)]
    inside, cut = symmetry.without(outside), len(prefix)
    return Symmetry(
        {name[cut:]: pattern for name, pattern in inside.tensors.items()}, inside.groups, inside.sizes,
        {group: {name[cut:]: pattern for name, pattern in shift.items()} for group, shift in inside.shifts.items()},
        frozen=frozenset(name[cut:] for name in inside.frozen if name.startswith(prefix)),
        flows={name: flow.renamed(lambda key: key[cut:]) for name, flow in inside.flows.items()},
    )


def _holds(report: CheckReport) -> bool:
    """Whether the outputs stay; where all is frozen no parameter has to move."""
    return report.invariance <= report.tolerance  # False for NaN


def _judge(report: CheckReport, module: nn.Module, found: Sequence[Found]) -> None:
    if _holds(report):
        return
    bad = [row.name for row in report.groups if not row.invariance <= report.tolerance]
    families = ", ".join(dict.fromkeys(f.family.name for f in found))
    raise SymmetryError(
        f"find_symmetry: {type(module).__name__} does not have the symmetry of the family {families}: a random "
        f"element changes its output by {report.invariance:.1e} (groups {', '.join(bad[:4]) or 'in combination'}). "
        "Declare what it has with symgeo.Symmetry"
    )
