"""The flows of a chain of affine maps: translations of channels, what stands behind a norm, slack of linear chains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from symgeo.models.chain import Affine, Fixed, Item, Normaliser
from symgeo.models.channels import Chain, Draft, reading_port
from symgeo.symmetry import Flow, Reader, RowFreedom, Span
from symgeo.symmetry.channels import ChannelShift
from symgeo.symmetry.slack import LinearSlack, RowTrade
from symgeo.symmetry.stream import Axis, StreamRotation


def write_flows(draft: Draft) -> None:
    """All of them, and the rows that read a norm without gains."""
    for i in range(len(draft.chain.nodes)):
        if (shift := _shift(draft.chain, i)) is not None:
            draft.flows[draft.name("shift", i)] = shift
        _behind_norm(draft, i)
    for letters, place, flow in _slack(draft.chain):
        draft.flows[draft.name(letters, place)] = flow


def _shift(chain: Chain, start: int) -> Flow | None:
    """A translation by the bias of map ``start``, which the next map with a bias takes back."""
    bias, ports = chain.nodes[start].bias, []
    if bias is None:
        return None
    for passing, reader in zip(chain.wires[start:], chain.nodes[start + 1 :]):
        if not passing.shifted or reader.pads:
            return None
        ports.append(reading_port(reader, passing.factor))
        if reader.bias:
            return ChannelShift(bias, tuple(ports))
    return None


def _behind_norm(draft: Draft, i: int) -> None:
    """What map i may add to its rows, and rotations of what stands before the norm that it reads."""
    chain, reader = draft.chain, draft.chain.nodes[i]
    gained = i > 0 and _is_gain(chain, i - 1) and chain.wires[i - 1].mixes
    at = i - 1 if gained else i
    gain = chain.nodes[at] if gained else None
    edge = chain.edges[at]
    place = next((k for k in reversed(range(len(edge))) if isinstance(edge[k], Normaliser)), None)
    norm = edge[place] if place is not None else None
    if reader.diagonal or place is None or not isinstance(norm, Normaliser):
        return
    if not _linear(edge[place + 1 :]) or norm.groups != 1 or not norm.divides or reader.pixels > 1:
        return
    if norm.rows and norm.centred and reader.axes == 2:
        name = draft.name("rows", i)
        if gain is None:
            draft.shifts[name] = {reader.weight: "_ 1"}
        elif gain.bias is None or _reader(chain, i).absorbs:
            draft.flows[name] = RowFreedom(_reader(chain, i), gain.weight, gain.bias)
        elif reader.channels[1] < reader.channels[0]:
            draft.flows[name] = RowTrade(reader.weight, gain.weight, gain.bias)
    first = at - 1
    least = 3 if norm.centred else 2
    if first < 0 or chain.nodes[first].diagonal or not _linear(edge[:place]) or chain.nodes[first].channels[1] < least:
        return
    draft.flows[draft.name("rotation", first)] = _rotation(chain.nodes[first], gain, reader, norm.centred)


def _rotation(writer: Affine, gain: Affine | None, reader: Affine, centred: bool) -> StreamRotation:
    """Of the channels between a map and the norm behind it, whose gains stay as they are."""
    name = gain.weight if gain else None
    return StreamRotation(
        (Axis(writer.weight, 1 if writer.transposed else 0), *((Axis(writer.bias, 0),) if writer.bias else ())),
        (Axis(reader.weight, 0 if reader.transposed else 1, name),),
        (Axis(gain.bias, 0, name),) if gain and gain.bias else (), centred,
    )


def _reader(chain: Chain, i: int) -> Reader:
    """A linear map with all that may take a change of its output back."""
    node = chain.nodes[i]
    behind = not node.bias and i + 1 < len(chain.nodes) and _joined(chain, i)
    return Reader(node.weight, Span(node.bias) if node.bias else None, then=_reader(chain, i + 1) if behind else None)


def _is_gain(chain: Chain, i: int) -> bool:
    """Whether map i is the learned part of a norm."""
    return chain.nodes[i].diagonal and chain.nodes[i].axes == 1


def _linear(items: Sequence[Item]) -> bool:
    """Whether all linear maps of channels pass."""
    return all(isinstance(item, Fixed) and item.mixes for item in items)


def _slack(chain: Chain) -> Iterator[tuple[str, int, LinearSlack]]:
    """That of linear maps one behind the other, and of a bias in front of such maps that have none."""
    nodes = chain.nodes
    for start, stop in _runs(chain):
        maps = nodes[start:stop]
        if len(maps) > 1:
            shapes = {node.weight: (node.channels[1], node.channels[0] * node.pixels) for node in maps}
            yield from (("slack", start + i, flow) for i, flow in _between(maps) if flow.dimension(shapes))
        first = start - 1 if start and nodes[start - 1].diagonal and _joined(chain, start - 1) else start
        biased = [i for i in range(first, stop) if nodes[i].bias]
        behind = nodes[biased[-1] + 1 : stop] if biased else ()
        if behind and min(node.channels[1] for node in behind) < behind[0].channels[0]:
            bias = nodes[biased[-1]].bias
            yield "unseen", biased[-1], LinearSlack((str(bias), *(node.weight for node in behind)), 0)


def _runs(chain: Chain) -> Iterator[tuple[int, int]]:
    """Linear maps with nothing between them: the first one, and the one behind the last."""
    start = 0
    for i in range(1, len(chain.nodes) + 1):
        if i == len(chain.nodes) or chain.nodes[i - 1].diagonal or not _joined(chain, i - 1):
            if not chain.nodes[start].diagonal and chain.nodes[start].axes == 2:
                yield start, i
            start = i


def _joined(chain: Chain, i: int) -> bool:
    """Whether the next map is linear and reads map i as it is."""
    reader = chain.nodes[i + 1]
    flat = not reader.diagonal and reader.axes == 2 and reader.pixels == 1
    return flat and chain.wires[i].mixes and chain.nodes[i].axes < 3


def _between(maps: Sequence[Affine]) -> Iterator[tuple[int, LinearSlack]]:
    """The slack of every map, where a bias from there on can take back what it makes of biases before."""
    weights, biases = tuple(node.weight for node in maps), tuple(node.bias for node in maps)
    for i in range(len(maps)):
        before = biases[:i] if any(biases[:i]) else ()
        later = next((j for j in range(i, len(maps)) if biases[j]), None)
        if not before:
            yield i, LinearSlack(weights, i)
        elif later is not None:
            yield i, LinearSlack(weights, i, before, biases[later], later - i)
