"""The small ViT of :mod:`symgeo.models.tiny_vit`."""

from symgeo.models.family import AttentionNames, Embeddings, Family, Head, MLPNames
from symgeo.symmetry import Span

FAMILY = Family(
    name="TinyViT",
    layer="symgeo.models.tiny_vit.Block",
    attention=AttentionNames(
        query="attention.query", key="attention.key", value="attention.value", output="attention.output",
        heads="attention.num_heads",
    ),
    mlp=MLPNames(up="mlp.up", down="mlp.down"),
    attention_norm="attention_norm",
    mlp_norm="mlp_norm",
    stack="symgeo.models.tiny_vit.TinyViT",
    final_norm="norm",
    heads=(Head("symgeo.models.tiny_vit.TinyViT", "norm", "head"),),
    embeddings=Embeddings(
        owner="symgeo.models.tiny_vit.TinyViT",
        sums=((Span("embed.bias"), Span("position")),),
        weights=("embed.weight",),
    ),
)

FAMILIES = (FAMILY,)
