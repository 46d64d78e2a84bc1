"""The compensated directions that follow from structure: biases that readers take back, and rows that read a LayerNorm.

What a norm's output feeds decides: in a pre-norm layer only the maps behind it; in a post-norm layer also the
residual stream, where the next map that writes takes a translation back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from symgeo.groups import PositiveScaling
from symgeo.models.structure import MLP, Attention, Layer, Linear, Norm
from symgeo.symmetry import Compensation, Flow, Reader, RowFreedom, Span, Symmetry


def layer_flows(layer: Layer) -> dict[str, Flow]:
    """Those within one layer, with names relative to it."""
    flows = value_flow(layer.attention) | key_flow(layer.attention)
    behind = mlp_readers(layer.mlp) if layer.mlp else {}
    if layer.prenorm and layer.attention_norm:
        flows |= norm_flows("attention_norm", layer.attention_norm, attention_readers(layer.attention))
    if layer.prenorm and layer.mlp_norm:
        flows |= norm_flows("mlp_norm", layer.mlp_norm, behind)
    if not layer.prenorm and layer.mlp and layer.attention_norm:
        flows |= norm_flows("attention_norm", layer.attention_norm, behind, (layer.mlp.down,))
    return flows


def entry_flows(layer: Layer, before: Norm, rule: Callable[[str], str]) -> dict[str, Flow]:
    """Those of a post-norm layer and the norm before it; `rule` gives the full names of the layer's parameters."""
    readers = {name: reader.renamed(rule) for name, reader in attention_readers(layer.attention).items()}
    return norm_flows("entry_norm", before, readers, (layer.attention.output.renamed(rule),))


def layer_scale(layer: Layer, approximate: bool) -> Symmetry | None:
    """The scale of a post-norm layer's inner norm; the norm at its end must not see it."""
    if layer.prenorm or not layer.mlp or not layer.attention_norm or not layer.mlp_norm:
        return None
    if not approximate and layer.mlp_norm.eps != 0:
        return None
    readers = [layer.mlp.up, *([layer.mlp.gate] if layer.mlp.gate else [])]
    return scale_symmetry("z", layer.attention_norm, readers, layer.mlp.down)


def entry_scale(
    layer: Layer, before: Norm, rule: Callable[[str], str], approximate: bool, name: str
) -> Symmetry | None:
    """The scale of the norm before a post-norm layer; the layer's first norm must not see it."""
    if not layer.attention_norm or (not approximate and layer.attention_norm.eps != 0):
        return None
    readers = [linear.renamed(rule) for linear in layer.attention.inputs]
    return scale_symmetry(name, before, readers, layer.attention.output.renamed(rule))


def exit_symmetry(norm: Norm, final: Norm, approximate: bool) -> Symmetry:
    """What the last norm of a post-norm layer passes to a norm behind the stack: the mean of its bias (if that one
    removes it), and its scale."""
    shifts = {"exit_mean": {norm.bias: "1"}} if norm.bias and final.centred else {}
    result = Symmetry({}, {}, shifts=shifts)
    return result | scale_symmetry("x", norm, ()) if approximate or final.eps == 0 else result


def head_flows(norm: Norm, head: Linear) -> dict[str, Flow]:
    """Those of the last norm and the one map behind it."""
    return norm_flows("final_norm", norm, {"head": _reader(head)})


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


def value_flow(a: Attention) -> dict[str, Flow]:
    """``b_v += c, b_o -= W_o c``: attention weights sum to 1, over extra tokens too unless one of them is zero."""
    bias, out = a.inputs[2].bias, a.output
    if not bias or not out.bias or a.shared_zero_token:
        return {}
    sources = (_input_bias(a, 2), *([Span(a.extra_value)] if a.extra_value else []))
    repeat = a.heads // a.kv_heads
    reader = Reader(out.weight, Span(out.bias), out.transposed, a.kv_heads if repeat > 1 else 1, repeat)
    return {"value_bias": Compensation(tuple(s for s in sources if s), (reader,))}


def key_flow(a: Attention) -> dict[str, Flow]:
    """``b_k += c`` together with a learned extra key, so that all logits of a query still change alike."""
    bias = _input_bias(a, 1)
    if not bias or not a.extra_key or a.rotary or a.shared_zero_token:
        return {}
    return {"key_bias": Compensation((bias, Span(a.extra_key)))}


def norm_flows(
    name: str, norm: Norm, readers: dict[str, Reader], writers: tuple[Linear, ...] = ()
) -> dict[str, Flow]:
    """The bias of a norm, if all that it feeds has biases, and the rows of the maps that read it."""
    flows: dict[str, Flow] = {}
    behind = [Span(writer.bias) for writer in writers if writer.bias]
    if norm.bias and readers and all(r.bias for r in readers.values()) and len(behind) == len(writers):
        flows[f"{name}_bias"] = Compensation((Span(norm.bias),), tuple(readers.values()), tuple(behind))
    for role, reader in readers.items():
        if norm.centred and (reader.bias or not norm.bias):
            flows[f"{role}_rows"] = RowFreedom(reader, norm.weight, norm.bias)
    return flows


def attention_readers(a: Attention) -> dict[str, Reader]:
    """The maps to query, key and value; one if they are fused."""
    if a.fused:
        return {"input": _reader(a.inputs[0])}
    roles = enumerate(("query", "key", "value"))
    return {role: Reader(a.inputs[i].weight, _input_bias(a, i), a.inputs[i].transposed) for i, role in roles}


def mlp_readers(m: MLP) -> dict[str, Reader]:
    """The maps that read the input of an MLP."""
    return {"up": _reader(m.up)} | ({"gate": _reader(m.gate)} if m.gate else {})


def _reader(linear: Linear) -> Reader:
    return Reader(linear.weight, Span(linear.bias) if linear.bias else None, linear.transposed)


def _input_bias(a: Attention, role: int) -> Span | None:
    """The bias of query, key or value (0, 1, 2), which may be a slice of one for all three."""
    bias = a.inputs[role].bias
    if not bias:
        return None
    shared = a.inputs[0].bias == a.inputs[1].bias == a.inputs[2].bias
    return Span(bias, role, (a.heads, a.kv_heads, a.kv_heads)) if shared else Span(bias)
