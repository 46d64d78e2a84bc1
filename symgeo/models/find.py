"""Finds the symmetry of a model: read its structure, derive the groups, try them, and only then trust them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from symgeo.distributed import refuse_sharded
from symgeo.errors import SymmetryError
from symgeo.functional import Params
from symgeo.models.adapters import adapter_symmetries
from symgeo.models.detect import Guess, guesses
from symgeo.models.families import FAMILIES
from symgeo.models.plain import plain_symmetries
from symgeo.models.precision import full_double
from symgeo.models.probe import Call, double_precision, evaluating, full_precision, inputs, output_function
from symgeo.models.recognise import recognise, symmetry_of, union, unknown_parts
from symgeo.symmetry import CheckReport, Symmetry, check
from symgeo.symmetry.check import Function

# what a symmetry up to the eps of a norm may change
APPROXIMATE = 1e-2
# up to this many parameters trials are made in double precision
EXACT = 3 * 10**8


@dataclass(frozen=True)
class Findings:
    """What a search came to.

    symmetry : what was found and, but for a model on the meta device, tried
    found : (where, as what) for every part that was recognised
    refused : (where, as what) for guesses about unknown parts that a trial refuted
    unknown : parts with parameters that look like attention, an MLP or a recurrent net and were not recognised
    tried : whether random elements were applied to the model
    """

    symmetry: Symmetry
    found: tuple[tuple[str, str], ...]
    refused: tuple[tuple[str, str], ...]
    unknown: tuple[str, ...]
    tried: bool


def find_symmetry(model: nn.Module, strict: bool = True, approximate: bool = False) -> Symmetry:
    """The symmetry of a model, verified on the model itself.

    Groups are derived from the structure that the family tables name (grouped queries, rotary positions, gates,
    activations, norms, whole residual streams), from chains of linear maps and convolutions in ``nn.Sequential``, and
    from the adapters of PEFT; attention and MLPs of models that no table knows are guessed from names and shapes.  All
    of it is tried: a random element of every group must leave the outputs on random inputs unchanged.  Keys are the
    names of ``model.named_parameters()``.  Parameters whose ``requires_grad`` is False are constants: nothing moves
    them.  The same outputs means in evaluation mode, and from the model's main input (token ids, not
    ``inputs_embeds``, where embeddings are not frozen): logits where the model has them, and hidden states of the last
    layer otherwise.  The model is not modified.

    ``approximate=True`` adds what holds only up to the eps of a norm (exact, and always included, where that is 0).

    A model on the meta device has no weights to try anything with: a warning says so.

    Raises ``SymmetryError`` when nothing is recognised, when a part that looks like attention or an MLP is not (with
    ``strict=False`` a warning, and that part is left alone), or when a derived group does not leave the model
    unchanged.

    >>> from symgeo.models.tiny_vit import TinyViT
    >>> symmetry = find_symmetry(TinyViT())
    >>> symmetry.tensors["blocks.0.attention.query.bias"]
    '(H[blocks.0] e[blocks.0]*)'
    """
    findings = examine(model, approximate)
    kind, unknown = type(model).__name__, findings.unknown
    refused = f". Tried and refuted: {_listed(findings.refused)}" if findings.refused else ""
    if not findings.found:
        known = ", ".join(family.name for family in FAMILIES)
        parts = f"; it has {', '.join(unknown[:4])}" if unknown else ""
        raise SymmetryError(
            f"find_symmetry: {kind} has no layer of a known family (known: {known}) and no chain of maps in an "
            f"nn.Sequential{parts}{refused}. Declare its symmetry with symgeo.Symmetry and verify it with symgeo.check"
        )
    if unknown:
        message = (f"find_symmetry: {kind} has parts that no table describes: {', '.join(unknown[:8])}"
                   f"{f' and {len(unknown) - 8} more' if len(unknown) > 8 else ''}{refused}")
        if strict:
            raise SymmetryError(f"{message}. Pass strict=False to leave them out, or declare their symmetry")
        warnings.warn(f"{message}; they are left alone", stacklevel=2)
    if not findings.tried:
        warnings.warn(f"find_symmetry: {kind} is on the meta device, without weights: what follows from its structure "
                      "is returned, and was not tried", stacklevel=2)
    return findings.symmetry


def examine(model: nn.Module, approximate: bool = False) -> Findings:
    """What :func:`find_symmetry` finds, with a list of what was recognised, refuted and not recognised."""
    refuse_sharded(dict(model.named_parameters()), "find the symmetry before fully_shard, or on the meta device")
    layers = recognise(model)
    meta = any(p.is_meta for p in model.parameters())
    _check_finite(model)
    own = [f.prefix for f in layers]
    chains = [] if meta else plain_symmetries(model, own, approximate)
    adapters = adapter_symmetries(model)
    parts = {prefix: "chain" for prefix, _ in chains} | {prefix: "adapter" for prefix, _ in adapters}
    extra = [symmetry for _, symmetry in (*chains, *adapters)]
    frozen = frozenset(name for name, p in model.named_parameters() if not p.requires_grad)

    def everything(more: bool, guessed: Sequence[Symmetry] = ()) -> Symmetry:
        return _with_frozen(union([symmetry_of(model, layers, more), *extra, *guessed]), frozen)

    unknown = unknown_parts(model, layers, [prefix for prefix, _ in chains])
    guessed: list[Symmetry] = []
    refused: list[tuple[str, str]] = []
    if unknown and not meta:
        believed, refused = narrow(model, guesses(model, [*own, *(p for p, _ in chains)]))
        guessed = [symmetry for _, _, symmetry in believed]
        parts |= {prefix: f"guessed {label}" for prefix, label, _ in believed}
        unknown = unknown_parts(model, layers, list(parts))
    symmetry = everything(False, guessed)
    required = [*own, *(prefix for prefix, label in parts.items() if label.startswith("guessed"))]
    if not meta and (required or parts):
        families = ", ".join(dict.fromkeys(f.family.name for f in layers)) or "that its parts look like"
        verify(model, required, symmetry, list(parts), families=families)
        if approximate:
            symmetry = everything(True, guessed)
            verify(model, required, symmetry, list(parts), APPROXIMATE, families)
    elif approximate:
        symmetry = everything(True)
    found = tuple((f.prefix.removesuffix("."), f.family.name) for f in layers)
    return Findings(symmetry, (*found, *((prefix.removesuffix("."), label) for prefix, label in parts.items())),
                    tuple(refused), tuple(unknown), not meta)


def narrow(
    model: nn.Module, candidates: Sequence[Guess]
) -> tuple[list[tuple[str, str, Symmetry]], list[tuple[str, str]]]:
    """(where, as what, declaration) for the guesses that hold, and (where, as what) for options that do not.

    Modules of one class are tried together: the first option that holds for all of them is believed.
    """
    believed: list[tuple[str, str, Symmetry]] = []
    refused: list[tuple[str, str]] = []
    kinds: dict[str, list[Guess]] = {}
    for guess in candidates:
        kinds.setdefault(guess.kind, []).append(guess)
    for kind, members in kinds.items():
        for number, (label, _) in enumerate(members[0].options):
            chosen = [member.options[number][1] for member in members if len(member.options) > number]
            if len(chosen) == len(members) and _survives(model, members, union(chosen)):
                believed += [(m.prefix, label, s) for m, s in zip(members, chosen)]
                break
            refused.append((kind, label))
    return believed, refused


def _survives(model: nn.Module, members: Sequence[Guess], symmetry: Symmetry) -> bool:
    try:
        verify(model, [member.prefix for member in members], symmetry)
    except SymmetryError:
        return False
    return True


def _listed(pairs: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{where} as {label}" for where, label in pairs[:6])


def _with_frozen(symmetry: Symmetry, frozen: frozenset[str]) -> Symmetry:
    return Symmetry(symmetry.tensors, symmetry.groups, symmetry.sizes, symmetry.shifts, frozen=frozen,
                    flows=symmetry.flows)


def verify(
    model: nn.Module, places: Sequence[str], symmetry: Symmetry, more: Sequence[str] = (),
    tolerance: float | None = None, families: str = "that its parts look like",
) -> list[CheckReport]:
    """Tries a random element on the outermost modules with known inputs that contain the places (prefixes of names), or
    one of ``more``: chains of torch's own modules and adapters, which need no trial where none can be made.

    Raises ``SymmetryError`` naming the groups that change the output, and places that could not be tried.
    """
    reports, waiting = [], list(places)
    for prefix, module in _probes(model, ""):
        inside = [place for place in (*waiting, *more) if place.startswith(prefix)]
        call = inputs(module, torch.Generator().manual_seed(0)) if inside else None
        if call is None:
            continue
        waiting = [place for place in waiting if place not in inside]
        report = try_on(_relative(symmetry, prefix), module, call, tolerance)
        _judge(report, module, families)
        reports.append(report)
    if waiting:
        names = ", ".join(place.removesuffix(".") or "the whole" for place in waiting[:4])
        raise SymmetryError(
            f"find_symmetry: {type(model).__name__} holds layers that cannot be tried alone: {names}. Pass the module "
            "that transformers built, or declare the symmetry with symgeo.Symmetry and verify it with symgeo.check"
        )
    return reports


def try_on(
    symmetry: Symmetry, module: nn.Module, call: Call, tolerance: float | None = None,
    seen: Callable[[Function], Function] | None = None,
) -> CheckReport:
    """The report of one random element, with a row for every group if it changes the outputs (or what ``seen`` makes
    of them).

    In double precision throughout, unless the model is too large for that or its device has none: where weights are
    small, as those of new models are, random elements of size 1 drown them in the rounding of single precision.
    """
    weights = dict(module.named_parameters())
    exact = sum(p.numel() for p in weights.values()) <= EXACT and all(p.device.type != "mps" for p in weights.values())
    lift = double_precision if exact else full_precision
    params = {name: lift(p.detach()) for name, p in weights.items()}
    arguments = tree_map(lambda x: lift(x) if isinstance(x, Tensor) else x, call)
    with evaluating(module), full_double() if exact else nullcontext():
        f: Function = output_function(module, arguments, lift)
        f = seen(f) if seen else f
        report = _try(symmetry, f, params, tolerance, by_group=False)
        return report if _holds(report) else _try(symmetry, f, params, tolerance, by_group=True)


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


def _check_finite(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if not p.is_meta and not bool(torch.isfinite(p.detach()).all()):
            raise ValueError(f"find_symmetry: parameter {name!r} has entries that are not finite; mend the weights")


def _holds(report: CheckReport) -> bool:
    """Whether the outputs stay; where all is frozen no parameter has to move."""
    return report.invariance <= report.tolerance  # False for NaN


def _judge(report: CheckReport, module: nn.Module, families: str) -> None:
    if _holds(report):
        return
    bad = [row.name for row in report.groups if not row.invariance <= report.tolerance]
    raise SymmetryError(
        f"find_symmetry: {type(module).__name__} does not have the symmetry of the family {families}: a "
        f"random element changes its output by {report.invariance:.1e} (groups "
        f"{', '.join(bad[:4]) or 'in combination'}). "
        "Declare what it has with symgeo.Symmetry"
    )
