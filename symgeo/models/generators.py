"""The symmetries that follow from structure; written once, for every family.

Notation of a declaration, beside that of :mod:`symgeo.models.attention`: X experts, h hidden units, u their scalings, s
their signs, c and g the coordinates of a norm, x, y and z the scale of what a norm passes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_

from symgeo.groups import Group, Permutation, PositiveScaling, SignFlip
from symgeo.models.attention import EMPTY, attention_symmetry
from symgeo.models.compensated import (
    by_norm,
    entry_flows,
    entry_scale,
    exit_symmetry,
    layer_flows,
    layer_scales,
    norm_flows,
)
from symgeo.models.structure import MLP, Branch, Layer, Linear, Norm
from symgeo.symmetry import Flow, MeanWrite, OffsetTrade, Reader, Span, Symmetry

_GAINS = {"attention": "c", "cross": "d", "mlp": "g"}


def layer_symmetry(layer: Layer, approximate: bool = False) -> Symmetry:
    """Everything that is known of one layer, with names relative to it.

    With ``approximate``, also what holds up to the eps of a norm.
    """
    parts = [branch_symmetry(branch, approximate) for branch in layer.branches]
    for norm, branches in by_norm(layer.branches):
        consumers = [linear for branch in branches for linear in branch.core.consumers]
        parts.append(gain_symmetry(_GAINS[branches[0].name], norm, consumers))
    for branch in layer.branches:
        judge = branch.after or branch.outer
        if judge.centred if judge else layer.centred_readers:
            parts.append(mean_shifts(f"{branch.name}_mean", branch.core.writer, None if branch.after else branch.scale))
        if branch.scale and not branch.after:
            name = f"l{branch.name}"
            written = branch.core.writer.outputs(name)
            parts.append(Symmetry(written | {branch.scale: f"{name}*"}, {name: PositiveScaling()}))
    parts.append(Symmetry({}, {}, flows=layer_flows(layer)))
    parts += layer_scales(layer, approximate)
    if layer.final_norm and (last := layer.branches[-1].outer):
        parts.append(exit_symmetry(last, layer.final_norm, approximate))
    return reduce(or_, parts)


def branch_symmetry(branch: Branch, approximate: bool = False) -> Symmetry:
    """That of attention or MLP alone; the names of a second attention are marked."""
    if isinstance(branch.core, MLP):
        return mlp_symmetry(branch.core)
    found = attention_symmetry(branch.core, approximate)
    return found if branch.name == "attention" else found.relabelled(lambda name: f"{name}_{branch.name}")


def entry_symmetry(layer: Layer, before: Norm, scope: str, approximate: bool = False) -> Symmetry:
    """What a post-norm layer has together with ``before``, the norm whose output it reads, both with full names."""
    flows = {f"{name}[{scope}]": flow for name, flow in entry_flows(layer, before).items()}
    return Symmetry({}, {}, flows=flows) | (entry_scale(layer, before, approximate, f"y[{scope}]") or EMPTY)


def reading_symmetry(name: str, norm: Norm, consumers: Sequence[Linear], readers: dict[str, Reader]) -> Symmetry:
    """What a norm has together with the only maps that read it."""
    return gain_symmetry(name, norm, consumers) | Symmetry({}, {}, flows=norm_flows(f"{name}_norm", norm, readers))


def bias_symmetry(norm: Norm, head: Linear) -> Symmetry:
    """What the last norm has with a map that others use too: its bias against that of the map."""
    if not norm.bias or not head.bias:
        return EMPTY
    flows = norm_flows("final_norm", norm, {"head": Reader(head.weight, Span(head.bias), head.transposed)})
    return Symmetry({}, {}, flows={name: flow for name, flow in flows.items() if name == "final_norm_bias"})


def mlp_symmetry(m: MLP) -> Symmetry:
    """Permutations of hidden units; with a gate or a positively homogeneous activation their scalings; with a
    gate or an odd activation their signs.  Experts have their own, and are permuted themselves."""
    scaled, signed = bool(m.gate) or m.homogeneous, bool(m.gate) or m.odd
    gated = bool(m.gate) and m.homogeneous
    plain, dual, gate = ["h"], ["h"], "(h v)" if gated else "h"
    for name, on in (("u", scaled), ("s", signed)):
        plain += [name] * on
        dual += [f"{name}*"] * on
    dual += ["v*"] * gated
    up, into = (f"({' '.join(x)})" if len(x) > 1 else x[0] for x in (plain, dual))
    if m.fused:
        halves = (gate, up) if m.fused == "gate" else (up, gate)
        tensors = m.up.outputs(f"({' + '.join(halves)})")
    else:
        tensors = m.up.outputs(up) | (m.gate.outputs(gate) if m.gate else {})
    tensors |= m.down.inputs(into)
    groups: dict[str, Group] = {"h": Permutation(per="X" if m.router else None)}
    for name, on, group in (("u", scaled, PositiveScaling(per="h")), ("s", signed, SignFlip(per="h")),
                            ("v", gated, PositiveScaling(per="h"))):
        groups |= {name: group} if on else {}
    found = Symmetry(tensors, groups)
    if m.router:
        found = found | Symmetry({m.router.weight: "X _"}, {"X": Permutation()},
                                 shifts={"router_shift": {m.router.weight: "1 _"}})
    return found


def gain_symmetry(name: str, norm: Norm, consumers: Sequence[Linear]) -> Symmetry:
    """The gain of a norm against the columns of all that reads it: ``gain s, bias s, W s^-1``."""
    if norm.offset or any(len(linear.parts) > 1 for linear in consumers):
        readers = tuple(linear.read() for linear in consumers)
        flow: Flow = OffsetTrade(norm.weight, norm.offset, readers, bias=norm.bias)
        return Symmetry({}, {}, flows={f"{name}_gain": flow})
    tensors = {norm.weight: name} | ({norm.bias: name} if norm.bias else {})
    for consumer in consumers:
        tensors |= consumer.inputs(f"{name}*")
    return Symmetry(tensors, {name: PositiveScaling()})


def mean_shifts(name: str, writer: Linear, scale: str | None = None) -> Symmetry:
    """The mean direction of what is written to a residual stream whose readers remove the mean:
    ``W += 1 c^T``, ``b += c_0 1``; behind a scale g, along ``1 / g``."""
    if scale:
        return Symmetry({}, {}, flows={name: MeanWrite(writer.reader, scale)})
    constant = {"_ 1" if writer.transposed else "1 _"}
    pattern = f"_ {constant.pop()}" if writer.lead else constant.pop()
    shifts = {f"{name}_weight": {writer.weight: pattern}}
    if writer.bias:
        shifts[f"{name}_bias"] = {writer.bias: "1"}
    return Symmetry({}, {}, shifts=shifts)

