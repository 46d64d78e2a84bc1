"""find_symmetry: what it finds is true, a broken twin is caught, and what it does not know is named."""

from __future__ import annotations

import pytest
import torch
from networks import MODELS, bert, llama, params_of, randomise, tiny_vit
from torch import nn

from symgeo import ParameterManifold, SymmetryError, check, find_symmetry
from symgeo.groups import GeneralLinear, PositiveScaling
from symgeo.models.family import AttentionNames, Family
from symgeo.models.probe import inputs, output_function
from symgeo.models.recognise import recognise, symmetry_of
from symgeo.models.structure import is_homogeneous, is_odd
from symgeo.symmetry import Symmetry

# per layer: GL 2 H d_h^2, shifts of key and value biases 2 d; means of what is written to the stream; gains and biases
# of norms; rows of the maps that read a LayerNorm; what gates and activations add.  Around the layers: the last norm
# and its head, what embeddings exchange, and their means (the exchange of a mean is counted once); rotations of the
# stream, or of its mean-free part, where embeddings, readers and head are all free
DIMENSIONS = {
    "bert": 2 * (2 * 3 * 49 + 2 * 21 + (21 + 1) + (37 + 1) + 2 * 21 + (3 * 21 + 37))
    + 2 * 21 + (41 + 16 + 2) - 2 + 3 * 21,
    "gpt2": 2 * (2 * 3 * 49 + 2 * 21 + (21 + 1) + (37 + 1) + 4 * 21 + (3 * 21 + 37)) + 16,
    "vit": 2 * (2 * 3 * 49 + 2 * 21 + (21 + 1) + (37 + 1) + 4 * 21 + (3 * 21 + 37)) + 2 * 21 + 3
    + 2 * 21 + (1 + 1 + 17 + 4) - 2 + 20 * 19 // 2,
    "llama": 2 * (2 * 2 * 2 + 2 * 16 + 37 + 2 * 24) + 24 + 24 * 23 // 2,
    "tiny_vit": 2 * (2 * 3 * 16 + 2 * 12 + (12 + 1) + (17 + 1) + 4 * 12 + (3 * 12 + 17)) + 2 * 12 + 3
    + 12 + (1 + 16 + 4) - 1 + 11 * 10 // 2,
    "encoder": 2 * (2 * 3 * 16 + 2 * 12 + 17 + (12 + 1) + (17 + 1) + 4 * 12 + (3 * 12 + 17)),
    "encoder_layer": 2 * 3 * 16 + 2 * 12 + (12 + 1) + (17 + 1) + 12 + 17,
    "multihead": 2 * 3 * 16 + 2 * 12,
    "multihead_plain": 2 * 3 * 16,
}


def probe(model: nn.Module):
    return output_function(model, inputs(model, torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("name", MODELS)
def test_random_elements_leave_the_output_alone(name: str) -> None:
    model = MODELS[name]()
    symmetry, params = find_symmetry(model), params_of(model)
    report = check(symmetry, probe(model), params, generator=torch.Generator().manual_seed(2))
    single = name in ("llama", "vit")  # transformers computes their norms or softmax in float32
    assert report.invariance < (1e-6 if single else 1e-12)
    assert report.moved > 0.05 and report.ok
    assert symmetry.dimension(params) == DIMENSIONS[name]


@pytest.mark.parametrize("name", MODELS)
def test_a_broken_twin_fails(name: str) -> None:
    """Without the dual, the query-key group no longer cancels."""
    model = MODELS[name]()
    symmetry = find_symmetry(model)
    drop = {key: pattern.replace("*", "") for key, pattern in symmetry.tensors.items()}
    broken = Symmetry(drop, symmetry.groups, symmetry.sizes)
    report = check(broken, probe(model), params_of(model), generator=torch.Generator().manual_seed(2))
    assert report.invariance > 1e-2 and not report.ok


def test_full_gl_on_a_rotary_head_fails() -> None:
    model = llama()
    symmetry = find_symmetry(model)
    groups = {name: GeneralLinear(per=group.per) if name.startswith("e[") else group
              for name, group in symmetry.groups.items()}
    report = check(Symmetry(symmetry.tensors, groups, symmetry.sizes), probe(model), params_of(model))
    assert report.invariance > 1e-2


def test_activations_decide_what_the_mlp_allows() -> None:
    assert is_homogeneous(nn.ReLU()) and is_homogeneous(nn.LeakyReLU(0.3)) and not is_homogeneous(nn.GELU())
    assert is_odd(nn.Tanh()) and not is_odd(nn.SiLU())
    relu = nn.TransformerEncoderLayer(12, 3, 17, activation="relu")
    gelu = nn.TransformerEncoderLayer(12, 3, 17, activation="gelu")
    kinds = [{type(g) for g in find_symmetry(m).groups.values()} for m in (relu, gelu)]
    assert PositiveScaling in kinds[0] and PositiveScaling not in kinds[1]


def test_frozen_parameters_do_not_move() -> None:
    model = bert()
    frozen = "bert.encoder.layer.0.attention.self.key.weight"
    model.get_parameter(frozen).requires_grad_(False)
    symmetry, params = find_symmetry(model), params_of(model)
    action = symmetry.bind(params)
    moved = action.act(action.random(torch.Generator().manual_seed(0)), params)
    assert torch.equal(moved[frozen], params[frozen])
    assert not torch.equal(moved[frozen.replace("key", "value")], params[frozen.replace("key", "value")])
    assert symmetry.dimension(params) == DIMENSIONS["bert"] - 3 * 49 - 21


def test_frozen_parameters_may_be_absent() -> None:
    """Only the value-output part of the first layer is trained: its pairs are what a manifold of the rest has."""
    model = bert(1)
    for name, p in model.named_parameters():
        p.requires_grad_(any(part in name for part in ("attention.self.value", "attention.output.dense")))
    symmetry, everything = find_symmetry(model), params_of(model)
    trained = {name: p for name, p in everything.items() if model.get_parameter(name).requires_grad}
    action = symmetry.bind(trained)
    assert {type(group) for group in action.groups.values()} == {GeneralLinear}
    moved = action.act(action.random(torch.Generator().manual_seed(0)), trained)
    f = probe(model)
    for before, after in zip(f(everything), f(everything | moved)):
        assert torch.allclose(before, after, atol=1e-12)
    assert all((moved[name] - p).norm() > 0.05 for name, p in trained.items() if name.endswith("weight"))
    assert ParameterManifold(trained, symmetry).layout.pairs == 3
    missing = {name: p for name, p in trained.items() if not name.endswith("value.weight")}
    with pytest.raises(SymmetryError, match="value.weight"):
        symmetry.bind(missing)


def test_a_model_that_is_frozen_altogether_has_no_motion() -> None:
    model = bert(1).requires_grad_(False)
    symmetry = find_symmetry(model)
    assert symmetry.dimension(params_of(model)) == 0 and not symmetry.bind(params_of(model)).groups


def test_weights_that_are_not_there_cannot_be_tried() -> None:
    with torch.device("meta"):
        model = nn.TransformerEncoderLayer(12, 3, 17)
    with pytest.warns(UserWarning, match="meta device.*not tried"):
        symmetry = find_symmetry(model)
    assert symmetry == find_symmetry(nn.TransformerEncoderLayer(12, 3, 17))


def test_weights_that_are_not_finite_are_named() -> None:
    model = tiny_vit()
    with torch.no_grad():
        name, p = list(model.named_parameters())[3]
        p.view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match=f"parameter '{name}' has entries that are not finite"):
        find_symmetry(model)


def test_the_model_is_not_touched() -> None:
    model = tiny_vit()
    model.train()
    before = params_of(model)
    find_symmetry(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(module.training for module in model.modules())


def test_half_precision_and_wrapped_models() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = bert()
            self.head = nn.Linear(3, 2).double()

    symmetry = find_symmetry(Wrapper())
    assert "inner.bert.encoder.layer.1.output.dense.weight" in symmetry.tensors
    assert find_symmetry(tiny_vit().to(torch.bfloat16)).tensors


def test_unknown_models_are_named() -> None:
    class Net(nn.Module):
        """What it calls in which order nobody can tell."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    with pytest.raises(SymmetryError, match="Net has no layer of a known family.*symgeo.check"):
        find_symmetry(Net())
    assert find_symmetry(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))).groups
    with pytest.raises(SymmetryError, match=r"LSTM"):
        find_symmetry(nn.LSTM(3, 4))
    with pytest.raises(SymmetryError, match="no layer of a known family"):
        find_symmetry(nn.Conv2d(1, 2, 3))


def test_unknown_parts_are_named_and_left_alone() -> None:
    class WithMemory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(12, 3, 17, batch_first=True)
            self.memory = nn.GRU(12, 12)

    with pytest.raises(SymmetryError, match=r"no table describes: memory \(GRU\).*strict=False"):
        find_symmetry(WithMemory())
    with pytest.warns(UserWarning, match=r"memory \(GRU\).*left alone"):
        symmetry = find_symmetry(WithMemory(), strict=False)
    assert not any(name.startswith("memory") for name in symmetry.tensors)


def test_a_subclass_that_computes_something_else_is_caught() -> None:
    class Scaled(nn.TransformerEncoderLayer):
        """Reads one coordinate of the queries outside attention."""

        def forward(self, src: torch.Tensor) -> torch.Tensor:
            return super().forward(src) + src @ self.self_attn.in_proj_weight[:1].mT

    model = randomise(Scaled(12, 3, 17))
    with pytest.raises(SymmetryError, match=r"does not have the symmetry of the family nn.TransformerEncoderLayer"):
        find_symmetry(model)


def test_layers_that_cannot_be_tried_are_not_trusted() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = bert().bert.encoder.layer

    with pytest.raises(SymmetryError, match="cannot be tried alone"):
        find_symmetry(Stack())


def test_a_family_is_one_small_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new architecture needs names only."""

    class Mini(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))
            self.heads = 2

    family = Family("Mini", f"{Mini.__module__}.{Mini.__qualname__}",
                    AttentionNames(query="q", key="k", value="v", output="o", heads="heads"))
    monkeypatch.setattr("symgeo.models.recognise.FAMILIES", (family,))
    model = nn.ModuleDict({"block": Mini()})
    symmetry = symmetry_of(model, recognise(model))
    assert symmetry.tensors["block.q.weight"] == "(H[block] e[block]*) _"
    assert symmetry.tensors["block.o.weight"] == "_ (H[block] f[block]*)"
