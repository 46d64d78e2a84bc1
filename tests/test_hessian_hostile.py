"""Curvature where models and data are not as they should be: the right number, or one line on what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hessian_cases import dense_hessian, error, flat, normal, unflat
from torch import Tensor, nn

from symgeo import ParameterManifold, Symmetry, functional_loss
from symgeo.functional import Params
from symgeo.groups import GeneralLinear
from symgeo.hessian import (
    Reparametrization,
    empirical_fisher,
    euclidean_hessian,
    fisher,
    fisher_metric,
    geodesic_jet,
    ggn,
    invariant_hessian,
    kronecker_metric,
    model_loss,
    module_blocks,
    riemannian_hessian,
)
from symgeo.hessian.blocks import block

LORA = Symmetry({"B": "_ r", "A": "r* _"}, {"r": GeneralLinear()})
LABELS = torch.tensor([0, 2, 1, 1, 0, 2])


def classifier() -> tuple[nn.Module, Params, tuple[Tensor, Tensor]]:
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    return model, {name: p.detach() for name, p in model.named_parameters()}, (normal(6, 2), LABELS)


def lora_loss(params: Params, target: Tensor) -> Tensor:
    return ((params["B"] @ params["A"]).tanh() - target).square().mean()


@pytest.mark.parametrize("loss", [lambda p, b: (3 * p["w"]).sum(), lambda p, b: (p["w"] - 9).abs().mean(),
                                  lambda p, b: torch.tensor(2.0)], ids=["linear", "absolute", "constant"])
def test_what_is_not_curved_has_a_hessian_of_zero(loss: Callable[[Params, Any], Tensor]) -> None:
    """torch's vmap makes up a shape for columns that depend on nothing."""
    params = {"w": normal(100)}
    for operator in (euclidean_hessian(loss, params, [0]),
                     invariant_hessian(loss, params, [0], torch.ones(100), connection=False)):
        assert torch.equal(operator.dense(), torch.zeros(100, 100, dtype=torch.float64))


@pytest.mark.parametrize("diagonal", [torch.linspace(0.01, 1, 300_000), torch.ones(300_000)], ids=["spread", "ones"])
def test_entries_of_a_diagonal_metric_are_not_rounding(diagonal: Tensor) -> None:
    params = {"w": torch.ones(300_000)}
    for pinv in (False, True):
        operator = invariant_hessian(lambda p, b: p["w"].square().sum(), params, [0], diagonal, False, pinv)
        assert operator.shape[0] == 300_000
        v = torch.ones(300_000)
        assert torch.allclose(operator @ v, 2 / diagonal)
    small = {"w": torch.tensor([1e-8, 1.0, 2.0], dtype=torch.float64)}
    spectrum = invariant_hessian(lambda p, b: p["w"].pow(3).sum(), small, [0], lambda p: p["w"].pow(-2)).eigvalsh()
    assert error(spectrum, 9 * small["w"].pow(3).sort().values) < 1e-12  # x = log w: 3 * 3 e^(3 x)
    with pytest.raises(ValueError, match="1 of 3 eigenvalues are zero"):
        invariant_hessian(lambda p, b: p["w"].sum(), small, [0], torch.tensor([0.0, 1.0, 1.0]))


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(label_smoothing=0.1),
                                       nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]).double())])
def test_the_fisher_metric_of_any_criterion_has_a_connection(criterion: nn.Module) -> None:
    """The covariant Hessian with the metric as a plain function of Params, written down densely."""
    model, params, (x, y) = classifier()
    loss = model_loss(model, criterion)

    def metric(p: Params) -> Tensor:
        outputs = loss.outputs(p, (x, y))
        rows = [torch.autograd.grad(output, list(p.values()), retain_graph=True, create_graph=True)
                for output in outputs.flatten()]
        jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        weights = torch.autograd.functional.hessian(lambda f: criterion(f, y), outputs, create_graph=True)
        return jacobian.T @ weights.reshape(18, 18) @ jacobian + eye

    eye, found_metric = torch.eye(21, dtype=torch.float64), fisher_metric(loss, [(x, y)])
    found = invariant_hessian(loss, params, [(x, y)], lambda p: found_metric(p) + eye)
    assert error(found.dense(), _covariant(lambda p: loss(p, (x, y)), params, metric)) < 1e-9


def _covariant(loss: Callable[[Params], Tensor], params: Params, metric: Callable[[Params], Tensor]) -> Tensor:
    """``G^-1/2 (d2L - Gamma dL) G^-1/2`` from the derivatives of a dense metric, entry by entry."""
    point = flat(params)
    g = metric(unflat(point.clone().requires_grad_(), params)).detach()
    columns = []
    for i in range(len(point)):  # d_i G by differences of fourth order
        step = torch.zeros_like(point)
        step[i] = 1e-3
        at = [metric(unflat((point + k * step).requires_grad_(), params)).detach() for k in (-2, -1, 1, 2)]
        columns.append((at[0] - 8 * at[1] + 8 * at[2] - at[3]) / 12e-3)
    d = torch.stack(columns)  # d[i, j, k] = d_i G_jk
    lowered = 0.5 * (torch.einsum("ijk->ijk", d) + d.transpose(0, 1) - d.permute(1, 2, 0))  # Gamma_k,ij at [i, j, k]
    slope = torch.autograd.functional.jacobian(lambda x: loss(unflat(x, params)), point)
    hessian = torch.autograd.functional.hessian(lambda x: loss(unflat(x, params)), point)
    values, vectors = torch.linalg.eigh(g)
    root = (vectors * values.rsqrt()) @ vectors.T
    return root @ (hessian - lowered @ torch.linalg.solve(g, slope)) @ root


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(4, 2, padding_idx=0), nn.Linear(2, 3)
        nn.init.normal_(self.words.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.words(tokens).tanh().mean(1))


@pytest.mark.parametrize("matrix", [ggn, empirical_fisher, fisher, euclidean_hessian])
def test_padding_that_is_read_is_a_constant(matrix: Callable[..., Any]) -> None:
    """torch masks the gradient of that row only: its rows and columns are zero, the others those of the sub-matrix."""
    model = Padded().double().eval()
    params = {name: p.detach() for name, p in model.named_parameters()}
    batch = (torch.tensor([[1, 2, 0], [3, 0, 0], [2, 1, 3]]), torch.tensor([0, 1, 2]))
    dense = matrix(model_loss(model, "cross_entropy"), params, [batch]).dense()
    assert not dense[:2].any() and not dense[:, :2].any()
    rest = params["words.weight"][1:]
    free = {"rest": rest, "head.weight": params["head.weight"], "head.bias": params["head.bias"]}

    def outputs(p: Params, b: Any) -> Tensor:
        words = torch.cat([params["words.weight"][:1], p["rest"]])[b[0]]
        return words.tanh().mean(1) @ p["head.weight"].T + p["head.bias"]

    from symgeo.hessian import ModelLoss
    from symgeo.hessian.criteria import CrossEntropy

    expected = matrix(ModelLoss(outputs, CrossEntropy()), free, [batch]).dense()
    assert error(dense[2:, 2:], expected) < 1e-12


def test_the_empirical_fisher_needs_a_mean() -> None:
    model, params, batch = classifier()
    smooth = empirical_fisher(model_loss(model, nn.CrossEntropyLoss(label_smoothing=1e-12)), params, [batch])
    assert error(smooth.dense(), empirical_fisher(model_loss(model, "cross_entropy"), params, [batch]).dense()) < 1e-9
    mapping = [{"input": batch[0], "labels": batch[1]}]
    assert torch.equal(empirical_fisher(model_loss(model, nn.CrossEntropyLoss(label_smoothing=1e-12)), params,
                                        mapping).dense(), smooth.dense())
    for criterion in (nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(ignore_index=1, label_smoothing=0.1),
                      nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]).double())):
        with pytest.raises(ValueError, match="a mean over the first axis"):
            empirical_fisher(model_loss(model, criterion), params, [batch])


def test_running_statistics_stay_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)).double()
    params = {name: p.detach() for name, p in model.named_parameters()}
    batch = (normal(6, 2), LABELS)
    functional_loss(model, nn.functional.cross_entropy)(params, batch)
    for matrix in (euclidean_hessian, ggn):
        try:
            matrix(model_loss(model, "cross_entropy"), params, [batch])
        except ValueError as refusal:
            assert "call model.eval()" in str(refusal)
    assert int(model[1].num_batches_tracked) == 0 and not model[1].running_mean.any()
    model.eval()
    expected = dense_hessian(functional_loss(model, nn.functional.cross_entropy), params, [batch])
    assert error(euclidean_hessian(model_loss(model, "cross_entropy"), params, [batch]).dense(), expected) < 1e-12


def test_blocks_of_modules_share_nothing() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).double().eval()
    params = {name: p.detach() for name, p in layer.named_parameters()}
    batch = (normal(2, 3, 4), normal(2, 3, 4, seed=1))
    operator = euclidean_hessian(functional_loss(layer, nn.functional.mse_loss), params, [batch])
    blocks = module_blocks(operator)
    assert sum(b.shape[0] for b in blocks.values()) == operator.shape[0]
    assert blocks["self_attn.out_proj"].shape[0] == 20 and blocks["self_attn"].shape[0] == 60
    assert module_blocks(operator, ["self_attn"])["self_attn"].shape[0] == 80


def test_a_constant_metric_stands_in_the_order_of_the_inverse_map() -> None:
    names = {"a": normal(2, seed=1).exp(), "b": normal(3, seed=2).exp()}
    matrix = normal(5, 5)
    matrix = matrix @ matrix.T + torch.eye(5)
    loss = lambda p, b: (p["a"].sum() * p["b"]).sin().sum()  # noqa: E731
    log = Reparametrization(lambda p: {n: x.log() for n, x in p.items()}, lambda p: {n: x.exp() for n, x in p.items()})
    before = invariant_hessian(loss, names, [0], matrix).eigvalsh()
    after = invariant_hessian(log.loss(loss), log.push(names), [0], log.metric(matrix)).eigvalsh()
    assert error(after, before) < 1e-9


def _manifold() -> tuple[Params, Tensor, ParameterManifold]:
    params = {"B": normal(3, 2, seed=0), "A": normal(2, 3, seed=1)}
    return params, normal(3, 3, seed=2), ParameterManifold(params, LORA)


def _refused() -> dict[str, Callable[[], Any]]:
    model, params, batch = classifier()
    loss = functional_loss(model, nn.functional.cross_entropy)
    split = model_loss(model, "cross_entropy")
    lora, target, manifold = _manifold()
    ignored = (batch[0], torch.full((6,), -100))
    beyond = (batch[0], batch[1] + 5)
    nothing = (batch[0][:0], batch[1][:0])
    riemannian = riemannian_hessian(lora_loss, lora, [target], manifold)
    log = Reparametrization(lambda p: {"s": p["w"].log()}, lambda p: {"w": p["s"].exp()})
    one = {"w": torch.ones(1)}
    lopsided = torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 2.0]])
    sparse = nn.Sequential(nn.Embedding(3, 2, sparse=True), nn.Linear(2, 3)).double()
    sparse_params = {name: p.detach() for name, p in sparse.named_parameters()}

    def kron(*pair: Tensor | None) -> Any:
        return invariant_hessian(loss, params, [batch], kronecker_metric({"0.weight": pair}))

    def inference() -> Any:
        with torch.inference_mode():
            return euclidean_hessian(loss, params, [batch])

    return {
        "the loss of a batch is nan": lambda: euclidean_hessian(loss, params, [batch, ignored]),
        "loss of a batch is nan": lambda: euclidean_hessian(loss, params, [nothing]),
        "the loss of a batch is nan at": lambda: ggn(split, params, [batch, ignored]),
        "batch 1 has no rows": lambda: ggn(split, params, [batch, nothing]),
        "batch 0 has no rows": lambda: ggn(model_loss(model, "mse"), params, [(batch[0][:0], normal(0, 3))]),
        "needed labels 0 to 2 or -100; found 5": lambda: ggn(split, params, [beyond]),
        "needed labels 0 to 2 or -100": lambda: empirical_fisher(split, params, [beyond]),
        r"needed 'A' of shape \(2, 3\); found shape \(3, 2\)": lambda: riemannian @ {**lora, "A": lora["A"].T},
        "needed 'A' .* found none": lambda: riemannian @ {"B": lora["B"]},
        "'C' is not a parameter": lambda: riemannian @ {**lora, "C": lora["A"]},
        r"needed 'B' of shape": lambda: geodesic_jet(lora_loss, lora, [target], manifold, {**lora, "B": lora["B"].T}),
        "velocity has entries that are not finite":
            lambda: geodesic_jet(lora_loss, lora, [target], manifold, {**lora, "B": lora["B"] * torch.nan}),
        "left factor of '0.weight': the matrix is not symmetric": lambda: kron(lopsided, None),
        "left factor of '0.weight': needed finite": lambda: kron(torch.eye(3) * torch.nan, None),
        "'0.weight' needs two factors": lambda: kron(torch.eye(3)),
        "needed a tensor or a function Params": lambda: log.metric(kronecker_metric({})),
        r"needed a matrix \(1, 1\)": lambda: log.metric(torch.eye(3))({"s": torch.zeros(1)}),
        "needed an entry 'w' of shape": lambda: log.gradient(one, {"s": torch.ones(1)}),
        "block: needed the names": lambda: block(euclidean_hessian(loss, params, [batch])),
        "'0.weight' is sparse": lambda: euclidean_hessian(functional_loss(sparse, nn.functional.cross_entropy),
                                                          sparse_params, [(LABELS, LABELS)]),
        "of '0.weight' is sparse": lambda: ggn(model_loss(sparse, "cross_entropy"), sparse_params, [(LABELS, LABELS)]),
        "inference_mode": inference,
    }


@pytest.mark.parametrize("message", list(_refused()))
def test_bad_input_is_one_clear_error(message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        _refused()[message]()
    assert "\n" not in str(caught.value)


def test_every_operator_is_one_fixed_matrix() -> None:
    model, params, batch = classifier()
    split, (lora, target, manifold) = model_loss(model, "cross_entropy"), _manifold()
    makers = [lambda: euclidean_hessian(split, params, [batch]), lambda: ggn(split, params, [batch]),
              lambda: empirical_fisher(split, params, [batch]), lambda: fisher(split, params, [batch], 3),
              lambda: invariant_hessian(split, params, [batch], torch.arange(1.0, 22)),
              lambda: riemannian_hessian(lora_loss, lora, [target], manifold)]
    for maker in makers:
        first, second = maker(), maker()
        v = normal(first.shape[0])
        assert torch.equal(first @ v, first @ v) and torch.equal(first @ v, second @ v)
