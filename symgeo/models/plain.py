"""Plain networks: linear maps and convolutions, one after the other, with activations, pooling and norms between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

from torch import nn

from symgeo.models.chain import is_plain, read_chain
from symgeo.models.channel_flows import write_flows
from symgeo.models.channels import Draft, regions, split_chain, write_region
from symgeo.symmetry import Symmetry


def plain_symmetries(
    model: nn.Module, skip: Collection[str] = (), approximate: bool = False
) -> list[tuple[str, Symmetry]]:
    r"""The symmetries of everything in ``nn.Sequential`` containers, each with the prefix of its container.

    Only in a container are modules known to be called one after the other; what flows in and out of it is left alone,
    so that it may stand anywhere, and nested ones are one chain. ::

        W_2 f(W_1 x + b_1) + b_2,     W_1 -> g W_1,  b_1 -> g b_1,  W_2 -> W_2 g^-1     where f(g y) = g f(y)

    What g may be follows from what stands between two maps, where that is known; activations are tried. All
    invertible matrices if there is nothing but pooling, permutations of channels, their scalings and signs otherwise;
    and with norms what these remove, and what they trade with the maps around them. Names of parameters are those of
    ``model.named_parameters()``. The function is that of evaluation mode, and the running statistics of norms are
    constants with the values they have now: channels whose statistics differ are not permuted. Behind a linear map
    the axis of features is the second one, as norms and softmax see it.

    skip : prefixes that are left alone;  approximate : with what holds up to the eps of a norm (exact, and always
    included, where that is 0)

    Parameters that are used in several places are left alone, and so is what is of another kind: modules with weights
    that are not in the list of `symgeo.models.chain`, convolutions in groups (but depthwise ones), LayerNorm over
    images. Not found are some directions where nothing nonlinear stands between two maps: what a narrower convolution
    does not see of another one; mixtures of channels around a BatchNorm; rows that read a GroupNorm of several groups
    or of an image; what a norm behind a widening linear map allows; the bias of a LayerNorm before maps without a bias
    that are at least as wide.

    >>> net = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> [(prefix, found)] = plain_symmetries(net)
    >>> found.tensors
    {'0.weight': '(h0 u0) _', '0.bias': '(h0 u0)', '2.weight': '_ (h0 u0*)'}
    """
    own = _own(model)
    found = []
    for prefix, modules in _Search(model, skip).containers(model):
        draft = Draft(split_chain(read_chain(modules, own)), prefix.removesuffix("."))
        for number, region in enumerate(regions(draft.chain)):
            write_region(draft, number, region, approximate)
        write_flows(draft)
        symmetry = draft.finish()
        if symmetry.groups or symmetry.shifts or symmetry.flows:
            found.append((prefix, symmetry))
    return found


def _own(model: nn.Module) -> dict[int, str]:
    """The names of the parameters that one module has and that stands in one place."""
    homes = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    places = Counter(id(child) for module in model.modules() for child in module._modules.values())
    shared = {id(p) for module in model.modules() if places[id(module)] > 1 for p in module._parameters.values()}
    return {id(p): name for name, p in model.named_parameters() if homes[id(p)] == 1 and id(p) not in shared}


class _Search:
    """Containers that lie in no other one, with everything that is called in them."""

    def __init__(self, model: nn.Module, skip: Collection[str]) -> None:
        self._left = tuple(f"{prefix.removesuffix('.')}." for prefix in skip)
        self._places = Counter(id(child) for module in model.modules() for child in module._modules.values())
        self._seen: set[int] = set()

    def containers(self, module: nn.Module, prefix: str = "") -> Iterator[tuple[str, list[nn.Module | None]]]:
        """Prefix and modules of each; None for those that are left alone."""
        if prefix.startswith(self._left) or id(module) in self._seen:
            return
        self._seen.add(id(module))
        if is_plain(module, (nn.Sequential,)):
            inside = list(self._flat(module, prefix))
            yield prefix, [None if f"{path}.".startswith(self._left) else child for path, child in inside]
        else:
            inside = [(f"{prefix}{name}", child) for name, child in module.named_children()]
        for path, child in inside:
            yield from self.containers(child, f"{path}.")

    def _flat(self, module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        """The modules of a container in the order of their calls; a container that stands in several places is one."""
        for name, child in module._modules.items():
            path = f"{prefix}{name}"
            single = self._places[id(child)] == 1 and not f"{path}.".startswith(self._left)
            if child is not None and is_plain(child, (nn.Sequential,)) and single:
                yield from self._flat(child, f"{path}.")
            elif child is not None:
                yield path, child
