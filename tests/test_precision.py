"""Inside `full_double` a float64 model computes in float64, and hides no derivatives; outside nothing changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import params_of
from torch import Tensor, nn
from zoo import ZOO, Case

from symgeo.models.precision import computing_in, full_double

Params = dict[str, Tensor]
LAYER = "model.layers.0."
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")


def rotated(params: Params) -> Params:
    """LLaMA's residual stream by an orthogonal O: writers O W, readers W g O^T g^-1 behind a norm of gain g."""
    width = params["model.norm.weight"].shape[0]
    basis = torch.randn(width, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    o = torch.linalg.qr(basis).Q
    moved = params | {"model.embed_tokens.weight": params["model.embed_tokens.weight"] @ o.mT}
    moved |= {f"{LAYER}{name}.weight": o @ params[f"{LAYER}{name}.weight"] for name in WRITERS}
    norms = {f"{LAYER}{name}": f"{LAYER}{norm}" for norm, names in READERS.items() for name in names}
    for reader, norm in (norms | {"lm_head": "model.norm"}).items():
        gain = params[f"{norm}.weight"]
        moved[f"{reader}.weight"] = params[f"{reader}.weight"] * gain @ o.mT / gain
    return moved


def scaled_gain(params: Params) -> Params:
    """The gain 1 + w of a norm of Gemma by s, the columns of what reads it by 1 / s."""
    gain = f"{LAYER}input_layernorm.weight"
    s = torch.linspace(0.4, 2.1, params[gain].shape[0], dtype=torch.float64)
    readers = [f"{LAYER}{name}.weight" for name in READERS["input_layernorm"]]
    return params | {gain: (1 + params[gain]) * s - 1} | {name: params[name] / s for name in readers}


def shifted_keys(params: Params, bias: str, rows: slice) -> Params:
    """The bias of the keys of one head by a constant, which shifts all logits of a query alike."""
    moved = params[bias].clone()
    moved[rows] += torch.tensor([0.7, -1.3, 0.4, 2.0], dtype=torch.float64)
    return params | {bias: moved}


Move = Callable[[Params], Params]
MOVES: dict[str, Move] = {
    "LLaMA": rotated,
    "Gemma 2": scaled_gain,
    "OPT": lambda p: shifted_keys(p, "model.decoder.layers.0.self_attn.k_proj.bias", slice(4, 8)),
    # the second head; rows are (heads, query key value, size of a head)
    "BLOOM": lambda p: shifted_keys(p, "transformer.h.0.self_attention.query_key_value.bias", slice(16, 20)),
}


def error(case: Case, move: Move) -> float:
    """The relative change of the outputs."""
    params = {name: p for name, p in params_of(case.model).items()}
    f, moved = case.function(), move(params)
    with torch.no_grad():
        before, after = torch.cat([x.flatten() for x in f(params)]), torch.cat([x.flatten() for x in f(moved)])
    assert any((moved[name] - p).norm() > 0.1 * p.norm() for name, p in params.items())
    return float((before - after).abs().max() / before.abs().max())


@pytest.mark.parametrize("name", MOVES)
def test_an_invariance_holds_to_rounding(name: str) -> None:
    case = ZOO[name]()
    assert 1e-12 < error(case, MOVES[name]) < 1e-5
    with full_double():
        assert error(case, MOVES[name]) < 1e-12
    assert 1e-12 < error(case, MOVES[name]) < 1e-5


def test_every_way_of_asking_for_a_precision() -> None:
    x = torch.linspace(0, 1, 4, dtype=torch.float64) / 3
    asked: dict[str, Callable[[], Tensor]] = {
        "float": lambda: x.float(), "half": lambda: x.half(), "bfloat16": lambda: x.bfloat16(),
        "to": lambda: x.to(torch.float32), "to by keyword": lambda: x.to(dtype=torch.bfloat16),
        "type": lambda: x.type(torch.float32), "type by name": lambda: x.type("torch.FloatTensor"),
        "softmax": lambda: nn.functional.softmax(x, -1, dtype=torch.float32),
        "torch.softmax": lambda: torch.softmax(x, -1, torch.float32), "sum": lambda: x.sum(dtype=torch.float32),
        "arange": lambda: torch.arange(3, dtype=torch.float32), "zeros": lambda: torch.zeros(3, dtype=torch.float16),
        "zeros by default": lambda: torch.zeros(3), "full": lambda: torch.full((3,), 0.1),
        "tensor": lambda: torch.tensor([0.1, 0.2], dtype=torch.float32), "tensor by default": lambda: torch.tensor(0.1),
        "like": lambda: torch.ones_like(x, dtype=torch.float32), "new": lambda: x.new_zeros(2, dtype=torch.float32),
    }
    inside = {}
    with full_double():
        for name, make in asked.items():
            inside[name] = make()
        assert torch.arange(3).dtype == torch.zeros(3, dtype=torch.int32).long().dtype == torch.int64
        assert torch.full((2,), 1).dtype == torch.int64 and torch.tensor(True).dtype == torch.bool
        assert x.view(torch.float32).shape == (8,), "bytes read as they are"
        assert torch.ones(2, dtype=torch.complex64).dtype == torch.complex128
    for name, make in asked.items():
        assert inside[name].dtype == torch.float64, name
        assert make().dtype in (torch.float16, torch.bfloat16, torch.float32), name
    assert torch.equal(inside["float"], x) and float(inside["tensor by default"]) == 0.1


def test_a_precision_in_between() -> None:
    x = torch.ones(2, dtype=torch.bfloat16)
    with computing_in(torch.float32):
        assert x.to(torch.float16).dtype == x.half().dtype == torch.float32
        assert x.double().dtype == x.to(torch.float64).dtype == torch.float64
        assert x.type("torch.DoubleTensor").dtype == torch.float64
    with computing_in(torch.float16):
        assert x.float().dtype == torch.float32 and x.half().dtype == torch.float16
    with pytest.raises(ValueError, match=r"floating-point dtype.*torch.int64"), computing_in(torch.int64):
        pass


def test_transforms() -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return (x.float() * torch.arange(3, dtype=torch.float32)).softmax(-1, dtype=torch.float32) + torch.zeros(3)

    exact = torch.func.vmap(torch.func.jacrev(lambda x: (x * torch.arange(3)).softmax(-1)))(x)
    with full_double():
        assert torch.equal(torch.func.vmap(torch.func.jacrev(f))(x), exact)
        forward = torch.func.vmap(torch.func.jacfwd(f))(x)
    assert torch.allclose(forward, exact, atol=1e-15)

    def inside(x: Tensor) -> Tensor:
        with full_double():
            return f(x)

    assert torch.equal(torch.func.vmap(torch.func.jacrev(inside))(x), exact)


def test_attention_has_second_and_forward_derivatives() -> None:
    q = torch.randn(1, 2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, q, x**2).sum()

    with full_double():
        twice = torch.func.hessian(f)(q)
        _, forward = torch.func.jvp(torch.func.grad(f), (q,), (q,))
    assert torch.allclose(torch.einsum("bhidckjl,ckjl->bhid", twice, q), forward, atol=1e-12)


def test_the_padding_row_has_a_gradient() -> None:
    """BERT reads the row of its padding token like any other."""
    case = ZOO["BERT"]()
    name, f, params = "embeddings.word_embeddings.weight", case.function(), params_of(case.model)
    embedding = case.model.get_submodule("embeddings.word_embeddings")
    assert isinstance(embedding, nn.Embedding) and embedding.padding_idx == 0

    def g(weight: Tensor) -> Tensor:
        return torch.cat([x.flatten() for x in f(params | {name: weight})]).square().sum()

    assert not torch.func.grad(g)(params[name])[0].any()
    with full_double():
        found = torch.func.grad(g)(params[name])
        step = torch.zeros_like(found)
        step[0] = torch.linspace(-1, 1, step.shape[1])
        difference = (g(params[name] + 1e-5 * step) - g(params[name] - 1e-5 * step)) / 2e-5
    assert torch.allclose((found * step).sum(), difference, rtol=1e-7) and found[0].norm() > 1e-3
    assert embedding.padding_idx == 0


def test_an_error_inside_leaves_nothing_behind() -> None:
    flags = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()
    with pytest.raises(RuntimeError, match="stop"), full_double():
        raise RuntimeError("stop")
    assert torch.zeros(1).dtype == torch.float32
    assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()) == flags
