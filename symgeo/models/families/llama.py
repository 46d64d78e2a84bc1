"""LLaMA (transformers): grouped-query, rotary positions, gated MLP, RMSNorm."""

from symgeo.models.family import AttentionNames, Family, Head, MLPNames

FAMILY = Family(
    name="LLaMA",
    layer="transformers.models.llama.modeling_llama.LlamaDecoderLayer",
    attention=AttentionNames(
        query="self_attn.q_proj", key="self_attn.k_proj", value="self_attn.v_proj", output="self_attn.o_proj",
        heads="self_attn.config.num_attention_heads", kv_heads="self_attn.config.num_key_value_heads",
        rotary="half",
    ),
    mlp=MLPNames(up="mlp.up_proj", down="mlp.down_proj", gate="mlp.gate_proj"),
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    stack="transformers.models.llama.modeling_llama.LlamaModel",
    final_norm="norm",
    heads=(Head("transformers.models.llama.modeling_llama.LlamaForCausalLM", "model.norm", "lm_head"),),
)
