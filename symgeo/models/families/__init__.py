"""The tables, one file per layout; a new family is a table there, before those from whose classes it derives."""

from symgeo.models.families import bert, gpt2, llama, modernbert, t5, tiny_lm, tiny_vit, torch_nn, vit

FAMILIES = (
    *bert.FAMILIES, *gpt2.FAMILIES, *llama.FAMILIES, *modernbert.FAMILIES, *t5.FAMILIES, *vit.FAMILIES,
    *tiny_lm.FAMILIES, *tiny_vit.FAMILIES, *torch_nn.FAMILIES,
)

__all__ = ["FAMILIES"]
