"""The tables, one file per family; a new family is a file here and a line below, before those it derives from."""

from symgeo.models.families import bert, gpt2, llama, tiny_lm, tiny_vit, torch_nn, vit

FAMILIES = (
    bert.FAMILY, gpt2.FAMILY, llama.FAMILY, vit.FAMILY, tiny_lm.FAMILY, tiny_vit.FAMILY, torch_nn.FAMILY,
    torch_nn.MULTIHEAD,
)

__all__ = ["FAMILIES"]
