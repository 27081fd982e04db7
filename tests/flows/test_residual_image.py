"""Residual flows and FFJORD for images: the bound of a convolution, estimates without bias, exactness, contexts."""

import math

import pytest
import torch
from flow_checks import check_bijection, check_gradients, scattered
from torch import nn

from fastflow import flows
from fastflow.flows import memory
from fastflow.flows.lipschitz_conv import conv_spectral_bound


def operator(weight, height, width):
    """The matrix of the zero-padded convolution as a linear map of images of that size."""
    images = torch.eye(weight.shape[1] * height * width, dtype=weight.dtype).view(-1, weight.shape[1], height, width)
    return nn.functional.conv2d(images, weight, padding=weight.shape[2] // 2).flatten(1).mT


@pytest.mark.parametrize(("shape", "height", "width"), [
    ((1, 1, 3, 3), 1, 1), ((2, 3, 3, 3), 4, 3), ((5, 2, 3, 3), 8, 8), ((3, 3, 5, 5), 2, 7), ((4, 6, 1, 1), 3, 2),
    ((2, 2, 5, 5), 1, 2)])
def test_the_bound_of_a_convolution(shape, height, width):
    """From above, and not far where the image is no smaller than the kernel."""
    for seed in range(10):
        torch.manual_seed(seed)
        weight = torch.randn(shape, dtype=torch.float64) * 10.0 ** torch.randint(-3, 4, (1,))
        truth = torch.linalg.matrix_norm(operator(weight, height, width), 2)
        bound = conv_spectral_bound(weight, height, width)
        far = 1.006 if shape[2] == 1 else 3.0 if min(height, width) >= shape[2] else math.inf
        assert 1 - 1e-9 < bound / truth < far
        torch.testing.assert_close(conv_spectral_bound(weight.float(), height, width).double(), bound, rtol=1e-4,
                                   atol=0.0)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: conv_spectral_bound(w, height, width), (weight,))


def test_the_bound_is_reached_on_large_images():
    weight = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    truth = torch.linalg.matrix_norm(operator(weight, 24, 24), 2)
    assert 1 < conv_spectral_bound(weight, 24, 24) / truth < 1.02
    layer = flows.SpectralConv2d(2, 3, 3, (4, 4), 0.5).double()
    assert torch.linalg.matrix_norm(operator(layer.bounded_weight().detach(), 4, 4), 2) <= 0.5
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x).flatten(1), x.flatten(1) @ operator(layer.bounded_weight(), 4, 4).mT
                               + layer.bias.repeat_interleave(16))


@pytest.mark.parametrize("activation", [flows.LipSwish, nn.ELU])
def test_the_lipschitz_bound_of_the_network_holds(activation):
    """The Jacobian's 2-norm, however large the weights are."""
    for bound in (0.3, 0.98):
        net = flows.LipschitzConvNet((2, 3, 3), (5, 5), bound=bound, activation=activation, activate_first=True)
        net = scattered(net.double(), 3.0)
        x = 2 * torch.randn(50, 2, 3, 3, dtype=torch.float64)
        matrix = flows.jacobian.jacobian(net, x)[1].detach()
        assert 0.01 * bound < torch.linalg.matrix_norm(matrix, 2).max() <= bound


def block(seed=0, *, bound=0.7, shape=(1, 2, 2), size=0.5, context=None, **options):
    torch.manual_seed(seed)
    net = flows.LipschitzConvNet(shape, (4, 4), bound=bound, **(context or {}))
    return scattered(flows.InvertibleResidual(net, **options).double(), size).eval()


def test_roulette_is_unbiased_and_eval_is_exact():
    """Means over 150 calls of 60 probes within 4 standard errors of the float64 Jacobian's log-determinant, and of its
    gradient in a kernel; eval mode gives that log-determinant itself."""
    layer = block(shape=(2, 2, 2), n_exact_terms=1, stop=0.4, exact_training_features=0)
    x = torch.randn(2, 2, 2, 2, dtype=torch.float64)
    check_bijection(layer, x)
    weight = layer.net.layers[1].weight
    exact = torch.linalg.slogdet(flows.jacobian.jacobian(lambda t: layer(t)[0], x)[1])[1]
    by_weight = torch.autograd.grad(exact.sum(), weight)[0].flatten()
    layer.train()
    values, gradients = [], []
    for _ in range(150):  # the calls are independent; within one the probes share the number of terms
        logdet = layer(x.repeat(60, 1, 1, 1))[1].view(60, 2).mean(0)
        values.append(logdet.detach())
        gradients.append(torch.autograd.grad(logdet.sum(), weight)[0].flatten())
    for sample, truth in ((torch.stack(values), exact.detach()), (torch.stack(gradients), by_weight)):
        standard = sample.std(0) / math.sqrt(len(sample))
        assert ((sample.mean(0) - truth).abs() <= 4 * standard + 1e-12).all() and 0 < standard.max() < 0.05


@pytest.mark.parametrize("context", [{"context_features": 2}, {"context_channels": 1}])
def test_gradients_and_context(context):
    layer = block(context=context, size=1.0)
    x = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    condition = torch.randn(2, *((2,) if "context_features" in context else (1, 2, 2)), dtype=torch.float64)
    check_bijection(layer, x, condition)
    check_gradients(layer, x, condition)
    with pytest.raises(ValueError, match="context"):
        layer(x)


SMALL = {"n_levels": 2, "n_blocks": 1, "hidden_channels": 4, "fc_hidden": (5,), "n_fc_blocks": 1, "bound": 0.6,
         "exact_features": 100}
FIELDS = {"n_levels": 2, "n_blocks": 1, "hidden_channels": (4,), "rtol": 1e-5, "atol": 1e-5}
MODELS = {
    "residual": lambda **kw: flows.ResidualFlowImage((1, 4, 4), **SMALL, **kw),
    "residual factored": lambda **kw: flows.ResidualFlowImage((1, 4, 4), **SMALL, factor_out=True, squeeze_first=True,
                                                              alpha=None, **kw),
    "ffjord": lambda **kw: flows.FFJORDImage((1, 2, 2), **FIELDS, **kw),
    "ffjord plain": lambda **kw: flows.FFJORDImage((1, 2, 2), **{**FIELDS, "n_levels": 1}, alpha=None, **kw),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_are_exact_and_conditional(name):
    """Against the Jacobian of the whole flow; the context matters, image by image."""
    side = 4 if "residual" in name else 2
    kinds = [({}, None), ({"context_features": 3}, (3,))]
    for options, shape in kinds if "residual" in name else [*kinds, ({"context_channels": 2}, (2, side, side))]:
        torch.manual_seed(0)
        flow = scattered(MODELS[name](**options).double(), 0.2).eval()
        x = 0.9 * torch.rand(2, 1, side, side, dtype=torch.float64) - 0.45
        context = None if shape is None else torch.randn(2, *shape, dtype=torch.float64)
        tolerance = 1e-8 if "residual" in name else 5e-4
        report = flows.check_invertible(flow.transform, x, context, tolerance=tolerance)
        assert report.ok, str(report)
        assert flow.transform(x, context)[0].shape == (2, side**2)
        if shape is not None:
            log_prob, other = flow(x, context), flow(x, torch.cat([context[:1] + 1, context[1:]]))
            assert log_prob[0] != other[0]
            torch.testing.assert_close(log_prob[1], other[1], rtol=1e-4, atol=1e-4)  # a solver's steps are shared
            with pytest.raises(ValueError, match="context"):
                flow(x)


@pytest.mark.parametrize("name", ["residual", "ffjord"])
def test_samples_temperature_and_bits(name):
    flow = scattered(MODELS[name](), 0.1).eval()
    shape = flow.image_shape
    draws = [flow.sample(3, temperature=t, generator=torch.Generator().manual_seed(0)) for t in (0.0, 0.5, 1.0)]
    assert all(d.shape == (3, *shape) and d.abs().max() <= 0.5 + 0.05 for d in draws)
    torch.testing.assert_close(draws[0][0], draws[0][1])
    z = [flow.transform(d)[0] for d in draws[1:]]
    torch.testing.assert_close(2 * z[0], z[1], rtol=1e-2, atol=1e-2)
    x = torch.randint(0, 256, (3, *shape))
    bits = flow.bits_per_dim(x, generator=torch.Generator().manual_seed(1))
    values = flows.dequantize(x, generator=torch.Generator().manual_seed(1))
    expected = (math.log(256) - flow(values) / math.prod(shape)) / math.log(2)
    torch.testing.assert_close(bits, expected, rtol=1e-4, atol=1e-4)


def test_the_series_in_eval_mode_is_within_its_bound():
    """Above ``exact_features`` eval mode takes the truncated series: its mean over probes is that of the Jacobian."""
    flow = scattered(flows.ResidualFlowImage((1, 2, 2), **{**SMALL, "n_levels": 1, "exact_features": 0}).double(), 0.2)
    x = 0.8 * torch.rand(1, 1, 2, 2, dtype=torch.float64) - 0.4
    with torch.no_grad():
        estimates = flow.eval()(x.expand(2000, 1, 2, 2))
        for module in flow.modules():
            if isinstance(module, flows.InvertibleResidual):
                module.exact_features = 4
                assert module.truncation_bound(4) < 1e-8
        exact = flow(x)
    assert abs(estimates.mean() - exact) < 4 * estimates.std() / math.sqrt(2000) + 1e-8


@pytest.mark.parametrize("name", ["residual", "ffjord"])
def test_memory_modes(name):
    """Kept inputs give the gradients of the plain pass from the same random numbers; recovered ones can't."""
    flow = scattered(MODELS[name](), 0.1)
    for module in flow.modules():  # however small the images
        if isinstance(module, flows.ContinuousTransform):
            module.trace = "hutchinson"
        elif isinstance(module, flows.InvertibleResidual):
            module.exact_training_features = 0
    x = flows.dequantize(torch.randint(0, 256, (2, *flow.image_shape)))
    gradients = []
    for mode in (None, memory.Mode("save_z", flow)):
        torch.manual_seed(1)
        with memory.saving(mode):
            log_prob = flow(x)
        gradients.append(torch.autograd.grad(log_prob.sum(), [*flow.parameters()], allow_unused=True))
    torch.testing.assert_close(*gradients)
    with pytest.raises(ValueError, match="memory: 'invert' can't run .* estimate"):
        memory.Mode("invert", flow)


@pytest.mark.parametrize(("call", "match"), [
    (lambda: flows.ResidualFlowImage((3, 6, 6)), "image_shape"),
    (lambda: flows.ResidualFlowImage((3, 4, 4), n_blocks=0), "n_blocks"),
    (lambda: flows.ResidualFlowImage((3, 4, 4), n_fc_blocks=-1), "n_fc_blocks"),
    (lambda: flows.ResidualFlowImage((3, 4, 4), bound=1.0), "bound"),
    (lambda: flows.LipschitzConvNet((3, 4), (5,), (3, 3)), "image_shape"),
    (lambda: flows.LipschitzConvNet((3, 4, 4), (5,)), "kernel_sizes"),
    (lambda: flows.LipschitzConvNet((3, 4, 4), bound=0.0), "bound"),
    (lambda: flows.SpectralConv2d(2, 2, 2, (4, 4)), "kernel_size"),
    (lambda: flows.FFJORDImage((3, 4, 4), n_levels=4), "image_shape"),
    (lambda: flows.VelocityConvNet((3, 4, 4), ()), "hidden_channels"),
    (lambda: flows.FFJORDImage((1, 4, 4), 1)(torch.zeros(1, 1, 4, 2)), "x"),
    (lambda: block()(torch.zeros(1, 1, 2, 3).double()), "x")])
def test_refusals(call, match):
    with pytest.raises(ValueError, match=match):
        call()
