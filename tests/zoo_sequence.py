"""From sequence to sequence: T5 and Whisper."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import transformers
from zoo_base import LENGTH, Case, Sizes, balanced, batches, finish, logits, maker, normal, on_tokens, repeats, tokens

TARGETS, BINS, FRAMES = 6, 3, 4


def t5(s: Sizes, model: str = "T5ForConditionalGeneration", **options: Any) -> Case:
    """T5: RMSNorm, biases of attention that depend on distance, no other biases."""
    config = transformers.T5Config(
        d_model=s.width, d_kv=3, d_ff=s.hidden, num_layers=s.layers, num_heads=s.heads, vocab_size=s.vocab,
        relative_attention_num_buckets=6, relative_attention_max_distance=6, dropout_rate=0.0, use_cache=False,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, **options)
    network = getattr(transformers, model)._from_config(config, attn_implementation="eager")
    if model == "T5EncoderModel":
        case = on_tokens(network, s, LENGTH * s.width, "last_hidden_state")
    else:
        case = on_tokens(network, s, logits(s, TARGETS),
                         decoder_input_ids=lambda n: tokens(n, TARGETS, s.vocab, seed=4))
    return balanced(case, "wi")


def whisper(s: Sizes, **options: Any) -> Case:
    """Whisper: convolutions, keys without biases, positions of the encoder constant."""
    config = transformers.WhisperConfig(
        d_model=s.width, encoder_layers=s.layers, decoder_layers=s.layers, encoder_attention_heads=s.heads,
        decoder_attention_heads=s.heads, encoder_ffn_dim=s.hidden, decoder_ffn_dim=s.hidden + 1, num_mel_bins=BINS,
        max_source_positions=FRAMES, max_target_positions=TARGETS, vocab_size=s.vocab, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, use_cache=False, attn_implementation="eager", **options)
    model = finish(transformers.WhisperForConditionalGeneration(config), s)
    ids = tokens(repeats(model, logits(s, TARGETS)), TARGETS, s.vocab)
    sound = normal(len(ids), BINS, 2 * FRAMES)
    calls = batches(logits(s, TARGETS), input_features=sound, decoder_input_ids=ids)
    return Case(model, calls, attrgetter("logits"))


SEQUENCE: dict[str, Callable[..., Case]] = {
    "T5 encoder": maker(t5, model="T5EncoderModel"),
    "T5": maker(t5),
    "T5 1.1": maker(t5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "Whisper": maker(whisper),
}
