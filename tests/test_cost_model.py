"""The cost model of the benchmarks: against torch's own counts, against the counts on record, and how costs grow."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from symgeo import ParameterManifold, find_symmetry, functional_loss, geodesic_sharpness, in_place_sharpness
from symgeo.hessian import riemannian_hessian
from symgeo.models.tiny_lm import TinyLM
from symgeo.optim import SymO, presets

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
Shape, optimizer, sharpness = (getattr(importlib.import_module("_cost_model"), name)
                               for name in ("Shape", "optimizer", "sharpness"))
live_bytes = importlib.import_module("_memory").live_bytes

RECORD: dict[str, Any] = json.loads((BENCHMARKS / "scaling.json").read_text())
RECORDED = Shape(2, 192, 768, 64, 6, 192, 1, 32, biases=True, norm_size=2)


def language_model(depth: int, width: int = 48, hidden: int = 200) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    model = TinyLM(vocabulary=17, context=8, width=width, depth=depth, heads=4, mlp_width=hidden).eval()
    return model, (torch.arange(16).view(2, 8), torch.arange(1, 17).view(2, 8) % 17)


def criterion(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), target.flatten())


def operations(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize(("width", "hidden", "depth"), [(48, 200, 1), (128, 96, 2)])
def test_operations_of_a_step_are_those_that_torch_counts(width: int, hidden: int, depth: int) -> None:
    model, (x, y) = language_model(depth, width, hidden)
    shape = Shape(depth, width, hidden, 17, 4, width, 1, 8, biases=True, norm_size=2)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    steps = SymO(model.named_parameters(), presets.muon(model), lr=1e-3, roots="newton")
    criterion(model(x), y).backward()
    says = optimizer(shape, 1, False)
    assert operations(steps.step) == says.flops + says.root_flops
    state = sum(value.nbytes for held in steps.state.values() for value in held.values()
                if isinstance(value, Tensor) and value.ndim)
    assert state == says.state


def memory(depth: int) -> tuple[float, float]:
    """Counted, beside a forward and backward pass, and predicted bytes of a sharpness iteration."""
    model, (x, y) = language_model(depth)
    symmetry, known = find_symmetry(model), [*model.parameters(), x, y]
    passes = live_bytes(lambda: criterion(model(x), y).backward(), known)
    model.zero_grad()
    whole = live_bytes(lambda: in_place_sharpness(
        model, [(x, y)], 0.1, symmetry, criterion, steps=6, chunk_bytes=2**16), known)
    shape = Shape(depth, 48, 200, 17, 4, 48, 1, 8, biases=True, norm_size=2)
    return whole - passes, sharpness(shape, 1, False).memory


def test_memory_of_a_sharpness_iteration_grows_as_the_model_says() -> None:
    """By what four more blocks need: what one chunk of parameters needs at a time drops out."""
    (low, says_low), (high, says_high) = memory(2), memory(6)
    assert high - low == pytest.approx(says_high - says_low, rel=0.1)


def test_the_counts_on_record_are_what_the_model_says() -> None:
    for row in RECORD["traffic"]:
        model = optimizer if row["what"] == "optimizer step" else sharpness
        says = model(RECORDED, row["processes"], row["parameters are"] == "shards")
        assert row["counted"]["received"] == pytest.approx(says.received, rel=5e-3)
        assert row["counted"]["messages"] == says.messages
    assert len(RECORD["traffic"]) == 8
    found = RECORD["operations"]
    assert found["sharpness iteration"]["counted"] == pytest.approx(sharpness(RECORDED, 1, False).flops, rel=0.01)
    moved = found["bytes of a sharpness iteration"]
    assert moved["counted"] == pytest.approx(sharpness(RECORDED, 1, False).moved, rel=0.01)
    says = optimizer(RECORDED, 1, False)
    assert found["optimizer step"]["counted"] == says.flops + says.root_flops
    for row in RECORD["memory"]:
        shape = Shape(row["blocks"], 192, 768, 64, 6, 192, 1, 32, biases=True, norm_size=2)
        assert row["sharpness iteration"]["counted"] == pytest.approx(sharpness(shape, 1, False).memory, rel=0.06)
        assert row["state of the optimizer"]["counted"] == optimizer(shape, 1, False).state


def works(depth: int) -> dict[str, tuple[Callable[[], object], list[Tensor]]]:
    """One unit of four kinds of work, with the tensors that are there before."""
    model, (x, y) = language_model(depth)
    symmetry = find_symmetry(model)
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss, manifold = functional_loss(model, criterion), ParameterManifold(params, symmetry)
    hessian = riemannian_hessian(loss, params, [(x, y)], manifold, check=False)
    v = torch.randn(hessian.shape[0])
    trained, _ = language_model(depth)
    steps = SymO(trained.named_parameters(), presets.muon(trained), lr=1e-3, roots="newton")
    criterion(trained(x), y).backward()
    known = [*model.parameters(), *params.values(), *trained.parameters(), x, y, v]
    return {
        "sharpness": (lambda: geodesic_sharpness(loss, params, [(x, y)], manifold, 0.1, 3), known),
        "in place": (lambda: in_place_sharpness(model, [(x, y)], 0.1, symmetry, criterion, steps=3), known),
        "hessian": (lambda: hessian @ v, known), "optimizer": (steps.step, known),
    }


def test_costs_grow_as_the_depth() -> None:
    """Four times the blocks: at most 4.5 times the operations and the memory.  Roots feel the width otherwise."""
    small, large = works(1), works(4)
    sizes = [sum(p.numel() for p in language_model(depth)[0].parameters()) for depth in (1, 4)]
    for kind in small:
        for count in (lambda work, _: operations(work), live_bytes):
            ratio = count(*large[kind]) / count(*small[kind])
            assert 1 < ratio * 4 * sizes[0] / sizes[1] < 4.5, (kind, count)


def test_more_processes_have_less_to_do_and_to_keep() -> None:
    shape = Shape(8, 64, 256, 100, 4, 64)
    one, many = optimizer(shape, 1, True), [optimizer(shape, size, True) for size in (2, 4, 8)]
    for fewer, more in zip([one, *many], many):
        assert more.flops < fewer.flops and more.state < fewer.state
    assert sharpness(shape, 8, True).memory == pytest.approx(sharpness(shape, 1, True).memory / 8)
    assert sharpness(shape, 8, False).received > sharpness(shape, 8, True).received
