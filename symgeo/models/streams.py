"""The symmetries of whole residual streams: embeddings, what the last norm feeds, rotations and scales."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from operator import or_

from torch import nn

from symgeo.models.attention import EMPTY
from symgeo.models.compensated import mean_exchanges, readers_of, row_flows
from symgeo.models.family import Family
from symgeo.models.generators import bias_symmetry, entry_symmetry, reading_symmetry
from symgeo.models.stack import Names, Stack, Start, reading_heads
from symgeo.models.structure import Branch, Linear, Norm
from symgeo.symmetry import (
    Axis,
    Compensation,
    Flow,
    Reader,
    Span,
    StreamRotation,
    StreamScale,
    Symmetry,
    TiedExchange,
    Unread,
)


def stack_symmetry(stack: Stack, approximate: bool = False) -> Symmetry:
    """What a stack has beside its layers, with full names; generators are scoped by the name of the stack."""
    parts = [entry_symmetry(layer, before, scope, approximate) for layer, scope, before in stack.before if before]
    entry = stack.start.norm.bias if stack.start and stack.start.norm else None
    means = mean_exchanges(stack.layers, Span(entry) if entry else None)
    own = [_behind(stack), _start_symmetry(stack, approximate), Symmetry({}, {}, flows=means)]
    return reduce(or_, [*parts, *(scoped(part, stack.scope) for part in own)], EMPTY)


def scoped(symmetry: Symmetry, scope: str) -> Symmetry:
    """With the scope behind every name of its own."""
    return symmetry.relabelled(lambda name: f"{name}[{scope}]") if scope else symmetry


def _behind(stack: Stack) -> Symmetry:
    """The last norm with the maps that read it, if these are all that does."""
    if stack.final is None or not stack.alone:
        return EMPTY
    if stack.tied:
        return EMPTY if stack.readers else bias_symmetry(stack.final, stack.tied)
    return reading_symmetry("final", stack.final, [linear for linear, _ in stack.readers],
                            _named([reader for _, reader in stack.readers]))


def _named(readers: Sequence[Reader]) -> dict[str, Reader]:
    return {("head" if len(readers) == 1 else f"head{i}"): reader for i, reader in enumerate(readers)}


def head_symmetries(model: nn.Module, families: Sequence[Family], stacks: Sequence[Stack]) -> list[Symmetry]:
    """Norms behind the stacks with the maps that alone read them, such as those of masked language models."""
    names, known = Names(model), {stack.final.weight for stack in stacks if stack.final}
    behind: dict[Norm, list[Linear]] = {}
    for family in families:
        for norm, head in reading_heads(model, family):
            if norm.weight not in known:
                behind.setdefault(norm, []).append(head)
    parts = []
    for norm, heads in behind.items():
        scope = norm.weight.removesuffix(".weight")
        if all(names.free(head) for head in heads):
            parts.append(scoped(reading_symmetry("final", norm, heads, _named([h.reader for h in heads])), scope))
        elif len(heads) == 1:
            tied = heads[0].renamed(names)
            parts.append(scoped(bias_symmetry(norm, tied), scope))
            parts += [_tied_exchanges(stack, norm, tied) for stack in stacks]
    return parts


def _tied_exchanges(stack: Stack, norm: Norm, head: Linear) -> Symmetry:
    """What tied embeddings may exchange with others that they are added to: what the norm before the head ignores."""
    start = stack.start
    if start is None or not norm.centred or not head.bias or head.weight not in start.axes:
        return EMPTY
    flows: dict[str, Flow] = {}
    for number, spans in enumerate(start.sums):
        rows = next((span.rows for span in spans), None)
        if spans and (number == 0 or start.padded):
            tied = Span(head.weight, rows=rows if number else None)
            flows[f"tied_exchange{number or ''}"] = TiedExchange(tied, spans[0], norm.weight, norm.bias, head.bias)
    return scoped(Symmetry({}, {}, flows=flows), stack.scope)


def _start_symmetry(stack: Stack, approximate: bool) -> Symmetry:
    """What embeddings exchange where they are added up, and their means where all readers remove them."""
    start = stack.start
    if start is None:
        return EMPTY
    branches = [b for layer in stack.layers for b in layer.branches]
    seen_centred = all(layer.prenorm and layer.centred_readers for layer in stack.layers) and all(
        b.before for b in branches)
    centred = start.norm.centred if start.norm else seen_centred
    shifts = _mean_shifts(start) if centred and not start.bent else {}
    if start.norm and start.norm.bias and seen_centred:
        shifts["entry_mean"] = {start.norm.bias: "1"}
    flows = _exchanges(start, "mean_free" if centred else "all") | _entry_flows(start, branches[0])
    flows |= {f"unread_{i}": Unread(span.parameter, (span.rows[0], span.rows[1]))
              for i, span in enumerate(start.dead) if span.rows and span.rows[1]}
    tied = stack.tied is not None and not stack.readers and stack.tied.weight in start.axes
    if start.norm and (start.whole or tied) and not start.bent and (approximate or start.norm.scale_free):
        flows["embedding_scale"] = StreamScale(_start_axes(start), _gains(stack.final) if tied else ())
    return Symmetry({}, {}, shifts=shifts, flows=flows)


def _exchanges(start: Start, within: str) -> dict[str, Flow]:
    """What spans that are added up at the same tokens exchange."""
    flows: dict[str, Flow] = {}
    for number, spans in enumerate(start.sums):
        for other, span in enumerate(spans[1:], start=1):
            sources = (spans[0], *(start.masks if number == 0 else ()))
            flows[f"exchange_{number}_{other}"] = Compensation(sources, (), (span,), within)
    return flows


def _mean_shifts(start: Start) -> dict[str, dict[str, str]]:
    """The mean of every row of the embeddings and of every column of maps."""
    last = {span.parameter: "_ " * (start.axes[span.parameter] - 1) + "1" for span in start.spans}
    first = {weight: "1" + " _" * (start.axes[weight] - 1) for weight in start.weights}
    return {f"{key.replace('.', '_')}_mean": {key: pattern} for key, pattern in (last | first).items()}


def _entry_flows(start: Start, first: Branch) -> dict[str, Flow]:
    """What the first branch takes back: on a post-norm stream a translation of the embeddings, and of a norm before a
    branch that reads it directly the rows."""
    readers = readers_of(first.core)
    if start.norm:
        return {} if first.outer or first.before else row_flows(start.norm, readers)
    source, bias = start.sums[0][-1:] if start.sums else (), first.core.writer.bias
    if source and first.outer and bias and all(reader.absorbs for reader in readers.values()):
        return {"entry_bias": Compensation((source[0],), tuple(readers.values()), (Span(bias),))}
    return {}


def rotations(stacks: Sequence[Stack], approximate: bool = False) -> Symmetry:
    """Rotations and scales of pre-norm streams; streams that share embeddings turn together."""
    parts = []
    for group in _joined(stacks):
        scope = group[0].scope
        writers = [axis for stack in group for axis in _writers(stack)]
        if all(_turns(stack) for stack in group):
            found = _rotation(group, writers)
            parts.append(scoped(Symmetry({}, {}, flows={"rotation": found}), scope))
        if all(_scales(stack, approximate) for stack in group):
            undone = [axis for stack in group for axis in _unscaled(stack)]
            flow = StreamScale(unique_axes(writers), unique_axes(undone))
            parts.append(scoped(Symmetry({}, {}, flows={"stream_scale": flow}), scope))
    return reduce(or_, parts, EMPTY)


def _joined(stacks: Sequence[Stack]) -> list[list[Stack]]:
    """Stacks that have embeddings in common, together."""
    groups: list[tuple[set[str], list[Stack]]] = []
    for stack in stacks:
        names = set(stack.start.axes) if stack.start else set()
        near = [g for g in groups if g[0] & names]
        groups = [g for g in groups if not g[0] & names]
        groups.append((names.union(*(g[0] for g in near)), [*(s for g in near for s in g[1]), stack]))
    return [members for _, members in groups]


def _turns(stack: Stack) -> bool:
    """Whether every norm on the stream has its readers to itself, and every writer is free."""
    start, final = stack.start, stack.final
    if start is None or start.norm or start.bent or not _known(stack) or final is None or not stack.alone or stack.tied:
        return False
    plain = all(b.before and not b.after and not b.outer for layer in stack.layers for b in layer.branches)
    kinds = {final.centred, *(b.before.centred for layer in stack.layers for b in layer.branches if b.before)}
    return plain and len(kinds) == 1


def _known(stack: Stack) -> bool:
    """Whether all that is written at the start can be moved, and is used nowhere else but by stacks and heads."""
    return stack.start is not None and bool(stack.start.axes)


def _scales(stack: Stack, approximate: bool) -> bool:
    start, final = stack.start, stack.final
    if start is None or (start.bent and not start.norm) or final is None or not _known(stack):
        return False
    norms = [final, *(b.before for layer in stack.layers for b in layer.branches if b.before)]
    if not all(layer.prenorm for layer in stack.layers):
        return False
    if stack.tied and (not stack.alone or stack.readers):
        return False
    return approximate or all(n.scale_free for n in norms)


def _unscaled(stack: Stack) -> Iterator[Axis]:
    """What takes a factor on the stream back: maps that read it without a norm, the last norm before a tied head."""
    for layer in stack.layers:
        for branch in layer.branches:
            if not branch.before:
                yield from (linear.read() for linear in branch.core.consumers)
    if stack.tied and stack.start and not stack.start.norm:
        yield from _gains(stack.final)


def _gains(norm: Norm | None) -> tuple[Axis, ...]:
    """Gain and bias of a norm."""
    if norm is None:
        return ()
    return (Axis(norm.weight, 0, offset=norm.offset), *((Axis(norm.bias, 0),) if norm.bias else ()))


def _writers(stack: Stack) -> Iterator[Axis]:
    """Everything that writes to the stream."""
    start = stack.start
    if start and start.norm:
        yield Axis(start.norm.weight, 0, offset=start.norm.offset)
        if start.norm.bias:
            yield Axis(start.norm.bias, 0)
    elif start:
        yield from _start_axes(start)
    for layer in stack.layers:
        for branch in layer.branches:
            yield from branch.written


def _start_axes(start: Start) -> tuple[Axis, ...]:
    first = {w: 0 for w in start.weights}
    return tuple(Axis(name, first.get(name, axes - 1)) for name, axes in start.axes.items())


def _rotation(group: Sequence[Stack], writers: Sequence[Axis]) -> StreamRotation:
    readers: list[Axis] = []
    biases: list[Axis] = []
    for stack in group:
        assert stack.final is not None
        pairs = [(b.before, b.core.consumers) for layer in stack.layers for b in layer.branches]
        for norm, consumers in [*pairs, (stack.final, tuple(linear for linear, _ in stack.readers))]:
            assert norm is not None
            readers += [linear.read(norm) for linear in consumers]
            biases += [Axis(norm.bias, 0, norm.weight, norm.offset)] if norm.bias else []
    centred = bool(group[0].final and group[0].final.centred)
    return StreamRotation(unique_axes(writers), unique_axes(readers), unique_axes(biases), centred)


def unique_axes(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """The axes in order, each once."""
    return tuple(dict.fromkeys(axes))

