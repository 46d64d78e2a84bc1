"""The transformers of torch.nn."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

from torch import Tensor, nn
from zoo_base import Case, Sizes, balanced, batches, finish, maker, normal, repeats

TIME, MEMORY = 6, 5


def _case(s: Sizes, model: nn.Module, read: Callable[[Any], Tensor] = lambda x: x, **inputs: Tensor) -> Case:
    """Time first, then the samples."""
    return Case(model, batches(TIME * s.width, axis=1, **inputs), read)


def multihead(s: Sizes, **options: Any) -> Case:
    """nn.MultiheadAttention."""
    model = finish(nn.MultiheadAttention(s.width, s.heads, **options), s)
    n = repeats(model, TIME * s.width)
    widths = (s.width, options.get("kdim", s.width), options.get("vdim", s.width))
    query, key, value = (normal(t, n, w, seed=t + w) for t, w in zip((TIME, MEMORY, MEMORY), widths))
    return _case(s, model, itemgetter(0), query=query, key=key, value=value)


def _layer(s: Sizes, kind: str, **options: Any) -> nn.Module:
    layer: nn.Module = getattr(nn, f"Transformer{kind}Layer")(
        s.width, s.heads, s.hidden, dropout=0.0, **{"activation": "gelu"} | options)
    return layer


def encoder_layer(s: Sizes, **options: Any) -> Case:
    """nn.TransformerEncoderLayer."""
    model = finish(_layer(s, "Encoder", **options), s)
    x = normal(TIME, repeats(model, TIME * s.width), s.width)
    case = _case(s, model, src=x)
    return balanced(case, "linear1") if options.get("activation") == "relu" else case


def encoder(s: Sizes, norm: bool = False, **options: Any) -> Case:
    """nn.TransformerEncoder, with or without a norm behind it."""
    last = nn.LayerNorm(s.width, bias=options.get("bias", True)) if norm else None
    model = finish(nn.TransformerEncoder(_layer(s, "Encoder", **options), s.layers, norm=last,
                                         enable_nested_tensor=False), s)
    x = normal(TIME, repeats(model, TIME * s.width), s.width)
    return _case(s, model, src=x)


def decoder_layer(s: Sizes, **options: Any) -> Case:
    """nn.TransformerDecoderLayer."""
    model = finish(_layer(s, "Decoder", **options), s)
    n = repeats(model, TIME * s.width)
    x, memory = normal(TIME, n, s.width), normal(MEMORY, n, s.width, seed=4)
    return _case(s, model, tgt=x, memory=memory)


def decoder(s: Sizes, norm: bool = False, **options: Any) -> Case:
    """nn.TransformerDecoder, with or without a norm behind it."""
    last = nn.LayerNorm(s.width) if norm else None
    model = finish(nn.TransformerDecoder(_layer(s, "Decoder", **options), s.layers, norm=last), s)
    n = repeats(model, TIME * s.width)
    x, memory = normal(TIME, n, s.width), normal(MEMORY, n, s.width, seed=4)
    return _case(s, model, tgt=x, memory=memory)


def transformer(s: Sizes, **options: Any) -> Case:
    """nn.Transformer; its own encoder warns that nested tensors are of no use here."""
    stack = nn.TransformerEncoder(_layer(s, "Encoder", **options), s.layers, norm=nn.LayerNorm(s.width),
                                  enable_nested_tensor=False)
    model = finish(nn.Transformer(s.width, s.heads, s.layers, s.layers, s.hidden, dropout=0.0, custom_encoder=stack,
                                  **{"activation": "gelu"} | options), s)
    n = repeats(model, TIME * s.width)
    x, y = normal(MEMORY, n, s.width, seed=4), normal(TIME, n, s.width)
    return _case(s, model, src=x, tgt=y)


TORCH: dict[str, Callable[..., Case]] = {
    "nn.MultiheadAttention": maker(multihead),
    "nn.MultiheadAttention, no bias": maker(multihead, bias=False),
    "nn.MultiheadAttention, extra tokens": maker(multihead, kdim=5, vdim=7, add_bias_kv=True),
    "nn.MultiheadAttention, zero token": maker(multihead, add_zero_attn=True),
    "nn.TransformerEncoderLayer": maker(encoder_layer),
    "nn.TransformerEncoderLayer, pre-norm": maker(encoder_layer, norm_first=True),
    "nn.TransformerEncoderLayer, ReLU": maker(encoder_layer, activation="relu"),
    "nn.TransformerEncoderLayer, no bias": maker(encoder_layer, bias=False),
    "nn.TransformerEncoderLayer, pre-norm, no bias": maker(encoder_layer, bias=False, norm_first=True),
    "nn.TransformerEncoder": maker(encoder),
    "nn.TransformerEncoder, pre-norm": maker(encoder, norm_first=True, norm=True),
    "nn.TransformerEncoder, post-norm, norm": maker(encoder, norm=True),
    "nn.TransformerDecoderLayer": maker(decoder_layer),
    "nn.TransformerDecoderLayer, pre-norm": maker(decoder_layer, norm_first=True),
    "nn.TransformerDecoder": maker(decoder),
    "nn.TransformerDecoder, pre-norm": maker(decoder, norm_first=True, norm=True),
    "nn.Transformer": maker(transformer),
    "nn.Transformer, pre-norm": maker(transformer, norm_first=True),
}
