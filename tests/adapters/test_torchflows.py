"""torchflows under accelerate: every bijection with a kernel, both directions, with and without context, images."""

import copy
import pickle

import pytest
import torch
from adapter_checks import accelerated, close, same, same_training, scattered
from torch import nn

import fastflow

flows = pytest.importorskip("torchflows.flows")
from torchflows.bijections import base  # noqa: E402
from torchflows.bijections.finite import matrix  # noqa: E402
from torchflows.bijections.finite.autoregressive import architectures, layers, layers_base  # noqa: E402
from torchflows.bijections.finite.autoregressive.transformers.linear import affine  # noqa: E402
from torchflows.bijections.finite.multiscale import architectures as images  # noqa: E402
from torchflows.bijections.finite.multiscale import base as multiscale  # noqa: E402

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
D, CONTEXT = 6, (3,)
COUPLINGS = ("AffineCoupling", "InverseAffineCoupling", "ShiftCoupling", "RQSCoupling", "LinearAffineCoupling",
             "LinearShiftCoupling", "LinearRQSCoupling")
AUTOREGRESSIVE = ("AffineForwardMaskedAutoregressive", "AffineInverseMaskedAutoregressive",
                  "RQSForwardMaskedAutoregressive", "RQSInverseMaskedAutoregressive")
ELEMENTWISE = ("ElementwiseAffine", "ElementwiseInverseAffine", "ElementwiseShift", "ElementwiseRQSpline")


@pytest.fixture(autouse=True)
def every_call_goes_to_the_kernel(monkeypatch):
    from fastflow.adapters import torchflows

    monkeypatch.setattr(torchflows, "WIDE", 0)
    monkeypatch.setattr(torchflows, "LARGE", 0)


def both(layer, x, c=None):
    z, logdet = layer(x, context=c)
    back, back_logdet = layer.inverse(x, context=c)
    return z, logdet, back, back_logdet


def inputs(shape, context, dtype):
    return [torch.randn(8, *shape, dtype=dtype), *([torch.randn(8, *CONTEXT, dtype=dtype)] if context else [])]


@DTYPES
@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("kind", (*COUPLINGS, *AUTOREGRESSIVE, *ELEMENTWISE))
def test_bijections(kind, context, dtype):
    torch.manual_seed(1)
    layer = scattered(getattr(layers, kind)((D,), context_shape=CONTEXT if context else None)).to(dtype)
    same(layer, (both,), inputs((D,), context, dtype), 1)


@DTYPES
@pytest.mark.parametrize("make", [
    lambda: layers_base.CouplingBijection((5,), affine.SafeAffine, conditioner_kwargs={"n_hidden": 9, "n_layers": 3}),
    lambda: layers_base.CouplingBijection((2, 2, 3), affine.Affine),
    lambda: layers_base.CouplingBijection((4,), affine.Affine,
                                          conditioner_kwargs={"percentage_global_parameters": 0.5}),
    lambda: layers_base.CouplingBijection((4,), affine.Affine, conditioner_kwargs={"output_lower_bound": -1.0}),
    lambda: layers.AffineCoupling((4,), coupling_kwargs={"edge_list": [(0, 1), (2, 3)]}),
    lambda: layers_base.MaskedAutoregressiveBijection((2, 3), affine.SafeAffine),
    lambda: layers_base.ElementwiseBijection((2, 3), affine.SafeAffine),
    lambda: layers.ActNorm((2, 3)).eval(),
    lambda: layers.ElementwiseRQSpline((2, 3), transformer_kwargs={"n_bins": 5, "boundary": 2.0}),
    lambda: matrix.ReversePermutationMatrix((2, 3)),
], ids=["three layers", "images", "global parameters", "bounded", "graph", "masked image", "elements", "actnorm",
        "spline", "reversal"])
def test_other_shapes_and_options(make, dtype):
    torch.manual_seed(2)
    layer = scattered(make()).to(dtype)
    same(layer, (both,), inputs(layer.event_shape, False, dtype), 1)


@DTYPES
@pytest.mark.parametrize("transformer", [affine.Affine, affine.InverseAffine, affine.Shift,
                                         layers.RationalQuadratic])
@pytest.mark.parametrize("alternate", [False, True])
@pytest.mark.parametrize("kind", [multiscale.CheckerboardCoupling, multiscale.ChannelWiseCoupling])
def test_image_couplings(kind, alternate, transformer, dtype):
    torch.manual_seed(3)
    # Its default interval of +-50 leaves float32 few digits for data of order 1.
    options = {"boundary": 4.0} if transformer is layers.RationalQuadratic else {}
    layer = kind((4, 4, 4), transformer_class=transformer, alternate=alternate, transformer_kwargs=options)
    layer = layer.to(dtype).eval()
    same(layer, (both,), inputs((4, 4, 4), False, dtype), 1)


def test_lu_matrices_in_float32():
    """torchflows' own triangular matrices are of float32 alone."""
    layer, x = scattered(matrix.LUMatrix((D,))), torch.randn(40, D)
    fused, report = accelerated(layer)
    for _ in range(2):
        for got, want in zip(both(fused, x), both(layer, x), strict=True):
            close(got, want, 1e-5)
    found = []
    for m in (fused, layer):
        leaf = x.clone().requires_grad_()
        found.append(torch.autograd.grad(m(leaf)[0].square().mean(), (leaf, *m.parameters())))
    for got, want in zip(*found, strict=True):
        close(got, want, 1e-5)
    assert report.verified == {""}


def test_shapes_of_batches():
    flow = scattered(architectures.RealNVP(D)).double().eval()
    fused, _ = accelerated(flow)
    for shape in ((2, 3, D), (1, D)):
        x = torch.randn(*shape, dtype=torch.float64)
        for got, want in zip(both(fused, x), both(flow, x), strict=True):
            close(got, want, 1e-10)


def test_actnorm_initialises_from_its_first_batch():
    x = 3.0 + 2.0 * torch.randn(50, D)
    plain = layers.ActNorm((D,))
    fused, report = accelerated(plain)
    for layer in (plain, fused):
        layer.z, layer.logdet = layer(x)
    close(fused.z, plain.z, 1e-5)
    close(fused.logdet, plain.logdet, 1e-5)
    close(fused.value, plain.value, 1e-6)
    assert report.verified == {""} and abs(float(fused.z.mean())) < 1e-5 and not fused.first_training_batch_pass


@pytest.mark.parametrize("kind", ["NICE", "RealNVP", "InverseRealNVP", "MAF", "IAF", "CouplingRQNSF",
                                  "MaskedAutoregressiveRQNSF"])
def test_architectures_train_the_same(kind):
    torch.manual_seed(4)
    flow = flows.Flow(getattr(architectures, kind)(D, context_shape=CONTEXT, n_layers=2)).double()
    x, c = torch.randn(40, D, dtype=torch.float64), torch.randn(40, *CONTEXT, dtype=torch.float64)
    fused, report = accelerated(flow, example=(x, c))
    assert len(report.swapped) == len(report.verified) == 9, str(report)
    assert report.skipped.keys() == {"", "base", "bijection"}  # which only contain the others
    same_training(flow, lambda m: -m.log_prob(x, context=c).mean())


def test_image_architectures():
    torch.manual_seed(5)
    flow = flows.Flow(images.MultiscaleRealNVP((2, 8, 8), n_layers=2)).eval()
    x = torch.randn(4, 2, 8, 8)
    fused, report = accelerated(flow, example=x)
    assert report.verified and len(report.verified) == len(report.swapped)
    close(fused.log_prob(x), flow.log_prob(x), 1e-5)


def test_published_example():
    """The README's example with one line more; its fit of 500 epochs cut to 5. In float64: AdamW's first steps divide
    gradients by their size, which makes 0.04 of log p(x) out of 1e-7 of x in float32."""
    losses = []
    for one_line in (lambda flow: None, fastflow.accelerate):
        torch.manual_seed(0)
        x = torch.randn(1000, 3).double()
        flow = flows.Flow(architectures.RealNVP(3)).double()
        one_line(flow)
        flow.fit(x, n_epochs=5)
        log_prob = flow.log_prob(x)
        x_new = flow.sample(50)
        assert log_prob.shape == (1000,) and x_new.shape == (50, 3)
        losses.append((log_prob.detach(), x_new.detach()))
    for got, want in zip(*losses[::-1], strict=True):
        close(got, want, 1e-6)


def test_copies_pickles_and_state_dicts():
    flow = scattered(flows.Flow(architectures.RealNVP(D))).eval()
    x = torch.randn(900, D)
    want = flow.log_prob(x)
    fused, _ = accelerated(flow)
    for _ in range(2):  # before and after the first call
        for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            close(other.log_prob(x), want, 1e-5)
            flow.load_state_dict(other.state_dict())
            assert fastflow.restore(other)
            assert [type(m) for m in other.modules()] == [type(m) for m in flow.modules()]
        fused.log_prob(x)


@pytest.mark.filterwarnings("ignore")
def test_it_compiles():
    flow = scattered(flows.Flow(architectures.RealNVP(D))).eval()
    x = torch.randn(900, D)
    fused, _ = accelerated(flow, example=x)
    compiled = torch.compile(fused.bijection, backend="aot_eager")
    for got, want in zip(compiled(x), flow.bijection(x), strict=True):
        close(got, want, 1e-5)


def test_what_is_left_alone():
    inverted = base.invert(layers.AffineCoupling((D,)))
    lrs, dsf = layers.LRSCoupling((D,)), layers.DeepSigmoidalCoupling((D,))
    own = layers_base.CouplingBijection((D,), affine.Scale)
    _, report = accelerated(nn.ModuleList([inverted, lrs, dsf, own]))
    assert not report.swapped
    assert report.skipped["0"] == "torchflows AffineCoupling: its forward is another function than its class's"
    assert report.skipped["1"] == "LRSCoupling is a subclass of torchflows CouplingBijection"
    assert report.skipped["3"] == "torchflows CouplingBijection: Scale has no kernel"


PARTS = {"network": lambda net: net, "its layers": lambda net: net.sequential, "shape": lambda net: net.sequential[-1],
         "context": lambda net: net.context_combiner}


@pytest.mark.parametrize("how", ["hook", "pre-hook", "backward hook", "forward"])
@pytest.mark.parametrize("part", PARTS)
def test_what_hangs_on_a_conditioner_is_run(part, how):
    layer, x = scattered(layers.AffineCoupling((D,), context_shape=CONTEXT)), inputs((D,), True, torch.float32)
    fused, _ = accelerated(layer, verify=False)
    ran, found = [], []
    x[0].requires_grad_()  # else the first part's backward hook is none
    for model in (fused, layer):
        module = PARTS[part](model.conditioner_transform)
        if how == "hook":
            module.register_forward_hook(lambda module, args, output: 2.0 * output)
        elif how == "pre-hook":
            module.register_forward_pre_hook(lambda module, args: (2.0 * args[0], *args[1:]))
        elif how == "backward hook":
            module.register_full_backward_hook(lambda *args: ran.append(1))
        else:
            module.forward = lambda *args, forward=module.forward, **kwargs: 2.0 * forward(*args, **kwargs)
        found.append(model(*x))
        found[-1][0].sum().backward()
    for got, want in zip(*found, strict=True):
        close(got, want, 1e-5)
    assert len(ran) == (2 if how == "backward hook" else 0)


@pytest.mark.parametrize("kind", ["AffineCoupling", "ShiftCoupling", "RQSCoupling", "ElementwiseAffine",
                                  "AffineForwardMaskedAutoregressive"])
def test_a_function_in_the_place_of_a_transformers_is_run(kind):
    layer, x = scattered(getattr(layers, kind)((D,))), torch.randn(8, D)
    fused, _ = accelerated(layer, verify=False)
    for model in (fused, layer):
        model.transformer.forward = lambda x, h: (2.0 * x, x.sum(1))
    for got, want in zip(fused(x), layer(x), strict=True):
        close(got, want, 1e-6)
