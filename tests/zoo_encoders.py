"""Encoders of text: BERT and its relatives, ModernBERT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zoo_base import LENGTH, Case, Sizes, balanced, logits, maker, on_tokens, tokens

LABELS = 3
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}


def _outputs(model: str, s: Sizes) -> tuple[int, str]:
    """(numbers for each sequence, their field)"""
    if model.endswith("ForSequenceClassification"):
        return LABELS, "logits"
    return (logits(s), "logits") if model.endswith("ForMaskedLM") else (LENGTH * s.width, "last_hidden_state")


def bert(s: Sizes, model: str = "BertModel", **options: Any) -> Case:
    """BERT: post-norm."""
    import transformers

    config = transformers.BertConfig(
        hidden_size=s.width, num_attention_heads=s.heads, intermediate_size=s.hidden, num_hidden_layers=s.layers,
        vocab_size=s.vocab, max_position_embeddings=LENGTH, type_vocab_size=2, num_labels=LABELS,
        attn_implementation="eager", **NO_DROPOUT, **options)
    bare = {"add_pooling_layer": False} if model == "BertModel" else {}
    outputs, field = _outputs(model, s)
    case = on_tokens(getattr(transformers, model)(config, **bare), s, outputs, field,
                     token_type_ids=lambda n: tokens(n, LENGTH, 2, seed=4))
    return balanced(case, "dense") if options.get("hidden_act") == "relu" else case


def roberta(s: Sizes, model: str = "RobertaModel") -> Case:
    """RoBERTa: positions count from behind the padding token, whose own position is its id."""
    import transformers

    config = transformers.RobertaConfig(
        hidden_size=s.width, num_attention_heads=s.heads, intermediate_size=s.hidden, num_hidden_layers=s.layers,
        vocab_size=s.vocab, max_position_embeddings=LENGTH + 1, type_vocab_size=2, num_labels=LABELS, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, attn_implementation="eager", **NO_DROPOUT)
    bare = {"add_pooling_layer": False} if model == "RobertaModel" else {}
    outputs, field = _outputs(model, s)
    return on_tokens(getattr(transformers, model)(config, **bare), s, outputs, field,
                     token_type_ids=lambda n: tokens(n, LENGTH, 2, seed=4))


def distilbert(s: Sizes, model: str = "DistilBertModel") -> Case:
    """DistilBERT: BERT without token types."""
    import transformers

    config = transformers.DistilBertConfig(
        dim=s.width, n_heads=s.heads, hidden_dim=s.hidden, n_layers=s.layers, vocab_size=s.vocab,
        max_position_embeddings=LENGTH, num_labels=LABELS, dropout=0.0, attention_dropout=0.0,
        seq_classif_dropout=0.0, attn_implementation="eager")
    outputs, field = _outputs(model, s)
    case = on_tokens(getattr(transformers, model)(config), s, outputs, field)
    return balanced(case, "pre_classifier")


def modernbert(s: Sizes, model: str = "ModernBertModel", **options: Any) -> Case:
    """ModernBERT: pre-norm, rotary, gated; its first layer has no norm before attention."""
    import transformers

    config = transformers.ModernBertConfig(
        hidden_size=s.width, num_attention_heads=s.heads, intermediate_size=s.hidden, num_hidden_layers=s.layers,
        vocab_size=s.vocab, max_position_embeddings=LENGTH, num_labels=LABELS, local_attention=4, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, attn_implementation="eager", **options)
    outputs, field = _outputs(model, s)
    return on_tokens(getattr(transformers, model)(config), s, outputs, field)


ENCODERS: dict[str, Callable[..., Case]] = {
    "BERT": maker(bert),
    "BERT classifier": maker(bert, model="BertForSequenceClassification"),
    "BERT masked LM": maker(bert, model="BertForMaskedLM"),
    "BERT masked LM, untied": maker(bert, model="BertForMaskedLM", tie_word_embeddings=False),
    "BERT, ReLU": maker(bert, hidden_act="relu"),
    "RoBERTa": maker(roberta),
    "RoBERTa classifier": maker(roberta, model="RobertaForSequenceClassification"),
    "RoBERTa masked LM": maker(roberta, model="RobertaForMaskedLM"),
    "DistilBERT": maker(distilbert),
    "DistilBERT classifier": maker(distilbert, model="DistilBertForSequenceClassification"),
    "DistilBERT masked LM": maker(distilbert, model="DistilBertForMaskedLM"),
    "ModernBERT": maker(modernbert),
    "ModernBERT classifier": maker(modernbert, model="ModernBertForSequenceClassification"),
    "ModernBERT classifier, mean": maker(
        modernbert, model="ModernBertForSequenceClassification", classifier_pooling="mean", classifier_bias=True),
    "ModernBERT masked LM": maker(modernbert, model="ModernBertForMaskedLM"),
    "ModernBERT masked LM, biases": maker(
        modernbert, model="ModernBertForMaskedLM", norm_bias=True, attention_bias=True, mlp_bias=True),
}
