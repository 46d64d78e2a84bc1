"""find_symmetry finds every flat direction: its dimension is the nullity of the Jacobian of generic outputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import params_of, randomise
from torch import Tensor, nn

from symgeo import Symmetry, SymmetryError, check, find_symmetry
from symgeo.models.tiny_vit import TinyViT

WIDTH, HEADS, HIDDEN = 8, 2, 6
SIZE = {"num_hidden_layers": 1, "vocab_size": 11, "attn_implementation": "eager"}
Case = tuple[nn.Module, Callable[[Callable[..., object]], Tensor]]


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def pretrained(model: nn.Module, frozen: list[str], sequences: int = 40) -> Case:
    """A model that starts from embeddings, whose own are constants."""
    model = randomise(model, size=0.3)
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    return model, lambda f: f(inputs_embeds=inputs(sequences, 6, WIDTH)).last_hidden_state  # type: ignore[attr-defined]


def gpt2() -> Case:
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(n_embd=WIDTH, n_layer=1, n_head=HEADS, n_inner=HIDDEN, n_positions=8, bos_token_id=0,
                        eos_token_id=0, vocab_size=11, attn_implementation="eager")
    return pretrained(GPT2Model(config), ["wte", "wpe"])


def bert(layers: int = 1, eps: float = 1e-2) -> Case:
    """The eps is large, so that the scales of norms are far from flat."""
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=WIDTH, num_attention_heads=HEADS, intermediate_size=HIDDEN, layer_norm_eps=eps,
                        max_position_embeddings=16, **SIZE | {"num_hidden_layers": layers})
    return pretrained(BertModel(config, add_pooling_layer=False), ["embeddings"], 40 * layers)


def llama() -> Case:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(hidden_size=WIDTH, head_dim=4, num_attention_heads=4, num_key_value_heads=2,
                         intermediate_size=HIDDEN, max_position_embeddings=16, **SIZE)
    return pretrained(LlamaModel(config), ["embed_tokens"])


def encoder(prenorm: bool, final: bool, layers: int = 1, eps: float = 1e-2) -> Case:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, norm_first=prenorm, activation="gelu", layer_norm_eps=eps)
    norm = nn.LayerNorm(WIDTH, eps=eps) if final else None
    model = randomise(nn.TransformerEncoder(layer, layers, norm=norm, enable_nested_tensor=False), size=0.3)
    return model, lambda f: f(inputs(6, 30 * layers, WIDTH))  # type: ignore[return-value]


def multihead() -> Case:
    model = randomise(nn.MultiheadAttention(WIDTH, HEADS, kdim=5, vdim=7, add_bias_kv=True), size=0.3)
    query, key, value = inputs(6, 40, WIDTH), inputs(7, 40, 5), inputs(7, 40, 7)
    return model, lambda f: f(query, key, value, need_weights=False)[0]  # type: ignore[index]


def from_tokens(kind: str) -> Case:
    """A whole model, its embeddings included, on sequences that use all of them."""
    from transformers import BertConfig, BertForSequenceClassification, BertModel, GPT2Config, GPT2Model

    common = {"vocab_size": 11, "attn_implementation": "eager"}
    if kind != "gpt2":
        config = BertConfig(hidden_size=WIDTH, num_attention_heads=HEADS, intermediate_size=HIDDEN, num_hidden_layers=1,
                            layer_norm_eps=1e-2, max_position_embeddings=7, num_labels=3, **common)
        model: nn.Module = BertForSequenceClassification(config)
        if kind == "bert":
            model = BertModel(config, add_pooling_layer=False)
    else:
        model = GPT2Model(GPT2Config(n_embd=WIDTH, n_layer=1, n_head=HEADS, n_inner=HIDDEN, n_positions=7,
                                     bos_token_id=0, eos_token_id=0, **common))
    generator = torch.Generator().manual_seed(3)
    ids, types = (torch.randint(0, n, (400 if kind == "classifier" else 80, 7), generator=generator) for n in (11, 2))
    extra = {"token_type_ids": types} if kind != "gpt2" else {}
    return randomise(model, size=0.3), lambda f: f(input_ids=ids, **extra)[0]  # type: ignore[index]


def vit() -> Case:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=HEADS, intermediate_size=HIDDEN,
                       image_size=4, patch_size=2, num_channels=1, layer_norm_eps=1e-2,
                       attn_implementation="sdpa")  # the eager softmax is in single precision
    model = randomise(ViTModel(config, add_pooling_layer=False), size=0.3)
    return model, lambda f: f(pixel_values=inputs(80, 1, 4, 4))[0]  # type: ignore[index]


def tiny_vit(depth: int = 1, whole: bool = False) -> Case:
    model = TinyViT(image_size=4, patch_size=2, width=WIDTH, heads=HEADS, mlp_width=HIDDEN, classes=3, depth=depth)
    model = randomise(model, size=0.3)
    model.get_submodule("embed").requires_grad_(whole)
    model.get_parameter("position").requires_grad_(whole)
    return model, lambda f: f(inputs(300 * depth, 4, 4))  # type: ignore[return-value]


def nullity(case: Case) -> int:
    """The number of zero singular values of d outputs / d trainable parameters, across a clear gap."""
    model, outputs = case
    params = params_of(model)
    moving = {name: params[name] for name, p in model.named_parameters() if p.requires_grad}

    def f(p: dict[str, Tensor]) -> Tensor:
        return outputs(lambda *args, **kwargs: torch.func.functional_call(model, params | p, args, kwargs)).reshape(-1)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        blocks = torch.func.jacrev(f)(moving)
    jacobian = torch.cat([x.flatten(1) for x in blocks.values()], dim=1)
    assert jacobian.shape[0] > 1.5 * jacobian.shape[1]
    values = torch.linalg.svdvals(jacobian)
    rank = int((values > 1e-10 * values[0]).sum())
    assert rank == len(values) or values[rank - 1] > 1e5 * values[rank]
    return len(values) - rank


# query-key and value-output GL 2 * 32; key and value biases 16; means of writers 9 + 7; rows of readers 24 + 6
BLOCK = 64 + 16 + 16 + 30
CASES: dict[str, tuple[Callable[[], Case], int]] = {
    "GPT-2": (gpt2, 158),
    "BERT": (bert, 134),
    "BERT, 2 layers": (lambda: bert(2), 276),
    "BERT, eps 0": (lambda: bert(1, 0.0), 135),
    "BERT, 2 layers, eps 0": (lambda: bert(2, 0.0), 279),
    "LLaMA": (llama, 8 + 32 + 6 + 16),
    "pre-norm": (lambda: encoder(True, True), BLOCK + 32),
    "post-norm": (lambda: encoder(False, False), BLOCK - 24 + 8),
    "post-norm, 2 layers": (lambda: encoder(False, False, 2), 2 * BLOCK - 24 + 3 * 8),
    "post-norm, 2 layers, last norm": (lambda: encoder(False, True, 2), 2 * BLOCK - 24 + 3 * 8 + 1),
    "post-norm, 2 layers, last norm, eps 0": (lambda: encoder(False, True, 2, 0.0), 2 * BLOCK - 24 + 3 * 8 + 1 + 4),
    "multihead": (multihead, 64 + 16),
    # the norm of the embeddings 24 - 16; exchanges 2 * 8; means of all rows 20; an exchange of means counts once
    "BERT with embeddings": (lambda: from_tokens("bert"), 134 + 8 + 16 + 20 - 2),
    "GPT-2 with embeddings": (lambda: from_tokens("gpt2"), 158 + 8 + 18 - 1),
    "BERT with embeddings and a classifier": (lambda: from_tokens("classifier"), 134 + 8 + 16 + 20 - 2 + 3 * 8),
    "ViT with embeddings": (vit, 158 + 16 + (1 + 1 + 5 + 4) - 2),
    "TinyViT": (tiny_vit, BLOCK + 32 + 16 + 3),
    "TinyViT, 2 layers": (lambda: tiny_vit(2), 2 * (BLOCK + 32) + 16 + 3),
}


@pytest.mark.parametrize("name", CASES)
def test_the_dimension_is_the_nullity(name: str) -> None:
    make, expected = CASES[name]
    case = make()
    dimension = find_symmetry(case[0]).dimension(params_of(case[0]))
    assert dimension == expected == nullity(case)


def test_rotations_of_the_stream() -> None:
    """With embeddings, gains and head all free, the stream may be rotated within its mean-free part: O(width - 1)."""
    case = tiny_vit(whole=True)
    dimension = find_symmetry(case[0]).dimension(params_of(case[0]))
    assert dimension == BLOCK + 32 + 16 + 3 + (8 + 9 - 1) + (WIDTH - 1) * (WIDTH - 2) // 2 == nullity(case)


def test_random_vertical_vectors_span_that_many_directions() -> None:
    model, _ = bert()
    params, symmetry = params_of(model), find_symmetry(model)
    action, generator = symmetry.bind(params), torch.Generator().manual_seed(0)
    rows = [torch.cat([x.flatten() for x in action.vertical(action.random_algebra(generator), params).values()])
            for _ in range(160)]
    assert int(torch.linalg.matrix_rank(torch.stack(rows), rtol=1e-10)) == symmetry.dimension(params) == 134


def test_scales_that_hold_up_to_an_eps_are_asked_for() -> None:
    for layers, exact, more in ((1, 134, 1), (2, 276, 3)):
        model, _ = bert(layers, 1e-6)
        params = params_of(model)
        assert find_symmetry(model).dimension(params) == exact
        assert find_symmetry(model, approximate=True).dimension(params) == exact + more
    model, _ = encoder(False, True, 2, eps=1e-6)
    more = find_symmetry(model, approximate=True).dimension(params_of(model))
    assert more == find_symmetry(model).dimension(params_of(model)) + 4
    with pytest.raises(SymmetryError, match=r"groups .*\[encoder.layer.\*\]"):
        find_symmetry(bert(2, eps=1.0)[0], approximate=True)


def test_masked_tokens_are_moved_with_the_patches() -> None:
    from transformers import ViTConfig, ViTForMaskedImageModeling

    model = randomise(ViTForMaskedImageModeling(ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=HEADS, intermediate_size=HIDDEN, image_size=4,
        patch_size=2, encoder_stride=2, num_channels=1, attn_implementation="sdpa")))
    params, symmetry = params_of(model), find_symmetry(model)
    images, mask = inputs(5, 1, 4, 4), inputs(5, 4) > 0

    def f(p: dict[str, Tensor]) -> Tensor:
        out = torch.func.functional_call(model, p, (images,), {"bool_masked_pos": mask})
        return out.reconstruction  # type: ignore[no-any-return]

    only = Symmetry({}, {}, flows=symmetry.flows)
    assert "exchange_0_1[vit]" in only.flows and check(only, f, params).invariance < 1e-12


def test_frozen_embeddings_are_read() -> None:
    """The norm before the first layer is a constant; the rows that read it are free all the same."""
    model, _ = bert()
    symmetry = find_symmetry(model)
    action = symmetry.bind(params_of(model))
    assert "query_rows[encoder.layer.0]" in action.flows and "entry_norm_bias[encoder.layer.0]" in symmetry.flows
    assert "entry_norm_bias[encoder.layer.0]" not in action.flows
