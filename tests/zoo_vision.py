"""Images, and images with text: ViT and DeiT, CLIP and SigLIP, the layout of timm, symgeo's own TinyViT."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import timm_layout
import torch
import torchvision_layout
import transformers
from torch import Tensor, nn
from zoo_base import LENGTH, Case, Sizes, batches, finish, maker, normal, on_tokens, repeats, tokens

from symgeo.models.tiny_vit import TinyViT

LABELS, SIDE, PATCH = 3, 4, 2
SQUARE = 9  # texts, and images, in one batch
PATCHES = (SIDE // PATCH) ** 2


def on_images(model: nn.Module, s: Sizes, outputs: int, field: str = "logits") -> Case:
    """A model of images with `outputs` numbers for each."""
    model = finish(model, s)
    images = normal(repeats(model, outputs), 1, SIDE, SIDE)
    return Case(model, batches(outputs, pixel_values=images), attrgetter(field))


def hidden_and_pooled(output: Any) -> Tensor:
    """Both outputs of a tower."""
    return torch.cat([output.last_hidden_state.reshape(-1), output.pooler_output.reshape(-1)])


def _tower(s: Sizes, **more: Any) -> dict[str, Any]:
    return {"hidden_size": s.width, "num_attention_heads": s.heads, "intermediate_size": s.hidden,
            "num_hidden_layers": s.layers, "attn_implementation": "eager", **more}


def _vision(s: Sizes, **more: Any) -> dict[str, Any]:
    return _tower(s, image_size=SIDE, patch_size=PATCH, num_channels=1, **more)


def _text(s: Sizes, **more: Any) -> dict[str, Any]:
    return _tower(s, vocab_size=s.vocab, max_position_embeddings=LENGTH, pad_token_id=0, bos_token_id=1,
                  eos_token_id=s.vocab - 1, **more)


def classifier(s: Sizes, kind: str, **options: Any) -> Case:
    """ViT and DeiT with their heads."""
    config = getattr(transformers, f"{kind}Config")(**_vision(s), num_labels=LABELS, **options)
    return on_images(getattr(transformers, f"{kind}ForImageClassification")(config), s, LABELS)


def bare(s: Sizes, kind: str, **options: Any) -> Case:
    """ViT and DeiT without."""
    config = getattr(transformers, f"{kind}Config")(**_vision(s), **options)
    model = getattr(transformers, f"{kind}Model")(config, add_pooling_layer=False)
    return on_images(model, s, (PATCHES + 1) * s.width, "last_hidden_state")


def vision_tower(s: Sizes, kind: str, **options: Any) -> Case:
    """The images of CLIP and SigLIP alone."""
    config = getattr(transformers, f"{kind}VisionConfig")(**_vision(s), **options)
    return on_images(getattr(transformers, f"{kind}VisionModel")(config), s, PATCHES * s.width, "last_hidden_state")


def pooled_tower(s: Sizes, kind: str, **options: Any) -> Case:
    """The same with the pooled output."""
    case = vision_tower(s, kind, **options)
    return Case(case.model, case.calls, hidden_and_pooled)


def text_tower(s: Sizes, kind: str, pooled: bool = False, **options: Any) -> Case:
    """The text of CLIP and SigLIP alone."""
    config = getattr(transformers, f"{kind}TextConfig")(**_text(s), **options)
    case = on_tokens(getattr(transformers, f"{kind}TextModel")(config), s, LENGTH * s.width, "last_hidden_state")
    return Case(case.model, case.calls, hidden_and_pooled) if pooled else case


def pairs(s: Sizes, kind: str, dim: int = 0, **options: Any) -> Case:
    """CLIP and SigLIP: similarities of images with texts in a space of `dim` dimensions, the width of SigLIP."""
    dim = dim or s.width
    text, vision = _text(s), _vision(s)
    if kind == "CLIP":
        vision["hidden_size"] -= s.heads
        options["projection_dim"] = dim
    else:
        vision["hidden_size"] = text["projection_size"] = dim
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, **options)
    model = finish(getattr(transformers, f"{kind}Model")(config), s)
    # the similarities of n texts and n images depend on 2 n (dim - 1) coordinates on spheres
    n = repeats(model, min(SQUARE, 2 * (dim - 1)))
    ids, images = tokens(n, LENGTH, s.vocab), normal(n, 1, SIDE, SIDE)
    # every text has an end, at any position
    ids[torch.arange(n), torch.arange(n) % LENGTH] = s.vocab - 1
    calls = batches(SQUARE, input_ids=ids, pixel_values=images)
    return Case(model, calls, attrgetter("logits_per_image"))


def timm(s: Sizes, **options: Any) -> Case:
    """The layout of timm."""
    model = finish(timm_layout.VisionTransformer(
        img_size=SIDE, patch_size=PATCH, in_chans=1, num_classes=LABELS, embed_dim=s.width, depth=s.layers,
        num_heads=s.heads, mlp_hidden=s.hidden, **options), s)
    images = normal(repeats(model, LABELS), 1, SIDE, SIDE)
    return Case(model, batches(LABELS, x=images), lambda x: x)


def torchvision(s: Sizes) -> Case:
    """The layout of torchvision."""
    model = finish(torchvision_layout.VisionTransformer(
        image_size=SIDE, patch_size=PATCH, channels=1, classes=LABELS, depth=s.layers, num_heads=s.heads,
        hidden_dim=s.width, mlp_dim=s.hidden), s)
    images = normal(repeats(model, LABELS), 1, SIDE, SIDE)
    return Case(model, batches(LABELS, x=images), lambda x: x)


def tiny_vit(s: Sizes) -> Case:
    """The small ViT of symgeo."""
    model = finish(TinyViT(image_size=SIDE, patch_size=PATCH, width=s.width, depth=s.layers, heads=s.heads,
                           mlp_width=s.hidden, classes=LABELS), s)
    images = normal(repeats(model, LABELS), SIDE, SIDE)
    return Case(model, batches(LABELS, images=images), lambda x: x)


# In the first layer the query of a class token, or of a token at the end, is the same for all inputs: one layer alone
# would have many more flat directions than any of those above it.
VISION: dict[str, Callable[..., Case]] = {
    "ViT classifier": maker(classifier, layers=2, kind="ViT"),
    "ViT": maker(bare, kind="ViT"),
    "ViT classifier, no biases": maker(classifier, layers=2, kind="ViT", qkv_bias=False),
    "DeiT classifier": maker(classifier, layers=2, kind="DeiT"),
    "DeiT": maker(bare, kind="DeiT"),
    "CLIP": maker(pairs, layers=2, kind="CLIP", dim=5),
    "CLIP, wide projection": maker(pairs, layers=2, kind="CLIP", dim=9),
    "CLIP vision": maker(vision_tower, kind="CLIP"),
    "CLIP vision, pooled": maker(pooled_tower, kind="CLIP"),
    "CLIP text": maker(text_tower, kind="CLIP"),
    "SigLIP": maker(pairs, kind="Siglip"),
    "SigLIP vision": maker(vision_tower, kind="Siglip", vision_use_head=False),
    "SigLIP vision, pooled": maker(pooled_tower, kind="Siglip"),
    "SigLIP text": maker(text_tower, kind="Siglip", projection_size=3),
    "SigLIP text, pooled": maker(text_tower, kind="Siglip", projection_size=3, pooled=True),
    "timm ViT": maker(timm, layers=2),
    "timm ViT, norms of heads and layer scale": maker(timm, layers=2, qk_norm=True, init_values=0.5),
    "torchvision ViT": maker(torchvision, layers=2),
    "TinyViT": maker(tiny_vit),
}
