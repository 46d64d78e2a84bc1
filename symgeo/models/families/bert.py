"""BERT (transformers)."""

from symgeo.models.family import AttentionNames, Embeddings, Family, Head, MLPNames
from symgeo.symmetry import Span

FAMILY = Family(
    name="BERT",
    layer="transformers.models.bert.modeling_bert.BertLayer",
    attention=AttentionNames(
        query="attention.self.query", key="attention.self.key", value="attention.self.value",
        output="attention.output.dense", heads="attention.self.num_attention_heads",
    ),
    mlp=MLPNames(up="intermediate.dense", down="output.dense", activation="intermediate.intermediate_act_fn"),
    attention_norm="attention.output.LayerNorm",
    mlp_norm="output.LayerNorm",
    prenorm=False,
    stack="transformers.models.bert.modeling_bert.BertEncoder",
    embeddings=Embeddings(
        owner="transformers.models.bert.modeling_bert.BertModel",
        sums=((Span("embeddings.word_embeddings.weight"), Span("embeddings.position_embeddings.weight"),
               Span("embeddings.token_type_embeddings.weight")),),
        norm="embeddings.LayerNorm",
    ),
    heads=tuple(
        Head(f"transformers.models.bert.modeling_bert.{owner}", "bert.encoder.layer.*.output.LayerNorm", linear)
        for owner, linear in (
            ("BertForSequenceClassification", "bert.pooler.dense"),
            ("BertForTokenClassification", "classifier"),
            ("BertForMaskedLM", "cls.predictions.transform.dense"),
        )
    ),
)
