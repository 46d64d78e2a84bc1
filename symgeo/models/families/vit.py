"""ViT (transformers 5)."""

from symgeo.models.family import AttentionNames, Embeddings, Family, Head, MLPNames
from symgeo.symmetry import Span

FAMILY = Family(
    name="ViT",
    layer="transformers.models.vit.modeling_vit.ViTLayer",
    attention=AttentionNames(
        query="attention.q_proj", key="attention.k_proj", value="attention.v_proj", output="attention.o_proj",
        heads="attention.num_attention_heads",
    ),
    mlp=MLPNames(up="mlp.fc1", down="mlp.fc2", activation="mlp.activation_fn"),
    attention_norm="layernorm_before",
    mlp_norm="layernorm_after",
    stack="transformers.models.vit.modeling_vit.ViTModel",
    final_norm="layernorm",
    heads=(Head("transformers.models.vit.modeling_vit.ViTForImageClassification", "vit.layernorm", "classifier"),),
    embeddings=Embeddings(
        owner="transformers.models.vit.modeling_vit.ViTModel",
        sums=(
            (Span("embeddings.patch_embeddings.projection.bias"),
             Span("embeddings.position_embeddings", rows=(1, None))),
            (Span("embeddings.cls_token"), Span("embeddings.position_embeddings", rows=(0, 1))),
        ),
        masks=(Span("embeddings.mask_token"),),
        weights=("embeddings.patch_embeddings.projection.weight",),
    ),
)
