"""Small models for the tests, with every parameter randomised, and their losses."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import Tensor, nn

from symgeo import functional_loss
from symgeo.functional import Loss, Params
from symgeo.models.tiny_vit import TinyViT

VOCABULARY = 41


def randomise(model: nn.Module, seed: int = 0, size: float = 0.2) -> nn.Module:
    """Float64, evaluation mode, every parameter moved by a normal draw."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def bert(layers: int = 2) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return randomise(BertForSequenceClassification(BertConfig(
        vocab_size=VOCABULARY, hidden_size=21, num_hidden_layers=layers, num_attention_heads=3, intermediate_size=37,
        max_position_embeddings=16, num_labels=3, attn_implementation="eager")))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return randomise(GPT2LMHeadModel(GPT2Config(
        vocab_size=VOCABULARY, n_embd=21, n_layer=2, n_head=3, n_inner=37, n_positions=16, bos_token_id=0,
        eos_token_id=0, attn_implementation="eager")))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return randomise(ViTForImageClassification(ViTConfig(
        hidden_size=21, num_hidden_layers=2, num_attention_heads=3, intermediate_size=37, image_size=8, patch_size=2,
        num_channels=1, num_labels=3, attn_implementation="eager")))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return randomise(LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        intermediate_size=37, max_position_embeddings=16, attn_implementation="eager")))


def tiny_vit() -> nn.Module:
    return randomise(TinyViT(width=12, heads=3, mlp_width=17, classes=3))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, 3, 17, norm_first=True)
    return randomise(nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(12), enable_nested_tensor=False))


def encoder_layer() -> nn.Module:
    return randomise(nn.TransformerEncoderLayer(12, 3, 17, activation="gelu", batch_first=True))


def multihead() -> nn.Module:
    return randomise(nn.MultiheadAttention(12, 3, kdim=5, vdim=7, add_bias_kv=True))


def multihead_plain() -> nn.Module:
    return randomise(nn.MultiheadAttention(12, 3, bias=False, add_zero_attn=True))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": bert, "gpt2": gpt2, "vit": vit, "llama": llama, "tiny_vit": tiny_vit, "encoder": encoder,
    "encoder_layer": encoder_layer, "multihead": multihead, "multihead_plain": multihead_plain,
}


def params_of(model: nn.Module) -> Params:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def language_loss(model: nn.Module, seed: int = 0, labels: int | None = None) -> tuple[Loss, list[Any]]:
    """The loss of a transformers model and two batches: next tokens, or classes when ``labels`` is given."""
    generator = torch.Generator().manual_seed(seed)

    def batch() -> dict[str, Tensor]:
        ids = torch.randint(0, VOCABULARY, (4, 7), generator=generator)
        target = torch.randint(0, labels, (4,), generator=generator) if labels else ids
        return {"input_ids": ids, "labels": target}

    return functional_loss(model), [batch(), batch()]
