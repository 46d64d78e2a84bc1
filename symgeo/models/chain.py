"""A chain of plain modules read as affine maps and what stands between them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from symgeo.models.structure import is_homogeneous, is_odd
from symgeo.symmetry.channels import Numbers

#: sizes at which an activation is tried
_SIZES = (1e-3, 1.0, 1e3, 1e6)
_DEGREES = (1, 2, 3)


@dataclass(frozen=True)
class Affine:
    """A map with learned weight: from all channels to all, or (``diagonal``) every channel by itself.

    axes : of the weight;  transposed : stored (in, out, ...);  channels : inputs and outputs
    pads : a constant image does not stay constant (zero padding);  pixels : entries of the input for every channel
    """

    weight: str
    bias: str | None
    axes: int
    channels: tuple[int, int]
    diagonal: bool = False
    transposed: bool = False
    pads: bool = False
    pixels: int = 1

    @property
    def absorbs(self) -> bool:
        """Whether its bias can take back a translation of its inputs."""
        return self.bias is not None and not self.pads


@dataclass(frozen=True)
class Fixed:
    """A map of every channel by itself, without weights (or with the slopes of PReLU).

    degree : f(s x) = s^degree f(x) for s > 0 (0: for none);  parity : f(-x) = parity f(x) (0: neither)
    shifts : f(x + t) = f(x) + t for a constant t;  mixes : it is linear, and the same for all channels
    """

    degree: int = 1
    parity: int = 1
    shifts: bool = True
    mixes: bool = True
    slopes: str | None = None


@dataclass(frozen=True)
class Constant:
    """scale x + offset for every channel: the running statistics of a norm."""

    scale: Numbers
    offset: Numbers

    @property
    def uniform(self) -> bool:
        """Whether it is the same for all channels."""
        return len(set(self.scale)) == len(set(self.offset)) == 1


@dataclass(frozen=True)
class Normaliser:
    """A norm without its learned part, which divides groups of channels by their size.

    rows : it acts on the features of one position, and not on an image as a whole;  centred : it removes the mean
    scale_free : its eps is 0;  divides : by a size at all (softmax only removes a mean)
    """

    groups: int
    rows: bool
    centred: bool = True
    scale_free: bool = False
    divides: bool = True


@dataclass(frozen=True)
class Cut:
    """Anything else, on both sides of which nothing moves."""


Item = Affine | Fixed | Constant | Normaliser | Cut

_IDENTITY = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_MAX_POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)
_MEANS = (
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.Upsample, nn.UpsamplingNearest2d,
    nn.UpsamplingBilinear2d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d,
    nn.ReplicationPad2d, nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d,
)
_ZEROS = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
_AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def is_plain(module: nn.Module, kinds: Iterable[type[nn.Module]]) -> bool:
    """Whether a module computes what one of these classes does: no subclass with a forward of its own."""
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)


@dataclass(frozen=True)
class State:
    """What flows between two modules: the number of channels and how they lie in a tensor.

    layout : "features" (last axis), "channels" (second axis, before pixels), "flat" (both in one), "" unknown
    """

    layout: str = ""
    channels: int = 0

    def fits(self, layout: str, channels: int) -> bool:
        """Whether what reads ``channels`` in this layout reads the channels that flow here."""
        if self.layout == "flat":
            return layout == "features" and channels % self.channels == 0
        return self.layout in ("", layout) and self.channels in (0, channels)


def read_chain(modules: Iterable[nn.Module | None], own: Mapping[int, str]) -> list[Item]:
    """The items of modules that are called one after the other; None is one that is left alone.

    ``own`` has the names of the parameters that nothing else uses, by ``id``.
    """
    items: list[Item] = []
    state = State()
    for module in modules:
        found = None if module is None else _read(module, state, own)
        if found is None:
            found = [Cut()], State() if module is None else _restart(module)
        new, state = found
        items += new
    return items


def _restart(module: nn.Module) -> State:
    """What is known behind a cut."""
    known: Any = module
    if is_plain(module, (nn.Linear,)):
        return State("features", known.out_features)
    return State("channels", known.out_channels) if is_plain(module, (*_CONVOLUTIONS, *_TRANSPOSED)) else State()


def _read(module: nn.Module, state: State, own: Mapping[int, str]) -> tuple[list[Item], State] | None:
    """The items of one module and what flows out of it; None if it is unknown or reads something else."""
    affine = _affine(module, own)
    if affine is not None:
        layout = "features" if isinstance(module, nn.Linear) else "channels"
        if not state.fits(layout, affine.channels[0]):
            # it is a beginning: what flows in is no channel of before
            return [Cut(), affine], State(layout, affine.channels[1])
        pixels = affine.channels[0] // state.channels if state.layout == "flat" else 1
        affine = replace(affine, pixels=pixels, channels=(affine.channels[0] // pixels, affine.channels[1]))
        return [affine], State(layout, affine.channels[1])
    norm = _norm(module, state, own)
    if norm is not None:
        return norm
    if isinstance(module, nn.Flatten) and is_plain(module, (nn.Flatten,)):
        return _flatten(module, state)
    if isinstance(module, nn.PReLU) and is_plain(module, (nn.PReLU,)):
        return _prelu(module, state, own)
    pool = _pool(module)
    if pool is not None:
        return ([pool], state) if state.layout in ("", "channels") else None
    if is_plain(module, (nn.Softmax, nn.LogSoftmax)):
        along = state.layout == "features" and module.dim in (-1, 1)
        return ([Normaliser(1, True, divides=False)], state) if along else None
    fixed = elementwise(module)
    return None if fixed is None else ([fixed], state)


def _names(module: nn.Module, own: Mapping[int, str]) -> tuple[str, str | None] | None:
    """The names of weight and bias, if they are parameters of this module alone."""
    weight, bias = (module._parameters.get(role) for role in ("weight", "bias"))
    if weight is None or id(weight) not in own or isinstance(weight, nn.parameter.UninitializedParameter):
        return None
    if bias is None:
        return own[id(weight)], None
    return (own[id(weight)], own[id(bias)]) if id(bias) in own else None


def _affine(module: nn.Module, own: Mapping[int, str]) -> Affine | None:
    """A linear map or a convolution."""
    if not is_plain(module, (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)) or (names := _names(module, own)) is None:
        return None
    if isinstance(module, nn.Linear):
        return Affine(*names, 2, (module.in_features, module.out_features))
    conv: Any = module
    channels = (conv.in_channels, conv.out_channels)
    transposed = isinstance(module, _TRANSPOSED)
    diagonal = conv.groups > 1 and conv.groups == channels[0] == channels[1] and not transposed
    if conv.groups > 1 and not diagonal:
        return None
    pads = transposed or (conv.padding_mode == "zeros" and conv.padding != "valid" and _nonzero(conv.padding))
    return Affine(*names, conv.weight.dim(), channels, diagonal, transposed, pads)


def _nonzero(padding: Any) -> bool:
    """Whether a padding (a number, one for each axis, or "same") adds anything."""
    return any(padding) if isinstance(padding, tuple) else bool(padding)


def _norm(module: nn.Module, state: State, own: Mapping[int, str]) -> tuple[list[Item], State] | None:
    """A norm: what it removes or the constants of its running statistics, then gain and bias."""
    found = _pure_norm(module, state)
    if found is None:
        return None
    pure, layout, channels = found
    if not state.fits(layout or state.layout, channels) or state.layout == "flat":
        return None
    after = State(state.layout or layout, channels)
    if all(p is None for p in module._parameters.values()):
        return [pure], after
    names = _names(module, own)
    return None if names is None else ([pure, Affine(*names, 1, (channels, channels), diagonal=True)], after)


def _pure_norm(module: nn.Module, state: State) -> tuple[Item, str, int] | None:
    """A norm without its learned part, the layout it needs ("" for any), and how many channels it has."""
    norm: Any = module
    features = state.layout == "features"
    if is_plain(module, (nn.LayerNorm, nn.RMSNorm)) and len(norm.normalized_shape) == 1:
        pure = Normaliser(1, True, isinstance(module, nn.LayerNorm), norm.eps == 0)
        return pure, "features", norm.normalized_shape[0]
    if is_plain(module, (nn.GroupNorm,)):
        return Normaliser(norm.num_groups, features, scale_free=norm.eps == 0), "", norm.num_channels
    if not is_plain(module, (*_BATCH, *_INSTANCE)):
        return None
    size = norm.num_features
    layout = "" if isinstance(module, nn.BatchNorm1d | nn.SyncBatchNorm) else "channels"
    if norm.running_mean is None or (isinstance(module, _INSTANCE) and not norm.track_running_stats):
        return Normaliser(size, False, scale_free=norm.eps == 0), layout, size
    if norm.running_mean.is_meta:
        return None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    offset = -norm.running_mean.double() * scale
    return Constant(tuple(scale.tolist()), tuple(offset.tolist())), layout, size


def _flatten(module: nn.Flatten, state: State) -> tuple[list[Item], State] | None:
    """An image becomes one axis (channel, pixel); vectors stay."""
    if module.end_dim != -1 or module.start_dim not in (1, 2):
        return None
    if module.start_dim == 1 and state.layout == "channels":
        state = replace(state, layout="flat")
    elif module.start_dim == 2 and state.layout != "channels":
        return None
    return [Fixed()], state


def _prelu(module: nn.PReLU, state: State, own: Mapping[int, str]) -> tuple[list[Item], State] | None:
    """A slope for all, or one for every channel."""
    if module.num_parameters == 1:
        return [Fixed(1, 0, False, False)], state
    slopes = own.get(id(module.weight))
    if slopes is None or state.layout == "flat" or state.channels != module.num_parameters:
        return None
    return [Fixed(1, 0, False, False, slopes)], state


def _pool(module: nn.Module) -> Fixed | None:
    """What acts on the pixels of every channel alike."""
    pool: Any = module
    if is_plain(module, _MAX_POOLS) and not pool.return_indices:
        return Fixed(parity=0, mixes=False)
    if is_plain(module, _MEANS):
        return Fixed()
    if is_plain(module, _ZEROS):
        return Fixed(shifts=False)
    if is_plain(module, _AVERAGES):
        padded = _nonzero(pool.padding) and pool.count_include_pad
        return Fixed(shifts=not padded and getattr(pool, "divisor_override", None) is None)
    return None


def elementwise(module: nn.Module) -> Fixed | None:
    """What an activation allows, decided by trying; None if it is no function of every number by itself."""
    if is_plain(module, _IDENTITY):
        return Fixed()
    if any(True for _ in module.parameters()) or any(True for _ in module.children()):
        return None
    twin = copy.deepcopy(module).eval()
    with torch.no_grad():
        try:
            return _tried(twin) if _acts_by_number(twin) else None
        except Exception:  # whatever it takes as input, it is no plain activation
            return None


def _acts_by_number(f: nn.Module) -> bool:
    """The same function of every number, wherever it stands."""
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(3, 5, 7, generator=generator, dtype=torch.float64)
    order = torch.randperm(x.numel(), generator=generator)
    y, shuffled = f(x.clone()), f(x.flatten()[order].reshape(x.shape))
    other = x.clone()
    other[0, 0, 0] += 1
    rest = f(other).flatten()[1:]
    same = y.shape == x.shape and torch.equal(shuffled.flatten(), y.flatten()[order])
    return bool(same and torch.equal(rest, y.flatten()[1:]) and y.isfinite().all())


def _tried(f: nn.Module) -> Fixed:
    """Degree and parity."""
    def at(size: float, degree: int) -> Callable[[Tensor], Tensor]:
        # homogeneous of degree 1 where f is of this degree
        return lambda x: f(size * x).sign() * (f(size * x).abs() ** (1 / degree) / size)

    x = torch.linspace(-3, 3, 25, dtype=torch.float64)
    if not bool(f(x.clone()).any()):
        return Fixed(0, 0, False, False)
    degrees = [k for k in _DEGREES if all(is_homogeneous(at(size, k)) for size in _SIZES)]
    odd, even = is_odd(at(1.0, 1)), bool(torch.allclose(f(x.clone()), f(-x), atol=1e-12))
    linear = odd and degrees == [1]
    same = linear and bool(torch.equal(f(x.clone()), x))
    return Fixed(degrees[0] if degrees else 0, 1 if odd else -1 if even else 0, same, linear)
