"""T5 and Whisper (transformers): encoders, and decoders with cross-attention."""

from __future__ import annotations

from dataclasses import replace

from symgeo.models.families._transformers import heads, path, rows
from symgeo.models.family import AttentionNames, Embeddings, Family, MLPNames

_SELF = AttentionNames(
    query="layer.0.SelfAttention.q", key="layer.0.SelfAttention.k", value="layer.0.SelfAttention.v",
    output="layer.0.SelfAttention.o", heads="layer.0.SelfAttention.n_heads",
    table="layer.0.SelfAttention.relative_attention_bias",
)
_CROSS = AttentionNames(
    query="layer.1.EncDecAttention.q", key="layer.1.EncDecAttention.k", value="layer.1.EncDecAttention.v",
    output="layer.1.EncDecAttention.o", heads="layer.1.EncDecAttention.n_heads", memory=True,
)
T5 = Family(
    name="T5",
    layer=path("t5", "T5Block"),
    attention=_SELF,
    cross=_CROSS,
    mlp=MLPNames(  # in a decoder one sublayer later; gated or not
        up="layer.{1,2}.DenseReluDense.{wi,wi_1}", gate="layer.{1,2}.DenseReluDense.wi_0",
        down="layer.{1,2}.DenseReluDense.wo", activation="layer.{2,1}.DenseReluDense.act",
    ),
    attention_norm="layer.0.layer_norm",
    cross_norm="layer.1.layer_norm",
    mlp_norm="layer.{2,1}.layer_norm",
    stack=path("t5", "T5Stack"),
    final_norm="final_layer_norm",
    heads=heads("t5", "T5", "decoder.final_layer_norm", ForConditionalGeneration="lm_head"),
    embeddings=Embeddings(path("t5", "T5Stack"), sums=(rows("embed_tokens.weight"),)),
    memory=("encoder", "decoder"),
)

_ATTENTION = AttentionNames(
    query="self_attn.q_proj", key="self_attn.k_proj", value="self_attn.v_proj", output="self_attn.out_proj",
    heads="self_attn.num_heads",
)
_LAYER = Family(
    name="Whisper encoder",
    layer=path("whisper", "WhisperEncoderLayer"),
    attention=_ATTENTION,
    mlp=MLPNames(up="fc1", down="fc2", activation="activation_fn"),
    attention_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    stack=path("whisper", "WhisperEncoder"),
    final_norm="layer_norm",
    memory=("encoder", "decoder"),
)
WHISPER_ENCODER = replace(
    _LAYER,  # a convolution and an activation stand before the positions, which are fixed
    embeddings=Embeddings(path("whisper", "WhisperEncoder"), sums=(rows("embed_positions.weight"),), bent=True),
)
WHISPER_DECODER = replace(
    _LAYER,
    name="Whisper decoder",
    layer=path("whisper", "WhisperDecoderLayer"),
    cross=AttentionNames(
        query="encoder_attn.q_proj", key="encoder_attn.k_proj", value="encoder_attn.v_proj",
        output="encoder_attn.out_proj", heads="encoder_attn.num_heads", memory=True,
    ),
    cross_norm="encoder_attn_layer_norm",
    stack=path("whisper", "WhisperDecoder"),
    embeddings=Embeddings(path("whisper", "WhisperDecoder"),
                          sums=(rows("embed_tokens.weight", "embed_positions.weight"),)),
    heads=heads("whisper", "Whisper", "model.decoder.layer_norm", ForConditionalGeneration="proj_out"),
)

FAMILIES = (T5, WHISPER_ENCODER, WHISPER_DECODER)
