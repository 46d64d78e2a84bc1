"""Hidden units matched by what they compute: permutations from the activations of two models.

The output of a layer carries the axis of its weight.  So it is the one parameter of a declaration of its own,
``"_ (H e)"`` for the keys of heads, and is aligned like weights after each unit has been normalised: what is summed
are correlations of units, and canonical correlations where GL acts on the units of a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from symgeo.functional import Params
from symgeo.groups import GeneralLinear, Group, Orthogonal, Permutation, Rotary
from symgeo.merge.align_groups import coordinates
from symgeo.merge.align_search import Search, permutation_names, place
from symgeo.merge.align_steps import clusters
from symgeo.models.probe import evaluating
from symgeo.symmetry import Action, Dim, Element, Symmetry
from symgeo.symmetry.layout import Layout
from symgeo.symmetry.pattern import Product, Sum, Tree, leaves

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Outputs = dict[str, Tensor]


def permutations_of_units(
    action: Action, model: nn.Module, batches: Iterable[Any], source: Params, target: Params
) -> dict[str, Tensor]:
    """The permutations that match the units of the source with those of the target, by activations.

    A batch is ``(x, y)``, of which x is used, or a mapping of keyword arguments.  Only permutations that the output
    of some linear or convolution layer carries are found.

    Raises ``ValueError`` if there is none, or no batch.
    """
    axes, batches = _output_axes(action, model), list(batches)
    if not batches:
        raise ValueError("batches: activations need at least one batch; found none")
    theirs, ours = (_outputs(model, params, batches, axes) for params in (source, target)) if axes else ({}, {})
    if not ours:
        raise ValueError(
            f"model: no output of a linear or convolution layer of {type(model).__name__} carries one of the "
            f"permutations ({', '.join(permutation_names(action)) or 'there are none'}); align by weights instead"
        )
    axes = {name: axes[name] for name in axes if name in ours}
    declared = _declaration(action, axes)
    bound = declared.bind(ours)
    start = Search(_normalised(bound, theirs), Element({}))
    steps = [step for step in clusters(bound) if isinstance(bound.groups[step.root], Permutation)]
    found = place(bound, start, steps, _normalised(bound, ours)).element
    return {name: found[name].to(action.device) for name in permutation_names(bound) if name in found}


def _output_axes(action: Action, model: nn.Module) -> dict[str, Tree[Dim]]:
    """For every module whose output carries a permutation, the layout of that axis."""
    permuted = set(permutation_names(action))
    found: dict[str, Tree[Dim]] = {}
    for name, layout in action.layouts.items():
        path, _, kind = name.rpartition(".")
        axis = _output_axis(model, path, kind, layout)
        if axis is not None and permuted & {dim.name for dim in leaves(axis)}:
            found[path] = axis
    return found


def _output_axis(model: nn.Module, path: str, kind: str, layout: Layout) -> Tree[Dim] | None:
    """The axis of a weight that its layer's output has."""
    module = dict(model.named_modules()).get(path)
    if kind != "weight" or module is None:
        return None
    if isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
        return layout[0]
    return layout[1] if type(module).__name__ == "Conv1D" else None  # of transformers, stored (in, out)


@torch.no_grad()
def _outputs(model: nn.Module, params: Params, batches: list[Any], names: Iterable[str]) -> Outputs:
    """The outputs of modules, (samples, units), centred, in double precision; of those that ran."""
    kept: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            units = output.movedim(1, -1) if isinstance(module, _CONVOLUTIONS) else output
            kept[name].append(units.reshape(-1, units.shape[-1]).double())

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name in kept:
            handle = model.get_submodule(name).register_forward_hook(partial(keep, name))
            stack.callback(handle.remove)
        for batch in batches:
            torch.func.functional_call(model, params, *_inputs(batch))
    outputs = {name: torch.cat(pieces) for name, pieces in kept.items() if pieces}
    return {name: x - x.mean(0) for name, x in outputs.items()}


def _inputs(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the model: a batch is ``(x, y)``, the input itself, or a mapping of keyword arguments."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return (batch[0],), {}
    raise ValueError(f"batches: needed (x, y), a tensor x or a mapping of arguments; got {type(batch).__name__}")


def _declaration(action: Action, axes: Mapping[str, Tree[Dim]]) -> Symmetry:
    """The groups of the outputs: one parameter ``_ axis`` for every module."""
    sizes: dict[str, int] = {}
    tensors = {name: f"_ {_text(axis, sizes)}" for name, axis in axes.items()}
    return Symmetry(tensors, {name: group for name, group in action.groups.items() if name in sizes}, sizes)


def _text(node: Tree[Dim], sizes: dict[str, int]) -> str:
    """A layout as a pattern; what has no name gets one, so that all sizes are known."""
    if isinstance(node, Product | Sum):
        joint = " " if isinstance(node, Product) else " + "
        return f"({joint.join(_text(part, sizes) for part in node.parts)})"
    name = node.name or f"free_{len(sizes)}"
    sizes[name] = node.size
    return f"{name}{'*' * node.dual}"


def _normalised(action: Action, outputs: Outputs) -> Params:
    """Outputs in which the cross products of two models are correlations.

    Every unit has length 1; so has every plane of a rotary group, and on average every coordinate of an orthogonal
    one; under GL the units of one copy are made orthonormal.
    """
    blocks = action.split(outputs)
    for name in sorted(action.groups, key=lambda name: len(action.copies[name])):
        for block in action.blocks(name):
            pieces = blocks[block.parameter]
            pieces[block.index] = block.restore(_unit(action.groups[name], block.rows(pieces[block.index])))
    return action.assemble(blocks)


def _unit(group: Group, rows: Tensor) -> Tensor:
    if isinstance(group, GeneralLinear):
        return torch.linalg.qr(rows).Q if rows.shape[-2] >= rows.shape[-1] else rows
    if isinstance(group, Rotary):
        size = torch.linalg.vector_norm(coordinates(group, rows), dim=-2, keepdim=True)
        size = size.repeat(*[1] * (size.ndim - 1), 2) if group.pairing == "half" else size.repeat_interleave(2, -1)
    elif isinstance(group, Orthogonal):
        size = torch.linalg.vector_norm(rows, dim=(-2, -1), keepdim=True) / rows.shape[-1] ** 0.5
    else:
        size = torch.linalg.vector_norm(rows, dim=-2, keepdim=True)
    return rows / torch.where(size > 0, size, 1.0)
