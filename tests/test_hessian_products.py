"""Products of Hessian, Gauss-Newton and Fisher matrices: dense float64 oracles, unbiasedness, and what cannot work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hessian_cases import (
    GroupedBlock,
    attention,
    dense_gradient,
    dense_hessian,
    error,
    flat,
    generator,
    mlp,
    normal,
    seeded,
    unflat,
)
from networks import MODELS, bert, language_loss, params_of
from torch import Tensor, nn

from symgeo import functional_loss
from symgeo.functional import Loss, Params
from symgeo.hessian import (
    HessianOperator,
    ModelLoss,
    empirical_fisher,
    euclidean_hessian,
    fisher,
    fisher_metric,
    ggn,
    model_loss,
)

Case = tuple[Loss, Params, list[Any]]
LABELS = torch.randint(0, 2, (7,), generator=generator(5))


def classifier(seed: int = 0) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    data = [(normal(n, 3, seed=n), torch.randint(0, 2, (n,), generator=generator(n))) for n in (7, 11)]
    return mlp(seed), data


def cross_entropy_case() -> Case:
    model, data = classifier()
    return functional_loss(model, nn.functional.cross_entropy), params_of(model), data


def regression_case() -> Case:
    model = mlp(1, nn.GELU)
    return functional_loss(model, nn.functional.mse_loss), params_of(model), [(normal(7, 3), normal(7, 2, seed=1))]


def attention_case() -> Case:
    model, data = attention()
    return functional_loss(model, nn.functional.mse_loss), params_of(model), data


def grouped_case() -> Case:
    model = seeded(lambda: GroupedBlock(3, 4, 2, 3), 1, 0.5)
    data = [(normal(2, 5, 3), normal(2, 5, 3, seed=1))]
    return functional_loss(model, nn.functional.mse_loss), params_of(model), data


CASES: dict[str, Callable[[], Case]] = {
    "cross_entropy": cross_entropy_case, "mse": regression_case, "attention": attention_case, "grouped": grouped_case,
}


@pytest.mark.parametrize("name", CASES)
def test_the_hessian_is_the_dense_one(name: str) -> None:
    """Against two reverse passes of classic autograd; products of vectors, columns and Params agree with the matrix."""
    loss, params, data = CASES[name]()
    operator, expected = euclidean_hessian(loss, params, data), dense_hessian(loss, params, data)
    assert operator.shape == tuple(expected.shape)
    assert error(operator.dense(), expected) <= 1e-10
    v = normal(len(expected), 3)
    assert error(operator @ v, expected @ v) <= 1e-10
    assert error(operator @ v[:, 0], expected @ v[:, 0]) <= 1e-10
    image = operator @ unflat(v[:, 1], params)
    assert list(image) == list(params)
    assert error(flat(image), expected @ v[:, 1]) <= 1e-10
    small = euclidean_hessian(loss, params, data, chunk=2)
    assert error(small @ v, expected @ v) <= 1e-10


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "encoder_layer", "multihead", "tiny_vit"])
def test_products_on_transformers(name: str) -> None:
    """Against the gradient of <gradient, v>, by classic autograd; causal losses of transformers run in float32."""
    tolerance = 1e-5 if name in ("gpt2", "llama") else 1e-10
    model = bert(1) if name == "bert" else MODELS[name]()
    params = params_of(model)
    if name in ("bert", "gpt2", "llama"):
        loss, data = language_loss(model, labels=3 if name == "bert" else None)
    elif name == "tiny_vit":
        loss, data = functional_loss(model, nn.functional.cross_entropy), [(normal(3, 8, 8), torch.arange(3))]
    else:
        x, target = normal(5, 2, 12), normal(5, 2, 12, seed=1)
        inputs = (x, normal(3, 2, 5), normal(3, 2, 7)) if name == "multihead" else (x,)

        def loss(p: Params, batch: Any) -> Tensor:
            out = torch.func.functional_call(model, p, inputs)
            return ((out if isinstance(out, Tensor) else out[0]) - target).square().mean()

        data = [None]
    operator = euclidean_hessian(loss, params, data)
    v = normal(operator.shape[0], 2)
    found = operator @ v
    for column in range(2):
        leaves = {key: p.clone().requires_grad_() for key, p in params.items()}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            value = sum(loss(leaves, batch) for batch in data) / len(data)
            kwargs = {"create_graph": True, "materialize_grads": True}
            slopes = torch.autograd.grad(value, list(leaves.values()), **kwargs)
            inner = sum((g * u).sum() for g, u in zip(slopes, unflat(v[:, column], params).values()))
            expected = torch.autograd.grad(inner, list(leaves.values()), materialize_grads=True)
        assert error(found[:, column], torch.cat([g.reshape(-1) for g in expected])) <= tolerance


def test_batches_are_averaged_with_equal_weight() -> None:
    loss, params, data = cross_entropy_case()
    each = [euclidean_hessian(loss, params, [batch]).dense() for batch in data]
    assert error(euclidean_hessian(loss, params, iter(data)).dense(), (each[0] + each[1]) / 2) <= 1e-12
    together = [(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))]
    assert error(euclidean_hessian(loss, params, together).dense(), (each[0] + each[1]) / 2) > 1e-3  # sizes differ


def jacobian(loss: ModelLoss, params: Params, batch: Any) -> tuple[Tensor, Tensor]:
    """Outputs (flat) and their dense Jacobian, by classic autograd."""
    outputs = lambda x: loss.outputs(unflat(x, params), batch).reshape(-1)  # noqa: E731
    return outputs(flat(params)), torch.autograd.functional.jacobian(outputs, flat(params))


CRITERIA: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = {
    "cross_entropy": ("cross_entropy", nn.functional.cross_entropy),
    "module": (nn.CrossEntropyLoss(ignore_index=1), lambda f, y: nn.functional.cross_entropy(f, y, ignore_index=1)),
    "mse": ("mse", nn.functional.mse_loss),
    "bce": (nn.BCEWithLogitsLoss(), nn.functional.binary_cross_entropy_with_logits),
    "custom": (lambda f, y: ((f - y) ** 4).mean(), lambda f, y: ((f - y) ** 4).mean()),
    "huber": (nn.functional.huber_loss, nn.functional.huber_loss),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss(label_smoothing=0.1)),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_gauss_newton_is_the_dense_one(name: str) -> None:
    """J^T H_out J with H_out by classic autograd; where the model is linear it is the Hessian."""
    criterion, plain = CRITERIA[name]
    model, data = classifier()
    if name in ("mse", "bce", "custom", "huber"):
        data = [(x, normal(len(x), 2).sigmoid()) for x, _ in data]
    loss, params = model_loss(model, criterion), params_of(model)
    assert torch.allclose(loss(params, data[0]), plain(model(data[0][0]), data[0][1]), rtol=1e-12)
    expected = torch.zeros(())
    for batch in data:
        out, j = jacobian(loss, params, batch)
        inside = lambda f, y=batch[1]: plain(f.view(len(y), -1), y)  # noqa: E731
        expected = expected + j.T @ torch.autograd.functional.hessian(inside, out) @ j / len(data)
    assert error(ggn(loss, params, data).dense(), expected) <= 1e-10
    head = {key: p for key, p in params.items() if key.startswith("2.")}  # the last layer is linear in these
    assert error(ggn(loss, head, data).dense(), dense_hessian(loss, head, data)) <= 1e-10
    assert error(fisher_metric(loss, data)(params), expected) <= 1e-10


def test_gauss_newton_of_a_language_model() -> None:
    """Shifted labels with ignored ones, mappings as batches: the loss is the model's own."""
    model = MODELS["gpt2"]()
    own, data = language_loss(model)
    for batch in data:
        batch["labels"] = torch.where(batch["labels"] % 5 == 0, -100, batch["labels"])
    loss, params = model_loss(model, "causal"), params_of(model)
    assert float(loss(params, data[0])) == pytest.approx(float(own(params, data[0])), rel=1e-6)  # theirs is float32
    head = {"transformer.ln_f.weight": params["transformer.ln_f.weight"]}  # the logits are linear in it
    assert error(ggn(loss, head, data).dense(), dense_hessian(loss, head, data)) <= 1e-10


def per_example(loss: ModelLoss, params: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    rows = [dense_gradient(loss, params, [(x[None], y[None])]) for x, y in zip(*batch)]
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["cross_entropy", "mse", "custom"])
def test_the_empirical_fisher_is_the_mean_of_outer_products(name: str) -> None:
    model, data = classifier()
    if name != "cross_entropy":
        data = [(x, normal(len(x), 2)) for x, _ in data]
    loss, params = model_loss(model, CRITERIA[name][0]), params_of(model)
    expected = torch.zeros(())
    for batch in data:
        g = per_example(loss, params, batch)
        expected = expected + g.T @ g / len(g) / len(data)
    assert error(empirical_fisher(loss, params, data).dense(), expected) <= 1e-10


@pytest.mark.parametrize("name", ["cross_entropy", "mse", "bce"])
def test_the_sampled_fisher_is_unbiased(name: str) -> None:
    """v^T F v over 200 seeds: within four standard errors of the Gauss-Newton form; the empirical Fisher is not."""
    model, data = classifier()
    if name != "cross_entropy":
        data = [(x, normal(len(x), 2).sigmoid()) for x, _ in data]
    loss, params = model_loss(model, CRITERIA[name][0]), params_of(model)
    exact = ggn(loss, params, data)
    v = normal(exact.shape[0], seed=3)
    draws = torch.stack([v @ (fisher(loss, params, data, samples=2, seed=s, check=False) @ v) for s in range(200)])
    stderr = float(draws.std()) / 200**0.5
    target = float(v @ (exact @ v))
    assert abs(float(draws.mean()) - target) <= 4 * stderr <= 0.5 * target
    assert torch.equal(fisher(loss, params, data, seed=4) @ v, fisher(loss, params, data, seed=4) @ v)
    assert not torch.equal(fisher(loss, params, data, seed=4) @ v, fisher(loss, params, data, seed=5) @ v)
    many = fisher(loss, params, data[:1], samples=4000).dense()
    assert error(many, ggn(loss, params, data[:1]).dense()) < 0.1


def test_fused_attention_is_switched_to_the_plain_kernel() -> None:
    def loss(params: Params, batch: Tensor) -> Tensor:
        q, k, v = (batch @ params[name] for name in "qkv")
        return nn.functional.scaled_dot_product_attention(q, k, v).square().mean()

    params = {name: normal(5, 4, seed=i) for i, name in enumerate("qkv")}
    data = [normal(2, 2, 6, 5)]
    found = euclidean_hessian(loss, params, data).dense()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert error(found, dense_hessian(loss, params, data)) <= 1e-10
    with pytest.raises(RuntimeError, match="scaled_dot_product"):
        dense_hessian(loss, params, data)


class Opaque(torch.autograd.Function):
    """A square that torch.func does not accept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * slope


class Wrong(torch.autograd.Function):
    """The sum of x0 x1 with a gradient that is none."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return (x[0] * x[1]).sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return slope * torch.stack([x[1] ** 2, x[0]])


def test_an_operation_without_second_derivative_is_named() -> None:
    def fused(params: Params, batch: Tensor) -> Tensor:
        q, k, v = (batch @ params[name] for name in "qkv")
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0].square().mean()

    params = {name: normal(5, 4, seed=i) for i, name in enumerate("qkv")}
    for check in (True, False):
        with pytest.raises(ValueError, match="differentiated twice: _scaled_dot_product_flash_attention_for_cpu") as e:
            euclidean_hessian(fused, params, [normal(2, 2, 6, 5)], check=check).dense()
        assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="differentiated twice: Opaque"):
        euclidean_hessian(lambda p, b: Opaque.apply(p["q"]).sum(), params, [None])
    with pytest.raises(RuntimeError, match="size of tensor"):  # the user's own mistake stays what it is
        euclidean_hessian(lambda p, b: (p["q"] + b).sum(), params, [torch.ones(3)])


def test_what_cannot_be_batched_or_pushed_forward_is_still_exact() -> None:
    """Random numbers from a fixed seed stop vmap, Huber's loss forward mode, a padding row the symmetry."""
    params = {"w": normal(5, 3)}

    def noisy(p: Params, batch: Any) -> Tensor:
        return (p["w"] + torch.randn(5, 3, generator=generator(0), dtype=torch.float64)).pow(4).sum()

    assert error(euclidean_hessian(noisy, params, [None]).dense(), dense_hessian(noisy, params, [None])) <= 1e-12

    def padded(p: Params, batch: Tensor) -> Tensor:
        rows = nn.functional.embedding(batch, p["w"], padding_idx=0)
        return rows.sin().prod(-1).sum() + (rows.sum(0) ** 3).sum()

    data = [torch.tensor([0, 2, 4, 2])]
    forward = torch.func.hessian(lambda w: padded({"w": w.view(5, 3)}, data[0]))(params["w"].view(-1))
    assert error(forward, forward.T) > 1e-3
    assert error(euclidean_hessian(padded, params, data).dense(), dense_hessian(padded, params, data)) <= 1e-12

    def huber(p: Params, batch: Any) -> Tensor:
        return nn.functional.huber_loss(p["w"] ** 2, torch.ones(5, 3, dtype=torch.float64), delta=0.7)

    assert error(euclidean_hessian(huber, params, [None]).dense(), dense_hessian(huber, params, [None])) <= 1e-12


def test_layer_norm_is_differentiated_in_the_right_order() -> None:
    """In torch 2.13 grad of jvp through it is wrong; jvp of grad is not."""
    norm, x = nn.LayerNorm(5).double(), normal(3, 5)
    f = lambda x: (norm(x).sin() * torch.arange(15).view(3, 5)).sum()  # noqa: E731
    exact = torch.autograd.functional.hessian(f, x).reshape(15, 15)
    assert error(euclidean_hessian(lambda p, b: f(p["x"]), {"x": x}, [0]).dense(), exact) <= 1e-12


def test_a_gradient_that_is_none_is_caught() -> None:
    with pytest.raises(ValueError, match=r"the Hessian is not symmetric \(by .*\)") as caught:
        euclidean_hessian(lambda p, b: Wrong.apply(p["x"]), {"x": normal(2, 3)}, [0])
    assert "\n" not in str(caught.value)


def test_dropout_is_detected() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.2), nn.Linear(5, 2)).double().train()
    params, data = params_of(model), classifier()[1]
    loss = model_loss(model, "cross_entropy")
    for build in (euclidean_hessian, ggn, fisher, empirical_fisher):
        with pytest.raises(ValueError, match=r"not deterministic: two .* differ by .*; call model.eval\(\)") as caught:
            build(loss, params, data)
        assert "\n" not in str(caught.value)
        model.eval()
        assert isinstance(build(loss, params, data), HessianOperator)
        model.train()


BAD: dict[str, Callable[[Any, Any, Any], Any]] = {
    "needed at least one batch": lambda loss, p, d: euclidean_hessian(loss, p, []),
    "the dict is empty": lambda loss, p, d: ggn(loss, {}, d),
    "'2.bias' has entries that are not finite": lambda loss, p, d: ggn(loss, p | {"2.bias": p["2.bias"] / 0}, d),
    "'2.bias' must be a floating-point tensor": lambda loss, p, d: ggn(loss, {"2.bias": torch.ones(2).int()}, d),
    "needed a loss split into outputs and criterion": lambda loss, p, d: ggn(lambda p, b: loss(p, b), p, d),
    "must return a scalar tensor": lambda loss, p, d: euclidean_hessian(loss.outputs, p, d),
    "chunk must be a positive integer; got 0": lambda loss, p, d: euclidean_hessian(loss, p, d, chunk=0),
    "samples must be a positive integer; got 0": lambda loss, p, d: fisher(loss, p, d, samples=0),
    "criterion must be one of cross_entropy": lambda loss, p, d: model_loss(mlp(), "kl"),
    "criterion must be a name or a function": lambda loss, p, d: model_loss(mlp(), 3),
    "no distribution to draw labels from": lambda loss, p, d: fisher(model_loss(mlp(), torch.dist), p, d),
    "needs integer labels of shape": lambda loss, p, d: ggn(loss, p, [(d[0][0], d[0][1].double())]),
    "squared error of outputs": lambda loss, p, d: ggn(model_loss(mlp(), "mse"), p, d),
    "a batch must be": lambda loss, p, d: ggn(loss, p, [torch.ones(3)]),
    "needed the key 'labels'": lambda loss, p, d: ggn(loss, p, [{"input": d[0][0]}]),
    r"@ needs a tensor \(32,\)": lambda loss, p, d: ggn(loss, p, d) @ torch.ones(31),
    "parameter '0.weight' of shape": lambda loss, p, d: ggn(loss, p, d) @ {"2.bias": torch.ones(2)},
    "'extra' is not a parameter": lambda loss, p, d: ggn(loss, p, d) @ (p | {"extra": torch.ones(1)}),
    "not finite": lambda loss, p, d: euclidean_hessian(lambda q, b: q["2.bias"].sub(p["2.bias"]).sqrt().sum(), p, d),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_clear_error(message: str) -> None:
    model, data = classifier()
    with pytest.raises(ValueError, match=message) as caught:
        BAD[message](model_loss(model, "cross_entropy"), params_of(model), data)
    assert "\n" not in str(caught.value)


def test_dtypes_and_subsets() -> None:
    """A subset of the parameters is a block; mixed dtypes are promoted, and come back as they were."""
    loss, params, data = cross_entropy_case()
    part = {key: params[key] for key in ("0.bias", "2.weight")}
    whole = dense_hessian(loss, params, data)
    position = {key: i for i, key in enumerate(params)}
    owner = torch.cat([torch.full((p.numel(),), position[key]) for key, p in params.items()])
    rows = torch.cat([(owner == position[key]).nonzero()[:, 0] for key in part])
    assert error(euclidean_hessian(loss, part, data).dense(), whole[rows][:, rows]) <= 1e-10
    model = mlp().float()
    single, floats = params_of(model), [(x.float(), y) for x, y in data]
    operator = euclidean_hessian(functional_loss(model, nn.functional.cross_entropy), single, floats)
    assert operator.dtype == torch.float32 and error(operator.dense().double(), whole) <= 1e-4
    leaf = {key: nn.Parameter(p) for key, p in params.items()}
    assert not (euclidean_hessian(loss, leaf, data) @ torch.ones(32)).requires_grad
