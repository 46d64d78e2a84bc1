"""The symmetries of whole residual streams: embeddings, what the last norm feeds, rotations and scales."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from operator import or_

from symgeo.models.attention import EMPTY
from symgeo.models.generators import bias_symmetry, entry_symmetry, reading_symmetry
from symgeo.models.stack import Stack, Start
from symgeo.symmetry import Axis, Compensation, Flow, StreamRotation, StreamScale, Symmetry


def stack_symmetry(stack: Stack, approximate: bool = False) -> Symmetry:
    """What a stack has beside its layers, with full names; generators are scoped by the name of the stack."""
    parts = [entry_symmetry(layer, before, scope, approximate) for layer, scope, before in stack.before if before]
    own = [_behind(stack), _start_symmetry(stack, approximate)]
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
    single = len(stack.readers) == 1
    readers = {("head" if single else f"head{i}"): r.reader for i, r in enumerate(stack.readers)}
    return reading_symmetry("final", stack.final, stack.readers, readers)


def _start_symmetry(stack: Stack, approximate: bool) -> Symmetry:
    """What embeddings exchange where they are added up, and their means where all readers remove them."""
    start = stack.start
    if start is None:
        return EMPTY
    prenorm = all(layer.prenorm for layer in stack.layers)
    centred = prenorm and all(layer.centred_readers for layer in stack.layers)
    judged = start.norm.centred if start.norm else centred
    flows: dict[str, Flow] = {}
    for number, spans in enumerate(start.sums):
        for other, span in enumerate(spans[1:], start=1):
            sources = (spans[0], *(start.masks if number == 0 else ()))
            flows[f"exchange_{number}_{other}"] = Compensation(sources, (), (span,), mean_free=judged)
    shifts: dict[str, dict[str, str]] = {}
    if judged and not start.bent:
        last = {span.parameter: "_ " * (start.axes[span.parameter] - 1) + "1" for span in start.spans}
        first = {weight: "1" + " _" * (start.axes[weight] - 1) for weight in start.weights}
        shifts = {f"{key.rpartition('.')[0].replace('.', '_') or key}_{key.rpartition('.')[2]}_mean": {key: pattern}
                  for key, pattern in (last | first).items()}
    if start.norm and start.norm.bias and centred:
        shifts["entry_mean"] = {start.norm.bias: "1"}
    if start.norm and start.whole and not start.bent and (approximate or start.norm.scale_free):
        flows["embedding_scale"] = StreamScale(_start_axes(start))
    return Symmetry({}, {}, shifts=shifts, flows=flows)


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
            undone = [Axis(s.final.weight, 0, offset=s.final.offset) for s in group if s.tied and s.final]
            flow = StreamScale(tuple(dict.fromkeys(writers)), tuple(undone))
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
    if start is None or start.bent and not start.norm or final is None or not _known(stack):
        return False
    norms = [final, *(b.before for layer in stack.layers for b in layer.branches)]
    if not all(layer.prenorm for layer in stack.layers) or not all(norms):
        return False
    if stack.tied and (not stack.alone or stack.readers):
        return False
    return approximate or all(n.scale_free for n in norms if n)


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
            if branch.after:
                yield Axis(branch.after.weight, 0, offset=branch.after.offset)
                if branch.after.bias:
                    yield Axis(branch.after.bias, 0)
            else:
                yield from branch.core.writer.written


def _start_axes(start: Start) -> tuple[Axis, ...]:
    first = {w: 0 for w in start.weights}
    return tuple(Axis(name, first.get(name, axes - 1)) for name, axes in start.axes.items())


def _rotation(group: Sequence[Stack], writers: Sequence[Axis]) -> StreamRotation:
    readers: list[Axis] = []
    biases: list[Axis] = []
    for stack in group:
        assert stack.final is not None
        pairs = [(b.before, b.core.consumers) for layer in stack.layers for b in layer.branches]
        for norm, consumers in [*pairs, (stack.final, stack.readers)]:
            assert norm is not None
            readers += [linear.read(norm) for linear in consumers]
            biases += [Axis(norm.bias, 0, norm.weight, norm.offset)] if norm.bias else []
    centred = bool(group[0].final and group[0].final.centred)
    return StreamRotation(*(tuple(dict.fromkeys(side)) for side in (writers, readers, biases)), centred)

