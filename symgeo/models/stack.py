"""Stacks of layers with what stands before and behind them: embeddings, last norms, and the maps that read those."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from symgeo.models.attention import memory_readers
from symgeo.models.family import Embeddings, Family, attribute, present, qualified_names, resolve
from symgeo.models.norms import norm
from symgeo.models.structure import Attention, Layer, Linear, Norm, linear
from symgeo.symmetry import Reader, Span


@dataclass(frozen=True)
class Found:
    """One recognised layer: where, by which table, its structure with names relative to it, the module (with its
    prefix) that calls it and its like one after the other, if a table knows one, and the norm behind them all with its
    full name."""

    prefix: str
    family: Family
    layer: Layer
    stack: tuple[str, nn.Module] | None = None
    final: Norm | None = None


@dataclass(frozen=True)
class Start:
    """What is added up at the start of a stack, with full names.

    sums, masks, weights : as in the table, those parameters that nothing else uses (``whole``: these are all);
    axes : the number of axes of every parameter;  norm : the one that alone reads the sum;  bent, dead : as in the
    table;  padded : the last of the sums is that of the padding token with its position.
    """

    sums: tuple[tuple[Span, ...], ...]
    masks: tuple[Span, ...]
    weights: tuple[str, ...]
    axes: dict[str, int]
    norm: Norm | None
    whole: bool
    bent: bool
    dead: tuple[Span, ...] = ()
    padded: bool = False

    @property
    def spans(self) -> tuple[Span, ...]:
        """All spans."""
        return tuple(span for spans in (*self.sums, self.masks) for span in spans)


@dataclass(frozen=True)
class Stack:
    """A stack of known layers, which its module calls one after the other; all names are full.

    readers : the maps that read the last norm and nothing else uses, each also as a reader;  tied : a map that reads
    it and whose weight others use;  alone : whether these are all that reads it
    """

    scope: str
    family: Family
    layers: tuple[Layer, ...]
    scopes: tuple[str, ...]
    start: Start | None
    final: Norm | None
    readers: tuple[tuple[Linear, Reader], ...]
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
        if f.stack and not f.layer.bypass:
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

    def free(self, head: Linear) -> bool:
        """Whether nothing else uses a map."""
        return all(self.alone(name) for name in (head.weight, head.bias) if name)

    def alone(self, name: str) -> bool:
        """Whether it exists and nothing else uses it."""
        return name in self._id and self._uses[self._id[name]] == 1


def _stack(
    model: nn.Module, found: Sequence[Found], prefix: str, members: Sequence[Found], names: Names
) -> Stack:
    family = members[0].family
    layers = tuple(f.layer.renamed(_under(f.prefix)) for f in members)
    final = members[0].final or layers[-1].branches[-1].outer
    readers: list[tuple[Linear, Reader]] = []
    tied = None
    for norm_of_it, head in reading_heads(model, family):
        if final is None or norm_of_it.weight != final.weight:
            continue
        if names.free(head):
            readers.append((head, head.reader))
        else:
            tied = head.renamed(names)
    readers += _memory(found, family, prefix, final)
    return Stack(prefix.removesuffix("."), family, layers, tuple(f.prefix.removesuffix(".") for f in members),
                 _start(model, family, prefix, names), final, tuple(readers), tied, bool(readers or tied))


def reading_heads(model: nn.Module, family: Family) -> Iterator[tuple[Norm, Linear]]:
    """The linear maps that the table puts behind norms, with those norms, by full names."""
    for name, owner in model.named_modules():
        path = f"{name}." if name else ""
        for head in family.heads:
            hidden = head.unless and present(owner, {head.unless})
            if not head.linear or hidden or head.owner not in qualified_names(owner):
                continue
            before, at = _last(owner, head.norm), resolve(owner, head.linear)
            if not at or not present(owner, {before}) or not isinstance(_base(owner.get_submodule(at)), nn.Linear):
                continue
            if found := norm(owner, before):
                yield found.renamed(_under(path)), linear(owner, at).renamed(_under(path))


def _base(module: nn.Module) -> nn.Module:
    """The map that adapters are added to, if there are some."""
    return dict(module.named_children()).get("base_layer", module)


def final_norm(family: Family, stack: tuple[str, nn.Module], above: Sequence[tuple[str, nn.Module]]) -> Norm | None:
    """The norm that reads the residual stream of a stack last, with its full name; ``above`` are all modules that hold
    the stack."""
    prefix, module = stack
    if family.final_norm and present(module, {family.final_norm}):
        found = norm(module, family.final_norm)
        return found.renamed(_under(prefix)) if found else None
    for path, owner in above:
        for head in family.heads:
            if head.stack and f"{path}{head.stack}." == prefix and head.owner in qualified_names(owner):
                found = norm(owner, head.norm)
                return found.renamed(_under(path)) if found else None
    return None


def _memory(
    found: Sequence[Found], family: Family, prefix: str, final: Norm | None
) -> list[tuple[Linear, Reader]]:
    """The maps to keys and values of the decoder that reads this stack."""
    encoder, decoder = family.memory or ("", "")
    if not encoder or final is None or not f".{prefix}".endswith(f".{encoder}."):
        return []
    home = f"{prefix.removesuffix(f'{encoder}.')}{decoder}."
    layers = [f.layer.renamed(_under(f.prefix)) for f in found if f.prefix.startswith(home)]
    cores = [b.core for layer in layers for b in layer.branches if isinstance(b.core, Attention) and b.core.memory]
    return [pair for core in cores for pair in zip(core.inputs[1:], memory_readers(core).values())]


def _start(model: nn.Module, family: Family, prefix: str, names: Names) -> Start | None:
    """The embeddings of the innermost owner that holds the stack."""
    for name, owner in reversed(list(model.named_modules())):
        if not prefix.startswith(f"{name}." if name else ""):
            continue
        for table in family.starts:
            if table.owner in qualified_names(owner) and (not table.needs or present(owner, {table.needs})):
                return _named_start(owner, table, f"{name}." if name else "", names)
    return None


def _named_start(owner: nn.Module, table: Embeddings, path: str, names: Names) -> Start:
    rule, params = _under(path), dict(owner.named_parameters(remove_duplicate=False))
    sums = [*table.sums, *_padding(owner, table)]
    given = [span for spans in (*sums, table.masks) for span in spans if span.parameter in params]
    wanted = [*(span.parameter for span in given), *(w for w in table.weights if w in params)]
    alone = {name for name in wanted if names.alone(rule(name))}

    def kept(spans: Sequence[Span]) -> tuple[Span, ...]:
        return tuple(span.renamed(rule).renamed(names) for span in spans if span.parameter in alone)

    first = norm(owner, table.norm) if table.norm and present(owner, {table.norm}) else None
    return Start(
        tuple(kept(spans) for spans in sums), kept(table.masks),
        tuple(rule(w) for w in table.weights if w in alone), {names(rule(n)): names.axes[rule(n)] for n in wanted},
        first.renamed(rule) if first else None, alone == set(wanted), table.bent,
        tuple(span.renamed(rule) for span in table.dead if span.parameter in alone), bool(table.padding),
    )


def _padding(owner: nn.Module, table: Embeddings) -> list[tuple[Span, Span]]:
    """The rows of token and position that only occur together."""
    if not table.padding or (row := attribute(owner, table.padding)) is None:
        return []
    first, second = table.sums[0][:2]
    return [(replace(first, rows=(row, row + 1)), replace(second, rows=(row, row + 1)))]


def _last(owner: nn.Module, path: str) -> str:
    """The path with the number of the last layer in place of the star."""
    before, star, after = path.partition(".*.")
    if not star or not present(owner, {before}):
        return path
    return f"{before}.{sum(1 for _ in owner.get_submodule(before).children()) - 1}.{after}"


def _under(prefix: str) -> Callable[[str], str]:
    """Puts a prefix before a name."""
    return lambda name: f"{prefix}{name}"
