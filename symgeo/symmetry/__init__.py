"""The declaration language: patterns, sizes, actions and their check."""

from symgeo.symmetry.action import Action
from symgeo.symmetry.blocks import Block
from symgeo.symmetry.check import CheckReport, GroupReport, check
from symgeo.symmetry.dimension import vertical_dimension
from symgeo.symmetry.element import Element
from symgeo.symmetry.flow import Compensation, Flow, MeanWrite, RowFreedom, Shear
from symgeo.symmetry.layout import Dim, assemble, split
from symgeo.symmetry.norm_bias import NormBias
from symgeo.symmetry.pattern import Pattern, parse
from symgeo.symmetry.reader import Reader, Span
from symgeo.symmetry.spec import Symmetry
from symgeo.symmetry.stream import Axis, OffsetTrade, StreamRotation, StreamScale
from symgeo.symmetry.tied import TiedExchange, Unread

__all__ = [
    "Action",
    "Axis",
    "Block",
    "CheckReport",
    "Compensation",
    "Dim",
    "Element",
    "Flow",
    "GroupReport",
    "MeanWrite",
    "NormBias",
    "OffsetTrade",
    "Pattern",
    "Reader",
    "RowFreedom",
    "Shear",
    "Span",
    "StreamRotation",
    "StreamScale",
    "Symmetry",
    "TiedExchange",
    "Unread",
    "assemble",
    "check",
    "parse",
    "split",
    "vertical_dimension",
]
