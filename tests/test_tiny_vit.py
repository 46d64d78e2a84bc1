"""TinyViT: its shapes, its derivatives, its dtype, and the symmetry its attention must have."""

import pytest
import torch
from torch import Tensor

from symgeo.models.tiny_vit import TinyViT

SMALL = {"image_size": 6, "patch_size": 3, "width": 10, "depth": 1, "heads": 2, "mlp_width": 7, "classes": 3}


def small(seed: int) -> TinyViT:
    return TinyViT(**SMALL, generator=torch.Generator().manual_seed(seed)).double()


def images(seed: int, batch: int = 5, side: int = 6) -> Tensor:
    return torch.rand(batch, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_default_has_the_documented_size() -> None:
    model = TinyViT()
    assert sum(p.numel() for p in model.parameters()) == 18154
    assert model(torch.zeros(3, 8, 8)).shape == (3, 10)


def test_channel_axis_is_optional() -> None:
    model, x = small(0), images(0)
    torch.testing.assert_close(model(x), model(x[:, None]), rtol=0, atol=0)


def test_patches_are_the_tiles_of_the_image() -> None:
    x = torch.arange(36.0).reshape(1, 6, 6)
    patches = small(0).patches(x)
    assert patches.shape == (1, 4, 9)
    torch.testing.assert_close(patches[0, 1].reshape(3, 3), x[0, :3, 3:])
    torch.testing.assert_close(patches[0, 2].reshape(3, 3), x[0, 3:, :3])


def test_float64_is_kept_inside() -> None:
    model, x = small(1), images(1)
    exact = model(x)
    assert exact.dtype == torch.float64
    twice = torch.stack([model(x + 1e-11) - exact, model(x + 2e-11) - exact])
    torch.testing.assert_close(twice[1], 2 * twice[0], rtol=1e-3, atol=1e-14)  # float32 would round the shift away


def test_seed_decides_the_initial_values() -> None:
    first, same, other = small(2), small(2), small(3)
    for name, value in first.named_parameters():
        torch.testing.assert_close(value, same.get_parameter(name), rtol=0, atol=0)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_init_scale_scales_the_weights_alone() -> None:
    plain, scaled = TinyViT(), TinyViT(init_scale=2.5)
    torch.testing.assert_close(scaled.head.weight, 2.5 * plain.head.weight)
    torch.testing.assert_close(scaled.head.bias, plain.head.bias, rtol=0, atol=0)
    torch.testing.assert_close(scaled.position, plain.position, rtol=0, atol=0)


def test_second_derivatives_agree_forward_and_reverse() -> None:
    model, x = small(4), images(4)
    params = {name: p.detach() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(5)
    direction = {n: torch.randn(p.shape, dtype=p.dtype, generator=generator) for n, p in params.items()}

    def loss(p: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, p, (x,)).logsumexp(-1).mean()

    # not grad of jvp: torch's layer_norm differentiates that wrongly, without a word
    def slope(p: dict[str, Tensor]) -> Tensor:
        return sum((value * direction[n]).sum() for n, value in torch.func.grad(loss)(p).items())

    _, forward = torch.func.jvp(torch.func.grad(loss), (params,), (direction,))
    reverse = torch.func.grad(slope)(params)
    for name, value in forward.items():
        torch.testing.assert_close(value, reverse[name], rtol=1e-9, atol=1e-12)
    step = 1e-5
    ahead, behind = ({n: p + s * direction[n] for n, p in params.items()} for s in (step, -step))
    difference = (loss(ahead) - 2 * loss(params) + loss(behind)) / step**2
    curvature = sum((forward[n] * direction[n]).sum() for n in params)
    torch.testing.assert_close(difference, curvature, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("consistent", [True, False])
def test_heads_have_the_general_linear_symmetry(consistent: bool) -> None:
    model, x = small(6), images(6)
    before = model(x)
    attention, d = model.blocks[0].attention, 5
    a = torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        for parameter in (attention.query.weight, attention.query.bias):
            parameter[d:] = torch.linalg.inv(a).T @ parameter[d:]
        for parameter in (attention.key.weight, attention.key.bias):
            parameter[d:] = (a if consistent else a.T) @ parameter[d:]
    change = (model(x) - before).abs().max() / before.abs().max()
    assert change < 1e-12 if consistent else change > 1e-4


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 30}, "width: needed a multiple of heads = 4, found 30"),
        ({"patch_size": 3}, "image_size: needed a multiple of patch_size = 3, found 8"),
        ({"depth": 0}, "depth: needed a positive size, found 0"),
    ],
)
def test_bad_sizes_are_named(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TinyViT(**sizes)


@pytest.mark.parametrize("shape", [(8, 8), (2, 3, 8, 8), (2, 8, 7)])
def test_bad_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images: needed shape \(batch, 8, 8\)"):
        TinyViT()(torch.zeros(shape))
