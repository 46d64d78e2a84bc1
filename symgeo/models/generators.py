"""The symmetries that follow from structure; written once, for every family.

Notation of a declaration: H heads (K key-value heads of G query heads each), e the query-key group, f the
value-output group, h hidden units, u their scalings, s their signs, c and g the coordinates of a norm, x, y and z
the scale of what a norm passes on.
"""

from __future__ import annotations

from functools import reduce
from operator import or_

from symgeo.groups import GeneralLinear, Group, Permutation, PositiveScaling, Rotary, SignFlip
from symgeo.models.compensated import entry_flows, entry_scale, exit_symmetry, head_flows, layer_flows, layer_scale
from symgeo.models.family import Embeddings
from symgeo.models.structure import MLP, Attention, Layer, Linear, Norm
from symgeo.symmetry import Compensation, Flow, Symmetry


def layer_symmetry(layer: Layer, approximate: bool = False) -> Symmetry:
    """Everything that is known of one layer, with names relative to it.

    With ``approximate``, also what holds up to the eps of a norm.
    """
    parts = [attention_symmetry(layer.attention)]
    if layer.mlp:
        parts.append(mlp_symmetry(layer.mlp))
    if layer.prenorm and layer.attention_norm:
        parts.append(gain_symmetry("c", layer.attention_norm, layer.attention.inputs))
    if layer.prenorm and layer.mlp_norm and layer.mlp:
        inputs = (layer.mlp.up, layer.mlp.gate) if layer.mlp.gate else (layer.mlp.up,)
        parts.append(gain_symmetry("g", layer.mlp_norm, inputs))
    if layer.centred_readers:
        parts.append(mean_shifts("attention_mean", layer.attention.output))
        if layer.mlp:
            parts.append(mean_shifts("mlp_mean", layer.mlp.down))
    parts.append(Symmetry({}, {}, flows=layer_flows(layer)))
    if scale := layer_scale(layer, approximate):
        parts.append(scale)
    if layer.final_norm and layer.mlp_norm:
        parts.append(exit_symmetry(layer.mlp_norm, layer.final_norm, approximate))
    return reduce(or_, parts)


def entry_symmetry(layer: Layer, before: Norm, prefix: str, approximate: bool = False) -> Symmetry:
    """What a post-norm layer at ``prefix`` has together with ``before``, the norm whose output it reads."""
    scope = prefix.removesuffix(".")

    def rule(name: str) -> str:
        return f"{prefix}{name}"

    flows = {f"{name}[{scope}]": flow for name, flow in entry_flows(layer, before, rule).items()}
    scale = entry_scale(layer, before, rule, approximate, f"y[{scope}]")
    return Symmetry({}, {}, flows=flows) | (scale or Symmetry({}, {}))


def head_symmetry(norm: Norm, head: Linear) -> Symmetry:
    """What the last norm has together with the only map that reads it."""
    flows = Symmetry({}, {}, flows=head_flows(norm, head))
    return gain_symmetry("final", norm, (head,)) | flows


def embedding_symmetry(table: Embeddings, axes: dict[str, int], centred: bool) -> Symmetry:
    """What embeddings exchange where they are added up, and their means where all readers remove them.

    ``axes`` has the number of axes of every parameter that nothing else uses.
    """
    flows: dict[str, Flow] = {}
    sums = [[span for span in spans if span.parameter in axes] for spans in table.sums]
    masks = [span for span in table.masks if span.parameter in axes]
    for number, spans in enumerate(sums):
        for other, span in enumerate(spans[1:], start=1):
            sources = (spans[0], *(masks if number == 0 else ()))
            flows[f"exchange_{number}_{other}"] = Compensation(sources, (), (span,))
    if not centred:
        return Symmetry({}, {}, flows=flows)
    last = {span.parameter: "_ " * (axes[span.parameter] - 1) + "1" for spans in (*sums, masks) for span in spans}
    first = {weight: "1" + " _" * (axes[weight] - 1) for weight in table.weights if weight in axes}
    shifts = {f"{key.replace('.', '_')}_mean": {key: pattern} for key, pattern in (last | first).items()}
    return Symmetry({}, {}, shifts=shifts, flows=flows)


def attention_symmetry(a: Attention) -> Symmetry:
    """GL per head on query-key and on value-output (the rotary commutant where positions are rotary),
    permutations of heads, and the shift of the key bias, which softmax does not see.

    query -> A^-T query, key -> A key;  value -> B value, output columns -> output B^-1.
    """
    grouped = a.kv_heads != a.heads
    head, own = ("K", "K G") if grouped else ("H", "H")
    sizes = {"K": a.kv_heads, "G": a.heads // a.kv_heads} if grouped else {"H": a.heads}
    axes = f"({own} e*)", f"({head} e)", f"({head} f)"
    tensors: dict[str, str] = {}
    if a.fused:
        tensors |= a.inputs[0].outputs(f"({own} e* + {head} e + {head} f)")
    else:
        for linear, axis in zip(a.inputs, axes):
            tensors |= Linear(linear.weight, None, linear.transposed).outputs(axis)
        biases = dict.fromkeys(linear.bias for linear in a.inputs if linear.bias)
        if len(biases) == 1 and a.inputs[0].bias == a.inputs[1].bias:  # one bias for three weights
            tensors[str(a.inputs[0].bias)] = f"({own} e* + {head} e + {head} f)"
        else:
            tensors |= {linear.bias: axis for linear, axis in zip(a.inputs, axes) if linear.bias}
    tensors |= a.output.inputs(f"({own} f*)")
    tensors |= {a.extra_key: f"_ _ {axes[1]}"} if a.extra_key else {}
    tensors |= {a.extra_value: f"_ _ {axes[2]}"} if a.extra_value else {}
    query_key = Rotary(per=head, pairing=a.rotary) if a.rotary else GeneralLinear(per=head)
    groups: dict[str, Group] = {head: Permutation(), "e": query_key, "f": GeneralLinear(per=head)}
    groups |= {"G": Permutation()} if grouped else {}
    return Symmetry(tensors, groups, sizes, _key_shift(a))


def _key_shift(a: Attention) -> dict[str, dict[str, str]]:
    """``b_k += c`` adds the same to every logit of a query: exact unless positions or extra tokens tell keys apart."""
    bias = a.inputs[1].bias
    if not bias or a.rotary or a.extra_key or a.shared_zero_token:
        return {}
    shared = a.inputs[0].bias == bias
    return {"key_shift": {bias: "(0 + _ + 0)" if shared else "_"}}


def mlp_symmetry(m: MLP) -> Symmetry:
    """Permutations of hidden units; with a gate or a positively homogeneous activation their scalings; with a
    gate or an odd activation their signs."""
    scaled, signed = bool(m.gate) or m.homogeneous, bool(m.gate) or m.odd
    factors = ["h", *(["u"] * scaled), *(["s"] * signed)]
    plain = f"({' '.join(factors)})"
    dual = f"({' '.join(name + '*' for name in factors)})"
    tensors = m.up.outputs(plain) | m.down.inputs(dual)
    if m.gate:
        tensors |= m.gate.outputs("h")
    groups: dict[str, Group] = {"h": Permutation()}
    groups |= {"u": PositiveScaling(per="h")} if scaled else {}
    groups |= {"s": SignFlip(per="h")} if signed else {}
    return Symmetry(tensors, groups)


def gain_symmetry(name: str, norm: Norm, consumers: tuple[Linear, ...]) -> Symmetry:
    """The gain of a norm against the columns of all that reads it: ``gain s, bias s, W s^-1``."""
    tensors = {norm.weight: name} | ({norm.bias: name} if norm.bias else {})
    for consumer in consumers:
        tensors |= consumer.inputs(f"{name}*")
    return Symmetry(tensors, {name: PositiveScaling()})


def mean_shifts(name: str, writer: Linear) -> Symmetry:
    """The mean direction of what is written to a residual stream whose readers remove the mean:
    ``W += 1 c^T``, ``b += c_0 1``."""
    shifts = {f"{name}_weight": {writer.weight: "_ 1" if writer.transposed else "1 _"}}
    if writer.bias:
        shifts[f"{name}_bias"] = {writer.bias: "1"}
    return Symmetry({}, {}, shifts=shifts)
