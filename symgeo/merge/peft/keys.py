"""Names of tensors in ``adapter_model.safetensors``: which module they belong to, and as what.

PEFT writes ``base_model.model.<module>.lora_A.weight`` and ``.lora_B.weight``; for embeddings ``.lora_embedding_A``
and ``.lora_embedding_B``; and, where an input embedding is adapted, also the tensors of the base that it replaces,
``.base_layer.weight``.  The name of the adapter is not part of the keys.
"""

from __future__ import annotations

import re
from pathlib import Path

PREFIX = "base_model.model."
PAIRS = {"linear": ("lora_A.weight", "lora_B.weight"), "embedding": ("lora_embedding_A", "lora_embedding_B")}
FACTORS = {role: (kind, side) for kind, pair in PAIRS.items() for side, role in zip("AB", pair)}
KEY = re.compile(
    re.escape(PREFIX) + r"(?P<module>.+)\.(?P<role>lora_[AB]\.weight|lora_embedding_[AB]|base_layer\.(?:weight|bias))"
)
# what a key that cannot be merged tells about the adapter, and what to do
FOREIGN = (
    (r"\.lora_magnitude_vector", "DoRA magnitudes (use_dora) cannot be merged; train without them"),
    (r"\.lora_[AB]\.bias$", "biases of factors (lora_bias) cannot be merged; train with lora_bias=false"),
    (r"\.lora_E$|\.ranknum$", "this is AdaLoRA (peft_type ADALORA); only plain LoRA can be merged"),
    (r"trainable_tokens", "trained tokens (trainable_token_indices) cannot be merged; train without them"),
    (r"\.lora_[AB]\.[^.]+\.weight$|\.lora_embedding_[AB]\.[^.]+$",
     "the key holds the name of an adapter; save the adapter with PeftModel.save_pretrained"),
    (r"\.lora_", "this kind of LoRA is not known; only plain LoRA can be merged"),
    (r"\.bias$", 'trained biases (bias) cannot be merged; train with bias="none"'),
)  # fmt: skip
PLAIN = (
    "a whole weight (modules_to_save, or a resized embedding) cannot be merged; train without it, or save with "
    "save_pretrained(..., save_embedding_layers=False)"
)


def parse_key(folder: Path, key: str) -> tuple[str, str]:
    """Module and role of a tensor; ``ValueError`` naming the folder and the tensor if it cannot be merged.

    >>> parse_key(Path("a"), "base_model.model.layers.0.q_proj.lora_A.weight")
    ('layers.0.q_proj', 'lora_A.weight')
    """
    match = KEY.fullmatch(key)
    if match:
        return match["module"], match["role"]
    if not key.startswith(PREFIX):
        why = f"PEFT's keys start with {PREFIX!r}; save the adapter with PeftModel.save_pretrained"
    else:
        why = next((reason for pattern, reason in FOREIGN if re.search(pattern, key)), PLAIN)
    raise ValueError(f"{folder}: tensor {key}: {why}")


def owner(module: str) -> str:
    """The module that the configuration names: ``nn.MultiheadAttention`` carries the adapter of its projection.

    >>> owner("blocks.0.attn.base_layer.out_proj"), owner("blocks.0.attn")
    ('blocks.0.attn', 'blocks.0.attn')
    """
    return module.partition(".base_layer.")[0]
