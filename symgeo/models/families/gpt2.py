"""GPT-2, GPT-NeoX (Pythia), Phi, OPT and BLOOM (transformers): decoders with LayerNorm."""

from __future__ import annotations

from dataclasses import replace

from symgeo.groups import GeneralLinear
from symgeo.models.families._transformers import heads, path, rows, tokens
from symgeo.models.family import AttentionNames, Embeddings, Extra, Family, Head, MLPNames
from symgeo.symmetry import Span, Symmetry

GPT2 = Family(
    name="GPT-2",
    layer=path("gpt2", "GPT2Block"),
    attention=AttentionNames(fused="attn.c_attn", output="attn.c_proj", heads="attn.num_heads"),
    mlp=MLPNames(up="mlp.c_fc", down="mlp.c_proj", activation="mlp.act"),
    attention_norm="ln_1",
    mlp_norm="ln_2",
    stack=path("gpt2", "GPT2Model"),
    final_norm="ln_f",
    heads=heads("gpt2", "GPT2", "transformer.ln_f", LMHeadModel="lm_head", ForSequenceClassification="score",
                ForTokenClassification="classifier"),
    embeddings=Embeddings(owner=path("gpt2", "GPT2Model"), sums=(rows("wte.weight", "wpe.weight"),)),
)
GPT_NEOX = Family(
    name="GPT-NeoX",
    layer=path("gpt_neox", "GPTNeoXLayer"),
    attention=AttentionNames(
        fused="attention.query_key_value", output="attention.dense", interleaved=True,
        heads="attention.config.num_attention_heads", head_size="attention.head_size", rotary="half",
        rotated="attention.rotary_ndims",
    ),
    mlp=MLPNames(up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h", activation="mlp.act"),
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    parallel="use_parallel_residual",
    stack=path("gpt_neox", "GPTNeoXModel"),
    final_norm="final_layer_norm",
    heads=heads("gpt_neox", "GPTNeoX", "gpt_neox.final_layer_norm", ForCausalLM="lm_head",
                ForSequenceClassification="score", ForTokenClassification="classifier"),
    embeddings=tokens("gpt_neox", "GPTNeoXModel", "embed_in.weight"),
    disk=((r"^lm_head\.", "embed_out."),),
)
PHI = Family(
    name="Phi",
    layer=path("phi", "PhiDecoderLayer"),
    attention=AttentionNames(
        query="self_attn.q_proj", key="self_attn.k_proj", value="self_attn.v_proj", output="self_attn.dense",
        heads="self_attn.config.num_attention_heads", kv_heads="self_attn.config.num_key_value_heads",
        head_size="self_attn.head_dim", rotary="half", rotated="self_attn.rotary_ndims",
        query_norm="self_attn.q_layernorm", key_norm="self_attn.k_layernorm",
    ),
    mlp=MLPNames(up="mlp.fc1", down="mlp.fc2", activation="mlp.activation_fn"),
    attention_norm="input_layernorm",
    mlp_norm="input_layernorm",
    parallel=True,
    stack=path("phi", "PhiModel"),
    final_norm="final_layernorm",
    heads=heads("phi", "Phi", "model.final_layernorm", ForCausalLM="lm_head", ForSequenceClassification="score",
                ForTokenClassification="score"),
    embeddings=(tokens("phi", "PhiModel"),),
)
_UNREAD = (Span("embed_positions.weight", rows=(0, 2)),)  # positions are counted from 2
OPT = Family(
    name="OPT",
    layer=path("opt", "OPTDecoderLayer"),
    attention=AttentionNames(
        query="self_attn.q_proj", key="self_attn.k_proj", value="self_attn.v_proj", output="self_attn.out_proj",
        heads="self_attn.num_heads",
    ),
    mlp=MLPNames(up="fc1", down="fc2", activation="activation_fn"),
    attention_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    prenorm="do_layer_norm_before",
    stack=path("opt", "OPTDecoder"),
    final_norm="final_layer_norm",
    heads=(
        Head(path("opt", "OPTDecoder"), "final_layer_norm", "project_out"),
        Head(path("opt", "OPTDecoder"), "layers.*.final_layer_norm", "project_out",
             unless="final_layer_norm"),
        *(replace(head, unless="model.decoder.project_out") for head in heads(
            "opt", "OPT", "model.decoder.final_layer_norm", ForCausalLM="lm_head", ForSequenceClassification="score")),
    ),
    embeddings=(
        Embeddings(path("opt", "OPTDecoder"), sums=(rows("embed_positions.weight"),), weights=("project_in.weight",),
                   dead=_UNREAD, needs="project_in"),
        Embeddings(path("opt", "OPTDecoder"), sums=(rows("embed_tokens.weight", "embed_positions.weight"),),
                   dead=_UNREAD),
    ),
    extras=(Extra(  # embeddings of another width than the stream
        path("opt", "OPTDecoder"),
        Symmetry({"embed_tokens.weight": "_ p", "project_in.weight": "_ p*", "project_out.weight": "p* _"},
                 {"p": GeneralLinear()}),
        shared=("embed_tokens.weight",),
    ),),
)
BLOOM = Family(
    name="BLOOM",
    layer=path("bloom", "BloomBlock"),
    attention=AttentionNames(
        fused="self_attention.query_key_value", output="self_attention.dense", interleaved=True,
        heads="self_attention.num_heads", ordered=True,
    ),
    mlp=MLPNames(up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"),
    bypass="apply_residual_connection_post_layernorm",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    stack=path("bloom", "BloomModel"),
    final_norm="ln_f",
    heads=heads("bloom", "Bloom", "transformer.ln_f", ForCausalLM="lm_head", ForSequenceClassification="score",
                ForTokenClassification="classifier"),
    embeddings=Embeddings(
        owner=path("bloom", "BloomModel"), sums=(rows("word_embeddings.weight"),), norm="word_embeddings_layernorm",
    ),
)

FAMILIES = (GPT2, GPT_NEOX, PHI, OPT, BLOOM)
