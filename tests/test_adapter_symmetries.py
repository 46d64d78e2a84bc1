"""Low-rank adapters: GL of the rank, on models of any kind; what is no such adapter is named and left alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import Any

import pytest
import torch
from networks import params_of
from torch import Tensor, nn

from symgeo import Symmetry, check, count
from symgeo.models.adapters import adapter_factors, adapter_symmetries
from symgeo.models.precision import full_double

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in (
    ".is_gradient_checkpointing. is deprecated", "LoRA adapter added to ConvNd layer", "aLoRA is currently only")]
WIDTH, HIDDEN = 8, 6
Function = Callable[[dict[str, Tensor]], tuple[Tensor, ...]]
SIZE = {"vocab_size": 23, "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": HIDDEN, "max_position_embeddings": 16, "attn_implementation": "eager"}


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(LlamaConfig(num_key_value_heads=1, **SIZE))


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**SIZE), add_pooling_layer=False)


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralModel

    return MixtralModel(MixtralConfig(num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2,
                                      experts_implementation="eager", **SIZE))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.groups, self.line = nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 2, groups=2), nn.Conv1d(6, 5, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.line(self.groups(self.image(x).tanh()).tanh().flatten(2))
        return out


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.core(x, x, x, need_weights=False)[0]
        return out


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(11, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).tanh())
        return out


def adapted(model: nn.Module, *configs: Any) -> nn.Module:
    """Float64, evaluation mode, everything random; all adapters active."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        result: Any = peft.get_peft_model(model, configs[0])
        for number, config in enumerate(configs[1:]):
            result.add_adapter(f"more{number}", config)
        result.base_model.set_adapter(list(result.peft_config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in result.double().eval().parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return result  # type: ignore[no-any-return]


def lora(targets: Any, r: int = 2, **kwargs: Any) -> Any:
    return peft.LoraConfig(r=r, target_modules=targets, **kwargs)


def symmetry_of(model: nn.Module) -> Symmetry:
    found = [symmetry for _, symmetry in adapter_symmetries(model)]
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    joined = reduce(or_, found, Symmetry({}, {}))
    return Symmetry(joined.tensors, joined.groups, joined.sizes, frozen=frozen, flows=joined.flows)


def outputs(model: nn.Module, *shape: int) -> Function:
    """Of small batches of random inputs: token ids, or numbers where a shape is given."""
    generator = torch.Generator().manual_seed(3)
    if shape:
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    else:
        x = torch.cat([torch.arange(25).reshape(5, 5) % 23, torch.randint(0, 23, (27, 5), generator=generator)])

    def f(params: dict[str, Tensor]) -> tuple[Tensor, ...]:
        found = (torch.func.functional_call(model, params, (part,)) for part in x.split(8))
        return tuple(y if isinstance(y, Tensor) else y.last_hidden_state for y in found)

    return f


def assert_holds(model: nn.Module, f: Function, dimension: int) -> Symmetry:
    symmetry, params = symmetry_of(model), params_of(model)
    with full_double():
        report = check(symmetry, f, params, samples=1, generator=torch.Generator().manual_seed(1), by_group=False)
        assert report.invariance < 1e-12 and report.moved > 0.05 and report.ok
        assert symmetry.dimension(params) == dimension
        dropped = Symmetry({key: text.replace("*", "") for key, text in symmetry.tensors.items()}, symmetry.groups,
                           symmetry.sizes, frozen=symmetry.frozen)
        assert check(dropped, f, params, samples=1, by_group=False).invariance > 1e-2
    return symmetry


LANGUAGE: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    # declared, and how much more is flat because of the model around the adapters
    "LLaMA, q and v": (lambda: adapted(llama(), lora(["q_proj", "v_proj"])), 2 * 4, 0),
    "LLaMA, all": (lambda: adapted(llama(), lora("all-linear", rank_pattern={"q_proj": 3, "down_proj": 1})),
                   5 * 4 + 9 + 1, 0),
    "LLaMA, DoRA": (lambda: adapted(llama(), lora(["q_proj", "v_proj"], use_dora=True)), 2 * 4, 0),
    "LLaMA, two": (lambda: adapted(llama(), lora(["q_proj", "v_proj"]), lora(["q_proj", "o_proj"], 3, lora_alpha=3)),
                   5 * 5 + 4 + 9, 0),
    "BERT, q and v": (lambda: adapted(bert(), lora(["query", "value"])), 2 * 4, 0),
    # the norms remove means of two writers, softmax does not see rows of keys that read a LayerNorm
    "BERT, all": (lambda: adapted(bert(), lora("all-linear")), 6 * 4, 3 * 2),
    # and means of embeddings
    "BERT, embeddings": (lambda: adapted(bert(), lora(["word_embeddings", "query"])), 2 * 4, 2),
}


@pytest.mark.parametrize("name", LANGUAGE)
def test_adapters_of_transformers(name: str) -> None:
    make, dimension, more = LANGUAGE[name]
    model = make()
    f = outputs(model)
    symmetry = assert_holds(model, f, dimension)
    report = count(symmetry, f, params_of(model), generic=False)
    assert report.measured == dimension + more and report.reliable


def test_experts_have_their_own_bases() -> None:
    both = ["experts.gate_up_proj", "experts.down_proj"]
    model = adapted(mixtral(), lora(["q_proj"], target_parameters=both))
    f = outputs(model)
    symmetry = assert_holds(model, f, 4 + 2 * 3 * 4)
    key = "base_model.model.layers.0.mlp.experts.lora_B.default.weight"
    r, e = (f"{letter}[base_model.model.layers.0.mlp.experts.default]" for letter in "rE")
    assert symmetry.tensors[key] == f"_ ({r} {e})" and symmetry.sizes[e] == 3
    fused = dict(symmetry.tensors) | {key: f"_ ({e} {r})"}
    other = Symmetry(fused, symmetry.groups, symmetry.sizes, frozen=symmetry.frozen)
    assert check(other, f, params_of(model), samples=2, by_group=False).invariance > 1e-2


def test_adapters_of_convolutions() -> None:
    model = adapted(Convolutions(), lora(["image", "line"]))
    f = outputs(model, 40, 4, 5, 5)
    report = count(assert_holds(model, f, 2 * 4), f, params_of(model), generic=False)
    assert report.complete and report.reliable
    model = adapted(Convolutions(), lora(["image", "groups"], 4), lora(["line", "groups"], 2))
    symmetry = assert_holds(model, outputs(model, 20, 4, 5, 5), 16 + 2 * 4 + 4 + 2 * 1)
    name = "base_model.model.groups.lora_A.default.weight"
    assert symmetry.tensors[name] == "(G[base_model.model.groups.default] r[base_model.model.groups.default]*) _ _ _"


def test_adapters_of_multihead_attention() -> None:
    model = adapted(Attention(), lora(["core"]))
    assert_holds(model, outputs(model, 8, 5, 6), 2 * 4)


@pytest.mark.parametrize("kind", ["rslora", "bias", "dora", "two", "velora"])
def test_variants_that_are_products(kind: str) -> None:
    more = {"rslora": {"use_rslora": True}, "bias": {"lora_bias": True}, "dora": {"use_dora": True}, "two": {}}
    if kind == "velora":
        from peft.tuners.lora.config import VeloraConfig

        more[kind] = {"velora_config": VeloraConfig()}
    again = [lora(["first"], 3)] if kind == "two" else []
    model = adapted(Two(), lora(["first", "second"], **more[kind]), *again)
    f = outputs(model, 80, 11)
    symmetry = assert_holds(model, f, 4 + (25 if kind == "two" else 4))
    if kind in ("rslora", "bias", "two"):
        report = count(symmetry, f, params_of(model), generic=False)
        assert report.measured == report.declared and report.reliable


def test_adapters_that_are_not_active_are_declared_alone() -> None:
    model = adapted(Two(), lora(["first"]), lora(["first"], 3))
    model.base_model.set_adapter("more0")
    assert {key.split("[")[0] for _, s in adapter_symmetries(model) for key in (*s.groups, *s.flows)} == {"r"}


def test_adapters_that_wait_for_a_token_are_told_that_it_came() -> None:
    model = adapted(llama(), lora(["q_proj"], alora_invocation_tokens=[3], task_type="FEATURE_EXTRACTION"))
    assert len(adapter_symmetries(model)) == 1


def test_what_is_no_product_is_left_alone_and_named() -> None:
    from peft.tuners.lora.config import KasaConfig

    more = r"left alone: base_model.model.first \(default: it computes more than B A\)"
    cases = [
        (more, peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=["first"])),
        (more, lora(["first"], kasa_config=KasaConfig())),
        (r"first \(peft.tuners.vera.layer.Linear\)", peft.VeraConfig(r=2, target_modules=["first"])),
    ]
    for message, config in cases:
        with pytest.warns(UserWarning, match=message):
            assert adapter_symmetries(adapted(Two(), config)) == []


def test_factors_that_do_not_fit_are_left_alone() -> None:
    layer: Any = nn.Module()
    layer.lora_A = nn.ModuleDict({"task": nn.Linear(5, 2, bias=False)})
    layer.lora_B = nn.ModuleDict({"task": nn.Linear(1, 3, bias=False)})
    with pytest.warns(UserWarning, match=r"task: factors of shapes \(3, 1\) and \(2, 5\)"):
        assert adapter_symmetries(layer) == []
    layer.lora_B["task"] = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU())
    assert adapter_symmetries(layer) == []
    layer.lora_B["task"] = nn.Linear(2, 3, bias=False)
    layer.lora_gate = nn.ParameterDict({"task": nn.Parameter(torch.ones(2))})
    with pytest.warns(UserWarning, match="a variant that could not be tried"):
        assert adapter_symmetries(layer) == []


def test_factors_that_are_shared_are_left_alone() -> None:
    model = adapted(Two(), lora(["first"]), lora(["first"]))
    layer: Any = model.get_submodule("base_model.model.first")
    layer.lora_A["more0"].weight = nn.Parameter(layer.lora_A["default"].weight.data)
    with pytest.warns(UserWarning, match="a factor is shared with another one"):
        assert adapter_symmetries(model) == []


def test_the_model_is_not_touched() -> None:
    model = adapted(Two(), lora(["first"], use_dora=True, lora_dropout=0.5))
    model.train()
    before = params_of(model)
    with torch.random.fork_rng():
        state = torch.random.get_rng_state()
        assert len(adapter_symmetries(model)) == 1
        assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(module.training for module in model.modules())
    assert adapter_factors(model) == {"base_model.model.first": [
        ("base_model.model.first.lora_A.default.weight", "base_model.model.first.lora_B.default.weight")]}
