"""The small language model of :mod:`symgeo.models.tiny_lm`."""

from symgeo.models.family import AttentionNames, Embeddings, Family, Head, MLPNames
from symgeo.symmetry import Span

FAMILY = Family(
    name="TinyLM",
    layer="symgeo.models.tiny_lm.CausalBlock",
    attention=AttentionNames(
        query="attention.query", key="attention.key", value="attention.value", output="attention.output",
        heads="attention.num_heads",
    ),
    mlp=MLPNames(up="mlp.up", down="mlp.down"),
    attention_norm="attention_norm",
    mlp_norm="mlp_norm",
    stack="symgeo.models.tiny_lm.TinyLM",
    final_norm="norm",
    heads=(Head("symgeo.models.tiny_lm.TinyLM", "norm", "head"),),
    embeddings=Embeddings(
        owner="symgeo.models.tiny_lm.TinyLM",
        sums=((Span("embed.weight"), Span("position")),),
    ),
)

FAMILIES = (FAMILY,)
