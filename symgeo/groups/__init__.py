"""Groups that act on one axis of a tensor: a few facts each, the rest is derived."""

from symgeo.groups.base import Group
from symgeo.groups.cyclic import Cyclic
from symgeo.groups.diagonal import PositiveScaling, SignFlip
from symgeo.groups.linear import GeneralLinear, Orthogonal
from symgeo.groups.permutation import Permutation
from symgeo.groups.rotary import Rotary

__all__ = ["Cyclic", "GeneralLinear", "Group", "Orthogonal", "Permutation", "PositiveScaling", "Rotary", "SignFlip"]

#: groups whose class alone says which elements they have
KNOWN = (Cyclic, GeneralLinear, Orthogonal, Permutation, PositiveScaling, Rotary, SignFlip)
