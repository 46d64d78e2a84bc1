"""A found symmetry as a person reads it: what each generator is, where, how much it explains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from symgeo.symmetry import Action, CheckReport

#: what the generators of symgeo.models are, by the beginning of their names; the first that fits
_MEANINGS = (
    ("key_shift", "key bias, which softmax does not see"), ("table_shift", "relative positions, by a constant"),
    ("router_shift", "router logits, by a constant"), ("value_bias", "value bias, output bias"),
    ("key_bias", "key bias, extra key"), ("gains", "gains of queries and keys"),
    ("final_norm", "bias of the last norm"), ("final", "gain of the last norm, head"), ("head", "rows of the head"),
    ("attention_norm_bias", "bias of a norm"), ("cross_norm_bias", "bias of a norm"),
    ("mlp_norm_bias", "bias of a norm"),
    ("entry_norm_bias", "bias of a norm"), ("entry_bias", "embeddings, biases"), ("entry_mean", "mean of the entry"),
    ("attention_mean", "mean of what attention writes"), ("cross_mean", "mean of what attention writes"),
    ("mlp_mean", "mean of what the MLP writes"), ("exit_mean", "mean of the exit"),
    ("mean_exchange", "mean, between writers"), ("write_exchange", "what parallel branches write"),
    ("exchange", "between embeddings"), ("tied_exchange", "between tied embeddings"),
    ("unread", "rows that nothing reads"),
    ("rotation", "rotations of the residual stream"), ("stream_scale", "scale of the residual stream"),
    ("embedding_scale", "scale of the embeddings"), ("wattention", "scale before a norm"),
    ("wmlp", "scale before a norm"),
    ("lattention", "layer scale"), ("lmlp", "layer scale"),
)
_LETTERS = {
    "H": "order of heads", "Hs": "order of heads", "K": "order of key heads", "G": "order of query heads",
    "e": "query-key", "p": "query-key, rotated part", "f": "value-output", "n": "gains of queries and keys",
    "m": "scale of queries", "h": "order of hidden units", "u": "scale of hidden units", "s": "sign of hidden units",
    "v": "scale of gates", "X": "order of experts", "c": "gain of a norm", "d": "gain of a norm", "g": "gain of a norm",
    "x": "scale before a norm", "y": "scale before a norm", "z": "scale before a norm", "r": "gauge of an adapter",
}
#: what a block of a parameter is drawn as: factors of its axes, the first that fits
KINDS = (
    ("query-key", ("e", "p", "a")), ("value-output", ("f",)), ("adapter gauge", ("r",)),
    ("hidden units", ("h", "u", "s", "v", "X")), ("heads", ("H", "K", "G", "Hs")),
    ("norms and their readers", ("c", "d", "g", "final", "x", "y", "z", "n", "m")),
)
OTHER, NONE = "shifts, compensations, rotations", "nothing acts"


@dataclass(frozen=True)
class Row:
    """One generator over all layers of a kind.

    where : the module, layers numbered by *;  what, kind : what it is and of which kind;  copies, dimension : over all
    layers;  share : dimension over the number of all parameters;  invariance : the relative change of the output
    exact : False for what holds only up to the eps of a norm
    """

    where: str
    what: str
    name: str
    kind: str
    copies: int
    dimension: int
    share: float
    invariance: float
    exact: bool


def rows(report: CheckReport, parameters: int, exact: set[str] | None = None) -> list[Row]:
    """The rows of a check, explained; ``exact`` names the generators that hold exactly (all if None)."""
    result = []
    for row in report.groups:
        base, _, scope = row.name.rstrip("]").partition("[")
        result.append(Row(scope or "model", meaning(base), row.name, row.kind, row.copies, row.dimension,
                          row.dimension / max(parameters, 1), row.invariance, exact is None or row.name in exact))
    return result


def meaning(base: str) -> str:
    """What a generator of this name is; the name itself if it is none of ours.

    >>> meaning("e"), meaning("query_rows"), meaning("mine")
    ('query-key', 'rows that read a LayerNorm', 'mine')
    """
    stem = base.removesuffix("_cross")
    if stem in _LETTERS:
        return _LETTERS[stem]
    if stem.endswith("_rows"):
        return "rows that read a LayerNorm"
    return next((text for start, text in _MEANINGS if stem.startswith(start)), _numbered(stem))


def _numbered(stem: str) -> str:
    letter = stem.rstrip("0123456789")
    return _LETTERS.get(letter, stem)


def table(rows: list[Row]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Header and cells."""
    header = ["where", "what", "group", "copies", "dimension", "share", "change of output", ""]
    return header, [(row.where, row.what, row.kind, str(row.copies), str(row.dimension), f"{row.share:.2%}",
                     f"{row.invariance:.0e}", "" if row.exact else "approximate") for row in rows]


def block_kinds(action: Action, params: Mapping[str, Tensor]) -> list[tuple[str, list[tuple[str, int]]]]:
    """For every parameter the kind and the number of entries of each of its blocks, in order."""
    touched = {name for shift in action.shifts.values() for name in shift.layouts}
    touched |= {name for flow in action.flows.values() for name in flow.moves}
    factors: dict[tuple[str, int], set[str]] = {}
    for name in action.groups:
        for block in action.blocks(name):
            factors.setdefault((block.parameter, block.index), set()).add(name.partition("[")[0].removesuffix("_cross"))
    result = []
    for name, p in params.items():
        fallback = OTHER if name in touched else NONE
        pieces = action.split({**params})[name] if name in action.layouts else [p]
        result.append((name, [(_kind(factors.get((name, i), set()), fallback), piece.numel())
                              for i, piece in enumerate(pieces)]))
    return result


def _kind(names: set[str], fallback: str) -> str:
    stems = names | {name.rstrip("0123456789") for name in names}
    return next((kind for kind, letters in KINDS if stems & set(letters)), fallback)
