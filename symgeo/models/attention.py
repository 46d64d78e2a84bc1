"""The symmetry of attention, in all its layouts.

Notation of a declaration: H heads (K key-value heads of G query heads each), e the query-key group (p for the
coordinates that rotary positions turn, where they turn some), a normalised queries and keys, on which nothing acts
but m, x and y, the scales that such norms remove, f the value-output group, n the gains of normalised
queries and keys.
"""

from __future__ import annotations

from dataclasses import dataclass

from symgeo.groups import GeneralLinear, Group, Permutation, PositiveScaling, Rotary
from symgeo.models.structure import Attention, Linear
from symgeo.symmetry import Axis, Compensation, Flow, OffsetTrade, Reader, Span, Symmetry

EMPTY = Symmetry({}, {})


def attention_symmetry(a: Attention, approximate: bool = False) -> Symmetry:
    """GL per head on query-key and on value-output (the rotary commutant where positions are rotary),
    permutations of heads, and the shift of the key bias, which softmax does not see.

    query -> A^-T query, key -> A key;  value -> B value, output columns -> output B^-1.
    """
    layout = _layout(a, approximate)
    tensors = _inputs(a, layout) | a.output.inputs(f"({layout.own} f*)")
    tensors |= {a.extra_key: f"_ _ ({layout.head} {layout.key})"} if a.extra_key else {}
    tensors |= {a.extra_value: f"_ _ ({layout.head} f)"} if a.extra_value else {}
    tensors |= {a.table: f"_ {layout.own}"} if a.table else {}
    named = {name for text in tensors.values() for name in text.translate(_MARKS).split()}
    groups = {name: group for name, group in layout.groups.items() if name in named}
    sizes = {name: size for name, size in layout.sizes.items() if name in named}
    gains = _gain_trade(a, layout)
    return Symmetry(tensors, groups, sizes, key_shift(a) | _table_shift(a)) | gains


_MARKS = str.maketrans("()*+", "    ")


@dataclass(frozen=True)
class _Layout:
    """How the axes of heads are written: the factors that number key heads and query heads, what a query, a key and
    a value head carry, and the groups and sizes behind the names."""

    head: str
    own: str
    query: str
    key: str
    groups: dict[str, Group]
    sizes: dict[str, int]


def _layout(a: Attention, approximate: bool) -> _Layout:
    grouped = a.kv_heads != a.heads
    head = "K" if grouped else "Hs" if a.shared_heads else "H"
    own = "K G" if grouped else head
    sizes = {"K": a.kv_heads, "G": a.heads // a.kv_heads} if grouped else {head: a.heads}
    groups: dict[str, Group] = {} if a.ordered else {head: Permutation()}
    query, key = "e*", "e"
    if a.norms:
        query, key = _normed(a, approximate, head, grouped, groups, sizes)
    elif a.partial:
        query, key = "(p* + e*)", "(p + e)"
        groups |= {"p": Rotary(per=head, pairing=a.rotary), "e": GeneralLinear(per=head)}
        sizes["p"] = a.rotated or 0
    else:
        groups["e"] = Rotary(per=head, pairing=a.rotary) if a.rotary else GeneralLinear(per=head)
    groups["f"] = GeneralLinear(per=head)
    groups |= {"G": Permutation(per="K" if a.norms else None)} if grouped and not a.ordered else {}
    return _Layout(head, own, query, key, groups, sizes)


def _normed(a: Attention, approximate: bool, head: str, grouped: bool, groups: dict[str, Group],
            sizes: dict[str, int]) -> tuple[str, str]:
    """What normalised queries and keys leave: scales that the norms remove, where they remove them exactly."""
    assert a.norms is not None
    free = [norm.scale_free or approximate for norm in a.norms]
    if a.joint:  # one scale for all heads, written on the axis as a factor of size 1
        groups |= {name: PositiveScaling() for name, on in zip(("x", "y"), free) if on}
        sizes |= {name: 1 for name, on in zip(("x", "y"), free) if on}
        return ("(a x)" if free[0] else "a"), ("(a y)" if free[1] else "a")
    groups |= {"m": PositiveScaling(per="G" if grouped else head)} if free[0] else {}
    groups |= {"x": PositiveScaling(per=head)} if free[1] else {}
    return ("(a m)" if free[0] else "a"), ("(a x)" if free[1] else "a")


def _inputs(a: Attention, layout: _Layout) -> dict[str, str]:
    axes = f"({layout.own} {layout.query})", f"({layout.head} {layout.key})", f"({layout.head} f)"
    if a.interleaved:
        return a.inputs[0].outputs(f"({layout.head} ({layout.query} + {layout.key} + f))")
    whole = " + ".join(axis[1:-1] for axis in axes)
    if a.fused:
        return a.inputs[0].outputs(f"({whole})")
    tensors: dict[str, str] = {}
    for linear, axis in zip(a.inputs, axes):
        tensors |= Linear(linear.weight, None, linear.transposed).outputs(axis)
    if one_bias(a):
        return tensors | {str(a.inputs[0].bias): f"({whole})"}
    return tensors | {linear.bias: axis for linear, axis in zip(a.inputs, axes) if linear.bias}


def one_bias(a: Attention) -> bool:
    """Whether queries, keys and values have one bias parameter together."""
    return a.inputs[0].bias is not None and a.inputs[0].bias == a.inputs[1].bias == a.inputs[2].bias


def shifts_freely(a: Attention) -> bool:
    """Whether softmax does not see a constant added to all keys: nothing but their values tells them apart."""
    return not (a.rotary or a.capped or a.norms or a.extra_key or a.shared_zero_token)


def key_shift(a: Attention) -> dict[str, dict[str, str]]:
    """``b_k += c`` adds the same to every logit of a query; with partly rotary heads, where positions do not turn."""
    bias = a.inputs[1].bias
    if not bias or not (shifts_freely(a) or (a.partial and not (a.capped or a.norms))):
        return {}
    key = "(0 + _)" if a.partial else "_"
    if a.interleaved:
        query, head = ("(0 + 0)" if a.partial else "0"), _layout(a, False).head
        return {"key_shift": {bias: f"({head} ({query} + {key} + 0))"}}
    if not a.partial:
        return {"key_shift": {bias: "(0 + _ + 0)" if one_bias(a) else "_"}}
    return {"key_shift": {bias: f"({_layout(a, False).head} {key})"}} if not one_bias(a) else {}


def _table_shift(a: Attention) -> dict[str, dict[str, str]]:
    """A learned bias of logits by distance: a constant added to all distances."""
    return {"table_shift": {a.table: "1 _"}} if a.table and not a.capped else {}


def _gain_trade(a: Attention, layout: _Layout) -> Symmetry:
    """The gains of normalised queries against those of keys, equal within each plane of rotary positions."""
    if not a.norms or any(norm.centred or norm.bias for norm in a.norms):
        return EMPTY
    query, key = a.norms
    period = 2 if a.rotary == "half" else 1
    if a.rotary == "interleaved" or a.partial:
        return EMPTY
    if a.joint:
        half = (a.head_size or 0) // period
        planes = "_ n" if period == 2 else "n"
        tensors = {query.weight: f"({layout.own} {planes})", key.weight: f"({layout.head} {planes}*)"}
        groups = {name: group for name, group in layout.groups.items() if name in ("H", "K", "G")}
        named = {name: size for name, size in layout.sizes.items() if name in ("H", "K", "G")}
        return Symmetry(tensors, groups | {"n": PositiveScaling(per=layout.head)}, named | {"n": half})
    return Symmetry({}, {}, flows={"gains": OffsetTrade(
        query.weight, query.offset, against=(Axis(key.weight, 0, offset=key.offset),), period=period)})


def attention_flows(a: Attention) -> dict[str, Flow]:
    """What values and keys may move while others take it back."""
    return _value_flow(a) | _key_flow(a)


def _value_flow(a: Attention) -> dict[str, Flow]:
    """``b_v += c, b_o -= W_o c``: attention weights sum to 1, over extra tokens too unless one of them is zero."""
    bias = input_bias(a, 2)
    if not bias or not a.output.bias or a.shared_zero_token:
        return {}
    sources = (bias, *([Span(a.extra_value)] if a.extra_value else []))
    return {"value_bias": Compensation(sources, (_output_reader(a),))}


def _output_reader(a: Attention) -> Reader:
    repeat, out = a.heads // a.kv_heads, a.output
    bias = Span(out.bias) if out.bias else None
    return Reader(out.weight, bias, out.transposed, a.kv_heads if repeat > 1 else 1, repeat)


def _key_flow(a: Attention) -> dict[str, Flow]:
    """``b_k += c`` together with a learned extra key, so that all logits of a query still change alike."""
    bias = input_bias(a, 1)
    if not bias or not a.extra_key or a.rotary or a.shared_zero_token:
        return {}
    return {"key_bias": Compensation((bias, Span(a.extra_key)))}


def attention_readers(a: Attention) -> dict[str, Reader]:
    """The maps that read the stream: to query, key and value, one if they are fused; to the query alone where keys
    and values read another stream."""
    if a.fused:
        return {"query": a.inputs[0].reader} if a.memory else {"input": a.inputs[0].reader}
    return {"query": _input_reader(a, 0)} | ({} if a.memory else memory_readers(a))


def memory_readers(a: Attention) -> dict[str, Reader]:
    """The maps to key and value.  Keys without a bias may change by a constant all the same where softmax does not see
    it, and values where the output has a bias."""
    if a.fused:
        return {"key": a.inputs[1].reader, "value": a.inputs[2].reader}
    return {"key": _input_reader(a, 1, free=shifts_freely(a) and not a.inputs[1].bias),
            "value": _input_reader(a, 2, then=None if a.shared_zero_token else _output_reader(a))}


def _input_reader(a: Attention, role: int, free: bool = False, then: Reader | None = None) -> Reader:
    linear, bias = a.inputs[role], input_bias(a, role)
    behind = then if bias is None and then is not None and then.bias else None
    return Reader(linear.weight, bias, linear.transposed, free=free, then=behind)


def input_bias(a: Attention, role: int) -> Span | None:
    """The bias of query, key or value (0, 1, 2), which may be a slice of one for all three."""
    bias = a.inputs[role].bias
    if not bias:
        return None
    if not one_bias(a):
        return Span(bias)
    if a.interleaved:
        return Span(bias, role, (1, 1, 1), groups=a.heads)
    return Span(bias, role, (a.heads, a.kv_heads, a.kv_heads))

