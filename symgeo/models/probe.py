"""Random inputs for the models whose calling convention is known, so that a symmetry can be tried out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from symgeo.functional import Params
from symgeo.models.family import qualified_names

Call = tuple[tuple[Any, ...], dict[str, Any]]
LENGTH, BATCH = 7, 2


def inputs(module: nn.Module, generator: torch.Generator) -> Call | None:
    """Arguments for ``module``, or None when its calling convention is not known."""
    for name in qualified_names(module):
        if name in _INPUTS:
            return _INPUTS[name](module, generator)
    return None


def output_function(module: nn.Module, call: Call) -> Callable[[Params], tuple[Tensor, ...]]:
    """``params -> all floating-point outputs``, with buffers in full precision."""
    args, kwargs = call
    buffers = {name: full_precision(b) for name, b in module.named_buffers()}

    def f(params: Params) -> tuple[Tensor, ...]:
        return tuple(_tensors(torch.func.functional_call(module, {**params, **buffers}, args, kwargs)))

    return f


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """``module`` in evaluation mode; every submodule gets its own mode back."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


def full_precision(x: Tensor) -> Tensor:
    """Half precision as float32; anything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)


def _normal(module: nn.Module, generator: torch.Generator, *shape: int) -> Tensor:
    first = next(module.parameters())
    dtype = torch.float32 if first.dtype in (torch.float16, torch.bfloat16) else first.dtype
    return torch.randn(*shape, generator=generator, dtype=dtype).to(first.device)


def _pretrained(module: nn.Module, generator: torch.Generator) -> Call | None:
    config: Any = module.config
    extra = {"use_cache": False} if getattr(config, "use_cache", None) is not None else {}
    kind = getattr(module, "main_input_name", "")
    if kind == "input_ids":
        ids = torch.randint(0, config.vocab_size, (BATCH, LENGTH), generator=generator)
        return (), {"input_ids": ids.to(next(module.parameters()).device), **extra}
    if kind == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return (), {"pixel_values": _normal(module, generator, BATCH, config.num_channels, height, width), **extra}
    return None


def _multihead(module: nn.Module, generator: torch.Generator) -> Call:
    assert isinstance(module, nn.MultiheadAttention)
    query = _normal(module, generator, LENGTH, LENGTH, module.embed_dim)
    key = _normal(module, generator, LENGTH, LENGTH, module.kdim)
    value = _normal(module, generator, LENGTH, LENGTH, module.vdim)
    return (query, key, value), {"need_weights": False}


def _encoder_layer(module: nn.Module, generator: torch.Generator) -> Call:
    assert isinstance(module, nn.TransformerEncoderLayer)
    return (_normal(module, generator, LENGTH, LENGTH, module.self_attn.embed_dim),), {}


def _encoder(module: nn.Module, generator: torch.Generator) -> Call | None:
    layers = getattr(module, "layers", None)
    first = layers[0] if layers else None
    return _encoder_layer(first, generator) if isinstance(first, nn.TransformerEncoderLayer) else None


def _tiny_vit(module: nn.Module, generator: torch.Generator) -> Call:
    size = int(module.image_size)  # type: ignore[arg-type]
    return (_normal(module, generator, BATCH, size, size),), {}


def _tiny_lm(module: nn.Module, generator: torch.Generator) -> Call:
    shape = BATCH, min(LENGTH, int(module.context))  # type: ignore[arg-type]
    symbols = torch.randint(0, int(module.head.out_features), shape, generator=generator)  # type: ignore[union-attr, arg-type]
    return (symbols.to(next(module.parameters()).device),), {}


_INPUTS: dict[str, Callable[[nn.Module, torch.Generator], Call | None]] = {
    "transformers.modeling_utils.PreTrainedModel": _pretrained,
    "torch.nn.modules.activation.MultiheadAttention": _multihead,
    "torch.nn.modules.transformer.TransformerEncoderLayer": _encoder_layer,
    "torch.nn.modules.transformer.TransformerEncoder": _encoder,
    "symgeo.models.tiny_vit.TinyViT": _tiny_vit,
    "symgeo.models.tiny_lm.TinyLM": _tiny_lm,
}
