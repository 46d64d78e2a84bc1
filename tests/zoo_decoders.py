"""Causal language models: GPT-2, NeoX, Phi, BLOOM, OPT, and LLaMA with all that descends from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from zoo_base import LENGTH, Case, Sizes, balanced, batches, finish, logits, maker, on_tokens, repeats, tokens

from symgeo.models.tiny_lm import TinyLM

EAGER = {"attn_implementation": "eager", "use_cache": False}
ROPE = {"rope_type": "default", "rope_theta": 100.0}  # frequencies that differ within a few positions
HEAD = 4


def _case(kind: str, s: Sizes, bare: bool = False, **options: Any) -> Case:
    """The causal model of a transformers family, or the bare one."""
    config = getattr(transformers, f"{kind}Config")(**options, **EAGER)
    if bare:
        return on_tokens(getattr(transformers, f"{kind}Model")(config), s, LENGTH * s.width, "last_hidden_state")
    model = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")
    return on_tokens(model(config), s, logits(s))


def _sizes(s: Sizes) -> dict[str, Any]:
    return {"hidden_size": s.width, "num_attention_heads": s.heads, "intermediate_size": s.hidden,
            "num_hidden_layers": s.layers, "vocab_size": s.vocab, "max_position_embeddings": LENGTH,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _grouped(s: Sizes) -> dict[str, Any]:
    """`heads` of keys and values, twice as many of queries."""
    return _sizes(s) | {"num_attention_heads": 2 * s.heads, "num_key_value_heads": s.heads, "head_dim": HEAD,
                        "rope_parameters": ROPE}


def gpt2(s: Sizes, **options: Any) -> Case:
    """GPT-2: pre-norm, fused projections stored (in, out)."""
    return _case("GPT2", s, n_embd=s.width, n_layer=s.layers, n_head=s.heads, n_inner=s.hidden, n_positions=LENGTH,
                 vocab_size=s.vocab, bos_token_id=1, eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                 **options)


def neox(s: Sizes, **options: Any) -> Case:
    """GPT-NeoX: half of every head rotary, interleaved fused projections, attention and MLP in parallel or not."""
    return _case("GPTNeoX", s, **_sizes(s), rope_parameters=ROPE | {"partial_rotary_factor": 0.5}, **options)


def phi(s: Sizes, **options: Any) -> Case:
    """Phi: attention and MLP read one LayerNorm, half of every head rotary, a head with a bias."""
    return _case("Phi", s, **_sizes(s), rope_parameters=ROPE | {"partial_rotary_factor": 0.5}, **options)


def llama_like(s: Sizes, kind: str, **options: Any) -> Case:
    """LLaMA and what has its layout: grouped queries, rotary, gated, RMSNorm."""
    return _case(kind, s, **_grouped(s) | options)


def gemma3(s: Sizes, **options: Any) -> Case:
    """Gemma 3 (text): norms around attention and MLP, norms of queries and keys, embeddings scaled."""
    thetas = {"full_attention": 100.0, "sliding_attention": 9.0}
    rope = {kind: ROPE | {"rope_theta": theta} for kind, theta in thetas.items()}
    sizes = _grouped(s) | EAGER | {"rope_parameters": rope, "sliding_window": 3}
    model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes | options))
    return on_tokens(model, s, logits(s))


def opt(s: Sizes, **options: Any) -> Case:
    """OPT: ReLU, positions from the attention mask."""
    case = _case("OPT", s, hidden_size=s.width, num_attention_heads=s.heads, ffn_dim=s.hidden,
                 num_hidden_layers=s.layers, vocab_size=s.vocab, max_position_embeddings=LENGTH, pad_token_id=0,
                 bos_token_id=1, eos_token_id=2, dropout=0.0, **{"word_embed_proj_dim": s.width} | options)
    return balanced(case, "fc1")


def bloom(s: Sizes, **options: Any) -> Case:
    """BLOOM: linear biases of attention, a norm behind the embeddings, hidden layers four times as wide."""
    return _case("Bloom", s, hidden_size=s.width, n_head=s.heads, n_layer=s.layers, vocab_size=s.vocab, bos_token_id=1,
                 eos_token_id=2, **options)


def tiny_lm(s: Sizes, tie: bool = False) -> Case:
    """The small language model of symgeo."""
    model = finish(TinyLM(vocabulary=s.vocab, context=LENGTH, width=s.width, depth=s.layers, heads=s.heads,
                          mlp_width=s.hidden, tie=tie), s)
    ids = tokens(repeats(model, logits(s)), LENGTH, s.vocab)
    return Case(model, batches(logits(s), symbols=ids), lambda x: x)


# Where the first MLP, or attention without a norm before it, reads embeddings as they are, it must see more tokens than
# it could tell apart: otherwise it has flat directions of its own.
MANY = 29

DECODERS: dict[str, Callable[..., Case]] = {
    "GPT-2": maker(gpt2),
    "GPT-2, untied": maker(gpt2, tie_word_embeddings=False),
    "GPT-2, bare": maker(gpt2, bare=True),
    "GPT-NeoX": maker(neox, vocab=MANY),
    "GPT-NeoX, sequential": maker(neox, use_parallel_residual=False),
    "GPT-NeoX, no attention bias": maker(neox, vocab=MANY, attention_bias=False),
    "Phi": maker(phi, vocab=MANY),
    "Phi, norms of heads": maker(phi, vocab=MANY, qk_layernorm=True),
    "Phi-3": maker(llama_like, kind="Phi3"),
    "LLaMA": maker(llama_like, kind="Llama"),
    "LLaMA, tied": maker(llama_like, kind="Llama", tie_word_embeddings=True),
    "LLaMA, biases": maker(llama_like, kind="Llama", attention_bias=True, mlp_bias=True),
    "LLaMA, bare": maker(llama_like, kind="Llama", bare=True),
    "Mistral": maker(llama_like, kind="Mistral"),
    "Mixtral": maker(llama_like, kind="Mixtral", num_local_experts=3, num_experts_per_tok=2,
                     experts_implementation="eager"),
    "Qwen2": maker(llama_like, kind="Qwen2"),
    "Qwen3": maker(llama_like, kind="Qwen3"),
    "Qwen3, biases": maker(llama_like, kind="Qwen3", attention_bias=True),
    "Gemma 2": maker(llama_like, kind="Gemma2", query_pre_attn_scalar=HEAD, final_logit_softcapping=3.0,
                     attn_logit_softcapping=2.0),
    "Gemma 2, no caps": maker(llama_like, kind="Gemma2", query_pre_attn_scalar=HEAD, final_logit_softcapping=None,
                              attn_logit_softcapping=None, attention_bias=True),
    "Gemma 3": maker(gemma3, query_pre_attn_scalar=HEAD),
    "OLMo 2": maker(llama_like, vocab=MANY, kind="Olmo2"),
    "OPT": maker(opt),
    "OPT, post-norm": maker(opt, do_layer_norm_before=False),
    "OPT, projected": maker(opt, word_embed_proj_dim=5),
    "OPT, projected, post-norm": maker(opt, word_embed_proj_dim=5, do_layer_norm_before=False),
    "OPT, untied": maker(opt, tie_word_embeddings=False),
    "BLOOM": maker(bloom),
    "BLOOM, residual behind the norm": maker(bloom, apply_residual_connection_post_layernorm=True),
    "TinyLM": maker(tiny_lm),
    "TinyLM, tied": maker(tiny_lm, tie=True),
}
