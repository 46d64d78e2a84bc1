"""LLaMA and the families of its layout (transformers): grouped-query, rotary positions, gated MLP, RMSNorm."""

from __future__ import annotations

from dataclasses import replace

from symgeo.models.families._transformers import GATED, ROTARY, heads, path, tokens
from symgeo.models.family import AttentionNames, ExpertNames, Family, MLPNames, MLPReader


def _family(name: str, module: str, attention: AttentionNames = ROTARY, mlp: MLPReader = GATED,
            model: str = "") -> Family:
    prefix = model.removesuffix("TextModel").removesuffix("Model")
    return Family(
        name=name,
        layer=path(module, f"{prefix}DecoderLayer"),
        attention=attention,
        mlp=mlp,
        attention_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        stack=path(module, model),
        final_norm="norm",
        embeddings=(tokens(module, model),),
        heads=heads(module, prefix, "model.norm", ForCausalLM="lm_head", ForSequenceClassification="score",
                    ForTokenClassification="score"),
    )


LLAMA = _family("LLaMA", "llama", model="LlamaModel")
MISTRAL = _family("Mistral", "mistral", model="MistralModel")
QWEN2 = _family("Qwen2", "qwen2", model="Qwen2Model")
QWEN3 = _family("Qwen3", "qwen3", replace(ROTARY, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"),
                model="Qwen3Model")
PHI3 = _family(
    "Phi-3", "phi3",
    AttentionNames(
        fused="self_attn.qkv_proj", output="self_attn.o_proj", heads="self_attn.config.num_attention_heads",
        kv_heads="self_attn.config.num_key_value_heads", head_size="self_attn.head_dim", rotary="half",
        rotated="self_attn.config.rope_parameters.partial_rotary_factor",
    ),
    MLPNames(fused="mlp.gate_up_proj", down="mlp.down_proj", activation="mlp.activation_fn"),
    model="Phi3Model",
)
MIXTRAL = replace(_family(
    "Mixtral", "mixtral",
    mlp=ExpertNames(fused="mlp.experts.gate_up_proj", down="mlp.experts.down_proj", router="mlp.gate",
                    activation="mlp.experts.act_fn"),
    model="MixtralModel",
), disk=((r"\.mlp\.(gate|experts)\b", r".block_sparse_moe.\1"),))
GEMMA2 = replace(
    _family("Gemma 2", "gemma2", replace(ROTARY, cap="self_attn.attn_logit_softcapping"), model="Gemma2Model"),
    attention_after="post_attention_layernorm", mlp_norm="pre_feedforward_layernorm",
    mlp_after="post_feedforward_layernorm",
)
GEMMA3 = replace(
    _family("Gemma 3", "gemma3", replace(ROTARY, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm",
                                         cap="self_attn.attn_logit_softcapping"), model="Gemma3TextModel"),
    attention_after="post_attention_layernorm", mlp_norm="pre_feedforward_layernorm",
    mlp_after="post_feedforward_layernorm",
)
OLMO2 = replace(
    _family("OLMo 2", "olmo2", replace(ROTARY, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"),
            model="Olmo2Model"),
    attention_norm="", attention_after="post_attention_layernorm", mlp_norm="", mlp_after="post_feedforward_layernorm",
)

FAMILIES = (QWEN3, QWEN2, PHI3, MIXTRAL, MISTRAL, GEMMA3, GEMMA2, OLMO2, LLAMA)
