"""The transformer layers of torch.nn, their stacks, and torch.nn.MultiheadAttention."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from symgeo.models.family import Family, MLPNames
from symgeo.models.structure import Attention, Linear


@dataclass(frozen=True)
class MultiheadNames:
    """Reads the ``nn.MultiheadAttention`` at ``path`` (the layer itself when empty).

    memory: keys and values read another stream;  owns: further parameters of the layer that belong to it.
    """

    path: str = ""
    memory: bool = False
    owns: tuple[str, ...] = ()

    def read(self, module: nn.Module) -> Attention:
        """Fused or separate projections, one bias for all three, learned or zero extra tokens."""
        attention = module.get_submodule(self.path)
        assert isinstance(attention, nn.MultiheadAttention)
        prefix = f"{self.path}." if self.path else ""
        bias = f"{prefix}in_proj_bias" if attention.in_proj_bias is not None else None
        separate = attention.in_proj_weight is None
        names = [f"{role}_proj_weight" if separate else "in_proj_weight" for role in "qkv"]
        parts = (1,) if separate else (1, 1, 1)
        query, key, value = (Linear(prefix + name, bias) for name in names)
        if self.memory and not separate:
            query, key, value = (replace(linear, part=i, parts=parts) for i, linear in enumerate((query, key, value)))
        out_bias = f"{prefix}out_proj.bias" if attention.out_proj.bias is not None else None
        return Attention(
            (query, key, value), Linear(f"{prefix}out_proj.weight", out_bias),
            heads=attention.num_heads, kv_heads=attention.num_heads, memory=self.memory,
            extra_key=f"{prefix}bias_k" if attention.bias_k is not None else None,
            extra_value=f"{prefix}bias_v" if attention.bias_v is not None else None,
            shared_zero_token=attention.add_zero_attn,
        )

    def owned(self) -> set[str]:
        """All of the attention module."""
        own = {self.path} if self.path else {"in_proj", "q_proj", "k_proj", "v_proj", "bias_k", "bias_v", "out_proj"}
        return own | set(self.owns)


MULTIHEAD = Family(
    name="nn.MultiheadAttention",
    layer="torch.nn.modules.activation.MultiheadAttention",
    attention=MultiheadNames(),
)

ENCODER = Family(
    name="nn.TransformerEncoderLayer",
    layer="torch.nn.modules.transformer.TransformerEncoderLayer",
    attention=MultiheadNames("self_attn"),
    mlp=MLPNames(up="linear1", down="linear2", activation="activation"),
    attention_norm="norm1",
    mlp_norm="norm2",
    prenorm="norm_first",
    stack="torch.nn.modules.transformer.TransformerEncoder",
    final_norm="norm",
    memory=("encoder", "decoder"),
)
DECODER = replace(
    ENCODER,
    name="nn.TransformerDecoderLayer",
    layer="torch.nn.modules.transformer.TransformerDecoderLayer",
    cross=MultiheadNames("multihead_attn", memory=True),
    cross_norm="norm2",
    mlp_norm="norm3",
    stack="torch.nn.modules.transformer.TransformerDecoder",
)

FAMILIES = (DECODER, ENCODER, MULTIHEAD)
