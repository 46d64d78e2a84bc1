"""The same declaration under the names of a checkpoint's files, where transformers keeps others in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from symgeo.groups import Group
from symgeo.models.recognise import recognise
from symgeo.models.structure import MLP
from symgeo.symmetry import Axis, Flow, OffsetTrade, StreamRotation, StreamScale, Symmetry
from symgeo.symmetry.pattern import parse


def disk_name(model: nn.Module, name: str) -> str:
    """The name in the safetensors files of a parameter that is stored as it is in memory.

    >>> disk_name(nn.Linear(2, 3), "weight")
    'weight'
    """
    for rule in dict.fromkeys(rule for f in recognise(model) for rule in f.family.disk):
        name = re.sub(*rule, name)
    return name


def on_disk(symmetry: Symmetry, model: nn.Module) -> Symmetry:
    """A symmetry of a model of transformers under the names, and for the tensors, of its safetensors files.

    ViT, DeiT and GPT-NeoX have other names there; Mixtral has one matrix for each expert and part of it,

        experts.gate_up_proj (E, 2 f, d), experts.down_proj (E, d, f)  ->  experts.i.w1, w3 (f, d), w2 (d, f)

    each with a group of its own for every expert; the order of experts, which would exchange tensors, is left out.
    Bind it to tensors read from the files; tied weights are stored once.
    """
    found = recognise(model)
    rules = tuple(dict.fromkeys(rule for f in found for rule in f.family.disk))

    def rename(name: str) -> str:
        for rule in rules:
            name = re.sub(*rule, name)
        return name

    experts: dict[str, _Experts] = {}
    for f in found:
        mlp = f.layer.mlp
        if isinstance(mlp, MLP) and mlp.router:
            into, out = f"{f.prefix}{mlp.up.weight}", f"{f.prefix}{mlp.down.weight}"
            one = _Experts(rename(into), rename(out), model.get_parameter(into).shape[0])
            experts |= {into: one, out: one}
    split = _split(symmetry, experts) if experts else symmetry
    return Symmetry(
        {rename(name): text for name, text in split.tensors.items()}, split.groups, split.sizes,
        {name: {rename(key): text for key, text in targets.items()} for name, targets in split.shifts.items()},
        frozen={rename(name) for name in split.frozen},
        flows={name: flow.renamed(rename) for name, flow in split.flows.items()},
    )


class _Experts:
    """The names of the matrices of one layer's experts."""

    def __init__(self, into: str, out: str, number: int):
        self.into, self.out, self.number = into, out, number
        self.home = into.rpartition(".")[0]

    def parts(self, i: int, out: bool) -> tuple[str, ...]:
        """The files' tensors of expert i that make up its slice."""
        return tuple(f"{self.home}.{i}.{name}.weight" for name in (("w2",) if out else ("w1", "w3")))


def _split(symmetry: Symmetry, experts: dict[str, _Experts]) -> Symmetry:
    tensors: dict[str, str] = {}
    numbered: dict[str, int] = {}  # names of units -> number of experts
    orders: set[str] = set()
    for name, text in symmetry.tensors.items():
        if name not in experts:
            tensors[name] = text
            continue
        one = experts[name]
        lead, first, second = parse(text).axes
        orders |= {str(lead)}
        out = name.endswith("down_proj")
        halves = [f"{first} {second}"] if out else [f"({half}) {second}" for half in _terms(str(first))]
        for name_of in {leaf for half in halves for leaf in parse(half).names()}:
            if symmetry.groups.get(name_of) is not None and _follows(symmetry.groups, name_of, str(lead)):
                numbered[name_of] = one.number
        for i in range(one.number):
            for part, half in zip(one.parts(i, out), halves):
                tensors[part] = str(parse(half).rename(
                    lambda n, i=i: _name(n, i) if n in numbered else n))  # type: ignore[misc]
    gone = re.compile(rf"(?<![\w.])(?:{'|'.join(map(re.escape, orders))})\*?(?![\w\[])")
    tensors = {name: gone.sub("_", text) for name, text in tensors.items()}
    groups = {name: group for name, group in symmetry.groups.items() if name not in numbered and name not in orders}
    for name, number in numbered.items():
        for i in range(number):
            per = symmetry.groups[name].per
            groups[_name(name, i)] = replace(symmetry.groups[name], per=_name(per, i) if per in numbered else None)
    sizes = {name: size for name, size in symmetry.sizes.items() if name not in numbered}
    return Symmetry(tensors, groups, sizes, symmetry.shifts, symmetry.frozen,
                    flows={name: _flow(flow, experts) for name, flow in symmetry.flows.items()})


def _terms(text: str) -> list[str]:
    """The slices of a sum."""
    return text[1:-1].split(" + ")


def _follows(groups: dict[str, Group], name: str, order: str) -> bool:
    """Whether the copies of a group are numbered, in the end, by this factor."""
    per = groups[name].per
    return per == order or (per in groups and per is not None and _follows(groups, per, order))


def _name(name: str | None, i: int) -> str:
    """The name of the i-th of several: "h[layers.0]" -> "h_2[layers.0]"."""
    base, bracket, scope = str(name).partition("[")
    return f"{base}_{i}{bracket}{scope}"


def _flow(flow: Flow, experts: dict[str, _Experts]) -> Flow:
    if isinstance(flow, StreamRotation):
        return replace(flow, writers=_axes(flow.writers, experts), readers=_axes(flow.readers, experts))
    if isinstance(flow, StreamScale):
        return replace(flow, writers=_axes(flow.writers, experts))
    return replace(flow, readers=_axes(flow.readers, experts)) if isinstance(flow, OffsetTrade) else flow


def _axes(axes: tuple[Axis, ...], experts: dict[str, _Experts]) -> tuple[Axis, ...]:
    return tuple(part for axis in axes for part in _parts(axis, experts))


def _parts(axis: Axis, experts: dict[str, _Experts]) -> Iterator[Axis]:
    if axis.parameter not in experts:
        yield axis
        return
    one = experts[axis.parameter]
    for i in range(one.number):
        for name in one.parts(i, axis.parameter.endswith("down_proj")):
            yield replace(axis, parameter=name, index=axis.index - 1)

