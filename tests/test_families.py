"""Every family: what is found is true, a broken twin fails, and nothing is missing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from networks import params_of
from torch import nn
from zoo import ZOO, Case

from symgeo import CountReport, Symmetry, check, count, find_symmetry
from symgeo.groups import GeneralLinear, Rotary
from symgeo.models import logit_symmetry
from symgeo.models.precision import full_double

#: the embeddings of ModernBERT are a table of free vectors behind a norm with an eps, so that small changes of its gain
#: (one for each coordinate) can be taken back by all rows; these are no group, and are not declared
LOCAL = {"ModernBERT": 8}
#: one instance of every family, with its flat directions counted by the Jacobian of its outputs
COMPLETE = (
    "BERT classifier", "BERT masked LM", "BERT masked LM, untied", "RoBERTa", "RoBERTa masked LM",
    "DistilBERT classifier", "DistilBERT masked LM", "GPT-2", "GPT-2, untied", "Phi-3", "LLaMA", "LLaMA, tied",
    "LLaMA, biases", "Mistral",
    "Mixtral", "Qwen2", "Qwen3", "Gemma 2", "Gemma 3", "OPT", "OPT, post-norm", "OPT, projected", "BLOOM", "T5 encoder",
    "T5", "T5 1.1", "ViT classifier", "ViT classifier, no biases", "DeiT classifier", "CLIP vision", "CLIP text",
    "SigLIP vision", "SigLIP text", "Whisper", "timm ViT", "torchvision ViT",
    "TinyLM", "TinyViT", "nn.TransformerEncoderLayer, pre-norm",
    "nn.TransformerEncoder, post-norm, norm", "nn.TransformerDecoderLayer", "nn.TransformerDecoderLayer, pre-norm",
    "nn.TransformerDecoder, pre-norm", "nn.Transformer", "nn.Transformer, pre-norm",
)
#: sizes at which a stream that starts from tokens alone is not generic otherwise
SIZES = {"GPT-NeoX": {"layers": 2, "vocab": 23}, "GPT-NeoX, sequential": {"vocab": 29},
         "Phi": {"layers": 2, "vocab": 23},
         "OLMo 2": {"vocab": 47}, "OPT, post-norm": {"vocab": 19}, "OPT, projected": {"vocab": 23}}


def generator(seed: int = 2) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def measured(symmetry: Symmetry, case: Case, by_group: bool = False) -> tuple[float, float]:
    """(change of the outputs, motion of the parameters) for a random element."""
    with full_double():
        report = check(symmetry, case.function(), params_of(case.model), 1, generator(), by_group=by_group)
    return report.invariance, report.moved


def counted_of(case: Case, symmetry: Symmetry) -> CountReport:
    """Declared and measured flat directions of the outputs of a case."""
    return count(symmetry, case.function(), params_of(case.model))


def broken(symmetry: Symmetry) -> Symmetry:
    """Without duals: where a query turns by the inverse transpose, it now turns with the key."""
    tensors = {name: text.replace("*", "") for name, text in symmetry.tensors.items()}
    return Symmetry(tensors, symmetry.groups, symmetry.sizes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_random_elements_of_the_whole_group(name: str) -> None:
    case = ZOO[name]()
    symmetry = find_symmetry(case.model)
    change, moved = measured(symmetry, case)
    assert change < 1e-10 and moved > 0.05
    change, moved = measured(broken(symmetry), case)
    assert change > 1e-2 and moved > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", [*COMPLETE, *(name for name in SIZES if name not in COMPLETE)])
def test_the_dimension_is_the_nullity(name: str) -> None:
    case = ZOO[name](**SIZES.get(name, {}))
    symmetry = find_symmetry(case.model)
    counted = counted_of(case, symmetry)
    assert counted.reliable and counted.declared == symmetry.dimension(params_of(case.model))
    assert counted.explained == counted.measured > 0


# the layers alone, their embeddings constant: the sizes of a published count, and two others for each
@pytest.mark.parametrize(("name", "sizes", "expected"), [
    ("LLaMA, bare", {}, 62), ("LLaMA, bare", {"width": 12, "hidden": 5, "vocab": 19}, 5 + 24 + 8 + 32),
    ("LLaMA, bare", {"layers": 2, "vocab": 13}, 124),
    ("GPT-2, bare", {}, 158), ("GPT-2, bare", {"width": 6, "hidden": 5, "heads": 3, "vocab": 13}, None),
    ("GPT-2, bare", {"layers": 2}, 316),
    ("BERT", {"eps": 0.0}, 135), ("BERT", {"eps": 0.0, "width": 6, "hidden": 5, "heads": 3, "vocab": 13}, None),
    ("BERT", {"eps": 0.0, "layers": 2, "vocab": 13}, 279),
])
def test_layers_alone(name: str, sizes: dict[str, float], expected: int | None) -> None:
    case = ZOO[name](**sizes)
    for part, p in case.model.named_parameters():
        p.requires_grad_(not any(word in part for word in ("embed", "wte", "wpe")))
    symmetry = find_symmetry(case.model)
    counted = counted_of(case, symmetry)
    assert counted.declared == counted.measured and expected in (None, counted.declared)


@pytest.mark.parametrize("sizes", [{}, {"width": 12, "hidden": 5, "vocab": 19}, {"layers": 2, "vocab": 13}])
def test_normalised_queries_without_eps(sizes: dict[str, float]) -> None:
    """Norms without eps remove scales exactly: those of every query head, every key head and the stream."""
    case = ZOO["Qwen3"](eps=0.0, **sizes)
    symmetry = find_symmetry(case.model)
    counted = counted_of(case, symmetry)
    assert counted.reliable and counted.declared == counted.measured


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LLaMA, tied", "GPT-2", "BERT", "Gemma 2", "Gemma 3", "BLOOM", "Mixtral",
                                  "T5 encoder", "Whisper", "ViT classifier"])
def test_scales_that_norms_remove(name: str) -> None:
    """Exact, and complete, where a norm has no eps; asked for, and measured to hold approximately, where it has."""
    case, near, far = (ZOO[name](eps=eps) for eps in (0.0, 1e-9, 1e-2))
    counted = counted_of(case, find_symmetry(case.model))
    assert counted.reliable and counted.explained == counted.measured
    params = params_of(near.model)
    exact, more = find_symmetry(near.model), find_symmetry(near.model, approximate=True)
    assert more.dimension(params) == counted.declared > exact.dimension(params)
    assert measured(exact, near)[0] < 1e-10
    assert 1e-14 < measured(more, near)[0] < 1e-3
    with pytest.raises(ValueError, match="does not have the symmetry"):
        find_symmetry(far.model, approximate=True)


def test_full_gl_where_positions_are_rotary_or_queries_normalised() -> None:
    for name in ("LLaMA", "GPT-NeoX", "Gemma 2"):
        case = ZOO[name]()
        symmetry = find_symmetry(case.model)
        groups = {key: GeneralLinear(per=group.per) if isinstance(group, Rotary) else group
                  for key, group in symmetry.groups.items()}
        assert any(isinstance(group, Rotary) for group in symmetry.groups.values())
        assert measured(Symmetry(symmetry.tensors, groups, symmetry.sizes), case)[0] > 1e-2
    for name in ("Qwen3", "Gemma 3", "OLMo 2"):
        symmetry = find_symmetry(ZOO[name]().model)
        assert not any(isinstance(group, Rotary) for group in symmetry.groups.values())
        assert sum(isinstance(group, GeneralLinear) for group in symmetry.groups.values()) == 1  # of values and outputs


def test_an_offset_gain_is_not_traded_as_a_plain_one() -> None:
    """Gemma's norms multiply by 1 + weight: scaling the weight itself changes the function."""
    case = ZOO["Gemma 2"]()
    symmetry = find_symmetry(case.model)
    wrong = {name: replace(flow, offset=0.0) if name.startswith("c_gain") else flow  # type: ignore[type-var]
             for name, flow in symmetry.flows.items()}
    only = Symmetry({}, {}, flows={name: flow for name, flow in symmetry.flows.items() if name.startswith("c_gain")})
    assert measured(only, case)[0] < 1e-12
    change, _ = measured(Symmetry({}, {}, flows={n: f for n, f in wrong.items() if n.startswith("c_gain")}), case)
    assert change > 1e-2


def test_what_softmax_over_the_logits_does_not_see() -> None:
    """Translations of the head: flat for probabilities, not for logits; and nothing else is."""
    case = ZOO["LLaMA"]()
    whole = find_symmetry(case.model) | logit_symmetry(case.model)
    f = case.function()

    def probabilities(params: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(x.log_softmax(-1) for x in f(params))

    counted = count(whole, probabilities, params_of(case.model))
    assert counted.complete and counted.declared == 98 + 8
    assert measured(logit_symmetry(case.model), case)[0] > 1e-2
    for name in ("LLaMA, tied", "Gemma 2", "BERT"):
        with pytest.raises(ValueError, match="no head whose translation softmax does not see"):
            logit_symmetry(ZOO[name]().model)


def test_biases_of_norms_that_are_still_zero() -> None:
    """As a model is built: the head has no bias, and the bias of the last norm is 0."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=7, vocab_size=11, bos_token_id=0,
                                       eos_token_id=0, tie_word_embeddings=False)).double().eval()
    assert not bool(model.transformer.ln_f.bias.any())
    symmetry = find_symmetry(model)
    assert "final_norm_bias[transformer]" in symmetry.flows
    action = symmetry.bind(params_of(model))
    moved = action.act(action.random(generator()), params_of(model))
    assert all(bool(x.isfinite().all()) for x in moved.values())


def test_a_7b_layout_needs_no_weights() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    with pytest.warns(UserWarning, match="not tried"):
        symmetry = find_symmetry(model)
    params = dict(model.named_parameters())
    assert sum(p.numel() for p in params.values()) > 6.7e9 and all(p.is_meta for p in params.values())
    per_layer = 32 * (128 + 128 * 128) + 11008 + 2 * 4096
    assert symmetry.dimension(params) == 32 * per_layer + 4096 + 4096 * 4095 // 2


def test_frozen_parts_stay_where_they_are() -> None:
    case = ZOO["LLaMA"]()
    case.model.get_parameter("model.embed_tokens.weight").requires_grad_(False)
    symmetry = find_symmetry(case.model)
    assert "rotation[model]" in symmetry.flows
    action = symmetry.bind(params_of(case.model))
    assert "rotation[model]" not in action.flows
    counted = counted_of(case, symmetry)
    assert counted.declared == counted.measured == 98 - 28


def test_unknown_layers_inside_known_stacks_are_named() -> None:
    case = ZOO["LLaMA"]()
    case.model.model.layers[0].extra = nn.Linear(8, 8).double()
    with pytest.raises(ValueError, match=r"model\.layers\.0\.extra \(Linear\)"):
        find_symmetry(case.model)
