"""Which parameters of a model a preset takes."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

#: names under which models keep the map to their outputs
HEADS = frozenset({"lm_head", "classifier", "score", "head"})


def selected(model: nn.Module, exclude: Iterable[str | nn.Module]) -> dict[str, Tensor]:
    """The trainable real parameters of a model by name, without those that are excluded, tied ones once.

    exclude: names of parameters or modules, or modules.  Raises ValueError for a name that the model does not have,
    and for a module that is not part of it.
    """
    params = dict(model.named_parameters())
    out = excluded(model, exclude)
    return {name: p for name, p in params.items() if p.requires_grad and p.is_floating_point() and id(p) not in out}


def excluded(model: nn.Module, exclude: Iterable[str | nn.Module]) -> set[int]:
    """The ids of all parameters that some entry of `exclude` means."""
    if isinstance(exclude, str | nn.Module):
        exclude = [exclude]
    modules = dict(model.named_modules())
    every = dict(model.named_parameters(remove_duplicate=False))
    out: set[int] = set()
    for entry in exclude:
        if isinstance(entry, nn.Module):
            if not any(entry is module for module in modules.values()):
                raise ValueError(f"exclude: {type(entry).__name__} is no module of this {type(model).__name__}")
            out |= {id(p) for p in entry.parameters()}
        elif entry in every:
            out.add(id(every[entry]))
        elif entry in modules:
            out |= {id(p) for p in modules[entry].parameters()}
        else:
            raise ValueError(f"exclude: {type(model).__name__} has no parameter or module named {entry!r}")
    return out


def embedded(model: nn.Module) -> set[int]:
    """The ids of embedding weights, and so of everything tied to them."""
    return {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}


def is_head(name: str) -> bool:
    """Whether a parameter belongs to a module that is named like an output head.

    >>> is_head("head.weight"), is_head("transformer.h.0.attn.weight")
    (True, False)
    """
    return not HEADS.isdisjoint(name.split(".")[:-1])


def matrices(model: nn.Module, exclude: Iterable[str | nn.Module]) -> dict[str, Tensor]:
    """The two-dimensional parameters that are neither embeddings, nor tied to them, nor output heads."""
    tables = embedded(model)
    return {
        name: p for name, p in selected(model, exclude).items()
        if p.dim() == 2 and id(p) not in tables and not is_head(name)
    }
