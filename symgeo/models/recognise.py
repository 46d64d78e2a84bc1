"""Reads the structure of a model by the tables: its layers, what no table describes, and all symmetries that follow."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

from symgeo.models.compensated import mean_exchanges
from symgeo.models.families import FAMILIES
from symgeo.models.family import Family, qualified_names
from symgeo.models.generators import layer_symmetry
from symgeo.models.stack import Found, Names, final_norm, stacks
from symgeo.models.streams import head_symmetries, rotations, scoped, stack_symmetry
from symgeo.symmetry import Symmetry
from symgeo.symmetry.pattern import merge, parse

# what a part with learned weights is usually called; such a part outside every table is named, not ignored
SUSPECT = re.compile(r"Attention|Attn|MLP|FeedForward|FFN|EncoderLayer|DecoderLayer|Expert|LSTM|GRU|RNN")


def recognise(model: nn.Module) -> list[Found]:
    """The layers of known families, outermost first match."""
    tables = {family.layer: family for family in FAMILIES}
    result: list[Found] = []

    def walk(module: nn.Module, prefix: str, above: list[tuple[str, nn.Module]]) -> None:
        names = [name for name in qualified_names(module) if name in tables]
        if names:
            family = tables[names[0]]  # that of its own class before those it derives from
            # a list of layers, or several, may lie between a layer and the module that calls them
            lists = (nn.ModuleList, nn.Sequential)
            holder = next((m for m in reversed(above) if not isinstance(m[1], lists)), None)
            stack = holder if holder and family.stack in qualified_names(holder[1]) else None
            final = final_norm(family, stack, above) if stack else None
            ends = stack is not None and isinstance(above[-1][1], lists) and above[-1][1][-1] is module
            result.append(Found(prefix, family, family.read(module, final, ends), stack, final))
            return
        for name, child in module.named_children():
            walk(child, f"{prefix}{name}.", [*above, (prefix, module)])

    walk(model, "", [])
    return result


def symmetry_of(model: nn.Module, found: Sequence[Found], approximate: bool = False) -> Symmetry:
    """All that follows from the structure of these layers and from where they stand, frozen parameters included."""
    parts = []
    for f in found:
        layer = layer_symmetry(f.layer, approximate)
        if f.stack is None:
            layer = layer | Symmetry({}, {}, flows=mean_exchanges((f.layer,)))
        shared = {"Hs"} & {name for name in layer.groups}
        parts.append(layer.each(f.prefix.removesuffix("."), shared) if f.prefix else layer)
    whole = stacks(model, found)
    parts += [stack_symmetry(stack, approximate) for stack in whole]
    parts.append(rotations(whole, approximate))
    families = list({f.family.name: f.family for f in found}.values())
    parts += head_symmetries(model, families, whole)
    parts += list(_extras(model, families))
    return union(parts)


def _extras(model: nn.Module, families: Iterable[Family]) -> Iterable[Symmetry]:
    names = Names(model)
    for family in families:
        for extra in family.extras:
            for name, owner in model.named_modules():
                prefix = f"{name}." if name else ""
                keys = [f"{prefix}{key}" for key in extra.symmetry.tensors]
                shared = {f"{prefix}{key}" for key in extra.shared}
                free = all(names.alone(key) or (key in names.axes and key in shared) for key in keys)
                if extra.owner in qualified_names(owner) and free:
                    own = Symmetry({f"{prefix}{key}": text for key, text in extra.symmetry.tensors.items()},
                                   extra.symmetry.groups, extra.symmetry.sizes)
                    yield scoped(own, name)


def union(parts: Iterable[Symmetry]) -> Symmetry:
    """All declarations together, built once; scopes, which only globs need, are dropped."""
    tensors: dict[str, str] = {}
    groups, sizes, shifts, flows = {}, {}, {}, {}  # type: ignore[var-annotated]
    for part in parts:
        for key, text in part.tensors.items():
            tensors[key] = str(merge(parse(tensors[key]), parse(text), key)) if key in tensors else text
        for all_of, own in ((groups, part.groups), (sizes, part.sizes), (shifts, part.shifts), (flows, part.flows)):
            all_of.update(own)
    return Symmetry(tensors, groups, sizes, shifts, flows=flows)


def unknown_parts(model: nn.Module, found: Sequence[Found], prefixes: Sequence[str] = ()) -> list[str]:
    """Parts with parameters that look like attention or an MLP and that no table accounts for; what lies under
    ``prefixes`` is accounted for otherwise."""
    parts = []
    for name, module in model.named_modules():
        path = f"{name}." if name else ""
        if any(path.startswith(prefix) for prefix in prefixes):
            continue
        home = next((f for f in found if path.startswith(f.prefix)), None)
        own = [parameter for parameter, _ in module.named_parameters(recurse=False)]
        if home is not None:
            inside = path.removeprefix(home.prefix)
            strange = [p for p in own if not _accounted(f"{inside}{p}", home.family)]
            parts += [f"{name or 'the model'} ({type(module).__name__})"] if strange else []
        elif SUSPECT.search(type(module).__name__) and any(True for _ in module.parameters()):
            contains = any(prefix.startswith(path) for prefix in (*(f.prefix for f in found), *prefixes))
            parts += [] if contains else [f"{name or 'the model'} ({type(module).__name__})"]
    return _outermost(parts)


def _accounted(parameter: str, family: Family) -> bool:
    return any(re.match(rf"{re.escape(name)}([._]|$)", parameter) for name in family.owned())


def _outermost(parts: list[str]) -> list[str]:
    """Without the parts that lie inside another one of the list."""
    names = [part.split(" ")[0] for part in parts]
    return [part for part, name in zip(parts, names) if not any(name.startswith(f"{other}.") for other in names)]
