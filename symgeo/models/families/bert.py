"""BERT and the families of its layout (transformers): post-norm encoders."""

from __future__ import annotations

from symgeo.groups import Permutation, PositiveScaling
from symgeo.models.families._transformers import path, rows
from symgeo.models.family import AttentionNames, Embeddings, Extra, Family, Head, MLPNames
from symgeo.symmetry import Symmetry

_LAST = "encoder.layer.*.output.LayerNorm"


def _family(name: str, module: str, prefix: str, heads: dict[str, str], masked: Head, padding: str = "") -> Family:
    return Family(
        name=name,
        layer=path(module, f"{prefix}Layer"),
        attention=AttentionNames(
            query="attention.self.query", key="attention.self.key", value="attention.self.value",
            output="attention.output.dense", heads="attention.self.num_attention_heads",
        ),
        mlp=MLPNames(up="intermediate.dense", down="output.dense", activation="intermediate.intermediate_act_fn"),
        attention_norm="attention.output.LayerNorm",
        mlp_norm="output.LayerNorm",
        prenorm=False,
        stack=path(module, f"{prefix}Encoder"),
        embeddings=Embeddings(
            owner=path(module, f"{prefix}Model"),
            sums=(rows("embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight",
                       "embeddings.token_type_embeddings.weight"),),
            norm="embeddings.LayerNorm", padding=padding,
        ),
        heads=(*(Head(path(module, f"{prefix}{owner}"), f"{module}.{_LAST}", linear)
                 for owner, linear in heads.items()), masked),
    )


BERT = _family("BERT", "bert", "Bert", {
    "ForSequenceClassification": "bert.pooler.dense", "ForTokenClassification": "classifier",
    "ForMaskedLM": "cls.predictions.transform.dense", "ForQuestionAnswering": "qa_outputs",
}, Head(path("bert", "BertForMaskedLM"), "cls.predictions.transform.LayerNorm", "cls.predictions.decoder"))
ROBERTA = _family("RoBERTa", "roberta", "Roberta", {
    "ForSequenceClassification": "classifier.dense", "ForTokenClassification": "classifier",
    "ForMaskedLM": "lm_head.dense", "ForQuestionAnswering": "qa_outputs",
}, Head(path("roberta", "RobertaForMaskedLM"), "lm_head.layer_norm", "lm_head.decoder"), "embeddings.padding_idx")
_DISTILBERT = "distilbert.transformer.layer.*.output_layer_norm"
DISTILBERT = Family(
    name="DistilBERT",
    layer=path("distilbert", "TransformerBlock"),
    attention=AttentionNames(
        query="attention.q_lin", key="attention.k_lin", value="attention.v_lin", output="attention.out_lin",
        heads="attention.n_heads",
    ),
    mlp=MLPNames(up="ffn.lin1", down="ffn.lin2", activation="ffn.activation"),
    attention_norm="sa_layer_norm",
    mlp_norm="output_layer_norm",
    prenorm=False,
    stack=path("distilbert", "Transformer"),
    embeddings=Embeddings(
        owner=path("distilbert", "DistilBertModel"),
        sums=(rows("embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"),),
        norm="embeddings.LayerNorm",
    ),
    heads=(
        *(Head(path("distilbert", f"DistilBertFor{owner}"), _DISTILBERT, linear) for owner, linear in (
            ("SequenceClassification", "pre_classifier"), ("MaskedLM", "vocab_transform"),
            ("TokenClassification", "classifier"), ("QuestionAnswering", "qa_outputs"))),
        Head(path("distilbert", "DistilBertForMaskedLM"), "vocab_layer_norm", "vocab_projector"),
    ),
    extras=(Extra(  # a hidden layer with ReLU
        path("distilbert", "DistilBertForSequenceClassification"),
        Symmetry({"pre_classifier.weight": "(t u) _", "pre_classifier.bias": "(t u)", "classifier.weight": "_ (t u*)"},
                 {"t": Permutation(), "u": PositiveScaling(per="t")}),
    ),),
)

FAMILIES = (ROBERTA, DISTILBERT, BERT)
