"""Attention and MLPs of models that no table knows: guessed from names and shapes, believed only when tried.

A guess is the largest group that a structure could have, then smaller ones; what a probe of the model refutes is
dropped.  Nothing is guessed about norms and the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from symgeo.models.attention import attention_symmetry
from symgeo.models.family import attribute, resolve
from symgeo.models.generators import mlp_symmetry
from symgeo.models.structure import MLP, Attention, Linear, linear
from symgeo.symmetry import Symmetry

_QUERY = "{q_proj,query,q_lin,q,wq,to_q,query_proj,q_linear,linear_q}"
_KEY = "{k_proj,key,k_lin,k,wk,to_k,key_proj,k_linear,linear_k}"
_VALUE = "{v_proj,value,v_lin,v,wv,to_v,value_proj,v_linear,linear_v}"
_OUTPUT = "{o_proj,out_proj,out_lin,o,wo,to_out,to_out.0,dense,c_proj,proj,output,Wo,linear_out}"
_FUSED = "{qkv,qkv_proj,in_proj,Wqkv,query_key_value,c_attn,to_qkv}"
_UP = "{up_proj,fc1,c_fc,w1,lin1,linear1,dense_h_to_4h,wi,fc_in,w3,wi_1,up}"
_DOWN = "{down_proj,fc2,c_proj,w2,lin2,linear2,dense_4h_to_h,wo,fc_out,down}"
_GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("wi_0", "wi_1", "wo"), ("gate", "up", "down"))
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads", "nhead", "attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads", "n_kv_head")


@dataclass(frozen=True)
class Guess:
    """What a module might be: its prefix, its class, and declarations with full names by label, the largest first."""

    prefix: str
    kind: str
    options: tuple[tuple[str, Symmetry], ...]


def guesses(model: nn.Module, skip: Sequence[str]) -> list[Guess]:
    """The modules outside the prefixes to skip whose names and shapes look like attention or an MLP."""
    result = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if any(prefix.startswith(s) for s in skip):
            continue
        options = tuple(_options(module))
        if options:
            named = tuple((label, s.each(name) if name else s) for label, s in options)
            result.append(Guess(prefix, type(module).__name__, named))
    return result


def _options(module: nn.Module) -> Iterator[tuple[str, Symmetry]]:
    attention = _attention(module)
    if attention is not None:
        yield from _attention_options(attention, module)
        return
    mlp = _mlp(module)
    if mlp is not None:
        for label, candidate in (("units, scaled", MLP(*mlp, homogeneous=True)), ("units", MLP(*mlp))):
            if not mlp[2] or label == "units":
                yield label, mlp_symmetry(candidate)


def _attention_options(a: Attention, module: nn.Module) -> Iterator[tuple[str, Symmetry]]:
    """Positions none, rotary by halves, rotary interleaved, unknown (no query-key group); also with heads fixed."""
    size = _size(module, a)
    for label, rotary in (("GL", ""), ("rotary, halves", "half"), ("rotary, interleaved", "interleaved")):
        if rotary and size % 2:
            continue
        found = attention_symmetry(replace(a, rotary=rotary))
        yield label, _without(found, set()) if rotary else found
        yield f"{label}, heads fixed", _without(found, {"H", "K", "G"})
    for label, dropped in (("values", {"e"}), ("values, heads fixed", {"e", "H", "K", "G"})):
        yield label, _without(attention_symmetry(a), dropped)


def _without(symmetry: Symmetry, names: set[str]) -> Symmetry:
    """Without these groups and without shifts."""
    groups = {name: group for name, group in symmetry.groups.items() if name not in names}
    return Symmetry(symmetry.tensors, groups, symmetry.sizes)


def _attention(module: nn.Module) -> Attention | None:
    heads = _number(module, _HEADS)
    query, key, value, output = (_linear(module, names) for names in (_QUERY, _KEY, _VALUE, _OUTPUT))
    if not heads or output is None:
        return None
    fused = _linear(module, _FUSED)
    if query is None or key is None or value is None:
        if fused is None:
            return None
        query = key = value = fused
    kv_heads = _number(module, _KV_HEADS) or heads
    if heads % kv_heads or not _fits(module, query, key, value, output, heads, kv_heads):
        return None
    return Attention((query, key, value), output, heads, kv_heads)


def _fits(module: nn.Module, query: Linear, key: Linear, value: Linear, output: Linear, heads: int, kv_heads: int
          ) -> bool:
    """Whether the sizes are those of heads."""
    q, k, v = (_outputs(module, linear) for linear in (query, key, value))
    o = _inputs(module, output)
    if query == key:
        return q % (heads + 2 * kv_heads) == 0 and o == q // (heads + 2 * kv_heads) * heads
    return q % heads == 0 and k % kv_heads == 0 and q // heads == k // kv_heads and o * kv_heads == v * heads


def _mlp(module: nn.Module) -> tuple[Linear, Linear, Linear | None] | None:
    for gate, up, down in _GATED:
        found = [_linear(module, name) for name in (up, down, gate)]
        if all(found) and found[0] is not None and found[1] is not None and found[2] is not None:
            return (found[0], found[1], found[2]) if _chained(module, found[0], found[1]) else None
    into, out = _linear(module, _UP), _linear(module, _DOWN)
    return (into, out, None) if into and out and _chained(module, into, out) else None


def _chained(module: nn.Module, up: Linear, down: Linear) -> bool:
    return _outputs(module, up) == _inputs(module, down)


def _linear(module: nn.Module, names: str) -> Linear | None:
    """The first of the names that is an affine map."""
    path = resolve(module, names)
    if not path:
        return None
    found = attribute(module, path)
    weight = getattr(found, "weight", None) if isinstance(found, nn.Module) else None
    return linear(module, path) if weight is not None and getattr(weight, "ndim", 0) == 2 else None


def _outputs(module: nn.Module, linear: Linear) -> int:
    return module.get_parameter(linear.weight).shape[1 if linear.transposed else 0]


def _inputs(module: nn.Module, linear: Linear) -> int:
    return module.get_parameter(linear.weight).shape[0 if linear.transposed else 1]


def _size(module: nn.Module, a: Attention) -> int:
    total = _outputs(module, a.inputs[0])
    return total // (a.heads + 2 * a.kv_heads) if a.fused else total // a.heads


def _number(module: nn.Module, names: Sequence[str]) -> int | None:
    """The first of these attributes of the module, or of its configuration, that is a positive number."""
    places: list[Any] = [module, getattr(module, "config", None)]
    for place in places:
        for name in names:
            found = getattr(place, name, None)
            if isinstance(found, int) and found > 0:
                return found
    return None

