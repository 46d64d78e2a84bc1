"""TinyLM: its shapes, its causality, its dtype, and the symmetry that is found for it."""

from __future__ import annotations

import math

import pytest
import torch
from networks import params_of, randomise
from test_completeness import nullity
from torch import Tensor
from torch.nn.functional import cross_entropy

from symgeo import check, find_symmetry
from symgeo.models.tiny_lm import TinyLM

SMALL = {"vocabulary": 11, "context": 5, "width": 8, "heads": 2, "mlp_width": 6}


def small(seed: int = 0, depth: int = 1, tie: bool = False) -> TinyLM:
    model = TinyLM(**SMALL, depth=depth, tie=tie, generator=torch.Generator().manual_seed(seed))
    assert isinstance(randomise(model, seed, size=0.3), TinyLM)
    return model


def symbols(count: int, seed: int = 3) -> Tensor:
    return torch.randint(0, 11, (count, 5), generator=torch.Generator().manual_seed(seed))


def test_default_has_the_documented_size() -> None:
    model = TinyLM()
    assert sum(p.numel() for p in model.parameters()) == 429664
    assert model(torch.zeros(3, 64, dtype=torch.int64)).shape == (3, 64, 96)
    assert sum(p.numel() for p in TinyLM(tie=True).parameters()) == 429664 - 96 * 128 - 96


def test_logits_see_the_past_alone() -> None:
    model, before = small(), symbols(7)
    after = before.clone()
    after[:, 3] = (before[:, 3] + 1) % 11
    change = (model(after) - model(before)).abs().amax((0, 2))
    assert (change[:3] == 0).all() and (change[3:] > 1e-3).all()


def test_a_shorter_sequence_has_the_same_logits() -> None:
    model, x = small(), symbols(7)
    torch.testing.assert_close(model(x[:, :3]), model(x)[:, :3], rtol=1e-12, atol=1e-12)


def test_first_token_attends_to_itself_alone() -> None:
    """By hand: the value of one token passes through attention unweighted."""
    model, x = small(), symbols(1)[:, :1]
    block = model.blocks[0]
    stream = model.embed.weight[x] + model.position[:1]
    stream = stream + block.attention.output(block.attention.value(block.attention_norm(stream)))
    stream = stream + block.mlp(block.mlp_norm(stream))
    torch.testing.assert_close(model(x), model.head(model.norm(stream)), rtol=1e-12, atol=1e-12)


def test_initial_loss_is_that_of_guessing() -> None:
    x = torch.randint(0, 96, (7, 64), generator=torch.Generator().manual_seed(1))
    loss = cross_entropy(TinyLM()(x).flatten(0, 1), x.flatten())
    assert abs(loss.item() - math.log(96)) < 0.3


def test_seed_decides_the_initial_values() -> None:
    first, same, other = (TinyLM(**SMALL, generator=torch.Generator().manual_seed(s)) for s in (2, 2, 3))
    for name, value in first.named_parameters():
        torch.testing.assert_close(value, same.get_parameter(name), rtol=0, atol=0)
    assert not torch.equal(first.head.weight, other.head.weight)
    assert not torch.equal(first.embed.weight, other.embed.weight)


def test_tied_head_is_the_embedding() -> None:
    model = small(tie=True)
    assert model.head.weight is model.embed.weight and model.head.bias is None
    assert "head.weight" not in dict(model.named_parameters())
    assert TinyLM(**SMALL, tie=True).embed.weight.std() < 0.03


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("tie", [False, True])
def test_random_elements_leave_the_logits_alone(depth: int, tie: bool) -> None:
    model, x = small(depth=depth, tie=tie), symbols(13)
    symmetry, params = find_symmetry(model), params_of(model)
    report = check(symmetry, lambda p: torch.func.functional_call(model, p, (x,)), params,
                   generator=torch.Generator().manual_seed(2))
    assert report.invariance < 1e-12 and report.moved > 0.05 and report.ok


def test_without_the_dual_the_logits_change() -> None:
    model, x = small(), symbols(13)
    symmetry, params = find_symmetry(model), params_of(model)
    key = "blocks.0.attention.key.weight"
    action = symmetry.bind(params)
    moved = action.act(action.random(torch.Generator().manual_seed(2)), params)
    wrong = torch.func.functional_call(model, {**moved, key: params[key]}, (x,))
    assert (wrong - model(x)).abs().max() > 1e-3


# per layer: query-key and value-output GL 64, key and value biases 16, means of writers 9 + 7, rows of readers 24 + 6,
# gains and biases of norms 32.  Around: exchange of embedding and position 8, their means 16 - 1 (counted once); the
# last norm and the rows of the head 16 + 11.  Where head and embedding are one, only the means of positions remain
BLOCK = 64 + 16 + 16 + 30 + 32
AROUND = {False: 8 + (11 + 5) - 1 + 16 + 11, True: 5}


@pytest.mark.parametrize(("depth", "tie"), [(1, False), (2, False), (1, True)])
def test_the_dimension_is_the_nullity(depth: int, tie: bool) -> None:
    model, x = small(depth=depth, tie=tie), symbols(24 * depth)
    dimension = find_symmetry(model).dimension(params_of(model))
    rotations = 0 if tie else 7 * 6 // 2  # of the mean-free part of the stream, where embedding and head are both free
    assert dimension == depth * BLOCK + AROUND[tie] + rotations == nullity((model, lambda f: f(x)))


def test_the_dimension_is_the_nullity_with_constant_embeddings() -> None:
    model, x = small(), symbols(24)
    model.embed.weight.requires_grad_(False)
    model.position.requires_grad_(False)
    dimension = find_symmetry(model).dimension(params_of(model))
    assert dimension == BLOCK + 16 + 11 == nullity((model, lambda f: f(x)))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 30}, "width: needed a multiple of heads = 4, found 30"),
        ({"mlp_width": 0}, "mlp_width: needed a positive size, found 0"),
        ({"vocabulary": -1}, "vocabulary: needed a positive size, found -1"),
    ],
)
def test_bad_sizes_are_named(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TinyLM(**sizes)


def test_long_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="symbols: needed at most context = 5 per sequence, found 6"):
        small()(torch.zeros(2, 6, dtype=torch.int64))
