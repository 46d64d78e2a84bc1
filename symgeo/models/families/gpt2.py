"""GPT-2 (transformers): fused query-key-value, weights stored (in, out)."""

from symgeo.models.family import AttentionNames, Embeddings, Family, Head, MLPNames
from symgeo.symmetry import Span

FAMILY = Family(
    name="GPT-2",
    layer="transformers.models.gpt2.modeling_gpt2.GPT2Block",
    attention=AttentionNames(fused="attn.c_attn", output="attn.c_proj", heads="attn.num_heads"),
    mlp=MLPNames(up="mlp.c_fc", down="mlp.c_proj", activation="mlp.act"),
    attention_norm="ln_1",
    mlp_norm="ln_2",
    stack="transformers.models.gpt2.modeling_gpt2.GPT2Model",
    final_norm="ln_f",
    heads=(Head("transformers.models.gpt2.modeling_gpt2.GPT2LMHeadModel", "transformer.ln_f", "lm_head"),),
    embeddings=Embeddings(
        owner="transformers.models.gpt2.modeling_gpt2.GPT2Model",
        sums=((Span("wte.weight"), Span("wpe.weight")),),
    ),
)
