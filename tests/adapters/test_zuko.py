"""zuko under accelerate: univariate transforms of every layer, both directions, with and without context."""

import functools

import pytest
import torch
from adapter_checks import accelerated, close, same, same_training
from torch import nn

zuko = pytest.importorskip("zuko")
from zuko import flows, lazy, transforms  # noqa: E402

D = 5


def _base(features):
    return lazy.UnconditionalDistribution(zuko.distributions.DiagNormal, torch.zeros(features), torch.ones(features),
                                          buffer=True)


def _lu():
    return lazy.UnconditionalTransform(transforms.LULinearTransform, torch.eye(D) + 0.3 * torch.randn(D, D))


FLOWS = {
    "RealNVP": lambda c: flows.RealNVP(D, c, transforms=2, hidden_features=(8, 8)),
    "RealNVP, other network": lambda c: flows.RealNVP(D, c, transforms=2, hidden_features=(8,), activation=nn.ELU),
    "RealNVP, random masks": lambda c: flows.RealNVP(D, c, transforms=2, hidden_features=(8,), randmask=True),
    "MAF": lambda c: flows.MAF(D, c, transforms=2, hidden_features=(8,)),
    "NSF": lambda c: flows.NSF(D, c, transforms=2, bins=4, hidden_features=(8,)),
    "NSF, coupling": lambda c: flows.NSF(D, c, transforms=2, passes=2, slope=1e-2, hidden_features=(8,)),
    "NICE": lambda c: flows.NICE(D, c, transforms=2, hidden_features=(8,), univariate=transforms.AdditiveTransform,
                                 shapes=[()]),
    "mixed": lambda c: flows.Flow([
        flows.GeneralCouplingTransform(D, c, mask=[1, 1, 0, 0, 0], hidden_features=(8,),
                                       univariate=functools.partial(transforms.MonotonicRQSTransform, bound=3.0),
                                       shapes=[(4,), (4,), (3,)]),
        flows.autoregressive.ElementWiseTransform(D, c, univariate=transforms.MonotonicRQSTransform,
                                                  shapes=[(4,), (4,), (3,)]),
        ], _base(D)),
}


def density(flow, x, c=None):
    t = flow.transform(c)
    return flow(c).log_prob(x), *t.call_and_ladj(x)


def generation(flow, z, c=None):
    t = flow.transform(c)
    return t.inv(z), *t.inv.call_and_ladj(z), t(z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("kind", FLOWS)
def test_flows(kind, context, dtype):
    inputs = [torch.randn(8, D, dtype=dtype), *([torch.randn(8, context, dtype=dtype)] if context else [])]
    same(FLOWS[kind](context).to(dtype), (density, generation), inputs, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_linear_map(dtype):
    same(lazy.LazyComposedTransform(_lu()).to(dtype), (
        lambda t, x: t().call_and_ladj(x), lambda t, x: t().inv.call_and_ladj(x)), [torch.randn(8, D, dtype=dtype)], 1)


@pytest.mark.parametrize("kind", ["RealNVP", "MAF", "NSF, coupling"])
def test_shapes_of_samples_and_single_points(kind):
    """(n, B, D) samples of a batch of contexts, one context, one point."""
    flow = FLOWS[kind](3).double()
    fused, _ = accelerated(flow)
    for c in (torch.randn(4, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)):
        found = []
        for m in (flow, fused):
            torch.manual_seed(1)
            x, log_prob = m(c).rsample_and_log_prob((6,))
            found.append((x, log_prob, m(c).log_prob(x), m(c).log_prob(x[0])))
        for got, want in zip(*found[::-1], strict=True):
            close(got, want, 1e-10)


@pytest.mark.parametrize("kind", ["MaskedAutoregressiveTransform", "ElementWiseTransform"])
def test_a_shift_whose_context_broadcasts_the_data(kind):
    """zuko's log-determinant has the shape of the data that goes in, its inverse's that of what comes out."""
    torch.manual_seed(0)
    family = flows.autoregressive if kind.startswith("Masked") else flows.gaussianization
    layer = getattr(family, kind)(D, 3, hidden_features=(8,), univariate=transforms.AdditiveTransform, shapes=[()])
    fused, _ = accelerated(layer.double())
    x, c = torch.randn(4, 1, D, dtype=torch.float64), torch.randn(4, 5, 3, dtype=torch.float64)
    for _ in range(2):
        found = [(*t.call_and_ladj(x), t.log_abs_det_jacobian(x, t(x)), *t.inv.call_and_ladj(x))
                 for t in (fused(c), layer(c))]
        for got, want in zip(*found, strict=True):
            close(got, want, 1e-10)
        assert found[0][1].shape == (4, 1)


def test_empty_batches_of_several_dims():
    flow = zuko.flows.RealNVP(3, 2, transforms=2, hidden_features=(16,))
    fused, _ = accelerated(flow)
    c, x = torch.randn(2), torch.randn(6, 0, 3)
    for model in (flow, fused):
        assert model(c).transform(x).shape == x.shape


def test_transforms_tell_what_they_are():
    flow, _ = accelerated(FLOWS["MAF"](0))
    x = torch.randn(3, D)
    inner = flow.transform.transforms[0]().meta(x)
    assert isinstance(inner, transforms.DependentTransform)
    assert isinstance(inner.base, transforms.MonotonicAffineTransform)
    close(inner.base(x), inner(x), 1e-6)
    coupling = accelerated(FLOWS["RealNVP"](0))[0].transform.transforms[0]()
    assert coupling.idx_a.tolist() == [0, 2, 4] and coupling.idx_b.tolist() == [1, 3]


def test_published_example():
    """The README's conditional spline flow trains as it does without the one line."""
    flow = flows.NSF(3, 5, transforms=3, hidden_features=[16] * 3).double()
    x, c = torch.randn(30, 3, dtype=torch.float64), torch.randn(30, 5, dtype=torch.float64)
    same_training(flow, lambda m: -m(c).log_prob(x).mean())
    fused, report = accelerated(flow, example=(x, c))
    assert len(report.verified) == len(report.swapped) == 3
    for m in (flow, fused):
        torch.manual_seed(2)
        m.drawn = m(c[0]).sample((4,))
    close(fused.drawn, flow.drawn, 1e-9)


def test_what_is_left_alone():
    _, report = accelerated(nn.ModuleList([flows.NCSF(3), flows.GF(3)]))
    assert not report.swapped
    reasons = set(report.skipped.values())
    assert any("CircularRQSTransform" in r for r in reasons) and any("RotationTransform" in r for r in reasons)


@pytest.mark.parametrize("keyword", [False, True])
def test_layers_without_parameters_are_verified(keyword):
    matrix = torch.eye(D) + 0.1 * torch.randn(D, D)
    args, kwargs = ((), {"LU": matrix}) if keyword else ((matrix,), {})
    layer, report = accelerated(lazy.UnconditionalTransform(transforms.LULinearTransform, *args, buffer=True, **kwargs))
    layer()
    assert report.verified == {""}


def test_a_context_by_keyword_verifies():
    layer = flows.MAF(D, 3, transforms=1, hidden_features=(8,)).transform.transforms[0]
    fused, report = accelerated(layer)
    fused(c=torch.randn(7, 3))
    assert report.verified == {""}


@pytest.mark.parametrize("kind", [flows.autoregressive.MaskedAutoregressiveTransform,
                                  flows.coupling.GeneralCouplingTransform,
                                  flows.gaussianization.ElementWiseTransform])
def test_a_univariate_transform_that_is_set_later_counts(kind):
    spline = functools.partial(transforms.MonotonicRQSTransform, bound=3.0)
    layer, x = kind(D, univariate=spline, shapes=[(4,), (4,), (3,)]), torch.randn(8, D)
    fused, _ = accelerated(layer, verify=False)
    for later in (False, True):
        for got, want in zip(*(m().call_and_ladj(x) for m in (fused, layer)), strict=True):
            close(got, want, 1e-5)
        assert (type(fused()) is type(layer())) == later or kind is flows.gaussianization.ElementWiseTransform
        for model in (fused, layer):
            model.univariate = functools.partial(transforms.MonotonicRQSTransform, bound=1.0)
