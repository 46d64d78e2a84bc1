"""Stacks of layers with what stands before and behind them: embeddings, last norms, and the maps that read those."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from symgeo.models.family import Embeddings, Family, final_norm, present, qualified_names
from symgeo.models.norms import norm
from symgeo.models.structure import Attention, Layer, Linear, Norm, linear
from symgeo.symmetry import Span


@dataclass(frozen=True)
class Found:
    """One recognised layer: where, by which table, its structure with names relative to it, and the module (with its
    prefix) that holds the list of layers in which it stands, if it stands in one."""

    prefix: str
    family: Family
    layer: Layer
    stack: tuple[str, nn.Module] | None = None


@dataclass(frozen=True)
class Start:
    """What is added up at the start of a stack, with full names.

    sums, masks, weights : as in the table, those parameters that nothing else uses (``whole``: these are all);
    axes : the number of axes of every parameter;  norm : the one that alone reads the sum;  bent : as in the table.
    """

    sums: tuple[tuple[Span, ...], ...]
    masks: tuple[Span, ...]
    weights: tuple[str, ...]
    axes: dict[str, int]
    norm: Norm | None
    whole: bool
    bent: bool

    @property
    def spans(self) -> tuple[Span, ...]:
        """All spans."""
        return tuple(span for spans in (*self.sums, self.masks) for span in spans)


@dataclass(frozen=True)
class Stack:
    """A stack of known layers, which its module calls one after the other; all names are full.

    readers : the maps that read the last norm and nothing else uses;  tied : a map that reads it and whose weight
    others use;  alone : whether these are all that reads it
    """

    scope: str
    family: Family
    layers: tuple[Layer, ...]
    scopes: tuple[str, ...]
    start: Start | None
    final: Norm | None
    readers: tuple[Linear, ...]
    tied: Linear | None
    alone: bool

    @property
    def before(self) -> list[tuple[Layer, str, Norm | None]]:
        """Every layer with its prefix and, on a post-norm stream, the norm whose output it reads."""
        last = self.start.norm if self.start else None
        result = []
        for layer, scope in zip(self.layers, self.scopes):
            result.append((layer, scope, None if layer.prenorm else last))
            last = layer.branches[-1].outer
        return result


def stacks(model: nn.Module, found: Sequence[Found]) -> list[Stack]:
    """The stacks whose module a table knows."""
    names = Names(model)
    groups: dict[str, list[Found]] = {}
    for f in found:
        if f.stack and f.family.stack in qualified_names(f.stack[1]):
            groups.setdefault(f.stack[0], []).append(f)
    return [_stack(model, found, prefix, members, names) for prefix, members in groups.items()]


class Names:
    """The canonical name of every parameter of a model, and how many modules use it."""

    def __init__(self, model: nn.Module):
        self._first: dict[int, str] = {}
        self._uses: Counter[int] = Counter()
        every = list(model.named_parameters(remove_duplicate=False))
        for name, p in every:
            self._first.setdefault(id(p), name)
            self._uses[id(p)] += 1
        self._id = {name: id(p) for name, p in every}
        self.axes = {name: p.ndim for name, p in every}

    def __call__(self, name: str) -> str:
        """The name under which ``named_parameters`` has it."""
        return self._first[self._id[name]]

    def alone(self, name: str) -> bool:
        """Whether it exists and nothing else uses it."""
        return name in self._id and self._uses[self._id[name]] == 1


def _stack(
    model: nn.Module, found: Sequence[Found], prefix: str, members: Sequence[Found], names: Names
) -> Stack:
    family, module = members[0].family, members[0].stack[1]  # type: ignore[index]
    layers = tuple(f.layer.renamed(_under(f.prefix)) for f in members)
    last = final_norm(family, module)
    final = last.renamed(_under(prefix)) if last else layers[-1].branches[-1].outer
    readers, tied = [], None
    for head in _heads(model, family, final):
        if all(names.alone(name) for name in (head.weight, head.bias) if name):
            readers.append(head)
        else:
            tied = head.renamed(names)
    memory = _memory(found, family, prefix, final)
    shown = not (readers or tied or memory)
    return Stack(prefix.removesuffix("."), family, layers, tuple(f.prefix.removesuffix(".") for f in members),
                 _start(model, family, prefix, names), final, (*readers, *memory), tied, not shown)


def _heads(model: nn.Module, family: Family, final: Norm | None) -> Iterator[Linear]:
    """The heads that the table puts behind this norm."""
    for name, owner in model.named_modules():
        path = f"{name}." if name else ""
        for head in family.heads:
            if head.owner not in qualified_names(owner) or not present(owner, {head.linear}):
                continue
            at = _last(owner, head.norm)
            behind = final is not None and final.weight == f"{path}{at}.weight"
            if behind and isinstance(owner.get_submodule(head.linear), nn.Linear):
                yield linear(owner, head.linear).renamed(_under(path))


def _memory(found: Sequence[Found], family: Family, prefix: str, final: Norm | None) -> tuple[Linear, ...]:
    """The maps to keys and values of the decoder that reads this stack."""
    encoder, decoder = family.memory or ("", "")
    if not encoder or final is None or not f".{prefix}".endswith(f".{encoder}."):
        return ()
    home = f"{prefix.removesuffix(f'{encoder}.')}{decoder}."
    layers = [f.layer.renamed(_under(f.prefix)) for f in found if f.prefix.startswith(home)]
    cores = [b.core for layer in layers for b in layer.branches if isinstance(b.core, Attention) and b.core.memory]
    return tuple(dict.fromkeys(linear for core in cores for linear in core.inputs[1:]))


def _start(model: nn.Module, family: Family, prefix: str, names: Names) -> Start | None:
    """The embeddings of the innermost owner that holds the stack."""
    table = family.embeddings
    if table is None:
        return None
    owners = [(name, m) for name, m in model.named_modules()
              if table.owner in qualified_names(m) and prefix.startswith(f"{name}." if name else "")]
    if not owners:
        return None
    name, owner = owners[-1]
    path = f"{name}." if name else ""
    return _named_start(owner, table, path, names)


def _named_start(owner: nn.Module, table: Embeddings, path: str, names: Names) -> Start:
    rule, params = _under(path), dict(owner.named_parameters(remove_duplicate=False))
    given = [span for spans in (*table.sums, table.masks) for span in spans if span.parameter in params]
    wanted = [*(span.parameter for span in given), *(w for w in table.weights if w in params)]
    alone = {name for name in wanted if names.alone(rule(name))}

    def kept(spans: Sequence[Span]) -> tuple[Span, ...]:
        return tuple(span.renamed(rule) for span in spans if span.parameter in alone)

    first = norm(owner, table.norm) if table.norm and present(owner, {table.norm}) else None
    return Start(
        tuple(kept(spans) for spans in table.sums), kept(table.masks),
        tuple(rule(w) for w in table.weights if w in alone), {rule(n): names.axes[rule(n)] for n in wanted},
        first.renamed(rule) if first else None, alone == set(wanted), table.bent,
    )


def _last(owner: nn.Module, path: str) -> str:
    """The path with the number of the last layer in place of the star."""
    before, star, after = path.partition(".*.")
    if not star or not present(owner, {before}):
        return path
    return f"{before}.{sum(1 for _ in owner.get_submodule(before).children()) - 1}.{after}"


def _under(prefix: str) -> Callable[[str], str]:
    """Puts a prefix before a name."""
    return lambda name: f"{prefix}{name}"
