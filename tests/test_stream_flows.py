"""The laws of every kind of flow that families have: inverses, velocities, what is moved and what is read."""

from __future__ import annotations

import pytest
import torch
from networks import params_of
from torch import Tensor
from zoo import ZOO

from symgeo import find_symmetry
from symgeo.functional import Params
from symgeo.symmetry import Axis, Flow, StreamRotation

#: a model that has the flow, and the beginning of its name there
KINDS = {
    "StreamRotation": ("LLaMA", "rotation"), "StreamRotation, centred": ("TinyLM", "rotation"),
    "StreamScale": ("OLMo 2", "stream_scale"), "StreamScale, tied": ("GPT-2", "stream_scale"),
    "OffsetTrade": ("Gemma 2", "c_gain"), "OffsetTrade, planes": ("Gemma 3", "gains"),
    "OffsetTrade, slices": ("nn.TransformerDecoder, pre-norm", "d_gain"),
    "NormBias": ("GPT-2, untied", "final_norm_bias"),
    "NormBias, mixed": ("ViT classifier, no biases", "attention_norm"),
    "MeanWrite": ("timm ViT, norms of heads and layer scale", "attention_mean"),
    "TiedExchange": ("BERT masked LM", "tied_exchange"), "TiedExchange, rows": ("RoBERTa masked LM", "tied_exchange1"),
    "Unread": ("OPT", "unread"), "RowFreedom, through": ("nn.TransformerDecoder, pre-norm", "query_cross_rows"),
    "Compensation, mean": ("nn.TransformerEncoderLayer, pre-norm", "mean_exchange"),
}


def found(name: str) -> tuple[Flow, Params]:
    kind, start = KINDS[name]
    model = ZOO[kind](eps=0.0 if "Scale" in name else 1e-2, layers=2).model
    flows = find_symmetry(model).flows
    flow = next(flow for key, flow in flows.items() if key.startswith(start))
    assert type(flow).__name__ == name.partition(",")[0]
    return flow, params_of(model)


def coordinates(flow: Flow, params: Params, seed: int) -> Tensor:
    n = flow.dimension({key: tuple(p.shape) for key, p in params.items()})
    return 0.5 * torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def distance(p: Params, q: Params) -> float:
    return max(float((p[key] - q[key]).abs().max()) for key in p)


@pytest.mark.parametrize("name", KINDS)
def test_laws(name: str) -> None:
    flow, params = found(name)
    t = coordinates(flow, params, 0)
    moved = flow.act(t, params)
    assert set(moved) == set(flow.moves) and not set(moved) & set(flow.reads)
    assert distance(moved, {key: params[key] for key in moved}) > 1e-2
    back = flow.act(-t, params | moved)
    assert distance(back, {key: params[key] for key in back}) < 1e-11
    h = 1e-5
    ahead, behind, velocity = flow.act(h * t, params), flow.act(-h * t, params), flow.vertical(t, params)
    assert set(velocity) == set(moved)
    for key, v in velocity.items():
        assert torch.allclose((ahead[key] - behind[key]) / (2 * h), v, atol=1e-8, rtol=1e-7)
    twice = flow.vertical(2 * t, params)
    assert all(torch.allclose(twice[key], 2 * v) for key, v in velocity.items())
    assert 0 < flow.rank(params) <= len(t)
    renamed = flow.renamed(lambda key: f"net.{key}")
    assert renamed.moves == tuple(f"net.{key}" for key in flow.moves)
    assert renamed.reads == tuple(f"net.{key}" for key in flow.reads)


def test_the_rank_of_a_rotation_is_that_of_an_orbit() -> None:
    """O(n) on k vectors in general position: n (n - 1) / 2 less the rotations of what they do not span."""
    for rows, n in ((2, 7), (5, 7), (6, 7), (9, 7), (0, 3)):
        params = {"w": torch.randn(rows, n, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))}
        flow = StreamRotation((Axis("w", 1),), ())
        size = n * (n - 1) // 2
        vertical = torch.stack([flow.vertical(unit, params)["w"].flatten() for unit in torch.eye(size).double()])
        expected = int(torch.linalg.matrix_rank(vertical)) if rows else 0
        assert flow.rank(params) == expected and flow.dimension({"w": (rows, n)}) == size
