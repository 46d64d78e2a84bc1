"""ModernBERT (transformers): fused and gated maps, rotary positions, the first attention without a norm."""

from symgeo.models.families._transformers import path, rows
from symgeo.models.family import AttentionNames, Embeddings, Family, Head, MLPNames

MODERNBERT = Family(
    name="ModernBERT",
    layer=path("modernbert", "ModernBertEncoderLayer"),
    attention=AttentionNames(fused="attn.Wqkv", output="attn.Wo", heads="attn.config.num_attention_heads",
                             head_size="attn.head_dim", rotary="half"),
    mlp=MLPNames(fused="mlp.Wi", down="mlp.Wo", activation="mlp.act"),
    attention_norm="attn_norm",
    mlp_norm="mlp_norm",
    stack=path("modernbert", "ModernBertModel"),
    final_norm="final_norm",
    heads=tuple(head for owner, last in (("MaskedLM", "decoder"), ("SequenceClassification", "classifier"),
                                         ("TokenClassification", "classifier"))
                for head in (Head(path("modernbert", f"ModernBertFor{owner}"), "model.final_norm", "head.dense"),
                             Head(path("modernbert", f"ModernBertFor{owner}"), "head.norm", last))),
    embeddings=Embeddings(path("modernbert", "ModernBertModel"), sums=(rows("embeddings.tok_embeddings.weight"),),
                          norm="embeddings.norm"),
)

FAMILIES = (MODERNBERT,)
