"""The cost model of the benchmarks against torch's own count of operations, at sizes that its file does not record."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from symgeo.models.tiny_lm import TinyLM
from symgeo.optim import SymO, presets

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from _cost_model import Shape, optimizer, sharpness


@pytest.mark.parametrize(("width", "hidden", "depth"), [(48, 200, 1), (128, 96, 2)])
def test_operations_of_a_step_are_those_that_torch_counts(width: int, hidden: int, depth: int) -> None:
    model = TinyLM(vocabulary=17, context=8, width=width, depth=depth, heads=4, mlp_width=hidden)
    shape = Shape(depth, width, hidden, 17, 4, width, 1, 8, biases=True, norm_size=2)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    steps = SymO(model.named_parameters(), presets.muon(model), lr=1e-3, roots="newton")
    symbols = torch.zeros(2, 8, dtype=torch.long)
    cross_entropy(model(symbols).flatten(0, 1), symbols.flatten()).backward()
    with FlopCounterMode(display=False) as counter:
        steps.step()
    says = optimizer(shape, 1, False)
    assert counter.get_total_flops() == says.flops + says.root_flops


def test_more_processes_have_less_to_do_and_to_keep() -> None:
    shape = Shape(8, 64, 256, 100, 4, 64)
    one, many = optimizer(shape, 1, True), [optimizer(shape, size, True) for size in (2, 4, 8)]
    for fewer, more in zip([one, *many], many):
        assert more.flops < fewer.flops and more.state < fewer.state
    assert sharpness(shape, 8, True).memory == pytest.approx(sharpness(shape, 1, True).memory / 8)
    assert sharpness(shape, 8, False).received > sharpness(shape, 8, True).received
