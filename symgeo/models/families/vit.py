"""ViT, DeiT, CLIP and SigLIP (transformers), and the ViT layouts of timm and torchvision."""

from __future__ import annotations

from dataclasses import replace

from symgeo.groups import Orthogonal, PositiveScaling
from symgeo.models.families._transformers import PLAIN, path, rows
from symgeo.models.families.torch_nn import MultiheadNames
from symgeo.models.family import AttentionNames, Embeddings, Extra, Family, Head, MLPNames
from symgeo.symmetry import Span, Symmetry

_POSITIONS = "embeddings.position_embeddings"
_PATCHES = "embeddings.patch_embeddings.projection"


_DISK = (
    (r"(^|\.)layers\.(\d+)\.", r"\1encoder.layer.\2."), (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."), (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."), (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def _vit(name: str, module: str, prefix: str, tokens: tuple[str, ...]) -> Family:
    count = len(tokens)
    own = ((Span(f"embeddings.{token}"), Span(_POSITIONS, rows=(i, i + 1))) for i, token in enumerate(tokens))
    return Family(
        name=name,
        layer=path(module, f"{prefix}Layer"),
        attention=AttentionNames(
            query="attention.q_proj", key="attention.k_proj", value="attention.v_proj", output="attention.o_proj",
            heads="attention.num_attention_heads",
        ),
        mlp=PLAIN,
        attention_norm="layernorm_before",
        mlp_norm="layernorm_after",
        stack=path(module, f"{prefix}Model"),
        final_norm="layernorm",
        heads=(Head(path(module, f"{prefix}ForImageClassification"), f"{module}.layernorm", "classifier"),
               Head(path(module, f"{prefix}ForImageClassificationWithTeacher"), f"{module}.layernorm",
                    "cls_classifier"),
               Head(path(module, f"{prefix}ForImageClassificationWithTeacher"), f"{module}.layernorm",
                    "distillation_classifier")),
        embeddings=Embeddings(
            owner=path(module, f"{prefix}Model"),
            sums=((Span(f"{_PATCHES}.bias"), Span(_POSITIONS, rows=(count, None))), *own),
            masks=(Span("embeddings.mask_token"),),
            weights=(f"{_PATCHES}.weight",),
        ),
        disk=_DISK,
    )


VIT = _vit("ViT", "vit", "ViT", ("cls_token",))
DEIT = _vit("DeiT", "deit", "DeiT", ("cls_token", "distillation_token"))

_ATTENTION = AttentionNames(
    query="self_attn.q_proj", key="self_attn.k_proj", value="self_attn.v_proj", output="self_attn.out_proj",
    heads="self_attn.num_heads",
)


def _tower(name: str, module: str, prefix: str, norm: str, tables: tuple[Embeddings, ...], heads: tuple[Head, ...],
           extras: tuple[Extra, ...] = ()) -> Family:
    """Both towers; their last norms stand in the models around the stacks."""
    vision, text = (path(module, f"{prefix}{kind}Model") for kind in ("Vision", "Text"))
    words = Embeddings(text, sums=(rows("embeddings.token_embedding.weight", "embeddings.position_embedding.weight"),))
    both = path(module, f"{prefix}Model")
    pairs = (Head(both, "text_model.final_layer_norm", norm, stack="text_model.encoder"),)
    alone = (Head(text, "final_layer_norm", "", stack="encoder"),)
    return Family(
        name=name,
        layer=path(module, f"{prefix}EncoderLayer"),
        attention=_ATTENTION,
        mlp=PLAIN,
        attention_norm="layer_norm1",
        mlp_norm="layer_norm2",
        stack=path(module, f"{prefix}Encoder"),
        embeddings=(words, *(replace(table, owner=vision) for table in tables)),
        heads=(*pairs, *heads, *alone),
        extras=extras,
    )


_POSITION = "embeddings.position_embedding.weight"
CLIP = _tower(
    "CLIP", "clip", "CLIP", "text_projection",
    (Embeddings("", sums=((Span("embeddings.class_embedding"), Span(_POSITION, rows=(0, 1))),
                          (Span(_POSITION, rows=(1, None)),)),
                weights=("embeddings.patch_embedding.weight",), norm="pre_layrnorm"),),
    (Head(path("clip", "CLIPModel"), "vision_model.post_layernorm", "visual_projection",
          stack="vision_model.encoder"),),
    extras=(Extra(  # features are normalised and multiplied: lengths are lost, and both may be turned
        path("clip", "CLIPModel"),
        Symmetry({"visual_projection.weight": "(p x) _", "text_projection.weight": "(p y) _"},
                 {"p": Orthogonal(), "x": PositiveScaling(), "y": PositiveScaling()}, {"x": 1, "y": 1}),
    ),),
)
SIGLIP = _tower(
    "SigLIP", "siglip", "Siglip", "text_model.head",
    (Embeddings("", sums=((Span("embeddings.patch_embedding.bias"), Span(_POSITION)),),
                weights=("embeddings.patch_embedding.weight",)),),
    (Head(path("siglip", "SiglipVisionModel"), "post_layernorm", "", stack="encoder"),),
)
SIGLIP_POOLING = Family(
    name="SigLIP pooling",
    layer=path("siglip", "SiglipMultiheadAttentionPoolingHead"),
    attention=MultiheadNames("attention", memory=True, owns=("probe",)),
    mlp=PLAIN,
    mlp_norm="layernorm",
)
TIMM = Family(
    name="timm ViT",
    layer="timm.models.vision_transformer.Block",
    attention=AttentionNames(fused="attn.qkv", output="attn.proj", heads="attn.num_heads", query_norm="attn.q_norm",
                             key_norm="attn.k_norm"),
    mlp=MLPNames(up="mlp.fc1", down="mlp.fc2", activation="mlp.act"),
    attention_norm="norm1",
    mlp_norm="norm2",
    attention_scale="ls1.gamma",
    mlp_scale="ls2.gamma",
    stack="timm.models.vision_transformer.VisionTransformer",
    final_norm="norm",
    heads=(Head("timm.models.vision_transformer.VisionTransformer", "norm", "head"),),
    embeddings=Embeddings(
        owner="timm.models.vision_transformer.VisionTransformer",
        sums=((Span("patch_embed.proj.bias"), Span("pos_embed", rows=(1, None))),
              (Span("cls_token"), Span("pos_embed", rows=(0, 1)))),
        weights=("patch_embed.proj.weight",),
    ),
)

TORCHVISION = Family(
    name="torchvision ViT",
    layer="torchvision.models.vision_transformer.EncoderBlock",
    attention=MultiheadNames("self_attention"),
    mlp=MLPNames(up="mlp.0", down="mlp.3", activation="mlp.1"),
    attention_norm="ln_1",
    mlp_norm="ln_2",
    stack="torchvision.models.vision_transformer.Encoder",
    final_norm="ln",
    heads=(Head("torchvision.models.vision_transformer.VisionTransformer", "encoder.ln", "heads.head"),),
    embeddings=Embeddings(
        owner="torchvision.models.vision_transformer.VisionTransformer",
        sums=((Span("conv_proj.bias"), Span("encoder.pos_embedding", rows=(1, None))),
              (Span("class_token"), Span("encoder.pos_embedding", rows=(0, 1)))),
        weights=("conv_proj.weight",),
    ),
)

FAMILIES = (DEIT, VIT, CLIP, SIGLIP, SIGLIP_POOLING, TIMM, TORCHVISION)
