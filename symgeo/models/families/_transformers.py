"""Where transformers keeps its classes, and names that many of its families share."""

from __future__ import annotations

from symgeo.models.family import AttentionNames, Embeddings, Head, MLPNames
from symgeo.symmetry import Span


def path(module: str, name: str) -> str:
    """The qualified name of a class of ``transformers.models.<module>``."""
    return f"transformers.models.{module}.modeling_{module}.{name}"


def rows(*names: str) -> tuple[Span, ...]:
    """Spans of whole parameters that are added up."""
    return tuple(Span(name) for name in names)


def tokens(module: str, owner: str, name: str = "embed_tokens.weight") -> Embeddings:
    """A stream that starts from token embeddings alone."""
    return Embeddings(path(module, owner), sums=(rows(name),))


def heads(module: str, prefix: str, norm: str, **linear: str) -> tuple[Head, ...]:
    """Heads behind one norm: class suffix -> name of the linear map."""
    return tuple(Head(path(module, f"{prefix}{suffix}"), norm, name) for suffix, name in linear.items())


#: the attention of LLaMA and what followed it
ROTARY = AttentionNames(
    query="self_attn.q_proj", key="self_attn.k_proj", value="self_attn.v_proj", output="self_attn.o_proj",
    heads="self_attn.config.num_attention_heads", kv_heads="self_attn.config.num_key_value_heads",
    head_size="self_attn.head_dim", rotary="half",
)
GATED = MLPNames(up="mlp.up_proj", down="mlp.down_proj", gate="mlp.gate_proj", activation="mlp.act_fn")
#: a two-layer perceptron as in CLIP and ViT
PLAIN = MLPNames(up="mlp.fc1", down="mlp.fc2", activation="mlp.activation_fn")
