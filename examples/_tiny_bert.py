"""A small BERT and a task for it, for `sharpness_of_a_transformer.py` and `log_sharpness_with_trainer.py`."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

VOCABULARY, LENGTH = 32, 9


def make_batch(size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random tokens; the label says whether most of them are in the upper half, and is wrong one time in ten."""
    ids = torch.randint(0, VOCABULARY, (size, LENGTH), generator=generator)
    wrong = torch.rand(size, generator=generator) < 0.1
    return {"input_ids": ids, "labels": ((2 * (ids >= VOCABULARY // 2).sum(1) > LENGTH) ^ wrong).long()}


def tiny_bert() -> BertForSequenceClassification:
    """Two layers without dropout, from the global generator."""
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
                        intermediate_size=48, max_position_embeddings=LENGTH, attn_implementation="eager",
                        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertForSequenceClassification(config)
