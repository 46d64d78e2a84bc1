"""The compensated directions that follow from structure: biases that readers take back, and rows that read a LayerNorm.

What a norm's output feeds decides: in a pre-norm layer only the maps behind it; in a post-norm layer also the
residual stream, where the next map that writes takes a translation back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from symgeo.groups import PositiveScaling
from symgeo.models.attention import attention_flows, attention_readers
from symgeo.models.structure import MLP, Attention, Branch, Layer, Linear, Norm
from symgeo.symmetry import Compensation, Flow, NormBias, Reader, RowFreedom, Span, Symmetry


def layer_flows(layer: Layer) -> dict[str, Flow]:
    """Those within one layer, with names relative to it."""
    flows: dict[str, Flow] = {}
    for branch in layer.branches:
        if isinstance(branch.core, Attention):
            suffix = "" if branch.name == "attention" else f"_{branch.name}"
            flows |= {f"{name}{suffix}": flow for name, flow in attention_flows(branch.core).items()}
    for norm, branches in by_norm(layer.branches):
        readers = {f"{role}{'' if b.name != 'cross' else '_cross'}": reader
                   for b in branches for role, reader in readers_of(b.core).items()}
        flows |= norm_flows(f"{branches[0].name}_norm", norm, readers)
    for first, second in pairwise(layer.branches):
        if first.outer and second.outer:
            flows |= norm_flows(f"{first.name}_norm", first.outer, _scoped(second), (second.core.writer,))
    if layer.parallel and layer.prenorm:
        biases = [Span(b.core.writer.bias) for b in layer.branches if b.core.writer.bias and not b.after]
        for number, span in enumerate(biases[1:]):
            flows[f"write_exchange{number or ''}"] = Compensation(
                (biases[0],), (), (span,), "mean_free" if layer.centred_readers else "all")
    return flows


def mean_exchanges(layers: Sequence[Layer], entry: Span | None = None) -> dict[str, Flow]:
    """Where nothing behind a pre-norm stream removes the mean, but everything that reads it does: what biases write
    along the mean is exchanged with the last of them."""
    branches = [b for layer in layers for b in layer.branches]
    plain = all(layer.prenorm and not layer.parallel and not layer.centred_readers for layer in layers)
    later = branches if entry else branches[1:]
    if not plain or not all(b.before and b.before.centred for b in later) or any(b.after or b.scale for b in branches):
        return {}
    spans = [*([entry] if entry else []), *(Span(b.core.writer.bias) for b in branches if b.core.writer.bias)]
    if not branches[-1].core.writer.bias:
        return {}
    return {f"mean_exchange_{i}": Compensation((span,), (), (spans[-1],), "mean") for i, span in enumerate(spans[:-1])}


def by_norm(branches: Iterable[Branch]) -> list[tuple[Norm, list[Branch]]]:
    """Every norm before a branch, with all branches that read it."""
    found: dict[Norm, list[Branch]] = {}
    for branch in branches:
        if branch.before:
            found.setdefault(branch.before, []).append(branch)
    return list(found.items())


def readers_of(core: Attention | MLP) -> dict[str, Reader]:
    """The maps of a branch that read the stream, by role; experts, whose biases would have to agree, have none."""
    if isinstance(core, Attention):
        return attention_readers(core)
    if core.router:
        return {}
    if core.fused:
        return {"up": core.up.reader}
    return {"up": core.up.reader} | ({"gate": core.gate.reader} if core.gate else {})


def _scoped(branch: Branch) -> dict[str, Reader]:
    return {f"{role}{'_cross' if branch.name == 'cross' else ''}": r for role, r in readers_of(branch.core).items()}


def entry_flows(layer: Layer, before: Norm) -> dict[str, Flow]:
    """Those of a post-norm layer and the norm before it, both with full names."""
    first = layer.branches[0]
    return norm_flows("entry_norm", before, readers_of(first.core), (first.core.writer,))


def layer_scales(layer: Layer, approximate: bool) -> list[Symmetry]:
    """The scales of a layer's inner norms on a post-norm stream, and of what a norm behind a branch removes; exact
    where the next norm removes scales exactly."""
    parts = []
    for number, (first, second) in enumerate(pairwise(layer.branches)):
        if first.outer and second.outer and (approximate or second.outer.scale_free):
            parts.append(scale_symmetry(f"z{number or ''}", first.outer, second.core.consumers, second.core.writer))
    for branch in layer.branches:
        if branch.after and (approximate or branch.after.scale_free):
            writer = branch.core.writer
            parts.append(Symmetry(writer.outputs(f"(w{branch.name} _)"), {f"w{branch.name}": PositiveScaling()},
                                  {f"w{branch.name}": 1}))
    return parts


def entry_scale(layer: Layer, before: Norm, approximate: bool, name: str) -> Symmetry | None:
    """The scale of the norm before a post-norm layer; the layer's first norm must not see it."""
    first = layer.branches[0]
    if not first.outer or not (approximate or first.outer.scale_free):
        return None
    return scale_symmetry(name, before, first.core.consumers, first.core.writer)


def exit_symmetry(norm: Norm, final: Norm, approximate: bool) -> Symmetry:
    """What the last norm of a post-norm layer passes to a norm behind the stack: the mean of its bias (if that one
    removes it), and its scale."""
    shifts = {"exit_mean": {norm.bias: "1"}} if norm.bias and final.centred else {}
    result = Symmetry({}, {}, shifts=shifts)
    return result | scale_symmetry("x", norm, ()) if approximate or final.scale_free else result


def scale_symmetry(name: str, norm: Norm, readers: Iterable[Linear], writer: Linear | None = None) -> Symmetry:
    """One factor on everything that a norm passes on: gain and bias s, columns of readers s^-1, the next writer s.

    The stream is then multiplied by s, which the next norm removes, up to its eps.
    """
    axis, dual = f"({name} _)", f"({name}* _)"
    tensors = {norm.weight: axis} | ({norm.bias: axis} if norm.bias else {})
    tensors |= writer.outputs(axis) if writer else {}
    for reader in readers:
        tensors |= reader.inputs(dual)
    return Symmetry(tensors, {name: PositiveScaling()}, {name: 1})


def norm_flows(
    name: str, norm: Norm, readers: Mapping[str, Reader], writers: Sequence[Linear] = ()
) -> dict[str, Flow]:
    """The bias of a norm, if all that it feeds takes it back, and the rows of the maps that read it."""
    flows: dict[str, Flow] = {}
    behind = [Span(writer.bias) for writer in writers if writer.bias]
    if norm.bias and readers and all(r.absorbs for r in readers.values()) and len(behind) == len(writers):
        flows[f"{name}_bias"] = Compensation((Span(norm.bias),), tuple(readers.values()), tuple(behind))
    elif norm.bias and norm.centred and readers and len(behind) == len(writers):
        flows[f"{name}_bias"] = NormBias(norm.weight, norm.bias, tuple(readers.values()), tuple(behind))
    return flows | row_flows(norm, readers)


def row_flows(norm: Norm, readers: Mapping[str, Reader]) -> dict[str, Flow]:
    """The rows of maps that read a LayerNorm, where its bias does not stand in the way."""
    return {f"{role}_rows": RowFreedom(reader if norm.bias else reader.bare, norm.weight, norm.bias)
            for role, reader in readers.items() if norm.centred and (reader.absorbs or not norm.bias)}
