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
IMAGES = (8, 16, 28, 32, 64, 12, 24, 48, 96, 224)


def inputs(module: nn.Module, generator: torch.Generator) -> Call | None:
    """Arguments for ``module``, or None when its calling convention is not known."""
    for name in qualified_names(module):
        if name in _INPUTS:
            return _INPUTS[name](module, generator)
    return None


def output_function(
    module: nn.Module, call: Call, lift: Callable[[Tensor], Tensor] | None = None
) -> Callable[[Params], tuple[Tensor, ...]]:
    """``params -> outputs``, with buffers (by ``lift``) in full precision: the logits where the model gives some, its
    last hidden states otherwise, and of anything that is no dict all floating-point tensors."""
    args, kwargs = call
    buffers = {name: (lift or full_precision)(b) for name, b in module.named_buffers()}

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


def double_precision(x: Tensor) -> Tensor:
    """Floating-point tensors as float64; anything else as it is."""
    return x.double() if x.is_floating_point() else x


def full_precision(x: Tensor) -> Tensor:
    """Half precision as float32; anything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        logits = [key for key in output if "logits" in key]
        hidden = [key for key in output if not key.startswith("encoder_")]
        for key in logits or hidden:
            yield from _tensors(output[key])
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)


def _normal(module: nn.Module, generator: torch.Generator, *shape: int) -> Tensor:
    first = next(module.parameters())
    dtype = torch.float32 if first.dtype in (torch.float16, torch.bfloat16) else first.dtype
    return torch.randn(*shape, generator=generator, dtype=dtype).to(first.device)


def _pretrained(module: nn.Module, generator: torch.Generator) -> Call | None:
    config: Any = module.config
    kwargs: dict[str, Any] = {"use_cache": False} if getattr(config, "use_cache", None) is not None else {}
    kind = getattr(module, "main_input_name", "")
    text, vision = getattr(config, "text_config", config), getattr(config, "vision_config", config)
    if kind == "input_ids":
        kwargs["input_ids"] = _tokens(module, text, generator)
    elif kind == "input_features":
        frames = 2 * int(config.max_source_positions)
        kwargs["input_features"] = _normal(module, generator, BATCH, config.num_mel_bins, frames)
    elif kind != "pixel_values":
        return None
    if kind == "pixel_values" or (vision is not config and "text_model" in dict(module.named_children())):
        size = vision.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        kwargs["pixel_values"] = _normal(module, generator, BATCH, vision.num_channels, height, width)
    parts = {name.rpartition(".")[2] for name, _ in module.named_modules()}
    if getattr(config, "is_encoder_decoder", False) and "decoder" in parts:
        kwargs["decoder_input_ids"] = _tokens(module, config, generator)
    return (), kwargs


def _tokens(module: nn.Module, config: Any, generator: torch.Generator) -> Tensor:
    length = min(LENGTH, *(int(n) for name in ("max_position_embeddings", "max_target_positions")
                           if (n := getattr(config, name, None))), LENGTH)
    ids = torch.randint(0, config.vocab_size, (BATCH, length), generator=generator)
    return ids.to(next(module.parameters()).device)


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


def _decoder_layer(module: nn.Module, generator: torch.Generator) -> Call:
    assert isinstance(module, nn.TransformerDecoderLayer)
    width = module.self_attn.embed_dim
    return (_normal(module, generator, LENGTH, LENGTH, width), _normal(module, generator, LENGTH, LENGTH, width)), {}


def _decoder(module: nn.Module, generator: torch.Generator) -> Call | None:
    layers = getattr(module, "layers", None)
    first = layers[0] if layers else None
    return _decoder_layer(first, generator) if isinstance(first, nn.TransformerDecoderLayer) else None


def _transformer(module: nn.Module, generator: torch.Generator) -> Call | None:
    decoder = getattr(module, "decoder", None)
    return _decoder(decoder, generator) if isinstance(decoder, nn.TransformerDecoder) else None


def _timm(module: nn.Module, generator: torch.Generator) -> Call:
    patches: Any = module.patch_embed
    height, width = patches.img_size
    return (_normal(module, generator, BATCH, patches.proj.in_channels, height, width),), {}


def _torchvision(module: nn.Module, generator: torch.Generator) -> Call:
    size: Any = module.image_size
    channels: Any = module.conv_proj
    return (_normal(module, generator, BATCH, channels.in_channels, size, size),), {}


def _sequential(module: nn.Module, generator: torch.Generator) -> Call | None:
    """Features for a chain that starts with a linear map, images of a size that it takes for one of convolutions."""
    first = next((m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)), None)
    if first is None or any(p.is_meta for p in module.parameters()):
        return None
    shapes: list[tuple[int, ...]] = [(first.in_features,)] if isinstance(first, nn.Linear) else [
        (first.in_channels, *(size,) * len(first.kernel_size)) for size in IMAGES]
    for shape in shapes:
        call: Call = (_normal(module, generator, BATCH, *shape),), {}
        if _runs(module, call):
            return call
    return None


def _runs(module: nn.Module, call: Call) -> bool:
    args, kwargs = call
    params = {name: full_precision(p.detach()) for name, p in module.named_parameters()}
    try:
        with evaluating(module), torch.no_grad():
            output_function(module, (args, kwargs))(params)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    return True


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
    "torch.nn.modules.transformer.TransformerDecoderLayer": _decoder_layer,
    "torch.nn.modules.transformer.TransformerDecoder": _decoder,
    "torch.nn.modules.transformer.Transformer": _transformer,
    "torch.nn.modules.container.Sequential": _sequential,
    "torchvision.models.vision_transformer.VisionTransformer": _torchvision,
    "timm.models.vision_transformer.VisionTransformer": _timm,
    "symgeo.models.tiny_vit.TinyViT": _tiny_vit,
    "symgeo.models.tiny_lm.TinyLM": _tiny_lm,
}
