"""Patterns, sizes, and the blocks they cut tensors into."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from symgeo.errors import SymmetryError
from symgeo.groups import GeneralLinear, Rotary
from symgeo.symmetry import Dim, Symmetry, assemble, parse, split
from symgeo.symmetry.bind import bind_layouts
from symgeo.symmetry.layout import block_dims, size
from symgeo.symmetry.pattern import (
    Constant,
    Factor,
    Free,
    Leaf,
    Pattern,
    Product,
    Sum,
    Tree,
    Zero,
    map_leaves,
)

NAMES = st.sampled_from(["h", "H", "e", "_x", "head2", "e[layers.*]", "d[vision.encoder]"])
LEAVES: st.SearchStrategy[Leaf] = st.one_of(
    st.just(Free()), st.just(Constant()), st.just(Zero()), st.builds(Factor, NAMES, st.booleans())
)


def texts(depth: int) -> st.SearchStrategy[str]:
    """Axes as a user might write them, with superfluous parentheses."""
    if depth == 0:
        return LEAVES.map(str)
    product = st.lists(texts(depth - 1), min_size=1, max_size=3).map(" ".join)
    total = st.lists(product, min_size=1, max_size=3).map(lambda terms: f"({' + '.join(terms)})")
    return LEAVES.map(str) | total


PATTERNS = st.lists(texts(3), max_size=3).map(lambda axes: parse(" ".join(axes), shift=True))


@settings(deadline=None, max_examples=100)
@given(PATTERNS)
def test_rendering_and_parsing_are_inverse(pattern: Pattern) -> None:
    assert parse(str(pattern), shift=True) == pattern
    assert parse(str(pattern).replace(" ", "  ").replace("(", "( "), shift=True) == pattern


def test_structure() -> None:
    e, dual, f, heads = Factor("e"), Factor("e", dual=True), Factor("f"), Factor("H")
    assert parse("(H (e* + e + f)) _").axes == (Product((heads, Sum((dual, e, f)))), Free())
    assert parse("(H e* + f)").axes == (Sum((Product((heads, dual)), f)),)
    assert parse("((h))") == parse("h") and parse("(e + (f + H))") == parse("(e + f + H)")
    assert parse("").axes == ()
    assert parse("_ (H e* + H f)").names() == ["H", "e", "f"]


@pytest.mark.parametrize(
    ("text", "reason", "column"),
    [
        ("(h s", "expected '\\)'", 4),
        ("h )", "unexpected '\\)'", 2),
        ("h + e", "unexpected '\\+'", 2),
        ("(h + )", "expected a name", 5),
        ("()", "expected a name", 1),
        ("h _*", "`_` has no dual", 2),
        ("h 1", "`1` belongs to shifts", 2),
        ("h ,", "unexpected character ','", 2),
        ("(h s)*", "unexpected character '\\*'", 5),
    ],
)
def test_mistakes_are_shown_where_they_are(text: str, reason: str, column: int) -> None:
    with pytest.raises(SymmetryError, match=reason) as caught:
        parse(text)
    lines = str(caught.value).splitlines()
    assert lines[1] == f"  {text}" and lines[2].index("^") == column + 2


def sized(tree: Tree[Leaf], lengths: st.DataObject, axis: int) -> Tree[Dim]:
    return map_leaves(tree, lambda leaf: Dim(None, False, lengths.draw(st.integers(1, 3)), axis))


@settings(deadline=None, max_examples=50)
@given(PATTERNS, st.data())
def test_split_and_assemble_are_inverse(pattern: Pattern, data: st.DataObject) -> None:
    layout = tuple(sized(node, data, axis) for axis, node in enumerate(pattern.axes))
    shape = [size(node) for node in layout]
    assume(prod(shape) <= 10**5)
    x = torch.arange(prod(shape)).reshape(shape)
    blocks = split(layout, x)
    assert [tuple(block.shape) for block in blocks] == [
        tuple(dim.size for dim in dims) for dims in block_dims(layout)
    ]
    assert all(block.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for block in blocks)
    assert torch.equal(assemble(layout, blocks), x)


def test_interleaved_slices() -> None:
    _, layouts = bind_layouts({"w": parse("(H (e + f)) _")}, {"w": (10, 3)}, {}, {"H": 2, "e": 2})
    x = torch.arange(30).reshape(10, 3)
    e, f = split(layouts["w"], x)
    assert torch.equal(e[1], x[5:7]) and torch.equal(f[1], x[7:10])


def test_sizes_are_solved_from_several_tensors() -> None:
    patterns = {
        "qkv": parse("_ (H e* + H e + H f)"),
        "out": parse("(H f*) _"),
        "square": parse("(k k) (k + _)"),
    }
    shapes = {"qkv": (7, 3 * (5 + 5 + 2)), "out": (6, 7), "square": (9, 11)}
    sizes, layouts = bind_layouts(patterns, shapes, {}, {"H": 3})
    assert sizes == {"H": 3, "e": 5, "f": 2, "k": 3}
    assert [dim.size for dim in block_dims(layouts["square"])[1]] == [3, 3, 8]


def bind(tensors: dict[str, str], shapes: dict[str, tuple[int, ...]], **options: object) -> None:
    groups = options.pop("groups", {})
    params = {name: torch.zeros(shape) for name, shape in shapes.items()}
    Symmetry(tensors, groups, **options).bind(params)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tensors", "shapes", "options", "message"),
    [
        (
            {"w": "(H e) _"},
            {"w": (6, 5)},
            {},
            r"'w'.*'\(H e\) _'.*axis 0.*H, e.*ambiguous.*length 6.*sizes=\{",
        ),
        ({"w": "(_ + _)"}, {"w": (6,)}, {}, r"'w'.*`_`, `_` are ambiguous.*name the slices"),
        (
            {"w": "h _", "v": "_ h*"},
            {"w": (7, 5), "v": (3, 11)},
            {},
            r"'v'.*'_ h\*'.*length 11.*gives 7.*h = 7",
        ),
        ({"w": "(H e) _"}, {"w": (7, 5)}, {"sizes": {"H": 3}}, r"'w'.*length 7.*no whole number e.*H = 3"),
        ({"w": "(H + e)"}, {"w": (7,)}, {"sizes": {"H": 9}}, r"'w'.*length 7.*no whole number e.*H = 9"),
        ({"w": "h"}, {"w": (7, 5)}, {}, r"'w'.*'h' has 1 axes.*has 2 \(shape \(7, 5\)\)"),
        (
            {"wieght": "h _"},
            {"weight": (7, 5)},
            {},
            r"'wieght'.*'h _'.*not among the 1 .*close names: 'weight'",
        ),
        (
            {"w": "r _"},
            {"w": (7, 5)},
            {"groups": {"r": Rotary()}},
            r"'w'.*Rotary on r.*multiple of 2; found 7",
        ),
        (
            {"w": "e _"},
            {"w": (7, 5)},
            {"groups": {"e": GeneralLinear(per="H")}},
            "'e' is per 'H', but no pattern has",
        ),
    ],
)
def test_errors_name_the_parameter_and_the_lengths(
    tensors: dict[str, str], shapes: dict[str, tuple[int, ...]], options: dict[str, object], message: str
) -> None:
    with pytest.raises(SymmetryError, match=message):
        bind(tensors, shapes, **options)
