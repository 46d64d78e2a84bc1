"""`symgeo.count`: the declared dimension beside the measured nullity, and what it says when the two differ."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from networks import params_of
from torch import Tensor, nn
from zoo import ZOO, nullity_of

import symgeo
from symgeo import Symmetry, count, find_symmetry
from symgeo.groups import GeneralLinear, Permutation, PositiveScaling
from symgeo.models.tiny_vit import TinyViT
from symgeo.nullity import numerical_rank
from symgeo.symmetry import Compensation, Span

Params = dict[str, Tensor]
LORA = Symmetry({"B": "_ r", "A": "r* _"}, {"r": GeneralLinear()})


def lora(params: Params) -> Tensor:
    return params["B"] @ params["A"]


def factors(rank: int = 2) -> Params:
    generator = torch.Generator().manual_seed(0)
    return {"B": torch.randn(7, rank, generator=generator), "A": torch.randn(rank, 5, generator=generator)}


def bare(name: str, frozen: list[str], **sizes: float) -> tuple[nn.Module, object]:
    """A case whose embeddings are constants."""
    case = ZOO[name](**sizes)
    for module in frozen:
        case.model.get_submodule(module).requires_grad_(False)
    return case.model, case


# one block; embeddings frozen
BLOCKS = {"GPT-2, bare": (["wte", "wpe"], {}, 158), "BERT": (["embeddings"], {}, 134),
          "LLaMA, bare": (["embed_tokens"], {}, 62)}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str) -> None:
    frozen, sizes, expected = BLOCKS[name]
    model, case = bare(name, frozen, **sizes)
    report = count(find_symmetry(model), case.function(), params_of(model))
    assert report.declared == report.measured == report.explained == expected == nullity_of(case)
    assert report.complete and report.reliable and report.gap > 1e6 and report.unused == 0


def test_scales_are_flat_where_the_eps_is_zero() -> None:
    model, case = bare("BERT", ["embeddings"], eps=0.0)
    report = count(find_symmetry(model), case.function(), params_of(model))
    assert report.declared == report.measured == 135


def test_a_module_gets_its_own_inputs() -> None:
    """The module is not touched, and its precision and mode do not matter."""
    model = TinyViT(image_size=4, patch_size=2, width=8, heads=2, mlp_width=6, classes=3, depth=1).train()
    symmetry, params = find_symmetry(model), params_of(model)
    report = count(symmetry, model, params)
    assert report.complete and report.reliable and report.declared == 214
    assert all(p.dtype == torch.float32 and torch.equal(p, params[name]) for name, p in model.named_parameters())
    assert model.training and all(p.grad is None for p in model.parameters())


def test_single_precision_inside_a_model_does_not_blur_the_count() -> None:
    case = ZOO["LLaMA, bare"]()
    report = count(find_symmetry(case.model), case.model, params_of(case.model))
    assert report.complete and report.gap > 1e8


def test_a_function() -> None:
    report = count(LORA, lora, factors())
    assert (report.declared, report.measured, report.parameters) == (4, 4, 24)
    assert count(LORA, lambda p: (lora(p)[:, :3], lora(p)[:, 3:]), factors()).measured == 4


def test_the_numbers_behind_the_count() -> None:
    model, case = bare("GPT-2, bare", ["wte", "wpe"])
    report = count(find_symmetry(model), case.function(), params_of(model))
    assert sum(report.kinds.values()) >= report.declared
    assert report.kinds["e"] == report.kinds["f"] == 32, "query-key and value-output pairs of two heads of size four"
    assert "h" not in report.kinds, "permutations have no directions"
    text = str(report)
    assert "complete" in text and "158" in text and text.splitlines()[0].split() == ["generator", "dimension"]


def test_an_incomplete_declaration() -> None:
    model, case = bare("GPT-2, bare", ["wte", "wpe"])
    full = find_symmetry(model)
    dropped = Symmetry(full.tensors, {name: group for name, group in full.groups.items() if not name.startswith("f[")},
                       full.sizes | {"f[h.0]": 4}, full.shifts, full.frozen, full.scopes, full.flows)
    report = count(dropped, case.function(), params_of(model))
    assert report.declared < report.measured == 158 and not report.complete and report.reliable
    assert f"{158 - report.declared} not declared" in str(report)


def test_a_wrong_declaration() -> None:
    """A scale for each hidden unit of a GELU network, which it does not have."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"up": (5, 4), "bias": (5,), "down": (3, 5)}
    params = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    x = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    symmetry = Symmetry({"up": "(h s) _", "bias": "(h s)", "down": "_ (h s*)"},
                        {"h": Permutation(), "s": PositiveScaling(per="h")})

    def network(activation: nn.Module):
        return lambda p: activation(x @ p["up"].mT + p["bias"]) @ p["down"].mT

    report = count(symmetry, network(nn.GELU()), params)
    assert (report.declared, report.measured) == (5, 0) and not report.complete and "5 too many" in str(report)
    assert count(symmetry, network(nn.ReLU()), params).complete


def test_zero_parameters_are_left_for_generic_ones() -> None:
    """At B = 0, as LoRA starts, all of A is flat as well."""
    params = factors() | {"B": torch.zeros(7, 2)}
    assert count(LORA, lora, params).measured == 4
    report = count(LORA, lora, params, generic=False)
    assert (report.declared, report.measured) == (4, 10)
    assert report.unused == 0 and torch.equal(params["B"], torch.zeros(7, 2))


def test_numbers_that_nothing_reads_are_told_apart() -> None:
    """The last row of B and a bias are not read: no part of the nullity, nor what is declared of them."""
    params = factors() | {"bias": torch.ones(5), "other": torch.ones(5)}
    flow = Compensation((Span("bias"),), (), (Span("other"),))
    symmetry = LORA | Symmetry({}, {}, flows={"spare": flow})
    report = count(symmetry, lambda p: lora(p)[:6].repeat(2, 1), params)
    assert (report.parameters, report.unused) == (34, 12)
    assert (report.declared, report.explained, report.measured) == (9, 4, 4) and report.complete
    assert "of them unused" in str(report)
    assert count(Symmetry({}, {}), lambda p: lora(p)[:6].repeat(2, 1), params).explained == 0


def test_rows_that_random_inputs_do_not_reach_do_not_count_against_a_declaration() -> None:
    """Two positions of OPT are never used."""
    model = ZOO["OPT"]().model
    report = count(find_symmetry(model), model, params_of(model))
    assert report.complete and report.unused >= 16 and report.declared > report.measured


def test_frozen_parameters_are_constants() -> None:
    """With A a constant, B is free along its left kernel only."""
    wide = {"B": torch.randn(4, 6), "A": torch.randn(6, 5)}
    report = count(Symmetry({}, {}, frozen={"A"}), lambda p: lora(p).repeat(4, 1), wide)
    assert (report.parameters, report.measured) == (24, 4 * (6 - 5))


def test_a_count_without_a_gap_is_flagged() -> None:
    def blurred(p: Params) -> Tensor:
        return p["x"] * torch.logspace(0, -14, 15, dtype=torch.float64)

    report = count(Symmetry({}, {}), blurred, {"x": torch.ones(15)})
    assert not report.reliable and "NOT RELIABLE" in str(report)


def test_the_numerical_rank() -> None:
    def rank(*values: float) -> tuple[int, float]:
        return numerical_rank(torch.tensor(values, dtype=torch.float64))

    assert rank(1.0, 1e-3, 1e-16)[0] == 2 and rank(5.0, 4.0)[0] == 2 and rank(0.0, 0.0) == (0, float("inf"))
    assert rank(1.0, 1e-7, 0.0)[0] == 2, "small is not zero"
    assert rank(1.0, 1e-2, 1e-8, 1e-15)[0] == 3


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"one number, as a loss does, for 24 parameters.*Return the outputs"):
        count(LORA, lambda p: lora(p).square().mean(), factors())
    with pytest.raises(ValueError, match=r"21 numbers for 24 parameters.*larger batch"):
        count(LORA, lambda p: lora(p)[:, :3], factors())
    with pytest.raises(ValueError, match=r"1 to 20 trainable numbers, found 24.*small instance"):
        count(LORA, lora, factors(), limit=20)
    with pytest.raises(ValueError, match=r"found 0"):
        count(Symmetry({}, {}, frozen={"A", "B"}), lora, factors())
    with pytest.raises(ValueError, match=r"not finite"):
        count(LORA, lambda p: lora(p) / 0, factors())
    with pytest.raises(ValueError, match=r"how to call Linear is not known"):
        count(Symmetry({}, {}), nn.Linear(3, 4), params_of(nn.Linear(3, 4)))
    with pytest.raises(ValueError, match=r"Linear has no parameter 'B'"):
        count(Symmetry({}, {}), nn.Linear(3, 4), factors())
    with pytest.raises(symgeo.SymmetryError, match="'B'"):
        count(LORA, lora, {"A": torch.ones(2, 5)})
    assert count(Symmetry({}, {}), nn.MultiheadAttention(4, 2), params_of(nn.MultiheadAttention(4, 2))).reliable


def test_the_public_name_is_the_function() -> None:
    code = "import symgeo.nullity, symgeo; assert callable(symgeo.count) and symgeo.CountReport"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0
