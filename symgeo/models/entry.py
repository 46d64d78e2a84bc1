"""How the ends of a layer and of a stack are connected: the norm before a post-norm layer, the head behind all.

The norm before is the last one of the layer before it, or that of the embeddings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from symgeo.models.family import Embeddings, Family, qualified_names
from symgeo.models.structure import Layer, Linear, Norm, linear, norm


class Entries:
    """Asked about layers in the order in which they stand in the model."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[nn.Module, Norm | None]] = {}

    def norm_before(self, layer: Layer, family: Family, prefix: str, above: Sequence[nn.Module]) -> Norm | None:
        """The norm, with its full name, whose output this layer reads and nothing else does; None if unknown.

        The layer must stand in the list of layers of its family's stack, which calls one after the other.
        """
        lists, stack = above[-1:], above[-2] if len(above) > 1 else None
        if stack is None or not isinstance(lists[0], nn.ModuleList) or family.stack not in qualified_names(stack):
            return None
        _, before = self._last.get(id(stack), (stack, None))
        if id(stack) not in self._last:
            before = _embedding_norm(family, prefix, above)
        after = layer.mlp_norm if not layer.prenorm and layer.mlp else None
        self._last[id(stack)] = stack, after.renamed(lambda name: f"{prefix}{name}") if after else None
        return None if layer.prenorm else before


def _embedding_norm(family: Family, prefix: str, above: Sequence[nn.Module]) -> Norm | None:
    """The norm of the embeddings from which the stack above the first layer reads."""
    names = family.embeddings
    owner = next((m for m in above if names and names.owner in qualified_names(m)), None)
    if owner is None or names is None or not names.norm:
        return None
    depth = len(above) - above.index(owner)
    path = ".".join(prefix.removesuffix(".").split(".")[:-depth])
    found = norm(owner, names.norm)
    return found.renamed(lambda name: f"{path}.{name}" if path else name) if found else None


def heads(model: nn.Module, families: Iterable[Family]) -> Iterator[tuple[str, Family, Norm, Linear]]:
    """(prefix of the owner, family, last norm, head) wherever a table knows the head and its weights are its own."""
    uses = _uses(model)
    for name, owner in model.named_modules():
        for family in families:
            for head in family.heads:
                if head.owner not in qualified_names(owner):
                    continue
                final, last = norm(owner, _last(owner, head.norm)), _child(owner, head.linear)
                if final and isinstance(last, nn.Linear) and all(uses[id(p)] == 1 for p in last.parameters()):
                    yield f"{name}." if name else "", family, final, linear(owner, head.linear)


def embeddings(
    model: nn.Module, layers: Iterable[tuple[Family, Layer]]
) -> Iterator[tuple[str, Family, Embeddings, dict[str, int], bool]]:
    """(prefix of the owner, family, table, the number of axes of every parameter of its own, whether all that reads
    the sum removes its mean) wherever a table knows the embeddings."""
    uses = _uses(model)
    known: dict[Family, list[Layer]] = {}
    for family, layer in layers:
        known.setdefault(family, []).append(layer)
    for name, owner in model.named_modules():
        for family, members in known.items():
            table = family.embeddings
            if table is None or table.owner not in qualified_names(owner):
                continue
            first = norm(owner, table.norm) if table.norm else None
            centred = first.centred if first else all(layer.prenorm and layer.centred_readers for layer in members)
            own = {key: p.ndim for key, p in owner.named_parameters() if uses[id(p)] == 1}
            yield f"{name}." if name else "", family, table, own, centred


def _last(owner: nn.Module, path: str) -> str:
    """The path with the number of the last layer in place of the star."""
    before, star, after = path.partition(".*.")
    if not star:
        return path
    return f"{before}.{sum(1 for _ in owner.get_submodule(before).children()) - 1}.{after}"


def _child(owner: nn.Module, path: str) -> nn.Module | None:
    """The submodule at a path, if it is there."""
    return dict(owner.named_modules()).get(path)


def _uses(model: nn.Module) -> Counter[int]:
    return Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
