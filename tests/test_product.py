"""Named products."""

import pytest
import torch
from cases import manifold_case
from laws import LAWS, close

from manifolds import BuresWasserstein, Elementwise, Product, ScaleQuotient

SHAPES = {"gain": (5,), "layers.0.weight": (7, 3)}


def product(shapes=SHAPES) -> Product:
    return Product({"gain": Elementwise(), "layers.0.weight": BuresWasserstein()}, shapes)


def point(seed: int, *batch: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randn(*batch, *s, dtype=torch.float64, generator=g).abs() for k, s in SHAPES.items()}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law, seed):
    law(manifold_case("product", seed))


def test_dictionaries_agree_with_packed_tensors():
    m, x, u = product(), point(0), point(1)
    packed, tangent = m.pack_point(x), m.pack_point(u)
    y = m.expmap(x, u)
    assert set(y) == set(x)
    close(m.inner(packed, tangent), m.inner(x, u), 1e-15)
    close(m.dist(packed, m.pack_point(y)), m.dist(x, y), 1e-15)
    for name, arguments in {
        "proju": (x, u), "egrad2rgrad": (x, u), "expmap": (x, u), "retr": (x, u), "logmap": (x, y),
        "christoffel": (x, u), "transp": (x, y, u), "projx": (x,), "component_inner": (x, u),
    }.items():  # fmt: skip
        method = getattr(m, name)
        close(method(*map(m.pack_point, arguments)), m.pack_point(method(*arguments)), 1e-14)
    algebra = {"gain": torch.zeros(5), "layers.0.weight": torch.arange(9.0, dtype=torch.float64).reshape(3, 3)}
    close(m.vertical(packed, algebra), m.pack_point(m.vertical(x, algebra)), 1e-15)


def test_factors_add_up():
    m, x, u = product(None), point(0, 2), point(1, 2)
    parts = [m.factors[k].inner(x[k], u[k]).sum() for k in x]
    assert m.inner(x, u).shape == ()
    close(m.inner(x, u), torch.stack(parts).sum(), 1e-15)
    close(m.norm(x, u), torch.stack(parts).sum().sqrt(), 1e-15)


def test_distance_is_differentiable_where_points_meet():
    m, x = product(), {k: p.requires_grad_() for k, p in point(0).items()}
    m.dist(x, {k: p.detach() for k, p in x.items()}).backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in x.values())


def test_packing_round_trip_with_a_batch():
    m, x = product(), point(0, 4, 2)
    packed = m.pack_point(x)
    assert packed.shape == (4, 2, 26)
    for name, part in m.unpack_tensor(packed).items():
        close(part, x[name], 0.0)
    close(m.pack_point(*x.values()), packed, 0.0)


def test_factors_may_hold_batches_of_points():
    m = Product({"rows": ScaleQuotient()}, {"rows": (3, 4)})
    x = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    assert m.inner(x, x).shape == (2,)
    close(m.inner(x, x), torch.full((2,), 3.0), 1e-6)


def test_errors_name_the_factor():
    m, x = product(), point(0)
    with pytest.raises(ValueError, match=r"lacks gain: the product has gain, layers.0.weight; got layers"):
        m.inner({"layers.0.weight": x["layers.0.weight"]}, x)
    with pytest.raises(ValueError, match=r"unknown bias"):
        m.proju(x, {**x, "bias": x["gain"]})
    with pytest.raises(ValueError, match=r"factor 'gain': shapes \(5,\) and \(4,\) disagree"):
        m.inner(x, {**x, "gain": x["gain"][:4]})
    with pytest.raises(ValueError, match=r"factor 'gain' needs shape \(..., 5,\); got \(4,\)"):
        m.pack_point({**x, "gain": x["gain"][:4]})
    with pytest.raises(ValueError, match=r"needs the shape \(..., 26\); got \(25,\)"):
        m.inner(torch.ones(25), torch.ones(25))
    with pytest.raises(ValueError, match="shapes="):
        product(None).inner(torch.ones(26), torch.ones(26))
    with pytest.raises(ValueError, match="at least one factor"):
        Product({})
    with pytest.raises(ValueError, match="shapes lacks gain"):
        Product({"gain": Elementwise()}, {})
