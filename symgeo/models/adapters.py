"""Low-rank adapters on any model: the basis of the rank axis of B A, which nothing sees."""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from symgeo.groups import GeneralLinear, Group
from symgeo.models.probe import evaluating
from symgeo.symmetry import Symmetry
from symgeo.symmetry.exchange import RankExchange

#: what a layer holds beside its two factors without being a variant: dropouts, and norms of W + B A (DoRA)
_HARMLESS = ("lora_dropout", "lora_magnitude_vector")
#: names of the two factors of a layer, and whether they are the factors of an embedding
_FACTORS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
_BATCH, _LENGTH = 2, 5


@dataclass(frozen=True)
class Adapter:
    """One adapter of one layer.

    path : of the layer;  a, b : its factors (rank, in, ...) and (out, rank, ...), with their names
    """

    path: str
    layer: nn.Module
    adapter: str
    names: tuple[str, str]
    a: nn.Parameter
    b: nn.Parameter

    @property
    def prefix(self) -> str:
        """That of the names of its layer's parameters."""
        return f"{self.path}." if self.path else ""

    @property
    def label(self) -> str:
        """Where it is, fit to be part of a factor's name."""
        return re.sub(r"[\[\]\s*]", "_", f"{self.path}.{self.adapter}" if self.path else self.adapter)


def adapter_symmetries(model: nn.Module) -> list[tuple[str, Symmetry]]:
    r"""GL(r) of every low-rank adapter, each with the prefix of its layer:

        W x + s B A x,      B -> B g^-1,   A -> g A,

    of any layer with factors in ``lora_A`` and ``lora_B`` (or ``lora_embedding_A``, ``lora_embedding_B``), as PEFT
    keeps them: one group for every adapter and layer, one for every expert where ``lora_A`` stacks those of a whole
    stack (rows expert by expert, columns of B rank by rank), one for every group of a convolution in groups. Adapters
    of one layer that are active together exchange rows: GL of the sum of their ranks. Names are those of
    ``model.named_parameters()``.

    Layers that hold more than two factors for an adapter, or compute a variant of it, are tried on random inputs.
    DoRA, whose magnitudes and norms see B A only, passes. Those that change their output are left out and named in a
    warning, as are those that could not be tried: singular values that are learned beside the factors
    (AdaLoRA, KaSA), block-diagonal factors.

    >>> layer = nn.Module()
    >>> layer.lora_A = nn.ModuleDict({"task": nn.Linear(5, 2, bias=False)})
    >>> layer.lora_B = nn.ModuleDict({"task": nn.Linear(2, 3, bias=False)})
    >>> adapter_symmetries(layer)[0][1].tensors
    {'lora_B.task.weight': '_ r[task]', 'lora_A.task.weight': 'r[task]* _'}
    """
    adapters = list(_adapters(model))
    homes = Counter(x.untyped_storage().data_ptr() for one in adapters for x in (one.a, one.b) if not x.is_meta)
    reasons = [_obstacle(one, homes) for one in adapters]
    fit = [one for one, reason in zip(adapters, reasons) if not reason]
    found = [(one.prefix, _symmetry(one)) for one in fit]
    left = [f"{one.path} ({one.adapter}: {reason})" for one, reason in zip(adapters, reasons) if reason]
    left += _others(model)
    if left:
        more = f" and {len(left) - 4} more" if len(left) > 4 else ""
        warnings.warn(f"adapter_symmetries: left alone: {', '.join(left[:4])}{more}", stacklevel=2)
    return found + _exchanges(fit)


def adapter_factors(model: nn.Module) -> dict[str, list[tuple[str, str]]]:
    """The names of (A, B) of all adapters of every layer, by the path of the layer."""
    factors: dict[str, list[tuple[str, str]]] = {}
    for one in _adapters(model):
        factors.setdefault(one.path, []).append(one.names)
    return factors


def _exchanges(adapters: Sequence[Adapter]) -> list[tuple[str, Symmetry]]:
    """What the adapters of one layer exchange that are added up as they are."""
    found = []
    for one, other in permutations(adapters, 2):
        if one.layer is not other.layer or not (_added(one) and _added(other)):
            continue
        scaling: Mapping[str, float] = getattr(one.layer, "scaling", {})
        ratio = scaling.get(one.adapter, 1.0) / scaling.get(other.adapter, 1.0)
        name = f"exchange[{one.label}.{other.adapter}]"
        flow = RankExchange(one.names, other.names, float(ratio))
        found.append((one.prefix, Symmetry({}, {}, flows={name: flow})))
    return found


def _added(one: Adapter) -> bool:
    """Whether s B A with some s is added to what the layer computes."""
    active = getattr(one.layer, "active_adapters", ())
    off = getattr(one.layer, "disable_adapters", False) or getattr(one.layer, "merged", False)
    scaled = bool(getattr(one.layer, "scaling", {}).get(one.adapter, 1.0))
    return one.adapter in active and not off and scaled and not _variant(one) and _experts(one) == _groups(one) == 1


def _others(model: nn.Module) -> list[str]:
    """Layers of PEFT that hold adapters of other kinds."""
    known = {role for pair in _FACTORS for role in pair}
    found = []
    for path, layer in model.named_modules():
        roles = getattr(layer, "adapter_layer_names", ())
        filled = [role for role in roles if getattr(layer, role, None)]
        if filled and not known & set(filled):
            found.append(f"{path} ({type(layer).__module__}.{type(layer).__name__})")
    return found


def _adapters(model: nn.Module) -> Iterator[Adapter]:
    """All pairs of factors, in the order of the layers."""
    names = {id(p): name for name, p in model.named_parameters()}
    for path, layer in model.named_modules():
        for role_a, role_b in _FACTORS:
            first, second = (_entries(layer._modules.get(role)) for role in (role_a, role_b))
            for adapter in first.keys() & second.keys():
                a, b = first[adapter], second[adapter]
                if id(a) in names and id(b) in names:
                    yield Adapter(path, layer, adapter, (names[id(a)], names[id(b)]), a, b)


def _entries(module: nn.Module | None) -> dict[str, nn.Parameter]:
    """The weights in a dictionary of modules or parameters."""
    if isinstance(module, nn.ParameterDict):
        return {name: p for name, p in module.items() if isinstance(p, nn.Parameter)}
    if isinstance(module, nn.ModuleDict):
        weights = {name: child._parameters.get("weight") for name, child in module.items()}
        return {name: weight for name, weight in weights.items() if weight is not None}
    return {}


def _symmetry(one: Adapter) -> Symmetry:
    """GL of the rank axis; of every expert or group alike where it is divided."""
    experts, groups = _experts(one), _groups(one)
    r, e = f"r[{one.label}]", f"{'E' if experts > 1 else 'G'}[{one.label}]"
    rest_a, rest_b = (" _" * (x.dim() - 2) for x in (one.a, one.b))
    name_a, name_b = one.names
    if experts > 1:
        tensors = {name_b: f"_ ({r} {e})", name_a: f"({e} {r}*) _"}
    elif groups > 1:
        tensors = {name_b: f"({e} _) {r}{rest_b}", name_a: f"({e} {r}*) _{rest_a}"}
    else:
        tensors = {name_b: f"_ {r}{rest_b}", name_a: f"{r}* _{rest_a}"}
    divided = max(experts, groups)
    group: dict[str, Group] = {r: GeneralLinear(per=e if divided > 1 else None)}
    return Symmetry(tensors, group, {e: divided} if divided > 1 else None)


def _experts(one: Adapter) -> int:
    """How many experts the factors of a layer hold."""
    return int(getattr(one.layer, "num_experts", 1) or 1)


def _groups(one: Adapter) -> int:
    """Into how many groups of its inputs a convolution B is divided."""
    entry: Any = one.layer._modules["lora_B"] if "lora_B" in one.layer._modules else {}
    return int(getattr(entry[one.adapter], "groups", 1)) if one.adapter in entry else 1


def _obstacle(one: Adapter, homes: Mapping[int, int]) -> str:
    """Why nothing is declared for an adapter, or ""."""
    if one.a.dim() < 2 or one.b.dim() < 2 or one.a.shape[0] != one.b.shape[1] * (_groups(one)):
        return f"factors of shapes {tuple(one.b.shape)} and {tuple(one.a.shape)}"
    if not one.a.is_meta and any(homes[x.untyped_storage().data_ptr()] > 1 for x in (one.a, one.b)):
        return "a factor is shared with another one"
    if not _variant(one):
        return ""
    if one.a.is_meta:
        return "weights are on the meta device, on which nothing can be tried"
    change = _tried(one)
    return "a variant that could not be tried" if change is None else "it computes more than B A" if change else ""


def _variant(one: Adapter) -> bool:
    """Whether a layer says that it computes something else, or holds more for this adapter."""
    more = [name for name, child in one.layer._modules.items()
            if isinstance(child, nn.ModuleDict | nn.ParameterDict) and one.adapter in child
            and name not in (*_HARMLESS, *(role for pair in _FACTORS for role in pair))]
    plain = all(type(child) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) for child in _factor_modules(one))
    return bool(more) or one.adapter in getattr(one.layer, "lora_variant", {}) or not plain


def _factor_modules(one: Adapter) -> list[nn.Module]:
    entries: list[Any] = [one.layer._modules.get(role) for role in ("lora_A", "lora_B")]
    return [entry[one.adapter] for entry in entries if isinstance(entry, nn.ModuleDict) and one.adapter in entry]


def _tried(one: Adapter) -> bool | None:
    """Whether a random element changes the output of the layer with random factors; None if that cannot be seen."""
    generator = torch.Generator().manual_seed(0)
    twin = copy.copy(one.layer)  # shares all modules; only its own flags are set
    twin.__dict__ |= {"_active_adapter": [one.adapter], "_disable_adapters": False, "merged_adapters": []}
    inside = [name.removeprefix(one.prefix) for name in one.names]
    params = {name: _normal(x, generator) for name, x in zip(inside, (one.a, one.b))}
    action = _symmetry(one).bind(dict(zip(one.names, params.values())))
    moved = action.act(action.random(generator), dict(zip(one.names, params.values())))
    off = {inside[0]: params[inside[0]], inside[1]: torch.zeros_like(one.b)}
    for call in _calls(one, generator):
        try:
            with torch.no_grad(), evaluating(one.layer):
                outputs = [torch.func.functional_call(twin, p, call[0], call[1])
                           for p in (params, dict(zip(inside, moved.values())), off)]
        except Exception:  # whatever the layer needs to be called, it cannot be tried like this
            continue
        before, after, without = (x.double() for x in outputs)
        if float((before - without).norm()) > 0.01 * float(without.norm()):
            return bool((after - before).norm() > _tolerance(one.a) * (before - without).norm())
    return None


def _normal(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)


def _tolerance(x: Tensor) -> float:
    """A relative change that rounding cannot make."""
    return float(torch.finfo(x.dtype).eps) ** 0.5


def _calls(one: Adapter, generator: torch.Generator) -> Iterator[tuple[tuple[Tensor, ...], dict[str, Any]]]:
    """Inputs of the layer; adapters that wait for a token are told that it came."""
    if "lora_embedding_A" in one.names[0]:
        yield (torch.arange(_LENGTH).remainder(one.a.shape[1]).to(one.a.device),), {}
        return
    base: Any = getattr(one.layer, "base_layer", None)
    weight = getattr(base, "weight", one.a)
    if one.a.dim() > 2:
        sizes: Collection[int] = [base.in_channels, *(k + 2 for k in one.a.shape[2:])]
    else:
        sizes = [_LENGTH, int(getattr(one.layer, "in_features", one.a.shape[1]))]
    x = torch.randn(_BATCH, *sizes, generator=generator, dtype=torch.float64).to(weight)
    yield (x,), {}
    yield (x,), {"alora_offsets": [_LENGTH] * _BATCH}
