"""Every declaration of the notation, on networks written out in a few lines, each with a broken twin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from symgeo.errors import SymmetryError
from symgeo.groups import GeneralLinear, Group, Orthogonal, Permutation, PositiveScaling, Rotary, SignFlip
from symgeo.symmetry import Action, Element, Symmetry, check

Params = Mapping[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    """A network, its declaration, and one that must fail."""

    name: str
    shapes: Shapes
    f: Callable[[Params], Tensor]
    symmetry: Symmetry
    broken: Symmetry
    dimension: int

    def params(self, seed: int = 0) -> dict[str, Tensor]:
        return {name: normal(*shape, seed=seed + i) for i, (name, shape) in enumerate(self.shapes.items())}

    def bind(self) -> Action:
        return self.symmetry.bind(self.params())

    def __str__(self) -> str:
        return self.name


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=drawn(seed), dtype=torch.float64)


def close(a: Params, b: Params, tolerance: float = 1e-12) -> bool:
    assert a.keys() == b.keys()
    return all(bool((a[k] - b[k]).abs().max() <= tolerance * (1 + b[k].abs().max())) for k in a)


def perceptron(activation: Callable[[Tensor], Tensor]) -> Callable[[Params], Tensor]:
    x = normal(13, 3, seed=100)

    def f(p: Params) -> Tensor:
        return activation(x @ p["0.weight"].mT + p["0.bias"]) @ p["2.weight"].mT

    return f


def mlp(
    name: str,
    activation: Callable[[Tensor], Tensor],
    h: str,
    groups: dict[str, Group],
    dimension: int,
    broken: Symmetry | None = None,
) -> Case:
    dual = " ".join(f"{factor}*" for factor in h.strip("()").split())
    tensors = {"0.weight": f"{h} _", "0.bias": h, "2.weight": f"_ ({dual})"}
    half = Symmetry({key: tensors[key] for key in ("0.weight", "0.bias")}, groups)
    shapes: Shapes = {"0.weight": (7, 3), "0.bias": (7,), "2.weight": (5, 7)}
    return Case(name, shapes, perceptron(activation), Symmetry(tensors, groups), broken or half, dimension)


def on_gelu() -> Symmetry:
    tensors = {"0.weight": "(h s) _", "0.bias": "(h s)", "2.weight": "_ (h* s*)"}
    return Symmetry(tensors, {"h": Permutation(), "s": SignFlip(per="h")})


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).movedim(-2, 0)  # (count, time, size)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    later = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
    return (q @ k.mT).masked_fill(later, -torch.inf).softmax(-1) @ v


def gpt2(interleaved: bool = False) -> Case:
    x, wide, count, e, f = normal(6, 7, seed=100), 7, 3, 5, 2

    def slices(p: Params) -> list[Tensor]:
        qkv = x @ p["c_attn.weight"] + p["c_attn.bias"]
        if interleaved:
            return list(heads(qkv, count).split([e, e, f], dim=-1))
        return [heads(part, count) for part in qkv.split([count * e, count * e, count * f], dim=-1)]

    def block(p: Params) -> Tensor:
        return attention(*slices(p)).movedim(0, -2).flatten(-2) @ p["c_proj.weight"] + p["c_proj.bias"]

    def declared(qkv: str, out: str) -> Symmetry:
        tensors = {"c_attn.weight": f"_ {qkv}", "c_attn.bias": qkv, "c_proj.weight": f"{out} _"}
        groups = {"H": Permutation(), "e": GeneralLinear(per="H"), "f": GeneralLinear(per="H")}
        return Symmetry(tensors, groups, {"H": count})

    shapes: Shapes = {
        "c_attn.weight": (wide, count * (e + e + f)),
        "c_attn.bias": (count * (e + e + f),),
        "c_proj.weight": (count * f, wide),
        "c_proj.bias": (wide,),
    }
    qkv = "(H (e* + e + f))" if interleaved else "(H e* + H e + H f)"
    good, broken = declared(qkv, "(H f*)"), declared(qkv.replace("e*", "e"), "(H f*)")
    name = "interleaved attention" if interleaved else "fused attention"
    return Case(name, shapes, block, good, broken, count * (e * e + f * f))


def rope(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(x.shape[-2]), torch.tensor([1.0, 0.3])[:half]).to(x)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


def llama() -> Case:
    """Grouped-query attention with rotary heads, then SwiGLU, between norms without gains."""
    kv, queries, e, f, d, h = 2, 3, 4, 5, 11, 13
    tokens = torch.tensor([1, 4, 2, 2, 0, 3])

    def norm(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    def model(p: Params) -> Tensor:
        x = p["embed"][tokens]
        y = norm(x)
        q = rope((y @ p["q"].mT).unflatten(-1, (kv, queries, e)).permute(1, 2, 0, 3))
        k = rope(heads(y @ p["k"].mT, kv)).unsqueeze(1)
        v = heads(y @ p["v"].mT, kv).unsqueeze(1)
        x = x + attention(q, k, v).permute(2, 0, 1, 3).flatten(-3) @ p["o"].mT
        y = norm(x)
        x = x + (F.silu(y @ p["gate"].mT) * (y @ p["up"].mT)) @ p["down"].mT
        return norm(x) @ p["head"].mT

    def declared(e_group: Group) -> Symmetry:
        tensors = {
            "embed": "_ d",
            "q": "(K G e*) d",
            "k": "(K e) d",
            "v": "(K f) d",
            "o": "d (K G f*)",
            "gate": "h d",
            "up": "(h u) d",
            "down": "d (h u*)",
            "head": "_ d",
        }
        groups = {
            "K": Permutation(),
            "G": Permutation(per="K"),
            "e": e_group,
            "f": GeneralLinear(per="K"),
            "h": Permutation(),
            "u": PositiveScaling(per="h"),
            "d": Orthogonal(),
        }
        return Symmetry(tensors, groups, {"K": kv})

    shapes: Shapes = {
        "embed": (5, d),
        "q": (kv * queries * e, d),
        "k": (kv * e, d),
        "v": (kv * f, d),
        "o": (d, kv * queries * f),
        "gate": (h, d),
        "up": (h, d),
        "down": (d, h),
        "head": (5, d),
    }
    dimension = kv * e + kv * f * f + h + d * (d - 1) // 2
    good, broken = declared(Rotary(per="K")), declared(GeneralLinear(per="K"))
    return Case("grouped-query attention", shapes, model, good, broken, dimension)


def lora() -> Case:
    groups = {"r": GeneralLinear()}
    good, broken = Symmetry({"B": "_ r", "A": "r* _"}, groups), Symmetry({"B": "_ r", "A": "r _"}, groups)
    return Case("LoRA", {"B": (7, 3), "A": (3, 5)}, lambda p: p["B"] @ p["A"], good, broken, 9)


def softmax_shift() -> Case:
    x = normal(13, 3, seed=100)

    def f(p: Params) -> Tensor:
        return (x @ p["weight"].mT + p["bias"]).softmax(-1)

    good = Symmetry({}, {}, shifts={"logits": {"weight": "1 _", "bias": "1"}})
    broken = Symmetry({}, {}, shifts={"logits": {"weight": "_ 1", "bias": "1"}})
    return Case("softmax shift", {"weight": (7, 3), "bias": (7,)}, f, good, broken, 4)


def diagonal_net() -> Case:
    def declared(h: str, sizes: dict[str, int]) -> Symmetry:
        return Symmetry({"u": "(h e)", "v": h}, {"e": GeneralLinear(per="h")}, sizes)

    good, broken = declared("(h e*)", {"e": 1}), declared("(h e)", {"e": 1})
    return Case("diagonal net", {"u": (7,), "v": (7,)}, lambda p: p["u"] * p["v"], good, broken, 7)


def nested_wreath() -> Case:
    """Heads of tanh units with signs, a query matrix inside, and a shift of the mean-free outputs."""
    x = normal(13, 3, seed=100)

    def f(p: Params) -> Tensor:
        y = (x @ p["in"].mT + p["in.bias"]).unflatten(-1, (3, 5)).tanh()
        z = torch.einsum("thi,hij,thj->th", y, p["core"], y).flatten()
        out = y.flatten(-2) @ p["out"].mT + p["out.bias"]
        return torch.cat([(out - out.mean(-1, keepdim=True)).flatten(), z.sort().values])

    def declared(core: str) -> Symmetry:
        tensors = {"in": "(H h s) _", "in.bias": "(H h s)", "core": core, "out": "_ (H h* s*)"}
        groups = {"H": Permutation(), "h": Permutation(per="H"), "s": SignFlip(per="h")}
        shifts = {"mean": {"out": "1 _", "out.bias": "1"}}
        return Symmetry(tensors, groups, {"H": 3}, shifts)

    shapes: Shapes = {"in": (15, 3), "in.bias": (15,), "core": (3, 5, 5), "out": (7, 15), "out.bias": (7,)}
    return Case("nested wreath", shapes, f, declared("H (h* s*) (h* s*)"), declared("H (h* s*) _"), 16)


def built() -> list[Case]:
    h: dict[str, Group] = {"h": Permutation()}
    scaled: dict[str, Group] = h | {"s": PositiveScaling(per="h")}
    signed: dict[str, Group] = h | {"s": SignFlip(per="h")}
    return [
        mlp("GELU", F.gelu, "h", h, 0),
        mlp("tanh", torch.tanh, "(h s)", signed, 0),
        mlp("ReLU", torch.relu, "(h s)", scaled, 7, broken=on_gelu()),
        gpt2(),
        gpt2(interleaved=True),
        llama(),
        lora(),
        softmax_shift(),
        diagonal_net(),
        nested_wreath(),
    ]


CASES = built()
cases = pytest.mark.parametrize("case", CASES, ids=str)


@cases
def test_the_network_does_not_change_and_the_parameters_do(case: Case) -> None:
    report = check(case.symmetry, case.f, case.params(), generator=drawn(3))
    assert report.ok and report.invariance < 1e-11 and report.moved > 1e-2, str(report)
    assert all(row.invariance < 1e-11 and row.moved > 1e-3 for row in report.groups), str(report)


@cases
def test_the_broken_twin_fails(case: Case) -> None:
    report = check(case.broken, case.f, case.params(), generator=drawn(3))
    assert not report.ok and report.invariance > 1e-3 and report.moved > 1e-3, str(report)


@cases
def test_composition_and_inverse(case: Case) -> None:
    action, p = case.bind(), case.params()
    g, h, k = (action.random(drawn(seed)) for seed in (1, 2, 3))
    assert close(action.act(action.compose(g, h), p), action.act(g, action.act(h, p)))
    assert close(action.act(action.inverse(g), action.act(g, p)), p)
    assert close(action.act(action.identity(), p), p, 0)
    left, right = action.compose(action.compose(g, h), k), action.compose(g, action.compose(h, k))
    assert all(torch.allclose(left[name], right[name], atol=1e-9) for name in left)
    one = action.compose(action.inverse(g), g)
    assert all(torch.allclose(one[name], x, atol=1e-12) for name, x in action.identity().items())
    assert (
        not close(action.act(action.compose(g, h), p), action.act(action.compose(h, g), p), 1e-3)
        or len(g) == 1
    )


@cases
def test_vertical_is_the_derivative_of_the_action(case: Case) -> None:
    action, p = case.bind(), case.params()
    xi, one = action.random_algebra(drawn(1)), action.identity()

    def curve(t: float | Tensor) -> dict[str, Tensor]:
        return action.act(Element({name: one[name] + t * xi[name] for name in xi}), p)

    step = 1e-6
    ahead, behind = curve(step), curve(-step)
    slopes = {name: (ahead[name] - behind[name]) / (2 * step) for name in p}
    velocity = action.vertical(xi, p)
    assert close(velocity, slopes, 1e-7)
    start, rate = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    assert close(velocity, torch.func.jvp(curve, (start,), (rate,))[1])
    assert any(bool(x.any()) for x in velocity.values()) == bool(xi)


@cases
def test_dimension_is_the_rank_of_the_orbit_map(case: Case) -> None:
    action, p = case.bind(), case.params()
    xi = action.random_algebra(drawn(1))
    names, sizes = (
        list(xi),
        [torch.view_as_real(x).numel() if x.is_complex() else x.numel() for x in xi.values()],
    )

    def orbit(flat: Tensor) -> Tensor:
        parts = {}
        for name, chunk in zip(names, flat.split(sizes)):
            like = xi[name]
            parts[name] = (
                torch.view_as_complex(chunk.reshape(-1, 2)).reshape(like.shape)
                if like.is_complex()
                else chunk.reshape(like.shape)
            )
            if isinstance(action.groups.get(name), Orthogonal):
                parts[name] = parts[name] - parts[name].mT
        return torch.cat([x.flatten() for x in action.vertical(Element(parts), p).values()])

    flat = torch.zeros(sum(sizes), dtype=torch.float64)
    rank = int(torch.linalg.matrix_rank(torch.func.jacfwd(orbit)(flat))) if sizes else 0
    assert case.symmetry.dimension(p) == rank == case.dimension


def test_dimension_at_degenerate_points_and_beyond_the_exact_range(monkeypatch: pytest.MonkeyPatch) -> None:
    case = lora()
    p = case.params()
    p["B"][:, 0] = p["B"][:, 1]
    assert case.symmetry.dimension(p) == 9
    p["A"][0] = p["A"][1]
    assert case.symmetry.dimension(p) == 8
    dense = llama()
    monkeypatch.setattr("symgeo.symmetry.dimension._MAX_ALGEBRA", 1)
    assert dense.symmetry.dimension(dense.params()) == dense.dimension


def test_an_element_is_one_matrix_on_all_parameters() -> None:
    """Against explicit dense matrices: heads A_i on their rows, then the permutation of the heads."""
    symmetry = Symmetry({"w": "(H e) _"}, {"H": Permutation(), "e": GeneralLinear(per="H")}, {"H": 3})
    w = normal(6, 5)
    action = symmetry.bind({"w": w})
    g, h = action.random(drawn(1)), action.random(drawn(2))

    def dense(element: Element) -> Tensor:
        inner = torch.block_diag(*element["e"])
        outer = torch.kron(torch.eye(3, dtype=torch.float64)[element["H"]], torch.eye(2, dtype=torch.float64))
        return outer @ inner

    def jacobian(element: Element) -> Tensor:
        full = torch.func.jacrev(lambda x: action.act(element, {"w": x})["w"])(w)
        return full[:, 0, :, 0]

    torch.testing.assert_close(jacobian(g), dense(g))
    torch.testing.assert_close(dense(action.compose(g, h)), dense(g) @ dense(h))
    torch.testing.assert_close(dense(action.inverse(g)), torch.linalg.inv(dense(g)))


def test_relu_scaling_fails_on_gelu() -> None:
    case = next(case for case in CASES if case.name == "ReLU")
    assert check(case.symmetry, perceptron(F.gelu), case.params(), generator=drawn(0)).invariance > 1e-3


def test_act_keeps_dtype_and_passes_untouched_tensors_on() -> None:
    case = gpt2()
    action = case.bind()
    for dtype in (torch.float32, torch.bfloat16):
        p = {name: x.to(dtype) for name, x in case.params().items()} | {"other": torch.arange(3)}
        moved = action.act(action.random(drawn(0)), p)
        assert moved["other"] is p["other"] and moved["c_proj.bias"] is p["c_proj.bias"]
        assert {name: x.dtype for name, x in moved.items()} == {name: x.dtype for name, x in p.items()}
    assert not action.vertical(action.random_algebra(drawn(0)), p)["other"].any()
    single = {name: x.float() for name, x in case.params().items()}
    assert check(case.symmetry, lambda p: lift(case, p), single, generator=drawn(0)).ok


def lift(case: Case, p: Params) -> Tensor:
    return case.f({name: x.double() for name, x in p.items()})


def test_act_inside_transforms() -> None:
    case = llama()
    action, p = case.bind(), case.params()
    g = action.random(drawn(0))
    stacked = {name: torch.stack([x, 2 * x]) for name, x in p.items()}
    out = torch.func.vmap(lambda q: action.act(g, q))(stacked)
    assert close(
        {name: x[1] for name, x in out.items()}, action.act(g, {name: 2 * x for name, x in p.items()})
    )
    e = g["e"].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(action.act(Element({"e": e}), p)["k"].sum(), e)
    assert gradient.shape == e.shape


def test_blocks_and_stacks() -> None:
    case = gpt2()
    action, p = case.bind(), case.params()
    blocks = action.blocks("e")
    assert [(b.parameter, b.index, b.dual) for b in blocks] == [
        ("c_attn.weight", 0, True),
        ("c_attn.weight", 1, False),
        ("c_attn.bias", 0, True),
        ("c_attn.bias", 1, False),
    ]
    plain, dual = action.stack("e", p)
    assert plain.shape == dual.shape == (3, 8, 5)
    view = action.split(p)["c_attn.weight"][1]
    assert torch.equal(blocks[1].restore(blocks[1].rows(view)), view)
    torch.testing.assert_close(plain[:, :7], view.movedim(1, 0))
    assert close(action.assemble(action.split(p)), {name: p[name] for name in action.layouts}, 0)
    with pytest.raises(SymmetryError, match=r"no group 'x' acts here; the groups are H, e, f"):
        action.blocks("x")


def layers(count: int) -> tuple[Symmetry, dict[str, Tensor]]:
    base = gpt2()
    params = {f"layers.{i}.attn.{k}": x for i in range(count) for k, x in base.params(10 * i).items()}
    return base.symmetry.each("attn").each("layers.*"), params


def test_each_match_has_its_own_elements() -> None:
    symmetry, params = layers(3)
    assert set(symmetry.groups) == {f"{name}[layers.*.attn]" for name in "Hef"}
    action = symmetry.bind(params)
    assert action.groups["e[layers.1.attn]"] == GeneralLinear(per="H[layers.1.attn]")
    assert symmetry.dimension(params) == 3 * gpt2().dimension
    moved = action.act(Element({"e[layers.1.attn]": action.random(drawn(0))["e[layers.1.attn]"]}), params)
    changed = {name for name in params if not torch.equal(moved[name], params[name])}
    assert changed == {"layers.1.attn.c_attn.weight", "layers.1.attn.c_attn.bias"}

    def f(p: Params) -> Tensor:
        return torch.cat([gpt2().f({k: p[f"layers.{i}.attn.{k}"] for k in gpt2().shapes}) for i in range(3)])

    report = check(symmetry, f, params, generator=drawn(0))
    assert report.ok and [(row.name, row.copies) for row in report.groups] == [
        ("H[layers.*.attn]", 3),
        ("e[layers.*.attn]", 9),
        ("f[layers.*.attn]", 9),
    ]


def test_each_with_a_shared_name_and_shifts() -> None:
    base = Symmetry(
        {"in": "h d", "out": "d h*"},
        {"h": PositiveScaling(), "d": Orthogonal()},
        {"h": 5},
        {"c": {"bias": "1"}},
    )
    symmetry = base.each("layers.*", shared=("d",)) | Symmetry({"embed": "_ d"}, {"d": Orthogonal()})
    shapes = {"in": (5, 7), "out": (7, 5), "bias": (7,)}
    params = {f"layers.{i}.{k}": normal(*shape, seed=i) for i in range(2) for k, shape in shapes.items()}
    action = symmetry.bind(params | {"embed": normal(11, 7)})
    assert set(action.groups) == {"h[layers.0]", "h[layers.1]", "d"}
    assert set(action.shifts) == {"c[layers.0]", "c[layers.1]"}
    assert action.sizes["h[layers.1]"] == 5
    with pytest.raises(SymmetryError, match=r"'e' is shared, so 'H'"):
        gpt2().symmetry.each("layers.*", shared=("e",))
    nested = base.each("blocks.*", shared=("d",)).each("stages.*")
    assert set(nested.groups) == {"h[stages.*.blocks.*]", "d[stages.*]"}
    deep = {f"stages.{j}.blocks{k.removeprefix('layers')}": x for j in "ab" for k, x in params.items()}
    assert set(nested.bind(deep).groups) == {
        "d[stages.a]",
        "d[stages.b]",
        *(f"h[stages.{j}.blocks.{i}]" for j in "ab" for i in "01"),
    }


def test_each_names_what_is_missing() -> None:
    symmetry, params = layers(2)
    del params["layers.1.attn.c_proj.weight"]
    with pytest.raises(SymmetryError, match=r"'layers.1.attn.c_proj.weight'.*'layers.\*.attn' needs it"):
        symmetry.bind(params)
    with pytest.raises(SymmetryError, match=r"each\('blocks.\*'\): no parameter begins with 'blocks\.\*\.'"):
        lora().symmetry.each("blocks.*").bind(params)
    with pytest.raises(SymmetryError, match=r"is no prefix"):
        lora().symmetry.each("layers..x")


def test_union() -> None:
    rows = Symmetry({"w": "h _"}, {"h": Permutation()})
    columns = Symmetry({"w": "_ d", "v": "d"}, {"d": Orthogonal()}, {"d": 5})
    both = rows | columns
    assert both.tensors == {"w": "h d", "v": "d"} and both.orthogonal and both.sizes == {"d": 5}
    assert (rows | rows) == rows
    with pytest.raises(SymmetryError, match=r"'w' is declared twice, as 'h _' and as 'k _'"):
        rows | Symmetry({"w": "k _"}, {})
    with pytest.raises(SymmetryError, match=r"group 'h' is Permutation\(.*Orthogonal\("):
        rows | Symmetry({"x": "h"}, {"h": Orthogonal()})
    with pytest.raises(SymmetryError, match=r"size 'd' is 5 .* and 7 on the other"):
        columns | Symmetry({"w": "_ d"}, {}, {"d": 7})
    assert not lora().symmetry.orthogonal and not softmax_shift().symmetry.orthogonal


def test_frozen_parameters_stay() -> None:
    case = gpt2()
    s = case.symmetry
    frozen = Symmetry(s.tensors, s.groups, s.sizes, frozen={"c_proj.weight"})
    action, p = frozen.bind(case.params()), case.params()
    assert list(action.groups) == ["e"] and frozen.dimension(p) == 3 * 25
    assert check(frozen, case.f, p, generator=drawn(0)).ok
    assert action.act(action.random(drawn(0)), p)["c_proj.weight"] is p["c_proj.weight"]
    shift = softmax_shift()
    half = Symmetry({}, {}, shifts=shift.symmetry.shifts, frozen={"bias"})
    assert half.dimension(shift.params()) == 0
    twins = Symmetry(s.tensors, s.groups, s.sizes, frozen={"c_proj.weight"}).each("layers.*")
    many = {f"layers.{i}.{k}": x for i in range(2) for k, x in p.items()}
    assert list(twins.bind(many).groups) == ["e[layers.0]", "e[layers.1]"]


def test_shift_of_one_slice_of_a_fused_bias() -> None:
    """Keys may be shifted by a constant: softmax does not see it."""
    case = gpt2()
    keys = {"keys": {"c_attn.bias": "(_ + 0 + 0)"}}
    s = case.symmetry
    with pytest.raises(SymmetryError, match=r"ambiguous"):
        Symmetry({}, {}, shifts=keys).bind(case.params())

    wrong = Symmetry(s.tensors, s.groups, s.sizes, keys)
    assert wrong.bind(case.params()).shifts["keys"].dimension == 15
    assert check(wrong, case.f, case.params(), generator=drawn(0)).invariance > 1e-3
    right = Symmetry(s.tensors, s.groups, s.sizes, {"keys": {"c_attn.bias": "(0 + _ + 0)"}})
    assert check(right, case.f, case.params(), generator=drawn(0)).ok
    assert right.dimension(case.params()) == case.dimension + 15
    named = Symmetry(
        {"c_proj.weight": "(H f) _"}, {}, {"H": 3, "f": 2}, {"keys": {"c_attn.bias": "(_ + H f + 0)"}}
    )
    with pytest.raises(SymmetryError, match=r"shift 'keys', parameter 'c_attn.bias'.*ambiguous.*length 36"):
        named.bind(case.params())


def test_shift_errors() -> None:
    p = {"w": normal(7, 5)}
    with pytest.raises(
        SymmetryError, match=r"shift 's' is constant along .* 'w' .*group 'h' \(PositiveScaling\)"
    ):
        Symmetry({"w": "h _"}, {"h": PositiveScaling()}, shifts={"s": {"w": "1 _"}}).bind(p)
    with pytest.raises(SymmetryError, match=r"cuts parameter 'w' at other places"):
        Symmetry(
            {"w": "(b + a) _", "v": "c"}, {"a": Orthogonal()}, {"a": 3}, {"s": {"w": "(c + 0 + c) _"}}
        ).bind(p | {"v": normal(2)})
    with pytest.raises(SymmetryError, match=r"the pattern has 1 axes, the tensor 2 \(shape \(7, 5\)\)"):
        Symmetry({}, {}, shifts={"s": {"w": "1"}}).bind(p)
    with pytest.raises(SymmetryError, match=r"sizes \[9, -2\].*length 7"):
        Symmetry({"w": "_ _", "v": "a"}, {}, shifts={"s": {"w": "(a + _) _"}}).bind(p | {"v": normal(9)})
    with pytest.raises(SymmetryError, match=r"'h' is both a factor and a shift"):
        Symmetry({"w": "h _"}, {}, shifts={"h": {"w": "_ 1"}})
    with pytest.raises(SymmetryError, match=r"h has size 7, but the axis has length 5"):
        Symmetry({"w": "h _"}, {}, shifts={"s": {"w": "_ h"}}).bind(p)
    Symmetry({"w": "h _"}, {"h": Permutation()}, shifts={"s": {"w": "1 _"}}).bind(p)


def test_declaration_errors() -> None:
    p = {"w": normal(6, 5), "v": normal(2)}
    with pytest.raises(SymmetryError, match=r"group 'g' is given, but no pattern"):
        Symmetry({"w": "h _"}, {"g": Permutation()})
    with pytest.raises(SymmetryError, match=r"size 'H' is given, but no pattern"):
        Symmetry({"w": "h _"}, {}, {"H": 2})
    with pytest.raises(SymmetryError, match=r"group 'h' must be a symgeo.groups.Group"):
        Symmetry({"w": "h _"}, {"h": Permutation})  # type: ignore[dict-item]
    with pytest.raises(SymmetryError, match=r"'w'.*\(e:6 _:5\) carries 'e'.*per 'H'.*does not have"):
        Symmetry({"w": "e _", "v": "H"}, {"e": GeneralLinear(per="H")}).bind(p)
    with pytest.raises(SymmetryError, match=r"more than once"):
        Symmetry({"w": "(H H _) e"}, {"e": GeneralLinear(per="H")}, {"H": 1}).bind(p)
    with pytest.raises(SymmetryError, match=r"'e' is per 'H', on which GeneralLinear acts"):
        Symmetry({"w": "(H e) _"}, {"H": GeneralLinear(), "e": GeneralLinear(per="H")})
    with pytest.raises(SymmetryError, match=r"leads back to"):
        Symmetry({"w": "(a b) _"}, {"a": SignFlip(per="b"), "b": SignFlip(per="a")})


def test_element_and_params_errors() -> None:
    case = gpt2()
    action, p = case.bind(), case.params()
    with pytest.raises(SymmetryError, match=r"'e' needs shape \(3, 5, 5\), copies first; found \(5, 5\)"):
        action.element({"e": torch.eye(5)})
    with pytest.raises(SymmetryError, match=r"'H' needs permutations of 0..2"):
        action.element({"H": torch.tensor([0, 0, 1])})
    with pytest.raises(SymmetryError, match=r"no part 'x'; its parts are H, e, f"):
        action.element({"x": torch.eye(5)})
    with pytest.raises(SymmetryError, match=r"'c_proj.weight': bound with shape \(6, 7\), found \(7, 6\)"):
        action.act(action.identity(), p | {"c_proj.weight": p["c_proj.weight"].mT})
    with pytest.raises(SymmetryError, match=r"'c_proj.weight'.*no such parameter"):
        action.act(action.identity(), {"c_attn.weight": p["c_attn.weight"], "c_attn.bias": p["c_attn.bias"]})
    with pytest.raises(ValueError, match=r"samples >= 1, found 0"):
        check(case.symmetry, case.f, p, samples=0)
    partial = action.element({"H": torch.tensor([2, 0, 1])})
    assert partial["H"].dtype == torch.int64
    assert close(action.act(partial, p), action.act(action.compose(partial, action.identity()), p), 0)


def test_report_is_a_table_and_not_ok_when_nothing_moves() -> None:
    case = llama()
    lines = str(check(case.symmetry, case.f, case.params(), samples=1, generator=drawn(0))).splitlines()
    assert lines[0].split() == ["group", "kind", "copies", "dimension", "invariance", "moved"]
    assert [line.split()[:4] for line in lines[3:5]] == [
        ["e", "Rotary", "2", "8"],
        ["f", "GeneralLinear", "2", "50"],
    ]
    assert len({len(line) for line in lines[:-1]}) == 1 and lines[-1].startswith("ok")
    still = check(Symmetry({"B": "_ r"}, {}), lora().f, lora().params())
    assert not still.ok and still.invariance == 0 and "FAILED" in str(still)
    infinite = check(lora().symmetry, lambda p: p["B"] @ p["A"] / 0, lora().params())
    assert not infinite.ok


def test_seeds_repeat_and_elements_do_not_depend_on_the_dtype() -> None:
    case = llama()
    single = case.symmetry.bind({name: x.float() for name, x in case.params().items()})
    a, b = case.bind().random(drawn(5)), single.random(drawn(5))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert set(single.random(drawn(5), only=["e"])) == {"e"}
    assert "e: (2, 2)" in repr(a)


def test_a_part_of_a_known_group_is_no_subclass_of_it() -> None:
    """Averages, alignments and pairs go by the class: a subclass would silently be taken for the whole group."""

    class Pairs(Permutation):
        """Permutations of neighbours only."""

    with pytest.raises(SymmetryError, match=r"Pairs is a subclass of Permutation.*derive it from symgeo.groups.Group"):
        Symmetry({"b": "h"}, {"h": Pairs()})
