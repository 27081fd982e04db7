"""torch.distributions' Normal as a posterior, and Pyro's transforms under accelerate."""

import pytest
import torch
from adapter_checks import TOLERANCE, accelerated, close, same, same_training
from torch import distributions

from fastflow.adapters.distributions import Normal

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@DTYPES
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(("shape", "sample_shape"), [((4, 3), ()), ((5,), (2,)), ((2, 3, 4), (3, 2)), ((), ())])
def test_sample_and_divergence_are_torch_s(shape, sample_shape, learned, dtype):
    leaves = [torch.randn(shape, dtype=dtype), torch.rand(shape, dtype=dtype) + 0.3,
              torch.randn(shape[-1:], dtype=dtype), torch.rand(shape[-1:], dtype=dtype) + 0.3]
    leaves = [t.requires_grad_() for t in leaves[:4 if learned else 2]]
    found = []
    for kind in (Normal, distributions.Normal):
        prior = distributions.Normal(*leaves[2:]) if learned else distributions.Normal(
            torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype))
        q = kind(*leaves[:2], prior) if learned and kind is Normal else kind(*leaves[:2])
        prior = q.prior if kind is Normal else prior
        torch.manual_seed(3)
        z = q.rsample(sample_shape)
        kl = distributions.kl_divergence(q, prior)
        found.append((z, kl, *torch.autograd.grad((z.square().sum() + 0.7 * kl.sum()), leaves), torch.rand(2)))
        if kind is Normal:
            assert distributions.kl_divergence(q, prior) is kl
    for got, want in zip(*found, strict=True):
        close(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("which", range(4))
def test_a_divergence_after_a_sample_without_gradients_has_them(which):
    """Those of the posterior's parameters, and of the prior's."""
    leaves = [torch.full((3,), 1.0 + index) for index in range(4)]
    leaves[which].requires_grad_()
    q = Normal(*leaves[:2], distributions.Normal(*leaves[2:]))
    with torch.no_grad():
        q.rsample()
        assert not distributions.kl_divergence(q, q.prior).requires_grad
    assert distributions.kl_divergence(q, q.prior).requires_grad


def test_what_has_no_fused_form_is_torch_s():
    q, own = Normal(torch.ones(3), 2 * torch.ones(3)), distributions.Normal(torch.ones(3), 2 * torch.ones(3))
    other = distributions.Normal(torch.full((3,), 0.5), torch.full((3,), 1.5))
    for prior in (other, distributions.Normal(torch.zeros(3), torch.ones(3)), q.prior):
        close(distributions.kl_divergence(q, prior), distributions.kl_divergence(own, prior), 1e-6)
    wide = q.expand((2, 3))
    assert wide.rsample().shape == distributions.kl_divergence(wide, wide.prior).shape == (2, 3)
    with pytest.raises(TypeError, match="prior"):
        Normal(torch.ones(3), torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError, match="prior"):
        Normal(torch.ones(3), torch.ones(3), distributions.Normal(torch.zeros(2), torch.ones(2)))


def both_ways(transform, x):
    y = transform(x)
    return y, transform.log_abs_det_jacobian(x, y), transform._inverse(x)


@DTYPES
@pytest.mark.parametrize("kind", ["vectors", "images", "1x1"])
def test_pyro_transforms(kind, dtype):
    T = pytest.importorskip("pyro.distributions.transforms", reason="Pyro is not installed")
    transform, x = {
        "vectors": lambda: (T.affine_coupling(5, [8]), torch.randn(4, 6, 5)),
        "images": lambda: (T.affine_coupling((4, 2, 3), [8], dim=-3), torch.randn(6, 4, 2, 3)),
        "1x1": lambda: (T.GeneralizedChannelPermute(4), torch.randn(6, 4, 3, 2)),
    }[kind]()
    same(transform.to(dtype), (both_ways,), [x.to(dtype)], 1)


@DTYPES
def test_pyro_conditional_coupling(dtype):
    T = pytest.importorskip("pyro.distributions.transforms", reason="Pyro is not installed")
    same(T.conditional_affine_coupling(5, 3, [8]).to(dtype), (lambda t, x, c: both_ways(t.condition(c), x),),
         [torch.randn(6, 5, dtype=dtype), torch.randn(6, 3, dtype=dtype)], 1)


def test_pyro_example_trains():
    """Its own example of a coupling flow, scored and drawn from."""
    dist = pytest.importorskip("pyro.distributions")
    T = dist.transforms
    model = torch.nn.ModuleList([T.affine_coupling(10, [16]), T.affine_coupling(10, [16])]).double()
    x = torch.randn(30, 10, dtype=torch.float64)

    def flow(m):
        return dist.TransformedDistribution(dist.Normal(torch.zeros(10).double(), torch.ones(10).double())
                                            .to_event(1), list(m))
    fused, report = accelerated(model)
    drawn = []
    for m in (model, fused):
        torch.manual_seed(1)
        drawn.append(flow(m).sample((3,)))
    close(*drawn, 1e-10)
    assert len(report.swapped) == len(report.verified) == 2
    fresh = torch.nn.ModuleList([T.affine_coupling(10, [16]) for _ in range(2)])
    same_training(fresh, lambda m: -flow(m).log_prob(x.clone()).mean())  # Pyro caches by identity


def quadratic_coupling(features, split, identity=False, bins=5):
    T, nn = pytest.importorskip("pyro.distributions.transforms"), pytest.importorskip("pyro.nn")
    sizes = [(features - split) * n for n in (bins, bins, bins - 1)]
    return T.SplineCoupling(features, split, nn.DenseNN(split, [8], sizes), bins, 2.0, "quadratic", identity)


@DTYPES
@pytest.mark.parametrize("kind", ["alone", "coupling", "coupling of the rest", "autoregressive"])
def test_pyro_splines(kind, dtype):
    """Both directions; what a coupling and an autoregressive transform consist of is swapped."""
    T, nn = pytest.importorskip("pyro.distributions.transforms"), pytest.importorskip("pyro.nn")
    make, layers = {
        "alone": (lambda: T.Spline(5, 6, 2.0, "quadratic"), 1),
        "coupling": (lambda: quadratic_coupling(5, 2), 2),
        "coupling of the rest": (lambda: quadratic_coupling(5, 2, True), 2),
        "autoregressive": (lambda: T.SplineAutoregressive(5, nn.AutoRegressiveNN(5, [8], [4, 4, 3]), 4, 2.0,
                                                          "quadratic"), 1)}[kind]
    same(make().to(dtype), (both_ways,), [2.0 * torch.randn(6, 5, dtype=dtype)], layers)


@DTYPES
def test_pyro_conditional_spline(dtype):
    T = pytest.importorskip("pyro.distributions.transforms", reason="Pyro is not installed")
    layer = T.conditional_spline(5, 3, [8], 4, order="quadratic").to(dtype)
    same(layer, (lambda t, x, c: both_ways(t.condition(c), x),),
         [torch.randn(6, 5, dtype=dtype), torch.randn(6, 3, dtype=dtype)], 1)


def test_pyro_conditional_layers_under_a_context_by_keyword_are_verified():
    T = pytest.importorskip("pyro.distributions.transforms", reason="Pyro is not installed")
    for layer in (T.conditional_spline(5, 3, [8], 4, order="quadratic"), T.conditional_affine_coupling(5, 3, [8])):
        layer, report = accelerated(layer)
        layer.condition(context=torch.randn(6, 3))
        assert report.verified == {""}


def test_pyro_conditional_spline_of_an_empty_batch():
    T = pytest.importorskip("pyro.distributions.transforms", reason="Pyro is not installed")
    layer = T.conditional_spline(6, 3, [8], order="quadratic")
    layer, _ = accelerated(layer)
    layer.condition(torch.randn(4, 3))(torch.randn(4, 6))
    empty = layer.condition(torch.randn(0, 3))
    assert empty(torch.randn(0, 6)).shape == empty.inv(torch.randn(0, 6)).shape == (0, 6)


def test_pyro_spline_coupling_trains():
    dist = pytest.importorskip("pyro.distributions")
    model = torch.nn.ModuleList([quadratic_coupling(4, 2), quadratic_coupling(4, 2)]).double()
    x = torch.randn(30, 4, dtype=torch.float64)

    def flow(m):
        base = dist.Normal(torch.zeros(4).double(), torch.ones(4).double()).to_event(1)
        return dist.TransformedDistribution(base, [m[0], dist.transforms.Permute(torch.tensor([2, 3, 0, 1])), m[1]])
    same_training(model, lambda m: -flow(m).log_prob(x.clone()).mean())


def test_pyro_splines_of_lines_are_left_alone():
    T = pytest.importorskip("pyro.distributions.transforms", reason="Pyro is not installed")
    _, report = accelerated(torch.nn.ModuleList([T.spline_coupling(4, hidden_dims=[8])]))
    assert not report.swapped and report.skipped["0.lower_spline"] == (
        "pyro Spline: a rational spline of order 'linear' has no kernel")
